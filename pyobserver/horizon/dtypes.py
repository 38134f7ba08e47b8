"""Horizon's quantized types: signed integers of 4, 8 and 16 bits."""

from __future__ import annotations

import enum

import torch


class QuantDType(enum.Enum):
    """A quantized type; its value is the number of bits."""

    qint4 = 4
    qint8 = 8
    qint16 = 16

    @property
    def storage(self) -> torch.dtype:
        """The torch type that holds its integers."""
        return torch.int16 if self.value > 8 else torch.int8

    @property
    def bounds(self) -> tuple[int, int]:
        """The least and the greatest integer."""
        half = 1 << (self.value - 1)
        return -half, half - 1

    def __repr__(self) -> str:
        return self.name

    __str__ = __repr__


qint4, qint8, qint16 = QuantDType
_OF_TORCH = {
    torch.int8: qint8,
    torch.qint8: qint8,
    torch.int16: qint16,
    torch.int4: qint4,  # type: ignore[attr-defined]
}


def quant_dtype(owner: str, dtype: QuantDType | torch.dtype, name: str = "dtype") -> QuantDType:
    """The quantized type of ``dtype``: itself, or that of ``torch.int4``, ``int8`` or ``int16``.

    Raises:
        ValueError: a type that is none of those; names the owner, the argument, what was expected
            and what came.
    """
    if isinstance(dtype, QuantDType):
        return dtype
    if dtype not in _OF_TORCH:
        served = ", ".join([*map(str, QuantDType), *map(str, _OF_TORCH)])
        raise ValueError(f"{owner}: {name}: expected one of {served}, got {dtype!r}")
    return _OF_TORCH[dtype]


class qinfo:
    """What there is to know of a quantized type, as ``torch.iinfo`` says it.

    Args:
        dtype: a :class:`QuantDType`, or the torch type of one.

    Attributes:
        dtype, bits, min, max.

    Raises:
        ValueError: a type that is none of those.
    """

    def __init__(self, dtype: QuantDType | torch.dtype):
        self.dtype = quant_dtype("qinfo", dtype)
        self.bits: int = self.dtype.value
        self.min, self.max = self.dtype.bounds

    def __repr__(self) -> str:
        return f"qinfo(min={self.min}, max={self.max}, bits={self.bits}, dtype={self.dtype})"

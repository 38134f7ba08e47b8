"""How a tensor is to be quantized, as data."""

from __future__ import annotations

import warnings
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

import numpy as np

from .. import _checks, ranges
from ..ops.tensor_quant import MOST_BITS

# "max": the greatest magnitude; "histogram": any method, chosen when amax is asked for, by default
# the least squared error; or a method by its name, "entropy" being NVIDIA's of "kl"
CALIB_METHODS = ("max", "histogram", "entropy", *ranges.METHODS)


def check_num_bits(owner: str, num_bits: object) -> int:
    if not isinstance(num_bits, int) or isinstance(num_bits, bool):
        raise TypeError(f"{owner}: num_bits: expected an integer, got {type(num_bits).__name__}")
    if not 0 <= num_bits <= MOST_BITS:
        raise ValueError(
            f"{owner}: num_bits: expected an integer in [0, {MOST_BITS}], got {num_bits}"
        )
    return num_bits


def check_flag(owner: str, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name}: expected a bool, got {type(value).__name__}")
    return value


def _check_axis(owner: str, axis: object) -> None:
    axes = axis if isinstance(axis, (tuple, list)) else () if axis is None else (axis,)
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in axes):
        raise TypeError(
            f"{owner}: axis: expected None, an integer or a tuple of integers, got {axis!r}"
        )


@dataclass(frozen=True, eq=False)
class ScaledQuantDescriptor:
    """How a tensor is to be quantized. All attributes are read-only.

    Args:
        num_bits: 0 to 32; 0 quantizes everything to zero, for debugging, with a warning.
        name: a string or None.
        fake_quant: to the integers and back; else to the integers.
        axis: None for one amax, or the axes whose indices have one each: an integer or a tuple;
            negative ones count from the last.
        amax: float, list or ndarray: the greatest magnitude, if it is known; kept in float32. With
            ``learn_amax`` what is learned begins with it.
        learn_amax: amax is learned, per tensor.
        scale_amax: a number that amax is multiplied with.
        calib_method: ``"max"``, ``"histogram"`` (any method, chosen when amax is asked for), or a
            method of :func:`pyobserver.ranges.solve`; ``"entropy"`` is ``"kl"``.
        unsigned: the integers from 0 on, for values that are never negative.
        narrow_range: of a signed grid, leave out the least integer.

    Raises:
        TypeError: an argument of another type, an unknown one, or an axis beside ``learn_amax``.
        ValueError: num_bits outside its range, an unknown calib_method.

    Source: ``ScaledQuantDescriptor`` of NVIDIA's pytorch-quantization (``QuantDescriptor``). There
    the keywords' types and calib_method are not looked at.
    """

    num_bits: int = 8
    name: str | None = None
    _: KW_ONLY
    fake_quant: bool = True
    axis: int | tuple[int, ...] | None = None
    amax: Any = None
    learn_amax: bool = False
    scale_amax: float | None = None
    calib_method: str = "max"
    unsigned: bool = False
    narrow_range: bool = False

    def __post_init__(self) -> None:
        owner = "QuantDescriptor"
        if check_num_bits(owner, self.num_bits) == 0:
            warnings.warn("num_bits is 0: everything will be quantized to 0", stacklevel=3)
        if self.name is not None and not isinstance(self.name, str):
            raise TypeError(
                f"{owner}: name: expected a string or None, got {type(self.name).__name__}"
            )
        for flag in ("fake_quant", "learn_amax", "unsigned", "narrow_range"):
            check_flag(owner, flag, getattr(self, flag))
        _check_axis(owner, self.axis)
        if self.learn_amax and self.axis is not None:
            raise TypeError(
                f"{owner}: axis: expected None beside learn_amax, which is per tensor, "
                f"got {self.axis!r}"
            )
        scaled = isinstance(self.scale_amax, (int, float)) and not isinstance(self.scale_amax, bool)
        if self.scale_amax is not None and not scaled:
            raise TypeError(
                f"{owner}: scale_amax: expected a float or None, "
                f"got {type(self.scale_amax).__name__}"
            )
        _checks.check_choice(owner, "calib_method", self.calib_method, CALIB_METHODS)
        if isinstance(self.axis, list):
            object.__setattr__(self, "axis", tuple(self.axis))
        if self.amax is not None:
            if not isinstance(self.amax, (float, list, np.ndarray)):
                raise TypeError(
                    f"{owner}: amax: expected a float, a list or an ndarray, "
                    f"got {type(self.amax).__name__}"
                )
            try:
                amax = np.array(self.amax, dtype=np.float32)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"{owner}: amax: expected numbers in a regular shape, got {self.amax!r}"
                ) from error
            amax.setflags(write=False)
            object.__setattr__(self, "amax", amax)

    def dict(self) -> dict[str, Any]:
        """The arguments that make this descriptor: num_bits, name, and what is not the default."""
        found: dict[str, Any] = {"num_bits": self.num_bits, "name": self.name}
        for field in fields(self)[2:]:
            value = getattr(self, field.name)
            if value is not None and (field.name == "amax" or value != field.default):
                found[field.name] = value.tolist() if field.name == "amax" else value
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScaledQuantDescriptor) and self.dict() == other.dict()

    __hash__ = None  # type: ignore[assignment]


QuantDescriptor = ScaledQuantDescriptor

QUANT_DESC_8BIT_PER_TENSOR = QuantDescriptor(num_bits=8)
QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR = QuantDescriptor(num_bits=8, unsigned=True)
QUANT_DESC_8BIT_CONV1D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_CONV2D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_CONV3D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_CONVTRANSPOSE1D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_CONVTRANSPOSE2D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)
QUANT_DESC_8BIT_CONVTRANSPOSE3D_WEIGHT_PER_CHANNEL = QuantDescriptor(num_bits=8, axis=0)

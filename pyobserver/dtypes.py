"""The quantized types an observer can serve, and the integer ranges on them."""

from __future__ import annotations

import torch

# The q-types are the aliases that torch is deprecating in favour of the plain ones.
_BOUNDS: dict[torch.dtype, tuple[int, int]] = {
    torch.int8: (-(2**7), 2**7 - 1),
    torch.uint8: (0, 2**8 - 1),
    torch.int16: (-(2**15), 2**15 - 1),
    torch.uint16: (0, 2**16 - 1),
    torch.int32: (-(2**31), 2**31 - 1),
    torch.qint8: (-(2**7), 2**7 - 1),
    torch.quint8: (0, 2**8 - 1),
    torch.quint4x2: (0, 2**4 - 1),
    torch.qint32: (-(2**31), 2**31 - 1),
}
_EIGHT_BIT = (torch.int8, torch.uint8, torch.qint8, torch.quint8)


def dtype_bounds(dtype: torch.dtype) -> tuple[int, int]:
    """The least and greatest integer of a quantized type.

    Raises:
        ValueError: the type is not one that the observers can serve (float8 ones are not).
    """
    if dtype not in _BOUNDS:
        served = ", ".join(str(known) for known in _BOUNDS)
        raise ValueError(f"dtype: expected one of {served}, got {dtype}")
    return _BOUNDS[dtype]


def check_bounds(owner: str, within: tuple[int, int], quant_min: int, quant_max: int) -> None:
    """Refuse bounds out of order, without zero, or outside those of their owner, a type."""
    if not quant_min < quant_max:
        raise ValueError(
            f"quant_min: expected a value below quant_max, "
            f"got quant_min={quant_min}, quant_max={quant_max}"
        )
    if not quant_min <= 0 <= quant_max:
        raise ValueError(
            f"quant_min, quant_max: expected a range that holds 0, got [{quant_min}, {quant_max}]"
        )
    least, greatest = within
    if quant_min < least or quant_max > greatest:
        raise ValueError(
            f"quant_min, quant_max: expected a range inside that of {owner}, "
            f"[{least}, {greatest}], got [{quant_min}, {quant_max}]"
        )


def quant_bounds(
    dtype: torch.dtype, quant_min: int | None, quant_max: int | None, reduce_range: bool
) -> tuple[int, int]:
    """The integer range of an observer: the one asked for, or that of the type.

    ``reduce_range`` takes one bit off 8-bit ranges: bounds of the caller's are floor-halved.

    Raises:
        ValueError: bounds out of order, without zero, or outside the type.

    Source: ``torch.ao.quantization.utils.calculate_qmin_qmax``, which accepts bounds outside the
    type.
    """
    least, greatest = dtype_bounds(dtype)
    if quant_min is None or quant_max is None:
        if quant_min is not None or quant_max is not None:
            raise ValueError(
                "quant_min, quant_max: expected both or neither, "
                f"got quant_min={quant_min}, quant_max={quant_max}"
            )
        if reduce_range and dtype in _EIGHT_BIT:
            return least // 2, greatest // 2
        return least, greatest
    check_bounds(str(dtype), (least, greatest), quant_min, quant_max)
    if reduce_range:
        return quant_min // 2, quant_max // 2
    return quant_min, quant_max


PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)
PER_CHANNEL = (
    torch.per_channel_affine,
    torch.per_channel_symmetric,
    torch.per_channel_affine_float_qparams,
)
SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)


def check_qscheme(owner: str, qscheme: torch.qscheme, allowed: tuple[torch.qscheme, ...]) -> None:
    if qscheme not in allowed:
        wanted = ", ".join(str(known) for known in allowed)
        raise NotImplementedError(f"{owner}: qscheme: expected one of {wanted}, got {qscheme}")

"""The grid of a site that is chosen again, and the type and scheme that hold it."""

from __future__ import annotations

import torch

from ..dtypes import PER_CHANNEL, dtype_bounds
from ..ranges import Grid

_SIGNED = (torch.int8, torch.int16, torch.int32)
_UNSIGNED = (torch.uint8, torch.uint16, torch.int32)


def regrid(
    grid: Grid,
    bits: int | None = None,
    quant_min: int | None = None,
    quant_max: int | None = None,
    symmetric: bool | None = None,
    narrow_range: bool = False,
    scale_constraint: str | None = None,
    eps: float | None = None,
) -> Grid:
    """Another grid; what is left out is as ``grid`` has it.

    So is whether there are negative integers, of a number of bits.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    was_symmetric = grid.zero_point is not None
    same_bounds = bits is None and quant_min is None and quant_max is None
    if same_bounds:
        quant_min, quant_max = grid.quant_min, grid.quant_max
    elif bits is not None and quant_min is None and quant_max is None:
        _, quant_max, *_ = Grid.of(bits, symmetric=grid.quant_min < 0)
        quant_min = -quant_max - 1 if grid.quant_min < 0 else 0
    new = Grid.of(
        8 if bits is None else bits,
        quant_min,
        quant_max,
        was_symmetric if symmetric is None else symmetric,
        narrow_range,
        grid.scale_constraint if scale_constraint is None else scale_constraint,
        float(grid.eps) if eps is None else eps,
    )
    if same_bounds and symmetric in (None, was_symmetric):
        new = new._replace(zero_point=grid.zero_point)
    return new


def dtype_holding(dtype: torch.dtype, grid: Grid) -> torch.dtype:
    """The type itself where the grid fits in it, else the least of its kind that holds it."""
    kinds = _SIGNED if grid.quant_min < 0 else _UNSIGNED
    for held in (dtype, *kinds):
        least, greatest = dtype_bounds(held)
        if least <= grid.quant_min and grid.quant_max <= greatest:
            return held
    raise ValueError(
        f"solve: quant_min, quant_max: expected bounds that int32 holds, "
        f"got [{grid.quant_min}, {grid.quant_max}]"
    )


def scheme_of(qscheme: torch.qscheme, grid: Grid) -> torch.qscheme:
    """The scheme of the grid, per tensor or per channel as ``qscheme`` is."""
    if qscheme in PER_CHANNEL:
        affine, symmetric = torch.per_channel_affine, torch.per_channel_symmetric
    else:
        affine, symmetric = torch.per_tensor_affine, torch.per_tensor_symmetric
    return affine if grid.zero_point is None else symmetric

"""How the reference kernels see groups: each in dimensions of its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def split(
    x: Tensor, axis: int | None, block_size: Sequence[int] | None
) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """A view of ``x``, its dimensions that lie within a group, and the shape of one value a group.

    With ``block_size`` each dimension becomes two: over the blocks, and within one. The shape is
    that of the view with 1 for each dimension within a group.
    """
    if block_size is not None:
        blocks = [whole // size for size, whole in zip(block_size, x.shape, strict=True)]
        pairs = list(zip(blocks, block_size, strict=True))
        view = x.reshape([size for pair in pairs for size in pair])
        within = tuple(range(1, 2 * x.dim(), 2))
    else:
        view = x
        kept = None if axis is None else axis % x.dim()
        within = tuple(d for d in range(x.dim()) if d != kept)
    shape = tuple(1 if d in within else size for d, size in enumerate(view.shape))
    return view, within, shape

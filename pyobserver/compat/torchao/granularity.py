"""torchao's granularities as the blocks that the ops take."""

from __future__ import annotations

from collections.abc import Sequence

from torchao.quantization.granularity import (
    Granularity,
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
)

GRANULARITIES = (PerTensor, PerAxis, PerRow, PerToken, PerGroup, PerBlock)


def blocks(granularity: Granularity, dims: int) -> list[int | None]:
    """The sizes of a block of a tensor of so many dimensions; None: all of the dimension.

    Raises:
        ValueError: the granularity needs more dimensions.

    Source: ``torchao.quantization.utils.get_block_size``.
    """
    sizes: list[int | None] = [None] * dims
    if isinstance(granularity, PerTensor):
        return sizes
    try:
        if isinstance(granularity, PerAxis):
            sizes[granularity.axis] = 1
            return sizes
        sizes = [1] * dims
        if isinstance(granularity, PerBlock):
            given = tuple(granularity.block_size)
            sizes[dims - len(given) :] = given
        elif isinstance(granularity, PerGroup):
            sizes[-1] = granularity.group_size
        else:
            sizes[-1 if isinstance(granularity, PerToken) else granularity.dim] = None
    except IndexError:
        sizes = []
    if len(sizes) != dims:
        raise ValueError(f"x: expected the dimensions that {granularity} has, got {dims}")
    return sizes


def block_size(granularity: Granularity, shape: Sequence[int]) -> list[int]:
    """The sizes of a block of a tensor of this shape."""
    sizes = blocks(granularity, len(shape))
    return [whole if size is None else size for whole, size in zip(shape, sizes, strict=True)]


def grid(granularity: Granularity, shape: Sequence[int]) -> tuple[int, ...]:
    """How many blocks there are in each dimension."""
    sizes = block_size(granularity, shape)
    return tuple(whole // size for whole, size in zip(shape, sizes, strict=True))

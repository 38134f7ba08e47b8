"""``minmax`` where the work is cut: for blocks and lanes on CUDA, for threads on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import ON_HOST, Backend, needs_device_in_software
from torch import Tensor

from .cases import DTYPES, assert_all_same, grid_of, sample, sprinkled, unchanged
from .test_minmax import UPDATES, channels_of, fold, fresh

# shape, axis or sizes of a block; what the kernels make of them on a small device
CUTS: dict[str, tuple[tuple[int, ...], int | tuple[int, ...] | None]] = {
    "one_block": ((32_000,), None),
    "blocks": ((100_003,), None),
    "long_channels": ((3, 30_001), 0),
    "long_channels_in_rows": ((5, 3, 5001), 1),
    "many_rows_of_a_channel": ((64, 3, 512), 1),
    "many_rows_that_are_unaligned": ((64, 3, 513), 1),
    "a_block_each": ((15, 700), 0),
    "small_blocks_each": ((9, 40), 0),
    "lanes_for_a_channel": ((100, 700), 0),
    "lanes_in_two_rows": ((2, 70, 130), 1),
    "lanes_for_one_value": ((3001,), 0),
    "lanes_for_three_values": ((1001, 3), 0),
    "lanes_for_blocks": ((64, 256), (1, 32)),
    "lanes_for_blocks_that_are_unaligned": ((40, 297), (1, 33)),
    "three_columns": ((6003, 3), 1),
    "seven_columns": ((3001, 7), 1),
    "sixteen_columns": ((1500, 16), 1),
    "a_tile_of_columns": ((97, 256), 1),
    "tiles_of_columns": ((33, 2080), 1),
    "tiles_of_columns_that_are_unaligned": ((20, 2051), 1),
    "columns_of_rows": ((40, 50, 9), 1),
    "columns_of_many_rows": ((9, 301, 12), 1),
    "columns_of_long_rows": ((8, 24, 196), 1),
    "columns_of_unaligned_rows": ((31, 25, 7), 1),
    "pieces": ((64, 1024), (4, 8)),
    "pieces_of_tiles": ((8, 4096), (4, 2)),
    "unaligned_pieces": ((32, 1030), (8, 5)),
    "pieces_in_two_dimensions": ((4, 64, 96), (2, 16, 8)),
    "pieces_in_three_dimensions": ((4, 6, 32, 64), (2, 3, 16, 4)),
    "pieces_that_blocks_share": ((4, 64, 256), (4, 32, 8)),
    "long_pieces_that_blocks_share": ((4, 4, 16, 512), (4, 2, 16, 256)),
    "more_channels_than_blocks": ((80, 4200), 0),
    "more_channels_than_lanes": ((20_000, 3), 0),
    "more_pieces_than_blocks": ((600, 256), (4, 8)),
    "long_pieces": ((4, 6, 8, 256), (2, 3, 4, 128)),
    "rows_of_pieces": ((4, 3, 6, 160), (2, 3, 2, 80)),
}

# those whose ranges several blocks work for
SHARED = (
    "blocks",
    "long_channels",
    "long_channels_in_rows",
    "many_rows_of_a_channel",
    "many_rows_that_are_unaligned",
    "three_columns",
    "seven_columns",
    "sixteen_columns",
    "a_tile_of_columns",
    "tiles_of_columns",
    "columns_of_rows",
    "pieces_that_blocks_share",
    "long_pieces_that_blocks_share",
)

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "unaligned": lambda x: torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "reversed_axes": lambda x: (
        x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    ),
}


def grouping(groups: int | tuple[int, ...] | None) -> dict[str, Any]:
    return {"block_size": groups} if isinstance(groups, tuple) else {"axis": groups}


def states(
    x: Tensor, axis: int | None = None, block_size: Any = None
) -> int | tuple[int, ...] | None:
    return channels_of(x, axis) if block_size is None else grid_of(x, block_size)


def with_specials(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """NaN and infinities everywhere; along each axis an index that has nothing else."""
    x = sprinkled(sample(shape))
    for d, size in enumerate(shape):
        if size > 2:
            x.select(d, 1).fill_((torch.nan, torch.inf, -torch.inf, -torch.nan)[d])
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CUTS)
def test_cuts(backend: Backend, name: str, dtype: torch.dtype) -> None:
    """Every way to update, with and without values that are not finite."""
    shape, groups = CUTS[name]
    options = grouping(groups)
    batches = [with_specials(shape, dtype), sample(shape, dtype, 1) / 2]
    for nonfinite in ("ignore", "propagate"):
        for update in UPDATES:
            state = fresh(states(batches[0], **options), backend.device)
            expected = fresh(states(batches[0], **options))
            for x in batches:
                given: dict[str, Any] = {"update": update, "averaging_constant": 0.25, **options}
                backend.op("minmax")(x.to(backend.device), *state, nonfinite=nonfinite, **given)
                fold(x, expected, nonfinite=nonfinite, **given)
            assert_all_same(state, expected, (nonfinite, update))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", CUTS)
def test_cuts_of_views(backend: Backend, name: str, view: str) -> None:
    """The least and the greatest value anywhere, also at the ends of a cut."""
    shape, groups = CUTS[name]
    options = grouping(groups)
    for dtype in (torch.float32, torch.bfloat16):
        x = VIEWS[view](with_specials(shape, dtype).to(backend.device))
        state, expected = fresh(states(x, **options), backend.device), fresh(states(x, **options))
        backend.op("minmax")(x, *state, **options)
        fold(x, expected, **options)
        assert_all_same(state, expected, dtype)


@pytest.mark.parametrize("name", CUTS)
def test_an_expanded_axis_counts_as_often_as_it_is(backend: Backend, name: str) -> None:
    shape, groups = CUTS[name]
    options = grouping(groups)
    values = with_specials(shape, torch.float16)
    expected = fresh(states(values, **options))
    fold(values, expected, **options)
    x = values.to(backend.device).unsqueeze(-1).expand(*shape, 3)
    wide = {"block_size": (*groups, 3)} if isinstance(groups, tuple) else options
    state = fresh(states(x, **wide), backend.device)
    backend.op("minmax")(x, *state, **wide)
    assert_all_same(
        [state[0].reshape(expected[0].shape), state[1].reshape(expected[1].shape), state[2]],
        [*expected[:2], expected[2] * 3],
    )


@pytest.mark.parametrize("name", ["one_block", "blocks", "long_channels", "tiles_of_columns"])
def test_raise_counts_all_values(backend: Backend, name: str) -> None:
    """Before anything is written; a switch that is off hides them."""
    shape, groups = CUTS[name]
    options = {**grouping(groups), "nonfinite": "raise"}
    x = with_specials(shape, torch.float32)
    count = int((~x.isfinite()).sum())
    state = fresh(channels_of(x, options["axis"]), backend.device)
    off = torch.zeros(1, dtype=torch.uint8, device=backend.device)
    with unchanged(*state):
        backend.op("minmax")(x.to(backend.device), *state, enabled=off, **options)
        with pytest.raises((ValueError, RuntimeError), match=f"got {count} NaN .* of {x.numel()}"):
            backend.op("minmax")(x.to(backend.device), *state, **options)
    expected = fresh(channels_of(x, options["axis"]))
    finite = sample(shape)
    backend.op("minmax")(finite.to(backend.device), *state, **options)
    fold(finite, expected, options["axis"])
    assert_all_same(state, expected)


@needs_device_in_software
@pytest.mark.parametrize("name", CUTS)
def test_one_launch(name: str) -> None:
    """Another with the rounding; memory is set where blocks share a range, and there alone."""
    shape, groups = CUTS[name]
    options = grouping(groups)
    x = sample(shape)
    low, high, count = fresh(states(x, **options) or 1)
    scale, zero_point, eps = torch.ones_like(low), low.int(), torch.full((1,), 1e-7)
    shared = int(name in SHARED)
    with ON_HOST.asked(launches=range(2), memsets=shared):
        ON_HOST.op("minmax")(x, low, high, count, **options)
    with ON_HOST.asked(launches=range(2), memsets=None):
        ON_HOST.op("choose_qparams")(low, high, scale, zero_point, eps, 0, 255)
    state = low, high, count, scale, zero_point, eps, 0, 255
    with ON_HOST.asked(launches=range(3), memsets=shared):
        ON_HOST.op("_observe_fake_quantize")(x, *state, **options)


@needs_device_in_software
def test_raise_waits_once() -> None:
    with ON_HOST.asked(launches=range(3), memsets=1, syncs=1):
        ON_HOST.op("minmax")(sample(1000), *fresh(), nonfinite="raise")

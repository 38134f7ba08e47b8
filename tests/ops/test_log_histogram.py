from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from backends import Backend
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from pyobserver import ops
from pyobserver.ops import log_columns, log_edges, log_histogram, mantissa_bits_of
from pyobserver.ops.log_histogram import _kept_edges

from .cases import (
    BLOCKED_SHAPES,
    BLOCKS,
    DTYPES,
    LARGE,
    LARGE_BLOCKED,
    LAYOUTS,
    REJECTED_BLOCKS,
    REJECTED_SWITCHES,
    SHAPE,
    SIZES,
    SPECIAL,
    any_isa,
    assert_all_same,
    assert_rejected,
    assert_same,
    grid_of,
    in_blocks,
    laid_out,
    not_dense_real_float,
    opcheck,
    opcheck_inputs,
    properties,
    sample,
    sprinkled,
    threads,
    unchanged,
)

State = tuple[Tensor, Tensor, Tensor]
BITS = range(11)


def fresh(bits: int, groups: Sequence[int] = (), device: str = "cpu") -> State:
    low = torch.full(tuple(groups), torch.inf, device=device)
    shape = (*groups, log_columns(bits))
    return torch.zeros(shape, dtype=torch.int64, device=device), low, -low


def columns_of(values: np.ndarray, bits: int) -> np.ndarray:
    """By sign and magnitude, the mantissa rounded half away from zero."""
    pattern = values.astype(np.float32).view(np.uint32).astype(np.int64)
    magnitude, greatest = pattern & 0x7FFFFFFF, 255 << bits
    nearest = (magnitude + (1 << (22 - bits))) >> (23 - bits)
    column = 1 + greatest + np.where(pattern >> 31 == 1, -nearest, nearest)
    column[values == -np.inf] = 0
    column[values == np.inf] = 2 * greatest + 2
    column[np.isnan(values)] = 2 * greatest + 3
    return column


def rows_of(x: Tensor, axis: int | None, block_size: Sequence[int] | None) -> Tensor:
    values = x.detach().cpu().float()
    if block_size is not None:
        return in_blocks(values, block_size)
    return (
        values.reshape(1, -1)
        if axis is None
        else values.movedim(axis, 0).reshape(x.shape[axis], -1)
    )


def add(
    x: Tensor,
    state: State,
    axis: int | None = None,
    nonfinite: str = "ignore",
    block_size: Sequence[int] | None = None,
) -> None:
    """What the op promises, in numpy, a row for each group."""
    if x.numel() == 0:
        return
    columns = state[0].shape[-1]
    rows = rows_of(x, axis, block_size).numpy()
    counts, low, high = (t.numpy().reshape(-1) for t in state)
    found = columns_of(rows, mantissa_bits_of(columns)) + columns * np.arange(len(rows))[:, None]
    counts += np.bincount(found.reshape(-1), minlength=len(counts))
    kept = np.isfinite(rows) if nonfinite == "ignore" else np.full(rows.shape, True)
    zero = np.float32(0)  # a zero is positive
    low[:] = np.minimum(low, np.where(kept, rows, np.float32(np.inf)).min(1) + zero)
    high[:] = np.maximum(high, np.where(kept, rows, np.float32(-np.inf)).max(1) + zero)


def check(
    backend: Backend, batches: list[Tensor], bits: int, groups: Sequence[int] = (), **options: Any
) -> State:
    """Feeds the batches, comparing the state after each."""
    state, expected = fresh(bits, groups, backend.device), fresh(bits, groups)
    for i, x in enumerate(batches):
        backend.op("log_histogram")(x.to(backend.device), *state, **options)
        add(x, expected, **options)
        assert_all_same(state, expected, (i, tuple(x.shape), bits, options))
    return state


def every(dtype: torch.dtype) -> Tensor:
    """All values of a type of 16 bits."""
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(backend: Backend, size: int | None, dtype: torch.dtype) -> None:
    batches = [sample(size, dtype, seed) * (10 * seed + 1) for seed in range(2)]
    for bits in (3, 8) if size in (2, 9, 65, 1000) else (3,):
        state = check(backend, batches, bits)
        assert state[0].sum() == sum(x.numel() for x in batches)
    if size and size < 70:
        check(backend, batches, 0, (size,), axis=0)


@pytest.mark.parametrize("bits", [0, 1, 4, 6, 7, 8, 10])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_value(backend: Backend, dtype: torch.dtype, bits: int) -> None:
    """Wherever it stands in a vector, with all others beside it and with those of its kind."""
    x = every(dtype)
    finite = x[x.isfinite()]
    check(backend, [x[1:].flip(0), finite[finite.abs() >= 2**-14]], bits)
    if bits in (4, 8):
        check(backend, [x, finite[3:]], bits, nonfinite="propagate")
        check(backend, [x[i : i + 257] for i in range(0, len(x), 8191)], bits)


@pytest.mark.parametrize("bits", [0, 3, 5, 7, 10])
def test_edges(backend: Backend, bits: int) -> None:
    """Each falls into the bin that is farther from zero, the float32 before it into the other."""
    greatest = 255 << bits
    edges = log_edges(bits)
    assert edges.shape == (2 * greatest + 2,)
    assert edges.dtype == torch.float64
    assert (edges.diff() > 0).all()
    assert_same(edges, -edges.flip(0))
    assert edges[-1] == 2.0**128 * (1 + 2.0 ** -(bits + 1))
    above = edges[greatest + 1 : -1]
    farther = above.float()
    assert_same(farther.double(), above)
    nearer = farther.nextafter(torch.zeros(()))
    bins = torch.arange(greatest)
    for sign in (1, -1):
        for values, found in ((farther, bins + 1), (nearer, bins)):
            state = fresh(bits, device=backend.device)
            backend.op("log_histogram")((sign * values).to(backend.device), *state)
            columns = 1 + greatest + sign * found
            assert_same(state[0], torch.bincount(columns, minlength=log_columns(bits)))


def test_edges_are_kept() -> None:
    assert log_edges(3) is log_edges(3)


def test_edges_are_ordinary_whoever_asks_first() -> None:
    """What is made under a mode or another default device is not kept for others."""
    for context in (torch.device("meta"), FakeTensorMode(), torch.inference_mode()):
        _kept_edges.cache_clear()
        with context:
            log_edges(3)
        edges = log_edges(3)
        assert type(edges) is torch.Tensor
        assert edges.device.type == "cpu"
        assert not edges.is_inference()
        assert_same(edges, -edges.flip(0))


def test_edges_of_a_mode_are_its_own() -> None:
    log_edges(3)
    with FakeTensorMode():
        assert isinstance(log_edges(3), FakeTensor)


def test_columns() -> None:
    """2 * 255 * 2^k finite bins that have a sign, zero, two infinities and NaN."""
    assert [log_columns(bits) for bits in (0, 5, 10)] == [514, 16324, 522244]
    assert [mantissa_bits_of(log_columns(bits)) for bits in BITS] == list(BITS)
    for columns in (0, 513, 515, 16323, 1044484):
        with pytest.raises(ValueError, match=f"^counts: expected a last size .* got {columns}$"):
            mantissa_bits_of(columns)
    for call in (log_columns, log_edges):
        for bits in (-1, 11):
            with pytest.raises(ValueError, match=rf"mantissa_bits: .* \[0, 10\], got {bits}"):
                call(bits)


def test_seven_bits_lose_nothing_of_bfloat16() -> None:
    """Nor do ten of float16's normal values: a bin holds one, and its edges enclose it."""
    for dtype, bits, least in ((torch.bfloat16, 7, 0.0), (torch.float16, 10, 2.0**-14)):
        x = every(dtype)
        x = x[x.isfinite() & (x.abs() >= least)]
        state = fresh(bits)
        log_histogram(x, *state)
        assert state[0].max() == (2 if least == 0 else 1)  # of both zeros
        found = state[0][1:-2].nonzero().reshape(-1)
        edges, values = log_edges(bits), x.double().unique()
        assert len(found) == len(values)
        assert ((edges[found] < values) & (values < edges[found + 1])).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    # the batch must keep its strides, so it is made where it is used
    for axis in (None, 0, 1, 2, -1):
        groups = () if axis is None else (SHAPE[axis],)
        for bits in (2, 8) if axis is None else (1,):
            state, expected = fresh(bits, groups, backend.device), fresh(bits, groups)
            for seed in range(2):
                x = laid_out(layout, dtype, backend.device, seed)
                backend.op("log_histogram")(x, *state, axis)
                add(x, expected, axis)
                assert_all_same(state, expected, (axis, bits))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_of_layouts(backend: Backend, layout: str) -> None:
    for dtype in (torch.float32, torch.float16):
        for block_size in BLOCKS if dtype == torch.float32 else BLOCKS[5:8]:
            grid = grid_of(torch.empty(SHAPE), block_size)
            state, expected = fresh(0, grid, backend.device), fresh(0, grid)
            x = laid_out(layout, dtype, backend.device)
            backend.op("log_histogram")(x, *state, block_size=block_size)
            add(x, expected, block_size=block_size)
            assert_all_same(state, expected, (dtype, block_size))


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1, 70, 1), 1),
        ((70, 1), 0),
        ((1, 1, 70), 2),
        ((2, 17, 33), 1),
        ((40, 3), 1),
        ((1000, 2), -1),
        ((300, 37), -1),
        ((2, 300, 16), -1),
        ((70, 19, 3), 1),
        ((9, 5, 300), 1),
        ((2, 2, 2, 2, 2, 9), 4),
    ],
    ids=str,
)
def test_channels(backend: Backend, shape: tuple[int, ...], axis: int) -> None:
    for dtype in DTYPES:
        batches = [sample(shape, dtype), sprinkled(sample(shape, dtype, 1))]
        check(backend, batches, 1, (shape[axis],), axis=axis)
    check(backend, batches, 1, (shape[axis],), axis=axis, nonfinite="propagate")


@pytest.mark.parametrize(("shape", "block_size"), BLOCKED_SHAPES, ids=str)
def test_blocks(backend: Backend, shape: tuple[int, ...], block_size: tuple[int, ...]) -> None:
    grid = grid_of(torch.empty(shape), block_size)
    for dtype in DTYPES:
        batches = [sample(shape, dtype, seed) for seed in range(2)]
        if batches[1].numel():
            sprinkled(batches[1])
        check(backend, batches, 1, grid, block_size=block_size)


@cache
def large(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    bits: int,
    axis: int | None = None,
    block_size: tuple[int, ...] | None = None,
) -> tuple[Tensor, State]:
    """Made once for all backends: a tensor that is worth threads, and its statistics."""
    x = sprinkled(sample(shape, dtype))
    x.view(-1)[-2] = 1000.0
    groups = () if axis is None else (shape[axis],)
    expected = fresh(bits, grid_of(x, block_size) if block_size else groups)
    add(x, expected, axis, block_size=block_size)
    return x, expected


def over_threads(
    backend: Backend, xs: Sequence[Tensor], expected: State, bits: int, **options: Any
) -> None:
    for x in xs:
        for count in (1, 2, 3) if backend.isa else (1,):
            state = fresh(bits, expected[1].shape, backend.device)
            with threads(count):
                backend.op("log_histogram")(x.to(backend.device), *state, **options)
            assert_all_same(state, expected, (x.stride(), x.dtype, count))


@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads(backend: Backend, dtype: torch.dtype, bits: int) -> None:
    x, expected = large((LARGE,), dtype, bits)
    apart = torch.stack([x, x], 1)[:, 0]
    over_threads(backend, [x, apart] if bits == 3 else [x], expected, bits)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((5, 40_001), 0), ((40_001, 5), 1), ((700, 301), -1), ((8, 3, 9001), 1), ((9, 41, 500), 1),
     ((400, 41, 12), 1), ((41, 9, 500), 0)],
    ids=str,
)  # fmt: skip
def test_channels_over_threads(backend: Backend, shape: tuple[int, ...], axis: int) -> None:
    """In rows of each thread's own, in those of a thread's groups, and between borders."""
    for dtype, bits in ((torch.float32, 0), (torch.bfloat16, 3)):
        x, expected = large(shape, dtype, bits, axis)
        xs = [x, x.mT.contiguous().mT] if bits == 0 else [x]
        over_threads(backend, xs, expected, bits, axis=axis)


@pytest.mark.parametrize(("shape", "block_size"), LARGE_BLOCKED, ids=str)
def test_blocks_over_threads(
    backend: Backend, shape: tuple[int, ...], block_size: tuple[int, ...]
) -> None:
    if len(shape) == 2 and block_size[0] * block_size[1] == 1:
        pytest.skip("rows of counts for 90,000 groups")
    x, expected = large(shape, torch.float32, 0, None, block_size)
    over_threads(backend, [x, x.mT.contiguous().mT], expected, 0, block_size=block_size)


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_equal_values_in_a_row(backend: Backend, share: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for n in (3000, 200_003):
            x = sample(n, dtype)
            x[torch.rand(n, generator=torch.Generator().manual_seed(1)) < share] = 0.0
            check(backend, [x, x + 2], 3)


def test_expanded_values_count_as_often_as_they_are(backend: Backend) -> None:
    """Read once, by as many threads as their memory is worth."""
    row = sprinkled(sample(3 * 32768 + 5))
    expected = fresh(3)
    add(row.expand(3, -1), expected)
    over_threads(backend, [row.expand(3, -1)], expected, 3)
    if backend.isa:
        state = fresh(5)
        backend.op("log_histogram")(torch.tensor(1.0).expand(2**20, 2**20), *state)
        assert state[0].sum() == state[0].max() == 2**40


def test_counts_pass_2_to_the_32(backend: Backend) -> None:
    for n in (100, 300_000):
        x = sample(n)
        state, expected = fresh(2, device=backend.device), fresh(2)
        for counts in (state[0], expected[0]):
            counts += 2**40
        backend.op("log_histogram")(x.to(backend.device), *state)
        add(x, expected)
        assert_all_same(state, expected)


@pytest.mark.parametrize("bits", [0, 5, 6, 10])
def test_one_launch_for_any_bits(backend: Backend, bits: int) -> None:
    """On a device with rows in shared memory, where they fit and where they do not."""
    x = sprinkled(sample(40_001))
    x[torch.arange(len(x)) % 2 == 0] = 0.0
    for one in (x, x[1:], x[:300], x.bfloat16()[3:]):
        state, expected = fresh(bits, (), backend.device), fresh(bits)
        for shift in (0.0, 1.0):
            batch = one + shift
            with backend.asked(launches=1):
                backend.op("log_histogram")(batch.to(backend.device), *state)
            add(batch, expected)
            assert_all_same(state, expected, (bits, shift))


# many values in a group: runs of whole packs and of others, of one value, in several pieces; more
# groups than a small device has blocks
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 2064), {"axis": 0}),
        ((3, 2063), {"axis": 0}),
        ((2063, 3), {"axis": 1}),
        ((11, 3, 192), {"axis": 1}),
        ((11, 3, 193), {"axis": 1}),
        ((13, 1100), {"axis": 0}),
        ((2, 40_000), {"axis": 0}),
        ((66, 64), {"block_size": (33, 32)}),
        ((66, 66), {"block_size": (33, 33)}),
        ((6, 30, 4, 40), {"block_size": (3, 15, 4, 20)}),
        ((6, 40, 4, 30), {"block_size": (6, 20, 1, 30)}),
        ((4, 40, 6, 30), {"block_size": (2, 40, 3, 10)}),
    ],
    ids=str,
)
def test_one_launch_for_groups(
    backend: Backend, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    grid = grid_of(torch.empty(shape), options.get("block_size", shape))
    groups = grid if "block_size" in options else (shape[options["axis"]],)
    for dtype in (torch.float32, torch.float16):
        state, expected = fresh(1, groups, backend.device), fresh(1, groups)
        x = sprinkled(sample(shape, dtype).relu())
        wide = sample((*shape[:-1], shape[-1] + 1), dtype, 1).to(backend.device)
        batches = (x, x.mT.contiguous().mT, wide[..., 1:], x[:1].expand(shape))
        for i, batch in enumerate(batches):
            with backend.asked(launches=1):
                backend.op("log_histogram")(batch.to(backend.device), *state, **options)
            add(batch, expected, **options)
            assert_all_same(state, expected, (dtype, i))


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (torch.nan, torch.nan), (5.0, -5.0)])
@pytest.mark.parametrize("nonfinite", ["ignore", "propagate"])
@pytest.mark.parametrize("n", [70, 40_000])
def test_merges_into_any_range(
    backend: Backend, n: int, nonfinite: str, low: float, high: float
) -> None:
    for x in (sample(n), sprinkled(sample(n)), torch.zeros(n), torch.full((n,), torch.nan)):
        state, expected = fresh(0, (), backend.device), fresh(0)
        for one in (state, expected):
            one[0].fill_(2**33)
            one[1].fill_(low)
            one[2].fill_(high)
        backend.op("log_histogram")(x.to(backend.device), *state, nonfinite=nonfinite)
        add(x, expected, nonfinite=nonfinite)
        assert_all_same(state, expected)


def test_what_is_asked_of_the_device(backend: Backend) -> None:
    """One launch; another one and a look at its count for "raise"; nothing for an empty tensor."""
    state = fresh(0, (2,), backend.device)
    x = sample((2, 3)).to(backend.device)
    off = torch.zeros((), dtype=torch.bool, device=backend.device)
    with backend.asked(launches=1), unchanged(*state):
        backend.op("log_histogram")(x, *state, 0, enabled=off)
    with backend.asked(launches=2, memsets=1, syncs=1):
        backend.op("log_histogram")(x, *state, 0, nonfinite="raise")
    with backend.asked(), unchanged(*state):
        backend.op("log_histogram")(x[:, :0], *state, 0, nonfinite="raise")


@pytest.mark.parametrize("nonfinite", ["ignore", "propagate"])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(backend: Backend, name: str, nonfinite: str) -> None:
    special = torch.tensor(SPECIAL[name])
    usual = sample(special.shape, seed=1)
    for dtype in DTYPES:
        for order in ([special, usual], [usual, special, usual]):
            batches = [x.to(dtype) for x in order]
            check(backend, batches, 5, nonfinite=nonfinite)
            rows = [torch.stack([x, x.flip(0)]) for x in batches]
            check(backend, rows, 1, (2,), axis=0, nonfinite=nonfinite)
            columns = [torch.stack([x, x * 0 + 1], 1) for x in batches]
            check(backend, columns, 1, (2,), axis=1, nonfinite=nonfinite)


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("nonfinite", ["ignore", "propagate"])
def test_a_value_that_is_not_finite_at_every_place(
    backend: Backend, nonfinite: str, value: float
) -> None:
    for dtype in DTYPES:
        for n, places in ((1, (0,)), (33, range(33)), (600, (0, 255, 256, 511, 512, 599))):
            for place in places:
                x = sample(n, dtype)
                x[place] = value
                check(backend, [x], 2, nonfinite=nonfinite)
    for n in (600, 200_000):
        for dtype in (torch.float32, torch.float16):
            masked = sample(n, dtype)
            masked[torch.arange(n) % 3 > 0] = value
            check(backend, [masked], 3, nonfinite=nonfinite)


def test_one_nan_whatever_the_threads(backend: Backend) -> None:
    """Of several NaN the bits would else be those that the last thread met."""
    x = sample(LARGE)
    for i, bits in enumerate((0x7FC00001, 0xFFC00005 - 2**32, 0x7FC00007)):
        x.view(torch.int32)[i * (LARGE // 3)] = bits
    for count in (1, 2) if backend.isa else ():
        state = fresh(0)
        with threads(count):
            backend.op("log_histogram")(x, *state, nonfinite="propagate")
        assert [t.view(torch.int32).item() for t in state[1:]] == [0x7FC00000] * 2
        assert state[0][-1] == 3


def test_a_channel_without_finite_values_keeps_its_range(backend: Backend) -> None:
    x = torch.tensor([[torch.nan, torch.inf], [1.0, 2.0]])
    check(backend, [x, x, x.flip(0)], 0, (2,), axis=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_raise_leaves_the_state_as_it_was(backend: Backend, value: float) -> None:
    options: list[dict[str, Any]] = [{}, {"axis": 1}, {"block_size": [2, 3]}]
    for option, groups in zip(options, ((), (6,), (2, 2)), strict=True):
        state, expected = fresh(3, groups, backend.device), fresh(3, groups)
        x = sample((4, 6))
        backend.op("log_histogram")(x.to(backend.device), *state, nonfinite="raise", **option)
        add(x, expected, **option)
        assert_all_same(state, expected, option)
        x[3, 5] = value
        x = x.to(backend.device)
        with (
            unchanged(*state),
            pytest.raises((ValueError, RuntimeError), match="1 NaN or infinite of 24"),
        ):
            backend.op("log_histogram")(x, *state, nonfinite="raise", **option)
        match = "^log_histogram: x: expected finite values, got 1 NaN or infinite of 24"
        with unchanged(*state), pytest.raises(ValueError, match=match):
            ops.log_histogram(x, *state, nonfinite="raise", **option)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
def test_enabled(backend: Backend, dtype: torch.dtype) -> None:
    x = sample((4, 6)).to(backend.device)
    x[3, 1] = torch.nan
    state, expected = fresh(2, (2, 2), backend.device), fresh(2, (2, 2))
    for flag in (0, 1, 0):
        enabled = torch.tensor([flag], dtype=dtype, device=backend.device)
        options: dict[str, Any] = {"enabled": enabled, "block_size": [2, 3]}
        backend.op("log_histogram")(x * (2 - flag), *state, **options)
        if flag:
            add(x, expected, block_size=[2, 3])
        else:
            backend.op("log_histogram")(x, *state, nonfinite="raise", **options)
        assert_all_same(state, expected, flag)


def test_state_of_a_tensor_may_have_a_row_for_it(backend: Backend) -> None:
    state, expected = fresh(3, (1,), backend.device), fresh(3, (1,))
    backend.op("log_histogram")(sample(9).to(backend.device), *state)
    add(sample(9), expected)
    assert_all_same(state, expected)
    scalars = fresh(3, (1,), backend.device)
    backend.op("log_histogram")(sample(9).to(backend.device), scalars[0][0], *scalars[1:])
    assert_all_same(scalars, expected)


def test_blocks_of_one_index_are_channels(backend: Backend) -> None:
    x = sample(SHAPE).to(backend.device)
    for axis in range(4):
        block_size = [1 if d == axis else size for d, size in enumerate(SHAPE)]
        grid = grid_of(x, block_size)
        ours, theirs = fresh(1, grid, backend.device), fresh(1, (SHAPE[axis],), backend.device)
        backend.op("log_histogram")(x, *ours, block_size=block_size)
        backend.op("log_histogram")(x, *theirs, axis)
        assert_all_same([t.view_as(u) for t, u in zip(ours, theirs, strict=True)], theirs)


def test_channels_add_up_to_the_tensor(backend: Backend) -> None:
    x = sprinkled(sample(SHAPE)).to(backend.device)
    whole, channels = fresh(6, (), backend.device), fresh(6, (5,), backend.device)
    backend.op("log_histogram")(x, *whole)
    backend.op("log_histogram")(x, *channels, -2)
    merged = channels[0].sum(0), channels[1].amin(), channels[2].amax()
    assert_all_same(merged, whole)


def test_dtypes_add_up(backend: Backend) -> None:
    """The value decides: a tensor has the statistics of its copies in wider types."""
    for narrow in (torch.float16, torch.bfloat16):
        x = every(narrow)
        for bits in (0, 5, 7, 8):
            expected = fresh(bits, device=backend.device)
            backend.op("log_histogram")(x.to(backend.device), *expected)
            for dtype in (torch.float32, torch.float64):
                state = fresh(bits, device=backend.device)
                backend.op("log_histogram")(x.to(backend.device, dtype), *state)
                assert_all_same(state, expected, (narrow, dtype, bits))


def test_float64_is_rounded_to_float32(backend: Backend) -> None:
    x = torch.tensor([0.1, -0.3, 1e300, -1e39, 1e-60, 3.4028235677973366e38], dtype=torch.float64)
    state = check(backend, [x], 4)
    assert state[0][[0, -2, -1]].tolist() == [1, 2, 0]


def test_input_and_grad_mode_are_left_alone(backend: Backend) -> None:
    x = sample(33).to(backend.device).requires_grad_()
    state = fresh(2, device=backend.device)
    with unchanged(x):
        backend.op("log_histogram")(x, *state)
    assert not any(t.requires_grad for t in state)


def some_bits() -> st.SearchStrategy[int]:
    return st.sampled_from(BITS[:8])


@properties
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=300),
    st.randoms(use_true_random=False),
    st.integers(1, 8),
    some_bits(),
    st.sampled_from(DTYPES),
)
def test_order_and_split_change_nothing(
    values: list[float], random: Any, chunks: int, bits: int, dtype: torch.dtype
) -> None:
    x = torch.tensor(values).to(dtype)
    expected, whole, shuffled, chunked = (fresh(bits) for _ in range(4))
    add(x, expected)
    log_histogram(x, *whole)
    order = list(range(len(values)))
    random.shuffle(order)
    log_histogram(x[order], *shuffled)
    parts = list(x.chunk(chunks))
    random.shuffle(parts)
    for part in parts:
        log_histogram(part, *chunked)
    for state in (whole, shuffled, chunked):
        assert_all_same(state, expected)


@properties
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=4),
    st.integers(0, 2**20),
    st.randoms(use_true_random=False),
    st.sampled_from(DTYPES),
)
def test_layout_changes_nothing(
    shape: list[int], seed: int, random: Any, dtype: torch.dtype
) -> None:
    """Permuted in memory, with gaps, and cut into two along an axis."""
    x = sample(shape, dtype, seed)
    order = list(range(len(shape)))
    random.shuffle(order)
    axis = random.choice([None, *order])
    groups = () if axis is None else (shape[axis],)
    expected = fresh(2, groups)
    add(x, expected, axis)
    laid = torch.empty([shape[d] for d in order], dtype=dtype)
    laid = laid.permute([order.index(d) for d in range(len(shape))]).copy_(x)
    gaps = torch.stack([x, x], random.randrange(x.dim() + 1))
    gaps = gaps.select(next(d for d in range(gaps.dim()) if gaps.shape[d] == 2), 0)
    for one in (laid, gaps if gaps.shape == x.shape and bool((gaps == x).all()) else x):
        state = fresh(2, groups)
        log_histogram(one, *state, axis)
        assert_all_same(state, expected, one.stride())
    cut = random.choice([d for d in order if d != axis] or [None])
    if cut is not None:
        state = fresh(2, groups)
        at = random.randint(0, shape[cut])
        for part in x.split([at, shape[cut] - at], cut):
            log_histogram(part, *state, axis)
        assert_all_same(state, expected, (cut, at))


def test_meta() -> None:
    log_histogram(torch.empty(3, 5, device="meta"), *fresh(5, (), "meta"))
    log_histogram(torch.empty(4, 6, device="meta"), *fresh(5, (2, 2), "meta"), block_size=(2, 3))
    x, counts = torch.empty(2, 3, device="meta"), fresh(0, (3,), "meta")[0]
    with pytest.raises(ValueError, match=r"counts: expected shape \(2, 514\)"):
        log_histogram(x, counts, *fresh(0, (2,), "meta")[1:], 0)


def test_compiles() -> None:
    def call(x: Tensor, counts: Tensor, low: Tensor, high: Tensor) -> Tensor:
        log_histogram(x, counts, low, high, 1, "propagate")
        return low + high

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    ours, theirs = fresh(1, (6,)), fresh(1, (6,))
    for seed in range(3):
        x = sample((4, 6), seed=seed)
        assert_all_same([compiled(x, *ours), *ours], [call(x, *theirs), *theirs], seed)


def arguments(**changed: Any) -> dict[str, Any]:
    counts, low, high = fresh(0, (3,))
    counts[1, 7], low[1], high[1] = 5, -1.0, 2.0
    given = {"x": sample((2, 3)), "counts": counts, "min_val": low, "max_val": high, "axis": 1}
    return {**given, **changed}


def _counts(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.ones(shape, dtype=dtype)


REJECTED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "counts_dtype": (
        {"counts": _counts(3, 514, dtype=torch.float64)},
        TypeError,
        "counts: expected torch.int64, got torch.float64",
    ),
    "counts_int32": (
        {"counts": _counts(3, 514, dtype=torch.int32)},
        TypeError,
        "counts: expected torch.int64, got torch.int32",
    ),
    "counts_none": ({"counts": None}, TypeError, "counts: expected torch.int64, got NoneType"),
    "counts_columns": (
        {"counts": _counts(3, 515)},
        ValueError,
        r"counts: expected a last size of one of 514, 1024, .*, got shape \(3, 515\)",
    ),
    "counts_0-d": ({"counts": _counts()}, ValueError, r"counts: .* got shape \(\)"),
    "counts_empty": ({"counts": _counts(3, 0)}, ValueError, r"counts: .* got shape \(3, 0\)"),
    "counts_rows": (
        {"counts": _counts(2, 514)},
        ValueError,
        r"counts: expected shape \(3, 514\), .* \(shape \(2, 3\)\), got \(2, 514\)",
    ),
    "counts_dim": (
        {"counts": _counts(3, 1, 514)},
        ValueError,
        r"counts: expected shape \(3, 514\), .* got \(3, 1, 514\)",
    ),
    "counts_flat": (
        {"counts": _counts(514)},
        ValueError,
        r"counts: expected shape \(3, 514\), .* got \(514,\)",
    ),
    "counts_strides": (
        {"counts": _counts(3, 1028)[:, ::2]},
        ValueError,
        "counts: expected a contiguous tensor, got strides",
    ),
    "counts_meta": (
        {"counts": torch.empty(3, 514, dtype=torch.int64, device="meta")},
        ValueError,
        "counts: expected a tensor on cpu beside x, got one on meta",
    ),
    "no_axis_rows": (
        {"axis": None, "min_val": torch.zeros(()), "max_val": torch.zeros(())},
        ValueError,
        r"counts: expected shape \(514,\), got \(3, 514\)",
    ),
    "no_axis_dim": (
        {
            "axis": None,
            "counts": _counts(1, 1, 514),
            "min_val": torch.zeros(()),
            "max_val": torch.zeros(()),
        },
        ValueError,
        r"counts: expected shape \(514,\), got \(1, 1, 514\)",
    ),
    "no_axis": ({"axis": None}, ValueError, r"min_val: expected 1 element, got shape \(3,\)"),
    "axis_high": ({"axis": 2}, ValueError, r"axis: expected .*\[-2, 1\].* got 2"),
    "axis_low": ({"axis": -3}, ValueError, r"axis: expected .*\[-2, 1\].* got -3"),
    "channels": ({"axis": 0}, ValueError, r"min_val: expected shape \(2,\).* got shape \(3,\)"),
    "0-d": ({"x": torch.tensor(1.0), "axis": 0}, ValueError, r"axis: expected .* got 0"),
    "max_val_size": (
        {"max_val": torch.zeros(2)},
        ValueError,
        r"max_val: expected shape \(3,\).* got shape \(2,\)",
    ),
    "min_val_dtype": (
        {"min_val": torch.zeros(3, dtype=torch.float64)},
        TypeError,
        "min_val: expected torch.float32, got torch.float64",
    ),
    "max_val_strides": (
        {"max_val": torch.zeros(6)[::2]},
        ValueError,
        r"max_val: expected a contiguous tensor, got strides \(2,\)",
    ),
    "nonfinite": ({"nonfinite": "drop"}, ValueError, "nonfinite: expected one of .* got 'drop'"),
    **REJECTED_SWITCHES,
    **REJECTED_BLOCKS,
    "block_shape": (
        {"axis": None, "block_size": [1, 1]},
        ValueError,
        r"min_val: expected shape \(2, 3\), .* block_size \(1, 1\), got shape \(3,\)",
    ),
    "block_counts": (
        {
            "axis": None,
            "block_size": [2, 1],
            "min_val": torch.zeros(1, 3),
            "max_val": torch.zeros(1, 3),
        },
        ValueError,
        r"counts: expected shape \(1, 3, 514\), .* got \(3, 514\)",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name: str) -> None:
    changed, error, match = REJECTED[name]
    assert_rejected(ops.log_histogram, arguments(**changed), error, f"^log_histogram: {match}")


@pytest.mark.parametrize("name", REJECTED)
@any_isa
def test_kernel_rejects(backend: Backend, name: str) -> None:
    if not backend.cuda:
        assert_rejected(backend.op("log_histogram"), arguments(**REJECTED[name][0]), Exception)


@any_isa
def test_rejects_other_inputs(backend: Backend) -> None:
    for x, came in not_dense_real_float().values():
        expected = f"^log_histogram: x: expected a dense tensor of float32, .*, {came}"
        assert_rejected(ops.log_histogram, arguments(x=x), TypeError, expected)
        if not backend.cuda:
            assert_rejected(backend.op("log_histogram"), arguments(x=x), Exception)


def test_opcheck() -> None:
    for x in opcheck_inputs().values():
        opcheck("log_histogram", x, *fresh(0))
        if x.dim() > 1:
            opcheck("log_histogram", x, *fresh(0, (x.shape[1],)), 1, "propagate")
    enabled = torch.ones(1, dtype=torch.uint8)
    x = sample((4, 6)).requires_grad_()
    opcheck("log_histogram", x, *fresh(0, (2, 2)), None, "ignore", enabled, [2, 3])

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from backends import Backend, backends
from hypothesis import given
from hypothesis import strategies as st
from streams import streams
from torch import Tensor
from torch.ao.quantization import HistogramObserver

from pyobserver import ops

from .cases import (
    DTYPES,
    LARGE,
    LAYOUTS,
    REJECTED_SWITCHES,
    SIZES,
    any_isa,
    assert_all_same,
    assert_rejected,
    assert_same,
    laid_out,
    not_dense_real_float,
    opcheck,
    opcheck_inputs,
    properties,
    sample,
    threads,
    unchanged,
    value_lists,
)

reference = Backend("reference").op("histogram")
reference_combine = Backend("reference").op("histogram_combine")

State = tuple[Tensor, Tensor, Tensor, Tensor]
STREAMS = streams()
COMBINES = ("midpoint", "aligned")


def fresh(bins: int, device: str = "cpu") -> State:
    return (
        torch.zeros(bins, dtype=torch.float64, device=device),
        torch.tensor(torch.inf, device=device),
        torch.tensor(-torch.inf, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )


def state_of(counts: list[float], low: float, high: float, device: str = "cpu") -> State:
    return (
        torch.tensor(counts, dtype=torch.float64, device=device),
        torch.tensor(low, device=device),
        torch.tensor(high, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )


def histc(x: Tensor, bins: int, low: Tensor, high: Tensor) -> Tensor:
    """float32 and no half type: ``torch.histc`` is not safe with those."""
    return torch.histc(x.float(), bins, float(low), float(high)).double()


def exact_counts(x: Tensor, bins: int, low: float, high: float) -> Tensor:
    """The bins of finite values in float64, for ranges that float32 cannot divide."""
    values = x.double().numpy().reshape(-1)
    index = np.floor((values - low) * bins / (high - low)).astype(np.int64).clip(0, bins - 1)
    return torch.from_numpy(np.bincount(index, minlength=bins)).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(backend: Backend, size: int | None, dtype: torch.dtype) -> None:
    x = sample(size, dtype)
    for bins in (2, 7, 256, 2048):
        state = fresh(bins, backend.device)
        backend.op("histogram")(x.to(backend.device), *state)
        if size == 0:
            assert_all_same(state, fresh(bins))
            continue
        low, high = torch.aminmax(x.float())
        expected = histc(x, bins, low, high)
        assert_all_same(state, (expected, low, high, torch.tensor(0)), bins)
        assert state[0].sum() == x.numel()  # D1: no value falls outside


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    state = fresh(64, backend.device)
    x = laid_out(layout, dtype, backend.device)
    backend.op("histogram")(x, *state)
    values = x.cpu().float()
    low, high = torch.aminmax(values)
    assert_all_same(state, (histc(values, 64, low, high), low, high, torch.tensor(0)))


@pytest.mark.parametrize("bins", [3, 64, 2048])
@pytest.mark.parametrize("stream", STREAMS)
def test_growth_is_that_of_torch(backend: Backend, stream: str, bins: int) -> None:
    """After every batch: up to 2^24 values the counts are computed in float32, as torch does."""
    state, theirs = fresh(bins, backend.device), HistogramObserver(bins=bins)
    for x in STREAMS[stream]:
        backend.op("histogram")(x.to(backend.device), *state)
        theirs(x)
        expected = (theirs.histogram.double(), theirs.min_val, theirs.max_val, torch.tensor(0))
        assert_all_same(state, expected)


@pytest.mark.parametrize("upsample_rate", [1, 2, 3, 16, 100])
def test_upsample_rate(backend: Backend, upsample_rate: int) -> None:
    state, theirs = fresh(32, backend.device), HistogramObserver(bins=32)
    theirs.upsample_rate = upsample_rate
    for x in STREAMS["growing"][:2]:
        backend.op("histogram")(x.to(backend.device), *state, "midpoint", upsample_rate)
        theirs(x)
    assert_same(state[0], theirs.histogram.double())


def test_many_growths_are_those_of_torch(backend: Backend) -> None:
    state, theirs = fresh(128, backend.device), HistogramObserver(bins=128)
    for i in range(20):
        x = sample(500, seed=i) * 1.1**i + i
        backend.op("histogram")(x.to(backend.device), *state)
        theirs(x)
        expected = (theirs.histogram.double(), theirs.min_val, theirs.max_val, torch.tensor(0))
        assert_all_same(state, expected, i)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(("start", "precision"), [(0, 1e-6), (2**30, 1e-12)])
def test_many_growths(backend: Backend, combine: str, start: int, precision: float) -> None:
    """Every kernel has the counts of the reference; above 2^24 they are computed in float64."""
    state, expected = fresh(128, backend.device), fresh(128)
    total = start
    if start:
        state, expected = (
            state_of([start / 128] * 128, -1.0, 1.0, device) for device in (backend.device, "cpu")
        )
    for i in range(20):
        x = sample(500, seed=i) * 1.1**i + i
        total += x.numel()
        backend.op("histogram")(x.to(backend.device), *state, combine)
        reference(x, *expected, combine)
        assert_all_same(state, expected, i)
        assert float(state[0].sum()) == pytest.approx(total, rel=precision)
        assert (state[0] >= 0).all()


class Aligned:
    """Combining as torch had it up to 2.3, on a grid that is laid out in full, in float32."""

    def __init__(self, bins: int, upsample_rate: int):
        self.bins, self.upsample_rate = bins, upsample_rate
        self.counts = np.zeros(bins)
        self.low, self.high = np.inf, -np.inf

    def add(self, x: Tensor) -> None:
        low, high = (float(edge) for edge in torch.aminmax(x))
        if self.low <= self.high:
            low, high = min(low, self.low), max(high, self.high)
            high = self.carry(low, high)
        new = histc(x, self.bins, torch.tensor(low), torch.tensor(high)).numpy()
        self.counts = (self.counts + new).astype(np.float32).astype(np.float64)
        self.low, self.high = low, high

    def carry(self, low: float, high: float) -> float:
        if (low, high) == (self.low, self.high):
            return high
        part = (self.high - self.low) / (self.bins * self.upsample_rate)
        per_bin = int(np.ceil((high - low) / (self.bins * part)))
        start = round((self.low - low) / part)
        grid = np.zeros(self.bins * per_bin)
        parts = np.repeat(self.counts / self.upsample_rate, self.upsample_rate)
        # what rounding of the start puts past the end belongs to the last bin
        np.add.at(grid, np.minimum(start + np.arange(parts.size), grid.size - 1), parts)
        self.counts = grid.reshape(self.bins, per_bin).sum(1)
        return max(high, float(np.float32(low + per_bin * self.bins * part)))


@pytest.mark.parametrize("upsample_rate", [1, 16, 128])
@pytest.mark.parametrize("stream", ["normal", "relu", "growing", "drifting", "shrinking", "tiny"])
def test_aligned(backend: Backend, stream: str, upsample_rate: int) -> None:
    for bins in (2, 64):
        state, expected = fresh(bins, backend.device), Aligned(bins, upsample_rate)
        for x in STREAMS[stream]:
            backend.op("histogram")(x.to(backend.device), *state, "aligned", upsample_rate)
            expected.add(x)
            assert float(state[1]) == expected.low
            assert float(state[2]) == expected.high
            assert_same(state[0], torch.from_numpy(expected.counts), (bins, upsample_rate))


def test_aligned_takes_ranges_of_any_ratio(backend: Backend) -> None:
    """D2: a grid of the small range's bins over the large range would have 1e63 of them."""
    state, expected = fresh(256, backend.device), fresh(256)
    for i, scale in enumerate((1e-30, 1e-10, 1.0, 1e10, 1e30)):
        x = sample(100, seed=i) * scale
        backend.op("histogram")(x.to(backend.device), *state, "aligned")
        reference(x, *expected, "aligned")
        assert_all_same(state, expected, scale)
        assert float(state[0].sum()) == pytest.approx(100 * (i + 1), rel=1e-6)
    low, high = torch.aminmax(x)
    assert state[1] == low
    assert state[2] >= high


@pytest.mark.parametrize("combine", COMBINES)
def test_counts_pass_2_to_the_24(backend: Backend, combine: str) -> None:
    """D7: float32 counts stop there."""
    state = state_of([2.0**24, 0.0, 0.0, 2.0**40], -1.0, 1.0, backend.device)
    x = torch.tensor([-1.0, -1.0, -1.0, 0.3, 1.0], device=backend.device)
    backend.op("histogram")(x, *state, combine)
    assert_same(state[0], torch.tensor([2.0**24 + 3, 0, 1, 2.0**40 + 1], dtype=torch.float64))


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        ([-3e38, 3e38, 0.0, 1e38, -1e38], -3e38, 3e38),
        (
            [-3.4028234663852886e38, 3.4028234663852886e38],
            -3.4028234663852886e38,
            3.4028234663852886e38,
        ),
        ([0.0, 3e38, 1e38], 0.0, 3e38),
        ([0.0, 1e36, 3e35, 7e35], 0.0, 1e36),
    ],
)
def test_wide_ranges(
    backend: Backend, values: list[float], low: float, high: float, combine: str
) -> None:
    """D12: the width, or its product with the number of bins, leaves float32."""
    x = torch.tensor(values)
    state = fresh(2048, backend.device)
    backend.op("histogram")(x.to(backend.device), *state, combine)
    expected = exact_counts(x, 2048, float(x.min()), float(x.max()))
    assert_all_same(state, (expected, torch.tensor(low), torch.tensor(high), torch.tensor(0)))
    # and a range that grows to one so wide
    state, other = fresh(64, backend.device), fresh(64)
    for batch in (torch.tensor([0.5, 1.0]), x / 10, x):
        backend.op("histogram")(batch.to(backend.device), *state, combine)
        reference(batch, *other, combine)
    assert_all_same(state, other)
    assert float(state[0].sum()) == pytest.approx(2 + 2 * len(values))


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(
    "values",
    [[0.0, 1e-45], [1e-40, 1.1e-40, 3e-40], [1.0, 1.0000001], [-1e-45, 1e-45], [1e-38, 1.1e-38]],
)
def test_narrow_ranges(backend: Backend, values: list[float], combine: str) -> None:
    """D13: the width of a bin leaves float32; nothing is lost, and all kernels agree."""
    x = torch.tensor(values)
    state, expected = fresh(2048, backend.device), fresh(2048)
    for i, batch in enumerate((x, x * 2, torch.tensor([-1.0, 1.0]))):
        backend.op("histogram")(batch.to(backend.device), *state, combine)
        reference(batch, *expected, combine)
        assert_all_same(state, expected, i)
        assert state[0].isfinite().all()
    assert float(state[0].sum()) == pytest.approx(2 * len(values) + 2)


@pytest.mark.parametrize("value", [2.5, 0.0, -3.0, -0.0, 1e-45, 1e10, -3e38])
def test_constant(backend: Backend, value: float) -> None:
    """D13: all counts in the middle bin, however large the value."""
    state = fresh(16, backend.device)
    x = torch.full((5,), value, device=backend.device)
    backend.op("histogram")(x, *state)
    backend.op("histogram")(x[:2], *state)
    expected = torch.zeros(16, dtype=torch.float64)
    expected[8] = 7
    edge = torch.tensor(value) + 0.0
    assert_all_same(state, (expected, edge, edge, torch.tensor(0)))


@pytest.mark.parametrize("combine", COMBINES)
def test_constant_then_more(backend: Backend, combine: str) -> None:
    """A single value seen goes whole into the bin that it falls into."""
    state = fresh(4, backend.device)
    for x in (torch.full((6,), 0.25), torch.tensor([0.0, 1.0])):
        backend.op("histogram")(x.to(backend.device), *state, combine)
    assert_same(state[0], torch.tensor([1.0, 6, 0, 1], dtype=torch.float64))


NONFINITE = torch.tensor([1.0, torch.nan, -2.0, torch.inf, 0.5, -torch.inf, torch.nan])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_ignored(backend: Backend, dtype: torch.dtype) -> None:
    """D10, D11: also as the first batch, where torch.ao breaks for good."""
    state, expected = fresh(8, backend.device), fresh(8)
    for x in (NONFINITE, NONFINITE * 2, NONFINITE[3:4]):
        backend.op("histogram")(x.to(dtype).to(backend.device), *state)
        finite = x[x.isfinite()]
        if finite.numel():
            reference(finite, *expected)
        expected[3].add_(x.numel() - finite.numel())
        assert_all_same(state, expected)
    assert int(state[3]) == 9
    assert state[0].sum() == 6


def test_nonfinite_propagated(backend: Backend) -> None:
    """The range is that of torch.aminmax, and a range that is not finite keeps its counts."""
    state = fresh(8, backend.device)
    usual = torch.tensor([0.0, 1.0], device=backend.device)
    propagate: dict[str, Any] = {"nonfinite": "propagate"}
    backend.op("histogram")(usual, *state, **propagate)
    counts = state[0].clone()
    infinite = torch.tensor([0.5, torch.inf], device=backend.device)
    backend.op("histogram")(infinite, *state, **propagate)
    assert_all_same(state, (counts, torch.tensor(0.0), torch.tensor(torch.inf), torch.tensor(1)))
    backend.op("histogram")(NONFINITE.to(backend.device), *state, **propagate)
    nan = torch.tensor(torch.nan)
    assert_all_same(state, (counts, nan, nan, torch.tensor(5)))


def test_nonfinite_raise(backend: Backend) -> None:
    state = fresh(8, backend.device)
    backend.op("histogram")(sample(9).to(backend.device), *state, nonfinite="raise")
    x = NONFINITE.to(backend.device)
    with unchanged(*state), pytest.raises((ValueError, RuntimeError), match="4 NaN or infinite"):
        backend.op("histogram")(x, *state, nonfinite="raise")
    with unchanged(*state), pytest.raises(ValueError, match=r"^histogram: x: .* 4 NaN .* of 7"):
        ops.histogram(x, *state, nonfinite="raise")


def test_float64_is_rounded_to_float32(backend: Backend) -> None:
    x = torch.tensor([0.1, -0.3, 1e300, 0.1 + 1e-12], dtype=torch.float64)
    state, expected = fresh(16, backend.device), fresh(16)
    backend.op("histogram")(x.to(backend.device), *state)
    reference(x.float(), *expected)
    assert_all_same(state, expected)
    assert int(state[3]) == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("combine", COMBINES)
def test_enabled(backend: Backend, combine: str, dtype: torch.dtype) -> None:
    state, expected = fresh(32, backend.device), fresh(32)
    for i, flag in enumerate((0, 1, 0, 1)):
        enabled = torch.tensor([flag], dtype=dtype, device=backend.device)
        x = sample(40, seed=i) * (i + 1)
        x[3] = torch.nan
        backend.op("histogram")(x.to(backend.device), *state, combine, 16, "ignore", enabled)
        if flag:
            reference(x, *expected, combine, 16)
        assert_all_same(state, expected, i)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_nothing(backend: Backend, dtype: torch.dtype) -> None:
    x = sample(LARGE, dtype)
    x[-1] = 100.0
    low, high = torch.aminmax(x.float())
    expected = (histc(x, 2048, low, high), low, high, torch.tensor(0))
    for count in (1, 2):
        state = fresh(2048, backend.device)
        with threads(count):
            backend.op("histogram")(x.to(backend.device), *state)
        assert_all_same(state, expected, count)


def fed(bins: int, low: float, high: float, device: str = "cpu") -> State:
    return state_of([float(i % 5) for i in range(bins)], low, high, device)


def check_step(backend: Backend, x: Tensor, low: float, high: float, bins: int = 16) -> State:
    """A batch after others is counted as the reference does, which looks for the range first."""
    state, expected = fed(bins, low, high, backend.device), fed(bins, low, high)
    backend.op("histogram")(x.to(backend.device), *state)
    reference(x, *expected)
    assert_all_same(state, expected, (low, high))
    return state


def beyond(low: float, high: float) -> tuple[Tensor, Tensor]:
    """The next values outside the range."""
    ends, away = torch.tensor([low, high]), torch.tensor([-torch.inf, torch.inf])
    below, above = torch.nextafter(ends, away)
    return below, above


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.5, 0.75), (-3e38, 3e38), (2.0, 2.0)])
def test_a_value_just_outside_at_every_place(backend: Backend, low: float, high: float) -> None:
    """The range grows by it; in one pass it would be counted into the last bin."""
    inside = torch.linspace(low, high, 600, dtype=torch.float64).float().clamp(low, high)
    for n, places in ((1, (0,)), (9, range(9)), (33, range(33)), (600, (0, 255, 256, 511, 599))):
        for place in places:
            for value in beyond(low, high):
                x = inside[:n].clone()
                x[place] = value
                state = check_step(backend, x, low, high)
                assert value in (state[1].cpu(), state[2].cpu())
    check_step(backend, inside, low, high)
    for value in (torch.nan, torch.inf):
        check_step(backend, torch.cat([inside, torch.full((9,), value)]), low, high)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_outside_in_the_part_of_any_thread(backend: Backend, dtype: torch.dtype) -> None:
    n = 3 * 32768 + 77
    inside = sample(n, dtype).clamp(-2, 2)
    inside[5000] = torch.nan
    for count in (1, 2, 3) if backend.isa else (1,):
        with threads(count):
            check_step(backend, inside, -2.0, 2.0, 256)
            for place in (0, 32767, n // 2 + 100, 2 * n // 3 + 200, n - 1):
                x = inside.clone()
                x[place] = -2.015625 if place % 2 else 2.015625  # the next one of bfloat16
                state = check_step(backend, x, -2.0, 2.0, 256)
                assert -float(state[1]) != float(state[2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_in_one_pass(backend: Backend, layout: str) -> None:
    """Also what is expanded: counted once, and so many times over."""
    for dtype in DTYPES:
        for seed in range(2):
            x = laid_out(layout, dtype, backend.device, seed)
            state, expected = fed(33, -20.0, 20.0, backend.device), fed(33, -20.0, 20.0)
            for _ in range(2):
                backend.op("histogram")(x, *state)
                reference(x.cpu(), *expected)
            assert_all_same(state, expected, (dtype, seed))


def test_expanded_values_that_are_not_finite(backend: Backend) -> None:
    for shape in ((7, 40), (40, 7), (3, 80_000)):
        for row in ([1.0], [torch.nan], [3.0, torch.nan, -torch.inf]):
            x = torch.tensor(row).repeat(shape[1])[: shape[1]][None]
            x = x.to(backend.device).expand(shape)
            state, expected = fed(8, -1.0, 2.0, backend.device), fed(8, -1.0, 2.0)
            for _ in range(2):
                backend.op("histogram")(x, *state)
                reference(x.cpu(), *expected)
                assert_all_same(state, expected, (shape, row))


@pytest.mark.parametrize("nonfinite", ["ignore", "propagate"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_batches_of_nothing_finite(backend: Backend, value: float, nonfinite: str) -> None:
    """As the first batch, as a later one, and with the range of one value."""
    x = torch.full((70,), value)
    x[::2] = torch.nan
    for state, expected in (
        (fresh(8, backend.device), fresh(8)),
        (fed(8, -1.0, 1.0, backend.device), fed(8, -1.0, 1.0)),
        (fed(8, 1.0, 1.0, backend.device), fed(8, 1.0, 1.0)),
    ):
        for _ in range(2):
            backend.op("histogram")(x.to(backend.device), *state, nonfinite=nonfinite)
            reference(x, *expected, nonfinite=nonfinite)
            assert_all_same(state, expected)


def test_one_pass_that_raises_changes_nothing(backend: Backend) -> None:
    x = sample(40).clamp(-1, 1)
    x[-1] = torch.nan
    state = fed(8, -1.0, 1.0, backend.device)
    with unchanged(*state), pytest.raises((ValueError, RuntimeError), match="1 NaN or infinite"):
        backend.op("histogram")(x.to(backend.device), *state, nonfinite="raise")


# of one block, of several with their bins in shared memory, and of several without
@pytest.mark.parametrize(("n", "bins"), [(9000, 64), (40_001, 2048), (300, 20_000), (300, 30_000)])
@pytest.mark.parametrize("combine", COMBINES)
def test_what_is_asked_of_the_device(backend: Backend, combine: str, n: int, bins: int) -> None:
    """One launch, or two and a memory set, whatever the batch makes of the state."""
    work = {"launches": 1} if n == 9000 else {"launches": 2, "memsets": 1}
    state, expected = fresh(bins, backend.device), fresh(bins)
    x = sample(n)
    x[: n // 2] = 0.0
    empty = x[:0].to(backend.device)
    for i, batch in enumerate((x, x[1:], -x * 3, x + 40, torch.full((n,), torch.nan), x.half())):
        with backend.asked(**work):
            backend.op("histogram")(batch.to(backend.device), *state, combine)
        reference(batch, *expected, combine)
        assert_all_same(state, expected, i)
    with backend.asked(), unchanged(*state):
        backend.op("histogram")(empty, *state, combine, nonfinite="raise")
    looked = {"launches": work["launches"] + 1, "memsets": work.get("memsets", 0) + 1, "syncs": 1}
    with backend.asked(**looked):
        backend.op("histogram")(x.to(backend.device), *state, combine, nonfinite="raise")
    off = torch.zeros(1, dtype=torch.uint8, device=backend.device)
    with unchanged(*state), backend.asked(**work):
        backend.op("histogram")(9 * x.to(backend.device), *state, combine, 16, "ignore", off)


def spread(n: int, low: float, high: float) -> Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64).float().clamp(low, high)


@pytest.mark.parametrize("nonfinite", ["ignore", "propagate"])
@pytest.mark.parametrize(
    ("low", "high"),
    [(-3e38, 3e38), (1e10, 1e10), (2.0, 2.0), (-1e-39, 1e-39), (-1e-30, 1e30), (1e6, 1e6 + 1)],
)
def test_ranges_over_blocks(backend: Backend, low: float, high: float, nonfinite: str) -> None:
    """Also where the bins are wide, unsplit, or of no moderate width."""
    x = spread(40_001, low, high)
    holes = x.clone()
    holes[1::7] = torch.nan
    holes[5::9] = -torch.inf
    state, expected = fresh(100, backend.device), fresh(100)
    for batch in (x, x[3:], x.flip(0).expand(2, -1), x / 2, holes, holes[:300], x):
        backend.op("histogram")(batch.to(backend.device), *state, nonfinite=nonfinite)
        reference(batch, *expected, nonfinite=nonfinite)
        assert_all_same(state, expected)


@pytest.mark.parametrize("missing", [-1.0, -0.0625, 0.0, 0.0625, 1.0])
@pytest.mark.parametrize("combine", COMBINES)
def test_the_sum_of_counts_decides_how_they_are_rounded(
    backend: Backend, combine: str, missing: float
) -> None:
    """At 2^24 values."""
    x = spread(100, -1.0, 1.0)
    saved = [i / 16 for i in range(32)]  # 31 in all
    for scale in (1.0, 1.5):
        counts = [2.0**24 - 231, 100.0 - missing, *saved]
        state, expected = (state_of(counts, -1.0, 1.0, d) for d in (backend.device, "cpu"))
        for one in (x * scale, x):
            backend.op("histogram")(one.to(backend.device), *state, combine)
            reference(one, *expected, combine)
            assert_all_same(state, expected, scale)


@pytest.mark.parametrize("combine", COMBINES)
def test_sums_of_any_counts(backend: Backend, combine: str) -> None:
    """Carried in the order of the reference, which rounds."""
    generator = torch.Generator().manual_seed(3)
    for bins in (9, 64, 1000):
        for large in (1.0, 1e12):
            counts = (large * torch.rand(bins, generator=generator)).double()
            pair = [state_of(counts.tolist(), -1.0, 1.0, d) for d in (backend.device, "cpu")]
            for x in (sample(77), 9 * sample(40_000), sample(50) + 70):
                backend.op("histogram")(x.to(backend.device), *pair[0], combine)
                reference(x, *pair[1], combine)
                assert_all_same(*pair, (bins, large))
            other = counts.flip(0), torch.tensor(-200.0), torch.tensor(3.0)
            moved = [t.to(backend.device) for t in other]
            with backend.asked(launches=1):
                backend.op("histogram_combine")(*pair[0][:3], *moved, combine)
            reference_combine(*pair[1][:3], *other, combine)
            assert_all_same(*pair, (bins, large))


@pytest.mark.parametrize("combine", COMBINES)
def test_devices_agree_on_ranges_of_few_floats(combine: str) -> None:
    """Where steps have few bits, edges and midpoints may fall back in the middle: each bin on its
    own finds what the bins one after the other do."""
    generator = torch.Generator().manual_seed(5)
    cpu = Backend("cpu")
    for device in (found for found in backends() if found.cuda):
        for i in range(300):
            ends = torch.randint(-4000, 4000, (4,), generator=generator, dtype=torch.int32)
            bases = (0, 2**23, 0x3F800000)
            x = (ends.abs() + bases[i % 3]).view(torch.float32) * ends.sign()
            bins, rate = (3, 50, 64, 129)[i % 4], (1, 3, 16, 100)[i // 4 % 4]
            counts = [float(j % 5) for j in range(bins)]
            old = x[:2].sort().values
            ours, theirs = (
                state_of(counts, float(old[0]), float(old[1]), d) for d in (device.device, "cpu")
            )
            device.op("histogram")(x.to(device.device), *ours, combine, rate)
            cpu.op("histogram")(x, *theirs, combine, rate)
            assert_all_same(ours, theirs, (i, x, bins, rate))


def test_half_bins_do_not_saturate(backend: Backend) -> None:
    """D14: torch counts in the type of the input, where a bfloat16 bin stops at 256."""
    x = torch.cat([torch.zeros(5000), torch.ones(3000)]).to(backend.device)
    for dtype in DTYPES:
        state = fresh(4, backend.device)
        backend.op("histogram")(x.to(dtype), *state)
        assert state[0].tolist() == [5000, 0, 0, 3000]


def test_input_is_left_alone(backend: Backend) -> None:
    x = sample(33).to(backend.device).requires_grad_()
    state = fresh(8, backend.device)
    with unchanged(x):
        backend.op("histogram")(x, *state)
    assert not any(t.requires_grad for t in state)


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(
    ("low", "high", "other_low", "other_high"),
    [
        (-1, 1, -1, 1),
        (-1, 1, -3, 2),
        (0, 5, 1, 2),
        (2, 2, 0, 5),
        (0, 5, 2, 2),
        (1, 1, 1, 1),
        (-9, -8, 8, 9),
    ],
)
def test_combine(
    backend: Backend, low: float, high: float, other_low: float, other_high: float, combine: str
) -> None:
    first = torch.linspace(low, high, 40)
    second = torch.linspace(other_low, other_high, 24)
    state, other = fresh(32), fresh(32)
    reference(first, *state)
    reference(second, *other)
    expected = [t.clone() for t in state[:3]]
    reference_combine(*expected, *other[:3], combine)
    ours, theirs = ([t.to(backend.device) for t in s[:3]] for s in (state, other))
    with unchanged(*theirs):
        backend.op("histogram_combine")(*ours, *theirs, combine)
    assert_all_same(ours, expected)
    assert float(ours[0].sum()) == pytest.approx(64, rel=1e-6)
    assert ours[1] == min(low, other_low)
    assert ours[2] >= max(high, other_high)
    if combine == "midpoint":
        assert ours[2] == max(high, other_high)


def test_combine_is_that_of_torch(backend: Backend) -> None:
    """With an added histogram over the wider range, which is what torch.ao combines."""
    theirs = HistogramObserver(bins=32)
    first, second = STREAMS["growing"][0], STREAMS["growing"][0] * 1.9
    state, other = fresh(32), fresh(32)
    reference(first, *state)
    reference(second, *other)
    expected = theirs._combine_histograms(
        state[0].float(), *state[1:3], other[0].float(), *other[1:3]
    )
    ours = [t.to(backend.device) for t in state[:3]]
    backend.op("histogram_combine")(*ours, *(t.to(backend.device) for t in other[:3]))
    assert_all_same(ours, (expected.double(), *other[1:3]))


@pytest.mark.parametrize("combine", COMBINES)
def test_combine_with_an_unfed_histogram(backend: Backend, combine: str) -> None:
    fed = fresh(8, backend.device)
    backend.op("histogram")(sample(20).to(backend.device), *fed)
    for ours, theirs, expected in (
        (fed[:3], fresh(8, backend.device)[:3], fed[:3]),
        (fresh(8, backend.device)[:3], fed[:3], fed[:3]),
        (fresh(8, backend.device)[:3], fresh(8, backend.device)[:3], fresh(8)[:3]),
    ):
        ours = [t.clone() for t in ours]
        expected = [t.clone() for t in expected]
        backend.op("histogram_combine")(*ours, *theirs, combine)
        assert_all_same(ours, expected)


@properties
@given(
    st.lists(value_lists(), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
    st.sampled_from(COMBINES),
    st.integers(2, 70),
)
def test_properties(batches: list[list[float]], random: Any, combine: str, bins: int) -> None:
    """The order within a batch changes nothing, and no count is lost in growing or combining."""
    state, shuffled, other = fresh(bins), fresh(bins), fresh(bins)
    for batch in batches:
        ops.histogram(torch.tensor(batch), *state, combine)
        random.shuffle(batch)
        ops.histogram(torch.tensor(batch), *shuffled, combine)
    assert_all_same(shuffled, state)
    total = sum(map(len, batches))
    assert float(state[0].sum()) == pytest.approx(total, rel=1e-6)
    assert (state[0] >= 0).all()
    assert state[1] == min(map(min, batches))
    assert state[2] >= max(map(max, batches))
    ops.histogram(torch.tensor(batches[-1]) * 3, *other, combine)
    ops.histogram_combine(*state[:3], *other[:3], combine)
    assert float(state[0].sum()) == pytest.approx(total + len(batches[-1]), rel=1e-6)


def test_meta() -> None:
    ops.histogram(torch.empty(3, 5, device="meta"), *fresh(8, "meta"))
    ops.histogram_combine(*fresh(8, "meta")[:3], *fresh(8, "meta")[:3])


def arguments(**changed: Any) -> dict[str, Any]:
    counts, low, high, nonfinite_count = state_of([1.0, 2.0, 3.0, 4.0], -1.0, 1.0)
    given = {"x": sample(9), "counts": counts, "min_val": low, "max_val": high}
    return {**given, "nonfinite_count": nonfinite_count, **changed}


REJECTED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one_bin": (
        {"counts": torch.zeros(1, dtype=torch.float64)},
        ValueError,
        r"counts: expected a 1-d tensor of at least 2 bins, got shape \(1,\)",
    ),
    "counts_2d": (
        {"counts": torch.zeros(2, 2, dtype=torch.float64)},
        ValueError,
        r"counts: expected a 1-d tensor .* got shape \(2, 2\)",
    ),
    "counts_dtype": (
        {"counts": torch.zeros(4)},
        TypeError,
        "counts: expected torch.float64, got torch.float32",
    ),
    "counts_strides": (
        {"counts": torch.zeros(8, dtype=torch.float64)[::2]},
        ValueError,
        r"counts: expected a contiguous tensor, got strides \(2,\)",
    ),
    "counts_none": ({"counts": None}, TypeError, "counts: expected torch.float64, got NoneType"),
    "min_val_dtype": (
        {"min_val": torch.zeros((), dtype=torch.float64)},
        TypeError,
        "min_val: expected torch.float32, got torch.float64",
    ),
    "max_val_size": (
        {"max_val": torch.zeros(2)},
        ValueError,
        r"max_val: expected 1 element, got shape \(2,\)",
    ),
    "count_dtype": (
        {"nonfinite_count": torch.zeros(())},
        TypeError,
        "nonfinite_count: expected torch.int64, got torch.float32",
    ),
    "combine": ({"combine": "sum"}, ValueError, "combine: expected one of midpoint.* got 'sum'"),
    "nonfinite": ({"nonfinite": "drop"}, ValueError, "nonfinite: expected one of .* got 'drop'"),
    "rate_0": (
        {"upsample_rate": 0},
        ValueError,
        r"upsample_rate: expected a value in \[1, 65536\], got 0",
    ),
    "rate_high": ({"upsample_rate": 65537}, ValueError, "upsample_rate: expected .*, got 65537"),
    **REJECTED_SWITCHES,
    "x_meta": (
        {"x": torch.empty(9, device="meta")},
        ValueError,
        "counts: expected a tensor on meta beside x, got one on cpu",
    ),
    "counts_meta": (
        {"counts": torch.zeros(4, dtype=torch.float64, device="meta")},
        ValueError,
        "counts: expected a tensor on cpu beside x, got one on meta",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name: str) -> None:
    changed, error, match = REJECTED[name]
    assert_rejected(ops.histogram, arguments(**changed), error, f"^histogram: {match}")


@pytest.mark.parametrize("name", REJECTED)
@any_isa
def test_kernel_rejects(backend: Backend, name: str) -> None:
    if not backend.cuda:
        assert_rejected(backend.op("histogram"), arguments(**REJECTED[name][0]), Exception)


@any_isa
def test_rejects_other_inputs(backend: Backend) -> None:
    for x, came in not_dense_real_float().values():
        expected = f"^histogram: x: expected a dense tensor of float32, .*, {came}"
        assert_rejected(ops.histogram, arguments(x=x), TypeError, expected)
        if not backend.cuda:
            assert_rejected(backend.op("histogram"), arguments(x=x), Exception)


def combine_arguments(**changed: Any) -> dict[str, Any]:
    names = ("counts", "min_val", "max_val")
    given = dict(zip(names, state_of([1.0, 2.0, 3.0, 4.0], -1.0, 1.0)[:3], strict=True))
    other = state_of([4.0, 3.0, 2.0, 1.0], -2.0, 0.0)[:3]
    given.update({f"other_{name}": t for name, t in zip(names, other, strict=True)})
    return {**given, **changed}


COMBINE_REJECTED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "bins": (
        {"other_counts": torch.zeros(5, dtype=torch.float64)},
        ValueError,
        "other_counts: expected 4 bins, got 5",
    ),
    "one_bin": (
        {"other_counts": torch.zeros(1, dtype=torch.float64)},
        ValueError,
        r"other_counts: expected a 1-d tensor of at least 2 bins, got shape \(1,\)",
    ),
    "dtype": (
        {"other_counts": torch.zeros(4)},
        TypeError,
        "other_counts: expected torch.float64, got torch.float32",
    ),
    "counts_dtype": (
        {"counts": torch.zeros(4, dtype=torch.int64)},
        TypeError,
        "counts: expected torch.float64, got torch.int64",
    ),
    "other_min_val": (
        {"other_min_val": torch.zeros(2)},
        ValueError,
        r"other_min_val: expected 1 element, got shape \(2,\)",
    ),
    "other_max_val": (
        {"other_max_val": torch.zeros((), dtype=torch.float64)},
        TypeError,
        "other_max_val: expected torch.float32, got torch.float64",
    ),
    "combine": ({"combine": "sum"}, ValueError, "combine: expected one of midpoint.* got 'sum'"),
    "rate": ({"upsample_rate": -1}, ValueError, "upsample_rate: expected .*, got -1"),
    "meta": (
        {"other_counts": torch.zeros(4, dtype=torch.float64, device="meta")},
        ValueError,
        "other_counts: expected a tensor on cpu .*, got one on meta",
    ),
}


@pytest.mark.parametrize("name", COMBINE_REJECTED)
def test_combine_rejects(name: str) -> None:
    changed, error, match = COMBINE_REJECTED[name]
    expected = f"^histogram_combine: {match}"
    assert_rejected(ops.histogram_combine, combine_arguments(**changed), error, expected)


@pytest.mark.parametrize("name", COMBINE_REJECTED)
def test_combine_kernel_rejects(backend: Backend, name: str) -> None:
    if not backend.cuda:
        changed = COMBINE_REJECTED[name][0]
        assert_rejected(backend.op("histogram_combine"), combine_arguments(**changed), Exception)


def test_opcheck() -> None:
    for x in opcheck_inputs().values():
        opcheck("histogram", x, *fresh(16))
    enabled = torch.ones(1, dtype=torch.uint8)
    opcheck("histogram", sample(9), *fresh(16), "aligned", 128, "propagate", enabled)
    opcheck("histogram", sample((3, 3)).requires_grad_(), *fresh(16))


def test_opcheck_combine() -> None:
    for combine in COMBINES:
        opcheck("histogram_combine", **combine_arguments(combine=combine))
    opcheck("histogram_combine", *fresh(16)[:3], *fresh(16)[:3])


@pytest.mark.parametrize("low", [1e6, 1e7])
def test_grows_where_float32_is_coarse(backend: Backend, low: float) -> None:
    """Many bins share an edge, and many parts a midpoint."""
    for bins in (64, 2048):
        state = [sample(bins).abs().floor().double(), low, low + 1, 0]
        state = [torch.as_tensor(v) for v in state]
        state[1:3] = [t.float() for t in state[1:3]]
        expected = [t.clone() for t in state]
        state = [t.to(backend.device) for t in state]
        x = torch.tensor([low - 1, low + 2])
        backend.op("histogram")(x.to(backend.device), *state)
        reference(x, *expected)
        assert_all_same(state, expected, bins)

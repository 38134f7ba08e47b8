from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from backends import Backend
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.ao.quantization import HistogramObserver

from pyobserver import native_status, ops

from .cases import (
    REJECTED_SWITCHES,
    any_isa,
    assert_all_same,
    assert_rejected,
    assert_same,
    opcheck,
    properties,
    threads,
    unchanged,
)

COUNT = 20000


def _normal(generator: torch.Generator) -> Tensor:
    return torch.randn(COUNT, generator=generator)


VALUES: dict[str, Callable[[torch.Generator], Tensor]] = {
    "normal": _normal,
    "relu": lambda g: _normal(g).relu(),
    "peaked": lambda g: _normal(g) * _normal(g),
    "heavy": lambda g: _normal(g) / _normal(g).abs().clamp(min=0.01),
    "uniform": lambda g: torch.rand(COUNT, generator=g) + 5,
    "two_scales": lambda g: _normal(g) * torch.where(torch.arange(COUNT) % 20 == 0, 20.0, 1.0),
    "few": lambda g: _normal(g)[:60],
}


def histogram_of(name: str, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    x = VALUES[name](torch.Generator().manual_seed(3))
    low, high = torch.aminmax(x)
    return torch.histc(x, bins, float(low), float(high)).double(), low, high


@cache
def _search_of_torch(
    counts: tuple[float, ...], low: float, high: float, num_levels: int
) -> tuple[Tensor, Tensor]:
    theirs = HistogramObserver(bins=len(counts))
    theirs.histogram.copy_(torch.tensor(counts, dtype=torch.float64))
    theirs.min_val.fill_(low)
    theirs.max_val.fill_(high)
    theirs.dst_nbins = num_levels
    return theirs._non_linear_param_search()


def search_of_torch(
    counts: Tensor, low: Tensor, high: Tensor, num_levels: int
) -> tuple[Tensor, Tensor]:
    """Taken once for all backends: it is slow."""
    return _search_of_torch(tuple(counts.tolist()), float(low), float(high), num_levels)


def _taken_one_by_one(value: float, step: float) -> Tensor:
    values = [value]
    while 0 <= values[-1] <= 1:
        values.append(values[-1] + step)
    return torch.tensor(values, dtype=torch.float64)


ALPHAS, BETAS = _taken_one_by_one(0.0, 1e-5), _taken_one_by_one(1.0, -1e-5)


def error_of(
    counts: Tensor, width: float, start: int, end: int, num_levels: int
) -> float:  # as torch.ao, but summed without rounding
    level = width * (end - start + 1) / num_levels
    begins = (torch.arange(counts.numel()) - start) * width
    ends = begins + width
    firsts, lasts = (
        (edges.double() / torch.tensor(level, dtype=torch.float32).double())
        .floor()
        .clamp(0, num_levels - 1)
        .float()
        for edges in (begins, ends)
    )
    half = torch.tensor(level / 2, dtype=torch.float32)

    def norm(low: Tensor, high: Tensor) -> Tensor:
        return counts.float() / width * ((high * high * high - low * low * low) / 3)

    error = norm(begins - (firsts + 0.5) * level, half)
    error += (lasts - firsts - 1) * norm(-half, half)
    error += norm(-half, ends - (lasts * level + level / 2))
    return math.fsum(error.tolist())


def search_by_steps(counts: Tensor, width: float, num_levels: int) -> tuple[int, int]:
    """The first and the last bin kept, from every quantile on the way."""
    total = float(counts.float().sum())
    lowers, uppers = (ALPHAS * total).float().tolist(), (BETAS * total).float()
    cumulative = counts.float().cumsum(0).tolist()
    start, end = 0, counts.numel() - 1
    a = b = 0
    best = math.inf
    while ALPHAS[a] < BETAS[b]:
        left, right = start, end
        while left < end and cumulative[left] < lowers[a + 1]:
            left += 1
        while right > start and cumulative[right] > uppers[b + 1]:
            right -= 1
        if left - start > end - right:
            span, a = (left, end), a + 1
        else:
            span, b = (start, right), b + 1
        if span == (start, end):
            # only b moves until the end does: one row of comparisons, not a loop
            moves = (uppers[b + 1 :] < cumulative[end]).nonzero()
            if start == end or moves.numel() == 0:
                break
            b += int(moves[0])
            continue
        error = error_of(counts, width, *span, num_levels)
        if error > best:
            break
        best, (start, end) = error, span
    return start, end


def spans_by_steps(counts: Tensor, widths: list[float], num_levels: int) -> Tensor:
    pairs = zip(counts, widths, strict=True)
    return torch.tensor([search_by_steps(*pair, num_levels) for pair in pairs]).T


def _random_counts(generator: torch.Generator, bins: int) -> Tensor:
    """Seven histograms: uneven, sparse, fractional, two-valued, with light tails or one peak."""
    share = torch.rand(7, bins, generator=generator, dtype=torch.float64)
    at = torch.linspace(-9, 7, bins, dtype=torch.float64).abs()
    counts = torch.zeros_like(share)
    counts[0] = (1e5 * share[0] ** 2).floor()
    counts[1] = (1e6 * share[1] ** 12).floor()
    counts[2] = (1e3 * share[2] * (share[3] < 0.1)).floor()
    counts[3] = 1e4 * share[3] ** 6
    counts[4, 0], counts[4, -1] = 1 + (1e5 * share[4, 0]).floor(), 1 + (99 * share[4, 1]).floor()
    counts[5] = (1e5 * torch.exp(-3 * share[5, 0] * at)).floor()
    counts[6] = (30 * share[6]).floor()
    counts[6, bins // 3] = 1e6
    counts[:, 0] += 1  # so that none is empty
    return counts


SMALL_SIZES = (2, 3, 7, 8, 9, 12, 16, 17, 24, 31, 40, 65, 130)
LEVELS = (2, 3, 16, 255, 256, 65536, 2**20)


@cache
def small_searches(bins: int) -> list[tuple[int, list[Tensor], tuple[Tensor, Tensor]]]:
    """Batches of random histograms, each with a number of levels and what steps one by one find."""
    generator = torch.Generator().manual_seed(bins)
    batches = []
    for num_levels in LEVELS:
        counts = torch.cat([_random_counts(generator, bins) for _ in range(2)])
        low = -torch.rand(len(counts), generator=generator)
        high = low + 10 ** (4 * torch.rand(len(counts), generator=generator) - 2)
        width = (high.double() - low.double()) / bins
        mantissas = torch.frexp(width).mantissa.tolist()
        first, last = spans_by_steps(counts, mantissas, num_levels)
        step = (high - low) / bins
        batches.append(
            (num_levels, [counts, low, high], (low + step * first, low + step * (last + 1)))
        )
    return batches


def run(
    backend: Backend, counts: Tensor, low: Tensor, high: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    inputs = [t.to(backend.device) for t in (counts, low, high)]
    with unchanged(*inputs):
        return backend.op("range_search")(*inputs, *options)


@pytest.mark.parametrize("num_levels", [2, 16, 256, 65536])
@pytest.mark.parametrize("name", VALUES)
def test_is_the_search_of_torch(backend: Backend, name: str, num_levels: int) -> None:
    # torch sums the error in float32: equal on these, though it need not be on every histogram
    for bins in (2, 3, 100, 2048) if num_levels == 256 else (2048,):
        histogram = histogram_of(name, bins)
        found = run(backend, *histogram, num_levels)
        assert_all_same(found, search_of_torch(*histogram, num_levels), bins)
        assert histogram[1] <= found[0] < found[1]


@pytest.mark.parametrize("bins", SMALL_SIZES)
def test_is_the_search_by_steps(backend: Backend, bins: int) -> None:
    for num_levels, histograms, expected in small_searches(bins):
        assert_all_same(run(backend, *histograms, num_levels), expected, num_levels)


@cache
def peaked_searches() -> list[tuple[int, list[Tensor], tuple[Tensor, Tensor]]]:
    """A peak that one quantile reaches, also where the kernel's chunks of 128 bins meet."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for bins, places in ((200, (1, 126, 127, 128, 129)), (300, (255, 256, 290))):
        peaks = [(at, size) for at in places for size in (1, 2, 5)]
        counts = torch.ones(len(peaks), bins, dtype=torch.float64)
        for row, (at, size) in zip(counts, peaks, strict=True):
            row[at : at + size] = 1e9 * torch.rand(size, generator=generator, dtype=torch.float64)
        low, high = torch.zeros(len(peaks)), torch.full((len(peaks),), bins / 2)
        for num_levels in (2, 16, 256):
            first, last = spans_by_steps(counts, [0.5] * len(counts), num_levels)
            found = (0.5 * first, 0.5 * (last + 1))
            batches.append((num_levels, [counts, low, high], found))
    return batches


def test_peaks(backend: Backend) -> None:
    for num_levels, histograms, expected in peaked_searches():
        assert_all_same(run(backend, *histograms, num_levels), expected, num_levels)


def assert_instruction_sets_agree(*inputs: Any) -> None:
    build = native_status.build
    before = build.cpu_isa()
    found = []
    try:
        for isa in build.cpu_isas():
            build.set_cpu_isa(isa)
            found.append(ops.range_search(*inputs))
    finally:
        build.set_cpu_isa(before)
    for other in found[1:]:
        assert_all_same(other, found[0], inputs[-1])


compiled = pytest.mark.skipif(not native_status.cpu, reason="without compiled kernels")


@compiled
@pytest.mark.parametrize("bins", [5, 8, 33, 100, 256, 1000])
def test_instruction_sets_agree(bins: int) -> None:
    """To the last bit, also above 2^20 levels, where the float32 errors are mostly noise."""
    generator = torch.Generator().manual_seed(bins)
    counts = torch.cat([_random_counts(generator, bins) for _ in range(10_000 // bins)])
    low = -torch.rand(len(counts), generator=generator)
    high = low + 10 ** (4 * torch.rand(len(counts), generator=generator) - 2)
    for num_levels in (*LEVELS, 2**20 + 1, 2**32):
        assert_instruction_sets_agree(counts, low, high, num_levels)


@compiled
@pytest.mark.parametrize("num_levels", [4, 12, 16, 64, 256])
def test_instruction_sets_agree_on_long_searches(num_levels: int) -> None:
    """Near the least error, where two spans differ by their last bits."""
    generator = torch.Generator().manual_seed(num_levels)
    share = torch.rand(60, 1, generator=generator, dtype=torch.float64)
    at = torch.linspace(-9, 7, 512, dtype=torch.float64).abs()
    counts = (1e5 * torch.exp(-(0.2 + share) * at)).floor()
    low = torch.full((60,), -9.0)
    high = 7 + torch.rand(60, generator=generator)
    assert_instruction_sets_agree(counts, low, high, num_levels)


@pytest.mark.parametrize(
    "counts", [[1, 0, 0, 1], [0, 0, 5, 0], [3, 1, 4, 1, 5, 9, 2, 6], [1e9, 1, 1, 1]]
)
def test_small_histograms(backend: Backend, counts: list[float]) -> None:
    histogram = (
        torch.tensor(counts, dtype=torch.float64),
        torch.tensor(-1.0),
        torch.tensor(2.0),
    )
    assert_all_same(run(backend, *histogram, 256), search_of_torch(*histogram, 256))


@pytest.mark.parametrize("num_levels", [4, 256])
def test_uneven_histograms(backend: Backend, num_levels: int) -> None:
    """Bins of very different counts, where every quantile on the way matters."""
    generator = torch.Generator().manual_seed(7)
    for bins in (8, 40, 64, 200):
        for power in (2, 6, 12):
            counts = (1e5 * torch.rand(bins, generator=generator) ** power).floor().double()
            histogram = (counts, torch.tensor(-1.3), torch.tensor(2.9))
            expected = search_of_torch(*histogram, num_levels)
            assert_all_same(run(backend, *histogram, num_levels), expected, (bins, power))


@pytest.mark.parametrize("num_levels", [4, 16])
def test_long_searches(backend: Backend, num_levels: int) -> None:
    """Dense tails, which are cut for hundreds of steps: each quantile of 1e-5 is many values."""
    at = torch.linspace(-9, 7, 2048, dtype=torch.float64)
    for density in (torch.exp(-at.square() / 2), torch.exp(-at.abs())):
        counts = (1e4 * density).floor()
        histogram = (counts, torch.tensor(-9.0), torch.tensor(7.0))
        assert_all_same(
            run(backend, *histogram, num_levels), search_of_torch(*histogram, num_levels)
        )


@cache
def many_bins(bins: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """More than a block of a GPU keeps beside it, or than torch sums alike everywhere."""
    at = torch.linspace(-9, 7, bins, dtype=torch.float64)
    counts = torch.stack([(30 * torch.exp(-at.abs())).floor(), (3 * at.cos().abs()).floor()])
    counts[1, 100:5000] = 0.0
    histograms = [counts, torch.tensor([-9.0, -2.0]), torch.tensor([7.0, 2.0])]
    return histograms, run(Backend("reference"), *histograms, 16)


@pytest.mark.parametrize("bins", [9003, 16389])
def test_many_bins(backend: Backend, bins: int) -> None:
    histograms, expected = many_bins(bins)
    assert_all_same(run(backend, *histograms, 16), expected)


def test_counts_above_2_to_the_24(backend: Backend) -> None:
    """D7: scaling all counts by a power of two changes no step of the search."""
    counts, low, high = histogram_of("normal", 512)
    expected = run(backend, counts, low, high, 256)
    assert_all_same(run(backend, counts * 2.0**30, low, high, 256), expected)


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
def test_scales_with_its_range(backend: Backend, exponent: int) -> None:
    """Where torch's cubes leave float32, and the range collapses or the search takes a second."""
    counts, low, high = histogram_of("peaked", 512)
    scale = 2.0**exponent
    expected = [t * scale for t in run(backend, counts, low, high, 256)]
    assert_all_same(run(backend, counts, low * scale, high * scale, 256), expected)


def test_widest_range(backend: Backend) -> None:
    """D12: the width leaves float32."""
    counts, _, _ = histogram_of("uniform", 64)
    high = torch.tensor(3.4e38)
    found = run(backend, counts, -high, high, 256)
    assert -high <= found[0] < found[1] <= high
    # the same search over a range that is not so wide
    usual = run(backend, counts, -high / 2**20, high / 2**20, 256)
    torch.testing.assert_close(
        torch.stack(found).cpu(), torch.stack(usual).cpu() * 2**20, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [
        ([0.0, 0, 0, 0], -1.0, 1.0),
        ([0.0, 0, 3, 0], 2.5, 2.5),
        ([0.0, 0, 0, 0], torch.inf, -torch.inf),
        ([1.0, 2, 3, 0], torch.nan, torch.nan),
        ([1.0, 2, 3, 0], 0.0, torch.inf),
        ([1.0, 2, 3, 0], -torch.inf, 0.0),
    ],
)
def test_keeps_a_range_that_cannot_be_searched(
    backend: Backend, counts: list[float], low: float, high: float
) -> None:
    ends = (torch.tensor(low), torch.tensor(high))
    found = run(backend, torch.tensor(counts, dtype=torch.float64), *ends, 256)
    assert_all_same(found, ends)


def test_narrow_range(backend: Backend) -> None:
    """D13: a width of the least float."""
    ends = (torch.tensor(0.0), torch.tensor(1e-45))
    found = run(backend, torch.ones(8, dtype=torch.float64), *ends, 4)
    assert 0 <= found[0] <= found[1] <= ends[1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
def test_enabled(backend: Backend, dtype: torch.dtype) -> None:
    histogram = histogram_of("normal", 128)
    for flag in (0, 1):
        enabled = torch.tensor([flag], dtype=dtype, device=backend.device)
        found = run(backend, *histogram, 256, enabled)
        expected = search_of_torch(*histogram, 256) if flag else histogram[1:]
        assert_all_same(found, expected, flag)


def test_off_returns_tensors_of_its_own(backend: Backend) -> None:
    counts, low, high = (t.to(backend.device) for t in histogram_of("normal", 128))
    enabled = torch.zeros(1, dtype=torch.uint8, device=backend.device)
    found = backend.op("range_search")(counts, low, high, 256, enabled)
    found[0].fill_(7.0)
    assert low != 7.0


def test_many_histograms(backend: Backend) -> None:
    """Each is searched as if it were alone; an empty one among them keeps its range."""
    singles = [histogram_of(name, 128) for name in VALUES]
    singles[2] = (torch.zeros(128, dtype=torch.float64), torch.tensor(-1.0), torch.tensor(4.0))
    expected = [run(backend, *single, 16) for single in singles]
    counts, low, high = (torch.stack(t) for t in zip(*singles, strict=True))
    found = run(backend, counts, low, high, 16)
    assert_all_same(found, [torch.stack(t) for t in zip(*expected, strict=True)])
    grid = run(
        backend, counts[:6].reshape(2, 3, 128), low[:6].reshape(2, 3), high[:6].reshape(2, 3), 16
    )
    assert_all_same(grid, [t[:6].reshape(2, 3) for t in found])
    one = run(backend, counts[:1], low[:1], high[:1], 16)
    assert_all_same(one, [t[:1] for t in found])


def test_threads_change_nothing(backend: Backend) -> None:
    singles = [histogram_of(name, 2048) for name in VALUES] * 4
    stacked = [torch.stack(t) for t in zip(*singles, strict=True)]
    found = []
    for count in (1, 2):
        with threads(count):
            found.append(run(backend, *stacked, 256))
    assert_all_same(found[0], found[1])
    assert_same(found[0][0][: len(VALUES)], found[0][0][len(VALUES) : 2 * len(VALUES)])


@properties
@given(
    st.lists(st.integers(0, 10**6), min_size=2, max_size=60),
    st.floats(-1e6, 1e6, width=32),
    st.floats(0, 1e6, width=32),
    st.sampled_from([2, 16, 256]),
)
def test_properties(counts: list[int], low: float, width: float, num_levels: int) -> None:
    """What is found lies within the range searched."""
    ends = (torch.tensor(low), torch.tensor(low) + torch.tensor(width))
    found = ops.range_search(torch.tensor(counts, dtype=torch.float64), *ends, num_levels)
    assert ends[0] <= found[0] <= found[1]
    # the last edge is computed, and may be rounded up
    assert found[1] <= ends[1] + 1e-6 * (abs(ends[0]) + abs(ends[1]))


def test_meta() -> None:
    counts = torch.empty(3, 5, 16, dtype=torch.float64, device="meta")
    ends = [torch.empty(3, 5, device="meta") for _ in range(2)]
    assert [t.shape for t in ops.range_search(counts, *ends, 256)] == [(3, 5), (3, 5)]


def arguments(**changed: Any) -> dict[str, Any]:
    counts, low, high = histogram_of("normal", 16)
    return {"counts": counts, "min_val": low, "max_val": high, "num_levels": 256, **changed}


REJECTED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one_bin": (
        {"counts": torch.ones(1, dtype=torch.float64)},
        ValueError,
        r"counts: expected shape .* at least 2 bins, got \(1,\)",
    ),
    "0-d": (
        {"counts": torch.ones((), dtype=torch.float64)},
        ValueError,
        r"counts: expected shape .* at least 2 bins, got \(\)",
    ),
    "counts_dtype": (
        {"counts": torch.ones(16)},
        TypeError,
        "counts: expected torch.float64, got torch.float32",
    ),
    "counts_list": ({"counts": [1.0, 2.0]}, TypeError, "counts: expected torch.float64, got list"),
    "counts_strides": (
        {"counts": torch.ones(32, dtype=torch.float64)[::2]},
        ValueError,
        r"counts: expected a contiguous tensor, got strides \(2,\)",
    ),
    "histograms": (
        {"counts": torch.ones(3, 16, dtype=torch.float64)},
        ValueError,
        r"min_val: expected 3 elements, got shape \(\)",
    ),
    "max_val_size": (
        {"max_val": torch.ones(2)},
        ValueError,
        r"max_val: expected 1 element, got shape \(2,\)",
    ),
    "min_val_dtype": (
        {"min_val": torch.ones((), dtype=torch.float64)},
        TypeError,
        "min_val: expected torch.float32, got torch.float64",
    ),
    "levels": ({"num_levels": 1}, ValueError, "num_levels: expected at least 2, got 1"),
    "levels_negative": ({"num_levels": -5}, ValueError, "num_levels: expected .*, got -5"),
    **REJECTED_SWITCHES,
    "meta": (
        {"min_val": torch.empty((), device="meta")},
        ValueError,
        "min_val: expected a tensor on cpu .*, got one on meta",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name: str) -> None:
    changed, error, match = REJECTED[name]
    assert_rejected(ops.range_search, arguments(**changed), error, f"^range_search: {match}")


@pytest.mark.parametrize("name", REJECTED)
@any_isa
def test_kernel_rejects(backend: Backend, name: str) -> None:
    if not backend.cuda:
        assert_rejected(backend.op("range_search"), arguments(**REJECTED[name][0]), Exception)


def test_opcheck() -> None:
    opcheck("range_search", **arguments())
    counts = torch.ones(2, 3, 7, dtype=torch.float64)
    low, high = -torch.ones(2, 3), torch.ones(2, 3)
    opcheck("range_search", counts, low, high, 16)
    opcheck("range_search", counts, low, high, 16, torch.zeros(1, dtype=torch.uint8))
    opcheck("range_search", counts[:0], low[:0], high[:0], 16)

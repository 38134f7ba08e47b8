"""The search against every scale and every zero point, tried one by one."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from backends import GPU, ON_HOST, Backend, backends, params
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyobserver import native_status, ops
from pyobserver.ops.lp_search import CONSTRAINTS

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

BINS = 24  # of the random histograms, at most 12 of them occupied
EXACT = 1e-9
# of the mean of |x|^p: where a histogram is of a few values that all lie on levels
ROUNDING = 1e-13


class Grid(NamedTuple):
    quant_min: int
    quant_max: int
    zero_point: int | None = None  # None: the best one

    @property
    def steps(self) -> int:
        return self.quant_max - self.quant_min

    @property
    def zero_points(self) -> list[int]:
        if self.zero_point is not None:
            return [self.zero_point]
        return list(range(self.quant_min, self.quant_max + 1))


GRIDS = [
    Grid(0, 1),
    Grid(0, 2),
    Grid(0, 3),
    Grid(-3, 2),
    Grid(-8, 7),
    Grid(5, 19),
    Grid(-1, 0, 0),
    Grid(0, 3, 0),
    Grid(-2, 5, 0),
    Grid(-3, 0, 0),
    Grid(-8, 7, 0),
    Grid(2, 15, 9),
]


# ---------------------------------------------------------------------------------------------
# the error by integration, level by level


class Values(NamedTuple):
    """What a histogram holds: single values, and values that lie evenly between two."""

    point: np.ndarray
    times: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    count: np.ndarray


def values_of(counts: np.ndarray, edges: np.ndarray, low: float, high: float) -> Values:
    occupied = np.flatnonzero(counts)
    first, last = occupied[0], occupied[-1]
    rest = {i: float(counts[i]) for i in occupied}
    points: list[tuple[float, float]] = []

    def take(value: float, bin_: int, times: float) -> None:
        times = min(times, rest[bin_])
        rest[bin_] -= times
        points.append((value, times))

    if first == last:
        take(high, last, 1.0 if low < high else np.inf)
        take(low, first, 1.0)
    else:
        alone = first + 1 not in rest or edges[first + 1] <= low
        take(low, first, np.inf if alone else 1.0)
        alone = last - 1 not in rest or edges[last] >= high
        take(high, last, np.inf if alone else 1.0)
    cells = [(max(edges[i], low), min(edges[i + 1], high), n) for i, n in rest.items() if n > 0]
    points = [(value, times) for value, times in points if times > 0]
    return Values(*np.array(points).T, *np.array(cells).reshape(-1, 3).T)


def integral(x: np.ndarray, p: float) -> np.ndarray:
    """Of |x|^p from 0."""
    size = np.abs(x)
    powers = {1.0: size, 1.5: size * np.sqrt(size), 2.0: size * size, 3.0: size * size * size}
    return x * (powers[p] if p in powers else size**p) / (p + 1)


def parts_of(
    values: Values, scales: np.ndarray, levels: np.ndarray, p: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The errors of each scale and level, as one between others, as the lowest, as the highest.

    A level takes what is nearest to it, and one at the end of the grid all that lies beyond.
    """
    position, half = scales[:, None, None] * levels[:, None], scales[:, None, None] / 2
    begin, end = (integral(edge - position, p) for edge in (values.begin, values.end))
    point = values.point - position
    density = values.count / (values.end - values.begin)
    size = values.times * np.abs(point) ** p
    bound = integral(half, p)

    def error(least: Any, most: Any, taken: np.ndarray) -> np.ndarray:
        # the integral grows with x, so that its bounds are those of x
        cells = density * (np.clip(end, least, most) - np.clip(begin, least, most))
        return cells.sum(-1) + np.where(taken, size, 0.0).sum(-1)

    above, below = point > -half, point <= half
    return (
        error(-bound, bound, above & below),
        error(-np.inf, bound, below),
        error(-bound, np.inf, above),
    )


def errors_of(values: Values, scales: np.ndarray, grid: Grid, p: float) -> np.ndarray:
    """The sums of |x - quantized x|^p, (scales, zero points)."""
    zeros = grid.zero_points
    levels = np.arange(grid.quant_min - zeros[-1], grid.quant_max - zeros[0] + 1)
    between, lowest, highest = parts_of(values, scales, levels, p)
    columns = []
    for zero in zeros:
        first = grid.quant_min - zero - int(levels[0])
        last = first + grid.steps
        columns.append(lowest[:, first] + between[:, first + 1 : last].sum(-1) + highest[:, last])
    return np.stack(columns, -1)


def signal_of(values: Values, p: float) -> float:
    cells = (integral(values.end, p) - integral(values.begin, p)) / (values.end - values.begin)
    return float((values.count * cells).sum() + (values.times * np.abs(values.point) ** p).sum())


def scales_of(
    values: Values, grid: Grid, constraint: str = "none", least: float = 0.0, octaves: int = 11
) -> np.ndarray:
    """From twice the greatest magnitude down, where one scale has all of its values at zero."""
    low, high = -min(0.0, values.point.min()), max(0.0, values.point.max())
    if grid.zero_point is None:
        sides = [(side, level) for side in (low, high) for level in range(1, grid.steps + 1)]
        unclipped = of_minmax = (low + high) / grid.steps
    else:
        sides = [
            (low, grid.zero_point - grid.quant_min),
            (high, grid.quant_max - grid.zero_point),
        ]
        unclipped = max(side / level for side, level in sides if level)
        of_minmax = max(low, high) / (grid.steps / 2)
    power = 2.0 ** (np.ceil(np.log2(max(low, high))) + 1 - np.arange(octaves))
    if constraint in ("power_of_two", "e8m0"):
        found = power
    else:
        found = (power[:, None] * (np.arange(128, 256) / 128)).ravel()
    if least:  # half of a scale may be none: those in question start at twice the unclipped one
        found = found[found <= max(least, found[found >= 2 * unclipped].min())]
    if constraint not in ("power_of_two", "e8m0"):
        found = np.concatenate(
            [found, [side / level for side, level in sides if level], [of_minmax]]
        )
        found = found.astype(np.float16 if constraint == "fp16" else np.float32)
        if least:
            found = found[found <= max(least, 2 * unclipped * 1.01)]
    found = np.unique(np.maximum(found.astype(np.float64), least))
    return found[found > 0]


# ---------------------------------------------------------------------------------------------
# random histograms


def _edges(rng: np.random.Generator) -> np.ndarray:
    kind = rng.integers(5)
    if kind == 0:
        edges = np.linspace(-rng.uniform(0, 3), rng.uniform(0.1, 3), BINS + 1)
    elif kind == 1:  # of both signs, as a log histogram's
        sizes = 2.0 ** np.linspace(-5, rng.uniform(-2, 3), BINS // 2)
        edges = np.concatenate([-sizes[::-1], [2.0**-6], sizes])
    elif kind == 2:
        edges = 2.0 ** np.linspace(-6, 2, BINS + 1)
    elif kind == 3:
        edges = np.sort(rng.standard_normal(BINS + 1))
    else:  # narrow about whole numbers
        whole = np.arange(BINS // 2) - rng.integers(BINS // 2)
        edges = np.concatenate([np.sort(np.concatenate([whole, whole + 2.0**-9])), [20.0]])
    edges = edges * rng.choice([1.0, 0.37, 5.9]) * rng.choice([1, -1])
    return np.sort(edges).astype(np.float32).astype(np.float64)


def _occupied(rng: np.random.Generator, edges: np.ndarray) -> np.ndarray:
    kind = rng.integers(4)
    found = np.zeros(BINS, bool)
    size = int(rng.integers(1, 13))
    start = int(rng.integers(BINS - size + 1))
    if kind == 0:
        found[start : start + size] = True
    elif kind == 1:
        found[rng.choice(BINS, size, replace=False)] = True
    elif kind == 2:  # one sign
        found[rng.choice(BINS, size, replace=False)] = True
        found &= edges[:-1] >= 0 if rng.integers(2) else edges[1:] <= 0
    else:  # every second
        found[start::2] = True
    found &= edges[1:] > edges[:-1]
    if not found.any():
        found[np.argmax(edges[1:] - edges[:-1])] = True
    return found


def random_histogram(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Counts, edges, and a least and a greatest value within the outermost occupied bins."""
    edges = _edges(rng)
    occupied = _occupied(rng, edges)
    size = rng.choice([1.0, 4.0, 1e3, 1e6])
    counts = np.where(occupied, rng.uniform(size=BINS) ** rng.choice([1, 3]) * size, 0.0)
    if rng.integers(3):
        counts = np.where(occupied, np.ceil(counts), 0.0)
    counts[occupied & (counts == 0.0)] = 1.0
    first, last = np.flatnonzero(occupied)[[0, -1]]
    low = edges[first] + (edges[first + 1] - edges[first]) * rng.choice([0.0, 0.0, 0.6, 1.0])
    high = edges[last] + (edges[last + 1] - edges[last]) * rng.choice([1.0, 1.0, 0.7, 0.0])
    low, high = float(np.float32(low)), float(np.float32(high))
    if first == last and (high < low or rng.integers(3) == 0):
        low = high
    return counts, edges, low, high


Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def stacked(histograms: list[tuple[np.ndarray, np.ndarray, float, float]]) -> Batch:
    counts, edges, low, high = zip(*histograms, strict=True)
    return (
        torch.from_numpy(np.stack(counts)),
        torch.from_numpy(np.stack(edges)),
        torch.tensor(low),
        torch.tensor(high),
    )


@cache
def random_batch(seed: int, size: int) -> tuple[Batch, list[Values]]:
    rng = np.random.default_rng(seed)
    histograms = [random_histogram(rng) for _ in range(size)]
    return stacked(histograms), [values_of(*histogram) for histogram in histograms]


class Found(NamedTuple):
    scale: Tensor
    zero_point: Tensor
    error: Tensor

    @property
    def total(self) -> Tensor:
        return self.error[..., 0] + self.error[..., 1]


def outputs(shape: tuple[int, ...] = (), zero_dtype: torch.dtype = torch.int32) -> Found:
    """Filled with what no search finds."""
    return Found(
        torch.full(shape, -7.0),
        torch.full(shape, -77, dtype=zero_dtype),
        torch.full((*shape, 3), -7.0, dtype=torch.float64),
    )


def run(backend: Backend, histograms: Batch, grid: Grid, p: float = 2.0, *options: Any) -> Found:
    inputs = [t.to(backend.device) for t in histograms]
    found = Found(*(t.to(backend.device) for t in outputs(histograms[2].shape)))
    with unchanged(*inputs):
        backend.op("lp_search")(
            *inputs, *found, grid.quant_min, grid.quant_max, p, grid.zero_point, *options
        )
    return Found(*(t.cpu() for t in found))


def some(backend: Backend, batch: Batch, few: int) -> Batch:
    """As many as the backend gets done in little time."""
    slow = {"reference": few, ON_HOST.name: 2 * few}
    return tuple(t[: slow.get(backend.name)] for t in batch)


# ---------------------------------------------------------------------------------------------
# the search


@cache
def least_errors(
    seed: int, size: int, grid: Grid, p: float, constraint: str = "none", least: float = 0.0
) -> list[float]:
    """Of the random histograms, over all scales and zero points; taken once for all backends."""
    return [
        errors_of(values, scales_of(values, grid, constraint, least), grid, p).min()
        for values in random_batch(seed, size)[1]
    ]


def assert_least(found: Found, seed: int, size: int, grid: Grid, p: float, *options: Any) -> None:
    """The errors are the least, and the scales and zero points have them."""
    (counts, *_), all_values = random_batch(seed, size)
    expected = least_errors(seed, size, grid, p, *options)
    for i, total in enumerate(counts.sum(-1)[: len(found.scale)].tolist()):
        values, least = all_values[i], expected[i]
        signal = signal_of(values, p)
        near = pytest.approx(least, rel=EXACT, abs=ROUNDING * signal)
        assert float(found.total[i]) * total == near, (i, found.scale[i], found.zero_point[i])
        zero = grid.zero_points.index(int(found.zero_point[i]))
        scale = np.array([float(found.scale[i])])
        assert errors_of(values, scale, grid, p)[0, zero] == near, i
        assert float(found.error[i, 2]) * total == pytest.approx(signal, rel=EXACT), i


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_has_the_least_error(backend: Backend, grid: Grid, p: float) -> None:
    seed, size = 100 * GRIDS.index(grid) + int(2 * p), 24
    found = run(backend, some(backend, random_batch(seed, size)[0], 3), grid, p)
    assert_least(found, seed, size, grid, p)


# where the first scale that clips more than the best one errs is followed by better ones
LATE = ((100, 49, Grid(0, 3), 2.0), (101, 72, Grid(5, 19), 1.0), (104, 183, Grid(-8, 7), 3.0))


@pytest.mark.parametrize(("seed", "row", "grid", "p"), LATE)
def test_finds_what_comes_late(backend: Backend, seed: int, row: int, grid: Grid, p: float) -> None:
    histograms, all_values = random_batch(seed, 200)
    found = run(backend, tuple(t[row].contiguous() for t in histograms), grid, p)
    least = errors_of(all_values[row], scales_of(all_values[row], grid), grid, p).min()
    assert float(found.total * histograms[0][row].sum()) == pytest.approx(least, rel=EXACT)


@pytest.mark.parametrize("eps", [None, 0.03, 0.3, 40.01])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("grid", [Grid(-3, 4), Grid(-2, 5, 0)], ids=str)
def test_constraints(backend: Backend, grid: Grid, constraint: str, eps: float | None) -> None:
    """The least error of the scales that are allowed."""
    seed, size = 5000 + 10 * CONSTRAINTS.index(constraint), 12
    histograms = some(backend, random_batch(seed, size)[0], 3)
    floor = None if eps is None else torch.tensor(eps, device=backend.device)
    found = run(backend, histograms, grid, 2.0, constraint, floor)
    least = 0.0 if floor is None else float(floor)
    if constraint == "fp16" and least:
        half = torch.tensor(least).half()
        least = float(half if float(half) >= least else half.nextafter(half + 1))
    elif constraint != "none" and least:
        least = 2.0 ** np.ceil(np.log2(least))
    assert_least(found, seed, size, grid, 2.0, constraint, least)
    assert (found.scale >= least).all()
    assert eps != 40.01 or (found.scale == least).all()
    if constraint == "fp16":
        assert_same(found.scale.half().float(), found.scale)
    elif constraint != "none":
        assert (torch.frexp(found.scale).mantissa == 0.5).all()


def log_histogram(x: Tensor, mantissa_bits: int = 5) -> Batch:
    """By sign, exponent and the leading bits of the mantissa."""
    size = x.abs().double()
    exponent = torch.frexp(size).exponent - 1
    lower = 2.0 ** exponent.double()
    step = torch.floor((size / lower - 1) * 2**mantissa_bits) / 2**mantissa_bits
    begin = torch.where(size > 0, lower * (1 + step), 0.0)
    end = torch.where(size > 0, begin + lower / 2**mantissa_bits, 1e-40)
    signs = torch.where(x < 0, -1.0, 1.0).double()
    cells = torch.stack([begin * signs, end * signs]).sort(0).values
    cells, counts = cells.unique(dim=1, return_counts=True)
    edges, at = cells.reshape(-1).unique(return_inverse=True)
    filled = torch.zeros(len(edges) - 1, dtype=torch.float64)
    filled[at.reshape(2, -1)[0]] = counts.double()
    return filled, edges, x.min(), x.max()


SHAPES = {
    "normal": lambda x: x,
    "half": lambda x: x.abs(),
    "heavy": lambda x: x / x.flip(0).abs().clamp(min=1e-3),
    "peaked": lambda x: x**3,
    "shifted": lambda x: x - 2,
    "whole": lambda x: (4 * x).round(),
}


@cache
def dense_histograms(name: str) -> list[Batch]:
    generator = torch.Generator().manual_seed(len(name))
    found = []
    for i in range(30):
        x = SHAPES[name](torch.randn(300, generator=generator))
        if i % 2:
            low, high = torch.aminmax(x)
            counts = torch.histc(x, 30, float(low), float(high)).double()
            edges = torch.linspace(float(low), float(high), 31, dtype=torch.float64)
            found.append((counts, edges, low, high))
        else:
            found.append(log_histogram(x, 2))
    return found


@cache
def least_of_ranges(name: str, at: int, mapping: str) -> Tensor:
    """The least error of the scales whose range ends where bins do; taken once for all backends."""
    counts, edges, low, high = dense_histograms(name)[at]
    pairs = torch.combinations(torch.arange(len(edges)))
    scale, zero = torch.zeros(len(pairs)), torch.zeros(len(pairs), dtype=torch.int32)
    ends = edges[pairs].float().T.contiguous()
    quickest = backends()[1 if len(backends()) > 1 else 0]
    choose, error_of = quickest.op("choose_qparams"), quickest.op("lp_error")
    choose(*ends, scale, zero, torch.tensor([1e-30]), -8, 7, mapping)
    many = [t.expand(len(pairs), *t.shape).contiguous() for t in (counts, low, high)]
    errors = error_of(many[0], edges, *many[1:], scale, zero, -8, 7, 2.0)
    return errors[:, :2].sum(-1).min()


@pytest.mark.parametrize("mapping", ["affine", "symmetric"])
@pytest.mark.parametrize("name", SHAPES)
def test_is_as_good_as_any_range_of_bins(backend: Backend, name: str, mapping: str) -> None:
    grid = Grid(-8, 7, 0 if mapping == "symmetric" else None)
    some_of_them = dense_histograms(name)[: 2 if backend.name == "reference" else None]
    for i, histogram in enumerate(some_of_them):
        found = run(backend, histogram, grid)
        assert found.total <= 1.01 * least_of_ranges(name, i, mapping)


# ---------------------------------------------------------------------------------------------
# the error


@pytest.mark.parametrize("p", [0.5, 1.0, 2.0, 2.4, 4.0])
@pytest.mark.parametrize("grid", [Grid(-3, 4), Grid(-2, 5, 0), Grid(0, 1)], ids=str)
def test_error_of_any_scale(backend: Backend, grid: Grid, p: float) -> None:
    size = 20 if backend.name == "reference" else 100
    histograms, all_values = random_batch(77, size)
    rng = np.random.default_rng(int(10 * p))
    scale = torch.tensor(2.0 ** rng.uniform(-6, 3, size)).float()
    zero = torch.tensor(rng.choice(grid.zero_points, size))
    inputs = [t.to(backend.device) for t in (*histograms, scale, zero)]
    with unchanged(*inputs):
        errors = backend.op("lp_error")(*inputs, grid.quant_min, grid.quant_max, p).cpu()
    total = histograms[0].sum(-1)
    for i, values in enumerate(all_values):
        one = Grid(grid.quant_min, grid.quant_max, int(zero[i]))
        expected = float(errors_of(values, np.array([float(scale[i])]), one, p)[0, 0])
        signal = signal_of(values, p)
        near = pytest.approx(expected, rel=EXACT, abs=ROUNDING * signal)
        assert float(errors[i, :2].sum() * total[i]) == near
        assert float(errors[i, 2] * total[i]) == pytest.approx(signal, rel=EXACT)


def points_of(values: list[float], times: list[float]) -> Batch:
    """Bins so narrow that each is one value."""
    at = torch.tensor(values, dtype=torch.float32).double()
    width = at.abs() * 2.0**-27 + 2.0**-60
    edges = torch.stack([at, at + width], 1).reshape(-1)
    counts = torch.zeros(len(edges) - 1, dtype=torch.float64)
    counts[::2] = torch.tensor(times, dtype=torch.float64)
    return counts, edges, at[0].float(), at[-1].float()


@pytest.mark.parametrize("scale", [0.25, 0.3, 1.0, 7.0])
@pytest.mark.parametrize("zero", [-4, 0, 3])
def test_error_is_that_of_fake_quantize(backend: Backend, scale: float, zero: int) -> None:
    """Clipped is what is rounded to beyond the grid."""
    x = torch.tensor([-9.0, -2.71, -0.4, -0.01, 0.0, 0.13, 0.77, 1.5, 3.4, 11.0])
    times = torch.tensor([3.0, 1.0, 8.0, 2.0, 5.0, 4.0, 1.0, 9.0, 2.0, 6.0], dtype=torch.float64)
    histogram = points_of(x.tolist(), times.tolist())
    s, z = torch.tensor(scale), torch.tensor(zero, dtype=torch.int32)
    level = torch.round(x.double() / s.double()) + zero
    y = ops.fake_quantize(x.double(), s, z, -4, 3)
    assert_same(y.float(), ((level.clamp(-4, 3) - zero) * s.double()).float())
    error = times * (x.double() - y) ** 2
    clipped = (level < -4) | (level > 3)
    inputs = [t.to(backend.device) for t in (*histogram, s, z)]
    found = backend.op("lp_error")(*inputs, -4, 3).cpu() * times.sum()
    expected = [error[clipped].sum(), error[~clipped].sum(), (times * x.double() ** 2).sum()]
    assert found.tolist() == pytest.approx([float(e) for e in expected], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_halfway_to_beyond_the_grid(backend: Backend, p: float) -> None:
    """As near to the last level as to one that the grid has not: counted once, as rounded."""
    low, high = torch.tensor(-4.5), torch.tensor(3.5)
    counts = torch.tensor([3.0, 0.0, 5.0], dtype=torch.float64)
    edges = torch.tensor([-5.0, -4.0, 3.0, 4.0], dtype=torch.float64)
    one, zero = torch.tensor(1.0), torch.tensor(0)
    inputs = [t.to(backend.device) for t in (counts, edges, low, high, one, zero)]
    found = backend.op("lp_error")(*inputs, -4, 3, p).cpu()
    assert found[:2].tolist() == [0.0, 0.5**p]


def test_error_is_that_of_values_within_the_bins(backend: Backend) -> None:
    edges = torch.tensor([-4.0, -1.0, 0.5, 0.75, 6.0], dtype=torch.float64)
    counts = torch.tensor([3.0, 70.0, 8.0, 20.0], dtype=torch.float64)
    steps = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    x = edges[:-1, None] + (edges[1:] - edges[:-1]).unsqueeze(1) * steps
    extremes = torch.tensor([-4.0, 6.0], dtype=torch.float64)
    inner = counts - torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    scale, zero = torch.tensor(0.37), torch.tensor(1, dtype=torch.int32)

    def off(values: Tensor) -> Tensor:
        return (values - ops.fake_quantize(values, scale, zero, -4, 3)).abs() ** 3

    expected = ((off(x).mean(1) * inner).sum() + off(extremes).sum()) / counts.sum()
    inputs = [t.to(backend.device) for t in (counts, edges, *extremes.float(), scale, zero)]
    found = backend.op("lp_error")(*inputs, -4, 3, 3.0)
    assert float(found[:2].sum()) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("scale", [0.0, -1.0, torch.inf, torch.nan])
def test_error_of_an_unusable_scale(backend: Backend, scale: float) -> None:
    arguments = error_arguments(scale=torch.tensor(scale))
    arguments = {k: to_device(v, backend) for k, v in arguments.items()}
    assert backend.op("lp_error")(**arguments).isnan().all()


@pytest.mark.parametrize("zero", [-9, 8, 2**40])
def test_error_of_a_zero_point_off_the_grid(backend: Backend, zero: int) -> None:
    arguments = error_arguments(zero_point=torch.tensor(zero))
    arguments = {k: to_device(v, backend) for k, v in arguments.items()}
    assert backend.op("lp_error")(**arguments).isnan().all()


def to_device(value: Any, backend: Backend) -> Any:
    return value.to(backend.device) if isinstance(value, Tensor) else value


# ---------------------------------------------------------------------------------------------
# histograms of one kind


@pytest.mark.parametrize("magnitude", [1e-38, 1e-20, 1.0, 1e30, torch.finfo().max])
@pytest.mark.parametrize("grid", [Grid(-8, 7), Grid(-8, 7, 0), Grid(0, 1)], ids=str)
def test_magnitudes(backend: Backend, grid: Grid, magnitude: float) -> None:
    """Times a power of two, all is as it was; and the greatest values have a scale."""
    counts = torch.tensor([5.0, 70.0, 300.0, 20.0, 1.0], dtype=torch.float64)
    edges = torch.tensor([-1.0, -0.6, -0.1, 0.3, 0.8, 1.0], dtype=torch.float64)
    power = 2.0 ** np.floor(np.log2(magnitude))
    ends = torch.tensor(-0.9), torch.tensor(0.95)
    one = run(backend, (counts, edges, *ends), grid)
    other = run(backend, (counts, edges * power, *(end * power for end in ends)), grid)
    if magnitude > 1e-38:  # below, the least scale is in the way
        assert_same(other.scale, (one.scale.double() * power).float())
        assert_same(other.zero_point, one.zero_point)
        near = pytest.approx(float(one.total) * power**2, rel=1e-12)
        assert float(other.total) == near
    assert 0 < float(other.scale) < torch.inf
    assert other.error.isfinite().all()


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_the_greatest_values(backend: Backend, constraint: str) -> None:
    most = torch.tensor(torch.finfo().max)
    edges = torch.tensor([-1.0, -0.5, 0.5, 1.0], dtype=torch.float64) * float(most)
    counts = torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64)
    found = run(backend, (counts, edges, -most, most), Grid(-1, 1, 0), 2.0, constraint)
    assert float(found.scale) < torch.inf
    if constraint in ("power_of_two", "e8m0"):
        assert float(found.scale) == 2.0**127
    elif constraint == "fp16":
        assert float(found.scale) == 65504
    # no scale of the constraint is as great as this least one
    least = torch.tensor(3e38, device=backend.device)
    found = run(backend, (counts, edges, -most, most), Grid(-1, 1, 0), 2.0, constraint, least)
    expected = {"none": float(most), "fp16": 65504.0}.get(constraint, 2.0**127)
    assert float(found.scale) == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("constraint", ["none", "power_of_two", "e8m0", "fp16"])
def test_the_least_scale(backend: Backend, constraint: str) -> None:
    """Values smaller than any scale that is allowed."""
    histogram = points_of([-1e-45, 0.0, 2e-45], [3.0, 4.0, 5.0])
    edges = torch.tensor([-2e-45, -1e-45, 1e-45, 3e-45], dtype=torch.float64)
    counts = torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64)
    found = run(backend, (counts, edges, *histogram[2:]), Grid(-8, 7), 2.0, constraint)
    expected = {"fp16": 2.0**-24, "e8m0": 2.0**-127}.get(constraint, 2.0**-126)
    assert float(found.scale) == expected


@pytest.mark.parametrize(
    "grid", [Grid(0, 1), Grid(0, 255), Grid(-8, 7), Grid(-128, 127, 0)], ids=str
)
@pytest.mark.parametrize(
    "values", [[0.0, 1.0], [-1.0, 1.0], [-1.0, 0.0], [3.7], [-0.3, 0.0], [0.0, 1e4]]
)
def test_few_values_have_no_error(backend: Backend, values: list[float], grid: Grid) -> None:
    if grid.steps == 1 and len(values) == 2 and 0.0 not in values:
        pytest.skip("three levels")
    found = run(backend, points_of(values, [600.0] * len(values)), grid)
    assert found.total <= 1e-12 * found.error[2]


@pytest.mark.parametrize("quant_max", [7, 127])
def test_whole_numbers_have_no_error(backend: Backend, quant_max: int) -> None:
    """No part of 1 is a scale for them: twice as many levels would be needed."""
    for most in (quant_max // 2 + 1, 3 * quant_max // 4, quant_max):
        values = [float(value) for value in range(-most, most + 1)]
        for zero_point in (None, 0):
            grid = Grid(-quant_max - 1, quant_max, zero_point)
            found = run(backend, points_of(values, [2.0] * len(values)), grid)
            assert float(found.scale) == 1
            assert found.total <= 1e-12 * found.error[2]


def test_one_outlier_is_exact(backend: Backend) -> None:
    values = [*torch.linspace(-3, 3, 400).tolist(), 1234.567]
    found = run(backend, points_of(values, [1e-6] * 400 + [1e6]), Grid(-128, 127))
    level = 1234.567 / float(found.scale)
    assert level == pytest.approx(round(level), abs=1e-4)


@pytest.mark.parametrize("value", [-2.5, 1e-3, 3.0])
def test_a_bin_that_ends_at_its_extreme(backend: Backend, value: float) -> None:
    """As bfloat16 data clamped at the edge of a bin: the others of that bin lie there too."""
    sign = 1.0 if value > 0 else -1.0
    edges = torch.tensor([0.0, value / 2, value, 2 * value], dtype=torch.float64).sort().values
    counts = torch.tensor([2.0, 3.0, 500.0], dtype=torch.float64)
    ends = [torch.tensor(0.0), torch.tensor(value)]
    if sign < 0:
        counts, ends = counts.flip(0).contiguous(), ends[::-1]
    found = run(backend, (counts, edges, ends[0], ends[1]), Grid(0, 255))
    assert float(found.error[2]) == pytest.approx(value**2, rel=0.02)


EMPTY: dict[str, tuple[list[float], float, float]] = {
    "no_counts": ([0.0, 0.0], -1.0, 1.0),
    "never_fed": ([0.0, 0.0], torch.inf, -torch.inf),
    "infinite": ([2.0, 3.0], -1.0, torch.inf),
    "nan": ([2.0, 3.0], torch.nan, 1.0),
    "crossed": ([2.0, 3.0], 1.0, -1.0),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("grid", [Grid(3, 9), Grid(3, 9, 5)], ids=str)
def test_empty(backend: Backend, name: str, grid: Grid) -> None:
    counts, low, high = EMPTY[name]
    edges = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    histogram = (
        torch.tensor(counts, dtype=torch.float64),
        edges,
        torch.tensor(low),
        torch.tensor(high),
    )
    found = run(backend, histogram, grid)
    assert (float(found.scale), int(found.zero_point), found.error.tolist()) == (1, 0, [0, 0, 0])
    inputs = [t.to(backend.device) for t in (*histogram, torch.tensor(-1.0), torch.tensor(5))]
    assert backend.op("lp_error")(*inputs, 3, 9).tolist() == [0, 0, 0]


@pytest.mark.parametrize("grid", [Grid(-8, 7), Grid(-8, 7, 2)], ids=str)
def test_zeros(backend: Backend, grid: Grid) -> None:
    zero = torch.tensor(0.0)
    for edges in ([-1.0, 1.0], [0.0, 1.0], [-1e-40, 1e-40]):
        counts = torch.tensor([50.0], dtype=torch.float64)
        histogram = counts, torch.tensor(edges, dtype=torch.float64), zero, zero
        found = run(backend, histogram, grid)
        assert float(found.scale) == 1
        assert found.error.tolist() == [0, 0, 0]
        assert int(found.zero_point) in grid.zero_points


def test_a_side_without_levels(backend: Backend) -> None:
    """All is clipped to zero, whatever the scale."""
    edges = torch.tensor([-2.0, -1.0, 0.0], dtype=torch.float64)
    counts = torch.tensor([2.0, 3.0], dtype=torch.float64)
    histogram = counts, edges, torch.tensor(-2.0), torch.tensor(0.0)
    found = run(backend, histogram, Grid(0, 255, 0))
    assert float(found.scale) == 1
    assert float(found.total) == pytest.approx(float(found.error[2]), rel=1e-12)


# ---------------------------------------------------------------------------------------------
# all backends alike


@cache
def of_the_reference(name: str, at: int, grid: Grid, p: float) -> Found:
    return run(Backend("reference"), dense_histograms(name)[at], grid, p)


@pytest.mark.parametrize("p", [0.5, 2.0, 2.4])
@pytest.mark.parametrize("grid", [Grid(-128, 127), Grid(0, 15), Grid(-128, 127, 0)], ids=str)
def test_is_the_reference(backend: Backend, grid: Grid, p: float) -> None:
    for name in SHAPES:
        for i, histogram in enumerate(dense_histograms(name)[:2]):
            found = run(backend, histogram, grid, p)
            expected = of_the_reference(name, i, grid, p)
            assert found.error.tolist() == pytest.approx(expected.error.tolist(), rel=1e-11)
            at = (*histogram, expected.scale, expected.zero_point, grid.quant_min, grid.quant_max)
            theirs = ops.lp_error(*at, p)[:2].sum()
            assert float(found.total) == pytest.approx(float(theirs), rel=1e-12)
            if p != 2.0 or grid.zero_point is not None:
                continue
            assert_all_same(found[:2], expected[:2], name)


@pytest.mark.parametrize("p", [2.0, 2.4])
def test_many_are_each_by_itself(backend: Backend, p: float) -> None:
    histograms = some(backend, random_batch(11, 60)[0], 6)
    empty = histograms[0].clone()
    empty[1] = 0
    histograms = empty, *histograms[1:]
    found = run(backend, histograms, Grid(-8, 7), p)
    for i in range(len(found.scale)):
        one = run(backend, tuple(t[i].contiguous() for t in histograms), Grid(-8, 7), p)
        assert_all_same(one, [t[i] for t in found], i)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (0,), (2, 0)])
def test_shapes_and_shared_edges(backend: Backend, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    edges = torch.linspace(-1, 2, 9, dtype=torch.float64)
    counts = torch.from_numpy(rng.integers(1, 99, (*shape, 8))).double()
    ends = torch.full(shape, -0.9), torch.full(shape, 1.9)
    shared = run(backend, (counts, edges, *ends), Grid(0, 15))
    own = run(backend, (counts, edges.expand(*shape, 9).contiguous(), *ends), Grid(0, 15))
    assert_all_same(own, shared)
    assert (shared.scale > 0).all()
    inputs = [t.to(backend.device) for t in (counts, edges, *ends, *shared[:2])]
    errors = backend.op("lp_error")(*inputs, 0, 15).cpu()
    assert errors.shape == (*shape, 3)
    torch.testing.assert_close(errors, shared.error, rtol=1e-12, atol=0)


def test_zero_point_dtypes(backend: Backend) -> None:
    histogram, _ = random_batch(12, 1)
    found = run(backend, histogram, Grid(-8, 7))
    wide = outputs((1,), torch.int64)
    inputs = [t.to(backend.device) for t in histogram]
    others = [t.to(backend.device) for t in wide]
    backend.op("lp_search")(*inputs, *others, -8, 7)
    assert_same(others[1].int(), found.zero_point)
    at = backend.op("lp_error")(*inputs, *others[:2], -8, 7)
    torch.testing.assert_close(at.cpu(), found.error, rtol=1e-12, atol=0)


compiled = pytest.mark.skipif(not native_status.cpu, reason="without compiled kernels")


@compiled
@pytest.mark.parametrize("p", [0.7, 1.0, 2.0, 2.4])
@pytest.mark.parametrize("grid", [Grid(-8, 7), Grid(0, 255), Grid(-128, 127, 0)], ids=str)
def test_instruction_sets_and_threads_agree(grid: Grid, p: float) -> None:
    """To the last bit."""
    build = native_status.build
    before = build.cpu_isa()
    histograms, _ = random_batch(13, 100)
    results = []
    try:
        for isa in build.cpu_isas():
            build.set_cpu_isa(isa)
            for count in (1, 2, 3):
                with threads(count):
                    found = outputs((100,))
                    levels = grid.quant_min, grid.quant_max, p, grid.zero_point
                    ops.lp_search(*histograms, *found, *levels)
                    errors = ops.lp_error(*histograms, *found[:2], *levels[:3])
                    results.append([*found, errors])
    finally:
        build.set_cpu_isa(before)
    for other in results[1:]:
        assert_all_same(other, results[0])


def many_bins() -> Batch:
    """Three histograms of more bins than a block of a GPU keeps beside it."""
    generator = torch.Generator().manual_seed(5)
    at = torch.linspace(-4, 4, 5001, dtype=torch.float64)
    share = torch.rand(3, 5000, generator=generator, dtype=torch.float64)
    counts = (1e3 * share * torch.exp(-(at[:-1] ** 2))).floor()
    counts[1, 10:-10] = 0.0
    counts[2, ::3] = 0.0
    return counts, at, torch.full((3,), -4.0), torch.full((3,), 4.0)


@compiled
@pytest.mark.parametrize("p", [2.0, 2.4, 0.5])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("cuda", params(lambda backend: backend.cuda))
def test_cuda_is_the_cpu(cuda: Backend, constraint: str, p: float) -> None:
    """To the last bit; but a GPU has powers of its own."""
    batches = [(random_batch(20, 5)[0], GRIDS[::2])]
    if p == 2.0:
        batches.append((many_bins(), [Grid(0, 255), Grid(-128, 127, 0)]))
    for histograms, grids in batches:
        for grid in grids:
            expected = run(Backend("cpu"), histograms, grid, p, constraint)
            with cuda.selected():
                found = run(cuda, histograms, grid, p, constraint)
            if cuda == GPU and p != 2.0:
                torch.testing.assert_close(found.total, expected.total, rtol=1e-9, atol=1e-12)
            else:
                assert_all_same(found, expected, grid)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_enabled(backend: Backend, dtype: torch.dtype) -> None:
    histogram, _ = random_batch(14, 3)
    inputs = [t.to(backend.device) for t in histogram]
    found = [t.to(backend.device) for t in outputs((3,))]
    off = torch.zeros(1, dtype=dtype, device=backend.device)
    with unchanged(*found):
        backend.op("lp_search")(*inputs, *found, -8, 7, enabled=off)
    backend.op("lp_search")(*inputs, *found, -8, 7, enabled=off.logical_not().to(dtype))
    assert_all_same(found, run(backend, histogram, Grid(-8, 7)))


@properties
@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=40),
    st.floats(-1e6, 1e6, width=32),
    st.floats(2**-10, 1e6, width=32),
    st.sampled_from([Grid(-8, 7), Grid(0, 255), Grid(-128, 127, 0), Grid(0, 2**16 - 1)]),
    st.floats(0.25, 6),
)
def test_properties(counts: list[int], low: float, width: float, grid: Grid, p: float) -> None:
    """What is found is on the grid, its error what lp_error says, and at most all there is."""
    ends = torch.tensor(low), torch.tensor(low) + torch.tensor(width)
    edges = torch.linspace(*map(float, ends), len(counts) + 1, dtype=torch.float64)
    histogram = torch.tensor(counts, dtype=torch.float64), edges, *ends
    found = outputs()
    ops.lp_search(*histogram, *found, grid.quant_min, grid.quant_max, p, grid.zero_point)
    assert 0 < float(found.scale) < torch.inf
    assert int(found.zero_point) in grid.zero_points or sum(counts) == 0
    at = ops.lp_error(*histogram, *found[:2], min(grid.quant_min, 0), grid.quant_max, p)
    torch.testing.assert_close(at, found.error, rtol=1e-9, atol=0)
    assert found.total <= found.error[2] * (1 + 1e-9)


# ---------------------------------------------------------------------------------------------
# arguments


def error_arguments(**changed: Any) -> dict[str, Any]:
    histogram = {
        "counts": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        "edges": torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64),
        "min_val": torch.tensor(-0.5),
        "max_val": torch.tensor(1.5),
    }
    grid = {"quant_min": -8, "quant_max": 7}
    at = {"scale": torch.tensor(0.1), "zero_point": torch.tensor(0, dtype=torch.int32)}
    return {**histogram, **at, **grid, **changed}


def arguments(**changed: Any) -> dict[str, Any]:
    return {**error_arguments(), "error": torch.ones(3, dtype=torch.float64), **changed}


Rejected = dict[str, tuple[dict[str, Any], type[Exception], str]]

REJECTED_BOTH: Rejected = {
    "counts_dtype": (
        {"counts": torch.ones(3)},
        TypeError,
        "counts: expected torch.float64, got torch.float32",
    ),
    "counts_list": ({"counts": [1.0]}, TypeError, "counts: expected torch.float64, got list"),
    "counts_0-d": (
        {"counts": torch.ones((), dtype=torch.float64)},
        ValueError,
        r"counts: expected shape .* at least 1 bin, got \(\)",
    ),
    "no_bins": (
        {"counts": torch.ones(0, dtype=torch.float64)},
        ValueError,
        r"counts: expected shape .* at least 1 bin, got \(0,\)",
    ),
    "counts_strides": (
        {"counts": torch.ones(6, dtype=torch.float64)[::2]},
        ValueError,
        r"counts: expected a contiguous tensor, got strides \(2,\)",
    ),
    "edges_dtype": (
        {"edges": torch.ones(4)},
        TypeError,
        "edges: expected torch.float64, got torch.float32",
    ),
    "edges_size": (
        {"edges": torch.ones(3, dtype=torch.float64)},
        ValueError,
        r"edges: expected shape \(4,\) or one row for each histogram, got \(3,\)",
    ),
    "min_val_dtype": (
        {"min_val": torch.ones((), dtype=torch.float64)},
        TypeError,
        "min_val: expected torch.float32, got torch.float64",
    ),
    "min_val_size": (
        {"min_val": torch.ones(2)},
        ValueError,
        r"min_val: expected 1 element, got shape \(2,\)",
    ),
    "max_val_size": (
        {"max_val": torch.ones(0)},
        ValueError,
        r"max_val: expected 1 element, got shape \(0,\)",
    ),
    "max_val_meta": (
        {"max_val": torch.empty((), device="meta")},
        ValueError,
        "max_val: expected a tensor on cpu .*, got one on meta",
    ),
    "scale_dtype": (
        {"scale": torch.ones((), dtype=torch.float16)},
        TypeError,
        "scale: expected torch.float32, got torch.float16",
    ),
    "scale_size": (
        {"scale": torch.ones(3)},
        ValueError,
        r"scale: expected 1 element, got shape \(3,\)",
    ),
    "zero_point_dtype": (
        {"zero_point": torch.ones(())},
        TypeError,
        "zero_point: expected torch.int32 or torch.int64, got torch.float32",
    ),
    "zero_point_size": (
        {"zero_point": torch.ones(2, dtype=torch.int32)},
        ValueError,
        r"zero_point: expected 1 element, got shape \(2,\)",
    ),
    "quant_range": (
        {"quant_min": 7},
        ValueError,
        "quant_min: expected a value below quant_max, got quant_min=7, quant_max=7",
    ),
    "quant_wide": (
        {"quant_max": 2**31},
        ValueError,
        "quant_min, quant_max: expected int32 values, got .*",
    ),
    "p_zero": ({"p": 0.0}, ValueError, r"p: expected a value in \(0, 6\], got 0.0"),
    "p_great": ({"p": 6.5}, ValueError, r"p: expected a value in \(0, 6\], got 6.5"),
    "p_nan": ({"p": float("nan")}, ValueError, r"p: expected a value in \(0, 6\], got nan"),
}
REJECTED: Rejected = {
    **REJECTED_BOTH,
    "error_dtype": (
        {"error": torch.ones(3)},
        TypeError,
        "error: expected torch.float64, got torch.float32",
    ),
    "error_size": (
        {"error": torch.ones(2, dtype=torch.float64)},
        ValueError,
        r"error: expected 3 elements, got shape \(2,\)",
    ),
    "fixed_below": (
        {"fixed_zero_point": -9},
        ValueError,
        r"fixed_zero_point: expected a value in \[-8, 7\], got -9",
    ),
    "fixed_above": (
        {"fixed_zero_point": 8},
        ValueError,
        r"fixed_zero_point: expected a value in \[-8, 7\], got 8",
    ),
    "eps_dtype": (
        {"eps": torch.ones((), dtype=torch.float64)},
        TypeError,
        "eps: expected torch.float32, got torch.float64",
    ),
    "eps_size": (
        {"eps": torch.ones(2)},
        ValueError,
        r"eps: expected 1 element, got shape \(2,\)",
    ),
    "eps_number": ({"eps": 1e-3}, TypeError, "eps: expected torch.float32, got float"),
    **REJECTED_SWITCHES,
}
CONSTRAINT_MESSAGE = "constraint: expected one of none, power_of_two, fp16, e8m0, got 'pot'"


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name: str) -> None:
    changed, error, match = REJECTED[name]
    assert_rejected(ops.lp_search, arguments(**changed), error, f"^lp_search: {match}")


def test_rejects_a_constraint() -> None:
    changed = arguments(constraint="pot")
    assert_rejected(ops.lp_search, changed, ValueError, f"^lp_search: {CONSTRAINT_MESSAGE}")


@pytest.mark.parametrize("name", REJECTED_BOTH)
def test_error_rejects(name: str) -> None:
    changed, error, match = REJECTED_BOTH[name]
    assert_rejected(ops.lp_error, error_arguments(**changed), error, f"^lp_error: {match}")


@pytest.mark.parametrize("name", REJECTED)
@any_isa
def test_kernel_rejects(backend: Backend, name: str) -> None:
    if not backend.cuda:
        assert_rejected(backend.op("lp_search"), arguments(**REJECTED[name][0]), Exception)
        if name in REJECTED_BOTH:
            changed = error_arguments(**REJECTED[name][0])
            assert_rejected(backend.op("lp_error"), changed, Exception)


@pytest.mark.parametrize("constraint", [-1, 4])
@any_isa
def test_kernel_rejects_a_constraint(backend: Backend, constraint: int) -> None:
    if not backend.cuda:
        changed = arguments(constraint=constraint)
        assert_rejected(backend.op("lp_search"), changed, Exception, "constraint: expected")


def test_meta() -> None:
    counts = torch.empty(2, 5, 16, dtype=torch.float64, device="meta")
    edges = torch.empty(17, dtype=torch.float64, device="meta")
    ends = [torch.empty(2, 5, device="meta") for _ in range(2)]
    found = [t.to("meta") for t in outputs((2, 5))]
    ops.lp_search(counts, edges, *ends, *found, -8, 7)
    assert ops.lp_error(counts, edges, *ends, *found[:2], -8, 7).shape == (2, 5, 3)


def test_opcheck() -> None:
    opcheck("lp_search", **arguments())
    opcheck("lp_error", **error_arguments())
    histograms, _ = random_batch(15, 3)
    found = outputs((3,), torch.int64)
    eps, off = torch.tensor(0.1), torch.zeros(1, dtype=torch.uint8)
    opcheck("lp_search", *histograms, *found, -8, 7, 2.4, 0, "fp16", eps, off)
    opcheck("lp_error", *histograms, torch.ones(3), torch.zeros_like(found[1]), -8, 7, 2.4)
    opcheck("lp_search", *(t[:0] for t in histograms), *(t[:0] for t in found), -8, 7)


def test_compiles() -> None:
    def search(histograms: Batch, found: Found) -> Tensor:
        ops.lp_search(*histograms, *found, -8, 7, 2.0, None, "power_of_two")
        return ops.lp_error(*histograms, found.scale, found.zero_point, -8, 7).sum()

    histograms, _ = random_batch(16, 3)
    eager, traced = outputs((3,)), outputs((3,))
    expected = search(histograms, eager)
    torch.compiler.reset()
    found = torch.compile(search, fullgraph=True, backend="aot_eager")(histograms, traced)
    assert_all_same([*traced, found], [*eager, expected])


def test_notes_its_updates() -> None:
    changed = arguments(scale=torch.tensor(0.1))
    before = changed["scale"]._version
    ops.lp_search(**changed)
    assert changed["scale"]._version > before

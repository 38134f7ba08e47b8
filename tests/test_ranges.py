"""Scales from stored histograms: against the raw data, and against each method's definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from entropy import divergences_of
from ops.cases import assert_all_same, assert_same, unchanged
from torch import Tensor, nn
from torch.ao.quantization import observer as ao_observer

import pyobserver as po
from pyobserver import ranges
from pyobserver.ranges import METHODS, Grid, Histogram, Solution, solve, solve_all

COUNT = 20_000
BINS = 256
SPACINGS = ("log", "linear")
SCHEMES = {"affine": False, "symmetric": True}
CONSTRAINTS = ("none", "power_of_two", "fp16", "e8m0")
FAST = po.native_status.cpu  # the reference takes a second a search, and is given few
TINY = torch.finfo(torch.float32).tiny


def _uniform(generator: torch.Generator) -> Tensor:
    return torch.rand(COUNT, generator=generator, dtype=torch.float64) * 0.998 + 0.001


def _normal(generator: torch.Generator) -> Tensor:
    return torch.randn(COUNT, generator=generator, dtype=torch.float64)


def _laplace(generator: torch.Generator) -> Tensor:
    p = _uniform(generator) - 0.5
    return -p.sign() * torch.log1p(-2 * p.abs())


def _student(generator: torch.Generator) -> Tensor:
    """Of two degrees of freedom, by its quantile function."""
    p = _uniform(generator)
    return (2 * p - 1) / (2 * p * (1 - p)).sqrt()


# those whose values are spread as the histograms take them to be
SMOOTH: dict[str, Callable[[torch.Generator], Tensor]] = {
    "normal": _normal,
    "laplace": _laplace,
    "student": _student,
    "log_normal": lambda g: _normal(g).exp(),
    "negative": lambda g: -_laplace(g).abs() - 0.5,
    "shifted": lambda g: _normal(g) * 0.1 + 3,
}
OTHERS: dict[str, Callable[[torch.Generator], Tensor]] = {
    "relu": lambda g: _normal(g).relu(),
    "sparse": lambda g: _normal(g) * (_uniform(g) > 0.95),
    "outlier": lambda g: torch.cat([_normal(g), torch.tensor([80.0], dtype=torch.float64)]),
    "constant": lambda g: torch.full((99,), -2.5, dtype=torch.float64),
    "zeros": lambda g: torch.zeros(99, dtype=torch.float64),
    "two_valued": lambda g: (_normal(g) > 0).double() * 4 - 1,
    "small": lambda g: _normal(g) * 1e-20,
    "large": lambda g: _normal(g) * 1e30,
}
KINDS = {**SMOOTH, **OTHERS}
USED = (*KINDS,) if FAST else ("laplace", "constant")


@cache
def data(kind: str) -> Tensor:
    return KINDS[kind](torch.Generator().manual_seed(len(kind))).float()


def log_of(x: Tensor, mantissa_bits: int = 2) -> Histogram:
    observer = po.LogHistogramObserver(mantissa_bits)
    observer(x)
    return observer.statistic()


def linear_of(x: Tensor, bins: int = BINS) -> Histogram:
    observer = po.HistogramObserver(bins)
    observer(x)
    return observer.statistic()


@cache
def histogram_of(kind: str, spacing: str) -> Histogram:
    return log_of(data(kind)) if spacing == "log" else linear_of(data(kind))


@cache
def all_kinds(spacing: str) -> Histogram:
    """A row for each kind."""
    return ranges.stack([histogram_of(kind, spacing) for kind in USED])


def options_of(method: str, bins: int = BINS) -> dict[str, Any]:
    """So few bins that the reference is fast."""
    if method == "kl":
        return {"bins": bins, "start_bin": bins // 16, "stride": 5}
    return {"bins": bins} if method == "l2_greedy" else {}


def quantized(x: Tensor, found: Solution, grid: Grid) -> tuple[Tensor, Tensor]:
    """The values in float64, and whether they round to beyond the grid."""
    scale, zero_point = found.scale.double(), found.zero_point.double()
    level = torch.round(x.double() / scale) + zero_point
    inside = level.clamp(grid.quant_min, grid.quant_max)
    return (inside - zero_point) * scale, level != inside


def measured(x: Tensor, found: Solution, grid: Grid) -> tuple[float, float]:
    """The mean squared error on the data: by clipping, by rounding."""
    y, clipped = quantized(x, found, grid)
    squared = (y - x.double()) ** 2
    return tuple(float(squared[at].sum()) / x.numel() for at in (clipped, ~clipped))  # type: ignore[return-value]


def grid_of(bits: int, scheme: str, constraint: str = "none") -> Grid:
    return Grid.of(bits, symmetric=SCHEMES[scheme], scale_constraint=constraint)


def is_allowed(scale: Tensor | float, constraint: str) -> bool:
    scale = torch.as_tensor(scale)
    mantissa, exponent = torch.frexp(scale)
    if constraint == "fp16":
        return bool((scale.half().float() == scale).all())
    power = (mantissa == 0.5) & (exponent - 1 >= -127) & (exponent - 1 <= 127)
    return constraint == "none" or bool(power.all())


def flat(solution: Solution) -> list[Tensor]:
    return [*solution, solution.error, solution.sqnr]


# ---- what holds for every method ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_grids(method: str, spacing: str, scheme: str) -> None:
    """The scale is one that is allowed, the zero point on the grid, zero exact."""
    for bits in (2, 4, 8, 16) if FAST else (4,):
        for constraint in CONSTRAINTS:
            grid = grid_of(bits, scheme, constraint)
            (found,) = solve_all([all_kinds(spacing)], method, grid, **options_of(method))
            scale, zero_point = found.scale, found.zero_point
            context = (bits, constraint, found)
            assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int64)
            assert ((scale > 0) & scale.isfinite()).all(), context
            assert is_allowed(scale, constraint), context
            assert ((zero_point >= grid.quant_min) & (zero_point <= grid.quant_max)).all(), context
            if scheme == "symmetric":
                assert (zero_point == 0).all(), context
            for end, level in ((found.min_val, grid.quant_min), (found.max_val, grid.quant_max)):
                assert_same(end, (level - zero_point) * scale, context)
            assert (
                torch.stack([found.clipping_error, found.rounding_error, found.signal]) >= 0
            ).all()
            assert_same(found.error, found.clipping_error + found.rounding_error)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_next_power_of_two_clips_nothing(spacing: str, scheme: str) -> None:
    """But for half a level, where the zero point is rounded."""
    for bits in (2, 4, 8, 16):
        for constraint in ("power_of_two", "e8m0"):
            grid = grid_of(bits, scheme, constraint)
            (found,) = solve_all([all_kinds(spacing)], "minmax", grid)
            (usual,) = solve_all([all_kinds(spacing)], "minmax", grid_of(bits, scheme))
            assert (found.scale >= usual.scale).all()
            assert (found.scale < 2 * usual.scale).all()
            for i, kind in enumerate(USED):
                levels = torch.round(data(kind).double() / found.scale[i]) + found.zero_point[i]
                assert grid.quant_min - 1 <= levels.min(), (kind, bits)
                assert levels.max() <= grid.quant_max + 1, (kind, bits)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_errors_are_those_of_the_data(method: str, spacing: str) -> None:
    for kind in SMOOTH if FAST else ("student",):
        x = data(kind)
        fine = log_of(x, 6) if spacing == "log" else linear_of(x, 2048)
        for bits in (3, 8):
            for scheme in SCHEMES:
                grid = grid_of(bits, scheme)
                (found,) = solve_all([fine], method, grid, **options_of(method))
                clipping, rounding = measured(x, found, grid)
                context = (kind, bits, scheme, found)
                total = clipping + rounding
                assert float(found.error) == pytest.approx(total, rel=0.05), context
                assert float(found.clipping_error) == pytest.approx(clipping, abs=0.05 * total)
                assert float(found.rounding_error) == pytest.approx(rounding, abs=0.05 * total)
                signal = float((x.double() ** 2).mean())
                assert float(found.signal) == pytest.approx(signal, rel=1e-3), context
                sqnr = 10 * math.log10(signal / total)
                assert float(found.sqnr) == pytest.approx(sqnr, abs=0.3), context


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_error_is_that_of_fake_quantize(spacing: str, scheme: str) -> None:
    x = data("laplace")
    for bits in (4, 8):
        grid = grid_of(bits, scheme)
        (found,) = solve_all([histogram_of("laplace", spacing)], "mse", grid)
        ends = (grid.quant_min, grid.quant_max)
        y = po.ops.fake_quantize(x, found.scale.view(1), found.zero_point.int().view(1), *ends)
        assert float(((y - x).double() ** 2).mean()) == pytest.approx(float(found.error), rel=0.1)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_mse_errs_least(spacing: str, scheme: str) -> None:
    """Others may have a scale between those that are tried, which lie 0.4 to 0.8 % apart.

    That of the range of all values is among those, up to its rounding.
    """
    for bits in (2, 8) if FAST else (4,):
        for constraint in CONSTRAINTS:
            grid = grid_of(bits, scheme, constraint)
            (best,) = solve_all([all_kinds(spacing)], "mse", grid)
            for method in METHODS:
                between = constraint in ("none", "fp16")
                slack = 1 + (1e-12 if not between else 1e-6 if method == "minmax" else 1e-2)
                (other,) = solve_all([all_kinds(spacing)], method, grid, **options_of(method))
                context = (bits, constraint, method, best, other)
                assert (best.error <= slack * other.error + 1e-90).all(), context


@pytest.mark.parametrize("method", METHODS)
def test_no_error_is_no_noise(method: str) -> None:
    for spacing in SPACINGS:
        found = solve(histogram_of("zeros", spacing), method, **options_of(method))
        assert (float(found.error), float(found.sqnr)) == (0.0, math.inf)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_data_of_any_magnitude_has_a_range_of_its_own(method: str, spacing: str) -> None:
    """Times a power of two, the scale is too."""
    x = data("laplace")
    for symmetric in (False, True):
        for exponent in (-66, 60):
            make = log_of if spacing == "log" else linear_of
            found = solve(make(x * 2.0**exponent), method, symmetric=symmetric)
            usual = solve(make(x), method, symmetric=symmetric)
            ratio = float(found.scale) / float(usual.scale)
            assert ratio == pytest.approx(2.0**exponent, rel=1e-5), (symmetric, exponent)
            assert_same(found.zero_point, usual.zero_point)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_eps_is_the_least_scale(method: str, constraint: str) -> None:
    least = 0.3
    for spacing in SPACINGS:
        for kind in ("normal", "constant", "zeros", "small"):
            histogram = histogram_of(kind, spacing)
            options = {"scale_constraint": constraint, **options_of(method)}
            found = solve(histogram, method, eps=least, **options)
            scale = float(found.scale)
            assert is_allowed(scale, constraint)
            if kind == "zeros" and method in ("mse", "lp"):
                assert scale == 1.0
            elif constraint in ("power_of_two", "e8m0"):
                assert scale == 0.5
            else:
                assert scale == pytest.approx(least, rel=1e-3)
                assert constraint == "fp16" or scale >= np.float32(least)


@pytest.mark.parametrize("method", METHODS)
def test_the_least_eps(method: str) -> None:
    """A positive eps that float32 has not is refused; the least that it has gives a scale."""
    for eps in (1e-50, 1e39, 0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="solve: eps: expected a positive finite float32, got"):
            solve(histogram_of("zeros", "log"), method, eps=eps)
    assert float(solve(histogram_of("zeros", "log"), method, eps=1e-45).scale) > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_data_at_the_ends_of_float32(method: str, constraint: str) -> None:
    for scale in (3.3e38, 1e-37):
        x = torch.linspace(-1, 1, 500) * scale
        for make in (log_of, linear_of):
            for bits in (2, 8):
                options = {"scale_constraint": constraint, **options_of(method)}
                found = solve(make(x), method, bits, **options)
                assert 0 < float(found.scale) < math.inf
                assert is_allowed(float(found.scale), constraint), (found, bits)


@pytest.mark.parametrize("method", METHODS)
def test_narrow_range_leaves_out_the_least_integer(method: str) -> None:
    for spacing in SPACINGS:
        histogram = histogram_of("laplace", spacing)
        for bits in (2, 8):
            options = options_of(method)
            for symmetric, low in ((True, -(2 ** (bits - 1))), (False, 0)):
                narrow = solve(
                    histogram, method, bits, symmetric=symmetric, narrow_range=True, **options
                )
                ends = {"quant_min": low + 1, "quant_max": low + 2**bits - 1}
                bounded = solve(histogram, method, symmetric=symmetric, **ends, **options)
                assert narrow.zero_point >= low + 1
                if symmetric:
                    assert narrow.zero_point == 0
                    assert float(narrow.min_val) == -float(narrow.max_val)
                    assert_all_same(flat(narrow), flat(bounded))
                elif method != "mse":
                    assert_all_same(flat(narrow), flat(bounded))


@pytest.mark.parametrize("method", METHODS)
def test_bounds_instead_of_bits(method: str) -> None:
    histogram, options = histogram_of("normal", "log"), options_of(method)
    for bits, low, high, symmetric in ((4, 0, 15, False), (5, -16, 15, True), (8, -128, 127, True)):
        by_bits = solve(histogram, method, bits, symmetric=symmetric, **options)
        bounds = {"quant_min": low, "quant_max": high, "symmetric": symmetric}
        assert_all_same(flat(solve(histogram, method, **bounds, **options)), flat(by_bits))
    # the zero point is that of the grid; shifted, all else is the same
    shifted = solve(histogram, method, quant_min=-8, quant_max=7, **options)
    usual = solve(histogram, method, 4, **options)
    assert_same(shifted.scale, usual.scale)
    assert_same(shifted.zero_point, usual.zero_point - 8)
    # symmetric and without negative integers: the middle
    middle = solve(histogram, method, quant_min=0, quant_max=15, symmetric=True, **options)
    assert middle.zero_point == 8
    assert_same(middle.scale, solve(histogram, method, 4, symmetric=True, **options).scale)


# ---- each method ----


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("dtype", [torch.quint8, torch.int8, torch.int16], ids=str)
@pytest.mark.parametrize("qscheme", [torch.per_tensor_affine, torch.per_tensor_symmetric], ids=str)
def test_minmax_is_that_of_the_observer(
    spacing: str, dtype: torch.dtype, qscheme: torch.qscheme
) -> None:
    for kind in KINDS:
        reference = po.MinMaxObserver(dtype, qscheme, eps=TINY)
        reference(data(kind))
        scale, zero_point = reference.calculate_qparams()
        found = solve(
            histogram_of(kind, spacing),
            "minmax",
            quant_min=reference.quant_min,
            quant_max=reference.quant_max,
            symmetric=qscheme == torch.per_tensor_symmetric,
        )
        assert_all_same([found.scale.view(1), found.zero_point.view(1)], [scale, zero_point.long()])


@pytest.mark.parametrize("kind", ["normal", "laplace", "relu", "outlier", "shifted"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_l2_greedy_is_that_of_the_observer(kind: str, symmetric: bool) -> None:
    qscheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    observer = po.HistogramObserver(dtype=torch.int8, qscheme=qscheme)
    for part in data(kind).split(7000):
        observer(part)
    scale, zero_point = observer.calculate_qparams()
    for found in (
        solve(
            observer.statistic(),
            "l2_greedy",
            quant_min=-128,
            quant_max=127,
            symmetric=symmetric,
            eps=float(observer.eps),
        ),
        observer.solve(),
        observer.solve("l2_greedy"),
    ):
        assert_all_same([found.scale.view(1), found.zero_point.view(1)], [scale, zero_point.long()])


def test_l2_greedy_searches_equal_bins() -> None:
    """Those of a log histogram are carried to as many as asked, and so give nearly the same."""
    for kind in ("normal", "laplace", "relu"):
        fine = solve(log_of(data(kind), 9), "l2_greedy", bins=BINS)
        linear = solve(linear_of(data(kind), BINS), "l2_greedy", bins=7)
        assert float(fine.scale) == pytest.approx(float(linear.scale), rel=0.02), kind
        fewer = solve(linear_of(data(kind), BINS), "l2_greedy", levels=16)
        assert fewer.scale < linear.scale


def test_l2_greedy_of_values_on_an_edge() -> None:
    """The least value counts where it is the edge of its bin, too."""
    least = -1.0625  # between the bins of -1 and -1.125
    x = torch.cat([torch.full((20_000,), least), data("normal") * 0.01])
    assert least in log_of(x, 3).edges()
    found = solve(log_of(x, 3), "l2_greedy", bins=BINS)
    usual = solve(linear_of(x), "l2_greedy")
    assert float(found.min_val) == pytest.approx(least, rel=0.02)
    assert float(found.scale) == pytest.approx(float(usual.scale), rel=0.02)


# ---- percentile ----


def quantile(x: Tensor, share: float) -> float:
    return float(np.quantile(x.numpy(), share, method="inverted_cdf"))


def width_at(histogram: Histogram, value: float) -> float:
    """Of the wider of the bins that a value is in or beside."""
    widths = histogram.edges().diff()
    at = torch.searchsorted(histogram.edges(), torch.tensor(value, dtype=torch.float64))
    return float(
        widths[[int(at.clamp(1, len(widths))) - 1, int(at.clamp(max=len(widths) - 1))]].max()
    )


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", [*SMOOTH, "relu", "sparse", "outlier", "two_valued"])
def test_percentile_is_the_quantile_of_the_values(kind: str, spacing: str) -> None:
    x, histogram = data(kind), histogram_of(kind, spacing)
    for share in (0.8, 0.99, 0.999, 0.9999):
        found = solve(histogram, "percentile", 16, percentile=share)
        ends = (quantile(x, (1 - share) / 2), quantile(x, (1 + share) / 2))
        low, high = min(ends[0], 0.0), max(ends[1], 0.0)  # a range holds zero
        for own, expected in ((found.min_val, low), (found.max_val, high)):
            slack = width_at(histogram, expected) + 2 * float(found.scale) + 1e-30
            assert abs(float(own) - expected) <= slack, (share, found, low, high)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", [*SMOOTH, "relu", "sparse", "outlier", "two_valued", "constant"])
def test_percentile_of_symmetric_grids_is_that_of_the_magnitudes(kind: str, spacing: str) -> None:
    x, histogram = data(kind), histogram_of(kind, spacing)
    for share in (0.5, 0.8, 0.99, 0.999, 0.9999):
        found = solve(histogram, "percentile", 16, percentile=share, symmetric=True)
        expected = quantile(x.abs(), share)
        widths = width_at(histogram, expected), width_at(histogram, -expected)
        assert abs(float(found.scale) * 32767.5 - expected) <= max(widths) + 1e-5, (share, found)


@pytest.mark.parametrize("kind", KINDS)
def test_percentile_of_all_values_is_minmax(kind: str) -> None:
    for spacing in SPACINGS:
        histogram = histogram_of(kind, spacing)
        for symmetric in (False, True):
            for share in (1, 1.0):
                found = solve(histogram, "percentile", percentile=share, symmetric=symmetric)
                usual = solve(histogram, "minmax", symmetric=symmetric)
                assert_all_same(flat(found), flat(usual), (spacing, symmetric))


def test_percentile_of_one_value() -> None:
    """Nothing is cut off a value that all have, however few are kept."""
    for value in (2.5, -2.5, 1.0, -1.0, 1.015625, 0.0):
        for make in (log_of, linear_of):
            histogram = make(torch.full((1000,), value))
            for symmetric in (False, True):
                for share in (1e-6, 0.5, 0.9999):
                    found = solve(histogram, "percentile", percentile=share, symmetric=symmetric)
                    usual = solve(histogram, "minmax", symmetric=symmetric)
                    assert_all_same(flat(found), flat(usual), (value, symmetric, share))


# ---- kl ----


def magnitudes(histogram: Histogram, bins: int) -> tuple[np.ndarray, float]:
    """Counts of |x| in equal bins, each cell of the histogram spread evenly; the greatest |x|."""
    low, high = float(histogram.min_val), float(histogram.max_val)
    greatest = max(-low, high)
    edges = np.clip(histogram.edges().numpy(), low, high)
    counts = histogram.counts.numpy()
    found = np.zeros(bins)
    width = greatest / bins
    for begin, end, count in zip(edges[:-1], edges[1:], counts, strict=True):
        if count == 0:
            continue
        parts = ((max(begin, 0.0), end), (max(-end, 0.0), -begin))
        for near, far in ((a, b) for a, b in parts if b > a or begin == end == a):
            share = count * ((far - near) / (end - begin) if end > begin else 1.0)
            first, last = (min(int(e / width), bins - 1) for e in (near, far))
            if first == last:
                found[first] += share
                continue
            for bin_ in range(first, last + 1):
                inside = min(far, (bin_ + 1) * width) - max(near, bin_ * width)
                found[bin_] += share * inside / (far - near)
    return found, greatest


def assert_kl(histogram: Histogram, levels: int, symmetric: bool, bits: int) -> None:
    """The range is that of a candidate with the least divergence."""
    bins, start, stride = 192, 16, 2
    counts, greatest = magnitudes(histogram, bins)
    kept, divergences = divergences_of(counts, levels, start, stride)
    best = kept[divergences <= divergences.min() * (1 + 1e-8) + 1e-10]
    options = {"bins": bins, "start_bin": start, "stride": stride}
    found = solve(histogram, "kl", bits, symmetric=symmetric, **options)
    expected = []
    for each in best.tolist():
        bound = greatest * each / bins
        ends = max(float(histogram.min_val), -bound), min(float(histogram.max_val), bound)
        clipped = Histogram(histogram.counts, *map(torch.tensor, ends), "linear")
        expected.append(float(solve(clipped, "minmax", bits, symmetric=symmetric).scale))
    assert len(set(expected)) < 4, "the test tells nothing"
    scale = float(found.scale)
    assert any(scale == pytest.approx(one, rel=1e-6) for one in expected), (best, found)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", ["normal", "laplace", "student", "shifted", "relu", "negative"])
def test_kl_is_entropy_calibration(kind: str, spacing: str) -> None:
    histogram = log_of(data(kind), 4) if spacing == "log" else linear_of(data(kind), 96)
    one_sided = kind in ("shifted", "relu", "negative")
    for bits in (3, 5):
        # affine levels lie on both signs, or all on one
        affine = 2**bits if one_sided else 2 ** (bits - 1)
        assert_kl(histogram, affine, False, bits)
        assert_kl(histogram, 2 ** (bits - 1), True, bits)


def test_kl_of_few_histograms_of_one_sign() -> None:
    """Whether the levels are of one sign is each histogram's own matter."""
    kinds = ("normal", "relu", "negative", "laplace")
    histograms = [histogram_of(kind, "log") for kind in kinds]
    together = solve_all(histograms, "kl", Grid.of(4), **options_of("kl"))
    for histogram, found in zip(histograms, together, strict=True):
        assert_all_same(flat(found), flat(solve(histogram, "kl", 4, **options_of("kl"))))


# ---- many at once ----


def channels_of(x: Tensor, mantissa_bits: int) -> Histogram:
    observer = po.PerChannelLogHistogramObserver(0, mantissa_bits)
    observer(x)
    return observer.statistic()


@cache
def mixed() -> list[Histogram]:
    x = data("laplace")
    blocks = po.PerBlockLogHistogramObserver((2, 100), 3)
    blocks(x[:1200].view(4, 300))
    return [
        linear_of(x, 64),
        log_of(x, 3),
        linear_of(x * 3, 64),
        channels_of(x[:600].view(3, 200) * torch.tensor([[1.0], [40.0], [1e-3]]), 3),
        linear_of(x, 100),
        log_of(x * 1e-9, 3),
        blocks.statistic(),
        log_of(x, 0),
        channels_of(x[:7].view(7, 1), 3),
        log_of(x.relu(), 3),
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_solve_all_is_solve_of_each(method: str, scheme: str) -> None:
    for constraint in ("none", "fp16") if FAST else ("power_of_two",):
        grid = grid_of(4, scheme, constraint)
        options = options_of(method, 64)
        together = solve_all(mixed(), method, grid, **options)
        for i, (histogram, found) in enumerate(zip(mixed(), together, strict=True)):
            (alone,) = solve_all([histogram], method, grid, **options)
            assert_all_same(flat(found), flat(alone), i)
            assert all(t.shape == histogram.min_val.shape for t in flat(found))


def test_groups_are_solved_each_by_itself() -> None:
    rows = data("laplace")[:600].view(3, 200) * torch.tensor([[1.0], [40.0], [1e-3]])
    for method in METHODS:
        together = solve(channels_of(rows, 3), method, **options_of(method))
        for i, row in enumerate(rows):
            alone = solve(log_of(row, 3), method, **options_of(method))
            assert_all_same([t[i] for t in flat(together)], flat(alone), (method, i))


def test_none_to_solve() -> None:
    assert solve_all([]) == []


def test_defaults_of_solve_all() -> None:
    histogram = histogram_of("normal", "log")
    (found,) = solve_all([histogram])
    assert_all_same(flat(found), flat(solve(histogram, "mse", 8)))


def test_a_group_that_was_never_fed_has_scale_one() -> None:
    rows = torch.stack([torch.full((50,), torch.nan), data("normal")[:50]])
    histogram = channels_of(rows, 3)
    for method in METHODS:
        found = solve(histogram, method, **options_of(method))
        assert (float(found.scale[0]), int(found.zero_point[0])) == (1.0, 0), method
        assert float(found.error[0]) == 0
        alone = solve(log_of(rows[1], 3), method, **options_of(method))
        assert_all_same([t[1] for t in flat(found)], flat(alone), method)


# ---- an observer's own ----


def observers() -> dict[str, Any]:
    made = {
        "log": po.LogHistogramObserver(3),
        "channels": po.PerChannelLogHistogramObserver(0, 3),
        "blocks": po.PerBlockLogHistogramObserver((1, 200), 3),
        "linear": po.HistogramObserver(64),
    }
    for observer in made.values():
        observer(data("normal")[:800].view(2, 400))
    return made


@pytest.mark.parametrize("name", observers())
def test_solving_leaves_the_observer_alone(name: str) -> None:
    observer = observers()[name]
    own = {key: value for key, value in vars(observer).items() if not key.startswith("_")}
    with unchanged(*observer.buffers()):
        for method in METHODS:
            for bits in (None, 4):
                found = observer.solve(method, bits, symmetric=True, **options_of(method))
                expected = solve(
                    observer.statistic(),
                    method,
                    8 if bits is None else bits,
                    **({"quant_min": 0, "quant_max": 255} if bits is None else {}),
                    symmetric=True,
                    eps=float(observer.eps),
                    **options_of(method),
                )
                assert_all_same(flat(found), flat(expected), (method, bits))
        observer.calculate_qparams()
    assert own == {key: value for key, value in vars(observer).items() if not key.startswith("_")}


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dtype": torch.int8, "qscheme": torch.per_tensor_symmetric},
        {"qscheme": torch.per_tensor_symmetric},
        {"qscheme": torch.per_tensor_symmetric, "quant_min": 0, "quant_max": 127},
        {"dtype": torch.int8, "quant_min": -8, "quant_max": 7},
        {"dtype": torch.int8, "scale_constraint": "power_of_two", "eps": 0.25},
        {"dtype": torch.int32, "qscheme": torch.per_tensor_symmetric},
        {"method": "percentile", "method_kwargs": {"percentile": 0.9}},
        {"method": "kl", "method_kwargs": {"bins": 300, "stride": 7}},
        {"method": "lp", "method_kwargs": {"p": 3}, "scale_constraint": "fp16"},
        {"method": "minmax", "scale_constraint": "e8m0"},
        {"method": "l2_greedy", "method_kwargs": {"bins": 100}},
    ],
    ids=str,
)
def test_without_arguments_an_observer_solves_for_itself(arguments: dict[str, Any]) -> None:
    observer = po.LogHistogramObserver(3, **arguments)
    observer(data("laplace"))
    scale, zero_point = observer.calculate_qparams()
    symmetric = observer.qscheme == torch.per_tensor_symmetric
    for found in (observer.solve(), observer.solve(symmetric=symmetric)):
        assert_same(found.scale.view(1), scale)
        assert_same(found.zero_point.view(1).to(zero_point.dtype), zero_point)
    assert is_allowed(float(scale), observer.scale_constraint)
    assert scale >= observer.eps


def test_options_of_the_method_may_be_changed() -> None:
    observer = po.PercentileObserver(0.9)
    observer(data("laplace"))
    assert_all_same(
        flat(observer.solve(percentile=0.5)), flat(observer.solve("percentile", percentile=0.5))
    )
    assert observer.solve(percentile=0.5).scale < observer.solve().scale
    # another's are not handed on
    assert observer.solve("percentile").scale > observer.solve().scale


# ---- histograms that were saved ----


def saved_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(po.LogHistogramObserver(3), nn.ReLU()))
    model.add_module("fake", po.FakeQuantize(po.HistogramObserver, bins=32))
    for module in (model[1], model.fake):
        module(data("laplace"))
    return model


def test_load(tmp_path: Path) -> None:
    model = saved_model()
    statistics = {
        "1.0.": model[1][0].statistic(),
        "fake.activation_post_process.": model.fake.activation_post_process.statistic(),
    }
    path = tmp_path / "model.pt"
    torch.save(model.state_dict(), path)
    for prefix, expected in statistics.items():
        for source in (model.state_dict(), path, str(path)):
            found = Histogram.load(source, prefix)
            assert_all_same(found[:3], expected[:3])
            assert found.spacing == expected.spacing
            for method in METHODS:
                one, other = (solve(h, method, 4, **options_of(method)) for h in (found, expected))
                assert_all_same(flat(one), flat(other))


@pytest.mark.parametrize("name", observers())
def test_load_of_an_observer(name: str) -> None:
    observer = observers()[name]
    found = Histogram.load(observer.state_dict())
    assert_all_same(found[:3], observer.statistic()[:3])


def test_load_of_torch() -> None:
    theirs, ours = ao_observer.HistogramObserver(bins=64), po.HistogramObserver(bins=64)
    for part in data("laplace").split(9000):
        theirs(part)
        ours(part)
    found = Histogram.load(theirs.state_dict())
    assert found.counts.dtype == torch.float64
    assert_all_same(found[:3], ours.statistic()[:3])
    scale, zero_point = theirs.calculate_qparams()
    solved = solve(found, "l2_greedy", eps=float(theirs.eps))
    assert_all_same([solved.scale.view(1), solved.zero_point.view(1).int()], [scale, zero_point])
    with pytest.raises(ValueError, match="expected one that was fed"):
        solve(Histogram.load(ao_observer.HistogramObserver().state_dict()))
    # before version 3 an unfed range had no elements
    old = {**ao_observer.HistogramObserver().state_dict()}
    old["min_val"], old["max_val"] = torch.empty(0), torch.empty(0)
    with pytest.raises(ValueError, match="expected one that was fed"):
        solve(Histogram.load(old))


@pytest.mark.parametrize(
    ("state", "prefix", "match"),
    [
        ({}, "", r"source: expected counts or histogram.* under '', got .* at \[\]$"),
        (po.MinMaxObserver().state_dict(), "", r"under '', got a state of observers at \[''\]"),
        (saved_model().state_dict(), "", r"under '', got .* at \['1.0', 'fake.activation_post_pr"),
        (saved_model().state_dict(), "1.0", "under '1.0', got "),
        (saved_model().state_dict(), "2.", "under '2.', got "),
    ],
)
def test_load_without_a_histogram(state: dict[str, Tensor], prefix: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Histogram.load(state, prefix)


def test_load_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "tensor.pt"
    torch.save(torch.ones(3), path)
    with pytest.raises(ValueError, match=r"load: source: expected .*, got Tensor"):
        Histogram.load(path)
    with pytest.raises(FileNotFoundError):
        Histogram.load(tmp_path / "none.pt")


def test_log_refuses_other_columns() -> None:
    with pytest.raises(ValueError, match=r"counts: expected a last size of one of .*, got 77"):
        Histogram.log(torch.zeros(77, dtype=torch.int64), torch.zeros(()), torch.zeros(()))


def test_edges() -> None:
    linear = Histogram(torch.ones(4, dtype=torch.float64), *torch.tensor([-1.0, 3.0]), "linear")
    assert linear.edges().tolist() == [-1, 0, 1, 2, 3]
    assert linear.finite()
    assert not linear._replace(max_val=torch.tensor(torch.inf)).finite()
    log = histogram_of("normal", "log")
    assert_same(log.edges(), po.ops.log_edges(2))
    assert log.edges().shape == (log.counts.shape[-1] + 1,)


# ---- errors ----


REJECTED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "method": ({"method": "best"}, ValueError, "method: expected one of minmax, .*, got 'best'"),
    "option": ({"stride": 2}, TypeError, r"stride: expected one of .* 'mse' \(none\), got 2"),
    "option_of_another": (
        {"method": "percentile", "p": 2},
        TypeError,
        r"p: expected one of the options of method 'percentile' \(percentile\), got 2",
    ),
    "percentile_0": ({"method": "percentile", "percentile": 0}, ValueError, r"\(0, 1\], got 0$"),
    "percentile_above": (
        {"method": "percentile", "percentile": 1.5},
        ValueError,
        r"percentile: expected a number in \(0, 1\], got 1.5",
    ),
    "percentile_text": (
        {"method": "percentile", "percentile": "a"},
        ValueError,
        r"percentile: expected a number in \(0, 1\], got 'a'",
    ),
    "percentile_bool": ({"method": "percentile", "percentile": True}, ValueError, "got True"),
    "percentile_nan": ({"method": "percentile", "percentile": math.nan}, ValueError, "got nan"),
    "p_0": ({"method": "lp", "p": 0}, ValueError, r"p: expected a number in \(0, 6\], got 0"),
    "p_above": ({"method": "lp", "p": 17.0}, ValueError, r"p: .*, got 17.0"),
    "bins": ({"method": "kl", "bins": 1}, ValueError, r"bins: expected an integer in .*, got 1$"),
    "bins_float": ({"method": "kl", "bins": 64.0}, ValueError, r"bins: .*, got 64.0"),
    "start_bin": ({"method": "kl", "start_bin": 0}, ValueError, r"start_bin: .*, got 0"),
    "stride": ({"method": "kl", "stride": 0}, ValueError, r"stride: .*, got 0"),
    "levels": ({"method": "l2_greedy", "levels": 1}, ValueError, r"levels: .*, got 1"),
    "bits_1": ({"bits": 1}, ValueError, r"bits: expected an integer in \[2, 16\], got 1$"),
    "bits_17": ({"bits": 17}, ValueError, r"bits: expected .*, got 17"),
    "bits_3.5": ({"bits": 3.5}, ValueError, r"bits: expected .*, got 3.5"),
    "constraint": (
        {"scale_constraint": "fp8"},
        ValueError,
        "scale_constraint: expected one of none, power_of_two, fp16, e8m0, got 'fp8'",
    ),
    "one_bound": ({"quant_min": 0}, ValueError, "expected both or neither, got quant_min=0"),
    "no_bounds": ({"quant_max": 0}, ValueError, "expected both or neither, .*quant_max=0"),
    "bounds": ({"quant_min": 3, "quant_max": 3}, ValueError, "quant_min: expected .* below"),
    "bounds_wide": ({"quant_min": 0, "quant_max": 2**31}, ValueError, "expected int32 values"),
    "no_middle": (
        {"quant_min": -9, "quant_max": -3, "symmetric": True},
        ValueError,
        "quant_min, quant_max: expected",
    ),
    "narrowed_to_nothing": (
        {"quant_min": 0, "quant_max": 1, "narrow_range": True},
        ValueError,
        "quant_min: expected a value below",
    ),
    "eps": ({"eps": 0.0}, ValueError, "eps: expected a positive finite .*, got 0.0"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name: str) -> None:
    arguments, error, match = REJECTED[name]
    histogram = histogram_of("normal", "log")
    with unchanged(*histogram[:3]), pytest.raises(error, match=match) as seen:
        solve(histogram, **arguments)
    assert str(seen.value).startswith("solve: ")
    observer = po.LogHistogramObserver(3)
    observer(data("normal"))
    with unchanged(*observer.buffers()), pytest.raises(error, match=match):
        observer.solve(**arguments)


@pytest.mark.parametrize("make", [po.LogHistogramObserver, po.HistogramObserver])
@pytest.mark.parametrize(
    "name", [name for name in REJECTED if REJECTED[name][0].keys() <= {"method", "percentile", "p"}]
)
def test_observers_reject(name: str, make: Callable[..., Any]) -> None:
    arguments, error, match = REJECTED[name]
    method = arguments.get("method", "mse")
    options = {key: value for key, value in arguments.items() if key != "method"}
    with pytest.raises(error, match=f"^{make.__name__}: .*{match}"):
        make(method=method, method_kwargs=options)
    with pytest.raises(ValueError, match=f"^{make.__name__}: scale_constraint: .* got 'fp8'"):
        make(scale_constraint="fp8")


def test_never_fed() -> None:
    for make in (
        po.LogHistogramObserver,
        po.HistogramObserver,
        po.PerChannelLogHistogramObserver,
        lambda: po.PerBlockLogHistogramObserver((1, 2)),
    ):
        observer = make()
        for method in METHODS:
            with pytest.raises(ValueError, match="expected one that was fed"):
                solve(observer.statistic(), method)
            with pytest.raises(ValueError, match=r"\.solve: expected an observer that was fed"):
                observer.solve(method)
        with pytest.raises(ValueError, match="expected one that was fed"):
            solve_all([histogram_of("normal", "log"), observer.statistic()])


def test_a_range_that_is_not_finite() -> None:
    """What the range gives, as for the min/max observers."""
    for value in (torch.inf, torch.nan):
        observer = po.LogHistogramObserver(3, nonfinite="propagate")
        reference = po.MinMaxObserver(nonfinite="propagate", eps=TINY)
        for each in (observer, reference):
            each(torch.tensor([1.0, value, -2.0]))
        with pytest.warns(UserWarning, match="let into"):
            expected = reference.calculate_qparams()
        for method in METHODS:
            chosen = ranges.choose(observer.statistic(), method, Grid.of(), {})
            assert_same(chosen[0].view(1), expected[0], method)

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from backends import Backend
from entropy import Expected, Histogram, assert_chosen, divergence_at, divergences_of, levels_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyobserver import ops
from pyobserver.ops.kl_search import reference

from .cases import (
    REJECTED_SWITCHES,
    any_isa,
    assert_rejected,
    assert_same,
    opcheck,
    properties,
    threads,
    unchanged,
)

LONG = 2**62


def run(backend: Backend, counts: Tensor | Histogram, *args: Any) -> Tensor:
    counts = torch.as_tensor(counts, dtype=torch.float64).to(backend.device)
    with unchanged(counts):
        found = backend.op("kl_search")(counts, *args)
    assert found.dtype == torch.int64
    assert found.device == counts.device
    return found.cpu()


def of_values(x: np.ndarray, bins: int) -> Histogram:
    x = abs(x)
    return np.histogram(x, bins, (0, x.max()))[0].astype(np.float64)


KINDS: dict[str, Callable[[np.random.Generator, int], Histogram]] = {
    "normal": lambda g, bins: of_values(g.normal(size=9000), bins),
    "few": lambda g, bins: of_values(g.normal(size=60), bins),
    "laplace": lambda g, bins: of_values(g.laplace(size=9000), bins),
    "student": lambda g, bins: of_values(g.standard_t(2, size=9000), bins),
    "log_normal": lambda g, bins: of_values(g.lognormal(0, 1, size=9000), bins),
    "uniform": lambda g, bins: of_values(g.uniform(size=9000), bins),
    "relu": lambda g, bins: of_values(g.normal(size=9000).clip(0), bins),
    "integers": lambda g, bins: of_values(g.integers(0, 20, size=900).astype(float), bins),
    "two_scales": lambda g, bins: of_values(
        g.normal(size=9000) * 20 ** (g.random(9000) < 0.02), bins
    ),
    "sparse": lambda g, bins: (g.random(bins) < 0.1) * g.integers(1, 1000, bins).astype(float),
    "two_valued": lambda g, bins: g.choice([0.0, 1.0, 1000.0], bins),
    "fractions": lambda g, bins: g.random(bins) ** 8,
    "two_bins": lambda g, bins: np.bincount([bins // 3, bins - 1], [700.0, 3.0], bins),
}
SIZES = (
    # bins, num_levels, start_bin, stride
    (2, 2, 1, 1),
    (3, 2, 2, 1),
    (16, 3, 2, 1),
    (33, 16, 8, 1),
    (64, 100, 20, 1),
    (100, 7, 10, 3),
    (128, 16, 16, 1),
    (150, 128, 128, 1),
    (200, 129, 40, 1),
    (300, 256, 100, 7),
)


@cache
def searches(size: tuple[int, int, int, int]) -> tuple[Tensor, list[Expected]]:
    """Three histograms of each kind, and their divergences."""
    bins, *options = size
    generator = np.random.default_rng(bins)
    batch = [make(generator, bins) for make in KINDS.values() for _ in range(3)]
    for counts in batch:
        counts[1] += counts[1:].sum() == 0
    return torch.tensor(np.stack(batch)), [divergences_of(counts, *options) for counts in batch]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_is_the_choice_by_definition(backend: Backend, size: tuple[int, int, int, int]) -> None:
    counts, expected = searches(size)
    found = run(backend, counts, *size[1:])
    for i, (kept, divergences) in enumerate(zip(found.tolist(), expected, strict=True)):
        assert_chosen(kept, divergences, (i, counts[i].tolist()))


@cache
def usual_search(name: str) -> tuple[Histogram, Expected]:
    counts = KINDS[name](np.random.default_rng(5), 2048)
    return counts, divergences_of(counts, 128, 128, 32)


@pytest.mark.parametrize("name", ["normal", "student", "relu"])
def test_usual_size(backend: Backend, name: str) -> None:
    counts, expected = usual_search(name)
    found = int(run(backend, counts, 128, 128, 32))
    assert_chosen(found, expected, name)
    every = int(run(backend, counts, 128))
    assert divergence_at(counts, 128, every) <= divergence_at(counts, 128, found) + 2e-13


@properties
@given(
    st.lists(st.integers(0, 50), min_size=2, max_size=64),
    st.integers(2, 16),
    st.integers(1, 70),
    st.integers(1, 3),
)
def test_properties(counts: list[int], num_levels: int, start_bin: int, stride: int) -> None:
    histogram = torch.tensor(counts, dtype=torch.float64)
    found = ops.kl_search(histogram, num_levels, start_bin, stride)
    assert_same(reference(histogram, num_levels, start_bin, stride), found)
    if sum(counts[1:]) == 0:
        assert found == len(counts)
    else:
        start = min(start_bin, len(counts))
        expected = divergences_of(histogram.numpy(), num_levels, start, stride)
        assert_chosen(int(found), expected, "")


def assert_levels(backend: Backend, bins: int, num_levels: int) -> None:
    """Equal counts within each level: no other cut of the bins into levels loses nothing.

    So all bins are as good as the first alone, which loses nothing ever.
    """
    counts = 1.0 + levels_of(bins, num_levels) % 2
    found = int(run(backend, counts, num_levels, 1, bins - 1))
    assert found == bins, (bins, num_levels)


def test_levels(backend: Backend) -> None:
    """Every number of levels; among them are those whose edges rounding moves by a bin."""
    for bins in range(2, 70):
        for num_levels in range(2, bins + 3):
            assert_levels(backend, bins, num_levels)


@cache
def moved_edges() -> list[tuple[int, int]]:
    pairs = []
    for bins in range(2, 1200):
        for num_levels in (30, 50, 127, 128, 129, 255, 256, 257):
            level = np.arange(min(num_levels, bins))
            edges = np.ceil(level * (bins / num_levels))
            if np.any(edges != -(-level * bins // num_levels)):
                pairs.append((bins, num_levels))
    return pairs


def test_moved_edges(backend: Backend) -> None:
    assert len(moved_edges()) > 100
    for bins, num_levels in moved_edges():
        assert_levels(backend, bins, num_levels)


@pytest.mark.parametrize(
    ("counts", "options", "expected"),
    [
        # nothing is lost by dropping bins without counts, nor by keeping them
        ([4, 4, 3, 2, 1, 0, 0, 0], (8, 2), 8),
        ([4, 4, 3, 2, 1, 0, 0, 0], (8, 2, 4), 6),
        # one candidate alone
        ([4, 4, 3, 2, 1, 9, 0, 7], (2, 8), 8),
        ([4, 4, 3, 2, 1, 9, 0, 7], (2, 100), 8),
        ([4, 4, 3, 2, 1, 9, 0, 7], (2, LONG), 8),
        ([4, 4, 3, 2, 1, 9, 0, 7], (2, 3, LONG), 3),
        ([4, 4, 3, 2, 1, 9, 0, 7], (2, 3, 6), 3),
        # more levels than bins: only all bins lose nothing
        ([4, 4, 3, 2, 1, 9, 0, 7], (8, 2), 8),
        ([4, 4, 3, 2, 1, 9, 0, 7], (LONG, 2), 8),
        # no mass to the empty last bin: never chosen, unless there is nothing else
        ([1, 1, 0, 0, 0, 1], (2, 3, 2), 5),
        ([1, 1, 5, 0, 9, 0, 9, 1, 1], (3, 4, 4), 8),
        ([0, 0, 0, 0, 0, 9, 4, 1, 7, 2], (2, 3, 4), 7),
        ([0, 0, 0, 0, 0, 9, 4, 1, 7, 2], (2, 3), 6),
        ([0, 0, 0, 0, 0, 9, 4, 1, 7, 2], (2, 3, 8), 3),
        # the first bin is as the second
        ([1e9, 2, 3, 4], (2, 4), 4),
        ([1e9, 0, 0, 0], (2, 2), 4),
    ],
)
def test_small_histograms(
    backend: Backend, counts: list[float], options: tuple[int, ...], expected: int
) -> None:
    assert int(run(backend, torch.tensor(counts), *options)) == expected


def test_the_first_bin_is_as_the_second(backend: Backend) -> None:
    counts, _ = searches((128, 16, 16, 1))
    expected = run(backend, counts, 16, 16)
    for first in (0.0, 1e12, torch.inf, torch.nan):
        counts = counts.clone()
        counts[:, 0] = first
        assert_same(run(backend, counts, 16, 16), expected, first)


@pytest.mark.parametrize("scale", [2.0**-1060, 1e-300, 1e-9, 0.3, 7.0, 2.0**50, 1e290])
def test_scale_changes_nothing(backend: Backend, scale: float) -> None:
    """Whatever unit the counts have, also one below the normal numbers."""
    counts, expected = searches((128, 16, 16, 1))
    whole = (counts.floor() == counts).all(1)  # of fractions rounding makes others
    found = run(backend, counts * scale, 16, 16)
    for i in whole.nonzero().flatten().tolist():
        assert_chosen(int(found[i]), expected[i], (i, scale))


def test_counts_far_apart(backend: Backend) -> None:
    """A count is never lost, however small beside the others."""
    counts = torch.tensor([1e20, 1e20, 1e20, 1, 5, 0, 1e20], dtype=torch.float64)
    # of 4 and 6: the last bin of 4 is not empty
    assert int(run(backend, counts, 7, 4, 2)) == 4


@pytest.mark.parametrize(
    "counts",
    [[0.0] * 9, [7.0] + [0.0] * 8, [-1.0] * 9, [torch.nan] * 9, [1.0, 2.0, torch.inf, 3.0]],
)
def test_keeps_all_bins_of_what_cannot_be_searched(backend: Backend, counts: list[float]) -> None:
    assert int(run(backend, torch.tensor(counts), 4, 2)) == len(counts)


def test_what_is_not_positive_is_empty(backend: Backend) -> None:
    counts, _ = searches((128, 16, 16, 1))
    spoiled = torch.where(counts == 0, -3.0, counts)
    spoiled[:, 5::9] = torch.nan
    clean = torch.where(spoiled > 0, spoiled, 0.0)
    assert_same(run(backend, spoiled, 16, 16), run(backend, clean, 16, 16))


@cache
def large_search() -> tuple[Tensor, Tensor, list[float]]:
    """Two histograms, what the reference finds, and the least divergence of some candidates."""
    generator = np.random.default_rng(3)
    rows = [of_values(generator.laplace(size=20_000), 1200) for _ in range(2)]
    least = [min(divergence_at(row, 500, kept) for kept in range(600, 1201, 50)) for row in rows]
    counts = torch.tensor(np.stack(rows))
    return counts, reference(counts, 500, 600), least


def test_many_bins_and_levels(backend: Backend) -> None:
    """Of which the reference looks at some candidates at a time."""
    counts, expected, least = large_search()
    found = run(backend, counts, 500, 600)
    assert_same(found, expected)
    for row, kept, of_some in zip(counts.numpy(), found.tolist(), least, strict=True):
        assert divergence_at(row, 500, kept) <= of_some + 2e-13


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
def test_enabled(backend: Backend, dtype: torch.dtype) -> None:
    counts = searches((128, 16, 16, 1))[0][:3]
    for flag in (0, 1):
        enabled = torch.tensor([flag], dtype=dtype, device=backend.device)
        found = run(backend, counts, 16, 16, 1, enabled)
        expected = run(backend, counts, 16, 16) if flag else torch.full((3,), 128)
        assert_same(found, expected, flag)


def test_many_histograms(backend: Backend) -> None:
    """Each is searched as if it were alone; an empty one among them keeps its bins."""
    counts = searches((128, 16, 16, 1))[0][:36].clone()
    counts[4] = 0.0
    found = run(backend, counts, 16, 16)
    singles = [run(backend, row, 16, 16) for row in counts]
    assert singles[0].shape == ()
    assert_same(found, torch.stack(singles))
    assert len(set(found.tolist())) > 5
    assert found[4] == 128
    assert_same(run(backend, counts.reshape(4, 9, 128), 16, 16), found.reshape(4, 9))
    assert_same(run(backend, counts[:1], 16, 16), found[:1])
    assert_same(run(backend, counts[:0], 16, 16), found[:0])
    assert run(backend, counts[:0].reshape(0, 3, 128), 16, 16).shape == (0, 3)


def test_threads_change_nothing(backend: Backend) -> None:
    counts, _ = searches((128, 16, 16, 1))
    found = []
    for count in (1, 2, 3):
        with threads(count):
            found.append(run(backend, counts, 16, 16))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_meta() -> None:
    found = ops.kl_search(torch.empty(3, 5, 16, dtype=torch.float64, device="meta"), 128)
    assert (found.shape, found.dtype) == ((3, 5), torch.int64)


def arguments(**changed: Any) -> dict[str, Any]:
    return {"counts": torch.ones(16, dtype=torch.float64), "num_levels": 4, **changed}


REJECTED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "one_bin": (
        {"counts": torch.ones(3, 1, dtype=torch.float64)},
        ValueError,
        r"counts: expected shape .* at least 2 bins, got \(3, 1\)",
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
    "levels": ({"num_levels": 1}, ValueError, "num_levels: expected at least 2, got 1"),
    "start_bin": ({"start_bin": 0}, ValueError, "start_bin: expected at least 1, got 0"),
    "start_bin_negative": ({"start_bin": -5}, ValueError, "start_bin: expected .*, got -5"),
    "stride": ({"stride": 0}, ValueError, "stride: expected at least 1, got 0"),
    **REJECTED_SWITCHES,
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name: str) -> None:
    changed, error, match = REJECTED[name]
    assert_rejected(ops.kl_search, arguments(**changed), error, f"^kl_search: {match}")


@pytest.mark.parametrize("name", REJECTED)
@any_isa
def test_kernel_rejects(backend: Backend, name: str) -> None:
    if not backend.cuda:
        assert_rejected(backend.op("kl_search"), arguments(**REJECTED[name][0]), Exception)


def test_opcheck() -> None:
    opcheck("kl_search", **arguments())
    counts = searches((16, 3, 2, 1))[0][:6].reshape(2, 3, 16)
    opcheck("kl_search", counts, 3, 2, 2)
    opcheck("kl_search", counts, 3, 2, 2, torch.zeros(1, dtype=torch.uint8))
    opcheck("kl_search", counts[:0], 3)

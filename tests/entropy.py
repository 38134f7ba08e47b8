"""Entropy calibration by its definition: NVIDIA's ``_compute_amax_entropy``, bin by bin."""

from __future__ import annotations

import numpy as np

Histogram = np.ndarray
Expected = tuple[np.ndarray, np.ndarray]


def levels_of(kept: int, num_levels: int) -> np.ndarray:
    """The level of each bin."""
    return np.digitize(range(kept), np.linspace(0, kept, num=num_levels + 1)) - 1


def divergence_of(counts: Histogram, kept: int, num_levels: int) -> float:
    """Of a candidate, by its definition."""
    reference_counts = counts[:kept].copy()
    reference_counts[-1] += counts[kept:].sum()
    level = levels_of(kept, num_levels)
    occupied = counts[:kept] != 0
    in_level, bins_of_level = np.zeros(num_levels), np.zeros(num_levels)
    for bin_ in np.flatnonzero(occupied):
        in_level[level[bin_]] += counts[bin_]
        bins_of_level[level[bin_]] += 1
    quantized = np.zeros(kept)
    for bin_ in np.flatnonzero(occupied):
        quantized[bin_] = in_level[level[bin_]] / bins_of_level[level[bin_]]
    p = reference_counts / reference_counts.sum()
    seen = p > 0
    if np.any(quantized[seen] == 0):
        return float("inf")
    q = quantized / quantized.sum()
    return float(np.sum(p[seen] * np.log(p[seen] / q[seen])))


def divergences_of(
    counts: Histogram, num_levels: int, start_bin: int, stride: int
) -> tuple[np.ndarray, np.ndarray]:
    """The candidates, and the divergence of each."""
    counts = counts.copy()
    counts[0] = counts[1]
    kept = np.arange(start_bin, len(counts) + 1, stride)
    return kept, np.array([divergence_of(counts, int(i), num_levels) for i in kept])


def divergence_at(counts: Histogram, num_levels: int, kept: int) -> float:
    return float(divergences_of(counts, num_levels, kept, len(counts))[1][0])


def assert_chosen(found: int, expected: Expected, context: object) -> None:
    """The last with the least divergence; rounding may tell apart what is equal here."""
    kept, divergences = expected
    theirs = kept[len(kept) - 1 - np.argmin(divergences[::-1])]
    assert found in kept, context
    own, least = divergences[kept == found][0], divergences.min()
    assert found == theirs or (found > theirs and own <= least + 1e-9 * least + 2e-13), (
        f"{context}: got {found} ({own}), expected {theirs} ({least})"
    )

"""The ``kl_search`` op against its definition, a candidate at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pyobserver.ops import kl_search

from .cases import Call, Case, contenders, normal

_BATCH = 100
_LEVELS = 128
_START = 128


def _divergence(counts: np.ndarray, kept: int) -> float:
    inside = counts[:kept]
    clipped = inside.copy()
    clipped[-1] += counts[kept:].sum()
    level = np.digitize(np.arange(kept), np.linspace(0, kept, _LEVELS + 1)) - 1
    occupied = inside > 0
    totals = np.bincount(level, inside, _LEVELS)
    means = totals / np.maximum(np.bincount(level, occupied, _LEVELS), 1)
    seen = clipped > 0
    p, q = clipped[seen], (means[level] * occupied)[seen]
    with np.errstate(divide="ignore"):
        return float((p * np.log(p / p.sum() / (q / q.sum()))).sum())


def _by_definition(counts: np.ndarray) -> int:
    counts = counts.copy()
    counts[0] = counts[1]
    divergences = [_divergence(counts, kept) for kept in range(_START, len(counts) + 1)]
    return len(counts) - int(np.argmin(divergences[::-1]))


def _contenders(counts: Tensor) -> dict[str, Call]:
    def reference() -> None:
        for row in counts.reshape(-1, counts.shape[-1]):
            _by_definition(row.cpu().numpy())

    def ours() -> Call:
        return lambda: kl_search(counts, _LEVELS, _START)

    return contenders(str(counts.device), reference, ours)


def _make_normal(bins: int, device: str) -> dict[str, Call]:
    x = normal((1_000_000,), device).abs()
    return _contenders(torch.histc(x, bins, 0, float(x.max())).double())


def _make_batch(bins: int, device: str) -> dict[str, Call]:
    x = normal((_BATCH, 10_000), device).abs()
    return _contenders(torch.stack([torch.histc(row, bins, 0, 4) for row in x]).double())


CASES = [
    Case("kl_search", _make_normal, sizes=(256, 2048), unit="bins"),
    Case(f"kl_search, {_BATCH} at once", _make_batch, sizes=(256,), unit="bins"),
]


def test_kl_search(benchmark: Callable[[Call], object], contender: Call) -> None:
    benchmark(contender)

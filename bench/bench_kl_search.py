"""The ``kl_search`` op against its definition, a candidate at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyobserver.ops import kl_search

from .cases import Call, Case, contenders, normal

_BATCH = 100
_LEVELS = 128
_START = 128


def _divergence(counts: Tensor, kept: int) -> Tensor:
    inside = counts[:kept]
    clipped = inside.clone()
    clipped[-1] += counts[kept:].sum()
    edges = torch.linspace(0, kept, _LEVELS + 1, dtype=torch.float64, device=counts.device)
    bins = torch.arange(kept, dtype=torch.float64, device=counts.device)
    level = torch.bucketize(bins, edges, right=True) - 1
    occupied = (inside > 0).double()
    totals = torch.bincount(level, inside, _LEVELS)
    means = totals / torch.bincount(level, occupied, _LEVELS).clamp(min=1)
    quantized = means[level] * occupied
    p, q = clipped / clipped.sum(), quantized / quantized.sum()
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum()


def _by_definition(counts: Tensor) -> int:
    counts = counts.clone()
    counts[0] = counts[1]
    candidates = range(_START, counts.numel() + 1)
    divergences = torch.stack([_divergence(counts, kept) for kept in candidates])
    return counts.numel() - int(divergences.flip(0).argmin())


def _contenders(counts: Tensor) -> dict[str, Call]:
    def reference() -> None:
        for row in counts.reshape(-1, counts.shape[-1]):
            _by_definition(row)

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
    Case("kl_search", _make_normal, sizes=(256, 2048, 16384), unit="bins"),
    Case(f"kl_search, {_BATCH} at once", _make_batch, sizes=(256,), unit="bins"),
]


def test_kl_search(benchmark: Callable[[Call], object], contender: Call) -> None:
    benchmark(contender)

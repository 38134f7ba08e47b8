"""The ``range_search`` op against torch.ao's search."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.ao.quantization import HistogramObserver

from pyobserver.ops import range_search

from .cases import Call, Case, contenders, normal

_BATCH = 100


def _contenders(counts: Tensor, low: Tensor, high: Tensor, levels: int = 256) -> dict[str, Call]:
    """The search of each row of counts; torch.ao's takes one at a time."""
    searches = []
    for row in counts.reshape(-1, counts.shape[-1]):
        observer = HistogramObserver(bins=row.numel()).to(counts.device)
        observer.histogram.copy_(row)
        observer.min_val.copy_(low)
        observer.max_val.copy_(high)
        observer.dst_nbins = levels
        searches.append(observer._non_linear_param_search)
    lows, highs = (end.expand(counts.shape[:-1]).contiguous() for end in (low, high))

    def reference() -> None:
        for search in searches:
            search()

    def ours() -> Call:
        return lambda: range_search(counts, lows, highs, levels)

    return contenders(str(counts.device), reference, ours)


def _make_normal(bins: int, device: str) -> dict[str, Call]:
    x = normal((100_000,), device)
    low, high = torch.aminmax(x)
    counts = torch.histc(x, bins, float(low), float(high)).double()
    return _contenders(counts, low, high)


def _make_batch(bins: int, device: str) -> dict[str, Call]:
    x = normal((_BATCH, 10_000), device).clamp(-4, 4)
    counts = torch.stack([torch.histc(row, bins, -4, 4) for row in x]).double()
    return _contenders(counts, *(torch.tensor(end, device=device) for end in (-4.0, 4.0)))


def _make_two_valued(bins: int, device: str) -> dict[str, Call]:
    """Where every quantile of 1e-5 is passed."""
    counts = torch.zeros(bins, dtype=torch.float64, device=device)
    counts[0], counts[-1] = 600, 400
    return _contenders(counts, *(torch.tensor(end, device=device) for end in (-1.0, 1.0)))


def _make_long(bins: int, device: str) -> dict[str, Call]:
    """Dense tails, cut bin by bin: hundreds of errors are taken."""
    at = torch.linspace(-9, 7, bins, dtype=torch.float64, device=device)
    counts = (1e4 * torch.exp(-at.abs())).floor()
    ends = (torch.tensor(end, device=device) for end in (-9.0, 7.0))
    return _contenders(counts, *ends, levels=16)


CASES = [
    Case("range_search", _make_normal, sizes=(256, 2048, 16384), unit="bins"),
    Case(f"range_search, {_BATCH} at once", _make_batch, sizes=(2048,), unit="bins"),
    Case("range_search, two values", _make_two_valued, sizes=(2048,), unit="bins"),
    Case("range_search, long", _make_long, sizes=(2048,), unit="bins"),
]


def test_range_search(benchmark: Callable[[Call], object], contender: Call) -> None:
    benchmark(contender)

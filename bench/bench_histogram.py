"""The ``histogram`` ops against ``torch.histc`` and torch.ao's combining."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.ao.quantization import HistogramObserver

from pyobserver.ops import histogram, histogram_combine

from .cases import BY_BINS, GROWTH_ELEMENTS, Call, Case, contenders, limit_call, normal

BINS = 2048


def _state(device: str, bins: int = BINS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    low = torch.tensor(torch.inf, device=device)
    counts = torch.zeros(bins, dtype=torch.float64, device=device)
    return counts, low, -low, torch.zeros((), dtype=torch.int64, device=device)


def _steady(x: Tensor, bins: int, device: str) -> dict[str, Call]:
    total = torch.zeros(bins, device=device)

    def reference() -> None:
        low, high = torch.aminmax(x)
        total.add_(torch.histc(x, bins, min=low.item(), max=high.item()))

    def ours() -> Call:
        state = _state(device, bins)
        return lambda: histogram(x, *state)

    return contenders(device, reference, ours)


def _make_steady(size: int, device: str) -> dict[str, Call]:
    x = normal((size,), device)
    return _steady(x, BINS, device) | limit_call("sum", x)


def _make_bins(bins: int, device: str) -> dict[str, Call]:
    return _steady(normal((GROWTH_ELEMENTS,), device), bins, device)


def _make_growing(size: int, device: str) -> dict[str, Call]:
    x = normal((size,), device)

    def narrow(low: Tensor, high: Tensor) -> None:
        low.fill_(-1.0)
        high.fill_(1.0)

    observer = HistogramObserver(bins=BINS).to(device)
    observer(x)

    def reference() -> None:
        narrow(observer.min_val, observer.max_val)
        observer(x)

    def ours() -> Call:
        state = _state(device)
        histogram(x, *state)

        def call() -> None:
            narrow(state[1], state[2])
            histogram(x, *state)

        return call

    return contenders(device, reference, ours) | limit_call("sum", x)


def _make_combine(bins: int, device: str) -> dict[str, Call]:
    counts = torch.arange(bins, dtype=torch.float64, device=device)
    low, high, wide_low, wide_high = torch.tensor([-1.0, 1.0, -1.5, 2.0], device=device)
    observer = HistogramObserver(bins=bins).to(device)
    theirs = counts.float()

    def reference() -> Tensor:
        return observer._combine_histograms(theirs, low, high, theirs, wide_low, wide_high)

    def ours() -> Call:
        state = counts.clone(), low.clone(), high.clone()

        def call() -> None:
            state[1].copy_(low)
            state[2].copy_(high)
            histogram_combine(*state, counts, wide_low, wide_high)

        return call

    return contenders(device, reference, ours)


CASES = [
    Case("histogram", _make_steady, bytes_moved=4, limit="sum"),
    Case("histogram, range grows", _make_growing, bytes_moved=4, limit="sum"),
    Case("histogram_combine", _make_combine, sizes=BY_BINS["sizes"], unit="bins"),
    Case("histogram", _make_bins, **BY_BINS),
]


def test_histogram(benchmark: Callable[[Call], object], contender: Call) -> None:
    benchmark(contender)

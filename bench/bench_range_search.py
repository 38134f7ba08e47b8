"""The ``range_search`` op against torch.ao's search."""

from __future__ import annotations

from collections.abc import Callable

from torch.ao.quantization import HistogramObserver

from pyobserver.ops import range_search

from .cases import Call, Case, contenders, normal


def _make(bins: int, device: str) -> dict[str, Call]:
    observer = HistogramObserver(bins=bins).to(device)
    observer(normal((100_000,), device))
    counts = observer.histogram.double()
    low, high = observer.min_val, observer.max_val

    def ours() -> Call:
        return lambda: range_search(counts, low, high, 256)

    return contenders(device, observer._non_linear_param_search, ours)


CASES = [Case("range_search", _make, sizes=(256, 2048), unit="bins")]


def test_range_search(benchmark: Callable[[Call], object], contender: Call) -> None:
    benchmark(contender)

"""The ``lp_search`` op against torch.ao's ``HistogramObserver.calculate_qparams``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.ao.quantization import HistogramObserver

from pyobserver.ops import lp_search

from .cases import Call, Case, contenders, normal

_BATCH = 200
_VALUES = 100_000  # in each histogram
_AFFINE_8, _SYMMETRIC_8, _AFFINE_4 = (0, 255, None), (-128, 127, 0), (0, 15, None)

Grid = tuple[int, int, int | None]


def _observers(x: Tensor, bins: int, grid: Grid) -> list[HistogramObserver]:
    """torch.ao's, each fed with a row of x."""
    affine = grid[2] is None
    found = []
    for row in x:
        observer = HistogramObserver(
            bins=bins,
            dtype=torch.quint8 if affine else torch.qint8,
            qscheme=torch.per_tensor_affine if affine else torch.per_tensor_symmetric,
            quant_min=grid[0],
            quant_max=grid[1],
        ).to(x.device)
        observer.dst_nbins = grid[1] - grid[0] + 1
        observer(row)
        found.append(observer)
    return found


def _contenders(x: Tensor, bins: int, grid: Grid, p: float = 2.0) -> dict[str, Call]:
    """Both on the histograms of torch.ao; its search takes one at a time."""
    observers = _observers(x, bins, grid)
    counts = torch.stack([observer.histogram.double() for observer in observers])
    low, high = (
        torch.stack([getattr(observer, end) for observer in observers])
        for end in ("min_val", "max_val")
    )
    steps = torch.arange(bins + 1, dtype=torch.float64, device=x.device) / bins
    edges = torch.lerp(low.double().unsqueeze(1), high.double().unsqueeze(1), steps)

    def reference() -> None:
        for observer in observers:
            observer.calculate_qparams()

    def ours() -> Call:
        scale, zero_point = torch.zeros_like(low), torch.zeros_like(low, dtype=torch.int32)
        error = torch.zeros(len(low), 3, dtype=torch.float64, device=x.device)
        outputs = scale, zero_point, error, *grid[:2], p, grid[2]
        return lambda: lp_search(counts, edges, low, high, *outputs)

    return contenders(str(x.device), reference, ours)


def _make(grid: Grid, histograms: int = 1, p: float = 2.0) -> Callable[[int, str], dict[str, Call]]:
    def make(bins: int, device: str) -> dict[str, Call]:
        values = _VALUES if histograms == 1 else _VALUES // 10
        return _contenders(normal((histograms, values), device), bins, grid, p)

    return make


CASES = [
    Case("lp_search", _make(_AFFINE_8), sizes=(256, 2048, 16384), unit="bins"),
    Case("lp_search, symmetric", _make(_SYMMETRIC_8), sizes=(2048,), unit="bins"),
    Case("lp_search, 4 bits", _make(_AFFINE_4), sizes=(2048,), unit="bins"),
    Case("lp_search, p = 2.4", _make(_AFFINE_8, p=2.4), sizes=(2048,), unit="bins"),
    Case(f"lp_search, {_BATCH} at once", _make(_AFFINE_8, _BATCH), sizes=(256,), unit="bins"),
]


def test_lp_search(benchmark: Callable[[Call], object], contender: Call) -> None:
    benchmark(contender)

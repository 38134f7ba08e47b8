"""``python -m bench.quality``: squared errors of the ranges that are chosen, over the least."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import pyobserver
from pyobserver import ops

from .report import table

COUNT = 200_000
BITS = (2, 4, 8)

Draw = Callable[[np.random.Generator], np.ndarray]


def _outlier(value: float) -> Draw:
    def draw(rng: np.random.Generator) -> np.ndarray:
        x = rng.standard_normal(COUNT)
        x[COUNT // 3] = value
        return x

    return draw


def _rectified(rng: np.random.Generator) -> np.ndarray:
    x = np.abs(rng.standard_normal(COUNT))
    return np.where(rng.uniform(size=COUNT) < 0.9, 0.0, x)


def _bimodal(rng: np.random.Generator) -> np.ndarray:
    x = rng.standard_normal(COUNT)
    return np.where(rng.uniform(size=COUNT) < 0.5, x - 4, x / 2 + 6)


DISTRIBUTIONS: dict[str, Draw] = {
    "normal": lambda rng: rng.standard_normal(COUNT),
    "half-normal": lambda rng: np.abs(rng.standard_normal(COUNT)),
    "Laplace": lambda rng: rng.laplace(size=COUNT),
    "Student-t 1": lambda rng: rng.standard_t(1, COUNT),
    "Student-t 2": lambda rng: rng.standard_t(2, COUNT),
    "Student-t 3": lambda rng: rng.standard_t(3, COUNT),
    "log-normal": lambda rng: np.exp(2 * rng.standard_normal(COUNT)),
    "uniform": lambda rng: rng.uniform(-1, 1, COUNT),
    "rectified": _rectified,
    "bimodal": _bimodal,
    "outlier 1e2": _outlier(1e2),
    "outlier 1e4": _outlier(1e4),
    "outlier 1e6": _outlier(1e6),
}


class Grid(NamedTuple):
    quant_min: int
    quant_max: int
    symmetric: bool  # its zero point is 0

    @property
    def steps(self) -> int:
        return self.quant_max - self.quant_min


def grid_of(bits: int, symmetric: bool) -> Grid:
    half = 2 ** (bits - 1)
    return Grid(-half, half - 1, True) if symmetric else Grid(0, 2 * half - 1, False)


@cache
def data(name: str) -> Tensor:
    return torch.from_numpy(DISTRIBUTIONS[name](np.random.default_rng(0)).astype(np.float32))


@cache
def observer_of(name: str) -> pyobserver.LogHistogramObserver:
    observer = pyobserver.LogHistogramObserver()
    observer(data(name))
    return observer


class Sorted:
    """Values in order and their sums, so that a level's error costs two look-ups."""

    def __init__(self, x: np.ndarray):
        self.x = np.sort(x.astype(np.float64))
        self.sums = np.concatenate([[0.0], np.cumsum(self.x)])
        self.squares = np.concatenate([[0.0], np.cumsum(self.x * self.x)])

    def error(self, begin: np.ndarray, end: np.ndarray, level: np.ndarray) -> np.ndarray:
        """The squared error of putting the values from ``begin`` to before ``end`` on a level."""
        total = self.sums[end] - self.sums[begin]
        return (
            self.squares[end] - self.squares[begin] - 2 * level * total + level**2 * (end - begin)
        )

    def by_level(self, scales: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, ...]:
        """Of each scale and level: with what is nearest to it, with all below too, all above."""
        at = scales[:, None] * levels
        bounds = scales[:, None] * (levels[0] - 0.5 + np.arange(len(levels) + 1))
        ends = np.searchsorted(self.x, bounds)
        begin, end = ends[:, :-1], ends[:, 1:]
        first, last = np.zeros_like(begin), np.full_like(begin, len(self.x))
        return self.error(begin, end, at), self.error(first, end, at), self.error(begin, last, at)

    def outside(self, low: float, high: float) -> float:
        """The least error of any grid within [low, high]."""
        ends = np.searchsorted(self.x, [low, high])
        first, last = np.array([0]), np.array([len(self.x)])
        below = self.error(first, ends[:1], np.array([low]))
        return float((below + self.error(ends[1:], last, np.array([high])))[0])


def _errors(values: Sorted, scales: np.ndarray, grid: Grid) -> np.ndarray:
    """Of each scale, with its best zero point."""
    if grid.symmetric:
        levels = np.arange(grid.quant_min, grid.quant_max + 1)
        nearest, lowest, highest = values.by_level(scales, levels)
        return lowest[:, 0] + nearest[:, 1:-1].sum(1) + highest[:, -1]
    steps = grid.steps
    nearest, lowest, highest = values.by_level(scales, np.arange(-steps, steps + 1))
    total = np.cumsum(nearest, 1)
    between = total[:, steps - 1 : -1] - total[:, : steps + 1]
    return (lowest[:, : steps + 1] + between + highest[:, steps:]).min(1)


def least_error(values: Sorted, grid: Grid) -> float:
    """Over all zero points, and all scales 0.2 % apart or with an extreme on a level."""
    low, high = -min(values.x[0], 0.0), max(values.x[-1], 0.0)
    if grid.symmetric:
        sides = [low / -grid.quant_min, high / max(grid.quant_max, 1)]
        unclipped, widest = max(sides), (grid.quant_min, grid.quant_max)
    else:
        sides = [side / level for side in (low, high) for level in range(1, grid.steps + 1)]
        unclipped, widest = (low + high) / grid.steps, (-grid.steps, grid.steps)
    dense = 2 * unclipped * 1.002 ** -np.arange(20_000.0)
    extremes = np.array([side for side in sides if dense[-1] < side <= dense[0]])
    scales = np.sort(np.concatenate([dense, extremes]))[::-1]
    least = np.inf
    for some in np.array_split(scales, len(scales) // 128):
        if values.outside(*(level * some[0] for level in widest)) >= least:
            break  # it only grows as the scale falls
        least = min(least, _errors(values, some, grid).min())
    return float(least)


def error_of(name: str, scale: Tensor, zero_point: Tensor, grid: Grid) -> float:
    """Of the data itself, through fake-quantize."""
    x = data(name)
    zero_point = zero_point.reshape(()).to(torch.int32)
    y = ops.fake_quantize(x, scale.reshape(()).float(), zero_point, grid.quant_min, grid.quant_max)
    return float(((x.double() - y.double()) ** 2).sum())


def found(name: str, grid: Grid) -> tuple[Tensor, Tensor]:
    """What our observer chooses."""
    solution = observer_of(name).solve(
        "mse", quant_min=grid.quant_min, quant_max=grid.quant_max, symmetric=grid.symmetric
    )
    return solution.scale, solution.zero_point


def _by_torch(name: str, grid: Grid, of_histogram: bool) -> tuple[Tensor, Tensor]:
    """What torch.ao's HistogramObserver or MinMaxObserver chooses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import HistogramObserver, MinMaxObserver

        observer = (HistogramObserver if of_histogram else MinMaxObserver)(
            dtype=torch.qint8 if grid.symmetric else torch.quint8,
            qscheme=torch.per_tensor_symmetric if grid.symmetric else torch.per_tensor_affine,
            quant_min=grid.quant_min,
            quant_max=grid.quant_max,
        )
        observer.dst_nbins = grid.steps + 1  # that of HistogramObserver is always of 8 bits
        observer(data(name))
        return observer.calculate_qparams()


def ratio(error: float, least: float) -> float:
    return error / least if least > 0 else 1.0 if error == 0 else np.inf


def _rows() -> Iterator[tuple[str, ...]]:
    for name in DISTRIBUTIONS:
        values = Sorted(data(name).numpy())
        for symmetric in (False, True):
            for bits in BITS:
                grid = grid_of(bits, symmetric)
                print(f"{name}, {bits} bits", file=sys.stderr)
                least = least_error(values, grid)
                chosen = (
                    _by_torch(name, grid, True),
                    _by_torch(name, grid, False),
                    found(name, grid),
                )
                ratios = [ratio(error_of(name, *qparams, grid), least) for qparams in chosen]
                yield (
                    name,
                    "symmetric" if symmetric else "affine",
                    str(bits),
                    f"{least / COUNT:.4g}",
                    *(f"{value:,.3f}" if value < 1000 else f"{value:,.0f}" for value in ratios),
                )


def main() -> None:
    torch.set_num_threads(1)
    heads = ("data", "scheme", "bits", "least", "torch.ao histogram", "min/max", "ours, mse")
    print(
        f"Mean squared error of {COUNT:,} float32 values: the least there is (brute force over "
        "scales and zero points), and as its multiples those of the ranges that torch.ao's "
        "HistogramObserver, min/max and LogHistogramObserver (by mse) choose.\n"
    )
    print("\n".join(table(heads, list(_rows()))), end="")


if __name__ == "__main__":
    main()

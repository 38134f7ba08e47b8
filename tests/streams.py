"""Streams of batches that observers meet: what they calibrate on, and what has broken others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(20)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _student(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Student-t of two degrees of freedom, by its quantile function."""
    p = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.998 + 0.001
    return ((2 * p - 1) / (2 * p * (1 - p)).sqrt()).float()


def _laplace(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    p = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.998 - 0.499
    return (-p.sign() * torch.log1p(-2 * p.abs())).float()


def _outlier(batch: Tensor) -> Tensor:
    batch.view(-1)[17] = 50.0
    return batch


# all of 5 channels on axis 1
def streams() -> dict[str, list[Tensor]]:
    g, shape = _generator(), (4, 5, 23)

    def normal(count: int) -> Iterator[Tensor]:
        return (_normal(shape, g) for _ in range(count))

    return {
        "normal": list(normal(4)),
        "relu": [x.relu() for x in normal(4)],
        "negative": [-x.abs() - 0.1 for x in normal(3)],
        "student": [_student(shape, g) for _ in range(4)],
        "laplace": [_laplace(shape, g) for _ in range(4)],
        "uniform_offset": [torch.rand(shape, generator=g) + 1000 for _ in range(3)],
        "two_valued": [(x > 0).float() for x in normal(2)],
        "constant": [torch.full(shape, 2.5) for _ in range(3)],
        "zeros": [torch.zeros(shape) for _ in range(3)],
        "constant_negative": [torch.full(shape, -3.0) for _ in range(3)],
        "constant_then_normal": [torch.full(shape, 0.25), *normal(2)],
        "zeros_then_normal": [torch.zeros(shape), *normal(2)],
        "growing": [x * 1.7**i for i, x in enumerate(normal(4))],
        "shrinking": [x / 3**i for i, x in enumerate(normal(4))],
        "drifting": [x + 0.8 * i for i, x in enumerate(normal(4))],
        "tiny": [x * 1e-6 for x in normal(3)],
        "large": [x * 1e4 for x in normal(3)],
        "varying_shapes": [
            _normal((4, 5, 1), g),
            _normal((1, 5, 33), g),
            _normal((2, 5), g),
            _normal((0, 5, 3), g),
            _normal((64, 5, 2), g),
        ],
        "outlier": [*normal(1), _outlier(_normal(shape, g)), *normal(1)],
    }


# torch.ao's search takes a second on each of these: all values in one or two bins
SLOW_TO_SEARCH = ("constant", "zeros", "constant_negative", "two_valued")

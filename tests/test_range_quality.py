"""On raw data, the range found in a log histogram errs at most 2 % more than the best there is."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from bench.quality import (
    BITS,
    DISTRIBUTIONS,
    Sorted,
    data,
    error_of,
    found,
    grid_of,
    least_error,
    ratio,
)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More only slow the reference: its tensors are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def values(name: str) -> Sorted:
    return Sorted(data(name).numpy())


@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_within_two_percent_of_the_best_range(name: str, bits: int, symmetric: bool) -> None:
    grid = grid_of(bits, symmetric)
    error = error_of(name, *found(name, grid), grid)
    assert ratio(error, least_error(values(name), grid)) <= 1.02

"""The ``minmax`` op against ``torch.aminmax`` (or ``amin``, ``amax``) and torch's update."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyobserver.ops import minmax

from .cases import (
    Call,
    Case,
    activation,
    contenders,
    flat,
    limit_call,
    normal,
    tokens,
    weight,
)

GROUP = 128  # values of a row that have a range, or a scale, of their own


def grouped(size: int, device: str) -> Tensor:
    """(rows, groups of ``GROUP`` values)"""
    columns = GROUP * (8 if size >= 10_000 else 1)
    return normal((max(1, size // columns), columns), device)


def _state(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor, Tensor]:
    shape = () if axis is None else (x.shape[axis],)
    low = torch.full(shape, torch.inf, device=x.device)
    return low, -low, torch.zeros((), dtype=torch.int64, device=x.device)


def _case(
    name: str,
    tensor: Callable[[int, str], Tensor],
    axis: int | None = None,
    update: str = "running",
) -> Case:
    def make(size: int, device: str) -> dict[str, Call]:
        x = tensor(size, device)
        dims = None if axis is None else [d for d in range(x.dim()) if d != axis % x.dim()]
        low, high, _ = _state(x, axis)

        def reference() -> None:
            if dims is None:
                least, greatest = torch.aminmax(x)
            else:
                least, greatest = x.amin(dims), x.amax(dims)
            if update == "running":
                low.copy_(torch.minimum(low, least))
                high.copy_(torch.maximum(high, greatest))
            else:
                low.copy_(torch.where(low.isinf(), least, low + 0.01 * (least - low)))
                high.copy_(torch.where(high.isinf(), greatest, high + 0.01 * (greatest - high)))

        def ours() -> Call:
            state = _state(x, axis)
            return lambda: minmax(x, *state, axis, update)

        return contenders(device, reference, ours) | limit_call("sum", x)

    return Case(name, make, bytes_moved=4, limit="sum")


def _make_blocks(size: int, device: str) -> dict[str, Call]:
    x = grouped(size, device)
    groups = x.unflatten(-1, (-1, GROUP))
    shape = groups.shape[:-1]
    low = torch.full(shape, torch.inf, device=device)
    high = -low

    def reference() -> None:
        low.copy_(torch.minimum(low, groups.amin(-1)))
        high.copy_(torch.maximum(high, groups.amax(-1)))

    def ours() -> Call:
        least = torch.full(shape, torch.inf, device=device)
        state = (least, -least, torch.zeros((), dtype=torch.int64, device=device))
        return lambda: minmax(x, *state, block_size=(1, GROUP))

    return contenders(device, reference, ours) | limit_call("sum", x)


CASES = [
    _case("minmax", flat),
    _case("minmax, moving average", flat, update="moving_average"),
    _case("minmax, axis 0", weight, 0),
    _case("minmax, axis 1", activation, 1),
    _case("minmax, last axis", tokens, -1),
    Case(f"minmax, blocks of {GROUP}", _make_blocks, bytes_moved=4, limit="sum"),
]


def test_minmax(benchmark: Callable[[Call], object], contender: Call) -> None:
    benchmark(contender)

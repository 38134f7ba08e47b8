"""How long one call with its gradient takes where the tensor is small."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cases import Call, Case, all_cases, flat, with_gradient
from ..timing import FULL, QUICK, measure
from .report import CallTime

SIZES = (16, 256, 4096)  # elements
_BOTH_WAYS = "forward and backward"


class _Cloned(torch.autograd.Function):
    """The least that a function with a gradient does in Python."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clone()


def _make_clone(size: int, device: str) -> dict[str, Call]:
    x = flat(size, device).detach().requires_grad_()
    return {
        "reference": with_gradient(x.clone, x),
        "native": with_gradient(lambda: _Cloned.apply(x), x),
    }


_FLOOR = Case(f"a copy, {_BOTH_WAYS} (beside torch's one in Python)", _make_clone)


def cases() -> list[Case]:
    """The floor, and what the other benchmarks time both ways on any number of elements."""
    found = [case for case in all_cases() if _BOTH_WAYS in case.name and case.sizes is None]
    return [_FLOOR, *found]


def time_calls(quick: bool) -> list[CallTime]:
    """On one thread, which small tensors have in any case."""
    torch.set_num_threads(1)
    rows = []
    for case in cases():
        for size in SIZES:
            made = case.make(size, "cpu")
            calls = {name: made[name] for name in ("reference", "native") if name in made}
            rows.append(CallTime(case.name, size, measure(calls, QUICK if quick else FULL, "cpu")))
    return rows

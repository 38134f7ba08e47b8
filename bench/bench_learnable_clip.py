"""``learnable_clip`` against the chain of torch ops that it is of old, forward and backward.

The chain is NVIDIA's pytorch-quantization's: its clip, and where it is quantized its
``fake_tensor_quant`` after it. Outputs are warm (see ``keep_memory_warm``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyobserver.ops import learnable_clip

from .bench_tensor_quant import fake_chain
from .cases import (
    BY_DTYPE,
    BY_LAYOUT,
    Call,
    Case,
    contenders,
    flat,
    limit_call,
    of_dtype,
    of_layout,
)

_MASK = 1 / 4  # bytes an element
_BITS = 8


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(x, low, high)
        return torch.max(torch.min(x, high), low)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, low, high = ctx.saved_tensors
        above_low, below_high = (x > low).to(grad.dtype), (x < high).to(grad.dtype)
        of_low, of_high = ((grad * (1.0 - kept)).sum() for kept in (above_low, below_high))
        return grad * above_low * below_high, of_low.to(low.dtype), of_high.to(high.dtype)


class _FakeChain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, amax: Tensor) -> Tensor:
        ctx.save_for_backward(x, amax)
        return fake_chain(x, amax)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, amax = ctx.saved_tensors
        return torch.where(x.abs() <= amax, grad, grad.new_zeros(1)), None


def _chain(x: Tensor, low: Tensor, high: Tensor, num_bits: int | None) -> Tensor:
    y = _Chain.apply(x, low, high)
    return y if num_bits is None else _FakeChain.apply(y, torch.max(-low, high).detach())


def _case(
    name: str,
    tensor: Callable[[Any, str], Tensor],
    num_bits: int | None,
    gradient: bool,
    limit: str | None = "copy_",
    **more: Any,
) -> Case:
    """The values, and the gradients of all three arguments."""

    def make(size: Any, device: str) -> dict[str, Call]:
        x = tensor(size, device).detach()
        # a tenth of the values of a normal distribution is clipped
        low, high = (torch.tensor(bound, device=device) for bound in (-1.65, 1.65))
        given = [t.requires_grad_(gradient) for t in (x, low, high)]
        grad = torch.ones_like(x)

        def call_of(clip: Callable[..., Tensor]) -> Call:
            if not gradient:
                return lambda: clip(*given, num_bits)
            return lambda: torch.autograd.grad(clip(*given, num_bits), given, grad)

        calls = contenders(device, call_of(_chain), lambda: call_of(learnable_clip))
        return calls | limit_call(limit, x)

    moved = 16 + 2 * _MASK if gradient else 8
    return Case(name, make, bytes_moved=moved, limit=limit, **more)


CASES = [
    _case("learnable_clip", flat, None, False),
    _case("learnable_clip, quantized", flat, _BITS, False),
    _case("learnable_clip forward and backward", flat, None, True),
    _case("learnable_clip, quantized, forward and backward", flat, _BITS, True),
    _case("learnable_clip, quantized, forward and backward", of_dtype, _BITS, True, **BY_DTYPE),
    _case("learnable_clip, quantized, forward and backward", of_layout, _BITS, True, **BY_LAYOUT),
]


def test_learnable_clip(benchmark: Callable[[Call], object], contender: Call) -> None:
    benchmark(contender)

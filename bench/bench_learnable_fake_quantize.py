"""The ``learnable_fake_quantize`` ops against torch's, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyobserver.ops import learnable_fake_quantize

from .cases import Call, Case, activation, contenders, flat, limit_call, weight

_FACTOR = 0.01


def _both_ways(name: str, tensor: Callable[[Any, str], Tensor], axis: int | None = None) -> Case:
    """The values, and the gradients of all three arguments."""

    def make(size: Any, device: str) -> dict[str, Call]:
        x = tensor(size, device).detach().requires_grad_()
        channels = 1 if axis is None else x.shape[axis]
        # a tenth of the values of a normal distribution is clipped
        scale = torch.full((channels,), 1.65 / 127, device=device).requires_grad_()
        zero_point = torch.zeros(channels, device=device).requires_grad_()
        given = x, scale, zero_point
        grad = torch.ones_like(x)

        def reference() -> tuple[Tensor, ...]:
            if axis is None:
                y = torch._fake_quantize_learnable_per_tensor_affine(*given, -128, 127, _FACTOR)
            else:
                y = torch._fake_quantize_learnable_per_channel_affine(
                    *given, axis, -128, 127, _FACTOR
                )
            return torch.autograd.grad(y, given, grad)

        def ours() -> Call:
            return lambda: torch.autograd.grad(
                learnable_fake_quantize(*given, -128, 127, axis, _FACTOR), given, grad
            )

        return contenders(device, reference, ours) | limit_call("copy_", x)

    return Case(name, make, bytes_moved=20, limit="copy_")


CASES = [
    _both_ways("learnable fake_quantize forward and backward", flat),
    _both_ways("learnable fake_quantize forward and backward, axis 0", weight, 0),
    _both_ways("learnable fake_quantize forward and backward, axis 1", activation, 1),
]


def test_learnable_fake_quantize(benchmark: Callable[[Call], object], contender: Call) -> None:
    benchmark(contender)

"""``tensor_quant`` and ``fake_tensor_quant`` against the chain of torch ops that they are of old.

The chain is that of NVIDIA's pytorch-quantization where its CUDA extension does not serve; the
outputs are warm (see ``keep_memory_warm``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyobserver.ops import fake_tensor_quant, tensor_quant

from .cases import (
    BY_CHANNELS,
    BY_DTYPE,
    BY_LAYOUT,
    BY_RUN,
    Call,
    Case,
    activation,
    channels_end,
    channels_first,
    channels_middle,
    contenders,
    flat,
    limit_call,
    of_dtype,
    of_layout,
    runs,
    tokens,
    weight,
)

_EPSILON = 2.0**-24
_MASK = 1 / 8  # bytes an element


def _chain(x: Tensor, amax: Tensor, unsigned: bool = False) -> tuple[Tensor, Tensor]:
    if unsigned and x.min() < 0:
        raise TypeError
    dtype = x.dtype
    if dtype == torch.float16:
        x, amax = x.float(), amax.float()
    least = amax.min()
    if least < 0:
        raise ValueError
    high = torch.tensor(2.0 ** (7 + unsigned) - 1, device=x.device)
    scale = high / amax
    if least <= _EPSILON:
        scale[amax <= _EPSILON] = 0
    outputs = torch.clamp((x * scale).round_(), 0 if unsigned else -high, high)
    if least <= _EPSILON:
        scale[amax <= _EPSILON] = 1
    return outputs.to(dtype), scale.to(dtype)


def fake_chain(x: Tensor, amax: Tensor, unsigned: bool = False) -> Tensor:
    outputs, scale = _chain(x, amax, unsigned)
    return outputs / scale


def _amax(x: Tensor, axis: int | None) -> Tensor:
    """Clips a few values of each amax; shaped to broadcast."""
    others = [d for d in range(x.dim()) if d != axis]
    amax = x.abs().amax(others, keepdim=True) if others else x.abs()
    return 0.7 * (amax if axis is not None else amax.max())


def _forward(
    name: str,
    tensor: Callable[[Any, str], Tensor],
    axis: int | None = None,
    unsigned: bool = False,
    limit: str | None = "copy_",
    **more: Any,
) -> Case:
    def make(size: Any, device: str) -> dict[str, Call]:
        x = tensor(size, device)
        x = x.abs() if unsigned else x
        amax = _amax(x, axis)
        calls = contenders(
            device,
            lambda: fake_chain(x, amax, unsigned),
            lambda: lambda: fake_tensor_quant(x, amax, 8, unsigned),
        )
        return calls | limit_call(limit, x)

    return Case(name, make, bytes_moved=8, limit=limit, **more)


def _make_integers(size: int, device: str) -> dict[str, Call]:
    x = flat(size, device)
    amax = _amax(x, None)
    calls = contenders(device, lambda: _chain(x, amax), lambda: lambda: tensor_quant(x, amax))
    return calls | limit_call("copy_", x)


def _make_autograd(size: int, device: str) -> dict[str, Call]:
    x = flat(size, device).detach().requires_grad_()
    amax = _amax(x.detach(), None)
    grad = torch.ones_like(x)

    def reference() -> Tensor:
        with torch.no_grad():
            fake_chain(x, amax)
            return torch.where(x.abs() <= amax, grad, grad.new_zeros(1))

    def ours() -> Call:
        return lambda: torch.autograd.grad(fake_tensor_quant(x, amax), x, grad)

    return contenders(device, reference, ours) | limit_call("copy_", x)


CASES = [
    _forward("fake_tensor_quant", flat),
    _forward("fake_tensor_quant, unsigned", flat, unsigned=True),
    _forward("fake_tensor_quant, axis 0", weight, 0),
    _forward("fake_tensor_quant, axis 1", activation, 1),
    _forward("fake_tensor_quant, last axis", tokens, 1),
    Case("tensor_quant", _make_integers, bytes_moved=8, limit="copy_"),
    Case(
        "fake_tensor_quant forward and backward",
        _make_autograd,
        bytes_moved=16 + 2 * _MASK,
        limit="copy_",
    ),
    _forward("fake_tensor_quant, axis 0", channels_first, 0, **BY_CHANNELS),
    _forward("fake_tensor_quant, axis 1", channels_middle, 1, **BY_CHANNELS),
    _forward("fake_tensor_quant, last axis", channels_end, 1, **BY_CHANNELS),
    _forward("fake_tensor_quant, axis 1", runs, 1, **BY_RUN),
    _forward("fake_tensor_quant", of_dtype, **BY_DTYPE),
    _forward("fake_tensor_quant", of_layout, **BY_LAYOUT),
]


def test_tensor_quant(benchmark: Callable[[Call], object], contender: Call) -> None:
    benchmark(contender)

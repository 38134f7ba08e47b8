"""The ``fake_quantize`` ops against torch's; the outputs are warm (see ``keep_memory_warm``)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyobserver.ops import fake_quantize

from .bench_minmax import GROUP, grouped
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
    normal,
    of_dtype,
    of_layout,
    runs,
    weight,
    with_gradient,
)

# the package has the function under the module's name
_ops = importlib.import_module("pyobserver.ops.fake_quantize")
_aten = torch.ops.aten
_MASK = 1 / 8  # bytes an element


def _qparams(x: Tensor, axis: int | None) -> tuple[Tensor, Tensor]:
    channels = 1 if axis is None else x.shape[axis]
    # a tenth of the values of a normal distribution is clipped
    scale = torch.full((channels,), 1.65 / 127, device=x.device)
    return scale, torch.zeros(channels, dtype=torch.int32, device=x.device)


def _calls(x: Tensor, axis: int | None) -> tuple[Call, Call]:
    """torch's and ours."""
    scale, zero_point = _qparams(x, axis)

    def reference() -> Tensor:
        if axis is None:
            return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -128, 127)
        return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, -128, 127)

    return reference, lambda: fake_quantize(x, scale, zero_point, -128, 127, axis)


def _forward(
    name: str,
    tensor: Callable[[Any, str], Tensor],
    axis: int | None = None,
    limit: str | None = "copy_",
    **more: Any,
) -> Case:
    def make(size: Any, device: str) -> dict[str, Call]:
        x = tensor(size, device)
        reference, ours = _calls(x, axis)
        return contenders(device, reference, lambda: ours) | limit_call(limit, x)

    return Case(name, make, bytes_moved=8, limit=limit, **more)


def _both_ways(name: str, tensor: Callable[[Any, str], Tensor], axis: int | None = None) -> Case:
    def make(size: Any, device: str) -> dict[str, Call]:
        x = tensor(size, device).detach().requires_grad_()
        reference, ours = (with_gradient(call, x) for call in _calls(x, axis))
        return contenders(device, reference, lambda: ours) | limit_call("copy_", x)

    return Case(name, make, bytes_moved=16 + 2 * _MASK, limit="copy_")


def _make_mask(size: int, device: str) -> dict[str, Call]:
    x = normal((size,), device)
    scale, zero_point = _qparams(x, None)
    cachemask = _aten.fake_quantize_per_tensor_affine_cachemask.default
    scale_value = scale.item()

    def ours() -> Call:
        return lambda: _ops._op_mask(x, scale, zero_point, -128, 127)

    calls = contenders(device, lambda: cachemask(x, scale_value, 0, -128, 127), ours)
    return calls | limit_call("copy_", x)


def _make_backward(size: int, device: str) -> dict[str, Call]:
    x = normal((size,), device)
    scale, zero_point = _qparams(x, None)
    mask = _aten.fake_quantize_per_tensor_affine_cachemask.default(x, scale.item(), 0, -128, 127)[1]
    bits = _ops._op_mask(x, scale, zero_point, -128, 127)[1]

    # torch's backward is this product
    calls = contenders(device, lambda: x * mask, lambda: lambda: _ops._op_backward(x, bits))
    return calls | limit_call("copy_", x)


def _make_blocks(size: int, device: str) -> dict[str, Call]:
    x = grouped(size, device)
    rows = x.reshape(-1, GROUP)
    scale, zero_point = _qparams(rows, 0)
    grid = (x.shape[0], x.shape[1] // GROUP)
    scales, zero_points = scale.reshape(grid), zero_point.reshape(grid)

    def reference() -> Tensor:
        y = torch.fake_quantize_per_channel_affine(rows, scale, zero_point, 0, -128, 127)
        return y.reshape(x.shape)

    def ours() -> Call:
        return lambda: fake_quantize(x, scales, zero_points, -128, 127, block_size=(1, GROUP))

    return contenders(device, reference, ours) | limit_call("copy_", x)


def _make_out(size: int, device: str) -> dict[str, Call]:
    x = normal((size,), device)
    scale, zero_point = _qparams(x, None)

    def reference() -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, -128, 127)

    def ours() -> Call:
        out = torch.empty_like(x)
        return lambda: fake_quantize(x, scale, zero_point, -128, 127, out=out)

    return contenders(device, reference, ours) | limit_call("copy_", x)


CASES = [
    _forward("fake_quantize", flat),
    _forward("fake_quantize, axis 0", weight, 0),
    _forward("fake_quantize, axis 1", activation, 1),
    Case(f"fake_quantize, blocks of {GROUP}", _make_blocks, bytes_moved=8, limit="copy_"),
    Case("fake_quantize into a given tensor", _make_out, bytes_moved=8, limit="copy_"),
    Case("fake_quantize with mask", _make_mask, bytes_moved=8 + _MASK, limit="copy_"),
    Case("fake_quantize backward", _make_backward, bytes_moved=8 + _MASK, limit="copy_"),
    _both_ways("fake_quantize forward and backward", flat),
    _both_ways("fake_quantize forward and backward, axis 0", weight, 0),
    _forward("fake_quantize, axis 0", channels_first, 0, **BY_CHANNELS),
    _forward("fake_quantize, axis 1", channels_middle, 1, **BY_CHANNELS),
    _forward("fake_quantize, last axis", channels_end, 1, **BY_CHANNELS),
    _forward("fake_quantize, axis 1", runs, 1, **BY_RUN),
    _forward("fake_quantize", of_dtype, **BY_DTYPE),
    _forward("fake_quantize, axis 0", of_dtype, 0, **BY_DTYPE),
    _forward("fake_quantize", of_layout, **BY_LAYOUT),
    _forward("fake_quantize, axis 1", of_layout, 1, **BY_LAYOUT),
]


def test_fake_quantize(benchmark: Callable[[Call], object], contender: Call) -> None:
    benchmark(contender)

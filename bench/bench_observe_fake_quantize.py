"""The ``observe_fake_quantize`` op against torch's fused kernel, or the three steps in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyobserver.ops import observe_fake_quantize

from .cases import (
    Call,
    Case,
    contenders,
    flat,
    limit_call,
    weight,
    with_gradient,
)

_CONSTANT = 0.01
_GRID = (-128, 127)
_MASK = 1 / 8  # bytes an element


def _state(x: Tensor, axis: int | None) -> tuple[Tensor, ...]:
    """min_val, max_val, nonfinite_count, scale, zero_point, eps."""
    low = torch.full((1 if axis is None else x.shape[axis],), torch.inf, device=x.device)
    return (
        *(low, -low, torch.zeros((), dtype=torch.int64, device=x.device)),
        *(torch.ones_like(low), torch.zeros_like(low, dtype=torch.int32)),
        torch.full((1,), torch.finfo(torch.float32).eps, device=x.device),
    )


def _fused(x: Tensor, axis: int | None, symmetric: bool) -> Call:
    """torch's own, which serves channels of axis 0 alone; it has a mask in any case."""
    low, high, _, scale, zero_point, _ = _state(x, axis)
    on = torch.ones(1, dtype=torch.int64, device=x.device)
    return lambda: torch.fused_moving_avg_obs_fake_quant(
        x, on, on, low, high, scale, zero_point, _CONSTANT, *_GRID, 0, axis is not None, symmetric
    )  # fmt: skip


def _in_steps(x: Tensor) -> Call:
    """``torch.aminmax``, the moving average, the affine scale, torch's fake-quantize."""
    low, high, _, _, _, eps = _state(x, None)
    quant_min, quant_max = _GRID

    def call() -> Tensor:
        least, greatest = torch.aminmax(x)
        low.copy_(torch.where(low.isinf(), least, low + _CONSTANT * (least - low)))
        high.copy_(torch.where(high.isinf(), greatest, high + _CONSTANT * (greatest - high)))
        bottom, top = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = torch.maximum((top - bottom) / float(quant_max - quant_min), eps)
        zero_point = (quant_min - torch.round(bottom / scale).int()).clamp(quant_min, quant_max)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, quant_min, quant_max)

    return call


def _case(
    name: str,
    tensor: Callable[[int, str], Tensor],
    mapping: str,
    axis: int | None = None,
    *,
    grad: bool = False,
) -> Case:
    def make(size: int, device: str) -> dict[str, Call]:
        x = tensor(size, device).detach().requires_grad_(grad)

        def of(call: Call) -> Call:
            return with_gradient(call, x) if grad else call

        def ours() -> Call:
            state = _state(x, axis)
            return of(lambda: observe_fake_quantize(x, *state, *_GRID, mapping=mapping, axis=axis))

        fused = mapping.startswith("fused")
        reference = _fused(x, axis, mapping == "fused_symmetric") if fused else _in_steps(x)
        return contenders(device, of(reference), ours) | limit_call("copy_", x)

    # x twice and the result, and backward the gradient twice
    bytes_moved = 20 + 2 * _MASK if grad else 12
    return Case(name, make, bytes_moved=bytes_moved, limit="copy_")


CASES = [
    _case("observe_fake_quantize", flat, "affine"),
    _case("observe_fake_quantize, fused affine", flat, "fused_affine"),
    _case("observe_fake_quantize, fused symmetric, axis 0", weight, "fused_symmetric", 0),
    _case("observe_fake_quantize forward and backward", flat, "fused_affine", grad=True),
    _case(
        "observe_fake_quantize forward and backward, axis 0",
        weight,
        "fused_symmetric",
        0,
        grad=True,
    ),
]


def test_observe_fake_quantize(benchmark: Callable[[Call], object], contender: Call) -> None:
    benchmark(contender)

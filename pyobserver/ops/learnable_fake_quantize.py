"""``learnable_fake_quantize``: fake-quantize whose scale and zero point get gradients too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _checks
from ._blocks import split
from ._elementwise import empty_output, is_laid_out_as_output, needs_gradient, with_strides
from ._library import define, define_composite
from .fake_quantize import _quantize, check_grid_params, check_values

_OP = "learnable_fake_quantize"


def _check(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    block_size: Sequence[int] | None,
    op: str = _OP,
) -> None:
    _checks.check_input(op, "x", x)
    _checks.check_state(op, "zero_point", zero_point, (torch.float32,))
    check_grid_params(op, x, scale, zero_point, quant_min, quant_max, axis, block_size)


def _check_values(scale: Tensor, zero_point: Tensor, op: str = _OP) -> None:
    """As check_values."""
    check_values(op, scale, zero_point, 0, 0)
    if zero_point.device.type == "cpu" and bool(zero_point.isnan().any()):
        raise ValueError(f"{op}: zero_point: expected numbers, got {zero_point.tolist()}")


def _rounded(zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    return zero_point.double().round().clamp(quant_min, quant_max).to(torch.int32)


def reference(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    block_size: Sequence[int] | None = None,
) -> Tensor:
    _check(x, scale, zero_point, quant_min, quant_max, axis, block_size)
    if x.numel() == 0:
        return empty_output(x)
    _check_values(scale, zero_point)
    integers = _rounded(zero_point, quant_min, quant_max)
    y, _ = _quantize(x, scale, integers, quant_min, quant_max, axis, block_size)
    return empty_output(x).copy_(y)


def _check_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    grad_factor: float,
    axis: int | None,
    block_size: Sequence[int] | None,
) -> None:
    op = f"{_OP}_backward"
    _check(x, scale, zero_point, quant_min, quant_max, axis, block_size, op)
    if not isinstance(grad, Tensor) or grad.dtype != x.dtype:
        got = grad.dtype if isinstance(grad, Tensor) else type(grad).__name__
        raise TypeError(f"{op}: grad: expected x's dtype, {x.dtype}, got {got}")
    _checks.check_same_device(op, x, {"grad": grad})
    if grad.shape != x.shape or (x.numel() and not is_laid_out_as_output(grad, x)):
        raise ValueError(
            f"{op}: grad: expected a tensor laid out as the forward's output, "
            f"got shape {tuple(grad.shape)} with strides {grad.stride()}"
        )


def reference_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    grad_factor: float = 1.0,
    axis: int | None = None,
    block_size: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    options = axis, block_size
    _check_backward(grad, x, scale, zero_point, quant_min, quant_max, grad_factor, *options)
    if x.numel() == 0:
        return empty_output(x), torch.zeros_like(scale), torch.zeros_like(zero_point)
    _check_values(scale, zero_point, f"{_OP}_backward")
    view, within, shape = split(x, *options)
    g = split(grad, *options)[0]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    view, g = view.to(compute), g.to(compute)
    step = scale.reshape(shape)
    inverse = (1.0 / step).to(compute)
    zero = _rounded(zero_point, quant_min, quant_max).float().reshape(shape)
    low, high = (torch.tensor(end).float() - zero for end in (quant_min, quant_max))
    factor = float(torch.tensor(grad_factor, dtype=torch.float32))

    q = torch.round(view * inverse) + zero.to(compute)
    inside = (q >= quant_min) & (q <= quant_max)
    # a NaN is below
    clamped = torch.where(q > quant_min, q, float(quant_min)).clamp(max=float(quant_max))
    y = ((clamped.float() - zero) * step).to(compute)
    slope = torch.where(q > quant_max, high, low).to(compute)
    by_rounding = g * (y - view) * inverse
    of_scale = torch.where(inside, by_rounding, g * slope) * factor
    of_zero = torch.where(inside, 0.0, g * -1.0 * step.to(compute) * factor)

    def total(terms: Tensor, like: Tensor) -> Tensor:
        # an empty tuple would be all dimensions
        sums = terms.double().sum(within) if within else terms
        return sums.to(torch.float32).reshape(like.shape)

    grad_x = (g * inside).reshape(x.shape).to(x.dtype)
    return empty_output(x).copy_(grad_x), total(of_scale, scale), total(of_zero, zero_point)


def fake(x: Tensor, *args: Any) -> Tensor:
    return empty_output(x)


def fake_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_output(x), torch.empty_like(scale), torch.empty_like(zero_point)


_GRID = "Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max"
_GROUPS = "int? axis=None, int[]? block_size=None"
_op = define(f"_learnable_fake_quantize({_GRID}, {_GROUPS}) -> Tensor", _check, reference, fake)
_op_backward = define(
    f"_learnable_fake_quantize_backward(Tensor grad, {_GRID}, float grad_factor=1.0, {_GROUPS})"
    " -> (Tensor, Tensor, Tensor)",
    _check_backward,
    reference_backward,
    fake_backward,
)


class _Learnable(torch.autograd.Function):
    """Keeps x: its gradients are found again from it, in one pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        grad_factor: float,
        axis: int | None,
        block_size: Sequence[int] | None,
    ) -> Tensor:
        y = _op(x, scale, zero_point, quant_min, quant_max, axis, block_size)
        ctx.save_for_backward(x, scale, zero_point)
        ctx.strides = y.stride()
        ctx.options = quant_min, quant_max, grad_factor, axis, block_size
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = _op_backward(with_strides(grad, ctx.strides), *ctx.saved_tensors, *ctx.options)
        return *grads, None, None, None, None, None


def learnable_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    grad_factor: float = 1.0,
    block_size: Sequence[int] | None = None,
) -> Tensor:
    """Quantize to integers in [quant_min, quant_max] and back; learn the scale and zero point.

    The result is :func:`fake_quantize`'s with the zero point rounded, halves to even, to an
    integer of the grid. The gradient of ``x`` is that of the result where the value was inside the
    grid, else zero. With ``y = (q - z) * scale`` an element adds to the gradients of ``scale`` and
    ``zero_point``, times ``grad_factor``,

    - inside the grid ``grad * (y - x) / scale`` and 0,
    - outside ``grad * (quant_min - z)`` or ``grad * (quant_max - z)``, and ``-grad * scale``.

    The backward reads ``x`` again, which is kept, and sums in float64, in an order that depends on
    shape and strides alone: the same bytes on every device. What runs without the compiled library
    sums in torch's order: off by 2^-53 of the sum of magnitudes for each element at most, before
    the result is rounded to float32.

    Args:
        x: any shape; float32, float64, float16 or bfloat16.
        scale: float32, one element, ``(x.shape[axis],)`` with ``axis``, or the shape of x over
            ``block_size`` with that; positive and finite.
        zero_point: float32, as scale.
        quant_min, quant_max: the integer grid.
        axis: the channel axis, or None for one scale.
        grad_factor: what the gradients of scale and zero point are multiplied by; LSQ's is
            ``1 / sqrt(n * quant_max)`` for the n elements of a scale.
        block_size: sizes of a block, one for each dimension of ``x``, each a divisor of its size.

    Returns:
        A tensor of x's shape and dtype, with x's strides where x is dense, else contiguous.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came. The values of
            scale and zero_point are checked on the CPU (elsewhere that would be a device sync).
        RuntimeError: differentiated twice.

    Source: ``torch._fake_quantize_learnable_per_tensor_affine`` and ``..._per_channel_affine``,
    which take float32 alone and add in float32. Per tensor, torch's backward rounds the zero point
    by ``trunc(z + 0.5)``, for a negative one to another integer than its forward, and on the CPU it
    rounds ``x / scale + z`` where the forward rounds ``x / scale``, which differs at ties; here the
    backward takes the integers of the forward. +inf is above the grid, where torch has it below.
    LSQ: Esser et al., "Learned Step Size Quantization", ICLR 2020.
    """
    try:
        if needs_gradient(x) or (
            torch.is_grad_enabled() and (scale.requires_grad or zero_point.requires_grad)
        ):
            return _Learnable.apply(
                x, scale, zero_point, quant_min, quant_max, grad_factor, axis, block_size
            )
        return _op(x, scale, zero_point, quant_min, quant_max, axis, block_size)
    except (RuntimeError, OverflowError, AttributeError, TypeError):
        _check(x, scale, zero_point, quant_min, quant_max, axis, block_size)
        _check_values(scale, zero_point)
        raise


define_composite(
    f"{_OP}({_GRID}, int? axis=None, float grad_factor=1.0, int[]? block_size=None) -> Tensor",
    learnable_fake_quantize,
)

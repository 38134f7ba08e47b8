"""``learnable_fake_quantize``: fake-quantize whose scale and zero point get gradients too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_exporting

from .. import _checks
from ._autograd import differentiable_once, is_transformed, needs_gradient
from ._blocks import split
from ._elementwise import empty_output, is_laid_out_as_output, with_strides
from ._float32 import to_float32
from ._library import batch, define, define_composite
from ._transforms import lane_by_lane, over_batch, refuse_compiled
from .fake_quantize import _quantize, check_grid_params, check_values, is_off

_OP = "learnable_fake_quantize"
NORMALIZATIONS = ("none", "elements", "features")
NONE, ELEMENTS, FEATURES = range(3)
NORMALIZATION_CODES = {name: code for code, name in enumerate(NORMALIZATIONS)}


def _check(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    block_size: Sequence[int] | None,
    enabled: Tensor | None,
    least_scale: float,
    op: str = _OP,
) -> None:
    _checks.check_input(op, "x", x)
    _checks.check_state(op, "zero_point", zero_point, (torch.float32,))
    check_grid_params(op, x, scale, zero_point, quant_min, quant_max, axis, block_size)
    _checks.check_enabled(op, enabled)
    _checks.check_same_device(op, x, {"enabled": enabled})
    if least_scale != 0 and not 0 < to_float32(least_scale) < torch.inf:
        raise ValueError(
            f"{op}: least_scale: expected 0 or a positive finite float32, got {least_scale}"
        )


def _check_held(op: str, x: Tensor, held: Tensor | None) -> None:
    _checks.check_enabled(op, held, "held")
    _checks.check_same_device(op, x, {"held": held})


def _check_values(
    scale: Tensor,
    zero_point: Tensor,
    enabled: Tensor | None,
    least_scale: float,
    op: str = _OP,
) -> None:
    """As check_values; any may be learned where there is a least scale."""
    if least_scale > 0 or is_off(enabled):
        return
    check_values(op, scale, zero_point, 0, 0)
    if zero_point.device.type == "cpu" and bool(zero_point.isnan().any()):
        raise ValueError(f"{op}: zero_point: expected numbers, got {zero_point.tolist()}")


def _rounded(zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    rounded = zero_point.double().round().nan_to_num(quant_min, torch.inf, -torch.inf)
    return rounded.clamp(quant_min, quant_max).to(torch.int32)


def usable_scale(scale: Tensor, zero_point: Tensor, least_scale: float) -> Tensor:
    """The scale that a learned one stands for; NaN where it or its zero point is."""
    if least_scale == 0:
        return scale
    bounded = scale.clamp(to_float32(least_scale), torch.finfo(torch.float32).max)
    return torch.where(zero_point.isnan(), zero_point, bounded)


def _factor(
    x: Tensor,
    grad_factor: float,
    axis: int | None,
    block_size: Sequence[int] | None,
    groups: int,
    normalize: int,
) -> float:
    """What the gradients of scale and zero point are multiplied by."""
    if normalize == NONE:
        return to_float32(grad_factor)
    count = x.numel() // groups
    if normalize == FEATURES and x.dim() > 0:
        if block_size is not None:
            count //= block_size[0]
        elif axis is None or axis % x.dim() != 0:
            count //= x.shape[0]
    return to_float32(grad_factor / math.sqrt(count))


def reference(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    block_size: Sequence[int] | None = None,
    enabled: Tensor | None = None,
    least_scale: float = 0.0,
) -> Tensor:
    _check(x, scale, zero_point, quant_min, quant_max, axis, block_size, enabled, least_scale)
    if x.numel() == 0:
        return empty_output(x)
    _check_values(scale, zero_point, enabled, least_scale)
    integers = _rounded(zero_point, quant_min, quant_max)
    usable = usable_scale(scale, zero_point, least_scale)
    y, _ = _quantize(x, usable, integers, quant_min, quant_max, axis, block_size)
    if enabled is not None:
        y = torch.where(enabled.reshape(()) == 0, x, y.to(x.dtype))
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
    enabled: Tensor | None,
    held: Tensor | None,
    least_scale: float,
    normalize: int,
) -> None:
    op = f"{_OP}_backward"
    _check(x, scale, zero_point, quant_min, quant_max, axis, block_size, enabled, least_scale, op)
    _check_held(op, x, held)
    _checks.check_code(op, "normalize", normalize, NORMALIZATIONS)
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
    enabled: Tensor | None = None,
    held: Tensor | None = None,
    least_scale: float = 0.0,
    normalize: int = NONE,
) -> tuple[Tensor, Tensor, Tensor]:
    groups = axis, block_size
    options: Any = (*groups, enabled, held, least_scale, normalize)
    _check_backward(grad, x, scale, zero_point, quant_min, quant_max, grad_factor, *options)
    if x.numel() == 0:
        return empty_output(x), torch.zeros_like(scale), torch.zeros_like(zero_point)
    _check_values(scale, zero_point, enabled, least_scale, f"{_OP}_backward")
    factor = _factor(x, grad_factor, *groups, scale.numel(), normalize)
    scale = usable_scale(scale, zero_point, least_scale)
    view, within, shape = split(x, *groups)
    g = split(grad, *groups)[0]
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    view, g = view.to(compute), g.to(compute)
    step = scale.reshape(shape)
    inverse = (1.0 / step).to(compute)
    zero = _rounded(zero_point, quant_min, quant_max).float().reshape(shape)
    low, high = (torch.tensor(end).float() - zero for end in (quant_min, quant_max))

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
    sums = total(of_scale, scale), total(of_zero, zero_point)
    if enabled is not None:
        off = enabled.reshape(()) == 0
        grad_x = torch.where(off, grad, grad_x)
        sums = torch.where(off, 0.0, sums[0]), torch.where(off, 0.0, sums[1])
    if held is not None:
        kept = held.reshape(()) != 0
        sums = torch.where(kept, 0.0, sums[0]), torch.where(kept, 0.0, sums[1])
    return empty_output(x).copy_(grad_x), *sums


def fake(x: Tensor, *args: Any) -> Tensor:
    return empty_output(x)


def fake_backward(
    grad: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return empty_output(x), torch.empty_like(scale), torch.empty_like(zero_point)


_GRID = "Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max"
_GROUPS = "int? axis=None, SymInt[]? block_size=None, Tensor? enabled=None"
_op = define(
    f"_learnable_fake_quantize({_GRID}, {_GROUPS}, float least_scale=0.0) -> Tensor",
    _check,
    reference,
    fake,
)
_op_backward = define(
    f"_learnable_fake_quantize_backward(Tensor grad, {_GRID}, float grad_factor=1.0, {_GROUPS}, "
    "Tensor? held=None, float least_scale=0.0, int normalize=0) -> (Tensor, Tensor, Tensor)",
    _check_backward,
    reference_backward,
    fake_backward,
)
_lanes = partial(over_batch, lane_by_lane)
batch("_learnable_fake_quantize_backward", partial(_lanes, _op_backward))


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
        enabled: Tensor | None,
        held: Tensor | None,
        least_scale: float,
        normalize: int,
    ) -> Tensor:
        y = _op(x, scale, zero_point, quant_min, quant_max, axis, block_size, enabled, least_scale)
        if held is not None:
            if held.dtype != torch.uint8 or held.numel() != 1:  # the forward's kernel sees it not
                _check_held(_OP, x, held)
            # what writes the scale may do so again before the backward, and switches turn
            scale, zero_point, held = scale.clone(), zero_point.clone(), held.clone()
        if enabled is not None:
            enabled = enabled.clone()
        ctx.save_for_backward(x, scale, zero_point, enabled, held)
        ctx.function, ctx.strides = _OP, y.stride()
        ctx.grid = quant_min, quant_max, grad_factor, axis, block_size
        ctx.options = least_scale, normalize
        return y

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, enabled, held = saved
        grad = with_strides(grad, ctx.strides)
        grads = _op_backward(grad, x, scale, zero_point, *ctx.grid, enabled, held, *ctx.options)
        return *grads, *(None,) * 9


class _Transformed(_Learnable):
    """Where a transform of ``torch.func`` is active: a batch is a call for each lane."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        x, scale, zero_point, *grid, _, axis, block_size, enabled, _, least_scale, _ = args
        return _op(x, scale, zero_point, *grid, axis, block_size, enabled, least_scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, scale, zero_point, *grid, enabled, held, least_scale, normalize = inputs
        ctx.save_for_backward(x, scale, zero_point, enabled, held)
        ctx.function, ctx.strides = _OP, output.stride()
        ctx.grid, ctx.options = grid, (least_scale, normalize)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(
            f"{_OP}: expected no forward mode (torch.func.jvp, jacfwd, hessian), which it does not "
            "serve: use torch.func.vjp or jacrev"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        return _lanes(_Transformed.apply, info, in_dims, *args)


def _learnable_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    grad_factor: float = 1.0,
    block_size: Sequence[int] | None = None,
    enabled: Tensor | None = None,
    held: Tensor | None = None,
    least_scale: float = 0.0,
    normalize: int = NONE,
) -> Tensor:
    options = (
        quant_min, quant_max, grad_factor, axis, block_size, enabled, held, least_scale, normalize,
    )  # fmt: skip
    if is_transformed():
        refuse_compiled()
        return _Transformed.apply(x, scale, zero_point, *options)
    if needs_gradient(x, scale, zero_point):
        return _Learnable.apply(x, scale, zero_point, *options)
    return _op(x, scale, zero_point, quant_min, quant_max, axis, block_size, enabled, least_scale)


_composite = define_composite(
    f"{_OP}({_GRID}, int? axis=None, float grad_factor=1.0, SymInt[]? block_size=None, "
    "Tensor? enabled=None, Tensor? held=None, float least_scale=0.0, int normalize=0) -> Tensor",
    _learnable_fake_quantize,
)


def learnable_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    grad_factor: float = 1.0,
    block_size: Sequence[int] | None = None,
    enabled: Tensor | None = None,
    held: Tensor | None = None,
    least_scale: float = 0.0,
    normalize: str = "none",
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
            ``block_size`` with that; positive and finite, unless there is a ``least_scale``.
        zero_point: float32, as scale.
        quant_min, quant_max: the integer grid.
        axis: the channel axis, or None for one scale.
        grad_factor: what the gradients of scale and zero point are multiplied by.
        block_size: sizes of a block, one for each dimension of ``x``, each a divisor of its size.
        enabled: one element (uint8, int64 or bool) read where the data is; 0 copies x, and its
            gradient.
        held: the same; 1: the gradients of scale and zero point are 0. With it scale, zero point
            and the switches may be written between the forward and the backward.
        least_scale: a scale below it counts as this one, one above the greatest float32 as that,
            and gets the gradient of that; one that is NaN, or whose zero point is, makes NaN. 0:
            such values are errors.
        normalize: what ``grad_factor`` is divided by besides: ``"none"``; ``"elements"``: the
            square root of the number of elements of a scale; ``"features"``: of those of them in
            one sample, along the first dimension of ``x``. So LSQ's factor,
            ``1 / sqrt(n * quant_max)``, is a ``grad_factor`` of ``quant_max ** -0.5``.

    Returns:
        A tensor of x's shape and dtype, with x's strides where x is dense, else contiguous.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came. The values of
            scale and zero_point are checked on the CPU (elsewhere that would be a device sync).
        RuntimeError: the gradient was differentiated.
        NotImplementedError: in forward mode.

    Source: ``torch._fake_quantize_learnable_per_tensor_affine`` and ``..._per_channel_affine``,
    which take float32 alone and add in float32. Per tensor, torch's backward rounds the zero point
    by ``trunc(z + 0.5)``, for a negative one to another integer than its forward, and on the CPU it
    rounds ``x / scale + z`` where the forward rounds ``x / scale``, which differs at ties; here the
    backward takes the integers of the forward. +inf is above the grid, where torch has it below.
    LSQ: Esser et al., "Learned Step Size Quantization", ICLR 2020; with a learned zero point:
    Bhalgat et al., "LSQ+", CVPR Workshops 2020.
    """
    try:
        # one node of an exported graph, which still has its gradient
        call = _composite if is_exporting() else _learnable_fake_quantize
        return call(
            x, scale, zero_point, quant_min, quant_max, axis, grad_factor, block_size,
            enabled, held, least_scale, NORMALIZATION_CODES[normalize],
        )  # fmt: skip
    except (RuntimeError, OverflowError, AttributeError, TypeError, KeyError):
        grid = quant_min, quant_max, axis, block_size
        _check(x, scale, zero_point, *grid, enabled, least_scale)
        _check_held(_OP, x, held)
        _checks.code_of(_OP, "normalize", normalize, NORMALIZATIONS)
        _check_values(scale, zero_point, enabled, least_scale)
        raise

"""``fake_quantize``: round to the grid of a scale and zero point, straight-through backward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_exporting

from .. import _checks
from .._native import status
from ._autograd import is_transformed, needs_gradient, with_gradient
from ._blocks import split
from ._elementwise import (
    check_backward,
    empty_output,
    in_memory_order,
    is_dense,
    is_laid_out_as_output,
    mask_bytes,
    pack_mask,
    unpack_mask,
)
from ._library import define, define_composite
from ._transforms import Rule, over_batch


def check_grid_params(
    op: str,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    block_size: Sequence[int] | None,
) -> None:
    numel = 1 if axis is None and block_size is None else None
    _checks.check_state(op, "scale", scale, (torch.float32,), numel)
    _checks.check_state(
        op, "zero_point", zero_point, (torch.int32, torch.int64, torch.float32), numel
    )
    _checks.check_quant_range(op, quant_min, quant_max)
    states = {"scale": scale, "zero_point": zero_point}
    _checks.check_same_device(op, x, states)
    _checks.check_groups(op, states, x, axis, block_size)


def _check(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    enabled: Tensor | None,
    block_size: Sequence[int] | None,
) -> None:
    op = "fake_quantize"
    _checks.check_input(op, "x", x)
    check_grid_params(op, x, scale, zero_point, quant_min, quant_max, axis, block_size)
    _checks.check_enabled(op, enabled)
    _checks.check_same_device(op, x, {"enabled": enabled})


def _check_out(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    out: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    enabled: Tensor | None,
    block_size: Sequence[int] | None,
) -> None:
    _check(x, scale, zero_point, quant_min, quant_max, axis, enabled, block_size)
    op = "fake_quantize"
    if not isinstance(out, Tensor) or out.dtype != x.dtype:
        got = out.dtype if isinstance(out, Tensor) else type(out).__name__
        raise TypeError(f"{op}: out: expected x's dtype, {x.dtype}, got {got}")
    _checks.check_same_device(op, x, {"out": out})
    if out.shape != x.shape or not is_laid_out_as_output(out, x):
        raise ValueError(
            f"{op}: out: expected shape {tuple(x.shape)} "
            f"{f'with strides {x.stride()}' if is_dense(x) else 'and contiguous'}, "
            f"got {tuple(out.shape)} with strides {out.stride()}"
        )


def check_values(
    op: str, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, off: bool = False
) -> None:
    """What would cost a device sync, and is therefore looked at on the CPU alone."""
    if scale.device.type != "cpu" or off:
        return
    if not bool(((scale > 0) & (scale < torch.inf)).all()):
        raise ValueError(f"{op}: scale: expected positive finite values, got {scale.tolist()}")
    if not zero_point.is_floating_point() and not bool(
        ((zero_point >= quant_min) & (zero_point <= quant_max)).all()
    ):
        raise ValueError(
            f"{op}: zero_point: expected values in [quant_min, quant_max] = "
            f"[{quant_min}, {quant_max}], got {zero_point.tolist()}"
        )


def is_off(enabled: Tensor | None) -> bool:
    """Whether a switch on the CPU is off."""
    return enabled is not None and enabled.device.type == "cpu" and not bool(enabled)


def _quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    block_size: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """(dequantized values, whether each was inside the grid), shaped as x."""
    view, _, shape = split(x, axis, block_size)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale, zero = scale.reshape(shape), zero_point.reshape(shape).to(torch.float32)
    scaled = view.to(compute) * (1.0 / scale).to(compute)
    if zero_point.is_floating_point():
        q = torch.round(scaled + zero.to(compute))
    else:
        q = torch.round(scaled) + zero.to(compute)
    # torch rounds the product of a per-tensor scale to float32, that of a channel's scale not
    per_tensor = axis is None and block_size is None
    if not per_tensor:
        q, zero, scale = q.double(), zero_point.reshape(shape).double(), scale.double()
    inside = (q >= quant_min) & (q <= quant_max)
    # a NaN fails the first comparison and becomes quant_min
    q = torch.where(q > quant_min, q, float(quant_min))
    q = torch.where(q < quant_max, q, float(quant_max))
    if per_tensor:
        q = q.to(torch.float32)
    return ((q - zero) * scale).reshape(x.shape), inside.reshape(x.shape)


def _forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    enabled: Tensor | None,
    block_size: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    _check(x, scale, zero_point, quant_min, quant_max, axis, enabled, block_size)
    if x.numel() == 0:
        return empty_output(x), torch.empty_like(x, dtype=torch.bool)
    check_values("fake_quantize", scale, zero_point, quant_min, quant_max, is_off(enabled))
    y, inside = _quantize(x, scale, zero_point, quant_min, quant_max, axis, block_size)
    if enabled is not None:
        off = enabled.reshape(()) == 0
        y, inside = torch.where(off, x, y.to(x.dtype)), inside | off
    return empty_output(x).copy_(y), inside


def reference(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
    block_size: Sequence[int] | None = None,
) -> Tensor:
    return _forward(x, scale, zero_point, quant_min, quant_max, axis, enabled, block_size)[0]


def reference_out(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    out: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
    block_size: Sequence[int] | None = None,
) -> None:
    options = quant_min, quant_max, axis, enabled, block_size
    _check_out(x, scale, zero_point, out, *options)
    out.copy_(_forward(x, scale, zero_point, *options)[0])


def reference_mask(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
    block_size: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    y, inside = _forward(x, scale, zero_point, quant_min, quant_max, axis, enabled, block_size)
    return y, pack_mask(inside, y)


def _check_backward(grad: Tensor, mask: Tensor) -> None:
    check_backward("fake_quantize_backward", grad, mask)


def reference_backward(grad: Tensor, mask: Tensor) -> Tensor:
    _check_backward(grad, mask)
    result = empty_output(grad)
    # a product, as in torch: a clipped NaN or infinite gradient is NaN, a clipped -1 is -0
    kept = in_memory_order(grad) * unpack_mask(mask, grad.numel())
    in_memory_order(result).copy_(kept)
    return result


def reference_backward_(grad: Tensor, mask: Tensor) -> None:
    grad.copy_(reference_backward(grad, mask))


def fake(x: Tensor, *args: Any) -> Tensor:
    return empty_output(x)


def fake_mask(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return empty_output(x), x.new_empty(mask_bytes(x), dtype=torch.uint8)


def _fake_backward(grad: Tensor, mask: Tensor) -> Tensor:
    return empty_output(grad)


_OPTIONS = (
    "int quant_min, int quant_max, int? axis=None, Tensor? enabled=None, SymInt[]? block_size=None"
)
_ARGS = f"(Tensor x, Tensor scale, Tensor zero_point, {_OPTIONS})"
_op_out = define(
    f"_fake_quantize_out(Tensor x, Tensor scale, Tensor zero_point, Tensor(a!) out, {_OPTIONS})"
    " -> ()",
    _check_out,
    reference_out,
)
_op_mask = define(
    f"_fake_quantize_mask{_ARGS} -> (Tensor, Tensor)", _check, reference_mask, fake_mask
)
_op_backward = define(
    "_fake_quantize_backward(Tensor grad, Tensor mask) -> Tensor",
    _check_backward,
    reference_backward,
    _fake_backward,
)
_op_backward_ = define(  # where the gradient is nobody else's
    "_fake_quantize_backward_(Tensor(a!) grad, Tensor mask) -> ()",
    _check_backward,
    reference_backward_,
)
# the gradient passes where the value was inside the grid
STRAIGHT_THROUGH = "_fake_quantize_backward"
_op = define(
    f"_fake_quantize{_ARGS} -> Tensor", _check, reference, fake,
    masked=("_fake_quantize_mask", STRAIGHT_THROUGH),
)  # fmt: skip


def _with_batch(
    dims: int,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
    block_size: Sequence[int] | None = None,
) -> tuple[Any, ...] | None:
    """The arguments for a batch of lanes as one tensor; None for blocks, or a wrong axis."""
    if block_size is not None or (axis is not None and not -dims <= axis < dims):
        return None
    shifted = axis if axis is None or axis < 0 else axis + 1
    return scale, zero_point, quant_min, quant_max, shifted, enabled


_rule = Rule(torch.mul, partial(over_batch, _with_batch))
_call = with_gradient(_op, _op_mask, _op_backward, _rule)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
    block_size: Sequence[int] | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Quantize to integers in [quant_min, quant_max] and back, with a straight-through gradient.

    ``(clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale``, the
    division as a product with 1 / scale, halves rounded to even. The gradient of ``x`` is that of
    the result where the value was inside the grid, else zero; ``scale`` and ``zero_point`` get
    none. For the backward one bit an element is kept, or within ``torch.func`` a byte.

    ``torch.func``'s transforms and forward mode pass through, though not within ``torch.compile``;
    ``torch.vmap`` over ``x`` alone is one call, over a scale or blocks one for each lane.

    Args:
        x: any shape; float32, float64, float16 or bfloat16.
        scale: float32, one element, ``(x.shape[axis],)`` with ``axis``, or the shape of x over
            ``block_size`` with that; positive and finite.
        zero_point: int32 or int64 inside the grid, or float32 (added before rounding); as scale.
        quant_min, quant_max: the integer grid.
        axis: the channel axis, or None for one scale.
        enabled: one element (uint8, int64 or bool) read where the data is; 0 copies x.
        block_size: sizes of a block, one for each dimension of ``x``, each a divisor of its size:
            a scale for each block, as torchao's granularities have it.
        out: where the result goes, laid out as it would be; may be ``x`` itself. Without gradient.

    Returns:
        A tensor of x's shape and dtype, with x's strides where x is dense, else contiguous.
        +inf becomes the greatest value of the grid, -inf and NaN the least.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came. The values of
            scale and zero_point are checked on the CPU (elsewhere that would be a device sync).
        RuntimeError: the gradient was differentiated outside of ``torch.func``.

    Source: ``torch.fake_quantize_per_tensor_affine`` and ``..._per_channel_affine``, bit for bit,
    but for +inf, and values beyond 2^63 steps, per channel: torch gives the least value there.
    """
    try:
        if out is not None:
            return _fake_quantize_out(
                x, scale, zero_point, out, quant_min, quant_max, axis, enabled, block_size
            )
        call = _composite if is_exporting() and needs_gradient(x) else _call
        if block_size is None:
            return call(x, scale, zero_point, quant_min, quant_max, axis, enabled)
        return call(x, scale, zero_point, quant_min, quant_max, axis, enabled, block_size)
    except (RuntimeError, OverflowError, AttributeError, TypeError):
        _check(x, scale, zero_point, quant_min, quant_max, axis, enabled, block_size)
        check_values("fake_quantize", scale, zero_point, quant_min, quant_max, is_off(enabled))
        raise


def _fake_quantize_out(
    x: Tensor, scale: Tensor, zero_point: Tensor, out: Tensor, *options: Any
) -> Tensor:
    try:
        if is_transformed() or needs_gradient(x, out):
            raise ValueError("fake_quantize: out: expected None where a gradient is needed")
        _op_out(x, scale, zero_point, out, *options)
    except (RuntimeError, OverflowError, TypeError, AttributeError):
        _check_out(x, scale, zero_point, out, *options)
        raise
    # as torch's own updates in place do, without a gradient too
    if status.autograd is None and not is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


# an exported model keeps this one, and its gradient with it
_composite = define_composite(f"fake_quantize{_ARGS} -> Tensor", lambda *args: _call(*args))

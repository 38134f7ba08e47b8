"""``fake_quantize``: round to the grid of a scale and zero point, straight-through backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .. import _checks
from ._library import define, define_composite


def _check(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    enabled: Tensor | None,
) -> None:
    op = "fake_quantize"
    _checks.check_input(op, "x", x)
    numel = 1 if axis is None else None
    _checks.check_state(op, "scale", scale, (torch.float32,), numel)
    _checks.check_state(
        op, "zero_point", zero_point, (torch.int32, torch.int64, torch.float32), numel
    )
    _checks.check_quant_range(op, quant_min, quant_max)
    _checks.check_enabled(op, enabled)
    _checks.check_same_device(op, x, {"scale": scale, "zero_point": zero_point, "enabled": enabled})
    if axis is not None:
        axis = _checks.check_axis(op, x, axis)
        _checks.check_channels(op, "scale", scale, x, axis)
        _checks.check_channels(op, "zero_point", zero_point, x, axis)


def _check_values(
    scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, enabled: Tensor | None
) -> None:
    """What would cost a device sync, and is therefore looked at on the CPU alone."""
    if scale.device.type != "cpu" or (enabled is not None and not bool(enabled)):
        return
    if not bool(((scale > 0) & (scale < torch.inf)).all()):
        raise ValueError(
            f"fake_quantize: scale: expected positive finite values, got {scale.tolist()}"
        )
    if not zero_point.is_floating_point() and not bool(
        ((zero_point >= quant_min) & (zero_point <= quant_max)).all()
    ):
        raise ValueError(
            f"fake_quantize: zero_point: expected values in [quant_min, quant_max] = "
            f"[{quant_min}, {quant_max}], got {zero_point.tolist()}"
        )


def _is_dense(x: Tensor) -> bool:
    """Whether the elements fill their memory without gap or overlap, in any order of axes."""
    expected = 1
    for stride, size in sorted(
        (stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size != 1
    ):
        if stride != expected:
            return False
        expected *= size
    return x.numel() > 0


def _empty_output(x: Tensor) -> Tensor:
    """The output of an elementwise op: x's strides where x is dense, else contiguous."""
    if _is_dense(x):
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _mask_bytes(x: Tensor) -> int:
    return (x.numel() + 7) // 8


def _quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
) -> tuple[Tensor, Tensor]:
    """(dequantized values, whether each was inside the grid), shaped as x."""
    shape = [1] * x.dim()
    if axis is not None:
        shape[axis] = scale.numel()
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale, zero = scale.reshape(shape), zero_point.reshape(shape).to(torch.float32)
    scaled = x.to(compute) * (1.0 / scale).to(compute)
    if zero_point.is_floating_point():
        q = torch.round(scaled + zero.to(compute))
    else:
        q = torch.round(scaled) + zero.to(compute)
    # torch rounds the product of a per-tensor scale to float32, that of a channel's scale not
    if axis is not None:
        q, zero, scale = q.double(), zero_point.reshape(shape).double(), scale.double()
    inside = (q >= quant_min) & (q <= quant_max)
    # a NaN fails the first comparison and becomes quant_min
    q = torch.where(q > quant_min, q, float(quant_min))
    q = torch.where(q < quant_max, q, float(quant_max))
    if axis is None:
        q = q.to(torch.float32)
    return (q - zero) * scale, inside


def _forward(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
    enabled: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check(x, scale, zero_point, quant_min, quant_max, axis, enabled)
    _check_values(scale, zero_point, quant_min, quant_max, enabled)
    y, inside = _quantize(x, scale, zero_point, quant_min, quant_max, axis)
    if enabled is not None:
        off = enabled.reshape(()) == 0
        y, inside = torch.where(off, x, y.to(x.dtype)), inside | off
    return _empty_output(x).copy_(y), inside


def reference(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
) -> Tensor:
    return _forward(x, scale, zero_point, quant_min, quant_max, axis, enabled)[0]


def reference_mask(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    y, inside = _forward(x, scale, zero_point, quant_min, quant_max, axis, enabled)
    bits = torch.zeros(_mask_bytes(x) * 8, dtype=torch.uint8, device=x.device)
    in_memory = torch.empty_like(y, dtype=torch.bool).copy_(inside)
    bits[: x.numel()] = in_memory.as_strided((x.numel(),), (1,))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=x.device)
    return y, (bits.reshape(-1, 8) * weights).sum(1, dtype=torch.uint8)


def _check_backward(grad: Tensor, mask: Tensor) -> None:
    op = "fake_quantize_backward"
    _checks.check_input(op, "grad", grad)
    _checks.check_state(op, "mask", mask, (torch.uint8,), _mask_bytes(grad))
    _checks.check_same_device(op, grad, {"mask": mask})
    if grad.numel() and not _is_dense(grad):
        raise ValueError(
            f"{op}: grad: expected a dense tensor, laid out as the forward's output, "
            f"got shape {tuple(grad.shape)} with strides {grad.stride()}"
        )


def reference_backward(grad: Tensor, mask: Tensor) -> Tensor:
    _check_backward(grad, mask)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(1) >> shifts) & 1
    result = _empty_output(grad)
    flat = grad.as_strided((grad.numel(),), (1,), grad.storage_offset())
    # a product, as in torch: a clipped NaN or infinite gradient is NaN, a clipped -1 is -0
    result.as_strided((grad.numel(),), (1,)).copy_(flat * bits.reshape(-1)[: grad.numel()])
    return result


def _fake(x: Tensor, *args: Any) -> Tensor:
    return _empty_output(x)


def _fake_mask(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty_output(x), x.new_empty(_mask_bytes(x), dtype=torch.uint8)


def _fake_backward(grad: Tensor, mask: Tensor) -> Tensor:
    return _empty_output(grad)


_ARGS = (
    "(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, "
    "int? axis=None, Tensor? enabled=None)"
)
_op = define(f"_fake_quantize{_ARGS} -> Tensor", _check, reference, _fake)
_op_mask = define(
    f"_fake_quantize_mask{_ARGS} -> (Tensor, Tensor)", _check, reference_mask, _fake_mask
)
_op_backward = define(
    "_fake_quantize_backward(Tensor grad, Tensor mask) -> Tensor",
    _check_backward,
    reference_backward,
    _fake_backward,
)


class _FakeQuantize(torch.autograd.Function):
    """Straight-through: the gradient passes where the value was inside the grid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        y, mask = _op_mask(x, *args)
        ctx.save_for_backward(mask)
        ctx.strides = y.stride()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        if grad.stride() != ctx.strides:
            # the bits of the mask lie in the order of the output's memory
            grad = torch.empty_strided(
                grad.shape, ctx.strides, dtype=grad.dtype, device=grad.device
            ).copy_(grad)
        return _op_backward(grad, mask), None, None, None, None, None, None


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None = None,
    enabled: Tensor | None = None,
) -> Tensor:
    """Quantize to integers in [quant_min, quant_max] and back, with a straight-through gradient.

    ``(clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) * scale``, the
    division as a product with 1 / scale, halves rounded to even. The gradient of ``x`` is that of
    the result where the value was inside the grid, else zero; ``scale`` and ``zero_point`` get
    none. For the backward one bit an element is kept.

    Args:
        x: any shape; float32, float64, float16 or bfloat16.
        scale: float32, one element, or ``(x.shape[axis],)`` with ``axis``; positive and finite.
        zero_point: int32 or int64 inside the grid, or float32 (added before rounding); as scale.
        quant_min, quant_max: the integer grid.
        axis: the channel axis, or None for one scale.
        enabled: one element (uint8, int64 or bool) read where the data is; 0 copies x.

    Returns:
        A tensor of x's shape and dtype, with x's strides where x is dense, else contiguous.
        +inf becomes the greatest value of the grid, -inf and NaN the least.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came. The values of
            scale and zero_point are checked on the CPU (elsewhere that would be a device sync).

    Source: ``torch.fake_quantize_per_tensor_affine`` and ``..._per_channel_affine``, bit for bit,
    but for +inf, and values beyond 2^63 steps, per channel: torch gives the least value there.
    """
    args = (scale, zero_point, quant_min, quant_max, axis, enabled)
    try:
        # in forward mode the function refuses, where the op would give a derivative of zero
        if (torch.is_grad_enabled() and x.requires_grad) or forward_ad._current_level >= 0:
            return _FakeQuantize.apply(x, *args)
        return _op(x, *args)
    except (RuntimeError, OverflowError, AttributeError):
        _check(x, *args)
        _check_values(scale, zero_point, quant_min, quant_max, enabled)
        raise


define_composite(f"fake_quantize{_ARGS} -> Tensor", fake_quantize)

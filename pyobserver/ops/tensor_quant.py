"""``tensor_quant``, ``fake_tensor_quant``: to the integers of a symmetric grid, given by amax."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_exporting

from .. import _checks
from ._autograd import needs_gradient, with_gradient
from ._elementwise import (
    check_backward,
    empty_output,
    in_memory_order,
    mask_bytes,
    pack_mask,
    unpack_mask,
)
from ._library import define, define_composite
from ._transforms import Rule, lane_by_lane, over_batch

MOST_BITS = 32
_EPSILON = 2.0**-24  # the least float16: an amax up to it counts as 0
_HALF_MAX = torch.finfo(torch.float16).max
_OP, _FAKE = "tensor_quant", "fake_tensor_quant"


def check_grid(op: str, num_bits: int, unsigned: bool, narrow_range: bool) -> None:
    if isinstance(num_bits, bool) or not isinstance(num_bits, (int, torch.SymInt)):
        raise TypeError(f"{op}: num_bits: expected an integer, got {type(num_bits).__name__}")
    if not 0 <= num_bits <= MOST_BITS:
        raise ValueError(f"{op}: num_bits: expected an integer in [0, {MOST_BITS}], got {num_bits}")
    for name, flag in (("unsigned", unsigned), ("narrow_range", narrow_range)):
        if not isinstance(flag, bool):
            raise TypeError(f"{op}: {name}: expected a bool, got {type(flag).__name__}")


def _check(
    op: str, inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool
) -> None:
    _checks.check_input(op, "inputs", inputs)
    _checks.check_input(op, "amax", amax)
    _checks.check_same_device(op, inputs, {"amax": amax})
    check_grid(op, num_bits, unsigned, narrow_range)
    missing = inputs.dim() - amax.dim()
    if missing < 0 or any(
        size not in (1, whole)
        for size, whole in zip(amax.shape, inputs.shape[missing:], strict=True)
    ):
        raise ValueError(
            f"{op}: amax: expected a shape that broadcasts to that of inputs, "
            f"{tuple(inputs.shape)}, got {tuple(amax.shape)}"
        )


def _check_quant(*args: Any) -> None:
    _check(_OP, *args)


def _check_fake(*args: Any) -> None:
    _check(_FAKE, *args)


def max_bound(num_bits: int, unsigned: bool) -> float:
    """The greatest integer of the grid, as float32 has it."""
    positive_bits = num_bits - 1 + unsigned
    most = 2**positive_bits - 1 if positive_bits > 0 else 0
    return torch.tensor(most, dtype=torch.float32, device="cpu").item()


def _scale_of(amax: Tensor, num_bits: int, unsigned: bool) -> tuple[Tensor, Tensor]:
    """What the values are multiplied with, and the scale: in float32, or float64 of float64."""
    amax = amax.to(torch.promote_types(amax.dtype, torch.float32))
    most = max_bound(num_bits, unsigned)
    # a number over a tensor would be a product with the reciprocal
    scale = torch.full_like(amax, most) / amax
    zero = (amax <= _EPSILON) | (most == 0)
    scale = scale.masked_fill(amax < 0, torch.nan)
    zero &= amax >= 0
    return torch.where(zero, 0.0, scale), torch.where(zero, 1.0, scale)


def _check_values(
    op: str, inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool
) -> None:
    """What would cost a device sync, and is therefore looked at on the CPU alone."""
    if inputs.device.type != "cpu":
        return
    if unsigned and bool((inputs < 0).any()):
        raise TypeError(
            f"{op}: inputs: expected no negative value for an unsigned grid, "
            f"got {inputs[inputs < 0].min().item()}"
        )
    if bool((amax < 0).any()):
        raise ValueError(
            f"{op}: amax: expected no negative value, got {amax[amax < 0].min().item()}"
        )
    if op == _OP and inputs.dtype == torch.float16:
        scale = _scale_of(amax, num_bits, unsigned)[1]
        if bool((scale > _HALF_MAX).any()):
            raise ValueError(
                f"{op}: amax: expected one whose scale float16 holds (up to {_HALF_MAX}), "
                f"got {amax.tolist()}"
            )


def _quantize(
    op: str, inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(integers or values, scales, whether each magnitude was within amax)"""
    given = inputs, amax, num_bits, unsigned, narrow_range
    _check(op, *given)
    _check_values(op, *given)
    compute = torch.promote_types(inputs.dtype, torch.float32)
    multiplier, scale = _scale_of(amax, num_bits, unsigned)
    high = max_bound(num_bits, unsigned)
    low = 0.0 if unsigned else -high if narrow_range else -high - 1
    values = inputs.to(compute)
    q = torch.round(values * multiplier.to(compute)).clamp(low, high)
    if op == _FAKE:
        # shaped as q: a scale of one number would be taken by its reciprocal
        q = q / scale.to(compute).expand_as(q)
    inside = values.abs() <= amax.to(compute)
    scale = torch.empty(scale.shape, dtype=inputs.dtype, device=scale.device).copy_(scale)
    return empty_output(inputs).copy_(q), scale, inside


def reference(
    inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool
) -> tuple[Tensor, Tensor]:
    return _quantize(_OP, inputs, amax, num_bits, unsigned, narrow_range)[:2]


def reference_mask(
    inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool
) -> tuple[Tensor, Tensor, Tensor]:
    y, scale, inside = _quantize(_OP, inputs, amax, num_bits, unsigned, narrow_range)
    return y, scale, pack_mask(inside, y)


def reference_fake(
    inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool
) -> Tensor:
    return _quantize(_FAKE, inputs, amax, num_bits, unsigned, narrow_range)[0]


def reference_fake_mask(
    inputs: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool
) -> tuple[Tensor, Tensor]:
    y, _, inside = _quantize(_FAKE, inputs, amax, num_bits, unsigned, narrow_range)
    return y, pack_mask(inside, y)


def _check_backward(grad: Tensor, mask: Tensor) -> None:
    check_backward("tensor_quant_backward", grad, mask)


def reference_backward(grad: Tensor, mask: Tensor) -> Tensor:
    _check_backward(grad, mask)
    result = empty_output(grad)
    kept = unpack_mask(mask, grad.numel()).bool()
    in_memory_order(result).copy_(torch.where(kept, in_memory_order(grad), 0.0))
    return result


def reference_backward_(grad: Tensor, mask: Tensor) -> None:
    grad.copy_(reference_backward(grad, mask))


def _empty_scale(inputs: Tensor, amax: Tensor) -> Tensor:
    return amax.new_empty(amax.shape, dtype=inputs.dtype)


def _empty_mask(inputs: Tensor) -> Tensor:
    return inputs.new_empty(mask_bytes(inputs), dtype=torch.uint8)


def _fake_quant(inputs: Tensor, amax: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return empty_output(inputs), _empty_scale(inputs, amax)


def _fake_quant_mask(inputs: Tensor, amax: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_output(inputs), _empty_scale(inputs, amax), _empty_mask(inputs)


def _fake_fake(inputs: Tensor, *args: Any) -> Tensor:
    return empty_output(inputs)


def _fake_fake_mask(inputs: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return empty_output(inputs), _empty_mask(inputs)


def _fake_backward(grad: Tensor, mask: Tensor) -> Tensor:
    return empty_output(grad)


_ARGS = "(Tensor inputs, Tensor amax, int num_bits, bool unsigned, bool narrow_range)"
# the gradient of the first result passes where |inputs| <= amax, else it is 0
_op_backward = define(
    "_tensor_quant_backward(Tensor grad, Tensor mask) -> Tensor",
    _check_backward,
    reference_backward,
    _fake_backward,
)
_op_backward_ = define(  # where the gradient is nobody else's
    "_tensor_quant_backward_(Tensor(a!) grad, Tensor mask) -> ()",
    _check_backward,
    reference_backward_,
)
_op_mask = define(
    f"_tensor_quant_mask{_ARGS} -> (Tensor, Tensor, Tensor)",
    _check_quant,
    reference_mask,
    _fake_quant_mask,
)
_op_fake_mask = define(
    f"_fake_tensor_quant_mask{_ARGS} -> (Tensor, Tensor)",
    _check_fake,
    reference_fake_mask,
    _fake_fake_mask,
)
_op = define(
    f"_tensor_quant{_ARGS} -> (Tensor, Tensor)", _check_quant, reference, _fake_quant,
    masked=("_tensor_quant_mask", "_tensor_quant_backward"),
)  # fmt: skip
_op_fake = define(
    f"_fake_tensor_quant{_ARGS} -> Tensor", _check_fake, reference_fake, _fake_fake,
    masked=("_fake_tensor_quant_mask", "_tensor_quant_backward"),
)  # fmt: skip


def _masked(grad: Tensor, inside: Tensor) -> Tensor:
    return torch.where(inside, grad, 0.0)


def _with_batch(dims: int, *args: Any) -> tuple[Any, ...]:
    """The arguments themselves: amax broadcasts from the last axis on."""
    return args


# the scale of a batch would be one for all lanes
_rule = Rule(_masked, partial(over_batch, lane_by_lane))
_rule_fake = Rule(_masked, partial(over_batch, _with_batch))
_call = with_gradient(_op, _op_mask, _op_backward, _rule)
_call_fake = with_gradient(_op_fake, _op_fake_mask, _op_backward, _rule_fake)


def tensor_quant(
    inputs: Tensor,
    amax: Tensor,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> tuple[Tensor, Tensor]:
    """Quantize to the integers of a symmetric grid, with a straight-through gradient.

    ``scale = max_bound / amax`` with ``max_bound = 2**(num_bits - 1 + unsigned) - 1``, and
    ``clamp(round(inputs * scale), min_bound, max_bound)``, halves rounded to even. The gradient of
    ``inputs`` is that of the outputs where ``|inputs| <= amax``, else 0; ``amax`` gets none. For
    the backward one bit an element is kept, or within ``torch.func``, whose transforms pass
    through, a byte.

    Args:
        inputs: any shape; float32, float64, float16 or bfloat16. float16 and bfloat16 are computed
            in float32.
        amax: the greatest magnitude: of the same types, a shape that broadcasts to that of inputs:
            one value, or one an index of some axes. One of 2^-24 or less quantizes to 0 with the
            scale 1; so does a grid without another integer than 0 (``num_bits`` 0, or 1 if signed).
        num_bits: 0 to 32.
        unsigned: the integers from 0 on, instead of those of both signs.
        narrow_range: from ``-max_bound`` on, instead of ``-max_bound - 1``; of a signed grid.

    Returns:
        outputs: the integers, in inputs' dtype and shape, with inputs' strides where inputs is
            dense, else contiguous. NaN stays NaN.
        scale: inputs' dtype, amax's shape: ``outputs / scale`` are the values. No gradient.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came.
        RuntimeError: the gradient was differentiated outside of ``torch.func``.
        TypeError: a negative value among ``inputs`` where ``unsigned``.
        ValueError: a negative value in ``amax``; a scale above 65504 for float16 inputs.

        The last two look at values, which elsewhere than on the CPU would be a device sync. There
        a negative input becomes 0, a negative amax makes NaN of outputs and scale, and a scale
        that float16 cannot hold is infinite.

    Source: ``tensor_quant`` of NVIDIA's pytorch-quantization, bit for bit in float32 and float64;
    of an amax that is NaN it takes no others for 0.
    """
    args = inputs, amax, num_bits, unsigned, narrow_range
    try:
        call = _composite if is_exporting() and needs_gradient(inputs) else _call
        return call(*args)
    except (RuntimeError, OverflowError, AttributeError, TypeError):
        _check(_OP, *args)
        _check_values(_OP, *args)
        raise


def fake_tensor_quant(
    inputs: Tensor,
    amax: Tensor,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> Tensor:
    """:func:`tensor_quant` and back: ``outputs / scale``, in one pass.

    float16 and bfloat16 are rounded once, at the end: a scale too large for float16 does no harm.

    Args, Raises: as for :func:`tensor_quant`, but for the scale above 65504.

    Returns:
        A tensor of inputs' shape and dtype, with inputs' strides where inputs is dense, else
        contiguous.

    Source: ``fake_tensor_quant`` of NVIDIA's pytorch-quantization, bit for bit in float32 and
    float64.
    """
    args = inputs, amax, num_bits, unsigned, narrow_range
    try:
        call = _composite_fake if is_exporting() and needs_gradient(inputs) else _call_fake
        return call(*args)
    except (RuntimeError, OverflowError, AttributeError, TypeError):
        _check(_FAKE, *args)
        _check_values(_FAKE, *args)
        raise


_PUBLIC = (
    "(Tensor inputs, Tensor amax, int num_bits=8, bool unsigned=False, bool narrow_range=True)"
)


def _complete(
    inputs: Tensor,
    amax: Tensor,
    num_bits: int = 8,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> tuple[Any, ...]:
    """The arguments, of which a composite gets no defaults."""
    return inputs, amax, num_bits, unsigned, narrow_range


# an exported model keeps these, and their gradient with them
_composite = define_composite(
    f"tensor_quant{_PUBLIC} -> (Tensor, Tensor)", lambda *args: _call(*_complete(*args))
)
_composite_fake = define_composite(
    f"fake_tensor_quant{_PUBLIC} -> Tensor", lambda *args: _call_fake(*_complete(*args))
)

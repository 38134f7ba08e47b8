"""``learnable_clip``: clip to two bounds that get gradients, and quantize if that is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_exporting

from .. import _checks
from ._autograd import needs_gradient, with_gradient
from ._elementwise import (
    check_dense_gradient,
    empty_output,
    in_memory_order,
    mask_bytes,
    pack_mask,
    unpack_mask,
)
from ._library import define, define_composite
from .tensor_quant import check_grid, reference_fake

_OP = "learnable_clip"


def _check(
    x: Tensor, low: Tensor, high: Tensor, num_bits: int | None, unsigned: bool, narrow_range: bool
) -> None:
    _checks.check_input(_OP, "x", x)
    _checks.check_state(_OP, "low", low, (torch.float32,), 1)
    _checks.check_state(_OP, "high", high, (torch.float32,), 1)
    _checks.check_same_device(_OP, x, {"low": low, "high": high})
    check_grid(_OP, 0 if num_bits is None else num_bits, unsigned, narrow_range)


def _clip(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(clipped values, whether each met the lower bound, the upper one)"""
    low, high = (bound.reshape(()).to(x.dtype) for bound in (low, high))
    # a NaN passes both
    clipped = torch.where(x > high, high, x)
    return torch.where(clipped < low, low, clipped), x <= low, x >= high


def _amax(low: Tensor, high: Tensor) -> Tensor:
    return torch.maximum(-low, high).reshape(())


def _check_values(
    x: Tensor, low: Tensor, high: Tensor, num_bits: int | None, unsigned: bool, narrow_range: bool
) -> None:
    """What would cost a device sync, and is therefore looked at on the CPU alone."""
    if x.device.type != "cpu" or x.numel() == 0:
        return
    got = f"got {low.item()} and {high.item()}"
    if bool(low.isnan()) or bool(high.isnan()):
        raise ValueError(f"{_OP}: low, high: expected numbers, {got}")
    if num_bits is None:
        return
    if bool(_amax(low, high) < 0):
        raise ValueError(f"{_OP}: low, high: expected max(-low, high) of 0 or more, {got}")
    if unsigned and bool((_clip(x, low, high)[0] < 0).any()):
        raise TypeError(
            f"{_OP}: x: expected no negative value after clipping for an unsigned grid, got one"
        )


def _forward(
    x: Tensor, low: Tensor, high: Tensor, num_bits: int | None, unsigned: bool, narrow_range: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, whether each met the lower bound, the upper one)"""
    _check(x, low, high, num_bits, unsigned, narrow_range)
    _check_values(x, low, high, num_bits, unsigned, narrow_range)
    y, below, above = _clip(x, low, high)
    if num_bits is not None:
        y = reference_fake(y, _amax(low, high), num_bits, unsigned, narrow_range)
    return empty_output(x).copy_(y), below, above


def reference(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    num_bits: int | None = None,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> Tensor:
    return _forward(x, low, high, num_bits, unsigned, narrow_range)[0]


def reference_mask(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    num_bits: int | None = None,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> tuple[Tensor, Tensor]:
    y, *met = _forward(x, low, high, num_bits, unsigned, narrow_range)
    return y, torch.stack([pack_mask(flags, y) for flags in met])


def _check_backward(grad: Tensor, mask: Tensor) -> None:
    op = f"{_OP}_backward"
    check_dense_gradient(op, grad)
    _checks.check_state(op, "mask", mask, (torch.uint8,))
    _checks.check_same_device(op, grad, {"mask": mask})
    if mask.shape != (2, mask_bytes(grad)):
        raise ValueError(
            f"{op}: mask: expected shape (2, {mask_bytes(grad)}), got {tuple(mask.shape)}"
        )


def reference_backward(grad: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_backward(grad, mask)
    values = in_memory_order(grad)
    below, above = (unpack_mask(plane, grad.numel()).bool() for plane in mask)
    result = empty_output(grad)
    in_memory_order(result).copy_(torch.where(below | above, 0.0, values))
    to_low, to_high = (
        torch.where(met, values, 0.0).sum(dtype=torch.float64).float() for met in (below, above)
    )
    return result, to_low, to_high


def fake(x: Tensor, *args: Any) -> Tensor:
    return empty_output(x)


def fake_mask(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return empty_output(x), x.new_empty((2, mask_bytes(x)), dtype=torch.uint8)


def fake_backward(grad: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    to_low, to_high = (grad.new_empty((), dtype=torch.float32) for _ in range(2))
    return empty_output(grad), to_low, to_high


_ARGS = (
    "(Tensor x, Tensor low, Tensor high, "
    "int? num_bits=None, bool unsigned=False, bool narrow_range=True)"
)
_op_mask = define(
    f"_learnable_clip_mask{_ARGS} -> (Tensor, Tensor)", _check, reference_mask, fake_mask
)
_op_backward = define(
    "_learnable_clip_backward(Tensor grad, Tensor mask) -> (Tensor, Tensor, Tensor)",
    _check_backward,
    reference_backward,
    fake_backward,
)
# two bits an element are kept: which bounds have its gradient
_op = define(
    f"_learnable_clip{_ARGS} -> Tensor", _check, reference, fake,
    masked=("_learnable_clip_mask", "_learnable_clip_backward"),
)  # fmt: skip
_call = with_gradient(_op, _op_mask, _op_backward)


def learnable_clip(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    num_bits: int | None = None,
    unsigned: bool = False,
    narrow_range: bool = True,
) -> Tensor:
    """Clip to [low, high], and with ``num_bits`` quantize; learn the bounds.

    ``max(min(x, high), low)``, the bounds rounded to x's dtype. With ``num_bits`` the result of
    that is quantized in the same pass as by :func:`fake_tensor_quant` with the amax
    ``max(-low, high)``, straight through.

    The gradient of ``x`` is that of the result where ``low < x < high``, else 0. That of ``low`` is
    the sum over the elements with ``x <= low``, that of ``high`` over those with ``x >= high``; a
    value that meets both bounds counts for both. For the backward two bits an element are kept. The
    sums are in float64, in an order that depends on the number of elements alone: the same bytes on
    every device. What runs without the compiled library sums in torch's order: off by 2^-53 of the
    sum of magnitudes for each element at most, before the result is rounded to float32.

    Args:
        x: any shape; float32, float64, float16 or bfloat16.
        low, high: float32, one element.
        num_bits: 0 to 32, or None not to quantize.
        unsigned, narrow_range: as for :func:`fake_tensor_quant`.

    Returns:
        A tensor of x's shape and dtype, with x's strides where x is dense, else contiguous. NaN
        stays NaN, and keeps its gradient to itself. Where ``low > high`` everything is ``low``.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came.
        ValueError: a bound that is NaN; with ``num_bits`` a negative ``max(-low, high)``.
        TypeError: a negative value among the clipped ones where ``unsigned``.
        RuntimeError: the gradient was differentiated.
        NotImplementedError: a transform of ``torch.func`` or forward mode is active.

        The values are looked at on the CPU alone; elsewhere that would be a device sync. There a
        bound that is NaN does not clip, and on a grid it or a negative amax makes NaN of all.

    Source: ``ClipFunction`` of NVIDIA's pytorch-quantization, where a NaN's gradient goes to both
    bounds, and a clipped gradient that is NaN stays one. Choi et al., "PACT: Parameterized Clipping
    Activation for Quantized Neural Networks", 2018.
    """
    args = x, low, high, num_bits, unsigned, narrow_range
    try:
        call = _composite if is_exporting() and needs_gradient(x, low, high) else _call
        return call(*args)
    except (RuntimeError, OverflowError, AttributeError, TypeError):
        _check(*args)
        _check_values(*args)
        raise


# an exported model keeps this one, and its gradient with it
_composite = define_composite(f"{_OP}{_ARGS} -> Tensor", lambda *args: _call(*args))

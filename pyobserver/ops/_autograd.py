"""Gradients of the ops: in C++ where that is built for the torch at hand, else in Python."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .._native import status
from ._elementwise import with_strides
from ._library import eager_call
from ._transforms import Rule, transformed

_transforms_are_active = torch._C._are_functorch_transforms_active


def needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def is_transformed() -> bool:
    """Whether forward mode or a transform of ``torch.func`` is active.

    There the ops themselves would give a derivative of zero, and a tensor of ``torch.vmap`` does
    not say whether it needs a gradient.
    """
    return forward_ad._current_level >= 0 or _transforms_are_active()


class _Refused(torch.autograd.Function):
    """The first ``count`` tensors; whoever differentiates them is told why that cannot be.

    Unlike torch's ``DelayedError`` it stands in the graph, so that ``torch.autograd.grad`` meets
    it too, where that one lets it say that the tensor was not used.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(ctx.message)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a backward that has no derivative: to differentiate it raises ``ctx.function``.

    The backward takes what was saved before the gradients: who recomputes it allows one look.
    As torch's ``once_differentiable``, which names nothing, forgets that what was saved may need a
    gradient, and enters a ``no_grad`` of microseconds in a plain backward too.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Tensor) -> Any:
        saved = ctx.saved_tensors
        if is_compiling() or not torch.is_grad_enabled():
            return backward(ctx, saved, *grads)
        with torch.no_grad():
            found = backward(ctx, saved, *grads)
        tensors = [t for t in found if t is not None]
        message = (
            f"{ctx.function}: its gradient was differentiated, but has no derivative: take it "
            "without create_graph=True, or detach it"
        )
        refused = iter(_Refused.apply(message, len(tensors), *tensors, *grads, *saved))
        return tuple(None if t is None else next(refused) for t in found)

    return checked


class _Masked(torch.autograd.Function):
    """Keeps the last result of ``ops``' second, a mask; the third makes the gradients of that.

    The gradients are those of the first ``inputs`` arguments, from that of the first result.
    """

    @staticmethod
    def forward(ctx: Any, ops: tuple[Any, Any, Any], inputs: int, *args: Any) -> Any:
        op, op_mask, ctx.op_backward = ops
        y, *others, mask = op_mask(*args)
        ctx.save_for_backward(mask)
        ctx.function = public_name(op)
        ctx.strides = y.stride()
        ctx.shapes = [t.shape for t in args[1:inputs]]
        ctx.nones = (None,) * (len(args) - inputs)
        if not others:
            return y
        ctx.mark_non_differentiable(*others)
        return (y, *others)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, saved: Any, grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        found = ctx.op_backward(with_strides(grad, ctx.strides), *saved)
        first, *learned = (found,) if isinstance(found, Tensor) else found
        shaped = [t.reshape(shape) for t, shape in zip(learned, ctx.shapes, strict=True)]
        return None, None, first, *shaped, *ctx.nones


def public_name(op: Any) -> str:
    """Of the function that an op is behind."""
    return str(op._schema.name).partition("::")[2].removeprefix("_")


def with_gradient(
    op: Any, op_mask: Any, op_backward: Any, rule: Rule | None = None
) -> Callable[..., Any]:
    """The call of an op that is defined with ``masked=``, with its gradient.

    The gradients are those of as many first arguments as ``op_backward`` has results. ``rule``
    says what is done under the transforms of ``torch.func``; without it they are refused.
    """
    ops = op, op_mask, op_backward
    eager, inputs = eager_call(op), len(op_backward._schema.returns)

    def plain(*args: Any) -> Any:
        if is_transformed():
            if rule is not None:
                return transformed(op_mask, rule, *args)
            raise NotImplementedError(
                f"{public_name(op)}: expected no transform of torch.func and no forward mode, "
                "which it does not serve"
            )
        return op(*args) if is_compiling() else eager(*args)

    def in_python(*args: Any) -> Any:
        if needs_gradient(*args[:inputs]) and not is_transformed():
            return _Masked.apply(ops, inputs, *args)
        return plain(*args)

    call: Any = in_python if status.autograd is None else plain
    call.ops, call.rule = ops, rule
    return call

"""Gradients of the ops: in C++ where that is built for the torch at hand, else in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from .._native import status
from ._elementwise import with_strides
from ._library import eager_call


def needs_gradient(x: Tensor) -> bool:
    # in forward mode the function refuses, where the op would give a derivative of zero
    return (torch.is_grad_enabled() and x.requires_grad) or forward_ad._current_level >= 0


class _Masked(torch.autograd.Function):
    """Keeps the last result of ``op``, a mask, and gives it to ``backward`` with the gradient."""

    @staticmethod
    def forward(ctx: Any, op: Any, backward: Any, x: Tensor, *args: Any) -> Any:
        y, *others, mask = op(x, *args)
        ctx.save_for_backward(mask)
        ctx.op_backward, ctx.strides, ctx.nones = backward, y.stride(), (None,) * len(args)
        if not others:
            return y
        ctx.mark_non_differentiable(*others)
        return (y, *others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        return None, None, ctx.op_backward(with_strides(grad, ctx.strides), mask), *ctx.nones


def with_gradient(op: Any, op_mask: Any, op_backward: Any) -> Callable[..., Any]:
    """The call of an op that is defined with ``masked=``, with its gradient."""
    eager = eager_call(op)

    def in_cpp(*args: Any) -> Any:
        return op(*args) if is_compiling() else eager(*args)

    def in_python(x: Tensor, *args: Any) -> Any:
        if needs_gradient(x):
            return _Masked.apply(op_mask, op_backward, x, *args)
        return in_cpp(x, *args)

    call: Any = in_python if status.autograd is None else in_cpp
    call.ops = op, op_mask, op_backward
    return call

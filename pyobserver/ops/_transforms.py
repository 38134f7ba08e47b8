"""Derivatives other than a plain backward: under ``torch.func``, and in forward mode.

An ``autograd.Function`` that serves ``torch.func`` costs a call several times what one does that
does not. So the ops that serve it have one of their own for where a transform is active.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ._elementwise import in_memory_order, unpack_mask


def lane_by_lane(*args: Any) -> None:
    """The ``with_batch`` of a function that cannot take a batch as one tensor."""


def over_batch(
    with_batch: Callable[..., Sequence[Any] | None],
    function: Callable[..., Any],
    info: Any,
    in_dims: Any,
    *args: Any,
) -> tuple[Any, Any]:
    """The rule of a function for ``torch.vmap``: one call with the batch as the first axis of its
    first argument, or a call for each lane.

    ``with_batch`` takes the number of axes of a lane and the arguments after the first, and gives
    those of the one call, or None where that is not possible.
    """
    x, *rest = args
    # of the sizes of a block there is a tuple
    dims = [dim if isinstance(dim, int) else None for dim in in_dims]
    if dims[0] is not None and all(dim is None for dim in dims[1:]):
        joined = with_batch(x.dim() - 1, *rest)
        if joined is not None:
            found = function(x.movedim(dims[0], 0), *joined)
            return found, 0 if isinstance(found, Tensor) else (0,) * len(found)
    if info.batch_size == 0:
        raise ValueError("pyobserver: expected a batch of one lane at least in torch.vmap, got 0")
    # contiguous, as an op wants its scales
    batches = [
        arg if dim is None else arg.movedim(dim, 0).contiguous()
        for arg, dim in zip(args, dims, strict=True)
    ]
    lanes = [
        function(
            *(batch if dim is None else batch[i] for batch, dim in zip(batches, dims, strict=True))
        )
        for i in range(info.batch_size)
    ]
    if isinstance(lanes[0], Tensor):
        return torch.stack(lanes), 0
    return tuple(map(torch.stack, zip(*lanes, strict=True))), (0,) * len(lanes[0])


@dataclass(frozen=True)
class Rule:
    """Of an op that keeps a mask, the gradient of its first argument.

    Attributes:
        masked: that gradient, from the one of the result and a bool for each of its elements.
        batched: the rule for ``torch.vmap``: :func:`over_batch` without its last arguments.
    """

    masked: Callable[[Tensor, Tensor], Tensor]
    batched: Callable[..., tuple[Any, Any]]


class _Transformed(torch.autograd.Function):
    """The gradient where a transform is active: of torch's own operations.

    So it has derivatives of every order. A byte an element is kept: the bits of a mask belong to
    no lane of a batch.
    """

    @staticmethod
    def forward(op_mask: Any, rule: Rule, *args: Any) -> tuple[Tensor, ...]:
        y, *others, mask = op_mask(*args)
        inside = torch.empty_like(y, dtype=torch.bool)
        in_memory_order(inside).copy_(unpack_mask(mask, y.numel()))
        return y, *others, inside

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, rule, _, *args = inputs
        _, *others = output
        ctx.mark_non_differentiable(*others)
        ctx.save_for_backward(others[-1])
        ctx.save_for_forward(others[-1])
        ctx.masked = rule.masked
        ctx.nones = (None,) * len(args)
        ctx.others = (None,) * len(others)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return None, None, ctx.masked(grad, inside), *ctx.nones

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, tangent: Tensor, *___: Any) -> tuple[Tensor | None, ...]:
        (inside,) = ctx.saved_tensors
        return ctx.masked(tangent, inside), *ctx.others

    @staticmethod
    def vmap(info: Any, in_dims: Any, op_mask: Any, rule: Rule, *args: Any) -> tuple[Any, Any]:
        function = functools.partial(_Transformed.apply, op_mask, rule)
        return rule.batched(function, info, in_dims[2:], *args)


def refuse_compiled() -> None:
    """Where a transform is active: torch.compile would give a gradient of zero there."""
    if is_compiling():
        raise ValueError(
            "pyobserver: expected no transform of torch.func and no forward mode within "
            "torch.compile, which cannot trace a gradient there: put it outside, or under "
            "torch.compiler.disable"
        )


def transformed(op_mask: Any, rule: Rule, *args: Any) -> Any:
    """The results of an op with their gradient, where a transform is active."""
    refuse_compiled()
    *found, _ = _Transformed.apply(op_mask, rule, *args)
    return found[0] if len(found) == 1 else tuple(found)

"""Definition of the ops of the ``pyobserver`` namespace.

Each op is defined here in Python, with a reference kernel that serves every device and a fake
kernel for tracing; the compiled libraries only override the reference where they are loaded. So
every op exists, and every class works, without a binary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._native import status

_LIBRARY = torch.library.Library("pyobserver", "DEF")
# the first is what the second calls, in two thirds of its time
_increment_version = getattr(torch._C, "_increment_version", torch.autograd.graph.increment_version)


def define(
    schema: str,
    check: Callable[..., None],
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    masked: tuple[str, str] | None = None,
) -> Any:
    """Define a kernel op and return its default overload.

    ``check`` looks at the arguments, without reading a tensor's values; the fake kernel begins
    with it, so that a wrong call fails when it is traced. ``fake`` makes the results; None for an
    op that only updates its arguments.

    ``masked`` names, of an op with a gradient of its first argument, the op that is run instead
    where the gradient is needed, whose last result is kept, and the one that makes the gradient of
    that of the first result and what was kept. Both are defined before; see :mod:`._autograd`.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, torch.no_grad()(reference), "CompositeExplicitAutograd")
    op = getattr(torch.ops.pyobserver, name).default
    implement_autograd(_LIBRARY, op, masked)
    signature = inspect.signature(reference)

    def fake_kernel(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        check(*bound.args)
        return None if fake is None else fake(*bound.args)

    torch.library.register_fake(f"pyobserver::{name}", fake_kernel, lib=_LIBRARY)
    if op._schema.is_mutable:
        public = name.lstrip("_").removesuffix("_mask").removesuffix("_out")
        batch(name, refused_batch(public))
    return op


def implement_autograd(
    library: torch.library.Library, op: Any, masked: tuple[str, str] | None
) -> None:
    """What autograd does around an op of the library, for the ``masked`` of :func:`define`."""
    name = op._schema.name.partition("::")[2]
    if status.autograd is None or not (masked or op._schema.is_mutable):
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    elif masked is None:
        status.autograd.implement(library.ns, name)
    else:
        status.autograd.implement_masked(library.ns, name, *masked)


def batch(name: str, rule: Callable[..., tuple[Any, Any]]) -> None:
    """Define what an op does under ``torch.vmap``, see ``torch.library.register_vmap``."""
    torch.library.register_vmap(f"pyobserver::{name}", rule, lib=_LIBRARY)


def refused_batch(public: str) -> Callable[..., Any]:
    """The rule of what updates its arguments."""

    def rule(*args: Any) -> Any:
        raise ValueError(
            f"{public}: expected a call outside of torch.vmap, for it updates tensors that are "
            "one for all lanes: observe the whole batch outside, and inside use "
            "pyobserver.ops.fake_quantize"
        )

    return rule


def eager_call(op: Any) -> Any:
    """What calling ``op`` comes down to, without the microsecond's third that its class adds.

    Not for what may be traced: Dynamo knows the op, not this.
    """
    return op._op


def without_defaults(given: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    """The positional arguments up to the last that is not its default: each costs its call."""
    kept = len(given)
    while kept and given[kept - 1] == defaults[kept - 1]:
        kept -= 1
    return given[:kept]


def note_update(*updated: Tensor) -> None:
    """Tell autograd that tensors were updated in place, which a kernel of another library cannot.

    So a graph that saved one of them fails in its backward, instead of using the new values.
    Not to be called while tracing: functionalization sees to it there. The autograd in C++ does it
    by itself.
    """
    if status.autograd is None and torch.is_grad_enabled():
        _increment_version(updated)


def define_composite(schema: str, function: Callable[..., Any]) -> Any:
    """Define an op that is a Python composition of other ops, and differentiable through them."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    # before a transform of torch.func has begun its work: the function sees to it
    _LIBRARY.impl(name, function, "FuncTorchDynamicLayerFrontMode")
    return getattr(torch.ops.pyobserver, name).default

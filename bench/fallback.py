"""Runs pyobserver on other kernels than the dispatcher's, while those are loaded."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any

import torch

import pyobserver
from pyobserver.ops._autograd import with_gradient
from pyobserver.ops._library import eager_call, implement_autograd

_LIBRARIES: list[torch.library.Library] = []  # an op lasts as long as its library


def _modules() -> Iterator[ModuleType]:
    for info in pkgutil.iter_modules(pyobserver.ops.__path__):
        yield importlib.import_module(f"{pyobserver.ops.__name__}.{info.name}")


def _ops() -> Iterator[tuple[ModuleType, str, Any]]:
    """(module, attribute, the op bound there)"""
    for module in _modules():
        for attribute in [name for name in vars(module) if name.startswith("_op")]:
            yield module, attribute, getattr(module, attribute)


def _calls() -> Iterator[tuple[ModuleType, str, Any]]:
    """(module, attribute, the differentiable call bound there)"""
    for module in _modules():
        for attribute in [name for name in vars(module) if name.startswith("_call")]:
            yield module, attribute, getattr(module, attribute)


def _name(op: Any) -> str:
    return str(op._schema.name).partition("::")[2]


def registered(
    namespace: str, kernel: Callable[[ModuleType, str], Any] | None = None
) -> dict[str, Any]:
    """All ops once more, in a namespace of their own, by their names.

    ``kernel`` gives what serves the op of a module and attribute; without it the namespace's
    kernels are registered elsewhere. They are registered as ours are, so that the dispatcher's
    share is in their time.
    """
    library = torch.library.Library(namespace, "DEF")
    _LIBRARIES.append(library)
    for module, attribute, op in _ops():
        library.define(str(op._schema).partition("::")[2])
        if kernel is not None:
            library.impl(_name(op), kernel(module, attribute), "CompositeExplicitAutograd")
    called = [[_name(op) for op in call.ops] for _, _, call in _calls()]
    masked = {name: (mask, backward) for name, mask, backward in called}
    space = getattr(torch.ops, namespace)
    found = {name: getattr(space, name).default for name in (_name(op) for _, _, op in _ops())}
    for name, op in found.items():
        implement_autograd(library, op, masked.get(name))
    return found


@contextmanager
def rebound(ops: Mapping[str, Any]) -> Iterator[None]:
    """Within it the package's functions and classes call these ops, given by their names."""
    bindings = [(module, attribute, ops[_name(op)]) for module, attribute, op in _ops()]
    bindings += [
        (module, "_eager", eager_call(ours))
        for module, attribute, ours in bindings
        if attribute == "_op" and hasattr(module, "_eager")
    ]
    bindings += [
        (module, attribute, with_gradient(*(ops[_name(op)] for op in call.ops), call.rule))
        for module, attribute, call in _calls()
    ]
    before = [(module, attribute, getattr(module, attribute)) for module, attribute, _ in bindings]
    try:
        for module, attribute, value in bindings:
            setattr(module, attribute, value)
        yield
    finally:
        for module, attribute, value in before:
            setattr(module, attribute, value)


@cache
def _references() -> dict[str, Any]:
    def reference(module: ModuleType, attribute: str) -> Any:
        return getattr(module, attribute.replace("_op", "reference", 1))

    return registered("pyobserver_fallback", reference)


def kernels_of(contender: str) -> Any:
    """For the contender ``fallback``, bind the reference kernels in place of the dispatched ops."""
    return rebound(_references()) if contender == "fallback" else nullcontext()

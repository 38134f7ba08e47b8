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
from pyobserver.ops._library import eager_call

_LIBRARIES: list[torch.library.Library] = []  # an op lasts as long as its library


def _ops() -> Iterator[tuple[ModuleType, str, Any]]:
    """(module, attribute, the op bound there)"""
    for info in pkgutil.iter_modules(pyobserver.ops.__path__):
        module = importlib.import_module(f"{pyobserver.ops.__name__}.{info.name}")
        for attribute in [name for name in vars(module) if name.startswith("_op")]:
            yield module, attribute, getattr(module, attribute)


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
    found = {}
    for module, attribute, op in _ops():
        schema = str(op._schema).partition("::")[2]
        name = schema.partition("(")[0]
        library.define(schema)
        if kernel is not None:
            library.impl(name, kernel(module, attribute), "CompositeExplicitAutograd")
        library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        found[name] = getattr(getattr(torch.ops, namespace), name).default
    return found


@contextmanager
def rebound(ops: Mapping[str, Any]) -> Iterator[None]:
    """Within it the package's functions and classes call these ops, given by their names."""
    before = []
    for module, attribute, op in list(_ops()):
        ours = ops[op._schema.name.partition("::")[2]]
        bindings = {attribute: ours}
        if attribute == "_op" and hasattr(module, "_eager"):
            bindings["_eager"] = eager_call(ours)
        for name, value in bindings.items():
            before.append((module, name, getattr(module, name)))
            setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@cache
def _references() -> dict[str, Any]:
    def reference(module: ModuleType, attribute: str) -> Any:
        return getattr(module, attribute.replace("_op", "reference", 1))

    return registered("pyobserver_fallback", reference)


def kernels_of(contender: str) -> Any:
    """For the contender ``fallback``, bind the reference kernels in place of the dispatched ops."""
    return rebound(_references()) if contender == "fallback" else nullcontext()

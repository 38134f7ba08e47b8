"""Runs pyobserver on its pure-PyTorch kernels while the native ones are loaded."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch

import pyobserver
from pyobserver.ops._library import eager_call

_LIBRARY = torch.library.Library("pyobserver_fallback", "DEF")


@cache
def _bindings() -> list[tuple[ModuleType, str, Any, Any]]:
    """(module, attribute, the op bound there, the same op of reference kernels alone).

    The second op is registered as the first is, so that the dispatcher's share is in its time.
    """
    found = []
    for info in pkgutil.iter_modules(pyobserver.ops.__path__):
        module = importlib.import_module(f"{pyobserver.ops.__name__}.{info.name}")
        for attribute in [name for name in vars(module) if name.startswith("_op")]:
            op = getattr(module, attribute)
            schema = str(op._schema).partition("::")[2]
            name = schema.partition("(")[0]
            reference = getattr(module, attribute.replace("_op", "reference", 1))
            _LIBRARY.define(schema)
            _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
            _LIBRARY.impl(name, torch.library.fallthrough_kernel, "Autograd")
            ours = getattr(torch.ops.pyobserver_fallback, name).default
            found.append((module, attribute, op, ours))
            if attribute == "_op" and hasattr(module, "_eager"):
                found.append((module, "_eager", eager_call(op), eager_call(ours)))
    return found


@contextmanager
def kernels_of(contender: str) -> Iterator[None]:
    """For the contender ``fallback``, bind the reference kernels in place of the dispatched ops."""
    bindings = _bindings() if contender == "fallback" else []
    for module, attribute, _, reference in bindings:
        setattr(module, attribute, reference)
    try:
        yield
    finally:
        for module, attribute, op, _ in bindings:
            setattr(module, attribute, op)

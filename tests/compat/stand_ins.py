"""Adapters imported with a host that is installed, or with stand-ins of the interface they need."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest


@contextmanager
def adapter(
    kind: str, name: str, host: str, stand_ins: Mapping[str, Mapping[str, Any]]
) -> Iterator[Any]:
    """An adapter, over its host where ``kind`` is ``"installed"``, else over stand-ins.

    Args:
        name: the adapter's module.
        host: what is imported to know whether the host is installed.
        stand_ins: modules by their names, each by what it holds.
    """
    if kind == "installed":
        pytest.importorskip(host, reason=f"{host} is not installed", exc_type=ImportError)
        yield importlib.import_module(name)
        return
    taken = {path: sys.modules.pop(path, None) for path in (*stand_ins, name)}
    for path, contents in stand_ins.items():
        sys.modules[path] = ModuleType(path)
        vars(sys.modules[path]).update(contents)
    try:
        yield importlib.import_module(name)
    finally:
        for path, module in taken.items():
            del sys.modules[path]
            if module is not None:
                sys.modules[path] = module

"""Our counterparts of a framework's classes, and comparisons of models made with either."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import pyobserver

OURS = pyobserver
PUBLIC_CLASSES: dict[str, type] = {
    name: value
    for name, value in vars(pyobserver).items()
    if isinstance(value, type) and value.__module__.partition(".")[0] == "pyobserver"
}


def our_class(theirs: type) -> type:
    return getattr(pyobserver, theirs.__name__)


def counterpart(constructor: Any, find: Callable[[type], type] = our_class) -> Any:
    """The constructor with the same arguments of the class that stands in for a framework's."""
    if isinstance(constructor, type):
        return find(constructor)
    bound = dict(constructor.p.keywords)
    if "observer" in bound:
        bound["observer"] = counterpart(bound["observer"], find)
    made = counterpart(constructor.p.func, find).with_args(**bound)
    if constructor.callable_args:
        return made.with_callable_args(**constructor.callable_args)
    return made


def same_named(*hosts: ModuleType) -> dict[str, tuple[type, type]]:
    """(ours, theirs) for each public class of ours that a framework has by the same name."""
    return {
        name: (ours, getattr(host, name))
        for host in hosts
        for name, ours in PUBLIC_CLASSES.items()
        if hasattr(host, name)
    }


def watchers(model: nn.Module) -> dict[str, nn.Module]:
    """The observers and fake-quantizers of ours in a model."""
    kinds = (pyobserver.ObserverBase, pyobserver.FakeQuantizeBase)
    return {name: m for name, m in model.named_modules() if isinstance(m, kinds)}


def assert_same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same keys, and the same values bit for bit; counts may be kept in another dtype."""
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        if not isinstance(tensor, Tensor):
            continue
        if not name.endswith("histogram"):
            assert ours[name].dtype == tensor.dtype, name
        assert ours[name].shape == tensor.shape, name
        assert torch.equal(ours[name].to(tensor.dtype), tensor), name

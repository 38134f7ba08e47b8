"""The statistics of a prepared model, apart from its weights."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import nn

from .compat.hosts import host_classes
from .fake_quantize import FakeQuantizeBase
from .observers import ObserverBase


def get_observer_state_dict(mod: nn.Module) -> OrderedDict[str, Any]:
    """The entries of a prepared model's ``state_dict`` that belong to its observers.

    Those are the ones whose name holds ``activation_post_process``, as the frameworks name them.

    Source: ``torch.ao.quantization.get_observer_state_dict``, without its TorchScript branch.
    """
    full = mod.state_dict()
    kept = OrderedDict((k, v) for k, v in full.items() if "activation_post_process" in k)
    kept._metadata = full._metadata  # type: ignore[attr-defined]
    return kept


def load_observer_state_dict(mod: nn.Module, obs_dict: OrderedDict[str, Any]) -> None:
    """Load what :func:`get_observer_state_dict` returned into a model prepared the same way.

    Raises:
        KeyError: entries are missing, or belong to no observer of the model.
        ValueError: an entry has another shape. Either way the model is as it was.

    Source: ``torch.ao.quantization.load_observer_state_dict``.
    """
    expected = get_observer_state_dict(mod)
    # one version of a name, so that dicts from before version 3 fit
    missing = {_current(k) for k in expected} - {_current(k) for k in obs_dict}
    missing = {k for k in missing if not k.endswith(".eps")}
    unexpected = {_current(k) for k in obs_dict} - {_current(k) for k in expected}
    for problem, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            raise KeyError(f"obs_dict: {problem} entries for the observers: {sorted(keys)}")
    before = copy.deepcopy(expected)
    errors = _load(mod, obs_dict)
    if errors:
        _load(mod, before)
        raise ValueError(f"obs_dict: {'; '.join(errors)}")


def _load(mod: nn.Module, obs_dict: OrderedDict[str, Any]) -> list[str]:
    """Load into every observer and fake-quantize, ours or a host's; returns what did not fit."""
    metadata = getattr(obs_dict, "_metadata", {})
    watchers: tuple[type[Any], ...] = (ObserverBase, FakeQuantizeBase)
    watchers += host_classes("ObserverBase", "FakeQuantizeBase")
    errors: list[str] = []
    for name, module in mod.named_modules():
        if isinstance(module, watchers):
            version = metadata.get(name, {})
            module._load_from_state_dict(obs_dict, name + ".", version, False, [], [], errors)
    return errors


def _current(key: str) -> str:
    for old in ("min_vals", "max_vals"):
        if key.endswith("." + old):
            return key[:-1]
    return key

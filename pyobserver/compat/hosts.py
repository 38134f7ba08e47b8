"""Recognition by torch.ao and torchao, without importing either.

Both ask ``isinstance`` of base classes of their own. Every public class of ours is registered as
a virtual subclass of the host's class of the same name, once that host is loaded: at the import
of pyobserver, and again whenever an observer or fake-quantizer is made.
"""

from __future__ import annotations

import sys
from abc import ABCMeta
from typing import Any

_HOST_MODULES = (
    "torch.ao.quantization.observer",
    "torch.ao.quantization.fake_quantize",
    "torchao.quantization.pt2e.observer",
    "torchao.quantization.pt2e.fake_quantize",
)
_registered: dict[str, type] = {}
_joined: set[str] = set()


def host_classes(*names: str) -> tuple[type[Any], ...]:
    """The classes of these names in the hosts that are loaded now."""
    found = []
    for host in _HOST_MODULES:
        module = sys.modules.get(host)
        for name in names:
            known = vars(module).get(name) if module is not None else None
            if known is not None and known.__module__ == host:
                found.append(known)
    return tuple(found)


def offer_to_hosts(cls: type) -> type:
    """Class decorator: the class stands in for the hosts' class of the same name."""
    _registered[cls.__name__] = cls
    return cls


def register_with_hosts() -> None:
    """Register our classes with each host that is loaded and was not at the last call.

    Called by the constructors. Only an object that is unpickled, or made before its host was
    imported and then passed to that host, needs a call by hand.
    """
    for host in _HOST_MODULES:
        if host in _joined or host not in sys.modules:
            continue
        module = sys.modules[host]
        known = {name: vars(module).get(name) for name in _registered}
        if any(
            cls is None and name in getattr(module, "__all__", ()) for name, cls in known.items()
        ):
            continue  # still being imported
        _joined.add(host)
        for name, host_class in known.items():
            if isinstance(host_class, ABCMeta) and host_class.__module__ == host:
                host_class.register(_registered[name])

"""Finds what would make a host wait for its device, on tensors of the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITS = {
    "_local_scalar_dense",  # item(), bool(), int(), float()
    "equal",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
}


def _has_mask(args: Sequence[Any]) -> bool:
    indices = args[1] if len(args) > 1 else ()
    return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices)


class NoReadback(TorchDispatchMode):
    """Within it, an op of torch whose result's shape or value the host needs is an error."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        waits = name in _WAITS or (name in ("index", "index_put", "index_put_") and _has_mask(args))
        assert not waits, f"{name} waits for the device"
        call: Callable[..., Any] = func
        return call(*args, **(kwargs or {}))


class OnDevice(TorchDispatchMode):
    """Within it, an op of torch that takes or makes a tensor of another device is an error."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        for t in tree_leaves((args, kwargs, found)):
            if isinstance(t, Tensor):
                device = t.device.type
                assert device == self.device, f"{func._schema.name}: a tensor of {device}"
        return found

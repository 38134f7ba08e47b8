"""What a timed case is, and the parts that the bench modules build theirs from."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

import pyobserver

Call = Callable[[], object]

SIZES = (256, 100_000, 10_000_000)
SMOKE_SIZES = (256,)
OURS = ("fallback", "native")
LIMIT_BYTES = {"sum": 4, "copy_": 8}  # that the limits move for each float32


@dataclass(frozen=True)
class Case:
    """One piece of work, done by several contenders.

    Attributes:
        name: the work.
        make: (size, device) -> zero-argument calls by contender: ``reference`` (torch),
            ``fallback`` and ``native`` (ours), and the limit's.
        bytes_moved: of each element, at least: a pass that needs the result of another pass reads
            the tensor again, so a fake-quantize that observes first moves 12.
        limit: ``sum`` or ``copy_`` of the same tensor, the memory limit; None for work that does
            not depend on the tensor's size.
        sizes: the case's own sizes, for work whose size is not that of a tensor to observe.
        unit: what ``sizes`` count.
    """

    name: str
    make: Callable[[int, str], dict[str, Call]]
    bytes_moved: float = 0.0
    limit: str | None = None
    sizes: tuple[int, ...] | None = None
    unit: str = "elements"

    def share_of_limit(self, seconds: dict[str, float], contender: str) -> float | None:
        """The contender's bandwidth over that of the limit."""
        if self.limit is None or contender not in seconds:
            return None
        more_bytes = self.bytes_moved / LIMIT_BYTES[self.limit]
        return more_bytes * seconds[self.limit] / seconds[contender]


def all_cases() -> list[Case]:
    """The cases of every bench module."""
    package = importlib.import_module(__package__)
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    modules = [
        importlib.import_module(f"{__package__}.{name}")
        for name in names
        if name.startswith("bench_")
    ]
    return [case for module in modules for case in module.CASES]


def has_native(device: str) -> bool:
    status = pyobserver.native_status
    return status.cuda if torch.device(device).type == "cuda" else status.cpu


def contender_names(case: Case, device: str) -> list[str]:
    """The keys of what the case makes."""
    names = ["reference", *OURS] if has_native(device) else ["reference", "fallback"]
    return names if case.limit is None else [*names, case.limit]


def contenders(device: str, reference: Call, ours: Callable[[], Call]) -> dict[str, Call]:
    """The calls of torch and of us; ``ours`` makes one, with state of its own.

    The fallback is the same call as the native one: whoever times it swaps the kernels
    underneath (:func:`bench.fallback.kernels_of`).
    """
    calls = {"reference": reference, "fallback": ours()}
    if has_native(device):
        calls["native"] = ours()
    return calls


def limit_call(limit: str, x: Tensor) -> dict[str, Call]:
    """The memory limit, as one more contender."""
    x = x.detach()
    if limit == "sum":
        return {"sum": x.sum}
    out = torch.empty_like(x)
    return {"copy_": lambda: out.copy_(x)}


@lru_cache(maxsize=4)
def normal(shape: tuple[int, ...], device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(device)


def flat(size: int) -> tuple[int, ...]:
    return (size,)


def weight_shape(size: int) -> tuple[int, ...]:
    """(channels, values)"""
    channels = 100 if size >= 10_000 else 16
    return channels, max(1, size // channels)


def activation_shape(size: int) -> tuple[int, ...]:
    """(batch, channels, values)"""
    batch = 10 if size >= 10_000 else 4
    channels, values = weight_shape(size)
    return batch, channels, max(1, values // batch)


def token_shape(size: int) -> tuple[int, ...]:
    """(values, channels)"""
    return weight_shape(size)[::-1]

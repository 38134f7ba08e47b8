"""What a timed case is, and the parts that the bench modules build theirs from."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import pyobserver

Call = Callable[[], object]

SIZES = (256, 10_000, 100_000, 1_000_000, 10_000_000)
SMOKE_SIZES = (256,)
GROWTH_ELEMENTS = 1_000_000
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
        sizes: the case's own sizes, for work whose size is not that of a tensor to observe;
            or what it is done with in turn, by name, such as dtypes.
        unit: what ``sizes`` are.
        growth: shows how the cost grows with ``sizes`` at ``GROWTH_ELEMENTS`` elements; the report
            has it in the section of its unit alone.
        headline: in the report's first table and in the picture.
        slow_fallback: leave the fallback out: it would take minutes.
    """

    name: str
    make: Callable[[Any, str], dict[str, Call]]
    bytes_moved: float = 0.0
    limit: str | None = None
    sizes: tuple[int | str, ...] | None = None
    unit: str = "elements"
    growth: bool = False
    headline: bool = False
    slow_fallback: bool = False

    def sizes_of(self, elements: tuple[int, ...], quick: bool) -> tuple[int | str, ...]:
        """What to run the case with: its own sizes, a quick growth at its ends, or ``elements``."""
        if self.sizes is None:
            return elements
        return (self.sizes[0], self.sizes[-1]) if quick and self.growth else self.sizes

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
    if case.slow_fallback:
        names.remove("fallback")
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


def limit_call(limit: str | None, x: Tensor) -> dict[str, Call]:
    """The memory limit, as one more contender."""
    if limit is None:
        return {}
    x = x.detach()
    if limit == "sum":
        return {"sum": x.sum}
    out = torch.empty_like(x)
    return {"copy_": lambda: out.copy_(x)}


def with_gradient(call: Callable[[], Any], x: Tensor) -> Call:
    """The call, and then the gradient of ``x`` from one of ones."""
    grad = torch.ones_like(x)
    return lambda: torch.autograd.grad(call(), x, grad)


@lru_cache(maxsize=4)
def normal(shape: tuple[int, ...], device: str) -> Tensor:
    """Drawn where it will lie: on the host a second for 10^8 values."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(shape, generator=generator, device=device)


# What a case works on, made from its size and device.


def flat(size: int, device: str) -> Tensor:
    return normal((size,), device)


def _channels(size: int) -> int:
    return 100 if size >= 10_000 else 16


def weight(size: int, device: str) -> Tensor:
    """(channels, values)"""
    channels = _channels(size)
    return normal((channels, max(1, size // channels)), device)


def activation(size: int, device: str) -> Tensor:
    """(batch, channels, values)"""
    channels, batch = _channels(size), 10 if size >= 10_000 else 4
    return normal((batch, channels, max(1, size // channels // batch)), device)


def tokens(size: int, device: str) -> Tensor:
    """(values, channels)"""
    channels = _channels(size)
    return normal((max(1, size // channels), channels), device)


# Series of inputs for growth cases, each with the fields of a Case that go with it.


def _series(unit: str, *sizes: int | str) -> dict[str, Any]:
    return {"limit": None, "sizes": sizes, "unit": unit, "growth": True}


BY_CHANNELS = _series("channels", 3, 16, 100, 1024, 16_384)
BY_RUN = _series("values in each run of a channel (64 channels)", 1, 3, 9, 49, 196, 1024)
BY_BINS = _series("bins", 128, 2048, 16_384)
BY_DTYPE = _series("dtype", "float32", "float64", "float16", "bfloat16")
BY_LAYOUT = _series("layout", "contiguous", "channels_last", "strided", "cropped", "expanded")


def channels_first(channels: int, device: str) -> Tensor:
    return normal((channels, GROWTH_ELEMENTS // channels), device)


def channels_middle(channels: int, device: str) -> Tensor:
    return normal((8, channels, GROWTH_ELEMENTS // (8 * channels)), device)


def channels_end(channels: int, device: str) -> Tensor:
    return normal((GROWTH_ELEMENTS // channels, channels), device)


def runs(values: int, device: str) -> Tensor:
    """(batch, 64 channels, values)"""
    return normal((GROWTH_ELEMENTS // (64 * values), 64, values), device)


def of_dtype(name: str, device: str) -> Tensor:
    return normal((100, GROWTH_ELEMENTS // 100), device).to(getattr(torch, name))


def of_layout(name: str, device: str) -> Tensor:
    """(batch, channels, height, width), as many elements in every layout."""
    batch, channels, height, width = shape = (10, 100, 25, 40)
    if name == "strided":
        return normal((batch, channels, height, 2 * width), device)[..., ::2]
    if name == "cropped":
        return normal((batch, channels, height + 2, width + 2), device)[..., 1:-1, 1:-1]
    if name == "expanded":
        return normal((batch, channels, 1, width), device).expand(shape)
    x = normal(shape, device)
    return x.contiguous(memory_format=torch.channels_last) if name == "channels_last" else x

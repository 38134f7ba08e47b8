"""The modules against those of torch.ao.

Observers are timed in their steady state, where the range does not grow any more; outputs are
warm (see ``keep_memory_warm``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao import quantization as torch_ao
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

import pyobserver

from .cases import (
    BY_BINS,
    BY_CHANNELS,
    BY_DTYPE,
    BY_LAYOUT,
    BY_RUN,
    GROWTH_ELEMENTS,
    Call,
    Case,
    activation,
    channels_end,
    channels_first,
    channels_middle,
    contenders,
    flat,
    limit_call,
    normal,
    of_dtype,
    of_layout,
    runs,
    weight,
    with_gradient,
)

_MASK = 1 / 8  # bytes an element

_FED = 20_000  # values of each of many observers

Factory = Callable[[ModuleType], nn.Module]  # of the host that has the class


def _forward(
    name: str,
    factory: Factory,
    tensor: Callable[[Any, str], Tensor] = flat,
    bytes_moved: float = 4,
    limit: str | None = "sum",
    **more: Any,
) -> Case:
    def make(size: Any, device: str) -> dict[str, Call]:
        x = tensor(size, device)

        def bind(host: ModuleType) -> Call:
            module = factory(host).to(device)
            return lambda: module(x)

        calls = contenders(device, bind(torch_ao), partial(bind, pyobserver))
        return calls | limit_call(limit, x)

    return Case(name, make, bytes_moved, limit, **more)


def _autograd(
    name: str,
    factory: Factory,
    tensor: Callable[[Any, str], Tensor] = flat,
    bytes_moved: float = 20 + 2 * _MASK,
    **more: Any,
) -> Case:
    def make(size: int, device: str) -> dict[str, Call]:
        x = tensor(size, device).detach().requires_grad_()

        def bind(host: ModuleType) -> Call:
            module = factory(host).to(device)
            return with_gradient(lambda: module(x), x)

        calls = contenders(device, bind(torch_ao), partial(bind, pyobserver))
        return calls | limit_call("copy_", x)

    return Case(name, make, bytes_moved, limit="copy_", **more)


def _make_calculate_qparams(factory: Factory, size: int, device: str) -> dict[str, Call]:
    x = normal((size,), device)

    def bind(host: ModuleType) -> Call:
        observer: Any = factory(host).to(device)
        observer(x)
        return observer.calculate_qparams

    return contenders(device, bind(torch_ao), partial(bind, pyobserver))


def _make_many(factory: Factory, observers: int, device: str) -> dict[str, Call]:
    """The scales of many observers: in one call, and one by one."""
    xs = [normal((_FED,), device) * (1 + i % 7) for i in range(observers)]

    def fed(host: ModuleType) -> list[Any]:
        found = [factory(host).to(device) for _ in xs]
        for observer, x in zip(found, xs, strict=True):
            observer(x)
        return found

    theirs = fed(torch_ao)

    def reference() -> None:
        for observer in theirs:
            observer.calculate_qparams()

    calls = contenders(
        device, reference, lambda: partial(pyobserver.calculate_qparams, fed(pyobserver))
    )
    del calls["fallback"]
    return calls


def _make_bins(bins: int, device: str) -> dict[str, Call]:
    x = normal((GROWTH_ELEMENTS,), device)

    def bind(host: ModuleType) -> Call:
        observer = host.HistogramObserver(bins=bins).to(device)
        return lambda: observer(x)

    return contenders(device, bind(torch_ao), partial(bind, pyobserver))


def _fake_quantize(
    name: str, factory: Factory, tensor: Callable[[Any, str], Tensor] = flat, **more: Any
) -> Case:
    return _forward(name, factory, tensor, bytes_moved=12, limit="copy_", **more)


def _minmax(host: ModuleType) -> nn.Module:
    return host.MinMaxObserver()


def _histogram(host: ModuleType) -> nn.Module:
    return host.HistogramObserver()


def _log_histogram(host: ModuleType) -> nn.Module:
    """torch.ao has none: beside its linear one."""
    return pyobserver.LogHistogramObserver() if host is pyobserver else _histogram(host)


def _per_channel(axis: int) -> Factory:
    return lambda host: host.PerChannelMinMaxObserver(ch_axis=axis)


def _moving_per_channel(axis: int) -> Factory:
    return lambda host: host.MovingAveragePerChannelMinMaxObserver(ch_axis=axis)


def _fake(host: ModuleType) -> nn.Module:
    return host.FakeQuantize()


def _fused(host: ModuleType) -> nn.Module:
    return host.FusedMovingAvgObsFakeQuantize()


def _learnable(host: ModuleType) -> nn.Module:
    """One that was calibrated, and learns."""
    made = _LearnableFakeQuantize if host is torch_ao else pyobserver.LearnableFakeQuantize
    module: Any = made(host.MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
    module(normal((_FED,), "cpu"))
    module.enable_param_learning()
    return module


def _of_weight(host: ModuleType, fake_quantize: str) -> nn.Module:
    return getattr(host, fake_quantize)(
        observer=host.MovingAveragePerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )


CASES = [
    _forward("MinMaxObserver", _minmax, headline=True),
    _forward(
        "MovingAverageMinMaxObserver",
        lambda host: host.MovingAverageMinMaxObserver(),
        headline=True,
    ),
    _forward("PerChannelMinMaxObserver, axis 0", _per_channel(0), weight, headline=True),
    _forward("PerChannelMinMaxObserver, axis 1", _per_channel(1), activation, headline=True),
    _forward("MovingAveragePerChannelMinMaxObserver, axis 0", _moving_per_channel(0), weight),
    _forward("MovingAveragePerChannelMinMaxObserver, axis 1", _moving_per_channel(1), activation),
    _forward("HistogramObserver", _histogram, headline=True),
    _forward("LogHistogramObserver", _log_histogram, headline=True),
    Case(
        "HistogramObserver.calculate_qparams",
        partial(_make_calculate_qparams, _histogram),
        headline=True,
    ),
    Case(
        "LogHistogramObserver.calculate_qparams (mse)",
        partial(_make_calculate_qparams, _log_histogram),
        headline=True,
    ),
    *(
        Case(
            f"calculate_qparams of many {name}",
            partial(_make_many, factory),
            sizes=(200,),
            unit="observers",
            slow_fallback=True,
        )
        for name, factory in (
            ("HistogramObservers", _histogram),
            ("LogHistogramObservers (mse)", _log_histogram),
        )
    ),
    _fake_quantize("FakeQuantize", _fake, headline=True),
    _autograd("FakeQuantize, forward and backward", _fake, headline=True),
    _fake_quantize(
        "FakeQuantize, axis 0", partial(_of_weight, fake_quantize="FakeQuantize"), weight
    ),
    _autograd(
        "FakeQuantize, axis 0, forward and backward",
        partial(_of_weight, fake_quantize="FakeQuantize"),
        weight,
    ),
    _fake_quantize(
        "FakeQuantize over HistogramObserver",
        lambda host: host.FakeQuantize(observer=host.HistogramObserver),
    ),
    _fake_quantize("FusedMovingAvgObsFakeQuantize", _fused, headline=True),
    _autograd("FusedMovingAvgObsFakeQuantize, forward and backward", _fused),
    _fake_quantize(
        "FusedMovingAvgObsFakeQuantize, axis 0",
        partial(_of_weight, fake_quantize="FusedMovingAvgObsFakeQuantize"),
        weight,
    ),
    _autograd(
        "FusedMovingAvgObsFakeQuantize, axis 0, forward and backward",
        partial(_of_weight, fake_quantize="FusedMovingAvgObsFakeQuantize"),
        weight,
    ),
    _autograd("LearnableFakeQuantize, forward and backward", _learnable, bytes_moved=20),
    _forward("PerChannelMinMaxObserver, axis 0", _per_channel(0), channels_first, **BY_CHANNELS),
    _forward("PerChannelMinMaxObserver, axis 1", _per_channel(1), channels_middle, **BY_CHANNELS),
    _forward("PerChannelMinMaxObserver, last axis", _per_channel(-1), channels_end, **BY_CHANNELS),
    _forward("PerChannelMinMaxObserver, axis 1", _per_channel(1), runs, **BY_RUN),
    Case("HistogramObserver", _make_bins, **BY_BINS),
    _forward("MinMaxObserver", _minmax, of_dtype, **BY_DTYPE),
    _forward("PerChannelMinMaxObserver, axis 0", _per_channel(0), of_dtype, **BY_DTYPE),
    _forward("HistogramObserver", _histogram, of_dtype, **BY_DTYPE),
    _forward("MinMaxObserver", _minmax, of_layout, **BY_LAYOUT),
    _forward("PerChannelMinMaxObserver, axis 1", _per_channel(1), of_layout, **BY_LAYOUT),
    _forward("HistogramObserver", _histogram, of_layout, **BY_LAYOUT),
    _forward("LogHistogramObserver", _log_histogram, of_dtype, **BY_DTYPE),
    _forward("LogHistogramObserver", _log_histogram, of_layout, **BY_LAYOUT),
]


def test_modules(benchmark: Callable[[Call], object], contender: Call) -> None:
    benchmark(contender)

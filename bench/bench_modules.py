"""The modules against those of torch.ao.

Observers are timed in their steady state, where the range does not grow any more; outputs are
warm (see ``keep_memory_warm``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType

import torch
from torch import nn
from torch.ao import quantization as torch_ao

import pyobserver

from .cases import (
    Call,
    Case,
    activation_shape,
    contenders,
    flat,
    limit_call,
    normal,
    weight_shape,
)

_MASK = 1 / 8  # bytes an element

Factory = Callable[[ModuleType], nn.Module]  # of the host that has the class


def _forward(
    name: str,
    factory: Factory,
    shape: Callable[[int], tuple[int, ...]] = flat,
    bytes_moved: float = 4,
    limit: str = "sum",
) -> Case:
    def make(size: int, device: str) -> dict[str, Call]:
        x = normal(shape(size), device)

        def bind(host: ModuleType) -> Call:
            module = factory(host).to(device)
            return lambda: module(x)

        calls = contenders(device, bind(torch_ao), partial(bind, pyobserver))
        return calls | limit_call(limit, x)

    return Case(name, make, bytes_moved, limit)


def _make_calculate_qparams(size: int, device: str) -> dict[str, Call]:
    x = normal((size,), device)

    def bind(host: ModuleType) -> Call:
        observer = host.HistogramObserver().to(device)
        observer(x)
        return observer.calculate_qparams

    return contenders(device, bind(torch_ao), partial(bind, pyobserver))


def _make_autograd(size: int, device: str) -> dict[str, Call]:
    x = normal((size,), device).detach().requires_grad_()
    grad = torch.ones_like(x)

    def bind(host: ModuleType) -> Call:
        module = host.FakeQuantize().to(device)
        return lambda: torch.autograd.grad(module(x), x, grad)

    calls = contenders(device, bind(torch_ao), partial(bind, pyobserver))
    return calls | limit_call("copy_", x)


def _fake_quantize(name: str, factory: Factory) -> Case:
    return _forward(name, factory, bytes_moved=12, limit="copy_")


CASES = [
    _forward("MinMaxObserver", lambda host: host.MinMaxObserver()),
    _forward("MovingAverageMinMaxObserver", lambda host: host.MovingAverageMinMaxObserver()),
    _forward(
        "PerChannelMinMaxObserver, axis 0",
        lambda host: host.PerChannelMinMaxObserver(ch_axis=0),
        weight_shape,
    ),
    _forward(
        "PerChannelMinMaxObserver, axis 1",
        lambda host: host.PerChannelMinMaxObserver(ch_axis=1),
        activation_shape,
    ),
    _forward(
        "MovingAveragePerChannelMinMaxObserver, axis 0",
        lambda host: host.MovingAveragePerChannelMinMaxObserver(ch_axis=0),
        weight_shape,
    ),
    _forward("HistogramObserver", lambda host: host.HistogramObserver()),
    Case("HistogramObserver.calculate_qparams", _make_calculate_qparams),
    _fake_quantize("FakeQuantize", lambda host: host.FakeQuantize()),
    Case(
        "FakeQuantize forward and backward",
        _make_autograd,
        bytes_moved=20 + 2 * _MASK,
        limit="copy_",
    ),
    _fake_quantize(
        "FakeQuantize over HistogramObserver",
        lambda host: host.FakeQuantize(observer=host.HistogramObserver),
    ),
    _fake_quantize(
        "FusedMovingAvgObsFakeQuantize", lambda host: host.FusedMovingAvgObsFakeQuantize()
    ),
]


def test_modules(benchmark: Callable[[Call], object], contender: Call) -> None:
    benchmark(contender)

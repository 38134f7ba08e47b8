"""The ``log_histogram`` op against torch.ao's HistogramObserver, and channels one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.ao.quantization import HistogramObserver

from pyobserver.ops import log_columns, log_histogram

from .cases import (
    BY_CHANNELS,
    BY_DTYPE,
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
    tokens,
    weight,
)

MANTISSA_BITS = 5
BY_MANTISSA_BITS = {"sizes": (3, 4, 5, 6, 7, 8), "unit": "mantissa bits", "growth": True}
_FEW_BITS = 2  # of many channels: their counts are to fit in memory


def _state(
    groups: tuple[int, ...], mantissa_bits: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    low = torch.full(groups, torch.inf, device=device)
    shape = (*groups, log_columns(mantissa_bits))
    return torch.zeros(shape, dtype=torch.int64, device=device), low, -low


def _calls(x: Tensor, device: str, mantissa_bits: int = MANTISSA_BITS) -> dict[str, Call]:
    observer = HistogramObserver().to(device)

    def ours() -> Call:
        state = _state((), mantissa_bits, device)
        return lambda: log_histogram(x, *state)

    return contenders(device, lambda: observer(x), ours)


def _channel_calls(x: Tensor, axis: int, device: str, mantissa_bits: int) -> dict[str, Call]:
    """Torch has no observer of channels' histograms: ``torch.histc`` of each, over its range."""
    channels = x.movedim(axis, 0).flatten(1)
    bins = 2048

    def reference() -> None:
        low, high = torch.aminmax(channels, dim=1)
        ends = zip(channels, low.tolist(), high.tolist(), strict=True)
        for channel, least, greatest in ends:
            torch.histc(channel, bins, min=least, max=greatest)

    def ours() -> Call:
        state = _state((x.shape[axis],), mantissa_bits, device)
        return lambda: log_histogram(x, *state, axis)

    return contenders(device, reference, ours)


def _make(size: int, device: str) -> dict[str, Call]:
    x = flat(size, device)
    return _calls(x, device) | limit_call("sum", x)


def _make_relu(size: int, device: str) -> dict[str, Call]:
    """Nine in ten are zero."""
    x = (flat(size, device) - 1.2815516).relu()
    return _calls(x, device) | limit_call("sum", x)


def _make_mantissa_bits(mantissa_bits: int, device: str) -> dict[str, Call]:
    return _calls(normal((GROWTH_ELEMENTS,), device), device, mantissa_bits)


def _make_dtype(name: str, device: str) -> dict[str, Call]:
    return _calls(of_dtype(name, device), device)


def _channel_case(name: str, tensor: Callable[[int, str], Tensor], axis: int) -> Case:
    def make(size: int, device: str) -> dict[str, Call]:
        x = tensor(size, device)
        return _channel_calls(x, axis, device, MANTISSA_BITS) | limit_call("sum", x)

    return Case(name, make, bytes_moved=4, limit="sum")


def _growth_case(name: str, tensor: Callable[[int, str], Tensor], axis: int) -> Case:
    def make(channels: int, device: str) -> dict[str, Call]:
        return _channel_calls(tensor(channels, device), axis, device, _FEW_BITS)

    return Case(name, make, **BY_CHANNELS)


CASES = [
    Case("log_histogram", _make, bytes_moved=4, limit="sum"),
    Case("log_histogram, nine in ten zero", _make_relu, bytes_moved=4, limit="sum"),
    _channel_case("log_histogram, axis 0", weight, 0),
    _channel_case("log_histogram, axis 1", activation, 1),
    _channel_case("log_histogram, last axis", tokens, -1),
    _growth_case("log_histogram, axis 0", channels_first, 0),
    _growth_case("log_histogram, axis 1", channels_middle, 1),
    _growth_case("log_histogram, last axis", channels_end, -1),
    Case("log_histogram", _make_mantissa_bits, **BY_MANTISSA_BITS),
    Case("log_histogram", _make_dtype, **BY_DTYPE),
]


def test_log_histogram(benchmark: Callable[[Call], object], contender: Call) -> None:
    benchmark(contender)

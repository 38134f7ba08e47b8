"""Signal-to-quantization-noise ratio."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.fake_quantize import fake_quantize

SLOTS = 2048


def sqnr(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    axis: int | None,
) -> float:
    """``10 * log10(sum(x**2) / sum((x - quantized x)**2))`` in dB, over the finite values of x.

    Infinite where quantizing changes nothing; NaN where the scale is not a positive number. The
    arguments are those of :func:`pyobserver.ops.fake_quantize`.
    """
    if not bool(((scale > 0) & scale.isfinite()).all()):
        return math.nan
    quantized = fake_quantize(x, scale, zero_point, quant_min, quant_max, axis)
    finite = x.isfinite()
    signal = torch.where(finite, x, 0).double().square().sum()
    noise = torch.where(finite, x.double() - quantized.double(), 0).square().sum()
    if noise == 0:
        return math.inf
    return float(10 * torch.log10(signal / noise))


class Sample(NamedTuple):
    """Some of the values of a site, on the CPU.

    Attributes:
        values: float32 ``(SLOTS,)``.
        channels: int64, as many: the channel of each; None where there is one scale.
    """

    values: Tensor
    channels: Tensor | None

    def sqnr(
        self, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
    ) -> float:
        """:func:`sqnr` of the sampled values; its standard error is about 0.2 dB on normal data."""
        scale, zero_point = scale.cpu(), zero_point.cpu()
        if self.channels is not None:
            # one scale a value: the sample is its own channel axis
            scale, zero_point, axis = scale[self.channels], zero_point[self.channels], 0
        return sqnr(self.values, scale, zero_point, quant_min, quant_max, axis)


class ValueSample:
    """A fixed number of values, each drawn evenly from all the values of all the tensors seen.

    Every slot is a reservoir of one: with n new values after N, a position is drawn from N + n,
    and the slot takes the value there if it is a new one. So a tensor costs a few operations on
    ``SLOTS`` elements, whatever its size, and no device sync.

    Args:
        axis: the channel axis, whose index is kept for every value, or None.
        generator: the source of the draws, on the device of the tensors.
    """

    def __init__(self, axis: int | None, generator: torch.Generator):
        self.axis = axis
        self.generator = generator
        self.seen = 0
        self.values = torch.zeros(SLOTS, device=generator.device)
        self.channels = torch.zeros(SLOTS, dtype=torch.int64, device=generator.device)

    def add(self, x: Tensor) -> None:
        new = x.numel()
        self.seen += new
        drawn = torch.randint(
            self.seen, (SLOTS,), generator=self.generator, device=self.values.device
        )
        fresh = drawn < new
        position = drawn.clamp_(max=new - 1)
        self.values = torch.where(fresh, torch.take(x, position).float(), self.values)
        if self.axis is not None:
            inner = math.prod(x.shape[self.axis :][1:])
            channel = position.div(inner, rounding_mode="floor") % x.shape[self.axis]
            self.channels = torch.where(fresh, channel, self.channels)

    def taken(self) -> Sample:
        """The values drawn so far."""
        channels = None if self.axis is None else self.channels.cpu().clone()
        return Sample(self.values.cpu().clone(), channels)

"""Clipping to bounds that are learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _ClipFunction(torch.autograd.Function):
    """The gradient goes to the value strictly inside the bounds, else to the bound that is met."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, low, high)
        return torch.clamp(inputs, low, high).to(inputs.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs, low, high = ctx.saved_tensors
        below, above = inputs <= low, inputs >= high
        to_low = torch.where(below, grad, 0.0).sum(dtype=low.dtype)
        to_high = torch.where(above, grad, 0.0).sum(dtype=high.dtype)
        to_inputs = torch.where(below | above, 0.0, grad)
        return to_inputs, to_low.reshape(low.shape), to_high.reshape(high.shape)


class Clip(nn.Module):
    """Clip to two bounds, which are learned.

    The gradient of a bound is the sum of the gradients of the values that it clips (Choi et al.,
    "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018).

    Args:
        clip_value_min, clip_value_max: where the bounds begin.

    Parameters: ``clip_value_min``, ``clip_value_max``: float32, 0-d.

    Source: ``Clip`` and ``ClipFunction`` of NVIDIA's pytorch-quantization. There a clipped gradient
    that is NaN stays one.
    """

    def __init__(self, clip_value_min: float, clip_value_max: float):
        super().__init__()
        self.clip_value_min = nn.Parameter(torch.tensor(clip_value_min, dtype=torch.float32))
        self.clip_value_max = nn.Parameter(torch.tensor(clip_value_max, dtype=torch.float32))

    def forward(self, inputs: Tensor) -> Tensor:
        return _ClipFunction.apply(inputs, self.clip_value_min, self.clip_value_max)

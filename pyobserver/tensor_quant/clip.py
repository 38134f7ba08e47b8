"""Clipping to bounds that are learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.learnable_clip import learnable_clip


class Clip(nn.Module):
    """Clip to two bounds, which are learned, see :func:`pyobserver.ops.learnable_clip`.

    The gradient of a bound is the sum of the gradients of the values that it clips (Choi et al.,
    "PACT: Parameterized Clipping Activation for Quantized Neural Networks", 2018).

    Args:
        clip_value_min, clip_value_max: where the bounds begin.

    Parameters: ``clip_value_min``, ``clip_value_max``: float32, 0-d; of another dtype, where the
    module was converted to one, they are read as float32.

    Source: ``Clip`` of NVIDIA's pytorch-quantization.
    """

    def __init__(self, clip_value_min: float, clip_value_max: float):
        super().__init__()
        self.clip_value_min = nn.Parameter(torch.tensor(clip_value_min, dtype=torch.float32))
        self.clip_value_max = nn.Parameter(torch.tensor(clip_value_max, dtype=torch.float32))

    def forward(self, inputs: Tensor, *grid: Any) -> Tensor:
        """``inputs`` clipped, and with a grid (``num_bits, unsigned, narrow_range``) quantized."""
        low, high = self.clip_value_min.float(), self.clip_value_max.float()
        return learnable_clip(inputs, low, high, *grid)

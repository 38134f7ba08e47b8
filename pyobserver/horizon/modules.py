"""Layers whose weight goes through a fake-quantize, and the stubs that mark what is quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .fake_quantize import FakeQuantize


class QuantStub(nn.Module):
    """Where a tensor enters the quantized part of a model; as torch.ao's, which serves as well."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` as it is."""
        return x


class DeQuantStub(nn.Module):
    """Where a tensor leaves the quantized part of a model; as torch.ao's, which serves as well."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` as it is."""
        return x


def is_stub(module: nn.Module, name: str) -> bool:
    """Whether a module is a ``QuantStub`` or ``DeQuantStub``, whichever toolkit it is of."""
    return any(cls.__name__ == name for cls in type(module).__mro__)


class _Weighted(nn.Module):
    weight: Tensor
    bias: Any
    weight_fake_quant: FakeQuantize


class _Conv(_Weighted):
    _conv_forward: Callable[..., Tensor]

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight_fake_quant(self.weight), self.bias)


class Conv1d(_Conv, nn.Conv1d):
    """``nn.Conv1d`` of the fake-quantized weight."""


class Conv2d(_Conv, nn.Conv2d):
    """``nn.Conv2d`` of the fake-quantized weight."""


class Conv3d(_Conv, nn.Conv3d):
    """``nn.Conv3d`` of the fake-quantized weight."""


class _ConvTranspose(_Weighted):
    _function: Callable[..., Tensor]
    _output_padding: Callable[..., Any]

    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        own: Any = self
        output_padding = self._output_padding(
            input, output_size, own.stride, own.padding, own.kernel_size,
            self.weight.dim() - 2, own.dilation,
        )  # fmt: skip
        return type(self)._function(
            input, self.weight_fake_quant(self.weight), self.bias,
            own.stride, own.padding, output_padding, own.groups, own.dilation,
        )  # fmt: skip


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` of the fake-quantized weight."""

    _function = F.conv_transpose1d


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` of the fake-quantized weight."""

    _function = F.conv_transpose2d


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` of the fake-quantized weight."""

    _function = F.conv_transpose3d


class Linear(_Weighted, nn.Linear):
    """``nn.Linear`` of the fake-quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight_fake_quant(self.weight), self.bias)


class Embedding(_Weighted, nn.Embedding):
    """``nn.Embedding`` of the fake-quantized weight."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight_fake_quant(self.weight)
        return F.embedding(
            input, weight, self.padding_idx, None, 2.0, self.scale_grad_by_freq, self.sparse
        )


_QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.ConvTranspose1d: ConvTranspose1d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.ConvTranspose3d: ConvTranspose3d,
    nn.Linear: Linear,
    nn.Embedding: Embedding,
}


def can_quantize_weight(module: nn.Module) -> bool:
    """Whether :func:`quantize_weight` serves a module."""
    renormalizes = isinstance(module, nn.Embedding) and module.max_norm is not None
    return type(module) in _QUANTIZED and not renormalizes


def quantize_weight(module: nn.Module, weight_fake_quant: FakeQuantize) -> None:
    """Put a fake-quantize before the weight of a layer, in place."""
    module.__class__ = _QUANTIZED[type(module)]
    module.weight_fake_quant = weight_fake_quant

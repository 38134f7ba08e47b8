"""What is trained with fake-quantize in it: a small convnet, and a transformer's block.

Prepared by torch.ao's ``prepare_qat``, whoever's the fake-quantize modules are: of each weight, by
channels, and of what goes into each product and comes out of each layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao import quantization as torch_ao

import pyobserver

from .cases import Call

BASE = "no fake-quantize"
HOOKS = "hooks alone"
THEIRS, THEIRS_FUSED = "torch.ao FakeQuantize", "torch.ao fused"
OURS, OURS_FUSED = "our FakeQuantize", "our fused"
_RATE = 1e-3


class Block(nn.Module):
    """A transformer's: attention and MLP, each after its norm and with its residual."""

    def __init__(self, width: int = 256, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.mixed, self.bent = torch_ao.QuantStub(), torch_ao.QuantStub()

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width // self.heads)
        mixed = nn.functional.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        x = x + self.proj(self.mixed(mixed.transpose(1, 2).reshape(x.shape)))
        return x + self.down(self.bent(nn.functional.gelu(self.up(self.norm2(x)))))


def _convolution(channels: int, made: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, made, 3, padding=1), nn.BatchNorm2d(made), nn.ReLU()


def _convnet() -> nn.Module:
    return nn.Sequential(
        torch_ao.QuantStub(),
        *_convolution(1, 32),
        *_convolution(32, 64),
        nn.MaxPool2d(2),
        *_convolution(64, 64),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


@dataclass(frozen=True)
class Trained:
    """A model and what it is fed: ``shape``, after the batch."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    large_batch: int  # where bytes are counted

    def input(self, large: bool = False) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        batch = self.large_batch if large else self.batch
        return torch.randn(batch, *self.shape, generator=generator)


MODELS = {
    "convnet": Trained(_convnet, (1, 8, 8), 64, 512),
    "transformer block": Trained(Block, (128, 256), 8, 32),
}


def _straight_through(host: ModuleType) -> Any:
    activation = host.FakeQuantize.with_args(
        observer=host.MovingAverageMinMaxObserver, quant_min=0, quant_max=255
    )
    return torch_ao.QConfig(activation, host.default_per_channel_weight_fake_quant)


def _fused(host: ModuleType) -> Any:
    return torch_ao.QConfig(
        host.default_fused_act_fake_quant, host.default_fused_per_channel_wt_fake_quant
    )


_QCONFIGS: dict[str, Callable[[], Any]] = {
    HOOKS: lambda: torch_ao.QConfig(nn.Identity, nn.Identity),
    THEIRS: lambda: _straight_through(torch_ao),
    THEIRS_FUSED: lambda: _fused(torch_ao),
    OURS: lambda: _straight_through(pyobserver),
    OURS_FUSED: lambda: _fused(pyobserver),
}
CONTENDERS = (BASE, *_QCONFIGS)


def prepared(trained: Trained, contender: str) -> nn.Module:
    """The same weights for each contender."""
    torch.manual_seed(0)
    model = trained.make().train()
    if contender != BASE:
        model.qconfig = _QCONFIGS[contender]()
        torch_ao.prepare_qat(model, inplace=True)
    return model


def sites(model: nn.Module) -> int:
    """How many tensors are fake-quantized in a forward."""
    return sum(hasattr(module, "fake_quant_enabled") for module in model.modules())


def step_of(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float32) -> Call:
    """A training step: forward, backward, optimizer, and the gradients dropped; gives the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=_RATE)

    def step() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = model(x)
        loss = y.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step

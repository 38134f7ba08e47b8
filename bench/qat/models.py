"""What is trained with fake-quantize in it: a small convnet, and a transformer's block.

Prepared by torch.ao's ``prepare_qat``, whoever's the fake-quantize modules are: of each weight, by
channels, and of what goes into each product and comes out of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao import quantization as torch_ao
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

import pyobserver

from ..cases import Call

BASE = "no fake-quantize"
HOOKS = "hooks alone"
THEIRS, OURS = "torch.ao FakeQuantize", "our FakeQuantize"
THEIRS_FUSED, OURS_FUSED = "torch.ao fused", "our fused"
THEIRS_LEARNED, OURS_LEARNED = "torch.ao learnable", "our learnable"
DTYPES = ("float32", "bfloat16")  # the second by autocast
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
    """A model and what it is fed.

    Attributes:
        shape: of the input, after the batch.
        batch: where steps are timed.
        large_batch: where bytes are counted.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int
    large_batch: int

    def input(self, batch: int) -> Tensor:
        return torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(0))


MODELS = {
    "convnet": Trained(_convnet, (1, 8, 8), 64, 512),
    "transformer block": Trained(Block, (128, 256), 8, 32),
}


@dataclass(frozen=True)
class Modules:
    """A contender's fake-quantize modules, as factories: of activations, and of a weight.

    ``weight`` is given the number of its channels.
    """

    activation: Callable[[], nn.Module]
    weight: Callable[[int], Callable[[], nn.Module]]


def _straight_through(host: ModuleType) -> Modules:
    activation = host.FakeQuantize.with_args(
        observer=host.MovingAverageMinMaxObserver, quant_min=0, quant_max=255
    )
    return Modules(activation, lambda channels: host.default_per_channel_weight_fake_quant)


def _fused(host: ModuleType) -> Modules:
    return Modules(
        host.default_fused_act_fake_quant,
        lambda channels: host.default_fused_per_channel_wt_fake_quant,
    )


def _learned(host: ModuleType, learnable: Any, **scaled: Any) -> Modules:
    """LSQ, with its factor of the gradient; torch.ao's is told how many scales there are."""

    def of_weight(channels: int) -> Callable[[], nn.Module]:
        told = {"channel_len": channels} if host is torch_ao else {}
        return learnable.with_args(
            observer=host.MovingAveragePerChannelMinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            **told,
            **scaled,
        )

    activation = learnable.with_args(
        observer=host.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, **scaled
    )
    return Modules(activation, of_weight)


MODULES = {
    HOOKS: Modules(nn.Identity, lambda channels: nn.Identity),
    THEIRS: _straight_through(torch_ao),
    THEIRS_FUSED: _fused(torch_ao),
    THEIRS_LEARNED: _learned(torch_ao, _LearnableFakeQuantize, use_grad_scaling=True),
    OURS: _straight_through(pyobserver),
    OURS_FUSED: _fused(pyobserver),
    OURS_LEARNED: _learned(pyobserver, pyobserver.LearnableFakeQuantize),
}
# contenders that do the same, and for how many steps their losses are alike
ALIKE = (
    (OURS, THEIRS, 5),
    (OURS_FUSED, THEIRS_FUSED, 5),
    (OURS_LEARNED, THEIRS_LEARNED, 1),  # of channels, torch.ao makes the gradients smaller
)
_FLOAT32_ALONE = (THEIRS_FUSED,)


def contenders(dtype: str) -> list[str]:
    """Those that can train in that dtype; the base is the first."""
    served = [name for name in MODULES if dtype == "float32" or name not in _FLOAT32_ALONE]
    return [BASE, *served]


def _with_weights(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            yield module


def prepared(trained: Trained, contender: str, batch: int) -> tuple[nn.Module, Tensor]:
    """The model as the contender trains it, and its input; the same weights for each.

    One batch has passed, from which a learnable scale begins.
    """
    torch.manual_seed(0)
    model, x = trained.make().train(), trained.input(batch)
    if contender == BASE:
        return model, x
    modules = MODULES[contender]
    model.qconfig = torch_ao.QConfig(modules.activation, modules.weight(1))
    for module in _with_weights(model):
        channels = module.weight.shape[0]
        module.qconfig = torch_ao.QConfig(modules.activation, modules.weight(channels))
    torch_ao.prepare_qat(model, inplace=True)
    with torch.no_grad():
        model(x)
    for module in model.modules():
        if hasattr(module, "enable_param_learning"):
            module.enable_param_learning()
    return model, x


def sites(model: nn.Module) -> int:
    """How many tensors are fake-quantized in a forward."""
    return sum(hasattr(module, "fake_quant_enabled") for module in model.modules())


def step_of(model: nn.Module, x: Tensor, dtype: str = "float32") -> Call:
    """A training step: forward, backward, optimizer, and the gradients dropped; gives the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=_RATE)

    def step() -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            y = model(x)
        loss = y.float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step

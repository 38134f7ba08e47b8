"""The table of everything differentiable, with the gradient that torch gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyobserver as po
from pyobserver import horizon, ops
from pyobserver.tensor_quant import QuantDescriptor, TensorQuantizer

from .cases import from_blocks, in_blocks

GRID = (-8, 7)
STEP = 0.25
LOW, HIGH = GRID[0] * STEP, GRID[1] * STEP
BLOCKS = (1, 3, 2)
CHANNEL_STEPS = torch.tensor([0.25, 0.5, 0.125])

# the ends of the grid, half a step beyond them, their neighbours, and what is no number; in half
# precision some of them are one
EDGES = [
    LOW, HIGH, LOW - STEP / 2, HIGH + STEP / 2, LOW - STEP / 2 - 2**-20, HIGH + STEP / 2 - 2**-20,
    LOW - STEP, HIGH + STEP, -HIGH, 1.75 + 2**-9, -1.75 - 2**-9, 0.0, -0.0, 0.3, -1.1, 1e-30,
    torch.nan, torch.inf, -torch.inf, 6e4, -6e4, 0.9, -0.6, 1.4,
]  # fmt: skip
GRADS = [torch.nan, torch.inf, -torch.inf, 6e4, -6e4, -1.0, 0.0, -0.0, 6e-8, 2.0, -3.5]
SHAPE = (4, 3, 2)


def values(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(EDGES, dtype=torch.float64).to(dtype).reshape(SHAPE)


def grads(dtype: torch.dtype = torch.float32) -> Tensor:
    """Each of the gradients beside other values, whether those pass or not."""
    return (
        torch.tensor([GRADS[i * 5 % 11] for i in range(24)], dtype=torch.float64)
        .to(dtype)
        .reshape(SHAPE)
    )


def grid_tensors(device: str, steps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    steps = torch.tensor([STEP]) if steps is None else steps
    return steps.to(device), torch.zeros(steps.shape, dtype=torch.int32, device=device)


def block_steps() -> Tensor:
    return torch.tensor([0.25, 0.5, 0.125, 1.0]).reshape(4, 1, 1)


Call = Callable[[Tensor], Tensor]


def fake_quantize(device: str) -> Call:
    scale, zero_point = grid_tensors(device)
    return lambda x: ops.fake_quantize(x, scale, zero_point, *GRID)


def fake_quantize_op(device: str) -> Call:
    scale, zero_point = grid_tensors(device)
    return lambda x: torch.ops.pyobserver.fake_quantize(x, scale, zero_point, *GRID)


def fake_quantize_channels(device: str) -> Call:
    scale, zero_point = grid_tensors(device, CHANNEL_STEPS)
    return lambda x: ops.fake_quantize(x, scale, zero_point, *GRID, 1)


def fake_quantize_blocks(device: str) -> Call:
    scale, zero_point = grid_tensors(device, block_steps())
    return lambda x: ops.fake_quantize(x, scale, zero_point, *GRID, block_size=BLOCKS)


def observe_fake_quantize(device: str) -> Call:
    """With the observer off, on the grid of the others."""
    scale, zero_point = grid_tensors(device)
    state = (
        torch.full((1,), LOW, device=device),
        torch.full((1,), HIGH, device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
    )
    eps, off = torch.tensor([1e-6], device=device), torch.zeros(1, dtype=torch.uint8, device=device)
    return lambda x: ops.observe_fake_quantize(x, *state, scale, zero_point, eps, *GRID, off)


def on_grid(module: Any, device: str, steps: Tensor | None = None) -> nn.Module:
    module = module.to(device)
    module.disable_observer()
    for buffer, value in zip(
        (module.scale, module.zero_point), grid_tensors(device, steps), strict=True
    ):
        buffer.copy_(value)
    return module


INT4: dict[str, Any] = {
    "quant_min": GRID[0], "quant_max": GRID[1], "dtype": torch.qint8,
}  # fmt: skip


def module(device: str) -> nn.Module:
    return on_grid(po.FakeQuantize(**INT4), device)


def module_histogram(device: str) -> nn.Module:
    return on_grid(po.FakeQuantize(po.HistogramObserver, bins=16, **INT4), device)


def module_channels(device: str) -> nn.Module:
    made = po.FakeQuantize(
        po.MovingAveragePerChannelMinMaxObserver,
        qscheme=torch.per_channel_symmetric,
        ch_axis=1,
        num_channels=3,
        **INT4,
    )
    return on_grid(made, device, CHANNEL_STEPS)


def module_fused(device: str) -> nn.Module:
    return on_grid(po.FusedMovingAvgObsFakeQuantize(**INT4), device)


def module_fixed(device: str) -> nn.Module:
    observer = po.FixedQParamsObserver.with_args(scale=STEP, zero_point=0, **INT4)
    return po.FixedQParamsFakeQuantize(observer).to(device)


def module_horizon(device: str) -> nn.Module:
    return on_grid(horizon.FakeQuantize(dtype=horizon.qint4), device)


def tensor_quant(device: str) -> Call:
    amax = torch.tensor(HIGH, device=device)
    return lambda x: ops.tensor_quant(x, amax, 4)[0]


def fake_tensor_quant(device: str) -> Call:
    amax = torch.tensor(HIGH, device=device)
    return lambda x: ops.fake_tensor_quant(x, amax, 4)


def tensor_quantizer(device: str) -> nn.Module:
    return TensorQuantizer(QuantDescriptor(4, amax=HIGH)).to(device)


def learnable(device: str) -> Call:
    scale, zero_point = (t.float() for t in grid_tensors(device))
    return lambda x: ops.learnable_fake_quantize(x, scale, zero_point, *GRID)


def of_torch(x: Tensor, grad: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    y = torch.fake_quantize_per_tensor_affine(x, *grid_tensors("cpu"), *GRID)
    return torch.autograd.grad(y, x, grad)[0]


def of_torch_channels(
    x: Tensor, grad: Tensor, axis: int = 1, steps: Tensor = CHANNEL_STEPS
) -> Tensor:
    x = x.detach().requires_grad_()
    y = torch.fake_quantize_per_channel_affine(x, *grid_tensors("cpu", steps), axis, *GRID)
    return torch.autograd.grad(y, x, grad)[0]


def of_torch_blocks(x: Tensor, grad: Tensor) -> Tensor:
    rows, grad_rows = (in_blocks(t, BLOCKS) for t in (x, grad))
    return from_blocks(of_torch_channels(rows, grad_rows, 0, block_steps().reshape(-1)), x, BLOCKS)


def within_amax(x: Tensor, grad: Tensor) -> Tensor:
    return torch.where(x.abs() <= HIGH, grad, 0.0)


@dataclass(frozen=True)
class Case:
    """A function of x, and its gradient by torch.

    Attributes:
        make: the function, with what it needs on a device.
        gradient: of x and the gradient of the result.
        name: what a refusal says.
        kept: the saved tensors and their elements, of 24.
        any_shape: not only that of the values.
        updates: it has a state that a batch of lanes cannot share.
    """

    make: Callable[[str], Call]
    gradient: Callable[[Tensor, Tensor], Tensor] = of_torch
    name: str = "fake_quantize"
    kept: list[tuple[torch.dtype, int]] = field(default_factory=lambda: [(torch.uint8, 3)])
    any_shape: bool = True
    updates: str = ""


OBSERVE = "observe_fake_quantize"
CASES = {
    "fake_quantize": Case(fake_quantize),
    "fake_quantize_op": Case(fake_quantize_op),
    "fake_quantize_channels": Case(fake_quantize_channels, of_torch_channels, any_shape=False),
    "fake_quantize_blocks": Case(fake_quantize_blocks, of_torch_blocks, any_shape=False),
    "observe_fake_quantize": Case(observe_fake_quantize, name=OBSERVE, updates=OBSERVE),
    "FakeQuantize": Case(module, name=OBSERVE, updates=OBSERVE),
    "FakeQuantize_histogram": Case(module_histogram, updates="histogram"),
    "FakeQuantize_channels": Case(
        module_channels, of_torch_channels, OBSERVE, any_shape=False, updates=OBSERVE
    ),
    "Fused": Case(module_fused, name=OBSERVE, updates=OBSERVE),
    "FixedQParams": Case(module_fixed),
    "horizon": Case(module_horizon),
    "tensor_quant": Case(tensor_quant, within_amax, "tensor_quant"),
    "fake_tensor_quant": Case(fake_tensor_quant, within_amax, "fake_tensor_quant"),
    "TensorQuantizer": Case(tensor_quantizer, within_amax, "fake_tensor_quant"),
    "learnable": Case(
        learnable,
        name="learnable_fake_quantize",
        kept=[(torch.float32, 24), (torch.float32, 1), (torch.float32, 1)],
    ),
}
STRAIGHT = [name for name in CASES if name != "learnable"]

each_case = pytest.mark.parametrize("name", CASES)
each_straight = pytest.mark.parametrize("name", STRAIGHT)

# of the values' shape, in another order or with gaps in memory
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "sliced": lambda x: torch.stack([x, x], -1)[..., 0],
    "expanded": lambda x: x[:1].expand(SHAPE),
    "one": lambda x: x[0, 0, 0].expand(SHAPE),
}

"""Mixed precision: the modules under autocast, on its tensors, and under a scaled loss."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pyobserver as po
from pyobserver import horizon
from pyobserver.tensor_quant import Clip, QuantDescriptor, TensorQuantizer

pytestmark = pytest.mark.once  # the reference kernels compute in float32, and slowly
HALVES = (torch.bfloat16, torch.float16)
SHAPE = (64, 96)
PER_CHANNEL = {"qscheme": torch.per_channel_affine, "ch_axis": 1}


def in_training(*args: Any, **kwargs: Any) -> horizon.FakeQuantize:
    fake = horizon.FakeQuantize(*args, **kwargs)
    fake.set_state(horizon.FakeQuantState.QAT)
    return fake


def calibrating() -> TensorQuantizer:
    return TensorQuantizer(QuantDescriptor(calib_method="mse", axis=0), if_calib=True)


class Learnable(nn.Module):
    """The op, with a scale and a zero point a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((SHAPE[1],), 0.02))
        self.zero_point = nn.Parameter(torch.zeros(SHAPE[1]))

    def forward(self, x: Tensor) -> Tensor:
        return po.ops.learnable_fake_quantize(x, self.scale, self.zero_point, -128, 127, 1)


MAKES: dict[str, Callable[[], nn.Module]] = {
    "MinMax": lambda: po.FakeQuantize(po.MinMaxObserver),
    "MovingAverage": po.FakeQuantize,
    "Fused": po.FusedMovingAvgObsFakeQuantize,
    "PerRow": po.default_per_channel_weight_fake_quant,
    "PerChannel": lambda: po.FakeQuantize(po.PerChannelMinMaxObserver, **PER_CHANNEL),
    "Histogram": lambda: po.FakeQuantize(po.HistogramObserver),
    "LogHistogram": lambda: po.FakeQuantize(po.LogHistogramObserver),
    "PerChannelLogHistogram": lambda: po.FakeQuantize(
        po.PerChannelLogHistogramObserver, mantissa_bits=2, ch_axis=1
    ),
    "Fixed": po.default_fixed_qparams_range_neg1to1_fake_quant,
    "Dynamic": po.default_dynamic_fake_quant,
    "Learnable": Learnable,
    "LearnableFakeQuantize": po.LearnableFakeQuantize,
    "LearnableFakeQuantize, learning": lambda: po.LearnableFakeQuantize().enable_param_learning(),
    "TensorQuantizer": TensorQuantizer,
    "TensorQuantizer of rows": lambda: TensorQuantizer(QuantDescriptor(axis=0)),
    "TensorQuantizer to integers": lambda: TensorQuantizer(QuantDescriptor(fake_quant=False)),
    "TensorQuantizer calibrating": calibrating,
    "TensorQuantizer learning": lambda: TensorQuantizer(QuantDescriptor(learn_amax=True)),
    "Clip": lambda: Clip(-1.0, 1.0),
    "Horizon": in_training,
    "Horizon's Clip": lambda: in_training(horizon.ClipObserver),
    "Horizon's Histogram": lambda: in_training(horizon.HistogramObserver),
}
with contextlib.suppress(ImportError):
    from torchao.quantization.granularity import PerAxis, PerTensor
    from torchao.quantization.quant_primitives import MappingType

    from pyobserver.compat.torchao import AffineQuantizedMinMaxObserver, ObservedLinear

modules = pytest.mark.parametrize("name", MAKES)
halves = pytest.mark.parametrize("dtype", HALVES, ids=str)


def sample(dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(SHAPE, generator=generator)).to(dtype)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def assert_same_state(module: nn.Module, other: nn.Module) -> None:
    first, second = state_of(module), state_of(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


def step(module: nn.Module, x: Tensor, *, autocast: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The output, and the gradient for one of other values."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = module(x)
    y.backward(x.detach().flip(0))
    assert x.grad is not None
    return y.detach(), x.grad


class Widened(TorchDispatchMode):
    """What is made of a tensor's size or more in another type of floating point."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.numel, self.dtype = like.numel(), like.dtype
        self.found: list[str] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.is_floating_point() and t.shape == SHAPE:
                self.found += [f"{func}: {t.dtype}"] * (t.dtype != self.dtype)
        return result


@halves
@modules
def test_on_a_half_s_tensor(name: str, dtype: torch.dtype) -> None:
    """The statistics of the tensor as it comes, in float32; outputs and gradients in its type."""
    ours, plain, wide = (MAKES[name]() for _ in range(3))
    for seed in range(2):
        x = sample(dtype, seed)
        y, grad = step(ours, x, autocast=dtype)
        assert (y.dtype, grad.dtype) == (dtype, dtype)
        expected = step(plain, x, autocast=None)
        assert torch.equal(y, expected[0])
        assert torch.equal(grad, expected[1])
        step(wide, x.float(), autocast=None)
        assert_same_state(ours, plain)
        assert_same_state(ours, wide)
    for parameter in ours.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32


@halves
@modules
def test_autocast_leaves_a_float32_tensor(name: str, dtype: torch.dtype) -> None:
    """What is before the product that autocast casts is not cast."""
    ours, plain = MAKES[name](), MAKES[name]()
    x = sample(torch.float32)
    y, grad = step(ours, x, autocast=dtype)
    expected = step(plain, x, autocast=None)
    assert y.dtype == torch.float32
    assert torch.equal(y, expected[0])
    assert torch.equal(grad, expected[1])
    assert_same_state(ours, plain)


@halves
@modules
def test_nothing_is_widened(name: str, dtype: torch.dtype) -> None:
    module, x = MAKES[name](), sample(dtype)
    for _ in range(2):  # the first tensor sizes the state
        with Widened(x) as watch:
            step(module, x, autocast=dtype)
        assert not watch.found


def test_what_is_widened_is_found() -> None:
    x = sample(torch.bfloat16)
    with Widened(x) as watch:
        x.clamp(-1, 1)
        assert not watch.found
        x.float().clamp(-1, 1)
    assert [found.split(".")[1] for found in watch.found] == ["_to_copy", "clamp"]


def peak_bytes(call: Callable[[], Any]) -> int:
    """What torch's allocator gave out at most at a time: the kernels allocate by it too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    results = profiled.profiler
    assert results is not None
    changes: list[tuple[int, int]] = []

    def walk(events: Any) -> None:
        for event in events:
            if hasattr(event.extra_fields, "alloc_size"):
                changes.append((event.start_time_ns, event.extra_fields.alloc_size))
            walk(event.children)

    walk(results.kineto_results.experimental_event_tree())
    now, most = 0, 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        now += change
        most = max(most, now)
    return most


@pytest.mark.skipif(not po.native_status.cpu, reason="the reference kernels compute in float32")
@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("MovingAverage", 1 / 8),
        ("Fused", 1 / 8),
        ("PerRow", 1 / 8),
        ("Histogram", 1 / 8),
        ("LogHistogram", 1 / 8),
        ("TensorQuantizer", 1 / 8),
        ("Learnable", 0),
    ],
)
def test_memory_of_a_step(name: str, kept: float) -> None:
    """The output, the gradient, and one bit an element; Learnable keeps its input instead."""
    module = MAKES[name]()
    x = torch.randn(4096, SHAPE[1]).bfloat16().requires_grad_()
    grad = torch.ones_like(x)
    with torch.autocast("cpu", torch.bfloat16):
        module(x)
        taken = peak_bytes(lambda: module(x).backward(grad))
    expected = 2 * x.nbytes + kept * x.numel()
    assert expected <= taken <= expected + 0.1 * x.nbytes


class Block(nn.Module):
    """Convolution, batch norm and a linear layer, their inputs and weights quantized."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.linear = (
            nn.Conv2d(2, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.Linear(4, 3),
        )
        self.inputs = nn.ModuleList(
            [po.default_fused_act_fake_quant(), po.FakeQuantize(po.LogHistogramObserver)]
        )
        self.weights = nn.ModuleList([po.default_per_channel_weight_fake_quant() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.inputs[0](x), self.weights[0](self.conv.weight))
        x = self.norm(x).relu().mean((2, 3))
        return F.linear(self.inputs[1](x), self.weights[1](self.linear.weight), self.linear.bias)


def images(seed: int = 0) -> Tensor:
    return torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(seed))


def loss_of(y: Tensor) -> Tensor:
    return F.cross_entropy(y.float(), torch.arange(8) % 3)


@halves
def test_a_step_of_a_model(dtype: torch.dtype) -> None:
    """Near the one of float32, its weights' statistics those of the float32 weights."""
    model = Block()
    wide = copy.deepcopy(model)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for fake in (*model.inputs, *model.weights):
        fake.register_forward_hook(lambda m, args, y: seen.append((args[0].dtype, y.dtype)))
    with torch.autocast("cpu", dtype):
        y = model(images())
        loss = loss_of(y)
    loss.backward()
    expected = loss_of(wide(images()))
    expected.backward()
    assert y.dtype == dtype
    assert all(before == after for before, after in seen)
    assert {before for before, _ in seen} <= {dtype, torch.float32}
    assert_same_state(model.weights, wide.weights)
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.02)
    for got, want in zip(model.parameters(), wide.parameters(), strict=True):
        assert got.grad is not None
        assert want.grad is not None
        assert got.grad.dtype == torch.float32
        assert F.cosine_similarity(got.grad.flatten(), want.grad.flatten(), 0) > 0.9


def test_a_scaled_loss() -> None:
    """The scaler's unscaled gradients; a step whose gradients overflow is left out, then taken."""
    model = Block()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def scaled_step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model(images()))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    before = [p.detach().clone() for p in model.parameters()]
    scaled_step()
    assert scaler.get_scale() == 2.0**8
    taken = [p.detach().clone() for p in model.parameters()]
    assert not any(torch.equal(old, new) for old, new in zip(before, taken, strict=True))
    scaler.update(2.0**40)
    scaled_step()
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(old, p) for old, p in zip(taken, model.parameters(), strict=True))
    statistics = [
        buffer for name, buffer in model.named_buffers() if "fake" in name or "val" in name
    ]
    assert all(bool(buffer.isfinite().all()) for buffer in statistics)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_gradients_that_overflow_pass_as_in_torch(dtype: torch.dtype) -> None:
    """A clipped infinity is NaN there, so a scaler finds it; tensor_quant's is 0, as NVIDIA's."""
    x = torch.tensor([-9.0, -0.5, 0.5, 9.0] * 3)
    inf, nan = torch.inf, torch.nan
    grad = torch.tensor([inf] * 4 + [-inf] * 4 + [nan] * 4)
    theirs = x.clone().requires_grad_()
    torch.fake_quantize_per_tensor_affine(theirs, 0.01, 0, -128, 127).backward(grad)
    ours = x.clone().to(dtype).requires_grad_()
    scale, zero_point = torch.tensor([0.01]), torch.zeros(1, dtype=torch.int32)
    po.ops.fake_quantize(ours, scale, zero_point, -128, 127).backward(grad.to(dtype))
    torch.testing.assert_close(ours.grad, theirs.grad.to(dtype), equal_nan=True, rtol=0, atol=0)
    nvidia = x.clone().to(dtype).requires_grad_()
    po.ops.fake_tensor_quant(nvidia, torch.tensor(1.28)).backward(grad.to(dtype))
    expected = torch.where(x.abs() <= 1.28, grad, 0.0).to(dtype)
    torch.testing.assert_close(nvidia.grad, expected, equal_nan=True, rtol=0, atol=0)


def test_float16_s_rules_of_tensor_quant_under_autocast() -> None:
    """The scale that float16 cannot hold is refused for integers, and harmless in one pass."""
    x = torch.full((4,), 1e-6, dtype=torch.float16)
    with torch.autocast("cpu", torch.float16):
        assert TensorQuantizer(QuantDescriptor(amax=1e-6))(x).dtype == torch.float16
        with pytest.raises(ValueError, match="65504"):
            TensorQuantizer(QuantDescriptor(amax=1e-6, fake_quant=False))(x)
        wide = TensorQuantizer(QuantDescriptor(amax=1e-6, fake_quant=False))(x.float())
    assert wide.dtype == torch.float32


@halves
def test_torchao_s_observed_linear(dtype: torch.dtype) -> None:
    pytest.importorskip("torchao")
    shared = MappingType.ASYMMETRIC, torch.int8
    observers = [
        AffineQuantizedMinMaxObserver(*shared, granularity=each)
        for each in (PerTensor(), PerAxis(0))
    ]
    layer = ObservedLinear.from_float(nn.Linear(SHAPE[1], 5), *observers)
    x = sample(dtype).requires_grad_()
    with torch.autocast("cpu", dtype), Widened(x) as watch:
        y = layer(x)
        y.sum().backward()
    assert y.dtype == dtype
    assert not watch.found
    assert layer.act_obs.max_val == x.detach().float().max()
    assert torch.equal(layer.weight_obs.max_val.flatten(), layer.weight.detach().amax(1))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_under_autocast() -> None:
    model = Block()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for each in (compiled, plain):
        with torch.autocast("cpu", torch.bfloat16):
            each(images())  # the first tensor sizes the state
    for seed in range(2):
        results = []
        for each in (compiled, plain):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(each(images(seed)))
            loss.backward()
            results.append(loss.detach())
        torch.testing.assert_close(*results)
    assert_same_state(model, plain)
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)

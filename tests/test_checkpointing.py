"""Activation checkpointing: a step updates the state once, and its gradients are those without."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from every_module import BATCHES, MAKERS, Maker, state_of
from ops.cases import assert_all_same, assert_same, opcheck
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import pyobserver as po
from pyobserver.ops import recomputation

Forward = Callable[[Tensor], Tensor]
SAVED = (torch.ops.aten.addmm.default, torch.ops.aten.tanh.default, torch.ops.aten.where.self)
TWO = po.MovingAverageMinMaxObserver.with_args(averaging_constant=0.3, quant_min=0, quant_max=15)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def reentrant(f: Forward) -> Forward:
    return lambda x: checkpoint(f, x, use_reentrant=True)


def non_reentrant(f: Forward, **options: Any) -> Forward:
    return lambda x: checkpoint(f, x, use_reentrant=False, **options)


def selective(f: Forward, policy: Callable[..., CheckpointPolicy]) -> Forward:
    return non_reentrant(
        f, context_fn=functools.partial(create_selective_checkpoint_contexts, policy)
    )


def recompute(*_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.PREFER_RECOMPUTE


def save_kernels(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """What is kept is looked for under the same op: the layers' and ours."""
    saved = op.namespace == "pyobserver" or op in SAVED
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def halves(module: nn.Module, way: Callable[[Forward], Forward]) -> Forward:
    """A checkpoint of the whole around checkpoints of its halves."""
    assert isinstance(module, nn.Sequential)
    first, second = way(module[:2]), way(module[2:])
    return lambda x: second(first(x))


WAYS: dict[str, Callable[[nn.Module], Forward]] = {
    "reentrant": reentrant,
    "non_reentrant": non_reentrant,
    "whole": lambda module: non_reentrant(module, early_stop=False),
    "saved": lambda module: selective(module, save_kernels),
    "recomputed": lambda module: selective(module, recompute),
    "nested_reentrant": lambda module: reentrant(halves(module, reentrant)),
    "nested_non_reentrant": lambda module: non_reentrant(halves(module, non_reentrant)),
    "nested_mixed": lambda module: non_reentrant(halves(module, reentrant)),
    "sequential": lambda module: (
        lambda x: checkpoint_sequential(module, 2, x, use_reentrant=False)  # type: ignore[arg-type]
    ),
}


def around(make: Maker) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 5), make(), nn.Tanh(), nn.Linear(5, 5))


def steps(module: nn.Module, call: Forward) -> list[Tensor]:
    """The outputs, gradients and states of some steps."""
    found = []
    for batch in BATCHES:
        module.zero_grad()
        x = batch.clone().requires_grad_()
        y = call(x)
        (y * torch.arange(5)).sum().backward()
        found += [y, x.grad, *(p.grad for p in module.parameters() if p.grad is not None)]
        found += state_of(module)
    return [t.detach().clone() for t in found]


def assert_as_plain(make: Maker, way: Callable[[nn.Module], Forward], context: str) -> None:
    plain, module = around(make), around(make)
    assert_all_same(steps(module, way(module)), steps(plain, plain), context)


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_is_as_without(name: str) -> None:
    for way, checkpointed in WAYS.items():
        assert_as_plain(MAKERS[name], checkpointed, way)


def test_selective_checkpointing_sees_no_switch_made() -> None:
    recomputation._kept_off.cache_clear()
    assert_as_plain(lambda: po.FakeQuantize(TWO), WAYS["recomputed"], "first of the process")


COMPILED = [
    "FakeQuantize_MovingAverage",
    "FakeQuantize_Histogram_l2_greedy",
    "FakeQuantize_MovingAveragePerChannel",
    "Fused",
    "MovingAverage",
    "horizon_MinMax_QAT",
    "horizon_Clip_QAT",
    "TensorQuantizer_clip",
]


@pytest.mark.parametrize("name", COMPILED)
def test_inside_a_compiled_graph(name: str) -> None:
    """Its backward runs the ops again, on the state that the forward has left."""

    def compiled(module: nn.Module) -> Forward:
        return torch.compile(non_reentrant(module), backend="aot_eager", fullgraph=True)

    assert_as_plain(MAKERS[name], compiled, "compiled")


@pytest.mark.parametrize("policy", [save_kernels, recompute])
def test_selectively_inside_a_compiled_graph(policy: Callable[..., CheckpointPolicy]) -> None:
    def compiled(module: nn.Module) -> Forward:
        return torch.compile(selective(module, policy), backend="aot_eager", fullgraph=True)

    assert_as_plain(lambda: po.FakeQuantize(TWO), compiled, policy.__name__)


def test_inductor() -> None:
    def compiled(module: nn.Module) -> Forward:
        return torch.compile(lambda x: reentrant(module[1])(x), fullgraph=True)  # type: ignore[index]

    plain, module = around(lambda: po.FakeQuantize(TWO)), around(lambda: po.FakeQuantize(TWO))
    call, expected = compiled(module), reentrant(plain[1])
    for batch in BATCHES:
        x, other = (batch.clone().requires_grad_() for _ in range(2))
        for given, forward in ((x, call), (other, expected)):
            forward(given).square().sum().backward()
        assert_same(x.grad, other.grad)
    assert_all_same(state_of(module), state_of(plain))


def test_no_checkpoint_adds_nothing_to_a_graph() -> None:
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(po.FakeQuantize(), backend=backend, fullgraph=True)(BATCHES[0])
    assert any("observe_fake_quantize" in name for name in seen)
    assert not any("_unless_in_backward" in name for name in seen)


def test_a_compiled_graph_that_is_checkpointed_counts_twice() -> None:
    """As torch's batch norm does: nothing of the graph knows that it is run again."""
    module = po.MovingAverageMinMaxObserver(0.5)
    graph = torch.compile(nn.Sequential(nn.Tanh(), module), backend="aot_eager", fullgraph=True)
    first, second = BATCHES[0], BATCHES[1].clone().requires_grad_()
    graph(first)
    checkpoint(graph, second, use_reentrant=False).sum().backward()
    twice = po.MovingAverageMinMaxObserver(0.5)
    for x in (first, second, second):
        twice(x.detach().tanh())
    assert_all_same(state_of(module), state_of(twice))


def test_opcheck() -> None:
    for dtype in (torch.uint8, torch.int64, torch.bool):
        opcheck("_unless_in_backward", torch.ones(1, dtype=dtype))
    with pytest.raises(TypeError, match="_unless_in_backward: enabled: expected"):
        torch.ops.pyobserver._unless_in_backward(torch.ones(1))


class _OwnCheckpoint(torch.autograd.Function):
    """As the libraries of large models have it."""

    @staticmethod
    def forward(ctx: Any, f: Forward, x: Tensor) -> Tensor:
        ctx.f = f
        ctx.save_for_backward(x)
        with torch.no_grad():
            return f(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (x,) = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            y = ctx.f(x)
        torch.autograd.backward(y, grad)
        return None, x.grad


def test_a_checkpoint_that_is_not_torchs() -> None:
    assert_as_plain(
        lambda: po.FakeQuantize(TWO),
        lambda module: lambda x: _OwnCheckpoint.apply(module, x),
        "own",
    )


def test_every_call_counts_and_the_last_scale_is_used_again() -> None:
    """Of a module that is called twice in a step."""
    module, plain = (po.FakeQuantize(TWO) for _ in range(2))
    small, large = (BATCHES[0].clone().requires_grad_() for _ in range(2))
    (checkpoint(module, small, use_reentrant=False) * 2).sum().backward(retain_graph=True)
    small.grad = None

    first = checkpoint(module, small, use_reentrant=False)
    second = checkpoint(module, large * 3, use_reentrant=False)
    (first + second).sum().backward()
    for x in (small, small, large * 3):
        plain(x.detach())
    assert_all_same(state_of(module), state_of(plain))

    plain.disable_observer()
    x = small.detach().clone().requires_grad_()
    plain(x).sum().backward()
    assert_same(small.grad, x.grad)


class _RoundedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module = module
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.module(grad), None


@pytest.mark.parametrize("way", [lambda f: f, reentrant, non_reentrant])
def test_gradients_can_be_observed(way: Callable[[Forward], Forward]) -> None:
    """What runs in a backward is not always a forward run again."""
    hooked, function = po.MovingAverageMinMaxObserver(0.5), po.FakeQuantize(TWO)
    expected_hooked, expected_function = po.MovingAverageMinMaxObserver(0.5), po.FakeQuantize(TWO)

    def forward(x: Tensor) -> Tensor:
        y = _RoundedGradient.apply(x * 2, function)
        if y.requires_grad:
            y.register_hook(hooked)
        return y.sin()

    for batch in BATCHES:
        x = batch.clone().requires_grad_()
        way(forward)(x).sum().backward()
        gradient = expected_hooked((batch * 2).cos())
        assert_same(x.grad, expected_function(gradient) * 2)
    assert_all_same(state_of(hooked), state_of(expected_hooked))
    assert_all_same(state_of(function), state_of(expected_function))

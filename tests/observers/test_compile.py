"""D19, D20, D21: observers and fake-quantizers in traced graphs, and on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from every_module import BATCHES, MAKERS, made, public_classes, state_of
from ops.cases import assert_all_same, assert_same
from torch import Tensor, nn

import pyobserver as po

# torch.export's own
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output, the gradients where there are some, and the state after it."""
    x = x.clone().requires_grad_()
    y = call(x)
    found = [y, *state_of(module)]
    if y.requires_grad and y is not x:
        leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
        found += torch.autograd.grad((y * torch.arange(5)).sum(), leaves)
    return [t.detach().clone() for t in found]


def assert_no_more_graphs(
    name: str, compiled: nn.Module, module: nn.Module, xs: list[Tensor]
) -> None:
    """A batch is compiled, the others not; the numbers are those of eager, batch after batch."""
    eager = copy.deepcopy(module)
    for i, x in enumerate(xs):
        stance = "fail_on_recompile" if i > 0 and name not in RECOMPILED else "default"
        with torch.compiler.set_stance(stance):
            assert_all_same(run(module, compiled, x), run(eager, eager, x))


RECOMPILED = {"Recording"}  # a list that grows
# a scale for each block of the batch too
OF_ONE_SHAPE = {"LogHistogram_per_block", "MinMax_per_block"}


def test_no_class_is_left_out() -> None:
    tried = {type(module) for make in MAKERS.values() for module in make().modules()}
    assert public_classes() <= tried


@pytest.mark.once
@pytest.mark.parametrize("name", MAKERS)
def test_compiles_whole(name: str) -> None:
    """One graph without a break."""
    module = made(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_no_more_graphs(name, compiled, module, BATCHES)


def batches(sizes: tuple[int, ...]) -> list[Tensor]:
    return [
        torch.randn(size, 4, 5, generator=torch.Generator().manual_seed(size)) for size in sizes
    ]


@pytest.mark.once
@pytest.mark.parametrize("name", sorted(set(MAKERS) - OF_ONE_SHAPE))
def test_compiles_for_any_batch(name: str) -> None:
    module = made(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    assert_no_more_graphs(name, compiled, module, batches((3, 7, 2)))


@pytest.mark.parametrize(
    "name", ["FakeQuantize_Histogram_l2_greedy", "horizon_MinMax_QAT", "Fused"]
)
def test_compiles_for_a_batch_that_is_marked(name: str) -> None:
    module = made(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    xs = batches((3, 7, 2))

    def marked(x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        return compiled(x)

    for i, x in enumerate(xs):
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            marked(x)
    eager = made(name)
    for x in xs:
        eager(x)
    assert_all_same(state_of(module), state_of(eager))


@pytest.mark.parametrize("name", ["FakeQuantize_MovingAverage", "horizon_Histogram_QAT"])
def test_compiles_once_more_for_another_batch(name: str) -> None:
    """Without a word of it: the second size makes a graph of any size."""
    module = made(name)
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for i, x in enumerate(batches((3, 7, 2, 5))):
        with torch.compiler.set_stance("fail_on_recompile" if i > 1 else "default"):
            assert_all_same(run(module, compiled, x), run(eager, eager, x))


def test_switches_make_no_new_graph() -> None:
    """They are tensors that the kernels read."""
    eager, module = po.FakeQuantize(), po.FakeQuantize()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert_all_same(run(module, compiled, BATCHES[0]), run(eager, eager, BATCHES[0]))
    with torch.compiler.set_stance("fail_on_recompile"):
        for observe, quantize in ((0, 1), (1, 0), (0, 0), (1, 1)):
            for each in (eager, module):
                each.enable_observer(bool(observe))
                each.enable_fake_quant(bool(quantize))
            for x in BATCHES:
                assert_all_same(run(module, compiled, x), run(eager, eager, x))


def test_first_batch_makes_no_new_graph() -> None:
    """D20: whether it is the first is decided where the data is."""
    module = po.MovingAverageMinMaxObserver()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(BATCHES[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(BATCHES[1])
        module.reset_min_max_vals()
        compiled(BATCHES[2])
    assert_same(module.min_val, BATCHES[2].min())


def test_inside_a_model() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 6), po.FakeQuantize(), nn.ReLU(), po.MinMaxObserver())

    eager, module = model(), model()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for x in BATCHES:
        for each in (eager, compiled):
            each.zero_grad()
            each(x).sum().backward()
        assert_same(module[0].weight.grad, eager[0].weight.grad)
    assert_all_same(list(module.buffers()), list(eager.buffers()))


@pytest.mark.once
@pytest.mark.parametrize(
    "name",
    ["FakeQuantize_MovingAverage", "Histogram_mse", "horizon_Clip_QAT", "TensorQuantizer_clip"],
)
def test_inductor(name: str) -> None:
    module = made(name)
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    assert_no_more_graphs(name, compiled, module, batches((3, 7)))


@pytest.mark.parametrize("name", MAKERS)
def test_meta_device(name: str) -> None:
    """D19: shapes can be worked out without the data."""
    module = made(name).to("meta")
    x = torch.empty(3, 4, 5, device="meta")
    y = module(x)
    assert (y.shape, y.device.type) == (x.shape, "meta")
    assert all(t.device.type == "meta" for t in module.buffers())


def test_meta_construction() -> None:
    for cls in (
        po.MinMaxObserver,
        po.HistogramObserver,
        po.LogHistogramObserver,
        po.PerChannelLogHistogramObserver,
        po.PerChannelMinMaxObserver,
    ):
        module = cls(factory_kwargs={"device": "meta"})
        assert all(t.device.type == "meta" for t in module.buffers())
        module(torch.empty(3, 4, device="meta"))

"""D19, D20, D21: observers and fake-quantizers in traced graphs, and on the meta device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from ops.cases import assert_all_same, assert_same
from torch import Tensor, nn

import pyobserver as po

MAKERS: dict[str, Callable[[], nn.Module]] = {
    "MinMax": po.MinMaxObserver,
    "MinMax_memoryless": lambda: po.MinMaxObserver(memoryless=True),
    "MovingAverage": lambda: po.MovingAverageMinMaxObserver(0.3),
    "PerChannel": lambda: po.PerChannelMinMaxObserver(1, num_channels=4),
    "PerChannel_unsized": lambda: po.PerChannelMinMaxObserver(-1),
    "MovingAveragePerChannel": lambda: po.MovingAveragePerChannelMinMaxObserver(
        0.3, 1, num_channels=4
    ),
    "Histogram": lambda: po.HistogramObserver(bins=64),
    "Histogram_aligned": lambda: po.HistogramObserver(bins=64, combine="aligned"),
    "Histogram_mse": lambda: po.HistogramObserver(bins=64, method="mse"),
    "LogHistogram": lambda: po.LogHistogramObserver(3),
    "LogHistogram_per_channel": lambda: po.PerChannelLogHistogramObserver(1, 3, num_channels=4),
    "FixedQParams": lambda: po.FixedQParamsObserver(0.1, 3),
    "Noop": po.NoopObserver,
    "Placeholder": po.PlaceholderObserver,
    "ReuseInput": po.ReuseInputObserver,
    "FakeQuantize": po.FakeQuantize,
    "FakeQuantize_histogram": lambda: po.FakeQuantize(po.HistogramObserver, bins=64),
    "FakeQuantize_kl": lambda: po.FakeQuantize(po.KLObserver, bins=64, mantissa_bits=3),
    "FakeQuantize_log_per_channel": lambda: po.FakeQuantize(
        po.PerChannelLogHistogramObserver,
        qscheme=torch.per_channel_symmetric,
        dtype=torch.qint8,
        ch_axis=1,
        num_channels=4,
        mantissa_bits=3,
    ),
    "FakeQuantize_per_channel": lambda: po.FakeQuantize(
        po.MovingAveragePerChannelMinMaxObserver,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=1,
        num_channels=4,
    ),
    "FixedQParamsFakeQuantize": po.default_fixed_qparams_range_0to1_fake_quant,
    "Fused": po.FusedMovingAvgObsFakeQuantize,
}
BATCHES = [
    torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(3)
]


# torch.export's own
pytestmark = pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def run(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The output, the gradient where there is one, and the state after it."""
    x = x.clone().requires_grad_()
    y = call(x)
    found = [y, *module.buffers()]
    if y.requires_grad and y is not x:
        found += torch.autograd.grad((y * torch.arange(5)).sum(), x)
    return [t.detach().clone() for t in found]


@pytest.mark.parametrize("name", MAKERS)
def test_compiles_whole(name: str) -> None:
    """One graph without a break; the numbers are those of eager, batch after batch."""
    eager = MAKERS[name]()
    module = copy.deepcopy(eager)
    if name == "PerChannel_unsized":
        for each in (eager, module):
            each(BATCHES[0])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for x in BATCHES:
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


def test_inductor() -> None:
    eager, module = po.FakeQuantize(), po.FakeQuantize()
    compiled = torch.compile(module, fullgraph=True)
    for x in BATCHES[:2]:
        assert_all_same(run(module, compiled, x), run(eager, eager, x))


@pytest.mark.parametrize("name", MAKERS)
def test_exports(name: str) -> None:
    """The exported module updates its state as the module does."""
    eager = MAKERS[name]()
    if name == "PerChannel_unsized":
        eager(BATCHES[0])
    exported = torch.export.export(copy.deepcopy(eager), (BATCHES[0],)).module()
    for x in BATCHES:
        assert_same(exported(x), eager(x))
    expected = dict(eager.named_buffers())
    for key, value in exported.named_buffers():
        assert_same(value, expected[key], key)


@pytest.mark.parametrize("name", MAKERS)
def test_meta_device(name: str) -> None:
    """D19: shapes can be worked out without the data."""
    module = MAKERS[name]().to("meta")
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

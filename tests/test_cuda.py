"""What CUDA asks beyond the same numbers: no sync, few launches, graphs, the current stream.

On a GPU, and, what can be counted there, on the device in software (see ``backends``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from backends import (
    GPU,
    ON_HOST,
    Backend,
    as_param,
    cuda_on_host,
    needs_device_in_software,
    params,
)
from ops.cases import assert_all_same
from ops.work import SEARCHES, WORK, values
from readback import NoReadback, OnDevice
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pyobserver as po
from pyobserver import ranges
from pyobserver.ops import recomputation
from pyobserver.tensor_quant import QuantDescriptor, TensorQuantizer

pytestmark = pytest.mark.once
on_gpu = pytest.mark.parametrize("gpu", [as_param(GPU)])
on_cuda = pytest.mark.parametrize("cuda", params(lambda backend: backend.cuda))

OBSERVERS: dict[str, Callable[[], nn.Module]] = {
    "minmax": po.MinMaxObserver,
    "moving_average": po.MovingAverageMinMaxObserver,
    "per_channel": lambda: po.PerChannelMinMaxObserver(ch_axis=1),
    "per_channel_moving_average": lambda: po.MovingAveragePerChannelMinMaxObserver(ch_axis=0),
    "histogram": po.HistogramObserver,
    "log_histogram": po.LogHistogramObserver,
    "per_channel_log_histogram": lambda: po.PerChannelLogHistogramObserver(ch_axis=1),
    "per_block_minmax": lambda: po.PerBlockMinMaxObserver(block_size=(1, 20)),
    "per_block_log_histogram": lambda: po.PerBlockLogHistogramObserver(block_size=(1, 20)),
}
FAKE_QUANTIZES: dict[str, Callable[[], nn.Module]] = {
    "fake_quantize": po.FakeQuantize,
    "fake_quantize_minmax": lambda: po.FakeQuantize(po.MinMaxObserver),
    "fake_quantize_per_channel": lambda: po.FakeQuantize(
        po.PerChannelMinMaxObserver, ch_axis=1, dtype=torch.qint8, quant_min=-128, quant_max=127
    ),
    "fake_quantize_histogram": lambda: po.FakeQuantize(po.HistogramObserver),
    "fake_quantize_fixed": lambda: po.FixedQParamsFakeQuantize(
        po.FixedQParamsObserver.with_args(scale=0.05, zero_point=8)
    ),
    "fused": po.FusedMovingAvgObsFakeQuantize,
    "learnable": po.LearnableFakeQuantize,
    "learnable_per_channel": lambda: po.LearnableFakeQuantize(
        po.PerChannelMinMaxObserver,
        ch_axis=1,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    ),
    "learnable_per_block": lambda: po.LearnableFakeQuantize(
        po.PerBlockMinMaxObserver, block_size=(1, 20)
    ),
}
HISTOGRAMS = (po.HistogramObserver, po.LogHistogramObserver)
MODULES = {**OBSERVERS, **FAKE_QUANTIZES}
SHAPE = (50, 200)


def batches(device: str) -> list[Tensor]:
    """The later ones are wider, so that ranges grow."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((4, *SHAPE), generator=generator)
    return [(batch * (1 + i)).to(device) for i, batch in enumerate(x)]


def state(module: nn.Module) -> list[Tensor]:
    return [t.detach().cpu().clone() for t in module.state_dict().values() if t is not None]


def fed_on_cpu(make: Callable[[], nn.Module], count: int) -> tuple[list[Tensor], Tensor]:
    """The state after so many batches, and the last output."""
    module = make()
    for x in batches("cpu")[:count]:
        y = module(x)
    return state(module), y


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replay(graph: torch.cuda.CUDAGraph) -> None:
    graph.replay()
    torch.cuda.synchronize()


@needs_device_in_software
@pytest.mark.parametrize("name", OBSERVERS)
def test_an_observer_takes_two_launches_and_no_sync(name: str) -> None:
    with ON_HOST.selected():
        module = OBSERVERS[name]()
        for x in batches("cpu"):
            with ON_HOST.asked(launches=range(3), memsets=None):
                module(x)


@needs_device_in_software
@pytest.mark.parametrize(
    "name", ["fake_quantize", "fake_quantize_minmax", "fake_quantize_per_channel", "fused"]
)
@pytest.mark.parametrize("gradient", [False, True])
def test_a_fake_quantize_takes_two_launches_and_no_sync(name: str, gradient: bool) -> None:
    with ON_HOST.selected():
        module = FAKE_QUANTIZES[name]()
        first, *others = batches("cpu")
        module(first)  # a per-channel state gets its size
        for x in others:
            with ON_HOST.asked(launches=range(3), memsets=None):
                y = module(x.requires_grad_(gradient))
            if gradient:
                with ON_HOST.asked(launches=range(2), memsets=None):
                    y.backward(torch.ones_like(y))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("gradient", [False, True])
def test_a_module_reads_nothing_back(name: str, gradient: bool) -> None:
    backend = Backend("cpu") if cuda_on_host() is None else ON_HOST
    with backend.selected():
        module = MODULES[name]()
        for x in batches("cpu"):
            with NoReadback():
                y = module(x.requires_grad_(gradient))
                if y.requires_grad:
                    y.backward(torch.ones_like(y))


def test_reading_back_is_found() -> None:
    x = torch.ones(3)
    for read in (lambda: x.sum().item(), lambda: bool(x[0]), lambda: x[x > 0], x.nonzero):
        with pytest.raises(AssertionError, match="waits for the device"), NoReadback():
            read()


METHODS = tuple(ranges.METHODS)
STATISTICS = {
    "histogram": po.HistogramObserver,
    "log_histogram": po.LogHistogramObserver,
    "per_channel_log_histogram": lambda **options: po.PerChannelLogHistogramObserver(
        ch_axis=1, **options
    ),
}
SCHEMES = {
    "affine": {},
    "symmetric": {"qscheme": torch.per_tensor_symmetric, "dtype": torch.qint8},
    "power_of_two": {"scale_constraint": "power_of_two"},
    "fp16": {"scale_constraint": "fp16"},
}


def asked(name: str, method: str, scheme: str) -> nn.Module:
    """An observer of a histogram that was fed."""
    options = dict(SCHEMES[scheme])
    if "channel" in name and scheme == "symmetric":
        options["qscheme"] = torch.per_channel_symmetric
    few = {"bins": 64, "start_bin": 32} if method == "kl" else {}  # the reference is slow
    observer = STATISTICS[name](method=method, method_kwargs=few, **options)
    observer(batches("cpu")[0])
    return observer


every_method = pytest.mark.parametrize("method", METHODS)
every_statistic = pytest.mark.parametrize("name", STATISTICS)
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@every_method
@every_statistic
@every_scheme
def test_a_method_reads_nothing_back(name: str, method: str, scheme: str) -> None:
    observer = asked(name, method, scheme)
    scale, zero_point = observer.calculate_qparams()
    enabled = torch.ones(1, dtype=torch.uint8)
    with NoReadback():
        observer.write_qparams(scale.clone(), zero_point.clone(), enabled)
        observer.calculate_qparams()


@every_method
@every_statistic
@every_scheme
def test_a_method_stays_on_its_device(name: str, method: str, scheme: str) -> None:
    """Nothing is made on the host and copied: the meta device has the part of another one."""
    observer = asked(name, method, scheme)
    found = [t.to("meta") for t in observer.calculate_qparams()]
    observer.to("meta")
    with OnDevice("meta"):
        observer.write_qparams(*found)


def test_leaving_the_device_is_found() -> None:
    x = torch.ones(3, device="meta")
    for leave in (lambda: torch.ones(3).to("meta"), lambda: x + torch.ones(())):
        with pytest.raises(AssertionError, match="tensor of cpu"), OnDevice("meta"):
            leave()


@every_method
def test_many_observers_wait_once(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    observers = [asked(name, method, "affine") for name in STATISTICS for _ in range(2)]
    reads = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda t: reads.append(t) or tolist(t))
    with NoReadback():
        po.calculate_qparams(observers)
    assert len(reads) == 1


def searches(count: int) -> dict[str, Callable[[], object]]:
    """The searches, of so many histograms each."""
    counts = torch.arange(24.0, dtype=torch.float64).expand(count, 24).contiguous()
    edges = torch.linspace(-1, 1, 25, dtype=torch.float64)
    ends = torch.full((count,), -1.0), torch.ones(count)
    scale, zero = torch.ones(count), torch.zeros(count, dtype=torch.int32)
    out = scale, zero, counts.new_zeros(count, 3)
    return {
        "range_search": lambda: po.ops.range_search(counts, *ends, 16),
        "kl_search": lambda: po.ops.kl_search(counts, 8, 10),
        "lp_search": lambda: po.ops.lp_search(counts, edges, *ends, *out, 0, 15),
        "lp_search_of_power": lambda: po.ops.lp_search(counts, edges, *ends, *out, 0, 15, 2.4),
        "lp_error": lambda: po.ops.lp_error(counts, edges, *ends, scale, zero, 0, 15),
    }


@needs_device_in_software
@pytest.mark.parametrize("name", searches(1))
@pytest.mark.parametrize("count", [0, 1, 20])
def test_a_search_of_many_takes_one_launch(name: str, count: int) -> None:
    with ON_HOST.selected(), ON_HOST.asked(launches=min(count, 1), memsets=None):
        searches(count)[name]()


@needs_device_in_software
@pytest.mark.parametrize(
    ("groups", "options"),
    [
        ((1,), {}),
        ((50,), {"axis": 0}),
        ((300,), {"axis": 1}),
        ((50, 15), {"block_size": (1, 20)}),
        ((10, 100), {"block_size": (5, 3)}),
    ],
    ids=str,
)
def test_fake_quantize_takes_one_launch(groups: tuple[int, ...], options: dict[str, Any]) -> None:
    scale = torch.ones(groups)
    for x in (torch.ones(50, 300), torch.ones(300, 50).t(), torch.ones(50, 600)[:, ::2]):
        with ON_HOST.asked(launches=range(2), memsets=None):
            y, mask = ON_HOST.op("_fake_quantize_mask")(x, scale, scale.int(), -8, 7, **options)
        with ON_HOST.asked(launches=range(2), memsets=None):
            ON_HOST.op("_fake_quantize_backward")(y, mask)


@needs_device_in_software
def test_an_empty_tensor_takes_no_launch() -> None:
    with ON_HOST.selected():
        for make in MODULES.values():
            module = make()
            module(batches("cpu")[0])
            launches = range(2 if isinstance(module, po.FakeQuantize) else 1)
            with ON_HOST.asked(launches, memsets=None):
                module(torch.empty(0, SHAPE[1]))


@on_cuda
@pytest.mark.parametrize("bins", [1400, 1487, 1488, 1535, 1536])
def test_shared_memory_has_room_for_a_kernels_variables(cuda: Backend, bins: int) -> None:
    """About the 48 KB that a launch has unasked, those among them."""
    counts = torch.arange(bins, 0, -1, dtype=torch.float64)
    expected = po.ops.kl_search(counts, 8, bins - 9)
    found = cuda.op("kl_search")(counts.to(cuda.device), 8, bins - 9)
    assert_all_same([found.cpu()], [expected])


@on_cuda
@pytest.mark.parametrize("name", MODULES)
def test_a_module_has_the_numbers_of_the_cpu(cuda: Backend, name: str) -> None:
    expected, expected_y = fed_on_cpu(MODULES[name], 4)
    with cuda.selected():
        module = MODULES[name]().to(cuda.device)
        for x in batches(cuda.device):
            y = module(x)
    assert_all_same([*state(module), y.detach().cpu()], [*expected, expected_y], name)


def solved(method: str, device: str) -> list[Tensor]:
    """Scales and zero points, one by one and of all observers at once."""
    observers = [make(method=method).to(device) for make in HISTOGRAMS for _ in range(2)]
    for observer, x in zip(observers, batches(device), strict=True):
        observer(x)
    alone = [observer.calculate_qparams() for observer in observers]
    return [t.cpu() for pair in [*alone, *po.calculate_qparams(observers)] for t in pair]


@on_cuda
@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "kl", "l2_greedy"])
def test_a_range_is_that_of_the_cpu(cuda: Backend, method: str) -> None:
    expected = solved(method, "cpu")
    with cuda.selected():
        found = solved(method, cuda.device)
    assert_all_same(found, expected, method)


@pytest.mark.parametrize("name", WORK)
def test_the_work_of_an_op_stays_on_its_device(name: str) -> None:
    """So that a GPU runs it without a sync, and in a graph."""
    x = torch.empty(300_000, device="meta")
    WORK[name](Backend("cpu").op, x)  # what is made once
    with OnDevice("meta"):
        WORK[name](Backend("cpu").op, x)


@on_gpu
@pytest.mark.parametrize("name", WORK)
def test_an_op_does_not_sync(gpu: Backend, name: str) -> None:
    x = values(torch.float32, name not in SEARCHES, gpu.device)
    WORK[name](gpu.op, x)  # what is made once
    with no_sync():
        WORK[name](gpu.op, x)


@on_gpu
@pytest.mark.parametrize("name", MODULES)
def test_a_module_does_not_sync(gpu: Backend, name: str) -> None:
    module = MODULES[name]().to(gpu.device)
    inputs = batches(gpu.device)
    module(inputs[0])  # a per-channel state gets its size
    with no_sync():
        for x in inputs[1:]:
            module(x)
    with no_sync():
        y = module(inputs[0].requires_grad_())
        if y.requires_grad:
            y.backward(torch.ones_like(y))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", WORK)
def test_an_op_is_captured_in_a_graph(gpu: Backend, name: str, dtype: torch.dtype) -> None:
    x = values(dtype, name not in SEARCHES, gpu.device)
    expected = [t.clone() for t in WORK[name](gpu.op, x)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found: Sequence[Tensor] = WORK[name](gpu.op, x)
    for _ in range(2):
        for t in found:
            t.fill_(1)
        replay(graph)
        assert_all_same([t.cpu() for t in found], [t.cpu() for t in expected], name)


@on_gpu
@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_captured_in_a_graph(gpu: Backend, name: str) -> None:
    expected, expected_y = fed_on_cpu(MODULES[name], 4)
    inputs = batches(gpu.device)
    module = MODULES[name]().to(gpu.device)
    x = inputs[0].clone()
    module(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = module(x)
    for batch in inputs[1:]:
        x.copy_(batch)
        replay(graph)
    assert_all_same([*state(module), y.detach().cpu()], [*expected, expected_y], name)


Training = tuple[nn.Sequential, torch.optim.Optimizer, po.QATSchedule]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=1e-4, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=1e-3, capturable=True),
}


def training(device: str, optimizer: str = "sgd") -> Training:
    """A model of everything that learns; its other parts are torch's elementwise ops."""
    parts = [
        po.FakeQuantize(),
        TensorQuantizer(QuantDescriptor(amax=3.0, learn_amax=True)),
        po.LearnableFakeQuantize(
            po.MovingAveragePerChannelMinMaxObserver, ch_axis=1, num_channels=SHAPE[1]
        ),
    ]
    freeze_from = None
    if device == "cuda":  # on the CPU it reads its switch
        parts, freeze_from = [po.FreezableBatchNorm1d(SHAPE[1]), *parts], 2
    model = nn.Sequential(*parts).to(device)
    schedule = po.QATSchedule(
        model, fake_quant_from=1, freeze_batch_norm_from=freeze_from, observer_until=3
    )
    return model, OPTIMIZERS[optimizer](model.parameters()), schedule


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    y = model(x)
    optimizer.zero_grad()
    y.square().sum().backward()
    optimizer.step()
    return y


def trained(model: nn.Module) -> dict[str, Any]:
    """Its state and its gradients."""
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters()}
    return {**model.state_dict(), **gradients}


def test_a_training_step_reads_nothing_back() -> None:
    """Nor does a step of the schedule; and the numbers are those of the CPU."""
    backend = Backend("cpu") if cuda_on_host() is None else ON_HOST
    expected, expected_optimizer, expected_schedule = training("cpu")
    model, optimizer, schedule = training("cpu")
    for x in batches("cpu") * 2:
        expected_y = train(expected, expected_optimizer, x)
        expected_schedule.step()
        with backend.selected(), NoReadback():
            y = train(model, optimizer, x)
            schedule.step()
        assert_all_same([y.detach()], [expected_y.detach()])
        for name, value in trained(expected).items():
            assert_all_same([trained(model)[name].detach()], [value.detach()], name)
    learned = model[-1]
    assert isinstance(learned, po.LearnableFakeQuantize)
    assert learned.scale.grad is not None
    assert learned.scale.grad.count_nonzero() > 0


@on_gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_training_step_is_captured_in_a_graph(gpu: Backend, optimizer: str) -> None:
    """The schedule turns its switches between the replays."""
    eager, eager_optimizer, eager_schedule = training(gpu.device, optimizer)
    captured, its_optimizer, schedule = training(gpu.device, optimizer)
    x = torch.ones(SHAPE, device=gpu.device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        train(captured, its_optimizer, x)  # the optimizer makes its state
    torch.cuda.current_stream().wait_stream(side)
    captured.load_state_dict(eager.state_dict())
    for made in its_optimizer.state.values():
        for t in made.values():
            t.zero_()
    its_optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = train(captured, its_optimizer, x)
    for batch in batches(gpu.device) * 2:
        x.copy_(batch)
        replay(graph)
        torch.testing.assert_close(y, train(eager, eager_optimizer, batch))
        torch.testing.assert_close(trained(captured), trained(eager))
        schedule.step()
        eager_schedule.step()


@on_gpu
def test_a_checkpoint_in_a_graph_keeps_none_of_its_memory(gpu: Backend) -> None:
    """The switch of a recomputation that is made in a capture is not zero before a replay."""
    model = po.FakeQuantize().to(gpu.device)
    x = batches(gpu.device)[0].requires_grad_()
    call = partial(checkpoint, model, x, use_reentrant=False, preserve_rng_state=False)
    torch.autograd.grad(call().sum(), x)
    recomputation._kept_off.cache_clear()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.autograd.grad(call().sum(), x)
    assert recomputation._kept_off.cache_info().currsize == 0


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of the parameters."""
    y = model(x)
    return y, list(torch.autograd.grad(y.square().sum(), model.parameters()))


@on_gpu
@pytest.mark.parametrize("frozen", [False, True])
def test_a_batch_norm_is_that_of_torch(gpu: Backend, frozen: bool) -> None:
    ours = po.FreezableBatchNorm1d(SHAPE[1], device=gpu.device)
    theirs = nn.BatchNorm1d(SHAPE[1], device=gpu.device)
    if frozen:
        ours.freeze_bn_stats()
        theirs.eval()
    for batch in batches(gpu.device):
        torch.testing.assert_close(gradients(ours, batch), gradients(theirs, batch))
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(getattr(ours, name), buffer)


@on_gpu
@pytest.mark.parametrize("name", WORK)
def test_an_op_runs_on_the_current_stream(gpu: Backend, name: str) -> None:
    x = values(torch.float32, name not in SEARCHES, gpu.device)
    expected = WORK[name](gpu.op, x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = x * 0
        torch.cuda._sleep(20_000_000)  # a kernel of another stream would read zeros
        late.copy_(x)
        found = WORK[name](gpu.op, late)
    stream.synchronize()
    assert_all_same([t.cpu() for t in found], [t.cpu() for t in expected], name)


@on_gpu
def test_gradients_go_through_cpp(gpu: Backend) -> None:
    assert po.native_status.autograd is not None, po.native_status.autograd_reason


@on_gpu
def test_a_nonfinite_value_is_raised_and_changes_nothing(gpu: Backend) -> None:
    for make in (po.MinMaxObserver, po.HistogramObserver, po.LogHistogramObserver):
        module = make(nonfinite="raise").to(gpu.device)
        module(torch.ones(10, device=gpu.device))
        before = state(module)
        with pytest.raises(ValueError, match=r"expected finite values, got 1 .* of 3"):
            module(torch.tensor([1.0, torch.nan, 2.0], device=gpu.device))
        assert_all_same(state(module), before)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_the_device_is_that_of_the_tensor(gpu: Backend) -> None:
    observer = po.MinMaxObserver().to("cuda:1")
    observer(torch.arange(5.0, device="cuda:1"))
    assert observer.max_val.item() == 4.0
    assert torch.cuda.current_device() == 0

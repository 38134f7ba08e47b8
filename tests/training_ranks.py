"""What the ranks of ``test_distributed.py`` run in training: every check, in one process group.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/training_ranks.py

Each rank makes the data of all ranks, so that it knows what they must come to together.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as saved
import torch.nn.functional as F
from distributed_ranks import (
    assert_same_on_all_ranks,
    counting_all_reduces,
    counts,
    per_channel_counts,
    run,
    state_bytes,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import pyobserver as po
from pyobserver import horizon
from pyobserver.distributed import sync, sync_after_forward
from pyobserver.tensor_quant import QuantDescriptor, TensorQuantizer

IN, HIDDEN, OUT, ROWS, STEPS = 4, 6, 3, 8, 3


def batch(rank: int, step: int, unfed: tuple[int, int] | None = None) -> Tensor:
    """Another spread on each rank and in each step."""
    generator = torch.Generator().manual_seed(100 * rank + step)
    x = torch.randn(ROWS, IN, generator=generator) * (1 + rank) + step / 4
    return x[:0] if (rank, step) == unfed else x


class QuantizedLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.weight_fake_quant = po.default_per_channel_weight_fake_quant(num_channels=outputs)
        self.input_fake_quant = po.default_fake_quant()

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_fake_quant(self.linear.weight)
        return F.linear(self.input_fake_quant(x), weight, self.linear.bias)


def linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(QuantizedLinear(IN, HIDDEN), nn.ReLU(), QuantizedLinear(HIDDEN, OUT))


class Model(nn.Module):
    """A fake-quantize of every kind, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = QuantizedLinear(IN, HIDDEN)
        per_channel = {"qscheme": torch.per_channel_affine, "ch_axis": 1}
        self.between = nn.Sequential(
            po.FakeQuantize(po.MinMaxObserver),
            po.FusedMovingAvgObsFakeQuantize(),
            po.FakeQuantize(po.PerChannelMinMaxObserver, **per_channel),
            po.FakeQuantize(po.HistogramObserver, bins=64),
            po.FakeQuantize(counts),
            po.LearnableFakeQuantize(counts, grad_factor="features"),
            po.LearnableFakeQuantize(
                po.MovingAveragePerChannelMinMaxObserver,
                grad_factor="features",
                num_channels=HIDDEN,
                **per_channel,
            ),
            TensorQuantizer(QuantDescriptor(learn_amax=True, amax=2.0)),
        )
        self.last = QuantizedLinear(HIDDEN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)).relu())


def train(
    model: nn.Module, steps: Iterable[int] = range(STEPS), unfed: tuple[int, int] | None = None
) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in steps:
        optimizer.zero_grad()
        loss_of(model(batch(dist.get_rank(), step, unfed))).backward()
        optimizer.step()


def loss_of(y: Tensor) -> Tensor:
    return y.square().sum()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_same_parameters(model: nn.Module) -> None:
    own = {name: full(p.detach()) for name, p in model.named_parameters()}
    first = [own]
    dist.broadcast_object_list(first)
    assert all(torch.equal(own[name], p) for name, p in first[0].items())


def ranks_stay_alike_under_ddp() -> None:
    options: tuple[dict[str, Any], ...] = (
        {},
        {"broadcast_buffers": False, "gradient_as_bucket_view": True},
        {"find_unused_parameters": True},
        {"static_graph": True},
    )
    for kwargs in options:
        for unfed in (None, (1, 0), (0, 1)):
            model = DistributedDataParallel(Model(), **kwargs)
            sync_after_forward(model)
            train(model, unfed=unfed)
            assert_same_parameters(model)
            assert_same_on_all_ranks(model, own=())
            model.apply(po.enable_param_learning)
            scale = model.module.between[5].scale.detach().clone()
            train(model, unfed=unfed)
            assert_same_parameters(model)
            assert not torch.equal(model.module.between[5].scale, scale)
            sync(model)  # which leaves what is learned
            assert_same_parameters(model)


def statistics_are_those_of_one_process() -> None:
    """Of observers that see the data itself; what is behind a scale sees other values."""

    def make() -> nn.Sequential:
        return nn.Sequential(
            po.MinMaxObserver(),
            po.PerChannelMinMaxObserver(ch_axis=1),
            counts(),
            per_channel_counts(ch_axis=1),
            nn.Linear(IN, IN),
        )

    for kwargs in ({}, {"broadcast_buffers": False}):
        for unfed in (None, (0, 0), (1, 0), (1, 2)):
            mine, everything = make(), make()
            everything.load_state_dict(mine.state_dict())
            model = DistributedDataParallel(mine, **kwargs)
            sync_after_forward(model)
            for step in range(STEPS):
                spread = [batch(rank, step, unfed) for rank in range(2)]
                for x in spread:
                    x[:1] = torch.nan
                    everything(x)
                model(spread[dist.get_rank()])
                assert state_bytes(mine) == state_bytes(everything), (kwargs, unfed, step)


def moving_averages_take_the_mean_of_the_ranks() -> None:
    mine = po.FakeQuantize(po.MovingAverageMinMaxObserver, averaging_constant=0.25)
    sync_after_forward(mine)
    expected: list[float] = []
    for step in range(STEPS):
        ends = [float(batch(rank, step).max()) for rank in range(2)]
        seen = sum(ends) / 2
        expected.append(seen if not expected else expected[-1] + 0.25 * (seen - expected[-1]))
        mine(batch(dist.get_rank(), step))
        torch.testing.assert_close(mine.activation_post_process.max_val, torch.tensor(expected[-1]))
        assert_same_on_all_ranks(mine, own=())
    before = state_bytes(mine, own=())
    sync(mine)  # of ranks that are alike: again and again the same
    assert state_bytes(mine, own=()) == before


def what_syncs_itself_is_left_alone() -> None:
    mine = nn.Sequential(horizon.HistogramObserver(), horizon.MinMaxObserver())
    everything = horizon.HistogramObserver(is_sync_quantize=False)
    sync_after_forward(mine)
    for step in range(2):
        everything(torch.cat([batch(rank, step) for rank in range(2)]))
        mine(batch(dist.get_rank(), step))
    assert state_bytes(mine[0]) == state_bytes(everything)


def linear_histograms_count_each_value_once() -> None:
    ends = torch.tensor([-20.0, 20.0])  # so that the range is there from the first batch on
    mine, everything = (po.HistogramObserver(bins=32) for _ in range(2))
    grown = po.HistogramObserver(bins=32)
    sync_after_forward(mine)
    sync_after_forward(grown)
    for step in range(4):
        spread = [batch(rank, step) for rank in range(2)]
        for x in spread:
            everything(torch.cat((ends, x.flatten())))
        mine(torch.cat((ends, spread[dist.get_rank()].flatten())))
        assert state_bytes(mine) == state_bytes(everything)
        grown(spread[dist.get_rank()] * 3.0**step)
        assert_same_on_all_ranks(grown)
        assert abs(float(grown.histogram.sum()) - 2 * ROWS * IN * (step + 1)) <= 2 * step
    assert bool((grown.histogram >= 0).all())


def assert_ranks_differ(module: nn.Module) -> None:
    states: list[Any] = [None, None]
    dist.all_gather_object(states, state_bytes(module))
    assert states[0] != states[1]


def without_it_ddp_keeps_those_of_the_first_rank() -> None:
    model, first = DistributedDataParallel(Model()), Model()
    for step in range(2):
        with torch.no_grad():
            model(batch(dist.get_rank(), step))
            first(batch(0, step))
    if dist.get_rank() == 0:
        assert state_bytes(model.module, own=()) == state_bytes(first, own=())
    assert_ranks_differ(model)  # by the last batch


def gradients_are_those_of_all_the_data() -> None:
    """Exactly the mean of the ranks'; and with scales that are fixed, of one process's batch."""
    model = DistributedDataParallel(Model())
    sync_after_forward(model)
    train(model, range(1))
    model.apply(po.disable_observer)
    alone = copy.deepcopy(model.module).eval()
    model.zero_grad()
    loss_of(model(batch(dist.get_rank(), 1))).backward()
    parts = []
    for rank in range(2):
        alone.zero_grad()
        loss_of(alone(batch(rank, 1))).backward()
        parts.append([p.grad.clone() for p in alone.parameters()])
    alone.zero_grad()
    loss_of(alone(torch.cat([batch(rank, 1) for rank in range(2)]))).backward()
    for got, whole, *each in zip(model.parameters(), alone.parameters(), *parts, strict=True):
        torch.testing.assert_close(got.grad, sum(each) / 2)
        torch.testing.assert_close(got.grad, whole.grad / 2)


def observers_that_are_off_stay_as_they_are() -> None:
    model = DistributedDataParallel(Model())
    handle = sync_after_forward(model)
    train(model, range(1))
    model.apply(po.disable_observer)
    with torch.no_grad():
        model.module.between[0].scale.fill_(0.5)  # by hand
    before = state_bytes(model, own=())
    train(model, range(1, STEPS))
    assert state_bytes(model, own=()) == before
    model.apply(po.enable_observer)
    handle.remove()
    model(batch(dist.get_rank(), 1))
    assert_ranks_differ(model)


def one_rank_alone_may_validate() -> None:
    model = Model()
    sync_after_forward(model)
    train(model, range(1))
    model.apply(po.disable_observer).eval()
    if dist.get_rank() == 0:
        model(batch(0, 1))
    model.apply(po.enable_observer).train()
    train(model, range(1, 2))
    assert_same_on_all_ranks(model, own=())


def a_saved_state_goes_on() -> None:
    """Counts that all ranks load are counted once."""
    model, other = Model(), Model()
    sync_after_forward(model)
    sync_after_forward(other)
    train(model, range(2))
    other.load_state_dict(model.state_dict())
    wrapped = [DistributedDataParallel(each) for each in (model, other)]
    for each in wrapped:
        train(each, range(2, 4))
    states = [state_bytes(each, own=()) for each in (model, other)]
    for state in states:  # not saved, as in torch.ao
        for name in [name for name in state if name.endswith("nonfinite_count")]:
            state.pop(name)
    assert states[0] == states[1]


def under_compile() -> None:
    model = linears()
    sync_after_forward(model)
    compiled = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    expected = linears()
    sync_after_forward(expected)
    train(compiled, range(2))
    train(DistributedDataParallel(expected), range(2))
    assert_same_on_all_ranks(model, own=())
    assert state_bytes(model, own=()) == state_bytes(expected, own=())


def sharded(model: nn.Sequential, **kwargs: Any) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh, **kwargs)
    return model


def fsdp_trains_as_ddp_does() -> None:
    model, expected = sharded(linears()), DistributedDataParallel(linears())
    for each in (model, expected):
        sync_after_forward(each)
        train(each)
    assert isinstance(model[0].linear.weight, DTensor)
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(full(got.detach()), want.detach())
    assert_same_on_all_ranks(model, own=())
    assert state_bytes(model, own=()) == state_bytes(expected.module, own=())


def fsdp_learns_scales_as_ddp_does() -> None:
    """After an estimate that came before ``fully_shard``, by which the scales are sharded too."""
    model = linears()
    with torch.no_grad():
        model(batch(0, 0))
    po.make_learnable(model, grad_factor="features").apply(po.enable_param_learning)
    expected = DistributedDataParallel(copy.deepcopy(model))
    sharded(model)
    start = full(model[0].weight_fake_quant.scale.detach()).clone()
    for each in (model, expected):
        sync_after_forward(each)
        train(each)
        sync(each)
    assert isinstance(model[0].weight_fake_quant.scale, DTensor)
    assert not torch.equal(full(model[0].weight_fake_quant.scale.detach()), start)
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(full(got.detach()), want.detach())


def fsdp_without_it_keeps_each_rank_s_own() -> None:
    model = sharded(linears())
    train(model, range(1))
    assert_same_on_all_ranks(model[0].weight_fake_quant, own=())  # of gathered weights
    assert_ranks_differ(model)
    sync(model)
    assert_same_on_all_ranks(model, own=())


def fsdp_in_mixed_precision_keeps_statistics_in_float32() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(linears(), mp_policy=policy)
    sync_after_forward(model)
    fake = model[0].weight_fake_quant
    seen: list[tuple[Any, ...]] = []

    def watch(module: nn.Module, args: Any, y: Tensor) -> None:
        (x,) = args
        seen.append((isinstance(x, DTensor), x.dtype, y.dtype, x.float().amin(1)))

    fake.register_forward_hook(watch)
    train(model, range(1))
    assert seen[0][:3] == (False, torch.bfloat16, torch.bfloat16)
    assert torch.equal(fake.activation_post_process.min_val, seen[0][3])  # of the tensor as it came
    assert fake.scale.dtype == torch.float32
    assert_same_parameters(model)
    assert_same_on_all_ranks(model, own=())


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


def a_forward_that_is_run_again_sends_nothing() -> None:
    for reentrant in (False, True):
        plain, model = Model(), Model()
        for each in (plain, model):
            sync_after_forward(each)
        for step in range(STEPS):
            x = batch(dist.get_rank(), step).requires_grad_()
            plain(x)
            y = checkpoint(model, x, use_reentrant=reentrant, early_stop=False)
            with counting_all_reduces() as calls:
                y.sum().backward()
            assert not calls
            assert state_bytes(model, own=()) == state_bytes(plain, own=())


def fsdp_with_checkpoints_has_the_same_gradients() -> None:
    plain = linears()
    model = nn.Sequential(Checkpointed(plain[0]), plain[1], Checkpointed(plain[2]))
    model.apply(po.disable_observer)
    expected = linears().apply(po.disable_observer)
    for each in (sharded(model), sharded(expected)):
        train(each, range(2))
    for got, want in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(full(got.detach()), full(want.detach()))


def a_sharded_model_is_saved_and_loaded() -> None:
    model, other, whole = sharded(linears()), sharded(linears()), linears()
    sync_after_forward(model)
    train(model)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    saved.save(get_model_state_dict(model), checkpoint_id=folder[0])
    state = get_model_state_dict(other)
    saved.load(state, checkpoint_id=folder[0])
    set_model_state_dict(other, state)
    everything = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    whole.load_state_dict(everything)
    x = batch(0, 5)
    for each in (model, other, whole):
        each.apply(po.disable_observer)
    expected = model(x)
    for each in (other, whole):
        torch.testing.assert_close(each(x), expected)
        assert state_bytes(each, own=()) == state_bytes(model, own=())


CHECKS: tuple[Callable[[], None], ...] = (
    ranks_stay_alike_under_ddp,
    statistics_are_those_of_one_process,
    moving_averages_take_the_mean_of_the_ranks,
    what_syncs_itself_is_left_alone,
    linear_histograms_count_each_value_once,
    without_it_ddp_keeps_those_of_the_first_rank,
    gradients_are_those_of_all_the_data,
    observers_that_are_off_stay_as_they_are,
    one_rank_alone_may_validate,
    a_saved_state_goes_on,
    a_forward_that_is_run_again_sends_nothing,
    under_compile,
    fsdp_trains_as_ddp_does,
    fsdp_learns_scales_as_ddp_does,
    fsdp_without_it_keeps_each_rank_s_own,
    fsdp_in_mixed_precision_keeps_statistics_in_float32,
    fsdp_with_checkpoints_has_the_same_gradients,
    a_sharded_model_is_saved_and_loaded,
)


if __name__ == "__main__":
    run(CHECKS)

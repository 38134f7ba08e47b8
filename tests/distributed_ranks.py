"""What the ranks of ``test_distributed.py`` run: every check, on each rank, in one process group.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/distributed_ranks.py

Each rank makes the data of all ranks, so that it knows what they must come to together.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import pyobserver as po
from pyobserver import horizon
from pyobserver.distributed import sync

CHANNELS = 5
Make = Callable[[], nn.Module]


def counts() -> Any:
    return po.LogHistogramObserver(mantissa_bits=3)


def per_channel_counts(ch_axis: int = 0) -> Any:
    return po.PerChannelLogHistogramObserver(ch_axis, mantissa_bits=2)


def per_block_counts() -> Any:
    return po.PerBlockLogHistogramObserver((7, 1, 3), mantissa_bits=1)


def batches(rank: int, unfed: int | None = None) -> list[Tensor]:
    """The data of a rank: another number of batches on each, of another spread."""
    generator = torch.Generator().manual_seed(rank)
    spread = (3.0 + rank, 0.5)[rank % 2]
    shape = (7, CHANNELS, 3)
    made = [spread * torch.randn(shape, generator=generator) + rank for _ in range(2 * rank + 1)]
    return [] if rank == unfed else made


def fed(make: Make, ranks: list[int], unfed: int | None = None) -> Any:
    module = make()
    for rank in ranks:
        for batch in batches(rank, unfed):
            module(batch)
    return module


def mine_and_all(make: Make, unfed: int | None = None) -> tuple[Any, Any]:
    """A module fed this rank's data, and one fed everybody's."""
    return fed(make, [dist.get_rank()], unfed), fed(make, [*range(dist.get_world_size())], unfed)


OWN = ("scale", "zero_point")


def state_bytes(module: nn.Module, own: tuple[str, ...] = OWN) -> dict[str, tuple[Any, ...]]:
    """Every buffer but the fake-quantizes' own."""
    return {
        name: (tuple(b.shape), b.dtype, b.numpy().tobytes())
        for name, b in module.named_buffers()
        if name.split(".")[-1] not in own
    }


def assert_same_on_all_ranks(module: nn.Module, own: tuple[str, ...] = OWN) -> None:
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, state_bytes(module, own))
    assert all(state == states[0] for state in states)


@contextmanager
def counting_all_reduces() -> Iterator[list[Any]]:
    calls: list[Any] = []
    original = dist.all_reduce

    def counted(tensor: Tensor, *args: Any) -> Any:
        calls.append((tensor.dtype, *args[:1]))
        return original(tensor, *args)

    dist.all_reduce = counted
    try:
        yield calls
    finally:
        dist.all_reduce = original


class Model(nn.Module):
    """Exact statistics of every kind, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = po.MinMaxObserver()
        self.rows = nn.Sequential(po.PerChannelMinMaxObserver(ch_axis=1), nn.Identity())
        self.again = self.first
        self.counts = counts()
        self.channel_counts = per_channel_counts(ch_axis=1)
        self.block_counts = per_block_counts()
        self.quantized = po.FakeQuantize(
            po.PerChannelMinMaxObserver, qscheme=torch.per_channel_affine, ch_axis=0
        )
        self.fixed = po.FixedQParamsFakeQuantize(
            po.FixedQParamsObserver.with_args(scale=0.1, zero_point=3)
        )
        self.placeholder = po.PlaceholderObserver()

    def forward(self, x: Tensor) -> Tensor:
        counts = (self.counts, self.channel_counts, self.block_counts)
        for module in (self.first, self.rows, *counts, self.quantized):
            module(x)
        return x


def exact_statistics_are_those_of_one_process() -> None:
    for unfed in (None, 0, dist.get_world_size() - 1):
        mine, everything = mine_and_all(Model, unfed)
        sync(mine)
        assert state_bytes(mine) == state_bytes(everything)
        assert torch.equal(mine.quantized.scale, everything.quantized.scale)
        mine(batches(7)[0])  # goes on, the unfed rank too
        everything(batches(7)[0])
        assert state_bytes(mine) == state_bytes(everything)
        assert torch.equal(mine.quantized.scale, everything.quantized.scale)


def the_scale_of_a_fake_quantize_is_that_of_all_the_data() -> None:
    average = {"averaging_constant": 0.5}
    makes: tuple[Make, ...] = (
        lambda: po.FakeQuantize(po.LogHistogramObserver),
        lambda: po.FakeQuantize(po.MovingAverageMinMaxObserver, **average),
        lambda: po.FusedMovingAvgObsFakeQuantize(**average),
        lambda: po.FusedMovingAvgObsFakeQuantize(
            po.MovingAveragePerChannelMinMaxObserver,
            quant_min=-127,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
            ch_axis=1,
            **average,
        ),
        lambda: horizon.FakeQuantize(horizon.HistogramObserver, is_sync_quantize=False),
    )
    for make in makes:
        for unfed in (None, 0):
            mine = fed(make, [dist.get_rank()], unfed)
            mine.disable_observer()
            sync(mine)
            expected = make()
            expected.load_state_dict(mine.state_dict())
            with torch.no_grad():  # the statistics decide, and a forward has them chosen
                expected.scale.fill_(7.0)
            expected.update_scale()
            assert torch.equal(mine.scale, expected.scale)
            assert torch.equal(mine.zero_point, expected.zero_point)
            assert_same_on_all_ranks(mine, own=())
    fixed = po.FixedQParamsFakeQuantize(po.FixedQParamsObserver.with_args(scale=0.1, zero_point=3))
    last = po.FakeQuantize(po.MinMaxObserver, memoryless=True)
    unfed = po.FakeQuantize(po.MinMaxObserver)
    for module in (fixed, last, unfed):
        if module is not unfed:
            module(batches(dist.get_rank())[0])
        scale = module.scale.clone()
        sync(module)
        assert torch.equal(module.scale, scale)


def observers_may_be_given_one_or_several() -> None:
    mine, everything = mine_and_all(po.MinMaxObserver)
    sync(mine)
    assert state_bytes(mine) == state_bytes(everything)
    several = [mine_and_all(make) for make in (counts, po.MinMaxObserver)]
    observers = [mine for mine, _ in several]
    sync(observer for observer in (*observers, *observers))
    for mine, everything in several:
        assert state_bytes(mine) == state_bytes(everything)


def many_observers_cost_as_many_reductions_as_one() -> None:
    makes = (
        Model,
        po.HistogramObserver,
        po.MovingAverageMinMaxObserver,
        po.MovingAverageMinMaxObserver,
        lambda: po.HistogramObserver(bins=32),
    )
    model = nn.ModuleList([mine_and_all(make)[0] for make in makes])
    with counting_all_reduces() as calls:
        sync(model)
    operations = dist.ReduceOp
    assert calls == [
        (torch.int64, operations.MAX),
        (torch.int64, operations.MAX),
        (torch.int32, operations.MIN),
        (torch.int64, operations.SUM),
        (torch.float64, operations.SUM),
    ]


def no_rank_fed() -> None:
    makes = (Model, po.HistogramObserver, po.MovingAveragePerChannelMinMaxObserver)
    model = nn.ModuleList([make() for make in makes])
    before = state_bytes(model)
    sync(model)
    assert state_bytes(model) == before


def zeros_nan_and_infinities_are_those_of_one_process() -> None:
    last = dist.get_world_size() - 1
    inf, nan = torch.inf, torch.nan
    streams = {
        "ignore": ([-0.0, -1.0], [0.0, -0.0], [nan, inf, -inf, -0.5], [nan, nan]),
        "propagate": ([1.0, 2.0], [-inf, 3.0], [1.0, nan], [-inf, inf]),
    }
    for nonfinite, (first, second, third, only) in streams.items():
        for data in ((first, second), (second, first), (third, first), (first, third), (only, [])):
            for make in (po.MinMaxObserver, po.LogHistogramObserver):
                mine, everything = (make(nonfinite=nonfinite) for _ in range(2))
                for rank, values in ((0, data[0]), (last, data[1])):
                    everything(torch.tensor(values))
                    if rank == dist.get_rank():
                        mine(torch.tensor(values))
                sync(mine)
                assert state_bytes(mine) == state_bytes(everything), (nonfinite, data, mine)


def moving_averages_are_the_mean_of_the_fed_ranks() -> None:
    makes: tuple[Make, ...] = (
        lambda: po.MovingAverageMinMaxObserver(averaging_constant=0.3),
        lambda: po.MovingAveragePerChannelMinMaxObserver(averaging_constant=0.3, ch_axis=1),
    )
    world = dist.get_world_size()
    for make in makes:
        for unfed in (None, 0, world - 1):
            mine = fed(make, [dist.get_rank()], unfed)
            ranks = [fed(make, [rank]) for rank in range(world) if rank != unfed]
            sync(mine)
            for name in ("min_val", "max_val"):
                values = torch.stack([getattr(rank, name).double() for rank in ranks])
                assert torch.equal(getattr(mine, name), values.mean(0).float()), (name, unfed)
            assert_same_on_all_ranks(mine)


def a_channel_without_values_does_not_enter_the_mean() -> None:
    mine = po.MovingAveragePerChannelMinMaxObserver()
    rows = torch.tensor([[1.0, 2.0], [3.0, 5.0], [torch.nan, torch.inf]])
    if dist.get_rank() == 0:
        rows[1] = torch.nan
    mine(rows)
    sync(mine)
    assert mine.min_val.tolist() == [1.0, 3.0, torch.inf]
    assert mine.max_val.tolist() == [2.0, 5.0, -torch.inf]
    assert int(mine.nonfinite_count) == 2 * dist.get_world_size() + 2


def carried(histogram: Any, low: float, high: float, parts: int) -> Tensor:
    """The counts over [low, high], where each part of a bin goes as a whole, by its middle."""
    bins = len(histogram.histogram)
    own_low, own_high = float(histogram.min_val), float(histogram.max_val)
    if (own_low, own_high) == (low, high):
        return histogram.histogram
    edges = torch.linspace(low, high, bins + 1)
    starts = torch.linspace(own_low, own_high, bins * parts + 1)[:-1]
    middles = starts + torch.tensor((own_high - own_low) / (bins * parts) / 2)
    index = (torch.bucketize(middles, edges, right=True) - 1).clamp(0, bins - 1)
    shares = histogram.histogram.repeat_interleave(parts) / parts
    return torch.bincount(index, shares, bins)


def linear_histograms_are_carried_to_the_union_and_summed() -> None:
    world = dist.get_world_size()
    for options in ({}, {"bins": 32, "upsample_rate": 4}, {"bins": 50, "combine": "aligned"}):
        for unfed in (None, 0, world - 1):

            def make(options: dict[str, Any] = options) -> nn.Module:
                return po.HistogramObserver(**options)

            ranks = [fed(make, [rank], unfed) for rank in range(world)]
            some = [rank for i, rank in enumerate(ranks) if i != unfed]
            mine = ranks[dist.get_rank()]
            low = min(float(rank.min_val) for rank in some)
            high = max(float(rank.max_val) for rank in some)
            expected = sum(carried(rank, low, high, mine.upsample_rate) for rank in some)
            total = sum(float(rank.histogram.sum()) for rank in some)
            sync(mine)
            assert (float(mine.min_val), float(mine.max_val)) == (low, high)
            assert torch.equal(mine.histogram, expected), (options, unfed)
            assert float(mine.histogram.sum()) == total
            assert_same_on_all_ranks(mine)


def no_share_of_a_count_is_rounded_away() -> None:
    """In float32 a bin of 2^22 and some sixteenths would be."""
    mine = po.HistogramObserver(bins=4)
    if dist.get_rank() < 2:
        mine.histogram.copy_(torch.tensor([2.0**21 + 1, 1.0, 7.0, 3.0]))
        mine.min_val.fill_(0.0)
        mine.max_val.fill_(1.0 + dist.get_rank() / 10)
    sync(mine)
    assert float(mine.histogram.sum()) == 2 * (2**21 + 12)
    assert mine.histogram[0].item() % 1 != 0
    assert_same_on_all_ranks(mine)


def a_range_that_is_not_finite_keeps_the_counts() -> None:
    mine = po.HistogramObserver(bins=4, nonfinite="propagate")
    mine(torch.tensor([0.0, 1.0, 4.0 + dist.get_rank()]))
    if dist.get_rank() == 1:
        mine(torch.tensor([torch.inf]))
    sync(mine)
    assert mine.max_val == torch.inf
    assert float(mine.histogram.sum()) == 3 * dist.get_world_size()
    assert_same_on_all_ranks(mine)


def what_keeps_no_statistics_is_left_alone() -> None:
    makes: tuple[Make, ...] = (
        lambda: po.MinMaxObserver(memoryless=True),
        lambda: po.PerChannelMinMaxObserver(ch_axis=1, memoryless=True),
        lambda: po.MovingAverageMinMaxObserver(averaging_constant=1, is_dynamic=True),
        po.RecordingObserver,
        po.NoopObserver,
        lambda: po.FixedQParamsObserver(0.1, 3),
    )
    model = nn.ModuleList([mine_and_all(make)[0] for make in makes])
    before = state_bytes(model)
    sync(model)
    sync([*model])
    assert state_bytes(model) == before


def other_numbers_of_channels_are_an_error_everywhere() -> None:
    for make in (po.PerChannelMinMaxObserver, per_channel_counts):
        model = nn.ModuleDict({"whole": po.MinMaxObserver(), "rows": make(ch_axis=0)})
        rank = dist.get_rank()
        if rank != 0:
            for module in model.values():
                module(torch.full((2 + rank % 2, 3), float(rank)))
        if dist.get_world_size() == 2 and rank == 0:
            model["rows"](torch.ones(2, 3))
        before = state_bytes(model)
        here = len(model["rows"].min_val)
        match = rf"rows: expected one number of channels .* 2 to 3 \(here {here}\)"
        with pytest.raises(ValueError, match=match):
            sync(model)
        assert state_bytes(model) == before


def other_grids_of_blocks_are_an_error_everywhere() -> None:
    for second in ((2, 4), (4, 3), (3, 2)):
        model = nn.Sequential(po.MinMaxObserver(), po.PerBlockLogHistogramObserver((2, 2), 0))
        rank = dist.get_rank()
        grid = (2, 3) if rank == 0 else second
        model(torch.full([2 * size for size in grid], float(rank)))
        before = state_bytes(model)
        least, greatest = (tuple(map(f, (2, 3), second)) for f in (min, max))
        match = f"1: expected one number of .*blocks .* {least} to {greatest} (here {grid})"
        with pytest.raises(ValueError, match=match.replace("(", r"\(").replace(")", r"\)")):
            sync(model)
        assert state_bytes(model) == before


def other_observers_are_an_error_everywhere() -> None:
    first = dist.get_rank() == 0
    pairs: tuple[tuple[Any, Any, str], ...] = (
        (po.MinMaxObserver(), po.MovingAverageMinMaxObserver(), "MinMaxObserver"),
        (po.HistogramObserver(bins=4), po.HistogramObserver(bins=8), "HistogramObserver"),
        (po.LogHistogramObserver(2), po.LogHistogramObserver(3), r"counts \("),
        (per_channel_counts(), po.PerChannelLogHistogramObserver(0, 5), "PerChannelLog"),
        (po.MinMaxObserver(), per_block_counts(), ""),
        (
            po.PerBlockLogHistogramObserver((1, 3)),
            po.PerBlockLogHistogramObserver((3, 1)),
            r"block of \(" + ("1, 3" if first else "3, 1"),
        ),
        (
            po.PerChannelMinMaxObserver(ch_axis=0),
            po.PerChannelMinMaxObserver(ch_axis=1),
            f"axis {int(not first)}",
        ),
    )
    for one, other, part in pairs:
        model = nn.ModuleList([po.MinMaxObserver(), one if first else other])
        model[0](torch.ones(3))
        before = state_bytes(model)
        match = f"sync: 1: expected the same observer on every rank, .*{part}"
        with pytest.raises(ValueError, match=match):
            sync(model)
        assert state_bytes(model) == before
    for one, other in ((1, 2), (0, 1)):
        model = [po.MinMaxObserver() for _ in range(one if first else other)]
        match = rf"as many observers .* got {one} to {other} \(here {len(model)},"
        with pytest.raises(ValueError, match=match):
            sync(model)
    sync([])


def only_the_group_takes_part() -> None:
    group = dist.new_group([0, 1])
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    mine = fed(po.PerChannelMinMaxObserver, [dist.get_rank()])
    before = state_bytes(mine)
    sync(mine, alone[dist.get_rank()])
    assert state_bytes(mine) == before
    sync(mine, group)
    both = fed(po.PerChannelMinMaxObserver, [0, 1])
    assert state_bytes(mine) == (state_bytes(both) if dist.get_rank() < 2 else before)


def what_inference_mode_sizes_may_go_on_outside_it() -> None:
    mine, everything = mine_and_all(Model, unfed=0)
    with torch.inference_mode():
        sync(mine)
    assert not any(buffer.is_inference() for buffer in mine.buffers())
    assert state_bytes(mine) == state_bytes(everything)
    assert state_bytes(copy.deepcopy(mine)) == state_bytes(everything)


def buffers_are_updated_in_place() -> None:
    mine = fed(po.PerChannelMinMaxObserver, [dist.get_rank()])
    before = {name: buffer.data_ptr() for name, buffer in mine.named_buffers()}
    sync(mine)
    assert {name: buffer.data_ptr() for name, buffer in mine.named_buffers()} == before


CHECKS: tuple[Callable[[], None], ...] = (
    exact_statistics_are_those_of_one_process,
    the_scale_of_a_fake_quantize_is_that_of_all_the_data,
    observers_may_be_given_one_or_several,
    many_observers_cost_as_many_reductions_as_one,
    no_rank_fed,
    zeros_nan_and_infinities_are_those_of_one_process,
    moving_averages_are_the_mean_of_the_fed_ranks,
    a_channel_without_values_does_not_enter_the_mean,
    linear_histograms_are_carried_to_the_union_and_summed,
    no_share_of_a_count_is_rounded_away,
    a_range_that_is_not_finite_keeps_the_counts,
    what_keeps_no_statistics_is_left_alone,
    other_numbers_of_channels_are_an_error_everywhere,
    other_grids_of_blocks_are_an_error_everywhere,
    other_observers_are_an_error_everywhere,
    only_the_group_takes_part,
    what_inference_mode_sizes_may_go_on_outside_it,
    buffers_are_updated_in_place,
)


def run(checks: Iterable[Callable[[], None]]) -> None:
    """Each of them, on every rank at a time."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    for check in checks:
        check()
        dist.barrier()
        if dist.get_rank() == 0:
            print("passed", check.__name__, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    run(CHECKS)

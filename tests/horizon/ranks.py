"""What the ranks of ``test_distributed.py`` run, in one process group on the CPU.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.horizon.ranks
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyobserver.horizon import (
    ClipObserver,
    FakeQuantize,
    FakeQuantState,
    HistogramObserver,
    MinMaxObserver,
    ObserverBase,
    set_fake_quantize,
)

PER_CHANNEL: dict[str, Any] = {"qscheme": torch.per_channel_symmetric, "ch_axis": 1}
OBSERVERS = [MinMaxObserver, ClipObserver, HistogramObserver]
STEPS = 3


def batch(rank: int, step: int) -> Tensor:
    """Another spread on each rank; the last step of rank 1 has nothing to see."""
    generator = torch.Generator().manual_seed(10 * rank + step)
    x = (1 + 2 * rank) * torch.randn(4, 3, generator=generator) / 6
    x[0, 0] = torch.nan
    return x[:0] if (rank, step) == (1, STEPS - 1) else x


def state(observer: ObserverBase) -> dict[str, Any]:
    return {name: buffer.tolist() for name, buffer in observer.named_buffers()}


def check_forward_takes_in_all_ranks(make: Any, kwargs: dict[str, Any]) -> None:
    together, alone = make(**kwargs), make(is_sync_quantize=False, **kwargs)
    everything = make(is_sync_quantize=False, **kwargs)
    for step in range(STEPS):
        own = batch(dist.get_rank(), step)
        together(own)
        alone(own)
        everything(torch.cat([batch(rank, step) for rank in range(dist.get_world_size())]))
    expected, got = state(everything), state(together)
    if make is not HistogramObserver:  # counted where it was seen
        local = state(alone)["nonfinite_count"]
        assert got.pop("nonfinite_count") == local
        expected.pop("nonfinite_count")
    assert got == expected, (make, kwargs, got, expected)
    if dist.get_rank() == 0:  # whose values are the smaller
        assert state(alone)["max_val"] != expected["max_val"]


def check_sync_minmax() -> None:
    rank = dist.get_rank()
    low, high = torch.tensor([-1.0 - rank, 3.0]), torch.tensor([2.0 * rank, 3.0 + rank])
    MinMaxObserver().sync_minmax(low, high)
    last = dist.get_world_size() - 1
    assert low.tolist() == [-1.0 - last, 3.0]
    assert high.tolist() == [2.0 * last, 3.0 + last]


def check_a_fake_quantize_of_nothing_takes_in_the_others() -> None:
    for state in (FakeQuantState.CALIBRATION, FakeQuantState.QAT):
        for make in OBSERVERS:
            fake = FakeQuantize(make)
            fake.set_state(state)
            for step in reversed(range(STEPS)):  # rank 1 begins with nothing
                fake(batch(dist.get_rank(), step))
            check_same_scale(fake)


def check_same_scale(fake: FakeQuantize) -> None:
    fake.update_scale()
    scales: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(scales, float(fake.scale))
    assert len(set(scales)) == 1, scales


def check_one_rank_alone_can_validate() -> None:
    fake = FakeQuantize()
    set_fake_quantize(fake, FakeQuantState.CALIBRATION)
    fake(batch(dist.get_rank(), 0))
    set_fake_quantize(fake, FakeQuantState.VALIDATION)
    if dist.get_rank() == 0:
        fake(batch(0, 1))  # would wait for the others if it observed
    set_fake_quantize(fake, FakeQuantState.QAT)
    fake(batch(dist.get_rank(), 1))
    check_same_scale(fake)


def main() -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for make in OBSERVERS:
        for kwargs in ({}, PER_CHANNEL):
            check_forward_takes_in_all_ranks(make, kwargs)
    check_sync_minmax()
    check_a_fake_quantize_of_nothing_takes_in_the_others()
    check_one_rank_alone_can_validate()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

"""``sync`` in processes of its own (``distributed_ranks.py``) and in this one, and ``merge``."""

from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_ranks import (
    CHECKS,
    batches,
    carried,
    counting_all_reduces,
    counts,
    per_block_counts,
    per_channel_counts,
    state_bytes,
)
from torch import nn

import pyobserver as po
from pyobserver.distributed import sync, sync_after_forward
from pyobserver.tensor_quant import QuantDescriptor, TensorQuantizer

with_processes = pytest.mark.skipif(
    not dist.is_available(), reason="torch without torch.distributed"
)
EXACT: dict[str, Callable[[], Any]] = {
    "MinMax": po.MinMaxObserver,
    "PerChannel": lambda: po.PerChannelMinMaxObserver(ch_axis=1),
    "Counts": counts,
    "PerChannelCounts": lambda: per_channel_counts(ch_axis=1),
    "PerBlockCounts": per_block_counts,
}
MERGED: dict[str, Callable[[], Any]] = {
    **EXACT,
    "MovingAverage": po.MovingAverageMinMaxObserver,
    "MovingAveragePerChannel": lambda: po.MovingAveragePerChannelMinMaxObserver(ch_axis=1),
    "Histogram": po.HistogramObserver,
}


def fed(make: Callable[[], Any], *ranks: int) -> Any:
    observer = make()
    for rank in ranks:
        for batch in batches(rank):
            observer(batch)
    return observer


def passed_by(script: str, ranks: int) -> list[str]:
    """The checks that every one of some processes passed."""
    run = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(ranks), str(Path(__file__).with_name(script))),
        ],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(po.__file__).parent.parent),
        },
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return [line.split()[1] for line in run.stdout.splitlines() if line.startswith("passed ")]


@with_processes
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.once)])
def test_processes(ranks: int) -> None:
    assert passed_by("distributed_ranks.py", ranks) == [check.__name__ for check in CHECKS]


@with_processes
@pytest.mark.once
def test_processes_in_training() -> None:
    """Its checks are not imported here: they take a second's worth of torch.distributed."""
    passed = passed_by("training_ranks.py", 2)
    assert passed[0] == "ranks_stay_alike_under_ddp"
    assert passed[-1] == "a_sharded_model_is_saved_and_loaded"


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", MERGED)
def test_one_rank_keeps_what_it_has(name: str) -> None:
    observer = fed(MERGED[name], 1)
    before = state_bytes(observer)
    with counting_all_reduces() as calls:
        sync(observer)
    assert not calls
    assert state_bytes(observer) == before


@pytest.mark.usefixtures("one_rank")
def test_one_rank_without_observers() -> None:
    sync(nn.Linear(2, 2))
    sync([])


@pytest.mark.usefixtures("one_rank")
def test_one_rank_in_training() -> None:
    model, alone = nn.Sequential(po.FakeQuantize()), nn.Sequential(po.FakeQuantize())
    with counting_all_reduces() as calls:
        handle = sync_after_forward(model)
        for batch in batches(1):
            assert torch.equal(model(batch), alone(batch))
    assert not calls
    assert state_bytes(model, own=()) == state_bytes(alone, own=())
    for again in (model, nn.Sequential(model), copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"expected one that is not synced .*counted twice"):
            sync_after_forward(again)
    handle.remove()
    sync_after_forward(model).remove()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_sync_after_forward_of_what_it_cannot() -> None:
    with pytest.raises(TypeError, match="model: expected a module, got list"):
        sync_after_forward([po.MinMaxObserver()])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"sync_after_forward: .* expected an initialized"):
        sync_after_forward(po.MinMaxObserver())


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_tensor_of_all_ranks_is_refused(differentiable: bool) -> None:
    """torch's error names an op, or nothing; inside FSDP's forward there is none to refuse."""
    tensor = pytest.importorskip("torch.distributed.tensor")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    x = tensor.distribute_tensor(torch.randn(6, 4), mesh, [tensor.Shard(0)])
    x.requires_grad_(differentiable)
    modules: list[Callable[[Any], Any]] = [
        make() for make in (*MERGED.values(), po.FakeQuantize, po.FusedMovingAvgObsFakeQuantize)
    ]
    modules.append(po.default_per_channel_weight_fake_quant())
    modules.append(po.FakeQuantize(po.LogHistogramObserver))
    modules += [TensorQuantizer(), TensorQuantizer(QuantDescriptor(amax=1.0))]
    grid = torch.ones(1), torch.zeros(1), -128, 127
    modules.append(lambda x: po.ops.fake_quantize(x, *grid))
    modules.append(lambda x: po.ops.learnable_fake_quantize(x, *grid))
    match = r"(x|inputs): expected a tensor of this process .*, got a DTensor with placements"
    for module in modules:
        before = state_bytes(module) if isinstance(module, nn.Module) else None
        with pytest.raises(TypeError, match=match):
            module(x)
        assert before is None or state_bytes(module) == before


@pytest.mark.parametrize(
    ("backend", "served"), [("gloo", "cpu"), ("nccl", "cuda"), ("cpu:gloo,cuda:nccl", "cpu")]
)
def test_reduces_where_a_backend_serves(
    backend: str, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Observers on the CPU, which NCCL does not reach."""
    config = str(dist.distributed_c10d.BackendConfig(dist.Backend(backend)))
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    device = po.distributed._reduction_device([po.MinMaxObserver()], None)
    assert device == torch.device(served)


def test_no_process_group() -> None:
    observer = fed(counts, 1)
    before = state_bytes(observer)
    with pytest.raises(RuntimeError, match=r"expected an initialized process group .* got none"):
        sync(observer)
    assert state_bytes(observer) == before


def test_torch_without_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Built so, torch has the module, and hardly a name in it."""
    for name in [name for name in vars(dist) if not name.startswith("_") and name != "torch"]:
        if name not in ("is_available", "distributed_c10d"):
            monkeypatch.delattr(dist, name)
    monkeypatch.setattr(dist, "is_available", lambda: False)
    spec = importlib.util.spec_from_file_location("pyobserver._again", po.distributed.__file__)
    assert spec is not None
    assert spec.loader is not None
    again = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(again)
    with pytest.raises(RuntimeError, match="expected an initialized process group"):
        again.sync(po.MinMaxObserver())


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (3, "model_or_observers: expected a module, an observer or an iterable .* got int"),
        (None, "got NoneType"),
        ([po.MinMaxObserver(), nn.Identity()], r"model_or_observers\[1\]: .* got Identity"),
        ([[po.MinMaxObserver()]], r"model_or_observers\[0\]: expected an observer, got list"),
        ("model", r"model_or_observers\[0\]: expected an observer, got str"),
    ],
)
def test_neither_module_nor_observers(given: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        sync(given)


@pytest.mark.parametrize("name", EXACT)
def test_merge_is_exact(name: str) -> None:
    make = EXACT[name]
    one, other = fed(make, 0, 3), fed(make, 1, 2)
    before = state_bytes(one), state_bytes(other)
    both = one + other
    assert state_bytes(both) == state_bytes(fed(make, 0, 1, 2, 3)) == state_bytes(other + one)
    assert (state_bytes(one), state_bytes(other)) == before
    one.merge(other)
    assert state_bytes(one) == state_bytes(both)


@pytest.mark.parametrize("name", MERGED)
def test_merge_with_one_that_was_never_fed(name: str) -> None:
    make = MERGED[name]
    one = fed(make, 2)
    assert state_bytes(one + make()) == state_bytes(one) == state_bytes(make() + one)
    assert state_bytes(make() + make()) == state_bytes(make())


@pytest.mark.parametrize("name", ["MovingAverage", "MovingAveragePerChannel"])
def test_merge_of_moving_averages(name: str) -> None:
    one, other = fed(MERGED[name], 1), fed(MERGED[name], 2)
    both = one + other
    for value in ("min_val", "max_val"):
        first, second = (getattr(observer, value).double() for observer in (one, other))
        assert torch.equal(getattr(both, value), ((first + second) / 2).float())


def test_merge_of_histograms() -> None:
    one, other = fed(po.HistogramObserver, 1), fed(po.HistogramObserver, 2)
    both = one + other
    low = min(float(one.min_val), float(other.min_val))
    high = max(float(one.max_val), float(other.max_val))
    assert (float(both.min_val), float(both.max_val)) == (low, high)
    expected = carried(one, low, high, 16) + carried(other, low, high, 16)
    assert torch.equal(both.histogram, expected)
    assert both.histogram.sum() == one.histogram.sum() + other.histogram.sum()


@pytest.mark.parametrize(
    ("one", "other", "match"),
    [
        (
            po.MinMaxObserver,
            po.MovingAverageMinMaxObserver,
            "expected MinMaxObserver .* got MovingAverageMinMax",
        ),
        (
            po.HistogramObserver,
            lambda: po.HistogramObserver(bins=16),
            r"expected .*histogram \(2048,\).* got .*histogram \(16,\)",
        ),
        (
            lambda: po.PerChannelMinMaxObserver(ch_axis=1),
            lambda: po.PerChannelMinMaxObserver(ch_axis=0),
            "expected .*axis 1.* got .*axis 0",
        ),
        (
            lambda: po.LogHistogramObserver(3),
            lambda: po.LogHistogramObserver(4),
            r"expected .*counts \(4084,\).* got .*counts \(8164,\)",
        ),
        (
            lambda: po.PerBlockLogHistogramObserver((1, 1, 3), 0),
            lambda: po.PerBlockLogHistogramObserver((7, 1, 1), 0),
            r"expected .*each block of \(1, 1, 3\), got .*each block of \(7, 1, 1\)",
        ),
    ],
)
def test_merge_of_different_observers(
    one: Callable[[], Any], other: Callable[[], Any], match: str
) -> None:
    first, second = fed(one, 0), fed(other, 1)
    before = state_bytes(first)
    for operation in (first.merge, first.__add__):
        with pytest.raises(ValueError, match=f"statistics of different observers: {match}"):
            operation(second)
    assert state_bytes(first) == before


@pytest.mark.parametrize("make", [po.PerChannelMinMaxObserver, per_channel_counts])
def test_merge_of_other_numbers_of_channels(make: Callable[[], Any]) -> None:
    one, other = make(), make()
    one(torch.ones(3, 2))
    other(torch.ones(4, 2))
    before = state_bytes(one)
    with pytest.raises(ValueError, match=r"different observers: expected 3 channels, got 4$"):
        one.merge(other)
    assert state_bytes(one) == before


def test_merge_of_other_grids_of_blocks() -> None:
    one, other = (po.PerBlockLogHistogramObserver((1, 2), 0) for _ in range(2))
    one(torch.ones(3, 4))
    other(torch.ones(3, 6))
    before = state_bytes(one)
    with pytest.raises(ValueError, match=r"expected \(3, 2\) blocks, got \(3, 3\)$"):
        one.merge(other)
    assert state_bytes(one) == before


@pytest.mark.parametrize("other", [3, nn.Identity(), po.NoopObserver()])
def test_merge_with_no_such_observer(other: Any) -> None:
    with pytest.raises(
        TypeError, match=f"other: expected an observer.* got {type(other).__name__}"
    ):
        po.MinMaxObserver().merge(other)


def test_merge_of_nonfinite_counts() -> None:
    one, other = po.MinMaxObserver(), po.MinMaxObserver()
    one(torch.tensor([1.0, torch.nan]))
    other(torch.tensor([torch.inf, torch.nan]))
    both = one + other
    assert int(both.nonfinite_count) == 3
    assert (float(both.min_val), float(both.max_val)) == (1.0, 1.0)


def test_every_buffer_that_forward_updates_merges() -> None:
    """Statistics that no rule names would stay those of one rank."""
    for make in MERGED.values():
        observer = make()
        assert {*observer._buffers} == {*observer._merges, "eps"}

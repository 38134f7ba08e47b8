"""What an independent reading of the code found: each was wrong once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from backends import Backend

import pyobserver
from pyobserver import ops, ranges
from pyobserver.ops.log_histogram import _kept_edges

INT32 = torch.int32


def fake_quantize(x: torch.Tensor, scale: float = 0.1, **kwargs: Any) -> torch.Tensor:
    return ops.fake_quantize(
        x, torch.tensor([scale]), torch.tensor([0], dtype=INT32), -8, 7, **kwargs
    )


def test_more_dimensions_than_anybody_has() -> None:
    strided = torch.randn(4)[::2].reshape([1] * 69 + [2])
    assert torch.equal(fake_quantize(strided), fake_quantize(strided.flatten()).reshape_as(strided))
    assert fake_quantize(torch.empty([0] + [1] * 69)).shape == (0, *[1] * 69)


def test_first_batch_under_inference_mode_leaves_ordinary_buffers() -> None:
    observer = pyobserver.PerChannelMinMaxObserver()
    module = pyobserver.FakeQuantize(pyobserver.MovingAveragePerChannelMinMaxObserver)
    with torch.inference_mode():
        observer(torch.randn(3, 4))
        module(torch.randn(3, 4))
    for holder in (observer, module):
        assert not any(buffer.is_inference() for buffer in holder.buffers())
        holder.load_state_dict(copy.deepcopy(holder.state_dict()))
    observer.reset_min_max_vals()
    observer(torch.randn(3, 4))


def test_graph_that_saved_a_state_fails_after_an_update() -> None:
    observer = pyobserver.MinMaxObserver()
    observer(torch.randn(9))
    weight = torch.ones((), requires_grad=True)
    loss = weight * observer.min_val
    observer(torch.full((1,), -100.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_switched_off_may_hold_any_scale(backend: Backend) -> None:
    x = torch.randn(5, device=backend.device)
    scale = torch.tensor([torch.nan], device=backend.device)
    zero_point = torch.zeros(1, dtype=INT32, device=backend.device)
    off = torch.zeros(1, dtype=torch.uint8, device=backend.device)
    result = backend.op("_fake_quantize")(x, scale, zero_point, -8, 7, None, off)
    assert torch.equal(result, x)


def test_moving_average_of_extremes_stays_finite(backend: Backend) -> None:
    low, high = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    low, high = low.to(backend.device), high.to(backend.device)
    count = torch.zeros((), dtype=torch.int64, device=backend.device)
    for value in (3e38, -3e38):
        x = torch.full((4,), value, device=backend.device)
        backend.op("minmax")(x, low, high, count, None, "moving_average", 0.5)
    assert float(low) == float(high) == 0.0


@pytest.mark.parametrize("other", [(-torch.inf, torch.inf), (torch.nan, torch.nan)])
@pytest.mark.parametrize("combine", ["midpoint", "aligned"])
def test_combining_with_a_range_that_is_not_finite_keeps_the_counts(
    backend: Backend, other: tuple[float, float], combine: str
) -> None:
    state = [torch.tensor([3.0, 4.0]).double(), torch.tensor(0.0), torch.tensor(1.0)]
    added = [torch.tensor([1.0, 1.0]).double(), torch.tensor(other[0]), torch.tensor(other[1])]
    state = [t.to(backend.device) for t in state]
    added = [t.to(backend.device) for t in added]
    backend.op("histogram_combine")(*state, *added, combine, 16)
    assert state[0].tolist() == [3.0, 4.0]
    assert not (state[1].isfinite() and state[2].isfinite())


def test_symmetric_uint16_with_bounds_has_its_zero_inside() -> None:
    observer = pyobserver.MinMaxObserver(
        torch.uint16, torch.per_tensor_symmetric, quant_min=0, quant_max=1023
    )
    observer(torch.randn(9))
    assert int(observer.calculate_qparams()[1]) == 511


@pytest.mark.parametrize("eps", [0.0, -1.0, torch.nan, torch.inf, 1e-60])
def test_least_scale_is_positive_and_finite(eps: float) -> None:
    with pytest.raises(ValueError, match="eps: expected a positive finite float32"):
        pyobserver.MinMaxObserver(eps=eps)


def test_number_of_channels_is_positive() -> None:
    with pytest.raises(ValueError, match="num_channels: expected at least 1 or None, got -1"):
        pyobserver.PerChannelMinMaxObserver(num_channels=-1)


@pytest.mark.parametrize("bound", [2**31, 2**70])
def test_bounds_beyond_int32_are_named(bound: int) -> None:
    with pytest.raises(ValueError, match="quant_max: expected int32 values"):
        ops.fake_quantize(torch.ones(2), torch.ones(1), torch.zeros(1, dtype=INT32), 0, bound)


def test_assigned_counts_take_the_buffer_s_type() -> None:
    theirs = torch.ao.quantization.HistogramObserver()
    theirs(torch.randn(50))
    ours = pyobserver.HistogramObserver()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert ours.histogram.dtype == torch.float64
    ours(torch.randn(50))


def test_channels_that_disagree_do_not_load() -> None:
    observer = pyobserver.PerChannelMinMaxObserver()
    saved = observer.state_dict() | {"min_val": torch.zeros(3), "max_val": torch.ones(4)}
    with pytest.raises(RuntimeError, match="size mismatch"):
        observer.load_state_dict(saved)
    assert observer.min_val.numel() == observer.max_val.numel() == 0


def test_count_of_other_data_is_forgotten_on_loading() -> None:
    observer = pyobserver.MinMaxObserver()
    observer(torch.tensor([torch.nan, 1.0]))
    observer.load_state_dict(pyobserver.MinMaxObserver().state_dict())
    assert int(observer.nonfinite_count) == 0


def test_scale_that_is_not_finite_is_not_applied() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    watcher = pyobserver.MinMaxObserver.with_args(nonfinite="propagate")
    with pytest.warns(UserWarning, match="NaN or infinite values were seen"):
        result = pyobserver.calibrate(model, [torch.full((1, 3), torch.nan)], activation=watcher)
    with pytest.raises(ValueError, match="a scale that is not positive and finite"):
        result.apply(model, inplace=True)
    assert not model[0]._forward_pre_hooks
    assert not torch.nn.utils.parametrize.is_parametrized(model[0])


@pytest.mark.parametrize("method", ranges.METHODS)
def test_scales_whatever_the_default_device_and_dtype(method: str) -> None:
    """As set_default_device("cuda") asks of a model that is kept on the CPU, and the other way."""
    observers = [pyobserver.LogHistogramObserver(), pyobserver.HistogramObserver()]
    for observer in observers:
        observer(torch.randn(99))
    expected = [observer.solve(method) for observer in observers]
    default = torch.get_default_dtype()
    _kept_edges.cache_clear()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = [observer.solve(method) for observer in observers]
    finally:
        torch.set_default_dtype(default)
    for got, wanted in zip(found, expected, strict=True):
        for one, other in zip(got, wanted, strict=True):
            assert torch.equal(one, other)
            assert one.dtype == other.dtype


def test_a_calibration_is_solved_on_the_cpu_whatever_the_default_device() -> None:
    model = torch.nn.Linear(3, 3)
    result = pyobserver.calibrate(model, [torch.randn(4, 3)], weight=None, progress=False)
    with torch.device("meta"):
        again = result.solve("mse")
    assert again["input"].scale.device.type == "cpu"


def test_a_site_s_histogram_is_a_copy() -> None:
    model = torch.nn.Linear(3, 3)
    result = pyobserver.calibrate(model, [torch.randn(4, 3)], weight=None, progress=False)
    for value in result.histogram("input")[:3]:
        value.fill_(9)
    assert torch.equal(result.solve()["input"].scale, result["input"].scale)
    assert float(result.histogram("input").counts.sum()) == 12

"""Horizon's fake-quantize and its three states."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyobserver
from pyobserver import horizon
from pyobserver.horizon import (
    ClipObserver,
    ComputeScaleStrategy,
    FakeQuantize,
    FakeQuantState,
    FixedScaleObserver,
    HistogramObserver,
    MinMaxObserver,
    MixObserver,
    MSEObserver,
    qint4,
    qint8,
    qint16,
    set_fake_quantize,
)

CALIBRATION, VALIDATION, QAT = FakeQuantState
PER_CHANNEL: dict[str, Any] = {"qscheme": torch.per_channel_symmetric, "ch_axis": 0}
KINDS: list[dict[str, Any]] = [
    {"observer": MinMaxObserver},
    {"observer": MinMaxObserver, **PER_CHANNEL},
    {"observer": MinMaxObserver, "compute_scale_strategy": ComputeScaleStrategy.POT},
    {"observer": ClipObserver},
    {"observer": HistogramObserver},
    {"observer": MSEObserver, **PER_CHANNEL},
    {"observer": MixObserver, "dtype": qint4},
]
IDS = ["minmax", "minmax-channel", "pot", "clip", "histogram", "mse-channel", "mix"]
kinds = pytest.mark.parametrize("kwargs", KINDS, ids=IDS)


def calibrated(*tensors: Tensor, **kwargs: Any) -> FakeQuantize:
    fake = FakeQuantize(**kwargs)
    set_fake_quantize(fake, CALIBRATION)
    for x in tensors:
        assert fake(x) is x
    return fake


def by_torch(fake: FakeQuantize, x: Tensor) -> Tensor:
    """What torch makes of the same scale."""
    bounds = fake.quant_min, fake.quant_max
    if fake.is_per_channel:
        return torch.fake_quantize_per_channel_affine(
            x, fake.scale, fake.zero_point, fake.ch_axis, *bounds
        )
    return torch.fake_quantize_per_tensor_affine(x, float(fake.scale), 0, *bounds)


@kinds
def test_calibration_observes_and_passes_through(kwargs: dict[str, Any]) -> None:
    batches = [torch.randn(3, 40), 2 * torch.randn(3, 40)]
    fake = calibrated(*batches, **kwargs)
    alone = kwargs["observer"](**{k: v for k, v in kwargs.items() if k != "observer"})
    for x in batches:
        alone(x)
    assert fake.scale.tolist() == [1.0]  # not chosen before it is asked for
    set_fake_quantize(fake, VALIDATION)
    assert torch.equal(fake.scale, alone.calculate_qparams()[0])


@kinds
def test_validation_quantizes_and_observes_nothing(kwargs: dict[str, Any]) -> None:
    fake = calibrated(torch.randn(3, 40), **kwargs)
    set_fake_quantize(fake, VALIDATION)
    before = copy.deepcopy(fake.state_dict())
    x = 5 * torch.randn(3, 40)
    assert torch.equal(fake(x), by_torch(fake, x))
    for key, value in fake.state_dict().items():
        assert torch.equal(value, before[key]) if isinstance(value, Tensor) else True


@kinds
def test_qat_does_both_with_gradient(kwargs: dict[str, Any]) -> None:
    fake, alone = FakeQuantize(**kwargs), FakeQuantize(**kwargs)
    set_fake_quantize(fake, QAT)
    for spread in (1.0, 3.0):
        x = (spread * torch.randn(3, 40)).requires_grad_()
        y = fake(x)
        alone.activation_post_process(x.detach())
        expected, _ = alone.calculate_qparams()
        assert torch.equal(fake.scale, expected)
        wanted = by_torch(fake, x.detach().clone().requires_grad_())
        assert torch.equal(y, wanted)
        y.sum().backward()
        inside = (x / fake.scale.reshape(-1, 1)).round()
        inside = (inside >= fake.quant_min) & (inside <= fake.quant_max)
        assert torch.equal(x.grad, inside.float())


def test_validation_passes_gradients_too() -> None:
    fake = calibrated(torch.tensor([-1.0, 1.0]), quant_min=-127, quant_max=127)
    set_fake_quantize(fake, VALIDATION)
    x = torch.tensor([0.5, 3.0], requires_grad=True)
    fake(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1.0, 0.0]


def test_states_are_known_and_the_switches_are_the_engines() -> None:
    fake = calibrated(torch.randn(10))
    assert fake.state is CALIBRATION
    pyobserver.enable_fake_quant(fake)
    assert fake.state is QAT
    pyobserver.disable_observer(fake)
    assert fake.state is VALIDATION
    pyobserver.disable_fake_quant(fake)
    assert fake.state is None
    x = torch.randn(5)
    assert fake(x) is x


@pytest.mark.parametrize("order", [0, 1])
def test_the_engines_switches_choose_the_scale_on_leaving_calibration(order: int) -> None:
    """Whichever of the two is turned first; they gave the scale of before, 1."""
    x = torch.randn(10)
    expected, fake = calibrated(x), calibrated(x)
    expected.set_state(VALIDATION)
    turns = [pyobserver.disable_observer, pyobserver.enable_fake_quant]
    for turn in turns[:: 1 - 2 * order]:
        turn(fake)
    assert fake.state is VALIDATION
    assert fake.scale == expected.scale != 1
    assert torch.equal(fake(x), expected(x))


def test_empty_tensors_change_nothing() -> None:
    fake = FakeQuantize()
    for state in FakeQuantState:
        fake.set_state(state)
        assert fake(torch.empty(0, 3)).shape == (0, 3)
    assert not fake.is_fed()


@kinds
def test_reset_dtype_chooses_anew_without_data(kwargs: dict[str, Any]) -> None:
    x = torch.randn(3, 400)
    fake = calibrated(x, **kwargs)
    set_fake_quantize(fake, VALIDATION)
    fake.reset_dtype(qint16)
    direct = calibrated(x, **{**kwargs, "dtype": qint16})
    set_fake_quantize(direct, VALIDATION)
    assert torch.equal(fake.scale, direct.scale)
    assert (fake.dtype, fake.quant_min, fake.quant_max) == (qint16, -32768, 32767)
    assert torch.equal(fake(x), by_torch(fake, x))
    with pytest.raises(ValueError, match="dtype: expected one of"):
        fake.reset_dtype(torch.float16)
    assert fake.dtype is qint16


def test_reset_dtype_before_any_data() -> None:
    fake = FakeQuantize(observer=HistogramObserver)
    fake.reset_dtype(qint16)
    assert fake.scale.tolist() == [1.0]
    x = torch.randn(1000)
    set_fake_quantize(fake, QAT)
    assert (fake(x) - x).abs().max() < 1e-3


@kinds
@pytest.mark.parametrize("state", FakeQuantState)
def test_round_trips(kwargs: dict[str, Any], state: FakeQuantState) -> None:
    x = torch.randn(3, 40)
    fake = calibrated(x, **kwargs)
    fake.reset_dtype(qint4)
    set_fake_quantize(fake, state)
    loaded = FakeQuantize(**kwargs)
    loaded.load_state_dict(copy.deepcopy(fake.state_dict()))
    for copied in (loaded, copy.deepcopy(fake), pickle.loads(pickle.dumps(fake))):
        assert copied.state is state
        assert copied.dtype is qint4
        set_fake_quantize(copied, VALIDATION)
    set_fake_quantize(fake, VALIDATION)
    for copied in (loaded, copy.deepcopy(fake)):
        assert torch.equal(copied(x), fake(x))


def test_a_state_saved_in_calibration_has_the_scale() -> None:
    x = torch.randn(100)
    fake = calibrated(x)
    assert fake.state_dict()["scale"] == x.abs().max() / 127.5


def test_a_loaded_scale_outlives_the_change_of_state() -> None:
    fake = calibrated(torch.randn(1000), observer=HistogramObserver)
    HistogramObserver.reset_scale(fake, "percentile", {"percentile": 0.5})
    loaded = FakeQuantize(observer=HistogramObserver)
    set_fake_quantize(loaded, CALIBRATION)
    loaded.load_state_dict(fake.state_dict())
    set_fake_quantize(loaded, CALIBRATION)
    set_fake_quantize(loaded, VALIDATION)
    assert torch.equal(loaded.scale, fake.scale)


def test_get_and_load_observer_state_dict() -> None:
    model = nn.Sequential(nn.ReLU())
    model.add_module("activation_post_process", calibrated(torch.randn(50)))
    other = nn.Sequential(nn.ReLU())
    other.add_module("activation_post_process", FakeQuantize())
    pyobserver.load_observer_state_dict(other, pyobserver.get_observer_state_dict(model))
    fake, loaded = model.activation_post_process, other.activation_post_process
    assert torch.equal(fake.calculate_qparams()[0], loaded.calculate_qparams()[0])
    assert loaded.state is CALIBRATION


def test_a_fixed_scale_is_there_at_once() -> None:
    fake = FakeQuantize(observer=FixedScaleObserver, scale=0.5)
    set_fake_quantize(fake, VALIDATION)
    assert fake(torch.tensor([0.3, 100.0])).tolist() == [0.5, 63.5]
    set_fake_quantize(fake, QAT)
    assert fake(torch.tensor([0.3, 100.0])).tolist() == [0.5, 63.5]


def test_validation_without_data_warns_with_names() -> None:
    model = nn.ModuleDict({"fed": calibrated(torch.randn(3)), "not": FakeQuantize()})
    with pytest.warns(UserWarning, match=r"never fed, so with the scale they had before: not$"):
        set_fake_quantize(model, VALIDATION)


def test_arguments() -> None:
    with pytest.raises(TypeError, match=r"observer: expected an observer of pyobserver\.horizon"):
        FakeQuantize(observer=pyobserver.MinMaxObserver)
    with pytest.raises(TypeError, match=r"observer: expected one of a scale .*, got Identity"):
        FakeQuantize(observer=nn.Identity)
    with pytest.raises(TypeError, match=r"observer: expected a class or factory .*, got 3"):
        FakeQuantize(observer=3)
    with pytest.raises(TypeError, match="state: expected a FakeQuantState, got 'QAT'"):
        set_fake_quantize(FakeQuantize(), "QAT")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="state: expected a FakeQuantState, got 'QAT'"):
        FakeQuantize().set_state("QAT")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a prepared one, got Linear without"):
        set_fake_quantize(nn.Linear(2, 2), QAT)


def test_repr() -> None:
    fake = FakeQuantize(observer=FixedScaleObserver, scale=0.25, dtype=qint4)
    assert "QAT, dtype=qint4, grid=[-8, 7], scale=0.25" in repr(fake)
    per_channel = calibrated(torch.randn(3, 4), **PER_CHANNEL)
    set_fake_quantize(per_channel, VALIDATION)
    assert "VALIDATION, dtype=qint8, grid=[-128, 127], ch_axis=0, channels=3" in repr(per_channel)


@pytest.mark.parametrize("state", FakeQuantState)
@pytest.mark.parametrize("observer", [MinMaxObserver, HistogramObserver])
def test_each_state_compiles_in_one_graph(observer: Any, state: FakeQuantState) -> None:
    x = torch.randn(30)
    eager = calibrated(x, observer=observer)
    set_fake_quantize(eager, state)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="eager")
    for spread in (1.0, 2.0):
        assert torch.equal(compiled(spread * x), eager(spread * x))


def test_the_meta_device() -> None:
    for kwargs in ({"observer": MinMaxObserver}, {"observer": HistogramObserver}):
        fake = FakeQuantize(**kwargs).to("meta")
        for state in (CALIBRATION, QAT):
            if state is QAT:
                fake.enable_fake_quant()
            else:
                fake.enable_fake_quant(False)
            assert fake(torch.empty(4, device="meta")).shape == (4,)


# --- reset_scale -------------------------------------------------------------------------------


def two_types() -> nn.ModuleDict:
    x = torch.distributions.StudentT(3.0).sample((5000,))
    model = nn.ModuleDict(
        {
            "eight": calibrated(x, observer=HistogramObserver),
            "sixteen": calibrated(x, observer=HistogramObserver, dtype=qint16),
            "other": calibrated(x, observer=MSEObserver),
        }
    )
    set_fake_quantize(model, VALIDATION)
    return model


def scales(model: nn.ModuleDict) -> dict[str, float]:
    return {name: float(model.state_dict()[f"{name}.scale"]) for name in model}


@pytest.mark.parametrize(
    ("method", "options"),
    [("mse", None), ("percentile", {"percentile": 0.99}), ("kl", None), ("minmax", None)],
)
def test_reset_scale_is_calibrating_by_that_method(method: str, options: Any) -> None:
    model = two_types()
    before = scales(model)
    HistogramObserver.reset_scale(model, method, options)
    after = scales(model)
    for name in ("eight", "sixteen"):
        watcher = model[name].activation_post_process
        wanted = watcher.solve(method, **(options or {})).scale
        assert after[name] == wanted
        assert (after[name] == before[name]) == (method == "mse")
    assert after["other"] == before["other"]


def test_reset_scale_of_one_type() -> None:
    model = two_types()
    before = scales(model)
    HistogramObserver.reset_scale(model, "percentile", {"percentile": 1.0}, qint16)
    after = scales(model)
    assert after["eight"] == before["eight"]
    largest = model["sixteen"].activation_post_process
    bound = max(-float(largest.min_val), float(largest.max_val))
    assert after["sixteen"] == pytest.approx(bound / 32767.5)
    assert model["sixteen"].dtype is qint16
    assert model["eight"].dtype is qint8


def test_reset_scale_checks_before_it_changes() -> None:
    model = two_types()
    before = scales(model)
    with pytest.raises(ValueError, match="reset_scale: method: expected one of"):
        HistogramObserver.reset_scale(model, "best")
    with pytest.raises(TypeError, match="reset_scale: percentile: expected one of the options of"):
        HistogramObserver.reset_scale(model, "mse", {"percentile": 1.0})
    with pytest.raises(
        ValueError, match=r"dtype: expected that of .* \(qint16, qint8\), got qint4"
    ):
        HistogramObserver.reset_scale(model, "kl", dtype=qint4)
    with pytest.raises(ValueError, match=r"expected one with HistogramObservers, got none$"):
        HistogramObserver.reset_scale(nn.Linear(2, 2), "mse")
    with pytest.raises(ValueError, match="none that was fed: calibrate first"):
        HistogramObserver.reset_scale(FakeQuantize(observer=HistogramObserver), "mse")
    assert scales(model) == before
    assert model["eight"].activation_post_process.method == "mse"


def test_the_engines_fake_quantize_takes_the_observers_too() -> None:
    fake = pyobserver.FakeQuantize(observer=horizon.MinMaxObserver, dtype=qint8)
    x = torch.randn(100)
    assert torch.equal(fake(x), by_torch(fake, x))
    assert fake.scale == x.abs().max() / 127.5

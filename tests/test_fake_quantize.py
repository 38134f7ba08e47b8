from __future__ import annotations

from typing import Any

import pytest
import torch
from observers.agreement import assert_range_agrees
from ops.cases import (
    DTYPES,
    assert_all_same,
    assert_rejected,
    assert_same,
    not_dense_real_float,
    unchanged,
)
from streams import streams
from torch import Tensor, nn
from torch.ao.quantization import fake_quantize as ao_fake_quantize
from torch.ao.quantization import observer as ao_observer

import pyobserver as po

STREAMS = streams()
SYMMETRIC = {"dtype": torch.qint8, "quant_min": -128, "quant_max": 127}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "moving_average": ("MovingAverageMinMaxObserver", {}),
    "moving_average_fast": ("MovingAverageMinMaxObserver", {"averaging_constant": 0.4}),
    "symmetric": (
        "MovingAverageMinMaxObserver",
        {**SYMMETRIC, "qscheme": torch.per_tensor_symmetric},
    ),
    "minmax": ("MinMaxObserver", {"quant_min": 0, "quant_max": 127}),
    "four_bits": ("MinMaxObserver", {"dtype": torch.int8, "quant_min": -8, "quant_max": 7}),
    "int16": ("MinMaxObserver", {"dtype": torch.int16}),
    "histogram": ("HistogramObserver", {}),
    "histogram_symmetric": (
        "HistogramObserver",
        {**SYMMETRIC, "qscheme": torch.per_tensor_symmetric},
    ),
    "per_channel": (
        "PerChannelMinMaxObserver",
        {**SYMMETRIC, "qscheme": torch.per_channel_symmetric, "ch_axis": 1},
    ),
    "per_channel_moving": ("MovingAveragePerChannelMinMaxObserver", {"ch_axis": 1}),
    "per_row": (
        "MovingAveragePerChannelMinMaxObserver",
        {"qscheme": torch.per_channel_affine, "averaging_constant": 0.4},
    ),
    "per_row_symmetric": (
        "MovingAveragePerChannelMinMaxObserver",
        {**SYMMETRIC, "qscheme": torch.per_channel_symmetric},
    ),
    "per_channel_float": (
        "PerChannelMinMaxObserver",
        {"qscheme": torch.per_channel_affine_float_qparams, "ch_axis": 1},
    ),
}
# whether to observe and whether to round, batch by batch
SWITCHES = ((1, 1), (0, 1), (1, 0), (0, 0), (1, 1))
USED = ("normal", "relu", "negative", "student", "growing", "outlier", "tiny")


def pair(config: str, cls: str = "FakeQuantize") -> tuple[Any, Any]:
    name, arguments = CONFIGS[config]
    return tuple(
        getattr(quantizers, cls)(observer=getattr(observers, name), **arguments)
        for quantizers, observers in ((po, po), (ao_fake_quantize, ao_observer))
    )  # type: ignore[return-value]


def step(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient for a weighted sum of it."""
    x = x.clone().requires_grad_()
    y = module(x)
    weight = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    return y, torch.autograd.grad((y * weight).sum(), x)[0]


def turn(module: Any, observe: int, quantize: int) -> None:
    module.enable_observer(bool(observe))
    module.enable_fake_quant(bool(quantize))


@pytest.mark.parametrize("stream", USED)
@pytest.mark.parametrize("config", CONFIGS)
def test_is_that_of_torch(config: str, stream: str) -> None:
    """Outputs and gradients bit for bit, and the state, with the switches turned midway."""
    ours, theirs = pair(config)
    batches = (STREAMS[stream] * 2)[: len(SWITCHES)]
    for i, (x, switches) in enumerate(zip(batches, SWITCHES, strict=True)):
        turn(ours, *switches)
        turn(theirs, *switches)
        assert_all_same(step(ours, x), step(theirs, x), i)
        assert_range_agrees(ours.activation_post_process, theirs.activation_post_process, i)
        # the zero of a float zero point may be a negative one
        expected = [theirs.scale, theirs.zero_point + 0]
        assert_all_same([ours.scale, ours.zero_point + 0], expected, i)


@pytest.mark.parametrize("stream", USED)
@pytest.mark.parametrize(
    "config", ["moving_average", "moving_average_fast", "symmetric", "per_row", "per_row_symmetric"]
)
def test_fused_is_that_of_torch(config: str, stream: str) -> None:
    """Bit for bit; torch serves no other channel axis than 0."""
    ours, theirs = pair(config, "FusedMovingAvgObsFakeQuantize")
    batches = (STREAMS[stream] * 2)[: len(SWITCHES)]
    for i, (x, switches) in enumerate(zip(batches, SWITCHES, strict=True)):
        turn(ours, *switches)
        turn(theirs, *switches)
        assert_all_same(step(ours, x), step(theirs, x), i)
        assert_range_agrees(ours.activation_post_process, theirs.activation_post_process, i)
        if switches[1]:  # while it does not round, torch leaves the scale as it was
            assert_all_same([ours.scale, ours.zero_point], [theirs.scale, theirs.zero_point], i)


@pytest.mark.parametrize("name", ["0to1", "neg1to1"])
def test_fixed(name: str) -> None:
    factory = f"default_fixed_qparams_range_{name}_fake_quant"
    ours, theirs = (getattr(module, factory)() for module in (po, ao_fake_quantize))
    for x in STREAMS["normal"]:
        assert_all_same(step(ours, x), step(theirs, x))
    assert_all_same(ours.calculate_qparams(), theirs.calculate_qparams())
    ours.disable_fake_quant()
    assert_same(ours(x), x)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(config: str, dtype: torch.dtype) -> None:
    """The statistics of float32, the output in the type of the input (D14)."""
    ours, wide = pair(config)[0], pair(config)[0]
    for x in STREAMS["growing"][:2]:
        x = x.to(dtype)
        y, gradient = step(ours, x)
        wide(x.float())
        assert (y.dtype, gradient.dtype) == (dtype, dtype)
        assert_all_same([ours.scale, ours.zero_point], [wide.scale, wide.zero_point])
        axis = ours.ch_axis if ours.is_per_channel else None
        grid = (ours.quant_min, ours.quant_max)
        assert_same(y, po.ops.fake_quantize(x, ours.scale, ours.zero_point, *grid, axis))


def test_batches_that_are_empty() -> None:
    for config in CONFIGS:
        ours, _ = pair(config)
        x = torch.empty(0, 5, 3)
        before = [t.clone() for t in ours.buffers()]
        assert ours(x) is x
        assert_all_same(list(ours.buffers()), before, config)


def test_update_scale() -> None:
    """By the statistics as they are, with the observer off too; of none it stays."""
    for config in CONFIGS:
        ours, _ = pair(config)
        ours.scale.fill_(0.25)
        ours.update_scale()
        assert set(ours.scale.tolist()) == {0.25}
        ours(STREAMS["normal"][0])
        expected = ours.scale.clone(), ours.zero_point.clone()
        ours.disable_observer()
        ours.scale.fill_(0.25)
        ours.zero_point.zero_()
        ours.update_scale()
        assert_all_same([ours.scale, ours.zero_point], expected, config)


def test_switches() -> None:
    model = nn.Sequential(po.FakeQuantize(), nn.Linear(3, 3), po.FusedMovingAvgObsFakeQuantize())
    fakes = (model[0], model[2])
    for function, name, value in (
        (po.disable_observer, "observer_enabled", 0),
        (po.disable_fake_quant, "fake_quant_enabled", 0),
        (po.enable_observer, "observer_enabled", 1),
        (po.enable_fake_quant, "fake_quant_enabled", 1),
    ):
        model.apply(function)
        assert [int(getattr(fake, name)) for fake in fakes] == [value, value]
    assert [fake.observer_enabled.dtype for fake in fakes] == [torch.uint8, torch.int64]


def test_off_keeps_everything() -> None:
    """With both switches off: the input comes out, the state stays."""
    for config in CONFIGS:
        ours, _ = pair(config)
        ours(STREAMS["normal"][0])
        turn(ours, 0, 0)
        before = [t.clone() for t in ours.buffers()]
        x = STREAMS["growing"][3]
        y, gradient = step(ours, x)
        assert_same(y, x, config)
        assert_same(gradient, torch.linspace(-1, 1, x.numel()).reshape(x.shape), config)
        assert_all_same(list(ours.buffers()), before, config)


def test_off_from_the_start_leaves_the_statistics_unfed() -> None:
    ours = po.FakeQuantize()
    ours.disable_observer()
    ours(torch.randn(9))
    assert ours.activation_post_process.min_val == torch.inf
    assert (ours.scale, ours.zero_point) == (1, 0)
    ours.enable_observer()
    x = torch.randn(9)
    ours(x)
    assert ours.activation_post_process.min_val == x.min()


def test_off_from_the_start_per_channel() -> None:
    """The state is sized all the same, with the scale of an observer that was never fed."""
    ours = pair("per_channel")[0]
    ours.disable_observer()
    x = torch.tensor([[0.4, 0.6, -1.4, 500.0, -500.0]])
    assert_same(ours(x), torch.tensor([[0.0, 1.0, -1.0, 127.0, -128.0]]))
    assert_same(ours.scale, torch.ones(5))
    assert_same(ours.zero_point, torch.zeros(5, dtype=torch.int32))
    assert (ours.activation_post_process.min_val == torch.inf).all()


def test_per_channel_state_is_sized_at_once_where_the_channels_are_known() -> None:
    ours = po.FakeQuantize(
        po.PerChannelMinMaxObserver,
        qscheme=torch.per_channel_affine,
        ch_axis=1,
        num_channels=5,
    )
    assert ours.scale.shape == ours.zero_point.shape == (5,)


def test_rejects_inputs() -> None:
    for config in CONFIGS:
        ours, _ = pair(config)
        ours(torch.randn(3, 4))
        for x, came in not_dense_real_float().values():
            if not isinstance(x, Tensor):
                continue
            with unchanged(*ours.buffers()):
                assert_rejected(ours, {"x": x}, TypeError, f"x: expected a dense .*, {came}")


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"quant_min": 0, "quant_max": 300}, ValueError, r"inside that of .* got \[0, 300\]"),
        ({"quant_min": 5}, ValueError, "expected both or neither"),
        ({"quant_min": 9, "quant_max": 3}, ValueError, "quant_min: expected a value below"),
        ({"dtype": torch.float8_e5m2}, ValueError, "dtype: expected .* got torch.float8_e5m2"),
        ({"averaging_constant": 2}, ValueError, "averaging_constant: expected .* got 2"),
    ],
)
def test_rejects_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    assert_rejected(po.FakeQuantize, arguments, error, match)


def test_rejects_observers() -> None:
    with pytest.raises(TypeError, match=r"observer: expected a MovingAverage.* got MinMaxObserver"):
        po.FusedMovingAvgObsFakeQuantize(observer=po.MinMaxObserver)
    with pytest.raises(TypeError, match=r"observer: expected a FixedQParamsObserver, got MinMax"):
        po.FixedQParamsFakeQuantize(observer=po.MinMaxObserver)


def test_an_observe_of_its_own_is_called() -> None:
    module = po.FakeQuantize()
    calls = []
    observe = module.activation_post_process.observe

    def wrapped(*args: torch.Tensor) -> None:
        calls.append(len(args))
        observe(*args)

    module.activation_post_process.observe = wrapped
    module(torch.randn(8))
    assert calls == [2]


def test_a_scale_of_another_size_is_sized_anew() -> None:
    module = po.FakeQuantize()
    module.scale, module.zero_point = torch.ones(4), torch.zeros(4, dtype=torch.int32)
    x = torch.randn(8)
    assert module(x).shape == x.shape
    assert module.scale.shape == (1,)

"""Every module of the package that watches, rounds or clips tensors, made for (batch, 4, 5)."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor, nn

import pyobserver as po
from pyobserver import horizon as hz
from pyobserver import tensor_quant as tq

Maker = Callable[[], nn.Module]
HAS_TORCHAO = find_spec("torchao") is not None

BATCHES = [
    torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(i)) * (i + 1) for i in range(3)
]

OBSERVERS: dict[str, Maker] = {
    "MinMax": po.MinMaxObserver,
    "MinMax_memoryless": lambda: po.MinMaxObserver(memoryless=True),
    "MovingAverage": lambda: po.MovingAverageMinMaxObserver(0.3),
    "PerChannel": lambda: po.PerChannelMinMaxObserver(1, num_channels=4),
    "PerChannel_unsized": lambda: po.PerChannelMinMaxObserver(-1),
    "MovingAveragePerChannel": lambda: po.MovingAveragePerChannelMinMaxObserver(
        0.3, 1, num_channels=4
    ),
    **{
        f"Histogram_{method}": lambda method=method: po.HistogramObserver(bins=64, method=method)
        for method in ("l2_greedy", "minmax", "mse", "lp", "percentile", "kl")
    },
    "Histogram_aligned": lambda: po.HistogramObserver(bins=64, combine="aligned"),
    "LogHistogram": lambda: po.LogHistogramObserver(3),
    "LogHistogram_per_channel": lambda: po.PerChannelLogHistogramObserver(1, 3, num_channels=4),
    "LogHistogram_per_block": lambda: po.PerBlockLogHistogramObserver((1, 2, 5), 3),
    "MinMax_per_block": lambda: po.PerBlockMinMaxObserver((1, 2, 5)),
    "KL": lambda: po.KLObserver(bins=64, start_bin=16, mantissa_bits=3),
    "MSE": lambda: po.MSEObserver(3),
    "Percentile": lambda: po.PercentileObserver(0.9, mantissa_bits=3),
}
PASSIVE: dict[str, Maker] = {
    "FixedQParams": lambda: po.FixedQParamsObserver(0.1, 3),
    "Noop": po.NoopObserver,
    "Placeholder": po.PlaceholderObserver,
    "Recording": po.RecordingObserver,
    "ReuseInput": po.ReuseInputObserver,
}


def _learning(module: po.LearnableFakeQuantize) -> nn.Module:
    module(BATCHES[0])
    module.enable_param_learning()
    return module


FAKE_QUANTIZES: dict[str, Maker] = {
    **{
        f"FakeQuantize_{name}": lambda make=make: po.FakeQuantize(make)
        for name, make in OBSERVERS.items()
        if not name.endswith("_per_block")
    },
    "Learnable": po.LearnableFakeQuantize,
    "Learnable_learning": lambda: _learning(po.LearnableFakeQuantize(grad_factor="features")),
    "Learnable_per_channel": lambda: po.LearnableFakeQuantize(
        po.PerChannelMinMaxObserver,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=1,
        num_channels=4,
    ),
    "FakeQuantize_symmetric": lambda: po.FakeQuantize(
        po.MovingAveragePerChannelMinMaxObserver,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
        ch_axis=1,
        num_channels=4,
    ),
    "FakeQuantize_fixed": lambda: po.FixedQParamsFakeQuantize(
        lambda: po.FixedQParamsObserver(0.1, 3)
    ),
    "Fused": lambda: po.FusedMovingAvgObsFakeQuantize(averaging_constant=0.3),
    "Fused_per_channel": lambda: po.FusedMovingAvgObsFakeQuantize(
        po.MovingAveragePerChannelMinMaxObserver, averaging_constant=0.3, ch_axis=1, num_channels=4
    ),
}
_CHANNELS = {"qscheme": torch.per_channel_symmetric, "ch_axis": 1}
HORIZON_OBSERVERS: dict[str, Maker] = {
    "MinMax": lambda: hz.MinMaxObserver(0.3),
    "MinMax_pot": lambda: hz.MinMaxObserver(
        0.3, compute_scale_strategy=hz.ComputeScaleStrategy.POT
    ),
    "MinMax_per_channel": lambda: hz.MinMaxObserver(0.3, **_CHANNELS),
    "Clip": lambda: hz.ClipObserver(0.3, xmin=-2.0, xmax=2.0),
    "FixedScale": lambda: hz.FixedScaleObserver(scale=0.02),
    "Histogram": hz.HistogramObserver,
    "MSE_per_channel": lambda: hz.MSEObserver(**_CHANNELS),
    "Percentile": hz.PercentileObserver,
    "KL": lambda: hz.KLObserver(bins=64, start_bin=16),
    "Mix": lambda: hz.MixObserver(methods=("minmax", "mse")),
}


def _in_state(make: Maker, state: hz.FakeQuantState) -> nn.Module:
    module = hz.FakeQuantize(make)
    if state is hz.FakeQuantState.VALIDATION:
        module(BATCHES[0])
    module.set_state(state)
    return module


HORIZON: dict[str, Maker] = {
    **{f"horizon_{name}": make for name, make in HORIZON_OBSERVERS.items()},
    **{
        f"horizon_{name}_{state.name}": lambda make=make, state=state: _in_state(make, state)
        for name, make in HORIZON_OBSERVERS.items()
        for state in hz.FakeQuantState
        if state is hz.FakeQuantState.QAT or name in ("MinMax", "Histogram")
    },
    "horizon_QuantStub": hz.QuantStub,
    "horizon_DeQuantStub": hz.DeQuantStub,
}


def _calibrating(**desc: object) -> nn.Module:
    return tq.TensorQuantizer(tq.QuantDescriptor(**desc), if_calib=True)  # type: ignore[arg-type]


TENSOR_QUANT: dict[str, Maker] = {
    "TensorQuantizer": tq.TensorQuantizer,
    "TensorQuantizer_axis": lambda: tq.TensorQuantizer(tq.QuantDescriptor(axis=1)),
    "TensorQuantizer_amax": lambda: tq.TensorQuantizer(tq.QuantDescriptor(amax=2.0)),
    "TensorQuantizer_clip": lambda: tq.TensorQuantizer(
        tq.QuantDescriptor(amax=2.0, learn_amax=True)
    ),
    "TensorQuantizer_calib": lambda: _calibrating(calib_method="histogram"),
    "TensorQuantizer_calib_max": lambda: _calibrating(calib_method="max", axis=1),
    "Clip": lambda: tq.Clip(-1.0, 2.0),
}


def _torchao() -> dict[str, Maker]:
    from torchao.quantization.granularity import PerAxis, PerTensor
    from torchao.quantization.quant_primitives import MappingType

    from pyobserver.compat import torchao as ours

    def observer(cls: type, granularity: object, **options: object) -> nn.Module:
        return cls(MappingType.ASYMMETRIC, torch.uint8, granularity, **options)

    def linear() -> ours.ObservedLinear:
        torch.manual_seed(1)
        observers = (
            observer(ours.AffineQuantizedMinMaxObserver, PerTensor()),
            observer(ours.AffineQuantizedMinMaxObserver, PerAxis(0)),
        )
        return ours.ObservedLinear(5, 5, *observers)

    def quantized_linear() -> nn.Module:
        layer = linear()
        layer(BATCHES[0])
        return ours.QuantizedLinear.from_observed(layer, torch.uint8)

    made: dict[str, Maker] = {
        "torchao_MinMax": lambda: observer(ours.AffineQuantizedMinMaxObserver, PerTensor()),
        "torchao_MinMax_axis": lambda: observer(ours.AffineQuantizedMinMaxObserver, PerAxis(1)),
        "torchao_MovingAverage": lambda: observer(
            ours.AffineQuantizedMovingAverageMinMaxObserver, PerTensor(), averaging_constant=0.3
        ),
        "torchao_Histogram": lambda: observer(
            ours.AffineQuantizedHistogramObserver, PerTensor(), bins=64
        ),
        "torchao_LogHistogram": lambda: observer(
            ours.AffineQuantizedLogHistogramObserver, PerAxis(1), mantissa_bits=3
        ),
        "torchao_ObservedLinear": linear,
        "torchao_QuantizedLinear": quantized_linear,
    }
    return made


MAKERS: dict[str, Maker] = {
    **OBSERVERS,
    **PASSIVE,
    **FAKE_QUANTIZES,
    **HORIZON,
    **TENSOR_QUANT,
    **(_torchao() if HAS_TORCHAO else {}),
}


def made(name: str) -> nn.Module:
    """The module, fed where the first tensor sizes its state, for that is not traced."""
    module = MAKERS[name]()
    fed = copy.deepcopy(module)
    fed(BATCHES[0])
    same = [t.shape for t in module.buffers()] == [t.shape for t in fed.buffers()]
    return module if same else fed


def public_classes() -> set[type[nn.Module]]:
    """Those that can be made, of all places that a user takes them from."""
    places: list[ModuleType] = [po, hz, tq]
    if HAS_TORCHAO:
        places.append(importlib.import_module("pyobserver.compat.torchao"))
    found = [getattr(place, name) for place in places for name in place.__all__]
    bases = po.observers.UniformQuantizationObserverBase, po.HistogramObserverBase
    return {
        cls
        for cls in found
        if inspect.isclass(cls)
        and issubclass(cls, nn.Module)
        and not inspect.isabstract(cls)
        and cls not in bases
        and not issubclass(cls, nn.modules.batchnorm._BatchNorm)  # they watch nothing
    }


def state_of(module: nn.Module) -> list[Tensor]:
    """What the module holds and what is recorded, as it is now."""
    recorded = [t for m in module.modules() for t in getattr(m, "tensor_val", ())]
    return [t.detach().clone() for t in (*module.parameters(), *module.buffers(), *recorded)]

"""Horizon's observers: the published formulas against numbers computed by hand, and the rest."""

from __future__ import annotations

import ast
import copy
import math
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pyobserver.horizon
from pyobserver import ranges
from pyobserver.horizon import (
    ClipObserver,
    ComputeScaleStrategy,
    FixedScaleObserver,
    HistogramObserver,
    KLObserver,
    MinMaxObserver,
    MixObserver,
    MSEObserver,
    ObserverBase,
    PercentileObserver,
    qint4,
    qint16,
)

STATISTIC, POT, KPOT, FP16 = ComputeScaleStrategy
METHODS = [HistogramObserver, MSEObserver, PercentileObserver, KLObserver, MixObserver]
OBSERVERS = [MinMaxObserver, ClipObserver, *METHODS]
PER_CHANNEL: dict[str, Any] = {"qscheme": torch.per_channel_symmetric, "ch_axis": 1}


def scale_of(observer: ObserverBase) -> Tensor:
    scale, zero_point = observer.calculate_qparams()
    assert zero_point is None
    return scale


def fed(observer: ObserverBase, *tensors: Tensor) -> ObserverBase:
    for x in tensors:
        assert observer(x) is x
    return observer


# --- the formulas of seed 1, by hand -----------------------------------------------------------


def test_scale_is_the_greatest_magnitude_over_half_the_steps() -> None:
    observer = fed(MinMaxObserver(), torch.tensor([-3.0, 1.0, 2.0]))
    torch.testing.assert_close(scale_of(observer), torch.tensor([3 / 127.5]), rtol=1e-7, atol=0)
    observer.reset_dtype(qint16)
    torch.testing.assert_close(scale_of(observer), torch.tensor([3 / 32767.5]), rtol=1e-7, atol=0)
    observer.reset_dtype(qint4)
    torch.testing.assert_close(scale_of(observer), torch.tensor([0.4]), rtol=1e-7, atol=0)


def test_bounds_of_the_caller_make_the_steps() -> None:
    observer = fed(MinMaxObserver(quant_min=-127, quant_max=127), torch.tensor([-2.54, 1.0]))
    torch.testing.assert_close(scale_of(observer), torch.tensor([0.02]), rtol=1e-7, atol=0)


def test_one_sided_values_and_zeros() -> None:
    assert scale_of(fed(MinMaxObserver(), torch.tensor([255.0, 51.0]))) == 2.0
    eps = torch.finfo(torch.float32).eps
    assert scale_of(fed(MinMaxObserver(), torch.zeros(3))) == eps


def test_moving_average_by_hand() -> None:
    observer = MinMaxObserver(averaging_constant=0.25)
    fed(observer, torch.tensor([-1.0, 2.0]), torch.tensor([-3.0, 6.0]))
    assert observer.min_val == -1.5
    assert observer.max_val == 3.0
    fed(MinMaxObserver(averaging_constant=1.0), torch.tensor([-9.0, 9.0]))


def test_per_channel_by_hand() -> None:
    x = torch.tensor([[[1.0, -2.0], [0.5, 0.0]], [[0.0, 0.0], [-4.0, 1.0]]])
    observer = fed(MinMaxObserver(**PER_CHANNEL), x)
    torch.testing.assert_close(scale_of(observer), torch.tensor([2.0, 4.0]) / 127.5)
    assert observer.min_val.tolist() == [-2.0, -4.0]
    assert observer.max_val.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("strategy", "magnitude", "expected"),
    [
        (STATISTIC, 3.0, 3 / 127.5),
        (POT, 3.0, 2.0**-5),  # log2(3 / 127.5) = -5.41, up
        (KPOT, 3.0, 2.0**-5),  # and to the nearest
        (POT, 2.2, 2.0**-5),  # log2(2.2 / 127.5) = -5.86, up
        (KPOT, 2.2, 2.0**-6),  # and to the nearest
        (POT, 127.5 / 64, 2.0**-6),  # a power of two is one
        (FP16, 1.0, 0.00784301757812),  # 1 / 127.5 = 0.0078431372 between 0.00783539, 0.00784302
        (FP16, 1e-6, 2.0**-23),  # eps, which a half holds
        (FP16, 127.5 * 1e6, 65504.0),  # the greatest half
    ],
)
def test_scale_strategies_by_hand(
    strategy: ComputeScaleStrategy, magnitude: float, expected: float
) -> None:
    observer = MinMaxObserver(compute_scale_strategy=strategy)
    scale = scale_of(fed(observer, torch.tensor([-magnitude, magnitude / 2])))
    torch.testing.assert_close(scale, torch.tensor([expected]), rtol=1e-6, atol=0)


def test_limits_clip_the_values() -> None:
    observer = ClipObserver(xmin=-0.5, xmax=2.0, averaging_constant=0.5)
    fed(observer, torch.tensor([-3.0, 1.0]))
    assert (observer.min_val, observer.max_val) == (-0.5, 1.0)
    fed(observer, torch.tensor([0.5, 7.0]), torch.empty(0))
    assert (observer.min_val, observer.max_val) == (0.0, 1.5)
    fed(observer, torch.tensor([torch.nan, torch.inf]))
    assert (observer.min_val, observer.max_val) == (0.0, 1.5)
    assert observer.nonfinite_count == 2


def test_limits_per_channel_on_any_axis() -> None:
    x = torch.tensor([[-3.0, 0.25], [4.0, torch.nan]])
    observer = fed(ClipObserver(**PER_CHANNEL), x)
    assert observer.min_val.tolist() == [-1.0, 0.25]
    assert observer.max_val.tolist() == [1.0, 0.25]
    with pytest.raises(ValueError, match="xmin: expected a value below xmax"):
        ClipObserver(xmin=1.0, xmax=1.0)
    with pytest.raises(ValueError, match="xmin: expected a value below xmax, got xmin='0'"):
        ClipObserver(xmin="0")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x: expected a dense tensor"):
        observer(None)


def test_fixed_scale() -> None:
    observer = fed(FixedScaleObserver(scale=0.5), torch.tensor([1e6]))
    assert scale_of(observer) == 0.5
    observer.reset_dtype(qint16)
    assert scale_of(observer) == 0.5
    assert observer.max_val == 0.5 * 32767
    several = FixedScaleObserver(scale=[0.5, 0.25], **PER_CHANNEL)
    assert scale_of(several).tolist() == [0.5, 0.25]
    assert scale_of(FixedScaleObserver(scale=0.7, compute_scale_strategy=POT)) == 1.0
    again = FixedScaleObserver(scale=1.0, **PER_CHANNEL)
    again.load_state_dict(several.state_dict())
    assert scale_of(again).tolist() == [0.5, 0.25]
    for scale in (0.0, -1.0, math.inf, [0.5, 0.5]):
        with pytest.raises(ValueError, match="scale: expected positive finite values, one in all"):
            FixedScaleObserver(scale=scale)


# --- the methods are those of the engine -------------------------------------------------------


@pytest.mark.parametrize(
    ("observer", "method", "options"),
    [
        (HistogramObserver(), "mse", {}),
        (MSEObserver(dtype=qint4), "mse", {}),
        (PercentileObserver(percentile=0.99), "percentile", {"percentile": 0.99}),
        (KLObserver(stride=16), "kl", {"stride": 16}),
        (HistogramObserver(method="lp", method_kwargs={"p": 3.0}), "lp", {"p": 3.0}),
        (MSEObserver(compute_scale_strategy=POT), "mse", {}),
        (MSEObserver(compute_scale_strategy=FP16), "mse", {}),
        (PercentileObserver(compute_scale_strategy=POT), "percentile", {"percentile": 0.9999}),
    ],
)
def test_methods(observer: Any, method: str, options: dict[str, Any]) -> None:
    fed(observer, torch.randn(3000), 4 * torch.randn(50))
    solved = ranges.solve(
        observer.statistic(),
        method,
        quant_min=observer.quant_min,
        quant_max=observer.quant_max,
        symmetric=True,
        scale_constraint=observer.compute_scale_strategy.value,
        **options,
    )
    assert scale_of(observer) == solved.scale


@pytest.mark.parametrize("strategy", [POT, KPOT])
@pytest.mark.parametrize("observer_class", [MSEObserver, KLObserver, MixObserver])
def test_methods_choose_powers_of_two(
    observer_class: type[ObserverBase], strategy: ComputeScaleStrategy
) -> None:
    observer = fed(observer_class(compute_scale_strategy=strategy), torch.randn(2000))
    mantissa, _ = torch.frexp(scale_of(observer))
    assert mantissa == 0.5


def test_the_trainable_power_of_two_of_a_percentile_is_the_nearest() -> None:
    x = torch.linspace(-2.2, 2.2, 1001)  # as above: 2 ** -5.86
    kwargs = {"percentile": 1.0}
    assert scale_of(fed(PercentileObserver(compute_scale_strategy=POT, **kwargs), x)) == 2.0**-5
    assert scale_of(fed(PercentileObserver(compute_scale_strategy=KPOT, **kwargs), x)) == 2.0**-6


def test_searches_are_among_the_powers_of_two_not_rounded_to_one() -> None:
    others = 0
    for spread in torch.linspace(1, 2, 12):
        x = spread * torch.randn(3000)
        scales = {
            strategy: scale_of(fed(MSEObserver(dtype=qint4, compute_scale_strategy=strategy), x))
            for strategy in (STATISTIC, POT, KPOT)
        }
        assert scales[KPOT] == scales[POT]
        others += int(scales[KPOT] != 2 ** scales[STATISTIC].log2().round())
    assert others > 0


def cosine(x: Tensor, scale: Tensor) -> float:
    quantized = torch.clamp(torch.round(x / scale), -8, 7) * scale
    return float(torch.nn.functional.cosine_similarity(x, quantized, dim=0))


def test_mix_takes_the_nearest_direction() -> None:
    x = torch.distributions.StudentT(2.0).sample((20000,))
    mix = fed(MixObserver(dtype=qint4), x)
    candidates = [
        scale_of(fed(HistogramObserver(method=method, method_kwargs=options, dtype=qint4), x))
        for method, options in mix.methods
    ]
    assert len({float(scale) for scale in candidates}) == 4
    best = max(candidates, key=lambda scale: cosine(x, scale))
    assert scale_of(mix) == best
    assert cosine(x, best) > cosine(x, candidates[0]) + 0.01


def test_mix_takes_options_and_refuses_none() -> None:
    x = torch.randn(1000)
    only = fed(MixObserver(methods=[("percentile", {"percentile": 0.5})]), x)
    assert scale_of(only) == scale_of(fed(PercentileObserver(percentile=0.5), x))
    for bad in (3, [("mse",)], [3], [("mse", 3)]):
        with pytest.raises(TypeError, match="methods: expected names of methods, or pairs of a na"):
            MixObserver(methods=bad)
    with pytest.raises(ValueError, match="methods: expected at least one, got none"):
        MixObserver(methods=())
    with pytest.raises(ValueError, match="MixObserver: method: expected one of"):
        MixObserver(methods=["best"])


def test_mix_per_channel_takes_each_channels_own() -> None:
    x = torch.stack((torch.randn(5000), torch.distributions.StudentT(1.5).sample((5000,))), 1)
    mix = fed(MixObserver(dtype=qint4, **PER_CHANNEL), x)
    alone = [scale_of(fed(MixObserver(dtype=qint4), column)) for column in x.T]
    assert scale_of(mix).tolist() == [float(scale) for scale in alone]


# --- what every observer has -------------------------------------------------------------------


@pytest.mark.parametrize("observer_class", OBSERVERS)
@pytest.mark.parametrize("kwargs", [{}, PER_CHANNEL], ids=["tensor", "channel"])
def test_never_fed_warns_and_gives_one_and_zero(
    observer_class: type[ObserverBase], kwargs: dict[str, Any]
) -> None:
    observer = observer_class(**kwargs)
    with pytest.warns(UserWarning, match="was never fed: calculate_qparams returns scale 1"):
        scale, zero_point = observer.calculate_qparams()
    assert scale.tolist() == [1.0]
    assert zero_point is not None
    assert zero_point.tolist() == [0]


@pytest.mark.parametrize("observer_class", OBSERVERS)
@pytest.mark.parametrize("kwargs", [{}, PER_CHANNEL], ids=["tensor", "channel"])
def test_round_trips(observer_class: type[ObserverBase], kwargs: dict[str, Any]) -> None:
    observer = fed(observer_class(**kwargs), torch.randn(6, 3, 4))
    observer.reset_dtype(qint4)
    expected = scale_of(observer)
    loaded = observer_class(**kwargs)
    loaded.load_state_dict(observer.state_dict())
    for copied in (loaded, copy.deepcopy(observer), pickle.loads(pickle.dumps(observer))):
        assert torch.equal(scale_of(copied), expected)
        assert copied.dtype is qint4
        assert (copied.quant_min, copied.quant_max) == (-8, 7)
        fed(copied, 9 * torch.randn(6, 3, 4))
        assert torch.equal(scale_of(observer), expected)


@pytest.mark.parametrize("observer_class", OBSERVERS)
def test_a_half_model_and_half_values(observer_class: type[ObserverBase]) -> None:
    x = torch.randn(1000)
    observer = observer_class().half()
    assert observer.min_val.dtype == torch.float32
    in_half = scale_of(fed(observer, x.bfloat16()))
    torch.testing.assert_close(in_half, scale_of(fed(observer_class(), x)), rtol=0.05, atol=0)


def test_merging_is_the_engines() -> None:
    a, b = torch.randn(400), 3 * torch.randn(500)
    merged = fed(HistogramObserver(), a) + fed(HistogramObserver(), b)
    assert torch.equal(scale_of(merged), scale_of(fed(HistogramObserver(), a, b)))


def test_with_args() -> None:
    factory = MinMaxObserver.with_args(dtype=qint16).with_args(averaging_constant=1.0)
    observer = factory()
    assert observer.dtype is qint16
    assert observer.averaging_constant == 1.0


def test_repr_shows_the_range_per_tensor_alone() -> None:
    observer = fed(MinMaxObserver(), torch.tensor([-1.5, 2.0]))
    assert repr(observer) == "MinMaxObserver(min_val=-1.5, max_val=2.0)"
    assert repr(fed(MinMaxObserver(**PER_CHANNEL), torch.randn(2, 3))) == "MinMaxObserver()"
    assert repr(MinMaxObserver(factory_kwargs={"device": "meta"})) == "MinMaxObserver()"


def test_base_is_abstract_and_subclasses_keep_the_range() -> None:
    with pytest.raises(TypeError, match="abstract"):
        ObserverBase()  # type: ignore[abstract]

    class Last(ObserverBase):
        def forward(self, x: Tensor) -> Tensor:
            self.min_val, self.max_val = x.aminmax()
            return x

    assert scale_of(fed(Last(), torch.tensor([-2.55]))) == pytest.approx(0.02)


# --- arguments ---------------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"qscheme": torch.per_channel_symmetric}, ValueError, "ch_axis: expected at least 0 with"),
    ({"ch_axis": 0}, ValueError, "ch_axis: expected a negative value with .*, got 0"),
    ({"ch_axis": "0"}, TypeError, "ch_axis: expected an integer, got '0'"),
    ({"ch_axis": True}, TypeError, "ch_axis: expected an integer, got True"),
    ({"qscheme": torch.per_tensor_affine}, NotImplementedError, "qscheme: expected one of"),
    ({"dtype": torch.uint8}, ValueError, "dtype: expected one of qint4"),
    ({"quant_min": 5, "quant_max": -5}, ValueError, "quant_min: expected a value below quant_max"),
    ({"quant_min": 1, "quant_max": 5}, ValueError, "expected a range that holds 0"),
    ({"quant_min": -129, "quant_max": 5}, ValueError, r"inside that of qint8, \[-128, 127\]"),
    ({"quant_min": -8, "quant_max": 8, "dtype": qint4}, ValueError, "inside that of qint4"),
    ({"quant_min": -8}, ValueError, "expected two integers or neither, got quant_max=None"),
    ({"quant_min": -8.0, "quant_max": 7}, ValueError, "two integers or neither, got quant_min="),
    ({"averaging_constant": 0.0}, ValueError, r"averaging_constant: expected a value in \(0, 1\]"),
    ({"averaging_constant": 1.5}, ValueError, r"averaging_constant: expected a value in \(0, 1\]"),
    ({"averaging_constant": "1"}, TypeError, "averaging_constant: expected a number, got '1'"),
    ({"is_sync_quantize": "no"}, TypeError, "is_sync_quantize: expected a bool or None, got 'no'"),
    ({"compute_scale_strategy": "POT"}, TypeError, "compute_scale_strategy: expected a Compute"),
]


@pytest.mark.parametrize("observer_class", [MinMaxObserver, HistogramObserver])
@pytest.mark.parametrize(("kwargs", "error", "message"), BAD)
def test_arguments_are_checked(
    observer_class: type[ObserverBase], kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"{observer_class.__name__}: .*{message}"):
        observer_class(**kwargs)


def test_no_check_is_an_assertion_which_python_may_leave_out() -> None:
    for source in Path(pyobserver.horizon.__file__).parent.rglob("*.py"):
        tree = ast.parse(source.read_text())
        assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert)], source


@pytest.mark.parametrize("observer_class", OBSERVERS)
def test_failed_calls_change_nothing(observer_class: type[ObserverBase]) -> None:
    observer = fed(observer_class(**PER_CHANNEL), torch.randn(4, 3))
    before = copy.deepcopy(observer.state_dict())
    with pytest.raises(ValueError, match="dtype: expected one of"):
        observer.reset_dtype(torch.uint8)
    with pytest.raises(ValueError, match="expected"):
        observer(torch.randn(4, 5))
    with pytest.raises(TypeError, match="expected"):
        observer(torch.ones(4, 3, dtype=torch.int64))
    after = observer.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]


def test_another_method_is_checked_before_it_is_taken() -> None:
    observer = HistogramObserver()
    with pytest.raises(ValueError, match="HistogramObserver: method: expected one of"):
        observer.reset_method("best")
    with pytest.raises(ValueError, match=r"percentile: expected a number in \(0, 1\]"):
        observer.reset_method("percentile", {"percentile": 99.9})
    with pytest.raises(TypeError, match="p: expected one of the options of method 'mse'"):
        observer.reset_method("mse", {"p": 2.0})
    assert observer.method == "mse"


# --- states of other versions ------------------------------------------------------------------

OLD: list[tuple[dict[str, Tensor], tuple[float, float]]] = [
    ({"min_vals": torch.tensor([-2.0]), "max_vals": torch.tensor([3.0])}, (-2.0, 3.0)),
    ({"min_val": torch.tensor(-2.0), "max_val": torch.tensor(3.0)}, (-2.0, 3.0)),
    ({"min_val": torch.empty(0), "max_val": torch.empty(0)}, (torch.inf, -torch.inf)),
    (
        {"min_val": torch.tensor([-2.0]), "max_val": torch.tensor([3.0]), "eps": torch.ones(1)},
        (-2.0, 3.0),
    ),
]


@pytest.mark.parametrize(("state", "ends"), OLD)
def test_states_of_older_versions(state: dict[str, Tensor], ends: tuple[float, float]) -> None:
    observer, given = MinMaxObserver(), dict(state)
    observer.load_state_dict(state)
    assert (float(observer.min_val), float(observer.max_val)) == ends
    assert observer.eps.tolist() == [1.0 if "eps" in state else torch.finfo(torch.float32).eps]
    assert state.keys() == given.keys()  # the caller's dict is the caller's
    fed(observer, torch.tensor([-4.0, 4.0]))
    assert observer.min_val.dim() == 0


def test_a_state_of_this_version_without_eps() -> None:
    state = OrderedDict({"min_val": torch.tensor(-2.0), "max_val": torch.tensor(3.0)})
    state._metadata = {"": {"version": 3}}  # type: ignore[attr-defined]
    observer = MinMaxObserver()
    observer.load_state_dict(state)
    assert observer.min_val == -2.0


@pytest.mark.parametrize("prefix", ["", "inner."])
def test_channels_into_empty_buffers(prefix: str) -> None:
    observer = MinMaxObserver(**PER_CHANNEL)
    target = torch.nn.ModuleDict({"inner": observer}) if prefix else observer
    state = {
        f"{prefix}min_vals": torch.tensor([-1.0, -2.0, 0.0]),
        f"{prefix}max_vals": torch.tensor([1.0, 1.0, 4.0]),
    }
    target.load_state_dict(state)
    torch.testing.assert_close(scale_of(observer), torch.tensor([1.0, 2.0, 4.0]) / 127.5)
    target.load_state_dict({key: value[0] for key, value in state.items()})  # 0-d
    assert observer.min_val.tolist() == [-1.0]


def test_only_keys_of_ones_own_are_renamed() -> None:
    observer = MinMaxObserver()
    errors: list[str] = []
    state = {"min_vals": torch.tensor(-9.0), "a.min_val": torch.tensor(-1.0)}
    observer._load_from_state_dict(state, "a.", {}, False, [], [], errors)
    assert observer.min_val == -1.0


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    observer = fed(MinMaxObserver(**PER_CHANNEL), torch.randn(2, 3))
    before = observer.min_val.clone()
    with pytest.raises(RuntimeError, match=r"expected one number of channels, got \(2,\) and \(4"):
        observer.load_state_dict({"min_val": -torch.ones(2), "max_val": torch.ones(4)})
    assert torch.equal(observer.min_val, before)
    with pytest.raises(RuntimeError, match="size mismatch for min_val"):
        MinMaxObserver().load_state_dict({"min_val": -torch.ones(2), "max_val": torch.ones(2)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"max_val"'):
        MinMaxObserver().load_state_dict({"min_val": torch.ones(())})
    for extra in ({"dtype": "qint5"}, 3, {"dtype": "qint8", "quant_min": 3, "quant_max": 2}):
        with pytest.raises(ValueError, match=r"MinMaxObserver: .*expected"):
            observer.load_state_dict({**observer.state_dict(), "_extra_state": extra})


@pytest.mark.parametrize("kwargs", [{}, PER_CHANNEL], ids=["tensor", "channel"])
def test_the_method_is_of_the_state(kwargs: dict[str, Any]) -> None:
    observer = fed(HistogramObserver(**kwargs), torch.randn(500, 3))
    observer.reset_method("percentile", {"percentile": 0.9})
    loaded = HistogramObserver(**kwargs)
    loaded.load_state_dict(observer.state_dict())
    assert torch.equal(scale_of(loaded), scale_of(observer))
    assert loaded.method_kwargs == {"percentile": 0.9}


# --- compiled ----------------------------------------------------------------------------------


@pytest.mark.parametrize("observer_class", [MinMaxObserver, ClipObserver, HistogramObserver])
def test_forward_compiles_in_one_graph(observer_class: type[ObserverBase]) -> None:
    torch._dynamo.reset()  # one forward compiles for some classes alone
    eager, compiled = observer_class(), observer_class()
    forward = torch.compile(compiled, fullgraph=True, backend="eager")
    for x in (torch.randn(20), 3 * torch.randn(20)):
        eager(x)
        forward(x)
    assert torch.equal(scale_of(eager), scale_of(compiled))

"""The module ``pyobserver.tensor_quant``: descriptors, the quantizer, and its learned clip."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ops.cases import DTYPES, assert_same, sample
from torch import Tensor, nn

import pyobserver as po
from pyobserver import ranges, tensor_quant
from pyobserver.tensor_quant import (
    Clip,
    QuantDescriptor,
    TensorQuantizer,
    fake_tensor_quant,
)
from pyobserver.tensor_quant.descriptor import CALIB_METHODS

CHANGED: dict[str, Any] = {
    "num_bits": 4,
    "name": "weight",
    "fake_quant": False,
    "axis": (0, -1),
    "amax": [[1.0, 2.5]],
    "scale_amax": 0.9,
    "calib_method": "histogram",
    "unsigned": True,
    "narrow_range": True,
}
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "bits_float": ({"num_bits": 8.0}, TypeError, "num_bits: expected an integer, got float"),
    "bits_bool": ({"num_bits": True}, TypeError, "num_bits: expected an integer, got bool"),
    "bits_low": ({"num_bits": -1}, ValueError, r"num_bits: .* in \[0, 32\], got -1"),
    "bits_high": ({"num_bits": 33}, ValueError, r"num_bits: .* in \[0, 32\], got 33"),
    "name": ({"name": 3}, TypeError, "name: expected a string or None, got int"),
    "fake_quant": ({"fake_quant": 1}, TypeError, "fake_quant: expected a bool, got int"),
    "unsigned": ({"unsigned": None}, TypeError, "unsigned: expected a bool, got NoneType"),
    "narrow_range": ({"narrow_range": "no"}, TypeError, "narrow_range: .* bool, got str"),
    "axis": ({"axis": 0.0}, TypeError, "axis: expected None, an integer or a tuple .*, got 0.0"),
    "axes": ({"axis": (0, "1")}, TypeError, r"axis: .* got \(0, '1'\)"),
    "axis_learned": (
        {"axis": 0, "learn_amax": True},
        TypeError,
        "axis: expected None beside learn_amax, .* got 0",
    ),
    "amax_int": ({"amax": 1}, TypeError, "amax: expected a float, a list or an ndarray, got int"),
    "amax_tensor": ({"amax": torch.ones(1)}, TypeError, "amax: expected .*, got Tensor"),
    "scale_amax": ({"scale_amax": "2"}, TypeError, "scale_amax: expected a float or None, got str"),
    "method": ({"calib_method": "best"}, ValueError, "calib_method: expected one of max, .*'best'"),
    "ragged": ({"amax": [[1.0], [2.0, 3.0]]}, TypeError, "amax: expected numbers in a regular"),
    "unknown": ({"quant_axis": 0}, TypeError, "unexpected keyword argument 'quant_axis'"),
}


def test_descriptor_defaults() -> None:
    descriptor = QuantDescriptor()
    assert tensor_quant.ScaledQuantDescriptor is QuantDescriptor
    assert {name: getattr(descriptor, name) for name in (*CHANGED, "learn_amax")} == {
        "num_bits": 8,
        "name": None,
        "fake_quant": True,
        "axis": None,
        "amax": None,
        "learn_amax": False,
        "scale_amax": None,
        "calib_method": "max",
        "unsigned": False,
        "narrow_range": False,
    }
    assert descriptor.dict() == {"num_bits": 8, "name": None}


def test_descriptor_round_trip() -> None:
    """Through its dict; every argument makes another descriptor."""
    for changed in (CHANGED, *({name: value} for name, value in CHANGED.items())):
        descriptor = QuantDescriptor(**changed)
        assert QuantDescriptor(**descriptor.dict()) == descriptor
        assert descriptor != QuantDescriptor()
        assert descriptor.dict() == {"num_bits": 8, "name": None, **changed}
    assert QuantDescriptor(axis=[0, 1]) == QuantDescriptor(axis=(0, 1))
    assert QuantDescriptor(learn_amax=True).dict()["learn_amax"] is True
    assert QuantDescriptor() != 8


@pytest.mark.parametrize("amax", [2.5, [1.0, 2.0], np.array([0.1, 3.0])], ids=str)
def test_descriptor_keeps_amax_in_float32(amax: Any) -> None:
    kept = QuantDescriptor(amax=amax).amax
    assert kept.dtype == np.float32
    assert np.array_equal(kept, np.asarray(amax, dtype=np.float32))
    with pytest.raises(ValueError, match="read-only"):
        kept[...] = 0


@pytest.mark.parametrize("name", [*CHANGED, "learn_amax"])
def test_descriptor_is_read_only(name: str) -> None:
    descriptor = QuantDescriptor()
    with pytest.raises(AttributeError):
        setattr(descriptor, name, getattr(descriptor, name))


@pytest.mark.parametrize("name", REFUSED)
def test_descriptor_refuses(name: str) -> None:
    arguments, error, match = REFUSED[name]
    with pytest.raises(error, match=match):
        QuantDescriptor(**arguments)


def test_descriptor_of_no_bits_warns() -> None:
    with pytest.warns(UserWarning, match="num_bits is 0"):
        QuantDescriptor(num_bits=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QuantDescriptor(num_bits=1)


def test_predefined_descriptors() -> None:
    found = {
        name.removeprefix("QUANT_DESC_"): getattr(tensor_quant, name).dict()
        for name in tensor_quant.__all__
        if name.startswith("QUANT_DESC_")
    }
    plain = {"num_bits": 8, "name": None}
    kinds = [f"{conv}{n}D" for conv in ("CONV", "CONVTRANSPOSE") for n in (1, 2, 3)]
    assert found == {
        "8BIT_PER_TENSOR": plain,
        "UNSIGNED_8BIT_PER_TENSOR": {**plain, "unsigned": True},
        "8BIT_LINEAR_WEIGHT_PER_ROW": {**plain, "axis": 0},
        **{f"8BIT_{kind}_WEIGHT_PER_CHANNEL": {**plain, "axis": 0} for kind in kinds},
    }


AXES: dict[Any, tuple[int, ...]] = {
    None: (),
    0: (4, 1, 1),
    (0,): (4, 1, 1),
    -2: (1, 5, 1),
    (0, 2): (4, 1, 6),
    (-1, 0): (4, 1, 6),
    (0, 1, 2): (4, 5, 6),
}


def amax_of(x: Tensor, axis: Any) -> Tensor:
    axes = axis if isinstance(axis, tuple) else () if axis is None else (axis,)
    kept = {each % x.dim() for each in axes}
    reduced = tuple(d for d in range(x.dim()) if d not in kept)
    amax = x.abs().float()
    if reduced:
        amax = amax.amax(reduced, keepdim=True)
    return amax if kept else amax.reshape(())


@pytest.mark.parametrize("axis", AXES, ids=str)
def test_quantizes_by_each_tensor_s_own_amax(axis: Any) -> None:
    for grid in ({}, {"narrow_range": True}, {"unsigned": True}, {"num_bits": 4}):
        quantizer = TensorQuantizer(QuantDescriptor(axis=axis, **grid))
        for seed in range(2):
            x = sample((4, 5, 6), seed=seed)
            x = x.abs() if grid.get("unsigned") else x
            options = {"narrow_range": False, **grid}
            assert_same(quantizer(x), fake_tensor_quant(x, amax_of(x, axis), **options), grid)
    assert quantizer.amax is None
    assert quantizer.step_size is None
    assert not quantizer.state_dict()


def test_quantizes_to_integers() -> None:
    x = sample((4, 6))
    quantizer = TensorQuantizer(QuantDescriptor(4, fake_quant=False, axis=0, narrow_range=True))
    assert quantizer.scale is None
    q = quantizer(x)
    assert_same(q, q.round())
    assert q.abs().max() == 7
    assert_same(quantizer.scale, torch.full((4, 1), 7.0) / amax_of(x, 0))
    wide = TensorQuantizer(QuantDescriptor(4, fake_quant=False, amax=1.0))
    assert wide(x).min() == -8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = sample((4, 6), dtype)
    assert TensorQuantizer()(x).dtype == dtype
    given = TensorQuantizer(QuantDescriptor(amax=1.1)).to(dtype)
    assert given.amax.dtype == torch.float32
    assert_same(given(x), fake_tensor_quant(x, torch.tensor(1.1), narrow_range=False))
    learned = TensorQuantizer(QuantDescriptor(learn_amax=True)).to(dtype)
    assert learned(x).dtype == dtype


def test_amax_that_is_given() -> None:
    x = sample((4, 6))
    quantizer = TensorQuantizer(QuantDescriptor(amax=2.0))
    assert_same(quantizer(x), fake_tensor_quant(x, torch.tensor(2.0), narrow_range=False))
    assert_same(quantizer.step_size, torch.tensor(2 / 127))
    quantizer.amax = 1.0
    assert_same(quantizer(x), fake_tensor_quant(x, torch.tensor(1.0), narrow_range=False))
    quantizer.narrow_range = True
    assert_same(quantizer(x), fake_tensor_quant(x, torch.tensor(1.0)))
    quantizer.num_bits, quantizer.unsigned = 4, True
    assert_same(quantizer(x.abs()), fake_tensor_quant(x.abs(), torch.tensor(1.0), 4, True))
    assert quantizer.num_bits == 4
    with pytest.raises(ValueError, match="num_bits: expected an integer in"):
        quantizer.num_bits = 77
    with pytest.raises(TypeError, match=r"amax: expected shape \(\), .* got \(2,\)"):
        quantizer.amax = [1.0, 2.0]
    with pytest.raises(TypeError, match=r"amax: expected a number, .* got NoneType"):
        quantizer.amax = None
    with pytest.raises(ValueError, match=r"amax: expected no negative value, got -2\.0"):
        quantizer.amax = -2.0
    with pytest.raises(TypeError, match="unsigned: expected a bool, got int"):
        quantizer.unsigned = 0  # type: ignore[assignment]
    with pytest.raises(TypeError, match="narrow_range: expected a bool, got NoneType"):
        quantizer.narrow_range = None  # type: ignore[assignment]
    assert quantizer.amax == 1
    assert quantizer.unsigned
    assert quantizer.narrow_range
    scaled = TensorQuantizer(QuantDescriptor(amax=2.0, scale_amax=0.5, narrow_range=True))
    assert_same(scaled(x), fake_tensor_quant(x, torch.tensor(1.0)))
    scaled = TensorQuantizer(QuantDescriptor(scale_amax=0.5, narrow_range=True))
    assert_same(scaled(x), fake_tensor_quant(x, x.abs().max() * 0.5))


def test_switches() -> None:
    x = sample((4, 6))
    quantizer = TensorQuantizer()
    rounded = quantizer(x)
    assert not torch.equal(rounded, x)
    quantizer.disable_quant()
    assert quantizer(x) is x
    quantizer.enable_quant()
    quantizer.disable()
    assert quantizer(x) is x
    assert quantizer.extra_repr() == "disabled"
    quantizer.enable()
    assert_same(quantizer(x), rounded)
    assert quantizer(x[:0]).shape == (0, 6)
    assert TensorQuantizer(disabled=True)(x) is x
    assert TensorQuantizer(if_quant=False)(x) is x
    assert "amax=dynamic" in repr(quantizer)
    assert "on=quant" in repr(quantizer)


def test_disabled_gathers_nothing() -> None:
    quantizer = TensorQuantizer(disabled=True, if_calib=True)
    quantizer(sample(9))
    assert quantizer.calibrator is None


def calibrated(quantizer: TensorQuantizer, batches: list[Tensor]) -> TensorQuantizer:
    quantizer.disable_quant()
    quantizer.enable_calib()
    for x in batches:
        assert quantizer(x) is x
    quantizer.enable_quant()
    quantizer.disable_calib()
    return quantizer


@pytest.mark.parametrize("method", ["max", "histogram"])
@pytest.mark.parametrize("axis", AXES, ids=str)
def test_calibrates_the_greatest_magnitude(axis: Any, method: str) -> None:
    batches = [sample((4, 5, 6), seed=seed) * (1 - seed / 4) for seed in range(3)]
    quantizer = calibrated(
        TensorQuantizer(QuantDescriptor(axis=axis, calib_method=method)), batches
    )
    calibrated(quantizer, [])
    quantizer(100 * batches[0])  # not gathered
    for name in ("max", "minmax"):
        quantizer.load_calib_amax(name)
        expected = torch.stack([amax_of(x, axis) for x in batches]).amax(0)
        assert_same(quantizer.amax, expected)
        assert quantizer.amax.shape == AXES[axis]
    x = batches[1]
    assert_same(quantizer(x), fake_tensor_quant(x, expected, narrow_range=False))


def error_of(x: Tensor, amax: Tensor, desc: QuantDescriptor) -> float:
    y = fake_tensor_quant(x, amax, desc.num_bits, desc.unsigned, desc.narrow_range)
    return float((y - x).double().square().mean())


@pytest.mark.parametrize("narrow_range", [False, True])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("num_bits", [3, 4, 8])
def test_calibrates_the_least_error(num_bits: int, unsigned: bool, narrow_range: bool) -> None:
    """As good as the best amax found by trying a thousand."""
    x = sample(20_000) + 0.01 * sample(20_000, seed=1) ** 5
    x = x.abs() if unsigned else x
    desc = QuantDescriptor(
        num_bits, unsigned=unsigned, narrow_range=narrow_range, calib_method="mse"
    )
    quantizer = calibrated(TensorQuantizer(desc), [x[:9000], x[9000:]])
    quantizer.load_calib_amax()
    top = x.abs().max()
    best = min(error_of(x, top * i / 1000, desc) for i in range(20, 1001))
    assert error_of(x, quantizer.amax, desc) <= 1.02 * best
    assert quantizer.amax.shape == ()
    of_histogram = copy.deepcopy(quantizer)
    of_histogram._calib_method = "histogram"
    of_histogram.load_calib_amax()
    assert_same(of_histogram.amax, quantizer.amax)


@pytest.mark.parametrize("unsigned", [False, True])
def test_calibrates_a_percentile_of_the_magnitudes(unsigned: bool) -> None:
    """In percent, as NVIDIA's calibrators take it."""
    x = sample(100_000).abs() if unsigned else sample(100_000)
    desc = QuantDescriptor(calib_method="percentile", unsigned=unsigned)
    quantizer = calibrated(TensorQuantizer(desc), [x])
    for percent in (90.0, 99.0, 99.99):
        quantizer.load_calib_amax(percentile=percent)
        assert quantizer.amax == pytest.approx(float(x.abs().quantile(percent / 100)), rel=0.01)
    quantizer.load_calib_amax()
    assert quantizer.amax == pytest.approx(float(x.abs().quantile(0.9999)), rel=0.01)


@pytest.mark.parametrize("unsigned", [False, True])
def test_calibrates_by_entropy(unsigned: bool) -> None:
    """The clip that the KL observer finds over as many levels of one sign."""
    x = sample(30_000).abs() + 0.2 if unsigned else sample(30_000)
    desc = QuantDescriptor(calib_method="entropy", unsigned=unsigned)
    quantizer = calibrated(TensorQuantizer(desc), [x])
    quantizer.load_calib_amax(bins=1024)
    counts, low, high, _ = statistic = quantizer.calibrator.statistic()
    magnitudes = ranges.Histogram(counts, low, high, statistic.spacing)
    levels = 512 if unsigned else 256
    expected = ranges.solve(
        magnitudes, "kl", quant_min=-levels // 2, quant_max=levels // 2 - 1, symmetric=True,
        bins=1024,
    )  # fmt: skip
    bound = float(expected.scale) * (levels - 1) / 2
    assert quantizer.amax == pytest.approx(bound)
    assert 0.3 * x.abs().max() < quantizer.amax <= x.abs().max() * 1.0001
    quantizer.load_calib_amax("kl", bins=1024)
    assert quantizer.amax == pytest.approx(bound)


def test_calibrates_each_channel_by_any_method() -> None:
    x = sample((3, 4000)) * torch.tensor([[0.1], [1.0], [10.0]])
    quantizer = calibrated(TensorQuantizer(QuantDescriptor(4, axis=0, calib_method="mse")), [x])
    quantizer.load_calib_amax()
    assert quantizer.amax.shape == (3, 1)
    for row, amax in zip(x, quantizer.amax, strict=True):
        alone = calibrated(TensorQuantizer(QuantDescriptor(4, calib_method="mse")), [row])
        alone.load_calib_amax()
        assert amax.item() == pytest.approx(alone.amax.item())


def test_amax_of_no_values() -> None:
    quantizer = TensorQuantizer(QuantDescriptor(axis=0))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="expected statistics of some values, got none"):
            quantizer.load_calib_amax()
        assert quantizer.amax is None
        calibrated(quantizer, [torch.full((2, 3), torch.nan)])
    with pytest.warns(UserWarning, match="amax is NaN"):
        quantizer.load_calib_amax(strict=False)
    assert quantizer.amax.isnan().all()
    # a channel without a finite value is one of zeros, and said
    x = sample((2, 3))
    x[0] = torch.inf
    quantizer = calibrated(TensorQuantizer(QuantDescriptor(axis=0)), [x])
    with pytest.warns(UserWarning, match="3 NaN or infinite values were left out"):
        quantizer.load_calib_amax()
    assert_same(quantizer.amax, torch.stack([torch.zeros(1), x[1].abs().max().reshape(1)]))


def test_loaded_amax_may_take_another_shape() -> None:
    quantizer = TensorQuantizer(QuantDescriptor(axis=0))
    with pytest.warns(UserWarning, match="amax is NaN"):
        quantizer.load_calib_amax(strict=False)
    x = sample((4, 6))
    calibrated(quantizer, [x]).load_calib_amax()
    assert_same(quantizer.amax, amax_of(x, 0))


def test_refuses_tensors_of_other_sizes() -> None:
    """Though they have as many rows; what is refused leaves the statistics as they were."""
    quantizer = TensorQuantizer(QuantDescriptor(axis=(0, 1)), if_calib=True, if_quant=False)
    with pytest.raises(TypeError, match="expected a dense tensor"):
        quantizer(torch.ones(3, 4, 5).int())
    assert quantizer.calibrator is None
    assert not quantizer.state_dict()
    x = sample((2, 6, 5))
    quantizer(x)
    with pytest.raises(ValueError, match=r"inputs: .*, as in \(2, 6, 1\), got \(3, 4, 1\)"):
        quantizer(100 * sample((3, 4, 5)))
    quantizer.load_calib_amax()
    assert_same(quantizer.amax, amax_of(x, (0, 1)))


def test_axis_of_nothing_is_none() -> None:
    x = sample((4, 6))
    quantizer = calibrated(TensorQuantizer(QuantDescriptor(axis=())), [x])
    assert_same(quantizer(x), TensorQuantizer()(x))
    quantizer.load_calib_amax()
    assert_same(quantizer.amax, amax_of(x, None))


def test_refuses_to_load_amax() -> None:
    quantizer = calibrated(TensorQuantizer(), [sample(9)])
    with pytest.raises(ValueError, match="method: expected 'max', which is the calib_method"):
        quantizer.load_calib_amax("mse")
    with pytest.raises(ValueError, match=r"method: expected one of max, .*, got 'best'"):
        quantizer.load_calib_amax("best")
    quantizer = calibrated(TensorQuantizer(QuantDescriptor(calib_method="histogram")), [sample(9)])
    with pytest.raises(TypeError, match="percentile: expected one of the options of method 'mse'"):
        quantizer.load_calib_amax("mse", percentile=99.9)
    with pytest.raises(ValueError, match="percentile: expected a number in"):
        quantizer.load_calib_amax("percentile", percentile=101)
    assert quantizer.amax is None
    with pytest.raises(ValueError, match=r"axis: expected values in \[-1, 0\] .* got 1"):
        TensorQuantizer(QuantDescriptor(axis=1))(sample(9))
    with pytest.raises(TypeError, match="quant_desc: expected a QuantDescriptor, got int"):
        TensorQuantizer(8)


MADE: dict[str, Callable[[], TensorQuantizer]] = {
    "dynamic": TensorQuantizer,
    "given": lambda: TensorQuantizer(QuantDescriptor(amax=1.5)),
    "max": lambda: calibrated(TensorQuantizer(), [sample((4, 6))]),
    "axes": lambda: calibrated(TensorQuantizer(QuantDescriptor(axis=(0, 1))), [sample((4, 6))]),
    "histogram": lambda: calibrated(
        TensorQuantizer(QuantDescriptor(axis=-1, calib_method="mse")), [sample((4, 6))]
    ),
    "learned": lambda: TensorQuantizer(QuantDescriptor(amax=1.5, learn_amax=True)),
}


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("name", MADE)
def test_state_dict(name: str, loaded: bool) -> None:
    """The amax and the statistics come back, into one that has seen nothing."""
    quantizer = MADE[name]()
    if loaded and quantizer.calibrator is not None:
        quantizer.load_calib_amax()
    saved = copy.deepcopy(quantizer.state_dict())
    again = TensorQuantizer(
        QuantDescriptor(
            axis=quantizer.axis, calib_method=quantizer._calib_method, learn_amax=name == "learned"
        )
    )
    assert not again.load_state_dict(saved).missing_keys
    assert set(again.state_dict()) == set(saved)
    for key, value in saved.items():
        assert_same(again.state_dict()[key], value, key)
    x = sample((4, 6), seed=3)
    assert_same(again(x), quantizer(x))
    if quantizer.calibrator is not None:
        for each in (quantizer, again):
            calibrated(each, [2 * x])
            each.load_calib_amax()
        assert_same(again.amax, quantizer.amax)
        again.reset_calib()
        assert list(again.state_dict()) == ["_amax"]
    copied = copy.deepcopy(quantizer)
    assert_same(copied(x), quantizer(x))


@pytest.mark.parametrize("name", ["dynamic", "given", "learned", "axis"])
def test_compiles(name: str) -> None:
    make = {**MADE, "axis": lambda: TensorQuantizer(QuantDescriptor(axis=(0, 1)))}[name]
    torch._dynamo.reset()
    ours, theirs = (sample((3, 4, 5)).requires_grad_() for _ in range(2))
    y = torch.compile(make(), backend="aot_eager", fullgraph=True)(ours)
    expected = make()(theirs)
    assert_same(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_same(ours.grad, theirs.grad)


@pytest.mark.parametrize("name", MADE)
def test_whatever_the_default_dtype(name: str) -> None:
    expected = MADE[name]().state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        quantizer = MADE[name]()
        assert quantizer(sample((4, 6))).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
    for key, value in quantizer.state_dict().items():
        assert_same(value, expected[key], key)


def test_state_dict_of_nvidia_loads() -> None:
    amax = torch.rand(4, 1)
    quantizer = TensorQuantizer(QuantDescriptor(axis=0))
    quantizer.load_state_dict({"_amax": amax})
    assert_same(quantizer.amax, amax)
    learned = TensorQuantizer(QuantDescriptor(learn_amax=True))
    bounds = {"clip.clip_value_min": torch.tensor(-2.0), "clip.clip_value_max": torch.tensor(3.0)}
    learned.load_state_dict(bounds)
    assert_same(learned.clip.clip_value_max.detach(), torch.tensor(3.0))


def test_gradient_passes_where_amax_allows() -> None:
    x = sample((4, 6)).requires_grad_()
    TensorQuantizer(QuantDescriptor(amax=2.0))(x).sum().backward()
    assert_same(x.grad, (x.detach().abs() <= 2).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_learned_clip(dtype: torch.dtype) -> None:
    """PACT: what is clipped sends its gradient to the bound, whatever the module's dtype."""
    clip = Clip(-1.0, 2.0).to(dtype)
    x = torch.tensor([-3.0, -1.0, -0.5, 0.0, 2.0, 2.5, 7.0, torch.nan], requires_grad=True)
    y = clip(x)
    assert_same(y, torch.tensor([-1.0, -1.0, -0.5, 0.0, 2.0, 2.0, 2.0, torch.nan]))
    grad = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0])
    y.backward(grad)
    assert_same(x.grad, torch.tensor([0.0, 0.0, 4.0, 8.0, 0.0, 0.0, 0.0, 128.0]))
    assert clip.clip_value_min.grad == 3
    assert clip.clip_value_max.grad == 112


@pytest.mark.parametrize("fake_quant", [True, False])
@pytest.mark.parametrize("amax", [2.0, 2.7, 1.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_learned_amax(dtype: torch.dtype, amax: float, fake_quant: bool) -> None:
    """Also where the dtype rounds it up, beyond itself: it learns all the same."""
    x = sample(500, dtype).requires_grad_()
    quantizer = TensorQuantizer(
        QuantDescriptor(learn_amax=True, amax=amax, narrow_range=True, fake_quant=fake_quant)
    )
    y = quantizer(x)
    bound = torch.tensor(amax).to(dtype)
    grad = sample(500, dtype, 1)
    y.backward(grad)
    values = x.detach()
    if fake_quant:
        clipped = values.clamp(-bound, bound)
        assert_same(y, fake_tensor_quant(clipped, torch.tensor(amax)))
    else:
        assert y.abs().max() == 127
    assert_same(x.grad, torch.where(values.abs() < bound, grad, 0.0))
    bounds = quantizer.clip.clip_value_min, quantizer.clip.clip_value_max
    for each, clipped in zip(bounds, (values <= -bound, values >= bound), strict=True):
        assert each.grad.dtype == torch.float32
        assert each.grad == pytest.approx(float(grad[clipped].float().sum()), rel=1e-5)


def test_the_farther_bound_is_the_amax() -> None:
    x = sample(500)
    quantizer = TensorQuantizer(QuantDescriptor(learn_amax=True, amax=2.0, narrow_range=True))
    with torch.no_grad():
        quantizer.clip.clip_value_max.fill_(3.0)
    assert_same(quantizer(x), fake_tensor_quant(x.clamp(-2, 3), torch.tensor(3.0)))


@pytest.mark.parametrize("method", CALIB_METHODS)
def test_learned_from_what_any_method_found(method: str) -> None:
    """Starting from its amax, which is kept, a training step learns on."""
    descriptor = QuantDescriptor(4, learn_amax=True, calib_method=method, narrow_range=True)
    quantizer = calibrated(TensorQuantizer(descriptor), [sample(3000), sample(3000, seed=1)])
    quantizer.load_calib_amax()
    quantizer.init_learn_amax()
    found = quantizer.amax.clone()
    for bound, sign in ((quantizer.clip.clip_value_min, -1), (quantizer.clip.clip_value_max, 1)):
        assert_same(bound.detach(), sign * found)
    x = 2 * sample(3000, seed=2)  # some of which each of them clips
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        loss = (quantizer(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    assert_same(quantizer.amax, found)
    assert quantizer.clip.clip_value_max > found


def test_learned_amax_trains_with_a_model() -> None:
    """Bounds too wide at 3 bits come down in front of a classifier, and its loss with them."""
    centers = torch.eye(4).repeat(1, 4) * 2
    labels = torch.arange(256) % 4
    x = centers[labels] + sample((256, 16)) / 3
    model = nn.Sequential(
        nn.Linear(16, 24),
        TensorQuantizer(QuantDescriptor(3, learn_amax=True, amax=1.0, narrow_range=True)),
        nn.Linear(24, 4),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert float(model[1].clip.clip_value_max.detach()) != 1.0


def test_learned_amax_goes_down_the_loss() -> None:
    x = sample(2000)
    quantizer = TensorQuantizer(QuantDescriptor(3, learn_amax=True, amax=20.0, narrow_range=True))
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    losses = []
    for _ in range(60):
        loss = (quantizer(x) - x.clamp(-4, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # while nothing is clipped nothing is learned, as in PACT
    assert losses == [losses[0]] * 60
    quantizer.amax = 2.0
    quantizer.init_learn_amax()
    first = float((quantizer(x) - x).detach().square().mean())
    for _ in range(60):
        loss = (quantizer(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.7 * first
    assert float(quantizer.clip.clip_value_max.detach()) > 2.5


def test_calibrates_the_learned_amax_unclipped() -> None:
    """What comes after sees no values clipped to bounds that are yet to be found."""
    first, second = (TensorQuantizer(QuantDescriptor(learn_amax=True)) for _ in range(2))
    x = sample(50)
    for quantizer in (first, second):
        quantizer.disable_quant()
        quantizer.enable_calib()
    assert second(first(x)) is x
    for quantizer in (first, second):
        quantizer.disable_calib()
        quantizer.load_calib_amax()
        assert_same(quantizer.amax, x.abs().max())


def test_learned_amax_of_an_empty_batch() -> None:
    """Without a gradient of 0 the other ranks of DDP would wait for one."""
    quantizer = TensorQuantizer(QuantDescriptor(learn_amax=True, axis=None))
    for switch_off in (lambda: None, quantizer.disable_quant):
        switch_off()
        quantizer.zero_grad()
        y = quantizer(torch.empty(0, 6))
        assert y.shape == (0, 6)
        y.sum().backward()
        assert [p.grad.item() for p in quantizer.parameters()] == [0.0, 0.0]
    quantizer.disable()
    x = torch.empty(0, 6)
    assert quantizer(x) is x


def test_switches_of_the_clip() -> None:
    x = sample(50)
    quantizer = TensorQuantizer(QuantDescriptor(learn_amax=True))
    assert "learn_amax=True" in repr(quantizer)
    quantizer.disable_quant()
    assert_same(quantizer(x).detach(), x.clamp(-1, 1))
    quantizer.disable_clip()
    assert quantizer(x) is x
    assert not any(p.requires_grad for p in quantizer.parameters())
    quantizer.enable_clip()
    assert all(p.requires_grad for p in quantizer.parameters())
    for call in (TensorQuantizer().enable_clip, lambda: TensorQuantizer(if_clip=True)):
        with pytest.raises(ValueError, match="clip: expected learn_amax"):
            call()
    with pytest.raises(RuntimeError, match="expected learn_amax, got False"):
        TensorQuantizer().init_learn_amax()
    with pytest.raises(RuntimeError, match="expected an amax, got none"):
        quantizer.init_learn_amax()
    quantizer.amax = [1.0, 4.0]
    quantizer.init_learn_amax()
    assert_same(quantizer.clip.clip_value_min.detach(), torch.tensor(-4.0))


def test_statistics_merge_like_an_observer_s() -> None:
    """It is one, where whoever goes through the modules finds it."""
    batches = [sample((4, 6), seed=seed) for seed in range(2)]
    halves = [calibrated(TensorQuantizer(QuantDescriptor(axis=1)), [x]) for x in batches]
    assert halves[0].calibrator in list(nn.Sequential(*halves).modules())
    halves[0].calibrator.merge(halves[1].calibrator)
    halves[0].load_calib_amax()
    assert_same(halves[0].amax, amax_of(torch.cat(batches), 1))


def test_first_batch_under_inference_mode_leaves_ordinary_buffers() -> None:
    quantizer = TensorQuantizer(QuantDescriptor(axis=0, calib_method="mse"), if_calib=True)
    with torch.inference_mode():
        quantizer(sample((4, 6)))
    assert not any(buffer.is_inference() for buffer in quantizer.buffers())
    quantizer.load_calib_amax()
    quantizer.load_state_dict(copy.deepcopy(quantizer.state_dict()))


def test_is_public() -> None:
    assert po.tensor_quant is tensor_quant
    assert tensor_quant.tensor_quant is po.ops.tensor_quant
    assert all(hasattr(tensor_quant, name) for name in tensor_quant.__all__)


@pytest.mark.parametrize("method", ["mse", "kl", "percentile"])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("num_bits", [1, 31, 32])
def test_calibrating_the_coarsest_and_the_finest_grids(
    num_bits: int, unsigned: bool, method: str
) -> None:
    desc = QuantDescriptor(
        num_bits=num_bits, unsigned=unsigned, narrow_range=True, calib_method="histogram"
    )
    quantizer = TensorQuantizer(desc, if_quant=False, if_calib=True)
    quantizer(torch.linspace(0.0, 1.0, 1001))
    quantizer.load_calib_amax(method)
    assert quantizer.amax is not None
    assert 0.4 < quantizer.amax.item() < 1.1


def test_functions_by_the_names_of_their_classes() -> None:
    x = sample((4, 6)).requires_grad_()
    amax = torch.tensor(1.0)
    q, scale = tensor_quant.TensorQuantFunction.apply(x, amax, 4, False, False)
    assert_same(q, tensor_quant.tensor_quant(x, amax, 4, False, False)[0])
    y = tensor_quant.FakeTensorQuantFunction.apply(x, amax, 4, False, False)
    assert_same(y, q / scale)
    y.sum().backward()
    assert_same(x.grad, (x.abs() <= 1).float())

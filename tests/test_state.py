from __future__ import annotations

import copy
import io
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.cases import assert_all_same, assert_same
from torch import Tensor, nn
from torch.ao.quantization import fake_quantize as ao_fake_quantize
from torch.ao.quantization import observer as ao_observer

import pyobserver as po

EPS = torch.finfo(torch.float32).eps
PER_CHANNEL = {"qscheme": torch.per_channel_affine, "ch_axis": 1}
MAKERS: dict[str, Callable[[Any, Any], Any]] = {
    "MinMax": lambda o, f: o.MinMaxObserver(),
    "MovingAverage": lambda o, f: o.MovingAverageMinMaxObserver(),
    "PerChannel": lambda o, f: o.PerChannelMinMaxObserver(ch_axis=1),
    "MovingAveragePerChannel": lambda o, f: o.MovingAveragePerChannelMinMaxObserver(ch_axis=1),
    "Histogram": lambda o, f: o.HistogramObserver(bins=32),
    "FixedQParams": lambda o, f: o.FixedQParamsObserver(0.1, 3),
    "Placeholder": lambda o, f: o.PlaceholderObserver(),
    "FakeQuantize": lambda o, f: f.FakeQuantize(),
    "FakeQuantize_histogram": lambda o, f: f.FakeQuantize(o.HistogramObserver, bins=32),
    "FakeQuantize_per_channel": lambda o, f: f.FakeQuantize(
        o.PerChannelMinMaxObserver, **PER_CHANNEL
    ),
    "Fused": lambda o, f: f.FusedMovingAvgObsFakeQuantize(),
    "Fixed": lambda o, f: f.FixedQParamsFakeQuantize(
        o.FixedQParamsObserver.with_args(scale=0.1, zero_point=3)
    ),
}
SIZED = [name for name in MAKERS if name not in ("Placeholder",)]


def ours(name: str, fed: bool = False) -> Any:
    return _feed(MAKERS[name](po, po), fed)


def theirs(name: str, fed: bool = False) -> Any:
    return _feed(MAKERS[name](ao_observer, ao_fake_quantize), fed)


def _feed(module: nn.Module, fed: bool) -> nn.Module:
    if fed:
        for seed in range(2):
            module(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)))
    return module


def saved(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_states_same(one: nn.Module, other: nn.Module) -> None:
    state, expected = one.state_dict(), other.state_dict()
    assert list(state) == list(expected)
    assert_all_same(list(state.values()), list(expected.values()))


@pytest.mark.parametrize("fed", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_is_of_version_3_and_has_the_keys_of_torch(name: str, fed: bool) -> None:
    state, expected = ours(name, fed).state_dict(), theirs(name, fed).state_dict()
    assert list(state) == list(expected)
    assert [v.shape for v in state.values()] == [v.shape for v in expected.values()]
    assert state._metadata == expected._metadata
    if "eps" in state:
        assert state._metadata[""]["version"] == 3


@pytest.mark.parametrize("fed", [False, True])
@pytest.mark.parametrize("name", SIZED)
def test_round_trip(name: str, fed: bool) -> None:
    """Into a fresh module and into a fed one: both take the sizes of what is saved."""
    source = ours(name, fed)
    stream = io.BytesIO()
    torch.save(source.state_dict(), stream)
    stream.seek(0)
    for target in (ours(name), ours(name, True)):
        stream.seek(0)
        result = target.load_state_dict(torch.load(stream))
        assert not result.missing_keys + result.unexpected_keys
        assert_states_same(target, source)


@pytest.mark.parametrize("fed", [False, True])
@pytest.mark.parametrize("name", SIZED)
def test_loads_those_of_torch(name: str, fed: bool) -> None:
    source, target = theirs(name, fed), ours(name)
    target.load_state_dict(source.state_dict())
    for key, value in source.state_dict().items():
        mine = target.state_dict()[key]
        assert mine.dtype == (torch.float64 if key.endswith("histogram") else value.dtype)
        assert_same(mine.double(), value.double())


@pytest.mark.parametrize("name", SIZED)
def test_continues_after_loading(name: str) -> None:
    source, target = ours(name, True), ours(name)
    target.load_state_dict(source.state_dict())
    x = 3 * torch.randn(3, 4)
    assert_same(target(x), source(x))
    assert_states_same(target, source)


@pytest.mark.parametrize("name", SIZED)
def test_loading_copies(name: str) -> None:
    """torch.ao's histogram keeps the caller's tensors, and writes into them."""
    state = ours(name, True).state_dict()
    before = {key: value.clone() for key, value in state.items()}
    keys = list(state)
    target = ours(name)
    target.load_state_dict(state)
    target(10 * torch.randn(3, 4))
    assert list(state) == keys
    assert_all_same(list(state.values()), list(before.values()))
    mine = {t.data_ptr() for t in target.buffers() if t.numel()}
    assert not mine & {t.data_ptr() for t in state.values() if t.numel()}


def versioned(state: dict[str, Tensor], version: int | None) -> OrderedDict[str, Tensor]:
    """A state_dict as an older torch wrote it."""
    old = OrderedDict(state)
    if version is not None:
        old._metadata = OrderedDict({"": {"version": version}})  # type: ignore[attr-defined]
    return old


@pytest.mark.parametrize("version", [None, 1])
@pytest.mark.parametrize("name", ["MinMax", "MovingAverage", "Histogram"])
def test_version_1_has_no_eps(name: str, version: int | None) -> None:
    state = saved(ours(name, True))
    del state["eps"]
    old = versioned(state, version)
    target = po.MinMaxObserver(eps=0.5) if name == "MinMax" else ours(name)
    target.load_state_dict(old)
    assert "eps" not in old
    assert float(target.eps) == EPS
    assert_all_same([target.state_dict()[k] for k in state], list(state.values()))


@pytest.mark.parametrize("version", [None, 1, 2])
@pytest.mark.parametrize("fed", [False, True])
@pytest.mark.parametrize("name", ["PerChannel", "MovingAveragePerChannel"])
def test_version_2_says_min_vals(name: str, fed: bool, version: int | None) -> None:
    state = saved(ours(name, fed))
    old = versioned(
        {"eps": state["eps"], "min_vals": state["min_val"], "max_vals": state["max_val"]}, version
    )
    if version != 2:
        del old["eps"]
    keys = list(old)
    for target in (ours(name), ours(name, True)):
        result = target.load_state_dict(old)
        assert not result.missing_keys + result.unexpected_keys
        assert list(old) == keys
        assert_same(target.min_val, state["min_val"])
        assert_same(target.max_val, state["max_val"])


@pytest.mark.parametrize("version", [None, 1, 2])
def test_version_2_of_an_unfed_histogram(version: int | None) -> None:
    state = saved(ours("Histogram"))
    state["min_val"], state["max_val"] = torch.empty(0), torch.empty(0)
    old = versioned(state, version)
    target = ours("Histogram", True)
    target.load_state_dict(old)
    assert old["min_val"].shape == (0,)
    assert_same(target.min_val, torch.tensor(torch.inf))
    assert_same(target.max_val, torch.tensor(-torch.inf))
    assert target.histogram.sum() == 0


def test_version_2_of_a_fake_quantize() -> None:
    """The names are renamed wherever the observer stands in a model."""
    source = nn.Sequential(ours("FakeQuantize_per_channel", True))
    state = saved(source)
    prefix = "0.activation_post_process."
    old = OrderedDict((key, state[key]) for key in state if not key.startswith(prefix))
    old[prefix + "min_vals"] = state[prefix + "min_val"]
    old[prefix + "max_vals"] = state[prefix + "max_val"]
    target = nn.Sequential(ours("FakeQuantize_per_channel"))
    target.load_state_dict(old)
    assert_states_same(target, source)


def test_strict_loading_names_what_is_missing() -> None:
    for name in ("MinMax", "PerChannel", "Histogram", "FakeQuantize"):
        state = ours(name).state_dict()
        key = next(k for k in state if k.endswith("min_val"))
        del state[key]
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            ours(name).load_state_dict(state)
        ours(name).load_state_dict(state, strict=False)


def test_a_histogram_of_other_bins_is_refused() -> None:
    target = ours("Histogram", True)
    before = saved(target)
    with pytest.raises(RuntimeError, match="size mismatch for histogram"):
        target.load_state_dict(po.HistogramObserver(bins=8).state_dict())
    assert_same(target.histogram, before["histogram"])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.activation_post_process_0 = ours("MinMax")
        self.second = nn.Sequential(nn.Linear(4, 4))
        self.second.add_module("activation_post_process", ours("PerChannel"))
        self.weight_fake_quant = ours("FakeQuantize")

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation_post_process_0(self.first(x))
        return self.weight_fake_quant(self.second(x))


def fed_model() -> Model:
    model = Model()
    model(torch.randn(3, 4))
    return model


def test_observer_state_dict() -> None:
    """The entries of the observers alone, which another model of the same form takes."""
    source, target = fed_model(), Model()
    state = po.get_observer_state_dict(source)
    assert state
    assert all("activation_post_process" in key for key in state)
    assert state._metadata == source.state_dict()._metadata
    weight = target.first.weight.clone()
    po.load_observer_state_dict(target, state)
    assert_same(target.first.weight, weight)
    for key, value in state.items():
        assert_same(target.state_dict()[key], value)
    assert not {t.data_ptr() for t in state.values()} & {t.data_ptr() for t in target.buffers()}


def test_observer_state_dict_of_log_histograms() -> None:
    """The state is sized by what is loaded; what does not fit changes nothing."""

    def model() -> nn.Module:
        made = Model()
        made.activation_post_process_0 = po.LogHistogramObserver(3)
        rows = po.PerChannelLogHistogramObserver(1, 3)
        made.second.add_module("activation_post_process", rows)
        made.weight_fake_quant = po.FakeQuantize(po.PercentileObserver, mantissa_bits=3)
        return made

    source, target, other = model(), model(), model()
    source(torch.randn(3, 4))
    state = po.get_observer_state_dict(source)
    assert sum(key.endswith("counts") for key in state) == 3
    po.load_observer_state_dict(target, state)
    for key, value in state.items():
        assert_same(target.state_dict()[key], value)
    other.activation_post_process_0 = po.LogHistogramObserver(4)
    before = saved(other)
    with pytest.raises(ValueError, match=r"activation_post_process_0.counts.*mantissa_bits 4"):
        po.load_observer_state_dict(other, state)
    assert_all_same(list(other.state_dict().values()), list(before.values()))


def test_observer_state_dict_is_that_of_torch() -> None:
    model = fed_model()
    expected = ao_observer.get_observer_state_dict(model)
    state = po.get_observer_state_dict(model)
    assert list(state) == list(expected)


def test_observer_state_dict_of_version_2() -> None:
    source, target = fed_model(), Model()
    state = po.get_observer_state_dict(source)
    old = OrderedDict()
    for key, value in state.items():
        renamed = key + "s" if key.startswith("second") and key.endswith("_val") else key
        if not key.endswith("eps"):
            old[renamed] = value
    po.load_observer_state_dict(target, old)
    for key, value in state.items():
        assert_same(target.state_dict()[key], value)


def _without(state: OrderedDict[str, Tensor]) -> None:
    del state["second.activation_post_process.min_val"]


def _with_more(state: OrderedDict[str, Tensor]) -> None:
    state["third.activation_post_process.min_val"] = torch.tensor(0.0)


def _misshapen(state: OrderedDict[str, Tensor]) -> None:
    state["activation_post_process_0.max_val"] = torch.zeros(7)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (_without, KeyError, r"missing entries .*second\.activation_post_process\.min_val"),
        (_with_more, KeyError, r"unexpected entries .*third\.activation_post_process\.min_val"),
        (_misshapen, ValueError, r"max_val"),
    ],
)
def test_observer_state_dict_errors_change_nothing(
    change: Callable[[OrderedDict[str, Tensor]], None], error: type[Exception], match: str
) -> None:
    state = po.get_observer_state_dict(fed_model())
    change(state)
    target = fed_model()
    before = saved(target)
    with pytest.raises(error, match=match):
        po.load_observer_state_dict(target, state)
    assert_all_same(list(target.state_dict().values()), list(before.values()))


@pytest.mark.parametrize("convert", ["half", "double", "bfloat16"])
@pytest.mark.parametrize("name", MAKERS)
def test_statistics_keep_their_dtype(name: str, convert: str) -> None:
    module = ours(name, True)
    before = [t.clone() for t in module.buffers()]
    model = nn.Sequential(nn.Linear(4, 4), module)
    getattr(model, convert)()
    assert model[0].weight.dtype != torch.float32
    assert_all_same(list(module.buffers()), before)
    module.to(torch.bfloat16)
    assert_all_same(list(module.buffers()), before)
    if name != "Placeholder":
        y = model(torch.randn(3, 4).to(model[0].weight.dtype))
        assert y.dtype == model[0].weight.dtype


@pytest.mark.parametrize("name", MAKERS)
def test_deepcopy(name: str) -> None:
    source = ours(name, True)
    copied = copy.deepcopy(source)
    assert_states_same(copied, source)
    before = [t.clone() for t in source.buffers()]
    copied(100 * torch.randn(3, 4))
    assert_all_same(list(source.buffers()), before)


def test_meta_and_back() -> None:
    for name in MAKERS:
        source = ours(name, True)
        target = ours(name, True).to("meta").to_empty(device="cpu")
        target.load_state_dict(source.state_dict())
        assert_states_same(target, source)


@pytest.mark.parametrize("name", ["MinMax", "PerChannel", "Histogram"])
def test_unfed_warnings_come_from_calculate_qparams_alone(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module = ours(name)
        module.load_state_dict(ours(name, True).state_dict())
        module.calculate_qparams()
    with pytest.warns(UserWarning, match="never fed") as seen:
        ours(name).calculate_qparams()
    assert seen[0].filename == __file__

from __future__ import annotations

import copy
import io
import math
import sys
import warnings
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyobserver
from pyobserver.workflow import CalibrationResult, calibrate
from pyobserver.workflow.progress import track
from pyobserver.workflow.sqnr import ValueSample

ACTIVATION = pyobserver.MinMaxObserver.with_args(dtype=torch.uint8)
PER_TENSOR_WEIGHT = pyobserver.MinMaxObserver.with_args(
    dtype=torch.int8, qscheme=torch.per_tensor_symmetric
)
PER_CHANNEL_WEIGHT = pyobserver.PerChannelMinMaxObserver.with_args(
    dtype=torch.int8, qscheme=torch.per_channel_symmetric
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.block = nn.ModuleDict({"conv2": nn.Conv2d(6, 4, 3), "unused": nn.Linear(4, 4)})
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x)))
        return self.fc(self.block["conv2"](x).flatten(1))


def batches_of(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(count)]


def quiet(*args: Any, **kwargs: Any) -> CalibrationResult:
    return calibrate(*args, progress=False, **kwargs)


def hook_count(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def tensors_through(module: nn.Module, run: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The first argument and the result of every call of a module while ``run()`` runs."""
    inputs, outputs = [], []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        inputs.append(args[0].clone())
        outputs.append(output.clone())

    handle = module.register_forward_hook(keep)
    run()
    handle.remove()
    return inputs, outputs


# what is observed


@pytest.mark.parametrize(
    "activation",
    [
        ACTIVATION,
        pyobserver.MovingAverageMinMaxObserver.with_args(dtype=torch.int8),
        pyobserver.HistogramObserver.with_args(dtype=torch.uint8),
        pyobserver.PerChannelMinMaxObserver.with_args(dtype=torch.int8, ch_axis=1),
        pyobserver.MovingAveragePerChannelMinMaxObserver.with_args(dtype=torch.int8, ch_axis=-3),
    ],
    ids=lambda factory: factory.__name__,
)
def test_same_numbers_as_observers_fed_by_hand(activation: Any) -> None:
    model, batches = Net().eval(), batches_of()
    result = quiet(model, batches, nn.Conv2d, activation=activation, weight=PER_CHANNEL_WEIGHT)

    def run() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    for name in ("conv1", "block.conv2"):
        inputs, outputs = tensors_through(model.get_submodule(name), run)
        for site, tensors in (("input", inputs), ("output", outputs)):
            observer = activation()
            for x in tensors:
                observer(x)
            found = result[f"{name}.{site}"]
            scale, zero_point = observer.calculate_qparams()
            assert torch.equal(found.scale, scale)
            assert torch.equal(found.zero_point, zero_point)
            assert torch.equal(found.min_val, observer.min_val.reshape(-1))
            assert torch.equal(found.max_val, observer.max_val.reshape(-1))
            assert found.dtype == observer.dtype
            assert found.qscheme == observer.qscheme
            assert (found.quant_min, found.quant_max) == (observer.quant_min, observer.quant_max)
            assert found.ch_axis == getattr(observer, "ch_axis", None)
            assert found.observer == type(observer).__name__
            assert found.tensors == len(batches)
            assert found.kind == site
        observer = PER_CHANNEL_WEIGHT()
        observer(model.get_submodule(name).weight)
        assert torch.equal(result[f"{name}.weight"].scale, observer.calculate_qparams()[0])


def test_defaults() -> None:
    model = nn.Sequential(
        nn.Conv1d(2, 3, 1), nn.ConvTranspose1d(3, 4, 1), nn.Flatten(), nn.Linear(20, 2)
    )
    result = quiet(model, [torch.randn(2, 2, 5)])
    kinds = ("input", "weight", "output")
    assert list(result) == [f"{name}.{kind}" for name in "013" for kind in kinds]
    for site in result.values():
        if site.kind == "weight":
            assert site.observer == "PerChannelMinMaxObserver"
            assert site.qscheme == torch.per_channel_symmetric
            assert site.dtype == torch.int8
            assert site.tensors == 1
        else:
            assert site.observer == "HistogramObserver"
            assert site.qscheme == torch.per_tensor_affine
            assert site.dtype == torch.uint8
    assert [result[f"{n}.weight"].ch_axis for n in "013"] == [0, 1, 0]
    assert [len(result[f"{n}.weight"].scale) for n in "013"] == [3, 4, 2]


def test_ch_axis_that_was_given_is_kept() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(3, 4, 1))
    given = PER_CHANNEL_WEIGHT.with_args(ch_axis=0)
    for weight, axis in ((given, 0), (lambda: given(), 0), (PER_CHANNEL_WEIGHT, 1)):
        site = quiet(model, None, activation=None, weight=weight)["0.weight"]
        assert (site.ch_axis, len(site.scale)) == (axis, (3, 4)[axis])
    bare_class = quiet(model, None, activation=None, weight=pyobserver.PerChannelMinMaxObserver)
    assert bare_class["0.weight"].ch_axis == 1


def test_weights_only_runs_nothing() -> None:
    model = Net()
    model.forward = None  # type: ignore[method-assign, assignment]
    result = quiet(model, None, activation=None)
    assert list(result) == [
        "conv1.weight",
        "block.conv2.weight",
        "block.unused.weight",
        "fc.weight",
    ]
    assert result.never_called == ()
    assert result.batches == 0


def test_activations_only() -> None:
    result = quiet(Net(), batches_of(1), "fc", weight=None)
    assert list(result) == ["fc.input", "fc.output"]


def test_embedding_has_a_weight_and_no_more() -> None:
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    result = quiet(model, [torch.randint(10, (3, 2))])
    assert list(result) == ["0.weight", "1.input", "1.weight", "1.output"]
    assert result.never_called == ()


def test_model_that_is_itself_chosen() -> None:
    model = nn.Linear(3, 2)
    result = quiet(model, [torch.randn(4, 3)])
    assert list(result) == ["input", "weight", "output"]
    assert hook_count(result.apply(model)) == 2


def test_one_dimensional_and_integer_weights_are_no_sites() -> None:
    result = quiet(Net(), batches_of(1), nn.BatchNorm2d)
    assert list(result) == ["norm.input", "norm.output"]


def test_reused_module_feeds_one_site() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.cell(x) * 3
            return x

    model, batches = Recurrent(), [torch.randn(5, 4) for _ in range(2)]
    result = quiet(model, batches, activation=ACTIVATION)
    assert result["cell.input"].tensors == 6
    with torch.no_grad():
        inputs, _ = tensors_through(model.cell, lambda: [model(batch) for batch in batches])
    assert result["cell.input"].max_val == torch.cat(inputs).max()


def test_shared_module_is_one_module() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential()
    model.add_module("first", layer)
    model.add_module("second", layer)
    result = quiet(model, [torch.randn(2, 4)])
    assert list(result) == ["first.input", "first.weight", "first.output"]
    assert result["first.input"].tensors == 2
    by_other_name = quiet(model, [torch.randn(2, 4)], "second")
    assert list(by_other_name) == ["second.input", "second.weight", "second.output"]
    assert hook_count(by_other_name.apply(model)) == 2


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    model[1].weight = model[0].weight
    batches = [torch.randint(6, (3,))]
    result = quiet(model, batches)
    assert torch.equal(result["0.weight"].scale, result["1.weight"].scale)
    applied = result.apply(model)
    assert len(list(applied.parameters())) == 1
    result.apply(model, inplace=True)
    CalibrationResult.remove(model)
    assert model[1].weight is model[0].weight


Pair = namedtuple("Pair", ["left", "right"])


class Structured(nn.Module):
    """Every kind of argument and result that a module can have."""

    def forward(self, x: Tensor, extra: Any, *, mask: Tensor | None = None, steps: int = 1) -> Any:
        left = extra["a"][0] + x
        return left, Pair(x * 2, [extra["b"], "text"]), {"mask": mask, "count": steps}


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Structured()

    def forward(self, x: Tensor) -> Any:
        extra = {"a": (x * 3, None), "b": torch.arange(3)}
        return self.inner(x, extra, mask=x.double() + 1)


def test_nested_inputs_and_outputs_are_sites_of_their_own() -> None:
    x = torch.rand(4, 3)
    result = quiet(Wrapped(), [x], Structured, activation=ACTIVATION)
    assert list(result) == [
        "inner.input.0",
        "inner.input.1.a.0",
        "inner.input.mask",
        "inner.output.0",
        "inner.output.1.0",
        "inner.output.2.mask",
    ]
    assert result["inner.input.1.a.0"].max_val == (x * 3).max()
    assert result["inner.input.mask"].max_val == (x + 1).max()


def test_nested_tensors_are_quantized_and_the_rest_kept() -> None:
    model, x = Wrapped(), torch.rand(4, 3)
    result = quiet(model, [x], Structured, activation=ACTIVATION)
    first, pair, rest = result.apply(model)(x)
    assert isinstance(pair, Pair)
    assert pair.right[1] == "text"
    assert torch.equal(pair.right[0], torch.arange(3))
    assert rest["count"] == 1
    assert rest["mask"].dtype == torch.float64

    def quantized(name: str, value: Tensor) -> Tensor:
        site = result[name]
        return pyobserver.ops.fake_quantize(value, site.scale, site.zero_point, 0, 255)

    inner_x = quantized("inner.input.0", x)
    expected = quantized("inner.output.0", inner_x + quantized("inner.input.1.a.0", x * 3))
    assert torch.equal(first, expected)


def test_containers_of_the_caller_are_not_written_to() -> None:
    class Takes(nn.Module):
        def forward(self, items: dict[str, Any]) -> Tensor:
            return items["x"] + items["more"][0]

    model, batch = nn.Sequential(Takes()), {"x": torch.rand(3), "more": [torch.rand(3)]}
    before = copy.deepcopy(batch)
    result = quiet(model, [batch], Takes, forward=lambda model, batch: model(batch))
    result.apply(model)(batch)
    assert list(result) == ["0.input.x", "0.input.more.0", "0.output"]
    assert torch.equal(batch["x"], before["x"])
    assert torch.equal(batch["more"][0], before["more"][0])


def test_never_called_modules_are_reported() -> None:
    result = quiet(Net(), batches_of(1))
    assert result.never_called == ("block.unused",)
    assert "block.unused.input" not in result
    assert "block.unused.weight" in result
    assert "never called: block.unused" in str(result)


def test_empty_tensors_make_no_site() -> None:
    result = quiet(nn.Linear(3, 2), [torch.empty(0, 3)])
    assert list(result) == ["weight"]
    assert result.never_called == ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floats(dtype: torch.dtype) -> None:
    model = nn.Linear(4, 3).to(dtype)
    batches = [torch.randn(5, 4).to(dtype)]
    result = quiet(model, batches)
    assert list(result) == ["input", "weight", "output"]
    assert all(site.scale.dtype == torch.float32 for site in result.values())
    assert result.apply(model)(batches[0]).dtype == dtype
    assert all(site.sqnr > 30 for site in result.values())


def test_transformer_layer_is_seen_through_its_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    result = quiet(layer, [x])
    assert {"linear1.input", "linear2.output", "self_attn.out_proj.weight"} <= set(result)
    with torch.no_grad():
        assert not torch.equal(result.apply(layer)(x), layer(x))


# how batches are fed


def test_batches_of_every_kind() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(x + y)

    model, x, y = Two(), torch.randn(4, 3), torch.randn(4, 3)
    expected = quiet(model, [(x, y)])["fc.input"]
    for batch in ([x, y], {"x": x, "y": y}):
        assert torch.equal(quiet(model, [batch])["fc.input"].scale, expected.scale)
    fed = quiet(model, [{"data": x, "label": 3}], forward=lambda model, b: model(b["data"], y))
    assert torch.equal(fed["fc.input"].scale, expected.scale)


def test_iterator_is_read_once_and_counted() -> None:
    result = quiet(Net(), iter(batches_of(3)))
    assert result.batches == 3
    assert result["fc.input"].tensors == 3


@pytest.mark.parametrize("batches", [[], iter(()), (x for x in ())], ids=["list", "iter", "gen"])
def test_no_batch_is_an_error(batches: Any) -> None:
    model = Net()
    with pytest.raises(ValueError, match="at least one batch, got none") as caught:
        quiet(model, batches)
    assert hook_count(model) == 0
    assert list(caught.value.calibration) == list(quiet(model, None, activation=None))


# the model afterwards


def test_model_is_left_as_it_was() -> None:
    model = Net().train()
    model.norm.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    seen = []
    quiet(
        model,
        batches_of(2),
        forward=lambda model, batch: seen.append((model.training, model(batch).requires_grad)),
    )
    assert seen == [(False, False)] * 2
    assert hook_count(model) == 0
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


class Failing(Net):
    def __init__(self, at: int, error: BaseException):
        super().__init__()
        self.at, self.error, self.calls = at, error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = torch.relu(self.norm(self.conv1(x)))
        if self.calls == self.at:
            raise self.error
        return self.fc(self.block["conv2"](x).flatten(1))


@pytest.mark.parametrize("error", [RuntimeError("burst pipe"), KeyboardInterrupt()], ids=repr)
def test_statistics_survive_an_exception_in_the_model(error: BaseException) -> None:
    model, batches = Failing(3, error).train(), batches_of(5)
    with pytest.raises(type(error)) as caught:
        quiet(model, batches, activation=ACTIVATION)
    assert caught.value is error
    assert hook_count(model) == 0
    assert all(module.training for module in model.modules())
    partial = caught.value.calibration
    assert partial.batches == 2
    assert partial["conv1.input"].tensors == 3
    assert partial["fc.input"].tensors == 2
    whole = quiet(Net(), batches[:3], "conv1", activation=ACTIVATION)
    assert torch.equal(partial["conv1.input"].scale, whole["conv1.input"].scale)
    assert partial["conv1.input"].sqnr == pytest.approx(whole["conv1.input"].sqnr, abs=2)


def test_statistics_survive_an_exception_in_the_data() -> None:
    def data() -> Iterator[Tensor]:
        yield from batches_of(2)
        raise OSError("disk gone")

    model = Net().train()
    with pytest.raises(OSError, match="disk gone") as caught:
        quiet(model, data())
    assert hook_count(model) == 0
    assert model.training
    expected = quiet(model, batches_of(2))
    partial = caught.value.calibration
    assert list(partial) == list(expected)
    assert partial.batches == 2
    for name in expected:
        assert torch.equal(partial[name].scale, expected[name].scale)
        assert partial[name].sqnr == expected[name].sqnr


def test_error_of_an_observer_names_the_site() -> None:
    strict = ACTIVATION.with_args(nonfinite="raise")
    model, bad = Net(), batches_of(2)
    bad[1][0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"calibrate: conv1\.input: minmax: x: .* 1 NaN") as caught:
        quiet(model, bad, activation=strict)
    assert caught.value.calibration["conv1.input"].tensors == 1
    assert hook_count(model) == 0


# values that are not finite


def test_nonfinite_values_warn_once() -> None:
    batches = batches_of(3)
    clean = quiet(Net(), batches, "conv1")["conv1.input"]
    for batch in batches:
        batch[0, 0, 0, :2] = torch.tensor([math.nan, math.inf])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = quiet(Net(), batches, ["conv1", "fc"])
    assert len(caught) == 1
    assert "conv1.input (6)" in str(caught[0].message)
    assert caught[0].filename == __file__
    site = result["conv1.input"]
    assert site.nonfinite == 6
    assert math.isfinite(site.sqnr)
    assert site.sqnr == pytest.approx(clean.sqnr, abs=1)
    assert "conv1.input 6" in str(result)


def test_site_of_nothing_finite() -> None:
    with pytest.warns(UserWarning, match=r"input \(6\)"):
        result = quiet(nn.Linear(3, 2), [torch.full((2, 3), math.nan)])
    assert result["input"].scale.tolist() == [1.0]
    str(result)


def test_propagated_nan_has_no_sqnr() -> None:
    propagating = ACTIVATION.with_args(nonfinite="propagate")
    with pytest.warns(UserWarning, match="NaN or infinite"):
        result = quiet(nn.Linear(3, 2), [torch.full((2, 3), math.nan)], activation=propagating)
    assert math.isnan(result["input"].sqnr)
    assert "nan" in str(result)


# SQNR


def direct_sqnr(x: Tensor, y: Tensor) -> float:
    return float(10 * torch.log10(x.double().square().sum() / (x - y).double().square().sum()))


@pytest.mark.parametrize(
    "weight", [PER_TENSOR_WEIGHT, PER_CHANNEL_WEIGHT], ids=["tensor", "channel"]
)
def test_weight_sqnr_is_exact(weight: Any) -> None:
    model = Net()
    result = quiet(model, None, activation=None, weight=weight)
    for name in ("conv1", "fc"):
        site, w = result[f"{name}.weight"], model.get_submodule(name).weight.detach()
        if site.ch_axis is None:
            y = torch.fake_quantize_per_tensor_affine(
                w, float(site.scale), int(site.zero_point), -128, 127
            )
        else:
            y = torch.fake_quantize_per_channel_affine(
                w, site.scale, site.zero_point.int(), 0, -128, 127
            )
        assert site.sqnr == pytest.approx(direct_sqnr(w, y), abs=1e-9)


@pytest.mark.parametrize("channel", [False, True], ids=["tensor", "channel"])
def test_activation_sqnr_is_near_the_direct_one(channel: bool) -> None:
    activation = pyobserver.PerChannelMinMaxObserver if channel else pyobserver.MinMaxObserver
    factory = activation.with_args(dtype=torch.uint8, **({"ch_axis": 1} if channel else {}))
    # batches of different sizes and spreads; channels of different spreads
    spread = torch.tensor([0.1, 1.0, 5.0]).reshape(1, 3, 1)
    batches = [torch.randn(n, 3, 50) * spread * (1 + n / 20) for n in (40, 3, 11, 1)]
    batches[1] = batches[1].transpose(0, 2)[:3].transpose(0, 2)
    result = quiet(nn.Sequential(nn.Identity()), batches, "0", activation=factory)
    site = result["0.input"]
    x = torch.cat([batch.transpose(0, 1).reshape(3, -1) for batch in batches], 1)
    if channel:
        y = pyobserver.ops.fake_quantize(x, site.scale, site.zero_point, 0, 255, 0)
    else:
        y = pyobserver.ops.fake_quantize(x, site.scale, site.zero_point, 0, 255)
    assert site.sqnr == pytest.approx(direct_sqnr(x, y), abs=1.0)


def test_sample_is_even_over_all_values() -> None:
    sizes = (500, 1500, 3000, 5000)
    sample = ValueSample(None, torch.Generator().manual_seed(3))
    for i, size in enumerate(sizes):
        sample.add(torch.full((size,), float(i)))
    counts = torch.bincount(sample.values.long(), minlength=4)
    expected = torch.tensor(sizes) * counts.sum() / sum(sizes)
    chi_squared = ((counts - expected).square() / expected).sum()
    assert chi_squared < 16.3  # 0.999 quantile with 3 degrees of freedom


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
def test_sample_knows_the_channel_of_its_values(axis: int) -> None:
    x = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    channel = torch.empty_like(x)
    for i, part in enumerate(channel.unbind(axis)):
        part.fill_(i)
    sample = ValueSample(axis, torch.Generator())
    sample.add(x.transpose(0, 1).contiguous().transpose(0, 1))
    assert torch.equal(channel.reshape(-1)[sample.values.long()].long(), sample.channels)


def test_exact_grid_has_infinite_sqnr() -> None:
    result = quiet(nn.Linear(3, 2), [torch.zeros(4, 3)])
    assert result["input"].sqnr == math.inf


def test_same_numbers_every_time() -> None:
    model = Net()
    first, second = quiet(model, batches_of()), quiet(model, batches_of())
    assert [site.sqnr for site in first.values()] == [site.sqnr for site in second.values()]


# which modules


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        (nn.Linear, {"block.unused", "fc"}),
        ((nn.Linear, nn.BatchNorm2d), {"block.unused", "fc", "norm"}),
        ("*conv?", {"conv1", "block.conv2"}),
        (["fc", "block.*"], {"fc", "block.conv2", "block.unused"}),
        (["fc", nn.BatchNorm2d], {"fc", "norm"}),
        (lambda name, module: name.startswith("block.c"), {"block.conv2"}),
    ],
    ids=["type", "types", "glob", "globs", "mixed", "predicate"],
)
def test_selection(modules: Any, expected: set[str]) -> None:
    result = quiet(Net(), batches_of(1), modules)
    assert {site.module for site in result.values()} | set(result.never_called) == expected


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("conv3", "'conv3'; near it are conv1"),
        (["fc", "zzz"], "'zzz'; the model has conv1, norm, block, block.conv2, block.unused, fc"),
        (nn.LSTM, "the model has BatchNorm2d, Conv2d, Linear, ModuleDict, Net"),
        (lambda name, module: False, "predicate"),
        ([], "got none"),
    ],
)
def test_selection_of_nothing(modules: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"calibrate: modules: .*{message}"):
        quiet(Net(), batches_of(1), modules)


def test_default_selection_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"usually quantized .* the model has ReLU"):
        quiet(nn.ReLU(), batches_of(1))


# arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"modules": 3}, TypeError, "modules: expected module types.* got 3"),
        ({"modules": nn.ReLU()}, TypeError, "modules: expected .* got ReLU"),
        ({"modules": [int]}, TypeError, "modules: expected .* got <class 'int'>"),
        ({"activation": None, "weight": None}, ValueError, "activation, weight: expected"),
        ({"activation": 3}, TypeError, "activation: expected a class or factory.* got 3"),
        ({"weight": pyobserver.MinMaxObserver()}, TypeError, "weight: .* got MinMaxObserver"),
        ({"activation": nn.ReLU}, TypeError, "activation: expected an observer .* got ReLU"),
        ({"weight": pyobserver.PlaceholderObserver}, TypeError, "weight: expected an observer"),
        (
            {"weight": pyobserver.PerBlockLogHistogramObserver.with_args(block_size=(1, 2))},
            TypeError,
            "weight: expected an observer of one scale, .* got PerBlockLogHistogramObserver",
        ),
        ({"batches": 3}, TypeError, "batches: expected an iterable of batches, got 3"),
        ({"batches": None}, TypeError, "batches: expected an iterable of batches, got None"),
        ({"model": len}, TypeError, "model: expected a torch.nn.Module"),
        ({"forward": 3}, TypeError, "forward: expected a callable .* got 3"),
    ],
)
def test_bad_arguments(arguments: Any, error: type[Exception], message: str) -> None:
    model = Net()
    with pytest.raises(error, match=f"calibrate: {message}"):
        quiet(**{"model": model, "batches": batches_of(1), **arguments})
    assert hook_count(model) == 0


def test_observers_of_torch_ao_serve() -> None:
    ao = pytest.importorskip("torch.ao.quantization")
    model, batches = Net(), batches_of(2)
    theirs = quiet(
        model,
        batches,
        activation=ao.MinMaxObserver.with_args(dtype=torch.quint8),
        weight=ao.PerChannelMinMaxObserver.with_args(
            dtype=torch.qint8, qscheme=torch.per_channel_symmetric
        ),
    )
    ours = quiet(model, batches, activation=ACTIVATION)
    for name in ours:
        assert torch.equal(theirs[name].scale, ours[name].scale)
        assert torch.equal(theirs[name].zero_point, ours[name].zero_point)
        assert theirs[name].sqnr == ours[name].sqnr


def test_fixed_parameters_serve() -> None:
    fixed = pyobserver.FixedQParamsObserver.with_args(scale=1 / 16, zero_point=8, quant_max=15)
    site = quiet(nn.Linear(3, 2), [torch.rand(4, 3)], activation=fixed)["input"]
    assert (float(site.scale), int(site.zero_point), site.min_val.numel()) == (1 / 16, 8, 0)


# the result


def test_mapping_and_repr() -> None:
    result = quiet(Net(), batches_of(2), "fc")
    assert len(result) == 3
    assert "fc.weight" in result
    assert repr(result) == "<CalibrationResult of 3 sites, 2 batches>"
    low, high = result["fc.input"].range
    site = result["fc.input"]
    assert float(low) == pytest.approx(-float(site.scale * site.zero_point))
    assert float(high - low) == pytest.approx(255 * float(site.scale))


def test_table() -> None:
    four_bit = ACTIVATION.with_args(quant_min=0, quant_max=15)
    lines = str(quiet(Net(), batches_of(2), "fc", activation=four_bit)).splitlines()
    header, rule, *rows, footer = lines
    assert header.split() == [
        "site", "observer", "method", "type", "scale", "zero", "point", "range", "SQNR", "dB",
        "predicted", "seen",
    ]  # fmt: skip
    assert set(rule) == {"-"}
    assert len({len(line) for line in (header, rule, *rows)}) == 1
    assert "uint8 0..15 affine" in rows[0]
    assert "int8 symmetric axis 0" in rows[1]
    assert " .. " in rows[1]
    assert footer == "2 batches"


def assert_same(left: CalibrationResult, right: CalibrationResult) -> None:
    assert list(left) == list(right)
    assert (left.batches, left.never_called) == (right.batches, right.never_called)
    for name in left:
        for field, value in vars(left[name]).items():
            other = getattr(right[name], field)
            if isinstance(value, Tensor):
                assert value.dtype == other.dtype
                assert torch.equal(value, other)
            elif field == "predicted_sqnr" and math.isnan(value):
                assert math.isnan(other)
            else:
                assert value == other


def test_save_and_load(tmp_path: Path) -> None:
    result = quiet(Net(), batches_of(2))
    path = tmp_path / "calibration.pt"
    result.save(path)
    plain = torch.load(path, weights_only=True)
    assert plain["sites"][0]["dtype"] == "uint8"
    loaded = CalibrationResult.load(path)
    assert_same(loaded, result)
    assert str(loaded) == str(result)


def test_load_refuses_other_files(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="expected a saved CalibrationResult, got"):
        CalibrationResult.load(path)
    torch.save({"format": "pyobserver.calibration", "version": 3}, path)
    with pytest.raises(ValueError, match="format version 2 or earlier, got 3"):
        CalibrationResult.load(path)


# its application


def test_applied_model_is_fake_quantized_bit_for_bit(tmp_path: Path) -> None:
    model, batches = Net().eval(), batches_of()
    result = quiet(model, batches, ["conv1", "fc"], activation=ACTIVATION)
    applied = result.apply(model)
    assert hook_count(model) == 0

    def quantized(name: str, x: Tensor) -> Tensor:
        site = result[name]
        axis = site.ch_axis
        return pyobserver.ops.fake_quantize(
            x, site.scale, site.zero_point, site.quant_min, site.quant_max, axis
        )

    x = batches[0]
    with torch.no_grad():
        h = nn.functional.conv2d(
            quantized("conv1.input", x),
            quantized("conv1.weight", model.conv1.weight),
            model.conv1.bias,
        )
        h = torch.relu(model.norm(quantized("conv1.output", h)))
        h = quantized("fc.input", model.block["conv2"](h).flatten(1))
        h = nn.functional.linear(h, quantized("fc.weight", model.fc.weight), model.fc.bias)
        expected = quantized("fc.output", h)
        assert torch.equal(applied(x), expected)

        result.save(tmp_path / "calibration.pt")
        fresh = Net().eval()
        fresh.load_state_dict(model.state_dict())
        loaded = CalibrationResult.load(tmp_path / "calibration.pt")
        assert torch.equal(loaded.apply(fresh)(x), expected)
        assert torch.equal(copy.deepcopy(applied)(x), expected)


def test_gradient_passes_straight_through() -> None:
    model, batches = Net().eval(), batches_of(1)
    applied = quiet(model, batches, activation=ACTIVATION).apply(model)
    x = batches[0].clone().requires_grad_()
    loss = applied(x).square().sum()
    loss.backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    used = [p for name, p in applied.named_parameters() if "unused" not in name]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in used)
    optimizer = torch.optim.SGD(applied.parameters(), lr=1e-3)
    optimizer.step()
    assert applied(x).square().sum() < loss


def test_inplace_and_remove() -> None:
    model, x = Net().eval(), batches_of(1)[0]
    result = quiet(model, [x])
    before, weight = model(x), model.conv1.weight
    assert result.apply(model, inplace=True) is model
    assert not torch.equal(model(x), before)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        CalibrationResult.remove(one)
        assert hook_count(one) == 0
        assert torch.equal(one(x), before)
        assert "conv1.weight" in one.state_dict()
    assert model.conv1.weight is weight
    result.apply(model, inplace=True)  # and again


def test_remove_leaves_what_is_not_ours() -> None:
    model, x = Net().eval(), batches_of(1)[0]
    nn.utils.parametrizations.weight_norm(model.fc)
    model.conv1.register_forward_pre_hook(lambda module, args: None)
    before = model(x)
    quiet(model, [x]).apply(model, inplace=True)
    assert not torch.equal(model(x), before)
    CalibrationResult.remove(model)
    assert hook_count(model) == 1
    assert torch.equal(model(x), before)


def test_apply_keeps_training_flag_and_activation_state_dict() -> None:
    model = Net().train()
    result = quiet(model, batches_of(1), weight=None)
    applied = result.apply(model)
    assert applied.training
    assert applied.state_dict().keys() == model.state_dict().keys()


def test_applied_scales_do_not_follow_the_dtype() -> None:
    model, x = Net().eval(), batches_of(1)[0]
    applied = quiet(model, [x]).apply(model).double()
    assert applied(x.double()).dtype == torch.float64


def test_apply_names_what_a_model_lacks() -> None:
    result = quiet(Net(), batches_of(1))
    other = Net()
    del other.fc
    other.conv1 = nn.Conv2d(3, 7, 3)
    other.block["conv2"] = nn.ReLU()
    with pytest.raises(ValueError, match="apply: model: expected one with the sites") as caught:
        result.apply(other, inplace=True)
    message = str(caught.value)
    assert "no module 'fc' for fc.input, fc.weight, fc.output" in message
    assert "conv1.weight of shape (7, 3, 3, 3) for 6 scales on axis 0" in message
    assert "no weight for block.conv2.weight" in message
    assert hook_count(other) == 0
    assert "conv1.weight" in other.state_dict()


def test_apply_twice_is_an_error() -> None:
    model = Net()
    result = quiet(model, batches_of(1), "fc")
    result.apply(model, inplace=True)
    with pytest.raises(ValueError, match="'fc' is fake-quantized already"):
        result.apply(model, inplace=True)


def test_result_is_not_tied_to_the_model() -> None:
    model = Net()
    result = quiet(model, batches_of(1), "fc")
    before = result["fc.weight"].scale.clone()
    applied = result.apply(model)
    for buffer in applied.buffers():
        buffer.fill_(0.5) if buffer.is_floating_point() else None
    assert torch.equal(result["fc.weight"].scale, before)


# the progress bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(track([1, 2, 3], "calibrate")) == [1, 2, 3]
    last = sys.stderr.getvalue().rsplit("\r", 1)[1]  # type: ignore[attr-defined]
    assert last.startswith("calibrate [##############################] 3/3")
    assert last.endswith("\n")


def test_progress_of_unknown_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    calibrate(Net(), iter(batches_of(2)))
    last = sys.stderr.getvalue().rsplit("\r", 1)[1]  # type: ignore[attr-defined]
    assert last.startswith("calibrate 2 ")


def test_progress_line_ends_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(RuntimeError):
        calibrate(Failing(2, RuntimeError()), batches_of(3))
    assert sys.stderr.getvalue().endswith("\n")  # type: ignore[attr-defined]


@pytest.mark.parametrize("show", [True, False])
def test_progress_is_silent_elsewhere(show: bool, capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(Net(), batches_of(1), progress=show)
    assert capsys.readouterr() == ("", "")

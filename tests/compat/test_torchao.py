"""Our classes in the place of torchao's, in its pt2e flows, give the models it gives."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convnet import CLASSES, ConvNet, make_batches, make_convnet, make_plain_convnet, train
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from twins import OURS, PUBLIC_CLASSES, assert_same_tensors, counterpart, our_class, same_named

pytest.importorskip("torchao", reason="the pt2e flows are torchao's, which is not installed")

import torchao.quantization.pt2e as pt2e
from torchao.quantization.pt2e import qat_utils
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase
from torchao.quantization.pt2e.observer import PartialWrapper, _is_activation_post_process
from torchao.quantization.pt2e.prepare import _create_obs_or_fq_from_qspec
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import (
    FixedQParamsQuantizationSpec,
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
    SharedQuantizationSpec,
)

aten = torch.ops.aten
decomposed = torch.ops.quantized_decomposed

OBSERVERS = [
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "PerChannelMinMaxObserver",
]
WITHOUT_COUNTERPART = [
    "KLObserver",
    "LogHistogramObserver",
    "MSEObserver",
    "PerChannelLogHistogramObserver",
    "PercentileObserver",
]


class SpecQuantizer(Quantizer):
    """The given specs on convolutions, linear layers and additions; pooling shares its input's."""

    def __init__(
        self, activation: QuantizationSpec, weight: QuantizationSpec, weighted_only: bool = False
    ):
        self.activation = activation
        self.weight = weight
        self.weighted_only = weighted_only

    def annotate(self, model: GraphModule) -> GraphModule:
        for node in model.graph.nodes:
            made = self._annotation(node)
            if made is not None:
                node.meta["quantization_annotation"] = made
        return model

    def _annotation(self, node: Node) -> QuantizationAnnotation | None:
        x = node.args[0] if node.args else None
        output = None if self.weighted_only else self.activation
        if node.target in (aten.conv2d.default, aten.linear.default):
            inputs = {x: self.activation, node.args[1]: self.weight}
        elif self.weighted_only:
            return None
        elif node.target is aten.add.Tensor:
            inputs = {x: self.activation, node.args[1]: self.activation}
        elif node.target is aten.max_pool2d.default:
            inputs, output = {x: self.activation}, SharedQuantizationSpec((x, node))
        elif node.target is aten.sigmoid.default:
            inputs = {x: self.activation}
            output = FixedQParamsQuantizationSpec(
                torch.uint8, 1 / 256, 0, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine
            )
        else:
            return None
        return QuantizationAnnotation(inputs, output, _annotated=True)

    def validate(self, model: GraphModule) -> None:
        pass


def activation_spec(constructor: Any, **changes: Any) -> QuantizationSpec:
    spec = QuantizationSpec(
        torch.int8,
        constructor,
        quant_min=-128,
        quant_max=127,
        qscheme=torch.per_tensor_affine,
    )
    return replace(spec, **changes)


def weight_spec(constructor: Any, **changes: Any) -> QuantizationSpec:
    spec = QuantizationSpec(
        torch.int8,
        constructor,
        quant_min=-127,
        quant_max=127,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
    )
    return replace(spec, **changes)


def per_tensor_weight_spec(constructor: Any) -> QuantizationSpec:
    return weight_spec(constructor, qscheme=torch.per_tensor_symmetric, ch_axis=None)


def export(net: nn.Module) -> GraphModule:
    return torch.export.export(net, (make_batches()[0],)).module()


def calibrate(model: nn.Module) -> None:
    with torch.no_grad():
        for batch in make_batches():
            model(batch)


def ptq(quantizer: Quantizer, fold: bool = False) -> tuple[GraphModule, GraphModule]:
    prepared = prepare_pt2e(export(make_convnet()), quantizer)
    calibrate(prepared)
    # the copy is what is kept: its annotations still point to nodes of the original
    return copy.deepcopy(prepared), convert_pt2e(prepared, fold_quantize=fold)


def theirs_in(model: nn.Module) -> list[nn.Module]:
    """What torchao takes for an observer, ours among them."""
    return [m for m in model.modules() if _is_activation_post_process(m)]


def ours_in(model: nn.Module) -> list[nn.Module]:
    kinds = (OURS.ObserverBase, OURS.FakeQuantizeBase)
    return [m for m in model.modules() if isinstance(m, kinds)]


def assert_no_observer_left(model: GraphModule) -> None:
    assert not ours_in(model)
    assert not theirs_in(model)
    assert not [n for n in model.graph.nodes if n.op == "call_module" and "post_process" in n.name]


def q_dq_calls(model: GraphModule) -> list[tuple[Any, ...]]:
    """Each q, dq and choose_qparams of a graph, with its arguments: tensors by their values."""

    def value(argument: Any) -> Any:
        if not isinstance(argument, Node):
            return argument
        if argument.op != "get_attr":
            return "node"
        found = attrgetter(argument.target)(model)
        return found.dtype, tuple(found.flatten().tolist())

    return [
        (node.target, *map(value, node.args), tuple(node.kwargs.items()))
        for node in model.graph.nodes
        if getattr(node.target, "namespace", None) == "quantized_decomposed"
    ]


def assert_same_model(ours: GraphModule, theirs: GraphModule) -> None:
    """The same q and dq nodes, and the same outputs, on data other than the calibration's."""
    assert_no_observer_left(ours)
    calls = q_dq_calls(theirs)
    assert len(calls) >= 4
    assert q_dq_calls(ours) == calls
    assert ours.code == theirs.code
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        expected = theirs(x)
        assert expected.shape == (4, CLASSES)
        # or the comparison would say nothing
        assert expected.unique().numel() > 10
        assert torch.equal(ours(x), expected)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are small: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- what torchao takes for its own ----


SAME_NAMED = same_named(pt2e.observer, pt2e.fake_quantize)


def test_every_class_of_theirs_that_is_replaced_is_found() -> None:
    assert len(SAME_NAMED) >= 16
    assert {"ObserverBase", "UniformQuantizationObserverBase", "FakeQuantizeBase"} <= {*SAME_NAMED}


@pytest.mark.parametrize("name", SAME_NAMED)
def test_every_class_of_ours_is_one_of_theirs(name: str) -> None:
    ours, theirs = SAME_NAMED[name]
    assert ours is not theirs
    OURS.NoopObserver()  # constructors register with the hosts that are loaded by then
    assert issubclass(ours, theirs)


@pytest.mark.parametrize("name", PUBLIC_CLASSES)
def test_nothing_public_is_called_convert(name: str) -> None:
    # convert_pt2e hands the graph over to a method of that name
    assert not hasattr(PUBLIC_CLASSES[name], "convert")


@pytest.mark.parametrize("name", [*OBSERVERS, *WITHOUT_COUNTERPART])
def test_per_channel_classes_say_so(name: str) -> None:
    # prepare_pt2e drops ch_axis of the others
    parameters = inspect.signature(PUBLIC_CLASSES[name]).parameters
    assert ("PerChannel" in name) == ("ch_axis" in parameters)
    made = getattr(OURS, name)()
    assert hasattr(made, "ch_axis") == ("PerChannel" in name)
    assert hasattr(made, "convert") is False


@pytest.mark.parametrize(
    "name",
    [*OBSERVERS, *WITHOUT_COUNTERPART, "FakeQuantize", "FusedMovingAvgObsFakeQuantize"],
)
def test_every_field_of_a_spec_is_taken(name: str) -> None:
    channel = "PerChannel" in name
    values = {
        "dtype": torch.int8,
        "quant_min": -7,
        "quant_max": 8,
        "qscheme": torch.per_channel_symmetric if channel else torch.per_tensor_symmetric,
        "ch_axis": 1 if channel else None,
        "is_dynamic": False,
    }
    constructor = getattr(OURS, name)
    assert {f.name for f in fields(QuantizationSpec)} == {*values, "observer_or_fake_quant_ctr"}
    made = _create_obs_or_fq_from_qspec(
        QuantizationSpec(observer_or_fake_quant_ctr=constructor, **values), {}, is_qat=False
    )
    assert type(made) is constructor
    for field, value in values.items():
        if field != "ch_axis" or channel:
            assert getattr(made, field) == value, field


def test_the_channel_axis_of_a_spec_reaches_a_factory() -> None:
    spec = weight_spec(OURS.PerChannelMinMaxObserver.with_args(eps=0.5), ch_axis=1)
    made = _create_obs_or_fq_from_qspec(spec, {}, is_qat=False)
    assert (made.ch_axis, made.eps.item()) == (1, 0.5)
    # bound twice, where torchao's own wrapper ends in a wrapper without a __name__
    twice = OURS.PerChannelMinMaxObserver.with_args(eps=0.5).with_args(nonfinite="raise")
    made = _create_obs_or_fq_from_qspec(weight_spec(twice, ch_axis=1), {}, is_qat=False)
    assert (made.ch_axis, made.nonfinite) == (1, "raise")


def test_factories_are_taken_by_both_frameworks() -> None:
    from torch.ao.quantization.observer import _PartialWrapper

    for factory in (
        OURS.MinMaxObserver.with_args(eps=0.5),
        OURS.MinMaxObserver.with_callable_args(eps=lambda: 0.5),
        OURS.default_fake_quant,
    ):
        assert isinstance(factory, PartialWrapper)
        assert isinstance(factory, _PartialWrapper)
        assert isinstance(copy.deepcopy(factory), PartialWrapper)
        assert factory.p.func.__name__ == factory.__name__


def test_a_subclass_of_a_user_is_converted() -> None:
    class Halved(OURS.MinMaxObserver):
        def observed_range(self, enabled: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return self.min_val / 2, self.max_val / 2

    def scales(constructor: Any) -> list[float]:
        weight = per_tensor_weight_spec(OURS.MinMaxObserver)
        _, converted = ptq(SpecQuantizer(activation_spec(constructor), weight, True))
        assert_no_observer_left(converted)
        quantize = decomposed.quantize_per_tensor.default
        nodes = [n for n in converted.graph.nodes if n.target is quantize]
        # weights have the symmetric range
        return [n.args[1] for n in nodes if n.args[3] == -128]

    halved, whole = scales(Halved), scales(OURS.MinMaxObserver)
    assert len(whole) == 4
    assert halved == pytest.approx([s / 2 for s in whole])


# ---- prepare_pt2e, convert_pt2e ----


def _activation(ns: ModuleType, kind: str) -> Any:
    return {
        "histogram": ns.HistogramObserver,
        "histogram_eps": ns.HistogramObserver.with_args(eps=2**-12),
        "minmax": ns.MinMaxObserver,
        "moving": ns.MovingAverageMinMaxObserver.with_args(averaging_constant=0.3),
    }[kind]


def _weight(ns: ModuleType, kind: str) -> QuantizationSpec:
    return {
        "channel": weight_spec(ns.PerChannelMinMaxObserver),
        "channel_1": weight_spec(ns.PerChannelMinMaxObserver, ch_axis=1),
        "channel_eps": weight_spec(ns.PerChannelMinMaxObserver.with_args(eps=2**-12)),
        "channel_moving": weight_spec(
            ns.MovingAveragePerChannelMinMaxObserver, qscheme=torch.per_channel_affine
        ),
        "tensor": per_tensor_weight_spec(ns.MinMaxObserver),
    }[kind]


SETTINGS = [
    ("histogram", "channel"),
    ("histogram_eps", "channel_eps"),
    ("minmax", "tensor"),
    ("minmax", "channel_1"),
    ("moving", "channel_moving"),
]


@pytest.mark.parametrize(("activation", "weight"), SETTINGS)
def test_ptq_converts_to_the_same_model(activation: str, weight: str) -> None:
    results = []
    for ns in (OURS, pt2e):
        spec = activation_spec(_activation(ns, activation))
        results.append(ptq(SpecQuantizer(spec, _weight(ns, weight))))
    (prepared, ours), (prepared_with_theirs, theirs) = results
    assert len(ours_in(prepared)) >= 10
    assert prepared.code == prepared_with_theirs.code
    assert_same_tensors(prepared.state_dict(), prepared_with_theirs.state_dict())
    assert_same_model(ours, theirs)
    with pytest.raises(AssertionError):
        assert_no_observer_left(prepared)


@pytest.mark.parametrize("name", ["MSEObserver", "PercentileObserver", "KLObserver"])
def test_ptq_converts_what_log_histograms_chose(name: str) -> None:
    """They have no counterpart; the scales are those of the observers, and the model is close."""
    activation = activation_spec(getattr(OURS, name).with_args(mantissa_bits=3))
    weight = weight_spec(OURS.PerChannelLogHistogramObserver.with_args(mantissa_bits=3))
    prepared, converted = ptq(SpecQuantizer(activation, weight))
    assert_no_observer_left(converted)
    chosen = [m.calculate_qparams() for m in ours_in(prepared) if hasattr(m, "solve")]
    pairs = {(float(s), int(z)) for s, z in chosen if s.numel() == 1}
    op = decomposed.quantize_per_tensor.default
    nodes = [n for n in converted.graph.nodes if n.target is op]
    found = {n.args[1:3] for n in nodes if n.args[1] != 1 / 256}  # the sigmoid's is fixed
    assert len(found) >= 5
    assert found <= pairs
    x = make_batches()[0]
    with torch.no_grad():
        assert float((converted(x) - make_convnet()(x)).abs().mean()) < 0.05


def test_the_axis_of_weights_survives() -> None:
    for axis, channels in ((0, {8, 10, 16}), (1, {1, 8, 16, 128})):
        weight = weight_spec(OURS.PerChannelMinMaxObserver, ch_axis=axis)
        _, converted = ptq(SpecQuantizer(activation_spec(OURS.MinMaxObserver), weight))
        op = decomposed.quantize_per_channel.default
        nodes = [n for n in converted.graph.nodes if n.target is op]
        assert [n.args[3:] for n in nodes] == [(axis, -127, 127, torch.int8)] * 4
        assert {getattr(converted, n.args[1].target).numel() for n in nodes} == channels


def test_folded_weights_are_the_same() -> None:
    results = []
    for ns in (OURS, pt2e):
        spec = activation_spec(_activation(ns, "histogram"))
        results.append(ptq(SpecQuantizer(spec, _weight(ns, "channel")), fold=True)[1])
    ours, theirs = results
    assert_same_tensors(ours.state_dict(), theirs.state_dict())
    assert [t.dtype for t in ours.state_dict().values()].count(torch.int8) == 4
    assert_same_model(ours, theirs)


def test_shared_specs_share_the_observer() -> None:
    spec = activation_spec(OURS.HistogramObserver)
    prepared, converted = ptq(SpecQuantizer(spec, _weight(OURS, "channel")))
    (pool,) = (n for n in prepared.graph.nodes if n.target is aten.max_pool2d.default)
    (after,) = pool.users
    before = prepared.get_submodule(pool.args[0].target)
    assert type(before) is OURS.HistogramObserver
    assert prepared.get_submodule(after.target) is before
    (pool,) = (n for n in converted.graph.nodes if n.target is aten.max_pool2d.default)
    (after,) = pool.users
    assert after.target is decomposed.quantize_per_tensor.default
    assert after.args[1:] == pool.args[0].args[1:]


def test_an_unregistered_class_would_be_left_in_the_graph() -> None:
    """The trap: torchao says nothing, so it is our registration that has to hold."""
    observed = OURS.MinMaxObserver

    class Unregistered(nn.Module):
        with_args = classmethod(lambda cls, **kwargs: lambda: cls(**kwargs))

        def __init__(self, **kwargs: Any) -> None:
            super().__init__()
            self.inner = observed(**kwargs)
            self.dtype = self.inner.dtype

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    weight = per_tensor_weight_spec(OURS.MinMaxObserver)
    _, converted = ptq(SpecQuantizer(activation_spec(Unregistered), weight, True))
    assert [m for m in converted.modules() if isinstance(m, Unregistered)]
    with pytest.raises(AssertionError):
        assert_no_observer_left(converted)


def _dynamic(ns: ModuleType, kind: str) -> Any:
    memoryless = {"averaging_constant": 1}
    return {
        "placeholder": ns.PlaceholderObserver,
        "placeholder_eps": ns.PlaceholderObserver.with_args(eps=2**-12),
        "fake_quantize": ns.FakeQuantize.with_args(
            observer=ns.MovingAverageMinMaxObserver.with_args(**memoryless)
        ),
        "moving": ns.MovingAverageMinMaxObserver.with_args(**memoryless),
        "minmax": ns.MinMaxObserver,
    }[kind]


def _dynamic_models(kind: str) -> tuple[GraphModule, GraphModule]:
    results = []
    for ns in (OURS, pt2e):
        spec = activation_spec(_dynamic(ns, kind), is_dynamic=True)
        results.append(ptq(SpecQuantizer(spec, _weight(ns, "channel"), weighted_only=True)))
    (prepared, ours), (prepared_with_theirs, theirs) = results
    assert len(ours_in(prepared)) >= 8
    assert prepared.code == prepared_with_theirs.code
    chosen = [n for n in ours.graph.nodes if n.target is decomposed.choose_qparams.tensor]
    assert len(chosen) == 4
    return ours, theirs


@pytest.mark.parametrize("kind", ["placeholder", "placeholder_eps", "fake_quantize"])
def test_dynamic_activations(kind: str) -> None:
    assert_same_model(*_dynamic_models(kind))


@pytest.mark.parametrize("kind", ["moving", "minmax"])
def test_dynamic_activations_of_observers_with_a_buffer_of_eps(kind: str) -> None:
    # torchao writes the buffer into the code of the graph, which then runs with neither's
    ours, theirs = _dynamic_models(kind)
    assert_no_observer_left(ours)
    assert q_dq_calls(ours) == q_dq_calls(theirs)


def test_dynamic_moving_average_has_to_be_memoryless() -> None:
    spec = activation_spec(OURS.MovingAverageMinMaxObserver, is_dynamic=True)
    with pytest.raises(NotImplementedError, match="averaging_constant"):
        ptq(SpecQuantizer(spec, _weight(OURS, "channel"), weighted_only=True))


# ---- quantizers that come with torchao ----


def _replaced(config: Any, find: Callable[[type], type]) -> Any:
    """A QuantizationConfig whose specs make the counterparts of what they made."""
    changes = {}
    for name in ("input_activation", "output_activation", "weight"):
        spec = getattr(config, name)
        if spec is not None:
            made = counterpart(spec.observer_or_fake_quant_ctr, find)
            changes[name] = replace(spec, observer_or_fake_quant_ctr=made)
    return replace(config, **changes)


def _same(theirs: type) -> type:
    return theirs


def _xnnpack(find: Callable[[type], type], **kwargs: Any) -> Quantizer:
    module = pytest.importorskip("torchao.testing.pt2e._xnnpack_quantizer")
    config = module.get_symmetric_quantization_config(**kwargs)
    return module.XNNPACKQuantizer().set_global(_replaced(config, find))


def _x86(find: Callable[[type], type], **kwargs: Any) -> Quantizer:
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as module

    config = module.get_default_x86_inductor_quantization_config(**kwargs)
    return module.X86InductorQuantizer().set_global(_replaced(config, find))


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (_xnnpack, {}),
        (_xnnpack, {"is_per_channel": True}),
        (_xnnpack, {"is_per_channel": True, "is_dynamic": True}),
        (_x86, {}),
        (_x86, {"is_dynamic": True}),
    ],
    ids=["xnnpack", "xnnpack_channel", "xnnpack_dynamic", "x86", "x86_dynamic"],
)
def test_ptq_with_their_quantizers(make: Callable[..., Quantizer], kwargs: dict[str, Any]) -> None:
    _, ours = ptq(make(our_class, **kwargs))
    prepared, theirs = ptq(make(_same, **kwargs))
    assert not ours_in(prepared)
    assert_same_model(ours, theirs)


def qat(
    quantizer: Quantizer, make_net: Callable[[], ConvNet] = make_plain_convnet
) -> tuple[list[float], GraphModule, GraphModule]:
    prepared = prepare_qat_pt2e(export(make_net().train()), quantizer)
    losses = train(prepared)
    pt2e.move_exported_model_to_eval(prepared)
    return losses, copy.deepcopy(prepared), convert_pt2e(prepared, fold_quantize=False)


def assert_same_training(
    ours: tuple[list[float], GraphModule, GraphModule],
    theirs: tuple[list[float], GraphModule, GraphModule],
) -> None:
    (losses, prepared, converted), (expected, prepared_with_theirs, expected_model) = ours, theirs
    assert len([m for m in ours_in(prepared) if isinstance(m, OURS.FakeQuantize)]) >= 4
    assert losses == expected
    assert losses[-1] < losses[0]
    assert prepared.code == prepared_with_theirs.code
    parameters = [dict(m.named_parameters()) for m in (prepared, prepared_with_theirs)]
    assert_same_tensors(*parameters)
    assert_same_model(converted, expected_model)


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [
        (_xnnpack, {"is_per_channel": True, "is_dynamic": True}),
        (_x86, {}),
    ],
    ids=["xnnpack_dynamic", "x86"],
)
def test_qat_with_their_quantizers(make: Callable[..., Quantizer], kwargs: dict[str, Any]) -> None:
    ours = qat(make(our_class, is_qat=True, **kwargs))
    assert_same_training(ours, qat(make(_same, is_qat=True, **kwargs)))


@pytest.fixture
def conv2d_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    """No search for the patterns of other convolutions: three quarters of torchao's time."""
    for name in ("_fuse_conv_bn_qat_helper", "_fold_conv_bn_qat_helper"):
        search = getattr(qat_utils, name, None)
        if search is not None:

            def narrowed(model: GraphModule, conv: Any, *args: Any, _go=search, **kw: Any) -> Any:
                return _go(model, conv, *args, **kw) if conv is F.conv2d else model

            monkeypatch.setattr(qat_utils, name, narrowed)


@pytest.mark.once
@pytest.mark.usefixtures("conv2d_patterns")
def test_qat_through_batch_norm() -> None:
    kwargs = {"is_qat": True, "is_per_channel": True}
    ours = qat(_xnnpack(our_class, **kwargs), make_convnet)
    assert_same_training(ours, qat(_xnnpack(_same, **kwargs), make_convnet))
    assert not [n for n in ours[2].graph.nodes if "batch_norm" in str(n.target)]


@pytest.mark.parametrize("observer", ["MovingAverageMinMaxObserver", "HistogramObserver"])
def test_qat_with_fake_quantize_in_specs(observer: str) -> None:
    results = []
    for ns in (OURS, pt2e):
        activation = ns.FakeQuantize.with_args(observer=getattr(ns, observer))
        weight = ns.FakeQuantize.with_args(observer=ns.MovingAverageMinMaxObserver)
        specs = activation_spec(activation), per_tensor_weight_spec(weight)
        results.append(qat(SpecQuantizer(*specs)))
    assert_same_training(*results)
    (_, ours, _), (_, theirs, _) = results
    assert_same_tensors(ours.state_dict(), theirs.state_dict())


def test_moving_an_exported_model_to_eval_and_back() -> None:
    results = []
    for ns in (OURS, pt2e):
        activation = activation_spec(ns.FakeQuantize)
        weight = per_tensor_weight_spec(ns.FakeQuantize)
        prepared = prepare_qat_pt2e(
            export(make_plain_convnet().train()), SpecQuantizer(activation, weight)
        )
        train(prepared)
        codes = [prepared.code]
        pt2e.move_exported_model_to_eval(prepared)
        codes.append(prepared.code)
        prepared.apply(pt2e.disable_observer)
        x = make_batches()[0]
        with torch.no_grad():
            y = prepared(x)
            assert torch.equal(prepared(x), y)
        pt2e.move_exported_model_to_train(prepared)
        codes.append(prepared.code)
        with torch.no_grad():
            assert not torch.equal(prepared(x), y)
        prepared.apply(pt2e.enable_observer)
        results.append((codes, y, train(prepared)))
    (codes, y, losses), (expected_codes, expected, expected_losses) = results
    assert codes[0] != codes[1] != codes[2]
    assert codes == expected_codes
    assert torch.equal(y, expected)
    assert losses == expected_losses


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_switch_functions_reach_modules_of_both(first: str) -> None:
    functions = OURS if first == "ours" else pt2e
    model = nn.Sequential(
        OURS.FakeQuantize(),
        pt2e.FakeQuantize(),
        OURS.FusedMovingAvgObsFakeQuantize(),
        pt2e.FusedMovingAvgObsFakeQuantize(),
    )
    assert all(isinstance(module, FakeQuantizeBase) for module in model)
    for function, expected in [
        ("disable_observer", (0, 1)),
        ("disable_fake_quant", (0, 0)),
        ("enable_observer", (1, 0)),
        ("enable_fake_quant", (1, 1)),
    ]:
        model.apply(getattr(functions, function))
        found = [(int(m.observer_enabled), int(m.fake_quant_enabled)) for m in model]
        assert found == [expected] * 4, function


# ---- one framework's fake-quantize over the other's observer; state_dict ----


HOSTED: list[tuple[str, str, dict[str, Any]]] = [
    ("FakeQuantize", "MinMaxObserver", {}),
    ("FakeQuantize", "HistogramObserver", {}),
    ("FakeQuantize", "PerChannelMinMaxObserver", {"ch_axis": 1}),
    ("FusedMovingAvgObsFakeQuantize", "MovingAverageMinMaxObserver", {}),
    ("FusedMovingAvgObsFakeQuantize", "MovingAveragePerChannelMinMaxObserver", {}),
]


@pytest.mark.parametrize("holder", ["ours", "theirs"])
@pytest.mark.parametrize(("fake_quant", "observer", "kwargs"), HOSTED)
def test_fake_quantize_over_the_observer_of_the_other(
    fake_quant: str, observer: str, kwargs: dict[str, Any], holder: str
) -> None:
    cls = getattr(OURS if holder == "ours" else pt2e, fake_quant)
    modules = [cls(observer=getattr(ns, observer), **kwargs) for ns in (OURS, pt2e)]
    for factor in range(1, 4):
        x = torch.randn(6, 3, 5) * factor
        assert torch.equal(modules[0](x), modules[1](x))
    assert_same_tensors(modules[0].state_dict(), modules[1].state_dict())


@pytest.mark.parametrize("source", ["ours", "theirs"])
@pytest.mark.parametrize("name", [*OBSERVERS, "FakeQuantize", "FusedMovingAvgObsFakeQuantize"])
def test_state_dicts_load_across(name: str, source: str) -> None:
    saver, loader = (OURS, pt2e) if source == "ours" else (pt2e, OURS)
    saved, loaded = getattr(saver, name)(), getattr(loader, name)()
    for factor in range(1, 4):
        saved(torch.randn(6, 3, 5) * factor)
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()), strict=True)
    assert_same_tensors(loaded.state_dict(), saved.state_dict())
    pairs = zip(loaded.calculate_qparams(), saved.calculate_qparams(), strict=True)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("functions", ["ours", "theirs"])
@pytest.mark.parametrize("source", ["ours", "theirs"])
def test_observer_state_dicts_load_across(source: str, functions: str) -> None:
    def prepared(ns: ModuleType) -> GraphModule:
        spec = activation_spec(ns.HistogramObserver)
        return prepare_pt2e(export(make_convnet()), SpecQuantizer(spec, _weight(ns, "channel")))

    saver, loader = (OURS, pt2e) if source == "ours" else (pt2e, OURS)
    functions_of = OURS if functions == "ours" else pt2e.observer
    saved, loaded = prepared(saver), prepared(loader)
    calibrate(saved)
    entries = functions_of.get_observer_state_dict(saved)
    assert len(entries) > 10
    functions_of.load_observer_state_dict(loaded, copy.deepcopy(entries))
    assert_same_tensors(OURS.get_observer_state_dict(loaded), entries)
    converted = [convert_pt2e(model, fold_quantize=False) for model in (loaded, saved)]
    assert q_dq_calls(converted[0]) == q_dq_calls(converted[1])


# ---- who imports whom ----


def run_python(script: str) -> None:
    """Run a script in an interpreter that has imported nothing yet."""
    package = Path(OURS.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:pyobserver", "-c", script],
        cwd=package,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.once
def test_no_framework_is_imported() -> None:
    run_python(
        """
import sys
import torch

before = {name for name in sys.modules if name.partition(".")[0] in ("torchao", "torch")}
import pyobserver

pyobserver.FakeQuantize.with_args(observer=pyobserver.HistogramObserver)()(torch.randn(9))
pyobserver.MinMaxObserver.with_args(eps=0.5).with_callable_args(dtype=lambda: torch.int8)()
gained = {name for name in sys.modules if name.startswith(("torchao", "torch.ao"))} - before
assert not gained, sorted(gained)
"""
    )


@pytest.mark.once
def test_what_was_made_before_torchao_is_taken() -> None:
    run_python(
        """
import copy
import pickle
import sys
import torch
import pyobserver

early = pyobserver.PerChannelMinMaxObserver.with_args(eps=0.5)
late = early.with_callable_args(quant_max=lambda: 7).with_args(quant_min=-8)
fake = pyobserver.FakeQuantize.with_args(observer=early)
observer = pyobserver.MinMaxObserver()
pickled = pickle.dumps((observer, early))
isinstance(early, int)  # what the factory looked like then is not kept
assert "torchao" not in sys.modules

from torchao.quantization.pt2e import observer as host
from torchao.quantization.pt2e.prepare import _create_obs_or_fq_from_qspec
from torchao.quantization.pt2e.quantizer import QuantizationSpec

restored, restored_factory = pickle.loads(pickled)
for factory in (early, late, fake, restored_factory, copy.deepcopy(early)):
    assert isinstance(factory, host.PartialWrapper)
# nothing was made since torchao was imported: observers of before need a call by hand
pyobserver.register_with_hosts()
assert host._is_activation_post_process(observer)
assert host._is_activation_post_process(restored)
for factory in (early, restored_factory):
    spec = QuantizationSpec(
        torch.int8, factory, -8, 7, qscheme=torch.per_channel_symmetric, ch_axis=1
    )
    made = _create_obs_or_fq_from_qspec(spec, {}, False)
    assert isinstance(made, host.PerChannelMinMaxObserver)
    assert (made.ch_axis, made.eps.item(), made.quant_min) == (1, 0.5, -8)
"""
    )


@pytest.mark.once
def test_every_class_is_registered_where_torchao_comes_first() -> None:
    run_python(
        """
import torchao.quantization.pt2e as host
import pyobserver

found = 0
for module in (host.observer, host.fake_quantize):
    for name in module.__all__:
        theirs, ours = getattr(module, name), getattr(pyobserver, name, None)
        if isinstance(theirs, type) and isinstance(ours, type):
            found += 1
            assert issubclass(ours, theirs), name
assert found >= 14, found
"""
    )

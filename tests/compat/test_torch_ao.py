"""Our classes in the place of torch.ao's, in its eager and FX flows, give the models it gives."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.ao.quantization as ao
from convnet import CLASSES, EagerConvNet, make_batches, make_convnet, train
from torch import Tensor, nn
from torch.ao.nn.quantized.reference import Conv2d as ReferenceConv2d
from torch.ao.nn.quantized.reference import Linear as ReferenceLinear
from torch.ao.quantization import QConfig, QConfigMapping, quantize_fx
from torch.ao.quantization.backend_config import (
    BackendConfig,
    BackendPatternConfig,
    DTypeConfig,
    DTypeWithConstraints,
    get_qnnpack_backend_config,
)
from torch.ao.quantization.qconfig import (
    _activation_is_memoryless,
    _is_reuse_input_qconfig,
    qconfig_equals,
)
from twins import (
    OURS,
    assert_same_tensors,
    counterpart,
    our_class,
    same_named,
    watchers,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:reduce_range"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),
]

WEIGHT = {"dtype": torch.qint8}
PER_CHANNEL = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are small: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- what torch.ao takes for its own ----


SAME_NAMED = same_named(ao.observer, ao)


def test_every_class_of_theirs_that_is_replaced_is_found() -> None:
    assert len(SAME_NAMED) >= 16
    assert {"ObserverBase", "UniformQuantizationObserverBase", "FakeQuantizeBase"} <= {*SAME_NAMED}


@pytest.mark.parametrize("name", SAME_NAMED)
def test_every_class_of_ours_is_one_of_theirs(name: str) -> None:
    ours, theirs = SAME_NAMED[name]
    assert ours is not theirs
    assert issubclass(ours, theirs)


def test_unrelated_classes_are_not_registered() -> None:
    assert not issubclass(OURS.MinMaxObserver, ao.HistogramObserver)
    assert not issubclass(OURS.MinMaxObserver, ao.MovingAverageMinMaxObserver)
    assert not issubclass(OURS.FakeQuantize, ao.FusedMovingAvgObsFakeQuantize)
    assert not issubclass(OURS.FakeQuantize, ao.ObserverBase)


def test_a_subclass_of_a_user_is_recognised() -> None:
    class Mine(OURS.MinMaxObserver):
        pass

    assert isinstance(Mine(), ao.MinMaxObserver)
    assert ao.observer._is_activation_post_process(Mine())


@pytest.mark.parametrize(
    ("attribute", "name"),
    [
        ("ch_axis", "MinMaxObserver"),
        ("ch_axis", "MovingAverageMinMaxObserver"),
        ("ch_axis", "HistogramObserver"),
        ("ch_axis", "PerChannelMinMaxObserver"),
        ("averaging_constant", "MinMaxObserver"),
        ("averaging_constant", "PerChannelMinMaxObserver"),
        ("averaging_constant", "MovingAverageMinMaxObserver"),
        ("averaging_constant", "MovingAveragePerChannelMinMaxObserver"),
        ("convert", "MinMaxObserver"),
        ("convert", "FakeQuantize"),
    ],
)
def test_attributes_that_flows_probe_with_hasattr(attribute: str, name: str) -> None:
    ours, theirs = getattr(OURS, name)(), getattr(ao, name)()
    assert hasattr(ours, attribute) == hasattr(theirs, attribute)


@pytest.mark.parametrize(
    "name", ["MinMaxObserver", "HistogramObserver", "PerChannelMinMaxObserver", "FakeQuantize"]
)
def test_attributes_that_converters_read(name: str) -> None:
    ours, theirs = getattr(OURS, name)(), getattr(ao, name)()
    for attribute in ("dtype", "qscheme", "quant_min", "quant_max", "is_dynamic"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    if name != "FakeQuantize":
        assert torch.equal(ours.eps, theirs.eps)


def test_memoryless_and_reuse_input_are_seen() -> None:
    moving = OURS.MovingAverageMinMaxObserver
    for activation, memoryless in [
        (moving.with_args(averaging_constant=1), True),
        (moving, False),
        (OURS.MinMaxObserver, False),
        (OURS.FakeQuantize.with_args(observer=moving, averaging_constant=1), True),
        (OURS.default_dynamic_fake_quant, True),
        (OURS.default_fake_quant, False),
    ]:
        assert _activation_is_memoryless(QConfig(activation, OURS.MinMaxObserver)) is memoryless
    assert _is_reuse_input_qconfig(QConfig(OURS.ReuseInputObserver, OURS.NoopObserver))
    assert not _is_reuse_input_qconfig(QConfig(OURS.MinMaxObserver, OURS.NoopObserver))


# ---- factories ----


def _bound(**kwargs: Any) -> Any:
    return OURS.MinMaxObserver.with_args(**kwargs)


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        (_bound(quant_min=0, quant_max=127), _bound(quant_min=0, quant_max=127), True),
        (_bound(quant_min=0, quant_max=127), _bound(quant_min=0, quant_max=255), False),
        (_bound(eps=0.5), OURS.HistogramObserver.with_args(eps=0.5), False),
        (_bound(eps=0.5), ao.MinMaxObserver.with_args(eps=0.5), False),
        (_bound(eps=0.5).with_args(quant_min=0, quant_max=9),
         _bound(eps=0.5, quant_min=0, quant_max=9), True),
        (OURS.MinMaxObserver, OURS.MinMaxObserver, True),
        (OURS.MinMaxObserver, OURS.HistogramObserver, False),
        (OURS.FakeQuantize.with_args(observer=_bound(eps=0.5)),
         OURS.FakeQuantize.with_args(observer=_bound(eps=0.5)), True),
        (OURS.FakeQuantize.with_args(observer=_bound(eps=0.5)),
         OURS.FakeQuantize.with_args(observer=_bound(eps=0.25)), False),
    ],
)  # fmt: skip
def test_qconfig_equals(first: Any, second: Any, equal: bool) -> None:
    weight = OURS.default_weight_observer
    assert qconfig_equals(QConfig(first, weight), QConfig(second, weight)) is equal
    assert qconfig_equals(QConfig(weight, first), QConfig(weight, second)) is equal
    assert QConfigMapping().set_global(QConfig(first, weight)).global_qconfig.activation is first


def test_qconfig_takes_factories_and_refuses_instances() -> None:
    qconfig = QConfig(OURS.MinMaxObserver, OURS.default_weight_observer)
    assert type(qconfig.weight()) is OURS.MinMaxObserver
    with pytest.raises(ValueError, match="instance"):
        QConfig(OURS.MinMaxObserver(), OURS.default_weight_observer)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))])
def test_copies_of_factories(clone: Callable[[Any], Any]) -> None:
    factory = OURS.FakeQuantize.with_args(
        observer=OURS.PerChannelMinMaxObserver.with_args(ch_axis=1, **PER_CHANNEL), eps=0.5
    )
    again = clone(factory)
    assert isinstance(again, ao.observer._PartialWrapper)
    assert qconfig_equals(QConfig(factory, factory), QConfig(again, again))
    made = again()
    assert type(made) is OURS.FakeQuantize
    assert made.ch_axis == 1
    assert made.activation_post_process.eps.item() == 0.5


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize(
    "name",
    [
        "MinMaxObserver",
        "MovingAverageMinMaxObserver",
        "HistogramObserver",
        "PerChannelMinMaxObserver",
        "MovingAveragePerChannelMinMaxObserver",
        "FakeQuantize",
        "FusedMovingAvgObsFakeQuantize",
    ],
)
def test_copies_of_fed_modules(name: str, clone: Callable[[Any], Any]) -> None:
    module = getattr(OURS, name)()
    module(torch.randn(3, 5))
    again = clone(module)
    assert_same_tensors(again.state_dict(), module.state_dict())
    wide = torch.randn(3, 5) * 9
    again(wide)
    assert not torch.equal(again.calculate_qparams()[0], module.calculate_qparams()[0])
    module(wide)
    assert_same_tensors(again.state_dict(), module.state_dict())


def test_callable_arguments_are_called_once_a_construction() -> None:
    calls = []

    def late() -> dict[str, str]:
        calls.append(1)
        return {"device": "meta"}

    factory = OURS.MinMaxObserver.with_callable_args(factory_kwargs=late).with_args(eps=0.5)
    assert not calls
    made = factory()
    assert made.min_val.device.type == "meta"
    assert made.eps.device.type == "meta"
    assert factory(factory_kwargs=None).eps.item() == 0.5
    assert len(calls) == 1


# ---- eager mode ----


def _activation(ns: ModuleType, kind: str) -> Any:
    return {
        "class": ns.MinMaxObserver,
        "minmax": ns.MinMaxObserver.with_args(quant_min=0, quant_max=127),
        "moving": ns.MovingAverageMinMaxObserver.with_args(
            averaging_constant=0.3, quant_min=0, quant_max=127
        ),
        "histogram": ns.HistogramObserver.with_args(quant_min=0, quant_max=127),
        "reduced": ns.HistogramObserver.with_args(reduce_range=True),
        "callable": ns.HistogramObserver.with_callable_args(
            factory_kwargs=lambda: {"device": "cpu"}
        ).with_args(quant_min=0, quant_max=127),
    }[kind]


def _weight(ns: ModuleType, kind: str) -> Any:
    return {
        "tensor": ns.MinMaxObserver.with_args(qscheme=torch.per_tensor_symmetric, **WEIGHT),
        "channel": ns.PerChannelMinMaxObserver.with_args(**PER_CHANNEL),
        "channel_affine": ns.PerChannelMinMaxObserver.with_args(**WEIGHT),
        "channel_moving": ns.MovingAveragePerChannelMinMaxObserver.with_args(**PER_CHANNEL),
    }[kind]


SETTINGS = [
    ("class", "tensor"),
    ("minmax", "tensor"),
    ("moving", "channel_moving"),
    ("histogram", "channel"),
    ("reduced", "channel_affine"),
    ("callable", "channel"),
]


def _calibrate(model: nn.Module) -> None:
    with torch.no_grad():
        for batch in make_batches():
            model(batch)


def _eager(ns: ModuleType, activation: str, weight: str) -> tuple[nn.Module, nn.Module]:
    net = make_convnet(EagerConvNet)
    net = ao.fuse_modules(net, [["conv1", "bn1", "relu1"], ["conv2", "bn2"]])
    net.qconfig = QConfig(_activation(ns, activation), _weight(ns, weight))
    prepared = ao.prepare(net)
    _calibrate(prepared)
    return prepared, ao.convert(prepared)


@pytest.mark.parametrize(("activation", "weight"), SETTINGS)
def test_eager_converts_to_the_same_model(activation: str, weight: str) -> None:
    prepared, ours = _eager(OURS, activation, weight)
    prepared_with_theirs, theirs = _eager(ao, activation, weight)
    assert len(watchers(prepared)) >= 5
    assert_same_tensors(prepared.state_dict(), prepared_with_theirs.state_dict())
    assert not watchers(ours)
    assert isinstance(ours.conv2, torch.ao.nn.quantized.Conv2d)
    assert_same_model(ours, theirs)


def assert_same_model(ours: nn.Module, theirs: nn.Module) -> None:
    """The same parameters, and the same outputs, on data other than the calibration's."""
    for name, tensor in theirs.state_dict().items():
        mine = ours.state_dict()[name]
        if isinstance(tensor, Tensor) and tensor.is_quantized:
            assert torch.equal(mine.int_repr(), tensor.int_repr()), name
            mine, tensor = mine.dequantize(), tensor.dequantize()
        if isinstance(tensor, Tensor):
            assert torch.equal(mine, tensor), name
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        expected = theirs(x)
        # or the comparison would say nothing
        assert expected.shape == (4, CLASSES)
        assert expected.unique().numel() > 10
        assert torch.equal(ours(x), expected)


def test_eager_puts_observers_on_the_device_of_the_module() -> None:
    for activation in (OURS.MinMaxObserver, OURS.HistogramObserver, OURS.FakeQuantize):
        net = nn.Sequential(nn.Linear(2, 3, device="meta"))
        net.qconfig = QConfig(activation, OURS.default_weight_observer)
        (found,) = (m for m in ao.prepare(net).modules() if isinstance(m, activation))
        assert {b.device.type for n, b in found.named_buffers() if "enabled" not in n} == {"meta"}


def _qat_qconfig(ns: ModuleType, kind: str) -> QConfig:
    moving = {"observer": ns.MovingAverageMinMaxObserver, "quant_min": 0, "quant_max": 255}
    return {
        "moving": QConfig(ns.FakeQuantize.with_args(**moving), ns.default_weight_fake_quant),
        "channel": QConfig(ns.default_fake_quant, ns.default_per_channel_weight_fake_quant),
        "histogram": QConfig(ns.default_histogram_fake_quant, ns.default_weight_fake_quant),
        "fused": QConfig(ns.default_fused_act_fake_quant, ns.default_fused_wt_fake_quant),
        "fused_channel": QConfig(
            ns.default_fused_act_fake_quant, ns.default_fused_per_channel_wt_fake_quant
        ),
    }[kind]


QAT = ["moving", "channel", "histogram", "fused", "fused_channel"]


def _eager_qat(qconfig: QConfig) -> tuple[list[float], nn.Module, nn.Module]:
    net = make_convnet(EagerConvNet).train()
    net = ao.fuse_modules_qat(net, [["conv1", "bn1", "relu1"], ["conv2", "bn2"]])
    net.qconfig = qconfig
    prepared = ao.prepare_qat(net)
    losses = train(prepared)
    return losses, prepared, ao.convert(prepared.eval())


@pytest.mark.parametrize("kind", QAT)
def test_eager_qat_trains_the_same_model(kind: str) -> None:
    losses, prepared, ours = _eager_qat(_qat_qconfig(OURS, kind))
    expected, prepared_with_theirs, theirs = _eager_qat(_qat_qconfig(ao, kind))
    assert losses == expected
    assert_same_tensors(prepared.state_dict(), prepared_with_theirs.state_dict())
    assert not watchers(ours)
    assert_same_model(ours, theirs)


def test_eager_dynamic_linear() -> None:
    results = []
    for ns in (OURS, ao):
        net = make_convnet()
        spec = QConfig(ns.default_dynamic_quant_observer, ns.default_weight_observer)
        quantized = ao.quantize_dynamic(net, {nn.Linear: spec})
        assert isinstance(quantized.linear1, torch.ao.nn.quantized.dynamic.Linear)
        results.append(quantized)
    assert_same_model(*results)


@pytest.mark.parametrize(
    "observer", ["default_float_qparams_observer", "default_float_qparams_observer_4bit"]
)
def test_eager_embedding(observer: str) -> None:
    rows = torch.arange(20)
    results = []
    for ns in (OURS, ao):
        torch.manual_seed(3)
        net = nn.Sequential(nn.EmbeddingBag(20, 8, mode="sum"))
        placeholder = ns.default_placeholder_observer
        net.qconfig = QConfig(placeholder, getattr(ns, observer))
        converted = ao.convert(ao.prepare(net), mapping=None)
        assert isinstance(converted[0], torch.ao.nn.quantized.EmbeddingBag)
        results.append(converted[0](rows, torch.arange(0, 20, 2)))
    assert results[0].unique().numel() > 10
    assert torch.equal(*results)


# ---- FX ----


def _mapping(
    ns: ModuleType, activation: Any, weight: Any, fixed: str = "observer"
) -> QConfigMapping:
    """As torch.ao's default mapping: fixed ranges for sigmoid, reuse for what only reshapes."""
    sigmoid = QConfig(getattr(ns, f"default_fixed_qparams_range_0to1_{fixed}"), weight)
    return (
        QConfigMapping()
        .set_global(QConfig(activation, weight))
        .set_object_type(torch.sigmoid, sigmoid)
        .set_object_type(nn.Sigmoid, sigmoid)
        .set_object_type(torch.flatten, QConfig(ns.default_reuse_input_observer, ns.NoopObserver))
    )


def _fx(
    mapping: QConfigMapping, to_reference: bool = False, backend_config: Any = None
) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    example = (make_batches()[0],)
    prepared = quantize_fx.prepare_fx(
        make_convnet(), mapping, example, backend_config=backend_config
    )
    _calibrate(prepared)
    convert = quantize_fx.convert_to_reference_fx if to_reference else quantize_fx.convert_fx
    return prepared, convert(copy.deepcopy(prepared), backend_config=backend_config)


@pytest.mark.parametrize("to_reference", [False, True], ids=["lowered", "reference"])
@pytest.mark.parametrize(("activation", "weight"), SETTINGS)
def test_fx_converts_to_the_same_model(activation: str, weight: str, to_reference: bool) -> None:
    results = []
    for ns in (OURS, ao):
        mapping = _mapping(ns, _activation(ns, activation), _weight(ns, weight))
        results.append(_fx(mapping, to_reference))
    (prepared, ours), (prepared_with_theirs, theirs) = results
    assert prepared.code == prepared_with_theirs.code
    assert_same_tensors(prepared.state_dict(), prepared_with_theirs.state_dict())
    assert ours.code == theirs.code
    assert not watchers(ours)
    kinds = {type(module) for module in ours.modules()}
    assert (ReferenceConv2d in kinds) is to_reference
    assert (torch.ao.nn.quantized.Conv2d in kinds) is not to_reference
    assert_same_model(ours, theirs)


LOG_SETTINGS = {
    "mse": OURS.MSEObserver,
    "percentile": OURS.PercentileObserver.with_args(percentile=0.99, mantissa_bits=3),
    "kl": OURS.KLObserver.with_args(bins=256, start_bin=64),
    "linear": OURS.HistogramObserver.with_args(method="mse", bins=128),
}


@pytest.mark.parametrize("kind", LOG_SETTINGS)
def test_fx_converts_what_log_histograms_chose(kind: str) -> None:
    """They have no counterpart; the scales are those of the observers, and the model is close."""
    weight = OURS.PerChannelLogHistogramObserver.with_args(mantissa_bits=3, **PER_CHANNEL)
    prepared, converted = _fx(_mapping(OURS, LOG_SETTINGS[kind], weight))
    observers = [m for m in watchers(prepared).values() if hasattr(m, "solve")]
    assert len(observers) >= 5
    assert not watchers(converted)
    assert isinstance(converted.conv2, torch.ao.nn.quantized.Conv2d)
    assert converted.conv2.weight().qscheme() == torch.per_channel_affine
    scales = {float(m.calculate_qparams()[0]) for m in observers}
    conv = converted.conv2
    assert float(torch.tensor(conv.scale)) in scales
    x = make_batches()[0]
    with torch.no_grad():
        expected = make_convnet()(x)
        assert float((converted(x) - expected).abs().mean()) < 0.05


def test_fx_reuses_the_observer_of_the_input() -> None:
    prepared, _ = _fx(_mapping(OURS, OURS.MinMaxObserver, OURS.default_weight_observer))
    (flatten,) = (n for n in prepared.graph.nodes if n.target is torch.flatten)
    (after,) = flatten.users
    (before,) = flatten.args[:1]
    assert before.op == after.op == "call_module"
    assert before.target != after.target
    assert prepared.get_submodule(before.target) is prepared.get_submodule(after.target)


def test_fx_sigmoid_keeps_its_fixed_range() -> None:
    prepared, converted = _fx(_mapping(OURS, OURS.MinMaxObserver, OURS.default_weight_observer))
    (fixed,) = (m for m in prepared.modules() if isinstance(m, OURS.FixedQParamsObserver))
    assert (fixed.scale.item(), fixed.zero_point.item()) == (1 / 256, 0)
    y = converted(make_batches()[0])
    assert torch.equal(y * 256, (y * 256).round())


def test_fx_ignores_sigmoid_without_a_fixed_range_as_for_theirs() -> None:
    codes = []
    for ns in (OURS, ao):
        mapping = QConfigMapping().set_global(
            QConfig(ns.MinMaxObserver, ns.default_weight_observer)
        )
        with pytest.warns(UserWarning, match="fixed qparams ops"):
            codes.append(_fx(mapping)[0].code)
    assert codes[0] == codes[1]


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn", "qnnpack"])
def test_fx_default_mapping_with_our_classes(backend: str) -> None:
    if backend not in torch.backends.quantized.supported_engines:
        pytest.skip(f"this torch has no {backend} engine")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = backend
    try:
        mapping = ao.get_default_qconfig_mapping(backend)
        (prepared, ours), (_, theirs) = _fx(_replaced_all(mapping, our_class)), _fx(mapping)
        kinds = {type(m).__name__ for m in watchers(prepared).values()}
        assert {"HistogramObserver", "FixedQParamsObserver"} <= kinds
        assert ours.code == theirs.code
        assert_same_model(ours, theirs)
    finally:
        torch.backends.quantized.engine = before


Find = Callable[[type], type]


def _replaced(qconfig: QConfig, find: Find) -> QConfig:
    return QConfig(counterpart(qconfig.activation, find), counterpart(qconfig.weight, find))


def _replaced_all(mapping: QConfigMapping, find: Find) -> QConfigMapping:
    made = QConfigMapping().set_global(_replaced(mapping.global_qconfig, find))
    for kind, qconfig in mapping.object_type_qconfigs.items():
        made.set_object_type(kind, qconfig and _replaced(qconfig, find))
    return made


def _narrow_linear() -> BackendConfig:
    """A backend that serves linear layers, with activations in 0..127."""
    narrow = DTypeWithConstraints(torch.quint8, quant_min_lower_bound=0, quant_max_upper_bound=127)
    linear = (
        BackendPatternConfig(nn.Linear)
        .set_dtype_configs([DTypeConfig(narrow, narrow, torch.qint8, torch.float)])
        .set_root_module(nn.Linear)
        .set_reference_quantized_module(ReferenceLinear)
    )
    return BackendConfig("narrow").set_backend_pattern_config(linear)


@pytest.mark.parametrize(
    ("backend_config", "activation", "served"),
    [
        (get_qnnpack_backend_config(), {"dtype": torch.qint8, "eps": 2**-12}, True),
        (get_qnnpack_backend_config(), {"dtype": torch.qint8}, False),
        (_narrow_linear(), {"quant_min": 0, "quant_max": 127}, True),
        (_narrow_linear(), {"quant_min": 0, "quant_max": 128}, False),
        (_narrow_linear(), {}, False),
    ],
    ids=["eps", "eps-too-small", "range", "range-too-wide", "range-of-the-type"],
)
def test_fx_backend_constraints(
    backend_config: BackendConfig, activation: dict[str, Any], served: bool
) -> None:
    results = []
    for ns in (OURS, ao):
        act = ns.MinMaxObserver.with_args(**activation)
        mapping = _mapping(ns, act, ns.weight_observer_range_neg_127_to_127)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(_fx(mapping, True, backend_config))
        ignored = [w for w in caught if "ignoring QConfig" in str(w.message)]
        assert bool(ignored) is not served
    (_, ours), (_, theirs) = results
    assert (ReferenceLinear in {type(m) for m in ours.modules()}) is served
    assert ours.code == theirs.code
    assert_same_model(ours, theirs)


def _fx_qat(mapping: QConfigMapping) -> tuple[list[float], nn.Module, nn.Module]:
    example = (make_batches()[0],)
    prepared = quantize_fx.prepare_qat_fx(make_convnet().train(), mapping, example)
    losses = train(prepared)
    prepared.eval()
    prepared.apply(ao.disable_observer)
    return losses, prepared, quantize_fx.convert_fx(copy.deepcopy(prepared))


@pytest.mark.parametrize("kind", QAT)
def test_fx_qat_trains_the_same_model(kind: str) -> None:
    results = []
    for ns in (OURS, ao):
        mapping = _mapping(ns, *_qat_qconfig(ns, kind), fixed="fake_quant")
        results.append(_fx_qat(mapping))
    (losses, prepared, ours), (expected, prepared_with_theirs, theirs) = results
    assert losses == expected
    assert_same_tensors(prepared.state_dict(), prepared_with_theirs.state_dict())
    assert not watchers(ours)
    assert_same_model(ours, theirs)


@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
def test_fx_default_qat_mapping_with_our_classes(backend: str) -> None:
    mapping = ao.get_default_qat_qconfig_mapping(backend)
    losses, prepared, ours = _fx_qat(_replaced_all(mapping, our_class))
    expected, prepared_with_theirs, theirs = _fx_qat(mapping)
    assert losses == expected
    assert list(prepared.state_dict()) == list(prepared_with_theirs.state_dict())
    assert_same_model(ours, theirs)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"observer": "MovingAveragePerChannelMinMaxObserver"},
        {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8,
          "qscheme": torch.per_tensor_symmetric},
    ],
    ids=["affine", "channel", "symmetric"],
)  # fmt: skip
def test_fused_modules_agree_with_their_kernel(kwargs: dict[str, Any]) -> None:
    name = "FusedMovingAvgObsFakeQuantize"
    ours, theirs = _make(OURS, name, kwargs), _make(ao, name, kwargs)
    for batch in _stream():
        assert torch.equal(ours(batch), theirs(batch))
        assert_same_tensors(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("weight", ["default_weight_observer", "default_placeholder_observer"])
def test_fx_dynamic(weight: str) -> None:
    results = []
    for ns in (OURS, ao):
        half = ns.PlaceholderObserver.with_args(dtype=torch.float16, is_dynamic=True)
        spec = {
            "default_weight_observer": QConfig(
                ns.default_dynamic_quant_observer, ns.default_weight_observer
            ),
            "default_placeholder_observer": QConfig(
                half, ns.PlaceholderObserver.with_args(dtype=torch.float16)
            ),
        }[weight]
        prepared = quantize_fx.prepare_fx(
            make_convnet(), QConfigMapping().set_global(spec), (make_batches()[0],)
        )
        converted = quantize_fx.convert_fx(prepared)
        assert isinstance(converted.linear2, torch.ao.nn.quantized.dynamic.Linear)
        assert not watchers(converted)
        results.append(converted)
    assert_same_model(*results)


# ---- one framework's fake-quantize over the other's observer ----


HOSTED: list[tuple[str, str, dict[str, Any]]] = [
    ("FakeQuantize", "MinMaxObserver", {}),
    ("FakeQuantize", "MinMaxObserver", {"quant_min": 0, "quant_max": 15}),
    ("FakeQuantize", "HistogramObserver", {"quant_min": 0, "quant_max": 127}),
    ("FakeQuantize", "MovingAverageMinMaxObserver", {"averaging_constant": 0.25}),
    ("FakeQuantize", "PerChannelMinMaxObserver", {"ch_axis": 1, **PER_CHANNEL}),
    ("FakeQuantize", "MovingAveragePerChannelMinMaxObserver", {"ch_axis": 1}),
    ("FusedMovingAvgObsFakeQuantize", "MovingAverageMinMaxObserver", {}),
    ("FusedMovingAvgObsFakeQuantize", "MovingAveragePerChannelMinMaxObserver", {}),
]


def _stream() -> list[Tensor]:
    return [torch.randn(6, 3, 5) * (1 + i) for i in range(4)]


def _run(module: nn.Module, stream: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients, batch by batch."""
    out = []
    for batch in stream:
        x = batch.clone().requires_grad_()
        y = module(x)
        y.backward(torch.ones_like(y) * 0.5)
        out += [y.detach(), x.grad]
    return out


@pytest.mark.parametrize("bound", [False, True], ids=["class", "with_args"])
@pytest.mark.parametrize(("fake_quant", "observer", "kwargs"), HOSTED)
def test_their_fake_quantize_over_our_observer(
    fake_quant: str, observer: str, kwargs: dict[str, Any], bound: bool
) -> None:
    host = getattr(ao, fake_quant)
    made = []
    for ns in (OURS, ao):
        inner = getattr(ns, observer)
        if bound:
            made.append(host(observer=inner.with_args(**kwargs)))
        else:
            made.append(host(observer=inner, **kwargs))
    stream = _stream()
    for ours, theirs in zip(_run(made[0], stream), _run(made[1], stream), strict=True):
        assert torch.equal(ours, theirs)
    assert_same_tensors(made[0].state_dict(), made[1].state_dict())


@pytest.mark.parametrize(("fake_quant", "observer", "kwargs"), HOSTED)
def test_our_fake_quantize_over_their_observer(
    fake_quant: str, observer: str, kwargs: dict[str, Any]
) -> None:
    cls = getattr(OURS, fake_quant)
    over_theirs = cls(observer=getattr(ao, observer), **kwargs)
    over_ours = cls(observer=getattr(OURS, observer), **kwargs)
    stream = _stream()
    for theirs, ours in zip(_run(over_theirs, stream), _run(over_ours, stream), strict=True):
        assert torch.equal(theirs, ours)
    frozen = copy.deepcopy(over_theirs)
    frozen.disable_observer()
    frozen(torch.randn(6, 3, 5) * 50)
    assert_same_tensors(frozen.state_dict() | _switches(over_theirs), over_theirs.state_dict())


@pytest.mark.parametrize("source", ["ours", "theirs"])
def test_our_fixed_fake_quantize_over_either_observer(source: str) -> None:
    observer = (OURS if source == "ours" else ao).default_fixed_qparams_range_neg1to1_observer
    ours = OURS.FixedQParamsFakeQuantize(observer)
    theirs = ao.FixedQParamsFakeQuantize(ao.default_fixed_qparams_range_neg1to1_observer)
    x = torch.linspace(-2, 2, 101)
    assert torch.equal(ours(x), theirs(x))
    assert ours(x).unique().numel() > 50
    assert_same_tensors(ours.state_dict(), theirs.state_dict())


def test_their_fixed_fake_quantize_asks_for_the_type_itself() -> None:
    # so FixedQParamsFakeQuantize and its observer have to come from the same package
    with pytest.raises(AssertionError, match="FixedQParamsObserver"):
        ao.FixedQParamsFakeQuantize(OURS.default_fixed_qparams_range_neg1to1_observer)


def _switches(module: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in module.state_dict().items() if k.endswith("_enabled")}


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_switch_functions_reach_modules_of_both(first: str) -> None:
    functions = OURS if first == "ours" else ao
    model = nn.Sequential(
        OURS.FakeQuantize(),
        ao.FakeQuantize(),
        OURS.FusedMovingAvgObsFakeQuantize(),
        ao.FusedMovingAvgObsFakeQuantize(),
        nn.Identity(),
    )

    def switches() -> list[tuple[int, int]]:
        return [(int(m.observer_enabled), int(m.fake_quant_enabled)) for m in list(model)[:4]]

    assert switches() == [(1, 1)] * 4
    for function, expected in [
        ("disable_observer", (0, 1)),
        ("disable_fake_quant", (0, 0)),
        ("enable_observer", (1, 0)),
        ("enable_fake_quant", (1, 1)),
    ]:
        model.apply(getattr(functions, function))
        assert switches() == [expected] * 4, function


def test_their_switches_act_on_our_modules() -> None:
    module = OURS.FakeQuantize()
    x = torch.randn(100)
    module.apply(ao.disable_fake_quant)
    assert torch.equal(module(x), x)
    module.apply(ao.disable_observer).apply(ao.enable_fake_quant)
    scale = module.scale.clone()
    y = module(x * 10)
    assert torch.equal(module.scale, scale)
    assert y.abs().max() < x.abs().max() * 2


# ---- state_dict ----


EXCHANGED: list[tuple[str, dict[str, Any]]] = [
    ("MinMaxObserver", {"eps": 0.01}),
    ("MinMaxObserver", {"qscheme": torch.per_tensor_symmetric, **WEIGHT}),
    ("MovingAverageMinMaxObserver", {"averaging_constant": 0.25}),
    ("HistogramObserver", {}),
    ("HistogramObserver", {"bins": 300}),
    ("PerChannelMinMaxObserver", {"ch_axis": 1}),
    ("MovingAveragePerChannelMinMaxObserver", {"ch_axis": 1, **PER_CHANNEL}),
    ("FixedQParamsObserver", {"scale": 0.5, "zero_point": 3}),
    ("FakeQuantize", {}),
    ("FakeQuantize", {"observer": "PerChannelMinMaxObserver", "ch_axis": 1}),
    ("FakeQuantize", {"observer": "HistogramObserver"}),
    ("FusedMovingAvgObsFakeQuantize", {}),
    ("FusedMovingAvgObsFakeQuantize", {"observer": "MovingAveragePerChannelMinMaxObserver"}),
]


def _make(ns: ModuleType, name: str, kwargs: dict[str, Any]) -> nn.Module:
    if "observer" in kwargs:
        kwargs = {**kwargs, "observer": getattr(ns, kwargs["observer"])}
    return getattr(ns, name)(**kwargs)


@pytest.mark.parametrize("fed", [True, False], ids=["fed", "unfed"])
@pytest.mark.parametrize("source", ["ours", "theirs"])
@pytest.mark.parametrize(("name", "kwargs"), EXCHANGED)
def test_state_dicts_load_across(name: str, kwargs: dict[str, Any], source: str, fed: bool) -> None:
    saver, loader = (OURS, ao) if source == "ours" else (ao, OURS)
    saved, loaded = _make(saver, name, kwargs), _make(loader, name, kwargs)
    stream = _stream()
    if fed:
        for batch in stream[:3]:
            saved(batch)
    result = loaded.load_state_dict(copy.deepcopy(saved.state_dict()), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_tensors(loaded.state_dict(), saved.state_dict())
    if fed:
        assert_same_qparams(loaded, saved)
    if not name.startswith("Fused"):
        # and goes on from there
        assert torch.equal(loaded(stream[3]), saved(stream[3]))
        assert_same_qparams(loaded, saved)


def assert_same_qparams(first: nn.Module, second: nn.Module) -> None:
    for a, b in zip(first.calculate_qparams(), second.calculate_qparams(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def _observed(ns: ModuleType, fed: bool, fake: bool = False) -> nn.Module:
    if fake:
        mapping = _mapping(ns, *_qat_qconfig(ns, "channel"), fixed="fake_quant")
    else:
        mapping = _mapping(ns, ns.HistogramObserver, ns.default_per_channel_weight_observer)
    prepare = quantize_fx.prepare_qat_fx if fake else quantize_fx.prepare_fx
    prepared = prepare(make_convnet().train(fake), mapping, (make_batches()[0],))
    if fed:
        _calibrate(prepared)
    return prepared


@pytest.mark.parametrize("fake", [False, True], ids=["observers", "fake_quant"])
@pytest.mark.parametrize("functions", ["ours", "theirs"])
@pytest.mark.parametrize("source", ["ours", "theirs"])
def test_observer_state_dicts_load_across(source: str, functions: str, fake: bool) -> None:
    saver, loader = (OURS, ao) if source == "ours" else (ao, OURS)
    ns = OURS if functions == "ours" else ao
    saved, loaded = _observed(saver, True, fake), _observed(loader, False, fake)
    entries = ns.get_observer_state_dict(saved)
    assert len(entries) > 10
    assert_same_tensors(OURS.get_observer_state_dict(saved), ao.get_observer_state_dict(saved))
    ns.load_observer_state_dict(loaded, copy.deepcopy(entries))
    assert_same_tensors(OURS.get_observer_state_dict(loaded), entries)

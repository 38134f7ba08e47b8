"""The complete example of seed 4, its three questions and answers, and what it says besides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pyobserver.horizon import (
    ConvDtypeTemplate,
    FakeQuantize,
    FakeQuantState,
    HistogramObserver,
    March,
    ModuleNameTemplate,
    QconfigSetter,
    SensitivityTemplate,
    get_qconfig,
    prepare,
    qint8,
    qint16,
    set_fake_quantize,
    set_march,
)

from . import seed_example


@pytest.fixture(scope="module")
def example() -> Any:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="nash-m is ignored"):
        return seed_example.main()


def types(model: nn.Module) -> dict[str, str]:
    found = model.named_modules()
    return {name: str(one.dtype) for name, one in found if isinstance(one, FakeQuantize)}


def test_its_types(example: Any) -> None:
    _, _, calib_net, _ = example
    found = types(calib_net)
    sixteen = {name for name, dtype in found.items() if dtype == "qint16"}
    assert sixteen == {
        *(
            f"backbone.conv{i}.{of}"
            for i in (1, 2)
            for of in ("weight_fake_quant", "activation_post_process")
        ),
        "headB._generated_adaptive_avg_pool2d_0.activation_post_process",
        "headB.fc.activation_post_process",
        "headB.fc.weight_fake_quant",
    }
    assert set(found.values()) == {"qint8", "qint16"}
    assert len(found) == 13


def test_its_outputs(example: Any) -> None:
    model, x, calib_net, qat_bc = example
    model.eval()
    for wanted, got, exported in zip(model(x), calib_net(x), qat_bc.module()(x), strict=True):
        assert torch.equal(got, exported)
        noise = (got - wanted).square().mean() / wanted.square().mean()
        assert 0 < noise < 1e-3


def test_single_nodes_go_by_its_names(example: Any) -> None:
    _, x, _, _ = example
    net = prepare(seed_example.MyNet().eval(), (x,))
    net(x)
    net.headA.fc1.weight_fake_quant.reset_dtype(qint16)
    net.headA._generated_relu_0.activation_post_process.reset_dtype(qint16)
    assert [name for name, dtype in types(net).items() if dtype == "qint16"] == [
        "headA.fc1.weight_fake_quant",
        "headA._generated_relu_0.activation_post_process",
    ]


def test_question_1_none_has_no_reset_dtype(example: Any) -> None:
    _, _, calib_net, _ = example
    for module in (calib_net.backbone.bn1, calib_net.backbone.relu1, calib_net.headA.fc1):
        assert module.activation_post_process is None
        with pytest.raises(
            AttributeError, match="'NoneType' object has no attribute 'reset_dtype'"
        ):
            module.activation_post_process.reset_dtype(qint16)


def test_question_2_the_sensitive_come_last_and_by_names_that_exist(example: Any) -> None:
    model, x, _, _ = example
    sensitive = SensitivityTemplate([("backbone.conv1", "output")], 1.0)
    first = [ModuleNameTemplate({"": qint8}), ConvDtypeTemplate(qint8, qint8)]

    def prepared(*templates: Any) -> dict[str, str]:
        return types(prepare(model, (x,), QconfigSetter(get_qconfig(), templates)))

    name = "backbone.conv1.activation_post_process"
    assert prepared(*first, sensitive)[name] == "qint16"
    assert prepared(sensitive, *first)[name] == "qint8"
    with pytest.raises(ValueError, match=r"got 'conv1'; .*backbone\.conv1"):
        prepared(*first, SensitivityTemplate([("conv1", "output")], 1.0))


def test_question_3_methods_and_types_need_no_data_again(example: Any) -> None:
    model, x, _, _ = example

    def calibrated(method: str, dtype: Any) -> nn.Module:
        def observer(**kwargs: Any) -> HistogramObserver:
            return HistogramObserver(method=method, **kwargs)

        net = prepare(model, (x,), QconfigSetter(get_qconfig(observer, dtype, dtype)))
        net(x)
        set_fake_quantize(net, FakeQuantState.VALIDATION)
        return net

    once = calibrated("mse", qint8)
    for method, dtype in (("percentile", qint16), ("kl", qint8), ("mse", qint8)):
        for module in once.modules():
            if isinstance(module, FakeQuantize):
                module.reset_dtype(dtype)
        HistogramObserver.reset_scale(once, method)
        again = calibrated(method, dtype)
        for name, value in again.state_dict().items():
            if name.endswith(".scale"):
                assert torch.equal(once.state_dict()[name], value), (method, dtype, name)


def test_the_march_is_accepted_and_ignored() -> None:
    with pytest.warns(UserWarning, match="set_march: bayes-e is ignored: nothing here is for one"):
        set_march(March.BAYES_E)
    with pytest.warns(UserWarning, match="nash-p is ignored"):
        set_march("nash-p")
    with pytest.raises(ValueError, match=r"march: expected one of .*nash-m.*, got 'x86'"):
        set_march("x86")

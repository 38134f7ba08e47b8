"""QConfig, the templates and the order they are applied in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyobserver
from pyobserver.horizon import (
    ConvDtypeTemplate,
    FakeQuantize,
    HistogramObserver,
    MatmulDtypeTemplate,
    MinMaxObserver,
    ModuleNameTemplate,
    QConfig,
    QconfigSetter,
    SensitivityTemplate,
    Template,
    get_qconfig,
    prepare,
    qint4,
    qint8,
    qint16,
)

from .models import make
from .seed_example import MyNet


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.k = nn.Linear(4, 4)
        self.v = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = torch.softmax(self.q(x) @ self.k(x).transpose(-1, -2), -1)
        return weights @ self.v(x)


def chosen(model: nn.Module, inputs: Any, *templates: Template) -> dict[str, str]:
    """The type of each fake-quantize that is not qint8, without the long ends of their names."""
    prepared = prepare(model, inputs, QconfigSetter(get_qconfig(MinMaxObserver), templates))
    short = {"activation_post_process": "output", "weight_fake_quant": "weight"}
    found = {}
    for name, module in prepared.named_modules():
        if isinstance(module, FakeQuantize) and module.dtype is not qint8:
            holder, _, attribute = name.rpartition(".")
            found[f"{holder}:{short[attribute]}"] = str(module.dtype)
    return found


def of_net(*templates: Template) -> dict[str, str]:
    return chosen(MyNet(), torch.randn(1, 3, 8, 8), *templates)


def of_attention(*templates: Template) -> dict[str, str]:
    return chosen(Attention(), torch.randn(2, 3, 4), *templates)


def test_names_stand_for_all_below_and_the_longer_wins() -> None:
    assert of_net(ModuleNameTemplate({"headA.fc1": qint8, "headA": qint16})) == {
        "headA.avgpool:output": "qint16",
        "headA.fc2:output": "qint16",
    }
    everything = of_net(ModuleNameTemplate({"": qint16}))
    assert len(everything) == 8
    assert all(name.endswith(":output") for name in everything)


def test_roles_by_name() -> None:
    template = ModuleNameTemplate(
        {"headA.fc1": {"input": qint16, "weight": qint4}, "headB": {"weight": qint16}}
    )
    assert of_net(template) == {
        "headA.avgpool:output": "qint16",
        "headA.fc1:weight": "qint4",
        "headB.fc:weight": "qint16",
    }
    assert of_attention(
        ModuleNameTemplate({"_generated_matmul_1": {"input": [qint8, qint16]}})
    ) == {"v:output": "qint16"}


def test_a_prefix_ends_at_a_dot() -> None:
    with pytest.raises(ValueError, match=r"got 'head'; near it are head[AB], head[AB]"):
        of_net(ModuleNameTemplate({"head": qint16}))


def test_convolutions_and_linear_layers() -> None:
    assert of_net(ConvDtypeTemplate(weight_dtype=qint16)) == {
        f"{name}:weight": "qint16"
        for name in ("backbone.conv1", "backbone.conv2", "headA.fc1", "headA.fc2", "headB.fc")
    }
    # what they take: through pooling and flattening, but not their own results
    assert of_net(ConvDtypeTemplate(input_dtype=qint16)) == {
        "quant:output": "qint16",
        "backbone.conv1:output": "qint16",
        "headA.avgpool:output": "qint16",
        "headA._generated_relu_0:output": "qint16",
        "headB._generated_adaptive_avg_pool2d_0:output": "qint16",
    }
    model, inputs = make("functional")
    assert chosen(model, inputs, ConvDtypeTemplate(weight_dtype=qint4)) == {
        "_generated_conv2d_0:weight": "qint4",
        "_generated_linear_0:weight": "qint4",
    }


def test_matrix_products() -> None:
    assert of_attention(MatmulDtypeTemplate(qint16)) == {
        f"{name}:output": "qint16" for name in ("q", "k", "_generated_softmax_0", "v")
    }
    assert of_attention(MatmulDtypeTemplate([qint8, qint16])) == {
        "k:output": "qint16",
        "v:output": "qint16",
    }


def test_the_later_wins() -> None:
    most = ModuleNameTemplate({"": qint16})
    back = ConvDtypeTemplate(input_dtype=qint8)
    assert set(of_net(most, back)) == {
        "backbone.conv2:output",
        "headA.fc2:output",
        "headB.fc:output",
    }
    assert len(of_net(back, most)) == 8


SENSITIVE = [("backbone.conv1", "output"), ("backbone.conv2", "weight"), ("headA.fc1", "input")]
EXPECTED = ["backbone.conv1:output", "backbone.conv2:weight", "headA.avgpool:output"]


@pytest.mark.parametrize(
    ("ratio", "count"), [(1.0, 3), (0.5, 2), (0.34, 2), (0.1, 1), (0.0, 0), (1, 1), (3, 3), (0, 0)]
)
def test_a_share_or_a_number_of_the_sensitive(ratio: float, count: int) -> None:
    assert list(of_net(SensitivityTemplate(SENSITIVE, ratio))) == EXPECTED[:count]


def test_sensitive_tensors_get_the_type_asked_for() -> None:
    assert of_net(SensitivityTemplate(SENSITIVE[:1], dtype=qint4)) == {EXPECTED[0]: "qint4"}


def test_fused_and_folded_modules_go_by_each_of_their_names() -> None:
    for name in ("backbone.conv1", "backbone.bn1", "backbone.relu1"):
        assert list(of_net(SensitivityTemplate([(name, "output")]))) == EXPECTED[:1]
    # the linear layer before a functional relu
    assert of_net(SensitivityTemplate([("headA.fc1", "output")])) == {
        "headA._generated_relu_0:output": "qint16"
    }


def test_all_calls_of_a_module_go_by_its_name() -> None:
    model, inputs = make("reused")
    assert chosen(model, inputs, SensitivityTemplate([("fc", "output")])) == {
        "fc:output": "qint16",
        "_generated_fc_0:output": "qint16",
    }
    assert chosen(model, inputs, SensitivityTemplate([("fc", "input")])) == {
        "quant:output": "qint16",
        "fc:output": "qint16",
    }


UNKNOWN: list[tuple[Template, str]] = [
    (
        SensitivityTemplate([("backbone.conv3", "output")]),
        "SensitivityTemplate: expected the name of what is quantized, got 'backbone.conv3'; "
        r"near it are backbone\.conv\d, backbone\.conv\d",
    ),
    (ModuleNameTemplate({"headC": qint16}), "ModuleNameTemplate: .*got 'headC'; near it are headB"),
    (
        SensitivityTemplate([("headA.avgpool", "weight")]),
        r"expected a name with a quantized weight, got 'headA\.avgpool': it has output",
    ),
    (
        SensitivityTemplate([("backbone", "output")]),
        "with a quantized output, got 'backbone': it holds others that are",
    ),
    (
        ModuleNameTemplate({"headA.avgpool": {"weight": qint8}}),
        r"expected a name with a quantized weight, got 'headA\.avgpool'",
    ),
]


@pytest.mark.parametrize(("template", "message"), UNKNOWN)
def test_names_that_match_nothing(template: Template, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of_net(template)


def test_a_template_of_ones_own() -> None:
    class Weights(Template):
        def apply(self, plan: Any) -> None:
            plan.set((key for key in plan.sites.weights if key.name.startswith("headB")), qint4)

    assert of_net(Weights()) == {"headB.fc:weight": "qint4"}


BAD: list[tuple[Any, type[Exception], str]] = [
    (lambda: ModuleNameTemplate([""]), TypeError, "dtypes: expected a mapping of names to types"),  # type: ignore[arg-type]
    (lambda: ModuleNameTemplate({"": torch.uint8}), ValueError, "ModuleNameTemplate: dtypes: exp"),
    (lambda: ModuleNameTemplate({"": {"bias": qint8}}), ValueError, "one of the roles input, wei"),
    (lambda: ConvDtypeTemplate("int8"), ValueError, "Template: input_dtype: expected one of"),  # type: ignore[arg-type]
    (lambda: ConvDtypeTemplate(qint8, "int8"), ValueError, "weight_dtype: expected one of"),  # type: ignore[arg-type]
    (lambda: MatmulDtypeTemplate("int8"), ValueError, "Template: input_dtypes: expected one of"),
    (lambda: ModuleNameTemplate({0: qint8}), TypeError, "dtypes: expected names of modules, got 0"),  # type: ignore[dict-item]
    (lambda: SensitivityTemplate(3), TypeError, "sensitive_list: expected pairs .*, got 3"),  # type: ignore[arg-type]
    (lambda: QconfigSetter(get_qconfig(), 3), TypeError, "templates: expected templates, got 3"),  # type: ignore[arg-type]
    (lambda: MatmulDtypeTemplate([qint8]), ValueError, "input_dtypes: expected one type or two"),
    (lambda: SensitivityTemplate(["conv"]), TypeError, "expected pairs of a name and a role, got"),
    (lambda: SensitivityTemplate([("a",)]), TypeError, "expected pairs of a name and a role, got"),
    (lambda: SensitivityTemplate([("a", "x")]), ValueError, "one of the roles .*, got 'x'"),
    (lambda: SensitivityTemplate(SENSITIVE, 4), ValueError, "ratio: expected a share in .* got 4"),
    (lambda: SensitivityTemplate(SENSITIVE, 1.5), ValueError, "number up to 3, got 1.5"),
    (lambda: SensitivityTemplate(SENSITIVE, True), ValueError, "ratio: expected .*, got True"),
    (lambda: QconfigSetter(HistogramObserver), TypeError, "reference_qconfig: expected a QConfig"),  # type: ignore[arg-type]
    (lambda: QconfigSetter(get_qconfig(), [qint8]), TypeError, "expected templates, got qint8"),  # type: ignore[list-item]
    (lambda: QConfig(weight=None, output=FakeQuantize), TypeError, "weight: expected a class or"),  # type: ignore[arg-type]
    (lambda: QConfig(FakeQuantize(), FakeQuantize), TypeError, "QConfig: weight: expected a class"),  # type: ignore[arg-type]
    (
        lambda: QConfig(FakeQuantize, pyobserver.FakeQuantize),  # type: ignore[arg-type]
        TypeError,
        "QConfig: output: expected a class or factory of FakeQuantize, got one of",
    ),
]


@pytest.mark.parametrize(("make_it", "error", "message"), BAD)
def test_arguments(make_it: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_it()


def test_get_qconfig() -> None:
    qconfig = get_qconfig(weight_dtype=qint4, out_dtype=qint16)
    weight, output = qconfig.weight(), qconfig.output()
    assert isinstance(weight.activation_post_process, MinMaxObserver)
    assert (weight.dtype, weight.ch_axis, weight.qscheme) == (qint4, 0, torch.per_channel_symmetric)
    assert isinstance(output.activation_post_process, HistogramObserver)
    assert output.dtype is qint16
    # the range of a weight is that of its present values
    weight(torch.full((2, 2), 7.5))
    weight(torch.full((2, 2), 0.75))
    torch.testing.assert_close(weight.scale, torch.tensor([0.1, 0.1]))

"""``prepare``: where the fake-quantizes are, and that they are all that changes."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_structure

from pyobserver import FreezableBatchNorm1d, make_batch_norm_freezable
from pyobserver.horizon import (
    DeQuantStub,
    FakeQuantize,
    FakeQuantState,
    FixedScaleObserver,
    HistogramObserver,
    MinMaxObserver,
    ModuleNameTemplate,
    QConfig,
    QconfigSetter,
    QuantStub,
    get_qconfig,
    prepare,
    qint8,
    qint16,
    set_fake_quantize,
)

from .models import Norms, Parts, Reused, cases, make

pytestmark = pytest.mark.filterwarnings("ignore:prepare. the weights of lstm stay in float")
CALIBRATION, VALIDATION, QAT = FakeQuantState
models = pytest.mark.parametrize("name", cases())
SIXTEEN = QconfigSetter(get_qconfig(MinMaxObserver, weight_dtype=qint16, out_dtype=qint16))


def fakes(model: nn.Module) -> dict[str, FakeQuantize]:
    return {name: one for name, one in model.named_modules() if isinstance(one, FakeQuantize)}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """All there is of a model: tensors, attributes, modes, hooks."""
    return {
        f"{path}:{name}": value.clone() if isinstance(value, Tensor) else value
        for path, module in model.named_modules()
        for name, value in {
            **module._parameters,
            **module._buffers,
            **{k: repr(v) for k, v in module.__dict__.items() if not k.startswith("_")},
            "class": type(module),
            "modules": list(module._modules),
        }.items()
    }


def same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def assert_close(a: Any, b: Any, **tolerance: float) -> None:
    assert tree_structure(a) == tree_structure(b)
    for x, y in zip(tree_leaves(a), tree_leaves(b), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@models
@pytest.mark.parametrize("training", [False, True])
def test_the_original_is_unchanged(name: str, training: bool) -> None:
    model, inputs = make(name)
    model.train(training)
    before, given = snapshot(model), copy.deepcopy(inputs)
    prepared = prepare(model, inputs)
    assert prepared.training == training
    prepared(*inputs)
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(same(value, after[key]) for key, value in before.items())
    assert_close(inputs, given, rtol=0, atol=0)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    assert own.isdisjoint(parameter.data_ptr() for parameter in prepared.parameters())


@models
def test_calibration_gives_the_outputs_of_the_model(name: str) -> None:
    model, inputs = make(name)
    assert_close(prepare(model, inputs)(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


@models
def test_sixteen_bits_give_them_nearly_and_eight_worse(name: str) -> None:
    model, inputs = make(name)
    outputs = model(*inputs)

    def error(setter: QconfigSetter) -> float:
        prepared = prepare(model, inputs, setter)
        prepared(*inputs)
        set_fake_quantize(prepared, VALIDATION)
        with torch.no_grad():
            pairs = zip(tree_leaves(prepared(*inputs)), tree_leaves(outputs), strict=True)
            return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

    fine, coarse = error(SIXTEEN), error(QconfigSetter(get_qconfig(MinMaxObserver)))
    assert 0 < fine < 1e-3
    assert 8 * fine < coarse < 0.1


@models
def test_gradients_reach_every_parameter_that_had_one(name: str) -> None:
    model, inputs = make(name)

    def trained(net: nn.Module) -> set[str]:
        leaves = [leaf for leaf in tree_leaves(net(*inputs)) if leaf.is_floating_point()]
        sum(leaf.sum() for leaf in leaves).backward()
        return {key for key, value in net.named_parameters() if value.grad is not None}

    prepared = prepare(model, inputs)
    set_fake_quantize(prepared, QAT)
    folded = {"bn.", "up_bn.", "fc_bn.", "batch_only_bn."}
    expected = {key for key in trained(model) if not key.startswith(tuple(folded))}
    assert trained(prepared) >= expected


@models
def test_copies_and_state_dicts(name: str) -> None:
    model, inputs = make(name)
    prepared = prepare(model, inputs)
    prepared(*inputs)
    for module in fakes(prepared).values():
        module.reset_dtype(qint16)
    set_fake_quantize(prepared, VALIDATION)
    outputs = prepared(*inputs)
    loaded = prepare(model, inputs)
    loaded.load_state_dict(prepared.state_dict())
    for copied in (loaded, copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert_close(copied(*inputs), outputs, rtol=0, atol=0)
        assert all(module.dtype is qint16 for module in fakes(copied).values())


NAMES = {
    "functional": [
        "_generated_quant_0.activation_post_process",
        "_generated_conv2d_0.weight_fake_quant",
        "_generated_relu_0.activation_post_process",
        "_generated_mean_0.activation_post_process",
        "_generated_linear_0.weight_fake_quant",
        "_generated_linear_0.activation_post_process",
        "_generated_matmul_0.weight_fake_quant",
        "_generated_matmul_0.activation_post_process",
        "_generated_flip_0.activation_post_process",
        "_generated_relu_1.activation_post_process",  # the sum before it is fused
        "_generated_matmul_1.activation_post_process",
        "_generated_mul_0.activation_post_process",
    ],
    "several": [
        "_generated_quant_0.activation_post_process",
        "_generated_getitem_0.activation_post_process",
        "left.activation_post_process",
        "left.weight_fake_quant",
        "table.activation_post_process",
        "table.weight_fake_quant",
        "_generated_add_0.activation_post_process",
        "_generated_getitem_1.activation_post_process",
        "_generated_sub_0.activation_post_process",
        "right.activation_post_process",
        "right.weight_fake_quant",
        "_generated_sigmoid_0.activation_post_process",
        "_generated_add_1.activation_post_process",
    ],
    "reused": [
        "quant.activation_post_process",
        "fc.activation_post_process",
        "fc.weight_fake_quant",
        "relu.activation_post_process",
        "_generated_fc_0.activation_post_process",
        "_generated_mul_0.activation_post_process",
        "block.fc.weight_fake_quant",
        "block._generated_relu_0.activation_post_process",
        "block._generated_add_0.activation_post_process",
        "block._generated_relu_1.activation_post_process",
        "block._generated_add_1.activation_post_process",
    ],
    "norms": [
        "_generated_quant_0.activation_post_process",
        "conv.activation_post_process",
        "conv.weight_fake_quant",
        "up.activation_post_process",
        "up.weight_fake_quant",
        "grouped.activation_post_process",
        "grouped.weight_fake_quant",
        "grouped_bn.activation_post_process",
        "plain.activation_post_process",
        "_generated_mean_0.activation_post_process",
        "fc.activation_post_process",
        "fc.weight_fake_quant",
        "branched.activation_post_process",
        "branched.weight_fake_quant",
        "branched_bn.activation_post_process",
        "_generated_add_0.activation_post_process",
        "batch_only.weight_fake_quant",
        "_generated_relu_0.activation_post_process",
    ],
    "parts": [
        "quant.activation_post_process",
        "conv.activation_post_process",
        "conv.weight_fake_quant",
        "_generated_maximum_0.activation_post_process",
        "_generated_getitem_0.activation_post_process",
    ],
}


@models
def test_what_is_quantized(name: str) -> None:
    prepared = prepare(*make(name))
    assert list(fakes(prepared)) == NAMES[name]
    assert all(module.state is CALIBRATION for module in fakes(prepared).values())


def test_weights_are_scaled_along_the_output_channels() -> None:
    prepared = prepare(*make("norms"))
    axes = {key: one.ch_axis for key, one in fakes(prepared).items() if one.is_per_channel}
    assert axes == {
        "conv.weight_fake_quant": 0,
        "up.weight_fake_quant": 1,
        "grouped.weight_fake_quant": 1,
        "fc.weight_fake_quant": 0,
        "branched.weight_fake_quant": 0,
        "batch_only.weight_fake_quant": 0,
    }
    functional = fakes(prepare(*make("functional")))
    assert functional["_generated_matmul_0.weight_fake_quant"].ch_axis == 1
    assert functional["_generated_linear_0.weight_fake_quant"].ch_axis == 0


def test_a_transposed_convolution_as_a_function() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(2, 5, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv_transpose1d(x, self.kernel)

    prepared = prepare(Transposed(), torch.randn(1, 2, 4))
    prepared(torch.randn(1, 2, 4))
    assert prepared._generated_conv_transpose1d_0.weight_fake_quant.ch_axis == 1


def test_batch_norms_are_folded_where_that_is_exact() -> None:
    prepared = prepare(*make("norms"))
    kinds = {key: type(prepared.get_submodule(key)) for key in dir(Norms()) if key.endswith("bn")}
    assert kinds == {
        "bn": nn.Identity,
        "up_bn": nn.Identity,
        "grouped_bn": nn.BatchNorm2d,  # of a group's channels alone
        "fc_bn": nn.Identity,
        "branched_bn": nn.BatchNorm1d,  # its input goes elsewhere too
        "batch_only_bn": nn.Identity,
    }
    assert isinstance(prepared.plain, nn.BatchNorm2d)
    assert prepared.conv.bias.requires_grad  # made by the folding


def test_a_batch_norm_of_a_sequence_is_not_that_of_the_features() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    assert isinstance(prepare(model, torch.randn(5, 4)).get_submodule("1"), nn.Identity)
    assert isinstance(prepare(model, torch.randn(5, 3, 4)).get_submodule("1"), nn.BatchNorm1d)


def test_batch_norms_that_can_be_frozen_are_folded_too() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3), nn.ReLU(), nn.BatchNorm1d(3))
    make_batch_norm_freezable(model)
    prepared = prepare(model, torch.randn(5, 2, 4))
    assert isinstance(prepared.get_submodule("1"), nn.Identity)
    assert isinstance(prepared.get_submodule("3"), FreezableBatchNorm1d)


def test_a_batch_norm_without_running_statistics_stays() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.BatchNorm1d(3, track_running_stats=False))
    assert isinstance(prepare(model, torch.randn(5, 2, 4)).get_submodule("1"), nn.BatchNorm1d)


def test_a_batch_norm_of_a_layer_called_twice_stays() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.bn(self.fc(x)))

    assert isinstance(prepare(Twice().eval(), torch.randn(5, 4)).bn, nn.BatchNorm1d)


def test_the_float_part_stays_as_it_is() -> None:
    prepared = prepare(*make("parts"))
    assert type(prepared.before) is nn.Linear
    assert type(prepared.after) is nn.Linear
    assert prepared.after.activation_post_process is None


def test_stubs_of_torch_and_of_horizon_are_the_same() -> None:
    ao = pytest.importorskip("torch.ao.quantization")
    for enter, leave in ((QuantStub, DeQuantStub), (ao.QuantStub, ao.DeQuantStub)):
        model = nn.Sequential(nn.Linear(2, 2), enter(), nn.Linear(2, 2), leave(), nn.Linear(2, 2))
        assert list(fakes(prepare(model, torch.randn(3, 2)))) == [
            "1.activation_post_process",
            "2.activation_post_process",
            "2.weight_fake_quant",
        ]


def test_inputs_have_a_fake_quantize_of_their_own() -> None:
    qconfig = QConfig(
        weight=FakeQuantize,
        output=FakeQuantize.with_args(observer=HistogramObserver),
        input=FakeQuantize.with_args(observer=FixedScaleObserver, scale=1 / 128),
    )
    prepared = prepare(*make("several"), QconfigSetter(qconfig))
    kinds = {key: type(one.activation_post_process) for key, one in fakes(prepared).items()}
    fixed = [key for key, kind in kinds.items() if kind is FixedScaleObserver]
    assert fixed == [
        f"_generated_{of}.activation_post_process" for of in ("quant_0", "getitem_0", "getitem_1")
    ]


def test_what_is_made_of_integers_enters_the_quantized_part() -> None:
    class OfBytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor, index: dict[str, Tensor]) -> Tensor:
            positions = torch.arange(3).float()  # of no input, as a constant is
            return self.first(x.float()) + self.second(index["of"] / 2) + positions

    inputs = torch.randint(256, (5, 4)), {"of": torch.randint(256, (5, 4))}
    entering = FakeQuantize.with_args(observer=FixedScaleObserver, scale=2.0)
    qconfig = QConfig(weight=FakeQuantize, output=FakeQuantize, input=entering)
    found = fakes(prepare(OfBytes(), inputs, QconfigSetter(qconfig)))
    assert [
        name.partition(".")[0]
        for name, one in found.items()
        if isinstance(one.activation_post_process, FixedScaleObserver)
    ] == ["_generated_float_0", "_generated_truediv_0"]
    assert {"first.weight_fake_quant", "second.weight_fake_quant"} < set(found)


def test_the_weight_of_an_embedding_function_is_quantized_along_its_rows() -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.randn(7, 4) * torch.arange(1.0, 8.0).unsqueeze(1))

        def forward(self, index: Tensor) -> Tensor:
            return F.embedding(index, self.rows)

    model, index = Table(), torch.arange(7)
    prepared = prepare(model, index)
    assert torch.equal(prepared(index), model(index))
    weight = fakes(prepared)["_generated_embedding_0.weight_fake_quant"]
    set_fake_quantize(prepared, VALIDATION)
    assert_close(weight.scale, model.rows.detach().abs().amax(1) / 127.5)


def test_the_copy_takes_the_arguments_of_the_example() -> None:
    model, (xs, index, bias) = make("several")
    prepared = prepare(model, (xs, index, bias))
    assert list(inspect.signature(prepared.forward).parameters) == ["xs", "index", "bias"]
    assert_close(prepared(xs=xs, index=index, bias=bias), model(xs, index, bias))


def test_one_tensor_is_an_example() -> None:
    model = nn.Linear(2, 3)
    x = torch.randn(4, 2)
    assert torch.equal(prepare(model, x)(x), model(x))


def test_names_are_parts_of_a_path() -> None:
    double = fx._symbolic_trace._create_wrapped_func(lambda x: 2 * x)

    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return double(x).add_(1)

    assert list(fakes(prepare(Wrapped(), torch.randn(3))))[1:] == [
        "_generated_lambda_0.activation_post_process",
        "_generated_add_0.activation_post_process",
    ]


def test_modules_on_no_grid_hold_none() -> None:
    prepared = prepare(*make("norms"))
    assert prepared.bn.activation_post_process is None
    assert prepared.relu.activation_post_process is None
    assert prepared.conv.activation_post_process is not None


def test_prepared_models_compile() -> None:
    x = torch.randn(3, 4)
    prepared = prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), x)
    prepared(x)
    set_fake_quantize(prepared, QAT)
    compiled = torch.compile(copy.deepcopy(prepared), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), prepared(x))


def test_a_model_on_another_device() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).to("meta")
    prepared = prepare(model, torch.empty(3, 2, device="meta"))
    assert {buffer.device.type for buffer in prepared.buffers()} == {"meta"}
    assert prepared(torch.empty(5, 2, device="meta")).shape == (5, 2)


def test_the_example_is_run_in_eval_mode_on_copies() -> None:
    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.mul_(2))

    model, x = Doubling().train(), torch.ones(3, 2)
    prepared = prepare(model, x)
    assert x.tolist() == torch.ones(3, 2).tolist()
    assert prepared.norm.running_mean.tolist() == [0.0, 0.0]
    assert prepared.norm.training


def test_the_inputs_come_first_in_the_graph() -> None:
    prepared = prepare(*make("several"))
    assert [node.op for node in prepared.graph.nodes][:4] == 3 * ["placeholder"] + ["call_module"]


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, unused: Tensor) -> Tensor:
        x = self.fc(x)
        y = self.relu(self.fc(x)).clone()
        y += x
        y.mul_(2.0)
        return F.relu(y.sub(x), inplace=True)


@pytest.mark.parametrize("state", FakeQuantState)
def test_updates_in_place(state: FakeQuantState) -> None:
    model, inputs = InPlace(), (torch.randn(3, 4), torch.randn(3))
    # bounds within which the greatest value is not clipped, which would cost its gradient
    fine = FakeQuantize.with_args(dtype=qint16, quant_min=-32767, quant_max=32767)
    prepared = prepare(model, inputs, QconfigSetter(QConfig(fine, fine)))
    prepared(*inputs)
    set_fake_quantize(prepared, state)
    outputs = prepared(*inputs)
    torch.testing.assert_close(outputs, model(*inputs), rtol=1e-2, atol=1e-3)
    outputs.sum().backward()
    gradient = prepared.fc.weight.grad
    model(*inputs).sum().backward()
    torch.testing.assert_close(gradient, model.fc.weight.grad, rtol=1e-2, atol=1e-2)
    assert "_generated_quant_0.activation_post_process" in fakes(prepared)
    assert "_generated_quant_1.activation_post_process" not in fakes(prepared)  # goes unused


class Operands(nn.Module):
    """What looks like a weight, and what is one."""

    def __init__(self) -> None:
        super().__init__()
        self.quant = QuantStub()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.matrix = nn.Parameter(torch.randn(3, 5))
        self.vector = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.quant(x)
        standard = (self.weight - self.weight.mean()) / self.weight.std()
        y = F.linear(weight=standard, input=x)
        y = y @ mask
        y = torch.matmul(self.matrix, y)
        return torch.matmul(input=x.sum(0), other=self.vector) + y


def test_operands_that_are_weights() -> None:
    prepared = prepare(Operands(), (torch.randn(5, 4), torch.randn(5, 2)))
    weights = {key: one.ch_axis for key, one in fakes(prepared).items() if one.is_per_channel}
    assert weights == {
        "_generated_linear_0.weight_fake_quant": 0,
        "_generated_matmul_1.weight_fake_quant": 0,
    }
    prepared(torch.randn(5, 4), torch.randn(5, 7))  # the mask is none of them


# --- what cannot be ----------------------------------------------------------------------------


class Branching(nn.Module):
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0:  # cannot be traced
                return x
            return -x

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(2, 2), self.Inner())

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


def test_what_cannot_be_traced_says_where() -> None:
    lines, first = inspect.getsourcelines(Branching)
    line = first + next(i for i, text in enumerate(lines) if "cannot be traced" in text)
    with pytest.raises(ValueError, match=rf"in 'block\.1' \(Inner\), .*test_prepare\.py:{line}: "):
        prepare(Branching(), torch.randn(3, 2))


class Varying(nn.Module):
    def forward(self, *xs: Tensor) -> Tensor:
        return xs[0]


class Nested(nn.Module):
    def forward(self, x: Tensor, sizes: tuple[int, ...] = (1, 2)) -> Tensor:
        return x.reshape(sizes)


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


BAD: list[tuple[Any, Any, Any, type[Exception], str]] = [
    (F.relu, torch.ones(2), None, TypeError, r"model: expected a torch\.nn\.Module"),
    (nn.ReLU(), {"x": torch.ones(2)}, None, TypeError, "example_inputs: expected a tuple of"),
    (nn.ReLU(), (), None, ValueError, r"expected the arguments of ReLU\.forward.*got 0: missing"),
    (nn.ReLU(), torch.ones(2), get_qconfig(), TypeError, "qconfig_setter: expected a QconfigS"),
    (Varying(), torch.ones(2), None, ValueError, r"a forward that names its inputs, got \*xs"),
    (Nested(), torch.ones(2), None, ValueError, "expected a value for sizes, whose default is"),
    (Failing(), torch.ones(2, 2), None, ValueError, "got RuntimeError in 'inner' at .*: mat1 and"),
]


@pytest.mark.parametrize(("model", "inputs", "setter", "error", "message"), BAD)
def test_arguments(
    model: Any, inputs: Any, setter: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"prepare: .*{message}"):
        prepare(model, inputs, setter)


def test_a_prepared_model_is_refused() -> None:
    x = torch.randn(3, 2)
    prepared = prepare(nn.Linear(2, 2), x)
    with pytest.raises(ValueError, match="expected one without fake-quantizes, got a prepared one"):
        prepare(prepared, x)


def test_weights_that_stay_in_float_are_named() -> None:
    with pytest.warns(UserWarning, match="prepare: the weights of lstm stay in float"):
        prepare(Parts(), torch.randn(4, 6))


def test_what_is_left_in_float() -> None:
    setter = QconfigSetter(
        get_qconfig(),
        [ModuleNameTemplate({"": torch.float32, "fc": {"weight": qint8, "output": qint16}})],
    )
    prepared = prepare(*make("reused"), setter)
    assert list(fakes(prepared)) == [
        "fc.activation_post_process",
        "fc.weight_fake_quant",
        "_generated_fc_0.activation_post_process",  # the layer's second call
        "block.fc.weight_fake_quant",
    ]


def test_models_without_anything_to_quantize() -> None:
    class Index(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    x = torch.tensor([1, 2])
    assert prepare(Index(), x)(x).tolist() == [2, 3]
    assert isinstance(prepare(Reused(), torch.randn(2, 4)), fx.GraphModule)

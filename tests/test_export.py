"""torch.export and AOT autograd: what is traced updates the state once, with eager's numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.ao.quantization as torch_ao
from every_module import BATCHES, MAKERS, made, state_of
from functorch.compile import aot_module, make_boxed_func
from ops.cases import assert_all_same, assert_same
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.experimental import _export_forward_backward
from torch.export.graph_signature import OutputKind

import pyobserver as po

# torch.export's own
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning"),
    pytest.mark.once,
]

CONFIGS: dict[str, Callable[[], Any]] = {
    "fused": lambda: torch_ao.QConfig(
        po.default_fused_act_fake_quant, po.default_fused_per_channel_wt_fake_quant
    ),
    "histograms": lambda: torch_ao.QConfig(
        po.FakeQuantize.with_args(observer=po.HistogramObserver, bins=32),
        po.FakeQuantize.with_args(
            observer=po.PerChannelLogHistogramObserver,
            mantissa_bits=3,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
        ),
    ),
}
IMAGES = [
    torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(size)) * size
    for size in (3, 5, 2)
]


def convnet(config: str) -> nn.Module:
    """A model that torch.ao prepared for training, with ours in it; sized."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        torch_ao.QuantStub(),
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Flatten(),
        nn.Linear(36, 5),
    ).train()
    model = torch_ao.fuse_modules_qat(layers, [["1", "2", "3"]])
    model.qconfig = CONFIGS[config]()
    model = torch_ao.prepare_qat(model)
    model(IMAGES[0])
    return model


def assert_trains_alike(exported: nn.Module, model: nn.Module, images: list[Tensor]) -> None:
    expected = dict(model.named_buffers()) | dict(model.named_parameters())
    for x in images:
        for each in (exported, model):
            each.zero_grad()
        y, other = exported(x), model(x)
        assert_same(y, other)
        for output in (y, other):
            output.square().sum().backward()
        for name, parameter in exported.named_parameters():
            assert_same(parameter.grad, expected[name].grad, name)
        for name, buffer in exported.named_buffers():
            assert_same(buffer, expected[name], name)


@pytest.mark.parametrize("config", CONFIGS)
def test_an_exported_model_trains_as_before(config: str) -> None:
    model = convnet(config)
    exported = export(copy.deepcopy(model), (IMAGES[0],)).module()
    assert_trains_alike(exported, model, [IMAGES[0], IMAGES[0] * 2])


@pytest.mark.parametrize("config", CONFIGS)
def test_an_exported_model_takes_any_batch(config: str) -> None:
    model = convnet(config)
    shapes = ({0: Dim("batch")},)
    exported = export(copy.deepcopy(model), (IMAGES[0],), dynamic_shapes=shapes).module()
    assert_trains_alike(exported, model, IMAGES)


class _Loss(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).square().sum()


def run_joint(joint: ExportedProgram, x: Tensor) -> dict[tuple[OutputKind, str], Tensor]:
    """The graph of a step called with the state: the new state and the gradients."""
    state: dict[str, Tensor] = {**joint.state_dict, **joint.constants}
    given = [
        state[spec.target] if spec.target is not None else x
        for spec in joint.graph_signature.input_specs
    ]
    outputs = joint.graph_module(*given)
    specs = joint.graph_signature.output_specs
    return {(spec.kind, str(spec.target)): t for spec, t in zip(specs, outputs, strict=True)}


def test_a_step_is_exported_whole() -> None:
    """Forward and backward in one graph, whose outputs are the gradients and the new state."""
    model = _Loss(convnet("fused"))
    joint = _export_forward_backward(export(copy.deepcopy(model), (IMAGES[0],)))
    found = run_joint(joint, IMAGES[0])
    model(IMAGES[0]).backward()
    for name, parameter in model.named_parameters():
        gradient = found[OutputKind.GRADIENT_TO_PARAMETER, name]
        torch.testing.assert_close(gradient, parameter.grad)  # torch's layers are decomposed
    updated = {name for kind, name in found if kind is OutputKind.BUFFER_MUTATION}
    assert any(name.endswith("min_val") for name in updated)
    for name, buffer in model.named_buffers():
        if name in updated:
            torch.testing.assert_close(found[OutputKind.BUFFER_MUTATION, name], buffer)


@pytest.mark.parametrize("name", sorted(set(MAKERS) - {"Recording"}))
def test_exports(name: str) -> None:
    """The exported module updates its state as the module does."""
    eager = made(name)
    exported = export(copy.deepcopy(eager), (BATCHES[0],)).module()
    for x in BATCHES:
        assert_same(exported(x), eager(x))
    expected = dict(eager.named_buffers())
    for key, value in exported.named_buffers():
        assert_same(value, expected[key], key)


TRAINED = [
    "FakeQuantize_MovingAverage",
    "FakeQuantize_Histogram_l2_greedy",
    "Learnable",
    "Learnable_learning",
    "horizon_MinMax_QAT",
    "TensorQuantizer",
    "TensorQuantizer_amax",
    "TensorQuantizer_clip",
    "Clip",
]


@pytest.mark.parametrize("name", TRAINED)
def test_an_exported_module_keeps_its_gradient(name: str) -> None:
    """By public ops alone: the others have one only where autograd is in C++."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), made(name))
    program = export(copy.deepcopy(model), (BATCHES[0],))
    called = [str(node.target) for node in program.graph.nodes]
    assert not [target for target in called if target.startswith("pyobserver._")]
    assert_trains_alike(program.module(), model, BATCHES)


@pytest.mark.parametrize("name", sorted(set(MAKERS) - {"Recording"}))
def test_aot_autograd(name: str) -> None:
    """Functionalized: each tensor of the state is written once, at the end."""
    module = made(name)
    eager = copy.deepcopy(module)
    traced = aot_module(module, fw_compiler=lambda graph, _: make_boxed_func(graph))
    for batch in BATCHES:
        x, other = (batch.clone().requires_grad_() for _ in range(2))
        y, expected = traced(x), eager(other)
        assert_same(y, expected)
        assert_all_same(state_of(module), state_of(eager))
        if expected.requires_grad and expected is not other:
            for output in (y, expected):
                output.square().sum().backward()
            assert_same(x.grad, other.grad)


@pytest.mark.parametrize("name", ["MovingAverage", "Histogram_mse", "FakeQuantize_MovingAverage"])
def test_functionalize_is_refused(name: str) -> None:
    """torch.func's takes no op of another library that updates its arguments; the state stays."""
    module = made(name)
    before = state_of(module)
    with pytest.raises(RuntimeError, match=r"custom|mutat"):
        torch.func.functionalize(module)(BATCHES[0])
    assert_all_same(state_of(module), before)

"""``export`` and ``export_onnx``: the integers, and the outputs of the model in VALIDATION."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pyobserver.horizon import (
    ConvDtypeTemplate,
    FakeQuantState,
    HistogramObserver,
    ModuleNameTemplate,
    QconfigSetter,
    export,
    export_onnx,
    get_qconfig,
    prepare,
    qint4,
    qint8,
    qint16,
    set_fake_quantize,
)

from .models import cases, make

pytestmark = pytest.mark.filterwarnings(
    "ignore:prepare. the weights of lstm stay in float", "ignore:The tensor attributes self.lstm"
)
pytest.importorskip("torch.ao.quantization")
OPS = torch.ops.quantized_decomposed


def mixed(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """A calibrated model with results in int16 and weights in qint4, others in int8."""
    model, inputs = make(name)
    templates = [ModuleNameTemplate({"": qint16}), ConvDtypeTemplate(qint8, qint4)]
    prepared = prepare(model, inputs, QconfigSetter(get_qconfig(), templates))
    prepared(*inputs)
    set_fake_quantize(prepared, FakeQuantState.VALIDATION)
    return prepared, inputs


def calls(program: torch.export.ExportedProgram, op: Any) -> list[Any]:
    return [node for node in program.graph.nodes if node.target is op.default]


@pytest.mark.parametrize("name", cases())
def test_the_program_computes_what_validation_does(name: str) -> None:
    prepared, inputs = mixed(name)
    before = copy.deepcopy(prepared.state_dict())
    program = export(prepared, inputs)
    with torch.no_grad():
        wanted = prepared(*inputs)
    pairs = zip(tree_leaves(program.module()(*inputs)), tree_leaves(wanted), strict=True)
    for got, expected in pairs:
        assert torch.equal(got, expected)
    for key, value in prepared.state_dict().items():
        assert (
            torch.equal(value, before[key]) if isinstance(value, Tensor) else value == before[key]
        )


def test_the_graph_holds_integers() -> None:
    prepared, inputs = mixed("norms")
    program = export(prepared, inputs)
    grids = [node.args[3:6] for node in calls(program, OPS.quantize_per_tensor)]
    assert {*grids} == {(-32768, 32767, torch.int16), (-128, 127, torch.int8)}
    weights = calls(program, OPS.dequantize_per_channel)
    assert len(weights) == 6
    assert {node.args[4:7] for node in weights} == {(-8, 7, torch.int8)}
    assert not calls(program, OPS.quantize_per_channel)  # stored as integers
    stored = {key: value for key, value in program.state_dict.items() if key.endswith(".weight")}
    assert stored["conv.weight"].dtype == torch.int8
    assert int(stored["conv.weight"].abs().max()) <= 8
    assert not any("post_process" in key or "observer" in key for key in program.state_dict)


def test_weights_of_functions_are_quantized_in_the_graph() -> None:
    program = export(*mixed("functional"))
    assert len(calls(program, OPS.quantize_per_channel)) == 3


def test_weights_alone() -> None:
    x = torch.randn(4, 2)
    template = ModuleNameTemplate({"": torch.float32})
    prepared = prepare(nn.Linear(2, 3), x, QconfigSetter(get_qconfig(), [template]))
    prepared(x)
    set_fake_quantize(prepared, FakeQuantState.VALIDATION)
    program = export(prepared, x)
    assert len(calls(program, OPS.dequantize_per_channel)) == 1
    assert torch.equal(program.module()(x), prepared(x))


def test_a_model_in_training_mode_is_exported_in_eval_mode() -> None:
    x = torch.randn(4, 2)
    prepared = prepare(nn.Sequential(nn.Linear(2, 3), nn.Dropout()), x)
    prepared(x)
    program = export(prepared.train(), x)
    set_fake_quantize(prepared.eval(), FakeQuantState.VALIDATION)
    assert torch.equal(program.module()(x), prepared(x))


def test_one_tensor_and_sizes_that_vary() -> None:
    x = torch.randn(4, 2)
    prepared = prepare(nn.Linear(2, 3), x)
    prepared(x)
    set_fake_quantize(prepared, FakeQuantState.VALIDATION)
    program = export(prepared, x, dynamic_shapes=({0: torch.export.Dim("batch")},))
    longer = torch.randn(9, 2)
    assert torch.equal(program.module()(longer), prepared(longer))


def test_a_model_in_half() -> None:
    x = torch.randn(4, 2).bfloat16()
    prepared = prepare(nn.Linear(2, 3).bfloat16(), x)
    prepared(x)
    set_fake_quantize(prepared, FakeQuantState.VALIDATION)
    got, wanted = export(prepared, x).module()(x), prepared(x)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, wanted)


def test_a_model_still_calibrating_is_exported_by_what_it_has_seen() -> None:
    x = torch.randn(4, 2)
    prepared = prepare(nn.Linear(2, 3), x)
    prepared(x)
    program = export(prepared, x)
    set_fake_quantize(prepared, FakeQuantState.VALIDATION)
    assert torch.equal(program.module()(x), prepared(x))


@pytest.mark.parametrize("exporter", [export, lambda *given: export_onnx(*given, "unwritten.onnx")])
def test_what_cannot_be_exported(exporter: Any) -> None:
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="export: model: expected a prepared one, got Linear"):
        exporter(nn.Linear(2, 2), x)
    with pytest.raises(ValueError, match=r"export: model: .* got never fed: .*weight_fake_quant"):
        exporter(prepare(nn.Linear(2, 2), x), x)
    assert not Path("unwritten.onnx").exists()


def test_onnx_without_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ImportError, match=r"export_onnx: .*pip install 'pyobserver\[onnx\]'"):
        export_onnx(*mixed("reused"), "unwritten.onnx")


def calibrated(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)).eval().to(dtype)
    x = torch.randn(5, 4, dtype=dtype)
    prepared = prepare(model, x)
    prepared(x)
    set_fake_quantize(prepared, FakeQuantState.VALIDATION)
    return prepared, x


def test_float64_which_the_ops_do_not_take() -> None:
    with pytest.raises(ValueError, match=r"export: model: expected float32, .* got torch\.float64"):
        export(*calibrated(torch.float64))


def test_models_in_half_precision(tmp_path: Path) -> None:
    prepared, x = calibrated(torch.bfloat16)
    assert torch.equal(export(prepared, x).module()(x), prepared(x))
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    prepared, x = calibrated(torch.float16)
    path = tmp_path / "model.onnx"
    export_onnx(prepared, x, path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    wanted = prepared(x).detach()
    assert float((torch.from_numpy(got) - wanted).abs().max() / wanted.abs().max()) < 0.02


ONNX = {
    "norms": (torch.randn(3, 2, 6, 6),),
    "functional": (torch.randn(7, 3, 6, 6),),
}


@pytest.mark.parametrize("name", ONNX)
def test_onnxruntime_computes_what_validation_does(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    prepared, inputs = mixed(name)
    path = tmp_path / "model.onnx"
    export_onnx(prepared, inputs, path)
    model = onnx.load(path)
    kinds = [node.op_type for node in model.graph.node]
    assert {"QuantizeLinear", "DequantizeLinear"} <= {*kinds}
    types = {one.data_type for one in model.graph.initializer}
    assert {onnx.TensorProto.INT8, onnx.TensorProto.INT16} <= types
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    for fed in (inputs, ONNX[name]):
        (got,) = session.run(None, {key: x.numpy() for key, x in zip(names, fed, strict=True)})
        with torch.no_grad():
            wanted = prepared(*fed)
        # sums in another order: now and then a value is rounded to the next step
        off = (torch.from_numpy(got) - wanted).abs() / wanted.abs().max()
        assert float(off.mean()) < 3e-4
        assert float(off.max()) < 0.02


def test_models_of_int8_alone_are_of_an_opset_that_onnxruntime_rewrites_rightly(
    tmp_path: Path,
) -> None:
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    x = torch.randn(2, 3, 4)
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)).eval()
    clipped = ModuleNameTemplate({"1": qint4})  # in int8, whose bounds are others
    prepared = prepare(model, x, QconfigSetter(get_qconfig(), [clipped]))
    prepared(x)
    set_fake_quantize(prepared, FakeQuantState.VALIDATION)
    HistogramObserver.reset_scale(prepared, "percentile", {"percentile": 0.7}, qint4)
    path = tmp_path / "model.onnx"
    export_onnx(prepared, x, path)
    assert onnx.load(path).opset_import[0].version == 20
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    wanted = prepared(x).detach()
    assert float((torch.from_numpy(got) - wanted).abs().mean() / wanted.abs().max()) < 3e-3

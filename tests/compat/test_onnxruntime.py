"""Calibration tables for ONNX Runtime, and its own static quantization with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

import pyobserver
from pyobserver.compat.onnxruntime import calibration_ranges, calibration_table

RNG = np.random.default_rng(0)


def batches() -> list[dict[str, np.ndarray]]:
    return [
        {
            "x": RNG.standard_normal((n, 4), dtype=np.float32),
            "half": RNG.standard_normal((n, 2)).astype(np.float16),
            "ids": np.arange(n),
        }
        for n in (3, 5)
    ]


def test_ranges_are_the_observers() -> None:
    data = batches()
    found = calibration_ranges(data, pyobserver.MinMaxObserver)
    assert set(found) == {"x", "half"}
    for name, (low, high) in found.items():
        whole = np.concatenate([batch[name] for batch in data])
        assert (low, high) == (whole.min(), whole.max())
        assert low.dtype == high.dtype == np.float32
        assert low.shape == high.shape == ()


def test_least_squared_error_by_default() -> None:
    data = batches()
    observer = pyobserver.LogHistogramObserver()
    for batch in data:
        observer(torch.from_numpy(batch["x"]))
    scale, zero_point = observer.calculate_qparams()
    low, high = calibration_ranges(iter(data))["x"]
    assert_allclose((high - low) / 255, scale.item(), rtol=1e-6)
    assert round(-low / scale.item()) == zero_point.item()


def test_arrays_of_any_layout() -> None:
    x = RNG.standard_normal((6, 8), dtype=np.float32)
    frozen = x.copy()
    frozen.flags.writeable = False
    for array in (x.T, x[::-1, ::-2], frozen, np.float64(x), np.array(3.5)):
        low, high = calibration_ranges([{"x": array}], pyobserver.MinMaxObserver)["x"]
        assert (low, high) == (np.float32(array.min()), np.float32(array.max()))


def test_what_cannot_be_ranged_is_refused() -> None:
    with pytest.raises(ValueError, match="expected floating-point arrays, got none"):
        calibration_ranges([])
    with pytest.raises(TypeError, match="expected numpy arrays, got 'x' of list"):
        calibration_ranges([{"x": [1.0]}])  # type: ignore[dict-item]
    nothing = [{"x": np.full(3, np.nan, np.float32)}]
    with pytest.raises(ValueError, match="x: expected one range of finite values, got none"):
        calibration_ranges(nothing)
    per_channel: Any = pyobserver.PerChannelMinMaxObserver
    with pytest.raises(ValueError, match="x: expected one range of finite values, got 4 ranges"):
        calibration_ranges([{"x": np.ones((4, 2), np.float32)}], per_channel)


def linear_model(path: Path, weight: np.ndarray) -> Path:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rows, columns = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None, columns])],
        [numpy_helper.from_array(weight, "weight")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


@pytest.mark.parametrize("symmetric", [False, True])
def test_quantize_static_takes_the_table(tmp_path: Path, symmetric: bool) -> None:
    """The scales in the quantized model are those that the observers chose."""
    ort = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    from onnxruntime.quantization import QuantFormat, QuantType, calibrate, quantize_static

    if not hasattr(calibrate, "save_tensors_data"):
        pytest.skip("this onnxruntime has no calibration_cache_path")
    weight = RNG.standard_normal((16, 8), dtype=np.float32)
    model = linear_model(tmp_path / "model.onnx", weight)
    session = ort.InferenceSession(model)
    inputs = [RNG.standard_t(3, (64, 16)).astype(np.float32) for _ in range(3)]
    data = [{"x": x, "y": session.run(["y"], {"x": x})[0]} for x in inputs]
    kwargs: dict[str, Any] = {"dtype": torch.uint8}
    if symmetric:
        kwargs = {"dtype": torch.int8, "quant_min": -127, "quant_max": 127}
        kwargs["qscheme"] = torch.per_tensor_symmetric
    observer = pyobserver.LogHistogramObserver.with_args(**kwargs)
    cache = tmp_path / "calibration.json"
    calibrate.save_tensors_data(calibration_table(data, observer), cache)
    quantize_static(
        model,
        tmp_path / "quantized.onnx",
        None,
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        extra_options={"ActivationSymmetric": symmetric},
        calibration_cache_path=cache,
    )
    found = onnx.load(tmp_path / "quantized.onnx").graph.initializer
    values = {each.name: onnx.numpy_helper.to_array(each) for each in found}
    for name in ("x", "y"):
        expected = observer()
        for batch in data:
            expected(torch.from_numpy(batch[name]))
        scale, zero_point = expected.calculate_qparams()
        assert_allclose(values[f"{name}_scale"], scale.item(), rtol=1e-5)
        assert values[f"{name}_zero_point"] == zero_point.item()
    quantized = ort.InferenceSession(tmp_path / "quantized.onnx")
    outputs = [quantized.run(["y"], {"x": x})[0] for x in inputs]
    error = np.concatenate(outputs) - np.concatenate([batch["y"] for batch in data])
    assert np.mean(error**2) < 1e-3 * np.mean(np.concatenate([b["y"] for b in data]) ** 2)


def test_write_calibration_table_takes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime.quantization")
    from onnxruntime.quantization import write_calibration_table

    monkeypatch.chdir(tmp_path)
    write_calibration_table(calibration_table(batches()).data)
    assert (tmp_path / "calibration.json").read_text().count('"lowest"') == 2

"""A quantized graph of a prepared model: as a torch.export program, and as ONNX."""

from __future__ import annotations

import copy
import importlib
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from .fake_quantize import (
    FakeQuantize,
    FakeQuantState,
    calibrated,
    set_fake_quantize,
)
from .kinds import kind_of, module_called
from .tracing import as_inputs, record_values, value_of

_OPSET, _OPSET_OF_INT16 = 20, 21  # the latter is the first whose QuantizeLinear knows int16


def export(
    model: nn.Module, example_inputs: Any, *, dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """A program that computes what a prepared model does in VALIDATION, with integers in it.

    Every activation goes through ``torch.ops.quantized_decomposed``'s quantize and dequantize ops
    with the scale and the bounds of its fake-quantize; qint4 and qint8 are int8 there, qint16 is
    int16. Weights of layers are stored as integers and only dequantized. These ops are torch.ao's:
    it is imported here, and where a saved program is loaded.

    Args:
        model: of :func:`prepare`, calibrated; it stays as it is.
        example_inputs: a tuple of its arguments, or one tensor.
        dynamic_shapes: as of ``torch.export.export``: which sizes may vary.

    Raises:
        ValueError: a model that is not prepared, or in float64, or fake-quantizes that were never
            fed.
    """
    inputs = as_inputs("export", example_inputs)
    with torch.no_grad():
        return torch.export.export(_converted(model), inputs, dynamic_shapes=dynamic_shapes)


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_shapes: Any = None,
) -> None:
    """Write :func:`export`'s program as ONNX, with QuantizeLinear and DequantizeLinear.

    Of opset 20, with int16 in it 21. Bounds that are not those of the integer type, as of qint4,
    are clipped to. What only moves values (reshaping, max pooling) stands between such pairs too,
    where it runs on integers. onnxruntime puts pairs there itself, of opset 21 with mistakes (its
    issues 25526 and 27845): where its 1.31 refuses a model with int16 for an ``output_dtype``,
    ``InferenceSession(path, disabled_optimizers=["QDQPropagationTransformer"])`` takes it.

    Args:
        model, example_inputs, dynamic_shapes: see :func:`export`.
        path: the file to write.

    Raises:
        ImportError: onnx or onnxscript is missing; says what to install.
        ValueError: as :func:`export`.
    """
    found = calibrated("export", model).values()
    has_int16 = any(one.dtype.storage is torch.int16 for one in found)
    opset = _OPSET_OF_INT16 if has_int16 else _OPSET
    try:
        translations = _translations(opset)
    except ImportError as error:
        raise ImportError(f"export_onnx: {error}; try: pip install 'pyobserver[onnx]'") from error
    inputs = as_inputs("export", example_inputs)
    converted = _converted(model)
    if isinstance(converted, fx.GraphModule):
        _requantize_moved(converted, inputs)
    with torch.no_grad():
        program = torch.export.export(converted, inputs, dynamic_shapes=dynamic_shapes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, of torch's own tables
        torch.onnx.export(
            program,
            f=path,
            dynamo=True,
            opset_version=opset,
            custom_translation_table=translations,
            external_data=False,
            verbose=False,
        )


def _converted(model: nn.Module) -> nn.Module:
    """A copy in eval mode with real quantization in place of the fake ones."""
    names = list(calibrated("export", model))
    _ops()
    converted = copy.deepcopy(model).eval()
    set_fake_quantize(converted, FakeQuantState.VALIDATION)
    for name in names:
        parent, _, attribute = name.rpartition(".")
        holder: Any = converted.get_submodule(parent)
        quantize = _QuantizeDequantize(getattr(holder, attribute))
        weight = getattr(holder, "weight", None)
        if attribute == "weight_fake_quant" and isinstance(weight, Tensor):
            del holder.weight  # a layer stores its weight as integers
            holder.register_buffer("weight", quantize.quantize(weight.detach()))
            holder.weight_fake_quant = _Dequantize(quantize, weight.dtype)
        else:
            setattr(holder, attribute, quantize)
    return converted


def _requantize_moved(converted: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """Quantize after what only moves quantized values by the same scale, which changes nothing."""
    record_values("export", converted, inputs)
    on_grid: dict[fx.Node, str] = {}
    for node in list(converted.graph.nodes):
        source = next((source for source in node.all_input_nodes if source in on_grid), None)
        if node.op == "call_module":
            called = module_called(node)
            if isinstance(called, _QuantizeDequantize) and called.axis is None:
                on_grid[node] = str(node.target)
        if source is None or not value_of(node).floating or kind_of(node) != "same":
            continue
        if value_of(node).container:
            on_grid[node] = on_grid[source]
            continue
        with converted.graph.inserting_after(node):
            call = converted.graph.call_module(on_grid[source], (node,))
        node.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
        on_grid[call] = on_grid[source]
    converted.recompile()


class _QuantizeDequantize(nn.Module):
    """To integers and back, by the ops of ``quantized_decomposed``."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, fake: FakeQuantize):
        super().__init__()
        self.axis = fake.ch_axis if fake.is_per_channel else None
        watcher = fake.activation_post_process
        self.grid = (watcher.quant_min, watcher.quant_max, watcher.dtype.storage)
        if self.axis is None:
            self.steps = (float(fake.scale), 0)
        else:
            self.register_buffer("scale", fake.scale)
            self.register_buffer("zero_point", fake.zero_point.long())

    def quantize(self, x: Tensor) -> Tensor:
        if x.dtype is torch.float64:
            raise ValueError(
                "export: model: expected float32, float16 or bfloat16, as the ops of "
                f"quantized_decomposed take it, got {x.dtype}"
            )
        x = _as(torch.float32, x)  # as the op does, but in ONNX the scale has the type of x
        if self.axis is None:
            return _ops().quantize_per_tensor(x, *self.steps, *self.grid)
        return _ops().quantize_per_channel(x, self.scale, self.zero_point, self.axis, *self.grid)

    def dequantize(self, integers: Tensor) -> Tensor:
        if self.axis is None:
            return _ops().dequantize_per_tensor(integers, *self.steps, *self.grid)
        return _ops().dequantize_per_channel(
            integers, self.scale, self.zero_point, self.axis, *self.grid
        )

    def forward(self, x: Tensor) -> Tensor:
        return _as(x.dtype, self.dequantize(self.quantize(x)))


class _Dequantize(nn.Module):
    def __init__(self, quantize: _QuantizeDequantize, dtype: torch.dtype):
        super().__init__()
        self.quantize = quantize
        self.dtype = dtype

    def forward(self, integers: Tensor) -> Tensor:
        return _as(self.dtype, self.quantize.dequantize(integers))


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _ops() -> Any:
    """The ops, which torch.ao defines when it is imported."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    return torch.ops.quantized_decomposed


def _translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What the ops are in ONNX of an opset."""
    numpy_of = importlib.import_module("onnx").helper.tensor_dtype_to_np_dtype
    onnxscript = importlib.import_module("onnxscript")
    op = getattr(onnxscript, f"opset{opset}")

    def zero(dtype: int) -> Any:
        return op.Cast(op.Constant(value_int=0), to=dtype)

    def is_narrower(quant_min: int, quant_max: int, dtype: int) -> bool:
        return quant_max - quant_min + 1 < 1 << 8 * numpy_of(dtype).itemsize

    def quantize_per_tensor(
        x: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int
    ) -> Any:
        if is_narrower(quant_min, quant_max, dtype):
            ends = (op.Constant(value_float=end * scale) for end in (quant_min, quant_max))
            x = op.Clip(x, *ends)
        return op.QuantizeLinear(x, op.Constant(value_float=scale), zero(dtype))

    def dequantize_per_tensor(
        x: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, dtype: int,
        out_dtype: int = -1,
    ) -> Any:  # fmt: skip
        return op.DequantizeLinear(x, op.Constant(value_float=scale), zero(dtype))

    def quantize_per_channel(
        x: Any, scale: Any, zero_point: Any, axis: int, quant_min: int, quant_max: int, dtype: int
    ) -> Any:
        integers = op.QuantizeLinear(x, scale, op.Cast(zero_point, to=dtype), axis=axis)
        if not is_narrower(quant_min, quant_max, dtype):
            return integers
        ends = (op.Cast(op.Constant(value_int=end), to=dtype) for end in (quant_min, quant_max))
        return op.Clip(integers, *ends)

    def dequantize_per_channel(
        x: Any, scale: Any, zero_point: Any, axis: int, quant_min: int, quant_max: int, dtype: int,
        out_dtype: int = -1,
    ) -> Any:  # fmt: skip
        return op.DequantizeLinear(x, scale, op.Cast(zero_point, to=dtype), axis=axis)

    ops = _ops()
    return {
        ops.quantize_per_tensor.default: quantize_per_tensor,
        ops.dequantize_per_tensor.default: dequantize_per_tensor,
        ops.quantize_per_channel.default: quantize_per_channel,
        ops.dequantize_per_channel.default: dequantize_per_channel,
    }

"""``prepare``: a copy of a model with fake-quantizes at its tensors."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import fx, nn

from ..dtypes import PER_CHANNEL
from ..fake_quantize import FakeQuantizeBase
from .dtypes import QuantDType
from .fake_quantize import FakeQuantize, FakeQuantState, set_fake_quantize
from .fusion import fold_batch_norms
from .modules import quantize_weight
from .qconfig import Factory, get_qconfig
from .qconfig_setter import Plan, QconfigSetter
from .sites import Key, Output, Weight, find_sites, quantized_nodes
from .tracing import as_inputs, trace, value_of


def prepare(
    model: nn.Module, example_inputs: Any, qconfig_setter: QconfigSetter | None = None
) -> fx.GraphModule:
    """A copy of a model that observes and fake-quantizes its tensors; it begins in CALIBRATION.

    **What is quantized.** Where the model has a ``QuantStub`` (torch.ao's, or ours): what comes
    from one, up to a ``DeQuantStub``. Else all of it, its floating-point inputs first, and what is
    made of integers (``x.float()``) as an input. Every floating-point result there gets an
    ``activation_post_process``, but for those that only take up or move values that are on a grid
    already (reshaping, indexing, max pooling, dropout), and the results before a relu that is
    fused: of linear layers, matrix products, sums and batch norms. Every weight of a linear layer,
    convolution, transposed one or embedding, as module or function, and every parameter in a
    matrix product gets a ``weight_fake_quant``, along the
    output channels where it is per channel. Batch norms are folded into the layers before them by
    their running statistics, also for training.

    **Where it is.** A module holds the ones of its own results and weight: the first module of
    those that are fused, the others hold None. Functions have theirs in modules made for them
    beside where they are called, ``_generated_relu_0``; so have the inputs of a model without
    stubs (``_generated_quant_0``), and the second and further calls of one module.

    Args:
        model: any module that ``torch.fx`` traces; it stays as it is.
        example_inputs: a tuple of its arguments, or one tensor. Arguments left out keep their
            defaults, and are no arguments of the copy. It is run once, in eval mode.
        qconfig_setter: which observers and types; None: :func:`get_qconfig`'s, all qint8.

    Returns:
        A ``torch.fx.GraphModule`` with the parameters by their names.

    Raises:
        TypeError, ValueError: an argument; a model that cannot be traced, with the module and line;
            a name in a template that the model does not have, with those near it.

    Warns:
        UserWarning: layers with weights that stay in float (recurrent ones, attention, …).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare: model: expected a torch.nn.Module, got {model!r}")
    if any(isinstance(module, FakeQuantizeBase) for module in model.modules()):
        raise ValueError("prepare: model: expected one without fake-quantizes, got a prepared one")
    if qconfig_setter is None:
        qconfig_setter = QconfigSetter(get_qconfig())
    if not isinstance(qconfig_setter, QconfigSetter):
        raise TypeError(
            f"prepare: qconfig_setter: expected a QconfigSetter or None, got {qconfig_setter!r}"
        )
    traced = trace(model, as_inputs("prepare", example_inputs))
    with torch.no_grad():
        fold_batch_norms(traced, quantized_nodes(traced))
    sites = find_sites(traced)
    plan = qconfig_setter.plan(sites)
    if sites.floats:
        warnings.warn(
            f"prepare: the weights of {', '.join(sites.floats)} stay in float: only those of "
            "linear layers, convolutions, embeddings and matrix products are quantized",
            stacklevel=2,
        )
    prepared = _Preparation(traced, plan, qconfig_setter).run()
    if sites.outputs or sites.weights:
        set_fake_quantize(prepared, FakeQuantState.CALIBRATION)
    return prepared


class _Preparation:
    """Puts the fake-quantizes of a plan into a traced model."""

    def __init__(self, traced: fx.GraphModule, plan: Plan, setter: QconfigSetter):
        self.traced = traced
        self.graph = traced.graph
        self.plan = plan
        self.qconfig = setter.reference_qconfig
        self.last_input = [node for node in self.graph.nodes if node.op == "placeholder"][-1:]

    def run(self) -> fx.GraphModule:
        for node in self.graph.nodes:
            if node.op == "call_module":
                called = self.traced.get_submodule(str(node.target))
                if not hasattr(called, "activation_post_process"):
                    called.register_module("activation_post_process", None)
        for key, weight in self.plan.sites.weights.items():
            self._add_weight(key, weight)
        for key, output in self.plan.sites.outputs.items():
            self._add_output(key, output)
        self.graph.lint()
        prepared = fx.GraphModule(self.traced, self.graph, type(self.traced).__name__)
        for node in prepared.graph.nodes:
            node.meta.pop("value", None)
        return prepared

    def _add_weight(self, key: Key, weight: Weight) -> None:
        operand = weight.operand
        if operand is None:
            layer: Any = self.traced.get_submodule(key.name)
            made = self._make(key, self.qconfig.weight, layer.weight.device, weight.axis)
            if made is not None:
                quantize_weight(layer, made)
            return
        made = self._make(key, self.qconfig.weight, value_of(operand).device, weight.axis)
        if made is not None:
            target = self._hold(key.name, "weight_fake_quant", made)
            with self.graph.inserting_before(weight.node):
                call = self.graph.call_module(target, (operand,))
            weight.node.replace_input_with(operand, call)

    def _add_output(self, key: Key, output: Output) -> None:
        factory = self.qconfig.output
        if output.entry and self.qconfig.input is not None:
            factory = self.qconfig.input
        made = self._make(key, factory, value_of(output.node).device)
        if made is None:
            return
        target = self._hold(key.name, "activation_post_process", made)
        is_input = output.node.op == "placeholder"
        with self.graph.inserting_after(self.last_input[0] if is_input else output.node):
            call = self.graph.call_module(target, (output.node,))
        output.node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)

    def _make(
        self, key: Key, factory: Factory, device: torch.device | None, axis: int | None = None
    ) -> FakeQuantize | None:
        """A fake-quantize as the plan has it; None where it leaves the tensor in float."""
        dtype: QuantDType | None = self.plan.dtypes.get(key)
        if key in self.plan.dtypes and dtype is None:
            return None
        made = factory()
        if axis and made.qscheme in PER_CHANNEL and made.ch_axis != axis:
            made = factory(ch_axis=axis)
        if dtype is not None:
            made.reset_dtype(dtype)
        return made.to(device)

    def _hold(self, path: str, name: str, made: FakeQuantize) -> str:
        """Put a fake-quantize into the module of a path, which is made where there is none."""
        holder: nn.Module = self.traced
        for part in path.split("."):
            if not hasattr(holder, part):
                holder.add_module(part, nn.Module())
            holder = getattr(holder, part)
        setattr(holder, name, made)
        return f"{path}.{name}"

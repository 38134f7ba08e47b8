"""Batch norms folded into the layers before them."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..workflow.sites import TRANSPOSED
from .kinds import kind_of, module_called
from .modules import can_quantize_weight
from .tracing import value_of


def fold_batch_norms(traced: fx.GraphModule, quantized: set[fx.Node]) -> None:
    """Fold each batch norm by its running statistics into the layer that it alone follows.

    In the place of the batch norm is an identity then; the node of the layer has its path in
    ``meta["folded"]``. Layers or batch norms that are called several times stay as they are, and
    so do those outside of ``quantized``.
    """
    graph = traced.graph
    calls: dict[Any, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    for node in list(graph.nodes):
        if node.op != "call_module" or kind_of(node) != "batch_norm" or calls[node.target] > 1:
            continue
        layer = node.all_input_nodes[0]
        alone = len(layer.users) == 1 and calls.get(layer.target) == 1
        if layer in quantized and alone and _fold(layer, node):
            layer.meta["folded"] = str(node.target)
            _replace(traced, str(node.target), nn.Identity())
            node.meta["value"] = value_of(layer)


def _fold(layer: fx.Node, node: fx.Node) -> bool:
    """Fold a batch norm into a layer where that can be done."""
    if layer.op != "call_module" or kind_of(layer) != "linear":
        return False
    module: Any = module_called(layer)
    norm: Any = module_called(node)
    if norm.running_mean is None or not can_quantize_weight(module):
        return False
    if isinstance(module, nn.Linear) and value_of(layer).dim != 2:
        return False  # its channels are not those of the batch norm
    transposed = isinstance(module, TRANSPOSED)
    if transposed and module.groups > 1:
        return False  # the axis of the weight is that of one group
    module.weight, module.bias = fuse_conv_bn_weights(
        module.weight, module.bias,
        norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias, transposed,
    )  # fmt: skip
    module.bias.requires_grad_(module.weight.requires_grad)
    return True


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)

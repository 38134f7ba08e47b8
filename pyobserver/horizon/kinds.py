"""What the calls of a graph are, to quantization."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..workflow.sites import TRANSPOSED
from .modules import is_stub

_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_LINEAR_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, F.linear, *_TRANSPOSED)
_MATMULS = (torch.matmul, torch.bmm, torch.mm, operator.matmul)
_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *TRANSPOSED),
    "embedding": (nn.Embedding,),
    "batch_norm": (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    "relu": (nn.ReLU, nn.ReLU6),
    # these give values that they were given, which lie on the grid already
    "same": (
        nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout1d, nn.Dropout2d,
        nn.Dropout3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d,
        nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.PixelShuffle, nn.PixelUnshuffle,
        nn.ChannelShuffle,
    ),
}  # fmt: skip
_FUNCTIONS: dict[str, tuple[Any, ...]] = {
    "linear": _LINEAR_FUNCTIONS,
    "matmul": _MATMULS,
    "embedding": (F.embedding,),
    "add": (torch.add, operator.add, operator.iadd),
    "relu": (F.relu, F.relu_, F.relu6, torch.relu, torch.relu_),
    "same": (
        torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze,
        torch.unsqueeze, torch.chunk, torch.split, torch.unbind, torch.clone, torch.detach,
        torch.dropout, torch.movedim, torch.swapaxes, torch.max_pool1d, torch.max_pool2d,
        torch.max_pool3d, operator.getitem, getattr, F.dropout, F.dropout2d, F.dropout3d,
        F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d,
        F.adaptive_max_pool3d, F.pixel_shuffle, F.pixel_unshuffle,
    ),
}  # fmt: skip
_OPERANDS = ("input", "weight", "other", "mat2")
_METHODS: dict[str, tuple[str, ...]] = {
    "matmul": ("matmul", "bmm", "mm"),
    "add": ("add", "add_"),
    "relu": ("relu", "relu_"),
    "same": (
        "view", "reshape", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze",
        "contiguous", "chunk", "split", "unbind", "expand", "expand_as", "view_as", "reshape_as",
        "repeat", "clone", "detach", "to", "float", "t", "movedim", "swapaxes", "narrow", "select",
    ),
}  # fmt: skip


def kind_of(node: fx.Node) -> str:
    """What a call is: ``"quant"`` and ``"dequant"`` the stubs, ``"same"``, … or ``"other"``."""
    if node.op == "call_module":
        module = module_called(node)
        for name, kind in (("QuantStub", "quant"), ("DeQuantStub", "dequant")):
            if is_stub(module, name):
                return kind
        return next((kind for kind, of in _MODULES.items() if isinstance(module, of)), "other")
    known: dict[str, Any] = _METHODS if node.op == "call_method" else _FUNCTIONS
    return next((kind for kind, of in known.items() if node.target in of), "other")


def module_called(node: fx.Node) -> nn.Module:
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target))  # type: ignore[union-attr]


def name_of(node: fx.Node) -> str:
    """The name of the function, method or module that is called, as a part of another name."""
    name = str(node.target).rpartition(".")[2]
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "")
    return re.sub(r"\W", "", name).strip("_") or "function"


def operands(node: fx.Node) -> list[Any]:
    """The tensors of a linear layer or matrix product: the input, and the other operand."""
    named = [node.kwargs[name] for name in _OPERANDS if name in node.kwargs]
    return [*node.args, *named][:2]


def weight_axis(node: fx.Node, index: int, dim: int) -> int:
    """The axis of the output channels of an operand, of ``dim`` dimensions, that is a weight."""
    if kind_of(node) == "matmul":
        return dim - 1 if index == 1 else dim - 2
    if node.op == "call_module":
        return int(isinstance(module_called(node), TRANSPOSED))
    return int(node.target in _TRANSPOSED)

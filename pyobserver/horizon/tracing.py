"""A copy of a model as a graph, with what the example inputs came to at each node."""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from ..batch_norm import FREEZABLE
from ..workflow.calibrate import eval_mode
from .modules import is_stub

_TORCH = str(Path(torch.__file__).parent)


class Value(NamedTuple):
    """What a node gave for the example inputs.

    Attributes:
        floating: whether it is a floating-point tensor, or holds one.
        container: whether it is something else than a tensor, such as a tuple of tensors.
        dim: of a tensor.
        device: of the tensor, or of the first that it holds.
    """

    floating: bool
    container: bool
    dim: int
    device: torch.device | None

    @classmethod
    def of(cls, result: Any) -> Value:
        tensors = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        floating = any(leaf.is_floating_point() for leaf in tensors)
        single = isinstance(result, Tensor)
        device = tensors[0].device if tensors else None
        return cls(floating, not single, result.dim() if single else 0, device)


def value_of(node: fx.Node) -> Value:
    return node.meta["value"]


def module_of(node: fx.Node) -> str:
    """The path of the module in whose forward a node is; of a module's call, the module's own."""
    stack = node.meta.get("nn_module_stack")
    return list(stack.values())[-1][0] if stack else ""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        stub = is_stub(m, "QuantStub") or is_stub(m, "DeQuantStub")
        return stub or isinstance(m, FREEZABLE) or super().is_leaf_module(m, module_qualified_name)


class _Recorder(fx.Interpreter):
    def __init__(self, owner: str, traced: fx.GraphModule):
        super().__init__(traced)
        self.owner = owner

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:
            raise ValueError(
                f"{self.owner}: example_inputs: expected inputs that the model takes, got "
                f"{type(error).__name__} in {module_of(n) or 'the model'!r} at "
                f"{n.format_node()}: {error}"
            ) from error
        n.meta["value"] = Value.of(result)
        return result


def as_inputs(owner: str, example_inputs: Any) -> tuple[Any, ...]:
    """Positional arguments: of one tensor, a tuple of it."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,)
    if not isinstance(example_inputs, (tuple, list)):
        raise TypeError(
            f"{owner}: example_inputs: expected a tuple of the model's arguments or one tensor, "
            f"got {type(example_inputs).__name__}"
        )
    return tuple(example_inputs)


def trace(model: nn.Module, example_inputs: tuple[Any, ...]) -> fx.GraphModule:
    """A copy of the model as a graph of the arguments that the example gives.

    Arguments that it leaves out keep their defaults. Every node has a :class:`Value`.

    Raises:
        ValueError: what cannot be traced, and where; inputs that the model does not take.
    """
    defaults = _defaults(model, example_inputs)
    copied = copy.deepcopy(model)
    tracer = _Tracer()
    try:
        graph = tracer.trace(copied, defaults or None)
    except Exception as error:
        raise ValueError(
            "prepare: model: expected one that torch.fx can trace, got "
            f"{type(error).__name__} {_location(tracer, error)}: {error}"
        ) from error
    _drop_defaults(graph, defaults)
    for node in graph.nodes:
        node.type = None  # an annotation that is a string makes code that cannot be pickled
    traced = fx.GraphModule(copied, graph, type(model).__name__)
    record_values("prepare", traced, example_inputs)
    return traced


def record_values(owner: str, traced: fx.GraphModule, example_inputs: tuple[Any, ...]) -> None:
    """Give every node its :class:`Value`, by running copies of the inputs in eval mode."""
    with torch.no_grad(), eval_mode(traced):
        _Recorder(owner, traced).run(*tree_map(_cloned, example_inputs))


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _defaults(model: nn.Module, example_inputs: tuple[Any, ...]) -> dict[str, Any]:
    """The defaults of the arguments that the example leaves out."""
    signature = inspect.signature(model.forward)
    try:
        given = signature.bind(*example_inputs)
    except TypeError as error:
        raise ValueError(
            f"prepare: example_inputs: expected the arguments of {type(model).__name__}.forward"
            f"{signature}, got {len(example_inputs)}: {error}"
        ) from error
    left_out: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL and given.arguments.get(name):
            raise ValueError(
                f"prepare: model: expected a forward that names its inputs, got *{name}"
            )
        if parameter.default is not parameter.empty and name not in given.arguments:
            left_out[name] = parameter.default
    nested = [name for name, value in left_out.items() if isinstance(value, (tuple, list, Mapping))]
    if nested:
        raise ValueError(
            f"prepare: example_inputs: expected a value for {', '.join(nested)}, whose default is "
            "nested, got none"
        )
    return left_out


def _drop_defaults(graph: fx.Graph, defaults: Mapping[str, Any]) -> None:
    """Take out the arguments that keep their defaults, and what torch.fx does to check them."""
    names = {f"{name}_1" for name in defaults}
    for node in list(graph.nodes):
        if node.op != "placeholder":
            continue
        target = str(node.target)
        if target in names:
            while node.users:
                graph.erase_node(_last_use(node))
            graph.erase_node(node)
        elif target.startswith("*") and not node.users:
            graph.erase_node(node)


def _last_use(node: fx.Node) -> fx.Node:
    """What comes of a node at last and is not used itself."""
    while node.users:
        node = list(node.users)[-1]
    return node


def _location(tracer: fx.Tracer, error: BaseException) -> str:
    """The module whose call failed, and the line of the model's source."""
    stack = list(getattr(tracer, "module_stack", {}).values())
    path, kind = stack[-1] if stack else ("", type(tracer.root))
    where = f"in {path!r} ({kind.__name__})" if path else f"in {kind.__name__}"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_TORCH, __file__))
    ]
    return f"{where}, {frames[-1].filename}:{frames[-1].lineno}" if frames else where

"""Which tensors of a traced model are quantized, and by what names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import fx, nn

from .kinds import kind_of, module_called, name_of, operands, weight_axis
from .modules import can_quantize_weight
from .tracing import module_of, value_of


class Key(NamedTuple):
    """A fake-quantize of a prepared model.

    Attributes:
        name: the module that holds it.
        role: ``"output"``: its ``activation_post_process``; ``"weight"``: its
            ``weight_fake_quant``.
    """

    name: str
    role: str


class Output(NamedTuple):
    """A result to quantize: that of a node; ``entry``: one that enters the quantized part."""

    node: fx.Node
    entry: bool


class Weight(NamedTuple):
    """A weight to quantize: of a layer, or the operand of a function, with its channel axis."""

    node: fx.Node
    operand: fx.Node | None
    axis: int


@dataclass
class Sites:
    """What is quantized in a model.

    Attributes:
        outputs, weights: by where their fake-quantizes go.
        names: the fake-quantizes that go by a name: a layer that is fused with its successors, or
            called several times, has those of the whole.
        inputs: by the name of a call, for each operand the fake-quantizes it comes from.
        kinds: by name, ``"linear"``, ``"matmul"``, ….
        floats: layers with a weight that cannot be quantized.
    """

    outputs: dict[Key, Output] = field(default_factory=dict)
    weights: dict[Key, Weight] = field(default_factory=dict)
    names: dict[str, list[Key]] = field(default_factory=dict)
    inputs: dict[str, list[tuple[Key, ...]]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    floats: list[str] = field(default_factory=list)


_FUSES_RELU = ("linear", "matmul", "add", "batch_norm")
_Grid = tuple[Key, ...]  # the fake-quantizes on whose grids a value lies; () where on none yet


def find_sites(traced: fx.GraphModule) -> Sites:
    """What is quantized: what comes from a ``QuantStub``, up to a ``DeQuantStub``.

    Of a model without a ``QuantStub`` everything is, its floating-point inputs first, and what is
    made of tensors of integers as an input is.
    """
    return _Search(traced).sites


def quantized_nodes(traced: fx.GraphModule) -> set[fx.Node]:
    """The nodes of the quantized part."""
    return set(_Search(traced).grids)


class _Search:
    """One walk over the graph."""

    def __init__(self, traced: fx.GraphModule):
        self.traced = traced
        self.sites = Sites()
        self.grids: dict[fx.Node, _Grid] = {}  # of the nodes of the quantized part
        self.chains: dict[fx.Node, list[fx.Node]] = {}  # what is fused with a relu, by the relu
        self.functions: dict[fx.Node, str] = {}  # the names generated for them
        self.generated: set[str] = set()
        self.taken: set[str] = set()  # names that hold a fake-quantize of a result
        calls = [node for node in traced.graph.nodes if node.op.startswith("call")]
        self.all_of_it = not any(kind_of(node) == "quant" for node in calls)
        for node in traced.graph.nodes:
            self._visit(node)

    def _visit(self, node: fx.Node) -> None:
        if node.op in ("output", "get_attr"):
            return
        value = value_of(node)
        if node.op == "placeholder":
            if self.all_of_it and value.floating and node.users:
                self._enter(node)
            return
        kind = kind_of(node)
        if kind == "quant":
            self._add_output([node], entry=True)
            return
        inside = any(source in self.grids for source in node.all_input_nodes)
        enters = self.all_of_it and not inside and self._is_of_integers(node)
        if kind == "dequant" or not (inside or enters) or not value.floating:
            return
        if enters and kind != "embedding":
            self._enter(node)
        elif kind == "same":
            self._pass_on(node)
        else:
            self._compute(node, kind)

    def _is_of_integers(self, node: fx.Node) -> bool:
        """Whether an operand is a tensor of integers, as of an input that is one."""
        operands = [source for source in node.all_input_nodes if not _is_constant(source)]
        values = map(value_of, operands)
        return any(not (value.floating or value.container) for value in values)

    def _enter(self, node: fx.Node) -> None:
        """An input: quantized as it is, or where it is taken out of its container."""
        if value_of(node).container:
            self.grids[node] = ()
        else:
            self._add_output([node], entry=True)

    def _pass_on(self, node: fx.Node) -> None:
        source = next(source for source in node.all_input_nodes if source in self.grids)
        grid = self.grids[source]
        if value_of(source).container and not grid and not value_of(node).container:
            self._add_output([node], entry=self._is_input(source))
        else:
            self.grids[node] = grid

    def _is_input(self, node: fx.Node) -> bool:
        while node.op != "placeholder" and node.all_input_nodes and kind_of(node) == "same":
            node = node.all_input_nodes[0]
        return node.op == "placeholder"

    def _compute(self, node: fx.Node, kind: str) -> None:
        name = self._name(node)
        self.sites.kinds[name] = kind
        self._note_inputs(node, kind, name)
        self._add_weight(node, kind, name)
        if value_of(node).container:
            self.grids[node] = ()
            return
        chain = [*self.chains.pop(node, []), node]
        relu = _following_relu(node) if kind in _FUSES_RELU else None
        if relu is not None:
            self.chains[relu] = chain
            self.grids[node] = ()
        elif node.users:
            self._add_output(chain, entry=False)

    def _note_inputs(self, node: fx.Node, kind: str, name: str) -> None:
        taken: list[Any] = list(node.all_input_nodes)
        if kind in ("linear", "matmul"):
            taken = operands(node)
        grids = [
            self.grids.get(source, ()) if isinstance(source, fx.Node) else () for source in taken
        ]
        known = self.sites.inputs.setdefault(name, grids)
        if known is not grids:  # a layer that is called several times
            both = zip(known, grids, strict=False)
            self.sites.inputs[name] = [tuple(dict.fromkeys(a + b)) for a, b in both]

    def _add_weight(self, node: fx.Node, kind: str, name: str) -> None:
        if node.op == "call_module":
            module = module_called(node)
            if kind in ("linear", "embedding") and can_quantize_weight(module):
                axis = weight_axis(node, 1, 0)
                self._note_weight(name, Weight(node, None, axis))
            elif any(p.dim() > 1 for p in module.parameters()) and name not in self.sites.floats:
                self.sites.floats.append(name)
        elif kind in ("linear", "matmul", "embedding"):
            for index, operand in enumerate(operands(node)):
                if (index == 1 or kind == "matmul") and _is_weight(operand):
                    axis = weight_axis(node, index, value_of(operand).dim)
                    self._note_weight(name, Weight(node, operand, axis))

    def _note_weight(self, name: str, weight: Weight) -> None:
        key = Key(name, "weight")
        self.sites.weights[key] = weight
        self._note(key, name)

    def _add_output(self, chain: list[fx.Node], entry: bool) -> None:
        key = Key(self._owner(chain), "output")
        self.taken.add(key.name)
        self.sites.outputs[key] = Output(chain[-1], entry)
        self.grids[chain[-1]] = (key,)
        for node in chain:
            self._note(key, self._name(node))
            if "folded" in node.meta:
                self._note(key, node.meta["folded"])
        self._note(key, key.name)

    def _note(self, key: Key, name: str) -> None:
        keys = self.sites.names.setdefault(name, [])
        if key not in keys:
            keys.append(key)

    def _owner(self, chain: list[fx.Node]) -> str:
        """Of modules alone the first of them, else the last of the chain."""
        only_modules = all(node.op == "call_module" for node in chain)
        node = chain[0] if only_modules else chain[-1]
        name = self._name(node)
        return self._generate(node) if name in self.taken else name

    def _name(self, node: fx.Node) -> str:
        """The path of the module called, or a generated one beside where the function is."""
        if node.op == "call_module":
            return str(node.target)
        if node not in self.functions:
            self.functions[node] = self._generate(node)
        return self.functions[node]

    def _generate(self, node: fx.Node) -> str:
        parent = module_of(node)
        if node.op == "call_module":
            parent = parent.rpartition(".")[0]
        plain = "quant" if node.op == "placeholder" else name_of(node)
        prefix = f"{parent}." if parent else ""
        number = 0
        while (name := f"{prefix}_generated_{plain}_{number}") in self.generated:
            number += 1
        self.generated.add(name)
        return name


def _is_weight(operand: Any) -> bool:
    """Whether an operand is a parameter, or made of parameters alone; a vector has no channels."""
    return isinstance(operand, fx.Node) and _is_constant(operand) and value_of(operand).dim > 1


def _is_constant(node: fx.Node) -> bool:
    made_of = node.all_input_nodes
    return node.op == "get_attr" or (bool(made_of) and all(map(_is_constant, made_of)))


def _following_relu(node: fx.Node) -> fx.Node | None:
    """The relu that alone takes a node's result, identities between them left out."""
    while len(node.users) == 1:
        (node,) = node.users
        if not node.op.startswith("call"):
            return None
        if kind_of(node) == "relu":
            return node
        identity = node.op == "call_module" and isinstance(module_called(node), nn.Identity)
        if not identity:
            return None
    return None

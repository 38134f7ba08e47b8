"""Where a model is observed: which modules, and which tensors of theirs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._checks import FLOATING

Selection: TypeAlias = (
    type[nn.Module]
    | str
    | Sequence[type[nn.Module] | str]
    | Callable[[str, nn.Module], bool]
    | None
)

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
USUALLY_QUANTIZED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, *EMBEDDINGS)
_SHOWN = 6  # names in an error message


def select_modules(
    model: nn.Module, modules: Selection, owner: str = "calibrate"
) -> dict[str, nn.Module]:
    """The chosen modules by name; one that has several names goes by the first that was chosen."""
    names = list(model.named_modules(remove_duplicate=False))
    if isinstance(modules, nn.Module):  # which is callable, too
        raise _selection_error(owner, modules)
    if modules is None:
        matches = _of_type(names, USUALLY_QUANTIZED)
        wanted = "the modules that are usually quantized (linear, convolution, embedding)"
    elif isinstance(modules, (str, type)):
        return select_modules(model, (modules,), owner)
    elif isinstance(modules, Sequence):
        matches, wanted = _listed(owner, names, modules), f"{modules!r}"
    elif callable(modules):
        matches = [(name, module) for name, module in names if modules(name, module)]
        wanted = "those that the predicate takes"
    else:
        raise _selection_error(owner, modules)
    if not matches:
        types = sorted({type(module).__name__ for _, module in names})
        raise ValueError(
            f"{owner}: modules: expected a selection that matches, got none for {wanted}; "
            f"the model has {_shortened(types)}"
        )
    chosen: dict[int, tuple[str, nn.Module]] = {}
    for name, module in matches:
        chosen.setdefault(id(module), (name, module))
    return dict(chosen.values())


def _listed(
    owner: str, names: list[tuple[str, nn.Module]], items: Sequence[type[nn.Module] | str]
) -> list[tuple[str, nn.Module]]:
    """What a list of types and name patterns takes, in the order of the model."""
    kinds: list[type] = []
    taken: set[str] = set()
    for item in items:
        if isinstance(item, str):
            taken |= _of_pattern(owner, [name for name, _ in names], item)
        elif isinstance(item, type) and issubclass(item, nn.Module):
            kinds.append(item)
        else:
            raise _selection_error(owner, item)
    taken |= {name for name, _ in _of_type(names, tuple(kinds))}
    return [(name, module) for name, module in names if name in taken]


def _of_type(
    names: list[tuple[str, nn.Module]], kinds: tuple[type, ...]
) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in names if isinstance(module, kinds)]


def _of_pattern(owner: str, names: list[str], pattern: str) -> set[str]:
    taken = {name for name in names if fnmatchcase(name, pattern)}
    if not taken:
        raise ValueError(
            f"{owner}: modules: expected a name pattern that matches, got {pattern!r}; "
            f"{near_matches(pattern, names)}"
        )
    return taken


def near_matches(name: str, names: list[str]) -> str:
    """What a message says of a name that is none of the names."""
    near = difflib.get_close_matches(name, names, n=_SHOWN, cutoff=0.5)
    return f"near it are {_shortened(near)}" if near else f"the model has {_shortened(names)}"


def _shortened(names: list[str]) -> str:
    shown = [name for name in names if name]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return (", ".join(shown[:_SHOWN]) or "no modules") + more


def _selection_error(owner: str, item: object) -> TypeError:
    return TypeError(
        f"{owner}: modules: expected module types, name patterns, a list of those or a predicate "
        f"(name, module) -> bool, got {item!r}"
    )


def weight_of(module: nn.Module) -> Tensor | None:
    """The floating-point ``weight`` of a module, of two or more dimensions, where it has one."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in FLOATING and weight.dim() >= 2:
        return weight
    return None


def map_tensors(path: str, value: Any, function: Callable[[str, Tensor], Tensor]) -> Any:
    """``value`` with ``function(path, tensor)`` in place of every floating-point tensor in it.

    Goes into tuples, lists and dicts, whose positions and keys lengthen the path. What does not
    change is handed back as it is, and no container is written to.
    """
    if isinstance(value, Tensor):
        observable = value.dtype in FLOATING and value.layout is torch.strided
        return function(path, value) if observable and value.numel() > 0 else value
    if isinstance(value, (tuple, list)):
        mapped = [map_tensors(f"{path}.{i}", item, function) for i, item in enumerate(value)]
        if all(new is old for new, old in zip(mapped, value, strict=True)):
            return value
        return type(value)(*mapped) if hasattr(value, "_fields") else type(value)(mapped)
    if isinstance(value, dict):
        changed = {key: map_tensors(f"{path}.{key}", item, function) for key, item in value.items()}
        if all(changed[key] is value[key] for key in value):
            return value
        # a copy keeps the type, and whatever else its constructor asks for
        result = value.copy()
        result.update(changed)
        return result
    return value


def map_inputs(
    args: tuple[Any, ...], kwargs: dict[str, Any], function: Callable[[str, Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """:func:`map_tensors` over the arguments of a module.

    A single positional argument is ``input``, several are ``input.0``, ``input.1`` …, and those
    passed by keyword ``input.<keyword>``.
    """
    if len(args) == 1:
        args = (map_tensors("input", args[0], function),)
    else:
        args = map_tensors("input", args, function)
    return args, map_tensors("input", kwargs, function)

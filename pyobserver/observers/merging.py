"""How the statistics of several observers become one: those of the ranks of a job, or of two.

A class of observers says in ``_merges`` by which rule each of its buffers merges; the rules are
here. What a rule makes of a buffer is reduced elementwise, so that the buffers of a whole model go
in a few reductions: one an operation and dtype.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import PER_CHANNEL

State = dict[str, Tensor]
# of an operation, "min" or "sum", and a flat tensor: over the ranks, in place
Reduce = Callable[[str, Tensor], None]

RUNNING: Mapping[str, str] = {"min_val": "min", "max_val": "max", "nonfinite_count": "sum"}
AVERAGED: Mapping[str, str] = {"min_val": "mean", "max_val": "mean", "nonfinite_count": "sum"}
_UNFED = {"min_val": torch.inf, "max_val": -torch.inf}  # the others start at 0
_NAN_KEY = -(2**31)


class _Rule(NamedTuple):
    operation: str
    dtype: torch.dtype
    # of the observer, its state, a buffer's name and what is merged so far: what is reduced
    pack: Callable[[Any, State, str, State], Tensor]
    # of what came of it, and the buffer as it was: the merged buffer
    unpack: Callable[[Tensor, Tensor], Tensor]
    counts: bool = False  # whether what is reduced adds up, value by value


def _keys(values: Tensor) -> Tensor:
    """Integers in the order of float32 values, NaN before all: any backend finds their minimum."""
    bits = values.view(torch.int32)
    return torch.where(values.isnan(), _NAN_KEY, bits ^ ((bits >> 31) & 0x7FFFFFFF))


def _values(keys: Tensor) -> Tensor:
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _one_nan(values: Tensor) -> Tensor:
    return torch.where(values.isnan(), torch.nan, values)


def _shares(state: State, name: str) -> Tensor:
    """Values to sum, and how many they are: none of a range that was never fed."""
    fed = ~(state["min_val"] > state["max_val"])  # a NaN was fed
    return torch.stack((torch.where(fed, state[name].double(), 0.0), fed.double()))


def _mean(shares: Tensor, unfed: Tensor) -> Tensor:
    total, fed = shares
    return torch.where(fed > 0, (total / fed).float(), unfed)


_RULES = {
    "min": _Rule(
        "min",
        torch.int32,
        lambda observer, state, name, merged: _keys(state[name]),
        lambda keys, old: _one_nan(_values(keys)),
    ),
    "max": _Rule(
        "min",
        torch.int32,
        lambda observer, state, name, merged: _keys(-state[name]),
        lambda keys, old: _one_nan(-_values(keys)),
    ),
    "sum": _Rule(
        "sum",
        torch.int64,
        lambda observer, state, name, merged: state[name],
        lambda total, old: total,
        counts=True,
    ),
    "mean": _Rule(
        "sum",
        torch.float64,
        lambda observer, state, name, merged: _shares(state, name),
        _mean,
    ),
    # the counts of linear bins, each first carried to the merged range
    "bins": _Rule(
        "sum",
        torch.float64,
        lambda observer, state, name, merged: observer.counts_over(
            merged["min_val"], merged["max_val"]
        ),
        lambda total, old: total,
        counts=True,
    ),
}
# in this order: the bins ask for the merged range
_STAGES = (("min", torch.int32), ("sum", torch.int64), ("sum", torch.float64))


def _group_dims(observer: Any) -> int:
    """The first dimensions of the buffers, which may not be sized yet."""
    if observer.qscheme in PER_CHANNEL:
        return 1
    return observer.min_val.dim() if hasattr(observer, "block_size") else 0


def describe(observer: Any) -> str:
    """What two observers must have in common for their statistics to merge."""
    dims = _group_dims(observer)
    shapes = ", ".join(
        f"{name} {tuple(observer._buffers[name].shape[dims:])}" for name in observer._merges
    )
    of_each = ""
    if observer.qscheme in PER_CHANNEL:
        of_each = f" of each channel along axis {observer.ch_axis}"
    elif dims:
        of_each = f" of each block of {observer.block_size}"
    return f"{type(observer).__qualname__} with {shapes}{of_each}"


def groups_of(observer: Any) -> tuple[int, ...]:
    """Channels of the state, or its grid of blocks; zeros while it is unsized; () per tensor."""
    if not _group_dims(observer):
        return ()
    shape = tuple(observer.min_val.shape)
    return (0,) * len(getattr(observer, "block_size", shape)) if 0 in shape else shape


def shown(groups: Sequence[int]) -> str:
    return str(groups[0] if len(groups) == 1 else tuple(groups))


def merge(
    parts: Sequence[Sequence[Any]],
    groups: Sequence[tuple[int, ...]],
    device: torch.device,
    reduce: Reduce,
    counted: Sequence[Any | None] = (),
) -> None:
    """Merge parts, lists of like observers, one by one, into the first, in place.

    Args:
        parts: each observer described as its counterparts in the other parts are.
        groups: of each observer, for those whose state is not sized yet.
        device: where to reduce.
        reduce: called for what the parts came to together, the same number of times with tensors
            of the same sizes for the same observers. Nothing is written before the last call.
        counted: of each observer of the first part None, or what it was (:func:`as_it_is`) when
            another that ``reduce`` takes in was the same: only what it counted since then is added.
    """
    states = [[_sized(*sized) for sized in zip(part, groups, strict=True)] for part in parts]
    merged: list[State] = [{} for _ in groups]
    for stage in _STAGES:
        _merge_stage(stage, parts, states, counted, groups, merged, device, reduce)
    for observer, state in zip(parts[0], merged, strict=True):
        for name, value in state.items():
            _write(observer, name, value)


def as_it_is(observer: Any) -> Any:
    """An observer with copies of the statistics, to compare with later."""
    kept = copy.copy(observer)
    buffers = {name: kept._buffers[name].clone() for name in observer._merges}
    kept.__dict__["_buffers"] = {**observer._buffers, **buffers}
    return kept


def _sized(observer: Any, groups: tuple[int, ...]) -> State:
    """The buffers that merge; those that are not sized yet as if they were, and unfed."""
    state = {}
    for name in observer._merges:
        buffer = observer._buffers[name]
        if any(groups) and buffer.dim() > 0 and len(buffer) == 0:
            buffer = buffer.new_full((*groups, *buffer.shape[1:]), _UNFED.get(name, 0))
        state[name] = buffer
    return state


def _merge_stage(
    stage: tuple[str, torch.dtype],
    parts: Sequence[Sequence[Any]],
    states: list[list[State]],
    counted: Sequence[Any | None],
    groups: Sequence[tuple[int, ...]],
    merged: list[State],
    device: torch.device,
    reduce_ranks: Reduce,
) -> None:
    """The buffers of one operation and dtype, laid end to end."""
    places = [
        (i, name, _RULES[rule])
        for i, observer in enumerate(parts[0])
        for name, rule in observer._merges.items()
        if _RULES[rule][:2] == stage
    ]
    if not places:
        return
    packed = [
        [rule.pack(part[i], state[i], name, merged[i]) for i, name, rule in places]
        for part, state in zip(parts, states, strict=True)
    ]
    for place, (i, name, rule) in enumerate(places):
        if rule.counts and counted and counted[i] is not None:
            before = rule.pack(counted[i], _sized(counted[i], groups[i]), name, merged[i])
            packed[0][place] = (packed[0][place] - before).clamp(min=0)
    flat = [torch.cat([piece.reshape(-1).to(device) for piece in pieces]) for pieces in packed]
    operation = stage[0]
    total = reduce(torch.minimum if operation == "min" else torch.add, flat)
    reduce_ranks(operation, total)
    pieces = total.split([piece.numel() for piece in packed[0]])
    for (i, name, rule), like, piece in zip(places, packed[0], pieces, strict=True):
        merged[i][name] = rule.unpack(piece.view(like.shape).to(like.device), states[0][i][name])


def _write(observer: Any, name: str, value: Tensor) -> None:
    if observer._buffers[name].shape != value.shape:
        with torch.inference_mode(False):  # an ordinary tensor, for a module to keep
            observer._buffers[name] = torch.empty(
                value.shape, dtype=value.dtype, device=value.device
            )
    observer._buffers[name].copy_(value)

"""``minmax``: running, moving-average or memoryless minimum and maximum, updated in place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _checks
from ._blocks import split
from ._float32 import to_float32
from ._library import define, eager_call, note_update, without_defaults

UPDATES = ("running", "moving_average", "memoryless")
RUNNING, MOVING_AVERAGE, MEMORYLESS = range(3)
UPDATE_CODES = {name: code for code, name in enumerate(UPDATES)}


def check_minmax(
    op: str,
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    axis: int | None,
    update: int,
    averaging_constant: float,
    nonfinite: int,
    block_size: Sequence[int] | None,
) -> None:
    _checks.check_input(op, "x", x)
    numel = 1 if axis is None and block_size is None else None
    _checks.check_state(op, "min_val", min_val, (torch.float32,), numel)
    _checks.check_state(op, "max_val", max_val, (torch.float32,), numel)
    _checks.check_state(op, "nonfinite_count", nonfinite_count, (torch.int64,), 1)
    states = {"min_val": min_val, "max_val": max_val}
    _checks.check_same_device(op, x, {**states, "nonfinite_count": nonfinite_count})
    _checks.check_code(op, "update", update, UPDATES)
    _checks.check_code(op, "nonfinite", nonfinite, _checks.NONFINITE)
    if not 0.0 < averaging_constant <= 1.0:
        raise ValueError(
            f"{op}: averaging_constant: expected a value in (0, 1], got {averaging_constant}"
        )
    _checks.check_groups(op, states, x, axis, block_size)


def _check(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    axis: int | None,
    update: int,
    averaging_constant: float,
    nonfinite: int,
    enabled: Tensor | None,
    block_size: Sequence[int] | None,
) -> None:
    check_minmax(
        "minmax", x, min_val, max_val, nonfinite_count,
        axis, update, averaging_constant, nonfinite, block_size,
    )  # fmt: skip
    _checks.check_enabled("minmax", enabled)
    _checks.check_same_device("minmax", x, {"enabled": enabled})


def finite_minmax(
    x: Tensor, dims: tuple[int, ...] | None, nonfinite: int, op: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The minimum, maximum and the number of NaN and infinite values of a float32 tensor.

    A zero is positive, whichever of the two zeros came first.
    """
    reduced = tuple(range(x.dim())) if dims is None else dims
    low, high = x.aminmax() if dims is None else (x.amin(dims), x.amax(dims))
    if bool((low.isfinite() & high.isfinite()).all()):  # a NaN would be either
        return low + 0.0, high + 0.0, torch.zeros((), dtype=torch.int64, device=x.device)
    finite = x.isfinite()
    count = x.numel() - finite.sum()
    if nonfinite == _checks.RAISE and int(count) > 0:
        raise ValueError(
            f"{op}: x: expected finite values, got {int(count)} NaN or infinite of {x.numel()}"
        )
    if nonfinite == _checks.IGNORE:
        low = torch.where(finite, x, torch.inf).amin(reduced)
        high = torch.where(finite, x, -torch.inf).amax(reduced)
    return low + 0.0, high + 0.0, count


def _average(state: Tensor, current: Tensor, averaging_constant: float) -> Tensor:
    """In float32 as torch computes it; in float64 where the difference leaves float32."""
    difference = current - state
    constant = to_float32(averaging_constant)
    wide = state.double() + constant * (current.double() - state.double())
    narrow = state + averaging_constant * difference
    return torch.where(difference.isfinite(), narrow, wide.float())


def reference(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    axis: int | None = None,
    update: int = RUNNING,
    averaging_constant: float = 0.01,
    nonfinite: int = _checks.IGNORE,
    enabled: Tensor | None = None,
    block_size: Sequence[int] | None = None,
) -> None:
    _check(
        x, min_val, max_val, nonfinite_count,
        axis, update, averaging_constant, nonfinite, enabled, block_size,
    )  # fmt: skip
    if x.numel() == 0:
        return
    if nonfinite == _checks.RAISE and enabled is not None and not bool(enabled):
        return
    x = x.detach().to(torch.float32)
    if axis is None and block_size is None:
        low, high, count = finite_minmax(x, None, nonfinite, "minmax")
    else:
        x, dims, _ = split(x, axis, block_size)
        if dims == ():
            x, dims = x.unsqueeze(-1), (x.dim(),)
        low, high, count = finite_minmax(x, dims, nonfinite, "minmax")
    low, high = low.reshape(min_val.shape), high.reshape(max_val.shape)
    unseen = low > high
    if update == RUNNING:
        new_min, new_max = torch.minimum(min_val, low), torch.maximum(max_val, high)
    elif update == MOVING_AVERAGE:
        first = (min_val == torch.inf) & (max_val == -torch.inf)
        new_min = torch.where(first, low, _average(min_val, low, averaging_constant))
        new_max = torch.where(first, high, _average(max_val, high, averaging_constant))
    else:
        new_min, new_max = low, high
    if enabled is not None:
        off = enabled.reshape(()) == 0
        unseen = unseen | off
        count = count.masked_fill(off, 0)
    min_val.copy_(torch.where(unseen, min_val, new_min))
    max_val.copy_(torch.where(unseen, max_val, new_max))
    nonfinite_count.add_(count)


_op = define(
    "minmax(Tensor x, Tensor(a!) min_val, Tensor(b!) max_val, Tensor(c!) nonfinite_count, "
    "int? axis=None, int update=0, float averaging_constant=0.01, int nonfinite=0, "
    "Tensor? enabled=None, SymInt[]? block_size=None) -> ()",
    _check,
    reference,
)
_eager = eager_call(_op)


@lru_cache(maxsize=128, typed=True)
def _settings(axis: int | None, update: str, averaging_constant: float, nonfinite: str) -> Any:
    given = axis, UPDATE_CODES[update], averaging_constant, _checks.NONFINITE_CODES[nonfinite]
    return without_defaults(given, (None, RUNNING, 0.01, _checks.IGNORE))


def minmax(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    axis: int | None = None,
    update: str = "running",
    averaging_constant: float = 0.01,
    nonfinite: str = "ignore",
    enabled: Tensor | None = None,
    block_size: Sequence[int] | None = None,
) -> None:
    """Fold the minimum and maximum of ``x`` into ``min_val`` and ``max_val``, in place.

    Args:
        x: what to observe: any shape and strides; float32, float64, float16 or bfloat16. Values
            are taken as float32 (float64 ones are rounded to it). An empty tensor changes nothing.
        min_val, max_val: the state, float32: one element; ``(x.shape[axis],)`` with ``axis``; the
            shape of x over ``block_size`` with that. A fresh state holds +inf and -inf, and that
            is how the first batch is known.
        nonfinite_count: int64, one element: the NaN and infinite values seen are added to it.
        axis: the channel axis, or None for one range over the whole tensor.
        update: ``"running"``: least and greatest value so far. ``"moving_average"``:
            ``min_val + averaging_constant * (min(x) - min_val)`` in float32, the first batch in
            full. ``"memoryless"``: of this ``x`` alone. The op has them as 0, 1, 2.
        averaging_constant: in (0, 1].
        nonfinite: ``"ignore"``: NaN and infinities are left out (a channel that has nothing else
            keeps its range). ``"propagate"``: they enter the range as in torch.
            ``"raise"``: they are an error, and the state stays as it was (reads the device).
            The op has them as 0, 1, 2.
        enabled: one element (uint8, int64 or bool) read where the data is; 0 changes nothing.
        block_size: sizes of a block, one for each dimension of ``x``, each a divisor of its size:
            a range for each block, as torchao's granularities have it.

    Raises:
        TypeError: a dtype or layout that is not served.
        ValueError: a shape, axis, device or value that does not fit; names the argument.

    Source: ``torch.aminmax`` and the update rules of ``torch.ao.quantization``'s MinMaxObserver
    and MovingAverageMinMaxObserver; the blocks are those of torchao's quantization primitives.
    """
    try:
        if is_compiling():
            _op(
                x, min_val, max_val, nonfinite_count, axis, UPDATE_CODES[update],
                averaging_constant, _checks.NONFINITE_CODES[nonfinite], enabled, block_size,
            )  # fmt: skip
            return
        if enabled is None and block_size is None:
            settings = _settings(axis, update, averaging_constant, nonfinite)
            _eager(x, min_val, max_val, nonfinite_count, *settings)
        else:
            _eager(
                x, min_val, max_val, nonfinite_count, axis, UPDATE_CODES[update],
                averaging_constant, _checks.NONFINITE_CODES[nonfinite], enabled, block_size,
            )  # fmt: skip
        note_update(min_val, max_val, nonfinite_count)
    except (RuntimeError, OverflowError, KeyError, TypeError):
        code = _checks.code_of("minmax", "nonfinite", nonfinite, _checks.NONFINITE)
        _check(
            x, min_val, max_val, nonfinite_count, axis,
            _checks.code_of("minmax", "update", update, UPDATES),
            averaging_constant, code, enabled, block_size,
        )  # fmt: skip
        if code == _checks.RAISE:
            finite_minmax(x.detach().float(), None, code, "minmax")
        raise

"""``log_histogram``: bins by the leading bits of a float, in place; no range to keep or to grow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _checks
from ._blocks import split
from ._library import define, eager_call, note_update, without_defaults
from .minmax import finite_minmax

MOST_MANTISSA_BITS = 10
_INFINITY = 0x7F800000  # the bits of a float32


def _greatest_bin(mantissa_bits: int) -> int:
    if not isinstance(mantissa_bits, int) or not 0 <= mantissa_bits <= MOST_MANTISSA_BITS:
        raise ValueError(
            f"mantissa_bits: expected an integer in [0, {MOST_MANTISSA_BITS}], "
            f"got {mantissa_bits!r}"
        )
    return 255 << mantissa_bits


def log_columns(mantissa_bits: int) -> int:
    """How many counts a log histogram of so many mantissa bits has: its last size.

    Those of -inf, of the finite bins in ascending order, of +inf, and of NaN.

    Raises:
        ValueError: ``mantissa_bits`` outside [0, 10].
    """
    return 2 * _greatest_bin(mantissa_bits) + 4


_COLUMNS = tuple(log_columns(bits) for bits in range(MOST_MANTISSA_BITS + 1))
_SIZES = ", ".join(map(str, _COLUMNS))


def mantissa_bits_of(columns: int) -> int:
    """The mantissa bits of a log histogram whose last size is ``columns``.

    Raises:
        ValueError: no log histogram has so many; names ``counts``.
    """
    if columns not in _COLUMNS:
        raise ValueError(f"counts: expected a last size of one of {_SIZES}, got {columns}")
    return _COLUMNS.index(columns)


def log_edges(mantissa_bits: int, device: torch.device | str = "cpu") -> Tensor:
    """The edges of the finite bins, ascending: float64 ``(2 * (255 << mantissa_bits) + 2,)``.

    Exact: bin ``i`` holds what rounds to it, [edges[i], edges[i + 1]] but for the edges themselves,
    which belong to the bin that is farther from zero. The outermost two lie beyond float32. The
    tensor of the CPU is kept and shared: not to be written to. That of another device is made
    there, as a copy would wait for it.

    Raises:
        ValueError: ``mantissa_bits`` outside [0, 10].
    """
    if torch.device(device).type != "cpu":
        return _edges(mantissa_bits, device)
    # what a mode of dispatch makes, as of fake tensors, is not for others to use
    plain = not is_compiling() and type(torch.empty(0, device="cpu")) is Tensor
    return _kept_edges(mantissa_bits) if plain else _edges(mantissa_bits, "cpu")


def _edges(mantissa_bits: int, device: torch.device | str) -> Tensor:
    bins = torch.arange(_greatest_bin(mantissa_bits) + 1, device=device)
    bits = (2 * bins + 1) << (22 - mantissa_bits)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    normal = ((exponent + (1023 - 127)) << 52 | mantissa << 29).view(torch.float64)
    edges = torch.where(exponent > 0, normal, mantissa.double() * 2.0**-149)
    return torch.cat([-edges.flip(0), edges])


@cache
def _kept_edges(mantissa_bits: int) -> Tensor:
    with torch.inference_mode(False):  # an ordinary tensor, whoever asks first
        return _edges(mantissa_bits, "cpu")


def _check_rows(
    counts: Tensor, x: Tensor, axis: int | None, block_size: Sequence[int] | None
) -> None:
    """A row of counts for each group; x, axis and block_size are checked before."""
    rows, columns = tuple(counts.shape[:-1]), counts.shape[-1]
    if axis is None and block_size is None:
        if rows not in ((), (1,)):
            raise ValueError(
                f"log_histogram: counts: expected shape ({columns},), got {tuple(counts.shape)}"
            )
        return
    if x.numel() == 0:
        return
    if block_size is not None:
        grid = tuple(whole // size for size, whole in zip(block_size, x.shape, strict=True))
    else:
        assert axis is not None
        grid = (x.shape[axis],)
    if rows != grid:
        raise ValueError(
            f"log_histogram: counts: expected shape {(*grid, columns)}, "
            f"a row for each group of x (shape {tuple(x.shape)}), got {tuple(counts.shape)}"
        )


def _check(
    x: Tensor,
    counts: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    axis: int | None,
    nonfinite: int,
    enabled: Tensor | None,
    block_size: Sequence[int] | None,
) -> None:
    op = "log_histogram"
    _checks.check_input(op, "x", x)
    _checks.check_state(op, "counts", counts, (torch.int64,))
    if counts.dim() == 0 or counts.shape[-1] not in _COLUMNS:
        raise ValueError(
            f"{op}: counts: expected a last size of one of {_SIZES}, "
            f"got shape {tuple(counts.shape)}"
        )
    numel = 1 if axis is None and block_size is None else None
    _checks.check_state(op, "min_val", min_val, (torch.float32,), numel)
    _checks.check_state(op, "max_val", max_val, (torch.float32,), numel)
    _checks.check_enabled(op, enabled)
    states = {"min_val": min_val, "max_val": max_val}
    _checks.check_same_device(op, x, {"counts": counts, **states, "enabled": enabled})
    _checks.check_code(op, "nonfinite", nonfinite, _checks.NONFINITE)
    _checks.check_groups(op, states, x, axis, block_size)
    _check_rows(counts, x, axis, block_size)


def _columns_of(x: Tensor, mantissa_bits: int) -> Tensor:
    """The column of each value of a float32 tensor."""
    bits = x.view(torch.int32).to(torch.int64)
    # as integers the keys are in the order of the values
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    nearest = (key + (1 << (22 - mantissa_bits))) >> (23 - mantissa_bits)
    greatest = 255 << mantissa_bits
    column = nearest + (1 + greatest)
    column = column.masked_fill(x == -torch.inf, 0)
    column = column.masked_fill(x == torch.inf, 2 * greatest + 2)
    return column.masked_fill(x.isnan(), 2 * greatest + 3)


def reference(
    x: Tensor,
    counts: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    axis: int | None = None,
    nonfinite: int = _checks.IGNORE,
    enabled: Tensor | None = None,
    block_size: Sequence[int] | None = None,
) -> None:
    _check(x, counts, min_val, max_val, axis, nonfinite, enabled, block_size)
    if x.numel() == 0 or (enabled is not None and not bool(enabled)):
        return
    x = x.detach().to(torch.float32)
    dims: tuple[int, ...] | None = None
    group = torch.zeros((), dtype=torch.int64, device=x.device)
    if axis is not None or block_size is not None:
        x, dims, shape = split(x, axis, block_size)
        group = torch.arange(min_val.numel(), device=x.device).reshape(shape)
        if dims == ():
            x, group, dims = x.unsqueeze(-1), group.unsqueeze(-1), (x.dim(),)
    low, high, _ = finite_minmax(x, dims, nonfinite, "log_histogram")
    columns = counts.shape[-1]
    at = group * columns + _columns_of(x, mantissa_bits_of(columns))
    counts.add_(torch.bincount(at.reshape(-1), minlength=counts.numel()).reshape(counts.shape))
    min_val.copy_(torch.minimum(min_val, low.reshape(min_val.shape)))
    max_val.copy_(torch.maximum(max_val, high.reshape(max_val.shape)))


_op = define(
    "log_histogram(Tensor x, Tensor(a!) counts, Tensor(b!) min_val, Tensor(c!) max_val, "
    "int? axis=None, int nonfinite=0, Tensor? enabled=None, SymInt[]? block_size=None) -> ()",
    _check,
    reference,
)
_eager = eager_call(_op)


@lru_cache(maxsize=128, typed=True)
def _settings(axis: int | None, nonfinite: str) -> Any:
    return without_defaults((axis, _checks.NONFINITE_CODES[nonfinite]), (None, _checks.IGNORE))


def log_histogram(
    x: Tensor,
    counts: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    axis: int | None = None,
    nonfinite: str = "ignore",
    enabled: Tensor | None = None,
    block_size: Sequence[int] | None = None,
) -> None:
    """Add the values of ``x`` to a histogram by their leading bits, in place.

    With k mantissa bits a value is rounded to its sign, its exponent and k bits of its mantissa,
    half away from zero: a relative resolution of 2^-k at every magnitude. So there is no range to
    find first, and counts add exactly: the same bytes for any order, split or dtype of the values.

    Args:
        x: what to observe: any shape and strides; float32, float64, float16 or bfloat16. Values
            are taken as float32 (float64 ones are rounded to it). An empty tensor changes nothing.
        counts: int64, contiguous: ``(columns,)`` or ``(1, columns)``; ``(x.shape[axis], columns)``
            with ``axis``; the shape of x over ``block_size``, and ``columns``, with that. k in
            [0, 10] follows from ``columns = log_columns(k)``: -inf, the finite bins from
            -(255 << k) to 255 << k, +inf, NaN. :func:`log_edges` has the edges of the finite bins.
        min_val, max_val: float32: one element, or one for each row of counts: the least and the
            greatest finite value so far, exactly; +inf and -inf before the first batch.
        axis: the channel axis, or None for one histogram of the whole tensor.
        nonfinite: ``"ignore"``: NaN and infinities are counted in their own columns alone.
            ``"propagate"``: they enter min_val and max_val too, as in :func:`minmax`.
            ``"raise"``: they are an error, and the state stays as it was (reads the device).
            The op has them as 0, 1, 2.
        enabled: one element (uint8, int64 or bool) read where the data is; 0 changes nothing.
        block_size: sizes of a block, one for each dimension of ``x``, each a divisor of its size:
            a histogram for each block.

    Raises:
        TypeError: a dtype or layout that is not served.
        ValueError: a shape, axis, device or value that does not fit; names the argument.
    """
    try:
        if is_compiling():
            _op(
                x, counts, min_val, max_val, axis, _checks.NONFINITE_CODES[nonfinite], enabled,
                block_size,
            )  # fmt: skip
            return
        if enabled is None and block_size is None:
            _eager(x, counts, min_val, max_val, *_settings(axis, nonfinite))
        else:
            _eager(
                x, counts, min_val, max_val, axis, _checks.NONFINITE_CODES[nonfinite], enabled,
                block_size,
            )  # fmt: skip
        note_update(counts, min_val, max_val)
    except (RuntimeError, OverflowError, KeyError, TypeError):
        code = _checks.code_of("log_histogram", "nonfinite", nonfinite, _checks.NONFINITE)
        _check(x, counts, min_val, max_val, axis, code, enabled, block_size)
        if code == _checks.RAISE:
            finite_minmax(x.detach().float(), None, code, "log_histogram")
        raise

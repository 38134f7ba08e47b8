"""``lp_search``: the scale and zero point that quantize a histogram with the least L_p error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import _checks
from ._library import define, note_update

CONSTRAINTS = ("none", "power_of_two", "fp16", "e8m0")
NONE, POWER_OF_TWO, FP16, E8M0 = range(4)
CONSTRAINT_CODES = {name: code for code, name in enumerate(CONSTRAINTS)}

MOST_P = 6  # the powers of float32 values, and their sums, are float64 ones

_SCALE_BITS = 7  # of the mantissa of the scales that are tried
_MOST_EXTREMES = 256
_POWERS = (POWER_OF_TWO, E8M0)
_MOST_POWER, _MOST_FLOAT = 2.0**127, torch.finfo(torch.float32).max
_LEAST_SCALE = {NONE: 2.0**-126, POWER_OF_TWO: 2.0**-126, FP16: 2.0**-24, E8M0: 2.0**-127}
_SCALES_AT_ONCE = 256  # of the reference: memory for speed


def _check_histograms(
    op: str, counts: Tensor, edges: Tensor, min_val: Tensor, max_val: Tensor
) -> int:
    """How many histograms there are."""
    _checks.check_state(op, "counts", counts, (torch.float64,))
    if counts.dim() == 0 or counts.shape[-1] < 1:
        raise ValueError(
            f"{op}: counts: expected shape (..., bins) with at least 1 bin, "
            f"got {tuple(counts.shape)}"
        )
    bins = counts.shape[-1]
    histograms = counts.numel() // bins
    _checks.check_state(op, "edges", edges, (torch.float64,))
    if edges.numel() not in (bins + 1, histograms * (bins + 1)):
        raise ValueError(
            f"{op}: edges: expected shape ({bins + 1},) or one row for each histogram, "
            f"got {tuple(edges.shape)}"
        )
    _checks.check_state(op, "min_val", min_val, (torch.float32,), histograms)
    _checks.check_state(op, "max_val", max_val, (torch.float32,), histograms)
    others = {"edges": edges, "min_val": min_val, "max_val": max_val}
    _checks.check_same_device(op, counts, others)
    return histograms


def _check_grid(
    op: str,
    counts: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    histograms: int,
    quant_min: int,
    quant_max: int,
    p: float,
) -> None:
    _checks.check_state(op, "scale", scale, (torch.float32,), histograms)
    _checks.check_state(op, "zero_point", zero_point, (torch.int32, torch.int64), histograms)
    _checks.check_same_device(op, counts, {"scale": scale, "zero_point": zero_point})
    _checks.check_quant_range(op, quant_min, quant_max)
    if not 0.0 < p <= MOST_P:
        raise ValueError(f"{op}: p: expected a value in (0, {MOST_P}], got {p}")


def _check(
    counts: Tensor,
    edges: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    error: Tensor,
    quant_min: int,
    quant_max: int,
    p: float,
    fixed_zero_point: int | None,
    constraint: int,
    eps: Tensor | None,
    enabled: Tensor | None,
) -> None:
    op = "lp_search"
    histograms = _check_histograms(op, counts, edges, min_val, max_val)
    _check_grid(op, counts, scale, zero_point, histograms, quant_min, quant_max, p)
    _checks.check_state(op, "error", error, (torch.float64,), 3 * histograms)
    _checks.check_enabled(op, enabled)
    _checks.check_same_device(op, counts, {"error": error, "enabled": enabled})
    _checks.check_code(op, "constraint", constraint, CONSTRAINTS)
    if fixed_zero_point is not None and not quant_min <= fixed_zero_point <= quant_max:
        raise ValueError(
            f"{op}: fixed_zero_point: expected a value in [{quant_min}, {quant_max}], "
            f"got {fixed_zero_point}"
        )
    if eps is not None:
        _checks.check_state(op, "eps", eps, (torch.float32,), 1)
        _checks.check_same_device(op, counts, {"eps": eps})


def _float64(values: Any) -> Tensor:
    """On the CPU, whatever the default device."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


class _Side:
    """The values of one sign by their magnitudes: cells of even density, and exact extremes."""

    def __init__(
        self, begin: Tensor, end: Tensor, counts: Tensor, points: list[tuple[float, float]]
    ):
        kept = (counts > 0) & (end > begin)
        order = torch.argsort(begin[kept])
        self.begin, self.end = begin[kept][order], end[kept][order]
        self.density = counts[kept][order] / (self.end - self.begin)
        values = _float64([point for point in points if min(point) > 0])
        self.value, self.times = values.reshape(-1, 2).to(begin.device).unbind(1)
        mass = self.density * (self.end - self.begin)
        first = mass * (self.begin + self.end) / 2
        second = mass * (self.begin**2 + self.begin * self.end + self.end**2) / 3
        moments = torch.stack((mass, first, second))
        # of all cells from each one on
        self.moments = nn.functional.pad(moments.flip(1).cumsum(1).flip(1), (0, 1))

    @property
    def extreme(self) -> float:
        ends = [*self.end[-1:].tolist(), *self.value.tolist()]
        return max(ends, default=0.0)

    def beyond(self, above: Tensor, level: Tensor, p: float) -> Tensor:
        """The sum of ``|x - level|^p`` over what lies above, for a column of each."""
        points = torch.where(self.value > above, self.times * (self.value - level).abs() ** p, 0.0)
        if p == 2:
            return self._beyond(above.squeeze(-1), level.squeeze(-1)) + points.sum(-1)
        begin, end = torch.maximum(self.begin, above), torch.maximum(self.end, above)
        mass = _integral(end - level, p) - _integral(begin - level, p)
        return (self.density * mass).sum(-1) + points.sum(-1)

    def _beyond(self, above: Tensor, level: Tensor) -> Tensor:
        """The squared error of the cells, from the moments of what lies above."""
        at = torch.searchsorted(self.end, above, right=True)
        count, first, second = self.moments[:, at]
        if self.end.numel():
            cell = at.clamp(max=self.end.numel() - 1)
            begin = self.begin[cell]
            cut = torch.where(at < self.end.numel(), (above - begin).clamp(min=0.0), 0.0)
            taken = self.density[cell] * cut
            count = count - taken
            first = first - taken * (begin + above) / 2
            second = second - taken * (begin * begin + begin * above + above * above) / 3
        return (second - 2 * level * first + level * level * count).clamp(min=0.0)

    def within(self, scale: Tensor, below: Tensor, p: float) -> Tensor:
        """The sum of ``dist(x, scale * Z)^p`` over what lies below, for a column of each."""
        begin, end = torch.minimum(self.begin, below), torch.minimum(self.end, below)
        mass = _steps(end, scale, p) - _steps(begin, scale, p)
        off = (self.value - torch.round(self.value / scale) * scale).abs()
        points = torch.where(self.value <= below, self.times * off**p, 0.0)
        return (self.density * mass).sum(-1) + points.sum(-1)

    def gain(self, levels: Tensor, scale: Tensor, p: float) -> Tensor:
        """What one more level takes away from the error of a side that has ``levels``."""
        above = (levels + 0.5) * scale
        fewer = self.beyond(above, levels * scale, p)
        return fewer - self.beyond(above, (levels + 1) * scale, p)

    def signal(self, p: float) -> Tensor:
        mass = _integral(self.end, p) - _integral(self.begin, p)
        return (self.density * mass).sum() + (self.times * self.value**p).sum()


def _integral(x: Tensor, p: float) -> Tensor:
    """Of ``|x|^p`` from 0."""
    return x.sign() * x.abs() ** (p + 1) / (p + 1)


def _steps(x: Tensor, scale: Tensor, p: float) -> Tensor:
    """The integral of ``dist(x, scale * Z)^p`` from 0."""
    level = torch.round(x / scale)
    return level * (2 * _integral(scale / 2, p)) + _integral(x - level * scale, p)


def _sides(counts: Tensor, edges: Tensor, low: float, high: float) -> tuple[_Side, _Side]:
    occupied = counts.nonzero().reshape(-1)
    first, last = int(occupied[0]), int(occupied[-1])
    counts = counts.clone()

    def at_extreme(bin_: int, inward: int) -> float:
        wide = float(edges[bin_]) < high and float(edges[bin_ + 1]) > low
        count = float(counts[bin_])
        return min(count, 1.0) if wide and counts[inward] > 0 else count

    if first == last:
        at_high = min(float(counts[last]), 1.0) if low < high else float(counts[last])
        at_low = min(float(counts[first]) - at_high, 1.0)
    else:
        at_low, at_high = at_extreme(first, first + 1), at_extreme(last, last - 1)
    counts[first] -= at_low
    counts[last] -= at_high
    begin, end = edges[:-1].clamp(min=low), edges[1:].clamp(max=high)
    width = end - begin
    points = [(low, at_low), (high, at_high)]

    def side(sign: int) -> _Side:
        ends = (begin, end) if sign > 0 else (-end, -begin)
        near, far = (e.clamp(min=0.0) for e in ends)
        share = torch.where(width > 0, counts * ((far - near) / width), 0.0)
        return _Side(near, far, share, [(sign * value, times) for value, times in points])

    return side(-1), side(1)


class _Goal(NamedTuple):
    below: int | None  # levels of the negative side; None: any split of ``above``
    above: int
    p: float
    constraint: int
    eps: float


def _allowed(values: Tensor, constraint: int) -> Tensor:
    """The nearest ones that the constraint allows, of powers of two where it is one of those."""
    if constraint == FP16:
        return values.clamp(max=65504.0).float().half().double()
    return values.clamp(max=_MOST_POWER if constraint in _POWERS else _MOST_FLOAT).float().double()


def _least_scale(goal: _Goal) -> float:
    finest = _LEAST_SCALE[goal.constraint]
    if not goal.eps > 0:
        return finest
    eps = _float64(goal.eps)
    least = float(_allowed(eps, goal.constraint))
    if goal.constraint in _POWERS:
        mantissa, exponent = math.frexp(least)
        least = math.ldexp(1.0, exponent if mantissa > 0.5 else exponent - 1)
    elif least < goal.eps:
        # three quarters of a step to one and a half further: the next one
        further = eps.new_tensor(least + max(least * 3 * 2.0**-12, 3 * 2.0**-26))
        least = float(_allowed(further, goal.constraint))
    return max(least, finest)


def _unclipped_scale(goal: _Goal, negative: float, positive: float) -> float:
    """The least scale that clips nothing; 0 where no level is beside zero's."""
    if goal.below is None:
        return (negative + positive) / goal.above
    sides = (negative, goal.below), (positive, goal.above)
    return max(extreme / levels if levels else 0.0 for extreme, levels in sides)


def _minmax_scale(goal: _Goal, negative: float, positive: float) -> float:
    """The scale of the range of all values, as :func:`choose_qparams` has it."""
    if goal.below is None:
        return _unclipped_scale(goal, negative, positive)
    return max(negative, positive) / ((goal.below + goal.above) / 2)


def _scales(goal: _Goal, negative: float, positive: float) -> Tensor:
    """The scales to try, descending: from twice the one that clips nothing.

    Of a greater one, half has all the levels that it uses, and more.
    """
    n = goal.above
    top, least = 2 * _unclipped_scale(goal, negative, positive), _least_scale(goal)
    exponents = range(math.frexp(top)[1], min(math.frexp(top)[1], math.frexp(least)[1]) - 2, -1)
    tried = _float64([math.ldexp(1.0, e) for e in exponents])
    if goal.constraint not in _POWERS:
        units = torch.arange(
            2**_SCALE_BITS, 2 ** (_SCALE_BITS + 1), dtype=torch.float64, device="cpu"
        )
        tried = (tried.unsqueeze(1) * (units / 2**_SCALE_BITS)).reshape(-1)
    parts = [tried[tried >= top].min().reshape(1), tried[tried < top]]
    if goal.constraint not in _POWERS:
        parts.append(_float64([_minmax_scale(goal, negative, positive)]))
    for extreme, fixed in ((negative, goal.below), (positive, n)):
        if extreme == 0 or goal.constraint in _POWERS:
            continue
        if goal.below is None:
            first, stride = max(1, math.ceil(extreme / top)), -(-n // _MOST_EXTREMES)
            parts.append(
                extreme / torch.arange(first, n + 1, stride, dtype=torch.float64, device="cpu")
            )
        elif fixed:
            parts.append(_float64([extreme / fixed]))
    return _allowed(torch.cat(parts), goal.constraint).clamp(min=least).unique().flip(0)


def _best_above(negative: _Side, positive: _Side, scale: Tensor, n: int, p: float) -> Tensor:
    """The levels of the positive side whose split errs least, for a column of scales."""
    low, high = torch.zeros_like(scale), torch.full_like(scale, n)
    for _ in range(n.bit_length() + 1):
        middle = torch.floor((low + high) / 2)
        found = (low < high).squeeze(-1)
        gained = positive.gain(middle, scale, p) > negative.gain(n - middle - 1, scale, p)
        low = torch.where((found & gained).unsqueeze(-1), middle + 1, low)
        high = torch.where((found & ~gained).unsqueeze(-1), middle, high)
    return low


def _search(
    counts: Tensor, edges: Tensor, low: float, high: float, goal: _Goal
) -> tuple[float, int, tuple[float, float, float]]:
    """The scale, the levels of the negative side, and the errors as sums."""
    negative, positive = _sides(counts, edges, low, high)
    n = goal.above
    best: tuple[float, float, int] = (math.inf, 1.0, goal.below or 0)
    if _unclipped_scale(goal, negative.extreme, positive.extreme) == 0:
        return best[1], best[2], _error_sums(negative, positive, best[1], best[2], n, goal.p)
    tried = _scales(goal, negative.extreme, positive.extreme).to(counts.device)
    for scale in tried.unsqueeze(-1).split(_SCALES_AT_ONCE):
        widest = [(goal.below if goal.below is not None else n) * scale[:1], n * scale[:1]]
        outside = [
            side.beyond(end, end, goal.p)
            for side, end in zip((negative, positive), widest, strict=True)
        ]
        if float(outside[0] + outside[1]) >= best[0]:
            break  # and so is the error of every smaller scale
        if goal.below is None:
            above = _best_above(negative, positive, scale, n, max(goal.p, 1.0))
            below = n - above
        else:
            below, above = torch.full_like(scale, goal.below), torch.full_like(scale, n)
        clipping, rounding = _errors(negative, positive, scale, below, above, goal.p)
        error, at = (clipping + rounding).min(0)
        if float(error) < best[0]:
            best = float(error), float(scale[at]), int(below[at])
    levels = best[2], n if goal.below is not None else n - best[2]
    return best[1], best[2], _error_sums(negative, positive, best[1], *levels, goal.p)


def _errors(
    negative: _Side, positive: _Side, scale: Tensor, below: Tensor, above: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    clipping = rounding = torch.zeros((), dtype=torch.float64, device=scale.device)
    for side, levels in ((negative, below), (positive, above)):
        end = (levels + 0.5) * scale
        clipping = clipping + side.beyond(end, levels * scale, p)
        rounding = rounding + side.within(scale, end, p)
    return clipping, rounding


def _error_sums(
    negative: _Side, positive: _Side, scale: float, below: int, above: int, p: float
) -> tuple[float, float, float]:
    columns = _float64([[scale], [below], [above]]).unbind()
    at = [column.reshape(1, 1).to(negative.begin.device) for column in columns]
    clipping, rounding = _errors(negative, positive, at[0], at[1], at[2], p)
    return float(clipping), float(rounding), float(negative.signal(p) + positive.signal(p))


def _fed(
    counts: Tensor, edges: Tensor, min_val: Tensor, max_val: Tensor
) -> Iterator[tuple[int, Tensor, Tensor, float, float]]:
    """Each histogram that holds something: its index, counts, edges, least and greatest value."""
    bins = counts.shape[-1]
    rows = counts.detach().reshape(-1, bins)
    edge_rows = edges.detach().reshape(-1, bins + 1).expand(len(rows), -1)
    ends = zip(min_val.reshape(-1).tolist(), max_val.reshape(-1).tolist(), strict=True)
    for i, (low, high) in enumerate(ends):
        if math.isfinite(low) and math.isfinite(high) and low <= high and bool(rows[i].sum() > 0):
            yield i, rows[i], edge_rows[i], low, high


def reference(
    counts: Tensor,
    edges: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    error: Tensor,
    quant_min: int,
    quant_max: int,
    p: float = 2.0,
    fixed_zero_point: int | None = None,
    constraint: int = NONE,
    eps: Tensor | None = None,
    enabled: Tensor | None = None,
) -> None:
    _check(
        counts, edges, min_val, max_val, scale, zero_point, error,
        quant_min, quant_max, p, fixed_zero_point, constraint, eps, enabled,
    )  # fmt: skip
    if enabled is not None and not bool(enabled):
        return
    least = 0.0 if eps is None else float(eps)
    goal = _Goal(None, quant_max - quant_min, p, constraint, least)
    if fixed_zero_point is not None:
        goal = goal._replace(below=fixed_zero_point - quant_min, above=quant_max - fixed_zero_point)
    scales, zeros = torch.ones_like(scale).reshape(-1), torch.zeros_like(zero_point).reshape(-1)
    errors = torch.zeros_like(error).reshape(-1, 3)
    for i, row, row_edges, low, high in _fed(counts, edges, min_val, max_val):
        scales[i], below, sums = _search(row, row_edges, low, high, goal)
        zeros[i] = quant_min + below
        errors[i] = _float64(sums) / float(row.sum())
    scale.copy_(scales.reshape(scale.shape))
    zero_point.copy_(zeros.reshape(zero_point.shape))
    error.copy_(errors.reshape(error.shape))


_op = define(
    "lp_search(Tensor counts, Tensor edges, Tensor min_val, Tensor max_val, Tensor(a!) scale, "
    "Tensor(b!) zero_point, Tensor(c!) error, int quant_min, int quant_max, float p=2.0, "
    "int? fixed_zero_point=None, int constraint=0, Tensor? eps=None, Tensor? enabled=None) -> ()",
    _check,
    reference,
)


def lp_search(
    counts: Tensor,
    edges: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    error: Tensor,
    quant_min: int,
    quant_max: int,
    p: float = 2.0,
    fixed_zero_point: int | None = None,
    constraint: str = "none",
    eps: Tensor | None = None,
    enabled: Tensor | None = None,
) -> None:
    """Write the scale and zero point that quantize each histogram with the least L_p error.

    The error is the mean of ``|x - quantized x|^p`` over the values of a histogram, held to lie
    evenly in their bins. The least and the greatest value are known exactly: each counts as one
    value by itself, or as all of its bin where the next bin inward is empty or it lies at the inner
    end of its bin.

    **What is searched.** Zero is always a level, so the levels of a scale are its multiples, and
    the zero point only splits the ``quant_max - quant_min`` steps between the two signs. Tried are
    the scales with 7 bits of mantissa (0.4 to 0.8 % apart), those that put the least or the
    greatest value on a level, and that of the range of all values; from twice the one that clips
    nothing downwards, and for each of them *every* zero point. The result has the least error of
    all those ranges.

    **Why it is exact.** Given a scale, one level more on a side takes away
    ``2 s * sum(x - t for x > t)`` of its squared error, with t between the old and the new level:
    that falls with each level, the error is convex in the split, and bisection finds its minimum,
    each gain from prefix sums of count, sum and square. As the scale falls, what lies outside all
    ranges it allows can only grow: once that alone is as much as the best error found, no smaller
    scale can be better. (For any other ``p >= 1`` alike; below 1 the split is that of ``p = 1``.)

    Args:
        counts: float64 ``(..., bins)``: one histogram, or many.
        edges: float64 ``(bins + 1,)``, ascending, or ``(..., bins + 1)``: the ends of the bins.
        min_val, max_val: float32, one element for each histogram: the least and greatest value.
        scale: float32, as many, written. 1 for a histogram that is empty, of zeros alone, or on
            whose side the grid has no level.
        zero_point: int32 or int64, as many, written.
        error: float64, three for each, written: the mean error by clipping (of the values that are
            rounded to beyond the grid) and by rounding, and the mean of ``|x|^p``.
        quant_min, quant_max: the integer grid.
        p: the exponent, in (0, 6]; 2 for the mean squared error, and the fastest by far.
        fixed_zero_point: the zero point of a symmetric scheme; None: the best one.
        constraint: the scales that are allowed: ``"none"``: any float32; ``"power_of_two"``;
            ``"fp16"``: those of a float16; ``"e8m0"``: the powers of two from 2^-127 to 2^127 (OCP
            microscaling). The op has them as 0 to 3.
        eps: float32, one element: no scale below it is tried; None: down to 2^-126, 2^-24 for fp16.
        enabled: one element (uint8, int64 or bool); 0 changes nothing.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came.

    Source: the objective of torch's and caffe2's ``NormMinimization``, on the real grid.
    """
    arguments = counts, edges, min_val, max_val, scale, zero_point, error, quant_min, quant_max, p
    try:
        _op(*arguments, fixed_zero_point, CONSTRAINT_CODES[constraint], eps, enabled)
        if not is_compiling():
            note_update(scale, zero_point, error)
    except (RuntimeError, OverflowError, KeyError, TypeError):
        code = _checks.code_of("lp_search", "constraint", constraint, CONSTRAINTS)
        _check(*arguments, fixed_zero_point, code, eps, enabled)
        raise


def _check_error(
    counts: Tensor,
    edges: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    p: float,
) -> None:
    histograms = _check_histograms("lp_error", counts, edges, min_val, max_val)
    _check_grid("lp_error", counts, scale, zero_point, histograms, quant_min, quant_max, p)


def reference_error(
    counts: Tensor,
    edges: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    p: float = 2.0,
) -> Tensor:
    _check_error(counts, edges, min_val, max_val, scale, zero_point, quant_min, quant_max, p)
    scales, zeros = scale.reshape(-1).tolist(), zero_point.reshape(-1).tolist()
    errors = counts.new_zeros(len(scales), 3)
    for i, row, row_edges, low, high in _fed(counts, edges, min_val, max_val):
        s, zero = scales[i], int(zeros[i])
        if not (0 < s < math.inf and quant_min <= zero <= quant_max):
            errors[i] = math.nan
            continue
        sides = _sides(row, row_edges, low, high)
        sums = _error_sums(*sides, s, zero - quant_min, quant_max - zero, p)
        errors[i] = _float64(sums) / float(row.sum())
    return errors.reshape(*counts.shape[:-1], 3)


def _fake_error(counts: Tensor, *args: Any) -> Tensor:
    return counts.new_empty((*counts.shape[:-1], 3))


_op_error = define(
    "lp_error(Tensor counts, Tensor edges, Tensor min_val, Tensor max_val, Tensor scale, "
    "Tensor zero_point, int quant_min, int quant_max, float p=2.0) -> Tensor",
    _check_error,
    reference_error,
    _fake_error,
)


def lp_error(
    counts: Tensor,
    edges: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    p: float = 2.0,
) -> Tensor:
    """The mean L_p error of quantizing histograms with given scales and zero points.

    Args:
        All as for :func:`lp_search`, but ``scale`` and ``zero_point`` are read.

    Returns:
        float64 ``(..., 3)``: by clipping, by rounding, and the mean of ``|x|^p``. NaN where the
        scale is not positive and finite or the zero point is off the grid; 0 for no values.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came.
    """
    arguments = counts, edges, min_val, max_val, scale, zero_point, quant_min, quant_max, p
    try:
        return _op_error(*arguments)
    except (RuntimeError, OverflowError):
        _check_error(*arguments)
        raise

"""``histogram``: linear bins over the range seen so far, updated in place as the range grows."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _checks
from ._float32 import to_float32
from ._library import define, eager_call, note_update, without_defaults
from .minmax import finite_minmax

COMBINES = ("midpoint", "aligned")
MIDPOINT, ALIGNED = range(2)
_COMBINE_CODES = {name: code for code, name in enumerate(COMBINES)}
UPSAMPLE_RATE = {"midpoint": 16, "aligned": 128}
# up to so many values the counts are computed in float32, for the very numbers of torch.ao
_FLOAT32_COUNTS = 2**24
_FLOAT_MAX = torch.finfo(torch.float32).max


def _check_histogram(
    op: str, prefix: str, counts: Tensor, min_val: Tensor, max_val: Tensor
) -> None:
    _checks.check_state(op, f"{prefix}counts", counts, (torch.float64,))
    if counts.dim() != 1 or counts.numel() < 2:
        raise ValueError(
            f"{op}: {prefix}counts: expected a 1-d tensor of at least 2 bins, "
            f"got shape {tuple(counts.shape)}"
        )
    _checks.check_state(op, f"{prefix}min_val", min_val, (torch.float32,), 1)
    _checks.check_state(op, f"{prefix}max_val", max_val, (torch.float32,), 1)


def check_upsample_rate(op: str, upsample_rate: int) -> None:
    if not 1 <= upsample_rate <= 65536:
        raise ValueError(
            f"{op}: upsample_rate: expected a value in [1, 65536], got {upsample_rate}"
        )


def _check(
    x: Tensor,
    counts: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    combine: int,
    upsample_rate: int,
    nonfinite: int,
    enabled: Tensor | None,
) -> None:
    op = "histogram"
    _checks.check_input(op, "x", x)
    _check_histogram(op, "", counts, min_val, max_val)
    _checks.check_state(op, "nonfinite_count", nonfinite_count, (torch.int64,), 1)
    _checks.check_code(op, "combine", combine, COMBINES)
    check_upsample_rate(op, upsample_rate)
    _checks.check_code(op, "nonfinite", nonfinite, _checks.NONFINITE)
    _checks.check_enabled(op, enabled)
    others = {"counts": counts, "min_val": min_val, "max_val": max_val}
    _checks.check_same_device(
        op, x, {**others, "nonfinite_count": nonfinite_count, "enabled": enabled}
    )


def _bin(x: Tensor, low: float, high: float, bins: int) -> Tensor:
    """How many of the finite values x fall into each bin of [low, high], as ``torch.histc`` counts.

    Where ``low == high`` the bins span [low - 1, high + 1], as there.
    """
    left, right = (to_float32(low - 1), to_float32(high + 1)) if low == high else (low, high)
    width = to_float32(right - left)
    if width == 0:  # a constant so large that adding one does not change it
        index = torch.full(x.shape, bins // 2, device=x.device)
    else:
        # float32 arithmetic; float64 where the product would leave it
        wide = abs(to_float32(width * bins)) == float("inf")
        values = x.double() if wide else x
        scale = torch.tensor(right - left if wide else width, dtype=values.dtype, device=x.device)
        index = ((values - left) * bins / scale).to(torch.int64).clamp_(0, bins - 1)
    return torch.bincount(index, minlength=bins)


def _linspace(low: float, high: float, steps: int, device: torch.device) -> Tensor:
    """``torch.linspace(low, high, steps)`` in float32, also of a width that float32 does not hold.

    The product and the sum are one rounding there (a fused multiply-add), hence float64 here.
    """
    step = to_float32(to_float32(high - low) / (steps - 1))
    if step == float("inf"):
        step = (high - low) / (steps - 1)
    index = torch.arange(steps, device=device, dtype=torch.float64)
    forward = low + step * index
    backward = high - step * (steps - 1 - index)
    return torch.where(index < steps // 2, forward, backward).float()


def _rebin_midpoint(
    counts: Tensor, low: float, high: float, new_low: float, new_high: float, upsample_rate: int
) -> Tensor:
    """Each bin is cut into equal parts, and each part goes to the bin its midpoint falls into."""
    bins = counts.numel()
    fine = bins * upsample_rate
    part_width = to_float32(to_float32(high - low) / fine)
    if part_width == float("inf"):
        part_width = to_float32(high / fine - low / fine)
    half = to_float32(0.5 * part_width)
    midpoints = _linspace(low, high, fine + 1, counts.device)[:-1] + half
    edges = _linspace(new_low, new_high, bins + 1, counts.device)
    index = (torch.bucketize(midpoints, edges, right=True) - 1).clamp_(0, bins - 1)
    parts = counts.repeat_interleave(upsample_rate) / upsample_rate
    return torch.bincount(index, weights=parts, minlength=bins)


def _rebin_aligned(
    counts: Tensor, low: float, high: float, new_low: float, new_high: float, upsample_rate: int
) -> tuple[Tensor, float]:
    """Old and new bins lie on one grid of parts, of which a new bin takes so many in a row.

    The cumulative count at any part is linear within its bin, so it is read off the bins' own
    cumulative counts: O(bins), however far the two ranges lie apart. Returns the counts and the
    new maximum, relaxed to the grid.
    """
    bins = counts.numel()
    part = (high - low) / (bins * upsample_rate)
    parts_per_bin = math.ceil((new_high - new_low) / (bins * part))
    relaxed = to_float32(min(new_low + parts_per_bin * (bins * part), _FLOAT_MAX))
    offset = float(round((low - new_low) / part))
    index = torch.arange(bins + 1, device=counts.device, dtype=torch.float64)
    position = (index * float(parts_per_bin) - offset).clamp(0, bins * upsample_rate)
    position[-1] = bins * upsample_rate
    whole = (position / upsample_rate).floor().clamp(max=bins - 1)
    old = counts.double()
    before = torch.cat([old.new_zeros(1), old.cumsum(0)])
    bin_of = whole.to(torch.int64)
    within = (position - whole * upsample_rate) / upsample_rate
    return (before[bin_of] + old[bin_of] * within).diff(), max(relaxed, new_high)


def _rebin(
    counts: Tensor,
    old: tuple[float, float],
    new: tuple[float, float],
    combine: int,
    upsample_rate: int,
) -> tuple[Tensor, float]:
    """The counts over the range ``old`` carried to ``new``: (counts, final maximum)."""
    if old == new:
        return counts, new[1]
    if old[0] == old[1]:
        value = torch.tensor([old[0]], device=counts.device)
        return _bin(value, *new, counts.numel()) * counts.double().sum(), new[1]
    if combine == MIDPOINT:
        return _rebin_midpoint(counts, *old, *new, upsample_rate), new[1]
    return _rebin_aligned(counts, *old, *new, upsample_rate)


def _working(counts: Tensor, added: float) -> Tensor:
    """The counts in the type to compute in: float32 as torch does, while that holds them."""
    return counts.float() if float(counts.sum()) + added <= _FLOAT32_COUNTS else counts


def reference(
    x: Tensor,
    counts: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    combine: int = MIDPOINT,
    upsample_rate: int = 16,
    nonfinite: int = _checks.IGNORE,
    enabled: Tensor | None = None,
) -> None:
    _check(x, counts, min_val, max_val, nonfinite_count, combine, upsample_rate, nonfinite, enabled)
    if x.numel() == 0 or (enabled is not None and not bool(enabled)):
        return
    x = x.detach().to(torch.float32).reshape(-1)
    low, high, nonfinite_seen = finite_minmax(x, None, nonfinite, "histogram")
    old = float(min_val), float(max_val)
    first = old[0] == float("inf") or old[1] == float("-inf")
    new_min, new_max = torch.minimum(min_val, low), torch.maximum(max_val, high)
    new = float(new_min), float(new_max)
    # no histogram over a range that is empty or, with "propagate", not finite
    if math.isfinite(new[0]) and math.isfinite(new[1]):
        finite = x if int(nonfinite_seen) == 0 else x[x.isfinite()]
        if first:
            counts.copy_(_bin(finite, *new, counts.numel()))
        else:
            working = _working(counts, finite.numel())
            carried, high_end = _rebin(working, old, new, combine, upsample_rate)
            fresh = _bin(finite, new[0], high_end, counts.numel())
            counts.copy_((carried + fresh).to(working.dtype))
            new_max.fill_(high_end)
    min_val.copy_(new_min)
    max_val.copy_(new_max)
    nonfinite_count.add_(nonfinite_seen)


_op = define(
    "histogram(Tensor x, Tensor(a!) counts, Tensor(b!) min_val, Tensor(c!) max_val, "
    "Tensor(d!) nonfinite_count, int combine=0, int upsample_rate=16, int nonfinite=0, "
    "Tensor? enabled=None) -> ()",
    _check,
    reference,
)


_eager = eager_call(_op)


@lru_cache(maxsize=128, typed=True)
def _settings(combine: str, upsample_rate: int, nonfinite: str) -> Any:
    given = _COMBINE_CODES[combine], upsample_rate, _checks.NONFINITE_CODES[nonfinite]
    return without_defaults(given, (MIDPOINT, 16, _checks.IGNORE))


def histogram(
    x: Tensor,
    counts: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    combine: str = "midpoint",
    upsample_rate: int | None = None,
    nonfinite: str = "ignore",
    enabled: Tensor | None = None,
) -> None:
    """Add the values of ``x`` to a histogram, whose range grows to hold them, in place.

    The bins divide [min_val, max_val] equally; the bin of a value is that of ``torch.histc``, in
    float32. When the range grows, the counts so far are carried to the new bins.

    Args:
        x: what to observe: any shape and strides; float32, float64, float16 or bfloat16, taken
            as float32. An empty tensor changes nothing.
        counts: float64 ``(bins,)``, at least 2 bins. While they sum to at most 2^24 they are
            computed in float32, as torch does; beyond, where that would stop counting, in float64.
        min_val, max_val: float32, one element each; +inf and -inf before the first batch.
        nonfinite_count: int64, one element: the NaN and infinite values seen are added to it.
        combine: how counts are carried to a wider range. ``"midpoint"`` (torch 2.13): each bin is
            cut into ``upsample_rate`` equal parts, and each part goes where its midpoint falls.
            ``"aligned"`` (torch up to 2.3): old and new bins lie on one grid of such parts, the
            maximum is relaxed to it, and a bin takes whole parts; in O(bins) here. The op has
            them as 0 and 1.
        upsample_rate: parts of a bin, in [1, 65536]; None: 16 for midpoint, 128 for aligned.
        nonfinite: as for :func:`minmax`; with ``"propagate"`` a range that is no longer finite
            keeps its counts as they were.
        enabled: one element read where the data is; 0 changes nothing.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came.

    Source: ``HistogramObserver.forward`` of torch 2.13, and of torch 1.13 for ``"aligned"``.
    """
    if upsample_rate is None:
        upsample_rate = UPSAMPLE_RATE.get(combine, 16)
    try:
        if is_compiling():
            _op(
                x, counts, min_val, max_val, nonfinite_count, _COMBINE_CODES[combine],
                upsample_rate, _checks.NONFINITE_CODES[nonfinite], enabled,
            )  # fmt: skip
            return
        if enabled is None:
            settings = _settings(combine, upsample_rate, nonfinite)
            _eager(x, counts, min_val, max_val, nonfinite_count, *settings)
        else:
            _eager(
                x, counts, min_val, max_val, nonfinite_count, _COMBINE_CODES[combine],
                upsample_rate, _checks.NONFINITE_CODES[nonfinite], enabled,
            )  # fmt: skip
        note_update(counts, min_val, max_val, nonfinite_count)
    except (RuntimeError, OverflowError, KeyError, TypeError):
        op = "histogram"
        code = _checks.code_of(op, "nonfinite", nonfinite, _checks.NONFINITE)
        _check(
            x, counts, min_val, max_val, nonfinite_count,
            _checks.code_of(op, "combine", combine, COMBINES), upsample_rate, code, enabled,
        )  # fmt: skip
        if code == _checks.RAISE:
            finite_minmax(x.detach().float(), None, code, op)
        raise


def _check_histogram_combine(
    counts: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    other_counts: Tensor,
    other_min_val: Tensor,
    other_max_val: Tensor,
    combine: int,
    upsample_rate: int,
) -> None:
    op = "histogram_combine"
    _check_histogram(op, "", counts, min_val, max_val)
    _check_histogram(op, "other_", other_counts, other_min_val, other_max_val)
    if other_counts.numel() != counts.numel():
        raise ValueError(
            f"{op}: other_counts: expected {counts.numel()} bins, got {other_counts.numel()}"
        )
    others = {"min_val": min_val, "max_val": max_val, "other_counts": other_counts}
    _checks.check_same_device(
        op, counts, {**others, "other_min_val": other_min_val, "other_max_val": other_max_val}
    )
    _checks.check_code(op, "combine", combine, COMBINES)
    check_upsample_rate(op, upsample_rate)


def reference_combine(
    counts: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    other_counts: Tensor,
    other_min_val: Tensor,
    other_max_val: Tensor,
    combine: int = MIDPOINT,
    upsample_rate: int = 16,
) -> None:
    _check_histogram_combine(
        counts, min_val, max_val, other_counts, other_min_val, other_max_val, combine, upsample_rate
    )
    other = float(other_min_val), float(other_max_val)
    if other[0] > other[1]:
        return
    old = float(min_val), float(max_val)
    new_min = torch.minimum(min_val.reshape(()), other_min_val.reshape(()))
    new_max = torch.maximum(max_val.reshape(()), other_max_val.reshape(()))
    new = float(new_min), float(new_max)
    if not (math.isfinite(new[0]) and math.isfinite(new[1])):  # the counts stay as they were
        min_val.copy_(new_min.reshape(min_val.shape))
        max_val.copy_(new_max.reshape(max_val.shape))
        return
    working = _working(counts, float(other_counts.sum()))
    carried = torch.zeros_like(working)
    high = new[1]
    if old[0] <= old[1]:
        carried, high = _rebin(working, old, new, combine, upsample_rate)
    # the first has settled the range; the other follows by its midpoints
    added = other_counts.to(working.dtype)
    added, _ = _rebin(added, other, (new[0], high), MIDPOINT, upsample_rate)
    counts.copy_((carried + added).to(working.dtype))
    min_val.fill_(new[0])
    max_val.fill_(high)


_op_combine = define(
    "histogram_combine(Tensor(a!) counts, Tensor(b!) min_val, Tensor(c!) max_val, "
    "Tensor other_counts, Tensor other_min_val, Tensor other_max_val, "
    "int combine=0, int upsample_rate=16) -> ()",
    _check_histogram_combine,
    reference_combine,
)


def histogram_combine(
    counts: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    other_counts: Tensor,
    other_min_val: Tensor,
    other_max_val: Tensor,
    combine: str = "midpoint",
    upsample_rate: int | None = None,
) -> None:
    """Add a second histogram to the first, in place, over the union of the two ranges.

    Args:
        counts, min_val, max_val: the histogram that is updated, as for :func:`histogram`.
        other_counts, other_min_val, other_max_val: the one that is added: as many bins.
            Where the union is not finite the counts stay as they were.
        combine, upsample_rate: as for :func:`histogram`; with ``"aligned"`` the first is carried
            on the common grid, and the second by its midpoints into the range so found.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came.

    Source: ``HistogramObserver._combine_histograms`` of torch 2.13 and 1.13.
    """
    if upsample_rate is None:
        upsample_rate = UPSAMPLE_RATE.get(combine, 16)
    histograms = counts, min_val, max_val, other_counts, other_min_val, other_max_val
    try:
        _op_combine(*histograms, _COMBINE_CODES[combine], upsample_rate)
        if not is_compiling():
            note_update(counts, min_val, max_val)
    except (RuntimeError, OverflowError, KeyError, TypeError):
        code = _checks.code_of("histogram_combine", "combine", combine, COMBINES)
        _check_histogram_combine(*histograms, code, upsample_rate)
        raise

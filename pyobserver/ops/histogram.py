"""``histogram``: linear bins over the range seen so far, updated in place as the range grows."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ._library import define, no_fake_result
from .minmax import finite_minmax

COMBINES = ("midpoint", "aligned")
UPSAMPLE_RATE = {"midpoint": 16, "aligned": 128}
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


def _check_combine(op: str, combine: str, upsample_rate: int) -> None:
    _checks.check_choice(op, "combine", combine, COMBINES)
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
    combine: str,
    upsample_rate: int,
    nonfinite: str,
    enabled: Tensor | None,
) -> None:
    op = "histogram"
    _checks.check_input(op, "x", x)
    others = {"counts": counts, "min_val": min_val, "max_val": max_val}
    _checks.check_same_device(
        op, x, {**others, "nonfinite_count": nonfinite_count, "enabled": enabled}
    )
    _check_histogram(op, "", counts, min_val, max_val)
    _checks.check_state(op, "nonfinite_count", nonfinite_count, (torch.int64,), 1)
    _check_combine(op, combine, upsample_rate)
    _checks.check_choice(op, "nonfinite", nonfinite, _checks.NONFINITE)
    _checks.check_enabled(op, enabled)


def _bin_index(x: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    """The bin of each value of [low, high], with the float32 arithmetic of ``torch.histc``.

    Values that are not finite get ``bins``, one past the last. Where ``low == high`` the bins
    span [low - 1, high + 1], as in ``histc``.
    """
    single = low == high
    left, right = torch.where(single, low - 1, low), torch.where(single, high + 1, high)
    width = right - left
    position = (x - left) * bins / width
    # beyond float32 the same formula in float64
    wide = ~(width * bins <= _FLOAT_MAX)
    exact = (x.double() - left.double()) * bins / (right.double() - left.double())
    position = torch.where(wide, exact, position.double())
    # a constant so large that adding one does not change it
    position = torch.where(width == 0, float(bins // 2), position)
    index = position.nan_to_num(0.0, 0.0, 0.0).to(torch.int64).clamp(0, bins - 1)
    return torch.where(x.isfinite(), index, bins)


def _bin(x: Tensor, low: Tensor, high: Tensor, bins: int) -> Tensor:
    index = _bin_index(x.reshape(-1), low, high, bins)
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=x.device)
    counts.scatter_add_(0, index, torch.ones_like(index))
    return counts[:bins].to(torch.float64)


def _linspace(low: Tensor, high: Tensor, steps: int) -> Tensor:
    """``torch.linspace(low, high, steps)`` in float32, without reading the ends on the host.

    The product and sum are one rounding there (a fused multiply-add), hence float64 here.
    """
    low, high = low.float(), high.float()
    step = ((high - low) / (steps - 1)).double()
    step = torch.where(step.isinf(), (high.double() - low.double()) / (steps - 1), step)
    index = torch.arange(steps, device=low.device, dtype=torch.float64)
    forward = low.double() + step * index
    backward = high.double() - step * (steps - 1 - index)
    return torch.where(index < steps // 2, forward, backward).float()


def _rebin_midpoint(
    counts: Tensor, low: Tensor, high: Tensor, new_low: Tensor, new_high: Tensor, upsample_rate: int
) -> Tensor:
    """Each bin is cut into equal parts, and each part goes to the bin its midpoint falls into."""
    bins = counts.numel()
    fine = bins * upsample_rate
    parts = counts.repeat_interleave(upsample_rate, output_size=fine) / upsample_rate
    part_width = (high - low) / fine
    part_width = torch.where(
        part_width.isinf(), (high.double() / fine - low.double() / fine).float(), part_width
    )
    midpoints = _linspace(low, high, fine + 1)[:-1] + 0.5 * part_width
    edges = _linspace(new_low, new_high, bins + 1)
    index = (torch.bucketize(midpoints, edges, right=True) - 1).clamp(0, bins - 1)
    return torch.zeros_like(counts).scatter_add_(0, index, parts)


def _aligned_grid(
    low: Tensor, high: Tensor, new_low: Tensor, new_high: Tensor, bins: int, upsample_rate: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The common grid of an old and a new range: (relaxed new_high, parts a new bin, offset)."""
    part = (high.double() - low.double()) / (bins * upsample_rate)
    parts_per_bin = torch.ceil((new_high.double() - new_low.double()) / (bins * part))
    relaxed = new_low.double() + parts_per_bin * (bins * part)
    relaxed = torch.maximum(relaxed.clamp(max=_FLOAT_MAX).float(), new_high)
    offset = torch.round((low.double() - new_low.double()) / part)
    return relaxed, parts_per_bin, offset


def _rebin_aligned(
    counts: Tensor, parts_per_bin: Tensor, offset: Tensor, upsample_rate: int
) -> Tensor:
    """Each bin is cut into equal parts, and a new bin takes ``parts_per_bin`` parts in a row.

    The cumulative count at any part is linear within its bin, so it is read off the bins' own
    cumulative counts: O(bins), however far the two ranges lie apart.
    """
    bins = counts.numel()
    index = torch.arange(bins + 1, device=counts.device, dtype=torch.float64)
    part = (index * parts_per_bin - offset).clamp(0, bins * upsample_rate)
    part[-1] = bins * upsample_rate
    whole = (part / upsample_rate).floor().clamp(max=bins - 1)
    before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    position = whole.to(torch.int64)
    cumulative = before[position] + counts[position] * (
        (part - whole * upsample_rate) / upsample_rate
    )
    return cumulative.diff()


def _rebin(
    counts: Tensor,
    low: Tensor,
    high: Tensor,
    new_low: Tensor,
    new_high: Tensor,
    combine: str,
    upsample_rate: int,
) -> tuple[Tensor, Tensor]:
    """The counts over [low, high] carried to [new_low, new_high]: (counts, final new_high)."""
    bins = counts.numel()
    same = (low == new_low) & (high == new_high)
    single = low == high
    index = _bin_index(low.reshape(1), new_low, new_high, bins).clamp(max=bins - 1)
    spike = torch.zeros_like(counts).scatter_(0, index, counts.sum().reshape(1))
    if combine == "midpoint":
        spread = _rebin_midpoint(counts, low, high, new_low, new_high, upsample_rate)
    else:
        relaxed, parts_per_bin, offset = _aligned_grid(
            low, high, new_low, new_high, bins, upsample_rate
        )
        spread = _rebin_aligned(counts, parts_per_bin, offset, upsample_rate)
        new_high = torch.where(same | single, new_high, relaxed)
    return torch.where(same, counts, torch.where(single, spike, spread)), new_high


def reference(
    x: Tensor,
    counts: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    combine: str = "midpoint",
    upsample_rate: int = 16,
    nonfinite: str = "ignore",
    enabled: Tensor | None = None,
) -> None:
    _check(x, counts, min_val, max_val, nonfinite_count, combine, upsample_rate, nonfinite, enabled)
    if x.numel() == 0:
        return
    x = x.detach().to(torch.float32)
    low, high, nonfinite_seen = finite_minmax(x, None, nonfinite, "histogram")
    old_low, old_high = min_val.reshape(()), max_val.reshape(())
    first = (old_low == torch.inf) | (old_high == -torch.inf)
    new_low, new_high = torch.minimum(old_low, low), torch.maximum(old_high, high)
    # no histogram over a range that is empty or, with "propagate", not finite
    countable = new_low.isfinite() & new_high.isfinite()
    carry = countable & ~first
    zero = torch.zeros_like(old_low)
    carried, final_high = _rebin(
        counts,
        torch.where(carry, old_low, zero),
        torch.where(carry, old_high, zero),
        torch.where(carry, new_low, zero),
        torch.where(carry, new_high, zero),
        combine,
        upsample_rate,
    )
    new_high = torch.where(carry, final_high, new_high)
    fresh = _bin(
        x,
        torch.where(countable, new_low, zero),
        torch.where(countable, new_high, zero),
        counts.numel(),
    )
    new_counts = torch.where(countable, fresh + torch.where(first, 0.0, carried), counts)
    if enabled is not None:
        off = enabled.reshape(()) == 0
        new_counts = torch.where(off, counts, new_counts)
        new_low, new_high = torch.where(off, old_low, new_low), torch.where(off, old_high, new_high)
        nonfinite_seen = nonfinite_seen.masked_fill(off, 0)
    counts.copy_(new_counts)
    min_val.copy_(new_low.reshape(min_val.shape))
    max_val.copy_(new_high.reshape(max_val.shape))
    nonfinite_count.add_(nonfinite_seen)


_op = define(
    "histogram(Tensor x, Tensor(a!) counts, Tensor(b!) min_val, Tensor(c!) max_val, "
    "Tensor(d!) nonfinite_count, str combine='midpoint', int upsample_rate=16, "
    "str nonfinite='ignore', Tensor? enabled=None) -> ()",
    reference,
    no_fake_result,
)


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
        counts: float64 ``(bins,)``, at least 2 bins. (Exact to 2^53, where float32 stops at 2^24.)
        min_val, max_val: float32, one element each; +inf and -inf before the first batch.
        nonfinite_count: int64, one element: the NaN and infinite values seen are added to it.
        combine: how counts are carried to a wider range. ``"midpoint"`` (torch 2.13): each bin is
            cut into ``upsample_rate`` equal parts, and each part goes where its midpoint falls.
            ``"aligned"`` (torch up to 2.3): old and new bins lie on one grid of such parts, the
            maximum is relaxed to it, and a bin takes whole parts; in O(bins) here.
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
    args = (
        x, counts, min_val, max_val, nonfinite_count,
        combine, upsample_rate, nonfinite, enabled,
    )  # fmt: skip
    try:
        _op(*args)
    except RuntimeError:
        _check(*args)
        if nonfinite == "raise":
            finite_minmax(x.detach().float(), None, nonfinite, "histogram")
        raise


def _check_histogram_combine(
    counts: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    other_counts: Tensor,
    other_min_val: Tensor,
    other_max_val: Tensor,
    combine: str,
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
    _check_combine(op, combine, upsample_rate)


def reference_combine(
    counts: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    other_counts: Tensor,
    other_min_val: Tensor,
    other_max_val: Tensor,
    combine: str = "midpoint",
    upsample_rate: int = 16,
) -> None:
    _check_histogram_combine(
        counts, min_val, max_val, other_counts, other_min_val, other_max_val, combine, upsample_rate
    )
    low, high = min_val.reshape(()), max_val.reshape(())
    other_low, other_high = other_min_val.reshape(()), other_max_val.reshape(())
    empty, other_empty = low > high, other_low > other_high
    # an empty side takes the other's range, so that what is carried is itself, or nothing
    low, high = torch.where(empty, other_low, low), torch.where(empty, other_high, high)
    other_low = torch.where(other_empty, low, other_low)
    other_high = torch.where(other_empty, high, other_high)
    new_low, new_high = torch.minimum(low, other_low), torch.maximum(high, other_high)
    carried, new_high = _rebin(counts, low, high, new_low, new_high, combine, upsample_rate)
    # the other side fits into the range that the first has settled; midpoints move nothing twice
    other, _ = _rebin(
        other_counts, other_low, other_high, new_low, new_high, "midpoint", upsample_rate
    )
    none = empty & other_empty
    total = torch.where(empty, 0.0, carried) + torch.where(other_empty, 0.0, other)
    counts.copy_(torch.where(none, counts, total))
    min_val.copy_(torch.where(none, min_val.reshape(()), new_low).reshape(min_val.shape))
    max_val.copy_(torch.where(none, max_val.reshape(()), new_high).reshape(max_val.shape))


_op_combine = define(
    "histogram_combine(Tensor(a!) counts, Tensor(b!) min_val, Tensor(c!) max_val, "
    "Tensor other_counts, Tensor other_min_val, Tensor other_max_val, "
    "str combine='midpoint', int upsample_rate=16) -> ()",
    reference_combine,
    no_fake_result,
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
        combine, upsample_rate: as for :func:`histogram`; with ``"aligned"`` the first is carried
            on the common grid, and the second by its midpoints into the range so found.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came.

    Source: ``HistogramObserver._combine_histograms`` of torch 2.13 and 1.13.
    """
    if upsample_rate is None:
        upsample_rate = UPSAMPLE_RATE.get(combine, 16)
    args = (
        counts, min_val, max_val, other_counts, other_min_val, other_max_val,
        combine, upsample_rate,
    )  # fmt: skip
    try:
        _op_combine(*args)
    except RuntimeError:
        _check_histogram_combine(*args)
        raise

"""``range_search``: the greedy L2 search for the range that quantizes a histogram best."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from functools import lru_cache
from itertools import accumulate, repeat
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ._library import define

_STEP = 1e-5  # of the quantiles that the search moves by
# above, torch would sum in an order that depends on its threads
_MOST_BINS_FOR_FLOAT32_SUM = 16384


def _check(
    counts: Tensor, min_val: Tensor, max_val: Tensor, num_levels: int, enabled: Tensor | None
) -> None:
    op = "range_search"
    _checks.check_state(op, "counts", counts, (torch.float64,))
    if counts.dim() == 0 or counts.shape[-1] < 2:
        raise ValueError(
            f"{op}: counts: expected shape (..., bins) with at least 2 bins, "
            f"got {tuple(counts.shape)}"
        )
    histograms = counts.numel() // counts.shape[-1]
    _checks.check_state(op, "min_val", min_val, (torch.float32,), histograms)
    _checks.check_state(op, "max_val", max_val, (torch.float32,), histograms)
    _checks.check_enabled(op, enabled)
    _checks.check_same_device(
        op, counts, {"min_val": min_val, "max_val": max_val, "enabled": enabled}
    )
    if num_levels < 2:
        raise ValueError(f"{op}: num_levels: expected at least 2, got {num_levels}")


def _error(density: Tensor, bin_width: float, start: int, end: int, num_levels: int) -> float:
    """The squared error of quantizing all bins with the levels laid over bins start..end.

    Values spread evenly over their bin; each goes to the centre of its level, those outside to
    the first or last. In float32 element by element, as torch does it, and summed in float64.
    """
    level_width = bin_width * (end - start + 1) / num_levels
    half = torch.tensor(level_width / 2, dtype=torch.float32, device="cpu")
    begin = (
        torch.arange(-start, density.numel() - start, dtype=torch.float32, device="cpu") * bin_width
    )
    finish = begin + bin_width
    first = torch.div(begin, level_width, rounding_mode="floor").clamp(0, num_levels - 1)
    last = torch.div(finish, level_width, rounding_mode="floor").clamp(0, num_levels - 1)

    def norm(low: Tensor, high: Tensor) -> Tensor:
        return density * ((high * high * high - low * low * low) / 3)

    total = norm(begin - (first + 0.5) * level_width, half)
    total = total + (last - first - 1) * norm(-half, half)
    total = total + norm(-half, finish - (last * level_width + level_width / 2))
    return float(total.double().sum())


@lru_cache(maxsize=128, typed=True)
def _upper_quantiles() -> array[float]:
    """What 1 is after each step down, as steps taken one by one round it; the last is below 0."""
    return array("d", accumulate(repeat(-_STEP, round(1 / _STEP) + 1), initial=1.0))


def _search(counts: Tensor, low: float, high: float, num_levels: int) -> tuple[int, int]:
    """The first and the last bin that the search keeps."""
    bins = counts.numel()
    # scaling by a power of two changes no decision, and keeps the cubes inside float32
    width = (high - low) / bins
    bin_width = math.frexp(width)[0]
    narrow = counts.float()
    density = narrow / bin_width
    cumulative = narrow.cumsum(0).tolist()
    total = float((narrow if bins <= _MOST_BINS_FOR_FLOAT32_SUM else counts).sum())
    one = torch.zeros((), dtype=torch.float32, device="cpu")

    def quantile(share: float) -> float:  # compared as float32, as in torch
        return one.fill_(share * total).item()

    def passed(beta: float) -> bool:
        return cumulative[end] > quantile(beta)

    betas = _upper_quantiles()
    start = left = 0
    end = right = bins - 1
    alpha, step = 0.0, 0
    best = float("inf")
    while alpha < betas[step]:
        lower, upper = quantile(alpha + _STEP), quantile(betas[step + 1])
        # both move inward only, so they go on from where they were
        left, right = min(left, end), max(right, start)
        while left < end and cumulative[left] < lower:
            left += 1
        while right > start and cumulative[right] > upper:
            right -= 1
        next_start, next_end = start, end
        if left - start > end - right:
            next_start, alpha = left, alpha + _STEP
        else:
            next_end, step = right, step + 1
        if (next_start, next_end) == (start, end):
            if start == end:
                break
            # alpha stays until a step moves the end; where it passes alpha first, all ends anyway
            step = bisect_left(betas, True, lo=step + 1, key=passed) - 1
            continue
        error = _error(density, bin_width, next_start, next_end, num_levels)
        if error > best:
            break
        best, start, end = error, next_start, next_end
    return start, end


def reference(
    counts: Tensor, min_val: Tensor, max_val: Tensor, num_levels: int, enabled: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check(counts, min_val, max_val, num_levels, enabled)
    if enabled is not None and int(enabled) == 0:
        return min_val.clone(), max_val.clone()
    bins = counts.shape[-1]
    lows, highs = min_val.detach().cpu().reshape(-1), max_val.detach().cpu().reshape(-1)
    starts, ends = torch.zeros_like(lows), torch.full_like(highs, bins)
    searched = torch.zeros(lows.shape, dtype=torch.bool, device="cpu")
    for i, histogram in enumerate(counts.detach().cpu().reshape(-1, bins)):
        low, high = float(lows[i]), float(highs[i])
        if (
            abs(low) < float("inf")
            and abs(high) < float("inf")
            and low < high
            and histogram.sum() > 0
        ):
            start, end = _search(histogram, low, high, num_levels)
            starts[i], ends[i], searched[i] = start, end + 1, True
    width = (highs - lows) / bins
    new_min, new_max = lows + width * starts, lows + width * ends
    # a width above the greatest float32
    wide = (highs.double() - lows.double()) / bins
    new_min = torch.where(width.isinf(), (lows.double() + wide * starts).float(), new_min)
    new_max = torch.where(width.isinf(), (lows.double() + wide * ends).float(), new_max)
    new_min = torch.where(searched, new_min, lows).reshape(min_val.shape)
    new_max = torch.where(searched, new_max, highs).reshape(max_val.shape)
    return new_min.to(min_val.device), new_max.to(max_val.device)


def _fake(counts: Tensor, min_val: Tensor, max_val: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(min_val), torch.empty_like(max_val)


_op = define(
    "range_search(Tensor counts, Tensor min_val, Tensor max_val, int num_levels, "
    "Tensor? enabled=None) -> (Tensor, Tensor)",
    _check,
    reference,
    _fake,
)


def range_search(
    counts: Tensor, min_val: Tensor, max_val: Tensor, num_levels: int, enabled: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The range of a histogram whose quantization to ``num_levels`` errs least, found greedily.

    From both ends the range is drawn in by quantiles of 1e-5, the end with the larger step in
    bins first, until the squared error grows for the first time.

    Args:
        counts: float64 ``(..., bins)``: one histogram, or many.
        min_val, max_val: float32, one element for each histogram: the ends of its bins.
        num_levels: levels of the quantized type, at least 2 (256 for 8 bits).
        enabled: one element (uint8, int64 or bool); 0 searches nothing and keeps the range.

    Returns:
        The chosen minimum and maximum, float32, shaped as ``min_val``. A histogram that is empty,
        has one value or a range that is not finite keeps its range.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came.

    Source: ``HistogramObserver._non_linear_param_search`` of torch 2.13, after caffe2's
    ``NormMinimization::NonlinearQuantizationParamsSearch``. Ranges so large or small that the
    cubes leave float32 are searched all the same.
    """
    try:
        return _op(counts, min_val, max_val, num_levels, enabled)
    except (RuntimeError, OverflowError):
        _check(counts, min_val, max_val, num_levels, enabled)
        raise

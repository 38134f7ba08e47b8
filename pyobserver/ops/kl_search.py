"""``kl_search``: the part of a histogram that its quantization tells most about."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ._library import define

_LN2 = 0.6931471805599453
_ROOT_OF_HALF = 0.7071067811865476
_ENTROPY_UNIT = 2.0**-58  # the entropies of 2^30 bins are below 2^5
_EQUAL_DIVERGENCE = 2.0**-44  # more than the errors of rounding, less than what samples tell
_CHUNK = 1 << 14  # levels looked at together: so few that torch takes no threads, which wait


def _check(
    counts: Tensor, num_levels: int, start_bin: int, stride: int, enabled: Tensor | None
) -> None:
    op = "kl_search"
    _checks.check_state(op, "counts", counts, (torch.float64,))
    if counts.dim() == 0 or counts.shape[-1] < 2:
        raise ValueError(
            f"{op}: counts: expected shape (..., bins) with at least 2 bins, "
            f"got {tuple(counts.shape)}"
        )
    _checks.check_enabled(op, enabled)
    _checks.check_same_device(op, counts, {"enabled": enabled})
    if num_levels < 2:
        raise ValueError(f"{op}: num_levels: expected at least 2, got {num_levels}")
    if start_bin < 1:
        raise ValueError(f"{op}: start_bin: expected at least 1, got {start_bin}")
    if stride < 1:
        raise ValueError(f"{op}: stride: expected at least 1, got {stride}")


def _log(x: Tensor) -> Tensor:
    """The logarithm in nothing but + - * /, so that every backend has the same bits.

    By the exponent, and the series of atanh for a mantissa in [sqrt(1/2), sqrt(2)).
    """
    mantissa, exponent = torch.frexp(x)
    small = mantissa < _ROOT_OF_HALF
    mantissa = torch.where(small, mantissa + mantissa, mantissa)
    s = (mantissa - 1) / (mantissa + 1)
    z = s * s
    series = torch.full_like(z, 2 / 21)
    for n in range(19, 0, -2):
        series = series * z + 2 / n
    return (exponent - small.int()).double() * _LN2 + s * series


def _integers(counts: Tensor) -> Tensor | None:
    """The counts in a unit that keeps their sum below 2^62; one at least where there is any.

    The first bin has the counts of the second. None for a histogram that is empty or not finite.
    """
    counts = torch.where(counts > 0, counts, 0.0)
    counts[0] = counts[1]
    most = counts.max()
    if not 0 < float(most) < float("inf"):
        return None
    shift = 62 - int(torch.frexp(most).exponent) - (counts.numel() - 1).bit_length()
    half = shift >> 1  # 2^shift alone may be no float64
    scaled = (counts * 2.0**half * 2.0 ** (shift - half)).round().long()
    return torch.maximum(scaled, (counts > 0).long())


def _before(values: Tensor) -> Tensor:
    """The sum of the values before each, and of all."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def _divergences(counts: Tensor, kept: Tensor, levels: int) -> Tensor:
    """The divergence of keeping so many bins, for each element of kept, times the total.

    The sums over bins are sums of integers, which have no order; the levels are added in theirs.
    """
    before = _before(counts)
    total = int(before[-1])
    unit = 2.0 ** -total.bit_length()
    shares = counts.double() * unit
    entropies = (shares * -_log(shares) * (1 / _ENTROPY_UNIT)).round().long()
    occupied_before, entropy_before = _before((counts > 0).long()), _before(entropies)

    # the bins of linspace(0, kept, levels + 1); with more levels than bins each bin has its own
    step = kept.double() / kept.clamp(max=levels)
    points = torch.arange(levels + 1, dtype=torch.float64, device="cpu")[:, None] * step
    edges = points.long()
    # rounded up; neither ceil nor indexing, which wait for threads at any size
    edges = torch.minimum(edges + (edges < points), kept)
    edges[-1] = kept
    in_level = before.take(edges).diff(dim=0).double() * unit
    occupied = occupied_before.take(edges).diff(dim=0).double()
    entropy = entropy_before.take(edges).diff(dim=0).double() * _ENTROPY_UNIT
    mean = in_level / occupied.clamp(min=1)
    lost = (-(in_level * _log(mean)) - entropy).clamp(min=0)
    within = torch.where(occupied > 1, lost, 0.0).cumsum(0)[-1]

    dropped = total - before[kept]
    last = counts[kept - 1]
    moved, raised = dropped.double() * unit, (last + dropped).double() * unit
    last_entropy = entropies[kept - 1].double() * _ENTROPY_UNIT
    last_mean = torch.where(kept < levels, last.double() * unit, mean[-1])
    at_end = raised * _log(raised) + last_entropy - moved * _log(last_mean)
    whole = float(total) * unit
    clipped = within + at_end + whole * _log(before[kept].double() * unit / whole)
    clipped = torch.where(last > 0, clipped, float("inf"))
    return torch.where(dropped > 0, clipped, within)


def _search(counts: Tensor, num_levels: int, start_bin: int, stride: int) -> int:
    """How many bins of one histogram to keep."""
    bins = counts.numel()
    integers = _integers(counts)
    if integers is None:
        return bins
    levels = min(num_levels, bins)
    kept = torch.arange(min(start_bin, bins), bins + 1, min(stride, bins), device="cpu")
    parts = kept.split(max(1, _CHUNK // levels))
    divergences = torch.cat([_divergences(integers, part, levels) for part in parts])
    equal = divergences <= divergences.min() + _EQUAL_DIVERGENCE
    return int(kept[equal][-1])


def reference(
    counts: Tensor,
    num_levels: int,
    start_bin: int = 128,
    stride: int = 1,
    enabled: Tensor | None = None,
) -> Tensor:
    _check(counts, num_levels, start_bin, stride, enabled)
    bins = counts.shape[-1]
    result = torch.full(counts.shape[:-1], bins, dtype=torch.int64, device="cpu")
    if enabled is None or int(enabled) != 0:
        flat = result.view(-1)
        for i, histogram in enumerate(counts.detach().cpu().reshape(-1, bins)):
            flat[i] = _search(histogram, num_levels, start_bin, stride)
    return result.to(counts.device)


def _fake(
    counts: Tensor, num_levels: int, start_bin: int, stride: int, enabled: Tensor | None
) -> Tensor:
    return counts.new_empty(counts.shape[:-1], dtype=torch.int64)


_op = define(
    "kl_search(Tensor counts, int num_levels, int start_bin=128, int stride=1, "
    "Tensor? enabled=None) -> Tensor",
    _check,
    reference,
    _fake,
)


def kl_search(
    counts: Tensor,
    num_levels: int,
    start_bin: int = 128,
    stride: int = 1,
    enabled: Tensor | None = None,
) -> Tensor:
    """How many of the first bins of a histogram of ``|x|`` to keep: entropy calibration.

    Each candidate range is ``[0, amax * kept / bins]``, with the levels laid evenly over it. What
    it clips counts in its last bin, and what is quantized is taken as spread evenly over the bins
    of its level that hold any. The range whose distribution so quantized diverges least
    (Kullback-Leibler) from the clipped one is chosen; of equal ones the greatest.

    The first bin is taken to hold as many as the second: zeros are exact on every grid.

    Args:
        counts: float64 ``(..., bins)``: one histogram over ``[0, amax]``, or many. Fractions are
            welcome; what is not positive counts as 0.
        num_levels: levels for ``[0, amax]``, at least 2: 128 for int8, 256 for uint8.
        start_bin: the fewest bins to keep, at least 1; at most all are.
        stride: what the candidates lie apart, at least 1.
        enabled: one element (uint8, int64 or bool); 0 searches nothing and keeps all bins.

    Returns:
        int64 ``(...)``: the bins to keep. A histogram with nothing but its first bin, or with an
        infinite count, keeps all.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came.

    Source: ``_compute_amax_entropy`` of NVIDIA's pytorch-quantization, after TensorRT; candidates
    and choice are the same, but for divergences within 2^-44 of the least, which are equal here,
    and a range that keeps no value at all, which is never chosen here.
    """
    try:
        return _op(counts, num_levels, start_bin, stride, enabled)
    except (RuntimeError, OverflowError):
        _check(counts, num_levels, start_bin, stride, enabled)
        raise

"""Scales from stored statistics: collect once, solve for any method, width and scheme.

A :class:`Histogram` is what an observer has collected; :func:`solve` asks a method for the scale
and zero point of a :class:`Grid`, and says what error to expect.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _checks
from .ops.choose_qparams import choose_qparams
from .ops.kl_search import kl_search
from .ops.log_histogram import log_edges, mantissa_bits_of
from .ops.lp_search import CONSTRAINTS, MOST_P, lp_error, lp_search
from .ops.range_search import range_search

_TINY = torch.finfo(torch.float32).tiny
_HALF_MAX, _HALF_MIN = 65504.0, 2.0**-24
LEAST_BITS, MOST_BITS = 2, 16
_FINEST = 2**24  # on a grid of more integers than float32 has in a row nothing is clipped sooner


def _part_of(x: Tensor, parts: int) -> Tensor:
    """``x / parts``, the same on every device: some multiply by the reciprocal of a number."""
    return x / x.new_full((), parts)


def _shares(bins: int, device: torch.device) -> Tensor:
    """The ends of equal bins from 0 to 1."""
    return _part_of(torch.arange(bins + 1, dtype=torch.float64, device=device), bins)


class Histogram(NamedTuple):
    """One histogram, or many of as many bins; the values of a bin lie evenly in it.

    Attributes:
        counts: float64 ``(..., bins)``.
        min_val, max_val: float32 ``(...)``: the least and greatest value; +inf and -inf of none.
        spacing: ``"linear"``: equal bins from ``min_val`` to ``max_val``; ``"log"``: those of
            :func:`pyobserver.ops.log_histogram`.
    """

    counts: Tensor
    min_val: Tensor
    max_val: Tensor
    spacing: str

    @classmethod
    def log(cls, counts: Tensor, min_val: Tensor, max_val: Tensor) -> Histogram:
        """Of the int64 counts ``(..., columns)`` of :func:`pyobserver.ops.log_histogram`."""
        mantissa_bits_of(counts.shape[-1])
        finite = counts[..., 1:-2].to(torch.float64).contiguous()
        return cls(finite, min_val, max_val, "log")

    def edges(self) -> Tensor:
        """The ends of the bins: float64 ``(..., bins + 1)``, or ``(bins + 1,)`` where all share."""
        bins = self.counts.shape[-1]
        if self.spacing == "log":
            return log_edges(mantissa_bits_of(bins + 3), self.counts.device)
        low, high = self.min_val.double().unsqueeze(-1), self.max_val.double().unsqueeze(-1)
        return low + (high - low) * _shares(bins, self.counts.device)

    def finite(self) -> Tensor:
        """Where there is a finite range: bool ``(...)``."""
        return self.min_val.isfinite() & self.max_val.isfinite()

    @classmethod
    def load(
        cls, source: str | os.PathLike[str] | Mapping[str, Any], prefix: str = ""
    ) -> Histogram:
        """Of a histogram observer's ``state_dict``, ours or torch.ao's, or the file of one.

        Args:
            source: the dict, or the path of a file that ``torch.load(weights_only=True)`` reads.
            prefix: what comes before the observer's keys in a model's dict, as ``"fc.observer."``.

        Raises:
            ValueError: there is no histogram under that prefix.
        """
        state = source
        if not isinstance(state, Mapping):
            state = torch.load(state, map_location="cpu", weights_only=True)
        if not isinstance(state, Mapping):
            raise ValueError(f"load: source: expected a state_dict, got {type(state).__name__}")
        low, high = (state.get(prefix + name) for name in ("min_val", "max_val"))
        if low is not None and high is not None:
            if (counts := state.get(prefix + "counts")) is not None:
                return cls.log(counts, low, high)
            if (counts := state.get(prefix + "histogram")) is not None:
                if low.numel() == 0:  # torch.ao's of before version 3, never fed
                    low, high = counts.new_tensor([torch.inf, -torch.inf]).float()
                shape = counts.shape[:-1]
                return cls(counts.double(), low.reshape(shape), high.reshape(shape), "linear")
        found = sorted({key.rpartition(".")[0] for key in state if key.endswith("min_val")})
        raise ValueError(
            f"load: source: expected counts or histogram, min_val and max_val under {prefix!r}, "
            f"got a state of observers at {found}"
        )


class Grid(NamedTuple):
    """The integers that a tensor is quantized to, and the scales it may have.

    Attributes:
        quant_min, quant_max: the least and the greatest integer.
        zero_point: the fixed one of a symmetric scheme; None: affine, any.
        scale_constraint: ``"none"``, ``"power_of_two"``, ``"fp16"`` or ``"e8m0"``.
        eps: float32, one element: the least scale.
    """

    quant_min: int
    quant_max: int
    zero_point: int | None
    scale_constraint: str
    eps: Tensor

    @classmethod
    def of(
        cls,
        bits: int = 8,
        quant_min: int | None = None,
        quant_max: int | None = None,
        symmetric: bool = False,
        narrow_range: bool = False,
        scale_constraint: str = "none",
        eps: float = _TINY,
    ) -> Grid:
        """The grid of a number of bits, or of given bounds.

        Args:
            bits: 2 to 16: ``0 .. 2^bits - 1``, if symmetric ``-2^(bits-1) .. 2^(bits-1) - 1``.
            quant_min, quant_max: both or neither: bounds instead of bits.
            symmetric: zero lies in the middle: 0, or half the levels where ``quant_min`` is 0.
            narrow_range: leave out the least integer.
            scale_constraint: the scales that are allowed, see :func:`pyobserver.ops.lp_search`.
            eps: the least scale.

        Raises:
            ValueError: names the argument, what was expected and what came.
        """
        if not isinstance(bits, int) or not LEAST_BITS <= bits <= MOST_BITS:
            raise ValueError(
                f"solve: bits: expected an integer in [{LEAST_BITS}, {MOST_BITS}], got {bits!r}"
            )
        _checks.check_choice("solve", "scale_constraint", scale_constraint, CONSTRAINTS)
        least_scale = torch.tensor([eps], dtype=torch.float32, device="cpu")
        if not bool((least_scale > 0) & least_scale.isfinite()):
            raise ValueError(f"solve: eps: expected a positive finite float32, got {eps}")
        if (quant_min is None) != (quant_max is None):
            raise ValueError(
                "solve: quant_min, quant_max: expected both or neither, "
                f"got quant_min={quant_min}, quant_max={quant_max}"
            )
        if quant_min is None or quant_max is None:
            quant_min = -(2 ** (bits - 1)) if symmetric else 0
            quant_max = quant_min + 2**bits - 1
        _checks.check_quant_range("solve", quant_min + narrow_range, quant_max)
        zero_point = None
        if symmetric:
            zero_point = 0 if quant_min < 0 else (quant_min + quant_max + 1) // 2
            if zero_point > quant_max:
                raise ValueError(
                    "solve: quant_min, quant_max: expected a range that holds 0 or more for a "
                    f"symmetric scheme, got [{quant_min}, {quant_max}]"
                )
        return cls(quant_min + narrow_range, quant_max, zero_point, scale_constraint, least_scale)


class Solution(NamedTuple):
    """A scale and zero point, and the error they are expected to make on the data collected.

    All shaped as the ``min_val`` of the histogram. Errors are means over the finite values.

    Attributes:
        scale: float32.
        zero_point: int64.
        min_val, max_val: float32: the range, from the least to the greatest level.
        clipping_error: float64: the squared error of values that are rounded to beyond the grid.
        rounding_error: float64: that of all the others.
        signal: float64: the mean square of the values.
    """

    scale: Tensor
    zero_point: Tensor
    min_val: Tensor
    max_val: Tensor
    clipping_error: Tensor
    rounding_error: Tensor
    signal: Tensor

    @property
    def error(self) -> Tensor:
        """The mean squared error."""
        return self.clipping_error + self.rounding_error

    @property
    def sqnr(self) -> Tensor:
        """Signal to quantization noise in dB; infinite where there is no error."""
        return _decibels(self.signal, self.error)


def _decibels(signal: Tensor, noise: Tensor) -> Tensor:
    """Infinite where there is no noise, be there a signal or not."""
    return torch.where(noise == 0, torch.inf, 10 * torch.log10(signal / noise))


Range = tuple[Tensor, Tensor]
Choice = tuple[Tensor, Tensor]


def _cumulative(counts: Tensor, edges: Tensor, at: Tensor, inclusive: bool = True) -> Tensor:
    """How many values lie below each of ``at`` ``(..., n)``, or not above them."""
    before = torch.nn.functional.pad(counts.cumsum(-1), (1, 0))
    bin_of = torch.searchsorted(edges, at.contiguous(), right=inclusive) - 1
    bin_of = bin_of.clamp(0, counts.shape[-1] - 1)
    begin, end = edges.gather(-1, bin_of), edges.gather(-1, bin_of + 1)
    reached = (at >= begin) if inclusive else (at > begin)
    share = torch.where(end > begin, ((at - begin) / (end - begin)).clamp(0, 1), reached.double())
    return before.gather(-1, bin_of) + counts.gather(-1, bin_of) * share


def clamped_edges(histogram: Histogram) -> Tensor:
    """The edges of each histogram, none outside the values seen."""
    low = histogram.min_val.double().nan_to_num(0.0, 0.0, 0.0).unsqueeze(-1)
    high = histogram.max_val.double().nan_to_num(0.0, 0.0, 0.0).unsqueeze(-1)
    edges = histogram.edges().nan_to_num(0.0).expand(*histogram.counts.shape[:-1], -1)
    return torch.minimum(torch.maximum(edges, low), high).contiguous()


def _quantile(counts: Tensor, edges: Tensor, share: float) -> Tensor:
    """The value that a share of all values does not exceed."""
    upto = counts.cumsum(-1)
    target = upto[..., -1:] * share
    bin_of = torch.searchsorted(upto, target).clamp(max=counts.shape[-1] - 1)
    begin, end = edges.gather(-1, bin_of), edges.gather(-1, bin_of + 1)
    count = counts.gather(-1, bin_of)
    rest = (target - (upto.gather(-1, bin_of) - count)) / count.clamp(min=1e-300)
    return (begin + (end - begin) * rest.clamp(0, 1)).squeeze(-1)


def _between(upto: Tensor) -> Tensor:
    """The counts of bins, of how many values lie up to their ends: the first begins at its own."""
    counts = upto.diff(dim=-1).contiguous()
    counts[..., 0] += upto[..., 0]  # values that are the least, and an edge
    return counts


def _magnitude_counts(counts: Tensor, edges: Tensor, bounds: Tensor) -> Tensor:
    """The counts of the magnitudes between bounds ``(..., n + 1)``, those up to the first in it."""
    below = _cumulative(counts, edges, -bounds, inclusive=False)
    return _between(_cumulative(counts, edges, bounds) - below)


def _within(histogram: Histogram, bound: Tensor) -> Range:
    """The range of the values whose magnitude a float64 bound allows."""
    return _inside(histogram, -bound, bound)


def _inside(histogram: Histogram, low: Tensor, high: Tensor) -> Range:
    """A range of float64 ends cut to the values seen; theirs where that is not finite."""
    finite = histogram.finite()
    low = torch.maximum(histogram.min_val, low.float())
    high = torch.minimum(histogram.max_val, high.float())
    return torch.where(finite, low, histogram.min_val), torch.where(finite, high, histogram.max_val)


def _linear_counts(histogram: Histogram, bins: int) -> Tensor:
    """The counts carried to equal bins from the least to the greatest value."""
    if histogram.spacing == "linear" and histogram.counts.shape[-1] == bins:
        return histogram.counts
    edges = Histogram(
        histogram.counts.new_empty((*histogram.counts.shape[:-1], bins)), *histogram[1:3], "linear"
    ).edges()
    at = edges.nan_to_num(0.0)
    return _between(_cumulative(histogram.counts, clamped_edges(histogram), at))


def constrained(scale: Tensor, constraint: str) -> Tensor:
    """The scale made one that is allowed: a power of two not below it, the nearest float16."""
    if constraint == "fp16":
        return scale.clamp(_HALF_MIN, _HALF_MAX).half().float()
    if constraint in ("power_of_two", "e8m0"):
        mantissa, exponent = torch.frexp(scale)
        exponent = (exponent - (mantissa == 0.5).int()).clamp(max=127)  # the last of float32
        power = ((exponent.long() + 1023) << 52).view(torch.float64).float()
        return torch.where(scale > 0, power, scale)
    return scale


def _of_range(low: Tensor, high: Tensor, grid: Grid) -> Choice:
    """Scale and zero point of a range, as the min/max observers choose them."""
    scale = torch.empty_like(low, memory_format=torch.contiguous_format)
    zero_point = torch.empty_like(scale, dtype=torch.int64)
    mapping = "affine" if grid.zero_point is None else "symmetric"
    eps = grid.eps.to(low.device)
    choose_qparams(
        low.contiguous(), high.contiguous(), scale, zero_point, eps,
        grid.quant_min, grid.quant_max, mapping, grid.zero_point or 0,
    )  # fmt: skip
    if grid.scale_constraint != "none":
        scale = torch.where(low > high, scale, constrained(scale, grid.scale_constraint))
        if grid.zero_point is None:
            shift = torch.round(low.clamp(max=0.0) / scale).nan_to_num(0.0).long()
            shifted = (grid.quant_min - shift).clamp(grid.quant_min, grid.quant_max)
            zero_point = torch.where(low > high, zero_point, shifted)
    return scale, zero_point


def _arguments(histogram: Histogram) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The histogram as the ops take it."""
    ends = histogram.min_val.contiguous(), histogram.max_val.contiguous()
    return histogram.counts, histogram.edges().contiguous(), *ends


def minmax(histogram: Histogram, grid: Grid, enabled: Tensor | None = None) -> Choice:
    """The range of all values: nothing is clipped."""
    return _of_range(histogram.min_val, histogram.max_val, grid)


def percentile(
    histogram: Histogram, grid: Grid, enabled: Tensor | None = None, *, percentile: float = 0.9999
) -> Choice:
    """The range of a share of the values: of the magnitudes if symmetric, else of the middle.

    Affine: half of what is left out is left out on either side. Source: the calibrators of
    ONNX Runtime (both) and NVIDIA's pytorch-quantization (magnitudes).
    """
    edges = clamped_edges(histogram)
    if grid.zero_point is not None:
        bounds = edges.abs().sort(-1).values
        counts = _magnitude_counts(histogram.counts, edges, bounds)
        return _of_range(*_within(histogram, _quantile(counts, bounds, percentile)), grid)
    cut = (1 - percentile) / 2
    ends = (_quantile(histogram.counts, edges, share) for share in (cut, 1 - cut))
    return _of_range(*_inside(histogram, *ends), grid)


def lp(
    histogram: Histogram, grid: Grid, enabled: Tensor | None = None, *, p: float = 2.4
) -> Choice:
    """The least mean ``|x - quantized x|^p`` of all ranges, see :func:`pyobserver.ops.lp_search`.

    The default exponent is that of the weights in Nagel et al., "A White Paper on Neural Network
    Quantization" (2021), and of MQBench.
    """
    scale = torch.empty_like(histogram.min_val, memory_format=torch.contiguous_format)
    zero_point = torch.empty_like(scale, dtype=torch.int64)
    error = torch.empty((*scale.shape, 3), dtype=torch.float64, device=scale.device)
    lp_search(
        *_arguments(histogram), scale, zero_point, error, grid.quant_min, grid.quant_max, float(p),
        grid.zero_point, grid.scale_constraint, grid.eps.to(scale.device), enabled,
    )  # fmt: skip
    of_range, zero_of_range = minmax(histogram, grid)  # 1 and 0 of no values, NaN of NaN
    finite = histogram.finite()
    return torch.where(finite, scale, of_range), torch.where(finite, zero_point, zero_of_range)


def mse(histogram: Histogram, grid: Grid, enabled: Tensor | None = None) -> Choice:
    """The least mean squared error of all ranges, see :func:`pyobserver.ops.lp_search`."""
    return lp(histogram, grid, enabled, p=2.0)


def kl(
    histogram: Histogram,
    grid: Grid,
    enabled: Tensor | None = None,
    *,
    bins: int = 2048,
    start_bin: int = 128,
    stride: int = 1,
) -> Choice:
    """The clip of the magnitudes whose quantization diverges least from them.

    NVIDIA's entropy calibration (pytorch-quantization, after TensorRT), see
    :func:`pyobserver.ops.kl_search`: on ``bins`` equal bins of the magnitudes, over the levels of
    one sign. Values that are all positive have all the levels of an affine grid.
    """
    wider = torch.maximum(-histogram.min_val, histogram.max_val).double().nan_to_num(0.0, 0.0, 0.0)
    bounds = wider.unsqueeze(-1) * _shares(bins, wider.device)
    counts = _magnitude_counts(histogram.counts, clamped_edges(histogram), bounds)
    levels = grid.quant_max - grid.quant_min + 1
    # which levels a histogram has is known on its device alone: a search nobody needs is off
    one_sided = (histogram.min_val >= 0) | (histogram.max_val <= 0)
    if grid.zero_point is not None:
        one_sided = torch.zeros_like(one_sided)

    def search(of_sign: int, wanted: Tensor) -> Tensor:
        on = wanted.any() if enabled is None else wanted.any() & (enabled.reshape(()) != 0)
        return kl_search(counts, max(of_sign, 2), start_bin, stride, on)

    kept = torch.where(one_sided, search(levels, one_sided), search(levels // 2, ~one_sided))
    return _of_range(*_within(histogram, _part_of(wider * kept, bins)), grid)


def l2_greedy(
    histogram: Histogram,
    grid: Grid,
    enabled: Tensor | None = None,
    *,
    bins: int = 2048,
    levels: int | None = None,
) -> Choice:
    """torch's greedy search over linear bins, see :func:`pyobserver.ops.range_search`.

    ``levels``: those that the search assumes; None: as many as the grid has. A linear histogram is
    searched on its own bins, another is carried to ``bins`` equal ones.
    """
    bins = histogram.counts.shape[-1] if histogram.spacing == "linear" else bins
    ends = histogram.min_val.contiguous(), histogram.max_val.contiguous()
    levels = grid.quant_max - grid.quant_min + 1 if levels is None else levels
    return _of_range(*range_search(_linear_counts(histogram, bins), *ends, levels, enabled), grid)


METHODS: dict[str, Callable[..., Choice]] = {
    method.__name__: method for method in (minmax, percentile, mse, lp, kl, l2_greedy)
}


def check_method(owner: str, method: str, options: Mapping[str, Any]) -> None:
    """Refuse a method that does not exist, or options that it does not take.

    Raises:
        ValueError: an unknown method, or an option's value.
        TypeError: an option that the method does not have.
    """
    _checks.check_choice(owner, "method", method, tuple(METHODS))
    known = [
        name
        for name, parameter in inspect.signature(METHODS[method]).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    for name, value in options.items():
        if name not in known:
            raise TypeError(
                f"{owner}: {name}: expected one of the options of method {method!r} "
                f"({', '.join(known) or 'none'}), got {value!r}"
            )
        least, most, what = _OPTIONS[name]
        number = isinstance(value, (int, float)) if what == "a number" else isinstance(value, int)
        optional = value is None and name == "levels"
        if not optional and (
            not number or isinstance(value, bool) or not least <= value <= most or value == 0
        ):
            bounds = f"({least}, {most}]" if least == 0 else f"[{least}, {most}]"
            raise ValueError(f"{owner}: {name}: expected {what} in {bounds}, got {value!r}")


_OPTIONS: dict[str, tuple[float, float, str]] = {
    "percentile": (0, 1, "a number"),
    "p": (0, MOST_P, "a number"),
    "bins": (2, 2**20, "an integer"),
    "start_bin": (1, 2**20, "an integer"),
    "stride": (1, 2**20, "an integer"),
    "levels": (2, 2**32, "an integer"),
}


# the methods that score every scale on the grid itself; the others choose a range
SEARCHES = ("mse", "lp")


def choose(
    histogram: Histogram,
    method: str,
    grid: Grid,
    options: Mapping[str, Any],
    enabled: Tensor | None = None,
) -> Choice:
    """Scale (float32) and zero point (int64) by a method, shaped as ``min_val``; decides nothing
    on the host.

    A histogram that was never fed gets 1 and 0, one whose range is not finite what its range
    gives. With ``enabled`` 0 the search is left out, and the result means nothing.
    """
    return METHODS[method](histogram, grid, enabled, **options)


def amax(
    histogram: Histogram,
    method: str,
    bound: int,
    unsigned: bool,
    narrow_range: bool,
    options: Mapping[str, Any],
) -> Tensor:
    """The greatest magnitude by a method, as NVIDIA's quantizers take it: ``bound / amax`` is
    what they multiply with.

    Args:
        method, options: see :func:`choose`.
        bound: the greatest integer.
        unsigned, narrow_range: whether the least is 0, or ``-bound`` in place of ``-bound - 1``.

    Returns:
        float32, shaped as ``min_val``; 0 where nothing was counted.
    """
    searches = method in SEARCHES
    bound = min(max(bound, 1), _FINEST)
    least = -bound - 1
    if searches and (unsigned or narrow_range):
        least = 0 if unsigned else -bound
    # a range of both signs is divided by half its levels
    times = bound if searches else (bound - least) / 2
    grid = Grid.of(quant_min=least, quant_max=bound)._replace(zero_point=0)
    scale, _ = choose(histogram, method, grid, options)
    return torch.where(histogram.min_val > histogram.max_val, 0.0, scale * times)


def stack(histograms: Sequence[Histogram]) -> Histogram:
    """Histograms of as many bins and one spacing as the rows of one."""
    bins = histograms[0].counts.shape[-1]
    return Histogram(
        torch.cat([h.counts.reshape(-1, bins) for h in histograms]),
        torch.cat([h.min_val.reshape(-1) for h in histograms]),
        torch.cat([h.max_val.reshape(-1) for h in histograms]),
        histograms[0].spacing,
    )


def expected_error(
    histogram: Histogram, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """The mean squared error that given scales are expected to make, as ``Solution`` has it.

    Args:
        histogram: the statistic.
        scale, zero_point: float32; int32 or int64; one element for each histogram.
        quant_min, quant_max: the integer grid.

    Returns:
        float64 ``(..., 3)``: by clipping, by rounding, and the mean square of the values. NaN where
        the scale is not positive and finite or the zero point is off the grid; 0 for no values.
    """
    return lp_error(
        *_arguments(histogram), scale.contiguous(), zero_point.contiguous(), quant_min, quant_max
    )


def pooled_sqnr(error: Tensor, counts: Tensor) -> float:
    """The SQNR in dB of all values of many histograms together; infinite where there is no error.

    Args:
        error: float64 ``(n, 3)``, as of :func:`expected_error`.
        counts: float64 ``(n, bins)``, the counts of the same histograms.
    """
    clipping, rounding, signal = (error * counts.sum(-1, keepdim=True)).sum(0).unbind()
    return float(_decibels(signal, clipping + rounding))


def solve_all(
    histograms: Sequence[Histogram], method: str = "mse", grid: Grid | None = None, **options: Any
) -> list[Solution]:
    """:func:`solve` for many histograms: those of one kind in one call, over torch's threads.

    Args:
        histograms: of any bins and shapes.
        method, options: as for :func:`solve`.
        grid: the grid of all of them; None: ``Grid.of()``.
    """
    check_method("solve", method, options)
    grid = Grid.of() if grid is None else grid
    kinds: dict[Any, list[int]] = {}
    for i, histogram in enumerate(histograms):
        if not bool((histogram.min_val <= histogram.max_val).any()):
            raise ValueError("solve: histogram: expected one that was fed, got no values")
        key = histogram.counts.shape[-1], histogram.spacing, histogram.counts.device
        kinds.setdefault(key, []).append(i)
    solutions: dict[int, Solution] = {}
    for indices in kinds.values():
        rows = stack([histograms[i] for i in indices])
        scale, zero_point = choose(rows, method, grid, options)
        error = expected_error(rows, scale, zero_point, grid.quant_min, grid.quant_max)
        low, high = ((end - zero_point) * scale for end in (grid.quant_min, grid.quant_max))
        columns = scale, zero_point, low, high, *error.unbind(-1)
        sizes = [histograms[i].min_val.numel() for i in indices]
        pieces = zip(*(column.split(sizes) for column in columns), strict=True)
        for i, parts in zip(indices, pieces, strict=True):
            solutions[i] = Solution(*(part.reshape(histograms[i].min_val.shape) for part in parts))
    return [solutions[i] for i in range(len(histograms))]


def solve(
    histogram: Histogram,
    method: str = "mse",
    bits: int = 8,
    *,
    quant_min: int | None = None,
    quant_max: int | None = None,
    symmetric: bool = False,
    narrow_range: bool = False,
    scale_constraint: str = "none",
    eps: float = _TINY,
    **options: Any,
) -> Solution:
    """Scale and zero point of a histogram by a method, with the error they are expected to make.

    Args:
        histogram: the statistic, see :class:`Histogram`.
        method: ``"minmax"``; ``"percentile"`` (option ``percentile``, in (0, 1], 0.9999);
            ``"mse"``: the least squared error; ``"lp"`` (``p``, 2.4); ``"kl"`` (``bins``,
            ``start_bin``, ``stride``): NVIDIA's entropy calibration; ``"l2_greedy"`` (``bins``,
            ``levels``): torch's search.
        bits, quant_min, quant_max, symmetric, narrow_range, scale_constraint, eps: see
            :meth:`Grid.of`. ``"mse"`` and ``"lp"`` search among the scales that are allowed; the
            others' is made one: the next power of two, the nearest float16.

    Returns:
        The :class:`Solution`, shaped as ``histogram.min_val``.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came.
    """
    grid = Grid.of(bits, quant_min, quant_max, symmetric, narrow_range, scale_constraint, eps)
    return solve_all([histogram], method, grid, **options)[0]

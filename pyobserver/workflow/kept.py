"""What a calibration keeps of a site, to choose its scale again without the data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ranges
from .sqnr import Sample, sqnr

_BYTES_AT_ONCE = 2**28  # of histograms in one call


class PackedHistogram(NamedTuple):
    """A histogram on the CPU of which only the bins that are occupied are kept.

    Attributes:
        positions: int32 (int64 of 2^31 bins and more): those bins, in the flattened counts.
        counts: float64, as many.
        shape: that of the counts.
        min_val, max_val, spacing: as of :class:`pyobserver.ranges.Histogram`.
    """

    positions: Tensor
    counts: Tensor
    shape: tuple[int, ...]
    min_val: Tensor
    max_val: Tensor
    spacing: str

    @classmethod
    def of(cls, histogram: ranges.Histogram) -> PackedHistogram:
        counts = histogram.counts.detach().cpu().reshape(-1)
        positions = counts.nonzero().squeeze(-1)
        return cls(
            positions.int() if counts.numel() < 2**31 else positions,
            counts[positions],
            tuple(histogram.counts.shape),
            histogram.min_val.detach().cpu().clone(),
            histogram.max_val.detach().cpu().clone(),
            histogram.spacing,
        )

    def unpacked(self) -> ranges.Histogram:
        """A copy: what is done to it changes nothing here."""
        counts = torch.zeros(math.prod(self.shape), dtype=torch.float64, device="cpu")
        counts[self.positions.long()] = self.counts
        return ranges.Histogram(
            counts.reshape(self.shape), self.min_val.clone(), self.max_val.clone(), self.spacing
        )

    def expected_sqnr(
        self, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
    ) -> float:
        """Of all its values together, see :func:`pyobserver.ranges.expected_error`."""
        rows = ranges.stack([self.unpacked()])
        error = ranges.expected_error(rows, scale, zero_point, quant_min, quant_max)
        return _pooled(scale, error, rows.counts)

    @property
    def rows(self) -> int:
        return self.min_val.numel()


def _pooled(scale: Tensor, error: Tensor, counts: Tensor) -> float:
    """The expected SQNR of all histograms of a site; NaN by a scale that cannot be used."""
    usable = bool(((scale > 0) & scale.isfinite()).all())
    return ranges.pooled_sqnr(error, counts) if usable else math.nan


class Values:
    """What the SQNR of a site is measured on: its weight while that is unchanged, else a sample.

    Args:
        sample: some of the values.
        weight: the weight itself, referenced and not copied; None for other tensors.
    """

    def __init__(self, sample: Sample, weight: Tensor | None = None):
        self.sample = sample
        self.weight = weight
        self._version = _version(weight)

    def sqnr(
        self, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
    ) -> float:
        """See :func:`pyobserver.workflow.sqnr.sqnr`."""
        if self.weight is None or _version(self.weight) != self._version:
            return self.sample.sqnr(scale, zero_point, quant_min, quant_max, axis)
        scale, zero_point = scale.to(self.weight.device), zero_point.to(self.weight.device)
        return sqnr(self.weight, scale, zero_point, quant_min, quant_max, axis)


def _version(weight: Tensor | None) -> int:
    """Counts the changes in place, of which inference tensors allow none."""
    return 0 if weight is None or weight.is_inference() else weight._version


@dataclass(frozen=True)
class Kept:
    """The statistic of a site, and how its scale was chosen from it."""

    histogram: PackedHistogram
    values: Values
    method: str
    options: Mapping[str, Any]
    grid: ranges.Grid

    def to_dict(self) -> dict[str, Any]:
        """Of tensors, numbers and strings, for a file."""
        sample = self.values.sample
        return {
            "histogram": self.histogram._asdict(),
            "sample": {"values": sample.values, "channels": sample.channels},
            "method": self.method,
            "options": dict(self.options),
            "grid": self.grid._asdict(),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Kept:
        return cls(
            PackedHistogram(**saved["histogram"]),
            Values(Sample(**saved["sample"])),
            saved["method"],
            saved["options"],
            ranges.Grid(**saved["grid"]),
        )


class Chosen(NamedTuple):
    """Scale and zero point of a site, one-dimensional, and the SQNR that they promise."""

    scale: Tensor
    zero_point: Tensor
    predicted_sqnr: float


def choose_all(kept: Sequence[Kept]) -> list[Chosen]:
    """The scales by the method and grid beside each statistic; those alike in one call."""
    alike: dict[Any, list[int]] = {}
    for i, one in enumerate(kept):
        grid, histogram = one.grid, one.histogram
        options = tuple(sorted(one.options.items()))
        kind = histogram.spacing, histogram.shape[-1]
        key = one.method, options, grid[:-1], float(grid.eps), kind
        alike.setdefault(key, []).append(i)
    chosen: dict[int, Chosen] = {}
    for indices in alike.values():
        for some in _portions(kept, indices):
            chosen.update(zip(some, _choose_alike([kept[i] for i in some]), strict=True))
    return [chosen[i] for i in range(len(kept))]


def _portions(kept: Sequence[Kept], indices: Sequence[int]) -> Iterator[list[int]]:
    """Parts whose histograms take no more memory at once than is allowed, one at least."""
    part: list[int] = []
    size = 0
    for i in indices:
        more = 8 * math.prod(kept[i].histogram.shape)
        if part and size + more > _BYTES_AT_ONCE:
            yield part
            part, size = [], 0
        part.append(i)
        size += more
    yield part


def _choose_alike(kept: Sequence[Kept]) -> Iterator[Chosen]:
    grid, method, options = kept[0].grid, kept[0].method, kept[0].options
    rows = ranges.stack([one.histogram.unpacked() for one in kept])
    scale, zero_point = ranges.choose(rows, method, grid, options)
    error = ranges.expected_error(rows, scale, zero_point, grid.quant_min, grid.quant_max)
    if grid.zero_point is None:
        zero_point = zero_point.int()  # as the observers have it
    sizes = [one.histogram.rows for one in kept]
    columns = (column.split(sizes) for column in (scale, zero_point, error, rows.counts))
    for of_scale, of_zero_point, of_error, of_counts in zip(*columns, strict=True):
        predicted = _pooled(of_scale, of_error, of_counts)
        yield Chosen(of_scale.clone(), of_zero_point.clone(), predicted)

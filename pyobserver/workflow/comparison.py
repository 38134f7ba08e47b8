"""Methods and widths side by side, by the SQNR that they give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from .table import aligned


class Sqnr(NamedTuple):
    """Signal to quantization noise in dB: as the histogram leads to expect, and as measured."""

    predicted: float
    measured: float

    def __str__(self) -> str:
        return f"{self.predicted:.1f} / {self.measured:.1f}"


class Comparison(Mapping[tuple[str, int], Mapping[str, Sqnr]]):
    """The :class:`Sqnr` by method and bits, and then by site: ``c["mse", 4]["fc.input"].measured``.

    ``print(comparison)`` shows their :meth:`mean` as a table of methods by bits.

    Attributes:
        sites: all that were compared.
        left_out: those that no mean counts, for by some method at some width they are NaN (no
            usable scale): means over different sites could not be compared.
    """

    def __init__(self, cells: Mapping[tuple[str, int], Mapping[str, Sqnr]]):
        self._cells = dict(cells)
        self.sites = tuple(next(iter(self._cells.values())))
        self.left_out = tuple(
            name
            for name in self.sites
            if any(math.isnan(value) for cell in self.values() for value in cell[name])
        )

    def __getitem__(self, method_and_bits: tuple[str, int]) -> Mapping[str, Sqnr]:
        return self._cells[method_and_bits]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._cells)

    def __len__(self) -> int:
        return len(self._cells)

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(method for method, _ in self))

    @property
    def bits(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(bits for _, bits in self))

    def mean(self, method: str, bits: int) -> Sqnr:
        """That of the mean share of noise over the sites, but for :attr:`left_out`.

        So ``-10 * log10(mean(10**(-dB / 10)))``: the worst sites weigh most, as they do in a model,
        and an infinite one (no noise) counts as a share of 0. NaN where all are left out.
        """
        cell = self[method, bits]
        taken = [cell[name] for name in self.sites if name not in self.left_out]
        if not taken:
            return Sqnr(math.nan, math.nan)
        return Sqnr(*(_mean(column) for column in zip(*taken, strict=True)))

    def __repr__(self) -> str:
        return (
            f"<Comparison of {len(self.methods)} methods at {', '.join(map(str, self.bits))} bits, "
            f"{len(self.sites)} sites>"
        )

    def __str__(self) -> str:
        rows = [("method", *(f"{bits} bits" for bits in self.bits))]
        for method in self.methods:
            rows.append((method, *(str(self.mean(method, bits)) for bits in self.bits)))
        lines = aligned(rows, numbers=len(self.bits))
        taken = [name for name in self.sites if name not in self.left_out]
        of = taken[0] if len(taken) == 1 else f"mean noise of {len(taken)} sites"
        lines.append(f"SQNR in dB, predicted / measured, {of}")
        if self.left_out:
            lines.append(f"left out, without a usable scale: {', '.join(self.left_out)}")
        return "\n".join(lines)


def _mean(decibels: Sequence[float]) -> float:
    share = sum(10 ** (-each / 10) for each in decibels) / len(decibels)
    return -10 * math.log10(share) if share > 0 else math.inf

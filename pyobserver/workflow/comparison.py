"""Methods and widths side by side, by the SQNR that they give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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
        left_out: those that the means leave out: they are infinite (no noise) or NaN (no usable
            scale) by some method at some width. A mean over different sites could not be compared.
    """

    def __init__(self, cells: Mapping[tuple[str, int], Mapping[str, Sqnr]]):
        self._cells = dict(cells)
        self.sites = tuple(next(iter(self._cells.values())))
        self.left_out = tuple(
            name
            for name in self.sites
            if not all(math.isfinite(value) for cell in self.values() for value in cell[name])
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
        """The mean of the dB over the sites, but for :attr:`left_out`; where that is all, of all.

        That of all may be infinite or NaN.
        """
        cell = self[method, bits]
        taken = [cell[name] for name in self.sites if name not in self.left_out]
        columns = zip(*(taken or cell.values()), strict=True)
        return Sqnr(*(sum(column) / len(column) for column in columns))

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
        taken = [name for name in self.sites if name not in self.left_out] or list(self.sites)
        of = taken[0] if len(taken) == 1 else f"mean over {len(taken)} sites"
        lines.append(f"SQNR in dB, predicted / measured, {of}")
        if self.left_out and len(taken) < len(self.sites):
            lines.append(f"left out, for it is not finite in all: {', '.join(self.left_out)}")
        return "\n".join(lines)

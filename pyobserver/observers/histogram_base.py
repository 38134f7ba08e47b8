"""The base of the observers whose statistic is a histogram, and their scales in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from .. import _checks, ranges
from ..dtypes import SYMMETRIC
from ..ops.lp_search import CONSTRAINTS
from .base import ObserverBase, UniformQuantizationObserverBase


class HistogramObserverBase(UniformQuantizationObserverBase):
    """An observer that keeps a histogram, of which any method may be asked for scales.

    Args:
        method: the method of ``calculate_qparams``, see :func:`pyobserver.ranges.solve`.
        method_kwargs: its options, as ``{"percentile": 0.999}``.
        scale_constraint: the scales that are allowed, see :func:`pyobserver.ops.lp_search`.
        Others: :class:`UniformQuantizationObserverBase`.
    """

    def __init__(
        self,
        method: str,
        method_kwargs: Mapping[str, Any] | None,
        scale_constraint: str,
        *args: Any,
        **kwargs: Any,
    ):
        owner = type(self).__name__
        ranges.check_method(owner, method, method_kwargs or {})
        _checks.check_choice(owner, "scale_constraint", scale_constraint, CONSTRAINTS)
        super().__init__(*args, **kwargs)
        self.method = method
        self.method_kwargs = dict(method_kwargs or {})
        self.scale_constraint = scale_constraint

    def statistic(self) -> ranges.Histogram:
        """The histogram, of tensors of this observer: for :mod:`pyobserver.ranges`."""
        raise NotImplementedError

    def solve(
        self,
        method: str | None = None,
        bits: int | None = None,
        *,
        quant_min: int | None = None,
        quant_max: int | None = None,
        symmetric: bool | None = None,
        narrow_range: bool = False,
        scale_constraint: str | None = None,
        eps: float | None = None,
        **options: Any,
    ) -> ranges.Solution:
        """Scale and zero point by any method, for any grid, from what was collected.

        Nothing of the observer changes. What is left out is as the observer has it: without
        ``method`` its own with its options, without ``bits`` and bounds its own grid.

        Args, Returns: as for :func:`pyobserver.ranges.solve`.

        Raises:
            ValueError: the observer was never fed.
            ValueError, TypeError: an argument; names it, what was expected and what came.
        """
        if method is None:
            method, options = self.method, {**self.method_kwargs, **options}
        own = bits is None and quant_min is None and quant_max is None
        symmetric_here = self.qscheme in SYMMETRIC
        is_symmetric = symmetric_here if symmetric is None else symmetric
        grid = ranges.Grid.of(
            8 if bits is None else bits,
            self.quant_min if own else quant_min,
            self.quant_max if own else quant_max,
            is_symmetric,
            narrow_range,
            self.scale_constraint if scale_constraint is None else scale_constraint,
            float(self.eps) if eps is None else eps,
        )
        if own and is_symmetric == symmetric_here:
            grid = grid._replace(zero_point=self._grid().zero_point)
        if not bool((self.min_val <= self.max_val).any()):
            unfed = bool((self.min_val > self.max_val).all())
            raise ValueError(
                f"{type(self).__name__}.solve: expected an observer that was fed, "
                f"got {'no values' if unfed else 'a range that is NaN'}"
            )
        return ranges.solve_all([self.statistic()], method, grid, **options)[0]

    def observed_range(self, enabled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The range that the observer's method chooses: from the least to the greatest level."""
        scale, zero_point = self._choose(enabled)
        return (self.quant_min - zero_point) * scale, (self.quant_max - zero_point) * scale

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point by the observer's method, see the base class."""
        self.warn_of_statistics()
        if self.min_val.numel() == 0:
            scale = self.min_val.new_ones(1)
            return scale, torch.zeros_like(scale, dtype=torch.int64)
        return self._finished(*self._choose())

    def write_qparams(
        self, scale: Tensor, zero_point: Tensor, enabled: Tensor | None = None
    ) -> None:
        new_scale, new_zero_point = (t.reshape(scale.shape) for t in self._choose(enabled))
        if enabled is not None:
            on = enabled.reshape(()) != 0
            new_scale = torch.where(on, new_scale, scale)
            new_zero_point = torch.where(on, new_zero_point.to(zero_point.dtype), zero_point)
        # together: within torch.func.grad a copy_ of its own may not update what was captured
        torch._foreach_copy_([scale, zero_point], [new_scale, new_zero_point])

    def _choose(self, enabled: Tensor | None = None) -> ranges.Choice:
        return ranges.choose(self.statistic(), self.method, self._grid(), self._options(), enabled)

    def _grid(self) -> ranges.Grid:
        zero_point = self._symmetric_zero_point if self.qscheme in SYMMETRIC else None
        return ranges.Grid(
            self.quant_min, self.quant_max, zero_point, self.scale_constraint, self.eps
        )

    def _options(self) -> Mapping[str, Any]:
        return self.method_kwargs

    def _finished(self, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """A choice in the shapes and dtypes of ``calculate_qparams``."""
        shape = self.min_val.shape or (1,)
        if self.qscheme not in SYMMETRIC:
            zero_point = zero_point.int()
        return scale.reshape(shape), zero_point.reshape(shape)


def _is_solved_by_its_method(observer: ObserverBase) -> TypeGuard[HistogramObserverBase]:
    """Whether no subclass chooses in a way of its own."""
    return isinstance(observer, HistogramObserverBase) and all(
        getattr(type(observer), name) is getattr(HistogramObserverBase, name)
        for name in ("calculate_qparams", "_choose", "_finished")
    )


def _read_at_once(observers: Sequence[HistogramObserverBase]) -> list[list[int]]:
    """The bits of the least scale and the faults of each; one wait for each device."""
    rows: dict[torch.device, list[Tensor]] = {}
    for observer in observers:
        bits = observer.eps.view(torch.int32).long()
        faults = observer._faults()
        rows.setdefault(observer.min_val.device, []).append(torch.cat((bits, faults)))
    read = {device: iter(torch.stack(found).tolist()) for device, found in rows.items()}
    return [next(read[observer.min_val.device]) for observer in observers]


def calculate_qparams(observers: Iterable[ObserverBase]) -> list[tuple[Tensor, Tensor]]:
    """``calculate_qparams`` of many observers, those of histograms together.

    Histograms that ask the same of the same bins are solved in one call, over torch's threads or a
    block of the GPU each; any other observer is asked by itself.

    Returns:
        Scale and zero point of each, as its own ``calculate_qparams`` gives them.
    """
    observers = list(observers)
    together = [
        observer
        for observer in observers
        if _is_solved_by_its_method(observer) and observer.min_val.numel() > 0
    ]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    alike: dict[Any, list[tuple[HistogramObserverBase, ranges.Histogram]]] = {}
    for observer, (eps, *faults) in zip(together, _read_at_once(together), strict=True):
        observer._warn(*faults, stacklevel=3)
        statistic, grid = observer.statistic(), observer._grid()
        options = tuple(sorted(observer._options().items()))
        kind = statistic.spacing, statistic.counts.shape[-1], statistic.counts.device
        key = observer.method, options, grid[:-1], eps, kind
        alike.setdefault(key, []).append((observer, statistic))
    for group in alike.values():
        first = group[0][0]
        rows = ranges.stack([statistic for _, statistic in group])
        chosen = ranges.choose(rows, first.method, first._grid(), first._options())
        sizes = [observer.min_val.numel() for observer, _ in group]
        pieces = zip(*(t.split(sizes) for t in chosen), strict=True)
        for (observer, _), (scale, zero_point) in zip(group, pieces, strict=True):
            found[id(observer)] = observer._finished(scale, zero_point)
    return [found.get(id(observer)) or observer.calculate_qparams() for observer in observers]

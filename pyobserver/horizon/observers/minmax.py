"""Horizon's observers of the least and the greatest value, and of none."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..._checks import check_axis, check_input
from ...observers.base import new_full
from ...observers.minmax import MinMaxBase
from ...ops.minmax import minmax
from ..dtypes import QuantDType
from ..strategy import ComputeScaleStrategy, allowed_scale
from .base import EngineObserver


class MinMaxObserver(EngineObserver, MinMaxBase):
    """The moving average of the tensors' least and greatest values; the first counts in full.

    Args:
        Those of :class:`ObserverBase`.
    """

    _limits: tuple[float, float] | None = None  # to which the values are clipped

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._update = "moving_average"

    @property
    def observes_in_one_call(self) -> bool:
        """Whether :meth:`observe_fake_quantize` does what observing and choosing would."""
        plain = self.compute_scale_strategy is ComputeScaleStrategy.STATISTIC
        return plain and not self.syncs

    def observe(self, x: Tensor, enabled: Tensor | None = None) -> None:
        if self._limits is None and not self.syncs:
            super().observe(x, enabled)
            return
        low, high, nonfinite = self._range_of(x, enabled)
        if self._limits is not None:
            fed = low <= high
            clipped_low, clipped_high = (end.clamp(*self._limits) for end in (low, high))
            low, high = torch.where(fed, clipped_low, low), torch.where(fed, clipped_high, high)
        if self.syncs:
            self.sync_minmax(low, high)
        # the two ends stand for the tensor; of none, they are infinite and are left out
        ends = torch.stack((low, high), -1)
        if self._per_channel:
            ends = ends.reshape((1,) * self.ch_axis + ends.shape)
        nonfinite += self.nonfinite_count
        super().observe(ends, enabled)
        self.nonfinite_count.copy_(nonfinite)

    def _range_of(self, x: Tensor, enabled: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The least and greatest values of one tensor, and how many of it are not finite."""
        check_input("minmax", "x", x)
        axis = self.ch_axis if self._per_channel else None
        groups = () if axis is None else (x.shape[check_axis("minmax", x, axis)],)
        low = self.eps.new_full(groups, torch.inf)
        high = self.eps.new_full(groups, -torch.inf)
        nonfinite = torch.zeros_like(self.nonfinite_count)
        minmax(x, low, high, nonfinite, axis, enabled=enabled)
        return low, high, nonfinite


class ClipObserver(MinMaxObserver):
    """:class:`MinMaxObserver` of the values clipped to given limits.

    Args:
        xmin, xmax: the limits, ``xmin < xmax``.
        Others: :class:`ObserverBase`.
    """

    def __init__(self, *args: Any, xmin: float = -1.0, xmax: float = 1.0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not (isinstance(xmin, Real) and isinstance(xmax, Real) and xmin < xmax):
            raise ValueError(
                f"{type(self).__name__}: xmin: expected a value below xmax, "
                f"got xmin={xmin!r}, xmax={xmax!r}"
            )
        self._limits = (float(xmin), float(xmax))


class FixedScaleObserver(EngineObserver):
    """A scale that is given; nothing is observed.

    Args:
        scale: positive and finite: a number, or per channel one for each channel.
        Others: :class:`ObserverBase`.

    Buffers: ``scale``: float32, ``(1,)`` or ``(channels,)``; ``min_val``, ``max_val``: the ends
    of the grid.
    """

    scale: Tensor
    _merges: ClassVar[dict[str, str]] = {}

    def __init__(self, *args: Any, scale: float | Sequence[float], **kwargs: Any):
        super().__init__(*args, **kwargs)
        given = torch.as_tensor(scale, dtype=torch.float32).reshape(-1)
        number = given.numel() if self._per_channel else 1
        if given.numel() != number or not bool(((given > 0) & given.isfinite()).all()):
            raise ValueError(
                f"{type(self).__name__}: scale: expected positive finite values, one "
                f"{'for each channel' if self._per_channel else 'in all'}, got {scale}"
            )
        allowed = allowed_scale(given.to(self.eps.device), self.compute_scale_strategy)
        self.register_buffer("scale", allowed.clone())
        self._register_range((number,) if self._per_channel else (), self.eps.device)
        self._write_ends()

    def _write_ends(self) -> None:
        self.min_val.copy_((self.quant_min * self.scale).view_as(self.min_val))
        self.max_val.copy_((self.quant_max * self.scale).view_as(self.max_val))

    def observe(self, x: Tensor, enabled: Tensor | None = None) -> None:
        """Nothing is observed."""

    def calculate_qparams(self) -> tuple[Tensor, None]:  # type: ignore[override]
        """The scale that was given, and None."""
        return self.scale.clone(), None

    def write_qparams(
        self, scale: Tensor, zero_point: Tensor, enabled: Tensor | None = None
    ) -> None:
        chosen = self.scale if enabled is None else torch.where(enabled != 0, self.scale, scale)
        scale.copy_(chosen)

    def reset_dtype(self, dtype: QuantDType | torch.dtype) -> None:
        super().reset_dtype(dtype)
        self._write_ends()

    def _fit_to(self, state: dict[str, Any], prefix: str) -> None:
        super()._fit_to(state, prefix)
        if self.scale.numel() != self.min_val.numel():
            self.scale = new_full(self.min_val.numel(), 1, self.scale)

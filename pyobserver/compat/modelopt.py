"""A calibrator for NVIDIA's Model Optimizer: any method of pyobserver where it has two.

Importing this imports Model Optimizer (``modelopt.torch.quantization``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from modelopt.torch.quantization.calib.calibrator import _Calibrator
from torch import Tensor

from .. import ranges
from ..observers import LogHistogramObserver, PerChannelLogHistogramObserver

__all__ = ["LogHistogramCalibrator"]


class LogHistogramCalibrator(_Calibrator):
    """A log histogram of all tensors collected, of which a method chooses the amax.

    In the configuration of a quantizer:
    ``{"num_bits": 8, "axis": None, "calibrator": (LogHistogramCalibrator, (8, None))}``. Model
    Optimizer calls ``compute_amax`` without a method, so that is an argument here.

    Args:
        num_bits: of the integers; or ``(exponent, mantissa)`` of a float format, with the methods
            ``"minmax"`` and ``"percentile"``.
        axis: the axes that have scales of their own, one or some; None: one for the tensor.
        unsigned: integers from 0 on.
        method: see :func:`pyobserver.ranges.solve`.
        method_kwargs: its options, as ``{"percentile": 0.9999}``.
        narrow_range: leave out the least integer, as the quantizer is told to.
        mantissa_bits: see :class:`pyobserver.LogHistogramObserver`; 128 KiB a scale with 5.

    NaN and infinities are left out, with a warning (Model Optimizer's fail on them).

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came.
    """

    def __init__(
        self,
        num_bits: Any = 8,
        axis: int | Sequence[int] | None = None,
        unsigned: bool = False,
        method: str = "mse",
        method_kwargs: Mapping[str, Any] | None = None,
        narrow_range: bool = False,
        mantissa_bits: int = 5,
    ):
        super().__init__(num_bits, axis, unsigned)
        ranges.check_method(type(self).__name__, method, method_kwargs or {})
        self._method = method
        self._method_kwargs = dict(method_kwargs or {})
        self._narrow_range = narrow_range
        self._mantissa_bits = mantissa_bits
        self.reset()

    def reset(self) -> None:
        """Forget what was collected."""
        self._observer: LogHistogramObserver | PerChannelLogHistogramObserver | None = None
        self._shape: tuple[int, ...] = ()

    @torch.no_grad()
    def collect(self, x: Tensor) -> None:
        """Add a tensor to the statistics.

        Raises:
            ValueError: it has other scales than the tensors before it; nothing changes.
        """
        shape, x = self._by_scale(x)
        observer = self._observer
        if observer is None or observer.counts.is_meta:  # a dry run's
            options: dict[str, Any] = {
                "mantissa_bits": self._mantissa_bits,
                "factory_kwargs": {"device": x.device},
            }
            if shape:
                options |= {"ch_axis": 0, "num_channels": math.prod(shape)}
            kind = PerChannelLogHistogramObserver if shape else LogHistogramObserver
            observer = kind(**options)
        elif shape != self._shape:
            raise ValueError(
                f"{type(self).__name__}.collect: x: expected scales of shape {self._shape}, "
                f"got {shape}"
            )
        observer(x)
        self._observer, self._shape = observer, shape

    def compute_amax(self, method: str | None = None, **options: Any) -> Tensor | None:
        """The amax by the calibrator's method, or another; ``"entropy"`` is ``"kl"``.

        Returns:
            float32: 0-d, or with ``axis`` as many dimensions as the tensors, of size 1 but for the
            axes; None: nothing was collected.
        """
        observer = self._observer
        if observer is None:
            return None
        if observer.counts.is_meta:
            return observer.min_val.reshape(self._shape)
        if bool((observer.min_val > observer.max_val).all()):
            return None
        if method is None:
            method, options = self._method, {**self._method_kwargs, **options}
        method = "kl" if method == "entropy" else method  # Model Optimizer's name for it
        ranges.check_method(type(self).__name__, method, options)
        bound = self._bound(method)
        observer.warn_of_statistics()
        grid = bound, self._unsigned, self._narrow_range
        return ranges.amax(observer.statistic(), method, *grid, options).reshape(self._shape)

    def _by_scale(self, x: Tensor) -> tuple[tuple[int, ...], Tensor]:
        """The shape of the amax, and the tensor with all its scales along the first axis."""
        if self._axis is None:
            return (), x
        axes = [self._axis] if isinstance(self._axis, int) else self._axis
        kept = tuple(sorted({axis % x.dim() for axis in axes}))
        shape = tuple(size if d in kept else 1 for d, size in enumerate(x.shape))
        return shape, x.movedim(kept, tuple(range(len(kept)))).reshape(math.prod(shape), -1)

    def _bound(self, method: str) -> int:
        """The greatest integer; of a float format any, which what chooses a range does not mind."""
        if isinstance(self._num_bits, int):
            return 2 ** (self._num_bits - 1 + int(self._unsigned)) - 1
        if method not in ("minmax", "percentile"):
            raise ValueError(
                f"{type(self).__name__}: method: expected minmax or percentile for num_bits "
                f"{self._num_bits}, got {method!r}"
            )
        return 127

    def __repr__(self) -> str:
        return f"{type(self).__name__}({super().__repr__()} method={self._method})"

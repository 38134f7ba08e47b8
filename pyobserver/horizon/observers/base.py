"""The base class of Horizon's observers."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...distributed import serving_device
from ...dtypes import PER_CHANNEL, SYMMETRIC, check_bounds, check_qscheme
from ...observers import UniformQuantizationObserverBase
from ...observers.base import new_full
from ...observers.minmax import check_averaging_constant
from ..dtypes import QuantDType, qint8, quant_dtype
from ..strategy import ComputeScaleStrategy, allowed_scale

_OLD_NAMES = {"min_vals": "min_val", "max_vals": "max_val"}


class ObserverBase(UniformQuantizationObserverBase):
    """Base of the symmetric observers: ``forward`` watches a tensor and returns it unchanged.

    A subclass keeps ``min_val`` and ``max_val`` up to date in it. The statistics, the methods and
    their guards are those of :mod:`pyobserver.observers`: NaN and infinities are left out and
    counted, an empty tensor changes nothing.

    Args:
        averaging_constant: the weight of a new tensor in a moving average, in (0, 1]. Observers
            of histograms count all tensors alike and do not use it.
        ch_axis: the channel axis, at least 0 per channel, negative per tensor.
        dtype: a :class:`QuantDType`, or ``torch.int4``, ``int8``, ``qint8`` or ``int16``.
        qscheme: ``torch.per_tensor_symmetric`` or ``torch.per_channel_symmetric``.
        quant_min, quant_max: both or neither: the integer range, if not the whole type.
        is_sync_quantize: whether every forward takes in the tensors of all ranks, where
            torch.distributed is initialized, so that all ranks choose the same scale; every rank
            has to take part in every forward then. None: as the class says, True.
        factory_kwargs: ``{"device": ...}`` for the buffers.
        compute_scale_strategy: which scales are allowed, see :class:`ComputeScaleStrategy`.

    Buffers: ``eps``: float32 ``(1,)``, the least scale; ``min_val``, ``max_val``: float32, 0-d, or
    ``(channels,)`` once sized by the first tensor.

    Raises:
        ValueError, TypeError, NotImplementedError: name the argument, what was expected and what
            came.

    Source: Horizon's ``ObserverBase`` as published (seed 1), whose checks are assertions.
    """

    is_sync_quantize: bool = True
    ch_axis: int = -1

    def __init__(
        self,
        averaging_constant: float = 0.01,
        ch_axis: int = -1,
        dtype: QuantDType | torch.dtype = qint8,
        qscheme: torch.qscheme = torch.per_tensor_symmetric,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_sync_quantize: bool | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        compute_scale_strategy: ComputeScaleStrategy = ComputeScaleStrategy.STATISTIC,
        *,
        _engine: Mapping[str, Any] | None = None,
    ):
        owner = type(self).__name__
        check_averaging_constant(owner, averaging_constant)
        check_qscheme(owner, qscheme, SYMMETRIC)
        _check_ch_axis(owner, qscheme, ch_axis)
        if not isinstance(compute_scale_strategy, ComputeScaleStrategy):
            raise TypeError(
                f"{owner}: compute_scale_strategy: expected a ComputeScaleStrategy, "
                f"got {compute_scale_strategy!r}"
            )
        if not isinstance(is_sync_quantize, (bool, type(None))):
            raise TypeError(
                f"{owner}: is_sync_quantize: expected a bool or None, got {is_sync_quantize!r}"
            )
        dtype = quant_dtype(owner, dtype)
        quant_min, quant_max = _bounds(owner, dtype, quant_min, quant_max)
        super().__init__(
            dtype=dtype.storage,
            qscheme=qscheme,
            quant_min=quant_min,
            quant_max=quant_max,
            factory_kwargs=factory_kwargs,
            **(_engine or {}),
        )
        self.dtype = dtype  # type: ignore[assignment]
        self.averaging_constant = averaging_constant
        self.compute_scale_strategy = compute_scale_strategy
        self._per_channel = qscheme in PER_CHANNEL
        if self._per_channel:  # per tensor, the engine takes one of the instance for an axis
            self.ch_axis = ch_axis
        self._register_range((0,) if self._per_channel else (), self.eps.device)
        if is_sync_quantize is not None:
            self.is_sync_quantize = is_sync_quantize

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @property
    def syncs(self) -> bool:
        """Whether a forward waits for those of other ranks."""
        return self.is_sync_quantize and _is_distributed() and dist.get_world_size() > 1

    def sync_minmax(self, min_val: Tensor, max_val: Tensor) -> None:
        """Give the least of all ranks' minima and the greatest of their maxima to each, in place.

        Wherever torch.distributed is initialized, on the CPU too; else nothing. One all-reduce.
        """
        if not _is_distributed():
            return
        ends = torch.stack((min_val, -max_val))
        reduced = ends.to(serving_device(ends.device, None))
        dist.all_reduce(reduced, dist.ReduceOp.MIN)
        low, negated_high = reduced.to(ends.device)
        min_val.copy_(low)
        max_val.copy_(-negated_high)

    def is_fed(self) -> bool:
        """Whether any values were seen; reads the device."""
        return not bool((self.min_val > self.max_val).all())  # also of no elements

    def calculate_qparams(self) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Scale: float32, ``(1,)`` or ``(channels,)``, and None: every zero point is 0.

        An observer that was never fed gives 1 and 0, with a warning; values that were left out as
        not finite give one too.
        """
        scale, zero_point = super().calculate_qparams()
        return scale, None if self.is_fed() else zero_point

    def _write_qparams(
        self,
        min_val: Tensor,
        max_val: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        enabled: Tensor | None,
    ) -> None:
        super()._write_qparams(min_val, max_val, scale, zero_point, enabled)
        if self.compute_scale_strategy is not ComputeScaleStrategy.STATISTIC:
            scale.copy_(allowed_scale(scale, self.compute_scale_strategy))

    def reset_dtype(self, dtype: QuantDType | torch.dtype) -> None:
        """Choose for another type from now on, its whole range; the statistics stay.

        Raises:
            ValueError: a type that is not served; nothing has changed then.
        """
        dtype = quant_dtype(type(self).__name__, dtype)
        if dtype is not self.dtype:
            self.dtype = dtype  # type: ignore[assignment]
            self.quant_min, self.quant_max = dtype.bounds

    def extra_repr(self) -> str:
        if self.min_val.numel() != 1 or self.min_val.is_meta:
            return ""
        return f"min_val={self.min_val.item()}, max_val={self.max_val.item()}"

    def get_extra_state(self) -> dict[str, Any]:
        """The type and its bounds, which ``reset_dtype`` changes: of the state_dict."""
        return {
            "dtype": str(self.dtype),
            "quant_min": self.quant_min,
            "quant_max": self.quant_max,
        }

    def set_extra_state(self, state: Any) -> None:
        owner = type(self).__name__
        known = QuantDType.__members__
        if not isinstance(state, Mapping) or state.get("dtype") not in known:
            raise ValueError(
                f"{owner}: state_dict: expected an extra state of dtype, quant_min and quant_max, "
                f"got {state!r}"
            )
        dtype = known[state["dtype"]]
        quant_min, quant_max = _bounds(owner, dtype, state.get("quant_min"), state.get("quant_max"))
        self.dtype, self.quant_min, self.quant_max = dtype, quant_min, quant_max  # type: ignore

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # a copy: the caller's dict is not ours to change
        renamed = {prefix + old: prefix + new for old, new in _OLD_NAMES.items()}
        state = {renamed.get(key, key): value for key, value in state_dict.items()}
        state.setdefault(prefix + "eps", torch.full((1,), torch.finfo(torch.float32).eps))
        state.setdefault(prefix + "_extra_state", self.get_extra_state())
        ends = [prefix + name for name in ("min_val", "max_val") if prefix + name in state]
        state.update((key, self._fitting(state[key], key)) for key in ends)
        sizes = {tuple(state[key].shape) for key in ends}
        if len(ends) == 2 and len(sizes) == 2:
            args[-1].append(
                f"size mismatch for {prefix}min_val, max_val: expected one number of channels, "
                f"got {' and '.join(map(str, sorted(sizes)))}"
            )
            return
        self._fit_to(state, prefix)
        super()._load_from_state_dict(state, prefix, local_metadata, *args)

    def _fitting(self, saved: Tensor, key: str) -> Tensor:
        """A saved end of the range in the shape of this observer's: 0-d, or of the channels."""
        if self._per_channel:
            return saved.reshape(-1)
        if saved.numel() == 0:
            return saved.new_tensor(torch.inf if key.endswith("min_val") else -torch.inf)
        return saved.reshape(()) if saved.numel() == 1 else saved

    def _fit_to(self, state: dict[str, Any], prefix: str) -> None:
        """Size the buffers of the range to those of the state."""
        saved = state.get(prefix + "min_val")
        if self._per_channel and saved is not None and saved.shape != self.min_val.shape:
            self.min_val = new_full(saved.numel(), torch.inf, self.min_val)
            self.max_val = new_full(saved.numel(), -torch.inf, self.max_val)


class EngineObserver(ObserverBase):
    """One that the engine watches for, in :meth:`observe`."""

    forward = UniformQuantizationObserverBase.forward


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _check_ch_axis(owner: str, qscheme: torch.qscheme, ch_axis: int) -> None:
    if isinstance(ch_axis, bool) or not isinstance(ch_axis, int):
        raise TypeError(f"{owner}: ch_axis: expected an integer, got {ch_axis!r}")
    if (qscheme in PER_CHANNEL) != (ch_axis >= 0):
        wanted = "at least 0" if qscheme in PER_CHANNEL else "a negative value"
        raise ValueError(f"{owner}: ch_axis: expected {wanted} with {qscheme}, got {ch_axis}")


def _bounds(
    owner: str, dtype: QuantDType, quant_min: int | None, quant_max: int | None
) -> tuple[int, int]:
    """The bounds of the type, or the caller's inside it."""
    if quant_min is None and quant_max is None:
        return dtype.bounds
    for name, bound in (("quant_min", quant_min), ("quant_max", quant_max)):
        if isinstance(bound, bool) or not isinstance(bound, int):
            raise ValueError(
                f"{owner}: quant_min, quant_max: expected two integers or neither, "
                f"got {name}={bound!r}"
            )
    try:
        check_bounds(str(dtype), dtype.bounds, quant_min, quant_max)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{owner}: {error}") from None
    return quant_min, quant_max  # type: ignore[return-value]

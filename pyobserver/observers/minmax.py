"""Observers of the minimum and maximum, per tensor and per channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..compat.hosts import offer_to_hosts
from ..dtypes import PER_CHANNEL, PER_TENSOR, check_qscheme
from ..ops.minmax import minmax
from ..ops.observe_fake_quantize import observe_fake_quantize
from . import merging
from .base import UniformQuantizationObserverBase, new_full


def _options(observer: Any, own: dict[str, Any]) -> tuple[int | None, str, float]:
    """Axis, update and averaging constant, attributes of the instance or of a subclass."""
    axis, averaging_constant, update = None, 0.01, own["_update"]
    try:
        if own["_per_channel"]:
            axis = own["ch_axis"]
        if update == "moving_average":
            averaging_constant = own["averaging_constant"]
    except KeyError:
        axis = observer.ch_axis if own["_per_channel"] else None
        averaging_constant = getattr(observer, "averaging_constant", averaging_constant)
    return axis, update, averaging_constant


class MinMaxBase(UniformQuantizationObserverBase):
    """Minimum and maximum, folded in by one op; what differs is the update and the axis."""

    _update: str
    _per_channel: bool
    ch_axis: int  # of those per channel
    averaging_constant: float  # of the moving averages

    @property
    def _merges(self) -> Mapping[str, str]:
        if self._update == "memoryless" or self.is_dynamic:
            return {}  # of the last tensor alone
        return merging.AVERAGED if self._update == "moving_average" else merging.RUNNING

    def observe(self, x: Tensor, enabled: Tensor | None = None) -> None:
        own = self.__dict__  # an attribute of an nn.Module costs a tenth of the call
        buffers, min_val = own["_buffers"], own["_buffers"]["min_val"]
        axis, update, averaging_constant = _options(self, own)
        if axis is not None and min_val.numel() == 0 and x.numel() > 0:
            self._observe_first(x, enabled)
            return
        minmax(
            x,
            min_val,
            buffers["max_val"],
            buffers["nonfinite_count"],
            axis,
            update,
            averaging_constant,
            own["nonfinite"],
            enabled,
        )

    def _observe_first(self, x: Tensor, enabled: Tensor | None) -> None:
        """Size the state of the channels, and keep that only where all goes well."""
        unsized = self.min_val, self.max_val
        axis = self.ch_axis
        channels = x.shape[axis] if -x.dim() <= axis < x.dim() else 0
        self.min_val = new_full(channels, torch.inf, unsized[0])
        self.max_val = new_full(channels, -torch.inf, unsized[1])
        try:
            if channels:
                self.observe(x, enabled)
            else:
                _checks.check_axis("minmax", x, axis)
        except Exception:
            self.min_val, self.max_val = unsized
            raise

    def observe_fake_quantize(
        self,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        mapping: str | None = None,
        observer_enabled: Tensor | None = None,
        fake_quant_enabled: Tensor | None = None,
    ) -> Tensor:
        """Observe ``x``, write its scale and zero point, and fake-quantize with them, in one call.

        Args:
            scale, zero_point: as many elements as the observer has ranges, see
                :func:`pyobserver.ops.observe_fake_quantize`.
            mapping: how scale and zero point are chosen; None: as the observer does.
            observer_enabled, fake_quant_enabled: one element each, read where the data is.
        """
        own = self.__dict__
        buffers = own["_buffers"]
        mapping = mapping or self._mapping
        axis, update, averaging_constant = _options(self, own)
        return observe_fake_quantize(
            x,
            buffers["min_val"],
            buffers["max_val"],
            buffers["nonfinite_count"],
            scale,
            zero_point,
            buffers["eps"],
            own["quant_min"],
            own["quant_max"],
            observer_enabled,
            fake_quant_enabled,
            mapping,
            axis,
            self._symmetric_zero_point if mapping == "symmetric" else 0,
            update,
            averaging_constant,
            own["nonfinite"],
        )


@offer_to_hosts
class MinMaxObserver(MinMaxBase):
    """The least and the greatest value of all tensors seen.

    Args:
        memoryless: forget the earlier tensors each time (torch up to 1.12).
        Others: :class:`UniformQuantizationObserverBase`; qscheme is a per-tensor one.

    Buffers: ``min_val``, ``max_val``: float32, 0-d; +inf and -inf before the first tensor.

    Source: ``torch.ao.quantization.MinMaxObserver``.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = torch.finfo(torch.float32).eps,
        is_dynamic: bool = False,
        memoryless: bool = False,
        **kwargs: Any,
    ):
        check_qscheme(type(self).__name__, qscheme, PER_TENSOR)
        super().__init__(
            dtype,
            qscheme,
            reduce_range,
            quant_min,
            quant_max,
            factory_kwargs,
            eps,
            is_dynamic,
            **kwargs,
        )
        self.memoryless = memoryless
        self._per_channel = False
        self._update = "memoryless" if memoryless else "running"
        device = torch.nn.factory_kwargs(factory_kwargs).get("device")
        self._register_range((), device)


@offer_to_hosts
class MovingAverageMinMaxObserver(MinMaxObserver):
    """The moving average of the tensors' least and greatest values; the first counts in full.

    Args:
        averaging_constant: the weight of a new tensor, in (0, 1].
        is_dynamic: only with ``averaging_constant=1``.
        Others: :class:`MinMaxObserver`.

    Source: ``torch.ao.quantization.MovingAverageMinMaxObserver``.
    """

    def __init__(
        self,
        averaging_constant: float = 0.01,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = torch.finfo(torch.float32).eps,
        is_dynamic: bool = False,
        **kwargs: Any,
    ):
        check_averaging_constant(type(self).__name__, averaging_constant)
        if is_dynamic and averaging_constant != 1:
            raise NotImplementedError(
                f"{type(self).__name__}: averaging_constant: expected 1 for dynamic quantization, "
                f"got {averaging_constant}"
            )
        super().__init__(
            dtype,
            qscheme,
            reduce_range,
            quant_min,
            quant_max,
            eps=eps,
            is_dynamic=is_dynamic,
            **kwargs,
        )
        self.averaging_constant = averaging_constant
        self._update = "moving_average"


@offer_to_hosts
class PerChannelMinMaxObserver(MinMaxBase):
    """The least and the greatest value of each channel of all tensors seen.

    The state is sized once: here with ``num_channels``, else by the first tensor. A tensor with
    another number of channels is an error after that.

    Args:
        ch_axis: the channel axis of the tensors; negative ones count from the last.
        num_channels: size the state now, so that the first forward compiles and exports too.
        memoryless: forget the earlier tensors each time (torch up to 1.12).
        Others: :class:`UniformQuantizationObserverBase`; qscheme is a per-channel one.

    Buffers: ``min_val``, ``max_val``: float32 ``(channels,)``; ``(0,)`` until sized.

    Source: ``torch.ao.quantization.PerChannelMinMaxObserver``.
    """

    def __init__(
        self,
        ch_axis: int = 0,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_channel_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = torch.finfo(torch.float32).eps,
        is_dynamic: bool = False,
        memoryless: bool = False,
        num_channels: int | None = None,
        **kwargs: Any,
    ):
        check_qscheme(type(self).__name__, qscheme, PER_CHANNEL)
        if is_dynamic:
            raise NotImplementedError(
                f"{type(self).__name__}: is_dynamic: expected False (no dynamic quantization per "
                "channel), got True"
            )
        super().__init__(
            dtype,
            qscheme,
            reduce_range,
            quant_min,
            quant_max,
            factory_kwargs,
            eps,
            is_dynamic,
            **kwargs,
        )
        self.memoryless = memoryless
        self._per_channel = True
        self._update = "memoryless" if memoryless else "running"
        self.ch_axis = ch_axis
        if num_channels is not None and num_channels < 1:
            raise ValueError(
                f"{type(self).__name__}: num_channels: expected at least 1 or None, "
                f"got {num_channels}"
            )
        device = torch.nn.factory_kwargs(factory_kwargs).get("device")
        size = (num_channels or 0,)
        self._register_range(size, device)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        version = local_metadata.get("version")
        for name in ("min_val", "max_val"):
            old = prefix + name + "s"
            if (version is None or version < 3) and old in state_dict:
                # renamed in version 3; a copy, for the caller's dict is not ours to change
                state_dict = {(prefix + name if k == old else k): v for k, v in state_dict.items()}
        # the buffers take the size of the saved ones, both or neither
        saved = [state_dict.get(prefix + name) for name in ("min_val", "max_val")]
        sizes = {value.numel() for value in saved if value is not None and value.dim() <= 1}
        if None not in saved and len(sizes) == 1 and self.min_val.numel() not in sizes:
            (size,) = sizes
            self.min_val = new_full(size, torch.inf, self.min_val)
            self.max_val = new_full(size, -torch.inf, self.max_val)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@offer_to_hosts
class MovingAveragePerChannelMinMaxObserver(PerChannelMinMaxObserver):
    """The moving average of each channel's least and greatest value; the first counts in full.

    Args:
        averaging_constant: the weight of a new tensor, in (0, 1].
        Others: :class:`PerChannelMinMaxObserver`.

    Source: ``torch.ao.quantization.MovingAveragePerChannelMinMaxObserver``.
    """

    def __init__(
        self,
        averaging_constant: float = 0.01,
        ch_axis: int = 0,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_channel_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = torch.finfo(torch.float32).eps,
        is_dynamic: bool = False,
        **kwargs: Any,
    ):
        check_averaging_constant(type(self).__name__, averaging_constant)
        super().__init__(
            ch_axis,
            dtype,
            qscheme,
            reduce_range,
            quant_min,
            quant_max,
            eps=eps,
            is_dynamic=is_dynamic,
            **kwargs,
        )
        self.averaging_constant = averaging_constant
        self._update = "moving_average"


@offer_to_hosts
class PerBlockMinMaxObserver(MinMaxBase):
    """The least and the greatest value of each block of all tensors seen.

    The state is sized once: here with ``shape``, else by the first tensor. Scales and zero points
    have the shape of the grid of blocks, as :func:`pyobserver.ops.fake_quantize` takes them with
    ``block_size``.

    Args:
        block_size: sizes of a block, one for each dimension, each a divisor of the tensors' sizes;
            a number: ``(1, number)``, groups of as many in the rows of a matrix.
        averaging_constant: the weight of a new tensor, in (0, 1], of a moving average as of
            :class:`MovingAverageMinMaxObserver`; None: the extremes of all tensors.
        shape: that of the tensors: size the state now.
        Others: :class:`UniformQuantizationObserverBase`; qscheme is a per-tensor one.

    Buffers: ``min_val``, ``max_val``: float32, shaped as the grid of blocks; ``(0,)`` until sized.
    """

    def __init__(
        self,
        block_size: int | Sequence[int],
        averaging_constant: float | None = None,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = torch.finfo(torch.float32).eps,
        is_dynamic: bool = False,
        shape: Sequence[int] | None = None,
        **kwargs: Any,
    ):
        owner = type(self).__name__
        check_qscheme(owner, qscheme, PER_TENSOR)
        if is_dynamic:
            raise NotImplementedError(
                f"{owner}: is_dynamic: expected False (no dynamic quantization per block), got True"
            )
        if averaging_constant is not None:
            check_averaging_constant(owner, averaging_constant)
        super().__init__(
            dtype, qscheme, reduce_range, quant_min, quant_max, factory_kwargs, eps, is_dynamic,
            **kwargs,
        )  # fmt: skip
        self.block_size = (1, block_size) if isinstance(block_size, int) else tuple(block_size)
        self.averaging_constant = 1.0 if averaging_constant is None else averaging_constant
        self._per_channel = False
        self._update = "running" if averaging_constant is None else "moving_average"
        groups: tuple[int, ...] = (0,)
        if shape is not None:
            groups = self._groups_of(torch.empty(tuple(shape), device="meta"))
        self._register_range(groups, torch.nn.factory_kwargs(factory_kwargs).get("device"))

    def _groups_of(self, x: Tensor) -> tuple[int, ...]:
        _checks.check_block_size("minmax", x, None, self.block_size)
        return tuple(whole // size for whole, size in zip(x.shape, self.block_size, strict=True))

    def observe(self, x: Tensor, enabled: Tensor | None = None) -> None:
        _checks.check_input("minmax", "x", x)
        if x.numel() == 0:
            return
        unsized = self.min_val, self.max_val
        if self.min_val.numel() == 0:
            self._size(self._groups_of(x))
        try:
            minmax(
                x, self.min_val, self.max_val, self.nonfinite_count, None, self._update,
                self.averaging_constant, self.nonfinite, enabled, self.block_size,
            )  # fmt: skip
        except Exception:
            self.min_val, self.max_val = unsized
            raise

    def _size(self, groups: tuple[int, ...]) -> None:
        with torch.inference_mode(False):
            self.min_val = self.min_val.new_full(groups, torch.inf)
            self.max_val = self.max_val.new_full(groups, -torch.inf)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # the buffers take the size of the saved ones, both or neither
        saved = [state_dict.get(prefix + name) for name in ("min_val", "max_val")]
        shapes = {tuple(value.shape) for value in saved if value is not None}
        if None not in saved and len(shapes) == 1:
            (shape,) = shapes
            if len(shape) == len(self.block_size) or shape == (0,):
                self._size(shape)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def check_averaging_constant(owner: str, averaging_constant: float) -> None:
    if not isinstance(averaging_constant, Real):
        raise TypeError(
            f"{owner}: averaging_constant: expected a number, got {averaging_constant!r}"
        )
    if not 0.0 < averaging_constant <= 1.0:
        raise ValueError(
            f"{owner}: averaging_constant: expected a value in (0, 1], got {averaging_constant}"
        )

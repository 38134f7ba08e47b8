"""Fake-quantize modules: an observer, and the fake-quantize op with the scale it chose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from .compat.hosts import host_classes, offer_to_hosts
from .dtypes import PER_CHANNEL, PER_TENSOR, SYMMETRIC, check_qscheme
from .observers import (
    FixedQParamsObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    UniformQuantizationObserverBase,
    default_fixed_qparams_range_0to1_observer,
    default_fixed_qparams_range_neg1to1_observer,
)
from .observers.base import StatisticsModule, new_full
from .ops.choose_qparams import choose_qparams
from .ops.fake_quantize import fake_quantize
from .ops.recomputation import backward_task, unless_recomputing

# exactly these: a subclass may observe in a way of its own
_ONE_CALL = frozenset(
    (
        MinMaxObserver,
        MovingAverageMinMaxObserver,
        PerChannelMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
    )
)

__all__ = [
    "FakeQuantize",
    "FakeQuantizeBase",
    "FixedQParamsFakeQuantize",
    "FusedMovingAvgObsFakeQuantize",
    "default_affine_fixed_qparams_fake_quant",
    "default_dynamic_fake_quant",
    "default_embedding_fake_quant",
    "default_embedding_fake_quant_4bit",
    "default_fake_quant",
    "default_fixed_qparams_range_0to1_fake_quant",
    "default_fixed_qparams_range_neg1to1_fake_quant",
    "default_fused_act_fake_quant",
    "default_fused_per_channel_wt_fake_quant",
    "default_fused_wt_fake_quant",
    "default_histogram_fake_quant",
    "default_per_channel_weight_fake_quant",
    "default_symmetric_fixed_qparams_fake_quant",
    "default_weight_fake_quant",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "fused_per_channel_wt_fake_quant_range_neg_127_to_127",
    "fused_wt_fake_quant_range_neg_127_to_127",
]


@offer_to_hosts
class FakeQuantizeBase(StatisticsModule, ABC):
    """Base of the fake-quantize modules: the two switches.

    The switches are buffers that the ops read where the data is, so that turning one costs no
    device sync, no new graph and no recompilation.

    Buffers: ``fake_quant_enabled``, ``observer_enabled``: one element each, 0 or 1.

    Source: ``torch.ao.quantization.FakeQuantizeBase``.
    """

    _flag_dtype = torch.uint8  # NCCL does not broadcast bool
    fake_quant_enabled: Tensor
    observer_enabled: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fake_quant_enabled", torch.ones(1, dtype=self._flag_dtype))
        self.register_buffer("observer_enabled", torch.ones(1, dtype=self._flag_dtype))

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def calculate_qparams(self) -> tuple[Tensor, Tensor]: ...

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round in forward, or pass the values through."""
        self.fake_quant_enabled.fill_(int(enabled))

    def disable_fake_quant(self) -> None:
        self.enable_fake_quant(False)

    def enable_observer(self, enabled: bool = True) -> None:
        """Gather statistics in forward and choose the scale anew, or keep both."""
        self.observer_enabled.fill_(int(enabled))

    def disable_observer(self) -> None:
        self.enable_observer(False)


@offer_to_hosts
class FakeQuantize(FakeQuantizeBase):
    """Observe a tensor, choose scale and zero point, quantize to integers and back.

    The gradient goes straight through where the value was inside the grid; see
    :func:`pyobserver.ops.fake_quantize`.

    Args:
        observer: a class or factory of an observer: ours, torch.ao's or one with their interface
            (for those the switch is read on the host). Not one of blocks: there is one scale, or
            one a channel.
        quant_min, quant_max: the integer range, handed to the observer.
        is_dynamic: handed to the observer.
        observer_kwargs: further arguments of the observer.

    Attributes:
        activation_post_process: the observer.

    Buffers: ``scale`` float32 and ``zero_point`` int32 (float32 for float qparams), ``(1,)`` or
    ``(channels,)`` once sized by the first tensor.

    Under activation checkpointing the forward that is run again, in the backward, observes nothing
    and quantizes by the scale as it is then: the state is updated once a step, and the gradients
    are those without checkpointing. A module that is called several times between a forward and
    its backward (shared layers, several micro-batches in flight) has the scale of its last call
    there; with the observer off that is the scale of each.

    Source: ``torch.ao.quantization.FakeQuantize``.
    """

    scale: Tensor
    zero_point: Tensor
    _observes_in_one_call = True
    _serves_blocks = False
    _mapping: str | None = None  # of scale and zero point; None: the observer's

    def __init__(
        self,
        observer: Any = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        **observer_kwargs: Any,
    ):
        super().__init__()
        if not callable(observer):
            raise TypeError(
                f"{type(self).__name__}: observer: expected a class or factory of observers, "
                f"got {observer!r}"
            )
        if quant_min is not None or quant_max is not None:
            observer_kwargs.update(quant_min=quant_min, quant_max=quant_max)
        if is_dynamic:  # else left out: not every observer knows it
            observer_kwargs["is_dynamic"] = True
        self.activation_post_process = observer(**observer_kwargs)
        watcher = self.activation_post_process
        served = self._serves_blocks or not hasattr(watcher, "block_size")
        if not served or not hasattr(watcher, "qscheme"):
            raise TypeError(
                f"{type(self).__name__}: observer: expected one of a scale per tensor or channel, "
                f"got {type(watcher).__name__}"
            )
        check_qscheme(type(self).__name__, watcher.qscheme, PER_TENSOR + PER_CHANNEL)
        self.quant_min, self.quant_max = watcher.quant_min, watcher.quant_max
        self.is_dynamic = watcher.is_dynamic
        self.dtype, self.qscheme = watcher.dtype, watcher.qscheme
        self.is_per_channel = self.qscheme in PER_CHANNEL
        self.is_symmetric_quant = self.qscheme in SYMMETRIC
        self.ch_axis = getattr(watcher, "ch_axis", -1)
        float_zero_point = self.qscheme == torch.per_channel_affine_float_qparams
        zero_dtype = torch.float32 if float_zero_point else torch.int32
        like = getattr(watcher, "min_val", torch.empty(0))
        size = max(1, like.numel())
        self.register_buffer("scale", torch.ones(size, device=like.device))
        self.register_buffer("zero_point", torch.zeros(size, dtype=zero_dtype, device=like.device))

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The observer's scale and zero point."""
        return self.activation_post_process.calculate_qparams()

    def forward(self, x: Tensor) -> Tensor:
        """``x`` rounded to the grid, shaped as x; also updates the observer and the scale."""
        if x.numel() == 0:
            return x
        own = self.__dict__  # an attribute of an nn.Module costs a fiftieth of the call
        buffers = own["_buffers"]
        watcher = own["_modules"]["activation_post_process"]
        scale = buffers["scale"]
        observer_enabled = buffers["observer_enabled"]
        if is_dynamo_compiling() or backward_task() != -1:
            observer_enabled = unless_recomputing(observer_enabled)
        if (
            self._observes_in_one_call
            and type(watcher) in _ONE_CALL
            and "observe" not in watcher.__dict__
        ):
            if watcher.__dict__["_buffers"]["min_val"].numel() != scale.numel():
                return self._forward_first(x, watcher)
            return watcher.observe_fake_quantize(
                x,
                scale,
                buffers["zero_point"],
                self._mapping,
                observer_enabled,
                buffers["fake_quant_enabled"],
            )
        self._observe(x, observer_enabled)
        return fake_quantize(
            x,
            self.scale,
            self.zero_point,
            watcher.quant_min,
            watcher.quant_max,
            self.ch_axis if self.is_per_channel else None,
            buffers["fake_quant_enabled"],
        )

    def _forward_first(self, x: Tensor, watcher: Any) -> Tensor:
        """Size the state of the channels, and keep that only where all goes well.

        So the first forward is of the same ops as one that checkpointing runs again.
        """
        modules = self, watcher
        unsized = [dict(module._buffers) for module in modules]
        try:
            watcher.observe(x, torch.zeros_like(self.observer_enabled))
            self._resize(watcher.min_val)
            return self.forward(x)
        except Exception:
            for module, buffers in zip(modules, unsized, strict=True):
                module._buffers.update(buffers)
            raise

    def _observe(self, x: Tensor, enabled: Tensor) -> None:
        watcher = self.activation_post_process
        if isinstance(watcher, UniformQuantizationObserverBase):
            watcher.observe(x, enabled)
        elif bool(enabled):
            watcher(x.detach())
        else:
            return
        self._choose_qparams(watcher, enabled)

    def update_scale(self) -> None:
        """Choose scale and zero point by the statistics as they are; of none they stay.

        Whether the observer is on or off; without a device sync, but where the observer is a
        host's.
        """
        watcher = self.activation_post_process
        fed = self.observer_enabled
        if isinstance(watcher, UniformQuantizationObserverBase):
            if watcher.min_val.numel() == 0:
                return
            fed = ~(watcher.min_val > watcher.max_val).all()  # a NaN was fed
        self._choose_qparams(watcher, fed)

    def _choose_qparams(self, watcher: Any, enabled: Tensor) -> None:
        if isinstance(watcher, UniformQuantizationObserverBase):
            self._resize(watcher.min_val)
            watcher.write_qparams(self.scale, self.zero_point, enabled)
        else:
            scale, zero_point = watcher.calculate_qparams()
            self._resize(scale)
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)

    def _resize(self, like: Tensor) -> None:
        """To as many as another tensor has values."""
        size = like.numel()
        if self.scale.numel() != size:
            self.scale = new_full(size, 1, self.scale)
            self.zero_point = new_full(size, 0, self.zero_point)

    def extra_repr(self) -> str:
        return (
            f"fake_quant_enabled={self.fake_quant_enabled}, "
            f"observer_enabled={self.observer_enabled}, "
            f"quant_min={self.quant_min}, quant_max={self.quant_max}, dtype={self.dtype}, "
            f"qscheme={self.qscheme}, ch_axis={self.ch_axis}, "
            f"scale={self.scale}, zero_point={self.zero_point}"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        saved = state_dict.get(prefix + "scale")
        if saved is not None:
            self._resize(saved)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@offer_to_hosts
class FixedQParamsFakeQuantize(FakeQuantize):
    """Fake-quantize with a scale and zero point that are given.

    Args:
        observer: a class or factory of :class:`FixedQParamsObserver`.

    Source: ``torch.ao.quantization.FixedQParamsFakeQuantize``.
    """

    def __init__(self, observer: Any):
        super().__init__(observer=observer)
        served: tuple[type[Any], ...] = (
            FixedQParamsObserver,
            *host_classes("FixedQParamsObserver"),
        )
        if not isinstance(self.activation_post_process, served):
            raise TypeError(
                f"{type(self).__name__}: observer: expected a FixedQParamsObserver, "
                f"got {type(self.activation_post_process).__name__}"
            )
        self._observer_ctr = observer
        self.scale.copy_(self.activation_post_process.scale)
        self.zero_point.copy_(self.activation_post_process.zero_point)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    _observes_in_one_call = False  # the parameters are fixed

    def _observe(self, x: Tensor, enabled: Tensor) -> None:
        """Nothing is chosen."""


@offer_to_hosts
class FusedMovingAvgObsFakeQuantize(FakeQuantize):
    """Fake-quantize over a moving-average observer, per tensor or per channel.

    The scale it trains with is that of torch's fused kernel, which is not that of the observer's
    ``calculate_qparams``, which the converters ask: a symmetric range is divided by 127 or 128
    levels instead of 127.5, a one-sided one is affine, and the least scale is 6.1e-5.

    Args:
        observer: a class or factory of a MovingAverage(PerChannel)MinMaxObserver.
        Others: :class:`FakeQuantize`.

    Source: ``torch.ao.quantization.FusedMovingAvgObsFakeQuantize``.
    """

    _flag_dtype = torch.int64

    def __init__(
        self,
        observer: Any = MovingAverageMinMaxObserver,
        quant_min: int = 0,
        quant_max: int = 255,
        **observer_kwargs: Any,
    ):
        super().__init__(observer, quant_min, quant_max, **observer_kwargs)
        ours = (MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver)
        served: tuple[type[Any], ...] = (*ours, *host_classes(*(cls.__name__ for cls in ours)))
        if not isinstance(self.activation_post_process, served):
            raise TypeError(
                f"{type(self).__name__}: observer: expected a MovingAverageMinMaxObserver or "
                "MovingAveragePerChannelMinMaxObserver, "
                f"got {type(self.activation_post_process).__name__}"
            )

        if self.qscheme != torch.per_channel_affine_float_qparams:
            self._mapping = "fused_symmetric" if self.is_symmetric_quant else "fused_affine"

    def _choose_qparams(self, watcher: Any, enabled: Tensor) -> None:
        if self._mapping is None:
            super()._choose_qparams(watcher, enabled)
            return
        self._resize(watcher.min_val)
        choose_qparams(
            watcher.min_val,
            watcher.max_val,
            self.scale,
            self.zero_point,
            watcher.eps,
            watcher.quant_min,
            watcher.quant_max,
            self._mapping,
            0,
            enabled,
        )


def as_fake_quantize(mod: nn.Module) -> Any:
    """The module if it is a fake-quantize, ours or a host's (a model may hold both); else None."""
    return mod if isinstance(mod, (FakeQuantizeBase, *host_classes("FakeQuantizeBase"))) else None


def disable_fake_quant(mod: nn.Module) -> None:
    """Let values pass one fake-quantize module: ``model.apply(disable_fake_quant)``."""
    if fake_quantize_module := as_fake_quantize(mod):
        fake_quantize_module.disable_fake_quant()


def enable_fake_quant(mod: nn.Module) -> None:
    """Round in one fake-quantize module: ``model.apply(enable_fake_quant)``."""
    if fake_quantize_module := as_fake_quantize(mod):
        fake_quantize_module.enable_fake_quant()


def disable_observer(mod: nn.Module) -> None:
    """Freeze one fake-quantize module's statistics: ``model.apply(disable_observer)``."""
    if fake_quantize_module := as_fake_quantize(mod):
        fake_quantize_module.disable_observer()


def enable_observer(mod: nn.Module) -> None:
    """Gather statistics in one fake-quantize module: ``model.apply(enable_observer)``."""
    if fake_quantize_module := as_fake_quantize(mod):
        fake_quantize_module.enable_observer()


default_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=0,
    quant_max=255,
    dtype=torch.quint8,
    qscheme=torch.per_tensor_affine,
    reduce_range=True,
)
default_weight_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=-128,
    quant_max=127,
    dtype=torch.qint8,
    qscheme=torch.per_tensor_symmetric,
    reduce_range=False,
)
default_dynamic_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=0,
    quant_max=255,
    is_dynamic=True,
    dtype=torch.quint8,
    averaging_constant=1,
)
default_fixed_qparams_range_neg1to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=default_fixed_qparams_range_neg1to1_observer
)
default_fixed_qparams_range_0to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=default_fixed_qparams_range_0to1_observer
)
# the names of torch 1.x
default_symmetric_fixed_qparams_fake_quant = default_fixed_qparams_range_neg1to1_fake_quant
default_affine_fixed_qparams_fake_quant = default_fixed_qparams_range_0to1_fake_quant
default_per_channel_weight_fake_quant = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    quant_min=-128,
    quant_max=127,
    dtype=torch.qint8,
    qscheme=torch.per_channel_symmetric,
    reduce_range=False,
    ch_axis=0,
)
default_embedding_fake_quant = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    qscheme=torch.per_channel_affine_float_qparams,
    dtype=torch.quint8,
    quant_min=0,
    quant_max=255,
    ch_axis=0,
    averaging_constant=1,
)
default_embedding_fake_quant_4bit = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    qscheme=torch.per_channel_affine_float_qparams,
    ch_axis=0,
    dtype=torch.quint4x2,
    averaging_constant=1,
)
default_histogram_fake_quant = FakeQuantize.with_args(
    observer=HistogramObserver,
    quant_min=0,
    quant_max=255,
    dtype=torch.quint8,
    qscheme=torch.per_tensor_affine,
    reduce_range=True,
)
default_fused_act_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, quant_min=0, quant_max=255, dtype=torch.quint8
)
default_fused_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver,
    quant_min=-128,
    quant_max=127,
    dtype=torch.qint8,
    qscheme=torch.per_tensor_symmetric,
)
default_fused_per_channel_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    quant_min=-128,
    quant_max=127,
    dtype=torch.qint8,
    qscheme=torch.per_channel_symmetric,
)
fused_wt_fake_quant_range_neg_127_to_127 = default_fused_wt_fake_quant.with_args(
    quant_min=-127, quant_max=127, eps=2**-12
)
fused_per_channel_wt_fake_quant_range_neg_127_to_127 = (
    default_fused_per_channel_wt_fake_quant.with_args(quant_min=-127, quant_max=127, eps=2**-12)
)

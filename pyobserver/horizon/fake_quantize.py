"""Horizon's fake-quantize: an observer, the scale it chose, and one of three states."""

from __future__ import annotations

import enum
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import fake_quantize as engine
from ..observers import UniformQuantizationObserverBase
from ..ops.fake_quantize import fake_quantize
from ..ops.recomputation import is_recomputing, unless_recomputing
from .dtypes import QuantDType
from .observers import FixedScaleObserver, MinMaxObserver, ObserverBase


class FakeQuantState(enum.Enum):
    """What fake-quantizes do; the value says whether they observe, and whether they quantize.

    * ``CALIBRATION``: observe, and pass the values through.
    * ``VALIDATION``: fake-quantize by the scale chosen; observe nothing.
    * ``QAT``: observe, choose the scale anew and fake-quantize, with gradients.
    """

    CALIBRATION = (True, False)
    VALIDATION = (False, True)
    QAT = (True, True)


class FakeQuantize(engine.FakeQuantize):
    """Fake-quantize over one of Horizon's observers, per tensor or per channel.

    In ``CALIBRATION`` the scale is chosen when the state is left, or saved in a state_dict: a
    search is run once, and not for every tensor. The gradient is that of
    :func:`pyobserver.ops.fake_quantize`.

    Args:
        observer: a class or factory of an :class:`ObserverBase`.
        quant_min, quant_max, observer_kwargs: handed to the observer.

    Attributes:
        activation_post_process: the observer.

    Buffers: ``scale`` float32, ``zero_point`` int32 and 0: ``(1,)``, or ``(channels,)`` once sized;
    the two switches of :class:`pyobserver.FakeQuantizeBase`.

    Raises:
        TypeError: ``observer`` makes something else.
    """

    def __init__(
        self,
        observer: Any = MinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        **observer_kwargs: Any,
    ):
        super().__init__(observer, quant_min, quant_max, **observer_kwargs)
        watcher = self.activation_post_process
        if not isinstance(watcher, ObserverBase):
            raise TypeError(
                f"{type(self).__name__}: observer: expected an observer of pyobserver.horizon, "
                f"got {type(watcher).__name__}"
            )
        self._follow_observer()
        self._follow_switches()
        if isinstance(watcher, FixedScaleObserver):
            self.update_scale()

    def _follow_observer(self) -> None:
        watcher = self.activation_post_process
        self.dtype = watcher.dtype
        self.quant_min, self.quant_max = watcher.quant_min, watcher.quant_max

    def _follow_switches(self) -> None:
        """Read the switches on the host: forward may call on other ranks, and must know when."""
        self._observes = bool(self.observer_enabled)
        self._quantizes = bool(self.fake_quant_enabled)

    def enable_observer(self, enabled: bool = True) -> None:
        """Gather statistics in forward, or not; leaving CALIBRATION chooses the scale."""
        if not enabled:
            self._choose_if_calibrating()
        super().enable_observer(enabled)
        self._observes = bool(enabled)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round in forward, or pass the values through; leaving CALIBRATION chooses the scale."""
        if enabled:
            self._choose_if_calibrating()
        super().enable_fake_quant(enabled)
        self._quantizes = bool(enabled)

    def _choose_if_calibrating(self) -> None:
        if self.state is FakeQuantState.CALIBRATION and not self.scale.is_meta:
            self.update_scale()

    @property
    def state(self) -> FakeQuantState | None:
        """The state; None where both switches are off."""
        switches = (self._observes, self._quantizes)
        return FakeQuantState(switches) if any(switches) else None

    def set_state(self, state: FakeQuantState) -> None:
        """Change the state; leaving CALIBRATION chooses the scale.

        Raises:
            TypeError: no FakeQuantState.
        """
        if not isinstance(state, FakeQuantState):
            raise TypeError(f"set_state: state: expected a FakeQuantState, got {state!r}")
        observes, quantizes = state.value
        self.enable_observer(observes)
        self.enable_fake_quant(quantizes)

    def is_fed(self) -> bool:
        """Whether the observer has seen any values; reads the device."""
        return self.activation_post_process.is_fed()

    def update_scale(self) -> None:
        """Choose the scale by the statistics as they are; of none it stays. Reads the device."""
        if self.is_fed():
            self._choose_qparams(self.activation_post_process)

    def reset_dtype(self, dtype: QuantDType | torch.dtype) -> None:
        """Quantize to another type; the scale is chosen anew, from what was collected.

        Raises:
            ValueError: a type that is not served; nothing has changed then.
        """
        self.activation_post_process.reset_dtype(dtype)
        self._follow_observer()
        self.update_scale()

    def _observe(self, x: Tensor, enabled: Tensor) -> None:
        watcher = self.activation_post_process
        # a subclass may observe in a way of its own, and a forward of other ranks is waited for
        if type(watcher).forward is UniformQuantizationObserverBase.forward and not watcher.syncs:
            watcher.observe(x, enabled)
        elif not is_recomputing():
            watcher(x)

    def _choose_qparams(self, watcher: Any, enabled: Tensor | None = None) -> None:
        self._resize(watcher.min_val)
        watcher.write_qparams(self.scale, self.zero_point, enabled)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` as the state says: itself, or rounded to the grid, shaped as x."""
        watcher = self.activation_post_process
        if x.numel() == 0:
            if self._observes and watcher.syncs and not is_recomputing():
                watcher(x.detach())  # for the other ranks wait for this one
                if self._quantizes:
                    self.update_scale()
            return x
        if self._observes:
            enabled = unless_recomputing(self.observer_enabled)
            if self._quantizes and self._is_one_call(watcher):
                if watcher.min_val.numel() != self.scale.numel():
                    return self._forward_first(x, watcher)
                return watcher.observe_fake_quantize(
                    x, self.scale, self.zero_point, observer_enabled=enabled
                )
            self._observe(x.detach(), enabled)
            if self._quantizes:
                self._choose_qparams(watcher, enabled)
        if not self._quantizes:
            return x
        axis = self.ch_axis if self.is_per_channel else None
        return fake_quantize(
            x, self.scale, self.zero_point, watcher.quant_min, watcher.quant_max, axis
        )

    def extra_repr(self) -> str:
        state = None if self.state is None else self.state.name
        shown = f"{state}, dtype={self.dtype}, grid=[{self.quant_min}, {self.quant_max}]"
        if self.is_per_channel:
            return f"{shown}, ch_axis={self.ch_axis}, channels={self.scale.numel()}"
        return shown if self.scale.is_meta else f"{shown}, scale={self.scale.item():.6g}"

    def _is_one_call(self, watcher: Any) -> bool:
        # exactly this class: a subclass may observe in a way of its own
        return type(watcher) is MinMaxObserver and watcher.observes_in_one_call

    def _save_to_state_dict(self, *args: Any) -> None:
        self._choose_if_calibrating()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # the observer's own turn comes after this
        saved = state_dict.get(f"{prefix}activation_post_process._extra_state")
        if saved is not None:
            self.activation_post_process.set_extra_state(saved)
            self._follow_observer()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self._follow_switches()


def set_fake_quantize(model: nn.Module, state: FakeQuantState) -> None:
    """Put every fake-quantize of a model into a state.

    Args:
        model: a prepared model, or one fake-quantize.
        state: see :class:`FakeQuantState`.

    Raises:
        TypeError: no FakeQuantState.
        ValueError: there is no fake-quantize in the model.

    Warns:
        UserWarning: VALIDATION with fake-quantizes that were never fed, with their names.
    """
    found = fake_quantizes("set_fake_quantize", model)
    for module in found.values():
        module.set_state(state)
    if state is FakeQuantState.VALIDATION:
        unfed = _unfed(found)
        if unfed:
            warnings.warn(
                "set_fake_quantize: never fed, so with the scale they had before: "
                f"{', '.join(unfed)}",
                stacklevel=2,
            )


def fake_quantizes(owner: str, model: nn.Module) -> dict[str, FakeQuantize]:
    """The fake-quantizes of a model by name; none is an error."""
    found = {
        name: module for name, module in model.named_modules() if isinstance(module, FakeQuantize)
    }
    if not found:
        raise ValueError(
            f"{owner}: model: expected a prepared one, got {type(model).__name__} without "
            "FakeQuantize"
        )
    return found


def calibrated(owner: str, model: nn.Module) -> dict[str, FakeQuantize]:
    """The fake-quantizes of a model by name; none, or one that was never fed, is an error."""
    found = fake_quantizes(owner, model)
    if unfed := _unfed(found):
        raise ValueError(
            f"{owner}: model: expected a calibrated one, got never fed: {', '.join(unfed)}"
        )
    return found


def _unfed(found: dict[str, FakeQuantize]) -> list[str]:
    return [name for name, module in found.items() if not module.is_fed()]

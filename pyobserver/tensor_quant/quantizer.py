"""A module that quantizes a tensor by its amax: given, calibrated, learned, or of each tensor."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _checks, ranges
from ..observers import (
    LogHistogramObserver,
    MinMaxObserver,
    PerChannelLogHistogramObserver,
    PerChannelMinMaxObserver,
    UniformQuantizationObserverBase,
)
from ..observers.base import StatisticsModule
from ..ops.minmax import minmax
from ..ops.recomputation import is_recomputing
from ..ops.tensor_quant import fake_tensor_quant, max_bound, tensor_quant
from .clip import Clip
from .descriptor import CALIB_METHODS, QuantDescriptor, check_flag, check_num_bits

_OWNER = "TensorQuantizer"


class TensorQuantizer(StatisticsModule):
    """Quantizes a tensor by its amax, see :func:`pyobserver.ops.fake_tensor_quant`.

    Without an amax that was given, loaded or learned, each tensor is quantized by its own.

    To calibrate: ``enable_calib()``, run the model, ``disable_calib()``,
    ``load_calib_amax("percentile")``. The statistics are those of our observers, in
    ``calibrator``: they merge over ranks (:func:`pyobserver.distributed.sync`), and are saved until
    ``reset_calib()``. With ``calib_method`` ``"max"`` only the greatest magnitude is kept, with any
    other a log histogram, of which any method can be asked.

    Args:
        quant_desc: how to quantize, see :class:`QuantDescriptor`.
        disabled: pass every tensor through.
        if_quant: quantize.
        if_clip: clip to the learned bounds; on by default where ``learn_amax`` is.
        if_calib: gather statistics.

    Attributes:
        calibrator: the observer of the statistics, None until the first tensor.
        num_bits, unsigned, narrow_range: may be changed.

    Buffers: ``_amax``: float32, 0-d or of one element an index of the axes; there once it is known.
    ``_calib_shape``: int64, the shape of the amax of the statistics; there while they are.
    Parameters: ``clip.clip_value_min``, ``clip.clip_value_max`` with ``learn_amax``.

    Raises:
        TypeError: quant_desc is no QuantDescriptor.
        ValueError: ``if_clip`` without ``learn_amax``.

    Source: ``TensorQuantizer`` of NVIDIA's pytorch-quantization, whose ``state_dict`` loads.
    Without its switch to torch's own fake-quantize, and with ``narrow_range`` handed on to
    ``tensor_quant`` too. There what is calibrated and not quantized is clipped to the bounds that
    are yet to be found.
    """

    _amax: Tensor
    _calib_shape: Tensor

    def __init__(
        self,
        quant_desc: QuantDescriptor | None = None,
        disabled: bool = False,
        if_quant: bool = True,
        if_clip: bool = False,
        if_calib: bool = False,
    ):
        super().__init__()
        desc = QuantDescriptor() if quant_desc is None else quant_desc
        if not isinstance(desc, QuantDescriptor):
            raise TypeError(
                f"{_OWNER}: quant_desc: expected a QuantDescriptor, got {type(desc).__name__}"
            )
        self._num_bits, self._unsigned = desc.num_bits, desc.unsigned
        self._narrow_range, self._fake_quant = desc.narrow_range, desc.fake_quant
        self._axis, self._scale_amax = desc.axis, desc.scale_amax
        self._learn_amax, self._calib_method = desc.learn_amax, desc.calib_method
        self._disabled, self._if_quant, self._if_calib = disabled, if_quant, if_calib
        self._if_clip = False
        self._scale: Tensor | None = None
        self._shape: list[int] = []
        self.calibrator: Any = None
        if desc.amax is not None:
            self.amax = desc.amax
        if self._learn_amax:
            initial = 1.0 if desc.amax is None else float(self._amax.max())
            self.clip = Clip(-initial, initial)
        if self._learn_amax or if_clip:
            self.enable_clip()

    @property
    def num_bits(self) -> int:
        return self._num_bits

    @num_bits.setter
    def num_bits(self, value: int) -> None:
        self._num_bits = check_num_bits(_OWNER, value)

    @property
    def unsigned(self) -> bool:
        return self._unsigned

    @unsigned.setter
    def unsigned(self, value: bool) -> None:
        self._unsigned = check_flag(_OWNER, "unsigned", value)

    @property
    def narrow_range(self) -> bool:
        return self._narrow_range

    @narrow_range.setter
    def narrow_range(self, value: bool) -> None:
        self._narrow_range = check_flag(_OWNER, "narrow_range", value)

    @property
    def axis(self) -> int | tuple[int, ...] | None:
        return self._axis

    @property
    def fake_quant(self) -> bool:
        return self._fake_quant

    @property
    def scale(self) -> Tensor | None:
        """Of the last tensor that was quantized to integers; None before, and with fake_quant."""
        return self._scale

    @property
    def step_size(self) -> Tensor | None:
        """The distance of two levels; None without an amax."""
        amax = self.amax
        return None if amax is None else amax / max_bound(self._num_bits, self._unsigned)

    @property
    def amax(self) -> Tensor | None:
        """The amax that was given or loaded, or None."""
        return self._buffers.get("_amax")

    @amax.setter
    def amax(self, value: float | list[Any] | np.ndarray | Tensor) -> None:
        if not isinstance(value, (int, float, list, np.ndarray, Tensor)):
            raise TypeError(
                f"{_OWNER}: amax: expected a number, a list, an ndarray or a tensor, "
                f"got {type(value).__name__}"
            )
        known = self.amax
        device = None if known is None else known.device
        new = torch.as_tensor(np.array(value) if isinstance(value, np.ndarray) else value)
        if new.device.type == "cpu" and bool((new < 0).any()):  # elsewhere that is a device sync
            raise ValueError(f"{_OWNER}: amax: expected no negative value, got {new.min().item()}")
        new = new.detach().to(device, torch.float32)
        if known is not None and known.shape != new.shape:
            raise TypeError(
                f"{_OWNER}: amax: expected shape {tuple(known.shape)}, which does not change, "
                f"got {tuple(new.shape)}"
            )
        self._set_amax(new)

    def _set_amax(self, value: Tensor) -> None:
        if self.amax is not None and self._amax.shape == value.shape:
            self._amax.copy_(value)
            return
        with torch.inference_mode(False):
            self.register_buffer("_amax", value.clone())

    def disable(self) -> None:
        """Pass every tensor through."""
        self._disabled = True

    def enable(self) -> None:
        self._disabled = False

    def disable_quant(self) -> None:
        """Do not quantize; gather statistics as before, or else clip."""
        self._if_quant = False

    def enable_quant(self) -> None:
        self._if_quant = True

    def disable_calib(self) -> None:
        """Gather no statistics; what was gathered is kept."""
        self._if_calib = False

    def enable_calib(self) -> None:
        self._if_calib = True

    def disable_clip(self) -> None:
        """Do not clip, and learn no bounds."""
        self._enable_clip(False)

    def enable_clip(self) -> None:
        self._enable_clip(True)

    def _enable_clip(self, enabled: bool) -> None:
        if not self._learn_amax:
            raise ValueError(f"{_OWNER}: clip: expected learn_amax, got learn_amax=False")
        self._if_clip = enabled
        self.clip.requires_grad_(enabled)

    def init_learn_amax(self) -> None:
        """Learn from the amax that was loaded on; of several, from the greatest.

        Raises:
            RuntimeError: without learn_amax, or without an amax.
        """
        if not self._learn_amax:
            raise RuntimeError(f"{_OWNER}.init_learn_amax: expected learn_amax, got False")
        if self.amax is None:
            raise RuntimeError(f"{_OWNER}.init_learn_amax: expected an amax, got none")
        with torch.no_grad():
            self.clip.clip_value_max.copy_(self._amax.max())
            self.clip.clip_value_min.copy_(-self._amax.max())

    def _device(self) -> torch.device:
        """Where the state is, the CPU where there is none."""
        state = next(iter(self.buffers()), next(iter(self.parameters()), None))
        return torch.device("cpu") if state is None else state.device

    def reset_calib(self) -> None:
        """Forget the statistics."""
        self.calibrator = None
        self._buffers.pop("_calib_shape", None)

    def _axes(self, dims: int) -> tuple[int, ...]:
        """The axes whose indices have an amax each, from 0 on."""
        axes = self._axis if isinstance(self._axis, tuple) else (self._axis,)
        for axis in axes:
            if axis is not None and not -dims <= axis < dims:
                raise ValueError(
                    f"{_OWNER}: axis: expected values in [{-dims}, {dims - 1}] for a {dims}-d "
                    f"tensor, got {self._axis}"
                )
        return tuple(sorted({axis % dims for axis in axes if axis is not None}))

    def _make_calibrator(self, shape: list[int], device: torch.device) -> None:
        classes = {
            (False, False): LogHistogramObserver,
            (False, True): PerChannelLogHistogramObserver,
            (True, False): MinMaxObserver,
            (True, True): PerChannelMinMaxObserver,
        }
        per_channel = len(shape) > 0
        # of one row for each amax, whatever their axes
        options: dict[str, Any] = {"ch_axis": 0} if per_channel else {}
        make = classes[self._calib_method == "max", per_channel]
        with torch.inference_mode(False):
            self.calibrator = make(dtype=torch.int8, factory_kwargs={"device": device}, **options)
            kept = torch.tensor(shape, dtype=torch.int64, device=device)
            self.register_buffer("_calib_shape", kept)
        self._shape = shape  # the same, to be looked at without a device sync

    def _collect(self, inputs: Tensor) -> None:
        axes = self._axes(inputs.dim())
        shape = self._amax_shape(inputs, axes)
        made = self.calibrator is None
        if made:
            self._make_calibrator(shape, inputs.device)
        elif shape != self._shape:
            raise ValueError(
                f"{_OWNER}: inputs: expected the sizes of the calibration's first tensor along "
                f"axis {self._axis}, as in {tuple(self._shape)}, got {tuple(shape)}"
            )
        rows = inputs.movedim(axes, tuple(range(len(axes)))).flatten(0, len(axes) - 1)
        try:
            self.calibrator.observe(rows if axes else inputs)
        except Exception:
            if made:
                self.reset_calib()
            raise

    @staticmethod
    def _amax_shape(inputs: Tensor, axes: tuple[int, ...]) -> list[int]:
        return [n if d in axes else 1 for d, n in enumerate(inputs.shape)] if axes else []

    def _solve(self, method: str, options: Mapping[str, Any]) -> Tensor:
        """The amax of the statistics by a method, one for each row."""
        observer: UniformQuantizationObserverBase = self.calibrator
        if method == "max":
            return torch.maximum(-observer.min_val, observer.max_val)
        if not isinstance(observer, (LogHistogramObserver, PerChannelLogHistogramObserver)):
            raise ValueError(
                f"{_OWNER}.load_calib_amax: method: expected 'max', which is the calib_method, "
                f"got {method!r}"
            )
        ranges.check_method(f"{_OWNER}.load_calib_amax", method, options)
        most = int(max_bound(self._num_bits, self._unsigned))
        grid = most, self._unsigned, self._narrow_range
        return ranges.amax(observer.statistic(), method, *grid, options)

    def load_calib_amax(
        self, method: str | None = None, *, strict: bool = True, **options: Any
    ) -> None:
        """Take the amax that a method chooses from the statistics.

        Args:
            method: ``"max"``, or where there is a histogram any method of
                :func:`pyobserver.ranges.solve` (``"entropy"`` is ``"kl"``); None: the
                ``calib_method``, of ``"histogram"`` ``"mse"``.
            strict: raise where no values were seen; else amax becomes NaN.
            options: those of the method; ``percentile`` in percent.

        Raises:
            RuntimeError: no values were seen, and strict.
            ValueError, TypeError: names the argument, what was expected and what came.
        """
        method = self._calib_method if method is None else method
        _checks.check_choice(f"{_OWNER}.load_calib_amax", "method", method, CALIB_METHODS)
        method = {"histogram": "mse", "entropy": "kl", "minmax": "max"}.get(method, method)
        if isinstance(options.get("percentile"), (int, float)):
            options["percentile"] = options["percentile"] / 100
        observer = self.calibrator
        if observer is None or bool((observer.min_val > observer.max_val).all()):
            message = f"{_OWNER}.load_calib_amax: expected statistics of some values, got none"
            if strict:
                raise RuntimeError(message)
            warnings.warn(f"{message}: amax is NaN", stacklevel=2)
            self._set_amax(torch.tensor(math.nan, dtype=torch.float32, device=self._device()))
            return
        amax = self._solve(method, options)
        observer.warn_of_statistics()
        unseen = observer.min_val > observer.max_val  # rows of no finite value
        amax = torch.where(unseen, 0.0, amax)
        self._set_amax(amax.detach().reshape(self._shape))

    def _amax_of(self, inputs: Tensor) -> Tensor:
        amax = self.amax
        if amax is None:
            axes = self._axes(inputs.dim())
            groups = self._amax_shape(inputs, axes)
            block_size = [1 if d in axes else n for d, n in enumerate(inputs.shape)]
            low = torch.full(groups, torch.inf, dtype=torch.float32, device=inputs.device)
            high, count = -low, torch.zeros((), dtype=torch.int64, device=inputs.device)
            minmax(
                inputs.detach(), low, high, count, None, "memoryless", nonfinite="propagate",
                block_size=block_size if axes else None,
            )  # fmt: skip
            amax = torch.maximum(-low, high)
        return amax if self._scale_amax is None else amax * self._scale_amax

    def _quantize(self, inputs: Tensor) -> Tensor:
        grid = self._num_bits, self._unsigned, self._narrow_range
        if self._learn_amax:
            if self._fake_quant:
                return self.clip(inputs, *grid)
            inputs = self.clip(inputs)
            amax = torch.maximum(-self.clip.clip_value_min, self.clip.clip_value_max).detach()
            if inputs.dtype.itemsize < amax.dtype.itemsize:
                amax = amax.to(inputs.dtype)  # so that what was clipped to it is within it
        else:
            amax = self._amax_of(inputs)
        if self._fake_quant:
            return fake_tensor_quant(inputs, amax, *grid)
        outputs, self._scale = tensor_quant(inputs, amax, *grid)
        return outputs

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs`` quantized, clipped or as they are; shaped as inputs."""
        if self._disabled:
            return inputs
        if inputs.numel() == 0:
            return self._clip_empty(inputs)
        if self._if_calib and not is_recomputing():
            self._collect(inputs.detach())
        if self._if_quant:
            return self._quantize(inputs)
        # bounds that are yet to be calibrated clip nothing that others are calibrated with
        return self.clip(inputs) if self._if_clip and not self._if_calib else inputs

    def _clip_empty(self, inputs: Tensor) -> Tensor:
        """Of no values the bounds have a gradient of 0: DDP waits for one, on every rank."""
        return (
            self.clip(inputs) if self._learn_amax and (self._if_quant or self._if_clip) else inputs
        )

    def extra_repr(self) -> str:
        if self._disabled:
            return "disabled"
        amax = self.amax
        shown = (
            "dynamic" if amax is None else f"{amax:.4g}" if amax.dim() == 0 else tuple(amax.shape)
        )
        stages = [stage for stage in ("quant", "clip", "calib") if getattr(self, f"_if_{stage}")]
        return (
            f"num_bits={self._num_bits}, unsigned={self._unsigned}, "
            f"narrow_range={self._narrow_range}, fake_quant={self._fake_quant}, "
            f"axis={self._axis}, amax={shown}, scale_amax={self._scale_amax}, "
            f"learn_amax={self._learn_amax}, calib_method={self._calib_method!r}, "
            f"on={'+'.join(stages) or None}"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # what this one has not seen yet takes the shape of the saved
        device = self._device()
        saved = state_dict.get(prefix + "_amax")
        if saved is not None and (self.amax is None or self._amax.shape != saved.shape):
            amax = torch.empty(saved.shape, dtype=torch.float32, device=device)
            self.register_buffer("_amax", amax)
        shape = state_dict.get(prefix + "_calib_shape")
        if shape is not None:
            self.reset_calib()
            self._make_calibrator(shape.tolist(), device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

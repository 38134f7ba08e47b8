"""The base classes of all observers."""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..compat.hosts import offer_to_hosts, register_with_hosts
from ..dtypes import PER_CHANNEL, PER_TENSOR, SYMMETRIC, check_qscheme, quant_bounds
from ..ops.choose_qparams import choose_qparams
from ..ops.recomputation import is_recomputing
from . import merging
from .factory import FactoryMixin

_EPS = torch.finfo(torch.float32).eps
_MAPPINGS = {
    torch.per_tensor_affine: "affine",
    torch.per_channel_affine: "affine",
    torch.per_tensor_symmetric: "symmetric",
    torch.per_channel_symmetric: "symmetric",
    torch.per_channel_affine_float_qparams: "affine_float",
}


def new_full(size: int, value: float, like: Tensor) -> Tensor:
    """A buffer for a module to keep: an ordinary tensor, also where inference mode is on."""
    with torch.inference_mode(False):
        return torch.full((size,), value, dtype=like.dtype, device=like.device)


class StatisticsModule(FactoryMixin, nn.Module):
    """A module whose buffers keep their dtype when the model's is changed.

    ``model.half()`` would round the statistics and the scales, and counts above 2048 with them.
    """

    _buffers: dict[str, Any]
    _modules: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        register_with_hosts()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StatisticsModule:
        def keep_dtype(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # for assign=True, which would take torch.ao's float32 counts, or a half's, as they are
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if buffer is not None and saved is not None and saved.dtype != buffer.dtype:
                state_dict = {**state_dict, prefix + name: saved.to(buffer.dtype)}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@offer_to_hosts
class ObserverBase(StatisticsModule, ABC):
    """Base of every observer: ``forward`` watches a tensor and returns it unchanged.

    Args:
        dtype: the quantized type that the model is prepared for.
        is_dynamic: whether the parameters are chosen anew for each input.

    Source: ``torch.ao.quantization.ObserverBase``.
    """

    def __init__(self, dtype: torch.dtype, is_dynamic: bool = False):
        super().__init__()
        self.dtype = dtype
        self.is_dynamic = is_dynamic

    @property
    def _merges(self) -> Mapping[str, str]:
        """The buffers that are statistics, and the rule by which each merges (``merging.py``)."""
        return {}

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor: ...

    @abstractmethod
    def calculate_qparams(self) -> tuple[Tensor, Tensor]: ...


@offer_to_hosts
class UniformQuantizationObserverBase(ObserverBase):
    """Base of the observers that choose a scale and a zero point from a range.

    A subclass keeps its statistics in buffers, folds a tensor into them with one op call in
    :meth:`observe`, says what range they stand for in :meth:`observed_range`, and how its buffers
    merge with those of another in ``_merges``.

    Args:
        dtype: the quantized type (``pyobserver.dtypes``).
        qscheme: the scheme, per tensor or per channel, affine or symmetric.
        reduce_range: use one bit less of an 8-bit type; deprecated in favour of the bounds.
        quant_min, quant_max: the integer range, if not the whole type.
        factory_kwargs: ``{"device": ...}`` for the buffers.
        eps: the least scale.
        is_dynamic: whether the parameters are chosen anew for each input.
        nonfinite: what NaN and infinities do: ``"ignore"`` leaves them out of the statistics and
            counts them in ``nonfinite_count``, and ``calculate_qparams`` warns with the count;
            ``"propagate"`` lets them into the range as torch.ao does; ``"raise"`` refuses them.

    Raises:
        ValueError: dtype, bounds or nonfinite that cannot be served.
        NotImplementedError: a qscheme that the class does not serve.

    Source: ``torch.ao.quantization.observer.UniformQuantizationObserverBase`` of torch 2.13.
    """

    # 2: eps became a buffer. 3: min_vals, max_vals were renamed min_val, max_val, and an unfed
    # histogram's have shape () instead of (0,).
    _version = 3

    eps: Tensor
    min_val: Tensor
    max_val: Tensor
    nonfinite_count: Tensor

    def __init__(
        self,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = _EPS,
        is_dynamic: bool = False,
        nonfinite: str = "ignore",
    ):
        super().__init__(dtype=dtype, is_dynamic=is_dynamic)
        check_qscheme(type(self).__name__, qscheme, PER_TENSOR + PER_CHANNEL)
        _checks.check_choice(type(self).__name__, "nonfinite", nonfinite, _checks.NONFINITE)
        if reduce_range:
            warnings.warn(
                "reduce_range is deprecated: give quant_min and quant_max instead", stacklevel=3
            )
            if qscheme in SYMMETRIC and dtype in (torch.quint8, torch.uint8):
                raise NotImplementedError(
                    f"{type(self).__name__}: reduce_range: expected False for {dtype} with a "
                    "symmetric qscheme (its zero point, 128, lies outside 0..127), got True"
                )
        self.qscheme = qscheme
        self.reduce_range = reduce_range
        self.nonfinite = nonfinite
        self.has_customized_qrange = quant_min is not None and quant_max is not None
        self.quant_min, self.quant_max = quant_bounds(dtype, quant_min, quant_max, reduce_range)
        device = torch.nn.factory_kwargs(factory_kwargs).get("device")
        least_scale = torch.tensor([eps], dtype=torch.float32, device="cpu")
        if not bool((least_scale > 0) & least_scale.isfinite()):
            raise ValueError(
                f"{type(self).__name__}: eps: expected a positive finite float32, got {eps}"
            )
        self.register_buffer("eps", least_scale.to(device or torch.get_default_device()))
        self._register_nonfinite_count(device)

    def _register_nonfinite_count(self, device: Any) -> None:
        # not saved: the keys of the state_dict are torch.ao's
        self.register_buffer(
            "nonfinite_count", torch.zeros((), dtype=torch.int64, device=device), persistent=False
        )

    def _register_range(self, groups: tuple[int, ...], device: Any) -> None:
        """The buffers of a range for each group, which was never fed."""
        for name, unfed in (("min_val", torch.inf), ("max_val", -torch.inf)):
            range_end = torch.full(groups, unfed, dtype=torch.float32, device=device)
            self.register_buffer(name, range_end)

    @property
    def _merges(self) -> Mapping[str, str]:
        return merging.RUNNING

    @property
    def _mapping(self) -> str:
        return _MAPPINGS[self.qscheme]

    @property
    def _symmetric_zero_point(self) -> int:
        if self.dtype in (torch.quint8, torch.uint8):
            return (self.quant_min + self.quant_max) // 2 if self.has_customized_qrange else 128
        if self.dtype == torch.uint16:
            middle = (self.quant_min + self.quant_max) // 2
            return 2**15 if self.quant_min <= 2**15 <= self.quant_max else middle
        return 0

    def observe(self, x: Tensor, enabled: Tensor | None = None) -> None:
        """Fold a tensor into the statistics; ``enabled`` is read where the data is."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Fold ``x`` into the statistics and return it as it is.

        A forward that activation checkpointing runs again, in the backward, counts nothing.
        """
        if not is_recomputing():
            self.observe(x)
        return x

    def observed_range(self, enabled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The range that the statistics stand for: float32 tensors, one element a scale."""
        return self.min_val, self.max_val

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point, one element per tensor or ``(channels,)``.

        The zero point is int32 for an affine scheme, int64 for a symmetric one and float32 for
        ``per_channel_affine_float_qparams``, as in torch.ao. An observer that was never fed gives
        1 and 0, with a warning; values that were left out as not finite give one too.
        """
        min_val, max_val = self.observed_range()
        device = min_val.device
        self.warn_of_statistics()
        if min_val.numel() == 0:
            scale = torch.ones(1, dtype=torch.float32, device=device)
            return scale, torch.zeros_like(scale, dtype=torch.int64)
        scale = torch.empty(min_val.shape or (1,), dtype=torch.float32, device=device)
        dtypes = {"affine": torch.int32, "symmetric": torch.int64, "affine_float": torch.float32}
        zero_point = torch.empty_like(scale, dtype=dtypes[self._mapping])
        self._write_qparams(min_val, max_val, scale, zero_point, None)
        return scale, zero_point

    def write_qparams(
        self, scale: Tensor, zero_point: Tensor, enabled: Tensor | None = None
    ) -> None:
        """Write scale and zero point in place; no device sync, no warning.

        Args:
            scale, zero_point: as many elements as there are ranges, see :func:`choose_qparams`.
            enabled: one element read where the data is; 0 writes nothing.
        """
        self._write_qparams(*self.observed_range(enabled), scale, zero_point, enabled)

    def _write_qparams(
        self,
        min_val: Tensor,
        max_val: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        enabled: Tensor | None,
    ) -> None:
        choose_qparams(
            min_val,
            max_val,
            scale,
            zero_point,
            self.eps,
            self.quant_min,
            self.quant_max,
            self._mapping,
            self._symmetric_zero_point,
            enabled,
        )

    def _faults(self) -> Tensor:
        """What calls for a warning: whether it was never fed, and the values not finite."""
        unfed = (self.min_val > self.max_val).all()  # also of no elements
        return torch.stack((unfed.long(), self.nonfinite_count))

    def warn_of_statistics(self) -> None:
        """Warn where nothing was fed, or values were not finite. It waits for the device."""
        self._warn(*self._faults().tolist(), stacklevel=4)

    def _warn(self, is_unfed: int, nonfinite: int, *, stacklevel: int) -> None:
        if is_unfed:
            warnings.warn(
                f"{type(self).__name__} was never fed: calculate_qparams returns scale 1 and zero "
                "point 0",
                stacklevel=stacklevel,
            )
        if nonfinite:
            fate = "left out of" if self.nonfinite == "ignore" else "let into"
            warnings.warn(
                f"{type(self).__name__}: {nonfinite} NaN or infinite values were {fate} the "
                "statistics",
                stacklevel=stacklevel,
            )

    def reset_min_max_vals(self) -> None:
        """Forget the range: back to +inf and -inf."""
        self.min_val.fill_(torch.inf)
        self.max_val.fill_(-torch.inf)
        self.nonfinite_count.zero_()

    def merge(self, other: UniformQuantizationObserverBase) -> None:
        """Take in the statistics of another observer, in place.

        The rules are those of :func:`pyobserver.distributed.sync`, this observer and ``other``
        being the ranks: counts add, and of moving averages the two weigh alike. ``a + b`` is a
        merged copy of ``a``.

        Raises:
            TypeError: ``other`` is no observer of this kind.
            ValueError: its class, bins, axis or number of channels is another, or the two are
                memoryless. Either way the statistics are as they were.
        """
        owner = f"{type(self).__name__}.merge"
        if not isinstance(other, UniformQuantizationObserverBase):
            raise TypeError(f"{owner}: other: expected an observer, got {type(other).__name__}")
        expected, got = merging.describe(self), merging.describe(other)
        groups, others = merging.groups_of(self), merging.groups_of(other)
        if expected == got and any(groups) and any(others) and groups != others:
            of = "channels" if self.qscheme in PER_CHANNEL else "blocks"
            expected, got = f"{merging.shown(groups)} {of}", merging.shown(others)
        if expected != got:
            raise ValueError(
                f"{owner}: other: statistics of different observers: expected {expected}, got {got}"
            )
        if not self._merges:
            raise ValueError(
                f"{owner}: other: expected observers of more than their last tensor, got {got}"
            )
        device = self.nonfinite_count.device
        merging.merge(
            [[self], [other]], [groups if any(groups) else others], device, lambda *_: None
        )

    def __add__(self, other: UniformQuantizationObserverBase) -> UniformQuantizationObserverBase:
        merged = copy.deepcopy(self)
        merged.merge(other)
        return merged

    def extra_repr(self) -> str:
        return f"min_val={self.min_val}, max_val={self.max_val}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        version = local_metadata.get("version")
        if version is None or version < 2:
            # a copy: the caller's dict is not ours to add to
            state_dict = {prefix + "eps": torch.tensor([_EPS]), **state_dict}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        self.nonfinite_count.zero_()  # it was of other data

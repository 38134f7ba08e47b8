"""Horizon's observers that choose by a method, from a log histogram of all values seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ... import ranges
from ..._checks import check_axis
from ...distributed import serving_device
from ...observers.log_histogram import LogHistogramBase
from ...ops.log_histogram import log_histogram
from ..dtypes import QuantDType, quant_dtype
from ..strategy import allowed_scale, searched_constraint
from .base import EngineObserver

_MANTISSA_BITS = 5


class MethodObserver(EngineObserver, LogHistogramBase):  # type: ignore[misc]
    """Counts all values by their leading bits and asks a method for the scale.

    One histogram serves all methods, types and strategies, so each can be changed after the data
    was seen. The statistic is :class:`pyobserver.LogHistogramObserver`'s: exact under merging, of
    no range that would have to grow; the choice is made of all the data at once, not averaged
    over tensors.

    Args:
        method, method_kwargs: see :func:`pyobserver.ranges.solve`.
        Others: :class:`ObserverBase`.

    Buffers: ``counts``: int64 ``(columns,)``, per channel ``(channels, columns)``.
    """

    def __init__(
        self, *args: Any, method: str, method_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ):
        engine = {
            "mantissa_bits": _MANTISSA_BITS,
            "groups": (),
            "method": method,
            "method_kwargs": method_kwargs,
            "scale_constraint": "none",
            "reduce_range": False,
            "eps": torch.finfo(torch.float32).eps,
            "is_dynamic": False,
        }
        super().__init__(*args, _engine=engine, **kwargs)
        if self._per_channel:
            self._group_dims = 1
            self._size((0,))
        self.reset_method(method, method_kwargs)

    def reset_method(self, method: str, method_kwargs: Mapping[str, Any] | None = None) -> None:
        """Choose by another method from now on; the statistics stay.

        Raises:
            ValueError, TypeError: as :func:`pyobserver.ranges.solve`; nothing has changed then.
        """
        options = dict(method_kwargs or {})
        ranges.check_method(type(self).__name__, method, options)
        self.method, self.method_kwargs = method, options
        self.scale_constraint = searched_constraint(self.compute_scale_strategy, method)

    def observe(self, x: Tensor, enabled: Tensor | None = None) -> None:
        if not self.syncs:
            super().observe(x, enabled)
            return
        groups = self._groups_of(x)
        axis = self.ch_axis if self._per_channel else None
        counts = self.counts.new_zeros((*groups, self.counts.shape[-1]))
        low = self.eps.new_full(groups, torch.inf)
        high = self.eps.new_full(groups, -torch.inf)
        log_histogram(x, counts, low, high, axis, enabled=enabled)
        reduced = counts.to(serving_device(counts.device, None))
        dist.all_reduce(reduced)
        self.sync_minmax(low, high)
        if self.min_val.shape != low.shape:
            self._size(groups)
        self.counts += reduced.to(counts.device)
        self.min_val.copy_(torch.minimum(self.min_val, low))
        self.max_val.copy_(torch.maximum(self.max_val, high))

    def _groups_of(self, x: Tensor) -> tuple[int, ...]:
        if not self._per_channel:
            return ()
        return (x.shape[check_axis("log_histogram", x, self.ch_axis)],)

    def _choose(self, enabled: Tensor | None = None) -> ranges.Choice:
        scale, zero_point = super()._choose(enabled)
        return allowed_scale(scale, self.compute_scale_strategy), zero_point

    def _fit_to(self, state: dict[str, Any], prefix: str) -> None:
        """The engine sizes its state, the counts among it."""

    def get_extra_state(self) -> dict[str, Any]:
        own = {"method": self.method, "method_kwargs": dict(self.method_kwargs)}
        return {**super().get_extra_state(), **own}

    def set_extra_state(self, state: Any) -> None:
        super().set_extra_state(state)
        if "method" in state:
            self.reset_method(state["method"], state.get("method_kwargs"))


class HistogramObserver(MethodObserver):
    """Collect once, then choose by any method: :meth:`reset_scale`.

    Args:
        method: ``"mse"``, ``"percentile"``, ``"kl"`` or another of
            :func:`pyobserver.ranges.solve`.
        method_kwargs: its options, as ``{"percentile": 0.999}``.
        Others: :class:`ObserverBase`.
    """

    def __init__(
        self,
        *args: Any,
        method: str = "mse",
        method_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(*args, method=method, method_kwargs=method_kwargs, **kwargs)

    @staticmethod
    def reset_scale(
        model: nn.Module,
        method: str,
        method_kwargs: Mapping[str, Any] | None = None,
        dtype: QuantDType | torch.dtype | None = None,
    ) -> None:
        """Choose the scales of a model anew by another method, from what was collected.

        No data is run. The new scales are in the buffers, and so in the state_dict; the method is
        kept for later choices.

        Args:
            model: a prepared model: all fake-quantizes over a HistogramObserver in it.
            method, method_kwargs: see :class:`HistogramObserver`.
            dtype: only those of this type, as it now is; None: all. So the int16 ones of a mixed
                model can keep their whole range, ``("percentile", {"percentile": 1.0}, qint16)``.

        Raises:
            ValueError: nothing to choose for: no such observer, none of the type, none was fed.
            ValueError, TypeError: the method or its options. Nothing has changed in either case.
        """
        ranges.check_method("reset_scale", method, method_kwargs or {})
        found = [module for module in model.modules() if isinstance(module, HistogramObserver)]
        if dtype is not None:
            wanted = quant_dtype("reset_scale", dtype)
            types = sorted({str(observer.dtype) for observer in found})
            found = [observer for observer in found if observer.dtype is wanted]
            if types and not found:
                raise ValueError(
                    f"reset_scale: dtype: expected that of a HistogramObserver of the model "
                    f"({', '.join(types)}), got {dtype}"
                )
        if not any(observer.is_fed() for observer in found):
            state = "none that was fed: calibrate first" if found else "none"
            raise ValueError(
                f"reset_scale: model: expected one with HistogramObservers, got {state}"
            )
        for observer in found:
            observer.reset_method(method, method_kwargs)
        for module in model.modules():
            update = getattr(module, "update_scale", None)
            if update and getattr(module, "activation_post_process", None) in found:
                update()


class MSEObserver(MethodObserver):
    """The scale of the least mean squared error, see :func:`pyobserver.ranges.mse`.

    Args:
        Those of :class:`ObserverBase`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, method="mse", **kwargs)


class PercentileObserver(MethodObserver):
    """The scale of a share of the magnitudes, see :func:`pyobserver.ranges.percentile`.

    Args:
        percentile: the share, in (0, 1]; 1 keeps them all.
        Others: :class:`ObserverBase`.
    """

    def __init__(self, *args: Any, percentile: float = 0.9999, **kwargs: Any):
        options = {"percentile": percentile}
        super().__init__(*args, method="percentile", method_kwargs=options, **kwargs)


class KLObserver(MethodObserver):
    """NVIDIA's entropy calibration, see :func:`pyobserver.ranges.kl`.

    Args:
        bins, start_bin, stride: the equal bins of the magnitudes, the first candidate, and the
            step between candidates.
        Others: :class:`ObserverBase`.
    """

    def __init__(
        self, *args: Any, bins: int = 2048, start_bin: int = 128, stride: int = 1, **kwargs: Any
    ):
        options = {"bins": bins, "start_bin": start_bin, "stride": stride}
        super().__init__(*args, method="kl", method_kwargs=options, **kwargs)


class MixObserver(MethodObserver):
    """Of the scales of several methods, the one whose quantized values lie nearest in direction.

    That is: of the greatest cosine similarity between the values and the quantized values, each
    bin of the histogram by its middle. Equal ones: the first.

    Args:
        methods: names of methods, or pairs of a name and its options.
        Others: :class:`ObserverBase`.

    Source: the criterion is that of Horizon's MixObserver; the methods are ours.
    """

    def __init__(
        self,
        *args: Any,
        methods: Any = ("minmax", ("percentile", {"percentile": 0.9999}), "mse", "kl"),
        **kwargs: Any,
    ):
        super().__init__(*args, method="minmax", **kwargs)
        try:
            pairs = [(one, {}) if isinstance(one, str) else (one[0], {**one[1]}) for one in methods]
        except (TypeError, IndexError):
            raise TypeError(
                f"{type(self).__name__}: methods: expected names of methods, or pairs of a name "
                f"and its options, got {methods!r}"
            ) from None
        if not pairs:
            raise ValueError(f"{type(self).__name__}: methods: expected at least one, got none")
        for method, options in pairs:
            ranges.check_method(type(self).__name__, method, options)
        self.methods: tuple[tuple[str, dict[str, Any]], ...] = tuple(pairs)

    def _choose(self, enabled: Tensor | None = None) -> ranges.Choice:
        statistic, grid = self.statistic(), self._grid()
        scales = []
        for method, options in self.methods:
            constraint = searched_constraint(self.compute_scale_strategy, method)
            chosen = ranges.choose(
                statistic, method, grid._replace(scale_constraint=constraint), options, enabled
            )
            scales.append(allowed_scale(chosen[0], self.compute_scale_strategy))
        candidates = torch.stack(scales)
        cosines = torch.stack([self._cosine(statistic, scale) for scale in scales])
        best = cosines.nan_to_num(-1.0).argmax(0, keepdim=True)
        scale = candidates.gather(0, best).squeeze(0)
        return scale, torch.zeros_like(scale, dtype=torch.int64)

    def _cosine(self, statistic: ranges.Histogram, scale: Tensor) -> Tensor:
        """The cosine similarity that the values have to the quantized values: float64."""
        edges = ranges.clamped_edges(statistic)
        values = (edges[..., 1:] + edges[..., :-1]) / 2
        steps = scale.double().unsqueeze(-1)
        quantized = (values / steps).round().clamp(self.quant_min, self.quant_max) * steps
        products = (values * quantized, values.square(), quantized.square())
        both, own, others = ((statistic.counts * each).sum(-1) for each in products)
        return both / (own * others).sqrt()

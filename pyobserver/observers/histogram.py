"""The observer of a linear histogram, with the greedy search for its range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks, ranges
from ..compat.hosts import offer_to_hosts
from ..dtypes import PER_TENSOR, check_qscheme
from ..ops.histogram import (
    COMBINES,
    UPSAMPLE_RATE,
    check_upsample_rate,
    histogram,
    histogram_combine,
)
from . import merging
from .histogram_base import HistogramObserverBase

# times so many, any counts are beyond what is computed in float32
_BEYOND_FLOAT32 = 2.0**25


@offer_to_hosts
class HistogramObserver(HistogramObserverBase):
    """A histogram of all tensors seen; the range is the one whose L2 error is found least.

    Args:
        bins: bins of the histogram, at least 2.
        upsample_rate: parts that a bin is cut into when the range grows; None: 16 for
            ``combine="midpoint"``, 128 for ``"aligned"``.
        combine: how counts are carried to a wider range, see :func:`pyobserver.ops.histogram`:
            ``"midpoint"`` as torch 2.13 does, ``"aligned"`` as torch up to 2.3 did.
        method, method_kwargs, scale_constraint: how ``calculate_qparams`` chooses, see
            :func:`pyobserver.ranges.solve`; by default torch's greedy search.
        Others: :class:`UniformQuantizationObserverBase`; qscheme is a per-tensor one.

    Buffers: ``histogram``: float64 ``(bins,)``, counts; ``min_val``, ``max_val``: float32, 0-d.

    Source: ``torch.ao.quantization.HistogramObserver`` of torch 2.13. Its search takes the levels
    of the whole dtype, whatever ``quant_min`` and ``quant_max``; so does this one. Every other
    method, and :meth:`solve`, takes those of the grid.
    """

    histogram: Tensor
    _merges: ClassVar[Mapping[str, str]] = {**merging.RUNNING, "histogram": "bins"}

    def __init__(
        self,
        bins: int = 2048,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = torch.finfo(torch.float32).eps,
        is_dynamic: bool = False,
        upsample_rate: int | None = None,
        combine: str = "midpoint",
        method: str = "l2_greedy",
        method_kwargs: Mapping[str, Any] | None = None,
        scale_constraint: str = "none",
        **kwargs: Any,
    ):
        owner = type(self).__name__
        check_qscheme(owner, qscheme, PER_TENSOR)
        if upsample_rate is None:
            upsample_rate = UPSAMPLE_RATE.get(combine, 1)
        _checks.check_choice(owner, "combine", combine, COMBINES)
        check_upsample_rate(owner, upsample_rate)
        if is_dynamic:
            raise NotImplementedError(
                f"{owner}: is_dynamic: expected False (no dynamic quantization by histogram), "
                "got True"
            )
        if not isinstance(bins, int) or bins < 2:
            raise ValueError(f"{owner}: bins: expected an integer of at least 2, got {bins}")
        super().__init__(
            method,
            method_kwargs,
            scale_constraint,
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
        self.bins = bins
        self.combine = combine
        self.upsample_rate = upsample_rate
        self.dst_nbins = 2 ** torch.iinfo(dtype).bits
        device = torch.nn.factory_kwargs(factory_kwargs).get("device")
        self.register_buffer("histogram", torch.zeros(bins, dtype=torch.float64, device=device))
        self._register_range((), device)

    def observe(self, x: Tensor, enabled: Tensor | None = None) -> None:
        own = self.__dict__  # an attribute of an nn.Module costs a tenth of the call
        buffers = own["_buffers"]
        histogram(
            x,
            buffers["histogram"],
            buffers["min_val"],
            buffers["max_val"],
            buffers["nonfinite_count"],
            own["combine"],
            own["upsample_rate"],
            own["nonfinite"],
            enabled,
        )

    def statistic(self) -> ranges.Histogram:
        return ranges.Histogram(self.histogram, self.min_val, self.max_val, "linear")

    def _options(self) -> Mapping[str, Any]:
        if self.method == "l2_greedy":
            return {"levels": self.dst_nbins, **self.method_kwargs}
        return self.method_kwargs

    def counts_over(self, min_val: Tensor, max_val: Tensor) -> Tensor:
        """The counts carried to a wider range by the midpoints of parts, none rounded away.

        Where that range is not finite they are as they were.
        """
        low, high = (end.to(self.histogram.device, copy=True) for end in (min_val, max_val))
        finite = low.isfinite() & high.isfinite()
        carried = torch.zeros_like(self.histogram)
        histogram_combine(
            carried,
            low,
            high,
            self.histogram * _BEYOND_FLOAT32,
            self.min_val,
            self.max_val,
            upsample_rate=self.upsample_rate,
        )
        return torch.where(finite, carried / _BEYOND_FLOAT32, self.histogram)

    def reset_min_max_vals(self) -> None:
        super().reset_min_max_vals()
        self.histogram.zero_()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        for name, unfed in (("min_val", torch.inf), ("max_val", -torch.inf)):
            value = state_dict.get(prefix + name)
            # before version 3 an unfed range had no elements; one of shape (1,) is as good as ()
            if value is not None and value.dim() == 1 and value.numel() <= 1:
                value = value.reshape(()) if value.numel() else torch.tensor(unfed)
                state_dict = {**state_dict, prefix + name: value}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

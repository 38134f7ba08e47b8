"""An observer for llm-compressor: any method of pyobserver by the name ``"pyobserver"``.

Importing this imports llm-compressor, and registers the observer.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationType
from llmcompressor.observers import Observer
from torch import Tensor
from torch import distributed as dist

from .. import ranges
from ..ops.log_histogram import log_columns, log_histogram

__all__ = ["LogHistogramObserver"]

_SCALES_AT_ONCE = 512  # of a weight: as many histograms are held, of 128 KiB each


@Observer.register("pyobserver")
class LogHistogramObserver(Observer):
    """A log histogram of each scale's values, of which a method chooses the range.

    ``QuantizationArgs(observer="pyobserver", observer_kwargs={"method": "percentile",
    "percentile": 0.9999})``. Of activations all batches are counted and the range is solved once
    (llm-compressor's average the optima of the batches); ranks add their counts, to the same bytes
    as one process with all the data. Weights are solved a few hundred scales at a time.

    Args, in ``observer_kwargs``:
        method: see :func:`pyobserver.ranges.solve`; by default ``"mse"``.
        mantissa_bits: see :class:`pyobserver.LogHistogramObserver`.
        Others: the method's options.

    NaN and infinities are left out.

    Raises:
        ValueError, TypeError: name the argument, what was expected and what came.
    """

    _act_sync_dict: ClassVar[dict[str, Any]] = {
        "counts": dist.ReduceOp.SUM,
        "min_vals": dist.ReduceOp.MIN,
        "max_vals": dist.ReduceOp.MAX,
    }

    def __init__(self, base_name: str, args: QuantizationArgs, **observer_kwargs: Any):
        super().__init__(base_name, args, **observer_kwargs)
        options = dict(self.args.observer_kwargs)
        self._method = options.pop("method", "mse")
        self._columns = log_columns(options.pop("mantissa_bits", 5))
        self._options = options
        ranges.check_method("pyobserver", self._method, options)
        if args.type != QuantizationType.INT:
            raise ValueError(f"pyobserver: type: expected int, got {args.type}")
        levels = 2**args.num_bits
        self._grid = ranges.Grid.of(
            args.num_bits, -levels // 2, levels // 2 - 1, symmetric=args.symmetric
        )

    def update_statistics_from_observed(self, observed: Tensor) -> None:
        """Count values ``(observations, *scales, size)``; of a weight, choose its ranges."""
        if self.is_weight_obs:
            self.min_vals, self.max_vals = self._ranges_of(observed)
            return
        scales = observed.shape[1:-1]
        if not self.has_statistics:
            self.counts, self.min_vals, self.max_vals = self._unfed(scales, observed.device)
        grid = (1, *scales, 1)
        log_histogram(
            observed,
            self.counts.view(*grid, -1),
            self.min_vals.view(grid),
            self.max_vals.view(grid),
            block_size=[len(observed), *[1] * len(scales), observed.shape[-1]],
        )

    def get_qparams(self) -> Any:
        """Scale and zero point from the ranges that the method chooses."""
        if not self.is_weight_obs and self.has_statistics:
            statistic = ranges.Histogram.log(self.counts, self.min_vals, self.max_vals)
            self.min_vals, self.max_vals = self._chosen(statistic)
        return super().get_qparams()

    def delete_statistics(self, check_fused: bool = True) -> None:
        super().delete_statistics(check_fused)
        if not check_fused:
            self.__dict__.pop("counts", None)

    def _unfed(self, scales: Any, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        counts = torch.zeros((*scales, self._columns), dtype=torch.int64, device=device)
        low = torch.full(scales, torch.inf, dtype=torch.float32, device=device)
        return counts, low, -low

    def _ranges_of(self, observed: Tensor) -> tuple[Tensor, Tensor]:
        """The ranges of a weight, whose histograms together would outweigh it."""
        rows = observed.movedim(0, -2).reshape(observed.shape[1:-1].numel(), -1)
        ends = []
        for piece in rows.split(_SCALES_AT_ONCE):
            state = self._unfed(piece.shape[:1], piece.device)
            log_histogram(piece, *state, axis=0)
            ends.append(self._chosen(ranges.Histogram.log(*state)))
        low, high = (torch.cat(pieces) for pieces in zip(*ends, strict=True))
        return low.reshape(observed.shape[1:-1]), high.reshape(observed.shape[1:-1])

    def _chosen(self, histogram: ranges.Histogram) -> tuple[Tensor, Tensor]:
        """Ends of which compressed-tensors makes the scale and zero point that were chosen."""
        scale, zero_point = ranges.choose(histogram, self._method, self._grid, self._options)
        if self.args.symmetric:
            bound = scale * ((self._grid.quant_max - self._grid.quant_min) / 2)
            return -bound, bound
        grid = self._grid
        return (grid.quant_min - zero_point) * scale, (grid.quant_max - zero_point) * scale

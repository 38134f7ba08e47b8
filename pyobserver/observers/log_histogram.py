"""Observers of a logarithmic histogram: one statistic, any method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks, ranges
from ..compat.hosts import offer_to_hosts
from ..dtypes import PER_CHANNEL, PER_TENSOR, check_qscheme
from ..ops.log_histogram import log_columns, log_histogram, mantissa_bits_of
from .histogram_base import HistogramObserverBase

_TINY = torch.finfo(torch.float32).tiny


class LogHistogramBase(HistogramObserverBase):
    """Counts by the leading bits of the values, and the least and greatest of them."""

    counts: Tensor
    _merges: ClassVar[Mapping[str, str]] = {"min_val": "min", "max_val": "max", "counts": "sum"}
    ch_axis: int  # of those per channel alone, as the frameworks ask by hasattr
    block_size: tuple[int, ...]

    def __init__(
        self,
        mantissa_bits: int,
        groups: tuple[int, ...],
        method: str,
        method_kwargs: Mapping[str, Any] | None,
        scale_constraint: str,
        dtype: torch.dtype,
        qscheme: torch.qscheme,
        reduce_range: bool,
        quant_min: int | None,
        quant_max: int | None,
        factory_kwargs: dict[str, Any] | None,
        eps: float,
        is_dynamic: bool,
        **kwargs: Any,
    ):
        owner = type(self).__name__
        if is_dynamic:
            raise NotImplementedError(
                f"{owner}: is_dynamic: expected False (no dynamic quantization by histogram), "
                "got True"
            )
        if qscheme == torch.per_channel_affine_float_qparams:
            raise NotImplementedError(
                f"{owner}: qscheme: expected an affine or symmetric one with integer zero points, "
                f"got {qscheme}"
            )
        columns = log_columns(mantissa_bits)
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
        device = torch.nn.factory_kwargs(factory_kwargs).get("device")
        counts = torch.zeros((*groups, columns), dtype=torch.int64, device=device)
        self.register_buffer("counts", counts)
        self._register_range(groups, device)
        self._group_dims = len(groups)

    def _register_nonfinite_count(self, device: Any) -> None:
        """None is needed: NaN and infinities have columns of their own."""

    @property
    def nonfinite_count(self) -> Tensor:  # type: ignore[override]
        """How many NaN and infinite values were seen: int64, 0-d."""
        return self.counts[..., 0].sum() + self.counts[..., -2:].sum()

    @property
    def mantissa_bits(self) -> int:
        return mantissa_bits_of(self.counts.shape[-1])

    def observe(self, x: Tensor, enabled: Tensor | None = None) -> None:
        own = self.__dict__  # an attribute of an nn.Module costs a tenth of the call
        buffers = own["_buffers"]
        if buffers["min_val"].numel() == 0:
            self._observe_first(x, enabled)
            return
        log_histogram(
            x,
            buffers["counts"],
            buffers["min_val"],
            buffers["max_val"],
            own.get("ch_axis"),
            own["nonfinite"],
            enabled,
            own.get("block_size"),
        )

    def _observe_first(self, x: Tensor, enabled: Tensor | None) -> None:
        """Size the state of the groups, and keep that only where all goes well."""
        _checks.check_input("log_histogram", "x", x)
        if x.numel() == 0:
            return
        unsized = self.counts, self.min_val, self.max_val
        self._size(self._groups_of(x))
        try:
            self.observe(x, enabled)
        except Exception:
            self.counts, self.min_val, self.max_val = unsized
            raise

    def _groups_of(self, x: Tensor) -> tuple[int, ...]:
        """The groups that a tensor sizes the state to."""
        return ()

    def _size(self, groups: tuple[int, ...]) -> None:
        """Fresh state of so many groups: ordinary tensors, also where inference mode is on."""
        with torch.inference_mode(False):
            self.counts = self.counts.new_zeros((*groups, self.counts.shape[-1]))
            self.min_val = self.min_val.new_full(groups, torch.inf)
            self.max_val = self.max_val.new_full(groups, -torch.inf)

    def statistic(self) -> ranges.Histogram:
        return ranges.Histogram.log(self.counts, self.min_val, self.max_val)

    def reset_min_max_vals(self) -> None:
        self.min_val.fill_(torch.inf)
        self.max_val.fill_(-torch.inf)
        self.counts.zero_()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        # the buffers take the size of the saved ones, all or none
        saved = [state_dict.get(prefix + name) for name in ("counts", "min_val", "max_val")]
        shapes = [tuple(value.shape) for value in saved if value is not None]
        own = [tuple(value.shape) for value in (self.counts, self.min_val, self.max_val)]
        if len(shapes) == 3 and shapes != own:
            counts, low, high = shapes
            sized = len(low) == self._group_dims or (self._group_dims > 0 and low == (0,))
            if not (sized and low == high == counts[:-1] and counts[-1:] == own[0][-1:]):
                args[-1].append(
                    f"size mismatch for {prefix}counts, min_val, max_val: expected those of "
                    f"mantissa_bits {self.mantissa_bits}, as {', '.join(map(str, own))}, "
                    f"got {', '.join(map(str, shapes))}"
                )
                return
            self._size(low)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@offer_to_hosts
class LogHistogramObserver(LogHistogramBase):
    """A histogram whose bins are the leading bits of the values; by default the range of least MSE.

    There is no range to grow and nothing to carry from bin to bin: the same values give the same
    bytes in any order, split, number of threads or ranks (``a + b``, ``a.merge(b)`` and
    :func:`pyobserver.distributed.sync` are exact), and every magnitude is resolved alike.

    Args:
        mantissa_bits: bits of the mantissa that a bin keeps, 0 to 10: the relative width of the
            bins is ``2**-mantissa_bits``. 7 tells all bfloat16 values apart.
        method, method_kwargs, scale_constraint: how ``calculate_qparams`` chooses, see
            :func:`pyobserver.ranges.solve`.
        eps: the least scale; by default the least normal float32, so that data down to
            magnitudes of 1e-36 has a scale of its own.
        Others: :class:`UniformQuantizationObserverBase`; qscheme is a per-tensor one.

    Buffers: ``counts``: int64 ``(columns,)``, see :func:`pyobserver.ops.log_histogram`;
    ``min_val``, ``max_val``: float32, 0-d, the exact least and greatest finite value.
    """

    def __init__(
        self,
        mantissa_bits: int = 5,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = _TINY,
        is_dynamic: bool = False,
        method: str = "mse",
        method_kwargs: Mapping[str, Any] | None = None,
        scale_constraint: str = "none",
        **kwargs: Any,
    ):
        check_qscheme(type(self).__name__, qscheme, PER_TENSOR)
        super().__init__(
            mantissa_bits, (), method, method_kwargs, scale_constraint, dtype, qscheme,
            reduce_range, quant_min, quant_max, factory_kwargs, eps, is_dynamic, **kwargs,
        )  # fmt: skip


@offer_to_hosts
class PerChannelLogHistogramObserver(LogHistogramBase):
    """A log histogram of each channel, see :class:`LogHistogramObserver`.

    The state is sized once: here with ``num_channels``, else by the first tensor. It takes
    ``8 * 510 * 2**mantissa_bits`` bytes a channel: 128 KiB with 5 bits, 32 KiB with 3.

    Args:
        ch_axis: the channel axis of the tensors; negative ones count from the last.
        num_channels: size the state now.
        Others: :class:`LogHistogramObserver`; qscheme is a per-channel one, affine or symmetric.

    Buffers: ``counts``: int64 ``(channels, columns)``; ``min_val``, ``max_val``: float32
    ``(channels,)``; of no channels until sized.
    """

    def __init__(
        self,
        ch_axis: int = 0,
        mantissa_bits: int = 5,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_channel_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = _TINY,
        is_dynamic: bool = False,
        method: str = "mse",
        method_kwargs: Mapping[str, Any] | None = None,
        scale_constraint: str = "none",
        num_channels: int | None = None,
        **kwargs: Any,
    ):
        owner = type(self).__name__
        check_qscheme(owner, qscheme, PER_CHANNEL)
        if num_channels is not None and num_channels < 1:
            raise ValueError(
                f"{owner}: num_channels: expected at least 1 or None, got {num_channels}"
            )
        super().__init__(
            mantissa_bits, (num_channels or 0,), method, method_kwargs, scale_constraint, dtype,
            qscheme, reduce_range, quant_min, quant_max, factory_kwargs, eps, is_dynamic, **kwargs,
        )  # fmt: skip
        self.ch_axis = ch_axis

    def _groups_of(self, x: Tensor) -> tuple[int, ...]:
        return (x.shape[_checks.check_axis("log_histogram", x, self.ch_axis)],)


@offer_to_hosts
class PerBlockLogHistogramObserver(LogHistogramBase):
    """A log histogram of each block of a tensor, see :class:`LogHistogramObserver`.

    The first tensor sizes the state; all have its shape. Scales and zero points have the shape of
    the grid of blocks, as :func:`pyobserver.ops.fake_quantize` takes them with ``block_size``. For
    activations in a few large blocks: of many small ones the counts take more memory than the data
    (``8 * 510 * 2**mantissa_bits`` bytes a block).

    Args:
        block_size: sizes of a block, one for each dimension, each a divisor of the tensors' sizes:
            ``(1, 128)`` for groups of 128 in the rows of a matrix.
        Others: :class:`LogHistogramObserver`.

    Buffers: ``counts``: int64 ``(*grid, columns)``; ``min_val``, ``max_val``: float32
    ``grid``; of no blocks until sized.
    """

    def __init__(
        self,
        block_size: Sequence[int],
        mantissa_bits: int = 5,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = _TINY,
        is_dynamic: bool = False,
        method: str = "mse",
        method_kwargs: Mapping[str, Any] | None = None,
        scale_constraint: str = "none",
        **kwargs: Any,
    ):
        check_qscheme(type(self).__name__, qscheme, PER_TENSOR)
        super().__init__(
            mantissa_bits, (0,), method, method_kwargs, scale_constraint, dtype, qscheme,
            reduce_range, quant_min, quant_max, factory_kwargs, eps, is_dynamic, **kwargs,
        )  # fmt: skip
        self.block_size = tuple(block_size)
        self._group_dims = len(self.block_size)

    def _groups_of(self, x: Tensor) -> tuple[int, ...]:
        _checks.check_block_size("log_histogram", x, None, self.block_size)
        return tuple(whole // size for whole, size in zip(x.shape, self.block_size, strict=True))


@offer_to_hosts
class MSEObserver(LogHistogramObserver):
    """The range of the least mean squared error of all, see :func:`pyobserver.ops.lp_search`.

    Args:
        Those of :class:`LogHistogramObserver` but the method.
    """

    def __init__(self, mantissa_bits: int = 5, **kwargs: Any):
        super().__init__(mantissa_bits, method="mse", **kwargs)


@offer_to_hosts
class PercentileObserver(LogHistogramObserver):
    """The range of a share of the values, see :func:`pyobserver.ranges.percentile`.

    Args:
        percentile: the share, in (0, 1]; 1 keeps them all.
        Others: those of :class:`LogHistogramObserver` but the method.
    """

    def __init__(self, percentile: float = 0.9999, **kwargs: Any):
        super().__init__(method="percentile", method_kwargs={"percentile": percentile}, **kwargs)


@offer_to_hosts
class KLObserver(LogHistogramObserver):
    """NVIDIA's entropy calibration, see :func:`pyobserver.ranges.kl`.

    Args:
        bins, start_bin, stride: the equal bins of the magnitudes, the first candidate, and the
            step between candidates.
        Others: those of :class:`LogHistogramObserver` but the method.
    """

    def __init__(self, bins: int = 2048, start_bin: int = 128, stride: int = 1, **kwargs: Any):
        options = {"bins": bins, "start_bin": start_bin, "stride": stride}
        super().__init__(method="kl", method_kwargs=options, **kwargs)

"""Observers with the interface of torchao's ``AffineQuantizedMinMaxObserver``.

The arguments, and the shapes and dtypes of what ``calculate_qparams`` gives, are torchao's; the
statistics are those of :mod:`pyobserver.observers`, in buffers.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchao.quantization import observer as host
from torchao.quantization.granularity import Granularity, PerTensor
from torchao.quantization.quant_primitives import MappingType, ZeroPointDomain

from ... import _checks, ranges
from ...observers import (
    HistogramObserver,
    HistogramObserverBase,
    LogHistogramObserver,
    UniformQuantizationObserverBase,
    merging,
)
from ...observers.minmax import check_averaging_constant
from ...ops.log_histogram import log_histogram
from ...ops.minmax import minmax
from .granularity import GRANULARITIES, block_size, blocks, grid

_TINY = torch.finfo(torch.float32).tiny


def dtype_bounds(owner: str, dtype: torch.dtype) -> tuple[int, int]:
    """The least and the greatest value of a type that torchao quantizes to."""
    if str(dtype).startswith("torch.float8_e") and "e8m0" not in str(dtype):
        return int(torch.finfo(dtype).min), int(torch.finfo(dtype).max)
    name = re.fullmatch(r"torch\.(?:(u?)int([1-8])|int(16|32))", str(dtype))
    if name is None:
        raise ValueError(
            f"{owner}: target_dtype: expected int1 to int8, uint1 to uint8, int16, int32, "
            f"or a float8 one, got {dtype}"
        )
    bits = int(name[2] or name[3])
    return (0, 2**bits - 1) if name[1] else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


class AffineQuantizedObserver(UniformQuantizationObserverBase):
    """Base of the observers of torchao's interface.

    Args:
        mapping_type: ``MappingType.ASYMMETRIC``, ``SYMMETRIC`` or ``SYMMETRIC_NO_CLIPPING_ERR``.
        target_dtype: int1 to int8, uint1 to uint8, int16, int32; float8 with a symmetric mapping,
            of observers of minima and maxima.
        granularity: ``PerTensor``, ``PerAxis``, ``PerRow``, ``PerToken``, ``PerGroup`` or
            ``PerBlock``: a range for each block of the tensors.
        quant_min, quant_max: the integer range, each by default that of the type; it holds 0.
        eps: the least scale; None: the least normal float32.
        scale_dtype: of the scale; None: float32, whatever dtype was observed.
        zero_point_dtype: of the zero point; None: int32, and float32 for ``ZeroPointDomain.FLOAT``.
        preserve_zero: whether the range is made to hold zero, which then is exact.
        zero_point_domain: ``INT``; ``FLOAT``: the value of the middle level, as tinygemm takes it;
            ``NONE``: ``calculate_qparams`` gives None for it (symmetric ones alone).
        keepdim: shape scale and zero point as the grid of blocks, with as many dimensions as the
            tensors: ``(rows, 1)`` for ``PerAxis(0)``, ``(rows, groups)`` for ``PerGroup``. Else the
            dimensions that a block fills are left out: ``()`` per tensor, ``(rows,)``.
        nonfinite: see :class:`pyobserver.UniformQuantizationObserverBase`.

    The state is sized by the first tensor, but for ``PerTensor()`` without keepdim. A tensor with
    another number of blocks is an error after that.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came.

    Source: ``torchao.quantization.observer.AffineQuantizedObserverBase`` of torchao 0.18; what it
    no longer computes of ``preserve_zero`` and ``zero_point_domain`` is that of
    ``_choose_qparams_affine_dont_preserve_zero`` and ``_choose_qparams_affine_tinygemm``.
    """

    def __init__(
        self,
        mapping_type: MappingType,
        target_dtype: torch.dtype,
        granularity: Granularity,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float | None = None,
        scale_dtype: torch.dtype | None = None,
        zero_point_dtype: torch.dtype | None = None,
        preserve_zero: bool = True,
        zero_point_domain: ZeroPointDomain = ZeroPointDomain.INT,
        keepdim: bool = False,
        **statistic: Any,
    ):
        owner = type(self).__name__
        _check_interface(owner, mapping_type, granularity, preserve_zero, zero_point_domain)
        least, greatest = dtype_bounds(owner, target_dtype)
        if target_dtype.is_floating_point and mapping_type is MappingType.ASYMMETRIC:
            raise ValueError(
                f"{owner}: mapping_type: expected a symmetric one for {target_dtype}, "
                f"got {mapping_type}"
            )
        quant_min = least if quant_min is None else quant_min
        quant_max = greatest if quant_max is None else quant_max
        if quant_min < least or quant_max > greatest:
            raise ValueError(
                f"{owner}: quant_min, quant_max: expected a range inside that of {target_dtype}, "
                f"[{least}, {greatest}], got [{quant_min}, {quant_max}]"
            )
        affine = mapping_type is MappingType.ASYMMETRIC
        super().__init__(
            dtype=torch.int32,  # any that holds the bounds
            qscheme=torch.per_tensor_affine if affine else torch.per_tensor_symmetric,
            quant_min=quant_min,
            quant_max=quant_max,
            eps=_TINY if eps is None else eps,
            **statistic,
        )
        self.dtype = self.target_dtype = target_dtype
        self.mapping_type = mapping_type
        self.granularity = granularity
        self.scale_dtype = scale_dtype
        self.zero_point_dtype = zero_point_dtype
        self.preserve_zero = preserve_zero
        self.zero_point_domain = zero_point_domain
        self.keepdim = keepdim
        self._in_blocks = keepdim or not isinstance(granularity, PerTensor)
        if self._in_blocks:
            self._size((0,))

    @property
    def _is_sized(self) -> bool:
        return self.min_val.dim() > 0 and self.min_val.numel() > 0

    @abstractmethod
    def _fold(self, x: Tensor, enabled: Tensor | None, block_size: list[int] | None) -> None:
        """Fold a tensor into statistics that are sized."""

    @abstractmethod
    def _size(self, groups: tuple[int, ...]) -> None:
        """Fresh statistics of a grid of blocks."""

    @abstractmethod
    def _chosen(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point, shaped as the statistics."""

    @property
    def _merges(self) -> Mapping[str, str]:
        return super()._merges if self._is_sized or not self._in_blocks else {}

    @property
    def block_size(self) -> tuple[int, ...]:
        """The sizes of a block, 0 for all of a dimension; none while the state is unsized."""
        if isinstance(self.granularity, PerTensor):
            raise AttributeError("block_size: there is one range for the whole tensor")
        if not self._is_sized:
            return ()
        return tuple(size or 0 for size in blocks(self.granularity, self.min_val.dim()))

    @property
    def _symmetric_zero_point(self) -> int:
        return int((self.quant_max + self.quant_min + 1) / 2)

    def observe(self, x: Tensor, enabled: Tensor | None = None) -> None:
        if not self._in_blocks:
            self._fold(x, enabled, None)
            return
        _checks.check_input(type(self).__name__, "x", x)
        if x.numel() == 0:
            return
        sizes = block_size(self.granularity, x.shape)
        if self._is_sized:
            self._fold(x, enabled, sizes)
            return
        _checks.check_block_size(type(self).__name__, x, None, sizes)
        unsized = dict(self._buffers)
        self._size(grid(self.granularity, x.shape))
        try:
            self._fold(x, enabled, sizes)
        except Exception:
            self._buffers.update(unsized)
            raise

    def calculate_qparams(self) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        """Scale and zero point, in the shapes and dtypes that were asked for.

        An observer that was never fed gives 1 and 0, with a warning; values that were left out as
        not finite give one too.
        """
        self.warn_of_statistics()
        if self.min_val.numel():
            scale, zero_point = self._chosen()
        else:
            scale, zero_point = self.eps.new_ones(1), self.eps.new_zeros(1)
        shape = self._shape() if self.min_val.numel() else (1,)
        scale = scale.reshape(shape).to(self.scale_dtype or torch.float32)
        if self.zero_point_domain is ZeroPointDomain.NONE:
            return scale, None
        floating = self.zero_point_domain is ZeroPointDomain.FLOAT
        dtype = self.zero_point_dtype or (torch.float32 if floating else torch.int32)
        return scale, zero_point.reshape(shape).to(dtype)

    def _shape(self) -> tuple[int, ...]:
        shape = tuple(self.min_val.shape)
        if self.keepdim:
            return shape
        sizes = blocks(self.granularity, len(shape))
        return tuple(
            count
            for count, size in zip(shape, sizes, strict=True)
            if size is not None and not (size > 1 and count == 1)
        )

    def extra_repr(self) -> str:
        mapping, dtype = self.mapping_type.name, self.target_dtype
        return f"{mapping}, {dtype}, {self.granularity}, {super().extra_repr()}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        saved = [state_dict.get(prefix + name) for name in ("min_val", "max_val")]
        shapes = {tuple(value.shape) for value in saved if value is not None}
        if self._in_blocks and None not in saved and len(shapes) == 1:
            (shape,) = shapes
            if shape != tuple(self.min_val.shape):
                self._size(shape)
        # the statistics' own know the dicts of torch.ao, whose shapes are others
        UniformQuantizationObserverBase._load_from_state_dict(
            self, state_dict, prefix, local_metadata, *args
        )


def _check_interface(
    owner: str,
    mapping_type: MappingType,
    granularity: Granularity,
    preserve_zero: bool,
    zero_point_domain: ZeroPointDomain,
) -> None:
    for name, value, kinds in (
        ("mapping_type", mapping_type, (MappingType,)),
        ("granularity", granularity, GRANULARITIES),
        ("zero_point_domain", zero_point_domain, (ZeroPointDomain,)),
    ):
        if not isinstance(value, kinds):
            wanted = ", ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"{owner}: {name}: expected one of {wanted}, got {value!r}")
    affine = mapping_type is MappingType.ASYMMETRIC
    if not affine and not preserve_zero:
        raise ValueError(f"{owner}: preserve_zero: expected True with {mapping_type}, got False")
    refused = ZeroPointDomain.NONE if affine else ZeroPointDomain.FLOAT
    if zero_point_domain is refused:
        raise ValueError(
            f"{owner}: zero_point_domain: expected INT or "
            f"{'FLOAT' if affine else 'NONE'} with {mapping_type}, got {zero_point_domain}"
        )


class AffineQuantizedMinMaxObserver(AffineQuantizedObserver):
    """The least and the greatest value of each block of all tensors seen.

    Args:
        Those of :class:`AffineQuantizedObserver`.

    Buffers: ``min_val``, ``max_val``: float32, the grid of blocks (0-d for one range).

    Source: ``torchao.quantization.observer.AffineQuantizedMinMaxObserver``, whose minima and maxima
    are of the dtype of the tensors and are not in its ``state_dict``.
    """

    _update = "running"
    averaging_constant = 0.01  # of the moving average

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not self._in_blocks:
            self._size(())

    def _size(self, groups: tuple[int, ...]) -> None:
        with torch.inference_mode(False):  # ordinary tensors, for a module to keep
            self._register_range(groups, self.eps.device)

    def _fold(self, x: Tensor, enabled: Tensor | None, block_size: list[int] | None) -> None:
        buffers = self._buffers
        minmax(
            x, buffers["min_val"], buffers["max_val"], buffers["nonfinite_count"], None,
            self._update, self.averaging_constant, self.nonfinite, enabled, block_size,
        )  # fmt: skip

    def _chosen(self) -> tuple[Tensor, Tensor]:
        low, high = self.min_val, self.max_val
        integers = self.zero_point_domain is not ZeroPointDomain.FLOAT
        if self.mapping_type is MappingType.SYMMETRIC_NO_CLIPPING_ERR:
            chosen = self._without_clipping(low, high)
        elif self.preserve_zero and integers:
            scale, zero_point = torch.empty_like(low), torch.empty_like(low, dtype=torch.int64)
            self._write_qparams(low, high, scale, zero_point, None)
            return scale, zero_point
        else:
            chosen = self._spanning(low, high, integers)
        unfed = low > high
        return torch.where(unfed, 1.0, chosen[0]), torch.where(unfed, 0.0, chosen[1])

    def _without_clipping(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The least symmetric scale by which both ends come to lie on the grid."""
        scale = self.eps.reshape(())
        for end, bound in ((low, self.quant_min), (high, self.quant_max)):
            if bound:
                scale = torch.maximum(scale, end / bound)
        return scale, torch.full_like(scale, self._symmetric_zero_point)

    def _spanning(self, low: Tensor, high: Tensor, integers: bool) -> tuple[Tensor, Tensor]:
        """The scale of the range as it is, zero in it or not."""
        if self.preserve_zero:
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        steps = float(self.quant_max - self.quant_min)
        width = (high - low) / steps
        # a width above the greatest float32 has a scale all the same
        width = torch.where(width.isinf(), high / steps - low / steps, width)
        scale = torch.maximum(width, self.eps.reshape(()))
        if not integers:
            return scale, low + scale * ((self.quant_max + self.quant_min + 1) / 2)
        zero_point = self.quant_min - torch.round(low / scale)
        return scale, zero_point.clamp(self.quant_min, self.quant_max)


class AffineQuantizedMovingAverageMinMaxObserver(AffineQuantizedMinMaxObserver):
    """The moving average of the blocks' least and greatest values; the first counts in full.

    Args:
        averaging_constant: the weight of a new tensor, in (0, 1]; by keyword.
        Others: :class:`AffineQuantizedObserver`.
    """

    _update = "moving_average"

    def __init__(self, *args: Any, averaging_constant: float = 0.01, **kwargs: Any):
        check_averaging_constant(type(self).__name__, averaging_constant)
        super().__init__(*args, **kwargs)
        self.averaging_constant = averaging_constant

    @property
    def _merges(self) -> Mapping[str, str]:
        return merging.AVERAGED if self.min_val.numel() else {}


class _OfHistogram(AffineQuantizedObserver):
    """Of a histogram, of which a method chooses among the scales of an integer grid."""

    def __init__(self, *args: Any, method: str = "mse", **kwargs: Any):
        super().__init__(*args, method=method, **kwargs)
        owner = type(self).__name__
        if self.target_dtype.is_floating_point:
            raise ValueError(
                f"{owner}: target_dtype: expected an integer type, got {self.target_dtype}"
            )
        if not self.preserve_zero or self.zero_point_domain is ZeroPointDomain.FLOAT:
            raise ValueError(
                f"{owner}: preserve_zero, zero_point_domain: expected True and INT (or NONE) for a "
                f"search on integers, got {self.preserve_zero} and {self.zero_point_domain}"
            )
        # by a search there is no range that could be clipped
        without_clipping = self.mapping_type is MappingType.SYMMETRIC_NO_CLIPPING_ERR
        if without_clipping and method not in ranges.SEARCHES:
            raise ValueError(
                f"{owner}: mapping_type: expected ASYMMETRIC or SYMMETRIC with method {method!r} "
                f"(SYMMETRIC_NO_CLIPPING_ERR with {' or '.join(ranges.SEARCHES)}), "
                f"got {self.mapping_type}"
            )

    def _chosen(self) -> tuple[Tensor, Tensor]:
        return HistogramObserverBase._choose(self)  # type: ignore[arg-type]


class AffineQuantizedHistogramObserver(_OfHistogram, HistogramObserver):  # type: ignore[override, misc]
    """A histogram of all tensors seen, of which any method may be asked for the range.

    Args:
        granularity: ``PerTensor()``.
        method: by default the least squared error; ``"l2_greedy"`` is torch's search.
        bins, upsample_rate, combine, method_kwargs, scale_constraint: by keyword, see
            :class:`pyobserver.HistogramObserver`.
        Others: :class:`AffineQuantizedObserver`, with ``preserve_zero`` and integer zero points.

    Buffers: ``histogram``: float64 ``(bins,)``; ``min_val``, ``max_val``: float32, 0-d (with
    keepdim as many dimensions as the tensors, of size 1).
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if not isinstance(self.granularity, PerTensor):
            raise ValueError(
                f"{type(self).__name__}: granularity: expected PerTensor() "
                f"(AffineQuantizedLogHistogramObserver has the others), got {self.granularity}"
            )

    def _size(self, groups: tuple[int, ...]) -> None:
        if 0 not in groups:
            self.min_val, self.max_val = (t.reshape(groups) for t in (self.min_val, self.max_val))

    def _fold(self, x: Tensor, enabled: Tensor | None, block_size: list[int] | None) -> None:
        HistogramObserver.observe(self, x, enabled)

    def _options(self) -> Mapping[str, Any]:
        return self.method_kwargs

    def statistic(self) -> ranges.Histogram:
        ends = self.min_val.reshape(()), self.max_val.reshape(())
        return ranges.Histogram(self.histogram, *ends, "linear")

    def counts_over(self, min_val: Tensor, max_val: Tensor) -> Tensor:
        return super().counts_over(min_val.reshape(()), max_val.reshape(()))


class AffineQuantizedLogHistogramObserver(_OfHistogram, LogHistogramObserver):  # type: ignore[override, misc]
    """A log histogram of each block; by default the range of the least squared error.

    It is the same bytes in any order of the tensors, and takes 128 KiB a block with 5 mantissa
    bits, 32 with 3. With ``method="mse"`` it stands in for torchao's
    ``AffineQuantizedMSEObserver``, whose range is the last tensor's.

    Args:
        mantissa_bits, method, method_kwargs, scale_constraint: by keyword, see
            :class:`pyobserver.LogHistogramObserver`.
        Others: :class:`AffineQuantizedObserver`, with ``preserve_zero`` and integer zero points.

    Buffers: ``counts``: int64 ``(*grid, columns)``; ``min_val``, ``max_val``: float32 ``grid``.
    """

    def _size(self, groups: tuple[int, ...]) -> None:
        LogHistogramObserver._size(self, groups)

    def _fold(self, x: Tensor, enabled: Tensor | None, block_size: list[int] | None) -> None:
        buffers = self._buffers
        log_histogram(
            x, buffers["counts"], buffers["min_val"], buffers["max_val"], None, self.nonfinite,
            enabled, block_size,
        )  # fmt: skip


host.AffineQuantizedObserverBase.register(AffineQuantizedObserver)
host.AffineQuantizedMinMaxObserver.register(AffineQuantizedMinMaxObserver)

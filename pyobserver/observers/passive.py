"""Observers that gather no statistics: they carry a configuration, or record what passes."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..compat.hosts import offer_to_hosts
from ..dtypes import PER_TENSOR, check_qscheme, quant_bounds
from ..ops.recomputation import is_recomputing
from .base import ObserverBase


class _PassiveObserver(ObserverBase):
    def forward(self, x: Tensor) -> Tensor:
        return x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        raise RuntimeError(f"{type(self).__name__} gathers no statistics: it has no scale to give")


@offer_to_hosts
class FixedQParamsObserver(_PassiveObserver):
    """A scale and a zero point that are given, for operators with a known range (sigmoid, tanh).

    Args:
        scale: positive and finite. zero_point: an integer in [quant_min, quant_max].
        Others: as of the other observers; qscheme is a per-tensor one.

    Buffers: ``scale`` float32 ``(1,)``, ``zero_point`` int32 ``(1,)``.

    Source: ``torch.ao.quantization.FixedQParamsObserver``.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        scale: float,
        zero_point: int,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        quant_min: int = 0,
        quant_max: int = 255,
        is_dynamic: bool = False,
    ):
        owner = type(self).__name__
        check_qscheme(owner, qscheme, PER_TENSOR)
        if is_dynamic:
            raise NotImplementedError(f"{owner}: is_dynamic: expected False, got True")
        rounded = torch.tensor([scale], dtype=torch.float32)
        if not bool((rounded > 0) & rounded.isfinite()):
            raise ValueError(f"{owner}: scale: expected a positive finite float32, got {scale}")
        quant_min, quant_max = quant_bounds(dtype, quant_min, quant_max, False)
        if not quant_min <= zero_point <= quant_max:
            raise ValueError(
                f"{owner}: zero_point: expected a value in [{quant_min}, {quant_max}], "
                f"got {zero_point}"
            )
        super().__init__(dtype=dtype, is_dynamic=is_dynamic)
        self.qscheme = qscheme
        self.quant_min, self.quant_max = quant_min, quant_max
        self.register_buffer("scale", rounded)
        self.register_buffer("zero_point", torch.tensor([zero_point], dtype=torch.int32))

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def extra_repr(self) -> str:
        return f"scale={self.scale}, zero_point={self.zero_point}"


@offer_to_hosts
class PlaceholderObserver(_PassiveObserver):
    """Carries a configuration to the converted module: for float16, or dynamic quantization.

    Args:
        dtype, quant_min, quant_max, qscheme, eps, is_dynamic: what the converter will read.
        custom_op_name: kept as ``custom_op``.
        compute_dtype: deprecated; any value means ``is_dynamic=True``.

    Source: ``torch.ao.quantization.PlaceholderObserver`` (which warns of compute_dtype, and then
    leaves is_dynamic as it was).
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        custom_op_name: str = "",
        compute_dtype: torch.dtype | None = None,
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: torch.qscheme | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
    ):
        if compute_dtype is not None:
            is_dynamic = True
            warnings.warn("compute_dtype is deprecated: give is_dynamic=True instead", stacklevel=2)
        super().__init__(dtype=dtype, is_dynamic=is_dynamic)
        self.qscheme = torch.per_tensor_affine if qscheme is None else qscheme
        self.quant_min, self.quant_max = quant_min, quant_max
        self.eps = torch.finfo(torch.float32).eps if eps is None else eps
        self.custom_op = custom_op_name

    def extra_repr(self) -> str:
        return f"dtype={self.dtype}, is_dynamic={self.is_dynamic}"


@offer_to_hosts
class RecordingObserver(_PassiveObserver):
    """Keeps a copy of every tensor seen, for debugging.

    Source: ``torch.ao.quantization.RecordingObserver``.
    """

    def __init__(self, dtype: torch.dtype = torch.quint8):
        super().__init__(dtype=dtype)
        self.tensor_val: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if not is_recomputing():
            self.tensor_val.append(x.clone())
        return x

    def get_tensor_value(self) -> list[Tensor]:
        return self.tensor_val


@offer_to_hosts
class NoopObserver(_PassiveObserver):
    """Does nothing but carry its dtype, for quantization to float16.

    Source: ``torch.ao.quantization.NoopObserver``.
    """

    def __init__(self, dtype: torch.dtype = torch.float16, custom_op_name: str = ""):
        super().__init__(dtype=dtype)
        self.custom_op = custom_op_name


@offer_to_hosts
class ReuseInputObserver(_PassiveObserver):
    """Asks for the observer of the operator's input to be used again (FX graph mode).

    Source: ``torch.ao.quantization.ReuseInputObserver``.
    """

    def __init__(self) -> None:
        super().__init__(dtype=torch.quint8)

"""Static quantization of linear layers by torchao's ``quantize_``: observe, calibrate, convert.

The classes are those of torchao's tutorial. ``to_affine_quantized_intx_static``, into which it
converts, left torchao with 0.18: :class:`Int8StaticConfig` converts into the ``Int8Tensor`` that is
there instead (integer matrix products), :class:`StaticQuantConfig` into any other integer type.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.quantization import quantize_
from torchao.quantization.granularity import PerRow, PerTensor
from torchao.quantization.quant_primitives import (
    MappingType,
    ZeroPointDomain,
    dequantize_affine,
    quantize_affine,
)
from torchao.quantization.quantize_.workflows.int8.int8_tensor import (
    Int8Tensor,
    QuantizeTensorToInt8Kwargs,
)
from torchao.quantization.transform_module import register_quantize_module_handler

from ...observers.base import StatisticsModule
from ...ops.fake_quantize import fake_quantize
from .granularity import block_size, grid
from .observers import dtype_bounds


class ObservedLinear(nn.Linear):
    """A linear layer in floating point whose input and weight are observed.

    Args:
        act_obs, weight_obs: observers of torchao's interface.
        Others: those of ``torch.nn.Linear``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        act_obs: nn.Module,
        weight_obs: nn.Module,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.act_obs = act_obs
        self.weight_obs = weight_obs

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.act_obs(input), self.weight_obs(self.weight), self.bias)

    @classmethod
    def from_float(
        cls, float_linear: nn.Linear, act_obs: nn.Module, weight_obs: nn.Module
    ) -> ObservedLinear:
        """A layer with the parameters themselves of ``float_linear``."""
        weight = float_linear.weight
        sizes = float_linear.in_features, float_linear.out_features
        observed = cls(*sizes, act_obs, weight_obs, False, device="meta", dtype=weight.dtype)
        observed.weight, observed.bias = weight, float_linear.bias
        observed.train(float_linear.training)
        return observed


@dataclass
class _ObserveConfig(AOBaseConfig):
    act_obs: nn.Module
    weight_obs: nn.Module


@register_quantize_module_handler(_ObserveConfig)
def _observe(module: nn.Linear, config: _ObserveConfig) -> nn.Module:
    observers = [
        copy.deepcopy(observer).to(module.weight.device)
        for observer in (config.act_obs, config.weight_obs)
    ]
    return ObservedLinear.from_float(module, *observers)


def insert_observers_(model: nn.Module, act_obs: nn.Module, weight_obs: nn.Module) -> None:
    """Replace each linear layer of a model by one that is observed, in place.

    Args:
        model: what holds the layers, ``torch.nn.Linear`` itself; those of a subclass stay, and so
            do those that are observed already.
        act_obs, weight_obs: observers of which each layer gets copies, on its device.

    Raises:
        ValueError: there is no linear layer in the model.
    """

    def is_plain(module: nn.Module, name: str) -> bool:
        return name != "" and type(module) is nn.Linear

    if not any(is_plain(module, name) for name, module in model.named_modules()):
        raise ValueError(
            "insert_observers_: model: expected one with torch.nn.Linear inside, "
            f"got {type(model).__name__} without"
        )
    quantize_(model, _ObserveConfig(act_obs, weight_obs), is_plain)


def _qparams(observer: Any, role: str) -> tuple[Tensor, Tensor]:
    """Scale and zero point of an observer that was fed, float32 and int32, in any shape."""
    low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
    if low is not None and high is not None and bool((low > high).all()):
        raise ValueError(f"{role}: expected an observer that was fed, got {observer}")
    if getattr(observer, "zero_point_domain", None) is ZeroPointDomain.FLOAT:
        raise ValueError(f"{role}: zero_point_domain: expected INT or NONE, got FLOAT")
    scale, zero_point = observer.calculate_qparams()
    if zero_point is None:
        zero_point = torch.zeros_like(scale)
    return scale.float(), zero_point.to(torch.int32)


def _integer_range(observer: Any, role: str, target_dtype: torch.dtype) -> tuple[int, int]:
    """The integers of an observer of this type; torchao's own leave the type's to be None."""
    if observer.target_dtype != target_dtype or target_dtype.is_floating_point:
        raise ValueError(
            f"target_dtype: expected the integer type of {role}, {observer.target_dtype}, "
            f"got {target_dtype}"
        )
    least, greatest = dtype_bounds("target_dtype", target_dtype)
    given = observer.quant_min, observer.quant_max
    return least if given[0] is None else given[0], greatest if given[1] is None else given[1]


class QuantizedLinear(StatisticsModule):
    """A linear layer on integers of fixed scales: input and weight, computed in floating point.

    Args:
        in_features, out_features, weight, bias: of the layer in floating point.
        act_obs, weight_obs: observers of torchao's interface that were fed.
        target_dtype: theirs.

    Buffers: ``qweight``: the weight's integers; ``act_scale``, ``act_zero_point``,
    ``weight_scale``, ``weight_zero_point``: float32 and int32, whatever the model is cast to.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """

    qweight: Tensor
    act_scale: Tensor
    act_zero_point: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        act_obs: Any,
        weight_obs: Any,
        weight: Tensor,
        bias: Tensor | None,
        target_dtype: torch.dtype,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.target_dtype = target_dtype
        self.bias = bias
        self._act_granularity = act_obs.granularity
        self._act_range = _integer_range(act_obs, "act_obs", target_dtype)
        self._weight_range = _integer_range(weight_obs, "weight_obs", target_dtype)
        self._weight_block = block_size(weight_obs.granularity, weight.shape)
        for name, observer in (("act", act_obs), ("weight", weight_obs)):
            scale, zero_point = _qparams(observer, f"{name}_obs")
            self.register_buffer(f"{name}_scale", scale)
            self.register_buffer(f"{name}_zero_point", zero_point)
        qweight = quantize_affine(
            weight.detach(), self._weight_block, self.weight_scale, self.weight_zero_point,
            target_dtype, *self._weight_range,
        )  # fmt: skip
        self.register_buffer("qweight", qweight)

    def dequantized_weight(self, dtype: torch.dtype) -> Tensor:
        return dequantize_affine(
            self.qweight, self._weight_block, self.weight_scale, self.weight_zero_point,
            self.qweight.dtype, *self._weight_range, output_dtype=dtype,
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        scale, zero_point, sizes = self.act_scale, self.act_zero_point, None
        if scale.numel() > 1:
            sizes = block_size(self._act_granularity, input.shape)
            shape = grid(self._act_granularity, input.shape)
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        rounded = fake_quantize(input, scale, zero_point, *self._act_range, block_size=sizes)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(rounded, self.dequantized_weight(input.dtype), bias)

    @classmethod
    def from_observed(
        cls, observed_linear: ObservedLinear, target_dtype: torch.dtype
    ) -> QuantizedLinear:
        return cls(
            observed_linear.in_features, observed_linear.out_features, observed_linear.act_obs,
            observed_linear.weight_obs, observed_linear.weight, observed_linear.bias, target_dtype,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.target_dtype}"


@dataclass
class StaticQuantConfig(AOBaseConfig):
    """Of ``quantize_``: each :class:`ObservedLinear` becomes a :class:`QuantizedLinear`.

    Args:
        target_dtype: the integer type of both observers.
    """

    target_dtype: torch.dtype


@register_quantize_module_handler(StaticQuantConfig)
def _apply_static_quant(module: nn.Module, config: StaticQuantConfig) -> nn.Module:
    return QuantizedLinear.from_observed(_observed(module), config.target_dtype)


@dataclass
class Int8StaticConfig(AOBaseConfig):
    """Of ``quantize_``: each :class:`ObservedLinear` becomes a ``Linear`` of torchao's int8 weight.

    As ``torchao.quantization.Int8StaticActivationInt8WeightConfig`` makes it, but with the scale
    that the weight's observer chose. What that takes: int8 of both observers, one range for the
    input, of either mapping, and one a row or one for the weight, symmetric; all of int8's
    integers, or for both -64..63. Inputs have two dimensions, or as many as the input's observer
    saw if it has ``keepdim=True``.

    Raises (in ``quantize_``):
        ValueError: names the argument, what was expected and what came.
    """


@register_quantize_module_handler(Int8StaticConfig)
def _apply_int8_static(module: nn.Module, config: Int8StaticConfig) -> nn.Module:
    observed = _observed(module)
    act_obs: Any = observed.act_obs
    weight_obs: Any = observed.weight_obs
    ranges = [_integer_range(act_obs, "act_obs", torch.int8)]
    ranges += [_integer_range(weight_obs, "weight_obs", torch.int8)]
    if ranges not in ([(-128, 127)] * 2, [(-64, 63)] * 2):
        raise ValueError(
            "quant_min, quant_max: expected (-128, 127) or (-64, 63) of both observers, "
            f"got {ranges[0]} of act_obs and {ranges[1]} of weight_obs"
        )
    if not isinstance(act_obs.granularity, PerTensor):
        raise ValueError(f"act_obs: granularity: expected PerTensor(), got {act_obs.granularity}")
    if weight_obs.mapping_type is MappingType.ASYMMETRIC:
        raise ValueError("weight_obs: mapping_type: expected a symmetric one, got ASYMMETRIC")
    weight = observed.weight.detach()
    shape = grid(weight_obs.granularity, weight.shape)
    granularities = {(len(weight), 1): PerRow(), (1, 1): PerTensor()}
    if shape not in granularities:
        raise ValueError(
            "weight_obs: granularity: expected PerRow(), PerAxis(0) or PerTensor(), "
            f"got {weight_obs.granularity}"
        )
    scale, zero_point = _qparams(act_obs, "act_obs")
    dims = scale.dim() if act_obs.keepdim else weight.dim()
    affine = act_obs.mapping_type is MappingType.ASYMMETRIC
    reduce_range = ranges[0] == (-64, 63)
    quantized = Int8Tensor.from_hp(
        weight,
        granularities[shape],
        scale=_qparams(weight_obs, "weight_obs")[0].reshape(shape),
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(
            PerTensor(),
            MappingType.ASYMMETRIC if affine else MappingType.SYMMETRIC,
            reduce_range,
        ),
        act_quant_scale=scale.reshape((1,) * dims),
        act_quant_zero_point=zero_point.to(torch.int8).reshape((1,) * dims) if affine else None,
        reduce_range=reduce_range,
    )
    sizes = observed.in_features, observed.out_features
    linear = nn.Linear(*sizes, bias=False, device="meta", dtype=weight.dtype)
    linear.weight, linear.bias = nn.Parameter(quantized, requires_grad=False), observed.bias
    return linear.train(observed.training)


def _observed(module: nn.Module) -> ObservedLinear:
    if not isinstance(module, ObservedLinear):
        raise TypeError(
            "quantize_: filter_fn: expected one that picks ObservedLinear alone, "
            f"got {type(module).__name__}"
        )
    return module

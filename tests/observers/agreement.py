"""Our observers beside torch.ao's: how a pair is made, fed and compared."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from ops.cases import assert_all_same, assert_same
from torch import Tensor, nn
from torch.ao.quantization import fake_quantize as ao_fake_quantize
from torch.ao.quantization import observer as ao_observer

import pyobserver

PER_TENSOR_CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "quint8_symmetric": {"qscheme": torch.per_tensor_symmetric},
    "qint8": {"dtype": torch.qint8},
    "qint8_symmetric": {"dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric},
    "int8": {"dtype": torch.int8},
    "uint8_symmetric": {"dtype": torch.uint8, "qscheme": torch.per_tensor_symmetric},
    "int16": {"dtype": torch.int16},
    "uint16": {"dtype": torch.uint16},
    "uint16_symmetric": {"dtype": torch.uint16, "qscheme": torch.per_tensor_symmetric},
    "int32_symmetric": {"dtype": torch.int32, "qscheme": torch.per_tensor_symmetric},
    "qint32_symmetric": {"dtype": torch.qint32, "qscheme": torch.per_tensor_symmetric},
    "quint4x2": {"dtype": torch.quint4x2},
    "seven_bits": {"quant_min": 0, "quant_max": 127},
    "seven_bits_symmetric": {
        "quant_min": 0,
        "quant_max": 127,
        "qscheme": torch.per_tensor_symmetric,
    },
    "four_bits": {"dtype": torch.int8, "quant_min": -8, "quant_max": 7},
    "narrow": {
        "dtype": torch.qint8,
        "qscheme": torch.per_tensor_symmetric,
        "quant_min": -127,
        "quant_max": 127,
        "eps": 2**-12,
    },
    "reduced": {"reduce_range": True},
    "reduced_qint8": {
        "reduce_range": True,
        "dtype": torch.qint8,
        "qscheme": torch.per_tensor_symmetric,
    },
    "reduced_bounds": {"reduce_range": True, "quant_min": 0, "quant_max": 255},
}
_PER_CHANNEL = {
    torch.per_tensor_affine: torch.per_channel_affine,
    torch.per_tensor_symmetric: torch.per_channel_symmetric,
}
PER_CHANNEL_CONFIGS: dict[str, dict[str, Any]] = {
    name: {**config, "qscheme": _PER_CHANNEL[config.get("qscheme", torch.per_tensor_affine)]}
    for name, config in PER_TENSOR_CONFIGS.items()
} | {
    "float_qparams": {"qscheme": torch.per_channel_affine_float_qparams},
    "float_qparams_4bit": {
        "qscheme": torch.per_channel_affine_float_qparams,
        "dtype": torch.quint4x2,
    },
}


def pair(name: str, **arguments: Any) -> tuple[Any, Any]:
    """Our class of a name and torch.ao's, made with the same arguments."""
    theirs = getattr(ao_observer, name, None) or getattr(ao_fake_quantize, name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*reduce_range")
        return getattr(pyobserver, name)(**arguments), theirs(**arguments)


def feed(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """One batch to each: in float32 to torch.ao, whose statistics are of the input's type."""
    assert ours(x) is x
    if x.numel():  # torch.ao per channel raises for an empty batch
        theirs(x.float())


def assert_range_agrees(ours: Any, theirs: Any, context: object = "") -> None:
    # torch.ao's zero may be a negative one
    expected = [theirs.min_val + 0.0, theirs.max_val + 0.0]
    assert_all_same([ours.min_val, ours.max_val], expected, context)


def assert_qparams_agree(ours: Any, theirs: Any, context: object = "") -> None:
    """Scale and zero point, to the last bit, and their types and shapes."""
    actual, expected = ours.calculate_qparams(), theirs.calculate_qparams()
    assert_same(actual[0], expected[0], context)
    assert_same(actual[1] + 0, expected[1] + 0, context)

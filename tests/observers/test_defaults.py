"""Every ``default_*`` object makes what torch.ao's of the same name makes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from ops.cases import assert_all_same
from torch import nn
from torch.ao.quantization import fake_quantize as ao_fake_quantize
from torch.ao.quantization import observer as ao_observer

import pyobserver

AO = (ao_observer, ao_fake_quantize)
FACTORIES = sorted(
    name
    for module in AO
    for name in module.__all__
    if name.startswith(("default_", "weight_", "per_channel_", "fused_"))
)
ATTRIBUTES = (
    "dtype", "qscheme", "quant_min", "quant_max", "is_dynamic", "reduce_range", "ch_axis", "bins",
    "averaging_constant", "has_customized_qrange", "custom_op", "is_per_channel", "upsample_rate",
    "dst_nbins",
)  # fmt: skip


def make(name: str) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*reduce_range")
        theirs = next(getattr(module, name) for module in AO if hasattr(module, name))
        return getattr(pyobserver, name)(), theirs()


def assert_alike(ours: nn.Module, theirs: nn.Module) -> None:
    assert type(ours).__name__ == type(theirs).__name__
    for attribute in ATTRIBUTES:
        if hasattr(theirs, attribute):
            assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]
    if hasattr(theirs, "eps"):
        assert float(ours.eps) == float(theirs.eps)


def test_there_are_as_many() -> None:
    assert len(FACTORIES) == 32
    assert all(hasattr(pyobserver, name) for name in FACTORIES)


@pytest.mark.parametrize("name", FACTORIES)
def test_is_alike(name: str) -> None:
    ours, theirs = make(name)
    assert_alike(ours, theirs)
    if hasattr(theirs, "activation_post_process"):
        assert_alike(ours.activation_post_process, theirs.activation_post_process)


@pytest.mark.parametrize("name", FACTORIES)
def test_acts_alike(name: str) -> None:
    """The same output and the same state after a batch, and the buffers of the same dtype."""
    ours, theirs = make(name)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    y, expected = ours(x), theirs(x)
    assert_all_same([y], [expected])
    for key, value in theirs.state_dict().items():
        saved = ours.state_dict()[key]
        assert saved.dtype == value.dtype or key.endswith("histogram")
        assert saved.shape == value.shape
        assert_all_same([saved.double()], [value.double()], key)


@pytest.mark.parametrize("name", ["default_debug_observer", "default_placeholder_observer"])
def test_classes_stand_for_themselves(name: str) -> None:
    assert isinstance(getattr(pyobserver, name), type)

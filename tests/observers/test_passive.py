from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.cases import assert_all_same, assert_same

from pyobserver import (
    FixedQParamsObserver,
    NoopObserver,
    PlaceholderObserver,
    RecordingObserver,
    ReuseInputObserver,
)

from .agreement import pair

PASSIVE: dict[str, dict[str, Any]] = {
    "NoopObserver": {},
    "PlaceholderObserver": {},
    "RecordingObserver": {},
    "ReuseInputObserver": {},
    "FixedQParamsObserver": {"scale": 0.1, "zero_point": 3},
}


@pytest.mark.parametrize("name", PASSIVE)
def test_passes_its_input_on(name: str) -> None:
    ours, theirs = pair(name, **PASSIVE[name])
    for x in (torch.randn(3), torch.arange(3), torch.empty(0)):
        assert ours(x) is x
    assert (ours.dtype, ours.is_dynamic) == (theirs.dtype, theirs.is_dynamic)
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("name", sorted(PASSIVE.keys() - {"FixedQParamsObserver"}))
def test_has_no_scale_to_give(name: str) -> None:
    ours, _ = pair(name)
    with pytest.raises(RuntimeError, match=f"{name} gathers no statistics"):
        ours.calculate_qparams()


def test_fixed() -> None:
    ours, theirs = pair("FixedQParamsObserver", scale=1 / 256, zero_point=0)
    assert_all_same(ours.calculate_qparams(), theirs.calculate_qparams())
    assert (ours.quant_min, ours.quant_max) == (theirs.quant_min, theirs.quant_max)
    assert ours.qscheme == theirs.qscheme


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"scale": 0.0}, ValueError, "scale: expected a positive finite float32, got 0.0"),
        ({"scale": -1.0}, ValueError, "scale: expected .* got -1.0"),
        ({"scale": float("nan")}, ValueError, "scale: expected .* got nan"),
        ({"scale": float("inf")}, ValueError, "scale: expected .* got inf"),
        ({"zero_point": 256}, ValueError, r"zero_point: expected .*\[0, 255\], got 256"),
        ({"zero_point": -1}, ValueError, "zero_point: expected .* got -1"),
        ({"quant_min": 255}, ValueError, "quant_min: expected a value below quant_max"),
        ({"quant_max": 1000}, ValueError, "inside that of torch.quint8"),
        ({"is_dynamic": True}, NotImplementedError, "is_dynamic: expected False"),
        ({"qscheme": torch.per_channel_affine}, NotImplementedError, "qscheme: expected"),
    ],
)
def test_fixed_rejects(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        FixedQParamsObserver(**{"scale": 0.1, "zero_point": 0, **arguments})


def test_recording_keeps_copies() -> None:
    ours = RecordingObserver()
    x = torch.ones(3)
    ours(x)
    x.fill_(2.0)
    ours(x)
    assert_all_same(ours.get_tensor_value(), [torch.ones(3), torch.full((3,), 2.0)])


def test_placeholder_carries_its_configuration() -> None:
    arguments = {
        "dtype": torch.qint8,
        "custom_op_name": "mine",
        "quant_min": -5,
        "quant_max": 5,
        "qscheme": torch.per_tensor_symmetric,
        "eps": 2**-12,
        "is_dynamic": True,
    }
    ours, theirs = pair("PlaceholderObserver", **arguments)
    for name in ("dtype", "custom_op", "quant_min", "quant_max", "qscheme", "eps", "is_dynamic"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert PlaceholderObserver().qscheme == torch.per_tensor_affine
    assert PlaceholderObserver().eps == torch.finfo(torch.float32).eps
    with pytest.warns(UserWarning, match="compute_dtype is deprecated"):
        assert PlaceholderObserver(compute_dtype=torch.quint8).is_dynamic


def test_dtypes() -> None:
    assert NoopObserver().dtype == torch.float16
    assert NoopObserver(torch.bfloat16, "mine").custom_op == "mine"
    assert ReuseInputObserver().dtype == torch.quint8
    fixed = FixedQParamsObserver(0.5, 1)
    assert_same(fixed.scale, torch.tensor([0.5]))
    assert_same(fixed.zero_point, torch.tensor([1], dtype=torch.int32))

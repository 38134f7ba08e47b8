"""The observer of llm-compressor's registry: its interface, and its own calibration with it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_ins import adapter
from torch import Tensor, nn

import pyobserver

HOST = "llmcompressor.observers"


class Observer(nn.Module):
    """What the adapter needs of ``llmcompressor.observers.Observer``."""

    registered: dict[str, type] = {}  # noqa: RUF012

    @classmethod
    def register(cls, name: str) -> Callable[[type], type]:
        def keep(observer: type) -> type:
            cls.registered[name] = observer
            return observer

        return keep

    @classmethod
    def load_from_registry(cls, name: str, **kwargs: Any) -> Any:
        return cls.registered[name](**kwargs)

    def __init__(self, base_name: str, args: Any, **observer_kwargs: Any):
        super().__init__()
        self.base_name, self.args = base_name, args
        self.args.observer_kwargs = {**(args.observer_kwargs or {}), **observer_kwargs}

    @property
    def has_statistics(self) -> bool:
        return hasattr(self, "min_vals") and hasattr(self, "max_vals")

    @property
    def is_weight_obs(self) -> bool:
        return self.base_name == "weight"

    def get_qparams(self) -> dict[str, Any]:
        low, high = self.min_vals.clamp(max=0), self.max_vals.clamp(min=0)
        least = -(2 ** (self.args.num_bits - 1))
        steps = 2**self.args.num_bits - 1
        scale = (high - low) / steps
        zero_point = (least - low / scale).round().clamp(least, -least - 1)
        if self.args.symmetric:
            scale = torch.maximum(-low, high) / (steps / 2)
            zero_point = torch.zeros_like(scale)
        self.delete_statistics(check_fused=False)
        return {"scale": scale, "zero_point": zero_point.to(torch.int8), "global_scale": None}

    def forward(self, observed: Tensor) -> Observer:
        if observed.numel() and not (self.is_weight_obs and self.has_statistics):
            self.update_statistics_from_observed(self._flat(observed))
        return self

    def _flat(self, x: Tensor) -> Tensor:
        if self.args.strategy == "tensor":
            return x.reshape(-1, 1, x.shape[-1])
        return x.unflatten(-1, (-1, self.args.group_size or x.shape[-1])).unsqueeze(0)

    def delete_statistics(self, check_fused: bool = True) -> None:
        if not check_fused:
            del self.min_vals, self.max_vals


def _arguments(**kwargs: Any) -> Any:
    defaults = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
    defaults |= {"strategy": "tensor", "observer_kwargs": {}}
    return SimpleNamespace(**{**defaults, **kwargs})


STAND_INS: dict[str, dict[str, Any]] = {
    "compressed_tensors": {},
    "compressed_tensors.quantization": {
        "QuantizationArgs": _arguments,
        "QuantizationType": SimpleNamespace(INT="int"),
    },
    "llmcompressor": {},
    HOST: {"Observer": Observer},
}


@pytest.fixture(params=["installed", "stand-in"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Makes the observer as llm-compressor does, of a tensor's name and quantization arguments."""
    with adapter(request.param, "pyobserver.compat.llmcompressor", HOST, STAND_INS):
        host = sys.modules[HOST].Observer
        arguments = sys.modules["compressed_tensors.quantization"].QuantizationArgs

        def made(base_name: str, **kwargs: Any) -> Any:
            args = arguments(observer="pyobserver", **kwargs)
            return host.load_from_registry("pyobserver", base_name=base_name, args=args)

        yield made


def solved(x: Tensor, bits: int, symmetric: bool, method: str = "mse", **options: Any) -> Any:
    """What pyobserver itself chooses for the rows of a tensor, on signed integers."""
    observer = pyobserver.PerChannelLogHistogramObserver()
    observer(x)
    least = -(2 ** (bits - 1))
    return observer.solve(
        method, quant_min=least, quant_max=-least - 1, symmetric=symmetric, **options
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("base_name", ["input", "output"])
def test_activations_are_solved_once_over_all_batches(
    make: Any, base_name: str, bits: int, symmetric: bool
) -> None:
    observer = make(base_name, num_bits=bits, symmetric=symmetric, strategy="tensor")
    tensors = [torch.randn(2, n, 16).exp() for n in (3, 5)]
    for x in tensors:
        assert observer(x) is observer
    assert observer.has_statistics
    found = observer.get_qparams()
    assert not observer.has_statistics
    values = torch.cat([x.flatten() for x in tensors]).unsqueeze(0)
    expected = solved(values, bits, symmetric)
    assert found["scale"].shape == (1,)
    assert torch.allclose(found["scale"], expected.scale, rtol=1e-5)
    assert torch.equal(found["zero_point"].long(), expected.zero_point)
    observer(tensors[0])  # begins again
    again = observer.get_qparams()["scale"]
    assert torch.allclose(
        again, solved(tensors[0].reshape(1, -1), bits, symmetric).scale, rtol=1e-5
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
def test_weights(
    make: Any, monkeypatch: pytest.MonkeyPatch, group: int | None, symmetric: bool
) -> None:
    kwargs = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    observer = make("weight", num_bits=4, symmetric=symmetric, **kwargs)
    monkeypatch.setattr(sys.modules[type(observer).__module__], "_SCALES_AT_ONCE", 3)
    weight = torch.randn(5, 32)
    found = observer(weight).get_qparams()
    expected = solved(weight.reshape(-1, group or 32), 4, symmetric)
    assert found["scale"].shape == (5, 32 // (group or 32))
    assert torch.allclose(found["scale"].flatten(), expected.scale, rtol=1e-5)
    assert torch.equal(found["zero_point"].flatten().long(), expected.zero_point)


def test_options(make: Any) -> None:
    kwargs = {"method": "percentile", "percentile": 0.9, "mantissa_bits": 7}
    observer = make("input", strategy="tensor", observer_kwargs=kwargs)
    x = torch.randn(8, 64)
    found = observer(x).get_qparams()["scale"]
    assert found.item() == pytest.approx(x.abs().quantile(0.9).item() / 127.5, rel=0.02)


def test_nonfinite_values_are_left_out(make: Any) -> None:
    x = torch.randn(4, 16)
    broken = torch.cat([x, torch.full((4, 16), torch.nan), torch.full((4, 16), torch.inf)])
    pair = [make("input", strategy="tensor")(t).get_qparams()["scale"] for t in (x, broken)]
    assert torch.equal(*pair)


def test_ranks_add_their_counts(make: Any) -> None:
    """What ``sync_activation_stats`` reduces, by its own operations."""
    tensors = [torch.randn(3, 16), torch.randn(5, 16) * 3]
    ranks = [make("input", strategy="tensor")(x) for x in tensors]
    both = make("input", strategy="tensor")
    for x in tensors:
        both(x)
    reduce = {"SUM": torch.add, "MIN": torch.minimum, "MAX": torch.maximum}
    for name, operation in ranks[0]._act_sync_dict.items():
        parts = [getattr(rank, name) for rank in ranks]
        merged = reduce[str(operation).rpartition(".")[2]](*parts)
        assert torch.equal(merged, getattr(both, name)), name
    assert set(ranks[0]._act_sync_dict) == {"counts", "min_vals", "max_vals"}


def test_arguments_are_checked(make: Any) -> None:
    with pytest.raises(ValueError, match=r"method: expected one of .*got 'best'"):
        make("input", strategy="tensor", observer_kwargs={"method": "best"})
    with pytest.raises(TypeError, match="p: expected one of the options"):
        make("input", strategy="tensor", observer_kwargs={"p": 3.0})
    with pytest.raises(ValueError, match="type: expected int, got float"):
        make("input", strategy="tensor", type="float")


def test_calibration_of_llm_compressor() -> None:
    """Its own functions attach the observer by name, feed it and write scales to the module."""
    pytest.importorskip(HOST, reason="llmcompressor is not installed", exc_type=ImportError)
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationScheme,
        initialize_module_for_quantization,
    )
    from llmcompressor.modifiers.quantization.calibration import (
        calibrate_input_hook,
        initialize_observer,
        observe,
        update_qparams,
    )

    importlib.import_module("pyobserver.compat.llmcompressor")  # registers the name
    linear = nn.Linear(32, 8, bias=False)
    args = {"observer": "pyobserver", "symmetric": True, "num_bits": 8}
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**args, strategy="channel"),
        input_activations=QuantizationArgs(**args, strategy="tensor"),
    )
    initialize_module_for_quantization(linear, scheme)
    for base_name in ("weight", "input"):
        initialize_observer(linear, base_name)
    x = torch.randn(4, 6, 32)
    calibrate_input_hook(linear, (x,))
    observe(linear, "weight")
    update_qparams(linear, ["weight", "input"])
    of_input, of_weight = solved(x.reshape(1, -1), 8, True), solved(linear.weight, 8, True)
    assert torch.allclose(linear.input_scale, of_input.scale, rtol=1e-5)
    assert torch.allclose(linear.weight_scale[:, 0], of_weight.scale, rtol=1e-5)

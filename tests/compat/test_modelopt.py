"""The calibrator of NVIDIA's Model Optimizer: its interface, and its own quantize with it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from stand_ins import adapter
from torch import Tensor, nn

import pyobserver
from pyobserver import ranges


class _Calibrator:
    """What the adapter needs of ``modelopt.torch.quantization.calib.calibrator._Calibrator``."""

    def __init__(self, num_bits: Any = 8, axis: Any = None, unsigned: bool = False):
        self._num_bits = num_bits
        self._axis = axis
        self._unsigned = unsigned

    def __repr__(self) -> str:
        return f"num_bits={self._num_bits} axis={self._axis} unsigned={self._unsigned}"


PACKAGES = ("modelopt", "modelopt.torch", "modelopt.torch.quantization")
STAND_INS: dict[str, dict[str, Any]] = {
    **{name: {} for name in (*PACKAGES, "modelopt.torch.quantization.calib")},
    "modelopt.torch.quantization.calib.calibrator": {"_Calibrator": _Calibrator},
}


@pytest.fixture(params=["installed", "stand-in"])
def calibrator(request: pytest.FixtureRequest) -> Iterator[Any]:
    name = "pyobserver.compat.modelopt"
    with adapter(request.param, name, PACKAGES[-1], STAND_INS) as module:
        yield module.LogHistogramCalibrator


def collected(calibrator: Any, tensors: list[Tensor]) -> Any:
    for x in tensors:
        calibrator.collect(x)
    return calibrator


def quantized(x: Tensor, amax: Tensor, bits: int, unsigned: bool, narrow: bool) -> Tensor:
    """What a TensorQuantizer makes of integers."""
    bound = 2 ** (bits - 1 + unsigned) - 1
    least = 0 if unsigned else -bound - 1 + narrow
    scale = bound / amax
    return (x * scale).round().clamp(least, bound) / scale


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_mse_is_the_least_error_of_the_quantizer(
    calibrator: Any, bits: int, unsigned: bool, narrow: bool
) -> None:
    x = torch.distributions.Laplace(0.0, 1.0).sample((4000,))
    x = torch.where(x < 0, 4 * x, x) if unsigned else x  # what is clipped has no say
    made = calibrator(bits, None, unsigned, narrow_range=narrow)
    amax = collected(made, [x[:1000], x[1000:]]).compute_amax()
    assert amax.shape == ()
    assert amax.dtype == torch.float32

    kept = x.clamp(min=0) if unsigned else x

    def error(at: Tensor) -> float:
        return (quantized(kept, at, bits, unsigned, narrow) - kept).double().pow(2).mean().item()

    tried = min(error(kept.abs().max() * share / 100) for share in range(5, 101))
    assert error(amax) <= 1.01 * tried
    assert bits == 8 or unsigned or error(amax) < 0.8 * error(x.abs().max())


@pytest.mark.parametrize("axis", [None, 0, -1, (0,), (0, 2), [1, 2], (0, 1, 2)])
@pytest.mark.parametrize("bits", [8, (4, 3)])
def test_minmax_is_the_greatest_magnitude_in_its_shape(
    calibrator: Any, axis: Any, bits: Any
) -> None:
    tensors = [torch.randn(2, 3, 4), torch.randn(2, 3, 4) * 2]
    made = collected(calibrator(bits, axis, method="minmax"), tensors)
    amax = made.compute_amax()
    kept = () if axis is None else tuple(a % 3 for a in ([axis] if isinstance(axis, int) else axis))
    reduced = [d for d in range(3) if d not in kept]
    whole = torch.stack(tensors).abs().amax(0)
    expected = (
        whole.max() if axis is None else whole.amax(reduced, keepdim=True) if reduced else whole
    )
    assert amax.shape == expected.shape
    assert torch.allclose(amax, expected, rtol=1e-6)
    assert torch.equal(made.compute_amax(), amax)


def test_batches_of_other_sizes(calibrator: Any) -> None:
    made = collected(calibrator(8, -1), [torch.randn(n, 4) for n in (2, 5)])
    assert made.compute_amax().shape == (1, 4)
    before = made.compute_amax()
    with pytest.raises(ValueError, match=r"collect: x: expected scales of shape \(1, 4\), got"):
        made.collect(torch.randn(2, 5))
    assert torch.equal(made.compute_amax(), before)


def test_methods(calibrator: Any) -> None:
    x = torch.distributions.StudentT(3.0).sample((20000,))
    observer = pyobserver.LogHistogramObserver()
    observer(x)
    made = collected(calibrator(8, method="percentile", method_kwargs={"percentile": 0.99}), [x])
    assert made.compute_amax().item() == pytest.approx(x.abs().quantile(0.99).item(), rel=0.02)
    assert made.compute_amax(percentile=0.5) < made.compute_amax() / 2
    of_kl = ranges.solve(observer.statistic(), "kl", 8, symmetric=True).scale * 127.5
    assert torch.allclose(made.compute_amax("entropy"), of_kl, rtol=1e-6)
    assert torch.equal(made.compute_amax("entropy"), made.compute_amax("kl"))


def test_nothing_collected(calibrator: Any) -> None:
    made = calibrator(8)
    assert made.compute_amax() is None
    with pytest.raises(TypeError, match="x: expected a dense tensor"):
        made.collect(torch.ones(3, dtype=torch.int32))
    assert made.compute_amax() is None
    made.collect(torch.empty(0, 3))
    assert made.compute_amax() is None
    assert collected(made, [torch.ones(3)]).compute_amax() is not None
    made.reset()
    assert made.compute_amax() is None
    rows = collected(calibrator(8, 0), [torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]])])
    with pytest.warns(UserWarning, match="2 NaN or infinite"):
        amax = rows.compute_amax()
    assert amax[1].item() == 0
    assert amax[0].item() > 1.9


def test_a_dry_run_on_meta(calibrator: Any) -> None:
    made = collected(calibrator(8, 0), [torch.empty(3, 4, device="meta")])
    assert made.compute_amax().shape == (3, 1)
    assert made.compute_amax().is_meta
    assert collected(made, [torch.randn(3, 4)]).compute_amax().shape == (3, 1)


def test_arguments_are_checked(calibrator: Any) -> None:
    with pytest.raises(ValueError, match=r"method: expected one of .*got 'best'"):
        calibrator(method="best")
    with pytest.raises(TypeError, match="percentile: expected one of the options"):
        calibrator(method="mse", method_kwargs={"percentile": 0.9})
    with pytest.raises(ValueError, match=r"method: expected minmax or percentile .*got 'mse'"):
        collected(calibrator((4, 3)), [torch.randn(9)]).compute_amax()
    assert "method=mse" in repr(copy.deepcopy(calibrator()))


def test_quantize_with_model_optimizer() -> None:
    """From its configuration on: amax of inputs and weights, and the error of the output."""
    mtq = pytest.importorskip(
        PACKAGES[-1], reason="modelopt is not installed", exc_type=ImportError
    )
    from pyobserver.compat.modelopt import LogHistogramCalibrator

    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    batches = [torch.distributions.StudentT(3.0).sample((64, 32)) for _ in range(4)]

    def run(model: nn.Module) -> None:
        for x in batches:
            model(x)

    def result(calibrators: tuple[Any, Any], bits: int) -> nn.Module:
        cfg = [
            {"quantizer_name": "*", "enable": False},
            {
                "quantizer_name": "*input_quantizer",
                "cfg": {"num_bits": bits, "axis": None, "calibrator": calibrators[0]},
            },
            {
                "quantizer_name": "*weight_quantizer",
                "cfg": {"num_bits": bits, "axis": 0, "calibrator": calibrators[1]},
            },
        ]
        return mtq.quantize(copy.deepcopy(model), {"quant_cfg": cfg, "algorithm": "max"}, run)

    x = torch.cat(batches)
    errors = {}
    for method in ("minmax", "mse"):
        pair = tuple((LogHistogramCalibrator, (4, axis, False, method)) for axis in (None, 0))
        found = result(pair, 4)
        assert found[0].weight_quantizer.amax.shape == (64, 1)
        errors[method] = (found(x) - model(x)).pow(2).mean().item()
        expected = collected(LogHistogramCalibrator(4, None, False, method), batches).compute_amax()
        assert torch.equal(found[0].input_quantizer.amax, expected)
    theirs = result(("max", "max"), 4)
    assert math.isclose(errors["minmax"], (theirs(x) - model(x)).pow(2).mean().item(), rel_tol=1e-3)
    assert errors["mse"] < 0.7 * errors["minmax"]

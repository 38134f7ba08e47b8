from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from torch import Tensor
from torch.ao.quantization import PerChannelMinMaxObserver

from pyobserver import ops

from .cases import REJECTED_SWITCHES, any_isa, assert_all_same, assert_rejected, opcheck, unchanged

EPS = torch.finfo(torch.float32).eps
QSCHEMES = {
    "affine": torch.per_channel_affine,
    "symmetric": torch.per_channel_symmetric,
    "affine_float": torch.per_channel_affine_float_qparams,
}
FUSED = ("fused_affine", "fused_symmetric")
MAPPINGS = (*QSCHEMES, *FUSED)
GRIDS = ((0, 255), (-128, 127), (0, 15), (-8, 7), (-127, 127), (0, 1), (0, 65535), (-32768, 32767))

# pairs of the least and the greatest value
RANGES = torch.tensor(
    [
        [-1.0, 1.0],
        [0.0, 0.0],
        [0.0, 3.0],
        [-3.0, 0.0],
        [2.5, 2.5],
        [-3.0, -3.0],
        [1000.0, 1001.0],
        [-7.0, -6.0],
        [-1e-9, 1e-9],
        [1e-30, 2e-30],
        [-1e-45, 1e-45],
        [-1e30, 1e30],
        [-1e38, 1e38],
        [-0.1, 12.75],
        [-0.01, 300.0],
        [-0.5, 254.5],
        [-12.8, 12.7],
        [-1e-30, 1e30],
        [-1e30, 1e-30],
    ]
)


def ranges() -> tuple[Tensor, Tensor]:
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(1)).sort(1).values
    low, high = torch.cat([RANGES, noise]).unbind(1)
    return low.contiguous(), high.contiguous()


def torch_qparams(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, mapping: str, eps: float
) -> tuple[Tensor, Tensor]:
    theirs = PerChannelMinMaxObserver(dtype=torch.int32, qscheme=QSCHEMES[mapping], eps=eps)
    theirs.quant_min, theirs.quant_max = quant_min, quant_max
    return theirs._calculate_qparams(low, high)


def run(
    backend: Backend,
    low: Tensor,
    high: Tensor,
    quant_min: int,
    quant_max: int,
    mapping: str = "affine",
    *,
    eps: float = EPS,
    zero_dtype: torch.dtype = torch.int64,
    symmetric_zero_point: int = 0,
) -> tuple[Tensor, Tensor]:
    scale = torch.full(low.shape, -1.0, device=backend.device)
    zero_dtype = torch.float32 if mapping == "affine_float" else zero_dtype
    zero_point = torch.full(low.shape, -99, dtype=zero_dtype, device=backend.device)
    ends = [t.to(backend.device) for t in (low, high)]
    least = torch.tensor([eps], device=backend.device)
    with unchanged(*ends, least):
        backend.op("choose_qparams")(
            *ends, scale, zero_point, least, quant_min, quant_max, mapping, symmetric_zero_point
        )
    return scale, zero_point


@pytest.mark.parametrize("eps", [EPS, 2**-12])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("mapping", QSCHEMES)
def test_is_that_of_torch(
    backend: Backend, mapping: str, grid: tuple[int, int], eps: float
) -> None:
    low, high = ranges()
    scale, zero_point = torch_qparams(low, high, *grid, mapping, eps)
    found = run(backend, low, high, *grid, mapping, eps=eps)
    assert_all_same(found, (scale, zero_point.to(found[1].dtype)))
    if mapping != "affine_float":
        for dtype in (torch.int32, torch.float32):  # float32: one that is learned
            other = run(backend, low, high, *grid, mapping, eps=eps, zero_dtype=dtype)
            assert_all_same(other, (scale, zero_point.to(dtype)), dtype)


# torch divides by zero on a grid of two symmetric levels
@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid != (0, 1)], ids=str)
@pytest.mark.parametrize("mapping", FUSED)
def test_is_that_of_the_fused_kernel(backend: Backend, mapping: str, grid: tuple[int, int]) -> None:
    """Its observer switched off, torch's kernel chooses from the range that it is given."""
    low, high = ranges()
    scale, zero_point = torch.ones_like(low), torch.zeros_like(low, dtype=torch.int32)
    off, on = torch.tensor([0]), torch.tensor([1])
    torch.fused_moving_avg_obs_fake_quant(
        torch.zeros(low.numel(), 1), off, on, low.clone(), high.clone(), scale, zero_point,
        0.01, *grid, 0, True, mapping == "fused_symmetric",
    )  # fmt: skip
    for dtype in (torch.int32, torch.int64, torch.float32):
        found = run(backend, low, high, *grid, mapping, zero_dtype=dtype)
        assert_all_same(found, (scale, zero_point.to(dtype)), dtype)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (17,), (2, 3)])
def test_shapes(backend: Backend, shape: tuple[int, ...]) -> None:
    low, high = torch.full(shape, -1.0), torch.full(shape, 3.0)
    scale, zero_point = run(backend, low, high, 0, 255)
    assert scale.shape == zero_point.shape == shape
    assert (scale == torch.tensor(4.0) / 255).all()
    assert (zero_point == 64).all()


def test_symmetric_zero_point(backend: Backend) -> None:
    ends = (torch.tensor([-1.0]), torch.tensor([0.5]))
    for zero in (128, 0, 2**15):
        scale, zero_point = run(backend, *ends, 0, 255, "symmetric", symmetric_zero_point=zero)
        assert zero_point.tolist() == [zero]
        assert scale.cpu() == torch.tensor(1.0) / 127.5


@pytest.mark.parametrize("mapping", MAPPINGS)
def test_never_fed(backend: Backend, mapping: str) -> None:
    """One channel of several: the others are served."""
    low, high = torch.tensor([torch.inf, -1.0]), torch.tensor([-torch.inf, 1.0])
    scale, zero_point = run(backend, low, high, -128, 127, mapping, symmetric_zero_point=5)
    assert scale[0] == 1
    assert zero_point[0] == 0
    assert_all_same(
        [scale[1:], zero_point[1:]],
        run(backend, low[1:], high[1:], -128, 127, mapping, symmetric_zero_point=5),
    )


@pytest.mark.parametrize("mapping", ["affine", "affine_float"])
def test_width_above_float32(backend: Backend, mapping: str) -> None:
    """D12: torch's scale is infinite there."""
    most = torch.finfo(torch.float32).max
    scale, zero_point = run(backend, torch.tensor([-most]), torch.tensor([most]), 0, 255, mapping)
    assert float(scale) == pytest.approx(2 * (most / 255), rel=1e-6)
    assert abs(float(zero_point) - 127.5) <= 0.5001
    # not more than the double of a float32 here, so the plain formula serves
    scale, _ = run(backend, torch.tensor([-most]), torch.tensor([most]), -8, 7, "symmetric")
    assert float(scale) == pytest.approx(most / 7.5, rel=1e-6)


def test_int32_grid_does_not_overflow(backend: Backend) -> None:
    """torch's zero point wraps around in int32."""
    grid = (-(2**31), 2**31 - 1)
    cases = {(-1.0, 1.0): 0, (0.0, 1.0): -(2**31), (-1.0, 0.0): 2**31 - 1}
    for pair, zero in cases.items():
        ends = [torch.tensor([end]) for end in pair]
        for dtype in (torch.int32, torch.int64):
            _, zero_point = run(backend, *ends, *grid, eps=1e-30, zero_dtype=dtype)
            assert abs(int(zero_point) - zero) <= 1


@pytest.mark.parametrize("mapping", ["affine", "symmetric"])
def test_not_finite(backend: Backend, mapping: str) -> None:
    """With nonfinite="propagate": the scale says so, as in torch, and the grid holds the zero."""
    low, high = (
        torch.tensor([torch.nan, 0.0, -torch.inf]),
        torch.tensor([torch.nan, torch.inf, 1.0]),
    )
    scale, zero_point = run(backend, low, high, 0, 255, mapping)
    assert scale[0].isnan()
    assert scale[1:].isinf().all()
    assert ((zero_point >= 0) & (zero_point <= 255)).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
def test_enabled(backend: Backend, dtype: torch.dtype) -> None:
    for mapping in MAPPINGS:
        given = arguments(mapping=mapping)
        if mapping == "affine_float":
            given["zero_point"] = torch.zeros(3)
        given = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in given.items()}
        off = torch.zeros(1, dtype=dtype, device=backend.device)
        with unchanged(given["scale"], given["zero_point"]):
            backend.op("choose_qparams")(**given, enabled=off)
        backend.op("choose_qparams")(**given, enabled=torch.ones_like(off))
        assert (given["scale"] != 0).all()


def test_meta() -> None:
    tensors = [torch.empty(3, device="meta") for _ in range(3)]
    zero_point = torch.empty(3, dtype=torch.int32, device="meta")
    ops.choose_qparams(*tensors, zero_point, torch.empty(1, device="meta"), 0, 255)


def arguments(**changed: Any) -> dict[str, Any]:
    given = {
        "min_val": torch.tensor([-1.0, -2.0, 0.0]),
        "max_val": torch.tensor([1.0, 2.0, 5.0]),
        "scale": torch.zeros(3),
        "zero_point": torch.zeros(3, dtype=torch.int32),
        "eps": torch.tensor([EPS]),
        "quant_min": 0,
        "quant_max": 255,
    }
    return {**given, **changed}


REJECTED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "grid_empty": (
        {"quant_min": 5, "quant_max": 5},
        ValueError,
        "quant_min: expected a value below quant_max, got quant_min=5, quant_max=5",
    ),
    "grid_reversed": ({"quant_min": 256}, ValueError, "quant_min: expected .* got quant_min=256"),
    "mapping": (
        {"mapping": "linear"},
        ValueError,
        "mapping: expected one of affine.* got 'linear'",
    ),
    "max_val_size": (
        {"max_val": torch.zeros(2)},
        ValueError,
        r"max_val: expected 3 elements, got shape \(2,\)",
    ),
    "scale_size": (
        {"scale": torch.zeros(1)},
        ValueError,
        r"scale: expected 3 elements, got shape \(1,\)",
    ),
    "scale_dtype": (
        {"scale": torch.zeros(3, dtype=torch.float64)},
        TypeError,
        "scale: expected torch.float32, got torch.float64",
    ),
    "min_val_dtype": (
        {"min_val": torch.zeros(3, dtype=torch.float16)},
        TypeError,
        "min_val: expected torch.float32, got torch.float16",
    ),
    "zero_dtype": (
        {"zero_point": torch.zeros(3, dtype=torch.int16)},
        TypeError,
        "zero_point: expected torch.int32 or torch.int64 or torch.float32, got torch.int16",
    ),
    "float_zero_dtype": (
        {"mapping": "affine_float"},
        TypeError,
        "zero_point: expected torch.float32, got torch.int32",
    ),
    "zero_size": (
        {"zero_point": torch.zeros(4, dtype=torch.int32)},
        ValueError,
        r"zero_point: expected 3 elements, got shape \(4,\)",
    ),
    "scale_strides": (
        {"scale": torch.zeros(6)[::2]},
        ValueError,
        r"scale: expected a contiguous tensor, got strides \(2,\)",
    ),
    "eps_size": (
        {"eps": torch.zeros(2)},
        ValueError,
        r"eps: expected 1 element, got shape \(2,\)",
    ),
    "eps_number": ({"eps": 1e-6}, TypeError, "eps: expected torch.float32, got float"),
    **REJECTED_SWITCHES,
    "meta": (
        {"scale": torch.zeros(3, device="meta")},
        ValueError,
        "scale: expected a tensor on cpu .*, got one on meta",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name: str) -> None:
    changed, error, match = REJECTED[name]
    assert_rejected(ops.choose_qparams, arguments(**changed), error, f"^choose_qparams: {match}")


@pytest.mark.parametrize("name", REJECTED)
@any_isa
def test_kernel_rejects(backend: Backend, name: str) -> None:
    if not backend.cuda:
        assert_rejected(backend.op("choose_qparams"), arguments(**REJECTED[name][0]), Exception)


def test_opcheck() -> None:
    opcheck("choose_qparams", **arguments())
    opcheck("choose_qparams", **arguments(mapping="symmetric", symmetric_zero_point=128))
    opcheck("choose_qparams", **arguments(mapping="affine_float", zero_point=torch.zeros(3)))
    opcheck("choose_qparams", **arguments(enabled=torch.zeros(1, dtype=torch.bool)))
    none = [torch.zeros(0) for _ in range(3)]
    opcheck("choose_qparams", *none, torch.zeros(0, dtype=torch.int64), torch.tensor([EPS]), 0, 255)

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from backends import ON_HOST, Backend, needs_device_in_software
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pyobserver import ops
from pyobserver.ops._elementwise import is_dense

from .cases import (
    DTYPES,
    LARGE,
    LAYOUTS,
    SHAPE,
    SIZES,
    SPECIAL,
    assert_all_same,
    assert_rejected,
    assert_same,
    laid_out,
    not_dense_real_float,
    opcheck,
    opcheck_inputs,
    properties,
    sample,
    sprinkled,
    threads,
    unchanged,
    value_lists,
)

Grid = tuple[int, bool, bool]
SIGNED, UNSIGNED = (8, False, True), (8, True, True)
GRIDS = (
    SIGNED,
    (8, False, False),
    UNSIGNED,
    (1, True, True),
    (1, False, False),
    (2, False, True),
    (2, False, False),
    (4, False, True),
    (11, True, False),
    (16, False, False),
    (24, False, False),
    (32, True, True),
)
# of values of SHAPE
AMAX_SHAPES = (
    (),
    (1,),
    (1, 1, 1, 1),
    (3,),
    (5, 1),
    (4, 1, 1),
    (1, 4, 1, 1),
    (6, 1, 1, 1),
    (6, 1, 1, 3),
    (4, 1, 3),
    (4, 5, 3),
    (6, 4, 1, 1),
    SHAPE,
)
FUNCTIONS = {"tensor_quant": ops.tensor_quant, "fake_tensor_quant": ops.fake_tensor_quant}


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def of_torch(
    x: Tensor, amax: Tensor, num_bits: int, unsigned: bool, narrow_range: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The chain of torch's operations: integers, scales, values again, and what was not clipped."""
    x, amax = x.detach().cpu().to(wide(x.dtype)), amax.cpu().to(wide(amax.dtype))
    high = torch.tensor(2.0 ** (num_bits - 1 + unsigned) - 1)
    low = 0 if unsigned else -high if narrow_range else -high - 1
    scale = high / amax
    zero = amax <= 1 / (1 << 24)
    scale[zero] = 0
    q = torch.clamp((x * scale.to(x.dtype)).round_(), low, high)
    scale[zero] = 1
    return q, scale, q / scale.to(x.dtype).expand_as(q), x.abs() <= amax.to(x.dtype)


def packed(inside: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Bit i of the mask is the i-th element in the order of the output's memory."""
    in_memory = torch.empty_strided(inside.shape, strides, dtype=torch.bool).copy_(inside)
    flat = in_memory.as_strided((inside.numel(),), (1,)).numpy()
    return torch.from_numpy(np.packbits(flat, bitorder="little"))


def amax_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Magnitudes that clip some of the values; neighbours are far apart, so none is another's."""
    count = int(np.prod(shape))
    return (0.5 + torch.arange(count) * 7 % 11).reshape(shape).to(dtype)


def check(backend: Backend, x: Tensor, amax: Tensor, grid: Grid, context: object = "") -> None:
    """The values, their layout, the scales and the mask, of every op."""
    q, scale, y, inside = of_torch(x, amax, *grid)
    given = x.to(backend.device), amax.to(backend.device)
    with unchanged(*given):
        quantized = backend.op("_tensor_quant")(*given, *grid)
        *quantized_too, mask = backend.op("_tensor_quant_mask")(*given, *grid)
        values = backend.op("_fake_tensor_quant")(*given, *grid)
        values_too, mask_too = backend.op("_fake_tensor_quant_mask")(*given, *grid)
    for got in (quantized, quantized_too):
        assert_same(got[0], q.to(x.dtype), (context, "integers"))
        assert_same(got[1], scale.to(x.dtype), (context, "scale"))
    for got in (values, values_too):
        assert_same(got, y.to(x.dtype), (context, "values"))
    strides = x.stride() if is_dense(x) else torch.empty(x.shape).stride()
    for got in (quantized[0], quantized_too[0], values, values_too):
        assert x.numel() == 0 or got.stride() == strides, context
    for got in (mask, mask_too):
        assert_same(got, packed(inside, values.stride()), (context, "mask"))


def printed(values: Tensor) -> list[str]:
    return [f"{value:.4f}" for value in values.tolist()]


def test_published_example(backend: Backend) -> None:
    """The one in the docstrings of pytorch-quantization, to every digit that it prints."""
    torch.manual_seed(12345)
    x = torch.rand(10)
    given = "0.9817 0.8796 0.9921 0.4611 0.0832 0.1784 0.3674 0.5676 0.3376 0.2119"
    assert printed(x) == given.split()
    x = x.to(backend.device)
    with unchanged(x):
        q, scale = ops.tensor_quant(x, x.abs().max())
        y = ops.fake_tensor_quant(x, x.abs().max())
    assert q.tolist() == [126, 113, 127, 59, 11, 23, 47, 73, 43, 27]
    assert printed(scale.reshape(1)) == ["128.0057"]
    values = "0.9843 0.8828 0.9921 0.4609 0.0859 0.1797 0.3672 0.5703 0.3359 0.2109"
    assert printed(y) == values.split()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(backend: Backend, size: int | None, dtype: torch.dtype) -> None:
    x = sample(size, dtype)
    check(backend, x, amax_of(()), SIGNED)
    check(backend, x.abs(), amax_of(() if size is None else (size,)), UNSIGNED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    x = laid_out(layout, dtype)
    for shape in AMAX_SHAPES:
        check(backend, x, amax_of(shape), (4, False, True), shape)


def test_amax_of_any_layout(backend: Backend) -> None:
    x = sample(SHAPE)
    for amax in (
        amax_of((3, 5, 4, 6)).permute(3, 2, 1, 0),
        amax_of((6, 8, 1, 1))[:, ::2],
        amax_of((6, 1, 1, 1)).expand(6, 4, 5, 1),
        amax_of(()).expand(SHAPE),
    ):
        check(backend, x, amax, SIGNED, amax.stride())


@pytest.mark.parametrize("amax_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_amax_of_any_dtype(backend: Backend, dtype: torch.dtype, amax_dtype: torch.dtype) -> None:
    """A scale of float64 is rounded once, to the type of the products."""
    x = sample((6, 40), dtype)
    for shape in ((), (6, 1), (40,)):
        amax = (1.1 + sample(shape, torch.float64, 3).abs()).to(amax_dtype)
        check(backend, x, amax, SIGNED, shape)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grids(backend: Backend, dtype: torch.dtype, grid: Grid) -> None:
    x = sample((5, 37), dtype)
    x = x.abs() if grid[1] else x
    if grid[:2] == (1, False) or (dtype == torch.float16 and grid[0] > 16):
        return  # no scale, and one that float16 does not hold: tests of their own
    for shape in ((), (5, 1), (37,)):
        check(backend, x, 2.5 * amax_of(shape), grid, shape)


@pytest.mark.parametrize(("num_bits", "unsigned"), [(0, False), (0, True), (1, False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_grid_of_zero_alone(
    backend: Backend, dtype: torch.dtype, num_bits: int, unsigned: bool
) -> None:
    x = sample((4, 9), dtype).abs().to(backend.device)
    amax = torch.tensor([[0.5], [0.0], [2.0], [1e-30]], device=backend.device)
    for narrow_range in (True, False):
        grid = num_bits, unsigned, narrow_range
        q, scale, mask = backend.op("_tensor_quant_mask")(x, amax, *grid)
        assert_same(q, torch.zeros_like(x))
        assert_same(scale, torch.ones(4, 1, dtype=dtype))
        assert_same(backend.op("_fake_tensor_quant")(x, amax, *grid), torch.zeros_like(x))
        assert_same(mask, packed(x.cpu().float() <= amax.cpu(), x.stride()))


@pytest.mark.parametrize("amax_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_amax_of_nothing(backend: Backend, dtype: torch.dtype, amax_dtype: torch.dtype) -> None:
    """Up to 2^-24 it counts as 0: the values are 0 and the scale 1."""
    amax = torch.tensor([0.0, -0.0, 1e-45, 2.0**-25, 2.0**-24, 2.0**-23, 1.0]).to(amax_dtype)
    x = torch.tensor([[-2.0, -0.0, 0.0, 2.0**-26, 1.0]], dtype=dtype)
    wider = x.to(wide(dtype))  # float16 has no scale for 2^-23
    check(backend, wider.expand(7, 5), amax.reshape(7, 1), SIGNED)
    check(backend, wider.t().expand(5, 7), amax, SIGNED)
    for one in amax[:5]:
        check(backend, x, one, SIGNED)
        q, scale = (t.cpu() for t in ops.tensor_quant(x.to(backend.device), one.to(backend.device)))
        assert q.abs().max() == 0
        assert scale == 1
    assert ops.fake_tensor_quant(*(t.to(backend.device) for t in (x, amax[5]))).abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(backend: Backend, name: str, dtype: torch.dtype) -> None:
    """NaN stays, and infinities are clipped."""
    x = torch.tensor(SPECIAL[name]).to(dtype)
    for amax in (torch.tensor(1.5), torch.tensor(0.0), amax_of((x.numel(),))):
        check(backend, x, amax, SIGNED)
        check(backend, x.abs(), amax, UNSIGNED)


@pytest.mark.parametrize("value", [3e38, 1e-7, 1e-30, torch.inf, torch.nan])
def test_extreme_amax(backend: Backend, value: float) -> None:
    x = torch.tensor([0.0, -1.0, 1e-38, -1e-30, 1e30, 3e38, value, value / 3, -value / 254])
    for dtype in (torch.float32, torch.float64):
        check(backend, x.to(dtype), torch.tensor(value), SIGNED)
        check(backend, x.to(dtype), torch.tensor([value] * 9), (16, False, False))
        check(backend, x.to(dtype).expand(2, 9), torch.tensor([[value], [2.0]]), SIGNED)


def test_nan_takes_no_other_amax_for_zero(backend: Backend) -> None:
    amax = torch.tensor([torch.nan, 0.0, 1.0], device=backend.device)
    q, scale = ops.tensor_quant(torch.ones(3, device=backend.device), amax)
    assert_same(q, torch.tensor([torch.nan, 0.0, 127.0]))
    assert_same(scale, torch.tensor([torch.nan, 1.0, 127.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_divides(backend: Backend, dtype: torch.dtype) -> None:
    """Not by reciprocals, of which the scale and the values would be one in the last place off."""
    generator = torch.Generator().manual_seed(5)
    amax = torch.rand(300, 1, generator=generator) + 0.01
    scale = torch.full_like(amax, 127) / amax
    steps = torch.arange(-100, 100)
    assert (scale != 127 * (1 / amax)).any()
    assert (steps / scale != steps * (1 / scale)).any()
    x = (steps + 0.5) / scale  # halfway between two integers, but for rounding
    check(backend, x.to(dtype), amax, SIGNED)
    for i in range(8):
        check(backend, x[i].to(dtype), amax[i], SIGNED)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_round_to_even(backend: Backend, dtype: torch.dtype) -> None:
    x = (torch.arange(-300, 301) / 2).to(dtype)
    check(backend, x, torch.tensor(127.0), SIGNED)
    y = ops.fake_tensor_quant(x[299:306].to(backend.device), torch.tensor(127.0).to(backend.device))
    assert y.tolist() == [-0.0, 0.0, 0.0, 1.0, 2.0, 2.0, 2.0]


def test_half_is_computed_in_float32(backend: Backend) -> None:
    """Rounded once: a scale that float16 does not hold does the values no harm."""
    x = sample(1000, torch.float16).to(backend.device) * 2.0**-20
    amax = x.abs().max()
    y = ops.fake_tensor_quant(x, amax)
    assert_same(y, ops.fake_tensor_quant(x.float(), amax.float()).half())
    assert 127 / amax.float() > 65504
    assert y.abs().max() == amax


def test_scale_that_float16_cannot_hold(backend: Backend) -> None:
    x = torch.full((2, 3), 1e-3, dtype=torch.float16, device=backend.device)
    amax = torch.tensor([[1.0], [127 / 65520]], device=backend.device)
    if backend.cuda:
        assert_same(ops.tensor_quant(x, amax)[1], torch.tensor([[127.0], [torch.inf]]).half())
        return
    match = r"^tensor_quant: amax: expected one whose scale float16 holds \(up to 65504.*\), got"
    for gradient in (False, True):
        given = {"inputs": x.clone().requires_grad_(gradient), "amax": amax}
        assert_rejected(ops.tensor_quant, given, ValueError, match)
    for op in ("_tensor_quant", "_tensor_quant_mask"):
        with pytest.raises((ValueError, RuntimeError), match=match):
            backend.op(op)(x, amax, *SIGNED)
    # no scale above 65504, or no float16
    assert ops.tensor_quant(x, torch.tensor(127 / 65504))[1] == 65504
    assert ops.tensor_quant(x.bfloat16(), amax)[1].isfinite().all()
    assert ops.tensor_quant(x, torch.zeros(()))[1] == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 9, 600, 70_001])
def test_negative_value_in_an_unsigned_grid(
    backend: Backend, size: int, dtype: torch.dtype
) -> None:
    """Wherever it lies, and whatever NaN there is; a negative zero is none."""
    clean = sample(size, dtype).abs().to(backend.device)
    clean[size // 2] = -0.0
    if size > 1:
        clean[0] = torch.nan
    amax = torch.tensor(3.0, device=backend.device)
    for function in FUNCTIONS.values():
        function(clean, amax, unsigned=True)
    for at in sorted({0, size // 3, size - 1}):
        x = clean.clone()
        x[at] = -0.25
        if backend.cuda:
            assert ops.fake_tensor_quant(x, amax, unsigned=True)[at] == 0
            continue
        for name, function in FUNCTIONS.items():
            match = f"^{name}: inputs: expected no negative value for an unsigned grid, got -0.25"
            for gradient in (False, True):
                given = {"inputs": x.clone().requires_grad_(gradient), "amax": amax}
                given["unsigned"] = True
                assert_rejected(function, given, TypeError, match)
            for suffix in ("", "_mask"):
                with pytest.raises((TypeError, RuntimeError), match="expected no negative value"):
                    backend.op(f"_{name}{suffix}")(x, amax, *UNSIGNED)
            function(x, amax)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_negative_amax(backend: Backend, dtype: torch.dtype) -> None:
    x = sample((2, 3), dtype).to(backend.device)
    amax = torch.tensor([[1.0], [-0.5]], dtype=dtype, device=backend.device)
    if backend.cuda:
        for y in (*ops.tensor_quant(x, amax), ops.fake_tensor_quant(x, amax)):
            assert y[0].isfinite().all()
            assert y[1].isnan().all()
        return
    for name, function in FUNCTIONS.items():
        given = {"inputs": x, "amax": amax}
        match = f"^{name}: amax: expected no negative value, got -0.5"
        assert_rejected(function, given, ValueError, match)
        with pytest.raises((ValueError, RuntimeError), match=match):
            backend.op(f"_{name}")(x, amax, *SIGNED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "amax_shape"),
    [
        ((LARGE // 8,), ()),
        ((61, 1409), (61, 1)),
        ((1409, 61), (61,)),
        ((61, 2, 590), (61, 1, 590)),
        ((10, 3001, 3), (3001, 1)),
    ],
    ids=str,
)
def test_threads_change_nothing(
    backend: Backend, shape: tuple[int, ...], amax_shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, amax = sprinkled(sample(shape, dtype)), amax_of(amax_shape)
    _, _, y, inside = of_torch(x, amax, *SIGNED)
    grad = sprinkled(sample(shape, dtype, 1))
    given = x.to(backend.device), amax.to(backend.device)
    for count in (1, 2, 3) if backend.isa else (1,):
        with threads(count):
            got, mask = backend.op("_fake_tensor_quant_mask")(*given, *SIGNED)
            result = backend.op("_tensor_quant_backward")(grad.to(backend.device), mask)
        assert_same(got, y.to(dtype), count)
        assert_same(mask, packed(inside, x.stride()), count)
        assert_same(result, torch.where(inside, grad, 0.0), count)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient(backend: Backend, layout: str, function: str) -> None:
    """Where |x| <= amax that of the result, else 0, be it NaN."""
    values = laid_out(layout, torch.float32, backend.device)
    weights = {
        "contiguous": sprinkled(sample(SHAPE, seed=1)),
        "transposed": sample((3, 5, 4, 6), seed=2).permute(3, 2, 1, 0),
        "expanded": torch.full((), -1.0).expand(SHAPE),
    }
    for shape in AMAX_SHAPES:
        amax = amax_of(shape).to(backend.device)
        inside = of_torch(values, amax, *SIGNED)[3]
        for name, weight in weights.items():
            x = values.detach().requires_grad_()
            y = FUNCTIONS[function](x, amax)
            y = y[0] if isinstance(y, tuple) else y
            (gradient,) = torch.autograd.grad(y, x, weight.to(backend.device))
            assert_same(gradient, torch.where(inside, weight, 0.0), (shape, name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_at_the_border(backend: Backend, dtype: torch.dtype) -> None:
    """A magnitude that is amax passes; NaN does not."""
    x = torch.tensor([-1.0, 1.0, -1.0078125, 1.0078125, 0.0, torch.nan, torch.inf], dtype=dtype)
    x = x.to(backend.device).requires_grad_()
    ops.fake_tensor_quant(x, torch.ones((), device=backend.device)).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0, 1, 0, 0]


def test_graph(backend: Backend) -> None:
    """Only where inputs needs it, with one bit an element, and none of the scale."""
    x = sample(1000).to(backend.device)
    amax = x.abs().max().requires_grad_()
    assert ops.fake_tensor_quant(x, amax).grad_fn is None
    assert ops.tensor_quant(x, amax)[0].grad_fn is None
    x.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = ops.fake_tensor_quant(x, amax)
        q, scale = ops.tensor_quant(x, amax)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, 125)] * 2
    assert not scale.requires_grad
    (y.sum() + q.sum()).backward()
    assert_same(x.grad, torch.full((1000,), 2.0))
    assert amax.grad is None
    with torch.no_grad():
        assert ops.fake_tensor_quant(x, amax).grad_fn is None
    (gradient,) = torch.autograd.grad(
        ops.fake_tensor_quant(x, amax).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="its gradient was differentiated"):
        gradient.sum().backward()


def test_composites_are_the_functions() -> None:
    x, amax = sample((3, 5)), amax_of((5,))
    for options in ((), (4,), (8, False, False)):
        assert_all_same(
            torch.ops.pyobserver.tensor_quant(x, amax, *options),
            ops.tensor_quant(x, amax, *options),
        )
        assert_same(
            torch.ops.pyobserver.fake_tensor_quant(x, amax, *options),
            ops.fake_tensor_quant(x, amax, *options),
        )


def test_compiles() -> None:
    def call(x: Tensor, amax: Tensor) -> Tensor:
        q, scale = ops.tensor_quant(x, amax, 4)
        return q / scale + ops.fake_tensor_quant(x, amax, 8, narrow_range=False)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for needed in (True, False):
        ours, theirs = (sample((4, 6)).requires_grad_(needed) for _ in range(2))
        y, expected = compiled(ours, amax_of((6,))), call(theirs, amax_of((6,)))
        assert_same(y, expected)
        if needed:
            y.square().sum().backward()
            expected.square().sum().backward()
            assert_same(ours.grad, theirs.grad)


def test_meta() -> None:
    x = torch.empty(4, 5, device="meta", dtype=torch.float16).t()
    amax = torch.empty(5, 1, device="meta")
    q, scale = ops.tensor_quant(x, amax)
    assert (q.shape, q.stride(), q.dtype) == ((5, 4), (1, 5), torch.float16)
    assert (scale.shape, scale.dtype, scale.device.type) == ((5, 1), torch.float16, "meta")
    assert ops.fake_tensor_quant(x, amax).stride() == (1, 5)
    with pytest.raises(ValueError, match="amax: expected a shape that broadcasts"):
        ops.fake_tensor_quant(x, torch.empty(5, device="meta"))


def test_empty(backend: Backend) -> None:
    """The scales are there all the same."""
    amax = torch.tensor([1.0, 0.0, 2.0], device=backend.device)
    q, scale = ops.tensor_quant(torch.empty(0, 3, device=backend.device), amax)
    assert q.shape == (0, 3)
    assert scale.tolist() == [127, 1, 63.5]
    q, scale = ops.tensor_quant(*(torch.empty(2, 0, device=backend.device) for _ in range(2)))
    assert q.shape == scale.shape == (2, 0)


@properties
@given(value_lists(1e4), st.floats(2**-10, 1e4, width=32), st.integers(2, 16), st.booleans())
def test_properties(values: list[float], amax: float, num_bits: int, narrow: bool) -> None:
    """Idempotent, monotonic, odd if narrow, never off by more than half a step inside."""
    x, bound = torch.tensor(values).sort().values, torch.tensor(amax)
    y = ops.fake_tensor_quant(x, bound, num_bits, False, narrow)
    assert_same(ops.fake_tensor_quant(y, bound, num_bits, False, narrow), y)
    assert (y.diff() >= 0).all()
    if narrow:
        assert_same(ops.fake_tensor_quant(-x, bound, num_bits), -y)
    step = amax / (2 ** (num_bits - 1) - 1)
    inside = x.abs() <= amax
    assert ((y - x).abs()[inside] <= 0.5001 * step).all()
    assert (y.abs() <= (amax + (0 if narrow else step)) * 1.0001).all()


def arguments(**changed: Any) -> dict[str, Any]:
    given = {"inputs": sample((2, 3)), "amax": torch.ones(3), "num_bits": 8, "unsigned": False}
    return {**given, "narrow_range": True, **changed}


_NOT_BROADCAST = r"amax: expected a shape that broadcasts to that of inputs, \(2, 3\), got "
REJECTED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "amax_number": ({"amax": 1.0}, TypeError, r"amax: expected a dense tensor .* got float \(1.0"),
    "amax_dtype": ({"amax": torch.ones(3).int()}, TypeError, "amax: .* got torch.int32"),
    "amax_size": ({"amax": torch.ones(2)}, ValueError, rf"{_NOT_BROADCAST}\(2,\)"),
    "amax_dims": ({"amax": torch.ones(1, 1, 1)}, ValueError, rf"{_NOT_BROADCAST}\(1, 1, 1\)"),
    "amax_wider": ({"inputs": sample((1, 3)), "amax": torch.ones(2, 3)}, ValueError, "amax: .*got"),
    "amax_empty": ({"amax": torch.ones(0)}, ValueError, rf"{_NOT_BROADCAST}\(0,\)"),
    "amax_meta": (
        {"amax": torch.ones(3, device="meta")},
        ValueError,
        "amax: expected a tensor on cpu .*, got one on meta",
    ),
    "bits_low": ({"num_bits": -1}, ValueError, r"num_bits: expected an integer in \[0, 32\], got"),
    "bits_high": ({"num_bits": 33}, ValueError, r"num_bits: expected an integer .* got 33"),
    "bits_huge": ({"num_bits": 2**70}, ValueError, r"num_bits: expected an integer .* got 11"),
    "bits_float": ({"num_bits": 8.0}, TypeError, "num_bits: expected an integer, got float"),
    "unsigned": ({"unsigned": "no"}, TypeError, "unsigned: expected a bool, got str"),
    "narrow": ({"narrow_range": "yes"}, TypeError, "narrow_range: expected a bool, got str"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name: str) -> None:
    changed, error, match = REJECTED[name]
    for entry, function in FUNCTIONS.items():
        assert_rejected(function, arguments(**changed), error, f"^{entry}: {match}")
        needs_grad = arguments(**changed)
        needs_grad["inputs"].requires_grad_()
        assert_rejected(function, needs_grad, error, f"^{entry}: {match}")


@pytest.mark.parametrize("name", REJECTED)
def test_kernel_rejects(backend: Backend, name: str) -> None:
    if not backend.cuda or "meta" not in name:
        for op in ("_tensor_quant", "_fake_tensor_quant_mask"):
            given = arguments(**REJECTED[name][0])
            if backend.device == "cpu":
                assert_rejected(backend.op(op), given, Exception)


def test_rejects_other_inputs(backend: Backend) -> None:
    for x, came in not_dense_real_float().values():
        for entry, function in FUNCTIONS.items():
            expected = f"^{entry}: inputs: expected a dense tensor of float32, .*, {came}"
            given = arguments(inputs=x, amax=torch.ones(()))
            assert_rejected(function, given, TypeError, expected)
            if not backend.cuda:
                assert_rejected(backend.op(f"_{entry}"), given, Exception)


@pytest.mark.parametrize(
    "changed",
    [
        {"mask": torch.zeros(2, dtype=torch.uint8)},
        {"mask": torch.zeros(3, dtype=torch.int8)},
        {"mask": torch.zeros(6, dtype=torch.uint8)[::2]},
        {"grad": torch.zeros(20, dtype=torch.int32)},
        {"grad": torch.zeros(40)[::2]},
    ],
)
def test_backward_rejects(backend: Backend, changed: dict[str, Tensor]) -> None:
    given = {"grad": torch.ones(20), "mask": torch.full((3,), 255, dtype=torch.uint8), **changed}
    if backend.device == "cpu":
        assert_rejected(backend.op("_tensor_quant_backward"), given, Exception)


OPS = ("_tensor_quant", "_tensor_quant_mask", "_fake_tensor_quant", "_fake_tensor_quant_mask")


@pytest.mark.parametrize("kind", ["0-d", "odd", "empty_2d", "sliced", "transposed"])
def test_opcheck(kind: str) -> None:
    x = opcheck_inputs()[kind]
    amax = torch.tensor(2.0) if x.dim() < 2 else amax_of((x.shape[0], *[1] * (x.dim() - 1)))
    for op in OPS:
        opcheck(op, x, amax, *SIGNED)
    grad = x if is_dense(x) else x.contiguous()
    mask = torch.full(((grad.numel() + 7) // 8,), 0b10110101, dtype=torch.uint8)
    opcheck("_tensor_quant_backward", grad, mask)
    for function in FUNCTIONS:
        opcheck(function, x.clone().requires_grad_(), amax)


CALLS: dict[str, tuple[int, Callable[[Tensor, Tensor], object]]] = {
    "tensor_quant": (1, ops.tensor_quant),
    "fake_tensor_quant": (1, ops.fake_tensor_quant),
    "unsigned": (1, lambda x, amax: ops.fake_tensor_quant(x, amax, unsigned=True)),
    "with gradient": (
        2,
        lambda x, amax: ops.fake_tensor_quant(x.requires_grad_(), amax).sum().backward(),
    ),
    "empty": (0, lambda x, amax: ops.fake_tensor_quant(x[:0], amax)),
    "empty, its scales": (1, lambda x, amax: ops.tensor_quant(x[:0], amax)),
}


@needs_device_in_software
@pytest.mark.parametrize("amax_shape", [(), (100, 1), (70,)], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_launches_on_cuda(name: str, amax_shape: tuple[int, ...]) -> None:
    launches, call = CALLS[name]
    x = sample((100, 70))
    amax = amax_of(amax_shape)
    if name.startswith("empty") and amax_shape == (100, 1):
        amax = amax[:1]
    with ON_HOST.selected(), ON_HOST.asked(launches):
        call(x, amax)

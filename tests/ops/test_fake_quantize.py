from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from backends import Backend
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pyobserver
from pyobserver import ops

from .cases import (
    BLOCKED_SHAPES,
    BLOCKS,
    DTYPES,
    LARGE,
    LARGE_BLOCKED,
    LAYOUTS,
    REJECTED_BLOCKS,
    REJECTED_SWITCHES,
    SHAPE,
    SIZES,
    SPECIAL,
    any_isa,
    assert_all_same,
    assert_rejected,
    assert_same,
    from_blocks,
    grid_of,
    in_blocks,
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

GRIDS = ((0, 255), (-128, 127), (0, 15), (-8, 7), (0, 1), (-32768, 32767), (0, 65535))
AXES = (None, 0, 1, 2, 3, -1, -2, -3, -4)
ENTRIES = {"function": ops.fake_quantize, "op": torch.ops.pyobserver.fake_quantize}


def qparams(
    quant_min: int,
    quant_max: int,
    channels: int | None,
    zero_dtype: torch.dtype,
    width: float = 6.0,
) -> tuple[Tensor, Tensor]:
    """Scales that put normal values of three inside the grid and outside."""
    count = 1 if channels is None else channels
    factor = 1 + torch.arange(count) / (2.0 * count)
    scale = factor * width / (quant_max - quant_min)
    middle = (quant_min + quant_max) // 2
    zero_point = (middle + torch.arange(count) % 3 - 1).clamp(quant_min, quant_max)
    return scale, zero_point.to(zero_dtype) + (0.3 if zero_dtype.is_floating_point else 0)


def of_torch(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, axis: int | None
) -> tuple[Tensor, Tensor]:
    """torch's values, and which of them lay inside the grid."""
    x = x.detach().cpu().contiguous()
    if zero_point.dtype == torch.int64:
        zero_point = zero_point.int()
    if axis is None:
        return torch.ops.aten._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(
            x, scale, zero_point, torch.ones(1, dtype=torch.int64), quant_min, quant_max
        )
    y, inside = torch.ops.aten.fake_quantize_per_channel_affine_cachemask(
        x, scale, zero_point, axis % x.dim(), quant_min, quant_max
    )
    # per channel, torch casts to int64 first: beyond it, with +inf, lies the least value
    steps = (x.double().movedim(axis, -1) / scale.double()).movedim(-1, axis)
    largest = torch.ops.aten.fake_quantize_per_channel_affine(
        torch.full_like(x, 6e4), scale, zero_point, axis % x.dim(), quant_min, quant_max
    )
    return torch.where(steps >= 2.0**63, largest, y), inside


def of_blocks(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    block_size: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """torch's values of each block as one channel of a matrix, and which lay inside the grid."""
    x = x.detach().cpu()
    if x.numel() == 0:
        return x.contiguous(), torch.empty(x.shape, dtype=torch.bool)
    grid = scale.reshape(-1), zero_point.reshape(-1), quant_min, quant_max
    y, inside = of_torch(in_blocks(x, block_size), *grid, 0)
    return from_blocks(y, x, block_size), from_blocks(inside, x, block_size)


def block_qparams(
    x: Tensor, block_size: Sequence[int], grid: tuple[int, int], zero_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    blocks = grid_of(x, block_size)
    count = int(np.prod(blocks))
    scale, zero_point = qparams(*grid, count, zero_dtype)
    # neighbours far apart, so that a block is not taken for another
    scale = scale * (1 + torch.arange(count) * 7 % 5)
    return scale.reshape(blocks), zero_point.reshape(blocks)


def packed(inside: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Bit i of the mask is the i-th element in the order of the output's memory."""
    in_memory = torch.empty_strided(inside.shape, strides, dtype=torch.bool).copy_(inside)
    flat = in_memory.as_strided((inside.numel(),), (1,)).numpy()
    return torch.from_numpy(np.packbits(flat, bitorder="little"))


def is_dense(x: Tensor) -> bool:
    return x.numel() > 0 and torch.ops.aten.is_non_overlapping_and_dense(x)


def check(
    backend: Backend,
    x: Tensor,
    quantizer: tuple[Any, ...],
    context: object = "",
    block_size: Sequence[int] | None = None,
) -> None:
    """The values, their layout, and the mask."""
    arguments = (*(t.to(backend.device) for t in quantizer[:2]), *quantizer[2:])
    options: dict[str, Any] = {}
    if block_size is None:
        expected, inside = of_torch(x, *quantizer)
    else:
        expected, inside = of_blocks(x, *quantizer, block_size)
        options["block_size"] = block_size
    with unchanged(x, *arguments[:2]):
        alone = backend.op("_fake_quantize")(x, *arguments, **options)
        y, mask = backend.op("_fake_quantize_mask")(x, *arguments, **options)
    assert_same(y, expected, context)
    assert_same(alone, expected, context)
    strides = x.stride() if is_dense(x) else torch.empty(x.shape).stride()
    if x.numel():
        assert y.stride() == strides, context
        assert alone.stride() == strides, context
    assert_same(mask, packed(inside, y.stride()), context)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(backend: Backend, size: int | None, dtype: torch.dtype) -> None:
    x = sample(size, dtype).to(backend.device)
    for zero_dtype in (torch.int32, torch.int64):
        check(backend, x, (*qparams(-128, 127, None, zero_dtype), -128, 127, None))
        if size:
            check(backend, x, (*qparams(0, 15, size, zero_dtype), 0, 15, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    x = laid_out(layout, dtype, backend.device)
    for axis in AXES:
        channels = None if axis is None else SHAPE[axis]
        check(backend, x, (*qparams(0, 255, channels, torch.int32), 0, 255, axis), axis)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_of_layouts(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    x = laid_out(layout, dtype, backend.device)
    for block_size in BLOCKS:
        quantizer = (*block_qparams(x, block_size, (0, 15), torch.int32), 0, 15)
        check(backend, x, quantizer, block_size, block_size)


@pytest.mark.parametrize(("shape", "block_size"), BLOCKED_SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks(
    backend: Backend, shape: tuple[int, ...], block_size: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Also of values that are not finite, and on grids whose integers float32 does not hold."""
    x = sample(shape, dtype)
    if x.numel():
        sprinkled(x)
    for zero_dtype, grid in (
        (torch.int32, (-8, 7)),
        (torch.int64, (0, 255)),
        (torch.int32, (-(2**31), 2**31 - 1)),
        (torch.float32, (0, 15)),
    ):
        quantizer = (*block_qparams(x, block_size, grid, zero_dtype), *grid)
        check(backend, x.to(backend.device), quantizer, (zero_dtype, grid), block_size)


@cache
def large_blocked(
    shape: tuple[int, ...], block_size: tuple[int, ...], dtype: torch.dtype
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Values, their quantizer, and what torch makes of them: taken once for all backends."""
    x = sprinkled(sample(shape, dtype))
    quantizer = block_qparams(x, block_size, (-8, 7), torch.int32)
    return x, quantizer, of_blocks(x, *quantizer, -8, 7, block_size)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "block_size"), LARGE_BLOCKED, ids=str)
def test_blocks_over_threads(
    backend: Backend, shape: tuple[int, ...], block_size: tuple[int, ...], dtype: torch.dtype
) -> None:
    values, quantizer, (expected, inside) = large_blocked(shape, block_size, dtype)
    given = [t.to(backend.device) for t in quantizer]
    grad = sample(shape, dtype, 1).to(backend.device)
    for permuted in (False, True):
        x = values.permute(*range(len(shape))[::-1]).contiguous() if permuted else values
        x = x.permute(*range(len(shape))[::-1]) if permuted else x
        for count in (1, 2, 3) if backend.isa else (1,):
            with threads(count):
                y, mask = backend.op("_fake_quantize_mask")(
                    x.to(backend.device), *given, -8, 7, block_size=block_size
                )
                # in the order of memory, as the mask
                weights = torch.empty_like(y).copy_(grad)
                result = backend.op("_fake_quantize_backward")(weights, mask)
            assert_same(y, expected, count)
            assert_same(mask, packed(inside, y.stride()), count)
            assert_same(result, grad.cpu() * inside, count)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_at_the_borders_of_blocks(backend: Backend, dtype: torch.dtype) -> None:
    """Blocks that alternate between all inside and all outside, of every length up to 70."""
    for length in range(1, 71):
        x = torch.ones(3, 6 * length, dtype=dtype, device=backend.device)
        scale = torch.tensor([1.0, 0.01] * 9, device=backend.device).reshape(3, 6)
        zero_point = torch.zeros(3, 6, dtype=torch.int32, device=backend.device)
        mask = backend.op("_fake_quantize_mask")(
            x, scale, zero_point, -8, 7, block_size=(1, length)
        )[1]
        inside = (scale.cpu() == 1).repeat_interleave(length, 1)
        assert_same(mask, packed(inside, (6 * length, 1)), length)


@cache
def run_case(
    shape: tuple[int, ...],
    axis: int | None,
    block_size: tuple[int, ...] | None,
    dtype: torch.dtype,
) -> tuple[Tensor, tuple[Any, ...], Tensor, Tensor]:
    """Values, their quantizer, what torch makes of them, and which lay inside the grid."""
    values = sprinkled(sample(shape, dtype))
    if block_size is None:
        channels = None if axis is None else shape[axis]
        quantizer = (*qparams(-8, 7, channels, torch.int32), -8, 7)
        return values, quantizer, *of_torch(values, *quantizer, axis)
    quantizer = (*block_qparams(values, block_size, (-8, 7), torch.int32), -8, 7)
    return values, quantizer, *of_blocks(values, *quantizer, block_size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "axis", "block_size"),
    [
        ((2**17 + 5,), None, None),
        ((700, 203), 1, None),
        ((300, 3, 148), 1, None),
        ((21, 130, 49), 1, None),
        ((2, 37, 2049), 1, None),
        ((5, 29003), 0, None),
        ((9, 14406), None, (3, 49)),
        ((9, 14406), None, (9, 7)),
        ((70, 2001), None, (7, 3)),
    ],
    ids=str,
)
def test_runs_and_vectors(
    backend: Backend,
    shape: tuple[int, ...],
    axis: int | None,
    block_size: tuple[int, ...] | None,
    dtype: torch.dtype,
) -> None:
    """Runs of a channel shorter and longer than a vector, that begin in its midst; odd offsets."""
    values, quantizer, expected, inside = run_case(shape, axis, block_size, dtype)
    mask = packed(inside, expected.stride())
    given = [t.to(backend.device) if isinstance(t, Tensor) else t for t in quantizer]
    options = {"axis": axis, "block_size": block_size}
    for offset in (0, 1):
        x = torch.empty(values.numel() + offset, dtype=dtype, device=backend.device)
        x = x[offset:].view(shape).copy_(values)
        y, bits = backend.op("_fake_quantize_mask")(x, *given, **options)
        assert_same(y, expected, offset)
        assert_same(bits, mask, offset)
        grad = backend.op("_fake_quantize_backward")(x, bits)
        assert_same(grad, values * inside, offset)
        backend.op("_fake_quantize_out")(x, *given[:2], x, *given[2:], **options)
        assert_same(x, expected, offset)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_blocks(backend: Backend, layout: str, entry: str) -> None:
    values = laid_out(layout, torch.float32, backend.device)
    weight = sample((3, 5, 4, 6), seed=2).permute(3, 2, 1, 0)
    for block_size in BLOCKS:
        quantizer = (*block_qparams(values, block_size, (-8, 7), torch.int32), -8, 7)
        given = [t.to(backend.device) if isinstance(t, Tensor) else t for t in quantizer]
        expected, inside = of_blocks(values, *quantizer, block_size)
        x = values.detach().requires_grad_()
        y = ENTRIES[entry](x, *given, block_size=block_size)
        assert_same(y, expected)
        (gradient,) = torch.autograd.grad(y, x, weight.to(backend.device))
        assert_same(gradient, weight * inside, block_size)


def test_blocks_of_one_index_are_channels(backend: Backend) -> None:
    x = sample(SHAPE).to(backend.device)
    for axis in range(4):
        block_size = [1 if d == axis else size for d, size in enumerate(SHAPE)]
        scale, zero_point = (t.to(backend.device) for t in qparams(0, 15, SHAPE[axis], torch.int32))
        grid = grid_of(x, block_size)
        op = backend.op("_fake_quantize_mask")
        ours = op(x, scale.view(grid), zero_point.view(grid), 0, 15, block_size=block_size)
        assert_all_same(ours, op(x, scale, zero_point, 0, 15, axis))


def test_blocks_are_those_of_torchao(backend: Backend) -> None:
    """Its float32 arithmetic, and its float16 and bfloat16 where all of it is exact."""
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    for (shape, block_size), dtype in [
        (case, dtype) for case in BLOCKED_SHAPES for dtype in (torch.float32, torch.bfloat16)
    ]:
        x = sample(shape, dtype)
        if x.numel() == 0 or x.dim() == 0:
            continue
        scale, zero_point = block_qparams(x, block_size, (-8, 7), torch.int32)
        if dtype == torch.bfloat16:
            x, scale = x.round(), scale.log2().round().exp2()
        quantized = primitives._quantize_affine_no_dtype_cast(
            x.float(), block_size, scale, zero_point, -8, 7
        )
        expected = primitives._dequantize_affine_no_dtype_check(
            quantized, block_size, scale, zero_point, -8, 7
        )
        y = backend.op("_fake_quantize")(
            *(t.to(backend.device) for t in (x, scale, zero_point)), -8, 7, block_size=block_size
        )
        # ours may round to a negative zero what is 0 * scale there, or the other way round
        assert_same(y.cpu() + 0.0, expected.to(dtype) + 0.0, (shape, block_size, dtype))


@pytest.mark.parametrize("flag", [0, 1])
def test_blocks_and_switch(backend: Backend, flag: int) -> None:
    x = sprinkled(sample((5, 77)))
    quantizer = (*block_qparams(x, (1, 11), (-8, 7), torch.int32), -8, 7)
    given = [t.to(backend.device) for t in (x, *quantizer[:2])]
    enabled = torch.tensor([flag], device=backend.device)
    y, mask = backend.op("_fake_quantize_mask")(*given, -8, 7, None, enabled, (1, 11))
    expected, inside = of_blocks(x, *quantizer, (1, 11))
    assert_same(y, expected if flag else x)
    assert_same(mask, packed(inside if flag else torch.ones_like(inside), x.stride()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_out(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    """Into another tensor, and where x is dense into x itself."""
    for options in ({}, {"axis": 1}, {"block_size": (2, 2, 5, 1)}, {"enabled": torch.zeros(1)}):
        x = laid_out(layout, dtype, backend.device)
        x = x.clone() if is_dense(x) else x
        given: dict[str, Any] = dict(options)
        if "enabled" in given:
            given["enabled"] = torch.zeros(1, dtype=torch.uint8, device=backend.device)
        if "block_size" in given:
            quantizer = block_qparams(x, given["block_size"], (-8, 7), torch.int32)
        else:
            quantizer = qparams(-8, 7, 4 if "axis" in given else None, torch.int32)
        arguments = [t.to(backend.device) for t in quantizer]
        expected = backend.op("_fake_quantize")(x, *arguments, -8, 7, **given)
        out = torch.full_like(expected, 5)
        with unchanged(x):
            backend.op("_fake_quantize_out")(x, *arguments, out, -8, 7, **given)
            assert_same(out, expected, options)
            again = torch.full_like(expected, 5)
            assert ops.fake_quantize(x, *arguments, -8, 7, **given, out=again) is again
            assert_same(again, expected, options)
        if is_dense(x):
            backend.op("_fake_quantize_out")(x, *arguments, x, -8, 7, **given)
            assert_same(x, expected, options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((LARGE // 4,), {}),
        ((61, 4099), {"axis": 0}),
        ((4099, 61), {"axis": 1}),
        ((410, 640), {"block_size": (1, 32)}),
        ((410, 640), {"block_size": (5, 8)}),
    ],
    ids=str,
)
def test_in_place_over_threads(
    backend: Backend, shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype
) -> None:
    x = sprinkled(sample(shape, dtype)).to(backend.device)
    if "block_size" in options:
        quantizer = block_qparams(x, options["block_size"], (-8, 7), torch.int32)
    else:
        axis = options.get("axis")
        quantizer = qparams(-8, 7, None if axis is None else shape[axis], torch.int32)
    arguments = [t.to(backend.device) for t in quantizer]
    expected = backend.op("_fake_quantize")(x, *arguments, -8, 7, **options)
    for count in (1, 2, 3) if backend.isa else (1,):
        for values in (x.clone(), x.t().contiguous().t() if x.dim() == 2 else x.clone()):
            with threads(count):
                backend.op("_fake_quantize_out")(values, *arguments, values, -8, 7, **options)
            assert_same(values, expected, count)


def test_out_of_other_strides_on_dimensions_of_one(backend: Backend) -> None:
    """Where x has one index, its stride is nobody's business; that of out is x's."""
    x = sample((2, 1, 3)).to(backend.device).as_strided((2, 1, 3), (3, 99, 1))
    scale, zero_point = (t.to(backend.device) for t in qparams(-8, 7, None, torch.int32))
    out = torch.empty_strided(x.shape, x.stride(), device=backend.device)
    backend.op("_fake_quantize_out")(x, scale, zero_point, out, -8, 7)
    assert_same(out, backend.op("_fake_quantize")(x, scale, zero_point, -8, 7))


def test_out_of_an_empty_tensor(backend: Backend) -> None:
    x = torch.empty(0, 3, device=backend.device)
    scale, zero_point = (t.to(backend.device) for t in qparams(-8, 7, None, torch.int32))
    assert ops.fake_quantize(x, scale, zero_point, -8, 7, out=x) is x
    backend.op("_fake_quantize_out")(x, scale, zero_point, torch.empty_like(x), -8, 7)


def test_out_is_an_update_for_autograd(backend: Backend) -> None:
    """A graph that saved it fails in its backward, instead of using the new values."""
    scale, zero_point = (t.to(backend.device) for t in qparams(-8, 7, None, torch.int32))
    weight = sample(9, seed=1).to(backend.device).requires_grad_()
    x = sample(9).to(backend.device)
    for gradient in (True, False):
        x = sample(9).to(backend.device)
        loss = (weight * x).sum()
        version = x._version
        with torch.set_grad_enabled(gradient):
            ops.fake_quantize(x, scale, zero_point, -8, 7, out=x)
        assert x._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_out_where_no_gradient_is_needed(backend: Backend) -> None:
    scale, zero_point = (t.to(backend.device) for t in qparams(-8, 7, None, torch.int32))
    x = sample(9).to(backend.device).requires_grad_()
    expected = ops.fake_quantize(x.detach(), scale, zero_point, -8, 7)
    for out in (torch.empty_like(expected), x):
        with pytest.raises(ValueError, match=r"^fake_quantize: out: .* where a gradient is needed"):
            ops.fake_quantize(x, scale, zero_point, -8, 7, out=out)
    with pytest.raises(ValueError, match=r"^fake_quantize: out: .* where a gradient is needed"):
        ops.fake_quantize(x.detach(), scale, zero_point, -8, 7, out=x)
    with torch.no_grad():
        assert ops.fake_quantize(x, scale, zero_point, -8, 7, out=x) is x
    assert_same(x, expected)
    assert x.requires_grad
    assert x.grad_fn is None


OUTS_REJECTED: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": (torch.zeros(3, 2), ValueError, r"expected shape \(2, 3\) .*, got \(3, 2\)"),
    "numel": (torch.zeros(2, 4), ValueError, r"expected shape \(2, 3\) .*, got \(2, 4\)"),
    "dims": (torch.zeros(6), ValueError, r"expected shape \(2, 3\) .*, got \(6,\)"),
    "dtype": (torch.zeros(2, 3).half(), TypeError, r"x's dtype, torch.float32, got torch.float16"),
    "strides": (
        torch.zeros(3, 2).t(),
        ValueError,
        r"expected .* strides \(3, 1\), got \(2, 3\) with strides \(1, 2\)",
    ),
    "gaps": (torch.zeros(2, 6)[:, ::2], ValueError, r"strides \(3, 1\), got .* \(6, 2\)"),
    "expanded": (torch.zeros(3).expand(2, 3), ValueError, r"strides \(3, 1\), got .* \(0, 1\)"),
    "meta": (torch.zeros(2, 3, device="meta"), ValueError, "tensor on cpu .*, got one on meta"),
    "list": ([0.0], TypeError, "x's dtype, torch.float32, got list"),
}


@pytest.mark.parametrize("name", OUTS_REJECTED)
@any_isa
def test_rejects_out(backend: Backend, name: str) -> None:
    out, error, match = OUTS_REJECTED[name]
    if backend.device != "cpu":
        return
    given = arguments(out=out)
    assert_rejected(ops.fake_quantize, given, error, f"^fake_quantize: out: .*{match}")
    assert_rejected(backend.op("_fake_quantize_out"), given, Exception)


def test_rejects_out_beside_a_wrong_argument() -> None:
    for name, (changed, error, match) in REJECTED.items():
        given = arguments(**changed, out=torch.zeros(2, 3))
        assert_rejected(ops.fake_quantize, given, error, f"^fake_quantize: {match}"), name


def test_rejects_x_as_out_where_it_is_not_dense() -> None:
    scale, zero_point = qparams(-8, 7, None, torch.int32)
    for layout in ("sliced", "cropped", "expanded", "overlapping"):
        x = laid_out(layout, torch.float32)
        with unchanged(x), pytest.raises(ValueError, match=r"out: expected shape .* strides"):
            ops.fake_quantize(x, scale, zero_point, -8, 7, out=x)


def test_compiles_with_blocks_and_out() -> None:
    """With gradient and without, and into a tensor that is given."""
    quantizer = block_qparams(torch.empty(4, 6), (2, 3), (-8, 7), torch.int32)

    def call(x: Tensor, out: Tensor | None = None) -> Tensor:
        return ops.fake_quantize(x, *quantizer, -8, 7, block_size=(2, 3), out=out)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for needed in (True, False):
        ours, theirs = (sample((4, 6)).requires_grad_(needed) for _ in range(2))
        y, expected = compiled(ours), call(theirs)
        assert_same(y, expected)
        if needed:
            (y * y).sum().backward()
            (expected * expected).sum().backward()
            assert_same(ours.grad, theirs.grad)
    x = sample((4, 6))
    out = torch.zeros(4, 6)
    compiled(x, out)
    assert_same(out, call(x))
    expected = call(x)
    compiled(x, x)
    assert_same(x, expected)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grids(backend: Backend, dtype: torch.dtype, grid: tuple[int, int]) -> None:
    x = sample((5, 37), dtype).to(backend.device)
    for zero_dtype in (torch.int32, torch.int64):
        for channels, axis in ((None, None), (5, 0), (37, 1)):
            for width in (6.0, 1e-3, 1e3):
                check(backend, x, (*qparams(*grid, channels, zero_dtype, width), *grid, axis))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float_zero_point(backend: Backend, dtype: torch.dtype) -> None:
    """Per channel it is added before rounding, as in torch."""
    x = sample((5, 37), dtype).to(backend.device)
    for channels, axis in ((5, 0), (37, 1)):
        check(backend, x, (*qparams(0, 15, channels, torch.float32), 0, 15, axis))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_halves_round_to_even(backend: Backend, dtype: torch.dtype) -> None:
    x = (torch.arange(-40, 41) / 2).to(dtype).to(backend.device)
    check(backend, x, (torch.tensor([1.0]), torch.tensor([3], dtype=torch.int32), -8, 7, None))
    check(backend, x, (torch.ones(81), torch.full((81,), 3, dtype=torch.int32), -8, 7, 0))


def test_multiplies_by_the_inverse(backend: Backend) -> None:
    """One in 1e6 differs from dividing: values on a boundary of the grid, for many scales."""
    generator = torch.Generator().manual_seed(5)
    scale = torch.rand(300, generator=generator) + 0.01
    x = (torch.arange(-100, 100) + 0.5) * scale[:, None]
    assert (torch.round(x / scale[:, None]) != torch.round(x * (1 / scale[:, None]))).any()
    zero_point = torch.zeros(300, dtype=torch.int32)
    check(backend, x.to(backend.device), (scale, zero_point, -128, 127, 0))
    for i in range(8):
        quantizer = (scale[i : i + 1], zero_point[:1], -128, 127, None)
        check(backend, x[i].to(backend.device), quantizer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(backend: Backend, name: str, dtype: torch.dtype) -> None:
    """+inf to the greatest value, -inf and NaN to the least, per tensor and per channel alike."""
    x = torch.tensor(SPECIAL[name]).to(dtype).to(backend.device)
    for grid in ((0, 255), (-8, 7)):
        check(backend, x, (*qparams(*grid, None, torch.int32), *grid, None))
        check(backend, x, (*qparams(*grid, x.numel(), torch.int32), *grid, 0))
        check(backend, x.expand(2, -1), (*qparams(*grid, 2, torch.int32), *grid, 0))
    scale, zero_point = (t.to(backend.device) for t in qparams(-8, 7, None, torch.int32))
    y = backend.op("_fake_quantize")(x.float(), scale, zero_point, -8, 7)
    least, most = ((q - zero_point) * scale for q in (-8, 7))
    values = x.float()
    assert (y[values == torch.inf] == most).all()
    assert (y[(values == -torch.inf) | values.isnan()] == least).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e30, 3e38])
def test_extreme_scales(backend: Backend, scale: float) -> None:
    x = torch.tensor([0.0, 1.0, -1.0, 1e-38, -1e-30, 1e30, 3e38, -3e38, scale, scale / 2])
    for dtype in (torch.float32, torch.float64):
        values = x.to(dtype).to(backend.device)
        zero_point = torch.tensor([2], dtype=torch.int32)
        check(backend, values, (torch.tensor([scale]), zero_point, -8, 7, None))


@pytest.mark.parametrize("flag_dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_enabled(backend: Backend, dtype: torch.dtype, flag_dtype: torch.dtype) -> None:
    """Off, it is the value itself, every bit of it, and every gradient passes."""
    x = laid_out("transposed", dtype, backend.device)
    x[0, 0, 0, 0], x[1, 1, 1, 1] = torch.nan, 1e-8
    for axis in (None, 1):
        quantizer = (*qparams(-8, 7, None if axis is None else 4, torch.int32), -8, 7, axis)
        given = [t.to(backend.device) if isinstance(t, Tensor) else t for t in quantizer]
        off = torch.zeros(1, dtype=flag_dtype, device=backend.device)
        y, mask = backend.op("_fake_quantize_mask")(x, *given, off)
        assert_same(y, x)
        assert y.stride() == x.stride()
        assert y.data_ptr() != x.data_ptr()
        assert_same(mask, packed(torch.ones(SHAPE, dtype=torch.bool), y.stride()))
        assert_same(backend.op("_fake_quantize")(x, *given, off), x)
        on = torch.ones_like(off)
        assert_same(backend.op("_fake_quantize")(x, *given, on), of_torch(x, *quantizer)[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_backward_of_a_mask(backend: Backend, size: int | None, dtype: torch.dtype) -> None:
    """A product, as in torch: what is clipped is a zero with the sign of the gradient."""
    grad = sample(size, dtype)
    inside = sample(size, seed=1) > 0
    mask = packed(inside, grad.stride())
    with unchanged(grad):
        result = backend.op("_fake_quantize_backward")(
            grad.to(backend.device), mask.to(backend.device)
        )
    assert_same(result, grad * inside)


def test_backward_of_special_gradients(backend: Backend) -> None:
    for dtype in DTYPES:
        grad = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, 0.0, -0.0, 1e-45, 2.0] * 3)
        grad = grad.to(dtype)
        inside = torch.arange(24) % 3 == 0
        mask = packed(inside, (1,)).to(backend.device)
        result = backend.op("_fake_quantize_backward")(grad.to(backend.device), mask)
        assert_same(result, grad * inside)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient(backend: Backend, layout: str, dtype: torch.dtype, entry: str) -> None:
    """Through gradients of the output's strides, of others, and expanded from one value."""
    values = laid_out(layout, dtype, backend.device)
    weights = {
        "contiguous": sample(SHAPE, dtype, 1),
        "strided": sample((3, 5, 4, 6), dtype, 2).permute(3, 2, 1, 0),
        "expanded": sample((6, 1, 1, 3), dtype, 3).expand(SHAPE),
        "one": torch.ones((), dtype=dtype).expand(SHAPE),
    }
    for axis in (None, 1, -1):
        channels = None if axis is None else SHAPE[axis]
        quantizer = (*qparams(-8, 7, channels, torch.int32), -8, 7, axis)
        given = [t.to(backend.device) if isinstance(t, Tensor) else t for t in quantizer]
        expected, inside = of_torch(values, *quantizer)
        for name, weight in weights.items():
            x = values.detach().requires_grad_()
            y = ENTRIES[entry](x, *given)
            assert_same(y, expected)
            (gradient,) = torch.autograd.grad(y, x, weight.to(backend.device))
            assert_same(gradient, weight * inside, (axis, name))


def test_gradient_is_that_of_torch(backend: Backend) -> None:
    """The whole path through torch's own autograd, and through ours, in a longer graph."""
    scale, zero_point = qparams(-8, 7, 4, torch.int32)
    ours, theirs = (sample((6, 4, 5)).requires_grad_() for _ in range(2))
    y = torch.fake_quantize_per_channel_affine(theirs * 2, scale, zero_point, 1, -8, 7)
    y.square().sum().backward()
    scale, zero_point = scale.to(backend.device), zero_point.to(backend.device)
    z = ops.fake_quantize(ours.to(backend.device) * 2, scale, zero_point, -8, 7, 1)
    z.square().sum().backward()
    assert_same(z, y)
    assert_same(ours.grad, theirs.grad)


@pytest.mark.parametrize("entry", ENTRIES)
def test_graph_only_where_it_is_needed(backend: Backend, entry: str) -> None:
    given = [t.to(backend.device) for t in qparams(0, 255, None, torch.int32)]
    x = sample(33).to(backend.device)
    assert ENTRIES[entry](x, *given, 0, 255).grad_fn is None
    given[0].requires_grad_()
    assert ENTRIES[entry](x, *given, 0, 255).grad_fn is None
    x.requires_grad_()
    assert ENTRIES[entry](x, *given, 0, 255).grad_fn is not None
    with torch.no_grad():
        assert ENTRIES[entry](x, *given, 0, 255).grad_fn is None
    with torch.inference_mode():
        assert not ENTRIES[entry](x, *given, 0, 255).requires_grad


@pytest.mark.parametrize("entry", ENTRIES)
def test_keeps_one_bit_an_element(backend: Backend, entry: str) -> None:
    given = [t.to(backend.device) for t in qparams(0, 255, None, torch.int32)]
    x = sample(1000).to(backend.device).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ENTRIES[entry](x, *given, 0, 255)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, 125)]


@pytest.mark.parametrize("entry", ENTRIES)
def test_twice_differentiated(backend: Backend, entry: str) -> None:
    given = [t.to(backend.device) for t in qparams(0, 255, None, torch.int32)]
    x = sample(9).to(backend.device).requires_grad_()
    y = ENTRIES[entry](x, *given, 0, 255)
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="its gradient was differentiated"):
        gradient.sum().backward()


def test_composite_is_the_function() -> None:
    scale, zero_point = qparams(0, 255, None, torch.int32)
    x = sample(33)
    enabled = torch.zeros(1, dtype=torch.uint8)
    for options in ((), (None,), (None, enabled)):
        arguments = (x, scale, zero_point, 0, 255, *options)
        assert_same(torch.ops.pyobserver.fake_quantize(*arguments), ops.fake_quantize(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "axis"), [((LARGE,), None), ((61, LARGE // 61), 0), ((LARGE // 61, 61), 1)]
)
def test_threads_change_nothing(
    backend: Backend, shape: tuple[int, ...], axis: int | None, dtype: torch.dtype
) -> None:
    x = sample(shape, dtype)
    grad = sample(shape, dtype, 1)
    quantizer = (
        *qparams(-128, 127, None if axis is None else shape[axis], torch.int32),
        *(-128, 127, axis),
    )
    expected, inside = of_torch(x, *quantizer)
    given = [t.to(backend.device) if isinstance(t, Tensor) else t for t in quantizer]
    for count in (1, 2):
        with threads(count):
            y, mask = backend.op("_fake_quantize_mask")(x.to(backend.device), *given)
            result = backend.op("_fake_quantize_backward")(grad.to(backend.device), mask)
        assert_same(y, expected, count)
        assert_same(mask, packed(inside, y.stride()), count)
        assert_same(result, grad * inside, count)


def test_meta() -> None:
    x = torch.empty(4, 5, device="meta").t()
    scale, zero_point = (torch.empty(1, device="meta") for _ in range(2))
    y = ops.fake_quantize(x, scale, zero_point, 0, 255)
    assert (y.shape, y.stride(), y.device.type) == ((5, 4), (1, 5), "meta")
    blocks = [torch.empty(1, 2, device="meta") for _ in range(2)]
    y = ops.fake_quantize(x, *blocks, 0, 255, block_size=(5, 2))
    assert (y.shape, y.stride(), y.device.type) == ((5, 4), (1, 5), "meta")
    assert ops.fake_quantize(x, *blocks, 0, 255, block_size=(5, 2), out=y) is y
    with pytest.raises(ValueError, match=r"scale: expected shape \(5, 2\)"):
        ops.fake_quantize(x, *blocks, 0, 255, block_size=(1, 2))
    with pytest.raises(ValueError, match="out: expected shape"):
        ops.fake_quantize(x, scale, zero_point, 0, 255, out=torch.empty(5, 4, device="meta"))


@properties
@given(
    value_lists(1e4),
    st.floats(2**-10, 100, width=32),
    st.integers(-128, 127),
)
def test_properties(values: list[float], scale: float, zero: int) -> None:
    """Idempotent, monotonic, never off by more than half a step inside the grid."""
    x = torch.tensor(values).sort().values
    given_scale, zero_point = torch.tensor([scale]), torch.tensor([zero], dtype=torch.int32)
    y = ops.fake_quantize(x, given_scale, zero_point, -128, 127)
    assert_same(ops.fake_quantize(y, given_scale, zero_point, -128, 127), y)
    assert (y.diff() >= 0).all()
    least, most = (-128 - zero) * scale, (127 - zero) * scale
    inside = (x > least) & (x < most)
    assert ((y - x).abs()[inside] <= 0.5001 * scale).all()
    assert ((y >= least * 1.0001 - 1e-6) | (y >= least * 0.9999 - 1e-6)).all()


def arguments(**changed: Any) -> dict[str, Any]:
    given = {
        "x": sample((2, 3)),
        "scale": torch.tensor([0.1, 0.2, 0.3]),
        "zero_point": torch.tensor([0, 1, 2], dtype=torch.int32),
        "quant_min": 0,
        "quant_max": 15,
        "axis": 1,
    }
    return {**given, **changed}


def _scale(value: float) -> dict[str, Any]:
    return {"scale": torch.tensor([0.1, value, 0.3])}


REJECTED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "scale_0": (_scale(0.0), ValueError, r"scale: expected positive finite values, got \[.*0.0"),
    "scale_negative": (_scale(-0.5), ValueError, "scale: expected positive .* got .*-0.5"),
    "scale_nan": (_scale(torch.nan), ValueError, "scale: expected positive .* got .*nan"),
    "scale_inf": (_scale(torch.inf), ValueError, "scale: expected positive .* got .*inf"),
    "scale_dtype": (
        {"scale": torch.ones(3, dtype=torch.float64)},
        TypeError,
        "scale: expected torch.float32, got torch.float64",
    ),
    "scale_number": ({"scale": 0.1}, TypeError, "scale: expected torch.float32, got float"),
    "scale_size": ({"scale": torch.ones(2)}, ValueError, r"scale: expected shape \(3,\).* \(2,\)"),
    "scale_dim": ({"scale": torch.ones(3, 1)}, ValueError, r"scale: .* got shape \(3, 1\)"),
    "scale_strides": (
        {"scale": torch.ones(6)[::2]},
        ValueError,
        r"scale: expected a contiguous tensor, got strides \(2,\)",
    ),
    "zero_low": (
        {"zero_point": torch.tensor([0, -1, 2])},
        ValueError,
        r"zero_point: expected values in .* \[0, 15\], got \[0, -1, 2\]",
    ),
    "zero_high": (
        {"zero_point": torch.tensor([0, 16, 2])},
        ValueError,
        r"zero_point: expected values in .* \[0, 15\], got \[0, 16, 2\]",
    ),
    "zero_dtype": (
        {"zero_point": torch.zeros(3, dtype=torch.int8)},
        TypeError,
        "zero_point: expected torch.int32 .*, got torch.int8",
    ),
    "zero_size": (
        {"zero_point": torch.zeros(4, dtype=torch.int32)},
        ValueError,
        r"zero_point: expected shape \(3,\).* got shape \(4,\)",
    ),
    "grid": (
        {"quant_min": 15},
        ValueError,
        "quant_min: expected a value below quant_max, got quant_min=15, quant_max=15",
    ),
    "axis": ({"axis": 2}, ValueError, r"axis: expected .*\[-2, 1\].* got 2"),
    "axis_low": ({"axis": -3}, ValueError, r"axis: expected .*\[-2, 1\].* got -3"),
    "no_axis": ({"axis": None}, ValueError, r"scale: expected 1 element, got shape \(3,\)"),
    **REJECTED_SWITCHES,
    **REJECTED_BLOCKS,
    "block_shape": (
        {"axis": None, "block_size": [1, 1]},
        ValueError,
        r"scale: expected shape \(2, 3\), .* block_size \(1, 1\), got shape \(3,\)",
    ),
    "block_zero_point": (
        {"axis": None, "block_size": [2, 1], "scale": torch.ones(1, 3)},
        ValueError,
        r"zero_point: expected shape \(1, 3\), .* got shape \(3,\)",
    ),
    "scale_meta": (
        {"scale": torch.ones(3, device="meta")},
        ValueError,
        "scale: expected a tensor on cpu .*, got one on meta",
    ),
    "x_meta": (
        {"x": torch.ones(2, 3, device="meta")},
        ValueError,
        "scale: expected a tensor on meta .*, got one on cpu",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name: str) -> None:
    changed, error, match = REJECTED[name]
    for entry in ENTRIES.values():
        assert_rejected(entry, arguments(**changed), (error, RuntimeError))
    assert_rejected(ops.fake_quantize, arguments(**changed), error, f"^fake_quantize: {match}")
    if isinstance(changed.get("x"), Tensor) or "scale" not in name:
        return
    needs_grad = arguments(**changed)
    needs_grad["x"] = needs_grad["x"].requires_grad_()
    assert_rejected(ops.fake_quantize, needs_grad, error, f"^fake_quantize: {match}")


@pytest.mark.parametrize("name", REJECTED)
@any_isa
def test_kernel_rejects(backend: Backend, name: str) -> None:
    if not backend.cuda:
        for op in ("_fake_quantize", "_fake_quantize_mask"):
            assert_rejected(backend.op(op), arguments(**REJECTED[name][0]), Exception)


@any_isa
def test_rejects_other_inputs(backend: Backend) -> None:
    for x, came in not_dense_real_float().values():
        expected = f"^fake_quantize: x: expected a dense tensor of float32, .*, {came}"
        assert_rejected(ops.fake_quantize, arguments(x=x), TypeError, expected)
        if not backend.cuda:
            assert_rejected(backend.op("_fake_quantize"), arguments(x=x), Exception)
            assert_rejected(backend.op("_fake_quantize_mask"), arguments(x=x), Exception)


@pytest.mark.parametrize(
    "changed",
    [
        {"mask": torch.zeros(2, dtype=torch.uint8)},
        {"mask": torch.zeros(4, dtype=torch.uint8)},
        {"mask": torch.zeros(3, dtype=torch.int8)},
        {"mask": torch.zeros(6, dtype=torch.uint8)[::2]},
        {"mask": torch.zeros(3, dtype=torch.uint8, device="meta")},
        {"grad": torch.zeros(20, dtype=torch.int32)},
        {"grad": torch.zeros(()).expand(20)},
        {"grad": torch.zeros(40)[::2]},
    ],
)
@any_isa
def test_backward_rejects(backend: Backend, changed: dict[str, Tensor]) -> None:
    given = {"grad": torch.ones(20), "mask": torch.full((3,), 255, dtype=torch.uint8), **changed}
    if not backend.cuda:
        assert_rejected(backend.op("_fake_quantize_backward"), given, Exception)


def test_opcheck() -> None:
    for x in opcheck_inputs().values():
        scale, zero_point = qparams(-8, 7, None, torch.int32)
        for op in ("_fake_quantize", "_fake_quantize_mask", "fake_quantize"):
            opcheck(op, x, scale, zero_point, -8, 7)
        opcheck("fake_quantize", x.clone().requires_grad_(), scale, zero_point, -8, 7)
        if x.dim() > 1:
            scale, zero_point = qparams(-8, 7, x.shape[1], torch.int64)
            for op in ("_fake_quantize", "_fake_quantize_mask"):
                opcheck(op, x, scale, zero_point, -8, 7, 1)
            opcheck("fake_quantize", x.clone().requires_grad_(), scale, zero_point, -8, 7, 1)


def test_opcheck_blocks_and_out() -> None:
    for x in opcheck_inputs().values():
        out = torch.ones_like(x) if is_dense(x) else torch.ones(x.shape, dtype=x.dtype)
        opcheck("_fake_quantize_out", x, *qparams(-8, 7, None, torch.int32), out, -8, 7)
        if x.numel() == 0:
            continue
        block_size = [size // 2 if size % 2 == 0 else size for size in x.shape]
        quantizer = block_qparams(x, block_size, (-8, 7), torch.int32)
        for op in ("_fake_quantize", "_fake_quantize_mask"):
            opcheck(op, x, *quantizer, -8, 7, block_size=block_size)
        opcheck("_fake_quantize_out", x, *quantizer, out, -8, 7, block_size=block_size)
        x = x.clone().requires_grad_()
        opcheck("fake_quantize", x, *quantizer, -8, 7, block_size=block_size)


def test_opcheck_backward() -> None:
    for x in opcheck_inputs().values():
        grad = x.contiguous() if not is_dense(x) else x
        mask = torch.full(((grad.numel() + 7) // 8,), 0b10110101, dtype=torch.uint8)
        opcheck("_fake_quantize_backward", grad, mask)


def test_opcheck_enabled() -> None:
    scale, zero_point = qparams(-8, 7, None, torch.int32)
    for flag in (0, 1):
        enabled = torch.tensor([flag], dtype=torch.uint8)
        for op in ("_fake_quantize", "_fake_quantize_mask", "fake_quantize"):
            opcheck(op, sample(9), scale, zero_point, -8, 7, None, enabled)
        x = sample(9).requires_grad_()
        opcheck("fake_quantize", x, scale, zero_point, -8, 7, None, enabled)


def test_more_dimensions_than_have_an_address(backend: Backend) -> None:
    scale, zero_point = (t.to(backend.device) for t in qparams(-8, 7, None, torch.int32))
    op = backend.op("_fake_quantize")
    x = sample(4).to(backend.device)[::2]
    y = op(x.view([1] * 199 + [2]), scale, zero_point, -8, 7)
    assert_same(y.flatten(), op(x.contiguous(), scale, zero_point, -8, 7))
    for shape in ([0] + [1] * 199, [0] + [1] * 63):
        empty = torch.empty(shape, device=backend.device)
        assert op(empty, scale, zero_point, -8, 7).shape == empty.shape
    ones = [1] * 64
    blocks = scale.reshape(ones), zero_point.reshape(ones)
    alone = op(x[:1].view(ones), *blocks, -8, 7, None, None, ones)
    assert_same(alone.flatten(), y.flatten()[:1])


@pytest.mark.skipif(not pyobserver.native_status.cpu, reason="the reference copies first")
def test_out_that_overlaps() -> None:
    scale, zero_point = qparams(-8, 7, None, torch.int32)
    memory = sample(20)
    with unchanged(memory), pytest.raises(RuntimeError, match="out: expected x itself, or memory"):
        ops.fake_quantize(memory[:-1], scale, zero_point, -8, 7, out=memory[1:])
    ops.fake_quantize(memory[:10], scale, zero_point, -8, 7, out=memory[10:])

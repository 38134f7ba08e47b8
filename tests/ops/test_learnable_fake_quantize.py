from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from backends import ON_HOST, Backend, backends, needs_device_in_software
from torch import Tensor

from pyobserver import ops

from .cases import (
    BLOCKS,
    DTYPES,
    LAYOUTS,
    REJECTED_BLOCKS,
    REJECTED_SWITCHES,
    SHAPE,
    SIZES,
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
    sample,
    sprinkled,
    threads,
    unchanged,
)

AXES = (None, 0, 1, 2, 3, -1)
ENTRIES = {
    "function": ops.learnable_fake_quantize,
    "op": torch.ops.pyobserver.learnable_fake_quantize,
}
GRID = (-8, 7)
FACTOR = 0.3
Options = dict[str, Any]


def groups_of(x: Tensor, options: Options) -> tuple[int, ...]:
    if options.get("block_size") is not None:
        return grid_of(x, options["block_size"])
    return (1,) if options.get("axis") is None else (x.shape[options["axis"]],)


def blocks_of(shape: Sequence[int], options: Options) -> Sequence[int]:
    """The groups as blocks."""
    if options.get("block_size") is not None:
        return options["block_size"]
    axis = options.get("axis")
    kept = None if axis is None else axis % len(shape)
    return [1 if d == kept else size for d, size in enumerate(shape)]


def qparams(groups: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Scales that put normal values of three inside the grid and outside; zero points between."""
    count = int(torch.tensor(groups).prod()) if groups else 1
    scale = 0.3 * (1 + torch.arange(count) * 7 % 5).float()
    # the third is beyond the grid, the fourth a half. All round to even integers: at ties torch's
    # backward on the CPU differs from its forward for odd ones
    zero_point = torch.tensor([1.7, -2.2, -11.0, 2.5, -3.5])[torch.arange(count) % 5]
    return scale.reshape(groups), zero_point.reshape(groups)


def of_torch(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    options: Options,
    factor: float = FACTOR,
    grid: tuple[int, int] = GRID,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The values and the three gradients of torch, per channel: a block is a row of a matrix.

    Per tensor too: torch's rounding there is another in the backward than in the forward.
    """
    x, grad = (t.detach().cpu().contiguous() for t in (x, grad))
    block_size, axis = options.get("block_size"), options.get("axis")
    if block_size is None and (axis is None or x.dim() == 1):
        # along the only axis torch adds up all channels
        block_size = x.shape if axis is None else (1,)
    rows = x if block_size is None else in_blocks(x, block_size)
    given = [
        t.detach().clone().requires_grad_()
        for t in (rows.float(), scale.reshape(-1), zero_point.reshape(-1))
    ]
    along = axis % x.dim() if block_size is None else 0
    y = torch._fake_quantize_learnable_per_channel_affine(*given, along, *grid, factor)
    y.backward((grad if block_size is None else in_blocks(grad, block_size)).float())
    results = [y.detach(), given[0].grad]
    if block_size is not None:
        results = [from_blocks(t, x, block_size) for t in results]
    of_scale, of_zero = (
        t.grad.reshape(like.shape) for t, like in zip(given[1:], (scale, zero_point), strict=True)
    )
    return results[0].to(x.dtype), results[1].to(x.dtype), of_scale, of_zero


def like_output(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient, laid out as the forward's output."""
    dense = x.numel() > 0 and torch.ops.aten.is_non_overlapping_and_dense(x)
    strides = x.stride() if dense else torch.empty(x.shape).stride()
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(grad)


def run(
    backend: Backend, grad: Tensor, x: Tensor, quantizer: Sequence[Tensor], options: Options
) -> tuple[Tensor, ...]:
    """The values, and the three gradients."""
    x = x.to(backend.device)
    given = [t.to(backend.device) for t in quantizer]
    weight = like_output(grad.to(backend.device), x)
    with unchanged(x, weight, *given):
        y = backend.op("_learnable_fake_quantize")(x, *given, *GRID, **options)
        op = backend.op("_learnable_fake_quantize_backward")
        return (y, *op(weight, x, *given, *GRID, FACTOR, **options))


def assert_near(found: Tensor, expected: Tensor, magnitude: Tensor, context: object) -> None:
    """Sums of float32 terms in another order: of float32 ones, off by their roundings."""
    off = (found.cpu() - expected).abs()
    assert (off <= 2e-6 * magnitude + 1e-30).all(), (context, off.max(), magnitude.max())


def magnitudes(
    grad: Tensor, x: Tensor, quantizer: Sequence[Tensor], options: Options
) -> tuple[Tensor, Tensor]:
    """At least the sums of the terms' magnitudes."""
    block_size = blocks_of(x.shape, options)
    total = in_blocks(grad.detach().cpu().float().abs(), block_size).sum(1)
    scale = quantizer[0]
    total = total.reshape(scale.shape)
    return total * 20 * FACTOR, total * scale * FACTOR


def check(backend: Backend, x: Tensor, options: Options, context: object = "") -> None:
    """The values and the gradient of x to the bit, the others but for the order of a sum."""
    quantizer = qparams(groups_of(x, options))
    grad = sample(x.shape, seed=1).to(x.dtype)  # torch's is of float32
    y, grad_x, *others = run(backend, grad, x, quantizer, options)
    expected_y, expected_x, *expected = of_torch(grad, x, *quantizer, options)
    assert_same(grad_x, expected_x, context)
    if x.dtype != torch.float64:
        assert_same(y, expected_y, context)
    sizes = magnitudes(grad, x, quantizer, options)
    for i, (found, of_them, size) in enumerate(zip(others, expected, sizes, strict=True)):
        assert found.dtype == torch.float32
        assert_near(found, of_them, size, (context, i))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [size for size in SIZES if size != 0], ids=str)
def test_sizes(backend: Backend, size: int | None, dtype: torch.dtype) -> None:
    x = sample(size, dtype)
    check(backend, x, {})
    if size:
        check(backend, x, {"axis": 0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    x = laid_out(layout, dtype, backend.device)
    for axis in AXES:
        check(backend, x, {"axis": axis}, axis)
    for block_size in BLOCKS:
        check(backend, x, {"block_size": block_size}, block_size)


# runs of one element, short, odd, long; groups of one chunk and of several
CUTS: list[tuple[tuple[int, ...], Options]] = [
    ((70_001,), {}),
    ((6, 12_293), {"axis": 0}),
    ((12_293, 6), {"axis": 1}),
    ((1100, 301), {"axis": 1}),
    ((9, 5, 1031), {"axis": 1}),
    ((900, 5, 3), {"axis": 1}),
    ((300, 8, 49), {"axis": 1}),
    ((500, 128), {"block_size": (1, 32)}),
    ((500, 130), {"block_size": (1, 10)}),
    ((512, 96), {"block_size": (32, 32)}),
    ((36, 4100), {"block_size": (9, 1)}),
    ((5, 9000), {"block_size": (5, 4500)}),
]


@cache
def cut_case(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return sample(shape, dtype), sample(shape, dtype, 1)


@cache
def of_kernel(name: str, index: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    shape, options = CUTS[index]
    x, grad = cut_case(shape, dtype)
    backend = next(backend for backend in backends() if backend.name == name)
    with backend.selected(), threads(1):
        return run(backend, grad, x, qparams(groups_of(x, options)), options)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("index", range(len(CUTS)), ids=[str(case) for case in CUTS])
def test_the_order_of_a_sum_is_one(backend: Backend, index: int, dtype: torch.dtype) -> None:
    """The same bytes on every kernel and any thread count; the reference adds in torch's order."""
    shape, options = CUTS[index]
    x, grad = cut_case(shape, dtype)
    quantizer = qparams(groups_of(x, options))
    if dtype == torch.float32:
        check(backend, x, options)
    expected = of_kernel("reference", index, dtype)
    sizes = magnitudes(grad, x, quantizer, options)
    for count in (1, 2, 3) if backend.isa else (1,):
        with threads(count):
            found = run(backend, grad, x, quantizer, options)
        assert_all_same(found[:2], expected[:2], count)
        for one, other, size in zip(found[2:], expected[2:], sizes, strict=True):
            off = (one.cpu().double() - other).abs()
            assert (off <= 2**-23 * other.abs() + 1e-11 * size).all(), count
        if backend.name != "reference" and (kernels := [b.name for b in backends() if b.isa]):
            assert_all_same(found[2:], of_kernel(kernels[0], index, dtype)[2:], count)


@cache
def of_cancelling(name: str, index: int) -> tuple[Tensor, ...]:
    """Gradients of 19 orders of magnitude, a group's sum zero: what is left is the order's."""
    shape, options = CUTS[index]
    x = torch.full(shape, 1e6)
    rows = in_blocks(x, blocks_of(shape, options))
    members = rows.shape[1]
    order = torch.randperm(members, generator=torch.Generator().manual_seed(4))
    row = sample(members) * 10.0 ** (torch.arange(members) // 2 % 19)
    row[1::2] = -row[: members - 1 : 2]
    grad = from_blocks(row[order].expand(rows.shape), x, blocks_of(shape, options))
    backend = next(backend for backend in backends() if backend.name == name)
    with backend.selected():
        quantizer = qparams(groups_of(x, options))
        return run(backend, grad, x, quantizer, options)


@pytest.mark.parametrize("index", range(len(CUTS)), ids=[str(case) for case in CUTS])
def test_the_order_shows_where_terms_cancel(backend: Backend, index: int) -> None:
    if backend.name != "reference" and (kernels := [b.name for b in backends() if b.isa]):
        found, expected = (of_cancelling(name, index) for name in (backend.name, kernels[0]))
        assert_all_same(found, expected)


@pytest.mark.parametrize("index", range(len(CUTS)), ids=[str(case) for case in CUTS])
def test_an_exact_sum_is_that_of_torch(backend: Backend, index: int) -> None:
    """Terms that are multiples of a quarter, whose sums float32 holds."""
    shape, options = CUTS[index]
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-40, 40, shape, generator=generator) / 4
    grad = torch.randint(-3, 4, shape, generator=generator).float()
    groups = groups_of(x, options)
    scale, zero_point = torch.ones(groups), qparams(groups)[1]
    x_, *given = (t.to(backend.device) for t in (x, scale, zero_point))
    op = backend.op("_learnable_fake_quantize_backward")
    found = op(grad.to(backend.device), x_, *given, *GRID, 0.5, **options)
    expected = of_torch(grad, x, scale, zero_point, options, 0.5)[1:]
    assert_all_same(found, expected)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_storage_offsets(backend: Backend, dtype: torch.dtype, offset: int) -> None:
    x = sample(60 * 41 + offset, dtype)[offset:].reshape(60, 41)
    for options in ({}, {"axis": 0}, {"axis": 1}):
        check(backend, x, options, options)


def test_values_that_are_not_finite(backend: Backend) -> None:
    """A NaN is below the grid, as with torch; +inf above it."""
    x = torch.tensor([torch.nan, -torch.inf, torch.inf, 1.0, 1e30, -1e30, -torch.nan])
    scale, zero_point = torch.tensor([0.5]), torch.tensor([1.0])
    grad = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    expected = torch.tensor([0.0, 0.0, 0.0, 8.0, 0.0, 0.0, 0.0])
    given = [t.to(backend.device) for t in (grad, x, scale, zero_point)]
    of_x, of_scale, of_zero = backend.op("_learnable_fake_quantize_backward")(*given, *GRID)
    assert_same(of_x, expected)
    assert of_scale.item() == (1 + 2 + 32 + 64) * (-8 - 1.0) + (4 + 16) * (7 - 1.0)
    assert of_zero.item() == -0.5 * (1 + 2 + 32 + 64 + 4 + 16)
    # a gradient that is not finite spoils its group alone
    grad = torch.ones(2, 600)
    grad[1, 599] = torch.nan
    x = sample((2, 600))
    given = [t.to(backend.device) for t in (grad, x, torch.ones(2), torch.zeros(2))]
    found = backend.op("_learnable_fake_quantize_backward")(*given, *GRID, axis=0)
    assert found[1].cpu().isnan().tolist() == [False, True]


@pytest.mark.parametrize("zero_point", [0.0, 0.4, 1.6, 3.0, 5.7, 100.0])
def test_per_tensor_is_that_of_torch(backend: Backend, zero_point: float) -> None:
    """Where torch's backward rounds to the integer of its forward."""
    ours, theirs = (
        [
            t.requires_grad_()
            for t in (sample(1000), torch.tensor([0.7]), torch.tensor([zero_point]))
        ]
        for _ in range(2)
    )
    y = torch._fake_quantize_learnable_per_tensor_affine(*theirs, *GRID, FACTOR)
    weight = sample(1000, seed=1)
    y.backward(weight)
    given = [t.detach().to(backend.device).requires_grad_() for t in ours]
    z = ops.learnable_fake_quantize(*given, *GRID, grad_factor=FACTOR)
    z.backward(weight.to(backend.device))
    assert_same(z, y)
    assert_same(given[0].grad, theirs[0].grad)
    for one, other in zip(given[1:], theirs[1:], strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("zero_point", [-1.0, -1.2, 2.5, -2.5])
def test_the_backward_takes_the_zero_point_of_the_forward(
    backend: Backend, zero_point: float
) -> None:
    """Each value with a slope of its own: clipped at -8 and 7, what the forward clips there."""
    rounded = round(zero_point)
    x = torch.tensor([-8.0 - rounded, 7.0 - rounded, -9.0 - rounded, 8.0 - rounded])
    given = [t.to(backend.device) for t in (x, torch.ones(1), torch.tensor([zero_point]))]
    op = backend.op("_learnable_fake_quantize_backward")
    grads = op(torch.ones(4, device=backend.device), *given, *GRID)
    assert_same(grads[0], torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert grads[1].item() == (-8 - rounded) + (7 - rounded)
    assert grads[2].item() == -2.0


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient(backend: Backend, layout: str, entry: str) -> None:
    """Through gradients of the output's strides, of others, and expanded from one value."""
    values = laid_out(layout, torch.float32, backend.device)
    weights = {
        "contiguous": sample(SHAPE, seed=1),
        "strided": sample((3, 5, 4, 6), seed=2).permute(3, 2, 1, 0),
        "one": torch.ones(()).expand(SHAPE),
    }
    for options in ({}, {"axis": 1}, {"block_size": (2, 2, 5, 1)}):
        quantizer = qparams(groups_of(values, options))
        for name, weight in weights.items():
            given = [t.detach().to(backend.device).requires_grad_() for t in (values, *quantizer)]
            y = ENTRIES[entry](*given, *GRID, grad_factor=FACTOR, **options)
            grads = torch.autograd.grad(y, given, weight.to(backend.device))
            expected = run(backend, weight, values, quantizer, options)
            assert_all_same([y, *grads], expected, (options, name))


def test_graph_only_where_it_is_needed(backend: Backend) -> None:
    """Any of the three may ask for it."""
    x, *quantizer = (t.to(backend.device) for t in (sample(33), *qparams((1,))))
    call = ops.learnable_fake_quantize
    assert call(x, *quantizer, *GRID).grad_fn is None
    for i in range(3):
        given = [t.detach().clone() for t in (x, *quantizer)]
        given[i].requires_grad_()
        y = call(*given, *GRID)
        y.sum().backward()
        assert [t.grad is not None for t in given] == [j == i for j in range(3)]
        with torch.no_grad():
            assert call(*given, *GRID).grad_fn is None


@pytest.mark.parametrize("entry", ENTRIES)
def test_twice_differentiated(backend: Backend, entry: str) -> None:
    given = [t.to(backend.device).requires_grad_() for t in (sample(9), *qparams((1,)))]
    y = ENTRIES[entry](*given, *GRID)
    (gradient,) = torch.autograd.grad(y.square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="its gradient was differentiated"):
        gradient.sum().backward()


def test_empty(backend: Backend) -> None:
    x = torch.empty(0, 3, device=backend.device)
    scale, zero_point = (t.to(backend.device) for t in qparams((3,)))
    for options in ({}, {"axis": 1}):
        given = (x, scale[:1], zero_point[:1]) if not options else (x, scale, zero_point)
        y = backend.op("_learnable_fake_quantize")(*given, *GRID, **options)
        assert y.shape == (0, 3)
        found = backend.op("_learnable_fake_quantize_backward")(x, *given, *GRID, **options)
        assert_all_same(found, [x, torch.zeros_like(given[1]), torch.zeros_like(given[2])])


@needs_device_in_software
@pytest.mark.parametrize("index", range(len(CUTS)), ids=[str(case) for case in CUTS])
def test_one_launch_each_way(index: int) -> None:
    """And where a group has several chunks a few bytes set; never a sync."""
    shape, options = CUTS[index]
    x, grad = cut_case(shape, torch.float32)
    given = (x, *qparams(groups_of(x, options)))
    with ON_HOST.asked(launches=1):
        ON_HOST.op("_learnable_fake_quantize")(*given, *GRID, **options)
    with ON_HOST.asked(launches=1, memsets=None):
        ON_HOST.op("_learnable_fake_quantize_backward")(grad, *given, *GRID, **options)


# x, its groups: long runs and short ones, of one chunk and of several
GROUPED: list[tuple[tuple[int, ...], Options]] = [
    ((3, 5, 7), {}),
    ((9, 1031), {"axis": 0}),
    ((1100, 3), {"axis": 1}),
    ((40, 12), {"block_size": (20, 3)}),
    ((2, 9000), {"block_size": (2, 4500)}),
]
EACH_GROUPING = pytest.mark.parametrize(("shape", "options"), GROUPED, ids=str)


def grads_of(
    backend: Backend,
    shape: tuple[int, ...],
    options: Options,
    quantizer: Sequence[Tensor] | None = None,
    **more: Any,
) -> tuple[Tensor, ...]:
    """The three gradients, of float32."""
    x, grad = cut_case(shape, torch.float32)
    quantizer = qparams(groups_of(x, options)) if quantizer is None else quantizer
    given = [t.to(backend.device) for t in (grad, x, *quantizer)]
    more = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in more.items()}
    op = backend.op("_learnable_fake_quantize_backward")
    return op(*given, *GRID, more.pop("factor", FACTOR), **options, **more)


@pytest.mark.parametrize("flag_dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
@EACH_GROUPING
def test_enabled(
    backend: Backend, shape: tuple[int, ...], options: Options, flag_dtype: torch.dtype
) -> None:
    """Off, values and gradients pass as they are, whatever the scale."""
    x, grad = cut_case(shape, torch.float32)
    quantizer = qparams(groups_of(x, options))
    off, on = torch.zeros(1, dtype=flag_dtype), torch.ones(1, dtype=flag_dtype)
    unusable = torch.full_like(quantizer[0], torch.nan), quantizer[1]
    for scale, zero_point in (quantizer, unusable):
        given = [t.to(backend.device) for t in (x, scale, zero_point)]
        call = backend.op("_learnable_fake_quantize")
        with backend.asked(launches=1):
            y = call(*given, *GRID, **options, enabled=off.to(backend.device))
        assert_same(y, x)
        found = grads_of(backend, shape, options, (scale, zero_point), enabled=off)
        zeros = torch.zeros_like(scale)
        assert_all_same(found, (grad, zeros, zeros))
    expected = grads_of(backend, shape, options)
    assert_all_same(grads_of(backend, shape, options, enabled=on), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_off_keeps_every_bit(backend: Backend, dtype: torch.dtype) -> None:
    x = laid_out("transposed", dtype, backend.device)
    x[0, 0, 0, 0], x[1, 1, 1, 1] = torch.nan, -torch.inf
    given = [t.to(backend.device) for t in (x, *qparams((1,)))]
    off = torch.zeros(1, dtype=torch.uint8, device=backend.device)
    y = backend.op("_learnable_fake_quantize")(*given, *GRID, enabled=off)
    grad_x = backend.op("_learnable_fake_quantize_backward")(x, *given, *GRID, enabled=off)[0]
    for found in (y, grad_x):
        assert_same(found, x)
        assert found.stride() == x.stride()


@EACH_GROUPING
def test_held(backend: Backend, shape: tuple[int, ...], options: Options) -> None:
    """The gradient of x alone, also where the others are not finite."""
    held, free = torch.ones(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    expected = grads_of(backend, shape, options)
    assert_all_same(grads_of(backend, shape, options, held=free), expected)
    zeros = torch.zeros_like(expected[1])
    for factor in (FACTOR, torch.inf):
        found = grads_of(backend, shape, options, held=held, factor=factor)
        assert_all_same(found, (expected[0], zeros, zeros))


LEARNED_SCALES = [0.5, 1e-9, 0.0, -0.0, -3.0, torch.inf, -torch.inf, 0.25]


def test_least_scale(backend: Backend) -> None:
    """A scale that is learned is used as at least that, and finite."""
    scale = torch.tensor(LEARNED_SCALES)
    usable = scale.clamp(1e-3, torch.finfo(torch.float32).max)
    zero_point = qparams(scale.shape)[1]
    options = {"axis": 0}
    shape = (len(scale), 1031)
    x = cut_case(shape, torch.float32)[0].to(backend.device)
    for given, least in ((scale, 1e-3), (usable, 0.0)):
        y = backend.op("_learnable_fake_quantize")(
            x, given.to(backend.device), zero_point.to(backend.device), *GRID, 0, least_scale=least
        )
        grads = grads_of(backend, shape, options, (given, zero_point), least_scale=least)
        if least:
            found = (y, *grads)
        else:
            assert_all_same(found, (y, *grads))


def test_least_scale_per_tensor(backend: Backend) -> None:
    x = cut_case((3, 5, 7), torch.float32)[0].to(backend.device)
    for learned in LEARNED_SCALES:
        scale = torch.tensor([learned])
        expected, found = (
            backend.op("_learnable_fake_quantize")(
                x, s.to(backend.device), torch.ones(1, device=backend.device), *GRID, **least
            )
            for s, least in (
                (scale.clamp(1e-3, torch.finfo(torch.float32).max), {}),
                (scale, {"least_scale": 1e-3}),
            )
        )
        assert_same(found, expected)


def test_a_learned_nan_shows(backend: Backend) -> None:
    """In the values of its group alone; no error, as the loss says it all."""
    scale = torch.tensor([0.5, torch.nan, 0.5])
    zero_point = torch.tensor([1.0, 1.0, torch.nan])
    given = [t.to(backend.device) for t in (sample((3, 50)), scale, zero_point)]
    y = backend.op("_learnable_fake_quantize")(*given, *GRID, 0, least_scale=1e-3)
    assert y.isnan().all(1).tolist() == y.isnan().any(1).tolist() == [False, True, True]


NORMALIZED: list[tuple[tuple[int, ...], Options, int, int]] = [
    # elements of a scale, and those of them in a sample
    ((6, 5, 7), {}, 210, 35),
    ((6, 5, 7), {"axis": 1}, 42, 7),
    ((6, 5, 7), {"axis": -2}, 42, 7),
    ((6, 5, 7), {"axis": 0}, 35, 35),
    ((6, 5, 7), {"axis": -3}, 35, 35),
    ((6, 5, 8), {"block_size": (3, 5, 2)}, 30, 10),
    ((40,), {"axis": 0}, 1, 1),
    ((40,), {}, 40, 1),
]


@pytest.mark.parametrize(("shape", "options", "elements", "features"), NORMALIZED, ids=str)
def test_normalize(
    backend: Backend, shape: tuple[int, ...], options: Options, elements: int, features: int
) -> None:
    """LSQ's gradient scale, for the grid of 7 steps."""
    counts = {"none": 1, "elements": elements, "features": features}
    for code, count in enumerate(counts.values()):
        expected = grads_of(backend, shape, options, factor=1 / math.sqrt(count * 7))
        found = grads_of(backend, shape, options, factor=7**-0.5, normalize=code)
        assert_same(found[0], expected[0])
        for one, other in zip(found[1:], expected[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-7, atol=0)
    x = torch.zeros((), device=backend.device)
    given = [t.to(backend.device) for t in (x, x + 9, *qparams((1,)))]
    given[0] += 1
    for code in range(3):  # of no dimensions
        grads = backend.op("_learnable_fake_quantize_backward")(*given, *GRID, normalize=code)
        assert grads[1].item() == GRID[1] - 2


@pytest.mark.parametrize("entry", ENTRIES)
def test_what_is_held_may_be_written_before_the_backward(backend: Backend, entry: str) -> None:
    """The gradient is of the scale and the switches of the forward."""

    def call(write: bool) -> list[Tensor]:
        given = [t.to(backend.device).requires_grad_() for t in (sample(99), *qparams((1,)))]
        enabled, held = (
            torch.full((1,), i, dtype=torch.uint8, device=backend.device) for i in (1, 0)
        )
        y = ENTRIES[entry](*given, *GRID, enabled=enabled, held=held)
        if write:
            with torch.no_grad():
                given[1].fill_(5)
                given[2].fill_(3)
                enabled.fill_(0)
                held.fill_(1)
        return list(torch.autograd.grad(y.square().sum(), given))

    assert_all_same(call(True), call(False))


def test_function_passes_its_options_on(backend: Backend) -> None:
    x, scale, zero_point = sample((6, 5)), torch.tensor([-1.0]), torch.zeros(1)
    one = torch.ones(1, dtype=torch.uint8)
    more = {"least_scale": 0.25, "enabled": one, "held": 1 - one}
    given = [t.to(backend.device).requires_grad_() for t in (x, scale, zero_point)]
    more = {k: v.to(backend.device) if isinstance(v, Tensor) else v for k, v in more.items()}
    for code, normalize in enumerate(("none", "elements", "features")):
        y = ops.learnable_fake_quantize(*given, *GRID, grad_factor=0.5, normalize=normalize, **more)
        weight = torch.ones_like(y)
        found = torch.autograd.grad(y, given, weight)
        with torch.no_grad():
            assert_same(y, backend.op("_learnable_fake_quantize")(*given, *GRID, least_scale=0.25))
            expected = backend.op("_learnable_fake_quantize_backward")(
                weight, *given, *GRID, 0.5, least_scale=0.25, normalize=code
            )
        assert_all_same(found, expected)


def arguments(**changed: Any) -> dict[str, Any]:
    given = {
        "x": sample((2, 3)),
        "scale": torch.tensor([0.1, 0.2, 0.3]),
        "zero_point": torch.tensor([0.0, 1.0, 2.0]),
        "quant_min": 0,
        "quant_max": 15,
        "axis": 1,
    }
    return {**given, **changed}


REJECTED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "scale_0": (
        {"scale": torch.tensor([0.1, 0.0, 0.3])},
        ValueError,
        r"scale: expected positive finite values, got \[.*0.0",
    ),
    "scale_dtype": (
        {"scale": torch.ones(3, dtype=torch.float64)},
        TypeError,
        "scale: expected torch.float32, got torch.float64",
    ),
    "scale_size": ({"scale": torch.ones(2)}, ValueError, r"scale: expected shape \(3,\).* \(2,\)"),
    "zero_nan": (
        {"zero_point": torch.tensor([0.0, torch.nan, 1.0])},
        ValueError,
        r"zero_point: expected numbers, got \[0.0, nan, 1.0\]",
    ),
    "zero_dtype": (
        {"zero_point": torch.zeros(3, dtype=torch.int32)},
        TypeError,
        "zero_point: expected torch.float32, got torch.int32",
    ),
    "zero_size": (
        {"zero_point": torch.zeros(4)},
        ValueError,
        r"zero_point: expected shape \(3,\).* got shape \(4,\)",
    ),
    "grid": (
        {"quant_min": 15},
        ValueError,
        "quant_min: expected a value below quant_max, got quant_min=15, quant_max=15",
    ),
    "axis": ({"axis": 2}, ValueError, r"axis: expected .*\[-2, 1\].* got 2"),
    "no_axis": ({"axis": None}, ValueError, r"scale: expected 1 element, got shape \(3,\)"),
    **REJECTED_BLOCKS,
    **REJECTED_SWITCHES,
    **{
        f"least_scale_{least}": (
            {"least_scale": least},
            ValueError,
            f"least_scale: expected 0 or a positive finite float32, got {least}",
        )
        for least in (-1.0, 1e-60, float("inf"), float("nan"))
    },
    "block_shape": (
        {"axis": None, "block_size": [1, 1]},
        ValueError,
        r"scale: expected shape \(2, 3\), .* block_size \(1, 1\), got shape \(3,\)",
    ),
    "scale_meta": (
        {"scale": torch.ones(3, device="meta")},
        ValueError,
        "scale: expected a tensor on cpu .*, got one on meta",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name: str) -> None:
    changed, error, match = REJECTED[name]
    call = ops.learnable_fake_quantize
    for gradient in (False, True):
        given = arguments(**changed)
        given["x"] = given["x"].requires_grad_(gradient)
        assert_rejected(call, given, error, f"^learnable_fake_quantize: {match}")


GRADS_REJECTED: dict[str, Tensor] = {
    "shape": torch.zeros(3, 2),
    "dtype": torch.zeros(2, 3).double(),
    "strides": torch.zeros(3, 2).t(),
    "meta": torch.zeros(2, 3, device="meta"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_kernel_rejects(backend: Backend, name: str) -> None:
    if not backend.cuda:
        given = arguments(**REJECTED[name][0])
        assert_rejected(backend.op("_learnable_fake_quantize"), given, Exception)
        given["grad"] = torch.zeros(2, 3)
        assert_rejected(backend.op("_learnable_fake_quantize_backward"), given, Exception)


@pytest.mark.parametrize("name", GRADS_REJECTED)
def test_rejects_a_gradient_of_another_layout(backend: Backend, name: str) -> None:
    if not backend.cuda:
        given = arguments(grad=GRADS_REJECTED[name])
        assert_rejected(backend.op("_learnable_fake_quantize_backward"), given, Exception, "grad")


HELD_REJECTED: dict[str, tuple[Any, type[Exception], str]] = {
    "held": (torch.ones(1), TypeError, "held: expected torch.uint8 .*, got torch.float32"),
    "normalize": ("mean", ValueError, "normalize: expected one of none, .*, got 'mean'"),
}


@pytest.mark.parametrize("name", HELD_REJECTED)
def test_rejects_what_the_backward_takes(backend: Backend, name: str) -> None:
    value, error, match = HELD_REJECTED[name]
    given = arguments(**{name: value})
    given["x"].requires_grad_()
    expected = f"^learnable_fake_quantize: {match}"
    assert_rejected(ops.learnable_fake_quantize, given, error, expected)
    if not backend.cuda:
        given = arguments(grad=torch.zeros(2, 3), **{name: 3 if name == "normalize" else value})
        assert_rejected(backend.op("_learnable_fake_quantize_backward"), given, Exception, name)


def test_rejects_other_inputs() -> None:
    for x, came in not_dense_real_float().values():
        expected = f"^learnable_fake_quantize: x: expected a dense tensor of float32, .*, {came}"
        assert_rejected(ops.learnable_fake_quantize, arguments(x=x), TypeError, expected)


def test_meta_and_compile() -> None:
    x = torch.empty(4, 5, device="meta").t()
    scale, zero_point = (torch.empty(1, device="meta") for _ in range(2))
    y = ops.learnable_fake_quantize(x, scale, zero_point, 0, 255)
    assert (y.shape, y.stride(), y.device.type) == ((5, 4), (1, 5), "meta")

    def call(*given: Tensor) -> Tensor:
        return ops.learnable_fake_quantize(*given, *GRID, 1, FACTOR)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    ours, theirs = (
        [t.requires_grad_() for t in (sample((4, 6)), *qparams((6,)))] for _ in range(2)
    )
    y, expected = compiled(*ours), call(*theirs)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_same(y, expected)
    assert_all_same([t.grad for t in ours], [t.grad for t in theirs])


def test_opcheck() -> None:
    inputs = opcheck_inputs()
    for x in (inputs[name] for name in ("0-d", "empty", "sliced", "transposed")):
        given = (x, *qparams((1,)), *GRID)
        opcheck("_learnable_fake_quantize", *given)
        opcheck("_learnable_fake_quantize_backward", like_output(x, x), *given)
        leaves = [t.clone().requires_grad_() for t in (x, *qparams((1,)))]
        opcheck("learnable_fake_quantize", *leaves, *GRID)
        if x.dim() > 1:
            opcheck("_learnable_fake_quantize", x, *qparams((x.shape[1],)), *GRID, 1)
            leaves = [t.clone().requires_grad_() for t in (x, *qparams((x.shape[1],)))]
            opcheck("learnable_fake_quantize", *leaves, *GRID, 1, FACTOR)
            flag = torch.ones(1, dtype=torch.uint8)
            switches = None, flag, 1 - flag, 1e-7, 2
            opcheck("learnable_fake_quantize", *leaves, *GRID, 1, FACTOR, *switches)


def test_a_batch_with_values_that_are_not_finite(backend: Backend) -> None:
    """The forward is fake_quantize's."""
    x = sprinkled(sample((5, 4100))).to(backend.device)
    scale, zero_point = (t.to(backend.device) for t in qparams((5,)))
    integers = zero_point.round().clamp(*GRID).int()
    y = backend.op("_learnable_fake_quantize")(x, scale, zero_point, *GRID, 0)
    assert_same(y, backend.op("_fake_quantize")(x, scale, integers, *GRID, 0))

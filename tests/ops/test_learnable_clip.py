"""``learnable_clip``: both results and all three gradients, over every kernel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from backends import ON_HOST, Backend, backends, needs_device_in_software
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from pyobserver import ops

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

ENTRIES = {
    "function": ops.learnable_clip,
    "op": torch.ops.pyobserver.learnable_clip,
}
BOUNDS = (-2.1, 1.7)  # which the shorter types have to round
Grid = tuple[int, bool, bool]
GRIDS: tuple[Grid | None, ...] = (None, (4, False, True), (8, False, False))


def bounds_of(low: float = BOUNDS[0], high: float = BOUNDS[1], device: str = "cpu") -> list[Tensor]:
    return [torch.tensor(bound, dtype=torch.float32, device=device) for bound in (low, high)]


def clipped(x: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The values, and whether each met the lower bound, the upper one; as NVIDIA has them."""
    low, high = (bound.reshape(()).to(x.dtype) for bound in (low, high))
    y = torch.max(torch.min(x, high), low)
    met = (low >= x, high <= x)
    return y, *(flags & ~x.isnan() for flags in met)


def run(
    backend: Backend,
    grad: Tensor,
    x: Tensor,
    bounds: Sequence[Tensor],
    grid: Grid | None = None,
) -> tuple[Tensor, ...]:
    """The values and the three gradients, of the gradient laid out as the values."""
    x = x.to(backend.device)
    args = x, *(bound.to(backend.device) for bound in bounds), *(grid or ())
    with unchanged(*args[:3]):
        y, mask = backend.op("_learnable_clip_mask")(*args)
        assert_same(backend.op("_learnable_clip")(*args), y)
    weight = torch.empty_like(y).copy_(grad)
    with unchanged(weight, mask):
        return y, *backend.op("_learnable_clip_backward")(weight, mask)


def assert_sums(found: Sequence[Tensor], grad: Tensor, met: Sequence[Tensor], context: Any) -> None:
    """Sums in float64, but for their order."""
    for one, flags in zip(found, met, strict=True):
        terms = grad.double()[flags]
        assert (one.dtype, one.shape) == (torch.float32, ())
        off = (one.cpu().double() - terms.sum()).abs()
        assert off <= 2**-23 * terms.sum().abs() + 1e-11 * terms.abs().sum(), context


def check(
    backend: Backend, x: Tensor, bounds: Sequence[Tensor], grid: Grid | None, context: Any = ""
) -> None:
    grad = sample(x.shape, x.dtype, 1)
    y, to_x, *to_bounds = run(backend, grad, x, bounds, grid)
    values = x.cpu()
    expected, *met = clipped(values, *bounds)
    if grid is not None:
        amax = torch.maximum(-bounds[0], bounds[1]).reshape(())
        expected = Backend("reference").op("_fake_tensor_quant")(expected, amax, *grid)
    assert_same(y, expected, context)
    assert_same(to_x, torch.where(met[0] | met[1], 0.0, grad), context)
    assert_sums(to_bounds, grad, met, context)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [size for size in SIZES if size != 0], ids=str)
def test_sizes(backend: Backend, size: int | None, dtype: torch.dtype) -> None:
    for grid in GRIDS:
        check(backend, sample(size, dtype), bounds_of(), grid, grid)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    for grid in GRIDS:
        check(backend, laid_out(layout, dtype, backend.device), bounds_of(), grid, grid)


@pytest.mark.parametrize("size", range(1, 18))
def test_the_mask(backend: Backend, size: int) -> None:
    """A plane for each bound, in the order of memory; what is beyond the last element is 0."""
    x = sample((size, 3), seed=size).t()
    for bounds in ((0.5, 1.0), (-1.0, -0.5), (0.5, 0.0)):
        _, mask = backend.op("_learnable_clip_mask")(
            x.to(backend.device), *bounds_of(*bounds, backend.device)
        )
        met = [[bool(v <= bounds[0]), bool(v >= bounds[1])] for v in x.t().reshape(-1)]
        planes = [sum(one[i] << at for at, one in enumerate(met)) for i in range(2)]
        expected = [list(plane.to_bytes(mask.shape[1], "little")) for plane in planes]
        assert mask.tolist() == expected, bounds


@pytest.mark.parametrize("offset", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_storage_offsets(backend: Backend, dtype: torch.dtype, offset: int) -> None:
    """Of x, and of the gradient."""
    x, grad = (sample(2461 + offset, dtype, seed)[offset:] for seed in (0, 1))
    check(backend, x, bounds_of(), None)
    x, low, high, weight = (t.to(backend.device) for t in (x, *bounds_of(), grad))
    _, mask = backend.op("_learnable_clip_mask")(x, low, high)
    moved = torch.empty(2461 + offset, dtype=dtype, device=backend.device)[offset:].copy_(weight)
    found = backend.op("_learnable_clip_backward")(moved, mask)
    assert_all_same(found, run(backend, grad, x, (low, high))[1:])


@pytest.mark.parametrize("grid", [(2, False, True), (8, False, True), (24, False, False)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grids(backend: Backend, dtype: torch.dtype, grid: Grid) -> None:
    """Of the farther bound, as float32 has it."""
    x = sample((5, 37), dtype)
    for bounds in ((-2.1, 1.7), (-1.3, 2.9), (0.7, 1.1), (-3.3, -0.2), (0.0, 0.0)):
        check(backend, x, bounds_of(*bounds), grid, bounds)
    check(backend, x.abs(), bounds_of(), (grid[0], True, False))
    check(backend, x, bounds_of(0.0, 1.7), (grid[0], True, True))


# of one chunk and less than a row of lanes, of a chunk and one, of several and a part
LENGTHS = (100, 4096, 4097, 70_001)


def cancelling(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Values and gradients of many orders of magnitude, whose sum is zero for each bound."""
    generator = torch.Generator().manual_seed(5)
    x = torch.where(torch.rand(size, generator=generator) < 0.5, 9.0, -9.0)
    orders = 8 if dtype == torch.float16 else 19
    grad = torch.zeros(size)
    for sign in (-9.0, 9.0):
        places = (x == sign).nonzero().reshape(-1)
        half = len(places) // 2
        terms = sample(half, seed=5) * 10.0 ** (torch.arange(half) % orders - orders // 2)
        order = torch.randperm(2 * half, generator=generator)
        grad[places[order]] = torch.cat([terms, -terms])
    return x.to(dtype), grad.to(dtype)


@cache
def of_cancelling(name: str, size: int, dtype: torch.dtype, count: int) -> tuple[Tensor, ...]:
    backend = next(backend for backend in backends() if backend.name == name)
    x, grad = cancelling(size, dtype)
    with backend.selected(), threads(count):
        return run(backend, grad, x, bounds_of())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", LENGTHS)
def test_the_order_of_a_sum_is_one(backend: Backend, size: int, dtype: torch.dtype) -> None:
    """Where terms cancel, what is left is the order's; the reference adds in torch's."""
    kernels = [b.name for b in backends() if b.isa]
    if backend.name == "reference" or not kernels:
        return
    for count in (1, 2, 3) if backend.isa else (1,):
        found = of_cancelling(backend.name, size, dtype, count)
        assert_all_same(found, of_cancelling(kernels[0], size, dtype, 1), count)
    # a float16 has too few bits for a sum in float64 to lose any
    assert dtype == torch.float16 or found[2] != 0 or found[3] != 0


def test_a_sum_of_more_chunks_than_lanes(backend: Backend) -> None:
    if backend.name == "reference":
        return
    x, grad = cancelling(LARGE, torch.bfloat16)
    given = bounds_of()
    found = run(backend, grad, x, given)
    _, *met = clipped(x, *given)
    assert_sums(found[2:], grad, met, backend)
    if kernels := [b.name for b in backends() if b.isa]:
        assert_all_same(found, of_cancelling(kernels[0], LARGE, torch.bfloat16, 1))


def test_a_few_gradients_far_apart(backend: Backend) -> None:
    """Each counts once, wherever it lies, whatever the others are."""
    for at in (0, 31, 32, 255, 256, 4095, 4096, 8191, 8192, 9000):
        x, grad = torch.zeros(9001), torch.full((9001,), torch.nan)
        x[at], grad[at] = -5.0, 3.0
        found = run(backend, grad, x, bounds_of())
        assert (found[2].item(), found[3].item()) == (3.0, 0.0)
        assert found[1][at] == 0
        found = run(backend, grad, -x, bounds_of())
        assert (found[2].item(), found[3].item()) == (0.0, 3.0)


def test_a_bound_that_is_met_has_the_gradient(backend: Backend) -> None:
    x = torch.tensor([-3.0, -1.0, -0.5, -0.0, 0.0, 2.0, 2.5, torch.inf, -torch.inf, torch.nan])
    grad = 2.0 ** torch.arange(10)
    for dtype in DTYPES:
        given = x.to(dtype), bounds_of(-1.0, 2.0)
        y, *grads = run(backend, grad.to(dtype), *given)
        clip = [-1.0, -1.0, -0.5, -0.0, 0.0, 2.0, 2.0, 2.0, -1.0, torch.nan]
        assert_same(y, torch.tensor(clip, dtype=dtype))
        kept = torch.tensor([0.0, 0, 4, 8, 16, 0, 0, 0, 0, 512], dtype=dtype)
        assert_all_same(grads, [kept, torch.tensor(259.0), torch.tensor(224.0)])


@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(backend: Backend, name: str) -> None:
    for dtype in DTYPES:
        for grid in GRIDS:
            check(backend, torch.tensor(SPECIAL[name]).to(dtype), bounds_of(), grid, dtype)


def test_the_gradient_may_be_anything(backend: Backend) -> None:
    """A clipped NaN makes x's a zero, and the bound's NaN; not the other bound's."""
    grad = torch.tensor([torch.nan, 1.0, torch.inf, torch.nan])
    x = torch.tensor([-5.0, 5.0, 5.0, 0.0])
    _, to_x, to_low, to_high = run(backend, grad, x, bounds_of())
    assert_same(to_x, torch.tensor([0.0, 0.0, 0.0, torch.nan]))
    assert to_low.isnan()
    assert to_high == torch.inf


def test_bounds_that_meet_or_cross(backend: Backend) -> None:
    """What meets both counts for both; where they cross everything is the lower one."""
    x = torch.tensor([-1.0, 0.5, 0.75, 1.0, 3.0, torch.nan])
    grad = 2.0 ** torch.arange(6)
    expected = {
        (0.75, 0.75): ([0.75] * 5, 7.0, 28.0),
        (1.0, 0.5): ([1.0] * 5, 15.0, 30.0),
        (torch.inf, torch.inf): ([torch.inf] * 5, 31.0, 0.0),
    }
    for bounds, (values, of_low, of_high) in expected.items():
        y, to_x, to_low, to_high = run(backend, grad, x, bounds_of(*bounds))
        assert_same(y, torch.tensor([*values, torch.nan]))
        assert_same(to_x, torch.tensor([0.0] * 5 + [32.0]))
        assert (to_low, to_high) == (of_low, of_high)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient(backend: Backend, layout: str, entry: str) -> None:
    """Through gradients of the output's strides, of others, and expanded from one value."""
    values = laid_out(layout, torch.float32, backend.device)
    weights = {
        "contiguous": sprinkled(sample(SHAPE, seed=1)),
        "strided": sample((3, 5, 4, 6), seed=2).permute(3, 2, 1, 0),
        "one": torch.ones(()).expand(SHAPE),
    }
    for grid in GRIDS:
        for name, weight in weights.items():
            leaves = [values.detach(), *bounds_of(device=backend.device)]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            y = ENTRIES[entry](*leaves, *(grid or ()))
            grads = torch.autograd.grad(y, leaves, weight.to(backend.device))
            expected = run(backend, weight, values, bounds_of(), grid)
            assert_all_same([y, *grads], expected, (grid, name))


def test_graph_only_where_it_is_needed(backend: Backend) -> None:
    """Any of the three may ask for it; a bound's gradient is shaped as the bound."""
    bounds = [bound.reshape(shape) for bound, shape in zip(bounds_of(), ((1,), ()), strict=True)]
    given = [t.to(backend.device) for t in (sample(33), *bounds)]
    call = ops.learnable_clip
    assert call(*given).grad_fn is None
    for i in range(3):
        leaves = [t.detach().clone() for t in given]
        leaves[i].requires_grad_()
        call(*leaves).sum().backward()
        assert [t.grad is not None for t in leaves] == [j == i for j in range(3)]
        assert leaves[i].grad is not None
        assert leaves[i].grad.shape == given[i].shape
        with torch.no_grad():
            assert call(*leaves).grad_fn is None


def test_two_bits_an_element_are_kept(backend: Backend) -> None:
    leaves = [t.to(backend.device).requires_grad_() for t in (sample(1000), *bounds_of())]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for grid in GRIDS:
            ops.learnable_clip(*leaves, *(grid or ()))
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, 250)] * len(GRIDS)


@pytest.mark.parametrize("entry", ENTRIES)
def test_twice_differentiated(backend: Backend, entry: str) -> None:
    leaves = [t.to(backend.device).requires_grad_() for t in (sample(9), *bounds_of())]
    y = ENTRIES[entry](*leaves)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="learnable_clip: its gradient was differentiated"):
        gradient.sum().backward()


@pytest.mark.parametrize("which", range(3))
def test_forward_mode_is_refused(which: int) -> None:
    given = [sample(9), *bounds_of()]
    with forward_ad.dual_level():
        given[which] = forward_ad.make_dual(given[which], torch.ones_like(given[which]))
        with pytest.raises(NotImplementedError, match="learnable_clip: expected no transform"):
            ops.learnable_clip(*given)


def test_gradient_check() -> None:
    """Of x, which is clipped by what it is; a bound is of float32, so its steps are wide."""
    x = sample(200, torch.float64).requires_grad_()
    bounds = bounds_of()
    assert torch.autograd.gradcheck(lambda x: ops.learnable_clip(x, *bounds), (x,))
    for i in range(2):
        moved = [[b + step * (j == i) for j, b in enumerate(bounds)] for step in (-0.125, 0.125)]
        near = torch.stack([(x - b).abs() for b in bounds]).amin(0) < 0.25
        low, high = (ops.learnable_clip(x, *each)[~near].sum() for each in moved)
        leaves = [b.clone().requires_grad_() for b in bounds]
        ops.learnable_clip(x, *leaves)[~near].sum().backward()
        assert leaves[i].grad is not None
        assert float((high - low).detach()) / 0.25 == pytest.approx(float(leaves[i].grad), abs=1e-5)


def test_empty(backend: Backend) -> None:
    x = torch.empty(0, 3, device=backend.device)
    given = x, *bounds_of(device=backend.device)
    y, mask = backend.op("_learnable_clip_mask")(*given, 8)
    assert (y.shape, mask.shape) == ((0, 3), (2, 0))
    zero = torch.zeros(())
    assert_all_same(backend.op("_learnable_clip_backward")(y, mask), [x, zero, zero])


CALLS = {
    "alone": (1, lambda x, low, high: ops.learnable_clip(x, low, high)),
    "quantized": (1, lambda x, low, high: ops.learnable_clip(x, low, high, 8)),
    "gradient": (
        2,
        lambda x, low, high: torch.autograd.grad(
            ops.learnable_clip(x, low.requires_grad_(), high, 8), low, torch.ones_like(x)
        ),
    ),
    "empty": (0, lambda x, low, high: ops.learnable_clip(x[:0], low, high)),
}


@needs_device_in_software
@pytest.mark.parametrize("size", [4096, 30_000])
@pytest.mark.parametrize("name", CALLS)
def test_launches_on_cuda(name: str, size: int) -> None:
    """One each way, and where there are several chunks a few bytes set; never a sync."""
    launches, call = CALLS[name]
    memsets = int(name == "gradient" and size > 4096)
    with ON_HOST.selected(), ON_HOST.asked(launches, memsets):
        call(sample(size), *bounds_of())


def arguments(**changed: Any) -> dict[str, Any]:
    low, high = bounds_of()
    return {"x": sample((2, 3)), "low": low, "high": high, **changed}


_BOUNDS = r"low, high: expected"
REJECTED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "low_number": ({"low": -1.0}, TypeError, r"low: expected torch.float32, got float \(-1.0\)"),
    "high_dtype": (
        {"high": torch.ones((), dtype=torch.float64)},
        TypeError,
        "high: expected torch.float32, got torch.float64",
    ),
    "low_size": ({"low": torch.ones(2)}, ValueError, r"low: expected 1 element, .* \(2,\)"),
    "high_size": ({"high": torch.ones(0)}, ValueError, r"high: expected 1 element, .* \(0,\)"),
    "high_meta": (
        {"high": torch.ones((), device="meta")},
        ValueError,
        "high: expected a tensor on cpu .*, got one on meta",
    ),
    "bits_low": ({"num_bits": -1}, ValueError, r"num_bits: expected an integer in \[0, 32\], got"),
    "bits_high": ({"num_bits": 33}, ValueError, r"num_bits: expected an integer .* got 33"),
    "bits_float": ({"num_bits": 8.0}, TypeError, "num_bits: expected an integer, got float"),
    "unsigned": ({"num_bits": 8, "unsigned": "no"}, TypeError, "unsigned: expected a bool, got"),
    "narrow": ({"narrow_range": "no"}, TypeError, "narrow_range: expected a bool, got str"),
}
# which are values, and looked at on the CPU
VALUES_REJECTED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "low_nan": ({"low": torch.tensor(torch.nan)}, ValueError, rf"{_BOUNDS} numbers, got nan and 1"),
    "high_nan": ({"high": torch.tensor(torch.nan)}, ValueError, rf"{_BOUNDS} numbers, .* and nan"),
    "amax": (
        {"low": torch.tensor(1.0), "high": torch.tensor(-0.5), "num_bits": 8},
        ValueError,
        rf"{_BOUNDS} max\(-low, high\) of 0 or more, got 1.0 and -0.5",
    ),
    "negative": (
        {"num_bits": 8, "unsigned": True},
        TypeError,
        "x: expected no negative value after clipping for an unsigned grid",
    ),
}


@pytest.mark.parametrize("gradient", [None, "x", "low"])
@pytest.mark.parametrize("name", [*REJECTED, *VALUES_REJECTED])
def test_rejects(name: str, gradient: str | None) -> None:
    changed, error, match = {**REJECTED, **VALUES_REJECTED}[name]
    given = arguments(**changed)
    if gradient is not None and isinstance(given[gradient], Tensor):
        given[gradient] = given[gradient].detach().clone().requires_grad_()
    assert_rejected(ops.learnable_clip, given, error, f"^learnable_clip: {match}")


@pytest.mark.parametrize("name", [*REJECTED, *VALUES_REJECTED])
def test_kernel_rejects(backend: Backend, name: str) -> None:
    changed = {**REJECTED, **VALUES_REJECTED}[name][0]
    if not backend.cuda:
        for op in ("_learnable_clip", "_learnable_clip_mask"):
            assert_rejected(backend.op(op), arguments(**changed), Exception)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 600, 70_001])
def test_negative_value_in_an_unsigned_grid(
    backend: Backend, size: int, dtype: torch.dtype
) -> None:
    """Wherever it lies, in any thread's part; what the lower bound takes away is none."""
    bounds = bounds_of(-1.0, 2.0, backend.device)
    for at in sorted({0, size // 3, size - 1}):
        x = sample(size, dtype).abs().to(backend.device)
        backend.op("_learnable_clip")(x, *bounds, 8, True)
        x[at] = -0.25
        backend.op("_learnable_clip")(x, bounds[0].abs(), bounds[1], 8, True)
        if backend.cuda:
            assert backend.op("_learnable_clip")(x, *bounds, 8, True)[at] == 0
        else:
            with (
                threads(3),
                pytest.raises((TypeError, RuntimeError), match="x: expected no negative value"),
            ):
                backend.op("_learnable_clip")(x, *bounds, 8, True)


def test_what_cuda_does_not_look_at(backend: Backend) -> None:
    if backend.cuda:
        x = sample(50).to(backend.device)
        nan = torch.tensor(torch.nan, device=backend.device)
        low, high = bounds_of(device=backend.device)
        op = backend.op("_learnable_clip")
        assert_same(op(x, nan, high), x.clamp(max=high))
        assert op(x, low, nan, 8).isnan().all()
        assert op(x, high, low, 8).isnan().all()


def test_rejects_other_inputs(backend: Backend) -> None:
    for x, came in not_dense_real_float().values():
        expected = f"^learnable_clip: x: expected a dense tensor of float32, .*, {came}"
        assert_rejected(ops.learnable_clip, arguments(x=x), TypeError, expected)
        if not backend.cuda:
            assert_rejected(backend.op("_learnable_clip"), arguments(x=x), Exception)


@pytest.mark.parametrize(
    "changed",
    [
        {"mask": torch.zeros(2, 2, dtype=torch.uint8)},
        {"mask": torch.zeros(6, dtype=torch.uint8)},
        {"mask": torch.zeros(1, 3, dtype=torch.uint8)},
        {"mask": torch.zeros(2, 3, dtype=torch.int8)},
        {"mask": torch.zeros(3, 2, dtype=torch.uint8).t()},
        {"grad": torch.zeros(20, dtype=torch.int32)},
        {"grad": torch.zeros(40)[::2]},
    ],
)
def test_backward_rejects(backend: Backend, changed: dict[str, Tensor]) -> None:
    given = {"grad": torch.ones(20), "mask": torch.full((2, 3), 255, dtype=torch.uint8), **changed}
    if backend.device == "cpu":
        assert_rejected(backend.op("_learnable_clip_backward"), given, Exception)


def test_meta() -> None:
    x = torch.empty(4, 5, device="meta", dtype=torch.float16).t()
    low, high = (torch.empty((), device="meta").requires_grad_() for _ in range(2))
    y = ops.learnable_clip(x, low, high, 8)
    assert (y.shape, y.stride(), y.dtype) == ((5, 4), (1, 5), torch.float16)
    grads = torch.autograd.grad(y, (low, high), torch.empty_like(y))
    assert [(grad.shape, grad.dtype) for grad in grads] == [((), torch.float32)] * 2
    with pytest.raises(ValueError, match="low: expected 1 element"):
        ops.learnable_clip(x, torch.empty(3, device="meta"), high)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_compiles(grid: Grid | None, dynamic: bool) -> None:
    def call(*given: Tensor) -> Tensor:
        return ops.learnable_clip(*given, *(grid or ()))

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for shape in ((4, 6), (7, 5)) if dynamic else ((4, 6),):
        ours, theirs = (
            [t.requires_grad_() for t in (sample(shape), *bounds_of())] for _ in range(2)
        )
        y, expected = compiled(*ours), call(*theirs)
        y.square().sum().backward()
        expected.square().sum().backward()
        assert_same(y, expected)
        for one, other in zip(ours, theirs, strict=True):
            assert one.grad is not None
            assert other.grad is not None
            assert_same(one.grad, other.grad)


@pytest.mark.parametrize("kind", ["0-d", "odd", "empty_2d", "sliced", "transposed"])
def test_opcheck(kind: str) -> None:
    x = opcheck_inputs()[kind]
    for grid in GRIDS[:2]:
        given = x, *bounds_of(), *(grid or ())
        opcheck("_learnable_clip", *given)
        opcheck("_learnable_clip_mask", *given)
        leaves = [t.clone().requires_grad_() for t in (x, *bounds_of())]
        opcheck("learnable_clip", *leaves, *(grid or ()))
    grad = x.contiguous()
    mask = torch.full((2, (grad.numel() + 7) // 8), 0b10110101, dtype=torch.uint8)
    opcheck("_learnable_clip_backward", grad, mask)


@properties
@given(value_lists(1e4), st.floats(-1e3, 1e3, width=32), st.floats(0, 1e3, width=32))
def test_properties(values: list[float], low: float, length: float) -> None:
    """Within the bounds, what was so stays; each gradient goes to one place."""
    x = torch.tensor(values).requires_grad_()
    bounds = [bound.requires_grad_() for bound in bounds_of(low, low + length)]
    y = ops.learnable_clip(x, *bounds)
    assert_same(y, torch.clamp(x, *bounds))
    y.sum().backward()
    assert all(t.grad is not None for t in (x, *bounds))
    total = sum(float(t.grad.sum()) for t in (x, *bounds) if t.grad is not None)
    assert total == len(values) or float(bounds[0].detach()) == float(bounds[1].detach())

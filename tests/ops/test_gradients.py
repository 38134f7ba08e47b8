"""Gradients of everything differentiable: those of torch, and a second refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import Backend
from torch import Tensor

import pyobserver as po
from pyobserver import ops

from .cases import DTYPES, assert_same, threads
from .differentiable import (
    CASES,
    GRADS,
    GRID,
    HIGH,
    LOW,
    SHAPE,
    STEP,
    VIEWS,
    each_case,
    each_straight,
    grads,
    values,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_case
def test_gradient_is_that_of_torch(backend: Backend, name: str, dtype: torch.dtype) -> None:
    """Every bit: at the ends of the grid, of NaN, and of gradients that are not finite."""
    case = CASES[name]
    call = case.make(backend.device)
    for layout, view in VIEWS.items():
        x = view(values(dtype))
        ours = view(values(dtype).to(backend.device)).detach().requires_grad_()
        y = call(ours)
        for weights, weigh in VIEWS.items():
            grad = weigh(grads(dtype).to(backend.device))
            (found,) = torch.autograd.grad(y, ours, grad, retain_graph=True)
            expected = case.gradient(x, weigh(grads(dtype)))
            assert_same(found, expected, (layout, weights))


@each_case
def test_shapes(backend: Backend, name: str) -> None:
    case = CASES[name]
    if not case.any_shape:
        pytest.skip("one shape")
    call = case.make(backend.device)
    base = values().reshape(2, 3, 2, 2)
    for x in (
        torch.tensor(0.3),
        torch.tensor(HIGH + STEP),
        torch.empty(0),
        torch.empty(2, 0, 3),
        base.contiguous(memory_format=torch.channels_last),
        values().reshape(24)[::5],
    ):
        ours = x.to(backend.device).detach().requires_grad_()
        grad = torch.full(x.shape, -2.0)
        found = torch.autograd.grad(call(ours), ours, grad.to(backend.device))[0]
        assert_same(found, case.gradient(x, grad), x.shape)
    x = values().to(backend.device).requires_grad_()
    call(x).sum().backward()
    assert_same(x.grad, case.gradient(values(), torch.ones(SHAPE)))


@each_case
def test_a_graph_that_is_kept(backend: Backend, name: str) -> None:
    """The same again; after the graph was freed torch's own error."""
    case = CASES[name]
    x = values().to(backend.device).requires_grad_()
    y = case.make(backend.device)(x)
    grad = grads().to(backend.device)
    expected = case.gradient(values(), grads())
    for keep in (True, True, False):
        assert_same(torch.autograd.grad(y, x, grad, retain_graph=keep)[0], expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, x, grad)


@each_case
def test_x_changes_after_the_call(backend: Backend, name: str) -> None:
    """Of no matter where the mask is kept; where x itself is, torch says so."""
    case = CASES[name]
    leaf = values().to(backend.device).requires_grad_()
    x = leaf * 1
    y = case.make(backend.device)(x)
    x.add_(1)
    grad = grads().to(backend.device)
    if name == "learnable":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(y, leaf, grad)
    else:
        found = torch.autograd.grad(y, leaf, grad)[0]
        assert_same(found, case.gradient(values(), grads()))


@each_case
def test_hooks_of_saved_tensors(backend: Backend, name: str) -> None:
    """One bit an element where that is enough; moved away and back, the gradient is the same."""
    case = CASES[name]
    call = case.make(backend.device)
    kept: list[tuple[torch.dtype, int]] = []

    def pack(t: Tensor) -> Any:
        kept.append((t.dtype, t.numel()))
        return t.cpu().numpy()

    def unpack(packed: Any) -> Tensor:
        return torch.from_numpy(packed).to(backend.device)

    grad = grads().to(backend.device)
    expected = case.gradient(values(), grads())
    for hooks in (
        torch.autograd.graph.saved_tensors_hooks(pack, unpack),
        torch.autograd.graph.save_on_cpu(),
    ):
        x = values().to(backend.device).requires_grad_()
        with hooks:
            y = call(x * 1)
        assert_same(torch.autograd.grad(y, x, grad)[0], expected)
    assert [(dtype, n) for dtype, n in kept if n > 0][-len(case.kept) :] == case.kept


@each_case
def test_twice(backend: Backend, name: str) -> None:
    """Refused by name, however it is asked for; the first gradient may be used."""
    case = CASES[name]
    call = case.make(backend.device)
    x = values().to(backend.device).nan_to_num_(0.5, 1.0, -1.0).requires_grad_()
    (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    y = call(x.detach())
    assert_same(first, case.gradient(x.detach().cpu(), 2 * y.cpu()))
    match = f"{case.name}.*: its gradient was differentiated"
    with pytest.raises(RuntimeError, match=match):
        torch.autograd.grad(first.sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match=match):
        torch.autograd.grad(first.sum(), x, allow_unused=True, retain_graph=True)
    with pytest.raises(RuntimeError, match=match):
        first.sum().backward()
    with pytest.raises(RuntimeError, match=match):
        torch.autograd.functional.hessian(lambda x: call(x).square().sum(), x.detach())


@each_straight
def test_the_rest_twice(backend: Backend, name: str) -> None:
    """A second derivative that does not pass through the function."""
    x = values().to(backend.device).nan_to_num_(0.5, 1.0, -1.0).requires_grad_()
    loss = CASES[name].make(backend.device)(x).sum() + (x**3).sum()
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    assert_same(torch.autograd.grad(first.sum(), x)[0], 6 * x.detach())


def test_what_was_saved_twice() -> None:
    """The gradient of a scale depends on x, whatever gradient came."""
    given = [torch.tensor([0.3, -1.1]), torch.tensor([STEP]), torch.zeros(1)]
    given = [t.requires_grad_() for t in given]
    y = ops.learnable_fake_quantize(*given, *GRID)
    (first,) = torch.autograd.grad(y.sum(), given[1], create_graph=True)
    with pytest.raises(RuntimeError, match="learnable_fake_quantize: its gradient"):
        torch.autograd.grad(first.sum(), given[0])


def with_gradient(surrogate: Tensor, y: Tensor) -> Tensor:
    """The values of a surrogate with the gradient of y."""
    return surrogate.detach() + (y - y.detach())


def away_from_kinks() -> Tensor:
    """On both sides of the grid's ends, none of them within a step's quarter."""
    return torch.tensor([-3.0, -2.4, -1.6, -0.6, 0.0, 0.3, 1.1, 1.4, 2.2, 5.0], dtype=torch.float64)


@pytest.mark.parametrize("name", ["fake_quantize", "FakeQuantize", "Fused", "fake_tensor_quant"])
def test_is_the_gradient_of_a_clamp(backend: Backend, name: str) -> None:
    call = CASES[name].make(backend.device)

    def surrogate(x: Tensor) -> Tensor:
        return with_gradient(x.clamp(LOW, HIGH), call(x))

    x = away_from_kinks().to(backend.device).requires_grad_()
    assert torch.autograd.gradcheck(surrogate, (x,))


@pytest.mark.parametrize("options", [{}, {"axis": 0}, {"block_size": (1, 5)}], ids=str)
def test_learnable_is_the_gradient_of_its_surrogate(
    backend: Backend, options: dict[str, Any]
) -> None:
    """Inside the error of rounding, in steps, is a constant; outside the values are exact."""
    x = away_from_kinks().reshape(2, 5).to(backend.device)
    shape = {"axis": (2,), "block_size": (2, 1)}.get(next(iter(options), ""), (1,))
    scale = torch.full(shape, STEP, dtype=torch.float64, device=backend.device)
    zero_point = torch.ones(shape, dtype=torch.float64, device=backend.device)
    steps = (x / STEP).round() + 1
    rounding = (x / STEP).round() - x / STEP
    column = (-1, 1) if options else (1,)

    def surrogate(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        y = ops.learnable_fake_quantize(x, scale.float(), zero_point.float(), *GRID, **options)
        scale, zero_point = scale.reshape(column), zero_point.reshape(column)
        below, above = ((end - zero_point) * scale for end in GRID)
        smooth = torch.where(steps > GRID[1], above, x + scale * rounding)
        return with_gradient(torch.where(steps < GRID[0], below, smooth), y)

    given = [t.requires_grad_() for t in (x, scale, zero_point)]
    assert torch.autograd.gradcheck(surrogate, given, atol=1e-5, rtol=1e-5)


def test_clip_is_differentiable() -> None:
    """Away from its bounds; they are float32, so the differences are taken over a wide step."""
    clip = po.tensor_quant.Clip(LOW, HIGH)

    def call(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        bounds = {"clip_value_min": low.float(), "clip_value_max": high.float()}
        return torch.func.functional_call(clip, bounds, (x,))

    bounds = torch.tensor([LOW, HIGH], dtype=torch.float64)
    given = [t.clone().requires_grad_() for t in (away_from_kinks(), *bounds)]
    assert torch.autograd.gradcheck(call, given, eps=2**-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["_fake_quantize_backward", "_tensor_quant_backward"])
def test_backward_in_place(backend: Backend, op: str, dtype: torch.dtype) -> None:
    """Of more elements than a thread has, at an odd place in memory too."""
    count = 70_001
    generator = torch.Generator().manual_seed(1)
    mask = torch.randint(0, 256, ((count + 7) // 8,), generator=generator, dtype=torch.uint8)
    mask = mask.to(backend.device)
    drawn = torch.randn(count + 1, generator=generator).to(dtype)
    drawn[:11] = torch.tensor(GRADS, dtype=torch.float64).to(dtype)
    for grad in (drawn[:-1], drawn[1:]):
        grad = grad.to(backend.device)
        expected = backend.op(op)(grad, mask)
        with threads(2):
            assert backend.op(f"{op}_")(grad, mask) is None
        assert_same(grad, expected)


@pytest.mark.parametrize("op", ["_fake_quantize_backward", "_tensor_quant_backward"])
def test_backward_in_place_rejects(backend: Backend, op: str) -> None:
    for grad, mask in (
        (torch.ones(9), torch.zeros(1, dtype=torch.uint8)),
        (torch.ones(9)[::2], torch.zeros(1, dtype=torch.uint8)),
        (torch.ones(9), torch.zeros(2)),
    ):
        before = grad.clone()
        with pytest.raises((RuntimeError, ValueError, TypeError), match=op.removeprefix("_")):
            backend.op(f"{op}_")(grad.to(backend.device), mask.to(backend.device))
        assert_same(grad, before)


def clipped(x: Tensor, high: int) -> Tensor:
    """On the integers up to one of them."""
    return ops.fake_quantize(x, torch.ones(1), torch.zeros(1, dtype=torch.int32), -high, high)


def test_gradient_that_somebody_else_holds_is_kept() -> None:
    """Only one of its own becomes the result in place."""
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    first, second = (torch.tensor([-3.0, -1.0, 1.0, 3.0]).requires_grad_() for _ in range(2))
    y = clipped(first, 2)
    given = weights.clone()
    y.backward(given, retain_graph=True)
    assert_same(given, weights)

    y.retain_grad()
    seen: list[Tensor] = []
    y.register_hook(seen.append)
    ((y + clipped(second, 1)) * weights).sum().backward()  # one gradient for both
    assert_same(y.grad, weights)
    assert_same(seen[0], weights)
    assert_same(first.grad, torch.tensor([0.0, 4.0, 6.0, 0.0]))
    assert_same(second.grad, torch.tensor([0.0, 2.0, 3.0, 0.0]))

    z = clipped(first, 2)
    both = torch.autograd.grad((z * weights).sum(), [z, first])
    assert_same(both[0], weights)
    assert_same(both[1], torch.tensor([0.0, 2.0, 3.0, 0.0]))


@pytest.mark.skipif(po.native_status.autograd is None, reason="Python holds a gradient itself")
def test_gradient_of_its_own_becomes_the_result() -> None:
    x = torch.randn(100, requires_grad=True)
    y = clipped(x, 2)
    with torch.autograd.profiler.profile(use_kineto=False) as profile:
        (y * 2).sum().backward()
    names = [event.name for event in profile.function_events]
    assert "pyobserver::_fake_quantize_backward_" in names
    assert "pyobserver::_fake_quantize_backward" not in names

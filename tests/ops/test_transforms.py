"""torch.func, forward mode and torch.vmap over everything differentiable, and over observers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import Backend
from torch import Tensor, nn
from torch.autograd import forward_ad

import pyobserver as po
from pyobserver import ops
from pyobserver.tensor_quant import QuantDescriptor, TensorQuantizer

from .cases import any_isa, assert_all_same, assert_same, unchanged
from .differentiable import (
    CASES,
    CHANNEL_STEPS,
    EDGES,
    GRID,
    STEP,
    VIEWS,
    Call,
    each_case,
    grads,
    grid_tensors,
    values,
)

LANES = torch.tensor(EDGES, dtype=torch.float32).nan_to_num(0.7).clamp(-9, 9)[:20].reshape(4, 5)


def forward_mode(call: Call, x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = call(forward_ad.make_dual(x, tangent))
        return forward_ad.unpack_dual(y).tangent


def batched_grads(call: Call, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    rows = torch.eye(x.numel(), device=x.device).reshape(-1, *x.shape)
    return torch.autograd.grad(call(x), x, rows, is_grads_batched=True)[0]


REVERSE: dict[str, Callable[[Call, Tensor, Tensor], Tensor]] = {
    "grad": lambda f, x, t: torch.func.grad(lambda x: (f(x) * t).sum())(x),
    "vjp": lambda f, x, t: torch.func.vjp(f, x)[1](t)[0],
    "jacrev": lambda f, x, t: torch.func.jacrev(f)(x).T @ t,
    "batched_grads": lambda f, x, t: batched_grads(f, x).T @ t,
}
FORWARD: dict[str, Callable[[Call, Tensor, Tensor], Tensor]] = {
    "forward_ad": forward_mode,
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
    "jacfwd": lambda f, x, t: torch.func.jacfwd(f)(x) @ t,
}


SECOND: dict[str, Callable[[Call, Tensor], Tensor]] = {
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x),
    "jacrev_of_jacrev": lambda f, x: torch.func.jacrev(
        torch.func.jacrev(lambda x: f(x).square().sum())
    )(x),
}
each_of_any_shape = pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.any_shape]
)


@any_isa
@each_of_any_shape
def test_transforms(backend: Backend, name: str) -> None:
    """Reverse and forward; forward mode is refused where there is none."""
    case = CASES[name]
    call = case.make(backend.device)
    x, tangent = LANES[0].to(backend.device), torch.arange(1.0, 6.0, device=backend.device)
    expected = case.gradient(LANES[0], tangent.cpu())
    for way, transform in REVERSE.items():
        assert_same(transform(call, x, tangent) + 0.0, expected + 0.0, way)
    for way, transform in FORWARD.items():
        if name == "learnable":
            with pytest.raises(NotImplementedError, match=r"^learnable_fake_quantize: .*vjp"):
                transform(call, x, tangent)
        else:
            assert_same(transform(call, x, tangent) + 0.0, expected + 0.0, way)


@any_isa
@each_case
def test_transforms_to_the_bit(backend: Backend, name: str) -> None:
    """Of whatever values, gradients and layouts."""
    case = CASES[name]
    call = case.make(backend.device)
    for layout, view in VIEWS.items():
        x, grad = view(values()), view(grads())
        expected = case.gradient(x, grad)
        ours, weights = (t.to(backend.device) for t in (x, grad))
        assert_same(torch.func.vjp(call, ours)[1](weights)[0], expected, layout)
        if name != "learnable":
            assert_same(torch.func.jvp(call, (ours,), (weights,))[1], expected, layout)


@any_isa
@each_of_any_shape
def test_second_order_transforms(backend: Backend, name: str) -> None:
    """torch's own has the same: that of ``(inside * x)^2``."""
    case = CASES[name]
    call = case.make(backend.device)
    expected = torch.diag(2 * case.gradient(LANES[0], torch.ones(5)))
    for transform in SECOND.values():
        if name == "learnable":
            with pytest.raises(RuntimeError, match=r"^learnable_fake_quantize: "):
                transform(call, LANES[0].to(backend.device))
        else:
            assert_same(transform(call, LANES[0].to(backend.device)) + 0.0, expected + 0.0)


@any_isa
@each_of_any_shape
def test_vmap(backend: Backend, name: str) -> None:
    """The lanes' own results and gradients, in any nesting; a state is for no lanes."""
    case = CASES[name]
    call = case.make(backend.device)
    x = LANES.to(backend.device)
    vmap, grad = torch.func.vmap, torch.func.grad
    ways: list[tuple[Callable[[], Tensor], bool]] = [
        (lambda: vmap(call)(x), False),
        (lambda: vmap(call, in_dims=1, out_dims=1)(x), False),
        (lambda: vmap(vmap(call))(x), False),
        (lambda: vmap(grad(lambda x: call(x).sum()))(x), True),
        (lambda: grad(lambda x: vmap(call)(x).sum())(x), True),
        (lambda: vmap(grad(lambda x: vmap(call)(x).sum()))(x), True),
    ]
    leaf = LANES.to(backend.device).requires_grad_()
    ways.append((lambda: torch.autograd.grad(vmap(call)(leaf).sum(), leaf)[0], True))
    if case.updates == "histogram" and backend.name == "cuda-on-host":
        pytest.skip("its ops are of another library, which has no rules")
    if case.updates:
        state = call.buffers() if isinstance(call, nn.Module) else ()
        with unchanged(*state):
            for way, _ in ways:
                with pytest.raises(ValueError, match=f"^{case.updates}: .*outside of torch.vmap"):
                    way()
        return
    y, gradient = call(x), case.gradient(LANES, torch.ones(4, 5))
    for i, (way, is_gradient) in enumerate(ways):
        assert_same(way(), gradient if is_gradient else y, i)


def in_lanes(call: Callable[..., Tensor], dims: tuple[int | None, ...], *args: Any) -> Tensor:
    count = next(t.shape[d] for t, d in zip(args, dims, strict=True) if d is not None)
    lanes = [
        [t if d is None else t.select(d, i).contiguous() for t, d in zip(args, dims, strict=True)]
        for i in range(count)
    ]
    return torch.stack([call(*each) for each in lanes])


@any_isa
@pytest.mark.parametrize("options", [{"axis": 0}, {"axis": 1}, {"axis": -1}, {"axis": -2}], ids=str)
def test_vmap_of_channels(backend: Backend, options: dict[str, int]) -> None:
    """An axis is one of a lane, wherever the batch lies; scales may have one too."""
    batch = LANES.reshape(2, 5, 2).to(backend.device)
    channels = (5, 2)[options["axis"]]
    steps = (torch.arange(1, channels + 1) * STEP).to(backend.device)
    zero = torch.zeros(channels, dtype=torch.int32, device=backend.device)

    def call(x: Tensor, steps: Tensor, zero: Tensor) -> Tensor:
        return ops.fake_quantize(x, steps, zero, *GRID, **options)

    def gradient(x: Tensor, steps: Tensor, zero: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(call(x, steps, zero).square().sum(), x)[0]

    of_lane = torch.func.grad(lambda *args: call(*args).square().sum())
    two_steps = torch.stack([steps, 2 * steps], 1)
    for dim in range(3):
        x = batch.movedim(0, dim)
        for args, dims in (
            ((x, steps, zero), (dim, None, None)),
            ((x, two_steps, zero), (dim, 1, None)),
            ((batch[0], two_steps, zero), (None, 1, None)),
        ):
            assert_same(torch.func.vmap(call, dims)(*args), in_lanes(call, dims, *args), dims)
            found = torch.func.vmap(of_lane, dims)(*args)
            assert_same(found, in_lanes(gradient, dims, *args), dims)


@any_isa
def test_vmap_of_blocks(backend: Backend) -> None:
    call = CASES["fake_quantize_blocks"].make(backend.device)
    x = values().nan_to_num(0.5, 1.0, -1.0).to(backend.device)
    batch = torch.stack([x, 2 * x, -x], 1)
    assert_same(torch.func.vmap(call, 1)(batch), in_lanes(call, (1,), batch))


def test_vmap_takes_no_axis_of_the_batch() -> None:
    x, (scale, zero_point) = torch.zeros(3, 5), grid_tensors("cpu", CHANNEL_STEPS)
    for axis in (1, -2):
        with pytest.raises(ValueError, match=r"^fake_quantize: axis: expected .* for a 1-d tensor"):
            torch.func.vmap(lambda x, a=axis: ops.fake_quantize(x, scale, zero_point, *GRID, a))(x)


def test_transforms_of_a_scale() -> None:
    """It has no gradient: zero, as where nothing depends on it."""
    scale, zero_point = grid_tensors("cpu")

    def call(scale: Tensor) -> Tensor:
        return ops.fake_quantize(LANES, scale, zero_point, *GRID).sum()

    assert torch.func.grad(call)(scale).tolist() == [0]
    assert torch.func.jvp(call, (scale,), (torch.ones(1),))[1].item() == 0
    tangent = forward_mode(call, scale, torch.ones(1))
    assert tangent is None or tangent.item() == 0


@any_isa
def test_transforms_of_learned_scales(backend: Backend) -> None:
    """All three gradients, with their factor, of the batch and of each lane."""
    given = [t.to(backend.device) for t in (LANES, torch.tensor([STEP]), torch.ones(1))]

    def loss(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        y = ops.learnable_fake_quantize(x, scale, zero_point, *GRID, grad_factor=0.5)
        return y.square().sum()

    def gradients(*given: Tensor) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in given]
        return torch.autograd.grad(loss(*leaves), leaves)

    transform = torch.func.grad(loss, argnums=(0, 1, 2))
    assert_all_same(transform(*given), gradients(*given))
    found = torch.func.vmap(transform, (0, None, None))(*given)
    lanes = [gradients(x, *given[1:]) for x in given[0]]
    assert_all_same(found, [torch.stack(each) for each in zip(*lanes, strict=True)])
    scales = torch.stack([given[1], 2 * given[1]], 1)
    found = torch.func.vmap(transform, (None, 1, None))(given[0], scales, given[2])
    lanes = [gradients(given[0], scale, given[2]) for scale in scales.T]
    assert_all_same(found, [torch.stack(each) for each in zip(*lanes, strict=True)])


OBSERVERS: dict[str, Callable[[], nn.Module]] = {
    "minmax": po.MovingAverageMinMaxObserver,
    "histogram": po.HistogramObserver,
    "log_histogram": po.LogHistogramObserver,
}


@pytest.mark.parametrize("name", OBSERVERS)
def test_observers(name: str) -> None:
    """They observe within a transform, but no lanes."""
    eager, observer = OBSERVERS[name](), OBSERVERS[name]()
    eager(LANES)
    with unchanged(*observer.buffers()), pytest.raises(ValueError, match=f"^{name}: .*torch.vmap"):
        torch.func.vmap(observer)(LANES)
    assert_same(torch.func.grad(lambda x: observer(x).sum())(LANES), torch.ones(4, 5))
    assert_all_same(list(observer.buffers()), list(eager.buffers()))


@pytest.mark.parametrize(
    "make",
    [
        po.FakeQuantize,
        po.FusedMovingAvgObsFakeQuantize,
        lambda: po.FakeQuantize(po.HistogramObserver, bins=32),
        lambda: po.FakeQuantize(po.LogHistogramObserver),
        lambda: TensorQuantizer(QuantDescriptor(4)),
    ],
)
def test_functional_call(make: Callable[[], nn.Module]) -> None:
    """The gradients of a model's parameters; its statistics are updated once."""

    def made() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 4), make(), nn.Linear(4, 2))

    eager, model = made(), made()
    for x in (LANES, 2 * LANES):
        eager.zero_grad()
        eager(x).square().sum().backward()

        def loss(params: dict[str, Tensor], x: Tensor = x) -> Tensor:
            return torch.func.functional_call(model, params, (x,)).square().sum()

        params = {name: p.detach() for name, p in model.named_parameters()}
        found = torch.func.grad(loss)(params)
        for name, parameter in eager.named_parameters():
            assert_same(found[name], parameter.grad, name)
        assert_all_same(list(model.buffers()), list(eager.buffers()))


@pytest.mark.parametrize("name", ["fake_quantize", "learnable"])
def test_compiled_transforms(name: str) -> None:
    """Refused where torch.compile would give zeros; left out of it they work."""
    call = CASES[name].make("cpu")

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: call(x).square().sum())(x)

    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"expected no transform of torch.func .* torch.compile"):
        torch.compile(gradient, backend="eager", fullgraph=True)(LANES)
    torch._dynamo.reset()
    outside = torch.compiler.disable(gradient)
    assert_same(torch.compile(lambda x: outside(x) * 1, backend="eager")(LANES), gradient(LANES))
    torch._dynamo.reset()


def test_refusals_keep_the_names_of_arguments() -> None:
    """What is wrong is said within a transform as outside of it."""
    scale, zero_point = grid_tensors("cpu")
    for transform in (torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())):
        with pytest.raises(TypeError, match=r"^fake_quantize: scale: expected torch.float32"):
            transform(lambda x: ops.fake_quantize(x, scale.double(), zero_point, *GRID))(LANES)
        with pytest.raises(ValueError, match=r"^fake_quantize: scale: expected positive"):
            transform(lambda x: ops.fake_quantize(x, scale * 0, zero_point, *GRID))(LANES)

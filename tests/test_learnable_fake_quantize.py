from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from ops.cases import DTYPES, assert_all_same, assert_rejected, assert_same, sample, unchanged
from torch import Tensor, nn
from torch.ao import quantization as ao
from torch.ao.quantization._learnable_fake_quantize import _LearnableFakeQuantize

import pyobserver as po

Module = po.LearnableFakeQuantize
INT4 = {"dtype": torch.qint8, "quant_min": -8, "quant_max": 7}
SYMMETRIC = {**INT4, "qscheme": torch.per_tensor_symmetric}
ROWS = {**INT4, "qscheme": torch.per_channel_symmetric, "ch_axis": 0}
COLUMNS = {**INT4, "qscheme": torch.per_channel_affine, "ch_axis": 1}
SHAPE = (6, 16)
CHANNELS = po.MovingAveragePerChannelMinMaxObserver
BLOCKS = po.PerBlockMinMaxObserver
# what a first tensor of SHAPE sizes, or what is told
UNSIZED: dict[str, Callable[..., Any]] = {
    "affine": lambda **more: Module(**more),
    "symmetric": lambda **more: Module(**SYMMETRIC, **more),
    "unsigned_symmetric": lambda **more: Module(
        po.MinMaxObserver, dtype=torch.quint8, qscheme=torch.per_tensor_symmetric, **more
    ),
    "histogram": lambda **more: Module(po.HistogramObserver, bins=64, **more),
    "rows": lambda **more: Module(CHANNELS, **ROWS, **more),
    "columns": lambda **more: Module(CHANNELS, **COLUMNS, **more),
    "columns_log": lambda **more: Module(
        po.PerChannelLogHistogramObserver, mantissa_bits=2, **COLUMNS, **more
    ),
    "groups": lambda **more: Module(BLOCKS, block_size=4, **SYMMETRIC, **more),
    "blocks": lambda **more: Module(BLOCKS, block_size=(3, 8), **INT4, **more),
}
TOLD: dict[str, dict[str, Any]] = {
    "rows": {"num_channels": 6},
    "columns": {"num_channels": 16},
    "columns_log": {"num_channels": 16},
    "groups": {"shape": SHAPE},
    "blocks": {"shape": SHAPE},
}
GRIDS = {"rows": (6,), "columns": (16,), "columns_log": (16,), "groups": (6, 4), "blocks": (2, 2)}
EACH = pytest.mark.parametrize("name", UNSIZED)


def make(name: str, **more: Any) -> Any:
    return UNSIZED[name](**TOLD.get(name, {}), **more)


def batch(seed: int = 0) -> Tensor:
    return sample(SHAPE, seed=seed)


def learning(name: str, **more: Any) -> Any:
    module = make(name, **more)
    module(batch())
    return module.enable_param_learning()


def step(module: Any, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of a weighted sum of it."""
    x = x.clone().requires_grad_()
    y = module(x)
    parameters = dict(module.named_parameters())
    weight = sample(tuple(x.shape), seed=9).to(y.dtype)
    grads = torch.autograd.grad((y * weight).sum(), [x, *parameters.values()])
    return {"y": y.detach(), **dict(zip(["x", *parameters], grads, strict=True))}


def assert_same_step(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert_same(found[name], value, name)


def of_paper(
    x: Tensor, scale: Tensor, zero_point: Tensor, grid: tuple[int, int], n: int, steps: int
) -> Tensor:
    """LSQ's and LSQ+'s pseudo-code, in float64: ``detach`` stops a gradient."""

    def grad_scale(t: Tensor, factor: float) -> Tensor:
        return (t - t * factor).detach() + t * factor

    def round_pass(t: Tensor) -> Tensor:
        return (t.round() - t).detach() + t

    factor = 1 / math.sqrt(n * steps)
    s, z = grad_scale(scale, factor), round_pass(grad_scale(zero_point, factor))
    q = (round_pass(x / s) + z).clamp(*grid)
    return (q - z) * s


@pytest.mark.parametrize("kind", ["elements", "features"])
@pytest.mark.parametrize("name", ["affine", "symmetric", "unsigned_symmetric", "rows", "columns"])
def test_is_lsq(name: str, kind: str) -> None:
    """The gradients of the papers; n: all elements of a scale, or those of a sample."""
    module = learning(name, grad_factor=kind)
    x = batch(1) * 1.3
    found = step(module, x)
    grid = module.quant_min, module.quant_max
    counts = {"rows": (16, 16), "columns": (6, 1)}
    n = counts.get(name, (96, 16))[kind == "features"]
    steps = {"unsigned_symmetric": 255 - 128}.get(name, module.quant_max)
    leaves = [t.detach().double().requires_grad_() for t in (x, module.scale, module.zero_point)]
    shape = {"rows": (-1, 1)}.get(name, (1, -1))
    y = of_paper(leaves[0], *(t.reshape(shape) for t in leaves[1:]), grid, n, steps)
    weight = sample(SHAPE, seed=9).double()
    grads = torch.autograd.grad((y * weight).sum(), leaves)
    expected = dict(zip(["x", "scale", "zero_point"], grads, strict=True))
    torch.testing.assert_close(found["y"], y.float(), rtol=1e-6, atol=1e-6)
    for key in set(found) - {"y"}:
        torch.testing.assert_close(found[key].double(), expected[key], rtol=1e-5, atol=1e-5)
    assert ("zero_point" in found) == (not module.is_symmetric_quant)


@pytest.mark.parametrize("name", ["affine", "symmetric", "rows", "columns"])
def test_gradients_are_those_of_torch(name: str) -> None:
    module = learning(name, grad_factor=0.25)
    x = batch(1) * 1.3
    found = step(module, x)
    leaves = [t.detach().clone().requires_grad_() for t in (x, module.scale, module.zero_point)]
    grid = module.quant_min, module.quant_max
    if module.is_per_channel:
        call = torch._fake_quantize_learnable_per_channel_affine
        y = call(*leaves, module.ch_axis, *grid, 0.25)
    else:
        y = torch._fake_quantize_learnable_per_tensor_affine(*leaves, *grid, 0.25)
    (y * sample(SHAPE, seed=9)).sum().backward()
    assert_same(found["y"], y)
    assert_same(found["x"], leaves[0].grad)
    for leaf, key in zip(leaves[1:], ("scale", "zero_point"), strict=True):
        if key in found:
            torch.testing.assert_close(found[key], leaf.grad, rtol=1e-5, atol=1e-5)


def test_trains_as_that_of_torch() -> None:
    """Calibration, then SGD; torch's gradient scale per tensor is LSQ's."""
    ours = Module(po.MinMaxObserver, 0, 255)
    theirs = _LearnableFakeQuantize(ao.MinMaxObserver, 0, 255, use_grad_scaling=True)
    losses = []
    for module in (ours, theirs):
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
        module.enable_static_estimate()
        for i in range(2):
            module(batch(i))
        module.enable_param_learning()
        losses.append([])
        for i in range(10):
            optimizer.zero_grad()
            loss = (module(batch(i) * 1.5) - batch(i) * 1.5).square().sum()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] != losses[0][0]
    for one, other in zip(ours.calculate_qparams(), theirs.calculate_qparams(), strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-5, atol=0)


@EACH
def test_calibrates_then_learns(name: str) -> None:
    """With the observer on it is FakeQuantize, and nothing is learned; then the optimizer's."""
    module = UNSIZED[name]()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    held = list(module.parameters())
    fixed = None if isinstance(module.zero_point, nn.Parameter) else module.zero_point
    observer = copy.deepcopy(module.activation_post_process)
    for i in range(3):
        found = step(module, batch(i))
        observer(batch(i))
        scale, zero_point = observer.calculate_qparams()
        assert_same(module.scale, scale)
        assert_same(module.zero_point, zero_point.float())
        expected = po.ops.fake_quantize(
            batch(i), scale, zero_point, module.quant_min, module.quant_max,
            module._axis, None, module.block_size,
        )  # fmt: skip
        assert_same(found["y"], expected)
        assert all(not found[key].any() for key in set(found) - {"x", "y"})
        module(batch(i)).sum().backward()
        optimizer.step()
        observer(batch(i))
    assert module.scale.shape == GRIDS.get(name, (1,))
    # the same objects, the optimizer's
    assert all(a is b for a, b in zip(module.parameters(), held, strict=True))
    assert (fixed is None) == ("zero_point" in module._parameters)

    module.apply(po.disable_observer)
    before = copy.deepcopy(module.state_dict())
    for i in range(3):
        optimizer.zero_grad()
        (module(batch(i) * 2) - batch(i)).square().sum().backward()
        optimizer.step()
    for key, value in module.state_dict().items():
        same = torch.equal(value, before[key])
        assert same != (key in dict(module.named_parameters())), key


@EACH
def test_learns_from_the_first_tensor_on(name: str) -> None:
    """Without an estimate the scale starts at 1, of the size that the tensor asks for."""
    module = UNSIZED[name]().enable_param_learning()
    found = step(module, batch())
    assert found["scale"].shape == module.scale.shape == GRIDS.get(name, (1,))
    assert found["scale"].any()
    assert_same(module.scale, torch.ones(GRIDS.get(name, (1,))))
    assert (module.zero_point == (module.symmetric_zero_point or 0)).all()


def test_learns_the_better_scale() -> None:
    """From one four times too large; that of the least error is not what LSQ's gradient seeks."""
    x = sample((64, 256))
    best = po.LearnableFakeQuantize(po.MSEObserver, **SYMMETRIC)
    best(x)
    module = Module(**SYMMETRIC).initialize_from((best.scale * 4, torch.zeros(1)))
    module.scale.requires_grad_()
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-2)

    def error(of: Any) -> float:
        return (of(x) - x).square().mean().item()

    first = error(module)
    for _ in range(150):
        optimizer.zero_grad()
        (module(x) - x).square().sum().backward()
        optimizer.step()
    assert error(best) <= error(module) * 1.001 < first / 4


@EACH
def test_a_bad_step_is_no_error(name: str) -> None:
    """The scale used is positive and finite; it may be learned back. NaN makes NaN."""
    module = learning(name)
    x = batch(1)
    for bad in (0.0, -3.0, 1e-30, torch.inf):
        with torch.no_grad():
            module.scale.fill_(bad)
        found = step(module, x)
        scale, zero_point = module.calculate_qparams()
        assert (scale >= module.least_scale).all()
        assert scale.isfinite().all()
        assert ((zero_point >= module.quant_min) & (zero_point <= module.quant_max)).all()
        if bad < 1:
            assert all(t.isfinite().all() for t in found.values())
            assert found["scale"].any()
    with torch.no_grad():
        module.scale.fill_(torch.nan)
    assert module(x).isnan().all()


def test_a_scale_below_the_least_one_is_learned_back() -> None:
    module = learning("symmetric")
    with torch.no_grad():
        module.scale.fill_(-0.01)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        (module(batch()) - batch()).square().sum().backward()
        optimizer.step()
    assert module.scale.item() > 0.05


def test_zero_points_are_those_of_the_grid() -> None:
    module = learning("affine")
    for value, expected in ((-4.0, 0), (300.0, 255), (7.5, 8), (6.5, 6)):
        with torch.no_grad():
            module.zero_point.fill_(value)
        scale, zero_point = module.calculate_qparams()
        assert (zero_point.dtype, zero_point.tolist()) == (torch.int32, [expected])
        assert_same(module(batch()), po.ops.fake_quantize(batch(), scale, zero_point, 0, 255))


def test_switches() -> None:
    module = learning("affine")
    module.disable_fake_quant()
    x = batch(1)
    found = step(module, x)
    assert_same(found["y"], x)
    assert_same(found["x"], sample(SHAPE, seed=9))
    assert not found["scale"].any()
    assert not found["zero_point"].any()

    module.enable_fake_quant()
    module.activation_post_process.observe = None  # is left out
    module(x)
    del module.activation_post_process.observe
    module.enable_static_observation()
    assert not any(p.requires_grad for p in module.parameters())
    assert_same(module(x * 9), x * 9)
    module.enable_static_estimate()
    assert not any(p.requires_grad for p in module.parameters())
    observer = module.activation_post_process
    module(x)
    assert_same(module.scale, observer.calculate_qparams()[0])
    assert module.enable_param_learning() is module
    assert all(p.requires_grad for p in module.parameters())
    assert (module.observer_enabled.item(), module.fake_quant_enabled.item()) == (0, 1)
    model = nn.Sequential(make("affine"), po.FakeQuantize())
    model.apply(po.enable_param_learning)
    assert [m.observer_enabled.item() for m in model] == [0, 1]


@EACH
def test_an_observer_that_is_off_leaves_the_parameters_alone(name: str) -> None:
    """Every bit of them: a zero point between two integers too."""
    module = learning(name)
    module.enable_observer()
    module.disable_observer()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.625)
    with unchanged(module.scale.detach(), module.zero_point.detach()):
        module(batch(1))


def test_an_observer_that_was_left_out_comes_back() -> None:
    """By its switch, or by a state that has it on."""
    on = make("affine")
    on(batch())
    on = on.state_dict()
    for put_back in (lambda m: m.enable_observer(), lambda m: m.load_state_dict(on)):
        module = learning("affine")
        module.disable_observer()
        put_back(module)
        observer = module.activation_post_process
        before = observer.max_val.clone()
        module(batch(1) * 9)
        assert observer.max_val > before
        assert_same(module.scale, observer.calculate_qparams()[0])


@EACH
def test_two_forwards_before_a_backward(name: str) -> None:
    """The observer writes the scale in between: each gradient is of its own forward."""
    module, apart = make(name), make(name)
    xs = [(batch(i) * (i + 1)).requires_grad_() for i in range(2)]
    sum((module(x) * sample(SHAPE, seed=9)).sum() for x in xs).backward()
    for i, x in enumerate(xs):
        found = step(apart, batch(i) * (i + 1))
        assert_same(x.grad, found["x"])


def of_histogram() -> Any:
    observer = po.LogHistogramObserver(4, **SYMMETRIC)
    observer(batch(3) * 2)
    return observer


def calibrated() -> po.Site:
    linear = nn.Linear(16, 4)
    observer = po.LogHistogramObserver.with_args(method="mse", **SYMMETRIC)
    result = po.calibrate(linear, [batch(3) * 2], activation=observer, weight=None, progress=False)
    return result["input"]


SOURCES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "observer": lambda: (of_histogram(), {}),
    "observer_by_method": lambda: (of_histogram(), {"method": "percentile", "percentile": 0.9}),
    "histogram": lambda: (of_histogram().statistic(), {}),
    "histogram_by_method": lambda: (of_histogram().statistic(), {"method": "minmax"}),
    "pair": lambda: ((torch.tensor([0.3]), torch.tensor([0])), {}),
    "numbers": lambda: ((0.3, 0), {}),
}


@pytest.mark.parametrize("source", SOURCES)
def test_initialized_from(source: str) -> None:
    module = make("symmetric")
    given, options = SOURCES[source]()
    assert module.initialize_from(given, **options) is module
    observer = of_histogram()
    expected = {
        "observer": observer.calculate_qparams,
        "observer_by_method": lambda: observer.solve("percentile", percentile=0.9),
        "histogram": lambda: observer.solve("mse"),
        "histogram_by_method": lambda: observer.solve("minmax"),
    }.get(source, lambda: (torch.tensor([0.3]), None))()[0]
    assert_same(module.scale, expected.reshape(1))
    assert_same(module.zero_point, torch.zeros(1))
    assert module.observer_enabled.item() == 0
    assert step(module, batch())["scale"].any()


def test_initialized_from_a_site() -> None:
    site = calibrated()
    module = make("symmetric").initialize_from(site)
    assert_same(module.scale, site.scale)


def test_initialized_from_its_own_observer() -> None:
    """What ranks do after a sync."""
    module = make("columns")
    other = copy.deepcopy(module.activation_post_process)
    module(batch())
    other(batch(1) * 4)
    module.activation_post_process.merge(other)
    module.initialize_from()
    scale, zero_point = module.activation_post_process.calculate_qparams()
    assert_same(module.scale, scale)
    assert_same(module.zero_point, zero_point.float())


@EACH
def test_initialized_from_data(name: str) -> None:
    """LSQ's start: twice the mean magnitude over the root of the greatest level."""
    module = UNSIZED[name]()
    x = batch(2)
    module.initialize_from(x)
    dims = {"rows": (1,), "columns": (0,), "columns_log": (0,)}.get(name, (0, 1))
    mean = x.abs().mean(dims)
    if name == "groups":
        mean = x.abs().reshape(6, 4, 4).mean(2)
    elif name == "blocks":
        mean = x.abs().reshape(2, 3, 2, 8).mean((1, 3))
    steps = module.quant_max - (module.symmetric_zero_point or 0)
    expected = (2 * mean / math.sqrt(steps)).reshape(GRIDS.get(name, (1,)))
    torch.testing.assert_close(module.scale.detach(), expected)
    if module.symmetric_zero_point is None:
        # nothing is clipped below, if it can be helped
        scale, zero = module.calculate_qparams()
        assert (zero <= module.quant_max).all()
        assert ((zero > module.quant_min) & (scale > 0)).all()
    else:
        assert (module.zero_point == module.symmetric_zero_point).all()
    assert module.observer_enabled.item() == 0


def test_initialized_from_data_that_is_not_negative() -> None:
    module = Module(**{**INT4, "quant_min": 0, "quant_max": 15})
    module.initialize_from(batch().relu())
    assert module.zero_point.item() == 0
    module.initialize_from(torch.zeros(4))
    assert module.scale.item() == pytest.approx(module.least_scale)


REFUSED: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "type": ("scale", {}, TypeError, "source: expected an observer, .*, got str"),
    "method": ((1.0, 0), {"method": "mse"}, TypeError, "method: expected None beside tuple"),
    "grid": (po.FakeQuantize(), {}, ValueError, r"expected the grid \[-8, 7\], .* \[0, 255\]"),
    "scale": ((-1.0, 0), {}, ValueError, "expected positive finite scales, got -1.0"),
    "zero_point": ((1.0, 9), {}, ValueError, r"expected zero points in \[-8, 7\], got 9"),
    "symmetric": ((1.0, 1), {}, ValueError, "expected zero points of 0, .*, got 1"),
    "shape": ((torch.ones(2), torch.zeros(2)), {}, ValueError, r"shaped as .*, got shapes \(2,\)"),
    "two_shapes": ((torch.ones(1), torch.zeros(2)), {}, ValueError, r"and \(2,\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_a_source(name: str) -> None:
    source, options, error, match = REFUSED[name]
    module = make("symmetric")
    with (
        unchanged(*module.state_dict().values()),
        pytest.raises(error, match=f"^LearnableFakeQuantize.initialize_from: .*{match}"),
    ):
        module.initialize_from(source, **options)


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("rows", (5,), True),
        ("rows", (2, 3), False),
        ("groups", (4, 6), True),
        ("groups", (24,), True),
        ("groups", (24,), False),
    ],
)
def test_refuses_a_start_of_another_shape(name: str, shape: tuple[int, ...], told: bool) -> None:
    module = make(name) if told else UNSIZED[name]()
    with pytest.raises(ValueError, match="shaped as the module's"):
        module.initialize_from((torch.ones(shape), torch.zeros(shape)))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"grad_factor": "mean"}, ValueError, "grad_factor: expected a number, .* got 'mean'"),
        ({"grad_factor": True}, ValueError, "grad_factor: expected a number, .* got True"),
        ({"quant_min": 5}, ValueError, "expected both or neither"),
        ({"observer": 3}, TypeError, "observer: expected a class or factory"),
        ({"observer": po.NoopObserver}, TypeError, "observer: expected one of a scale"),
        (
            {
                "observer": po.PerChannelMinMaxObserver,
                "qscheme": torch.per_channel_affine_float_qparams,
            },
            NotImplementedError,
            "qscheme: expected",
        ),
    ],
)
def test_rejects_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    assert_rejected(Module, arguments, error, match)


def test_replaces_fake_quantizes() -> None:
    """The same observers, switches and values, so the model computes the same."""
    shared = po.FakeQuantize(CHANNELS, **ROWS)
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(po.FakeQuantize(), nn.ReLU(), shared),
            "b": nn.Sequential(shared, ao.FakeQuantize(observer=ao.MinMaxObserver)),
            "fused": po.FusedMovingAvgObsFakeQuantize(),
            "fixed": po.default_fixed_qparams_range_0to1_fake_quant(),
            "other": type("Other", (po.FakeQuantize,), {})(),
        }
    )
    used = [model["a"][0], model["a"][2], model["b"][1], model["fused"]]
    for module in used:
        module(batch())
        module.disable_observer()
    used[0].disable_fake_quant()
    before = copy.deepcopy(used)
    model.eval()
    assert po.make_learnable(model, grad_factor="features") is model
    assert model["a"][2] is model["b"][0]
    assert type(model["fixed"]) is po.FixedQParamsFakeQuantize
    assert type(model["other"]).__name__ == "Other"
    now = [model["a"][0], model["a"][2], model["b"][1], model["fused"]]
    assert all(type(module) is Module and not module.training for module in now)
    for new, old in zip(now, before, strict=True):
        assert_same(new(batch(1)), old(batch(1)))
        assert_same(new.calculate_qparams()[0], old.scale)
        assert new.grad_factor == "features"
    assert now[0].activation_post_process is used[0].activation_post_process
    once = list(model.modules())
    assert list(po.make_learnable(model).modules()) == once
    alone = po.make_learnable(po.FakeQuantize())
    assert type(alone) is Module
    with pytest.raises(TypeError, match="fake_quantize: expected a FakeQuantize, got Linear"):
        Module.from_fake_quantize(nn.Linear(1, 1))


def copied(module: Any) -> Any:
    return copy.deepcopy(module)


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def reloaded(module: Any, fresh: Any, **options: Any) -> Any:
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    fresh.load_state_dict(torch.load(stream, weights_only=True), **options)
    return fresh


@EACH
def test_copies(name: str) -> None:
    module = learning(name)
    expected = step(module, batch(1))
    for other in (copied(module), reloaded(module, UNSIZED[name]()), reloaded(module, make(name))):
        assert_same_step(step(other, batch(1)), expected)
        assert other.scale.data_ptr() != module.scale.data_ptr()
    kept = UNSIZED[name]()
    parameters = list(kept.parameters())
    reloaded(module, kept)
    assert all(a is b for a, b in zip(kept.parameters(), parameters, strict=True))
    if name in ("affine", "symmetric"):
        assert_same_step(step(pickled(module), batch(1)), expected)


@EACH
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_less_precision_is_made_float32(name: str, assign: bool) -> None:
    module = learning(name)
    state = {k: v.half() if v.is_floating_point() else v for k, v in module.state_dict().items()}
    before = dict(state)
    other = make(name)
    other.load_state_dict(state, assign=assign)
    assert {t.dtype for t in (other.scale, other.zero_point)} == {torch.float32}
    assert isinstance(other.scale, nn.Parameter)
    assert_same(other.scale, module.scale.half().float())
    assert state == before
    other(batch())


def test_takes_the_state_of_others() -> None:
    theirs = _LearnableFakeQuantize(ao.MinMaxObserver, 0, 255)
    theirs(batch())
    theirs.enable_param_learning()
    ours = Module(po.MinMaxObserver, 0, 255)
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert (missing, unexpected) == ([], ["learning_enabled", "eps"])
    assert ours.observer_enabled.item() == 0
    assert_same(ours(batch(1)), theirs(batch(1)))

    fake = po.FakeQuantize(CHANNELS, **ROWS)
    fake(batch())
    fake.disable_observer()
    ours = UNSIZED["rows"]()
    ours.load_state_dict(fake.state_dict())
    assert_same(ours(batch(1)), fake(batch(1)))


@EACH
def test_stays_float32(name: str) -> None:
    module = learning(name)
    expected = [t.detach().clone() for t in (module.scale, module.zero_point)]
    for change in (nn.Module.half, nn.Module.bfloat16, nn.Module.double):
        change(module)
        assert_all_same([module.scale, module.zero_point], expected)


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    """Values in the dtype of x, the gradients of the parameters in float32."""
    module, wide = make(name), make(name)
    x = batch(1).to(dtype)
    for each in (module, wide):
        each(x if each is module else x.float())
        each.disable_observer()
    found, expected = step(module, x), step(wide, x.float())
    assert (found["y"].dtype, found["x"].dtype) == (dtype, dtype)
    if dtype != torch.float64:
        assert_same(found["y"], expected["y"].to(dtype))
        assert found["scale"].dtype == torch.float32
        torch.testing.assert_close(found["scale"], expected["scale"], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["affine", "symmetric", "rows", "groups"])
def test_parameters_of_mixed_precision(name: str) -> None:
    """What hands over bfloat16 ones gets gradients of that type; an estimate goes to them too."""
    module = learning(name)
    narrow = {k: p.detach().bfloat16().requires_grad_() for k, p in module.named_parameters()}
    y = torch.func.functional_call(module, narrow, (batch(1),))
    y.square().sum().backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.any() for p in narrow.values())
    with torch.no_grad():
        for key, p in module.named_parameters():
            p.copy_(narrow[key])
    assert_same(y, module(batch(1)))
    module.enable_observer()
    torch.func.functional_call(module, narrow, (batch(1) * 2,))
    scale = module.activation_post_process.calculate_qparams()[0]
    assert_same(narrow["scale"], scale.bfloat16())


@EACH
def test_empty(name: str) -> None:
    module = UNSIZED[name]()
    x = torch.empty(0, 16)
    with unchanged(*module.state_dict().values()):
        with torch.no_grad():
            assert module(x) is x
        module(x).sum().backward()
    for parameter in module.parameters():  # DDP waits for each, on every rank
        assert_same(parameter.grad, torch.zeros_like(parameter))


def test_an_empty_batch_before_the_first_leaves_no_gradient_of_its_shape() -> None:
    module = Module(po.PerChannelMinMaxObserver, qscheme=torch.per_channel_affine)
    for rows in (0, 3):
        module(torch.ones(rows, 4)).sum().backward()
    assert module.scale.grad is not None
    assert module.scale.grad.shape == module.scale.shape == (3,)


def test_made_on_the_meta_device() -> None:
    with torch.device("meta"):
        module = Module(po.MovingAverageMinMaxObserver)
    assert {t.device.type for t in (*module.buffers(), *module.parameters())} == {"meta"}
    module.to_empty(device="cpu").reset_parameters()
    alike = Module(po.MovingAverageMinMaxObserver)
    x = torch.arange(-3.0, 5.0)
    assert_same(module(x), alike(x))


def test_meta_device() -> None:
    for name in UNSIZED:
        module = make(name).to("meta")
        y = module(torch.empty(SHAPE, device="meta"))
        assert (y.shape, y.device.type) == (SHAPE, "meta")
        empty = module.to_empty(device="cpu")
        with torch.no_grad():
            for t in empty.state_dict().values():
                t.fill_(3)  # what memory may hold
        empty.reset_parameters()
        assert_same_step(step(empty, batch()), step(make(name), batch()))
    made = Module(CHANNELS, **ROWS, num_channels=6, factory_kwargs={"device": "meta"})
    assert {p.device.type for p in (made.scale, made.zero_point)} == {"meta"}


def test_an_observer_of_fixed_parameters_is_a_start() -> None:
    observer = po.FixedQParamsObserver.with_args(scale=0.5, zero_point=3, quant_max=15)
    module = Module(observer, quant_min=0, quant_max=15)
    assert (module.scale.item(), module.zero_point.item()) == (0.5, 3.0)
    with torch.no_grad():
        module.scale.fill_(0.25)
    module(batch())
    assert module.scale.item() == 0.25


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@EACH
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiles_whole(name: str) -> None:
    """Calibration and learning in one graph, forward and backward; the numbers are eager's."""
    module, eager = make(name), make(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")

    def both(x: Tensor) -> None:
        results = []
        for call, own in ((compiled, module), (eager, eager)):
            x = x.detach().clone().requires_grad_()
            own.zero_grad()
            y = call(x)
            (y * sample(tuple(x.shape), seed=9)).sum().backward()
            results.append([y, x.grad, *(p.grad for p in own.parameters())])
        assert_all_same(*results)
        assert_all_same(*([*m.state_dict().values()] for m in (module, eager)))

    both(batch())
    with torch.compiler.set_stance("fail_on_recompile"):
        both(batch(1) * 2)
        for switch in ("disable_observer", "disable_fake_quant", "enable_fake_quant"):
            for each in (module, eager):
                getattr(each, switch)()
            both(batch(2))


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor() -> None:
    module, eager = learning("columns"), learning("columns")
    compiled = torch.compile(module, fullgraph=True)
    x = batch(1).requires_grad_()
    y = compiled(x)
    (y * sample(SHAPE, seed=9)).sum().backward()
    expected = step(eager, batch(1))
    assert_all_same([y, x.grad, module.scale.grad, module.zero_point.grad], expected.values())


@pytest.mark.parametrize("kind", ["elements", "features", 0.5])
@pytest.mark.usefixtures("fresh_dynamo")
def test_shapes_that_vary_make_one_graph(kind: Any) -> None:
    """The factor of LSQ, which depends on the shape, is found in the kernel."""
    module, eager = (learning("symmetric", grad_factor=kind) for _ in range(2))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    step(compiled, sample((4, 5)))
    with torch.compiler.set_stance("fail_on_recompile"):
        for shape in ((7, 3), (2, 90), (33, 33)):
            found = step(compiled, sample(shape))
            expected = step(eager, sample(shape))
            assert_all_same(found.values(), expected.values(), shape)


@EACH
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_exports(name: str) -> None:
    """Forward and backward; while the observer is on, the exported module estimates too."""
    module, eager = make(name), make(name)
    exported = torch.export.export(module, (batch(),)).module()
    for i in range(3):
        results = []
        for each in (exported, eager):
            x = (batch(i) * (i + 1)).requires_grad_()
            each.zero_grad()
            y = each(x)
            (y * sample(SHAPE, seed=9)).sum().backward()
            results.append([y, x.grad, *(p.grad for p in each.parameters())])
        assert_all_same(*results, i)
        for key, value in exported.state_dict().items():
            assert_same(value, eager.state_dict()[key], key)
        if i == 1:
            exported.observer_enabled.zero_()
            eager.disable_observer()


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")
def test_exports_with_dynamic_shapes() -> None:
    module = learning("affine", grad_factor="features")
    rows = torch.export.Dim("rows", min=2, max=99)
    program = torch.export.export(module, (batch(),), dynamic_shapes=({0: rows},))
    with torch.no_grad():  # a graph of plain ops writes the parameters back by copy_
        for call in (program.module(), program.run_decompositions().module()):
            for count in (2, 31):
                assert_same(call(sample((count, 16))), module(sample((count, 16))))


def qconfig(**more: Any) -> ao.QConfig:
    return ao.QConfig(
        activation=Module.with_args(
            observer=po.MovingAverageMinMaxObserver, quant_min=0, quant_max=255, **more
        ),
        weight=Module.with_args(
            observer=CHANNELS, dtype=torch.qint8, qscheme=torch.per_channel_symmetric, ch_axis=0
        ),
    )


def test_prepared_and_converted_by_torch() -> None:
    """What is trained is what the converted model computes with."""
    torch.manual_seed(3)
    model = nn.Sequential(
        ao.QuantStub(), nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(64, 5), ao.DeQuantStub(),
    ).train()  # fmt: skip
    model = ao.fuse_modules_qat(model, [["1", "2", "3"]])
    model.qconfig = qconfig(grad_factor="features")
    prepared = ao.prepare_qat(model)
    learnable = [m for m in prepared.modules() if isinstance(m, Module)]
    assert len(learnable) == 5
    assert all(isinstance(m, ao.FakeQuantizeBase) for m in learnable)
    optimizer = torch.optim.SGD(prepared.parameters(), lr=1e-2)
    for i in range(6):
        if i == 2:
            prepared.apply(ao.disable_observer)
        optimizer.zero_grad()
        prepared(sample((8, 2, 6, 6), seed=i)).square().mean().backward()
        optimizer.step()
    learned = [m.calculate_qparams() for m in learnable]
    observed = [m.activation_post_process.calculate_qparams() for m in learnable]
    assert all(not torch.equal(a, b) for (a, _), (b, _) in zip(learned, observed, strict=True))
    x = sample((8, 2, 6, 6), seed=8)
    expected = prepared.eval()(x)
    converted = ao.convert(prepared)
    assert not any(isinstance(m, Module) for m in converted.modules())
    weights = [converted[1].weight(), converted[5].weight()]
    assert_all_same(
        [w.q_per_channel_scales().float() for w in weights],
        [learnable[i].calculate_qparams()[0] for i in (1, 3)],
    )
    scale = converted[5].scale
    assert scale == learnable[4].calculate_qparams()[0].item()
    assert (converted(x) - expected).abs().max() <= scale * 1.01

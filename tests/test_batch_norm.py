"""Batch norms that are frozen by a buffer: torch's numbers, and no new graph."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.cases import assert_all_same, assert_same, unchanged
from readback import NoReadback, OnDevice
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import pyobserver as po

pytestmark = pytest.mark.once


@pytest.fixture(params=["host", "device"])
def reads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the flag is read: as on the CPU, and as elsewhere."""
    if request.param == "device":
        read_on_the_device(monkeypatch)


def read_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyobserver.batch_norm._is_readable", lambda flag: False)


either = pytest.mark.usefixtures("reads")

SHAPES: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "rows": (nn.BatchNorm1d, (7, 5)),
    "1d": (nn.BatchNorm1d, (4, 5, 6)),
    "2d": (nn.BatchNorm2d, (4, 5, 3, 2)),
    "3d": (nn.BatchNorm3d, (2, 5, 3, 2, 2)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "plain": {"affine": False},
    "cumulative": {"momentum": None},
    "fast": {"momentum": 0.7, "eps": 0.1},
    "latest": {"momentum": 1.0},
}


def batches(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(shape, generator=generator) * 3 + i).to(dtype) for i in range(3)]


def pair(cls: type[nn.Module] = nn.BatchNorm2d, **options: Any) -> tuple[Any, Any]:
    """Ours and torch's, of the same parameters."""
    theirs: Any = cls(5, **options)
    for parameter in theirs.parameters():
        nn.init.uniform_(parameter, 0.5, 2)
    ours = copy.deepcopy(theirs)
    po.make_batch_norm_freezable(ours)
    return ours, theirs


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and the parameters."""
    x = x.detach().requires_grad_()
    y = module(x)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [x, *module.parameters()])]


def assert_steps_agree(ours: Any, theirs: Any, x: Tensor, **tolerance: float) -> None:
    assert_close(step(ours, x), step(theirs, x), **tolerance)
    for name, buffer in theirs.named_buffers():
        assert_close(getattr(ours, name), buffer, **tolerance)


@either
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_training_is_that_of_torch(shape: str, options: str) -> None:
    """Outputs, gradients and running statistics, with the rounding of float32 apart."""
    cls, sizes = SHAPES[shape]
    ours, theirs = pair(cls, **OPTIONS[options])
    for x in batches(sizes):
        assert_steps_agree(ours, theirs, x, rtol=1e-5, atol=2e-6)


@either
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_frozen_is_eval_mode(shape: str, options: str) -> None:
    """To the bit but for the gradients' rounding; and the running statistics stay."""
    cls, sizes = SHAPES[shape]
    ours, theirs = pair(cls, **OPTIONS[options])
    first, *rest = batches(sizes)
    for module in (ours, theirs):
        module(first)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.eval()
    ours.freeze_bn_stats()
    for x in rest:
        with unchanged(*ours.buffers()):
            (y, *gradients), (expected, *others) = step(ours, x), step(theirs, x)
        assert_same(y, expected)
        assert_close(gradients, others, rtol=1e-6, atol=1e-6)
    ours.update_bn_stats()
    assert_steps_agree(ours, theirs.train(), first, rtol=1e-5, atol=2e-6)


@either
def test_frozen_before_the_first_batch() -> None:
    for options in OPTIONS.values():
        ours, theirs = pair(**options)
        ours.freeze_bn_stats()
        with unchanged(*ours.buffers()):
            assert_same(ours(batches((4, 5, 3, 2))[2]), theirs.eval()(batches((4, 5, 3, 2))[2]))


@either
@pytest.mark.parametrize(
    ("dtype", "parameters"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_half_precision(dtype: torch.dtype, parameters: torch.dtype) -> None:
    """Also of parameters and statistics that are wider, as under autocast."""
    ours, theirs = (module.to(parameters) for module in pair())
    unit = torch.finfo(dtype).eps
    for x in batches((4, 5, 3, 2), dtype):
        assert ours(x).dtype == dtype
        theirs(x)
        assert_steps_agree(ours, theirs, x, rtol=4 * unit, atol=8 * unit)
    if parameters == torch.float32:  # of statistics that were not rounded on the way
        assert_close(ours.running_var, theirs.running_var, rtol=1e-6, atol=0)


@either
def test_float64() -> None:
    ours, theirs = (module.double() for module in pair())
    for x in batches((4, 5, 3, 2), torch.float64):
        assert_steps_agree(ours, theirs, x, rtol=1e-13, atol=1e-13)


@either
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_of_differences(frozen: bool) -> None:
    ours = pair()[0].double()
    ours.running_mean.uniform_(-1, 1)
    if frozen:
        ours.freeze_bn_stats()

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(ours, {"weight": weight, "bias": bias}, (x,))

    x = torch.randn(3, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, ours.weight, ours.bias))


def test_on_the_cpu_the_numbers_are_those_of_torch_to_the_bit() -> None:
    ours, theirs = pair()
    for x in batches((4, 5, 3, 2)):
        assert_all_same(step(ours, x), step(theirs, x))
    assert_all_same([*ours.buffers()][:3], [*theirs.buffers()])
    ours.freeze_bn_stats()
    theirs.eval()
    for x in batches((4, 5, 3, 2)):
        assert_all_same(step(ours, x), step(theirs, x))


def test_tensors_without_data() -> None:
    """As for an estimate of memory: nothing can be read."""
    with FakeTensorMode():
        y, *_ = step(po.FreezableBatchNorm2d(5), torch.empty(4, 5, 3, 2))
    assert y.shape == (4, 5, 3, 2)


@either
def test_channels_last_stays() -> None:
    ours, theirs = pair()
    x = batches((4, 5, 3, 2))[0].contiguous(memory_format=torch.channels_last)
    y, gradient, *_ = step(ours, x)
    assert (y.stride(), gradient.stride()) == (x.stride(), x.stride())
    assert_close(y, theirs(x))


@either
def test_the_flag_of_the_forward_counts_in_the_backward() -> None:
    ours, theirs = pair()
    x = batches((4, 5, 3, 2))[0].requires_grad_()
    y = ours(x)
    ours.freeze_bn_stats()
    weights = torch.linspace(-1, 2, y.numel()).reshape(y.shape)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    assert_close(gradient, step(theirs, x)[1], rtol=1e-5, atol=2e-6)


@either
def test_parameters_that_do_not_learn() -> None:
    ours, _ = pair()
    ours.bias.requires_grad_(False)
    x = batches((4, 5, 3, 2))[0]
    ours(x).square().sum().backward()
    assert ours.bias.grad is None
    assert ours.weight.grad is not None
    with torch.no_grad():
        assert not ours(x).requires_grad


@either
def test_frozen_statistics_survive_what_is_not_finite() -> None:
    ours, _ = pair()
    ours.freeze_bn_stats()
    with unchanged(*ours.buffers()):
        for value in (torch.inf, torch.nan):
            for dtype in (torch.float32, torch.bfloat16):
                ours(torch.full((4, 5, 3, 2), value, dtype=dtype))


def test_eval_is_that_of_torch() -> None:
    ours, theirs = (module.eval() for module in pair())
    for frozen in (0, 1):
        ours.frozen.fill_(frozen)
        with unchanged(*ours.buffers()):
            assert_all_same(*(step(module, batches((4, 5, 3, 2))[0]) for module in (ours, theirs)))


@either
def test_empty_batches_count_for_nothing() -> None:
    ours, _ = pair()
    with unchanged(*ours.buffers()):
        y, *gradients = step(ours, torch.ones(0, 5, 3, 2))
    assert y.shape == (0, 5, 3, 2)
    assert [g.count_nonzero().item() for g in gradients] == [0, 0, 0]


@either
@pytest.mark.parametrize(
    ("shape", "match"),
    [
        (
            (1, 5, 1, 1),
            "2d: input: expected 5 channels, in training of more than 1 value, got shape",
        ),
        ((4, 5, 3), "expected 4D input"),
        ((4, 6, 3, 2), r"expected 5 channels.*, got shape \(4, 6, 3, 2\)"),
        ((0, 6, 3, 2), r"expected 5 channels.*, got shape \(0, 6, 3, 2\)"),
    ],
)
def test_refuses_inputs(shape: tuple[int, ...], match: str) -> None:
    ours, _ = pair()
    with unchanged(*ours.buffers()), pytest.raises(ValueError, match=match):
        ours(torch.ones(shape))


def test_refuses_statistics_that_are_not_tracked() -> None:
    with pytest.raises(ValueError, match="FreezableBatchNorm1d: track_running_stats: expected"):
        po.FreezableBatchNorm1d(5, track_running_stats=False)


def test_refuses_a_double_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    read_on_the_device(monkeypatch)
    ours, _ = pair()
    x = batches((4, 5, 3, 2))[0].requires_grad_()
    (gradient,) = torch.autograd.grad(ours(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_waits_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    read_on_the_device(monkeypatch)
    for options in OPTIONS.values():
        ours, _ = pair(**options)
        with NoReadback():
            for turn in (ours.freeze_bn_stats, ours.update_bn_stats):
                turn()
                step(ours, batches((4, 5, 3, 2))[0])


def test_meta_device() -> None:
    ours = po.FreezableBatchNorm2d(5, device="meta")
    with OnDevice("meta"):
        ours.freeze_bn_stats()
        y = ours(torch.empty(4, 5, 3, 2, device="meta", requires_grad=True))
        y.backward(torch.empty_like(y))
    assert y.shape == (4, 5, 3, 2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic: bool) -> None:
    """Freezing and going on make no new graph, nor do other sizes where they are dynamic."""
    torch._dynamo.reset()
    eager, _ = pair()
    ours = copy.deepcopy(eager)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    step(eager, batches((4, 5, 3, 2))[0])
    step(compiled, batches((4, 5, 3, 2))[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        for i, name in enumerate(("freeze_bn_stats", "update_bn_stats", "freeze_bn_stats")):
            for module in (eager, ours):
                getattr(module, name)()
            for x in batches((4, 5, 3, 2 + dynamic * i)):
                assert_close(step(compiled, x), step(eager, x), rtol=1e-5, atol=2e-6)
                assert_close(ours.state_dict(), eager.state_dict())


def test_inductor() -> None:
    torch._dynamo.reset()
    eager, _ = pair()
    ours = copy.deepcopy(eager)
    compiled = torch.compile(ours, fullgraph=True)
    for name in ("update_bn_stats", "freeze_bn_stats"):
        for module in (eager, ours):
            getattr(module, name)()
        for x in batches((4, 5, 3, 2)):
            assert_close(step(compiled, x), step(eager, x), rtol=1e-5, atol=2e-6)
    assert_close(ours.state_dict(), eager.state_dict())


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch.export's own
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_exported_it_trains_as_before(shape: str, options: str) -> None:
    """With the gradient that goes by way of the mean and variance, until it is frozen."""
    cls, sizes = SHAPES[shape]
    eager, _ = pair(cls, **OPTIONS[options])
    exported = torch.export.export(copy.deepcopy(eager), (torch.ones(sizes),)).module()
    state: dict[str, Any] = dict(exported.named_buffers())
    for frozen in (0, 1):
        state["frozen"].fill_(frozen)
        eager.frozen.fill_(frozen)
        for x in batches(sizes):
            assert_close(step(exported, x), step(eager, x), rtol=1e-4, atol=2e-6)
            assert_close(state, dict(eager.named_buffers()))


def model() -> nn.Sequential:
    inner = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, momentum=0.3))
    return nn.Sequential(inner, nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(20))


def test_turned_in_place() -> None:
    """The same objects, parameters, buffers and hooks."""
    net = model()
    norm: Any = net[0][1]
    calls = []
    norm.register_forward_hook(lambda *_: calls.append(1))
    before = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    po.make_batch_norm_freezable(net)
    assert net[0][1] is norm
    assert type(norm) is po.FreezableBatchNorm2d
    assert type(net[3]) is po.FreezableBatchNorm1d
    assert norm.momentum == 0.3
    after = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert set(after) - set(before) == {"0.1.frozen", "3.frozen"}
    assert all(after[name] is tensor for name, tensor in before.items())
    net(torch.randn(2, 3, 4, 4))
    assert calls == [1]
    norm.freeze_bn_stats()
    po.make_batch_norm_freezable(net)  # again: nothing to do
    assert norm.frozen == 1
    for copied in (copy.deepcopy(net), pickle.loads(pickle.dumps(net[3]))):
        assert_all_same([*copied.buffers()][-1:], [*net.buffers()][-1:])


def test_state_dicts_of_torch_load_and_ours_but_for_the_flag() -> None:
    theirs, ours = model(), model()
    po.make_batch_norm_freezable(ours)
    theirs(torch.randn(4, 3, 4, 4))
    ours[3].freeze_bn_stats()
    saved = theirs.state_dict()
    keys = list(saved)
    for assign in (False, True):
        ours.load_state_dict(saved, assign=assign)
        assert [ours[0][1].frozen.item(), ours[3].frozen.item()] == [0, 1]
    assert list(saved) == keys
    for key, value in saved.items():
        assert_same(ours.state_dict()[key], value, key)
    found = model().load_state_dict(ours.state_dict(), strict=False)
    assert found.missing_keys == []
    assert found.unexpected_keys == ["0.1.frozen", "3.frozen"]
    again = model()
    po.make_batch_norm_freezable(again)
    again.load_state_dict(ours.state_dict())
    assert [again[0][1].frozen.item(), again[3].frozen.item()] == [0, 1]


def test_a_cast_leaves_the_flag() -> None:
    ours, _ = pair()
    assert ours.half().frozen.dtype == torch.uint8


def test_fused_modules_of_torch_keep_theirs() -> None:
    from torch.ao.nn.intrinsic import qat
    from torch.ao.quantization import get_default_qat_qconfig

    fused = qat.ConvBn2d(3, 5, 3, qconfig=get_default_qat_qconfig("x86"))
    net = nn.Sequential(fused, nn.BatchNorm2d(5))
    po.make_batch_norm_freezable(net)
    assert type(fused.bn) is nn.BatchNorm2d
    assert type(net[1]) is po.FreezableBatchNorm2d


class OtherBatchNorm(nn.BatchNorm2d):
    pass


REFUSED: dict[str, Callable[[], Any]] = {
    r"1 \(SyncBatchNorm\)": lambda: nn.SyncBatchNorm(5),
    r"1 \(LazyBatchNorm2d\)": nn.LazyBatchNorm2d,
    r"1 \(OtherBatchNorm\)": lambda: OtherBatchNorm(5),
    r"1 \(BatchNorm2d, track_running_stats=False\)": lambda: nn.BatchNorm2d(
        5, track_running_stats=False
    ),
}


@pytest.mark.parametrize("match", REFUSED)
def test_refuses_batch_norms(match: str) -> None:
    net = nn.Sequential(nn.BatchNorm2d(5), REFUSED[match]())
    with pytest.raises(ValueError, match=f"BatchNorm1d, 2d and 3d .*, got {match}$"):
        po.make_batch_norm_freezable(net)
    assert type(net[0]) is nn.BatchNorm2d


def test_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"make_batch_norm_freezable: model: expected a torch\.nn"):
        po.make_batch_norm_freezable([nn.BatchNorm2d(5)])  # type: ignore[arg-type]

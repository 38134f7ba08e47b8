"""Switches of training, at once and after some steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from ops.cases import assert_all_same
from readback import NoReadback, OnDevice
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantize as TorchFakeQuantize

import pyobserver as po
from pyobserver import QATSchedule, switch

pytestmark = pytest.mark.once


class Layer(nn.Module):
    """A convolution with a rounded weight, a batch norm, and rounded activations."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.weight_fake_quant = po.default_per_channel_weight_fake_quant(num_channels=outputs)
        self.act_fake_quant = po.FakeQuantize()

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(x, self.weight_fake_quant(self.conv.weight))
        return self.act_fake_quant(torch.relu(self.norm(x)))


def make_model() -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(Layer(2, 3), Layer(3, 4), nn.Flatten(), nn.Linear(16, 2))
    po.make_batch_norm_freezable(model)
    return model


def flags(model: Any) -> list[tuple[int, int, int]]:
    """Whether each layer rounds, observes, and is frozen; both its fake-quantizes alike."""
    found = []
    for layer in (model[0], model[1]):
        fakes = (layer.weight_fake_quant, layer.act_fake_quant)
        both = {(int(f.fake_quant_enabled), int(f.observer_enabled)) for f in fakes}
        assert len(both) == 1
        found.append((*both.pop(), int(layer.norm.frozen)))
    return found


def batch(step: int, size: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 2, 6, 6, generator=generator) * (1 + step)


class Training:
    """A model with its optimizer and schedule; steps by number."""

    def __init__(self, **schedule: Any) -> None:
        self.model = make_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.05)
        self.schedule = QATSchedule(self.model, **schedule)

    def run(self, steps: range, forward: Any = None) -> None:
        for step in steps:
            self.optimizer.zero_grad()
            (forward or self.model)(batch(step)).square().mean().backward()
            self.optimizer.step()
            self.schedule.step()

    def state(self) -> list[Tensor]:
        return [t.clone() for t in self.model.state_dict().values()]


# --- switch --------------------------------------------------------------------------------------


def test_switches_everything() -> None:
    model = make_model()
    assert flags(model) == [(1, 1, 0)] * 2
    switch(model, fake_quant=False)
    assert flags(model) == [(0, 1, 0)] * 2
    switch(model, observer=False, batch_norm_frozen=True)
    assert flags(model) == [(0, 0, 1)] * 2
    switch(model, fake_quant=True, observer=True, batch_norm_frozen=False)
    assert flags(model) == [(1, 1, 0)] * 2
    switch(model[1].act_fake_quant, fake_quant=False)
    assert model[1].act_fake_quant.fake_quant_enabled == 0
    assert model[1].weight_fake_quant.fake_quant_enabled == 1


@pytest.mark.parametrize(
    "modules",
    ["1", "1.*", ["1.conv", "1.norm", "1.*_fake_quant"], lambda name, _: name == "1", ["1", "1.*"]],
)
def test_switches_what_is_chosen_and_what_lies_inside(modules: Any) -> None:
    model = make_model()
    switch(model, modules, fake_quant=False, observer=False, batch_norm_frozen=True)
    assert flags(model) == [(1, 1, 0), (0, 0, 1)]


def test_switches_by_type() -> None:
    model = make_model()
    switch(model, po.FakeQuantize, fake_quant=False)
    switch(model, nn.BatchNorm2d, batch_norm_frozen=True)
    assert flags(model) == [(0, 1, 1)] * 2


def test_switches_the_hosts_fake_quantizes() -> None:
    """A model may hold both."""
    model = nn.Sequential(TorchFakeQuantize(), po.FakeQuantize())
    switch(model, fake_quant=False, observer=False)
    for fake in model:
        assert (fake.fake_quant_enabled, fake.observer_enabled) == (0, 0)


def test_fused_modules_of_torch_freeze_their_own_way() -> None:
    from torch.ao.nn.intrinsic import qat
    from torch.ao.quantization import get_default_qat_qconfig

    qconfig = get_default_qat_qconfig("x86")
    conv = qat.ConvBnReLU2d(3, 5, 3, qconfig=qconfig)
    linear = qat.LinearBn1d(5, 4, qconfig=qconfig)
    model = nn.ModuleList([conv, linear, po.FreezableBatchNorm2d(5)])
    for frozen in (True, False):
        switch(model, batch_norm_frozen=frozen)
        assert (conv.freeze_bn, linear.freeze_bn) == (frozen, frozen)
        assert (conv.bn.training, linear.bn.training) == (not frozen, not frozen)
        assert model[2].frozen == frozen


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, "switch: fake_quant, observer, batch_norm_frozen: expected one of them"),
        ({"fake_quant": 1}, TypeError, "switch: fake_quant: expected True, False or None, got 1"),
        ({"observer": "on"}, TypeError, "switch: observer: expected True, False or None, got 'on'"),
        (
            {"modules": "2", "fake_quant": False},
            ValueError,
            "switch: modules: expected fake-quantizes, got none in Flatten",
        ),
        (
            {"modules": ["0.norm", "3"], "observer": False},
            ValueError,
            "switch: modules: expected fake-quantizes, got none in FreezableBatchNorm2d, Linear",
        ),
        (
            {"modules": "*.conv", "batch_norm_frozen": True},
            ValueError,
            "switch: modules: expected batch norms, got none in Conv2d",
        ),
        ({"modules": "4", "observer": False}, ValueError, "switch: modules: expected a name"),
        ({"modules": 4, "observer": False}, TypeError, "switch: modules: expected module types"),
        (  # one of the two is not there: the other is not turned
            {"modules": "*_fake_quant", "observer": False, "batch_norm_frozen": True},
            ValueError,
            "switch: modules: expected batch norms",
        ),
    ],
)
def test_refuses_and_turns_nothing(
    arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = make_model()
    with pytest.raises(error, match=match):
        switch(model, **arguments)
    assert flags(model) == [(1, 1, 0)] * 2


def test_refuses_batch_norms_that_cannot_be_frozen() -> None:
    model = make_model()
    model.append(nn.BatchNorm1d(2))
    model.append(nn.SyncBatchNorm(2))
    with pytest.raises(ValueError, match=r"makes them\), got BatchNorm1d 4, SyncBatchNorm 5$"):
        switch(model, fake_quant=False, batch_norm_frozen=True)
    assert flags(model) == [(1, 1, 0)] * 2
    switch(model, Layer, batch_norm_frozen=True)  # without these
    assert flags(model) == [(1, 1, 1)] * 2
    with pytest.raises(ValueError, match=r"got BatchNorm1d$"):
        switch(model, "4", batch_norm_frozen=True)


def test_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"switch: model: expected a torch\.nn\.Module, got None"):
        switch(None, observer=False)  # type: ignore[arg-type]


def test_refuses_to_become_a_part_of_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="switch: expected no capture of a CUDA graph"):
        switch(model, observer=False)
    assert flags(model) == [(1, 1, 0)] * 2


# --- the schedule --------------------------------------------------------------------------------

NUMBERS = {"fake_quant_from": 2, "observer_until": 4, "freeze_batch_norm_from": 3}
# rounds, observes, is frozen: at each step
EXPECTED = [(0, 1, 0), (0, 1, 0), (1, 1, 0), (1, 1, 1), (1, 0, 1), (1, 0, 1)]


def test_turns_each_at_its_step() -> None:
    model = make_model()
    schedule = QATSchedule(model, **NUMBERS)
    for step, expected in enumerate(EXPECTED):
        assert schedule.steps == step
        assert flags(model) == [expected] * 2, step
        schedule.step()


def test_numbers_of_zero_hold_from_the_start() -> None:
    model = make_model()
    QATSchedule(model, fake_quant_from=0, observer_until=0, freeze_batch_norm_from=0)
    assert flags(model) == [(1, 0, 1)] * 2


@pytest.mark.parametrize(("name", "place"), list(zip(NUMBERS, range(3), strict=True)))
def test_leaves_alone_what_is_not_given(name: str, place: int) -> None:
    model = make_model()
    switch(model, fake_quant=False, observer=False, batch_norm_frozen=True)
    before = flags(model)[0]
    schedule = QATSchedule(model, **{name: 1})
    schedule.step()
    after = (1, 0, 1)[place]
    assert flags(model) == [(*before[:place], after, *before[place + 1 :])] * 2


def test_writes_only_where_a_change_is_due() -> None:
    """What is turned by hand stays until then; ``apply`` turns it back."""
    model = make_model()
    schedule = QATSchedule(model, **NUMBERS)
    switch(model, "0", observer=False)
    schedule.step()
    assert flags(model) == [(0, 0, 0), (0, 1, 0)]
    schedule.step()
    assert flags(model) == [(1, 0, 0), (1, 1, 0)]
    schedule.apply()
    assert flags(model) == [(1, 1, 0)] * 2


def test_a_schedule_for_each_part() -> None:
    model = make_model()
    schedules = [
        QATSchedule(model, fake_quant_from=1, modules="0"),
        QATSchedule(model, fake_quant_from=2, observer_until=1, modules="1.*_fake_quant"),
    ]
    seen = []
    for _ in range(3):
        seen.append(flags(model))
        for schedule in schedules:
            schedule.step()
    assert seen == [
        [(0, 1, 0), (0, 1, 0)],
        [(1, 1, 0), (0, 0, 0)],
        [(1, 1, 0), (1, 0, 0)],
    ]


def test_fake_quantizes_that_are_added_later() -> None:
    model = make_model()
    schedule = QATSchedule(model, **NUMBERS)
    model[1].act_fake_quant = po.FakeQuantize()
    schedule.step()
    assert model[1].act_fake_quant.fake_quant_enabled == 1  # its own
    schedule.apply()
    assert flags(model) == [(0, 1, 0)] * 2


def test_trains_with_what_the_switches_say() -> None:
    """The scale and the statistics stand still from their step on."""
    training = Training(**NUMBERS)
    fake, norm = training.model[1].act_fake_quant, training.model[1].norm

    def moves(step: int) -> tuple[bool, bool]:
        before = fake.scale.clone(), norm.running_var.clone()
        training.run(range(step, step + 1))
        return bool((fake.scale != before[0]).any()), bool((norm.running_var != before[1]).any())

    assert [moves(step) for step in range(6)] == [(True, True)] * 3 + [(True, False)] + [
        (False, False)
    ] * 2


def test_no_new_graph_at_any_switch() -> None:
    """One compilation of forward and backward serves the whole schedule."""
    torch._dynamo.reset()
    eager, training = Training(**NUMBERS), Training(**NUMBERS)
    compiled = torch.compile(training.model, fullgraph=True, backend="aot_eager")
    eager.run(range(1))
    training.run(range(1), compiled)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(1, len(EXPECTED)):
            eager.run(range(step, step + 1))
            training.run(range(step, step + 1), compiled)
            assert flags(training.model) == flags(eager.model)
            torch.testing.assert_close(training.state(), eager.state(), rtol=1e-4, atol=1e-4)


def test_waits_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyobserver.batch_norm._is_readable", lambda flag: False)  # as of a GPU
    training = Training(**NUMBERS)
    saved = training.schedule.state_dict()
    with NoReadback():
        training.schedule.load_state_dict(saved)
        training.run(range(len(EXPECTED)))
        training.schedule.apply()
    assert flags(training.model) == [EXPECTED[-1]] * 2


def test_meta_device() -> None:
    model = make_model().to("meta")
    with OnDevice("meta"):
        schedule = QATSchedule(model, **NUMBERS)
        for _ in EXPECTED:
            schedule.step()


# --- resuming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["model", "schedule"])
@pytest.mark.parametrize("at", range(len(EXPECTED)))
def test_resumes(at: int, first: str) -> None:
    """To the bit as if it had not stopped, whichever is loaded first."""
    whole, begun, resumed = (Training(**NUMBERS) for _ in range(3))
    whole.run(range(6))
    begun.run(range(at))
    saved = copy.deepcopy((begun.model.state_dict(), begun.schedule.state_dict()))
    for part in ("model", "schedule") if first == "model" else ("schedule", "model"):
        getattr(resumed, part).load_state_dict(saved[part == "schedule"])
    assert resumed.schedule.steps == at
    assert flags(resumed.model) == [EXPECTED[at]] * 2
    resumed.run(range(at, 6))
    assert_all_same(resumed.state(), whole.state())


def test_goes_by_its_own_numbers_and_not_the_saved_flags() -> None:
    begun, resumed = Training(**NUMBERS), Training(fake_quant_from=8, observer_until=3)
    for _ in range(3):
        begun.schedule.step()
    resumed.model.load_state_dict(begun.model.state_dict())
    resumed.schedule.load_state_dict(begun.schedule.state_dict())
    assert flags(resumed.model) == [(0, 0, 1)] * 2  # frozen: as the model's were


@pytest.mark.parametrize(
    ("state", "error", "match"),
    [
        ({}, ValueError, "load_state_dict: state_dict: expected {'steps': ...}, got {}"),
        ({"steps": 1, "lr": 2}, ValueError, "expected {'steps': ...}, got {'steps': 1, 'lr': 2}"),
        (3, ValueError, "expected {'steps': ...}, got 3"),
        ({"steps": 1.5}, TypeError, "load_state_dict: steps: expected a number of steps, got 1.5"),
        ({"steps": -1}, ValueError, "load_state_dict: steps: expected a number .*, got -1"),
    ],
)
def test_refuses_state_dicts(state: Any, error: type[Exception], match: str) -> None:
    model = make_model()
    schedule = QATSchedule(model, **NUMBERS)
    schedule.step()
    with pytest.raises(error, match=match):
        schedule.load_state_dict(state)
    assert schedule.state_dict() == {"steps": 1}
    assert flags(model) == [EXPECTED[1]] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, "fake_quant_from, observer_until, freeze_batch_norm_from: expected one"),
        ({"observer_until": -1}, ValueError, "observer_until: expected .* from 0 on, got -1"),
        ({"observer_until": 2.0}, TypeError, "observer_until: expected a number of steps, got 2.0"),
        ({"fake_quant_from": True}, TypeError, "fake_quant_from: expected .*, got True"),
        ({"observer_until": 3, "modules": "2"}, ValueError, "QATSchedule: modules: expected fake"),
        ({"observer_until": 3, "modules": "8"}, ValueError, "QATSchedule: modules: expected a na"),
        (
            {"fake_quant_from": 3, "freeze_batch_norm_from": 3, "modules": "*_fake_quant"},
            ValueError,
            "QATSchedule: modules: expected batch norms",
        ),
    ],
)
def test_refuses_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    model = make_model()
    with pytest.raises(error, match=f"QATSchedule: .*{match.removeprefix('QATSchedule: ')}"):
        QATSchedule(model, **arguments)
    assert flags(model) == [(1, 1, 0)] * 2


def test_a_step_that_fails_is_not_counted() -> None:
    model = nn.Sequential(po.FakeQuantize())
    schedule = QATSchedule(model, observer_until=1)
    del model[0]
    for call in (schedule.step, lambda: schedule.load_state_dict({"steps": 5})):
        with pytest.raises(ValueError, match="QATSchedule: modules: expected fake-quantizes"):
            call()
        assert schedule.steps == 0

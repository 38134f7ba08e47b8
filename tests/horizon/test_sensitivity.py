"""``sensitivity``: the ranking, its table and picture, and a template of it."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyobserver.horizon import (
    FakeQuantize,
    FakeQuantState,
    MinMaxObserver,
    QconfigSetter,
    Sensitive,
    SensitivityTemplate,
    get_qconfig,
    prepare,
    qint16,
    sensitivity,
    set_fake_quantize,
)

from .models import make


class Lopsided(nn.Module):
    """Of the first layer's weights one is so large that the others are lost in eight bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        with torch.no_grad():
            self.first.weight[:, 0] = 300.0

    def forward(self, x: Tensor) -> Any:
        return self.second(self.first(x)), torch.arange(3)


def calibrated() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    x[:, 0] = 0.0
    net = prepare(Lopsided(), x, QconfigSetter(get_qconfig(MinMaxObserver)))
    net(x)
    return net, x


def test_ranks_by_what_each_alone_does() -> None:
    net, x = calibrated()
    set_fake_quantize(net, FakeQuantState.VALIDATION)
    found = sensitivity(net, [x, x[:8]], progress=False)
    assert len(found) == 5
    assert found[0][:2] == ("first", "weight")
    assert [one.error for one in found] == sorted((one.error for one in found), reverse=True)
    # the first by hand
    fakes = {name: one for name, one in net.named_modules() if isinstance(one, FakeQuantize)}
    for module in fakes.values():
        module.enable_fake_quant(False)
    floats = [net(batch)[0].detach() for batch in (x, x[:8])]
    fakes["first.weight_fake_quant"].enable_fake_quant()
    rounded = [net(batch)[0].detach() for batch in (x, x[:8])]
    noise = [
        (a - b).square().sum() / a.square().sum() for a, b in zip(floats, rounded, strict=True)
    ]
    assert found[0].error == pytest.approx(float(sum(noise)) / 2, rel=1e-4)
    assert found[0].dtype == "qint8"


def test_fits_the_template() -> None:
    net, x = calibrated()
    found = sensitivity(net, [(x,)])
    setter = QconfigSetter(get_qconfig(), [SensitivityTemplate(found, 2)])
    types = {
        name: one.dtype
        for name, one in prepare(Lopsided(), x, setter).named_modules()
        if isinstance(one, FakeQuantize)
    }
    short = {"output": "activation_post_process", "weight": "weight_fake_quant"}
    wanted = {f"{one.name}.{short[one.role]}" for one in found[:2]}
    assert {name for name, dtype in types.items() if dtype is qint16} == wanted


@pytest.mark.parametrize("state", FakeQuantState)
def test_leaves_the_model_as_it_was(state: FakeQuantState) -> None:
    net, x = calibrated()
    set_fake_quantize(net, state)
    net.train()
    before = copy.deepcopy(net.state_dict())
    sensitivity(net, [x])
    after = net.state_dict()
    for key, value in before.items():
        assert torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
    states = {one.state for one in net.modules() if isinstance(one, FakeQuantize)}
    assert states == {state}
    assert net.training


def test_and_after_an_error_too() -> None:
    net, x = calibrated()

    def failing(wanted: Any, got: Any) -> float:
        raise KeyError("metric")

    with pytest.raises(KeyError, match="metric"):
        sensitivity(net, [x], failing)
    states = {one.state for one in net.modules() if isinstance(one, FakeQuantize)}
    assert states == {FakeQuantState.CALIBRATION}


def test_a_metric_of_ones_own() -> None:
    net, x = calibrated()
    found = sensitivity(net, [x], lambda wanted, got: float((wanted[0] - got[0]).abs().max()))
    assert found[0].error > found[-1].error > 0


def test_outputs_of_zeros_have_no_error() -> None:
    net = prepare(nn.ReLU(), torch.ones(3))
    net(-torch.ones(3))
    assert [one.error for one in sensitivity(net, [-torch.ones(3)])] == [0.0, 0.0]


def test_table_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = calibrated()
    found = sensitivity(net, [x])
    lines = str(found).splitlines()
    assert lines[0].split() == ["name", "role", "dtype", "error"]
    assert lines[2].split()[:3] == ["first", "weight", "qint8"]
    assert len(lines) == 2 + len(found)
    assert repr(found) == "<Sensitivity of 5 tensors>"
    assert isinstance(found[0], Sensitive)
    image = pytest.importorskip("matplotlib.image")
    found.plot(tmp_path / "bars.png")
    pixels = image.imread(tmp_path / "bars.png")
    for colour in ((0, 0x72, 0xB2), (0xE6, 0x9F, 0)):
        near = abs(pixels[..., :3] * 255 - colour).max(-1) < 6
        assert near.sum() > 50
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plot: .*pip install 'pyobserver\[demo\]'"):
        found.plot(tmp_path / "other.png")


def test_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    net, x = calibrated()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    sensitivity(net, [x])
    assert "sensitivity [" in capsys.readouterr().err
    sensitivity(net, [x], progress=False)
    assert capsys.readouterr().err == ""


def test_arguments() -> None:
    x = torch.randn(4, 2)
    with pytest.raises(ValueError, match="sensitivity: model: expected a prepared one"):
        sensitivity(nn.Linear(2, 2), [x])
    with pytest.raises(
        ValueError, match="sensitivity: model: expected a calibrated one, got never"
    ):
        sensitivity(prepare(nn.Linear(2, 2), x), [x])
    net, x = calibrated()
    with pytest.raises(ValueError, match="batches: expected at least one, got none"):
        sensitivity(net, [])
    with pytest.raises(TypeError, match="sensitivity: example_inputs: expected a tuple"):
        sensitivity(net, [{"x": x}])


def test_models_with_several_outputs() -> None:
    model, inputs = make("several")
    net = prepare(model, inputs)
    net(*inputs)
    found = sensitivity(net, [inputs])
    assert len(found) == 13
    assert all(one.error > 0 for one in found)

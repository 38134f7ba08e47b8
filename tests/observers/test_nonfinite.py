"""D10, D11: what NaN and infinities do to each observer, and what they tell its user."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.cases import assert_all_same, assert_same, unchanged
from torch import Tensor

import pyobserver

NAMES = {
    "MinMaxObserver": {},
    "MovingAverageMinMaxObserver": {"averaging_constant": 0.5},
    "PerChannelMinMaxObserver": {"ch_axis": 0},
    "MovingAveragePerChannelMinMaxObserver": {"ch_axis": 0, "averaging_constant": 0.5},
    "HistogramObserver": {"bins": 64},
}
BAD = torch.tensor([[1.0, torch.nan, -2.0], [torch.inf, 0.5, -torch.inf]])


def make(name: str, **arguments: Any) -> Any:
    return getattr(pyobserver, name)(**NAMES[name], **arguments)


def statistics(observer: Any) -> list[Tensor]:
    """Every buffer but the count of what was left out."""
    return [t for name, t in observer.named_buffers() if name != "nonfinite_count"]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_ignore(name: str, first: bool) -> None:
    """The same statistics as without them, whether they come first or later."""
    ours, clean = make(name), make(name)
    usual = torch.tensor([[0.25, 3.0, -1.0], [4.0, -5.0, 0.5]])
    # the same least and greatest value of each row as the finite ones of BAD
    finite = torch.tensor([[1.0, 1.0, -2.0], [0.5, 0.5, 0.5]])
    for observer, bad in ((ours, BAD), (clean, finite)):
        for x in (bad, usual) if first else (usual, bad):
            observer(x)
    if name != "HistogramObserver":
        assert_all_same(statistics(ours), statistics(clean))
    else:
        assert_same(ours.min_val, clean.min_val)
        assert_same(ours.max_val, clean.max_val)
        assert float(ours.histogram.sum()) == 9
    assert ours.nonfinite_count == 3
    with pytest.warns(UserWarning, match=f"{name}: 3 NaN or infinite values were left out of"):
        scale, zero_point = ours.calculate_qparams()
    if name != "HistogramObserver":
        assert_all_same((scale, zero_point), clean.calculate_qparams())
    assert scale.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_ignore_a_batch_of_nothing_else(name: str) -> None:
    ours = make(name)
    ours(torch.full((2, 3), torch.nan))
    assert ours.nonfinite_count == 6
    with pytest.warns(UserWarning, match="never fed|NaN") as seen:
        scale, _ = ours.calculate_qparams()
    assert any("was never fed" in str(warning.message) for warning in seen)
    assert any("6 NaN or infinite" in str(warning.message) for warning in seen)
    assert (scale == 1).all()
    ours(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert ours.min_val.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_propagate(name: str) -> None:
    ours = make(name, nonfinite="propagate")
    ours(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    ours(BAD)
    assert not (ours.min_val.isfinite() & ours.max_val.isfinite()).any()
    with pytest.warns(UserWarning, match=f"{name}: 3 NaN or infinite values were let into"):
        ours.calculate_qparams()


@pytest.mark.parametrize("name", NAMES)
def test_raise(name: str) -> None:
    ours = make(name, nonfinite="raise")
    with pytest.raises(ValueError, match="expected finite values, got 3 NaN or infinite of 6"):
        ours(BAD)
    with pytest.warns(UserWarning, match="never fed"):
        ours.calculate_qparams()
    ours(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    before = [t.clone() for t in ours.buffers()]
    with pytest.raises(ValueError, match="expected finite values"):
        ours(BAD)
    assert_all_same(list(ours.buffers()), before)


@pytest.mark.parametrize("name", NAMES)
def test_the_count_is_not_saved(name: str) -> None:
    """The keys of the state_dict are torch.ao's."""
    ours = make(name)
    ours(BAD)
    assert "nonfinite_count" not in ours.state_dict()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_dtype(name: str, dtype: torch.dtype) -> None:
    ours, wide = make(name), make(name)
    ours(BAD.to(dtype))
    wide(BAD)
    assert_all_same(list(ours.buffers()), list(wide.buffers()))


def test_beyond_float32() -> None:
    """A float64 that is infinite as float32 counts as infinite."""
    ours = pyobserver.MinMaxObserver()
    x = torch.tensor([1e300, 1.0, -1e39], dtype=torch.float64)
    with unchanged(x):
        ours(x)
    assert (ours.min_val, ours.max_val, ours.nonfinite_count) == (1, 1, 2)

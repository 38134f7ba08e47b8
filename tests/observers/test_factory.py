from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch

from pyobserver import FakeQuantize, HistogramObserver, MinMaxObserver, PerChannelMinMaxObserver


def test_with_args() -> None:
    factory = MinMaxObserver.with_args(dtype=torch.qint8, eps=0.5)
    first, second = factory(), factory()
    assert first is not second
    assert (first.dtype, float(first.eps)) == (torch.qint8, 0.5)
    assert factory(eps=0.25).eps == 0.25


def test_factories_are_bound_further() -> None:
    """The first keeps its arguments, the later ones win."""
    first = MinMaxObserver.with_args(dtype=torch.qint8, quant_min=-8, quant_max=7)
    second = first.with_args(quant_min=-4)
    assert (first().quant_min, second().quant_min, second().quant_max) == (-8, -4, 7)
    assert second().dtype == torch.qint8


def test_callable_arguments_are_called_at_construction() -> None:
    made: list[int] = []

    def bins() -> int:
        made.append(1)
        return 16 + len(made)

    factory = HistogramObserver.with_callable_args(bins=bins).with_args(combine="aligned")
    assert not made
    assert [factory().bins for _ in range(2)] == [17, 18]
    assert factory().combine == "aligned"
    assert factory(bins=5).bins == 5
    assert len(made) == 3


def test_callable_arguments_join() -> None:
    factory = PerChannelMinMaxObserver.with_callable_args(ch_axis=lambda: 2)
    factory = factory.with_callable_args(num_channels=lambda: 7)
    assert (factory().ch_axis, factory().min_val.shape) == (2, (7,))


def test_of_fake_quantizers() -> None:
    factory = FakeQuantize.with_args(observer=HistogramObserver.with_args(bins=32))
    assert factory().activation_post_process.bins == 32
    assert factory.with_args(quant_min=0, quant_max=15)().quant_max == 15


def test_name_and_repr() -> None:
    """``prepare_pt2e`` asks a factory for the name of its class."""
    factory = MinMaxObserver.with_args(eps=0.5).with_args(dtype=torch.qint8)
    assert factory.__name__ == "MinMaxObserver"
    assert "MinMaxObserver" in repr(factory)
    assert "eps=0.5" in repr(factory)
    assert isinstance(factory.p, partial)


@pytest.mark.parametrize(
    "clone", [copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))]
)
def test_copies(clone: object) -> None:
    factory = MinMaxObserver.with_args(dtype=torch.qint8)
    copied = clone(factory)  # type: ignore[operator]
    assert copied().dtype == torch.qint8
    assert copied.__name__ == factory.__name__


def test_wrong_arguments_are_refused_at_construction() -> None:
    with pytest.raises(TypeError):
        MinMaxObserver.with_args(no_such_argument=1)()
    with pytest.raises(ValueError, match="quant_min"):
        MinMaxObserver.with_args(quant_min=5, quant_max=1)()

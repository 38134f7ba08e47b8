from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.cases import DTYPES, assert_rejected, assert_same, not_dense_real_float, unchanged
from streams import streams
from torch import Tensor

from pyobserver import (
    FakeQuantize,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerBlockMinMaxObserver,
    PerChannelMinMaxObserver,
)

from .agreement import (
    PER_CHANNEL_CONFIGS,
    PER_TENSOR_CONFIGS,
    assert_qparams_agree,
    assert_range_agrees,
    feed,
    pair,
)

STREAMS = streams()
PER_TENSOR = {
    "MinMaxObserver": ({},),
    "MovingAverageMinMaxObserver": ({}, {"averaging_constant": 0.3}, {"averaging_constant": 1}),
}
PER_CHANNEL = {
    "PerChannelMinMaxObserver": ({"ch_axis": 1},),
    "MovingAveragePerChannelMinMaxObserver": (
        {"ch_axis": 1},
        {"ch_axis": 1, "averaging_constant": 0.3},
    ),
}


def agree(name: str, stream: str, of: torch.dtype, **arguments: Any) -> None:
    """The same state and the same scale as torch.ao's, after every batch."""
    ours, theirs = pair(name, **arguments)
    for i, x in enumerate(STREAMS[stream]):
        feed(ours, theirs, x.to(of))
        assert_range_agrees(ours, theirs, (stream, i, arguments))
        assert_qparams_agree(ours, theirs, (stream, i, arguments))


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("name", PER_TENSOR)
def test_per_tensor_streams(name: str, stream: str) -> None:
    for arguments in PER_TENSOR[name]:
        for dtype in DTYPES:
            agree(name, stream, dtype, **arguments)


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("name", PER_CHANNEL)
def test_per_channel_streams(name: str, stream: str) -> None:
    for arguments in PER_CHANNEL[name]:
        for dtype in DTYPES:
            agree(name, stream, dtype, **arguments)


@pytest.mark.parametrize("config", PER_TENSOR_CONFIGS)
@pytest.mark.parametrize("name", PER_TENSOR)
def test_per_tensor_configs(name: str, config: str) -> None:
    for stream in ("normal", "relu", "negative", "zeros", "constant", "tiny", "large"):
        agree(name, stream, torch.float32, **PER_TENSOR_CONFIGS[config])


@pytest.mark.parametrize("config", PER_CHANNEL_CONFIGS)
@pytest.mark.parametrize("name", PER_CHANNEL)
def test_per_channel_configs(name: str, config: str) -> None:
    for stream in ("normal", "relu", "negative", "zeros", "constant", "tiny", "large"):
        agree(name, stream, torch.float32, ch_axis=1, **PER_CHANNEL_CONFIGS[config])


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -2, -3, -4])
@pytest.mark.parametrize("name", PER_CHANNEL)
def test_every_axis(name: str, axis: int) -> None:
    """D18: also where the channels are not next to each other in memory."""
    ours, theirs = pair(name, ch_axis=axis)
    for scale in (1, 2):
        x = scale * torch.randn(3, 4, 5, 6)
        feed(ours, theirs, x.contiguous(memory_format=torch.channels_last))
    assert_range_agrees(ours, theirs)
    assert_qparams_agree(ours, theirs)
    assert ours.min_val.shape == (x.shape[axis],)


def test_int32_affine_zero_point_does_not_overflow() -> None:
    """torch.ao's wraps around."""
    ours = MinMaxObserver(dtype=torch.int32)
    ours(torch.tensor([0.0, 1.0]))
    scale, zero_point = ours.calculate_qparams()
    assert zero_point.tolist() == [-(2**31)]
    assert scale.item() == pytest.approx(torch.finfo(torch.float32).eps)


def test_memoryless() -> None:
    for ours in (
        MinMaxObserver(memoryless=True),
        PerChannelMinMaxObserver(memoryless=True, ch_axis=0),
    ):
        for scale in (3, 1):
            x = scale * torch.randn(2, 9)
            ours(x)
        per_tensor = isinstance(ours, MinMaxObserver)
        low, high = x.aminmax() if per_tensor else x.aminmax(dim=1)
        assert_same(ours.min_val, low)
        assert_same(ours.max_val, high)


def test_num_channels_sizes_the_state() -> None:
    sized, lazy = PerChannelMinMaxObserver(ch_axis=1, num_channels=5), PerChannelMinMaxObserver(1)
    assert sized.min_val.shape == sized.max_val.shape == (5,)
    assert lazy.min_val.shape == lazy.max_val.shape == (0,)
    x = STREAMS["normal"][0]
    for observer in (sized, lazy):
        observer(x)
    assert_same(sized.min_val, lazy.min_val)
    assert_same(sized.max_val, lazy.max_val)


@pytest.mark.parametrize("first", ["lazy", "sized"])
def test_a_channel_count_that_changes(first: str) -> None:
    """torch.ao broadcasts one channel over the three of before."""
    observer = PerChannelMinMaxObserver(0, num_channels=3 if first == "sized" else None)
    if first == "lazy":
        observer(torch.randn(3, 4))
    for wrong in (torch.randn(1, 4), torch.randn(4, 3)):
        with (
            unchanged(observer.min_val, observer.max_val, observer.nonfinite_count),
            pytest.raises(ValueError, match=r"min_val: expected shape \(\d,\).* got shape \(3,\)"),
        ):
            observer(wrong)


def test_a_first_batch_that_fails_leaves_the_state_unsized() -> None:
    observer = PerChannelMinMaxObserver(ch_axis=2)
    before = observer.min_val
    with pytest.raises(ValueError, match="axis: expected"):
        observer(torch.randn(3, 4))
    with pytest.raises(TypeError, match=r"x: expected .* got torch.int64"):
        observer(torch.ones(3, 4, 5, dtype=torch.int64))
    assert observer.min_val is before
    observer(torch.randn(3, 4, 5))
    assert observer.min_val.shape == (5,)


@pytest.mark.parametrize("name", [*PER_TENSOR, *PER_CHANNEL])
def test_empty_batches_change_nothing(name: str) -> None:
    ours, _ = pair(name)
    for x in (torch.empty(0), torch.empty(0, 3), torch.empty(3, 0)):
        assert ours(x) is x
    assert ours.min_val.numel() == (1 if name in PER_TENSOR else 0)
    with pytest.warns(UserWarning, match=f"{name} was never fed"):
        scale, zero_point = ours.calculate_qparams()
    assert scale.tolist() == [1.0]
    assert zero_point.tolist() == [0]


@pytest.mark.parametrize("name", [*PER_TENSOR, *PER_CHANNEL])
def test_reset(name: str) -> None:
    ours, _ = pair(name)
    ours(torch.tensor([[1.0, torch.nan, -2.0]]))
    ours.reset_min_max_vals()
    assert (ours.min_val == torch.inf).all()
    assert (ours.max_val == -torch.inf).all()
    assert ours.nonfinite_count == 0
    x = torch.tensor([[3.0, 5.0]])
    ours(x)
    assert ours.min_val == 3
    assert ours.max_val == 5


def test_gradient_passes_unobserved() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    ours = MinMaxObserver()
    y = ours(x * 2)
    assert not ours.min_val.requires_grad
    y.sum().backward()
    assert_same(x.grad, torch.full((3, 4), 2.0))


@pytest.mark.parametrize("name", [*PER_TENSOR, *PER_CHANNEL])
def test_rejects_inputs(name: str) -> None:
    ours, _ = pair(name)
    ours(torch.randn(3, 4))
    for x, came in not_dense_real_float().values():
        with unchanged(ours.min_val, ours.max_val, ours.nonfinite_count):
            assert_rejected(ours, {"x": x}, TypeError, f"x: expected a dense tensor .*, {came}")


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"dtype": torch.float8_e4m3fn}, ValueError, "dtype: expected .* got torch.float8_e4m3fn"),
        ({"dtype": torch.float16}, ValueError, "dtype: expected .* got torch.float16"),
        ({"quant_min": 5}, ValueError, "expected both or neither, got quant_min=5, quant_max=None"),
        ({"quant_min": 0, "quant_max": 0}, ValueError, "quant_min: expected .*quant_max=0"),
        ({"quant_min": 1, "quant_max": 9}, ValueError, r"that holds 0, got \[1, 9\]"),
        (
            {"quant_min": 0, "quant_max": 1000},
            ValueError,
            r"inside that of torch.quint8, \[0, 255\], got \[0, 1000\]",
        ),
        (
            {"dtype": torch.qint8, "quant_min": -129, "quant_max": 7},
            ValueError,
            r"inside that of torch.qint8, .* got \[-129, 7\]",
        ),
        ({"nonfinite": "drop"}, ValueError, "nonfinite: expected one of .* got 'drop'"),
    ],
)
@pytest.mark.parametrize("name", [*PER_TENSOR, *PER_CHANNEL])
def test_rejects_arguments(
    name: str, arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    """D25 among them."""
    classes = (
        MinMaxObserver,
        MovingAverageMinMaxObserver,
        PerChannelMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
    )
    cls = {cls.__name__: cls for cls in classes}[name]
    assert_rejected(cls, arguments, error, match)


def test_rejects_qschemes_and_constants() -> None:
    per_tensor, per_channel = torch.per_tensor_affine, torch.per_channel_affine
    for cls in (MinMaxObserver, MovingAverageMinMaxObserver):
        with pytest.raises(NotImplementedError, match=r"qscheme: expected .* got .*per_channel"):
            cls(qscheme=per_channel)
    for cls in (PerChannelMinMaxObserver, MovingAveragePerChannelMinMaxObserver):
        with pytest.raises(NotImplementedError, match=r"qscheme: expected .* got .*per_tensor"):
            cls(qscheme=per_tensor)
        with pytest.raises(NotImplementedError, match="is_dynamic: expected False"):
            cls(is_dynamic=True)
    for cls in (MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver):
        for constant in (0.0, -0.1, 1.5, float("nan")):
            with pytest.raises(ValueError, match=r"averaging_constant: expected .*\(0, 1\], got"):
                cls(averaging_constant=constant)
    with pytest.raises(NotImplementedError, match="averaging_constant: expected 1 for dynamic"):
        MovingAverageMinMaxObserver(is_dynamic=True)
    assert MovingAverageMinMaxObserver(averaging_constant=1, is_dynamic=True).is_dynamic
    with (
        pytest.warns(UserWarning, match="reduce_range is deprecated"),
        pytest.raises(NotImplementedError, match=r"reduce_range: expected False for torch.quint8"),
    ):
        MinMaxObserver(reduce_range=True, qscheme=torch.per_tensor_symmetric)


def test_attributes_that_a_subclass_computes() -> None:
    class Scheduled(MovingAverageMinMaxObserver):
        @property
        def averaging_constant(self) -> float:
            return 0.5

        @averaging_constant.setter
        def averaging_constant(self, value: float) -> None:
            """Computed."""

    observer = Scheduled()
    for high in (1.0, 2.0):
        observer(torch.tensor([0.0, high]))
    assert observer.max_val == 1.5

    class LastAxis(PerChannelMinMaxObserver):
        ch_axis = property(lambda self: -1, lambda self, value: None)

    per_channel = LastAxis()
    per_channel(torch.arange(6.0).reshape(2, 3))
    assert per_channel.max_val.tolist() == [3.0, 4.0, 5.0]


def test_an_axis_set_on_a_per_tensor_observer_is_not_taken() -> None:
    observer = MinMaxObserver()
    observer.ch_axis = -1
    observer(torch.arange(6.0).reshape(2, 3))
    assert observer.max_val == 5


BLOCK = (2, 3)
OF_BLOCKS: dict[str, dict[str, Any]] = {
    "running": {},
    "moving_average": {"averaging_constant": 0.3},
}


def in_pairs(x: Tensor) -> Tensor:
    """The blocks of a (4, 9) matrix as rows."""
    return x.reshape(2, 2, 3, 3).transpose(1, 2).reshape(6, 6)


@pytest.mark.parametrize("kind", OF_BLOCKS)
@pytest.mark.parametrize("told", [False, True])
def test_per_block(kind: str, told: bool) -> None:
    """Each block as a channel of its own."""
    more = {"shape": (4, 9)} if told else {}
    ours = PerBlockMinMaxObserver(BLOCK, **OF_BLOCKS[kind], **more)
    channels = {
        "running": PerChannelMinMaxObserver,
        "moving_average": MovingAveragePerChannelMinMaxObserver,
    }[kind](**OF_BLOCKS[kind])
    assert ours.min_val.shape == ((2, 3) if told else (0,))
    for i in range(3):
        x = torch.randn(4, 9, generator=torch.Generator().manual_seed(i))
        assert ours(x) is x
        channels(in_pairs(x))
        assert_same(ours.min_val, channels.min_val.reshape(2, 3))
        assert_same(ours.max_val, channels.max_val.reshape(2, 3))
    found, expected = ours.calculate_qparams(), channels.calculate_qparams()
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other.reshape(2, 3))


def test_per_block_groups_of_rows() -> None:
    ours = PerBlockMinMaxObserver(4)
    assert ours.block_size == (1, 4)
    ours(torch.arange(24.0).reshape(3, 8))
    assert ours.min_val.tolist() == [[0, 4], [8, 12], [16, 20]]


def test_per_block_state() -> None:
    ours = PerBlockMinMaxObserver(4)
    x = torch.randn(3, 8)
    ours(x)
    for fresh in (PerBlockMinMaxObserver(4), PerBlockMinMaxObserver(4, shape=(6, 8))):
        fresh.load_state_dict(ours.state_dict())
        assert_same(fresh.min_val, ours.min_val)
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict({**ours.state_dict(), "min_val": torch.zeros(5)})
    other = PerBlockMinMaxObserver(4)
    other(x * 2)
    assert_same((ours + other).max_val, torch.maximum(ours.max_val, other.max_val))
    ours.reset_min_max_vals()
    assert_same(ours.max_val, torch.full((3, 2), -torch.inf))


@pytest.mark.parametrize("told", [False, True])
def test_per_block_keeps_its_state_where_a_tensor_is_refused(told: bool) -> None:
    ours = PerBlockMinMaxObserver(4, nonfinite="raise", **({"shape": (3, 8)} if told else {}))
    refused = [
        torch.zeros(3, 9),
        torch.zeros(8),
        torch.full((3, 8), torch.nan),
        torch.ones(3, 8).int(),
    ]
    if told:
        refused.append(torch.zeros(4, 8))
    for x in refused:
        before = ours.min_val
        with pytest.raises((ValueError, TypeError), match=r"^minmax: "):
            ours(x)
        assert ours.min_val is before
        assert_same(ours.min_val, torch.full(before.shape, torch.inf))
    assert ours(torch.empty(0, 8)).numel() == 0


def test_per_block_rejects_arguments() -> None:
    for arguments, match in (
        ({"block_size": 4, "shape": (3, 9)}, "block_size: expected a divisor"),
        ({"block_size": 0, "shape": (3, 8)}, "block_size: expected a divisor"),
        ({"block_size": 4, "averaging_constant": 2}, "averaging_constant: expected"),
        ({"block_size": 4, "is_dynamic": True}, "is_dynamic: expected False"),
        ({"block_size": 4, "qscheme": torch.per_channel_affine}, "qscheme: expected"),
    ):
        with pytest.raises((ValueError, NotImplementedError), match=match):
            PerBlockMinMaxObserver(**arguments)
    with pytest.raises(TypeError, match="expected one of a scale per tensor or channel"):
        FakeQuantize(PerBlockMinMaxObserver, block_size=4)

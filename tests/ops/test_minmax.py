from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from backends import Backend
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import pyobserver
from pyobserver import ops

from .cases import (
    BLOCKED_SHAPES,
    BLOCKS,
    DTYPES,
    LARGE,
    LARGE_BLOCKED,
    LAYOUTS,
    REJECTED_BLOCKS,
    REJECTED_SWITCHES,
    SHAPE,
    SIZES,
    SPECIAL,
    any_isa,
    assert_all_same,
    assert_rejected,
    grid_of,
    in_blocks,
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

UPDATES = ("running", "moving_average", "memoryless")
AXES = (None, 0, 1, 2, 3, -1, -2, -3, -4)
State = tuple[Tensor, Tensor, Tensor]


def fresh(channels: int | tuple[int, ...] | None = None, device: str = "cpu") -> State:
    size = channels if isinstance(channels, tuple) else () if channels is None else (channels,)
    return (
        torch.full(size, torch.inf, device=device),
        torch.full(size, -torch.inf, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    )


def channels_of(x: Tensor, axis: int | None) -> int | None:
    return None if axis is None else x.shape[axis]


def fold(
    x: Tensor,
    state: State,
    axis: int | None = None,
    update: str = "running",
    averaging_constant: float = 0.01,
    nonfinite: str = "ignore",
    block_size: Sequence[int] | None = None,
) -> None:
    """What the op promises, out of ``torch.amin``, ``amax`` and the update rules of torch.ao."""
    min_val, max_val, nonfinite_count = (t.reshape(-1) for t in state)
    if x.numel() == 0:
        return
    values = x.detach().cpu().to(torch.float32)
    if block_size is not None:
        rows = in_blocks(values, block_size)
    elif axis is not None:
        rows = values.movedim(axis, 0).reshape(x.shape[axis], -1)
    else:
        rows = values.reshape(1, -1)
    finite = rows.isfinite()
    nonfinite_count += (~finite).sum()
    if nonfinite == "ignore":
        seen = finite.any(1)
        low = rows.where(finite, torch.inf).amin(1)
        high = rows.where(finite, -torch.inf).amax(1)
    else:
        seen = torch.ones(len(rows), dtype=torch.bool)
        low, high = rows.amin(1), rows.amax(1)
    # which of two zeros is the least is nobody's promise: ours is positive
    low, high = low + 0.0, high + 0.0
    first = (min_val == torch.inf) & (max_val == -torch.inf)
    if update == "running":
        low, high = torch.minimum(min_val, low), torch.maximum(max_val, high)
    elif update == "moving_average":
        low = torch.where(first, low, min_val + averaging_constant * (low - min_val))
        high = torch.where(first, high, max_val + averaging_constant * (high - max_val))
    min_val[seen], max_val[seen] = low[seen], high[seen]


def check(backend: Backend, batches: list[Tensor], axis: int | None, **options: Any) -> None:
    """Feeds the batches, comparing the state after each."""
    state = fresh(channels_of(batches[0], axis), backend.device)
    expected = fresh(channels_of(batches[0], axis))
    for i, x in enumerate(batches):
        backend.op("minmax")(x.to(backend.device), *state, axis=axis, **options)
        fold(x, expected, axis, **options)
        assert_all_same(state, expected, (i, tuple(x.shape), axis, options))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(backend: Backend, size: int | None, dtype: torch.dtype, update: str) -> None:
    batches = [sample(size, dtype, seed) * (seed + 1) for seed in range(3)]
    for axis in (None,) if size is None else (None, 0):
        check(backend, batches, axis, update=update, averaging_constant=0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    # the batch must keep its strides, so it is made where it is used
    for axis in AXES:
        state = fresh(channels_of(torch.empty(SHAPE), axis), backend.device)
        expected = fresh(channels_of(torch.empty(SHAPE), axis))
        for seed in range(2):
            x = laid_out(layout, dtype, backend.device, seed)
            backend.op("minmax")(x, *state, axis, "moving_average", 0.3)
            fold(x, expected, axis, "moving_average", 0.3)
            assert_all_same(state, expected, axis)


@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((1, 70, 1), 1),
        ((70, 1), 0),
        ((1, 1, 70), 2),
        ((3, 1, 5), 1),
        ((2, 17, 33), 1),
        ((40, 3), 1),
        ((3, 40), 0),
        ((1000, 2), -1),
        ((2, 2, 2, 2, 2, 9), 4),
    ],
)
def test_shapes_per_channel(backend: Backend, shape: tuple[int, ...], axis: int) -> None:
    for dtype in DTYPES:
        check(backend, [sample(shape, dtype, seed) for seed in range(2)], axis)


@pytest.mark.parametrize("nonfinite", ["ignore", "propagate"])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(backend: Backend, name: str, nonfinite: str) -> None:
    special = torch.tensor(SPECIAL[name])
    usual = sample(special.shape, seed=1)
    for dtype in DTYPES:
        for update in UPDATES:
            for order in ([special, usual], [usual, special, usual]):
                batches = [x.to(dtype) for x in order]
                options = {"update": update, "averaging_constant": 0.25, "nonfinite": nonfinite}
                check(backend, batches, None, **options)
                check(backend, [torch.stack([x, x.flip(0)]) for x in batches], 0, **options)
                check(backend, [torch.stack([x, x * 0 + 1], 1) for x in batches], 1, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_of_layouts(backend: Backend, layout: str, dtype: torch.dtype) -> None:
    for block_size in BLOCKS:
        grid = grid_of(torch.empty(SHAPE), block_size)
        state, expected = fresh(grid, backend.device), fresh(grid)
        for seed in range(2):
            x = laid_out(layout, dtype, backend.device, seed)
            backend.op("minmax")(x, *state, None, "moving_average", 0.3, block_size=block_size)
            fold(x, expected, None, "moving_average", 0.3, block_size=block_size)
            assert_all_same(state, expected, block_size)


@pytest.mark.parametrize(("shape", "block_size"), BLOCKED_SHAPES, ids=str)
@pytest.mark.parametrize("nonfinite", ["ignore", "propagate"])
def test_blocks(
    backend: Backend, shape: tuple[int, ...], block_size: tuple[int, ...], nonfinite: str
) -> None:
    for dtype in DTYPES:
        for update in UPDATES:
            options = {"update": update, "nonfinite": nonfinite, "block_size": block_size}
            grid = grid_of(torch.empty(shape), block_size)
            state, expected = fresh(grid, backend.device), fresh(grid)
            for seed in range(3):
                x = sample(shape, dtype, seed)
                if seed == 1 and x.numel():
                    sprinkled(x)
                    x.view(-1)[: x.numel() // 3] = torch.nan  # whole blocks among them
                backend.op("minmax")(x.to(backend.device), *state, None, **options)
                fold(x, expected, None, **options)
                assert_all_same(state, expected, (dtype, update, seed))


@pytest.mark.parametrize(("shape", "block_size"), LARGE_BLOCKED, ids=str)
def test_blocks_over_threads(
    backend: Backend, shape: tuple[int, ...], block_size: tuple[int, ...]
) -> None:
    values = sprinkled(sample(shape))
    rows = in_blocks(values, block_size)
    finite = rows.isfinite()
    grid = grid_of(values, block_size)
    expected = (
        (rows.where(finite, torch.inf).amin(1) + 0.0).reshape(grid),
        (rows.where(finite, -torch.inf).amax(1) + 0.0).reshape(grid),
        (~finite).sum(),
    )
    transposed = values.permute(*range(len(shape))[::-1]).contiguous()
    transposed = transposed.permute(*range(len(shape))[::-1])
    wide = torch.cat([values, values], -1)[..., : shape[-1]]
    for x in (values, transposed, wide):
        for count in (1, 2, 3) if backend.isa else (1,):
            state = fresh(grid, backend.device)
            with threads(count):
                backend.op("minmax")(x.to(backend.device), *state, block_size=block_size)
            assert_all_same(state, expected, (x.stride(), count))


def test_expanded_over_threads(backend: Backend) -> None:
    """Read once, by as many threads as its memory is worth; a value counts as often as it is."""
    row = sprinkled(sample(3 * 32768 + 5))
    count = 3 * int((~row.isfinite()).sum())
    finite = row[row.isfinite()]
    x = row.to(backend.device).expand(3, -1)
    for parts in (1, 2, 3):
        state = fresh(device=backend.device)
        with threads(parts):
            backend.op("minmax")(x, *state)
        assert_all_same(state, (finite.min(), finite.max(), torch.tensor(count)), parts)


def test_blocks_of_one_index_are_channels(backend: Backend) -> None:
    """A block across all axes but one holds what a channel does."""
    x = sample(SHAPE).to(backend.device)
    for axis in range(4):
        block_size = [1 if d == axis else size for d, size in enumerate(SHAPE)]
        grid = grid_of(x, block_size)
        ours, theirs = fresh(grid, backend.device), fresh(SHAPE[axis], backend.device)
        backend.op("minmax")(x, *ours, block_size=block_size)
        backend.op("minmax")(x, *theirs, axis)
        assert_all_same([t.reshape(-1) for t in ours], [t.reshape(-1) for t in theirs])


def test_blocks_that_are_not_finite_raise(backend: Backend) -> None:
    x = sample((4, 6)).to(backend.device)
    state = fresh((2, 2), backend.device)
    ops.minmax(x, *state, block_size=(2, 3))
    x[3, 5] = torch.nan
    options: dict[str, Any] = {"nonfinite": "raise", "block_size": (2, 3)}
    with unchanged(*state), pytest.raises((ValueError, RuntimeError), match="1 NaN or infinite"):
        backend.op("minmax")(x, *state, **options)
    with unchanged(*state), pytest.raises(ValueError, match=r"x: expected finite .* 1 NaN"):
        ops.minmax(x, *state, **options)


def test_blocks_and_switch(backend: Backend) -> None:
    x = sample((4, 6)).to(backend.device)
    state, expected = fresh((2, 2), backend.device), fresh((2, 2))
    for flag in (0, 1, 0):
        enabled = torch.tensor([flag], device=backend.device)
        backend.op("minmax")(x * (2 - flag), *state, enabled=enabled, block_size=[2, 3])
        if flag:
            fold(x, expected, block_size=[2, 3])
        assert_all_same(state, expected, flag)


def test_a_channel_without_finite_values_keeps_its_range(backend: Backend) -> None:
    state = fresh(2, backend.device)
    x = torch.tensor([[torch.nan, torch.inf], [1.0, 2.0]], device=backend.device)
    backend.op("minmax")(x, *state, 0)
    assert_all_same(
        state, (torch.tensor([torch.inf, 1.0]), torch.tensor([-torch.inf, 2.0]), torch.tensor(2))
    )
    backend.op("minmax")(x.flip(0), *state, 0, "moving_average", 0.5)
    assert_all_same(state, (torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0]), torch.tensor(4)))


def test_float64_is_rounded_to_float32(backend: Backend) -> None:
    x = torch.tensor([0.1, -0.3, 1e300, -1e39], dtype=torch.float64, device=backend.device)
    state = fresh(device=backend.device)
    backend.op("minmax")(x, *state)
    assert_all_same(state, (torch.tensor(-0.3), torch.tensor(0.1), torch.tensor(2)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_raise_leaves_the_state_as_it_was(backend: Backend, value: float) -> None:
    for axis in (None, 1):
        state = fresh(channels_of(torch.empty(2, 3), axis), backend.device)
        backend.op("minmax")(sample((2, 3)).to(backend.device), *state, axis, nonfinite="raise")
        x = sample((2, 3)).to(backend.device)
        x[1, 2] = value
        with (
            unchanged(*state),
            pytest.raises((ValueError, RuntimeError), match="1 NaN or infinite"),
        ):
            backend.op("minmax")(x, *state, axis, nonfinite="raise")
        with (
            unchanged(*state),
            pytest.raises(ValueError, match=r"x: expected finite .* 1 NaN .* 6"),
        ):
            ops.minmax(x, *state, axis, nonfinite="raise")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
def test_enabled(backend: Backend, dtype: torch.dtype) -> None:
    x = sample(33).to(backend.device)
    x[3] = torch.nan
    for update in UPDATES:
        state, expected = fresh(device=backend.device), fresh()
        for flag in (0, 1, 0):
            enabled = torch.tensor([flag], dtype=dtype, device=backend.device)
            backend.op("minmax")(x * (2 - flag), *state, None, update, 0.5, "ignore", enabled)
            if flag:
                fold(x, expected, None, update, 0.5)
            assert_all_same(state, expected, (update, flag))


def test_state_of_one_element_has_any_shape(backend: Backend) -> None:
    x = sample(9).to(backend.device)
    for shape in ((), (1,), (1, 1)):
        state, expected = fresh(device=backend.device), fresh()
        reshaped = tuple(t.reshape(shape) for t in state)
        backend.op("minmax")(x, *reshaped)
        fold(x, expected)
        assert_all_same(state, expected)


@pytest.mark.parametrize(
    ("shape", "axis"), [((LARGE,), None), ((61, LARGE // 61), 0), ((LARGE // 61, 61), 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_nothing(
    backend: Backend, shape: tuple[int, ...], axis: int | None, dtype: torch.dtype
) -> None:
    x = sample(shape, dtype)
    x.view(-1)[-1] = 1000.0  # in the tail
    x.view(-1)[7] = torch.nan
    expected = fresh(channels_of(x, axis))
    fold(x, expected, axis)
    for count in (1, 2):
        state = fresh(channels_of(x, axis), backend.device)
        with threads(count):
            backend.op("minmax")(x.to(backend.device), *state, axis)
        assert_all_same(state, expected, count)


def test_input_and_grad_mode_are_left_alone(backend: Backend) -> None:
    x = sample(33).to(backend.device).requires_grad_()
    state = fresh(device=backend.device)
    with unchanged(x):
        backend.op("minmax")(x, *state)
    assert not any(t.requires_grad for t in state)


@properties
@given(value_lists(), st.randoms(use_true_random=False), st.integers(1, 8))
def test_properties(values: list[float], random: Any, chunks: int) -> None:
    """The order of values and the cut into batches change nothing."""
    x = torch.tensor(values)
    whole, shuffled, chunked = fresh(), fresh(), fresh()
    ops.minmax(x, *whole)
    random.shuffle(values)
    ops.minmax(torch.tensor(values), *shuffled)
    for chunk in x.chunk(chunks):
        ops.minmax(chunk, *chunked)
    assert_all_same(shuffled, whole)
    assert_all_same(chunked, whole)
    assert whole[0] == x.min()
    assert whole[1] == x.max()


def test_meta() -> None:
    state = fresh(device="meta")
    ops.minmax(torch.empty(3, 5, device="meta"), *state)
    assert [t.shape for t in state] == [(), (), ()]


def test_meta_blocks() -> None:
    ops.minmax(torch.empty(4, 6, device="meta"), *fresh((2, 2), "meta"), block_size=(2, 3))
    with pytest.raises(ValueError, match=r"min_val: expected shape \(2, 3\)"):
        ops.minmax(torch.empty(4, 6, device="meta"), *fresh((2, 2), "meta"), block_size=(2, 2))


def test_compiles_with_blocks() -> None:
    def call(x: Tensor, low: Tensor, high: Tensor, count: Tensor) -> Tensor:
        ops.minmax(x, low, high, count, None, "moving_average", 0.5, block_size=(2, 3))
        return low + high

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    ours, theirs = fresh((2, 2)), fresh((2, 2))
    for seed in range(3):
        x = sample((4, 6), seed=seed)
        assert_all_same([compiled(x, *ours), *ours], [call(x, *theirs), *theirs], seed)


def arguments(**changed: Any) -> dict[str, Any]:
    low, high, count = fresh(3)
    low[1], high[1] = -1.0, 2.0
    given = {
        "x": sample((2, 3)),
        "min_val": low,
        "max_val": high,
        "nonfinite_count": count,
        "axis": 1,
    }
    return {**given, **changed}


REJECTED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "axis_high": ({"axis": 2}, ValueError, r"axis: expected .*\[-2, 1\].* got 2"),
    "axis_low": ({"axis": -3}, ValueError, r"axis: expected .*\[-2, 1\].* got -3"),
    "channels": ({"axis": 0}, ValueError, r"min_val: expected shape \(2,\).* got shape \(3,\)"),
    "no_axis": ({"axis": None}, ValueError, r"min_val: expected 1 element, got shape \(3,\)"),
    "0-d": ({"x": torch.tensor(1.0), "axis": 0}, ValueError, r"axis: expected .* got 0"),
    "max_val_size": (
        {"max_val": torch.zeros(2)},
        ValueError,
        r"max_val: expected shape \(3,\).* got shape \(2,\)",
    ),
    "min_val_dim": ({"min_val": torch.zeros(3, 1)}, ValueError, r"min_val: .* got shape \(3, 1\)"),
    "min_val_dtype": (
        {"min_val": torch.zeros(3, dtype=torch.float64)},
        TypeError,
        "min_val: expected torch.float32, got torch.float64",
    ),
    "max_val_dtype": (
        {"max_val": torch.zeros(3, dtype=torch.float16)},
        TypeError,
        "max_val: expected torch.float32, got torch.float16",
    ),
    "min_val_none": ({"min_val": None}, TypeError, "min_val: expected torch.float32, got NoneType"),
    "min_val_strides": (
        {"min_val": torch.zeros(6)[::2]},
        ValueError,
        r"min_val: expected a contiguous tensor, got strides \(2,\)",
    ),
    "count_dtype": (
        {"nonfinite_count": torch.zeros((), dtype=torch.int32)},
        TypeError,
        "nonfinite_count: expected torch.int64, got torch.int32",
    ),
    "count_size": (
        {"nonfinite_count": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        r"nonfinite_count: expected 1 element, got shape \(3,\)",
    ),
    "update": ({"update": "mean"}, ValueError, "update: expected one of running.* got 'mean'"),
    "nonfinite": ({"nonfinite": "drop"}, ValueError, "nonfinite: expected one of .* got 'drop'"),
    "constant_0": (
        {"averaging_constant": 0.0},
        ValueError,
        r"averaging_constant: expected a value in \(0, 1\], got 0.0",
    ),
    "constant_high": (
        {"averaging_constant": 1.5},
        ValueError,
        r"averaging_constant: expected .*, got 1.5",
    ),
    "constant_nan": (
        {"averaging_constant": float("nan")},
        ValueError,
        r"averaging_constant: expected .*, got nan",
    ),
    **REJECTED_SWITCHES,
    **REJECTED_BLOCKS,
    "block_shape": (
        {"axis": None, "block_size": [1, 1]},
        ValueError,
        r"min_val: expected shape \(2, 3\), .* block_size \(1, 1\), got shape \(3,\)",
    ),
    "block_dim": (
        {"axis": None, "block_size": [2, 1]},
        ValueError,
        r"min_val: expected shape \(1, 3\), .* got shape \(3,\)",
    ),
    "block_max_val": (
        {
            "min_val": torch.zeros(1, 3),
            "max_val": torch.zeros(3, 1),
            "axis": None,
            "block_size": [2, 1],
        },
        ValueError,
        r"max_val: expected shape \(1, 3\), .* got shape \(3, 1\)",
    ),
    "x_meta": (
        {"x": torch.empty(2, 3, device="meta")},
        ValueError,
        "min_val: expected a tensor on meta beside x, got one on cpu",
    ),
    "min_val_meta": (
        {"min_val": torch.empty(3, device="meta")},
        ValueError,
        "min_val: expected a tensor on cpu beside x, got one on meta",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name: str) -> None:
    changed, error, match = REJECTED[name]
    assert_rejected(ops.minmax, arguments(**changed), error, f"^minmax: {match}")


@pytest.mark.parametrize("name", REJECTED)
@any_isa
def test_kernel_rejects(backend: Backend, name: str) -> None:
    if not backend.cuda:
        assert_rejected(backend.op("minmax"), arguments(**REJECTED[name][0]), Exception)


@any_isa
def test_rejects_other_inputs(backend: Backend) -> None:
    for x, came in not_dense_real_float().values():
        expected = f"^minmax: x: expected a dense tensor of float32, .*, {came}"
        assert_rejected(ops.minmax, arguments(x=x), TypeError, expected)
        if not backend.cuda:
            assert_rejected(backend.op("minmax"), arguments(x=x), Exception)


def test_opcheck() -> None:
    for x in opcheck_inputs().values():
        opcheck("minmax", x, *fresh())
        if x.dim() > 1:
            opcheck("minmax", x, *fresh(x.shape[1]), 1, "moving_average", 0.5)
        block_size = [max(1, size // 2) if size % 2 == 0 else size for size in x.shape]
        if x.numel():
            opcheck("minmax", x, *fresh(grid_of(x, block_size)), block_size=block_size)
    enabled = torch.ones(1, dtype=torch.uint8)
    opcheck("minmax", sample(9), *fresh(), None, "memoryless", 1.0, "propagate", enabled)
    opcheck("minmax", sample((3, 3)).requires_grad_(), *fresh(3), axis=-1)


def test_one_nan_whatever_the_threads() -> None:
    """Of several NaN the bits would else be those that the last thread met."""
    x = sample(LARGE)
    for i, bits in enumerate((0x7FC00001, 0xFFC00005 - 2**32, 0x7FC00007)):
        x.view(torch.int32)[i * (LARGE // 3)] = bits
    for count in (1, 2, 3):
        state = torch.tensor(torch.inf), torch.tensor(-torch.inf), torch.tensor(0)
        with threads(count):
            ops.minmax(x, *state, nonfinite="propagate")
        if pyobserver.native_status.cpu:
            assert [t.view(torch.int32).item() for t in state[:2]] == [0x7FC00000] * 2
        assert state[0].isnan()

"""What the tests of every op share: the tensors they run over, and how results are compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from backends import coded, params
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# None is a 0-d tensor; the others straddle the vector lengths, and the last few tails of them
SIZES = (None, 0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000)
LARGE = 2**20 + 3  # above every threshold for threads
SHAPE = (6, 4, 5, 3)

properties = settings(derandomize=True, deadline=None, max_examples=50)

# a backend of each library: arguments are checked before an instruction set is chosen
any_isa = pytest.mark.parametrize(
    "backend", params(lambda backend: backend.isa in (None, "baseline")), indirect=True
)

View = Callable[[Tensor], Tensor]

# the shape to start from, and the view of it whose shape is SHAPE
LAYOUTS: dict[str, tuple[tuple[int, ...], View]] = {
    "contiguous": (SHAPE, lambda x: x),
    "unaligned": ((361,), lambda x: x[1:].view(SHAPE)),
    "sliced": ((6, 4, 5, 7), lambda x: x[..., 1::2]),
    "cropped": ((8, 4, 6, 3), lambda x: x[1:7, :, 1:]),
    "transposed": ((3, 5, 4, 6), lambda x: x.permute(3, 2, 1, 0)),
    "permuted": ((5, 3, 6, 4), lambda x: x.permute(2, 3, 0, 1)),
    "channels_last": (SHAPE, lambda x: x.contiguous(memory_format=torch.channels_last)),
    "expanded": ((6, 1, 5, 3), lambda x: x.expand(SHAPE)),
    "one_value": ((), lambda x: x.expand(SHAPE)),
    "overlapping": ((124,), lambda x: x.as_strided(SHAPE, (20, 5, 1, 1), 1)),
}

SPECIAL: dict[str, list[float]] = {
    "nan": [1.0, float("nan"), -2.0],
    "nan_first": [float("nan"), 1.0, -2.0, 0.5],
    "all_nan": [float("nan")] * 9,
    "inf": [1.0, float("inf"), -2.0],
    "minus_inf": [1.0, -float("inf"), 5.0],
    "both_inf": [float("inf"), 3.0, -float("inf"), float("nan")],
    "only_inf": [float("inf"), -float("inf")],
    "nan_late": [0.25] * 70 + [float("nan")],
    "minus_zero": [-0.0, -0.0],
    "both_zeros": [0.0, -0.0, 0.0, -0.0],
    "denormal": [1e-45, -1e-45, 3e-42, 0.0],
    "equal": [2.5] * 17,
    "equal_negative": [-3.0] * 17,
    "huge": [3e38, -3e38, 1e38, 0.0],
    "tiny": [1e-38, 2e-38, -1e-38],
    "large_equal": [3e10] * 5,
}

# sizes of a block for SHAPE: of one element, along each axis, across several, the whole
BLOCKS = (
    (1, 1, 1, 1),
    (1, 1, 1, 3),
    (1, 1, 5, 1),
    (1, 4, 1, 1),
    (6, 1, 1, 1),
    (2, 2, 5, 1),
    (3, 4, 1, 3),
    (1, 2, 5, 3),
    (2, 4, 5, 3),
    SHAPE,
)
# other shapes, with the sizes of a block: a group of a row, tiles, no dimension, no element
BLOCKED_SHAPES = (
    ((4, 64), (1, 32)),
    ((3, 1032), (1, 8)),
    ((8, 16), (4, 8)),
    ((10, 21), (5, 7)),
    ((35, 39), (5, 13)),
    ((4, 6, 2), (2, 3, 1)),
    ((4, 6, 2, 3), (2, 3, 1, 3)),
    ((4, 6, 2, 3), (1, 3, 2, 1)),
    ((2, 2, 2, 2, 2, 6), (1, 2, 1, 2, 1, 3)),
    ((7,), (1,)),
    ((7,), (7,)),
    ((), ()),
    ((0,), (3,)),
    ((3, 0), (1, 2)),
)
# long enough for threads
LARGE_BLOCKED = (
    ((300, 512), (1, 32)),
    ((300, 512), (4, 8)),
    ((1200, 77), (3, 11)),
    ((1200, 77), (1200, 7)),
    ((77, 1200), (7, 1200)),
    ((77, 1201), (1, 1)),
    ((77, 1201), (77, 1201)),
    ((8, 30, 21, 20), (2, 5, 1, 20)),
    ((8, 30, 21, 20), (4, 1, 7, 2)),
)

# rows of a table of rejected arguments, of x of shape (2, 3) and axis 1
REJECTED_BLOCKS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    name: ({"block_size": block_size, "axis": axis}, ValueError, f"block_size: expected {match}")
    for name, block_size, axis, match in (
        ("block_short", [3], None, r"a divisor .* \(shape \(2, 3\)\), got \(3,\)"),
        ("block_long", [1, 1, 3], None, r"a divisor .* got \(1, 1, 3\)"),
        ("block_empty", [], None, r"a divisor .* got \(\)"),
        ("block_no_divisor", [1, 2], None, r"a divisor .* got \(1, 2\)"),
        ("block_above", [1, 6], None, r"a divisor .* got \(1, 6\)"),
        ("block_zero", [1, 0], None, r"a divisor .* got \(1, 0\)"),
        ("block_negative", [1, -1], None, r"a divisor .* got \(1, -1\)"),
        ("block_beside_axis", [1, 3], 1, r"None beside axis=1, got \[1, 3\]"),
    )
}

# rows of such a table: a switch of the wrong type, or of two elements
REJECTED_SWITCHES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "enabled_dtype": (
        {"enabled": torch.ones(1)},
        TypeError,
        "enabled: expected torch.uint8 .*, got torch.float32",
    ),
    "enabled_size": (
        {"enabled": torch.ones(2, dtype=torch.uint8)},
        ValueError,
        r"enabled: expected 1 element, got shape \(2,\)",
    ),
}


def sample(
    shape: Sequence[int] | int | None, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Normal values, three wide, the same for every dtype but for rounding."""
    dims = () if shape is None else (shape,) if isinstance(shape, int) else tuple(shape)
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(dims, generator=generator, dtype=torch.float64)).to(dtype)


def value_lists(bound: float = 1e6) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(-bound, bound, width=32), min_size=1, max_size=40)


def laid_out(layout: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    shape, view = LAYOUTS[layout]
    return view(sample(shape, dtype, seed).to(device))


def grid_of(x: Tensor, block_size: Sequence[int]) -> tuple[int, ...]:
    return tuple(whole // size for whole, size in zip(x.shape, block_size, strict=True))


def in_blocks(x: Tensor, block_size: Sequence[int]) -> Tensor:
    """A row for each block, in the order of the grid, with its elements in theirs."""
    if x.numel() == 0:
        return x.reshape(0, 1)
    dims = x.dim()
    for d, size in enumerate(block_size):
        x = x.unfold(d, size, size)
    return x.flatten(0, dims - 1).flatten(1) if dims else x.reshape(1, 1)


def from_blocks(rows: Tensor, like: Tensor, block_size: Sequence[int]) -> Tensor:
    """The tensor, shaped as ``like``, of which ``in_blocks`` made the rows."""
    places = in_blocks(torch.arange(like.numel()).reshape(like.shape), block_size)
    x = torch.empty(like.shape, dtype=rows.dtype)
    x.view(-1)[places.reshape(-1)] = rows.reshape(-1)
    return x


def sprinkled(x: Tensor) -> Tensor:
    """NaN of both signs and infinities here and there, also in the first and the last element."""
    flat = x.view(-1)
    for first, step, value in (
        (0, 4099, torch.nan),
        (x.numel() - 1, -5003, torch.inf),
        (3, 7013, -torch.inf),
        (5, 9973, -torch.nan),
    ):
        flat[list(range(x.numel())[first::step])] = value
    return x


def _bits(x: Tensor) -> Tensor:
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.contiguous().view(integer)


def assert_same(actual: Tensor, expected: Tensor, context: object = "") -> None:
    """Equal to the last bit, the sign of a zero included; one NaN is as good as another."""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    assert actual.dtype == expected.dtype, context
    assert actual.shape == expected.shape, context
    bits_actual, bits_expected = actual, expected
    if expected.is_floating_point():
        bits_actual, bits_expected = _bits(actual), _bits(expected)
        if not torch.equal(bits_actual, bits_expected):
            bits_actual, bits_expected = (
                _bits(t.where(t == t, torch.nan)) for t in (actual, expected)
            )
    if not torch.equal(bits_actual, bits_expected):
        wrong = (bits_actual != bits_expected).reshape(-1)
        at = int(wrong.nonzero()[0])
        pytest.fail(
            f"{context}: {int(wrong.sum())} of {wrong.numel()} differ, the first at {at}: "
            f"got {actual.reshape(-1)[at].item()!r}, expected {expected.reshape(-1)[at].item()!r}"
        )


def assert_all_same(
    actual: Sequence[Tensor], expected: Sequence[Tensor], context: object = ""
) -> None:
    assert len(actual) == len(expected)
    for i, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert_same(one, other, (context, i))


@contextmanager
def unchanged(*state: Tensor) -> Iterator[None]:
    """The tensors hold the same bits after the block as before."""
    before = [t.clone() for t in state]
    yield
    assert_all_same(state, before, "state changed")


def assert_rejected(
    call: Callable[..., Any],
    arguments: dict[str, Any],
    error: type[Exception] | tuple[type[Exception], ...],
    match: str | None = None,
) -> None:
    """The call raises, and no tensor among its arguments has changed."""
    tensors = [
        value
        for value in arguments.values()
        if isinstance(value, Tensor)
        and value.device.type != "meta"
        and value.layout is torch.strided
        and not value.is_quantized
    ]
    with unchanged(*tensors), pytest.raises(error, match=match):
        call(**arguments)


def not_dense_real_float() -> dict[str, tuple[Any, str]]:
    """What no op takes for its data, with what the message says came."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and said so once a process
        quantized = torch.quantize_per_tensor(torch.zeros(3, 4), 0.1, 0, torch.quint8)
    return {
        "integer": (torch.zeros(3, 4, dtype=torch.int32), "got torch.int32"),
        "bool": (torch.zeros(3, 4, dtype=torch.bool), "got torch.bool"),
        "complex": (torch.zeros(3, 4, dtype=torch.complex64), "got torch.complex64"),
        "float8": (torch.zeros(3, 4).to(torch.float8_e4m3fn), "got torch.float8_e4m3fn"),
        "sparse": (torch.eye(4).to_sparse(), "got a sparse tensor"),
        "quantized": (quantized, "got a quantized tensor"),
        "list": ([1.0, 2.0], "got list"),
        "none": (None, "got NoneType"),
    }


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def opcheck(name: str, *args: Any, **kwargs: Any) -> None:
    """All the checks of ``torch.library.opcheck``, none of them skipped."""
    op = getattr(torch.ops.pyobserver, name).default
    kwargs = {key: coded(arg) for key, arg in kwargs.items()}
    results = torch.library.opcheck(op, tuple(map(coded, args)), kwargs)
    assert len(results) == 4
    assert set(results.values()) == {"SUCCESS"}


def opcheck_inputs() -> dict[str, Tensor]:
    """Empty, 0-d, odd and strided tensors; of every dtype one that is strided and another."""
    return {
        "0-d": sample(None, torch.float64),
        "empty": sample(0, torch.float16),
        "empty_2d": sample((0, 3), torch.bfloat16),
        "odd": sample(33, torch.float32),
        "sliced": laid_out("sliced", torch.bfloat16),
        "transposed": laid_out("transposed", torch.float64),
        "channels_last": laid_out("channels_last", torch.float32),
        "expanded": laid_out("expanded", torch.float16),
    }

"""Every op gives the same bytes on every instruction set and thread count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from backends import Backend, backends
from torch import Tensor

import pyobserver
from pyobserver.ops import log_columns

from .cases import DTYPES, assert_all_same, grid_of, sample, sprinkled, threads

# odd, so that the parts of two and of three threads, and their tails, are of different lengths
LENGTH = 209_327
SHAPE = (67, 41, 81)
BLOCKS = ((1, 1, 27), (1, 41, 9), (67, 1, 1), (1, 1, 1))
Op = Callable[[str], Callable[..., Any]]
Work = Callable[[Op, Tensor], Sequence[Tensor]]

BASELINE = [backend for backend in backends() if backend.isa == "baseline"]
NATIVE = [backend for backend in backends() if backend.isa is not None]


@cache
def values(dtype: torch.dtype, special: bool = True) -> Tensor:
    """With extremes in the last element and about the middle, and values that are not finite."""
    x = sample(LENGTH + 1, dtype)[1:]
    x[LENGTH // 3 :: 40_009] *= 40
    x[-2] = 500.0
    return sprinkled(x) if special else x


@cache
def shaped(dtype: torch.dtype, layout: str) -> Tensor:
    x = sprinkled(sample(SHAPE, dtype))
    x[33, :, 7] *= 50
    if layout == "transposed":
        return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    if layout == "sliced":
        return torch.stack([x, x], -1)[..., 0]
    return x[:, :1].expand(SHAPE) if layout == "expanded" else x


def state_of(groups: tuple[int, ...] = (), fed: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    low = torch.full(groups, -0.25 if fed else torch.inf)
    return low, -low, torch.zeros((), dtype=torch.int64)


def grid_state(groups: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    count = max(1, int(torch.tensor(groups).prod()))
    scale = 0.05 * (1 + torch.arange(count) * 7 % 11).float()
    return scale.reshape(groups), (torch.arange(count) % 5 - 2).int().reshape(groups)


def minmax(update: str, nonfinite: str, fed: bool) -> Work:
    def run(op: Op, x: Tensor) -> Sequence[Tensor]:
        state = state_of(fed=fed)
        op("minmax")(x, *state, None, update, 0.1, nonfinite)
        return state

    return run


def grouped_minmax(layout: str) -> Work:
    def run(op: Op, x: Tensor) -> Sequence[Tensor]:
        x = shaped(x.dtype, layout)
        found = list(state_of())
        op("minmax")(x, *found)
        for axis in range(3):
            state = state_of((SHAPE[axis],), True)
            op("minmax")(x, *state, axis, "moving_average", 0.3)
            found += state
        for block_size in BLOCKS:
            state = state_of(grid_of(x, block_size), True)
            op("minmax")(x, *state, None, "moving_average", 0.3, block_size=block_size)
            found += state
        return found

    return run


def histogram(scales: Sequence[float], combine: str, bins: int, layout: str | None = None) -> Work:
    """A range that stays, or that grows with the scales."""

    def run(op: Op, x: Tensor) -> Sequence[Tensor]:
        x = x if layout is None else shaped(x.dtype, layout)
        state = (torch.zeros(bins, dtype=torch.float64), *state_of())
        for scale in scales:
            op("histogram")((x * scale) if layout is None else x, *state, combine)
        return state

    return run


def histogram_combine(op: Op, x: Tensor) -> Sequence[Tensor]:
    found = []
    for combine in ("midpoint", "aligned"):
        first, second = ((torch.zeros(511, dtype=torch.float64), *state_of()) for _ in range(2))
        op("histogram")(x, *first)
        op("histogram")(x[: LENGTH // 2] * 1.7, *second)
        op("histogram_combine")(*first[:3], *second[:3], combine)
        found += first[:3]
    return found


def log_histogram(bits: int, layout: str | None = None, nonfinite: str = "ignore") -> Work:
    """Two batches; of a shape, for the tensor, for its channels, and for blocks."""

    def run(op: Op, x: Tensor) -> Sequence[Tensor]:
        found = []
        options: list[dict[str, Any]] = [{}]
        if layout is not None:
            x = shaped(x.dtype, layout)
            options += [{"axis": axis} for axis in range(3)]
            options += [{"block_size": block_size} for block_size in BLOCKS[:3]]
        for option in options:
            groups: tuple[int, ...] = ()
            if "axis" in option:
                groups = (SHAPE[option["axis"]],)
            elif option:
                groups = grid_of(x, option["block_size"])
            counts = torch.zeros((*groups, log_columns(bits)), dtype=torch.int64)
            state = (counts, *state_of(groups)[:2])
            for batch in (x, x[: x.shape[0] // 2] if not groups else x):
                op("log_histogram")(batch, *state, nonfinite=nonfinite, **option)
            found += state
        return found

    return run


def range_search(op: Op, x: Tensor) -> Sequence[Tensor]:
    state = (torch.zeros(2048, dtype=torch.float64), *state_of())
    op("histogram")(x, *state)
    return [*state, *op("range_search")(*state[:3], 256)]


def kl_search(op: Op, x: Tensor) -> Sequence[Tensor]:
    counts, *state = (torch.zeros(6000, dtype=torch.float64), *state_of())
    op("histogram")(x.abs(), counts, *state)
    many = counts.reshape(3, 4, 500)
    return [
        op("kl_search")(counts, 128),
        op("kl_search")(many, 30, 7),
        op("kl_search")(many, 8, 20),
    ]


def lp_search(op: Op, x: Tensor) -> Sequence[Tensor]:
    """Nine histograms at once, with every kind of exponent, zero point and scale."""
    states = []
    for i in range(9):
        states.append((torch.zeros(301, dtype=torch.float64), *state_of()))
        op("histogram")(x[i :: 9 - i % 4] * 2.0**i, *states[-1])
    counts, low, high = (torch.stack(t) for t in list(zip(*states, strict=True))[:3])
    steps = torch.arange(302, dtype=torch.float64) / 301
    edges = torch.lerp(low.double().unsqueeze(1), high.double().unsqueeze(1), steps)
    found = [counts, low, high]
    for p, zero_point, constraint in (
        (2.0, None, "none"),
        (2.0, 0, "fp16"),
        (2.4, None, "none"),
        (1.0, None, "power_of_two"),
        (0.5, 3, "none"),
    ):
        scale, zero = torch.zeros(9), torch.zeros(9, dtype=torch.int32)
        error = torch.zeros(9, 3, dtype=torch.float64)
        outputs = scale, zero, error
        op("lp_search")(counts, edges, low, high, *outputs, -128, 127, p, zero_point, constraint)
        again = op("lp_error")(counts, edges, low, high, scale, zero, -128, 127, p)
        found += [*outputs, again]
    return found


def choose_qparams(op: Op, x: Tensor) -> Sequence[Tensor]:
    ends = x[:20_000].float().nan_to_num(0.0, 1e30, -1e30).reshape(2, -1).sort(0).values
    found = []
    for mapping in ("affine", "symmetric", "affine_float", "fused_affine", "fused_symmetric"):
        scale = torch.zeros(10_000)
        zero = torch.zeros(10_000, dtype=torch.float32 if "float" in mapping else torch.int32)
        op("choose_qparams")(*ends, scale, zero, torch.tensor([1e-7]), -128, 127, mapping)
        found += [scale, zero]
    return found


def fake_quantize(groups: str, layout: str | None = None) -> Work:
    """The values, the mask, its gradient, and the values again in a tensor that is given."""

    def run(op: Op, x: Tensor) -> Sequence[Tensor]:
        x = x if layout is None else shaped(x.dtype, layout)
        options: list[dict[str, Any]] = [{}]
        if groups == "axis":
            options = [{"axis": axis} for axis in range(x.dim())]
        elif groups == "blocks":
            options = [{"block_size": block_size} for block_size in BLOCKS]
        found = []
        for option in options:
            size: tuple[int, ...] = (1,)
            if groups == "axis":
                size = (x.shape[option["axis"]],)
            elif groups == "blocks":
                size = grid_of(x, option["block_size"])
            quantizer = grid_state(size)
            alone = op("_fake_quantize")(x, *quantizer, -8, 7, **option)
            y, mask = op("_fake_quantize_mask")(x, *quantizer, -8, 7, **option)
            out = torch.empty_like(y)
            op("_fake_quantize_out")(x, *quantizer, out, -8, 7, **option)
            grad = op("_fake_quantize_backward")(y, mask)
            found += [alone, y, mask, out, grad]
        return found

    return run


def switched_off(op: Op, x: Tensor) -> Sequence[Tensor]:
    off = torch.zeros(1, dtype=torch.uint8)
    return op("_fake_quantize_mask")(x, *grid_state((1,)), -8, 7, None, off)


def observe_fake_quantize(groups: str) -> Work:
    def run(op: Op, x: Tensor) -> Sequence[Tensor]:
        options: dict[str, Any] = {}
        size: tuple[int, ...] = (1,)
        if groups == "axis":
            x, options, size = shaped(x.dtype, "transposed"), {"axis": 1}, (SHAPE[1],)
        elif groups == "blocks":
            x, options = shaped(x.dtype, "contiguous"), {"block_size": BLOCKS[0]}
            size = grid_of(x, BLOCKS[0])
        found = []
        for mapping in ("affine", "fused_symmetric"):
            scale, zero = torch.ones(size), torch.zeros(size, dtype=torch.int32)
            state = (*state_of(size), scale, zero, torch.tensor([1e-7]))
            for _ in range(2):
                found += op("_observe_fake_quantize_mask")(
                    x, *state, -128, 127, mapping=mapping, **options
                )
                y = op("_observe_fake_quantize")(x, *state, -128, 127, mapping=mapping, **options)
                found.append(y)
            found += state
        return found

    return run


SEARCHES = ("range_search", "lp_search")  # of finite values
WORK: dict[str, Work] = {
    **{f"minmax_{update}": minmax(update, "ignore", False) for update in ("running", "memoryless")},
    "minmax_moving_average": minmax("moving_average", "ignore", True),
    "minmax_propagate": minmax("running", "propagate", True),
    **{
        f"minmax_{layout}": grouped_minmax(layout)
        for layout in ("contiguous", "transposed", "sliced", "expanded")
    },
    "histogram_steady": histogram((1.0, 1.0, 0.5), "midpoint", 2048),
    "histogram_growing": histogram((1.0, 1.3, 4.0), "midpoint", 509),
    "histogram_aligned": histogram((1.0, 1.3, 4.0), "aligned", 509),
    "histogram_few_bins": histogram((1.0, 1.0), "midpoint", 3),
    "histogram_sliced": histogram((1.0, 1.0), "midpoint", 256, "sliced"),
    "histogram_expanded": histogram((1.0, 1.0), "midpoint", 256, "expanded"),
    "histogram_combine": histogram_combine,
    **{f"log_histogram_{bits}_bits": log_histogram(bits) for bits in (2, 6, 9)},
    "log_histogram_propagate": log_histogram(3, None, "propagate"),
    **{
        f"log_histogram_{layout}": log_histogram(0, layout)
        for layout in ("contiguous", "transposed", "sliced", "expanded")
    },
    "range_search": range_search,
    "kl_search": kl_search,
    "lp_search": lp_search,
    "choose_qparams": choose_qparams,
    "fake_quantize": fake_quantize("none"),
    "fake_quantize_axis": fake_quantize("axis", "contiguous"),
    "fake_quantize_axis_transposed": fake_quantize("axis", "transposed"),
    "fake_quantize_blocks": fake_quantize("blocks", "contiguous"),
    "fake_quantize_blocks_sliced": fake_quantize("blocks", "sliced"),
    "fake_quantize_off": switched_off,
    **{
        f"observe_fake_quantize_{groups}": observe_fake_quantize(groups)
        for groups in ("none", "axis", "blocks")
    },
}


def results(backend: Backend, name: str, dtype: torch.dtype, count: int) -> list[bytes]:
    """The bytes of all outputs and states, each in the order of its memory."""
    x = values(dtype, special=name not in SEARCHES)
    with backend.selected(), threads(count):
        found = WORK[name](backend.op, x)
    flat = [t.as_strided((t.numel(),), (1,)) for t in found]
    return [t.view(torch.uint8).numpy().tobytes() for t in flat]


@pytest.mark.skipif(not NATIVE, reason="one kernel alone")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", WORK)
def test_same_bytes(name: str, dtype: torch.dtype) -> None:
    build = pyobserver.native_status.build
    isa = build.cpu_isa()
    try:
        expected = results(BASELINE[0], name, dtype, 1)
        for backend in NATIVE:
            for count in (1, 2, 3):
                found = results(backend, name, dtype, count)
                same = [one == other for one, other in zip(found, expected, strict=True)]
                assert all(same), (str(backend), count, same)
    finally:
        build.set_cpu_isa(isa)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", [name for name in WORK if "sliced" not in name and name != "lp_search"]
)
def test_same_as_the_reference(name: str, dtype: torch.dtype) -> None:
    """Its numbers: one NaN is as good as another."""
    searches = ("range_search", "kl_search", "choose_qparams")
    if not NATIVE or (name in searches and dtype != torch.float32):
        pytest.skip("one kernel alone, or the dtype changes nothing")
    x = values(dtype, special=name not in SEARCHES)
    with threads(2):
        found = WORK[name](NATIVE[-1].op, x)
        assert_all_same(found, WORK[name](Backend("reference").op, x), name)

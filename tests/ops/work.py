"""Pieces of work, of every op: what tests of determinism, of graphs and of syncs run.

Each takes the kernels by the names of their ops, and a tensor, on whose device it makes its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pyobserver.ops import log_columns

from .cases import grid_of, sample, sprinkled

# odd, so that the parts of two and of three threads, and their tails, are of different lengths
LENGTH = 209_327
SHAPE = (67, 41, 81)
BLOCKS = ((1, 1, 27), (1, 41, 9), (67, 1, 1), (1, 1, 1))
Op = Callable[[str], Callable[..., Any]]
Work = Callable[[Op, Tensor], Sequence[Tensor]]


@cache
def values(dtype: torch.dtype, special: bool = True, device: str = "cpu") -> Tensor:
    """With extremes in the last element and about the middle, and values that are not finite."""
    x = sample(LENGTH + 1, dtype).to(device)[1:]
    x[LENGTH // 3 :: 40_009] *= 40
    x[-2] = 500.0
    return sprinkled(x) if special else x


@cache
def shaped(dtype: torch.dtype, layout: str, device: torch.device) -> Tensor:
    x = sprinkled(sample(SHAPE, dtype)).to(device)
    x[33, :, 7] *= 50
    if layout == "transposed":
        return x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    if layout == "sliced":
        return torch.stack([x, x], -1)[..., 0]
    return x[:, :1].expand(SHAPE) if layout == "expanded" else x


def state_of(
    x: Tensor, groups: tuple[int, ...] = (), fed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    low = torch.full(groups, -0.25 if fed else torch.inf, device=x.device)
    return low, -low, low.new_zeros((), dtype=torch.int64)


def bins_of(x: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (torch.zeros(bins, dtype=torch.float64, device=x.device), *state_of(x))


def grid_state(x: Tensor, groups: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    index = torch.arange(math.prod(groups), device=x.device)
    scale = 0.05 * (1 + index * 7 % 11).float()
    return scale.reshape(groups), (index % 5 - 2).int().reshape(groups)


def minmax(update: str, nonfinite: str, fed: bool) -> Work:
    def run(op: Op, x: Tensor) -> Sequence[Tensor]:
        state = state_of(x, fed=fed)
        op("minmax")(x, *state, None, update, 0.1, nonfinite)
        return state

    return run


def grouped_minmax(layout: str) -> Work:
    def run(op: Op, x: Tensor) -> Sequence[Tensor]:
        x = shaped(x.dtype, layout, x.device)
        found = list(state_of(x))
        op("minmax")(x, *found)
        for axis in range(3):
            state = state_of(x, (SHAPE[axis],), True)
            op("minmax")(x, *state, axis, "moving_average", 0.3)
            found += state
        for block_size in BLOCKS:
            state = state_of(x, grid_of(x, block_size), True)
            op("minmax")(x, *state, None, "moving_average", 0.3, block_size=block_size)
            found += state
        return found

    return run


def histogram(scales: Sequence[float], combine: str, bins: int, layout: str | None = None) -> Work:
    """A range that stays, or that grows with the scales."""

    def run(op: Op, x: Tensor) -> Sequence[Tensor]:
        x = x if layout is None else shaped(x.dtype, layout, x.device)
        state = bins_of(x, bins)
        for scale in scales:
            op("histogram")((x * scale) if layout is None else x, *state, combine)
        return state

    return run


def histogram_combine(op: Op, x: Tensor) -> Sequence[Tensor]:
    found = []
    for combine in ("midpoint", "aligned"):
        first, second = bins_of(x, 511), bins_of(x, 511)
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
            x = shaped(x.dtype, layout, x.device)
            options += [{"axis": axis} for axis in range(3)]
            options += [{"block_size": block_size} for block_size in BLOCKS[:3]]
        for option in options:
            groups: tuple[int, ...] = ()
            if "axis" in option:
                groups = (SHAPE[option["axis"]],)
            elif option:
                groups = grid_of(x, option["block_size"])
            low, high, count = state_of(x, groups)
            state = (count.new_zeros((*groups, log_columns(bits))), low, high)
            for batch in (x, x[: x.shape[0] // 2] if not groups else x):
                op("log_histogram")(batch, *state, nonfinite=nonfinite, **option)
            found += state
        return found

    return run


def range_search(op: Op, x: Tensor) -> Sequence[Tensor]:
    state = bins_of(x, 2048)
    op("histogram")(x, *state)
    return [*state, *op("range_search")(*state[:3], 256)]


def kl_search(op: Op, x: Tensor) -> Sequence[Tensor]:
    counts, *state = bins_of(x, 6000)
    op("histogram")(x.abs(), counts, *state)
    many = counts.reshape(3, 4, 500)
    return [
        op("kl_search")(counts, 128),
        op("kl_search")(many, 30, 7),
        op("kl_search")(many, 8, 20),
    ]


def lp_search(*exponents: float) -> Work:
    """Nine histograms at once, with every kind of zero point and scale."""

    def run(op: Op, x: Tensor) -> Sequence[Tensor]:
        states = []
        for i in range(9):
            states.append(bins_of(x, 301))
            op("histogram")(x[i :: 9 - i % 4] * 2.0**i, *states[-1])
        counts, low, high = (torch.stack(t) for t in list(zip(*states, strict=True))[:3])
        # neither a division by a number nor lerp: not the same on every device
        steps = torch.arange(302, dtype=torch.float64, device=x.device) / counts.new_full((), 301)
        edges = low.double().unsqueeze(1) + (high.double() - low).unsqueeze(1) * steps
        found = [counts, low, high]
        for p in exponents:
            for zero_point, constraint in ((None, "none"), (0, "fp16"), (3, "power_of_two")):
                scale, zero = torch.zeros_like(low), torch.zeros_like(low, dtype=torch.int32)
                outputs = scale, zero, counts.new_zeros(9, 3)
                grid = -128, 127, p
                op("lp_search")(counts, edges, low, high, *outputs, *grid, zero_point, constraint)
                again = op("lp_error")(counts, edges, low, high, scale, zero, *grid)
                found += [*outputs, again]
        return found

    return run


def choose_qparams(op: Op, x: Tensor) -> Sequence[Tensor]:
    ends = x[:20_000].float().nan_to_num(0.0, 1e30, -1e30).reshape(2, -1).sort(0).values
    found = []
    for mapping in ("affine", "symmetric", "affine_float", "fused_affine", "fused_symmetric"):
        scale = torch.zeros_like(ends[0])
        zero = scale.to(torch.float32 if "float" in mapping else torch.int32, copy=True)
        op("choose_qparams")(*ends, scale, zero, scale.new_full((1,), 1e-7), -128, 127, mapping)
        found += [scale, zero]
    return found


def fake_quantize(groups: str, layout: str | None = None) -> Work:
    """The values, the mask, its gradient, and the values again in a tensor that is given."""

    def run(op: Op, x: Tensor) -> Sequence[Tensor]:
        x = x if layout is None else shaped(x.dtype, layout, x.device)
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
            quantizer = grid_state(x, size)
            alone = op("_fake_quantize")(x, *quantizer, -8, 7, **option)
            y, mask = op("_fake_quantize_mask")(x, *quantizer, -8, 7, **option)
            out = torch.empty_like(y)
            op("_fake_quantize_out")(x, *quantizer, out, -8, 7, **option)
            grad = op("_fake_quantize_backward")(y, mask)
            found += [alone, y, mask, out, grad]
        return found

    return run


def switched_off(op: Op, x: Tensor) -> Sequence[Tensor]:
    off = torch.zeros(1, dtype=torch.uint8, device=x.device)
    return op("_fake_quantize_mask")(x, *grid_state(x, (1,)), -8, 7, None, off)


def tensor_quant(layout: str | None = None) -> Work:
    """Every op, for one amax; of a shape for one an index of each axis, and of two axes."""

    def run(op: Op, x: Tensor) -> Sequence[Tensor]:
        x = x if layout is None else shaped(x.dtype, layout, x.device)
        sizes = [(1,)] if layout is None else [(67, 1, 1), (41, 1), (81,), (67, 1, 81)]
        found = []
        for size in sizes:
            index = torch.arange(math.prod(size), device=x.device)
            amax = (index * 7 % 11).float().reshape(size)
            q, scale, bits = op("_tensor_quant_mask")(x, amax, 4, False, False)
            y, mask = op("_fake_tensor_quant_mask")(x, amax, 8, False, True)
            grad = op("_tensor_quant_backward")(y, mask)
            found += [q, scale, bits, y, mask, grad]
            found += op("_tensor_quant")(x, amax, 8, False, True)
            found.append(op("_fake_tensor_quant")(x, amax, 4, False, False))
        return found

    return run


def learnable_clip(layout: str) -> Work:
    """Its values, the bits of both bounds, and the gradients, whose sums are taken in one order."""

    def run(op: Op, x: Tensor) -> Sequence[Tensor]:
        x = shaped(x.dtype, layout, x.device)
        low, high = (torch.full((), bound, device=x.device) for bound in (-2.1, 1.7))
        found = []
        for grid in ((), (4,), (8, False, False)):
            alone = op("_learnable_clip")(x, low, high, *grid)
            y, mask = op("_learnable_clip_mask")(x, low, high, *grid)
            found += [alone, y, mask, *op("_learnable_clip_backward")(y.nan_to_num(0.5), mask)]
        return found

    return run


def learnable_fake_quantize(layout: str) -> Work:
    """Its values, and the gradients, whose sums are taken in one order."""

    def run(op: Op, x: Tensor) -> Sequence[Tensor]:
        x = shaped(x.dtype, layout, x.device).nan_to_num(0.0, 1e4, -1e4)
        options: list[dict[str, Any]] = [{}, {"axis": 0}, {"axis": 2}, {"block_size": BLOCKS[0]}]
        found = []
        for option in options:
            size: tuple[int, ...] = (1,)
            if "axis" in option:
                size = (x.shape[option["axis"]],)
            elif option:
                size = grid_of(x, option["block_size"])
            scale, zero = grid_state(x, size)
            given = (x, scale, zero + 0.25, -8, 7)
            y = op("_learnable_fake_quantize")(*given, **option)
            found.append(y)
            found += op("_learnable_fake_quantize_backward")(y, *given, 0.1, **option)
            # scales that are none, learned all the same, and what is switched off or held
            learned = (x, scale - 0.3, zero + 0.25, -8, 7)
            option["least_scale"] = 1e-3
            found.append(op("_learnable_fake_quantize")(*learned, **option))
            off, on = torch.arange(2, dtype=torch.uint8, device=x.device).split(1)
            for more in ({"normalize": 2}, {"enabled": off}, {"held": on}):
                backward = op("_learnable_fake_quantize_backward")
                found += backward(y, *learned, 0.1, **option, **more)
        return found

    return run


def observe_fake_quantize(groups: str) -> Work:
    def run(op: Op, x: Tensor) -> Sequence[Tensor]:
        options: dict[str, Any] = {}
        size: tuple[int, ...] = (1,)
        if groups == "axis":
            x, options, size = shaped(x.dtype, "transposed", x.device), {"axis": 1}, (SHAPE[1],)
        elif groups == "blocks":
            x, options = shaped(x.dtype, "contiguous", x.device), {"block_size": BLOCKS[0]}
            size = grid_of(x, BLOCKS[0])
        found = []
        for mapping in ("affine", "fused_symmetric"):
            low, high, nonfinite = state_of(x, size)
            scale, zero = torch.ones_like(low), torch.zeros_like(low, dtype=torch.int32)
            state = (low, high, nonfinite, scale, zero, low.new_full((1,), 1e-7))
            for _ in range(2):
                found += op("_observe_fake_quantize_mask")(
                    x, *state, -128, 127, mapping=mapping, **options
                )
                y = op("_observe_fake_quantize")(x, *state, -128, 127, mapping=mapping, **options)
                found.append(y)
            found += state
        return found

    return run


SEARCHES = ("range_search", "lp_search", "lp_search_powers")  # of finite values
OF_COUNTS = (*SEARCHES, "kl_search", "choose_qparams")  # the dtype of x changes nothing
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
    "lp_search": lp_search(2.0),
    "lp_search_powers": lp_search(2.4, 0.5),
    "choose_qparams": choose_qparams,
    "fake_quantize": fake_quantize("none"),
    "fake_quantize_axis": fake_quantize("axis", "contiguous"),
    "fake_quantize_axis_transposed": fake_quantize("axis", "transposed"),
    "fake_quantize_blocks": fake_quantize("blocks", "contiguous"),
    "fake_quantize_blocks_sliced": fake_quantize("blocks", "sliced"),
    "fake_quantize_off": switched_off,
    "tensor_quant": tensor_quant(),
    "tensor_quant_transposed": tensor_quant("transposed"),
    "tensor_quant_sliced": tensor_quant("sliced"),
    **{
        f"learnable_{name}_{layout}": work(layout)
        for name, work in (("clip", learnable_clip), ("fake_quantize", learnable_fake_quantize))
        for layout in ("contiguous", "transposed", "sliced")
    },
    **{
        f"observe_fake_quantize_{groups}": observe_fake_quantize(groups)
        for groups in ("none", "axis", "blocks")
    },
}

"""Argument checks shared by every op: each names the argument, what was expected and what came."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NONFINITE = ("ignore", "propagate", "raise")
IGNORE, PROPAGATE, RAISE = range(3)
NONFINITE_CODES = {name: code for code, name in enumerate(NONFINITE)}


def _describe(value: object) -> str:
    if not isinstance(value, Tensor):
        return f"{type(value).__name__} ({value!r})"
    if value.is_quantized:
        return f"a quantized tensor ({value.dtype})"
    if value.layout is not torch.strided:
        return f"a sparse tensor ({value.layout})"
    return str(value.dtype)


def check_input(op: str, name: str, x: Tensor) -> None:
    """A tensor to observe or to quantize: dense, real, floating-point, of this process."""
    if (
        not isinstance(x, Tensor)
        or x.is_quantized
        or x.layout is not torch.strided
        or x.dtype not in FLOATING
    ):
        raise TypeError(
            f"{op}: {name}: expected a dense tensor of float32, float64, float16 or bfloat16, "
            f"got {_describe(x)}"
        )
    if is_dtensor(x):
        raise TypeError(
            f"{op}: {name}: expected a tensor of this process (x.to_local(), or x.full_tensor()), "
            f"got a DTensor with placements {x.placements}"  # type: ignore[attr-defined]
        )


def is_dtensor(x: object) -> bool:
    """Whether a tensor is spread over the ranks, without an import where none can be."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(x, kind)


def check_state(
    op: str, name: str, state: Tensor, dtypes: tuple[torch.dtype, ...], numel: int | None = None
) -> None:
    """A tensor that the op reads or updates: its dtype, contiguity and, where given, its size."""
    if not isinstance(state, Tensor) or state.dtype not in dtypes or state.is_quantized:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{op}: {name}: expected {wanted}, got {_describe(state)}")
    if not state.is_contiguous():
        raise ValueError(
            f"{op}: {name}: expected a contiguous tensor, got strides {state.stride()}"
        )
    if numel is not None and state.numel() != numel:
        raise ValueError(
            f"{op}: {name}: expected {numel} element{'s' if numel != 1 else ''}, "
            f"got shape {tuple(state.shape)}"
        )


def check_same_device(op: str, x: Tensor, others: Mapping[str, Tensor | None]) -> None:
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(
                f"{op}: {name}: expected a tensor on {x.device} beside x, got one on {other.device}"
            )


def check_choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name}: expected one of {', '.join(choices)}, got {value!r}")


def code_of(op: str, name: str, value: object, choices: tuple[str, ...]) -> int:
    """The number by which an op knows a mode: an integer costs its call less than a string."""
    check_choice(op, name, value, choices)
    return choices.index(str(value))


def check_code(op: str, name: str, code: int, choices: tuple[str, ...]) -> None:
    if not 0 <= code < len(choices):
        wanted = ", ".join(f"{i} ({choice})" for i, choice in enumerate(choices))
        raise ValueError(f"{op}: {name}: expected one of {wanted}, got {code}")


def check_axis(op: str, x: Tensor, axis: int) -> int:
    """The axis as a number from 0 on."""
    if x.dim() == 0:
        raise ValueError(f"{op}: axis: expected None for a 0-d tensor, got {axis}")
    if not -x.dim() <= axis < x.dim():
        raise ValueError(
            f"{op}: axis: expected a value in [{-x.dim()}, {x.dim() - 1}] "
            f"for a {x.dim()}-d tensor, got {axis}"
        )
    return axis % x.dim()


def check_block_size(op: str, x: Tensor, axis: int | None, block_size: Sequence[int]) -> None:
    if axis is not None:
        raise ValueError(f"{op}: block_size: expected None beside axis={axis}, got {block_size}")
    if len(block_size) != x.dim() or any(
        size < 1 or whole % size for size, whole in zip(block_size, x.shape, strict=True)
    ):
        raise ValueError(
            f"{op}: block_size: expected a divisor of each size of x (shape {tuple(x.shape)}), "
            f"got {tuple(block_size)}"
        )


def check_groups(
    op: str,
    states: dict[str, Tensor],
    x: Tensor,
    axis: int | None,
    block_size: Sequence[int] | None,
) -> None:
    """Tensors of one value for each group: one, a channel's each, or the grid of blocks."""
    if block_size is not None:
        check_block_size(op, x, axis, block_size)
        grid = tuple(whole // size for size, whole in zip(block_size, x.shape, strict=True))
        for name, state in states.items():
            if x.numel() and tuple(state.shape) != grid:
                raise ValueError(
                    f"{op}: {name}: expected shape {grid}, x's shape {tuple(x.shape)} over "
                    f"block_size {tuple(block_size)}, got shape {tuple(state.shape)}"
                )
    elif axis is not None and x.numel() > 0:
        axis = check_axis(op, x, axis)
        for name, state in states.items():
            check_channels(op, name, state, x, axis)


def check_channels(op: str, name: str, state: Tensor, x: Tensor, axis: int) -> None:
    if state.dim() != 1 or state.numel() != x.shape[axis]:
        raise ValueError(
            f"{op}: {name}: expected shape ({x.shape[axis]},), one value for each channel of "
            f"x (shape {tuple(x.shape)}, axis {axis}), got shape {tuple(state.shape)}"
        )


def check_quant_range(op: str, quant_min: int, quant_max: int) -> None:
    if quant_min < -(2**31) or quant_max >= 2**31:
        raise ValueError(
            f"{op}: quant_min, quant_max: expected int32 values, "
            f"got quant_min={quant_min}, quant_max={quant_max}"
        )
    if not quant_min < quant_max:
        raise ValueError(
            f"{op}: quant_min: expected a value below quant_max, "
            f"got quant_min={quant_min}, quant_max={quant_max}"
        )


def check_enabled(op: str, enabled: Tensor | None, name: str = "enabled") -> None:
    if enabled is not None:
        check_state(op, name, enabled, (torch.uint8, torch.int64, torch.bool), 1)

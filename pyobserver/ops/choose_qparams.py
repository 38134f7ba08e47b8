"""``choose_qparams``: scale and zero point of a range, written in place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _checks
from ._float32 import to_float32
from ._library import define, note_update

_LEAST_FUSED_SCALE = to_float32(6.1e-5)
MAPPINGS = ("affine", "symmetric", "affine_float", "fused_affine", "fused_symmetric")
AFFINE, SYMMETRIC, AFFINE_FLOAT, FUSED_AFFINE, FUSED_SYMMETRIC = range(5)
MAPPING_CODES = {name: code for code, name in enumerate(MAPPINGS)}


def check_qparams(
    op: str,
    scale: Tensor,
    zero_point: Tensor,
    eps: Tensor,
    quant_min: int,
    quant_max: int,
    mapping: int,
    symmetric_zero_point: int,
    integers: tuple[torch.dtype, ...] = (torch.int32, torch.int64),
) -> None:
    """integers: the dtypes that may hold an integer zero point."""
    _checks.check_code(op, "mapping", mapping, MAPPINGS)
    _checks.check_state(op, "scale", scale, (torch.float32,))
    dtypes = (torch.float32,) if mapping == AFFINE_FLOAT else integers
    _checks.check_state(op, "zero_point", zero_point, dtypes, scale.numel())
    _checks.check_state(op, "eps", eps, (torch.float32,), 1)
    _checks.check_same_device(op, scale, {"zero_point": zero_point, "eps": eps})
    _checks.check_quant_range(op, quant_min, quant_max)
    if mapping == FUSED_SYMMETRIC and quant_max - quant_min < 2:
        raise ValueError(
            f"{op}: quant_max: expected at least quant_min + 2 for fused_symmetric, "
            f"got quant_min={quant_min}, quant_max={quant_max}"
        )
    if abs(symmetric_zero_point) >= 2**31:
        raise ValueError(
            f"{op}: symmetric_zero_point: expected an int32 value, got {symmetric_zero_point}"
        )


def _check(
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    eps: Tensor,
    quant_min: int,
    quant_max: int,
    mapping: int,
    symmetric_zero_point: int,
    enabled: Tensor | None,
) -> None:
    op = "choose_qparams"
    _checks.check_state(op, "min_val", min_val, (torch.float32,))
    _checks.check_state(op, "max_val", max_val, (torch.float32,), min_val.numel())
    _checks.check_state(op, "scale", scale, (torch.float32,), min_val.numel())
    _checks.check_enabled(op, enabled)
    others = {"max_val": max_val, "scale": scale, "enabled": enabled}
    _checks.check_same_device(op, min_val, others)
    integers = (torch.int32, torch.int64, torch.float32)
    check_qparams(
        op, scale, zero_point, eps, quant_min, quant_max, mapping, symmetric_zero_point, integers
    )


def _fused(
    low: Tensor, high: Tensor, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of torch's fused moving-average kernel."""
    if symmetric:
        two_sided = (low < 0) & (high > 0)
        least, most = -((quant_max - quant_min) // 2 + 1), (quant_max - quant_min) // 2
        bound = torch.maximum((low / least).abs(), (high / most).abs()).double()
        low = torch.where(two_sided, (bound * least).float(), low)
        high = torch.where(two_sided, (bound * most).float(), high)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ((high.double() - low.double()) / (quant_max - quant_min)).float()
    unusable = (scale == 0) | (1.0 / scale).isinf()
    scale = torch.where(unusable, 0.1, scale)
    small = scale < _LEAST_FUSED_SCALE
    width = _LEAST_FUSED_SCALE * (quant_max - quant_min)
    amplifier = torch.full_like(scale, _LEAST_FUSED_SCALE) / scale  # a true division
    grown_high = torch.where(low == 0, width, torch.where(high == 0, high, high * amplifier))
    grown_low = torch.where(low == 0, low, torch.where(high == 0, -width, low * amplifier))
    low = torch.where(small, grown_low, low).double()
    high = torch.where(small, grown_high, high).double()
    scale = torch.where(small, _LEAST_FUSED_SCALE, scale).double()
    low_nearer = abs(quant_min) + (low / scale).abs() < abs(quant_max) + (high / scale).abs()
    zero_point = torch.where(low_nearer, quant_min - low / scale, quant_max - high / scale)
    if symmetric:
        # asked again: denormals became 0 above
        zero_point = torch.where((low < 0) & (high > 0), (quant_min + quant_max) / 2, zero_point)
    return scale.float(), torch.round(zero_point.nan_to_num(0.0)).clamp(quant_min, quant_max)


def reference(
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    eps: Tensor,
    quant_min: int,
    quant_max: int,
    mapping: int = AFFINE,
    symmetric_zero_point: int = 0,
    enabled: Tensor | None = None,
) -> None:
    _check(
        min_val, max_val, scale, zero_point, eps,
        quant_min, quant_max, mapping, symmetric_zero_point, enabled,
    )  # fmt: skip
    low, high, eps = min_val.reshape(scale.shape), max_val.reshape(scale.shape), eps.reshape(())
    steps = float(quant_max - quant_min)
    unseen = (low == torch.inf) & (high == -torch.inf)
    if mapping in (FUSED_AFFINE, FUSED_SYMMETRIC):
        symmetric = mapping == FUSED_SYMMETRIC
        new_scale, new_zero = _fused(low, high, quant_min, quant_max, symmetric)
        new_zero = new_zero.long().to(zero_point.dtype)
    elif mapping == SYMMETRIC:
        bound = torch.maximum(-low.clamp(max=0.0), high.clamp(min=0.0))
        new_scale = torch.maximum(bound / (steps / 2), eps)
        new_zero = torch.full_like(zero_point, symmetric_zero_point)
    else:
        if mapping == AFFINE:
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        width = (high - low) / steps
        # a width above the greatest float32 has a scale all the same
        width = torch.where(width == torch.inf, high / steps - low / steps, width)
        if mapping == AFFINE:
            new_scale = torch.maximum(width, eps)
            shift = torch.round(low / new_scale).nan_to_num(0.0).to(torch.int64)
            new_zero = (quant_min - shift).clamp(quant_min, quant_max)
        else:
            new_scale = torch.where(width > eps, width, 1.0)
            new_zero = -1 * low / new_scale
    new_scale = torch.where(unseen, 1.0, new_scale)
    new_zero = torch.where(unseen, 0, new_zero)
    if enabled is not None:
        off = enabled.reshape(()) == 0
        new_scale = torch.where(off, scale, new_scale)
        new_zero = torch.where(off, zero_point, new_zero)
    scale.copy_(new_scale)
    zero_point.copy_(new_zero)


_op = define(
    "choose_qparams(Tensor min_val, Tensor max_val, Tensor(a!) scale, Tensor(b!) zero_point, "
    "Tensor eps, int quant_min, int quant_max, int mapping=0, int symmetric_zero_point=0, "
    "Tensor? enabled=None) -> ()",
    _check,
    reference,
)


def choose_qparams(
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    eps: Tensor,
    quant_min: int,
    quant_max: int,
    mapping: str = "affine",
    symmetric_zero_point: int = 0,
    enabled: Tensor | None = None,
) -> None:
    """Write the scale and zero point of the range [min_val, max_val], in place.

    Args:
        min_val, max_val: float32, n elements each. A range that was never fed (+inf, -inf) gets
            scale 1 and zero point 0.
        scale: float32, n elements, written.
        zero_point: int32 or int64 (float32 for ``"affine_float"``), n elements, written; or
            float32, for one that is learned, which gets the integer.
        eps: float32, one element: the least scale.
        quant_min, quant_max: the integer grid.
        mapping: ``"affine"``: zero is put into the range, the zero point is rounded to the grid.
            ``"symmetric"``: scale ``2 * max(|min|, |max|) / (quant_max - quant_min)``, zero point
            ``symmetric_zero_point``. ``"affine_float"``: the range as it is, zero point
            ``-min / scale`` unrounded (torch's ``per_channel_affine_float_qparams``).
            ``"fused_affine"``, ``"fused_symmetric"``: what torch's
            ``fused_moving_avg_obs_fake_quant`` chooses, in float64, with a least scale of its own.
            The op has them as 0 to 4.
        enabled: one element; 0 changes nothing.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came.

    Source: ``UniformQuantizationObserverBase._calculate_qparams`` of torch 2.13; two results
    differ: a width above the greatest float32 and an int32 zero point do not overflow. The fused
    ones: ``ChooseQuantizationParams`` of FBGEMM.
    """
    try:
        _op(
            min_val, max_val, scale, zero_point, eps,
            quant_min, quant_max, MAPPING_CODES[mapping], symmetric_zero_point, enabled,
        )  # fmt: skip
        if not is_compiling():
            note_update(scale, zero_point)
    except (RuntimeError, OverflowError, KeyError, TypeError):
        code = _checks.code_of("choose_qparams", "mapping", mapping, MAPPINGS)
        _check(
            min_val, max_val, scale, zero_point, eps,
            quant_min, quant_max, code, symmetric_zero_point, enabled,
        )  # fmt: skip
        raise

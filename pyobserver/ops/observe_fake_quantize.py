"""``observe_fake_quantize``: minima and maxima, scale and zero point, and rounding in one call."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_exporting

from .. import _checks
from ._autograd import with_gradient
from ._library import define, define_composite, note_update, refused_batch, without_defaults
from ._transforms import Rule
from .choose_qparams import AFFINE, MAPPING_CODES, MAPPINGS, check_qparams
from .choose_qparams import reference as reference_choose_qparams
from .fake_quantize import (
    STRAIGHT_THROUGH,
    check_grid_params,
    check_values,
    fake,
    fake_mask,
    is_off,
)
from .fake_quantize import _op as op_fake_quantize
from .fake_quantize import _op_backward as op_backward
from .fake_quantize import _op_mask as op_fake_quantize_mask
from .fake_quantize import reference as reference_fake_quantize
from .fake_quantize import reference_mask as reference_fake_quantize_mask
from .minmax import MOVING_AVERAGE, UPDATE_CODES, UPDATES, check_minmax, finite_minmax
from .minmax import reference as reference_minmax

_OP = "observe_fake_quantize"


def _check(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    eps: Tensor,
    quant_min: int,
    quant_max: int,
    observer_enabled: Tensor | None,
    fake_quant_enabled: Tensor | None,
    mapping: int,
    axis: int | None,
    symmetric_zero_point: int,
    update: int,
    averaging_constant: float,
    nonfinite: int,
    block_size: Sequence[int] | None,
) -> None:
    check_minmax(
        _OP, x, min_val, max_val, nonfinite_count,
        axis, update, averaging_constant, nonfinite, block_size,
    )  # fmt: skip
    check_qparams(_OP, scale, zero_point, eps, quant_min, quant_max, mapping, symmetric_zero_point)
    check_grid_params(_OP, x, scale, zero_point, quant_min, quant_max, axis, block_size)
    switches = {"observer_enabled": observer_enabled, "fake_quant_enabled": fake_quant_enabled}
    for name, enabled in switches.items():
        _checks.check_enabled(_OP, enabled, name)
    _checks.check_same_device(_OP, x, switches)


def _observe(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    eps: Tensor,
    quant_min: int,
    quant_max: int,
    observer_enabled: Tensor | None,
    fake_quant_enabled: Tensor | None,
    mapping: int,
    axis: int | None,
    symmetric_zero_point: int,
    update: int,
    averaging_constant: float,
    nonfinite: int,
    block_size: Sequence[int] | None,
) -> None:
    """The part before the rounding; on copies first, so that a failed call changes nothing."""
    if x.numel() == 0:
        return
    state = min_val, max_val, nonfinite_count, scale, zero_point
    if nonfinite == _checks.RAISE and not is_off(observer_enabled):
        finite_minmax(x.detach().float(), None, nonfinite, _OP)
    low, high, count, new_scale, new_zero_point = new = [t.clone() for t in state]
    reference_minmax(
        x, low, high, count, axis, update, averaging_constant, nonfinite,
        observer_enabled, block_size,
    )  # fmt: skip
    reference_choose_qparams(
        low, high, new_scale, new_zero_point, eps, quant_min, quant_max,
        mapping, symmetric_zero_point, observer_enabled,
    )  # fmt: skip
    off = is_off(fake_quant_enabled)
    check_values(_OP, new_scale, new_zero_point, quant_min, quant_max, off)
    for old, value in zip(state, new, strict=True):
        old.copy_(value)


def reference(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    eps: Tensor,
    quant_min: int,
    quant_max: int,
    observer_enabled: Tensor | None = None,
    fake_quant_enabled: Tensor | None = None,
    mapping: int = AFFINE,
    axis: int | None = None,
    symmetric_zero_point: int = 0,
    update: int = MOVING_AVERAGE,
    averaging_constant: float = 0.01,
    nonfinite: int = _checks.IGNORE,
    block_size: Sequence[int] | None = None,
) -> Tensor:
    args = (
        x, min_val, max_val, nonfinite_count, scale, zero_point, eps, quant_min, quant_max,
        observer_enabled, fake_quant_enabled, mapping, axis, symmetric_zero_point,
        update, averaging_constant, nonfinite, block_size,
    )  # fmt: skip
    _check(*args)
    _observe(*args)
    # another device may have a kernel for this part
    quantize = reference_fake_quantize if x.device.type == "cpu" else op_fake_quantize
    return quantize(
        x, scale, zero_point, quant_min, quant_max, axis, fake_quant_enabled, block_size
    )


def reference_mask(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    eps: Tensor,
    quant_min: int,
    quant_max: int,
    observer_enabled: Tensor | None = None,
    fake_quant_enabled: Tensor | None = None,
    mapping: int = AFFINE,
    axis: int | None = None,
    symmetric_zero_point: int = 0,
    update: int = MOVING_AVERAGE,
    averaging_constant: float = 0.01,
    nonfinite: int = _checks.IGNORE,
    block_size: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    args = (
        x, min_val, max_val, nonfinite_count, scale, zero_point, eps, quant_min, quant_max,
        observer_enabled, fake_quant_enabled, mapping, axis, symmetric_zero_point,
        update, averaging_constant, nonfinite, block_size,
    )  # fmt: skip
    _check(*args)
    _observe(*args)
    on_cpu = x.device.type == "cpu"
    quantize = reference_fake_quantize_mask if on_cpu else op_fake_quantize_mask
    return quantize(
        x, scale, zero_point, quant_min, quant_max, axis, fake_quant_enabled, block_size
    )


_STATE = (
    "Tensor x, Tensor(a!) min_val, Tensor(b!) max_val, Tensor(c!) nonfinite_count, "
    "Tensor(d!) scale, Tensor(e!) zero_point, Tensor eps, int quant_min, int quant_max, "
    "Tensor? observer_enabled=None, Tensor? fake_quant_enabled=None, int mapping=0, "
    "int? axis=None, int symmetric_zero_point=0, int update=1, float averaging_constant=0.01, "
    "int nonfinite=0, SymInt[]? block_size=None"
)
_op_mask = define(
    f"_observe_fake_quantize_mask({_STATE}) -> (Tensor, Tensor)", _check, reference_mask, fake_mask
)
_op = define(
    f"_observe_fake_quantize({_STATE}) -> Tensor", _check, reference, fake,
    masked=("_observe_fake_quantize_mask", STRAIGHT_THROUGH),
)  # fmt: skip
_call = with_gradient(_op, _op_mask, op_backward, Rule(torch.mul, refused_batch(_OP)))


def _observe_and_quantize(x: Tensor, *args: Any) -> Tensor:
    y = _call(x, *args)
    if not is_compiling():
        note_update(*args[:5])
    return y


def _coded(
    mapping: str,
    axis: int | None,
    symmetric_zero_point: int,
    update: str,
    averaging_constant: float,
    nonfinite: str,
) -> Any:
    return (
        MAPPING_CODES[mapping], axis, symmetric_zero_point, UPDATE_CODES[update],
        averaging_constant, _checks.NONFINITE_CODES[nonfinite],
    )  # fmt: skip


@lru_cache(maxsize=128, typed=True)
def _settings(*options: Any) -> Any:
    return without_defaults(
        _coded(*options), (AFFINE, None, 0, MOVING_AVERAGE, 0.01, _checks.IGNORE)
    )


_composite = define_composite(f"observe_fake_quantize({_STATE}) -> Tensor", _observe_and_quantize)


def observe_fake_quantize(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    nonfinite_count: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    eps: Tensor,
    quant_min: int,
    quant_max: int,
    observer_enabled: Tensor | None = None,
    fake_quant_enabled: Tensor | None = None,
    mapping: str = "affine",
    axis: int | None = None,
    symmetric_zero_point: int = 0,
    update: str = "moving_average",
    averaging_constant: float = 0.01,
    nonfinite: str = "ignore",
    block_size: Sequence[int] | None = None,
) -> Tensor:
    """Observe ``x``, choose scale and zero point, and quantize ``x`` with them, in one call.

    What :func:`minmax`, :func:`choose_qparams` and :func:`fake_quantize` do one after the other,
    with the same arguments, numbers and gradient; a failed call changes nothing of the state.
    ``torch.vmap`` is refused: the state is one for all lanes.

    Args:
        x: any shape and strides; float32, float64, float16 or bfloat16. Empty: changes nothing.
        min_val, max_val, nonfinite_count: the statistics, updated; see :func:`minmax`.
        scale, zero_point: float32 and int32 or int64 (float32 for ``"affine_float"``), shaped as
            ``min_val``, updated.
        eps: float32, one element: the least scale.
        quant_min, quant_max: the integer grid.
        observer_enabled: one element (uint8, int64 or bool) read where the data is; 0 keeps the
            statistics, the scale and the zero point as they are.
        fake_quant_enabled: the same; 0 copies x.
        mapping, symmetric_zero_point: see :func:`choose_qparams`.
        axis, update, averaging_constant, nonfinite, block_size: see :func:`minmax`.

    Returns:
        What :func:`fake_quantize` gives.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came.

    Source: ``torch.fused_moving_avg_obs_fake_quant``, which takes float32 and moving averages
    alone (its scale is that of the mappings ``"fused_affine"`` and ``"fused_symmetric"``).
    """
    try:
        coded = mapping, axis, symmetric_zero_point, update, averaging_constant, nonfinite
        settings = _coded(*coded) if is_compiling() else _settings(*coded)
        if block_size is not None:
            settings = (*_coded(*coded), block_size)
        # an exported model keeps this op, and its gradient with it
        call = _composite if is_exporting() else _observe_and_quantize
        return call(
            x, min_val, max_val, nonfinite_count, scale, zero_point, eps, quant_min, quant_max,
            observer_enabled, fake_quant_enabled, *settings,
        )  # fmt: skip
    except (RuntimeError, OverflowError, AttributeError, TypeError, KeyError):
        state: Any = min_val, max_val, nonfinite_count, scale, zero_point
        coded_settings = (
            _checks.code_of(_OP, "mapping", mapping, MAPPINGS), axis, symmetric_zero_point,
            _checks.code_of(_OP, "update", update, UPDATES), averaging_constant,
            _checks.code_of(_OP, "nonfinite", nonfinite, _checks.NONFINITE), block_size,
        )  # fmt: skip
        options: Any = (
            eps,
            quant_min,
            quant_max,
            observer_enabled,
            fake_quant_enabled,
            *coded_settings,
        )
        _check(x, *state, *options)
        _observe(x.detach(), *[t.clone() for t in state], *options)
        raise

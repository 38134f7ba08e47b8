"""Calibration tables for ONNX Runtime's static quantization, from numpy activations.

ONNX Runtime is imported when a table is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from ..observers import LogHistogramObserver, UniformQuantizationObserverBase

__all__ = ["calibration_ranges", "calibration_table"]

Batches = Iterable[Mapping[str, np.ndarray]]
Ranges = dict[str, tuple[np.ndarray, np.ndarray]]


def calibration_ranges(
    batches: Batches, observer: Callable[[], UniformQuantizationObserverBase] | None = None
) -> Ranges:
    """The range of each activation, as an observer chooses it.

    Args:
        batches: for each batch the arrays by the names of their tensors, as of
            ``dict(zip(names, session.run(names, inputs)))``: one batch after the other is looked
            at, and none is kept. Arrays that are not of floating point are left out, as ONNX
            Runtime leaves them.
        observer: makes the observer of a tensor, as ``pyobserver.MinMaxObserver`` or a
            ``with_args``; None: ``LogHistogramObserver``, the affine range of the least squared
            error at 8 bits. One range a tensor. For symmetric activations ONNX Runtime's int8 ends
            at -127: ``with_args(dtype=torch.int8, qscheme=torch.per_tensor_symmetric,
            quant_min=-127, quant_max=127)``.

    Returns:
        Lowest and highest of each tensor, 0-d float32 arrays.

    Raises:
        ValueError: there is no batch, or a tensor without a finite value.
        TypeError: what is not an array.
    """
    make = LogHistogramObserver if observer is None else observer
    observers: dict[str, UniformQuantizationObserverBase] = {}
    for batch in batches:
        for name, array in batch.items():
            if not isinstance(array, np.ndarray):
                raise TypeError(
                    f"calibration_ranges: batches: expected numpy arrays, got {name!r} of "
                    f"{type(array).__name__}"
                )
            if np.issubdtype(array.dtype, np.floating):
                x = torch.from_numpy(np.require(array, requirements=["C", "W"]))
                observers.setdefault(name, make())(x)
    if not observers:
        raise ValueError("calibration_ranges: batches: expected floating-point arrays, got none")
    return {name: _range_of(name, each) for name, each in observers.items()}


def _range_of(
    name: str, observer: UniformQuantizationObserverBase
) -> tuple[np.ndarray, np.ndarray]:
    if observer.min_val.numel() != 1 or bool(observer.min_val > observer.max_val):
        got = "none" if observer.min_val.numel() == 1 else f"{observer.min_val.numel()} ranges"
        raise ValueError(
            f"calibration_ranges: {name}: expected one range of finite values, got {got}"
        )
    low, high = (end.detach().reshape(()).numpy() for end in observer.observed_range())
    return low, high


def calibration_table(
    batches: Batches, observer: Callable[[], UniformQuantizationObserverBase] | None = None
) -> Any:
    """:func:`calibration_ranges` as ONNX Runtime's ``TensorsData``.

    What its calibrators' ``compute_data`` gives: for ``QDQQuantizer(tensors_range=…)``,
    ``write_calibration_table``, and ``save_tensors_data``, whose file ``quantize_static`` takes as
    ``calibration_cache_path``.
    """
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData

    return TensorsData(CalibrationMethod.MinMax, calibration_ranges(batches, observer))

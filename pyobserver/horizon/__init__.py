"""Horizon's quantization toolkit by its names, over pyobserver's statistics and kernels."""

from .dtypes import QuantDType, qinfo, qint4, qint8, qint16
from .observers import (
    ClipObserver,
    FixedScaleObserver,
    HistogramObserver,
    KLObserver,
    MinMaxObserver,
    MixObserver,
    MSEObserver,
    ObserverBase,
    PercentileObserver,
)
from .strategy import ComputeScaleStrategy

__all__ = [
    "ClipObserver",
    "ComputeScaleStrategy",
    "FixedScaleObserver",
    "HistogramObserver",
    "KLObserver",
    "MSEObserver",
    "MinMaxObserver",
    "MixObserver",
    "ObserverBase",
    "PercentileObserver",
    "QuantDType",
    "qinfo",
    "qint4",
    "qint8",
    "qint16",
]

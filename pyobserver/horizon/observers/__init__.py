"""Horizon's observers, symmetric, over pyobserver's statistics and methods."""

from .base import ObserverBase
from .histogram import (
    HistogramObserver,
    KLObserver,
    MixObserver,
    MSEObserver,
    PercentileObserver,
)
from .minmax import ClipObserver, FixedScaleObserver, MinMaxObserver

__all__ = [
    "ClipObserver",
    "FixedScaleObserver",
    "HistogramObserver",
    "KLObserver",
    "MSEObserver",
    "MinMaxObserver",
    "MixObserver",
    "ObserverBase",
    "PercentileObserver",
]

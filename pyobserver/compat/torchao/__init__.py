"""For torchao's ``quantize_``: observers of its interface, and static quantization with them.

Importing this imports torchao.
"""

from .observers import (
    AffineQuantizedHistogramObserver,
    AffineQuantizedLogHistogramObserver,
    AffineQuantizedMinMaxObserver,
    AffineQuantizedMovingAverageMinMaxObserver,
    AffineQuantizedObserver,
)
from .static import (
    Int8StaticConfig,
    ObservedLinear,
    QuantizedLinear,
    StaticQuantConfig,
    insert_observers_,
)

__all__ = [
    "AffineQuantizedHistogramObserver",
    "AffineQuantizedLogHistogramObserver",
    "AffineQuantizedMinMaxObserver",
    "AffineQuantizedMovingAverageMinMaxObserver",
    "AffineQuantizedObserver",
    "Int8StaticConfig",
    "ObservedLinear",
    "QuantizedLinear",
    "StaticQuantConfig",
    "insert_observers_",
]

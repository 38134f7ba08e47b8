"""Observers and fake-quantize for PyTorch, in compiled kernels."""

from . import batch_norm as _batch_norm
from . import distributed, ops, ranges, tensor_quant
from . import fake_quantize as _fake_quantize
from . import learnable_fake_quantize as _learnable_fake_quantize
from . import observers as _observers
from ._native import NativeStatus
from ._native import status as native_status
from ._version import __version__
from .batch_norm import *  # noqa: F403
from .compat.hosts import register_with_hosts
from .fake_quantize import *  # noqa: F403
from .learnable_fake_quantize import *  # noqa: F403
from .observers import *  # noqa: F403
from .state import get_observer_state_dict, load_observer_state_dict
from .workflow import CalibrationResult, Comparison, QATSchedule, Site, calibrate, switch

register_with_hosts()

__all__ = [
    "CalibrationResult",
    "Comparison",
    "NativeStatus",
    "QATSchedule",
    "Site",
    "__version__",
    "calibrate",
    "distributed",
    "get_observer_state_dict",
    "load_observer_state_dict",
    "native_status",
    "ops",
    "ranges",
    "register_with_hosts",
    "switch",
    "tensor_quant",
]
__all__ += [
    *_batch_norm.__all__,
    *_fake_quantize.__all__,
    *_learnable_fake_quantize.__all__,
    *_observers.__all__,
]

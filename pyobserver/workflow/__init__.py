"""What a person does with observers: calibrate a model, read the result, apply it, train."""

from .calibrate import calibrate
from .comparison import Comparison, Sqnr
from .result import CalibrationResult, Site
from .schedule import QATSchedule, switch

__all__ = [
    "CalibrationResult",
    "Comparison",
    "QATSchedule",
    "Site",
    "Sqnr",
    "calibrate",
    "switch",
]

"""What a person does with observers: calibrate a model, read the result, apply it."""

from .calibrate import calibrate
from .comparison import Comparison, Sqnr
from .result import CalibrationResult, Site

__all__ = ["CalibrationResult", "Comparison", "Site", "Sqnr", "calibrate"]

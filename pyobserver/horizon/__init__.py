"""Horizon's quantization toolkit by its names, over pyobserver's statistics and kernels."""

from .dtypes import QuantDType, qinfo, qint4, qint8, qint16
from .export import export, export_onnx
from .fake_quantize import FakeQuantize, FakeQuantState, set_fake_quantize
from .march import March, set_march
from .modules import DeQuantStub, QuantStub
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
from .prepare import prepare
from .qconfig import QConfig, get_qconfig
from .qconfig_setter import (
    ConvDtypeTemplate,
    MatmulDtypeTemplate,
    ModuleNameTemplate,
    QconfigSetter,
    SensitivityTemplate,
    Template,
)
from .sensitivity import Sensitive, Sensitivity, sensitivity
from .strategy import ComputeScaleStrategy

__all__ = [
    "ClipObserver",
    "ComputeScaleStrategy",
    "ConvDtypeTemplate",
    "DeQuantStub",
    "FakeQuantState",
    "FakeQuantize",
    "FixedScaleObserver",
    "HistogramObserver",
    "KLObserver",
    "MSEObserver",
    "March",
    "MatmulDtypeTemplate",
    "MinMaxObserver",
    "MixObserver",
    "ModuleNameTemplate",
    "ObserverBase",
    "PercentileObserver",
    "QConfig",
    "QconfigSetter",
    "QuantDType",
    "QuantStub",
    "Sensitive",
    "Sensitivity",
    "SensitivityTemplate",
    "Template",
    "export",
    "export_onnx",
    "get_qconfig",
    "prepare",
    "qinfo",
    "qint4",
    "qint8",
    "qint16",
    "sensitivity",
    "set_fake_quantize",
    "set_march",
]

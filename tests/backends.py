"""The kernels that a case is run over: the reference, each CPU ISA of this machine, CUDA."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import pyobserver
from pyobserver._checks import NONFINITE
from pyobserver.ops.choose_qparams import MAPPINGS
from pyobserver.ops.histogram import COMBINES
from pyobserver.ops.lp_search import CONSTRAINTS
from pyobserver.ops.minmax import UPDATES

_REFERENCES = {
    "minmax": ("minmax", "reference"),
    "histogram": ("histogram", "reference"),
    "histogram_combine": ("histogram", "reference_combine"),
    "log_histogram": ("log_histogram", "reference"),
    "range_search": ("range_search", "reference"),
    "kl_search": ("kl_search", "reference"),
    "lp_search": ("lp_search", "reference"),
    "lp_error": ("lp_search", "reference_error"),
    "choose_qparams": ("choose_qparams", "reference"),
    "_fake_quantize": ("fake_quantize", "reference"),
    "_fake_quantize_mask": ("fake_quantize", "reference_mask"),
    "_fake_quantize_out": ("fake_quantize", "reference_out"),
    "_fake_quantize_backward": ("fake_quantize", "reference_backward"),
    "_observe_fake_quantize": ("observe_fake_quantize", "reference"),
    "_observe_fake_quantize_mask": ("observe_fake_quantize", "reference_mask"),
}
_CODES = {
    name: code
    for names in (UPDATES, NONFINITE, COMBINES, MAPPINGS, CONSTRAINTS)
    for code, name in enumerate(names)
}


def coded(arg: Any) -> Any:
    """The number of a mode, as the ops take it; anything else as it is."""
    return _CODES[arg] if isinstance(arg, str) else arg


@dataclass(frozen=True)
class Backend:
    """One way to run an op; ``select`` makes it the one that the dispatcher takes."""

    name: str
    device: str = "cpu"
    isa: str | None = None

    def op(self, name: str) -> Callable[..., Any]:
        """The kernel of an op, called with its arguments, modes by their names."""
        if self.name == "reference":
            module, function = _REFERENCES[name]
            kernel = getattr(importlib.import_module(f"pyobserver.ops.{module}"), function)
        else:
            kernel = getattr(torch.ops.pyobserver, name).default

        def call(*args: Any, **kwargs: Any) -> Any:
            return kernel(*map(coded, args), **{name: coded(arg) for name, arg in kwargs.items()})

        return call

    def select(self) -> None:
        if self.isa is not None:
            pyobserver.native_status.build.set_cpu_isa(self.isa)

    def __str__(self) -> str:
        return self.name


def backends() -> list[Backend]:
    """All that this machine can run."""
    found = [Backend("reference")]
    status = pyobserver.native_status
    if status.cpu:
        found += [Backend(f"cpu-{isa}", isa=isa) for isa in status.build.cpu_isas()]
    if torch.cuda.is_available():
        found.append(Backend("cuda", device="cuda"))
    return found

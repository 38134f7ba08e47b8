"""The kernels that a case is run over: the reference, each CPU ISA of this machine, CUDA.

The CUDA kernels run on a GPU, and where they were built for it (``PYOBSERVER_CUDA_ON_HOST=1`` at
the build) on a device in software too, on tensors of the CPU.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import pyobserver
from bench.fallback import rebound, registered
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
    "_fake_quantize_backward_": ("fake_quantize", "reference_backward_"),
    "_learnable_clip": ("learnable_clip", "reference"),
    "_learnable_clip_mask": ("learnable_clip", "reference_mask"),
    "_learnable_clip_backward": ("learnable_clip", "reference_backward"),
    "_learnable_fake_quantize": ("learnable_fake_quantize", "reference"),
    "_learnable_fake_quantize_backward": ("learnable_fake_quantize", "reference_backward"),
    "_observe_fake_quantize": ("observe_fake_quantize", "reference"),
    "_observe_fake_quantize_mask": ("observe_fake_quantize", "reference_mask"),
    "_tensor_quant": ("tensor_quant", "reference"),
    "_tensor_quant_mask": ("tensor_quant", "reference_mask"),
    "_tensor_quant_backward": ("tensor_quant", "reference_backward"),
    "_tensor_quant_backward_": ("tensor_quant", "reference_backward_"),
    "_fake_tensor_quant": ("tensor_quant", "reference_fake"),
    "_fake_tensor_quant_mask": ("tensor_quant", "reference_fake_mask"),
}
_CODES = {
    name: code
    for names in (UPDATES, NONFINITE, COMBINES, MAPPINGS, CONSTRAINTS)
    for code, name in enumerate(names)
}


def coded(arg: Any) -> Any:
    """The number of a mode, as the ops take it; anything else as it is."""
    return _CODES[arg] if isinstance(arg, str) else arg


class CudaOnHost:
    """The CUDA kernels on a device in software, and what it was asked to do so far."""

    def __init__(self, library: Path) -> None:
        torch.ops.load_library(str(library))
        self._library = ctypes.CDLL(str(library))
        self.ops = registered("pyobserver_cuda_on_host")

    def counts(self) -> dict[str, int]:
        """How many kernels were launched, memories set, and streams waited for."""
        names = ("launches", "memsets", "syncs")
        return {name: getattr(self._library, f"cuda_on_host_{name}")() for name in names}


@cache
def cuda_on_host() -> CudaOnHost | None:
    """None where it was not built."""
    root = Path(__file__).parents[1]
    built = f"build/cmake-{sys.implementation.cache_tag}-*/tests/cuda_on_host/*_cuda_on_host.so"
    libraries = sorted(root.glob(built))
    return CudaOnHost(libraries[0]) if libraries and pyobserver.native_status.cpu else None


@dataclass(frozen=True)
class Backend:
    """One way to run an op; within ``selected`` it is the one that everything takes.

    Attributes:
        device: where the tensors lie.
        isa: of the CPU kernels; None of others.
        cuda: the kernels are those of CUDA, on a GPU or not.
    """

    name: str
    device: str = "cpu"
    isa: str | None = None
    cuda: bool = False

    def op(self, name: str) -> Callable[..., Any]:
        """The kernel of an op, called with its arguments, modes by their names."""
        if self.name == "reference":
            module, function = _REFERENCES[name]
            kernel = getattr(importlib.import_module(f"pyobserver.ops.{module}"), function)
        elif self.name == "cuda-on-host":
            kernel = getattr(torch.ops.pyobserver_cuda_on_host, name).default
        else:
            kernel = getattr(torch.ops.pyobserver, name).default

        def call(*args: Any, **kwargs: Any) -> Any:
            return kernel(*map(coded, args), **{name: coded(arg) for name, arg in kwargs.items()})

        return call

    @contextmanager
    def selected(self) -> Iterator[None]:
        if self.name == "cuda-on-host":
            found = cuda_on_host()
            assert found is not None
            with rebound(found.ops):
                yield
            return
        build = pyobserver.native_status.build
        before = None if build is None else build.cpu_isa()
        if self.isa is not None:
            build.set_cpu_isa(self.isa)
        try:
            yield
        finally:
            if before is not None:
                build.set_cpu_isa(before)

    @contextmanager
    def asked(
        self, launches: int | range = 0, memsets: int | None = 0, syncs: int = 0
    ) -> Iterator[None]:
        """Asserts what the block asks of the device, where that can be counted: in software.

        ``launches`` may be a range of numbers; ``memsets`` None is any number.
        """
        host = cuda_on_host() if self.name == "cuda-on-host" else None
        before = {} if host is None else host.counts()
        yield
        if host is not None:
            found = {name: count - before[name] for name, count in host.counts().items()}
            allowed = launches if isinstance(launches, range) else (launches,)
            assert found["launches"] in allowed, found
            assert memsets in (None, found["memsets"]), found
            assert found["syncs"] == syncs, found

    def __str__(self) -> str:
        return self.name


GPU = Backend("cuda", device="cuda", cuda=True)
ON_HOST = Backend("cuda-on-host", cuda=True)


def why_no_gpu() -> str | None:
    """Why the CUDA kernels cannot run on a GPU here; None where they can."""
    if not torch.cuda.is_available():
        return "no GPU"
    reason = pyobserver.native_status.cuda_reason
    return None if reason is None else f"no CUDA kernels: {reason}"


def as_param(backend: Backend) -> Any:
    """A test's parameter; that of the GPU is marked, and skipped by name where there is none.

    ``PYOBSERVER_REQUIRE_GPU=1`` forbids to skip it.
    """
    if backend != GPU:
        return pytest.param(backend, id=backend.name)
    reason = why_no_gpu()
    skipped = reason is not None and os.environ.get("PYOBSERVER_REQUIRE_GPU") != "1"
    marks = [pytest.mark.gpu, *([pytest.mark.skip(reason=str(reason))] if skipped else [])]
    return pytest.param(backend, id=backend.name, marks=marks)


def backends() -> list[Backend]:
    """All that this machine can run."""
    found = [Backend("reference")]
    status = pyobserver.native_status
    if status.cpu:
        found += [Backend(f"cpu-{isa}", isa=isa) for isa in status.build.cpu_isas()]
    if cuda_on_host() is not None:
        found.append(ON_HOST)
    if why_no_gpu() is None:
        found.append(GPU)
    return found


def params(kept: Callable[[Backend], bool] = lambda backend: True) -> list[Any]:
    """A test's parameters: what this machine can run, and the GPU."""
    return [as_param(backend) for backend in dict.fromkeys([*backends(), GPU]) if kept(backend)]


needs_device_in_software = pytest.mark.skipif(
    cuda_on_host() is None, reason="built without PYOBSERVER_CUDA_ON_HOST=1"
)

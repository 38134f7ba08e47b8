"""Finds and loads the compiled libraries, and says why there are none."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

_HERE = Path(__file__).parent
_NOTE = _HERE / "_build_note.txt"  # why the install built nothing
_BUILD_MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
_AUTOGRAD_MODULE = "_autograd" + sysconfig.get_config_var("EXT_SUFFIX")
_LIBRARIES = {"cpu": "libpyobserver.so", "cuda": "libpyobserver_cuda.so"}


@dataclass(frozen=True)
class NativeStatus:
    """What is loaded.

    Attributes:
        cpu, cuda: whether the compiled kernels of that device are loaded.
        reason: why the CPU ones are not; None where they are.
        cuda_reason: the same of the CUDA ones.
        build: the pybind11 module ``pyobserver._C``, or None.
        autograd: ``pyobserver._autograd``, the ops' autograd in C++, or None: it is in Python.
        autograd_reason: why it is in Python.
    """

    cpu: bool
    cuda: bool
    reason: str | None
    cuda_reason: str | None
    build: ModuleType | None
    autograd: ModuleType | None = None
    autograd_reason: str | None = "the kernels are not compiled"


def _library_folder() -> Path:
    """The package's folder; in a checkout that is imported as it is, the one CMake built in."""
    if not (_HERE / _LIBRARIES["cpu"]).exists() and not _NOTE.exists():
        for built in sorted(
            (_HERE.parent / "build").glob(f"cmake-{sys.implementation.cache_tag}-*")
        ):
            if (built / _LIBRARIES["cpu"]).exists():
                return built
    return _HERE


def _load_library(folder: Path, device: str) -> str | None:
    """Load one library; returns why not, or None."""
    path = folder / _LIBRARIES[device]
    if not path.exists():
        return _NOTE.read_text().strip() if _NOTE.exists() else f"{path.name} was not built"
    if not (folder / _BUILD_MODULE).exists():
        return f"{path.name} was built for another Python ({_BUILD_MODULE} is missing)"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load under torch {torch.__version__}: {error}"
    return None


def _import_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"pyobserver.{path.name.split('.')[0]}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[spec.name] = module
    return module


def _import_autograd(folder: Path, build_torch: str) -> ModuleType | str:
    """The module, or why there is none. Unlike the kernels it is of one version of torch alone."""
    path = folder / _AUTOGRAD_MODULE
    if not path.exists():
        return f"{path.name} was not built"
    if build_torch != torch.__version__:
        return f"{path.name} was built for torch {build_torch}, and this is {torch.__version__}"
    try:
        return _import_module(path)
    except ImportError as error:
        return f"{path.name} does not load under torch {torch.__version__}: {error}"


def _load() -> NativeStatus:
    wanted = os.environ.get("PYOBSERVER_NATIVE", "1")
    if wanted not in ("0", "1", "require"):
        raise ValueError(f"PYOBSERVER_NATIVE: expected 0, 1 or require, got {wanted!r}")
    if wanted == "0":
        off = "switched off by PYOBSERVER_NATIVE=0"
        return NativeStatus(False, False, off, off, None)
    folder = _library_folder()
    reason = _load_library(folder, "cpu")
    if reason is not None:
        if wanted == "require":
            raise ImportError(
                f"PYOBSERVER_NATIVE=require, but the native library is absent: {reason}"
            )
        # pip hides what an install says, so it is said here
        warnings.warn(
            f"pyobserver runs in pure PyTorch, which is slower: {reason} "
            "(PYOBSERVER_NATIVE=0 accepts that)",
            RuntimeWarning,
            stacklevel=2,
        )
        return NativeStatus(False, False, reason, reason, None)
    build = _import_module(folder / _BUILD_MODULE)
    forced = os.environ.get("PYOBSERVER_ISA")
    if forced:
        build.set_cpu_isa(forced)
    # torch.cuda is not asked: that starts CUDA, and a process that forks later could not use it
    cuda_reason: str | None
    if torch.version.cuda is not None:
        cuda_reason = _load_library(folder, "cuda")
    else:
        built = (folder / _LIBRARIES["cuda"]).exists()
        cuda_reason = f"it was {'' if built else 'not '}built, and this torch is without CUDA"
    autograd = _import_autograd(folder, build.build_info()["build_torch"])
    if isinstance(autograd, str):
        return NativeStatus(True, cuda_reason is None, None, cuda_reason, build, None, autograd)
    return NativeStatus(True, cuda_reason is None, None, cuda_reason, build, autograd, None)


status = _load()

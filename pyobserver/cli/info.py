"""``pyobserver info``: what is installed, and which kernels are loaded."""

from __future__ import annotations

import platform

import torch

from .._native import status
from .._version import __version__


def backend() -> str:
    """Which CPU kernels run, in a few words."""
    if status.build is None:
        return "pure PyTorch"
    return f"native ({status.build.cpu_isa()})"


def cuda_library() -> str:
    """Whether the CUDA kernels are in use, or why not."""
    if not status.cuda:
        return f"not loaded: {status.cuda_reason}"
    if not torch.cuda.is_available():
        return "loaded, not in use: torch finds no GPU"
    return f"loaded, for {torch.cuda.get_device_name()}"


def run() -> int:
    """Print the report; returns the exit status."""
    lines = {
        "pyobserver": __version__,
        "torch": torch.__version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "CPU library": "loaded" if status.cpu else f"not loaded: {status.reason}",
        "CUDA library": cuda_library(),
        "CPU kernels": backend(),
        "autograd": "in C++" if status.autograd else f"in Python: {status.autograd_reason}",
    }
    if status.build is None:
        lines["threads"] = str(torch.get_num_threads())
    else:
        lines["CPU ISAs"] = ", ".join(status.build.cpu_isas())
        lines["threads"] = str(status.build.num_threads())
        lines.update({f"build: {key}": text for key, text in status.build.build_info().items()})
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:<{width}}  {text}")
    return 0

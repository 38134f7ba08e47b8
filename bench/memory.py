"""Peak memory of a call: by how much the process's resident memory grows while it runs.

Neither torch's profiler nor its allocator sees what the compiled kernels allocate for themselves;
the kernel of the operating system sees all. It counts pages, and in batches on several cores:
``RESOLUTION`` bytes may be missing or too many.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from .cases import Call, normal
from .fallback import kernels_of

RESOLUTION = 250_000
_CHECKED_ELEMENTS = 1_000_000
_REPEATS = 3
_OWN_MAPPING = 2**16  # bytes; a block as large is mapped by itself, and unmapped when freed


@contextmanager
def traced() -> Iterator[None]:
    """Make resident memory follow what is allocated; raises OSError where that cannot be had.

    Malloc's settings stay: enter it before :func:`bench.timing.keep_memory_warm`, which sets its
    own, not after; and early in a process, before its heap has holes, from which large blocks would
    be taken and to which they would return unseen.
    """
    libc = ctypes.CDLL(None)
    if not (sys.platform.startswith("linux") and hasattr(libc, "mallopt")):
        raise OSError("it takes Linux and glibc")
    trim_threshold, mmap_threshold, disable_huge_pages = -1, -3, 41  # malloc.h and sys/prctl.h
    libc.mallopt(mmap_threshold, _OWN_MAPPING)
    libc.mallopt(trim_threshold, _OWN_MAPPING)
    libc.prctl(disable_huge_pages, 1, 0, 0, 0)
    try:
        x = normal((_CHECKED_ELEMENTS,), "cpu")
        for call, expected in ((x.clone, x.nbytes), (x.aminmax, 0)):
            found, _ = grown(call)
            if abs(found - expected) > RESOLUTION:
                raise OSError(f"a call that takes {expected:,} bytes seems to take {found:,}")
        yield
    finally:
        libc.prctl(disable_huge_pages, 0, 0, 0, 0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def grown(call: Call) -> tuple[int, int]:
    """(bytes more at the peak of the call than before, bytes more while its result lives)"""
    libc = ctypes.CDLL(None)
    call()  # what is allocated once
    gc.collect()
    found = []
    for _ in range(_REPEATS):
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
        before = _status("VmRSS")
        result = call()
        found.append((_status("VmHWM") - before, _status("VmRSS") - before))
        del result
    peaks, kept = zip(*found, strict=True)
    return max(0, sorted(peaks)[_REPEATS // 2]), max(0, sorted(kept)[_REPEATS // 2])


def _peak_on_cuda(call: Call) -> tuple[int, int]:
    """The same, of torch's allocator on the device."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    peak, kept = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    del result
    return peak - before, kept - before


def peaks(calls: Mapping[str, Call], device: str) -> dict[str, int]:
    """Peak bytes by contender; ``result``: what of them the call of the reference returns."""
    measure = _peak_on_cuda if torch.device(device).type == "cuda" else grown
    found = {}
    for name in ("reference", "fallback", "native"):
        if name in calls:
            with kernels_of(name):
                found[name], kept = measure(calls[name])
            if name == "reference":
                found["result"] = kept
    return found

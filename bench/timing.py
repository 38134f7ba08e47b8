"""Interleaved timing: the contenders of a case take turns, so that noise hits all alike."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import repeat
from math import ceil

import torch

from .cases import Call
from .fallback import kernels_of


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        sample: seconds that one sample lasts at least; short calls are repeated within it.
        budget: seconds of samples for each contender.
        least, most: bounds of the number of samples, whatever the budget.
    """

    sample: float
    budget: float
    least: int
    most: int


FULL = Effort(sample=1e-3, budget=0.3, least=5, most=101)
QUICK = Effort(sample=3e-4, budget=0.02, least=3, most=31)
_SLOW = 1.0  # a call that takes as long needs no second one to be warm
_WARM_BYTES = 128  # an element: what the contenders of one case hold at once, and gaps


def keep_memory_warm(elements: int) -> bool:
    """Make glibc keep what is freed, and touch enough for tensors of that size; whether it does.

    Otherwise every output above 32 MiB is mapped anew, and its page faults take longer than the
    work that is timed.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    if mallopt is None or not (mallopt(trim_threshold, 2**31 - 1) and mallopt(mmap_max, 0)):
        return False
    torch.zeros(_WARM_BYTES * elements, dtype=torch.uint8).fill_(1)
    return True


def cpu_clock() -> Callable[[], float]:
    """The clock of work on the CPU: that of the process where it has one thread.

    Waiting for a core is left out so. On a busy machine it falls on the long calls, which outlast
    a time slice, and hardly ever on the short ones, and would flatter whoever is faster. Of several
    threads the process's time is the sum, so they are timed by the wall clock.
    """
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def _seconds(call: Call, loops: int, on_cuda: bool) -> float:
    """Time of one call, the mean of ``loops`` in a row."""
    if on_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in repeat(None, loops):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / loops
    clock = cpu_clock()
    begin = clock()
    for _ in repeat(None, loops):
        call()
    return (clock() - begin) / loops


def _calibrate(call: Call, sample: float, on_cuda: bool) -> tuple[int, float]:
    """Warm up; then how often to call for one sample, and the time of a call."""
    loops, seconds = 1, _seconds(call, 1, on_cuda)
    if seconds < _SLOW:
        seconds = _seconds(call, 1, on_cuda)
    while loops * seconds < sample:
        loops = min(10 * loops, ceil(1.2 * sample / seconds))
        seconds = _seconds(call, loops, on_cuda)
    return loops, seconds


def measure(calls: Mapping[str, Call], effort: Effort, device: str) -> dict[str, float]:
    """The median time of each contender's call, in seconds."""
    on_cuda = torch.device(device).type == "cuda"
    loops, counts = {}, {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for name, call in calls.items():
            with kernels_of(name):
                loops[name], seconds = _calibrate(call, effort.sample, on_cuda)
            wanted = int(effort.budget / (loops[name] * seconds))
            counts[name] = max(effort.least, min(wanted, effort.most))
        rounds = max(counts.values())
        for turn in range(rounds):
            for name, call in calls.items():
                # a slow contender sits out most rounds, evenly
                if (turn + 1) * counts[name] // rounds > turn * counts[name] // rounds:
                    with kernels_of(name):
                        samples[name].append(_seconds(call, loops[name], on_cuda))
    finally:
        if collecting:
            gc.enable()
    return {name: statistics.median(times) for name, times in samples.items()}

"""``python -m bench``: a report of times, ratios and memory, in Markdown."""

from __future__ import annotations

import argparse
import gc
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

import pyobserver

from .cases import GROWTH_ELEMENTS, SIZES, Case, all_cases, has_native
from .memory import RESOLUTION, peaks, traced
from .report import Peak, Record, Timing, markdown, write
from .timing import FULL, QUICK, keep_memory_warm, measure

_LEAST_FOR_MEMORY = 1_000_000  # elements; fewer are lost in the resolution


def counts(text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(float(count)) for count in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers such as 256,1e5, got {text!r}")
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples: a look, no record")
    parser.add_argument(
        "--threads", type=counts, metavar="N,N", help="of torch (default 1 and 2 where there are)"
    )
    parser.add_argument(
        "--sizes",
        type=counts,
        default=SIZES,
        metavar="N,N",
        help="elements (default %(default)s)",
    )
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name matches the regex")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE.md",
        help="instead of stdout; the figures go beside it, to FILE.json (see bench.picture)",
    )
    arguments = parser.parse_args()
    if arguments.output is not None and arguments.output.suffix == ".json":
        parser.error("--output: expected FILE.md; the figures go to FILE.json by themselves")
    if arguments.threads is None:
        several = torch.device(arguments.device).type == "cpu" and (os.cpu_count() or 1) > 1
        arguments.threads = (1, 2) if several else (1,)
    return arguments


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def facts(device: str, module: str = "bench") -> dict[str, str]:
    status = pyobserver.native_status
    if torch.device(device).type == "cuda":
        reason, native = status.cuda_reason, torch.cuda.get_device_name(device)
    else:
        reason = status.reason
        native = f"CPU, {status.build.cpu_isa()}" if status.build is not None else ""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": _cpu_model(),
        "load average": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        "torch": torch.__version__,
        "pyobserver": pyobserver.__version__,
        "native kernels": native if has_native(device) else f"none: {reason}",
        "command": f"`{shlex.join(['python', '-m', module, *sys.argv[1:]])}`",
    }


def _notes(device: str, warm: bool) -> str:
    if torch.device(device).type == "cuda":
        clock = "device time"
    else:
        clock = "CPU time on one thread, of wall-clock time on more"
    pages = "warm (freed memory is kept)" if warm else "fresh (their page faults are timed)"
    return (
        f"Medians of {clock}; float32 unless a row says otherwise; contenders taking turns in one "
        "process. Reference: torch.ao, or the chain of torch ops. Fallback: pyobserver in pure "
        "PyTorch. Ratios above 1: pyobserver is faster. Share of limit: bandwidth over that of "
        "`sum` or `copy_` of the same tensor on as many threads, counting a read or write "
        f"wherever the work cannot do without. Large outputs: {pages}."
    )


def _measure_memory(record: Record, cases: Sequence[Case], sizes: tuple, device: str) -> None:
    large = tuple(size for size in sizes if size >= _LEAST_FOR_MEMORY) or (max(sizes),)
    torch.set_num_threads(1)
    try:
        with traced():
            for case in cases:
                # of a case's own sizes the largest will do
                for size in large if case.sizes is None else case.sizes[-1:]:
                    print(f"memory: {case.name}, {size:,} {case.unit}", file=sys.stderr)
                    found = peaks(case.make(size, device), device)
                    record.peaks.append(Peak(case.name, size, case.unit, found))
    except OSError as error:
        record.memory_note = f"Not measured: {error}."
        return
    record.memory_note = (
        "What a call needs at its peak beyond what lived before it, on one thread, in MB (10^6 "
        "bytes), and what of that the reference's result holds. "
    )
    if torch.device(device).type == "cuda":
        record.memory_note += "Of torch's allocator on the device."
    else:
        record.memory_note += (
            "Measured as the growth of the process's resident memory, so with whatever the "
            f"kernels allocate for themselves, to {RESOLUTION / 1e6} MB (less is 0)."
        )


def _measure_times(
    record: Record, cases: Sequence[Case], threads: int, arguments: argparse.Namespace
) -> None:
    torch.set_num_threads(threads)
    effort = QUICK if arguments.quick else FULL
    for case in cases:
        for size in case.sizes_of(arguments.sizes, arguments.quick):
            label = size if isinstance(size, str) else f"{size:,}"
            print(f"{threads} threads: {case.name}, {label} {case.unit}", file=sys.stderr)
            calls = case.make(size, arguments.device)
            measured = measure(calls, effort, arguments.device)
            seconds = {name: float(f"{value:.4g}") for name, value in measured.items()}
            record.timings.append(
                Timing(
                    case.name,
                    size,
                    case.unit,
                    threads,
                    seconds,
                    case.limit,
                    case.share_of_limit(seconds, "native"),
                    case.growth,
                    case.headline,
                )
            )


def main() -> None:
    arguments = _arguments()
    wanted = re.compile(arguments.only or "", re.IGNORECASE)
    cases = [case for case in all_cases() if wanted.search(case.name)]
    if not cases:
        sys.exit(f"--only: no case matches {arguments.only!r}")
    gc.freeze()  # what the imports left; to look through it between cases takes longer than they do
    record = Record(facts(arguments.device), "")
    # before freed memory is kept
    _measure_memory(
        record, [case for case in cases if not case.growth], arguments.sizes, arguments.device
    )
    warm = keep_memory_warm(max(GROWTH_ELEMENTS, *arguments.sizes))
    record.notes = _notes(arguments.device, warm)
    for threads in arguments.threads:
        _measure_times(record, cases, threads, arguments)
    write(markdown(record), record.to_json(), arguments.output)


if __name__ == "__main__":
    main()

"""``python -m bench``: one Markdown table of times and ratios."""

from __future__ import annotations

import argparse
import os
import platform
import re
import shlex
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

import pyobserver

from .cases import OURS, SIZES, Case, all_cases, has_native
from .timing import FULL, QUICK, cpu_clock, keep_memory_warm, measure

_HEADS = (
    "work",
    "size",
    "reference",
    "fallback",
    "native",
    "reference / native",
    "reference / fallback",
    "native, share of limit",
)
_LEAST_FOR_BANDWIDTH = 10_000  # elements; below, a call's overhead is what is timed


def _element_counts(text: str) -> list[int]:
    try:
        sizes = [int(float(size)) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers such as 256,1e5, got {text!r}")
    return sizes


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few samples: a look, no record")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument(
        "--sizes",
        type=_element_counts,
        default=list(SIZES),
        metavar="N,N",
        help="elements (default %(default)s)",
    )
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name matches the regex")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--output", type=Path, metavar="FILE", help="instead of stdout")
    return parser.parse_args()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _digits(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{_digits(seconds * factor)} {unit}"
    return f"{_digits(seconds * 1e6)} µs"


def _ratio(seconds: dict[str, float], contender: str) -> str:
    if contender not in seconds:
        return "-"
    return f"{_digits(seconds['reference'] / seconds[contender])}x"


def _share(case: Case, size: int, seconds: dict[str, float]) -> str:
    share = case.share_of_limit(seconds, "native")
    if share is None or size < _LEAST_FOR_BANDWIDTH:
        return "-"
    return f"{share:.2f} of {case.limit}"


def _row(case: Case, size: int, seconds: dict[str, float]) -> tuple[str, ...]:
    return (
        case.name,
        f"{size:,} {case.unit}",
        *(_time(seconds.get(name)) for name in ("reference", *OURS)),
        *(_ratio(seconds, name) for name in reversed(OURS)),
        _share(case, size, seconds),
    )


def _header(device: str, warm: bool) -> list[str]:
    status = pyobserver.native_status
    if torch.device(device).type == "cuda":
        reason, native = status.cuda_reason, torch.cuda.get_device_name(device)
    else:
        reason = status.reason
        native = f"CPU, {status.build.cpu_isa()}" if status.build is not None else ""
    facts = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": _cpu_model(),
        "threads": torch.get_num_threads(),
        "load average": f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        "torch": torch.__version__,
        "pyobserver": pyobserver.__version__,
        "native kernels": native if has_native(device) else f"none: {reason}",
        "command": f"`{shlex.join(['python', '-m', 'bench', *sys.argv[1:]])}`",
    }
    if torch.device(device).type == "cuda":
        clock = "device time"
    else:
        clock = "CPU time" if cpu_clock() is time.process_time else "wall-clock time"
    pages = "warm (freed memory is kept)" if warm else "fresh (their page faults are timed)"
    return [
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        f"Medians of {clock}, float32, contenders taking turns in one process. Reference: "
        "torch.ao, or the chain of torch ops. Fallback: pyobserver in pure PyTorch. Ratios above "
        "1: pyobserver is faster. Share of limit: bandwidth over that of `sum` or `copy_` of the "
        "same tensor, counting a read or write wherever the work cannot do without. Large "
        f"outputs: {pages}.",
        "",
    ]


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(_HEADS, *rows, strict=True)]
    lines = [" | ".join(map(str.ljust, row, widths)) for row in (_HEADS, *rows)]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return [f"| {line} |" for line in lines]


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    warm = keep_memory_warm(max(arguments.sizes))
    wanted = re.compile(arguments.only or "", re.IGNORECASE)
    cases = [case for case in all_cases() if wanted.search(case.name)]
    if not cases:
        sys.exit(f"--only: no case matches {arguments.only!r}")
    effort = QUICK if arguments.quick else FULL
    rows = []
    for case in cases:
        for size in case.sizes or arguments.sizes:
            print(f"{case.name}, {size:,} {case.unit}", file=sys.stderr)
            calls = case.make(size, arguments.device)
            rows.append(_row(case, size, measure(calls, effort, arguments.device)))
    report = "\n".join([*_header(arguments.device, warm), *_table(rows)]) + "\n"
    if arguments.output is None:
        print(report, end="")
    else:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()

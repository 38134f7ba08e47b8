"""``python -m bench.gpu``: times on a GPU beside what its memory allows, launches and syncs.

The same cases as ``python -m bench``. Each is made several times over, on tensors of its own, which
take turns, so that the cache does not serve them; times are medians of CUDA events. Beside torch.ao
stand the same call compiled by torch, where it compiles, and ours replayed from a CUDA graph, which
leaves out what the host takes to launch it.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from .__main__ import counts, facts
from .cases import Call, Case, all_cases, normal
from .report import ratio_text, size_text, table, time_text

SIZES = (10_000, 1_000_000, 100_000_000)
COMPILED_FROM = 100_000_000  # elements; below, a compiled call is mostly its guards
_MANY = 10_000  # elements; in smaller tensors nothing is bound by memory
_SECONDS = 0.06  # of samples for each contender
_FEWEST, _MOST = 3, 100  # samples
_MOST_TURNS = 64
_CONTENDERS = ("reference", "compiled", "native", "graph")


@dataclass
class Row:
    """One case at one size: seconds by contender; CUDA calls of one call of torch.ao and of ours.

    ``share``: bandwidth over that of a copy of the same tensor in the same run, counting what the
    work cannot do without.
    """

    case: str
    size: int
    unit: str
    seconds: dict[str, float]
    share: float | None
    calls: dict[str, dict[str, int]] = field(default_factory=dict)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--sizes", type=counts, default=SIZES, metavar="N,N", help="elements")
    parser.add_argument("--only", metavar="PATTERN", default="", help="cases that match the regex")
    parser.add_argument("--device", default="cuda", help="cpu: to see that it runs")
    parser.add_argument(
        "--deadline", type=float, default=900, metavar="SECONDS", help="begin no row after it"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.md", help="and .json")
    return parser.parse_args()


def _is_timed(case: Case) -> bool:
    """Not how the cost grows, and nothing that takes torch.ao minutes."""
    return not case.growth and (case.sizes is None or case.unit == "observers")


class Clock:
    """Times calls on a device: by events on a GPU, else by the process's time."""

    def __init__(self, device: str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"

    def seconds(self, calls: Sequence[Call], loops: int) -> float:
        """Of one call, the mean of so many in turn."""
        turns = cycle(calls)
        if not self.on_gpu:
            begin = time.process_time()
            for _ in range(loops):
                next(turns)()
            return (time.process_time() - begin) / loops
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(loops):
            next(turns)()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / loops

    def medians(self, contenders: dict[str, list[Call]]) -> dict[str, float]:
        """Of contenders that take turns, each with as many calls a sample as fill a millisecond."""
        loops = {}
        for name, calls in contenders.items():
            self.seconds(calls, len(calls))
            once = max(self.seconds(calls, len(calls)), 1e-7)
            loops[name] = max(1, min(1000, int(1e-3 / once)))
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        spent = dict.fromkeys(contenders, 0.0)
        while waiting := [name for name in contenders if spent[name] < _SECONDS]:
            for name in waiting:
                found = self.seconds(contenders[name], loops[name])
                samples[name].append(found)
                spent[name] += min(max(found * loops[name], _SECONDS / _MOST), _SECONDS / _FEWEST)
        return {name: statistics.median(found) for name, found in samples.items()}


def _turns(size: int, device: str) -> int:
    """Of a tensor so many that the cache holds no more than half of them."""
    if torch.device(device).type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(_MOST_TURNS, -(-2 * cache // (4 * size))))


def _make(case: Case, size: int, device: str) -> dict[str, list[Call]]:
    """The calls of each contender, one for each turn."""
    found: dict[str, list[Call]] = {}
    for _ in range(1 if case.unit == "observers" else _turns(size, device)):
        normal.cache_clear()  # other memory each time
        for name, call in case.make(size, device).items():
            found.setdefault(name, []).append(call)
    found.pop("fallback", None)
    if case.unit == "observers":
        del found["reference"]  # torch.ao waits for the device thousands of times for each
    return found


def _compiled(call: Call) -> Call | None:
    """The call compiled by torch; None where that fails."""
    torch._dynamo.reset()
    try:
        compiled: Call = torch.compile(call)
        compiled()
        compiled()
    except Exception as error:
        print(f"  does not compile: {type(error).__name__}", file=sys.stderr)
        return None
    return compiled


def _graph(calls: Sequence[Call]) -> Call:
    """All turns in one graph."""
    for call in calls:
        call()  # kernels are loaded, and states made, before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def cuda_calls(names: Sequence[str]) -> dict[str, int]:
    """What a profile's events say: kernels launched, memories set or copied, waits."""
    kinds = {"launches": "LaunchKernel", "memory": "Mem", "syncs": "Synchronize"}
    found = Counter(
        kind for name in names for kind, part in kinds.items() if name[:2] == "cu" and part in name
    )
    return {kind: found[kind] for kind in kinds}


def _profiled(call: Callable[[], object]) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
    return cuda_calls([event.name for event in profiler.events()])


def _count(call: Call) -> dict[str, int]:
    """CUDA calls of one call, without those of the profiler itself."""
    call()
    torch.cuda.synchronize()
    idle, found = _profiled(lambda: None), _profiled(call)
    return {kind: max(0, found[kind] - idle[kind]) for kind in found}


def _row(case: Case, size: int, device: str, clock: Clock) -> Row:
    contenders = _make(case, size, device)
    limit = contenders.pop(case.limit or "", None)
    x = torch.empty(size if case.limit else 1, device=device)
    copies = [x.new_empty(x.shape) for _ in next(iter(contenders.values()))]
    if limit is not None:
        contenders["copy"] = [lambda to=to: to.copy_(x) for to in copies]
    per_replay = 1
    if clock.on_gpu:
        if size >= COMPILED_FROM and case.headline and "reference" in contenders:
            compiled = _compiled(contenders["reference"][0])
            if compiled is not None:
                contenders["compiled"] = [compiled]
        if "native" in contenders and "calculate_qparams" not in case.name:
            per_replay = len(contenders["native"])
            contenders["graph"] = [_graph(contenders["native"])]
    seconds = clock.medians(contenders)
    if "graph" in seconds:
        seconds["graph"] /= per_replay
    share = None
    if "copy" in seconds and size > _MANY:
        ours = seconds.get("graph", seconds.get("native", seconds["reference"]))
        share = case.bytes_moved / 8 * seconds["copy"] / ours
    calls = {}
    if clock.on_gpu:
        named = ("reference", "native")
        calls = {name: _count(contenders[name][0]) for name in named if name in contenders}
    rounded = {name: float(f"{value:.4g}") for name, value in seconds.items()}
    return Row(case.name, size, case.unit, rounded, share, calls)


def _calls_text(row: Row, name: str) -> str:
    found = row.calls.get(name)
    return "-" if found is None else "/".join(str(found[kind]) for kind in found)


def _markdown(about: dict[str, str], rows: Sequence[Row]) -> str:
    heads = (
        "work", "size", *_CONTENDERS, "reference / native", "reference / graph",
        "share of a copy's bandwidth", "calls of the reference", "calls of ours",
    )  # fmt: skip
    cells = []
    for row in rows:
        reference = row.seconds.get("reference")
        ratios = (
            reference / row.seconds[name] if reference and name in row.seconds else None
            for name in ("native", "graph")
        )
        cells.append(
            (
                row.case,
                f"{size_text(row.size)} {row.unit}",
                *(time_text(row.seconds.get(name)) for name in _CONTENDERS),
                *map(ratio_text, ratios),
                "-" if row.share is None else f"{row.share:.2f}",
                _calls_text(row, "reference"),
                _calls_text(row, "native"),
            )
        )
    notes = (
        "Medians of CUDA events, contenders taking turns in one process, on tensors that take "
        "turns too. Reference: torch.ao, or the chain of torch ops; compiled: the same by "
        "`torch.compile`. Graph: ours from a CUDA graph, without the host's part; the share is "
        "its. Calls: kernels launched / memories set or copied / waits of the host, of one call."
    )
    lines = [*(f"- {name}: {text}" for name, text in about.items()), "", notes, ""]
    return "\n".join([*lines, *table(heads, cells)]).rstrip() + "\n"


def main() -> None:
    arguments = _arguments()
    begin = time.monotonic()
    wanted = re.compile(arguments.only, re.IGNORECASE)
    cases = [case for case in all_cases() if _is_timed(case) and wanted.search(case.name)]
    if not cases:
        sys.exit(f"--only: no case matches {arguments.only!r}")
    # what the first table has comes first, in the largest size
    cases.sort(key=lambda case: not case.headline)
    clock = Clock(arguments.device)
    about = facts(arguments.device, "bench.gpu")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    failed: list[str] = []
    for wanted_size in sorted(arguments.sizes, reverse=True):
        for case in cases:
            size = wanted_size if case.sizes is None else case.sizes[-1]
            repeated = case.sizes is not None and wanted_size != max(arguments.sizes)
            if repeated or time.monotonic() - begin > arguments.deadline:
                continue
            print(f"{case.name}, {size:,} {case.unit}", file=sys.stderr)
            try:
                rows.append(_row(case, size, arguments.device, clock))
            except RuntimeError as error:  # the other rows are wanted all the same
                failed.append(f"{case.name}, {size:,}: {error}")
                continue
            # as far as it got, should the machine be taken away
            arguments.output.write_text(_markdown(about, rows), encoding="utf-8")
            record = {"facts": about, "rows": [asdict(row) for row in rows]}
            arguments.output.with_suffix(".json").write_text(json.dumps(record) + "\n")
    if failed:
        sys.exit("\n".join(["rows that failed:", *failed]))


if __name__ == "__main__":
    main()

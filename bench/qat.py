"""``python -m bench.qat``: what fake-quantize adds to a training step, ours beside torch.ao's."""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import isfinite
from pathlib import Path

import torch

from .__main__ import counts, facts
from .cases import Call
from .qat_models import (
    BASE,
    CONTENDERS,
    MODELS,
    OURS,
    OURS_FUSED,
    THEIRS,
    THEIRS_FUSED,
    Trained,
    prepared,
    sites,
    step_of,
)
from .report import table, time_text
from .timing import cpu_clock, keep_memory_warm

_WARM_ELEMENTS = 4_000_000
_WARM_UP = 5  # steps
_PARTS = 5  # of a run, each with a median of its own
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_UNSERVED = {(THEIRS_FUSED, "bfloat16")}  # it takes float32 alone
# the overhead of the first over that of the second, and what it should be at most
_GOALS = (
    (OURS, THEIRS, 0.2),
    (OURS, THEIRS_FUSED, 0.5),
    (OURS_FUSED, THEIRS, 0.2),
    (OURS_FUSED, THEIRS_FUSED, 0.5),
)
_ALIKE = ((THEIRS, OURS), (THEIRS_FUSED, OURS_FUSED))  # the same numbers, so the same losses


@dataclass(frozen=True)
class Effort:
    """How many rounds: as many as fill the budget (seconds), within bounds."""

    budget: float
    least: int
    most: int

    def rounds(self, seconds: float) -> int:
        return max(self.least, min(int(self.budget / seconds), self.most))


FULL = Effort(budget=30.0, least=40, most=500)
QUICK = Effort(budget=0.5, least=_PARTS, most=10)


@dataclass(frozen=True)
class StepTime:
    """A contender's training step, in seconds.

    Attributes:
        sites: tensors fake-quantized in a forward.
        seconds: the median.
        overhead: the median of what it takes longer than the base's of the same round.
        quartiles: the first and third of the same.
        parts: its medians in consecutive parts of the run.
    """

    model: str
    dtype: str
    threads: int
    contender: str
    sites: int
    seconds: float
    overhead: float
    quartiles: tuple[float, float]
    parts: tuple[float, ...]


@dataclass
class Record:
    facts: dict[str, str]
    notes: str
    steps: list[StepTime] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.qat", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: a look, no record")
    parser.add_argument("--threads", type=counts, default=(1, 2), metavar="N,N", help="of torch")
    parser.add_argument(
        "--dtypes", type=lambda text: text.split(","), default=list(_DTYPES), metavar="NAME,NAME"
    )
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument(
        "--output", type=Path, metavar="FILE.md", help="instead of stdout; and FILE.json beside it"
    )
    return parser.parse_args()


def in_turns(calls: Mapping[str, Call], effort: Effort) -> dict[str, list[float]]:
    """Seconds of each contender's call, round by round.

    In each round everyone has one turn, in an order drawn anew, so that nobody always comes after
    the same neighbour, whose tensors are what it finds in the cache.
    """
    clock = cpu_clock()

    def seconds(call: Call) -> float:
        begin = clock()
        call()
        return clock() - begin

    rounds = effort.rounds(sum(map(seconds, calls.values())))
    found: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffled = list(calls), random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffled.shuffle(order)
            for name in order:
                found[name].append(seconds(calls[name]))
    finally:
        gc.enable()
    return found


def _part_medians(values: Sequence[float]) -> tuple[float, ...]:
    bounds = [len(values) * part // _PARTS for part in range(_PARTS + 1)]
    return tuple(statistics.median(values[begin:end]) for begin, end in pairwise(bounds))


def _warm_up(steps: Mapping[str, Call]) -> None:
    """And see that those who should give the same numbers do."""
    losses = {name: [float(step()) for _ in range(_WARM_UP)][-1] for name, step in steps.items()}
    for theirs, ours in _ALIKE:
        if theirs in losses and abs(losses[ours] / losses[theirs] - 1) > 1e-3:
            sys.exit(f"{ours}: a loss of {losses[ours]}, {theirs}: {losses[theirs]}")


def time_steps(
    name: str, trained: Trained, dtype: str, threads: int, effort: Effort
) -> list[StepTime]:
    torch.set_num_threads(threads)
    models = {
        contender: prepared(trained, contender)
        for contender in CONTENDERS
        if (contender, dtype) not in _UNSERVED
    }
    x = trained.input()
    steps = {contender: step_of(model, x, _DTYPES[dtype]) for contender, model in models.items()}
    _warm_up(steps)
    found = in_turns(steps, effort)
    rows = []
    for contender, seconds in found.items():
        more = [a - b for a, b in zip(seconds, found[BASE], strict=True)]
        first, median, third = statistics.quantiles(more, n=4)
        rows.append(
            StepTime(
                name,
                dtype,
                threads,
                contender,
                sites(models[contender]),
                statistics.median(seconds),
                median,
                (first, third),
                _part_medians(more),
            )
        )
    return rows


def expected_steps(
    models: Sequence[str], dtypes: Sequence[str], threads: Sequence[int]
) -> set[tuple[str, str, int, str]]:
    return {
        (model, dtype, count, contender)
        for model in models
        for dtype in dtypes
        for count in threads
        for contender in CONTENDERS
        if (contender, dtype) not in _UNSERVED
    }


def missing(record: Record, expected: set[tuple[str, str, int, str]]) -> list[str]:
    """What the record lacks, or has no number for."""
    there = {
        (row.model, row.dtype, row.threads, row.contender)
        for row in record.steps
        if all(map(isfinite, (row.seconds, row.overhead, *row.quartiles, *row.parts)))
    }
    return sorted(", ".join(map(str, row)) for row in expected - there)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _step_tables(record: Record) -> list[str]:
    lines: list[str] = []
    heads = (
        "contender", "tensors", "step", "of the base", "overhead, ms", "its quartiles",
    )  # fmt: skip
    for title, rows in _by_title(record).items():
        base = rows[BASE].seconds
        cells = [
            (
                row.contender,
                str(row.sites),
                time_text(row.seconds),
                f"{row.seconds / base:.2f}x",
                *(
                    ("-", "-")
                    if row.contender == BASE
                    else (
                        _milliseconds(row.overhead),
                        " - ".join(map(_milliseconds, row.quartiles)),
                    )
                ),
            )
            for row in rows.values()
        ]
        lines += [f"### {title}", "", *table(heads, cells)]
    return ["## A training step", "", *lines]


def _by_title(record: Record) -> dict[str, dict[str, StepTime]]:
    found: dict[str, dict[str, StepTime]] = {}
    for row in record.steps:
        title = f"{row.model}, {row.dtype}, {row.threads} thread{'s' * (row.threads > 1)}"
        found.setdefault(title, {})[row.contender] = row
    return found


def _ratio_table(record: Record) -> list[str]:
    heads = ("step", "overhead of", "over that of", "ratio", "in parts of the run", "goal")
    cells = []
    for title, rows in _by_title(record).items():
        for ours, theirs, goal in _GOALS:
            if ours not in rows or theirs not in rows:
                continue
            mine, other = rows[ours], rows[theirs]
            parts = sorted(a / b for a, b in zip(mine.parts, other.parts, strict=True) if b > 0)
            ratio = f"{mine.overhead / other.overhead:.2f}" if other.overhead > 0 else "-"
            spread = f"{parts[0]:.2f} - {parts[-1]:.2f}" if parts else "-"
            cells.append((title, ours, theirs, ratio, spread, f"{goal}"))
    return ["## Overhead over overhead", "", *table(heads, cells)]


def markdown(record: Record) -> str:
    lines = [
        *(f"- {name}: {value}" for name, value in record.facts.items()),
        "",
        record.notes,
        "",
        *_ratio_table(record),
        *_step_tables(record),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _notes(warm: bool) -> str:
    pages = "kept (its page faults are not timed)" if warm else "given back (page faults are timed)"
    return (
        "A step is forward, backward, SGD and dropping the gradients. Medians of CPU time on one "
        "thread, of wall-clock time on more; in each round everyone has one step, in an order "
        "drawn anew. Overhead: what a step takes longer than the base's of the same round; its "
        "median and quartiles. Parts of the run: the least and greatest ratio of five. `hooks "
        f"alone` is prepared with `nn.Identity`. Freed memory is {pages}."
    )


def main() -> None:
    arguments = _arguments()
    warnings.simplefilter("ignore")  # torch.ao's
    warm = keep_memory_warm(_WARM_ELEMENTS)
    record = Record(facts("cpu", "bench.qat"), _notes(warm))
    effort = QUICK if arguments.quick else FULL
    for name in arguments.models:
        for dtype in arguments.dtypes:
            for threads in arguments.threads:
                print(f"{name}, {dtype}, {threads} threads", file=sys.stderr)
                record.steps += time_steps(name, MODELS[name], dtype, threads, effort)
    if lacking := missing(
        record, expected_steps(arguments.models, arguments.dtypes, arguments.threads)
    ):
        sys.exit("\n".join(["figures that are missing:", *lacking]))
    if arguments.output is None:
        print(markdown(record), end="")
    else:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(markdown(record), encoding="utf-8")
        arguments.output.with_suffix(".json").write_text(record.to_json(), encoding="utf-8")


if __name__ == "__main__":
    main()

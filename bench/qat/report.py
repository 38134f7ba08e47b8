"""What a run found, kept as JSON and written as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite, nan
from typing import Any

from ..report import ratio_text, table, time_text
from .models import BASE, OURS, OURS_FUSED, OURS_LEARNED, THEIRS, THEIRS_FUSED, THEIRS_LEARNED

# the overhead of the first over that of the second, and what it should be at most
_GOALS = (
    (OURS, THEIRS, 0.2),
    (OURS, THEIRS_FUSED, 0.5),
    (OURS_FUSED, THEIRS, 0.2),
    (OURS_FUSED, THEIRS_FUSED, 0.5),
    (OURS_LEARNED, THEIRS_LEARNED, 0.5),
)

Key = tuple[str | int, ...]  # of a row


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
    quartiles: tuple[float, ...]
    parts: tuple[float, ...]

    @property
    def title(self) -> str:
        return f"{self.model}, {self.dtype}, {self.threads} thread{'s' * (self.threads > 1)}"

    @property
    def key(self) -> Key:
        return "step", self.model, self.dtype, self.threads, self.contender

    @property
    def figures(self) -> tuple[float, ...]:
        return self.seconds, self.overhead, *self.quartiles, *self.parts


@dataclass(frozen=True)
class CallTime:
    """A call with its gradient: seconds of torch's (``reference``) and of ours (``native``)."""

    work: str
    elements: int
    seconds: Mapping[str, float]

    @property
    def key(self) -> Key:
        return "call", self.work, self.elements

    @property
    def figures(self) -> tuple[float, ...]:
        return tuple(self.seconds.get(name, nan) for name in ("reference", "native"))


@dataclass(frozen=True)
class SavedBytes:
    """What a module's forward keeps for its backward, in bytes an element.

    Attributes:
        tensors: those that autograd is given to save, but for the input.
        resident: by how much more memory is resident than before, but for the output.
        of_input: of the input, which may be kept in any case.
    """

    module: str
    granularity: str
    tensors: float
    resident: float
    of_input: float

    @property
    def key(self) -> Key:
        return "saved", self.module, self.granularity

    @property
    def figures(self) -> tuple[float, ...]:
        return self.tensors, self.resident, self.of_input


@dataclass(frozen=True)
class StepBytes:
    """A contender's training step, in bytes.

    Attributes:
        peak: beyond what lives before the step.
        saved: the tensors that autograd is given to save, but for parameters and the input.
    """

    model: str
    contender: str
    peak: int
    saved: int

    @property
    def key(self) -> Key:
        return "peak", self.model, self.contender

    @property
    def figures(self) -> tuple[float, ...]:
        return self.peak, self.saved


@dataclass
class Record:
    """A whole run.

    Attributes:
        facts: what the run was, by name.
        notes: how to read it.
        memory_note: how memory was measured, or why it was not.
    """

    facts: dict[str, str]
    notes: str
    memory_note: str = ""
    steps: list[StepTime] = field(default_factory=list)
    calls: list[CallTime] = field(default_factory=list)
    saved: list[SavedBytes] = field(default_factory=list)
    peaks: list[StepBytes] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"

    def missing(self, expected: Iterable[Key]) -> list[Key]:
        """The rows, by their keys, that are not there, or lack a figure."""
        rows: list[Any] = [*self.steps, *self.calls, *self.saved, *self.peaks]
        there = {row.key for row in rows if all(map(isfinite, row.figures))}
        return [key for key in expected if key not in there]


def _by_title(steps: Iterable[StepTime]) -> dict[str, dict[str, StepTime]]:
    found: dict[str, dict[str, StepTime]] = {}
    for row in steps:
        found.setdefault(row.title, {})[row.contender] = row
    return found


def _ratio_cells(ours: StepTime, theirs: StepTime, goal: float) -> tuple[str, ...]:
    """Noise may have made an overhead nothing."""
    parts = sorted(a / b for a, b in zip(ours.parts, theirs.parts, strict=True) if b > 0)
    return (
        ours.title,
        ours.contender,
        theirs.contender,
        f"{ours.overhead / theirs.overhead:.2f}" if theirs.overhead > 0 else "-",
        f"{parts[0]:.2f} - {parts[-1]:.2f}" if parts else "-",
        f"{goal}",
    )


def _ratio_table(record: Record) -> list[str]:
    heads = ("step", "overhead of", "over that of", "ratio", "in parts of the run", "goal")
    cells = [
        _ratio_cells(rows[ours], rows[theirs], goal)
        for rows in _by_title(record.steps).values()
        for ours, theirs, goal in _GOALS
        if ours in rows and theirs in rows
    ]
    return ["## Overhead of fake-quantize", "", *table(heads, cells)]


def _milliseconds(*seconds: float) -> str:
    return " - ".join(f"{value * 1e3:.3f}" for value in seconds)


def _step_cells(row: StepTime, base: StepTime) -> tuple[str, ...]:
    overhead = ("-", "-")
    if row is not base:
        overhead = _milliseconds(row.overhead), _milliseconds(*row.quartiles)
    relative = f"{row.seconds / base.seconds:.2f}x"
    return row.contender, str(row.sites), time_text(row.seconds), relative, *overhead


def _step_tables(record: Record) -> list[str]:
    heads = ("contender", "tensors", "step", "of the base", "overhead, ms", "its quartiles")
    lines = []
    for title, rows in _by_title(record.steps).items():
        cells = [_step_cells(row, rows[BASE]) for row in rows.values()]
        lines += [f"### {title}", "", *table(heads, cells)]
    return ["## A training step", "", *lines]


def _call_table(calls: Sequence[CallTime]) -> list[str]:
    """A row for each work, a column for each size."""
    sizes = list(dict.fromkeys(call.elements for call in calls))
    cells: dict[str, list[str]] = {}
    for call in calls:
        theirs, ours = call.figures
        text = f"{time_text(theirs)}, {time_text(ours)}, {ratio_text(theirs / ours)}"
        cells.setdefault(call.work, []).append(text)
    heads = ("work", *(f"{size:,} elements" for size in sizes))
    return [
        "## A call on a small tensor, with its gradient",
        "",
        "Times of torch's (torch.ao's where the work is a module) and of ours, and the first over "
        "the second.",
        "",
        *table(heads, [(work, *texts) for work, texts in cells.items()]),
    ]


def _saved_table(record: Record) -> list[str]:
    heads = ("module", "scales", "saved tensors", "resident memory", "of the input")
    cells = [
        (row.module, row.granularity, *(f"{value:.3f}" for value in row.figures))
        for row in record.saved
    ]
    return ["## Kept for the backward, bytes an element", "", *table(heads, cells)]


def _peak_table(record: Record) -> list[str]:
    heads = ("step", "contender", "peak", "beyond the base's", "saved", "beyond the base's")
    bases = {row.model: row for row in record.peaks if row.contender == BASE}
    cells = []
    for row in record.peaks:
        base = bases[row.model]
        counts = row.peak, row.peak - base.peak, row.saved, row.saved - base.saved
        cells.append((row.model, row.contender, *(f"{count / 1e6:.1f}" for count in counts)))
    return ["## A training step's memory, MB", "", *table(heads, cells)]


def markdown(record: Record) -> str:
    lines = [
        *(f"- {name}: {value}" for name, value in record.facts.items()),
        "",
        record.notes,
        "",
        *_ratio_table(record),
        *_step_tables(record),
        *_call_table(record.calls),
        *_saved_table(record),
        record.memory_note,
        "",
        *_peak_table(record),
    ]
    return "\n".join(lines).rstrip() + "\n"

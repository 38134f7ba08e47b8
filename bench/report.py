"""What a run of the benchmarks found, kept as JSON and written as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .cases import GROWTH_ELEMENTS, OURS
from .memory import RESOLUTION

_LEAST_FOR_BANDWIDTH = 10_000  # elements; below, a call's overhead is what is timed

Size = int | str


@dataclass(frozen=True)
class Timing:
    """One case at one size: seconds by contender; the other fields are those of the case."""

    case: str
    size: Size
    unit: str
    threads: int
    seconds: dict[str, float]
    limit: str | None
    share_of_limit: float | None
    growth: bool
    headline: bool

    def ratio(self, contender: str) -> float | None:
        """How many times faster than the reference."""
        if contender not in self.seconds:
            return None
        return self.seconds["reference"] / self.seconds[contender]


@dataclass(frozen=True)
class Peak:
    """Peak memory of one case at one size: bytes by contender, and of the result."""

    case: str
    size: Size
    unit: str
    bytes: dict[str, int]


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
    timings: list[Timing] = field(default_factory=list)
    memory_note: str = ""
    peaks: list[Peak] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Record:
        fields = json.loads(text)
        fields["timings"] = [Timing(**timing) for timing in fields["timings"]]
        fields["peaks"] = [Peak(**peak) for peak in fields["peaks"]]
        return cls(**fields)

    def headlines(self) -> dict[str, dict[int, float]]:
        """Ratio by case and size, on the fewest threads; nothing without native kernels."""
        threads = min((timing.threads for timing in self.timings), default=1)
        found: dict[str, dict[int, float]] = {}
        for timing in self.timings:
            ratio = timing.ratio("native")
            if timing.headline and timing.threads == threads and ratio is not None:
                found.setdefault(timing.case, {})[timing.size] = ratio
        return found


def _digits(value: float) -> str:
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def time_text(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for factor, unit in ((1.0, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{_digits(seconds * factor)} {unit}"
    return f"{_digits(seconds * 1e6)} µs"


def ratio_text(ratio: float | None) -> str:
    return "-" if ratio is None else f"{_digits(ratio)}x"


def size_text(size: Size) -> str:
    return size if isinstance(size, str) else f"{size:,}"


def _share(timing: Timing) -> str:
    if timing.share_of_limit is None or timing.size < _LEAST_FOR_BANDWIDTH:
        return "-"
    return f"{timing.share_of_limit:.2f} of {timing.limit}"


def _unique(values: Iterable[Size]) -> list:
    return list(dict.fromkeys(values))


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [" | ".join(map(str.ljust, row, widths)) for row in (heads, *rows)]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return [*(f"| {line} |" for line in lines), ""]


def _headline_table(record: Record) -> list[str]:
    ratios = record.headlines()
    if not ratios:
        return []
    sizes = _unique(size for by_size in ratios.values() for size in by_size)
    rows = [
        (case, *(ratio_text(by_size.get(size)) for size in sizes))
        for case, by_size in ratios.items()
    ]
    threads = min(timing.threads for timing in record.timings)
    return [
        f"## In short: reference / native on {_threads(threads)}, by elements",
        "",
        *table(("work", *map(size_text, sizes)), rows),
    ]


def _full_tables(record: Record) -> list[str]:
    heads = (
        "work",
        "size",
        "reference",
        "fallback",
        "native",
        "reference / native",
        "reference / fallback",
        "native, share of limit",
    )
    timings = [timing for timing in record.timings if not timing.growth]
    lines = []
    for threads in _unique(timing.threads for timing in timings):
        rows = [
            (
                timing.case,
                f"{size_text(timing.size)} {timing.unit}",
                *(time_text(timing.seconds.get(name)) for name in ("reference", *OURS)),
                *(ratio_text(timing.ratio(name)) for name in reversed(OURS)),
                _share(timing),
            )
            for timing in timings
            if timing.threads == threads
        ]
        lines += [f"## Every op and module on {_threads(threads)}", "", *table(heads, rows)]
    return lines


def _growth_table(timings: list[Timing]) -> list[str]:
    """A row for each case and thread count, a column for each size."""
    sizes = _unique(timing.size for timing in timings)
    if all(isinstance(size, int) for size in sizes):
        sizes.sort()
    cells: dict[tuple[str, int], dict[Size, str]] = {}
    for timing in timings:
        ours = "native" if "native" in timing.seconds else "fallback"
        cell = f"{time_text(timing.seconds[ours])}, {ratio_text(timing.ratio(ours))}"
        cells.setdefault((timing.case, timing.threads), {})[timing.size] = cell
    rows = [
        (case, str(threads), *(cells[case, threads].get(size, "-") for size in sizes))
        for case, threads in sorted(cells)
    ]
    return table(("work", "threads", *map(size_text, sizes)), rows)


def _growth_tables(record: Record) -> list[str]:
    units = _unique(timing.unit for timing in record.timings if timing.growth)
    lines = []
    for unit in units:
        # also of cases that are sized in it anyway
        timings = [timing for timing in record.timings if timing.unit == unit]
        lines += [f"### By {unit}", "", *_growth_table(timings)]
    if not lines:
        return []
    return [
        f"## How the cost grows, at {GROWTH_ELEMENTS:,} elements",
        "",
        "Time of the native kernels (without them, of the fallback), and the reference's over "
        "it. A millisecond is a nanosecond an element, but for `histogram_combine` and "
        "`range_search`, which take bins alone.",
        "",
        *lines,
    ]


def _megabytes(count: int | None) -> str:
    if count is None:
        return "-"
    return "0" if count < RESOLUTION else f"{count / 1e6:.1f}"


def _memory_table(record: Record) -> list[str]:
    heads = ("work", "size", "result", "reference", "fallback", "native")
    rows = [
        (
            peak.case,
            f"{size_text(peak.size)} {peak.unit}",
            *(_megabytes(peak.bytes.get(name)) for name in heads[2:]),
        )
        for peak in record.peaks
    ]
    lines = table(heads, rows) if rows else []
    return ["## Peak memory, MB", "", record.memory_note, "", *lines]


def write(markdown: str, figures: str, output: Path | None) -> None:
    """To FILE.md, the figures beside it in FILE.json; or what is to be read to stdout."""
    if output is None:
        print(markdown, end="")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(markdown, encoding="utf-8")
    output.with_suffix(".json").write_text(figures, encoding="utf-8")


def markdown(record: Record) -> str:
    lines = [
        *(f"- {name}: {value}" for name, value in record.facts.items()),
        "",
        record.notes,
        "",
        *_headline_table(record),
        *_full_tables(record),
        *_growth_tables(record),
        *_memory_table(record),
    ]
    return "\n".join(lines).rstrip() + "\n"

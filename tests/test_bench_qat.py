"""The benchmark of training: that every row is there, and that a figure that is not is told."""

import json
import subprocess
import sys
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest

from bench.memory import RESOLUTION
from bench.qat import calls, memory
from bench.qat.models import BASE, OURS, THEIRS, contenders
from bench.qat.report import Record, StepBytes, StepTime, markdown
from bench.qat.steps import in_turns

pytestmark = pytest.mark.once
ROOT = Path(__file__).parents[1]
QUICK = ("--quick", "--models", "convnet", "--threads", "1")


def step(contender: str, seconds: float, parts: tuple[float, ...]) -> StepTime:
    return StepTime("net", "float32", 2, contender, 3, 1 + seconds, seconds, (0.0, 9.0), parts)


@pytest.fixture
def record() -> Record:
    found = Record({"CPU": "some"}, "How to read it.")
    found.steps = [
        step(BASE, 0.0, (0.0, 0.0)),
        step(THEIRS, 4.0, (4.0, 5.0)),
        step(OURS, 1.0, (2.0, 1.0)),
    ]
    found.peaks = [StepBytes("net", BASE, 1_000_000, 0), StepBytes("net", OURS, 3_500_000, 70_000)]
    return found


def test_overheads_are_compared_and_the_base_is_taken_off(record: Record) -> None:
    lines = [[cell.strip() for cell in line.split("|")] for line in markdown(record).splitlines()]
    title = "net, float32, 2 threads"
    assert ["", title, OURS, THEIRS, "0.25", "0.20 - 0.50", "0.2", ""] in lines
    times = ["2.00 s", "2.00x", "1000.000", "0.000 - 9000.000"]
    assert ["", OURS, "3", *times, ""] in lines
    assert ["", "net", OURS, "3.5", "2.5", "0.1", "0.1", ""] in lines


def test_a_missing_row_and_a_missing_figure_are_found(record: Record) -> None:
    keys = [row.key for row in (*record.steps, *record.peaks)]
    assert record.missing(keys) == []
    assert record.missing([*keys, ("call", "some", 16)]) == [("call", "some", 16)]
    record.steps[1] = replace(record.steps[1], parts=(1.0, nan))
    assert record.missing(keys) == [keys[1]]


def test_in_every_round_everyone_has_a_turn() -> None:
    turns: list[str] = []
    found = in_turns({name: lambda name=name: turns.append(name) for name in "abc"}, 20)
    rounds = ["".join(turns[begin : begin + 3]) for begin in range(0, 60, 3)]
    assert {"".join(sorted(order)) for order in rounds} == {"abc"}
    assert len(set(rounds)) > 3
    assert {name: len(seconds) for name, seconds in found.items()} == {"a": 20, "b": 20, "c": 20}


def test_a_run_has_every_row(tmp_path: Path) -> None:
    output = tmp_path / "new" / "qat.md"
    subprocess.run(
        [sys.executable, "-m", "bench.qat", *QUICK, "--output", str(output)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    found: dict[str, Any] = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert [(row["dtype"], row["contender"]) for row in found["steps"]] == [
        (dtype, name) for dtype in ("float32", "bfloat16") for name in contenders(dtype)
    ]
    assert [(row["work"], row["elements"]) for row in found["calls"]] == [
        (case.name, size) for case in calls.cases() for size in calls.SIZES
    ]
    assert OURS in output.read_text(encoding="utf-8")
    if found["memory_note"].startswith("Not measured"):
        pytest.skip(found["memory_note"])
    assert [row["contender"] for row in found["peaks"]] == contenders("float32")
    saved = {(row["module"], row["granularity"]): row for row in found["saved"]}
    assert list(saved) == list(memory.modules())
    for (module, _), row in saved.items():
        if module in (OURS, THEIRS):
            assert row["tensors"] == (1 / 8 if module == OURS else 1)
        assert abs(row["resident"] - row["tensors"]) < 2 * RESOLUTION / memory.QUICK_ELEMENTS


WITHOUT_A_FIGURE = """
import sys
from dataclasses import replace
from bench.qat import __main__ as run

time_steps = run.time_steps
run.time_steps = lambda *options: [
    replace(row, overhead=float("nan")) if row.contender == "our fused" else row
    for row in time_steps(*options)
]
run.main()
"""


def test_a_run_without_a_figure_fails() -> None:
    options = [*QUICK, "--steps-alone", "--dtypes", "float32"]
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_FIGURE, *options], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "('step', 'convnet', 'float32', 1, 'our fused')" in run.stderr
    assert run.stdout == ""

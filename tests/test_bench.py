"""The benchmark report: what it is written from, and that memory is measured rightly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import memory
from bench.gpu import cuda_calls
from bench.picture import draw
from bench.report import Peak, Record, Timing, markdown

pytestmark = pytest.mark.once
ROOT = Path(__file__).parents[1]


def timing(
    case: str,
    size: int | str,
    *,
    unit: str = "elements",
    threads: int = 1,
    growth: bool = False,
    headline: bool = False,
) -> Timing:
    seconds = {"reference": 8e-3 / threads, "fallback": 1.6e-2, "native": 1e-3 / threads}
    return Timing(case, size, unit, threads, seconds, "sum", 0.5, growth, headline)


@pytest.fixture
def record() -> Record:
    found = Record({"CPU": "some"}, "How to read it.")
    for threads in (1, 2):
        found.timings += [
            timing("observer", 256, threads=threads, headline=True),
            timing("observer", 1_000_000, threads=threads, headline=True),
            timing("combine", 2048, unit="bins", threads=threads),
            timing("observer", 16_384, unit="bins", threads=threads, growth=True),
            timing("observer", 128, unit="bins", threads=threads, growth=True),
            timing("observer", "float16", unit="dtype", threads=threads, growth=True),
        ]
    found.memory_note = "Of pages."
    found.peaks.append(Peak("op", 1_000_000, "elements", {"result": 3_990_000, "native": 9}))
    return found


def table_rows(section: str) -> list[list[str]]:
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_record_comes_back_from_json(record: Record) -> None:
    assert Record.from_json(record.to_json()) == record


def test_the_report_has_every_section(record: Record) -> None:
    head, *sections = ("\n" + markdown(record)).split("\n## ")
    assert "- CPU: some" in head
    by_title = {section.partition("\n")[0]: section for section in sections}
    short, one, two, growth, peak = by_title
    assert table_rows(by_title[short]) == [
        ["work", "256", "1,000,000"],
        ["-" * 8, "-" * 5, "-" * 9],
        ["observer", "8.00x", "8.00x"],
    ]
    full = table_rows(by_title[one])
    assert full[2:] == [
        ["observer", "256 elements", "8.00 ms", "16.0 ms", "1.00 ms", "8.00x", "0.50x", "-"],
        [
            *("observer", "1,000,000 elements", "8.00 ms", "16.0 ms", "1.00 ms", "8.00x", "0.50x"),
            "0.50 of sum",
        ],
        ["combine", "2,048 bins", "8.00 ms", "16.0 ms", "1.00 ms", "8.00x", "0.50x", "-"],
    ]
    assert table_rows(by_title[two])[2][2:5] == ["4.00 ms", "16.0 ms", "500 µs"]
    bins, dtype = by_title[growth].split("\n### ")[1:]
    assert [row for row in table_rows(bins) if row[1] != "2"] == [
        ["work", "threads", "128", "2,048", "16,384"],
        ["-" * 8, "-" * 7, "-" * 14, "-" * 14, "-" * 14],
        ["combine", "1", "-", "1.00 ms, 8.00x", "-"],
        ["observer", "1", "1.00 ms, 8.00x", "-", "1.00 ms, 8.00x"],
    ]
    assert table_rows(dtype)[0] == ["work", "threads", "float16"]
    assert table_rows(by_title[peak])[2] == ["op", "1,000,000 elements", "4.0", "-", "-", "0"]


def test_a_run_without_native_kernels_is_reported(record: Record) -> None:
    for found in record.timings:
        del found.seconds["native"]
    assert record.headlines() == {}
    assert "16.0 ms, 0.50x" in markdown(record)


def test_the_picture_is_the_same_from_the_same_figures(record: Record, tmp_path: Path) -> None:
    first, second = tmp_path / "first.svg", tmp_path / "second.svg"
    draw(record, first)
    draw(Record.from_json(record.to_json()), second)
    assert first.read_bytes() == second.read_bytes()
    assert len(first.read_bytes()) < 100_000


def test_a_run_writes_report_and_record(tmp_path: Path) -> None:
    output = tmp_path / "new" / "report.md"
    command = [sys.executable, "-m", "bench", "--quick", "--threads", "1", "--sizes", "256"]
    subprocess.run(
        [*command, "--only", "^MinMaxObserver$", "--output", str(output)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    record = Record.from_json(output.with_suffix(".json").read_text(encoding="utf-8"))
    assert output.read_text(encoding="utf-8") == markdown(record)
    assert {found.unit for found in record.timings} == {"elements", "dtype", "layout"}
    assert record.peaks or record.memory_note.startswith("Not measured")


PEAKS_OF_CALLS = """
import json, torch
from bench import memory

x = torch.ones(1_000_000)
calls = {
    "reference": x.clone,
    "fallback": lambda: x.add(1).double().float(),  # 4 bytes an element and 8, then 8 and 4
    "native": x.sum,
}
try:
    with memory.traced():
        print(json.dumps(memory.peaks(calls, "cpu")))
except OSError as error:
    print(json.dumps(str(error)))
"""


def test_memory_is_seen_at_its_peak() -> None:
    # in a process of its own: the heap of this one has room of any size to give
    printed = subprocess.run(
        [sys.executable, "-c", PEAKS_OF_CALLS], cwd=ROOT, check=True, capture_output=True
    ).stdout
    found = json.loads(printed)
    if isinstance(found, str):
        pytest.skip(found)
    expected = {"reference": 4e6, "result": 4e6, "fallback": 12e6, "native": 0}
    assert found == pytest.approx(expected, abs=2 * memory.RESOLUTION)


def test_the_gpu_report_runs_where_there_is_none(tmp_path: Path) -> None:
    output = tmp_path / "gpu.md"
    only = "^(MinMaxObserver|fake_quantize backward)$"
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--sizes", "256,20000"]
    subprocess.run(
        [*command, "--only", only, "--output", str(output)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    rows = json.loads(output.with_suffix(".json").read_text())["rows"]
    assert [(row["case"], row["size"]) for row in rows] == [
        ("MinMaxObserver", 20_000),
        ("fake_quantize backward", 20_000),
        ("MinMaxObserver", 256),
        ("fake_quantize backward", 256),
    ]
    assert all(row["seconds"]["reference"] > 0 for row in rows)
    assert [row["share"] is None for row in rows] == [False, False, True, True]
    assert "| MinMaxObserver " in output.read_text()


def test_cuda_calls_are_counted_by_their_kind() -> None:
    names = [
        "cudaLaunchKernel",
        "cuLaunchKernelEx",
        "cudaMemsetAsync",
        "aten::add",
        "minmax_kernel",
    ]
    names += ["cudaStreamSynchronize", "cudaLaunchKernelExC", "cudaMemcpyAsync", "Memcpy DtoH"]
    assert cuda_calls(names) == {"launches": 3, "memory": 2, "syncs": 1}

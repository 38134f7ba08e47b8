"""The examples run, in short form."""

from __future__ import annotations

import runpy
import statistics
from pathlib import Path
from typing import Any

import pytest

from pyobserver.ranges import METHODS

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.once
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_digits_qat(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    example: dict[str, Any] = runpy.run_path(str(EXAMPLES / "digits_qat.py"))
    picture = tmp_path / "digits_qat.svg"
    runs = example["main"](seeds=1, widths=(4, 2), float_epochs=6, qat_epochs=2, picture=picture)
    trained = [example["BY_STEP"], example["HELD"], example["LSQ"]]
    rows = [example["FLOAT"], *(f"PTQ, {method}" for method in METHODS), *trained]

    def test_accuracy(row: str, bits: int) -> float:
        return runs[0][row, bits].test

    minmax = {bits: test_accuracy("PTQ, minmax", bits) for bits in (4, 2)}
    assert test_accuracy(example["FLOAT"], 4) > 93
    # four bits cost a few points, most of which training wins back
    assert minmax[4] > 80
    assert statistics.mean(test_accuracy(row, 4) for row in trained) > minmax[4]
    assert min(test_accuracy(row, 4) for row in trained) > minmax[4] - 2
    # two bits are too few without training
    assert min(test_accuracy(row, 2) for row in trained[1:]) > minmax[2] + 15
    assert {len(runs[0][row, 4].validation) for row in trained} == {1 + 2}

    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == rows
    assert all(row in picture.read_text() for row in trained)

"""The examples run, in short form."""

from __future__ import annotations

import runpy
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
    runs = example["main"](seeds=1, widths=(4, 2), float_epochs=8, qat_epochs=3, picture=picture)
    trained = [example["BY_STEP"], example["HELD"]]
    rows = [example["FLOAT"], *(f"PTQ, {method}" for method in METHODS), *trained]

    def test_accuracy(row: str, bits: int) -> float:
        return runs[0][row, bits].test

    assert test_accuracy(example["FLOAT"], 4) > 94
    # four bits cost little, and little of that remains after training
    for row in trained:
        assert test_accuracy(row, 4) > max(test_accuracy("PTQ, minmax", 4), 94) - 1, row
    # two bits are too few without training
    assert test_accuracy(example["HELD"], 2) > test_accuracy("PTQ, minmax", 2) + 10
    assert {len(runs[0][row, 4].validation) for row in trained} == {1 + 3}

    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == rows
    assert all(row in picture.read_text() for row in trained)

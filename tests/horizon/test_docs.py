"""The page ``docs/horizon.md`` runs, as one program."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent.parent / "docs" / "horizon.md"


def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("sklearn", "matplotlib", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    program = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))
    exec(compile(program, PAGE.name, "exec"), {})
    text = capsys.readouterr().out
    rows = re.findall(r"^(.+?) +([\d.]+)%   ink off by ([\d.]+)$", text, re.MULTILINE)
    accuracies = {name: float(accuracy) for name, accuracy, _ in rows}
    errors = {name: float(error) for name, _, error in rows}
    assert list(accuracies) == [
        *("float32", "int8", "mse", "percentile", "kl", "minmax", "mixed", "the same", "trained"),
    ]
    assert accuracies["float32"] > 90
    assert accuracies["mse"] == accuracies["int8"]
    for name in ("int8", "percentile", "minmax", "mixed", "the same", "trained"):
        assert abs(accuracies[name] - accuracies["float32"]) < 4, name
        assert errors[name] < errors["float32"] + 0.02, name
    assert (accuracies["mixed"], errors["mixed"]) == (accuracies["the same"], errors["the same"])
    found = re.search(r"onnxruntime says the same of ([\d.]+)% of the digits", text)
    assert found is not None
    assert float(found[1]) > 99
    for name in ("calib_model.pth", "sensitivity.png", "mixed.pt2", "mixed.onnx"):
        assert (tmp_path / name).stat().st_size > 1000

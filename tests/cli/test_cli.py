from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pyobserver
from pyobserver import NativeStatus
from pyobserver.cli import info, main

ROOT = Path(pyobserver.__file__).parent.parent


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter that sees the pyobserver under test."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def fields(text: str) -> dict[str, str]:
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in text.splitlines())


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown, status = fields(capsys.readouterr().out), pyobserver.native_status
    assert shown["pyobserver"] == pyobserver.__version__
    assert shown["torch"] == torch.__version__
    assert shown["Python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}")
    assert shown["CPU library"] == ("loaded" if status.cpu else f"not loaded: {status.reason}")
    assert ("not loaded" in shown["CUDA library"]) == (not status.cuda)


@pytest.mark.parametrize(
    ("cuda_reason", "gpu", "said"),
    [
        ("it was built, and …", None, "not loaded: it was built, and …"),
        (None, None, "loaded, not in use: torch finds no GPU"),
        (None, "Some GPU", "loaded, for Some GPU"),
    ],
)
def test_info_says_why_cuda_is_not_in_use(
    monkeypatch: pytest.MonkeyPatch, cuda_reason: str | None, gpu: str | None, said: str
) -> None:
    status = NativeStatus(True, cuda_reason is None, None, cuda_reason, None)
    monkeypatch.setattr(info, "status", status)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    assert info.cuda_library() == said


@pytest.mark.skipif(not pyobserver.native_status.cpu, reason="needs the native CPU library")
def test_info_of_the_build(capsys: pytest.CaptureFixture[str]) -> None:
    main(["info"])
    shown, build = fields(capsys.readouterr().out), pyobserver.native_status.build
    assert build is not None
    assert shown["CPU kernels"] == f"native ({build.cpu_isa()})"
    assert shown["CPU ISAs"] == ", ".join(build.cpu_isas())
    assert shown["threads"] == str(build.num_threads())
    for key, text in build.build_info().items():
        assert shown[f"build: {key}"] == text


@pytest.mark.once
def test_info_without_native() -> None:
    done = python("-m", "pyobserver", "info", PYOBSERVER_NATIVE="0")
    assert (done.returncode, done.stderr) == (0, "")
    shown = fields(done.stdout)
    assert shown["CPU library"] == "not loaded: switched off by PYOBSERVER_NATIVE=0"
    assert shown["CUDA library"] == "not loaded: switched off by PYOBSERVER_NATIVE=0"
    assert shown["CPU kernels"] == "pure PyTorch"
    assert int(shown["threads"]) >= 1
    assert not any(name.startswith("build") for name in shown)


def pixels_of(image: Any, colour: str) -> int:
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return int((abs(image[..., :3] - rgb).max(-1) < 0.02).sum())


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("matplotlib.image")
    pytest.importorskip("sklearn")
    output, threads = tmp_path / "demo.png", torch.get_num_threads()
    assert main(["demo", "--quick", "--output", str(output)]) == 0
    assert torch.get_num_threads() == threads

    pixels = image.imread(output)
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 1000
    # grey bars, and the colours of the observers
    of_observers = ("#B8B8B8", "#D55E00", "#0072B2", "#009E73", "#CC79A7")
    assert all(pixels_of(pixels, colour) > 200 for colour in of_observers)
    # and those of the methods
    tails = image.imread(tmp_path / "demo-tails.png")
    assert all(pixels_of(tails, colour) > 200 for colour in (*of_observers, "#E69F00", "#56B4E9"))

    text = capsys.readouterr().out
    assert ("backend: native" if pyobserver.native_status.cpu else "backend: pure PyTorch") in text
    found = re.search(r"accuracy in float32: ([\d.]+)%", text)
    assert found is not None
    in_float = float(found[1])
    assert in_float > 90
    rows = re.findall(r"^(\w+) +(\w+) +([\d.]+)% +([\d.]+)% +[\d.]+( +.+)?$", text, re.MULTILINE)
    # without the native library it searches no channels
    assert len(rows) == 8 if pyobserver.native_status.cpu else 7
    assert {name for row in rows for name in row[:2]} == {
        "MinMax",
        "MovingAverageMinMax",
        "Histogram",
        "LogHistogram",
        "PerChannelMinMax",
        "MovingAveragePerChannelMinMax",
        *(["PerChannelLogHistogram"] if pyobserver.native_status.cpu else []),
    }
    for *_, int8, int4, _ in rows:
        assert abs(float(int8) - in_float) < 3
        assert float(int4) > 70

    cells = dict(re.findall(r"^(\w+) +([\d.]+ / [\d./ ]+)$", text, re.MULTILINE))
    assert cells.keys() == pyobserver.ranges.METHODS.keys()
    predicted = {
        method: [float(cell.split(" / ")[0]) for cell in re.split(r" {2,}", row)]
        for method, row in cells.items()
    }
    for method, row in predicted.items():
        assert len(row) == 3
        assert row == sorted(row)
        assert all(x <= best + 0.1 for x, best in zip(row, predicted["mse"], strict=True)), method
    accuracies = re.findall(r"^(\w+) +[\d.]+% +[\d.]+% +([\d.]+)%$", text, re.MULTILINE)
    assert [method for method, _ in accuracies] == list(pyobserver.ranges.METHODS)
    assert all(abs(float(accuracy) - in_float) < 3 for _, accuracy in accuracies)


@pytest.mark.once
@pytest.mark.parametrize("package", ["sklearn", "matplotlib"])
def test_demo_without_its_packages(package: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules[{package!r}] = None; from pyobserver.cli import main; "
        f"sys.exit(main(['demo', '--quick', '--output', {str(tmp_path / 'x.png')!r}]))"
    )
    done = python("-c", code)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert package in line
    assert "pip install 'pyobserver[demo]'" in line
    assert not any(tmp_path.iterdir())


@pytest.mark.once
def test_demo_without_torch_ao(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    monkeypatch.setitem(sys.modules, "torch.ao.quantization", None)
    assert main(["demo", "--quick", "--output", str(tmp_path / "demo.png")]) == 0
    assert capsys.readouterr().out.count("not importable") == 6


@pytest.mark.parametrize("arguments", [["conjure"], [], ["info", "--loud"]])
def test_arguments_that_are_not_understood(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: pyobserver" in capsys.readouterr().err


@pytest.mark.once
def test_unknown_command_of_the_process() -> None:
    assert python("-m", "pyobserver", "conjure").returncode == 2

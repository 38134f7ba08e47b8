"""What is loaded, what is said when it is not, and the control of the instruction set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import pyobserver
from pyobserver import _native

pytestmark = pytest.mark.once  # what is loaded they decide themselves
PACKAGE = Path(pyobserver.__file__).parent
needs_native = pytest.mark.skipif(
    not pyobserver.native_status.cpu, reason="needs the native library"
)


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter whose pyobserver is the one in ``folder``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYOBSERVER_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": str(folder), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def pure(tmp_path: Path) -> Path:
    """A folder with a copy of the package that has no binary."""
    shutil.copytree(
        PACKAGE, tmp_path / "pyobserver", ignore=shutil.ignore_patterns("*.so", "_build_note.txt")
    )
    return tmp_path


def test_without_binary_says_so_and_works(pure: Path) -> None:
    code = (
        "import torch, pyobserver; o = pyobserver.HistogramObserver(); o(torch.randn(9));"
        "print(pyobserver.native_status.reason, o.calculate_qparams()[0].item() > 0)"
    )
    done = run(code, pure)
    assert done.returncode == 0, done.stderr
    assert "libpyobserver.so was not built" in done.stdout
    assert "True" in done.stdout
    assert "RuntimeWarning: pyobserver runs in pure PyTorch" in done.stderr


def test_reason_of_the_install_is_kept(pure: Path) -> None:
    (pure / "pyobserver" / "_build_note.txt").write_text("not built: no C++ compiler was found\n")
    done = run("import pyobserver; print(pyobserver.native_status.reason)", pure)
    assert done.stdout == "not built: no C++ compiler was found\n"


def test_require_without_binary_is_an_error(pure: Path) -> None:
    done = run("import pyobserver", pure, PYOBSERVER_NATIVE="require")
    assert done.returncode != 0
    assert "ImportError: PYOBSERVER_NATIVE=require, but the native library is absent" in done.stderr


def test_switched_off_without_warning(pure: Path) -> None:
    code = "import pyobserver; print(pyobserver.native_status.reason)"
    done = run(code, pure, PYOBSERVER_NATIVE="0")
    assert done.stdout == "switched off by PYOBSERVER_NATIVE=0\n"
    assert done.stderr == ""


def test_unknown_setting_is_an_error(pure: Path) -> None:
    done = run("import pyobserver", pure, PYOBSERVER_NATIVE="yes")
    assert "ValueError: PYOBSERVER_NATIVE: expected 0, 1 or require, got 'yes'" in done.stderr


def test_binary_of_another_python_falls_back(pure: Path) -> None:
    (pure / "pyobserver" / "libpyobserver.so").write_bytes(b"of another Python")
    done = run("import pyobserver; print(pyobserver.native_status.reason)", pure)
    assert done.returncode == 0
    assert "libpyobserver.so was built for another Python" in done.stdout


def test_broken_binary_falls_back(pure: Path) -> None:
    (pure / "pyobserver" / "libpyobserver.so").write_bytes(b"no library")
    (pure / "pyobserver" / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))).touch()
    done = run("import pyobserver; print(pyobserver.native_status.reason)", pure)
    assert done.returncode == 0
    assert "libpyobserver.so does not load under torch" in done.stdout


@needs_native
class TestNative:
    def test_build_information(self) -> None:
        build = pyobserver.native_status.build
        info = build.build_info()
        assert info["version"] == pyobserver.__version__
        assert info["torch_target"] == "2.10"
        assert set(info) == {
            "version",
            "compiler",
            "torch_target",
            "build_torch",
            "cuda",
            "build_type",
        }
        assert all(info.values())

    def test_autograd_of_another_torch_is_not_loaded(self, tmp_path: Path) -> None:
        (tmp_path / _native._AUTOGRAD_MODULE).write_bytes(b"whose loading would fail")
        reason = _native._import_autograd(tmp_path, "2.0.0+old")
        assert isinstance(reason, str)
        assert f"was built for torch 2.0.0+old, and this is {torch.__version__}" in reason
        reason = _native._import_autograd(tmp_path, torch.__version__)
        assert isinstance(reason, str)
        assert "does not load under torch" in reason

    def test_threads_are_torch_s(self) -> None:
        before = torch.get_num_threads()
        try:
            for count in (3, 1):
                torch.set_num_threads(count)
                assert pyobserver.native_status.build.num_threads() == count
        finally:
            torch.set_num_threads(before)

    def test_instruction_set_is_forced(self) -> None:
        build = pyobserver.native_status.build
        before = build.cpu_isa()
        assert before == build.cpu_isas()[-1] or os.environ.get("PYOBSERVER_ISA")
        try:
            for isa in build.cpu_isas():
                build.set_cpu_isa(isa)
                assert build.cpu_isa() == isa
        finally:
            build.set_cpu_isa(before)

    def test_unknown_instruction_set_changes_nothing(self) -> None:
        build = pyobserver.native_status.build
        before = build.cpu_isa()
        with pytest.raises(ValueError, match=r"name: expected .*baseline.*, got 'mmx'"):
            build.set_cpu_isa("mmx")
        assert build.cpu_isa() == before

    def test_instruction_set_of_the_environment(self) -> None:
        code = "import pyobserver; print(pyobserver.native_status.build.cpu_isa())"
        done = run(code, PACKAGE.parent, PYOBSERVER_ISA="baseline")
        assert done.stdout == "baseline\n", done.stderr
        done = run(code, PACKAGE.parent, PYOBSERVER_ISA="mmx")
        assert "got 'mmx'" in done.stderr

    def test_kernels_override_the_reference(self) -> None:
        kernels = torch._C._dispatch_dump("pyobserver::minmax")
        assert "CPU: registered" in kernels
        assert "CompositeExplicitAutograd" in kernels

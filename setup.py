"""Drives CMake from pip. What is built, and how, is said in CMakeLists.txt; torch is not imported.

Environment: PYOBSERVER_NATIVE=0 installs the pure-PyTorch package, =require makes a missing
compiler an error; PYOBSERVER_CUDA=auto|0|1; PYOBSERVER_CUDA_ON_HOST=1 (for tests);
PYOBSERVER_WERROR=1; PYOBSERVER_BUILD_DIR; MAX_JOBS; CMAKE_ARGS for anything else.
"""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NATIVE = os.environ.get("PYOBSERVER_NATIVE", "1")


def find_torch() -> bool:
    """Whether the interpreter has torch; the flags see past pip's build isolation."""
    probe = "import importlib.util as u, sys; sys.exit(u.find_spec('torch') is None)"
    flags = ([], ["-I"], ["-E"])
    return any(subprocess.run([sys.executable, *f, "-c", probe]).returncode == 0 for f in flags)


def tool(name: str) -> str:
    """A build tool: of the build environment if it is there, else of the machine."""
    found = shutil.which(name)
    if found is None:
        sys.exit(f"pyobserver: {name} was not found; install it: pip install {name}")
    return found


class CMakeBuild(build_ext):
    def run(self) -> None:
        destination = ROOT if self.inplace else Path(self.build_lib).resolve()
        package = destination / "pyobserver"
        note = package / "_build_note.txt"
        for pattern in ("_C.*.so", "_autograd.*.so", "libpyobserver*.so"):
            for stale in package.glob(pattern):
                stale.unlink()  # of an earlier build, perhaps for another Python or without CUDA
        reason = self.reason_for_none()
        if reason is None:
            self.build_native(destination)
            note.unlink(missing_ok=True)
        else:
            self.warn(f"{reason}: installing the pure-PyTorch package, which is slower")
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(f"not built: {reason}\n")

    def reason_for_none(self) -> "str | None":
        """Why the native library is not built; None if it is."""
        if NATIVE not in ("0", "1", "require"):
            sys.exit(f"PYOBSERVER_NATIVE: expected 0, 1 or require, got {NATIVE!r}")
        if NATIVE == "0":
            return "PYOBSERVER_NATIVE=0 at install"
        if not find_torch():
            sys.exit(
                "pyobserver builds against the torch that is installed, and there is none: install "
                "torch first, then run this again (with --no-build-isolation if that was not pip)"
            )
        compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        if sys.platform != "linux":
            reason = f"the native build is for Linux, and this is {sys.platform}"
        elif not any(shutil.which(shlex.split(compiler)[0]) for compiler in compilers):
            reason = f"no C++ compiler was found ({', '.join(compilers)})"
        else:
            return None
        if NATIVE == "require":
            sys.exit(f"pyobserver: PYOBSERVER_NATIVE=require, but {reason}")
        return reason

    def build_native(self, destination: Path) -> None:
        tag = f"{sys.implementation.cache_tag}-{self.plat_name}"
        build = Path(os.environ.get("PYOBSERVER_BUILD_DIR", ROOT / "build" / f"cmake-{tag}"))
        if importlib.util.find_spec("pybind11") is None:
            sys.exit("pyobserver: pybind11 was not found; install it: pip install pybind11")
        import pybind11

        cmake = tool("cmake")
        # a build folder used again must not remember tools of a deleted isolated environment
        configure = [
            cmake,
            "-GNinja",
            f"-S{ROOT}",
            f"-B{build}",
            f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYOBSERVER_CUDA={os.environ.get('PYOBSERVER_CUDA', 'auto')}",
            f"-DPYOBSERVER_CUDA_ON_HOST={os.environ.get('PYOBSERVER_CUDA_ON_HOST', '0')}",
            f"-DPYOBSERVER_WERROR={os.environ.get('PYOBSERVER_WERROR', '0')}",
            "-DPYOBSERVER_SANITIZE=",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS", str(len(os.sched_getaffinity(0))))
        install = [cmake, "--install", str(build), "--prefix", str(destination)]
        try:
            subprocess.run(configure, check=True)
            compile = [cmake, "--build", str(build), "-j", jobs, "--target", "all"]
            if subprocess.run([*compile, "_autograd"]).returncode != 0:
                self.build_without_autograd(compile, build)
            subprocess.run(install, check=True)
        except subprocess.CalledProcessError as error:
            sys.exit(
                f"pyobserver: the native build failed ({shlex.join(error.cmd[:2])} …, messages "
                "above); PYOBSERVER_NATIVE=0 installs the pure-PyTorch package instead"
            )

    def build_without_autograd(self, compile: "list[str]", build: Path) -> None:
        """_autograd uses torch's C++ API, which changes: where it fails, Python serves."""
        subprocess.run(compile, check=True)
        if NATIVE == "require":
            sys.exit("pyobserver: PYOBSERVER_NATIVE=require, but _autograd failed (messages above)")
        for stale in build.glob("_autograd.*.so"):
            stale.unlink()  # of another torch
        self.warn("_autograd does not compile with this torch: gradients go through Python")

    def get_outputs(self) -> "list[str]":
        return []


# one extension, so that the wheel is of this platform; CMake decides what it holds
setup(ext_modules=[Extension("pyobserver._C", [])], cmdclass={"build_ext": CMakeBuild})

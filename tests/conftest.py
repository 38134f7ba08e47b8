from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from backends import Backend, backends

import pyobserver


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=backends(), ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each kernel in turn; the ISA that was active before is restored."""
    chosen: Backend = request.param
    before = pyobserver.native_status.build.cpu_isa() if pyobserver.native_status.cpu else None
    chosen.select()
    yield chosen
    if before is not None:
        pyobserver.native_status.build.set_cpu_isa(before)


def pytest_report_header() -> str:
    return "pyobserver backends: " + ", ".join(map(str, backends()))

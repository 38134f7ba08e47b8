from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from backends import GPU, Backend, as_param, backends


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=[as_param(each) for each in dict.fromkeys([*backends(), GPU])])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each kernel in turn; what was active before is restored."""
    chosen: Backend = request.param
    with chosen.selected():
        yield chosen


def pytest_report_header() -> str:
    return "pyobserver backends: " + ", ".join(map(str, backends()))

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from backends import Backend, backends, params

# more only wait for each other: the tensors are small, and a test of threads says how many
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=params())
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each kernel in turn; what was active before is restored."""
    chosen: Backend = request.param
    with chosen.selected():
        yield chosen


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "backend" in getattr(item, "fixturenames", ()):
            item.add_marker("once")


def pytest_report_header() -> str:
    return "pyobserver backends: " + ", ".join(map(str, backends()))

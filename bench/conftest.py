"""Every case of a bench module, at every size, by every contender, as one test each."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

from .cases import GROWTH_ELEMENTS, SIZES, SMOKE_SIZES, Call, contender_names
from .fallback import kernels_of
from .timing import keep_memory_warm


def _is_smoke(config: pytest.Config) -> bool:
    return config.getoption("benchmark_disable")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    keep_memory_warm(GROWTH_ELEMENTS if _is_smoke(config) else max(SIZES))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    smoke = _is_smoke(metafunc.config)
    params = [
        pytest.param(
            (case, size, name),
            id=f"{case.name}-{size}-{name}",
            marks=pytest.mark.benchmark(
                group=f"{case.name}, {size} {case.unit}",
                max_time=0.2,
                min_rounds=3,
                disable_gc=True,
                timer=time.process_time,  # see cpu_clock
                warmup=True,
                warmup_iterations=1,
            ),
        )
        for case in metafunc.module.CASES
        for size in case.sizes_of(SMOKE_SIZES if smoke else SIZES, smoke)
        for name in contender_names(case, "cpu")
    ]
    metafunc.parametrize("contender", params, indirect=True)


@pytest.fixture
def contender(request: pytest.FixtureRequest) -> Iterator[Call]:
    """The contender's call, with its kernels, on one thread."""
    case, size, name = request.param
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    call = case.make(size, "cpu")[name]
    with kernels_of(name):
        yield call
    torch.set_num_threads(threads)

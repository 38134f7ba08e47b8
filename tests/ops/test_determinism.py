"""Every op gives the same bytes on every instruction set and thread count, and on CUDA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
import torch
from backends import GPU, Backend, backends, params

from .cases import DTYPES, assert_all_same, threads
from .work import OF_COUNTS, SEARCHES, WORK, values

BASELINE = [backend for backend in backends() if backend.isa == "baseline"]
NATIVE = [backend for backend in backends() if backend.isa is not None]


def results(
    backend: Backend, name: str, dtype: torch.dtype, count: int, one_nan: bool = False
) -> list[bytes]:
    """The bytes of all outputs and states, each in the order of its memory.

    ``one_nan``: with the same bits for every NaN.
    """
    x = values(dtype, name not in SEARCHES, backend.device)
    with backend.selected(), threads(count):
        found = WORK[name](backend.op, x)
    flat = [t.as_strided((t.numel(),), (1,)).cpu() for t in found]
    if one_nan:
        flat = [t.where(t == t, torch.nan) if t.is_floating_point() else t for t in flat]
    return [t.view(torch.uint8).numpy().tobytes() for t in flat]


def cases(names: Iterable[str], dtypes: Sequence[torch.dtype] = DTYPES) -> pytest.MarkDecorator:
    """Each work with each dtype that changes something."""
    pairs = [(name, dtype) for name in names for dtype in dtypes[: 1 if name in OF_COUNTS else 4]]
    return pytest.mark.parametrize(("name", "dtype"), pairs, ids=str)


pytestmark = [pytest.mark.once, pytest.mark.skipif(not NATIVE, reason="one kernel alone")]


@cases(WORK)
def test_same_bytes(name: str, dtype: torch.dtype) -> None:
    expected = results(BASELINE[0], name, dtype, 1)
    for backend in NATIVE:
        for count in (1, 2, 3) if backend != BASELINE[0] else (2, 3):
            found = results(backend, name, dtype, count)
            same = [one == other for one, other in zip(found, expected, strict=True)]
            assert all(same), (str(backend), count, same)


@pytest.mark.parametrize("cuda", params(lambda backend: backend.cuda))
@cases(WORK, (torch.float32, torch.bfloat16))
def test_same_bytes_on_cuda(cuda: Backend, name: str, dtype: torch.dtype) -> None:
    if cuda == GPU and name == "lp_search_powers":
        pytest.skip("a GPU has powers of its own")
    one_nan = cuda == GPU  # whose arithmetic gives another than a CPU's
    expected = results(BASELINE[0], name, dtype, 1, one_nan)
    found = results(cuda, name, dtype, 1, one_nan)
    same = [one == other for one, other in zip(found, expected, strict=True)]
    assert all(same), same


NOT_OF_THE_REFERENCE = ("sliced", "lp_search", "learnable")


@cases(name for name in WORK if not any(part in name for part in NOT_OF_THE_REFERENCE))
def test_same_as_the_reference(name: str, dtype: torch.dtype) -> None:
    """Its numbers: one NaN is as good as another."""
    x = values(dtype, special=name not in SEARCHES)
    with threads(2):
        found = WORK[name](NATIVE[-1].op, x)
        assert_all_same(found, WORK[name](Backend("reference").op, x), name)

from __future__ import annotations

import pytest
import torch

from pyobserver.dtypes import dtype_bounds, quant_bounds

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32)
ALIASES = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_bounds_are_those_of_the_type(dtype: torch.dtype) -> None:
    info = torch.iinfo(dtype)
    assert dtype_bounds(dtype) == (info.min, info.max)
    assert quant_bounds(dtype, None, None, False) == (info.min, info.max)


def test_aliases() -> None:
    for alias, dtype in ALIASES.items():
        assert dtype_bounds(alias) == dtype_bounds(dtype)
    assert dtype_bounds(torch.quint4x2) == (0, 15)


def test_one_bit_less() -> None:
    """Of 8-bit types, and of bounds that the caller gives: floor-halved, as in torch.ao."""
    assert quant_bounds(torch.qint8, None, None, True) == (-64, 63)
    assert quant_bounds(torch.quint8, None, None, True) == (0, 127)
    assert quant_bounds(torch.int16, None, None, True) == (-(2**15), 2**15 - 1)
    assert quant_bounds(torch.quint8, 0, 255, True) == (0, 127)
    assert quant_bounds(torch.qint8, -127, 127, True) == (-64, 63)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.float8_e4m3fn, torch.bool, torch.int64, torch.complex64],
    ids=str,
)
def test_other_types_are_refused_by_name(dtype: torch.dtype) -> None:
    """D25: torch.ao takes float8 for 0 to 15."""
    with pytest.raises(ValueError, match=f"dtype: expected one of .* got {dtype}"):
        dtype_bounds(dtype)


@pytest.mark.parametrize(
    ("bounds", "match"),
    [
        ((0, None), "both or neither, got quant_min=0, quant_max=None"),
        ((None, 5), "both or neither, got quant_min=None, quant_max=5"),
        ((3, 3), "quant_min: expected a value below quant_max"),
        ((1, 5), r"holds 0, got \[1, 5\]"),
        ((-5, -1), r"holds 0, got \[-5, -1\]"),
        ((0, 128), r"inside that of torch.int8, \[-128, 127\], got \[0, 128\]"),
        ((-129, 0), r"inside that of torch.int8, .* got \[-129, 0\]"),
    ],
)
def test_bounds_that_do_not_fit(bounds: tuple[int | None, int | None], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        quant_bounds(torch.int8, *bounds, False)

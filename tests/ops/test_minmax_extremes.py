"""``minmax`` where a value could be missed: every length, every place, every kind of value."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from backends import Backend
from torch import Tensor

from .cases import DTYPES, assert_all_same, assert_same, sample

SIGNS = ("mixed", "positive", "negative")
INTEGERS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}


def signed(x: Tensor, sign: str) -> Tensor:
    """With values next to zero, but not zero."""
    return x if sign == "mixed" else (x.abs() + 0.125) * (1 if sign == "positive" else -1)


def ranges(
    backend: Backend, tensors: list[Tensor], axis: int | None = None, nonfinite: str = "ignore"
) -> tuple[Tensor, Tensor, Tensor]:
    """The range of each tensor (of each of its channels), and its count."""
    op = backend.op("minmax")
    channels = 1 if axis is None else tensors[0].shape[axis]
    low = torch.full((len(tensors), channels), torch.inf, device=backend.device)
    high = -low
    count = torch.zeros(len(tensors), dtype=torch.int64, device=backend.device)
    for i, x in enumerate(tensors):
        op(x, low[i], high[i], count[i], axis, "memoryless", nonfinite=nonfinite)
    return low.cpu(), high.cpu(), count.cpu()


def expected_ranges(
    rows: list[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by torch, of the finite values of each row."""
    found = []
    for row in rows:
        values = row.float()
        finite = values.isfinite()
        low = values.where(finite, torch.inf).amin() + 0.0
        high = values.where(finite, -torch.inf).amax() + 0.0
        found.append((low, high, (~finite).sum()))
    low, high, count = map(torch.stack, zip(*found, strict=True))
    return low[:, None], high[:, None], count


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length(backend: Backend, dtype: torch.dtype, sign: str) -> None:
    x = signed(sample(301, dtype), sign)
    tensors = [x[1 : 1 + n] for n in range(1, 301)]
    found = ranges(backend, [t.to(backend.device) for t in tensors])
    assert_all_same(found, expected_ranges(tensors))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_about_a_stretch(backend: Backend, dtype: torch.dtype) -> None:
    """A long run is gone through a stretch at a time: its first and last values, and NaN in one."""
    tensors = []
    for n in (16383, 16384, 16385, 32769, 65532, 65535, 65537, 65540, 131073):
        for place in (0, n // 2, n - 1):
            x = signed(sample(n, dtype, place), SIGNS[place % 3])
            x[place], x[(place + n // 3) % n] = 900.0, -900.0
            if place % 2:
                x[(place + 2 * n // 3) % n] = torch.nan
            tensors.append(x)
    found = ranges(backend, [t.to(backend.device) for t in tensors])
    assert_all_same(found, expected_ranges(tensors))


@cache
def with_extremes(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Row i of n has its least value at i, and its greatest at another place; rows of each sign."""
    places = torch.arange(n)
    x = sample((n, n), seed=n) / 16 + 2.0 * ((places + n) % 3 - 1)[:, None]
    x[places, (places * 7 + 3) % n] += 1.5
    x[places, places] -= 1.5
    x = x.to(dtype)
    return x, x.float().amin(1), x.float().amax(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_place(backend: Backend, dtype: torch.dtype) -> None:
    """In runs of every length, which begin anywhere; and the whole tensor's range."""
    for n in range(1, 201):
        x, low, high = with_extremes(n, dtype)
        given = x.to(backend.device)
        rows = ranges(backend, [given], 0)
        assert_all_same((rows[0][0], rows[1][0]), (low, high), n)
        if n in (7, 8, 9, 31, 32, 33, 65, 130):
            alone = ranges(backend, list(given))
            assert_all_same((alone[0][:, 0], alone[1][:, 0]), (low, high), n)


def special_values(dtype: torch.dtype) -> list[Tensor]:
    """NaN of either sign, with the least and the greatest of its bits, and the infinities."""
    integer = INTEGERS[dtype]
    bits = torch.tensor(torch.inf, dtype=dtype).view(integer)
    negative = torch.tensor(-torch.inf, dtype=dtype).view(integer)
    return [
        *(t.view(dtype) for t in (bits, negative, bits + 1, negative + 1)),
        *(t.view(dtype) for t in (bits * 0 - 1, bits * 0 + torch.iinfo(integer).max)),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_value_that_is_not_finite_at_every_place(backend: Backend, dtype: torch.dtype) -> None:
    values = special_values(dtype)
    for i, value in enumerate(values):
        assert not value.isfinite()
        for n in (1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 130):
            x = signed(sample((n, n), dtype, n), SIGNS[(n + i) % 3])
            x.view(INTEGERS[dtype]).fill_diagonal_(int(value.view(INTEGERS[dtype])))
            low, high, count = ranges(backend, [x.to(backend.device)], 0)
            expected = expected_ranges(list(x))
            assert_all_same((low[0], high[0]), [t[:, 0] for t in expected[:2]], (value, n))
            assert int(count) == n
            if n < 10:
                found = ranges(backend, list(x.to(backend.device)))
                assert_all_same(found, expected, (value, n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_the_least_values(backend: Backend, dtype: torch.dtype) -> None:
    """Zeros of both signs give a positive one; subnormal values are not taken for zeros."""
    least = torch.tensor([1], dtype=INTEGERS[dtype]).view(dtype)
    if dtype == torch.float64:
        least = torch.tensor([1e-45], dtype=dtype)
    normal = torch.tensor([torch.finfo(torch.float32 if dtype == torch.float64 else dtype).tiny])
    few = torch.cat([*(t.to(dtype) for t in (least, normal, least * 3)), torch.zeros(1).to(dtype)])
    few = torch.cat([few, -few])
    tensors = []
    for n in (1, 2, 3, 9, 17, 65):
        for i in range(8):
            for j in range(8):
                x = few[i].repeat(n)
                x[n // 2 :] = few[j]
                tensors.append(x)
    found = ranges(backend, [t.to(backend.device) for t in tensors])
    assert_all_same(found, expected_ranges(tensors))


SHAPES = [
    (outer, channels, inner)
    for outer in (1, 2, 7, 8, 9, 100)
    for channels in (1, 2, 3, 7, 31, 32, 33, 100, 1000)
    for inner in (1, 3, 9, 15, 16, 17)
    if outer * channels * inner <= 10_000
] + [(100, 1000, 1), (20_000, 7, 1), (3000, 33, 2), (300, 100, 9)]


@cache
def columns(dtype: torch.dtype) -> list[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
    """Channels of each sign, every place of the extremes, and what torch finds in them."""

    def cases() -> Iterator[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]]:
        for i, (outer, channels, inner) in enumerate(SHAPES):
            for special in (False, True) if i % 5 == 0 else (i % 2 == 0,):
                x = sample(outer * channels * inner, seed=i).reshape(outer, channels, inner)
                x[:, 1::3].abs_().add_(1)
                x[:, 2::3].abs_().add_(1).neg_()
                x[(i * 5) % outer, :, (i * 3) % inner] *= 30
                if special:
                    flat = x.view(-1)
                    flat[i % 5 :: 1 + x.numel() // 3] = torch.nan
                    flat[x.numel() - 1] = -torch.inf
                    flat[x.numel() // 2] = torch.inf
                    x[:, channels // 2] = torch.nan  # nothing else in it
                x = x.to(dtype)
                values = x.float()
                finite = values.isfinite()
                low = values.where(finite, torch.inf).amin((0, 2)) + 0.0
                high = values.where(finite, -torch.inf).amax((0, 2)) + 0.0
                yield x, (low[None], high[None], (~finite).sum()[None])

    return list(cases())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns(backend: Backend, dtype: torch.dtype) -> None:
    for x, expected in columns(dtype):
        found = ranges(backend, [x.to(backend.device)], 1)
        assert_all_same(found, expected, tuple(x.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_place_of_a_column(backend: Backend, dtype: torch.dtype) -> None:
    """An extreme and a NaN at every place of narrow matrices, whose rows are taken together."""
    for rows in (8, 9, 23):
        for width in (2, 3, 17, 33):
            base = sample((rows, width), dtype, width)
            tensors = [base.clone() for _ in range(rows * width)]
            for i, x in enumerate(tensors):
                x.view(-1)[i] = 77.0 if i % 2 else -77.0
                x.view(-1)[(i * 5 + 2) % x.numel()] = torch.nan
            found = ranges(backend, [t.to(backend.device) for t in tensors], 1)
            values = torch.stack(tensors).float()
            finite = values.isfinite()
            expected = (
                values.where(finite, torch.inf).amin(1),
                values.where(finite, -torch.inf).amax(1),
                (~finite).sum((1, 2)),
            )
            assert_all_same(found, expected, (rows, width))


def test_not_finite_values_propagate_from_every_place(backend: Backend) -> None:
    for dtype in DTYPES:
        for value in special_values(dtype):
            for n in (1, 5, 16, 33, 70):
                x = sample((n, n), dtype, n)
                x.view(INTEGERS[dtype]).fill_diagonal_(int(value.view(INTEGERS[dtype])))
                low, high, count = ranges(backend, [x.to(backend.device)], 0, "propagate")
                assert_same(low[0], x.float().amin(1), (dtype, value, n))
                assert_same(high[0], x.float().amax(1), (dtype, value, n))
                assert int(count) == n

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.cases import DTYPES, assert_rejected, assert_same, not_dense_real_float, unchanged
from streams import SLOW_TO_SEARCH, streams

from pyobserver import HistogramObserver
from pyobserver.ranges import METHODS

from .agreement import (
    PER_TENSOR_CONFIGS,
    assert_qparams_agree,
    assert_range_agrees,
    feed,
    pair,
)

STREAMS = streams()


def agree(stream: str, of: torch.dtype, search: bool = True, **arguments: Any) -> None:
    """The same range and counts as torch.ao's after every batch, and the same scale."""
    ours, theirs = pair("HistogramObserver", **arguments)
    last = len(STREAMS[stream]) - 1
    for i, x in enumerate(STREAMS[stream]):
        feed(ours, theirs, x.to(of))
        assert_range_agrees(ours, theirs, (stream, i))
        assert_same(ours.histogram, theirs.histogram.double(), (stream, i))
        if search and (i == last or stream not in SLOW_TO_SEARCH):
            assert_qparams_agree(ours, theirs, (stream, i))


@pytest.mark.parametrize("stream", STREAMS)
def test_streams(stream: str) -> None:
    for dtype in DTYPES:
        agree(stream, dtype, search=dtype == torch.float32)
    if stream not in SLOW_TO_SEARCH:
        for bins in (2, 100):
            agree(stream, torch.float32, bins=bins)


@pytest.mark.parametrize("config", sorted(PER_TENSOR_CONFIGS.keys() - {"quint4x2"}))
def test_configs(config: str) -> None:
    arguments = PER_TENSOR_CONFIGS[config]
    for stream in ("drifting", "laplace"):
        agree(stream, torch.float32, bins=256, **arguments)


def test_quint4x2_is_searched_as_a_byte() -> None:
    """With the 256 levels of the byte that holds two of them, as torch.ao does."""
    ours, theirs = pair("HistogramObserver", dtype=torch.quint4x2)
    assert ours.dst_nbins == theirs.dst_nbins == 256
    for x in STREAMS["drifting"]:
        feed(ours, theirs, x)
        assert_qparams_agree(ours, theirs)


def test_many_batches() -> None:
    """The rounding of the counts to float32 is torch.ao's too, growth after growth."""
    ours, theirs = pair("HistogramObserver", bins=512)
    for i in range(30):
        feed(ours, theirs, (1 + 0.1 * i) * torch.randn(500) + 0.05 * i)
        assert_range_agrees(ours, theirs, i)
        assert_same(ours.histogram, theirs.histogram.double(), i)
        assert_qparams_agree(ours, theirs, i)


def test_counts_pass_2_to_the_24() -> None:
    """D7: torch.ao stops counting there."""
    ours = HistogramObserver(bins=4)
    ours(torch.tensor([0.0, 1.0]))
    ours.histogram[0] = 2.0**24
    ours(torch.zeros(3))
    assert ours.histogram.tolist() == [2.0**24 + 3, 0, 0, 1]


def test_state() -> None:
    ours = HistogramObserver(bins=100, upsample_rate=8)
    assert (ours.histogram.dtype, ours.histogram.shape) == (torch.float64, (100,))
    assert ours.min_val.shape == ours.max_val.shape == ()
    assert (ours.bins, ours.upsample_rate, ours.combine) == (100, 8, "midpoint")
    assert HistogramObserver().upsample_rate == 16
    assert HistogramObserver(combine="aligned").upsample_rate == 128


def test_aligned() -> None:
    """The older combining: the maximum is relaxed to the grid, and no count is lost."""
    ours = HistogramObserver(bins=64, combine="aligned")
    for x in STREAMS["growing"]:
        ours(x)
    whole = torch.cat([x.reshape(-1) for x in STREAMS["growing"]])
    assert ours.min_val == whole.min()
    width = float(ours.max_val - ours.min_val)
    assert whole.max() <= ours.max_val < whole.max() + width / 64
    assert float(ours.histogram.sum()) == pytest.approx(whole.numel(), rel=1e-6)
    scale, _ = ours.calculate_qparams()
    assert 0 < float(scale) <= width / 255 * 1.01


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_data_near_the_ends_of_float32(scale: float) -> None:
    """torch.ao's range collapses there, after a second."""
    ours, usual = HistogramObserver(eps=1e-38), HistogramObserver(eps=1e-38)
    x = torch.randn(2000, dtype=torch.float64)
    ours((x * scale).float())
    usual(x.float())
    torch.testing.assert_close(
        ours.calculate_qparams()[0], usual.calculate_qparams()[0] * scale, rtol=0.02, atol=0
    )


def test_width_above_float32() -> None:
    """D12: torch.ao's histogram stays empty, and its scale is not a number."""
    ours = HistogramObserver(bins=64)
    ours(torch.linspace(-1, 1, 500) * 3.4e38)
    assert ours.histogram.sum() == 500
    scale, zero_point = ours.calculate_qparams()
    assert scale.isfinite().all()
    assert 1e36 < float(scale) < 3e36
    assert abs(int(zero_point) - 128) < 20


def test_unfed_and_reset() -> None:
    ours = HistogramObserver(bins=16)
    ours(torch.empty(0))
    with pytest.warns(UserWarning, match="HistogramObserver was never fed"):
        scale, zero_point = ours.calculate_qparams()
    assert (scale.tolist(), zero_point.tolist()) == ([1.0], [0])
    ours(torch.tensor([1.0, torch.nan, 2.0]))
    ours.reset_min_max_vals()
    assert (ours.min_val, ours.max_val) == (torch.inf, -torch.inf)
    assert ours.histogram.sum() == 0
    assert ours.nonfinite_count == 0


def test_calculate_qparams_changes_nothing() -> None:
    ours = HistogramObserver()
    ours(torch.randn(1000))
    with unchanged(ours.histogram, ours.min_val, ours.max_val):
        first = ours.calculate_qparams()
    assert_same(first[0], ours.calculate_qparams()[0])


@pytest.mark.parametrize("method", sorted(METHODS))
def test_methods(method: str) -> None:
    """The statistic is the same; of it the method is asked, with the levels of the grid."""
    usual = HistogramObserver(bins=64)
    options = {"stride": 3, "bins": 64, "start_bin": 8} if method == "kl" else {}
    for qscheme in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        ours = HistogramObserver(
            64, torch.int8, qscheme, quant_min=-8, quant_max=7, method=method, method_kwargs=options
        )
        for x in STREAMS["growing"]:
            for observer in (ours, usual):
                observer(x)
        assert_same(ours.histogram, usual.histogram)
        scale, zero_point = ours.calculate_qparams()
        levels = {"levels": 256} if method == "l2_greedy" else {}  # torch's search
        found = usual.solve(
            method,
            quant_min=-8,
            quant_max=7,
            symmetric=qscheme == torch.per_tensor_symmetric,
            **options,
            **levels,
        )
        assert_same(scale, found.scale.view(1))
        assert_same(zero_point.long(), found.zero_point.view(1))
        usual.reset_min_max_vals()


def test_rejects_inputs() -> None:
    ours = HistogramObserver(bins=16)
    ours(torch.randn(3, 4))
    state = (ours.histogram, ours.min_val, ours.max_val, ours.nonfinite_count)
    for x, came in not_dense_real_float().values():
        with unchanged(*state):
            assert_rejected(ours, {"x": x}, TypeError, f"x: expected a dense tensor .*, {came}")


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"bins": 1}, ValueError, "bins: expected an integer of at least 2, got 1"),
        ({"method": "best"}, ValueError, "method: expected one of .* got 'best'"),
        ({"method_kwargs": {"p": 2}}, TypeError, "p: expected one of the options .* got 2"),
        ({"scale_constraint": "fp8"}, ValueError, "scale_constraint: expected .* got 'fp8'"),
        ({"combine": "sum"}, ValueError, "combine: expected one of .* got 'sum'"),
        ({"upsample_rate": 0}, ValueError, "upsample_rate: expected .* got 0"),
        ({"upsample_rate": 70000}, ValueError, "upsample_rate: expected .* got 70000"),
        ({"is_dynamic": True}, NotImplementedError, "is_dynamic: expected False"),
        ({"qscheme": torch.per_channel_affine}, NotImplementedError, "qscheme: expected"),
        ({"dtype": torch.float8_e4m3fn}, ValueError, "dtype: expected .* got torch.float8_e4m3fn"),
        ({"nonfinite": "drop"}, ValueError, "nonfinite: expected one of .* got 'drop'"),
        ({"quant_min": 0, "quant_max": 256}, ValueError, r"inside .* got \[0, 256\]"),
    ],
)
def test_rejects_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    assert_rejected(HistogramObserver, arguments, error, match)

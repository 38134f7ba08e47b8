"""A calibration that is solved again, and methods compared, without the data."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pyobserver
from pyobserver import ranges
from pyobserver.workflow import CalibrationResult, calibrate
from pyobserver.workflow import kept as kept_module

# few bits and no search: quick also on the reference kernels
LOG = pyobserver.PercentileObserver.with_args(mantissa_bits=3, dtype=torch.uint8)
SEARCHED = pyobserver.LogHistogramObserver.with_args(mantissa_bits=3, dtype=torch.uint8)
CHANNEL = pyobserver.PerChannelLogHistogramObserver.with_args(
    mantissa_bits=2, dtype=torch.int8, qscheme=torch.per_channel_symmetric, method="minmax"
)
OPTIONS: dict[str, dict[str, Any]] = {
    "percentile": {"percentile": 0.99},
    "lp": {"p": 3.0},
    "kl": {"bins": 512, "start_bin": 64},
    "l2_greedy": {"bins": 256, "levels": 16},
}


def small_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv1d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).eval()


def batches_of(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    batches = [torch.randn(16, 3, 8, generator=generator) for _ in range(count)]
    batches[0][0, 0, 0] = 40.0
    return batches


def quiet(activation: Any = LOG, weight: Any = CHANNEL, **kwargs: Any) -> CalibrationResult:
    model, batches = kwargs.pop("model", small_net()), kwargs.pop("batches", batches_of())
    return calibrate(model, batches, activation=activation, weight=weight, progress=False, **kwargs)


def assert_same(left: CalibrationResult, right: CalibrationResult) -> None:
    """Every field of every site, to the bit."""
    assert list(left) == list(right)
    assert (left.batches, left.never_called) == (right.batches, right.never_called)
    for name in left:
        for field, value in vars(left[name]).items():
            other = getattr(right[name], field)
            if isinstance(value, Tensor):
                assert value.dtype == other.dtype, (name, field)
                assert torch.equal(value, other), (name, field)
            elif isinstance(value, float) and math.isnan(value):
                assert math.isnan(other), (name, field)
            else:
                assert value == other, (name, field)


def direct_sqnr(x: Tensor, site: Any) -> float:
    y = pyobserver.ops.fake_quantize(
        x, site.scale, site.zero_point, site.quant_min, site.quant_max, site.ch_axis
    )
    return float(10 * torch.log10(x.double().square().sum() / (x - y).double().square().sum()))


# what calibrate predicts


@pytest.mark.parametrize("linear", [False, True], ids=["log", "linear"])
def test_predicted_sqnr_is_near_that_of_all_the_data(linear: bool) -> None:
    activation = pyobserver.HistogramObserver.with_args(dtype=torch.uint8) if linear else LOG
    batches = batches_of(20)
    site = quiet(activation, batches=batches)["0.input"]
    # the sample misses the outlier, the histogram does not
    assert site.predicted_sqnr == pytest.approx(direct_sqnr(torch.cat(batches), site), abs=0.1)


def test_predicted_sqnr_of_channels_is_that_of_all_their_values() -> None:
    torch.manual_seed(1)
    model = nn.Linear(1000, 3)
    with torch.no_grad():
        model.weight[0] *= 1e-3
        model.weight[1, 10:] = 0
    site = quiet(None, CHANNEL.with_args(quant_min=-8, quant_max=7), batches=None, model=model)
    exact = direct_sqnr(model.weight.detach(), site["weight"])
    assert site["weight"].sqnr == pytest.approx(exact, abs=1e-9)
    assert site["weight"].predicted_sqnr == pytest.approx(exact, abs=0.3)


def test_predicted_sqnr_is_of_the_scale_chosen() -> None:
    result = quiet()
    for name, site in result.items():
        histogram = result.histogram(name)
        error = ranges.expected_error(
            histogram, site.scale, site.zero_point, site.quant_min, site.quant_max
        )
        counts = histogram.counts.sum(-1).reshape(-1, 1)
        clipping, rounding, signal = (error.reshape(-1, 3) * counts).sum(0)
        expected = 10 * math.log10(signal / (clipping + rounding))
        assert site.predicted_sqnr == pytest.approx(expected, abs=1e-9)


def test_channels_weigh_by_their_finite_values() -> None:
    x = torch.randn(2, 400, generator=torch.Generator().manual_seed(2))
    x[0] *= 3
    x[0, 20:] = math.nan
    activation = CHANNEL.with_args(quant_min=-8, quant_max=7, method="percentile", mantissa_bits=6)
    model = nn.Sequential(nn.Identity())
    with pytest.warns(UserWarning, match="NaN or infinite"):
        site = quiet(activation, None, model=model, batches=[x], modules="0")["0.input"]
    finite = [(row[row.isfinite()], scale) for row, scale in zip(x, site.scale, strict=True)]
    signal = sum(row.double().square().sum() for row, _ in finite)
    noise = sum(
        (row - pyobserver.ops.fake_quantize(row, scale, torch.tensor(0), -8, 7)).square().sum()
        for row, scale in finite
    )
    assert site.predicted_sqnr == pytest.approx(float(10 * torch.log10(signal / noise)), abs=0.4)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many histograms were in each call."""
    sizes: list[int] = []
    choose = ranges.choose

    def counting(histogram: ranges.Histogram, *args: Any) -> Any:
        sizes.append(histogram.min_val.numel())
        return choose(histogram, *args)

    monkeypatch.setattr(ranges, "choose", counting)
    return sizes


def test_histograms_that_ask_the_same_are_asked_in_one_call(asked: list[int]) -> None:
    result = quiet()
    assert sorted(asked) == [4, 5]  # inputs and outputs; the channels of two weights
    asked.clear()
    result.compare(("minmax", "percentile"), (4, 8))
    assert sorted(asked) == [4] * 4 + [5] * 4
    asked.clear()
    result.solve("minmax", 4, sites="*put")
    assert asked == [4]


def test_sites_without_a_histogram_predict_nothing() -> None:
    result = quiet(pyobserver.MinMaxObserver)
    assert math.isnan(result["0.input"].predicted_sqnr)
    assert result["0.input"].method is None
    assert math.isfinite(result["0.weight"].predicted_sqnr)
    assert result["0.weight"].method == "minmax"
    row = next(line for line in str(result).splitlines() if line.startswith("0.input"))
    assert row.split()[2] == "-"
    assert row.split()[-2] == "-"
    with pytest.raises(ValueError, match=r"name: expected a site .* '0\.input' of a MinMaxObs"):
        result.histogram("0.input")
    with pytest.raises(KeyError):
        result.histogram("nowhere")


@pytest.mark.parametrize("fill", [0.0, math.nan], ids=["zeros", "nothing finite"])
def test_site_of_no_signal(fill: float, recwarn: pytest.WarningsRecorder) -> None:
    batch = torch.full((4, 3), fill)
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 2))
    result = quiet(model=model, batches=[batch], modules=[nn.Identity, nn.Linear])
    assert result["0.input"].predicted_sqnr == math.inf
    assert result["0.input"].sqnr == math.inf
    comparison = result.compare(bits=4, sites=["0.input", "1.weight"])
    assert comparison.left_out == ()
    for method in ranges.METHODS:
        assert comparison[method, 4]["0.input"] == (math.inf, math.inf)
        of_weight = comparison[method, 4]["1.weight"]  # all the noise of two sites
        expected = [value + 10 * math.log10(2) for value in of_weight]
        assert comparison.mean(method, 4) == pytest.approx(expected, abs=1e-9)
    assert "inf / inf" in str(result.compare("mse", 4, "0.input"))


def test_scale_that_is_not_finite_is_nan() -> None:
    batches = batches_of()
    batches[0][0, 0, 1] = math.nan
    propagating = pyobserver.HistogramObserver.with_args(
        dtype=torch.uint8, nonfinite="propagate", method="minmax"
    )
    with pytest.warns(UserWarning, match="NaN or infinite"):
        result = quiet(propagating, batches=batches, modules="0")
    assert math.isnan(result["0.input"].predicted_sqnr)
    comparison = result.compare("minmax", 8)
    assert set(comparison.left_out) <= {"0.input", "0.output"}
    assert "0.input" in comparison.left_out
    assert "left out, without a usable scale: 0.input" in str(comparison)
    only = result.compare("minmax", 8, "0.input")
    assert all(map(math.isnan, only.mean("minmax", 8)))
    assert "nan / nan" in str(only)
    assert math.isnan(comparison["minmax", 8]["0.input"].predicted)
    assert math.isfinite(comparison.mean("minmax", 8).predicted)


def test_portions_of_memory_change_nothing(
    asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quiet()
    solved = whole.solve("percentile", 4)
    monkeypatch.setattr(kept_module, "_BYTES_AT_ONCE", 1)
    # the name in the package is that of the function
    calibrate_module = importlib.import_module("pyobserver.workflow.calibrate")
    monkeypatch.setattr(calibrate_module, "_BYTES_PENDING", 1)
    asked.clear()
    assert_same(quiet(), whole)
    assert asked == [2, 3, 4]  # each weight by itself, then the inputs and outputs
    asked.clear()
    assert_same(whole.solve("percentile", 4), solved)
    assert sorted(asked) == [1, 1, 1, 1, 2, 3]


# solve


@pytest.mark.parametrize(
    ("method", "bits"), [*((method, 4) for method in ranges.METHODS), ("percentile", 8)]
)
def test_solve_is_calibrating_again(method: str, bits: int) -> None:
    half, options = 2 ** (bits - 1), OPTIONS.get(method, {})
    chosen = {"method": method, "method_kwargs": options}
    of_weight = {"quant_min": -half, "quant_max": half - 1}
    of_activation = {"quant_min": 0, "quant_max": 2 * half - 1}
    data = {"model": nn.Linear(6, 2), "batches": [x.reshape(-1, 6) for x in batches_of()]}
    linear = pyobserver.HistogramObserver.with_args(dtype=torch.uint8, bins=256)
    for activation in (SEARCHED, linear):
        again = quiet(
            activation.with_args(**chosen, **of_activation),
            CHANNEL.with_args(**chosen, **of_weight),
            **data,
        )
        first = quiet(activation.with_args(method="minmax"), **data)
        assert_same(first.solve(method, bits, **options), again)


@pytest.mark.parametrize(
    ("grid", "observer"),
    [
        ({"quant_min": 0, "quant_max": 100}, {"quant_min": 0, "quant_max": 100}),
        ({"bits": 8, "symmetric": True}, {"qscheme": torch.per_tensor_symmetric}),
        (
            {"scale_constraint": "power_of_two", "eps": 2.0},
            {"scale_constraint": "power_of_two", "eps": 2.0},
        ),
        ({"quant_min": -8, "quant_max": 7}, {"dtype": torch.int8, "quant_min": -8, "quant_max": 7}),
        ({"bits": 16}, {"dtype": torch.uint16}),
        (
            {"quant_min": -8, "quant_max": 7, "symmetric": True, "narrow_range": True},
            {
                "dtype": torch.int8,
                "qscheme": torch.per_tensor_symmetric,
                "quant_min": -7,
                "quant_max": 7,
            },
        ),
    ],
    ids=["bounds", "symmetric", "constraint", "signed", "sixteen", "narrow"],
)
def test_grid_of_solve(grid: dict[str, Any], observer: dict[str, Any]) -> None:
    again = quiet(LOG.with_args(**observer), weight=None)
    assert_same(quiet(LOG, weight=None).solve(**grid), again)


def test_solve_of_nothing_is_the_same() -> None:
    greedy = pyobserver.HistogramObserver.with_args(
        dtype=torch.uint8, quant_min=0, quant_max=3, scale_constraint="fp16"
    )
    unsigned = LOG.with_args(
        qscheme=torch.per_tensor_symmetric, quant_min=0, quant_max=15, percentile=0.9, eps=2.0
    )
    for activation in (greedy, unsigned, pyobserver.KLObserver.with_args(bins=512)):
        result = quiet(activation)
        assert_same(result.solve(), result)


def test_solve_keeps_what_is_left_out() -> None:
    percentile = pyobserver.PercentileObserver.with_args(percentile=0.9, dtype=torch.uint8)
    result = quiet(percentile)
    four = result.solve(bits=4)
    assert four["0.input"].method == "percentile"
    assert four["0.weight"].method == "minmax"
    assert_same(four, quiet(
        percentile.with_args(quant_min=0, quant_max=15),
        CHANNEL.with_args(quant_min=-8, quant_max=7),
    ))  # fmt: skip
    assert_same(four.solve(bits=8), result)
    assert_same(four.solve("minmax").solve("l2_greedy", 8), result.solve("l2_greedy", 8))
    wider = result.solve(percentile=0.999, sites="*put")["0.input"]
    assert wider.scale > result["0.input"].scale


def test_solve_of_some_sites() -> None:
    result = quiet()
    some = result.solve("minmax", 4, sites=["0.*", "3.out*"])
    whole = result.solve("minmax", 4)
    for name in result:
        expected = whole if name.startswith("0.") or name == "3.output" else result
        assert torch.equal(some[name].scale, expected[name].scale)
        assert some[name].quant_max == expected[name].quant_max
        assert some[name].method == expected[name].method
    # and those that were left are solved from there
    assert_same(some.solve("minmax", 4), whole)


def test_sites_that_differ_in_one_thing_stay_apart() -> None:
    result = quiet(weight=None).solve(bits=4)
    mixed = result.solve(percentile=0.7, sites="0.input").solve(eps=3.0, sites="3.input")
    assert_same(mixed.solve(), mixed)
    for changed in ("0.input", "3.input"):
        assert not torch.equal(mixed[changed].scale, result[changed].scale)


def test_sites_without_a_histogram_stay() -> None:
    result = quiet(weight=pyobserver.PerChannelMinMaxObserver)
    with pytest.warns(UserWarning, match=r"stay as they are.*: 0\.weight \(PerChannelMinMax.*3\."):
        solved = result.solve("minmax", 4)
    assert solved["0.weight"] is result["0.weight"]
    assert solved["0.input"].quant_max == 15
    result.solve("minmax", 4, sites="*put")  # no warning
    assert list(result.compare("minmax").sites) == ["0.input", "0.output", "3.input", "3.output"]
    with pytest.raises(ValueError, match=r"solve: sites: .* keeps a histogram, got PerChannelMin"):
        result.solve("minmax", 4, sites="*weight")
    with pytest.raises(ValueError, match=r"compare: sites: .* keeps a histogram, got PerChannel"):
        result.compare(sites="*weight")


def test_solved_result_applies() -> None:
    model, batches = small_net(), batches_of()
    four = quiet().solve(bits=4)
    assert quiet()["3.output"].quant_max == 255  # the result it is from stays
    applied = four.apply(model)(batches[0])
    again = quiet(
        LOG.with_args(quant_min=0, quant_max=15), CHANNEL.with_args(quant_min=-8, quant_max=7)
    )
    assert torch.equal(applied, again.apply(model)(batches[0]))


def test_partial_result_can_be_solved() -> None:
    def data() -> Any:
        yield from batches_of(2)
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone") as caught:
        quiet(batches=data())
    expected = quiet(batches=batches_of(2)).solve("minmax", 4)
    assert_same(caught.value.calibration.solve("minmax", 4), expected)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "l3"}, ValueError, "solve: .*method.*minmax.*'l3'"),
        ({"method": ""}, ValueError, "solve: .*method.*minmax.*''"),
        ({"bits": 1}, ValueError, r"bits: expected an integer in \[2, 16\], got 1"),
        ({"bits": 17}, ValueError, "bits: expected .* got 17"),
        ({"bits": 4.0}, ValueError, "bits: expected .* got 4.0"),
        ({"quant_min": 0}, ValueError, "quant_min, quant_max: expected both or neither"),
        ({"quant_min": 3, "quant_max": 2}, ValueError, "quant_min"),
        ({"quant_min": 0, "quant_max": 2**40}, ValueError, "quant_m"),
        ({"scale_constraint": "odd"}, ValueError, "scale_constraint: .*'odd'"),
        ({"eps": 0.0}, ValueError, "eps: expected a positive"),
        ({"method": "mse", "p": 2.0}, TypeError, "p: expected one of the options of method 'mse'"),
        ({"bins": 20}, TypeError, "bins: expected one of the options of method 'percentile'"),
        ({"method": "lp", "p": 0.0}, ValueError, "p: expected a number"),
        (
            {"sites": "5.*"},
            ValueError,
            r"solve: sites: .* got '5\.\*'; the sites are 0\.in",
        ),
    ],
)
def test_bad_arguments_of_solve(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    result = quiet(weight=None)
    with pytest.raises(error, match=message):
        result.solve(**arguments)


# compare


def test_compare_is_solving_each() -> None:
    result = quiet()
    methods = {"minmax": {}, "percentile": OPTIONS["percentile"], "l2_greedy": {}}
    comparison = result.compare(methods, (3, 8))
    assert comparison.methods == tuple(methods)
    assert comparison.bits == (3, 8)
    assert comparison.sites == tuple(result)
    assert comparison.left_out == ()
    assert len(comparison) == 6
    for (method, bits), cell in comparison.items():
        solved = result.solve(method, bits, **methods[method])
        for name, site in solved.items():
            assert cell[name] == (site.predicted_sqnr, site.sqnr)
        for field, mean in zip(
            ("predicted_sqnr", "sqnr"), comparison.mean(method, bits), strict=True
        ):
            shares = [10 ** (-getattr(site, field) / 10) for site in solved.values()]
            assert 10 ** (-mean / 10) == pytest.approx(sum(shares) / len(shares), rel=1e-9)


def test_compare_measures_weights_exactly() -> None:
    model = small_net()
    result = quiet(model=model)
    w = model[3].weight.detach()
    found = result.compare("minmax", 4)["minmax", 4]["3.weight"].measured
    scale = (w.abs().amax(1) / 7.5).float()
    y = torch.fake_quantize_per_channel_affine(
        w, scale, torch.zeros(3, dtype=torch.int32), 0, -8, 7
    )
    exact = 10 * torch.log10(w.double().square().sum() / (w - y).double().square().sum())
    assert found == pytest.approx(float(exact), abs=1e-6)


def test_weight_that_is_changed_is_measured_on_its_sample() -> None:
    model = small_net()
    result = quiet(model=model)
    before = result.compare("minmax", 8, "3.weight")["minmax", 8]["3.weight"]
    with torch.no_grad():
        model[3].weight.mul_(100)
    after = result.compare("minmax", 8, "3.weight")["minmax", 8]["3.weight"]
    assert after.predicted == before.predicted
    assert after.measured == pytest.approx(before.measured, abs=1.0)
    assert after.measured != before.measured


def test_least_squares_is_best_as_predicted() -> None:
    comparison = quiet(weight=None).compare(bits=3, sites="0.*")
    for bits in (3,):
        for name in comparison.sites:
            best = comparison["mse", bits][name].predicted
            for method in ranges.METHODS:
                assert comparison[method, bits][name].predicted <= best + 0.02


def test_table_of_comparison() -> None:
    comparison = quiet().compare(("minmax", "percentile"), (4, 8))
    header, rule, *rows, footer = str(comparison).splitlines()
    assert header.split() == ["method", "4", "bits", "8", "bits"]
    assert set(rule) == {"-"}
    assert len({len(line) for line in (header, rule, *rows)}) == 1
    for row, method in zip(rows, ("minmax", "percentile"), strict=True):
        name, *cells = row.split()
        assert name == method
        means = [comparison.mean(method, bits) for bits in (4, 8)]
        assert " ".join(cells) == "  ".join(
            f"{mean.predicted:.1f} / {mean.measured:.1f}" for mean in means
        ).replace("  ", " ")
    assert footer == "SQNR in dB, predicted / measured, mean noise of 6 sites"
    assert repr(comparison) == "<Comparison of 2 methods at 4, 8 bits, 6 sites>"
    one = str(quiet().compare("minmax", sites="0.input")).splitlines()
    assert one[-1] == "SQNR in dB, predicted / measured, 0.input"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"methods": "l3"}, "compare: .*method.*'l3'"),
        ({"methods": ("mse", "l3")}, "compare: .*method.*'l3'"),
        ({"methods": ()}, "compare: methods: expected at least one, got none"),
        ({"bits": ()}, "compare: bits: expected at least one, got none"),
        ({"bits": (4, 1)}, r"bits: expected an integer in \[2, 16\], got 1"),
        ({"methods": {"percentile": {"percentile": 2.0}}}, "percentile: expected a number"),
        ({"sites": ["0.*", "zzz"]}, "compare: sites: expected .* got 'zzz'"),
    ],
)
def test_bad_arguments_of_compare(arguments: dict[str, Any], message: str) -> None:
    result = quiet(weight=None)
    with pytest.raises(ValueError, match=message):
        result.compare(**arguments)


# the file


def test_saved_calibration_can_be_solved(tmp_path: Path) -> None:
    result = quiet()
    path = tmp_path / "calibration.pt"
    result.save(path)
    assert torch.load(path, weights_only=True)["version"] == 2
    loaded = CalibrationResult.load(path)
    assert_same(loaded, result)
    for name in result:
        ours, theirs = result.histogram(name), loaded.histogram(name)
        assert ours.spacing == theirs.spacing
        assert all(torch.equal(a, b) for a, b in zip(ours[:3], theirs[:3], strict=True))
    solved, again = result.solve("l2_greedy", 4), loaded.solve("l2_greedy", 4)
    for name, site in solved.items():
        assert torch.equal(site.scale, again[name].scale)
        assert torch.equal(site.zero_point, again[name].zero_point)
        assert site.predicted_sqnr == again[name].predicted_sqnr
        # of a weight the file has a sample
        margin = 1.5 if site.kind == "weight" else 0.0
        assert again[name].sqnr == pytest.approx(site.sqnr, abs=margin)
    assert str(loaded.compare("minmax", sites="*put")) == str(
        result.compare("minmax", sites="*put")
    )


def test_solved_calibration_can_be_saved(tmp_path: Path) -> None:
    solved = quiet().solve("percentile", 4, percentile=0.99, scale_constraint="fp16")
    solved.save(tmp_path / "four.pt")
    loaded = CalibrationResult.load(tmp_path / "four.pt")
    assert_same(loaded, solved)
    assert_same(loaded.solve(sites="*put"), solved)


def test_file_holds_only_the_bins_that_are_occupied(tmp_path: Path) -> None:
    fine = CHANNEL.with_args(mantissa_bits=8)
    result = quiet(activation=None, weight=fine)
    result.save(tmp_path / "calibration.pt")
    dense = sum(8 * result.histogram(name).counts.numel() for name in result)
    assert (tmp_path / "calibration.pt").stat().st_size < dense / 20


def test_file_of_version_1(tmp_path: Path) -> None:
    result = quiet()
    result.save(tmp_path / "new.pt")
    saved = torch.load(tmp_path / "new.pt", weights_only=True)
    saved["version"] = 1
    del saved["kept"]
    for site in saved["sites"]:
        del site["predicted_sqnr"], site["method"]
    torch.save(saved, tmp_path / "old.pt")
    old = CalibrationResult.load(tmp_path / "old.pt")
    assert list(old) == list(result)
    assert math.isnan(old["0.input"].predicted_sqnr)
    assert old["0.input"].method is None
    assert torch.equal(old["0.weight"].scale, result["0.weight"].scale)
    with pytest.raises(ValueError, match="keeps a histogram, got PerChannelLog"):
        old.solve("mse", 4)

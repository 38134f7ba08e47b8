from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.cases import (
    DTYPES,
    LAYOUTS,
    assert_all_same,
    assert_rejected,
    assert_same,
    in_blocks,
    laid_out,
    not_dense_real_float,
    properties,
    unchanged,
)
from torch import Tensor, nn

import pyobserver as po
from pyobserver import ranges
from pyobserver.observers import calculate_qparams
from pyobserver.ops import log_columns

BITS = 3
CHANNELS = {"ch_axis": 1}
BLOCKS = {"block_size": (2, 5, 3)}
USUAL = {"mantissa_bits": BITS, "method": "percentile"}  # one that the reference is fast at
MAKERS: dict[str, Callable[..., Any]] = {
    "Log": lambda **kwargs: po.LogHistogramObserver(**{**USUAL, **kwargs}),
    "PerChannel": lambda **kwargs: po.PerChannelLogHistogramObserver(
        **{**USUAL, **CHANNELS, **kwargs}
    ),
    "PerBlock": lambda **kwargs: po.PerBlockLogHistogramObserver(**{**USUAL, **BLOCKS, **kwargs}),
    "MSE": lambda **kwargs: po.MSEObserver(**{"mantissa_bits": BITS, **kwargs}),
    "Percentile": lambda **kwargs: po.PercentileObserver(
        **{"percentile": 0.9, "mantissa_bits": BITS, **kwargs}
    ),
    "KL": lambda **kwargs: po.KLObserver(
        **{"bins": 256, "start_bin": 32, "mantissa_bits": BITS, **kwargs}
    ),
}
GROUPS = {"PerChannel": (5,), "PerBlock": (2, 1, 2)}
SHAPE = (4, 5, 6)  # of the tensors
BAD = torch.tensor([[1.0, torch.nan, -2.0], [torch.inf, 0.5, -torch.inf]])


def batch(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * 10.0 ** (seed % 3 - 1)


def make(name: str, fed: bool = False, **kwargs: Any) -> Any:
    observer = MAKERS[name](**kwargs)
    if fed:
        for seed in range(3):
            observer(batch(seed))
    return observer


def state(observer: nn.Module) -> list[Tensor]:
    return [observer.counts, observer.min_val, observer.max_val]


def qparams(observer: Any) -> tuple[Tensor, Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return observer.calculate_qparams()


# ---- the statistic ----


@pytest.mark.parametrize("name", MAKERS)
def test_state(name: str) -> None:
    observer = make(name, fed=True)
    groups = GROUPS.get(name, ())
    assert set(observer._buffers) == {"eps", "counts", "min_val", "max_val"}
    assert (observer.counts.dtype, observer.counts.shape) == (
        torch.int64,
        (*groups, log_columns(BITS)),
    )
    assert observer.min_val.dtype == observer.max_val.dtype == torch.float32
    assert observer.min_val.shape == observer.max_val.shape == groups
    assert observer.mantissa_bits == BITS
    assert observer.counts.sum() == 3 * batch().numel()
    assert observer.min_val.min() == min(batch(seed).min() for seed in range(3))
    assert float(observer.eps) == torch.finfo(torch.float32).tiny
    # torch's flows probe for it
    assert hasattr(observer, "ch_axis") == (name == "PerChannel")


def test_defaults() -> None:
    assert po.LogHistogramObserver().mantissa_bits == 5
    chosen = {
        "LogHistogramObserver": ("mse", {}),
        "MSEObserver": ("mse", {}),
        "PercentileObserver": ("percentile", {"percentile": 0.9999}),
        "KLObserver": ("kl", {"bins": 2048, "start_bin": 128, "stride": 1}),
        "PerChannelLogHistogramObserver": ("mse", {}),
        "HistogramObserver": ("l2_greedy", {}),
    }
    for name, expected in chosen.items():
        observer = getattr(po, name)()
        assert (observer.method, observer.method_kwargs) == expected


@pytest.mark.parametrize("name", ["Log", "PerChannel", "PerBlock"])
def test_forward_returns_its_input(name: str) -> None:
    x = batch().requires_grad_()
    assert make(name)(x) is x


parts = st.lists(st.integers(0, 1000), max_size=4)


@properties
@given(
    cuts=parts,
    order=st.permutations(range(5)),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5),
    values=st.lists(
        st.floats(width=16, allow_nan=True, allow_infinity=True), min_size=1, max_size=40
    ),
    merged=st.booleans(),
)
def test_order_changes_nothing(
    cuts: list[int],
    order: list[int],
    dtypes: list[torch.dtype],
    values: list[float],
    merged: bool,
) -> None:
    """Any split of the same values, in any order and of any types that hold them."""
    whole = torch.tensor(values).bfloat16().half().float()  # both hold them
    whole = torch.where(whole.bfloat16() == whole, whole, 0.0)
    expected = po.LogHistogramObserver(BITS)
    expected(whole)
    ends = sorted(cut % (len(values) + 1) for cut in cuts)
    pieces = list(whole.tensor_split(ends))
    pieces = [pieces[i] for i in order if i < len(pieces)]
    observers = [po.LogHistogramObserver(BITS) for _ in range(3 if merged else 1)]
    for i, (piece, dtype) in enumerate(zip(pieces, dtypes, strict=False)):
        observers[i % len(observers)](piece.to(dtype))
    total = sum(observers[1:], observers[0])
    assert_all_same(state(total), state(expected))


@pytest.mark.parametrize("name", ["Log", "PerChannel", "PerBlock"])
def test_batches_in_any_order(name: str) -> None:
    batches = [batch(seed) for seed in range(4)]
    expected = make(name)
    for x in batches:
        expected(x)
    for order in ((3, 1, 0, 2), (2, 3, 1, 0)):
        observer = make(name)
        for i in order:
            observer(batches[i].double() if i == 1 else batches[i])
        assert_all_same(state(observer), state(expected))
    one, other = make(name), make(name)
    for i, x in enumerate(batches):
        (one, other)[i % 2](x)
    with unchanged(*state(one), *state(other)):
        assert_all_same(state(one + other), state(expected))
        assert_all_same(state(other + one), state(expected))
    one.merge(other)
    assert_all_same(state(one), state(expected))
    assert_all_same(qparams(one), qparams(expected))


@pytest.mark.parametrize("name", ["Log", "PerChannel", "PerBlock"])
def test_merge_with_one_that_was_never_fed(name: str) -> None:
    fed = make(name, fed=True)
    assert_all_same(state(fed + make(name)), state(fed))
    assert_all_same(state(make(name) + fed), state(fed))


@pytest.mark.parametrize("name", ["Log", "PerChannel", "PerBlock"])
def test_merge_of_other_statistics(name: str) -> None:
    others = [make(name, fed=True, mantissa_bits=BITS + 1), po.HistogramObserver(16)]
    if name == "PerChannel":
        others.append(make(name, ch_axis=0))
    if name == "PerBlock":
        others.append(make(name, fed=True, block_size=(1, 1, 1)))
    observer = make(name, fed=True)
    for other in others:
        with (
            unchanged(*state(observer), *other.buffers()),
            pytest.raises(ValueError, match="statistics of different observers: expected"),
        ):
            observer.merge(other)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_per_channel_is_per_tensor_of_each_channel(axis: int) -> None:
    for options in ({"method": "mse"} if axis == -2 else {}, {"nonfinite": "propagate"}):
        observer = make("PerChannel", fed=True, ch_axis=axis, **options)
        x = batch(3)
        x[1, 2, 3] = torch.nan
        observer(x)
        scale, zero_point = qparams(observer)
        for i in range(SHAPE[axis]):
            alone = make("Log", **options)
            for seed in range(3):
                alone(batch(seed).select(axis, i))
            alone(x.select(axis, i))
            assert_all_same([t[i] for t in state(observer)], state(alone))
            assert_all_same([scale[i : i + 1], zero_point[i : i + 1]], qparams(alone))


@pytest.mark.parametrize("block_size", [(2, 5, 3), (1, 1, 1), (4, 5, 6), (1, 5, 2)], ids=str)
def test_per_block_is_per_tensor_of_each_block(block_size: tuple[int, ...]) -> None:
    options = {"method": "mse" if block_size == (2, 5, 3) else "percentile"}
    observer = make("PerBlock", fed=True, block_size=block_size, **options)
    grid = tuple(whole // size for whole, size in zip(SHAPE, block_size, strict=True))
    scale, zero_point = qparams(observer)
    assert scale.shape == zero_point.shape == grid
    rows = torch.stack([in_blocks(batch(seed), block_size) for seed in range(3)], 1)
    for i, row in enumerate(rows):
        alone = make("Log", **options)
        alone(row)
        at = np.unravel_index(i, grid)
        assert_all_same([t[at] for t in state(observer)], state(alone))
        own = [scale[at].view(1), zero_point[at].view(1)]
        assert_all_same(own, qparams(alone))
    y = po.ops.fake_quantize(batch(), scale, zero_point.int(), 0, 255, block_size=block_size)
    assert float((y - batch()).abs().max()) <= float(scale.max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["Log", "PerChannel"])
def test_layouts(name: str, layout: str) -> None:
    for dtype in DTYPES:
        x = laid_out(layout, dtype)
        observer, expected = make(name), make(name)
        observer(x)
        expected(x.contiguous().float())
        assert_all_same(state(observer), state(expected), dtype)


def test_one_number() -> None:
    observer = make("Log")
    observer(torch.tensor(-1.5, dtype=torch.float64))
    assert (float(observer.min_val), float(observer.max_val)) == (-1.5, -1.5)
    assert observer.counts.sum() == 1
    # the sum of what rounds to -1.5 with 3 bits of mantissa
    assert observer.counts[1 + (255 << BITS) - (0x3FC00000 >> (23 - BITS))] == 1


@pytest.mark.parametrize("name", MAKERS)
def test_empty_tensors(name: str) -> None:
    observer = make(name)
    empty = torch.empty(0, 5, 6)
    with unchanged(*state(observer)):
        assert observer(empty) is empty
    fed, expected = make(name, fed=True), make(name, fed=True)
    fed(empty)
    assert_all_same(state(fed), state(expected))


# ---- what goes wrong ----


def test_other_numbers_of_channels() -> None:
    observer = make("PerChannel", fed=True)
    for x, match in (
        (torch.ones(4, 6, 6), r"expected shape \(6,\), one value for each channel of x"),
        (torch.ones(5), r"axis: expected a value in \[-1, 0\]"),
        (torch.ones(()), "axis: expected None for a 0-d tensor, got 1"),
    ):
        with unchanged(*state(observer)):
            assert_rejected(observer, {"x": x}, ValueError, match)


def test_other_shapes_of_blocks() -> None:
    observer = make("PerBlock", fed=True)
    for x in (torch.ones(4, 5, 9), torch.ones(4, 5, 7), torch.ones(4, 5), torch.ones(())):
        with unchanged(*state(observer)):
            assert_rejected(observer, {"x": x}, ValueError, "block_size|min_val: expected shape")


@pytest.mark.parametrize("name", ["PerChannel", "PerBlock"])
def test_a_first_tensor_that_is_refused_sizes_nothing(name: str) -> None:
    observer = make(name, nonfinite="raise")
    bad = batch()
    bad[1, 1, 1] = torch.nan
    refused: list[Any] = [torch.ones(7), torch.ones(()), bad]
    refused += [x for x, _ in not_dense_real_float().values()]
    for x in refused:
        with pytest.raises((ValueError, TypeError)):
            observer(x)
        assert observer.counts.shape == (0, log_columns(BITS))
        assert observer.min_val.shape == observer.max_val.shape == (0,)
    observer(batch())
    assert observer.counts.sum() == batch().numel()


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("fed", [False, True])
def test_rejects_inputs(name: str, fed: bool) -> None:
    observer = make(name, fed=fed)
    for x, came in not_dense_real_float().values():
        with unchanged(*state(observer)):
            assert_rejected(observer, {"x": x}, TypeError, f"x: expected a dense tensor .*, {came}")


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"mantissa_bits": 11}, ValueError, r"mantissa_bits: expected .* \[0, 10\], got 11"),
        ({"mantissa_bits": -1}, ValueError, "mantissa_bits: expected .*, got -1"),
        ({"mantissa_bits": 2.5}, ValueError, "mantissa_bits: expected .*, got 2.5"),
        ({"method": "best"}, ValueError, "method: expected one of .* got 'best'"),
        ({"method": "mse", "method_kwargs": {"p": 2}}, TypeError, "p: expected one of the options"),
        ({"scale_constraint": "x"}, ValueError, "scale_constraint: expected one of .* got 'x'"),
        ({"is_dynamic": True}, NotImplementedError, "is_dynamic: expected False"),
        ({"nonfinite": "drop"}, ValueError, "nonfinite: expected one of .* got 'drop'"),
        ({"dtype": torch.float8_e4m3fn}, ValueError, "dtype: expected .* got torch.float8_e4m3fn"),
        ({"quant_min": 0, "quant_max": 256}, ValueError, r"inside .* got \[0, 256\]"),
        ({"quant_min": 0}, ValueError, "expected both or neither"),
        ({"eps": 0.0}, ValueError, "eps: expected a positive finite float32, got 0.0"),
        ({"qscheme": torch.per_channel_affine_float_qparams}, NotImplementedError, "qscheme: exp"),
    ],
)
def test_rejects_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    for name in ("Log", "PerChannel", "PerBlock"):
        assert_rejected(make, {"name": name, **arguments}, error, match)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: po.LogHistogramObserver(qscheme=torch.per_channel_affine), "qscheme: expected"),
        (lambda: make("PerChannel", qscheme=torch.per_tensor_affine), "qscheme: expected"),
        (lambda: make("PerBlock", qscheme=torch.per_channel_affine), "qscheme: expected"),
        (lambda: make("PerChannel", num_channels=0), "num_channels: expected at least 1 .* got 0"),
        (lambda: po.PercentileObserver(1.5), r"PercentileObserver: percentile: .* got 1.5"),
        (lambda: po.KLObserver(stride=0), r"KLObserver: stride: .* got 0"),
    ],
)
def test_rejects_arguments_of_a_class(make: Callable[[], Any], match: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=match):
        make()


# ---- NaN and infinities ----


def feed_bad(name: str, **options: Any) -> Any:
    block = {"block_size": (1, 3)} if name == "PerBlock" else {}
    observer = make(name, **({"ch_axis": 0} if name == "PerChannel" else block), **options)
    observer(torch.tensor([[0.25, 3.0, -1.0], [4.0, -5.0, 0.5]]))
    return observer


@pytest.mark.parametrize("name", MAKERS)
def test_ignore(name: str) -> None:
    """The same range as without them; each kind in a column of its own."""
    observer, clean = feed_bad(name), feed_bad(name)
    observer(BAD)
    clean(torch.tensor([[1.0, 1.0, -2.0], [0.5, 0.5, 0.5]]))
    assert_all_same(state(observer)[1:], state(clean)[1:])
    rows = observer.counts.reshape(-1, log_columns(BITS))
    kinds = torch.tensor([[0, 0, 1], [1, 1, 0]])  # -inf, +inf and NaN of each row
    expected = kinds if len(rows) == 2 else kinds.sum(0, keepdim=True)
    assert rows[:, [0, -2, -1]].tolist() == expected.tolist()
    assert observer.counts.sum() == 12
    assert observer.nonfinite_count == 3
    assert "nonfinite_count" not in observer.state_dict()
    kind = type(observer).__name__
    with pytest.warns(UserWarning, match=f"{kind}: 3 NaN or infinite values were left out of") as w:
        scale, _ = observer.calculate_qparams()
    assert len(w) == 1
    assert w[0].filename == __file__
    assert scale.isfinite().all()
    finite = BAD[BAD.isfinite()]
    without = make("Log")
    without(torch.cat([finite, torch.tensor([0.25, 3.0, -1.0, 4.0, -5.0, 0.5])]))
    if name == "Log":
        assert_all_same(qparams(observer), qparams(without))


@pytest.mark.parametrize("name", MAKERS)
def test_propagate(name: str) -> None:
    observer = feed_bad(name, nonfinite="propagate")
    observer(BAD)
    assert not (observer.min_val.isfinite() & observer.max_val.isfinite()).any()
    with pytest.warns(UserWarning, match=r": 3 NaN or infinite values were let into"):
        observer.calculate_qparams()


@pytest.mark.parametrize("name", MAKERS)
def test_raise(name: str) -> None:
    observer = feed_bad(name, nonfinite="raise")
    with (
        unchanged(*state(observer)),
        pytest.raises(ValueError, match="expected finite values, got 3 NaN or infinite of 6"),
    ):
        observer(BAD)


@pytest.mark.parametrize("name", MAKERS)
def test_never_fed(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        observer = make(name)
        observer(torch.empty(0, 5, 6))
    with pytest.warns(UserWarning, match="was never fed") as seen:
        scale, zero_point = observer.calculate_qparams()
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert (scale.tolist(), zero_point.tolist()) == ([1.0], [0])
    nothing = make(name)
    nothing(torch.full(SHAPE, torch.nan))
    with pytest.warns(UserWarning, match="never fed|NaN") as seen:
        scale, zero_point = nothing.calculate_qparams()
    assert sorted("never fed" in str(w.message) for w in seen) == [False, True]
    assert (scale == 1).all()
    assert (zero_point == 0).all()


@pytest.mark.parametrize("name", MAKERS)
def test_reset(name: str) -> None:
    observer = make(name, fed=True)
    observer(torch.full(SHAPE, torch.nan))
    pointers = [t.data_ptr() for t in state(observer)]
    observer.reset_min_max_vals()
    assert [t.data_ptr() for t in state(observer)] == pointers
    assert observer.counts.sum() == observer.nonfinite_count == 0
    assert (observer.min_val == torch.inf).all()
    assert (observer.max_val == -torch.inf).all()
    with pytest.warns(UserWarning, match="never fed"):
        observer.calculate_qparams()
    for seed in range(3):
        observer(batch(seed))
    assert_all_same(state(observer), state(make(name, fed=True)))


# ---- saving, copying, moving ----


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("fed", [False, True])
def test_state_dict(name: str, fed: bool) -> None:
    source = make(name, fed=fed)
    for target in (make(name), make(name, fed=True), make(name, eps=0.5)):
        target.load_state_dict(source.state_dict())
        assert_all_same([*target.buffers()], [*source.buffers()])
        target(batch(1))
        with unchanged(*state(source)):
            target(batch(2))
        goes_on = copy.deepcopy(source)
        goes_on(batch(1))
        goes_on(batch(2))
        assert_all_same(state(target), state(goes_on))


def test_state_dict_of_other_mantissa_bits() -> None:
    for name in ("Log", "PerChannel", "PerBlock"):
        saved = make(name, fed=True, mantissa_bits=BITS + 1).state_dict()
        for target in (make(name), make(name, fed=True)):
            with (
                unchanged(*state(target)),
                pytest.raises(RuntimeError, match=r"size mismatch for counts.*mantissa_bits 3"),
            ):
                target.load_state_dict(saved)


def test_state_dict_of_other_groups() -> None:
    for name in ("Log", "PerChannel", "PerBlock"):
        for other in ("Log", "PerChannel", "PerBlock"):
            for fed in (False, True):
                if name == other or (not fed and "Log" not in (name, other)):
                    continue
                target = make(name, fed=fed)
                with (
                    unchanged(*state(target)),
                    pytest.raises(RuntimeError, match="size mismatch for counts"),
                ):
                    target.load_state_dict(make(other, fed=fed).state_dict())


def test_state_dict_of_rows_that_do_not_fit() -> None:
    saved = make("PerChannel", fed=True).state_dict()
    saved["min_val"] = saved["min_val"][:2]
    for target in (make("PerChannel"), make("PerChannel", fed=True)):
        with unchanged(*state(target)), pytest.raises(RuntimeError, match="size mismatch"):
            target.load_state_dict(saved)
    del saved["min_val"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"min_val"'):
        make("PerChannel", fed=True).load_state_dict(saved)


@pytest.mark.parametrize("convert", ["half", "double", "bfloat16"])
@pytest.mark.parametrize("name", MAKERS)
def test_statistics_keep_their_dtype(name: str, convert: str) -> None:
    observer = make(name, fed=True)
    model = nn.Sequential(nn.Linear(4, 4), observer)
    with unchanged(*observer.buffers()):
        getattr(model, convert)()
        model.to(torch.float16)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", MAKERS)
def test_copies(name: str, clone: Callable[[Any], Any]) -> None:
    source = make(name, fed=True)
    again = clone(source)
    assert_all_same([*again.buffers()], [*source.buffers()])
    with unchanged(*source.buffers()):
        again(batch(5))
    source(batch(5))
    assert_all_same(state(again), state(source))
    assert_all_same(qparams(again), qparams(source))


@pytest.mark.parametrize("name", MAKERS)
def test_meta_device(name: str) -> None:
    observer = make(name, factory_kwargs={"device": "meta"})
    assert {t.device.type for t in observer.buffers()} == {"meta"}
    x = torch.empty(SHAPE, device="meta")
    for _ in range(2):
        assert observer(x) is x
    assert observer.min_val.shape == GROUPS.get(name, ())
    assert {t.device.type for t in observer.buffers()} == {"meta"}


@pytest.mark.parametrize("name", MAKERS)
def test_inference_mode(name: str) -> None:
    """What it sizes may be fed, and copied, outside it."""
    observer = make(name)
    with torch.inference_mode():
        for seed in range(3):
            observer(batch(seed))
        inside = qparams(observer)
    assert not any(t.is_inference() for t in observer.buffers())
    assert_all_same(state(observer), state(make(name, fed=True)))
    assert_all_same(qparams(observer), inside)
    observer(batch(7))
    copy.deepcopy(observer)


def test_num_channels() -> None:
    observer = make("PerChannel", num_channels=5)
    pointer = observer.counts.data_ptr()
    assert observer.min_val.shape == (5,)
    observer(batch())
    assert observer.counts.data_ptr() == pointer
    with unchanged(*state(observer)), pytest.raises(ValueError, match="one value for each channel"):
        observer(torch.ones(2, 3))


# ---- scales ----


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_calculate_qparams(name: str, symmetric: bool) -> None:
    """Shapes and types as torch.ao's; the values those of ``solve``, and of the range."""
    scheme = "symmetric" if symmetric else "affine"
    per = "channel" if name == "PerChannel" else "tensor"
    qscheme = getattr(torch, f"per_{per}_{scheme}")
    observer = make(name, fed=True, qscheme=qscheme, dtype=torch.int8, scale_constraint="fp16")
    with unchanged(*observer.buffers()):
        scale, zero_point = observer.calculate_qparams()
    assert scale.shape == zero_point.shape == GROUPS.get(name, (1,))
    assert (scale.dtype, zero_point.dtype) == (
        torch.float32,
        torch.int64 if symmetric else torch.int32,
    )
    solved = observer.solve()
    assert_same(scale, solved.scale.reshape(scale.shape))
    assert_same(zero_point.long(), solved.zero_point.reshape(scale.shape))
    assert_same(scale.half().float(), scale)
    low, high = observer.observed_range()
    assert_all_same([low, high], [solved.min_val, solved.max_val])


def test_each_class_uses_its_method() -> None:
    x = batch(1, (40, 50)) ** 3
    for observer, method, options in (
        (po.MSEObserver(), "mse", {}),
        (po.PercentileObserver(0.99), "percentile", {"percentile": 0.99}),
        (po.KLObserver(512, 64, 2), "kl", {"bins": 512, "start_bin": 64, "stride": 2}),
        (po.LogHistogramObserver(method="minmax"), "minmax", {}),
        (po.HistogramObserver(method="lp", method_kwargs={"p": 3.0}), "lp", {"p": 3.0}),
    ):
        observer(x)
        found = ranges.solve(observer.statistic(), method, eps=float(observer.eps), **options)
        scale, zero_point = observer.calculate_qparams()
        assert_all_same([scale, zero_point.long()], [found.scale.view(1), found.zero_point.view(1)])


def many() -> list[Any]:
    """Observers of every kind, some alike, some that were never fed."""
    found: list[Any] = []
    for name in MAKERS:
        changes: list[dict[str, Any]] = [{"dtype": torch.int8}, {"eps": 0.5}]
        for kwargs in [{}] if name == "MSE" else [{}, *changes, {"scale_constraint": "e8m0"}]:
            found += [make(name, fed=True, **kwargs), make(name, **kwargs)]
    found.append(make("Log", fed=True, qscheme=torch.per_tensor_symmetric))
    found.append(make("PerChannel", fed=True, qscheme=torch.per_channel_symmetric))
    found.append(make("Log", fed=True, mantissa_bits=0))
    found.append(make("PerChannel", fed=True, method="mse"))
    found.append(make("KL", fed=True, stride=3))
    found.append(make("Log", fed=True, method="l2_greedy", method_kwargs={"bins": 64}))
    for kwargs in ({}, {"bins": 64}, {"method": "mse"}, {"dtype": torch.int16}):
        found.append(po.HistogramObserver(**{"bins": 128, **kwargs}))
        found[-1](batch(1))
    found.append(po.HistogramObserver(bins=64))
    found += [po.MinMaxObserver(), po.PerChannelMinMaxObserver(), po.FixedQParamsObserver(0.1, 3)]
    found[-2](batch())
    return found


def test_many_at_once() -> None:
    observers = many()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        expected = [observer.calculate_qparams() for observer in observers]
    with (
        unchanged(*(t for observer in observers for t in observer.buffers())),
        warnings.catch_warnings(record=True) as seen_together,
    ):
        warnings.simplefilter("always")
        found = calculate_qparams(iter(observers))
    assert len(found) == len(observers)
    for observer, one, other in zip(observers, found, expected, strict=True):
        assert_all_same(one, other, observer)
    messages, together = (sorted(str(w.message) for w in each) for each in (seen, seen_together))
    assert messages == together
    assert calculate_qparams([]) == []


def test_many_at_once_asks_those_that_choose_for_themselves() -> None:
    class Doubled(po.MSEObserver):
        def calculate_qparams(self) -> tuple[Tensor, Tensor]:
            scale, zero_point = super().calculate_qparams()
            return 2 * scale, zero_point

    usual, doubled = po.MSEObserver(), Doubled()
    for observer in (usual, doubled):
        observer(batch())
    (scale, _), (twice, _) = calculate_qparams([usual, doubled])
    assert_same(twice, 2 * scale)


# ---- in a fake-quantize ----

FAKE: dict[str, dict[str, Any]] = {
    method: {"observer": po.LogHistogramObserver, "mantissa_bits": BITS, "method": method}
    for method in ranges.METHODS
} | {
    "kl": {"observer": po.KLObserver, "bins": 128, "start_bin": 16, "mantissa_bits": BITS},
    "MSE": {"observer": po.MSEObserver, "quant_min": 0, "quant_max": 15},
    "linear": {"observer": po.HistogramObserver, "bins": 64, "method": "mse"},
    "per_channel": {
        "observer": po.PerChannelLogHistogramObserver,
        "mantissa_bits": BITS,
        "ch_axis": 1,
        "qscheme": torch.per_channel_symmetric,
        "dtype": torch.qint8,
    },
}


def fake(name: str) -> Any:
    return po.FakeQuantize(**FAKE[name])


@pytest.mark.parametrize("name", FAKE)
def test_fake_quantize(name: str) -> None:
    module = fake(name)
    for seed in (1, 0):
        x = batch(seed)
        y = module(x)
        observer = module.activation_post_process
        scale, zero_point = observer.calculate_qparams()
        assert_all_same([module.scale, module.zero_point], [scale, zero_point.int()])
        axis = 1 if name == "per_channel" else None
        ends = (observer.quant_min, observer.quant_max)
        assert_same(y, po.ops.fake_quantize(x, scale, zero_point.int(), *ends, axis))
    assert_all_same(module.calculate_qparams(), (scale, zero_point))


@pytest.mark.parametrize("name", FAKE)
def test_fake_quantize_with_the_observer_off(name: str) -> None:
    module = fake(name)
    module(batch(1))
    module.disable_observer()
    with unchanged(*module.buffers()):
        module(batch(2))
    unfed = fake(name)
    unfed.disable_observer()
    unfed(batch(1))
    assert (unfed.scale == 1).all()
    assert (unfed.zero_point == 0).all()
    unfed.enable_observer()
    unfed(batch(1))
    assert_all_same([*unfed.buffers()][2:], [*module.buffers()][2:])


@pytest.mark.parametrize("name", FAKE)
def test_fake_quantize_compiles_whole(name: str) -> None:
    torch._dynamo.reset()
    eager, module = fake(name), fake(name)
    for each in (eager, module):
        each(batch(1))  # sizes the channels
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seed, on in ((0, True), (1, True), (2, False)):
        for each in (eager, module):
            each.enable_observer(on)
        assert_same(compiled(batch(seed)), eager(batch(seed)))
        assert_all_same([*module.buffers()], [*eager.buffers()])


def test_fake_quantize_of_blocks_is_refused() -> None:
    for observer in (
        po.PerBlockLogHistogramObserver.with_args(block_size=(1, 2)),
        type("Mine", (po.PerBlockLogHistogramObserver,), {}).with_args(block_size=(1, 2)),
    ):
        with pytest.raises(TypeError, match=r"FakeQuantize: observer: expected .* per tensor or"):
            po.FakeQuantize(observer)


def test_default_dtype_is_not_that_of_statistics() -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for kind in (po.LogHistogramObserver, po.MinMaxObserver, po.HistogramObserver):
            observer = kind()
            observer(torch.randn(100, dtype=torch.float32))
            assert observer.min_val.dtype == torch.float32
            assert observer.calculate_qparams()[0].dtype == torch.float32
    finally:
        torch.set_default_dtype(default)


def test_a_nan_range_is_no_unfed_one() -> None:
    observer = po.LogHistogramObserver(nonfinite="propagate")
    observer(torch.tensor([1.0, torch.nan]))
    with pytest.raises(ValueError, match="got a range that is NaN"):
        observer.solve()


def test_memoryless_observers_have_nothing_to_merge() -> None:
    a, b = po.MinMaxObserver(memoryless=True), po.MinMaxObserver(memoryless=True)
    with pytest.raises(ValueError, match="more than their last tensor"):
        a.merge(b)

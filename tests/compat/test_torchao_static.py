"""Observers of torchao's interface, and the static quantization of its tutorial with them."""

from __future__ import annotations

import copy
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import GPU, Backend, as_param
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyobserver

pytest.importorskip("torchao.quantization.quant_api")
from torchao.quantization import Int8StaticActivationInt8WeightConfig, quantize_
from torchao.quantization import observer as host
from torchao.quantization.granularity import (
    PerAxis,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    PerToken,
)
from torchao.quantization.quant_primitives import (
    MappingType,
    ZeroPointDomain,
    _choose_qparams_affine_dont_preserve_zero,
    _choose_qparams_affine_tinygemm,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)
from torchao.quantization.utils import get_block_size

from pyobserver.compat import torchao as ours
from pyobserver.compat.torchao.granularity import block_size

ASYMMETRIC, SYMMETRIC = MappingType.ASYMMETRIC, MappingType.SYMMETRIC
NO_CLIPPING = MappingType.SYMMETRIC_NO_CLIPPING_ERR
MINMAX = ours.AffineQuantizedMinMaxObserver
MOVING = ours.AffineQuantizedMovingAverageMinMaxObserver
HISTOGRAM = ours.AffineQuantizedHistogramObserver
LOG = ours.AffineQuantizedLogHistogramObserver
ALL = (MINMAX, MOVING, HISTOGRAM, LOG)
EXAMPLE = Path(__file__).parents[2] / "examples" / "torchao_static_quantization.py"

GRANULARITIES = [
    PerTensor(),
    PerAxis(0),
    PerAxis(-1),
    PerRow(),
    PerRow(1),
    PerToken(),
    PerGroup(4),
    PerGroup(16),
    PerBlock((2, 4)),
]


def batches(*shape: int) -> list[Tensor]:
    return [torch.randn(shape) * factor - 0.3 for factor in (1, 2, 0.5)]


def fed(observer: Any, tensors: list[Tensor]) -> Any:
    for x in tensors:
        assert observer(x) is x
    return observer


def assert_same(ours: tuple[Any, ...], theirs: tuple[Any, ...]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert torch.equal(a, b)


# ---- the interface ----


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("mapping", list(MappingType), ids=lambda m: m.name)
def test_qparams_are_torchaos(mapping: MappingType, granularity: Any, keepdim: bool) -> None:
    tensors = batches(4, 8, 16)
    for dtype, bounds in [
        (torch.int8, ()),
        (torch.uint8, (3, 200)),
        (torch.uint4, ()),
        (torch.int4, (-7, 7)),
    ]:
        bounds = (0, 200) if dtype == torch.uint8 else bounds
        kwargs: dict[str, Any] = dict(zip(("quant_min", "quant_max"), bounds, strict=False))
        kwargs |= {"eps": 1e-6, "scale_dtype": torch.float64, "zero_point_dtype": torch.int16}
        observer = fed(MINMAX(mapping, dtype, granularity, **kwargs, keepdim=keepdim), tensors)
        theirs = fed(
            host.AffineQuantizedMinMaxObserver(mapping, dtype, granularity, **kwargs), tensors
        ).calculate_qparams()
        if keepdim:
            sizes = get_block_size(tensors[0].shape, granularity)
            shape = [n // size for n, size in zip(tensors[0].shape, sizes, strict=True)]
            theirs = tuple(t.reshape(shape) for t in theirs)
        assert_same(observer.calculate_qparams(), theirs)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_keepdim_has_the_shape_that_from_hp_takes(granularity: Any) -> None:
    x = torch.randn(4, 16)
    observer = fed(MINMAX(SYMMETRIC, torch.int8, granularity, keepdim=True), [x])
    sizes = get_block_size(x.shape, granularity)
    scale, _ = choose_qparams_affine(x, SYMMETRIC, sizes, torch.int8, keepdim=True)
    assert_same(observer.calculate_qparams()[:1], (scale,))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_block_sizes_are_torchaos(granularity: Any) -> None:
    for shape in [(4, 16), (2, 8, 16), (2, 2, 8, 16)]:
        assert tuple(block_size(granularity, shape)) == tuple(get_block_size(shape, granularity))


def test_zero_need_not_be_kept() -> None:
    x = torch.rand(4, 16) + 3
    sizes, kwargs = (1, 16), {"eps": 1e-6}
    args: tuple[Any, ...] = (ASYMMETRIC, torch.uint8, PerRow())
    wide = fed(MINMAX(*args, **kwargs, preserve_zero=False), [x]).calculate_qparams()
    assert_same(
        wide, _choose_qparams_affine_dont_preserve_zero(x, ASYMMETRIC, sizes, torch.uint8, **kwargs)
    )
    floating = {"preserve_zero": False, "zero_point_domain": ZeroPointDomain.FLOAT}
    middle = fed(MINMAX(*args, **kwargs, **floating), [x]).calculate_qparams()
    assert_same(
        middle, _choose_qparams_affine_tinygemm(x, ASYMMETRIC, sizes, torch.uint8, **kwargs)
    )
    kept = fed(MINMAX(*args, zero_point_domain=ZeroPointDomain.FLOAT), [x]).calculate_qparams()
    assert torch.allclose(kept[1] - 128 * kept[0], torch.zeros(4), atol=1e-6)


def test_no_zero_point_and_float8() -> None:
    x = torch.randn(4, 16)
    kwargs: dict[str, Any] = {
        "zero_point_domain": ZeroPointDomain.NONE,
        "scale_dtype": torch.float32,
    }
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8):
        for mapping in (SYMMETRIC, NO_CLIPPING):
            pair = [
                fed(cls(mapping, dtype, PerRow(), **kwargs), [x]).calculate_qparams()
                for cls in (MINMAX, host.AffineQuantizedMinMaxObserver)
            ]
            assert pair[0][1] is pair[1][1] is None
            assert_same(pair[0][:1], pair[1][:1])


@pytest.mark.parametrize("cls", ALL)
def test_qparams_are_float32_and_int32_where_nothing_is_asked(cls: Any) -> None:
    observer = fed(cls(SYMMETRIC, torch.int8, PerTensor()), [torch.randn(3, 4).bfloat16()])
    scale, zero_point = observer.calculate_qparams()
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)
    assert scale.shape == zero_point.shape == ()
    assert observer.min_val.dtype == torch.float32


@pytest.mark.parametrize("cls", ALL)
def test_hosts_take_the_classes(cls: Any) -> None:
    made = cls.with_args(mapping_type=SYMMETRIC, target_dtype=torch.int8)(granularity=PerTensor())
    assert isinstance(made, host.AffineQuantizedObserverBase)
    assert isinstance(made, pyobserver.ObserverBase)
    assert isinstance(
        MOVING(ASYMMETRIC, torch.int8, PerTensor()), host.AffineQuantizedMinMaxObserver
    )
    assert not hasattr(made, "convert")


def test_the_last_batch_is_another_size() -> None:
    """A range for the whole tensor: torchao's own fails after a batch of one."""
    for granularity in (PerTensor(), PerAxis(-1)):
        for keepdim in (False, True):
            observer = MINMAX(ASYMMETRIC, torch.uint8, granularity, keepdim=keepdim)
            tensors = [torch.randn(n, 16) for n in (1, 5, 3)]
            scale = fed(observer, tensors).calculate_qparams()[0]
            whole = MINMAX(ASYMMETRIC, torch.uint8, granularity, keepdim=keepdim)
            assert_same((scale,), fed(whole, [torch.cat(tensors)]).calculate_qparams()[:1])


# ---- the siblings ----


def test_moving_average() -> None:
    tensors = batches(4, 16)
    observer = fed(MOVING(ASYMMETRIC, torch.uint8, PerRow(), averaging_constant=0.25), tensors)
    channels = pyobserver.MovingAveragePerChannelMinMaxObserver(0.25, dtype=torch.uint8)
    fed(channels, tensors)
    assert torch.equal(observer.min_val[:, 0], channels.min_val)
    assert torch.equal(observer.max_val[:, 0], channels.max_val)
    assert_same(observer.calculate_qparams(), channels.calculate_qparams())


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("method", ["mse", "percentile"])
@pytest.mark.parametrize(
    ("cls", "plain"),
    [(HISTOGRAM, pyobserver.HistogramObserver), (LOG, pyobserver.LogHistogramObserver)],
)
def test_histograms(cls: Any, plain: Any, method: str, keepdim: bool) -> None:
    tensors = batches(4, 16)
    for mapping, qscheme, dtype in [
        (ASYMMETRIC, torch.per_tensor_affine, torch.uint8),
        (SYMMETRIC, torch.per_tensor_symmetric, torch.int8),
    ]:
        observer = fed(cls(mapping, dtype, PerTensor(), keepdim=keepdim, method=method), tensors)
        counterpart = fed(plain(dtype=dtype, qscheme=qscheme, method=method), tensors)
        expected = counterpart.calculate_qparams()
        shape = (1, 1) if keepdim else ()
        found = observer.calculate_qparams()
        assert all(t.shape == shape for t in found)
        assert [t.item() for t in found] == [t.item() for t in expected]
        assert (
            observer.solve("mse", bits=4).scale.item() == counterpart.solve("mse", 4).scale.item()
        )


def test_log_histogram_of_rows_and_groups() -> None:
    x = torch.randn(4, 16)
    rows = fed(LOG(SYMMETRIC, torch.int4, PerRow(), method="mse"), [x])
    plain = pyobserver.PerChannelLogHistogramObserver(
        0, dtype=torch.int8, qscheme=torch.per_channel_symmetric, quant_min=-8, quant_max=7
    )
    assert torch.equal(rows.calculate_qparams()[0], fed(plain, [x]).calculate_qparams()[0])
    groups = fed(LOG(SYMMETRIC, torch.int4, PerGroup(8), mantissa_bits=3), [x])
    blocks = pyobserver.PerBlockLogHistogramObserver(
        (1, 8), 3, dtype=torch.int8, qscheme=torch.per_tensor_symmetric, quant_min=-8, quant_max=7
    )
    assert torch.equal(groups.calculate_qparams()[0], fed(blocks, [x]).calculate_qparams()[0])


def test_the_search_scores_the_grid_that_is_asked_for() -> None:
    """``l2_greedy`` by levels of the dtype that torch's histogram observer takes is another."""
    tensors = [torch.randn(1000) for _ in range(3)]
    four = fed(HISTOGRAM(ASYMMETRIC, torch.uint4, PerTensor(), method="l2_greedy"), tensors)
    solved = pyobserver.ranges.solve(four.statistic(), "l2_greedy", bits=4)
    assert four.calculate_qparams()[0].item() == solved.scale.item()


# ---- state ----


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1), PerGroup(4)], ids=str)
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("cls", ALL)
def test_state_is_saved(cls: Any, keepdim: bool, granularity: Any) -> None:
    if cls is HISTOGRAM and not isinstance(granularity, PerTensor):
        return
    kwargs: dict[str, Any] = {"keepdim": keepdim}
    if cls in (HISTOGRAM, LOG):
        kwargs["method"] = "percentile"  # the search by the reference kernels takes seconds
    observer = fed(cls(ASYMMETRIC, torch.uint8, granularity, **kwargs), batches(4, 16))
    loaded = cls(ASYMMETRIC, torch.uint8, granularity, **kwargs)
    loaded.load_state_dict(copy.deepcopy(observer.state_dict()), strict=True)
    assert_same(loaded.calculate_qparams(), observer.calculate_qparams())
    more = torch.randn(4, 16) * 3
    assert_same(*(fed(each, [more]).calculate_qparams() for each in (loaded, observer)))
    model = nn.Sequential(copy.deepcopy(observer)).bfloat16()
    assert_same(model[0].calculate_qparams(), observer.calculate_qparams())


@pytest.mark.parametrize("cls", ALL)
def test_an_unfed_state_loads_and_warns(cls: Any) -> None:
    for keepdim in (False, True):
        observer = cls(ASYMMETRIC, torch.uint8, PerTensor(), keepdim=keepdim)
        other = fed(cls(ASYMMETRIC, torch.uint8, PerTensor(), keepdim=keepdim), batches(2, 3))
        other.load_state_dict(observer.state_dict())
        for each in (observer, other):
            each(torch.empty(0, 3))
            with pytest.warns(UserWarning, match="never fed") as caught:
                scale, zero_point = each.calculate_qparams()
            assert caught[0].filename == __file__
            assert (scale.item(), zero_point.item()) == (1, 0)


@pytest.mark.parametrize("cls", ALL)
def test_two_merge(cls: Any) -> None:
    granularity = PerTensor() if cls is HISTOGRAM else PerRow()
    for keepdim in (False, True):
        halves = [cls(SYMMETRIC, torch.int8, granularity, keepdim=keepdim) for _ in range(2)]
        tensors = [torch.randn(4, 16), torch.randn(4, 16) * 2]
        for half, x in zip(halves, tensors, strict=True):
            half(x)
        merged = halves[0] + halves[1]
        for name, buffer in merged.named_buffers():
            assert buffer.shape == dict(halves[0].named_buffers())[name].shape, name
        if cls is HISTOGRAM:
            other = fed(cls(SYMMETRIC, torch.int8, granularity, keepdim=keepdim, bins=9), tensors)
            with pytest.raises(ValueError, match=r"histogram \(2048,\), got"):
                halves[0].merge(other)
        if cls in (MINMAX, LOG):
            whole = fed(cls(SYMMETRIC, torch.int8, granularity, keepdim=keepdim), tensors)
            assert_same(merged.calculate_qparams(), whole.calculate_qparams())
        else:
            assert merged.calculate_qparams()[0].shape == halves[0].calculate_qparams()[0].shape


def test_nonfinite_values_are_left_out() -> None:
    x = torch.randn(4, 16)
    broken = torch.cat([x, torch.tensor([torch.nan, torch.inf]).expand(4, 2)], 1)
    for cls in (MINMAX, LOG):
        observer = fed(cls(SYMMETRIC, torch.int8, PerRow()), [broken])
        with pytest.warns(UserWarning, match="8 NaN or infinite values"):
            found = observer.calculate_qparams()
        assert_same(found, fed(cls(SYMMETRIC, torch.int8, PerRow()), [x]).calculate_qparams())


@pytest.mark.parametrize("cls", [MINMAX, MOVING, LOG])
def test_a_refused_tensor_changes_nothing(cls: Any) -> None:
    observer = cls(SYMMETRIC, torch.int8, PerGroup(4))
    for bad in (torch.randn(2, 6), torch.ones(2, 8, dtype=torch.int32)):
        with pytest.raises((TypeError, ValueError)):
            observer(bad)
        assert observer.min_val.shape == (0,)
    strict = cls(SYMMETRIC, torch.int8, PerGroup(4), nonfinite="raise")
    with pytest.raises(ValueError, match="expected finite values"):
        strict(torch.full((2, 8), torch.nan))
    assert strict.min_val.shape == (0,)
    observer(torch.randn(2, 8))
    before = copy.deepcopy(observer.state_dict())
    for bad in (torch.randn(3, 8), torch.randn(2, 12), torch.randn(8)):
        with pytest.raises(ValueError, match=r"min_val|counts|block_size"):
            observer(bad)
    assert all(torch.equal(value, before[name]) for name, value in observer.state_dict().items())


@pytest.mark.parametrize(
    ("cls", "kwargs", "names"),
    [
        (MINMAX, {"mapping_type": "symmetric"}, "mapping_type"),
        (MINMAX, {"target_dtype": torch.float32}, "target_dtype"),
        (MINMAX, {"target_dtype": torch.float8_e8m0fnu}, "target_dtype"),
        (MINMAX, {"target_dtype": torch.float8_e4m3fn}, "mapping_type"),
        (MINMAX, {"granularity": None}, "granularity"),
        (MINMAX, {"quant_max": 256}, "quant_max"),
        (MINMAX, {"quant_min": -1}, "quant_min"),
        (MINMAX, {"quant_min": 5}, "quant_min"),
        (MINMAX, {"eps": 0.0}, "eps"),
        (MINMAX, {"zero_point_domain": None}, "zero_point_domain"),
        (MINMAX, {"zero_point_domain": ZeroPointDomain.NONE}, "zero_point_domain"),
        (MINMAX, {"mapping_type": SYMMETRIC, "preserve_zero": False}, "preserve_zero"),
        (
            MINMAX,
            {"mapping_type": SYMMETRIC, "zero_point_domain": ZeroPointDomain.FLOAT},
            "zero_point_domain",
        ),
        (MOVING, {"averaging_constant": 0}, "averaging_constant"),
        (HISTOGRAM, {"granularity": PerAxis(0)}, "granularity"),
        (HISTOGRAM, {"method": "best"}, "method"),
        (LOG, {"preserve_zero": False}, "preserve_zero"),
        (LOG, {"zero_point_domain": ZeroPointDomain.FLOAT}, "zero_point_domain"),
        (LOG, {"mapping_type": NO_CLIPPING, "method": "kl"}, "mapping_type"),
        (LOG, {"mapping_type": SYMMETRIC, "target_dtype": torch.float8_e5m2}, "target_dtype"),
    ],
)
def test_arguments_are_checked(cls: Any, kwargs: dict[str, Any], names: str) -> None:
    given = {"mapping_type": ASYMMETRIC, "target_dtype": torch.uint8, "granularity": PerTensor()}
    with pytest.raises((TypeError, ValueError), match=f"{names}.*expected.*got"):
        cls(**(given | kwargs))


@pytest.mark.parametrize("cls", ALL)
def test_compiles_without_a_break(cls: Any) -> None:
    tensors = batches(4, 16)
    for granularity in (PerTensor(), PerAxis(0)):
        if cls is HISTOGRAM and granularity != PerTensor():
            continue
        plain, compiled = (cls(SYMMETRIC, torch.int8, granularity) for _ in range(2))
        if granularity != PerTensor():
            fed(compiled, tensors[:1])  # sizes the state
            fed(plain, tensors[:1])
        fed(torch.compile(compiled, backend="eager", fullgraph=True), tensors)
        fed(plain, tensors)
        assert_same(compiled.calculate_qparams(), plain.calculate_qparams())


GRAINS = [
    pytest.param(cls, granularity, id=f"{cls.__name__}-{granularity}")
    for cls in ALL
    for granularity in (PerTensor(), PerAxis(-1), PerGroup(4))
    if cls is not HISTOGRAM or granularity == PerTensor()
]


class Reads(TorchDispatchMode):
    """Counts what would be a sync on a GPU."""

    count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(not pyobserver.native_status.cpu, reason="the reference kernels read values")
@pytest.mark.parametrize(("cls", "granularity"), GRAINS)
def test_a_forward_reads_nothing_back(cls: Any, granularity: Any) -> None:
    observer = cls(ASYMMETRIC, torch.uint8, granularity)
    with Reads() as reads:
        fed(observer, batches(4, 16))
    assert reads.count == 0


@pytest.mark.parametrize("gpu", [as_param(GPU)])
@pytest.mark.parametrize(("cls", "granularity"), GRAINS)
def test_on_a_gpu(gpu: Backend, cls: Any, granularity: Any) -> None:
    tensors = batches(4, 16)
    plain = fed(cls(ASYMMETRIC, torch.uint8, granularity), tensors)
    observer = cls(ASYMMETRIC, torch.uint8, granularity).to(gpu.device)
    moved = [x.to(gpu.device) for x in tensors]
    observer(moved[0])  # sizes the state
    torch.cuda.set_sync_debug_mode("error")
    try:
        fed(observer, moved[1:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(tuple(t.cpu() for t in observer.calculate_qparams()), plain.calculate_qparams())


# ---- the flow of the tutorial ----


class Toy(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.linear1 = nn.Linear(64, 48, bias=bias)
        self.linear2 = nn.Linear(48, 32, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.linear1(x))


def is_observed(module: nn.Module, name: str) -> bool:
    return isinstance(module, ours.ObservedLinear)


def observed(model: nn.Module, act_obs: nn.Module, weight_obs: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    ours.insert_observers_(model, act_obs, weight_obs)
    torch.manual_seed(0)
    for x in batches(8, 64):
        model(x.to(next(model.parameters()).dtype))
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_uint8_is_torchaos_arithmetic(bias: bool, dtype: torch.dtype) -> None:
    model = Toy(bias).to(dtype)
    pair = MINMAX(ASYMMETRIC, torch.uint8, PerTensor()), MINMAX(ASYMMETRIC, torch.uint8, PerAxis(0))
    found = observed(model, *pair)
    layers = copy.deepcopy([found.linear1, found.linear2])
    quantize_(found, ours.StaticQuantConfig(torch.uint8), is_observed)
    assert [type(m) for m in found.children()] == [ours.QuantizedLinear] * 2
    assert found.linear1.qweight.dtype == torch.uint8
    assert "linear1.act_scale" in found.state_dict()
    x = torch.randn(5, 64, dtype=dtype)
    expected = x
    for layer in layers:
        rounded = []
        for t, observer in ((expected, layer.act_obs), (layer.weight, layer.weight_obs)):
            sizes = get_block_size(t.shape, observer.granularity)
            qparams = observer.calculate_qparams()
            q = quantize_affine(t, sizes, *qparams, torch.uint8)
            rounded.append(dequantize_affine(q, sizes, *qparams, torch.uint8, output_dtype=dtype))
        expected = F.linear(*rounded, layer.bias)
    assert torch.allclose(
        found(x), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
    )
    assert not torch.equal(found(x), model(x))
    fresh = copy.deepcopy(found)
    for buffer in fresh.buffers():
        buffer.zero_()
    fresh.load_state_dict(found.state_dict())
    assert torch.equal(fresh(x), found(x))
    assert fresh.half()(x.half()).dtype == torch.float16
    assert torch.equal(fresh.linear1.act_scale, found.linear1.act_scale)


@pytest.mark.parametrize("granularity", [PerRow(), PerAxis(0), PerTensor()], ids=str)
@pytest.mark.parametrize("mapping", [SYMMETRIC, ASYMMETRIC], ids=str)
@pytest.mark.parametrize("reduced", [False, True])
def test_int8_is_torchaos_config(mapping: MappingType, granularity: Any, reduced: bool) -> None:
    """With the range that torchao would take for the weight, the same integers and outputs."""
    bounds: dict[str, Any] = {"quant_min": -64, "quant_max": 63} if reduced else {}
    eps = torch.finfo(torch.float32).eps
    model = nn.Sequential(nn.Linear(64, 48))
    act_obs = MINMAX(mapping, torch.int8, PerTensor(), **bounds)
    found = observed(model, act_obs, MINMAX(SYMMETRIC, torch.int8, granularity, eps=eps, **bounds))
    scale, zero_point = (t.reshape(1, 1) for t in found[0].act_obs.calculate_qparams())
    quantize_(found, ours.Int8StaticConfig(), is_observed)
    theirs = copy.deepcopy(model)
    config = Int8StaticActivationInt8WeightConfig(
        scale,
        zero_point.to(torch.int8) if mapping is ASYMMETRIC else None,
        [PerTensor(), PerTensor() if granularity == PerTensor() else PerRow()],
        mapping,
        set_inductor_config=False,
        reduce_range=reduced,
    )
    quantize_(theirs, config)
    assert type(found[0]) is nn.Linear
    assert torch.equal(found[0].weight.qdata, theirs[0].weight.qdata)
    x = torch.randn(20, 64)
    assert torch.equal(found(x), theirs(x))
    noise = (found(x) - model(x)).pow(2).mean() / model(x).pow(2).mean()
    assert noise < (3e-3 if reduced else 5e-4)


def test_int8_weight_has_the_scale_that_was_chosen() -> None:
    """The reason for a config of our own: torchao's takes the range of the weight itself."""
    weight_obs = LOG(
        SYMMETRIC, torch.int8, PerRow(), method="percentile", method_kwargs={"percentile": 0.9}
    )
    found = observed(Toy(), MINMAX(ASYMMETRIC, torch.int8, PerTensor()), weight_obs)
    scale, _ = found.linear1.weight_obs.calculate_qparams()
    quantize_(found, ours.Int8StaticConfig(), is_observed)
    assert torch.equal(found.linear1.weight.scale[:, 0], scale)
    assert (found.linear1.weight.qdata == 127).sum() > 48


def test_int8_takes_sequences_with_keepdim() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    ours.insert_observers_(
        model,
        MINMAX(ASYMMETRIC, torch.int8, PerTensor(), keepdim=True),
        MINMAX(SYMMETRIC, torch.int8, PerRow()),
    )
    x = torch.randn(2, 5, 16)
    expected = model(x)
    quantize_(model, ours.Int8StaticConfig(), is_observed)
    assert (model(x) - expected).abs().max() < 0.05


def test_torchaos_own_observers_convert() -> None:
    theirs = host.AffineQuantizedMinMaxObserver
    kwargs = {"eps": 1e-6, "scale_dtype": torch.float32, "zero_point_dtype": torch.int32}
    model = Toy()
    found = [
        observed(
            model,
            *(
                cls(m, torch.int8, g, **kwargs)
                for m, g in ((ASYMMETRIC, PerTensor()), (SYMMETRIC, PerRow()))
            ),
        )
        for cls in (MINMAX, theirs)
    ]
    x = torch.randn(20, 64)
    for config in (ours.Int8StaticConfig(), ours.StaticQuantConfig(torch.int8)):
        pair = copy.deepcopy(found)
        for each in pair:
            quantize_(each, config, is_observed)
        assert torch.equal(pair[0](x), pair[1](x))


def test_insertion() -> None:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 2, bias=False))
    ).eval()
    parameters = dict(model.named_parameters())
    pair = MINMAX(ASYMMETRIC, torch.int8, PerTensor()), MINMAX(SYMMETRIC, torch.int8, PerRow())
    ours.insert_observers_(model, *pair)
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    assert not any(m.training for m in model.modules() if isinstance(m, ours.ObservedLinear))
    assert model[0].act_obs is not model[2][0].act_obs
    model(torch.randn(3, 4))
    assert pair[0].min_val == torch.inf
    for nothing in (model, nn.Linear(4, 4), nn.ReLU()):
        with pytest.raises(ValueError, match=r"model: expected one with torch\.nn\.Linear"):
            ours.insert_observers_(nothing, *pair)


@pytest.mark.parametrize(
    ("act", "weight", "message"),
    [
        ((ASYMMETRIC, torch.uint8, PerTensor()), (SYMMETRIC, torch.int8, PerRow()), "act_obs"),
        ((ASYMMETRIC, torch.int8, PerAxis(-1)), (SYMMETRIC, torch.int8, PerRow()), "PerTensor"),
        ((ASYMMETRIC, torch.int8, PerTensor()), (ASYMMETRIC, torch.int8, PerRow()), "symmetric"),
        ((ASYMMETRIC, torch.int8, PerTensor()), (SYMMETRIC, torch.int8, PerGroup(8)), "PerRow"),
        (
            (ASYMMETRIC, torch.int8, PerTensor(), -127),
            (SYMMETRIC, torch.int8, PerRow()),
            "quant_min",
        ),
    ],
)
def test_int8_refuses_what_its_kernel_would_get_wrong(act: Any, weight: Any, message: str) -> None:
    model = observed(Toy(), MINMAX(*act), MINMAX(*weight))
    with pytest.raises(ValueError, match=f"{message}.*got"):
        quantize_(model, ours.Int8StaticConfig(), is_observed)


def test_conversion_is_checked() -> None:
    pair = MINMAX(ASYMMETRIC, torch.uint8, PerTensor()), MINMAX(ASYMMETRIC, torch.uint8, PerAxis(0))
    with pytest.raises(ValueError, match=r"target_dtype.*uint8, got torch\.int8"):
        quantize_(observed(Toy(), *pair), ours.StaticQuantConfig(torch.int8), is_observed)
    model = Toy()
    ours.insert_observers_(model, *pair)
    with pytest.raises(ValueError, match="act_obs: expected an observer that was fed"):
        quantize_(model, ours.StaticQuantConfig(torch.uint8), is_observed)
    with pytest.raises(TypeError, match=r"filter_fn.*got Linear"):
        quantize_(Toy(), ours.StaticQuantConfig(torch.uint8))
    floating = MINMAX(ASYMMETRIC, torch.uint8, PerAxis(0), zero_point_domain=ZeroPointDomain.FLOAT)
    model = observed(Toy(), pair[0], floating)
    with pytest.raises(ValueError, match="weight_obs: zero_point_domain"):
        quantize_(model, ours.StaticQuantConfig(torch.uint8), is_observed)


def test_activations_by_channel_and_weights_in_groups_of_four_bits() -> None:
    model = Toy()
    act_obs = MINMAX(ASYMMETRIC, torch.uint8, PerAxis(-1))
    with pytest.raises(ValueError, match="weight_obs"):
        quantize_(
            observed(model, act_obs, MINMAX(SYMMETRIC, torch.uint4, PerGroup(16))),
            ours.StaticQuantConfig(torch.uint8),
            is_observed,
        )
    weight_obs = MINMAX(SYMMETRIC, torch.uint8, PerGroup(16), quant_max=15)
    found = observed(model, act_obs, weight_obs)
    quantize_(found, ours.StaticQuantConfig(torch.uint8), is_observed)
    assert found.linear1.qweight.max() == 15
    x = torch.randn(20, 64)
    assert (found(x) - model(x)).pow(2).mean() < 0.08 * model(x).pow(2).mean()


def test_the_example_keeps_its_accuracy(capsys: pytest.CaptureFixture) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the training is small
    try:
        found = runpy.run_path(str(EXAMPLE))["main"]()
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 9
    assert found["float32"] > 0.94
    assert min(found.values()) > found["float32"] - 0.01
    assert "AffineQuantizedHistogramObserver" in capsys.readouterr().out


def test_torchao_is_imported_only_when_asked_for() -> None:
    script = (
        "import sys, pyobserver, pyobserver.compat\n"
        "assert not any(name.startswith('torchao') for name in sys.modules)\n"
    )
    package = Path(pyobserver.__file__).parents[1]
    subprocess.run([sys.executable, "-c", script], cwd=package, check=True)

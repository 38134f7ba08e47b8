from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from backends import Backend
from torch import Tensor

from pyobserver import ops

from .cases import (
    BLOCKS,
    DTYPES,
    LAYOUTS,
    REJECTED_BLOCKS,
    SHAPE,
    SIZES,
    any_isa,
    assert_all_same,
    assert_rejected,
    assert_same,
    grid_of,
    laid_out,
    not_dense_real_float,
    opcheck,
    opcheck_inputs,
    sample,
    threads,
    unchanged,
)

UPDATES = ("running", "moving_average", "memoryless")
MAPPINGS = ("affine", "symmetric", "affine_float", "fused_affine", "fused_symmetric")
SWITCHES = ((1, 1), (0, 1), (1, 0), (0, 0), (1, 1))
EPS = torch.finfo(torch.float32).eps
State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def groups_of(
    x: Tensor, axis: int | None = None, block_size: tuple[int, ...] | None = None
) -> tuple[int, ...]:
    if block_size is not None:
        return grid_of(x, block_size)
    return (1,) if axis is None else (x.shape[axis],)


def fresh(
    groups: tuple[int, ...] = (1,), mapping: str = "affine", device: str = "cpu"
) -> tuple[Tensor, ...]:
    """min_val, max_val, nonfinite_count, scale, zero_point."""
    zero_dtype = torch.float32 if mapping == "affine_float" else torch.int32
    low = torch.full(groups, torch.inf, device=device)
    return (
        *(low, -low, torch.zeros((), dtype=torch.int64, device=device)),
        *(torch.ones_like(low), torch.zeros(groups, dtype=zero_dtype, device=device)),
    )


def eps(device: str = "cpu") -> Tensor:
    return torch.tensor([EPS], device=device)


def switch(flag: int | None, dtype: torch.dtype = torch.uint8, device: str = "cpu") -> Any:
    return None if flag is None else torch.tensor([flag], dtype=dtype, device=device)


def chain(
    x: Tensor,
    state: tuple[Tensor, ...],
    grid: tuple[int, int],
    observe: int | None = None,
    quantize: int | None = None,
    mapping: str = "affine",
    axis: int | None = None,
    symmetric_zero_point: int = 0,
    update: str = "moving_average",
    averaging_constant: float = 0.01,
    nonfinite: str = "ignore",
    block_size: tuple[int, ...] | None = None,
) -> Tensor:
    """The three ops one after the other: with their own reference kernels where x needs nothing."""
    low, high, count, scale, zero_point = state
    observed, quantized = (switch(flag, device=x.device.type) for flag in (observe, quantize))
    if x.numel():
        ops.minmax(
            x, low, high, count, axis, update, averaging_constant, nonfinite, observed, block_size
        )
        ops.choose_qparams(
            low, high, scale, zero_point, eps(x.device.type), *grid, mapping,
            symmetric_zero_point, observed,
        )  # fmt: skip
    return ops.fake_quantize(x, scale, zero_point, *grid, axis, quantized, block_size)


def observe_both(
    backend: Backend,
    x: Tensor,
    state: tuple[Tensor, ...],
    grid: tuple[int, int],
    observe: int | None = None,
    quantize: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """The op and the one with a mask, which leave the same state and the same values."""
    switches = [switch(flag, device=backend.device) for flag in (observe, quantize)]
    other = [t.clone() for t in state]
    y = backend.op("_observe_fake_quantize")(
        x, *other, eps(backend.device), *grid, *switches, **options
    )
    z, mask = backend.op("_observe_fake_quantize_mask")(
        x, *state, eps(backend.device), *grid, *switches, **options
    )
    assert_all_same(other, state)
    assert_same(y, z)
    assert y.stride() == z.stride()
    return z, mask


def check(
    backend: Backend, batches: list[Tensor], grid: tuple[int, int] = (0, 255), **options: Any
) -> None:
    """Feeds the batches, comparing values, mask and state with those of the chain after each."""
    mapping = options.get("mapping", "affine")
    switches = options.pop("switches", ((None, None),))
    groups = groups_of(batches[0], options.get("axis"), options.get("block_size"))
    state = fresh(groups, mapping, backend.device)
    expected = fresh(groups, mapping, backend.device)
    for i, x in enumerate(batches):
        flags = switches[i % len(switches)]
        y, mask = observe_both(backend, x, state, grid, *flags, **options)
        assert_same(y, chain(x, expected, grid, *flags, **options), (i, options))
        assert_all_same(state, expected, (i, options))
        masked = backend.op("_fake_quantize_mask")(
            x, *expected[3:], *grid, options.get("axis"), switch(flags[1], device=backend.device),
            options.get("block_size"),
        )  # fmt: skip
        assert_all_same((y, mask), masked, (i, options))
        assert y.stride() == masked[0].stride()


def batches_of(
    shape: tuple[int, ...] | int | None, dtype: torch.dtype, device: str, special: bool = False
) -> list[Tensor]:
    """Growing, shifted, constant and one-sided ones, with values that are not finite or without."""
    found = [
        sample(shape, dtype, 0),
        sample(shape, dtype, 1) * 3 + 1,
        sample(shape, dtype, 2).abs(),
        sample(shape, dtype, 3) * 0 - 2,
        sample(shape, dtype, 4) / 100,
    ]
    for i, x in enumerate(found):
        if special and x.numel() > 3:
            x.view(-1)[i] = torch.nan
            x.view(-1)[-1] = (torch.inf, -torch.inf)[i % 2]
    return [x.to(device) for x in found]


@pytest.mark.parametrize("mapping", MAPPINGS)
@pytest.mark.parametrize("update", UPDATES)
def test_is_the_chain(backend: Backend, update: str, mapping: str) -> None:
    for dtype in DTYPES:
        for groups in ({}, {"axis": 0}, {"axis": -1}, {"block_size": (1, 7)}):
            options = {"update": update, "mapping": mapping, "averaging_constant": 0.3, **groups}
            batches = batches_of((4, 21), dtype, backend.device, special=True)
            check(backend, batches, switches=SWITCHES, **options)
            check(backend, batches, (-8, 7), **options, symmetric_zero_point=3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes(backend: Backend, size: int | None, dtype: torch.dtype) -> None:
    batches = batches_of(size, dtype, backend.device)[:3]
    check(backend, batches, switches=SWITCHES)
    if size is not None:
        check(backend, batches, axis=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(backend: Backend, dtype: torch.dtype, layout: str) -> None:
    batches = [laid_out(layout, dtype, backend.device, seed) for seed in range(2)]
    for axis in (None, 0, 1, -1):
        check(backend, batches, axis=axis, mapping="symmetric")
    for block_size in BLOCKS:
        check(backend, batches, (-8, 7), block_size=block_size, averaging_constant=0.5)


@pytest.mark.parametrize("flag_dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
def test_switches(backend: Backend, flag_dtype: torch.dtype) -> None:
    """Both off from the start: the values pass, the state stays unfed."""
    state = fresh(device=backend.device)
    x = sample(33).to(backend.device)
    x[4] = torch.nan
    off = switch(0, flag_dtype, backend.device)
    with unchanged(*state, x):
        for options in ({}, {"nonfinite": "raise"}):
            y = backend.op("_observe_fake_quantize")(
                x, *state, eps(backend.device), 0, 255, off, off, **options
            )
            assert_same(y, x)
            assert y.data_ptr() != x.data_ptr()
    on = switch(1, flag_dtype, backend.device)
    expected = fresh(device=backend.device)
    y = backend.op("_observe_fake_quantize")(x, *state, eps(backend.device), 0, 255, on, on)
    assert_same(y, chain(x, expected, (0, 255)))
    assert_all_same(state, expected)


def test_batches_that_are_empty(backend: Backend) -> None:
    for shape, options in (
        ((0,), {}),
        ((0, 3), {"axis": 1}),
        ((3, 0), {"axis": 0}),
        ((0, 6), {"block_size": (1, 3)}),
    ):
        state = fresh((3,) if "axis" in options else (1,), device=backend.device)
        x = torch.empty(shape, device=backend.device)
        with unchanged(*state):
            y, mask = observe_both(backend, x, state, (0, 255), **options)
        assert (y.shape, mask.numel()) == (x.shape, 0)


@pytest.mark.parametrize("special", [False, True])
def test_over_threads(backend: Backend, special: bool) -> None:
    for shape, options in (
        ((200_003,), {}),
        ((61, 2003), {"axis": 0}),
        ((2003, 61), {"axis": 1}),
        ((403, 512), {"block_size": (1, 32)}),
        ((400, 513), {"block_size": (8, 27)}),
    ):
        batches = [x.view(shape) for x in batches_of(shape, torch.float32, backend.device, special)]
        for count in (1, 2, 3) if backend.isa else (1,):
            with threads(count):
                check(backend, batches[:2], **options)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "channels_last", "expanded"])
def test_gradient(backend: Backend, layout: str) -> None:
    """That of the chain, whatever the strides of the gradient that comes."""
    weight = sample((3, 5, 4, 6), seed=7).permute(3, 2, 1, 0).to(backend.device)
    for options in ({}, {"axis": 1}, {"block_size": (2, 2, 5, 1)}, {"mapping": "fused_affine"}):
        for dtype in DTYPES:
            groups = groups_of(torch.empty(SHAPE), options.get("axis"), options.get("block_size"))
            state, expected = (fresh(groups, device=backend.device) for _ in range(2))
            for seed in range(2):
                ours, theirs = (
                    laid_out(layout, dtype, backend.device, seed).detach().requires_grad_()
                    for _ in range(2)
                )
                y = ops.observe_fake_quantize(
                    ours, *state, eps(backend.device), -8, 7, **options, averaging_constant=0.9
                )
                z = chain(theirs, expected, (-8, 7), **options, averaging_constant=0.9)
                gradients = [
                    torch.autograd.grad(out, x, weight.to(dtype))[0]
                    for out, x in ((y, ours), (z, theirs))
                ]
                assert_same(y, z)
                assert_same(*gradients)
                assert_all_same(state, expected)


def test_graph_only_where_it_is_needed(backend: Backend) -> None:
    def call(x: Tensor) -> Tensor:
        return ops.observe_fake_quantize(
            x, *fresh(device=backend.device), eps(backend.device), 0, 255
        )

    x = sample(1000).to(backend.device)
    assert call(x).grad_fn is None
    x.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        assert call(x).grad_fn is not None
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.uint8, 125)]
    with torch.no_grad():
        assert call(x).grad_fn is None


def test_state_is_updated_for_autograd(backend: Backend) -> None:
    """A graph that saved a scale fails in its backward, instead of using the new one."""
    for needed in (False, True):
        state = fresh(device=backend.device)
        weight = torch.ones(1, device=backend.device, requires_grad=True)
        losses = [(weight * t.detach()).sum() for t in (*state[:2], state[3])]
        versions = [t._version for t in state]
        x = sample(9).to(backend.device).requires_grad_(needed)
        ops.observe_fake_quantize(x, *state, eps(backend.device), 0, 255)
        assert all(t._version > before for t, before in zip(state, versions, strict=True))
        for loss in losses:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("grid", [(0, 255), (-128, 127), (-127, 127), (-8, 7)], ids=str)
def test_is_the_fused_kernel_of_torch(
    backend: Backend, grid: tuple[int, int], axis: int | None, symmetric: bool
) -> None:
    """Values, gradient, range, scale and zero point, with the switches turned midway."""
    groups = (1,) if axis is None else (6,)
    mapping = "fused_symmetric" if symmetric else "fused_affine"
    for constant in (0.01, 0.4, 1.0):
        state = fresh(groups, mapping, backend.device)
        low, high = torch.full(groups, torch.inf), torch.full(groups, -torch.inf)
        scale, zero_point = torch.ones(groups), torch.zeros(groups, dtype=torch.int32)
        batches = batches_of((6, 35), torch.float32, "cpu") * 2
        for i, x in enumerate(batches):
            observe, quantize = SWITCHES[i % 5]
            ours, theirs = x.to(backend.device).requires_grad_(), x.clone().requires_grad_()
            z = torch.fused_moving_avg_obs_fake_quant(
                theirs, torch.tensor([observe]), torch.tensor([quantize]), low, high, scale,
                zero_point, constant, *grid, 0, axis is not None, symmetric,
            )  # fmt: skip
            y = ops.observe_fake_quantize(
                ours, *state, eps(backend.device), *grid,
                switch(observe, torch.int64, backend.device),
                switch(quantize, torch.int64, backend.device),
                mapping, axis, averaging_constant=constant,
            )  # fmt: skip
            assert_same(y, z, i)
            weight = sample(x.shape, seed=i)
            (gradient,) = torch.autograd.grad(y, ours, weight.to(backend.device))
            assert_same(gradient, torch.autograd.grad(z, theirs, weight)[0], i)
            assert_all_same((state[0] + 0.0, state[1] + 0.0), (low + 0.0, high + 0.0), i)
            if quantize:  # while it does not round, torch leaves the scale as it was
                assert_all_same(state[3:], (scale, zero_point), i)


def test_a_failed_call_changes_nothing(backend: Backend) -> None:
    """Also where the failure shows only after the range, the scale, or both are known."""
    x = sample((4, 6)).to(backend.device)
    bad = x.clone()
    bad[3, 5] = torch.nan
    infinite = x.clone()
    infinite[2, 1] = torch.inf
    for groups in ({}, {"axis": 0}, {"axis": 1}, {"block_size": (2, 3)}):
        state = fresh(
            groups_of(x, groups.get("axis"), groups.get("block_size")), device=backend.device
        )
        observe_both(backend, x, state, (0, 255), **groups)
        for name in ("_observe_fake_quantize", "_observe_fake_quantize_mask"):
            for value, nonfinite in (
                (bad, "propagate"),
                (infinite, "propagate"),
                (bad, "raise"),
                (infinite, "raise"),
            ):
                if backend.cuda and nonfinite == "propagate":
                    continue  # a scale is not looked at there
                match = "scale: expected pos" if nonfinite == "propagate" else "1 NaN or infinite"
                with (
                    unchanged(*state),
                    pytest.raises((ValueError, RuntimeError), match=f"observe_fake.*{match}"),
                ):
                    backend.op(name)(
                        value, *state, eps(backend.device), 0, 255, nonfinite=nonfinite, **groups
                    )


def test_a_range_that_is_not_finite_passes_where_nothing_is_rounded(backend: Backend) -> None:
    x = sample(9).to(backend.device)
    x[2] = torch.inf
    state = fresh(device=backend.device)
    y, _ = observe_both(backend, x, state, (0, 255), None, 0, nonfinite="propagate")
    assert_same(y, x)
    assert state[1] == torch.inf
    assert state[2] == 1


@pytest.mark.parametrize("needed", [False, True])
@pytest.mark.parametrize("nonfinite", ["propagate", "raise"])
def test_errors_of_values_are_value_errors(nonfinite: str, needed: bool) -> None:
    state = fresh()
    x = torch.tensor([1.0, torch.nan]).requires_grad_(needed)
    match = "scale: expected positive" if nonfinite == "propagate" else "x: expected finite"
    with unchanged(*state), pytest.raises(ValueError, match=f"^observe_fake_quantize: {match}"):
        ops.observe_fake_quantize(x, *state, eps(), 0, 255, nonfinite=nonfinite)


def arguments(**changed: Any) -> dict[str, Any]:
    names = ("min_val", "max_val", "nonfinite_count", "scale", "zero_point")
    state = dict(zip(names, fresh((3,)), strict=True))
    given = {"x": sample((2, 3)), **state, "eps": eps(), "quant_min": 0, "quant_max": 15}
    return {**given, "axis": 1, **changed}


REJECTED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "axis": ({"axis": 2}, ValueError, r"axis: expected .*\[-2, 1\].* got 2"),
    "channels": ({"axis": 0}, ValueError, r"min_val: expected shape \(2,\).* got shape \(3,\)"),
    "no_axis": ({"axis": None}, ValueError, r"min_val: expected 1 element, got shape \(3,\)"),
    "min_val_dtype": (
        {"min_val": torch.zeros(3).double()},
        TypeError,
        "min_val: expected torch.float32, got torch.float64",
    ),
    "max_val_size": ({"max_val": torch.zeros(2)}, ValueError, r"max_val: expected shape \(3,\)"),
    "count": (
        {"nonfinite_count": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        "nonfinite_count: expected 1 element",
    ),
    "scale_dtype": (
        {"scale": torch.ones(3).half()},
        TypeError,
        "scale: expected torch.float32, got torch.float16",
    ),
    "scale_size": (
        {"scale": torch.ones(2), "zero_point": torch.zeros(2, dtype=torch.int32)},
        ValueError,
        r"scale: expected shape \(3,\).* got shape \(2,\)",
    ),
    "scale_number": ({"scale": 0.1}, TypeError, "scale: expected torch.float32, got float"),
    "zero_point_size": (
        {"zero_point": torch.zeros(2, dtype=torch.int32)},
        ValueError,
        r"zero_point: expected 3 elements, got shape \(2,\)",
    ),
    "zero_point_dtype": (
        {"zero_point": torch.zeros(3)},
        TypeError,
        "zero_point: expected torch.int32 or torch.int64, got torch.float32",
    ),
    "zero_point_float": (
        {"mapping": "affine_float"},
        TypeError,
        "zero_point: expected torch.float32, got torch.int32",
    ),
    "eps_size": ({"eps": torch.ones(3)}, ValueError, "eps: expected 1 element"),
    "eps_dtype": ({"eps": torch.ones(1).double()}, TypeError, "eps: expected torch.float32"),
    "grid": ({"quant_min": 15}, ValueError, "quant_min: expected a value below quant_max"),
    "grid_wide": ({"quant_max": 2**31}, ValueError, "quant_min, quant_max: expected int32"),
    "grid_fused": (
        {"mapping": "fused_symmetric", "quant_min": 14},
        ValueError,
        r"quant_max: expected at least quant_min \+ 2",
    ),
    "mapping": ({"mapping": "linear"}, ValueError, "mapping: expected one of .* got 'linear'"),
    "update": ({"update": "mean"}, ValueError, "update: expected one of .* got 'mean'"),
    "nonfinite": ({"nonfinite": "drop"}, ValueError, "nonfinite: expected one of .* got 'drop'"),
    "constant": ({"averaging_constant": 0.0}, ValueError, "averaging_constant: expected .* got 0"),
    "symmetric_zero_point": (
        {"symmetric_zero_point": 2**31},
        ValueError,
        "symmetric_zero_point: expected an int32 value",
    ),
    "observer_enabled": (
        {"observer_enabled": torch.ones(1)},
        TypeError,
        "observer_enabled: expected torch.uint8 .*, got torch.float32",
    ),
    "fake_quant_enabled": (
        {"fake_quant_enabled": torch.ones(2, dtype=torch.uint8)},
        ValueError,
        r"fake_quant_enabled: expected 1 element, got shape \(2,\)",
    ),
    **REJECTED_BLOCKS,
    "block_shape": (
        {"axis": None, "block_size": [1, 1]},
        ValueError,
        r"min_val: expected shape \(2, 3\), .* got shape \(3,\)",
    ),
    "x_meta": (
        {"x": torch.empty(2, 3, device="meta")},
        ValueError,
        "min_val: expected a tensor on meta beside x, got one on cpu",
    ),
    "eps_meta": (
        {"eps": torch.ones(1, device="meta")},
        ValueError,
        "eps: expected a tensor on cpu beside x, got one on meta",
    ),
    "switch_meta": (
        {"observer_enabled": torch.ones(1, dtype=torch.uint8, device="meta")},
        ValueError,
        "observer_enabled: expected a tensor on cpu beside x, got one on meta",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects(name: str) -> None:
    changed, error, match = REJECTED[name]
    expected = f"^observe_fake_quantize: {match}"
    assert_rejected(ops.observe_fake_quantize, arguments(**changed), error, expected)
    given = arguments(**changed)
    if given["x"].device.type == "cpu":
        given["x"].requires_grad_()
        assert_rejected(ops.observe_fake_quantize, given, error, expected)


@pytest.mark.parametrize("name", REJECTED)
@any_isa
def test_kernel_rejects(backend: Backend, name: str) -> None:
    if not backend.cuda:
        for op in ("_observe_fake_quantize", "_observe_fake_quantize_mask"):
            assert_rejected(backend.op(op), arguments(**REJECTED[name][0]), Exception)


@any_isa
def test_rejects_other_inputs(backend: Backend) -> None:
    for x, came in not_dense_real_float().values():
        expected = f"^observe_fake_quantize: x: expected a dense tensor of float32, .*, {came}"
        assert_rejected(ops.observe_fake_quantize, arguments(x=x), TypeError, expected)
        if not backend.cuda:
            assert_rejected(backend.op("_observe_fake_quantize"), arguments(x=x), Exception)


def test_meta() -> None:
    x = torch.empty(4, 5, device="meta").t()
    for options in ({}, {"axis": 0}, {"block_size": (5, 2)}):
        groups = groups_of(x, options.get("axis"), options.get("block_size"))
        y = ops.observe_fake_quantize(
            x, *fresh(groups, device="meta"), eps("meta"), 0, 255, **options
        )
        assert (y.shape, y.stride(), y.device.type) == ((5, 4), (1, 5), "meta")


@pytest.mark.parametrize("needed", [False, True])
@pytest.mark.parametrize("options", [{}, {"axis": 1}, {"block_size": (2, 3)}], ids=str)
def test_compiles(options: dict[str, Any], needed: bool) -> None:
    """One graph without a break; values, gradient and state are those of eager."""

    def call(x: Tensor, *state: Tensor) -> Tensor:
        return ops.observe_fake_quantize(
            x, *state, eps_tensor, -8, 7, averaging_constant=0.5, mapping="symmetric", **options
        )

    eps_tensor = eps()
    torch._dynamo.reset()
    compiled: Callable[..., Tensor] = torch.compile(call, backend="aot_eager", fullgraph=True)
    groups = groups_of(torch.empty(4, 6), options.get("axis"), options.get("block_size"))
    ours, theirs = fresh(groups), fresh(groups)
    for seed in range(3):
        x, z = (sample((4, 6), seed=seed).requires_grad_(needed) for _ in range(2))
        y, expected = compiled(x, *ours), call(z, *theirs)
        assert_same(y, expected, seed)
        assert_all_same(ours, theirs, seed)
        if needed:
            (y * y).sum().backward()
            (expected * expected).sum().backward()
            assert_same(x.grad, z.grad, seed)


def test_opcheck() -> None:
    for name, x in opcheck_inputs().items():
        for op in ("_observe_fake_quantize", "_observe_fake_quantize_mask"):
            opcheck(op, x, *fresh(), eps(), -8, 7)
            if name in ("sliced", "channels_last"):
                opcheck(op, x, *fresh((4,)), eps(), -8, 7, axis=1, mapping="symmetric")
                block_size = (2, 2, 5, 1)
                state = fresh(grid_of(x, block_size))
                opcheck(op, x, *state, eps(), -8, 7, block_size=block_size)
        if name in ("odd", "transposed"):
            opcheck("observe_fake_quantize", x, *fresh(), eps(), -8, 7)
    on = switch(1)
    options: dict[str, Any] = {"update": "running", "nonfinite": "propagate"}
    opcheck("_observe_fake_quantize", sample(9), *fresh(), eps(), 0, 255, on, on, **options)


def test_opcheck_with_gradient() -> None:
    opcheck("observe_fake_quantize", sample(9).requires_grad_(), *fresh(), eps(), -8, 7)

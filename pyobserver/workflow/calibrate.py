"""``calibrate``: run a model over data and choose the scales of its inputs, outputs and weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..dtypes import PER_CHANNEL, dtype_bounds
from ..observers import (
    HistogramObserver,
    HistogramObserverBase,
    PerChannelMinMaxObserver,
    calculate_qparams,
)
from .kept import Kept, PackedHistogram, Values
from .progress import track
from .result import CalibrationResult, Kind, Site, site_name
from .sites import (
    EMBEDDINGS,
    TRANSPOSED,
    Selection,
    map_inputs,
    map_tensors,
    select_modules,
    weight_of,
)
from .sqnr import ValueSample

_DEFAULT_ACTIVATION = HistogramObserver.with_args(dtype=torch.uint8)
_DEFAULT_WEIGHT = PerChannelMinMaxObserver.with_args(
    dtype=torch.int8, qscheme=torch.per_channel_symmetric
)
_BYTES_PENDING = 2**28  # of the observers of weights that wait for their scales


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] | None,
    modules: Selection = None,
    *,
    activation: Callable[..., Any] | None = _DEFAULT_ACTIVATION,
    weight: Callable[..., Any] | None = _DEFAULT_WEIGHT,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    progress: bool = True,
) -> CalibrationResult:
    """Run ``model`` over ``batches`` and choose how its tensors are to be quantized.

    The chosen modules are watched by hooks, in eval mode and without gradients; afterwards the
    hooks are gone and every module is in the mode it was in. Every floating-point tensor among a
    module's arguments and results is a site of its own with its own observer, called
    ``<module>.input``, ``<module>.output.1`` and so on; a module that is called several times
    feeds the same sites each time. Of an embedding only the weight is a site: its inputs are
    indices and its outputs rows of the weight.

    The SQNR of a site is ``10 * log10(sum(x**2) / sum((x - quantized x)**2))`` in dB with the
    scale chosen. For a weight it is exact. For inputs and outputs it is measured on a sample of
    2048 values, each drawn evenly from all that the site saw: its standard error is about 0.2 dB
    on normal data. Values that are clipped and rare it mostly misses, and where it has one, that
    weighs too much. The draws are seeded, and leave torch's global generators alone.

    Where the observer keeps a histogram, ``predicted_sqnr`` is the SQNR that this leads to expect,
    of all values. Either is infinite where quantizing changes nothing (as of zeros alone, or of no
    values), and NaN where the scale is not a positive number.

    **What the result keeps.** Of each site with a histogram observer, on the CPU, so that
    :meth:`CalibrationResult.solve` can choose again without the data: the occupied bins of the
    histogram (12 bytes each; about a thousand in a log histogram of a million normal values) and
    the sample (8 KiB, per channel 24). A weight is referenced and not copied, so it lives as long
    as the result; once it is changed in place, its sample stands for it.

    Args:
        model: any module. Its tensors and the batches have to be on the same device already.
        batches: what to run it over; each is fed as ``forward`` says. None only with
            ``activation=None``, where the model is not run.
        modules: which modules: a type, a name pattern (``"encoder.*.fc?"``, as of ``fnmatch``; a
            ``*`` also crosses dots, and containers count like others), a list of types and
            patterns, or a predicate ``(name, module) -> bool``. None: linear layers,
            convolutions, transposed ones and embeddings.
        activation: a class or factory of the observers of inputs and outputs, as
            ``HistogramObserver.with_args(dtype=torch.int8)``; None leaves those out. Observers of
            torch.ao serve as well. Default: histogram, uint8, per tensor, affine.
        weight: the same of the weights: each chosen module's floating-point ``weight`` of two or
            more dimensions; None leaves them out. Where a per-channel class or ``with_args``
            factory leaves ``ch_axis`` open, it is that of the output channels: 1 for transposed
            convolutions, else 0. Default: min/max, int8, per channel, symmetric.
        forward: ``forward(model, batch)`` runs one batch. None: a tuple or list is
            ``model(*batch)``, a mapping ``model(**batch)``, anything else ``model(batch)``.
        progress: show a bar on stderr, where that is a terminal.

    Returns:
        The :class:`CalibrationResult`: one :class:`Site` for each tensor.

    Raises:
        ValueError: a selection that matches nothing, no batch, both observers None, or what an
            observer says to its tensor (with the name of the site).
        TypeError: an argument of the wrong kind, or an observer that has no scale to give.
        Exception: whatever ``model`` and ``batches`` raise, KeyboardInterrupt included. It carries
            what was seen until then in an attribute: ``error.calibration``, a CalibrationResult.

    Warns:
        UserWarning: once, if NaN or infinite values were seen, with the sites and counts.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"calibrate: model: expected a torch.nn.Module, got {model!r}")
    if activation is None and weight is None:
        raise ValueError(
            "calibrate: activation, weight: expected an observer for one, got None twice"
        )
    if activation is not None and not isinstance(batches, Iterable):
        raise TypeError(f"calibrate: batches: expected an iterable of batches, got {batches!r}")
    if forward is not None and not callable(forward):
        raise TypeError(
            f"calibrate: forward: expected a callable (model, batch) or None, got {forward!r}"
        )
    for argument, factory in (("activation", activation), ("weight", weight)):
        if factory is not None:
            _check_factory(argument, factory)
    calibration = _Calibration(select_modules(model, modules))
    runs = activation is not None
    try:
        with torch.no_grad(), eval_mode(model):
            if weight is not None:
                calibration.observe_weights(weight)
            if activation is not None and batches is not None:
                calibration.run(model, batches, activation, forward or _feed, progress)
    except BaseException as error:
        error.calibration = calibration.result(runs)  # type: ignore[attr-defined]
        raise
    result = calibration.result(runs)
    nonfinite = [f"{site.name} ({site.nonfinite})" for site in result.values() if site.nonfinite]
    if nonfinite:
        warnings.warn(
            f"calibrate: NaN or infinite values were seen at {', '.join(nonfinite)}", stacklevel=2
        )
    return result


class _Watch:
    """An input or output while it is being observed."""

    def __init__(self, observer: Any, generator: torch.Generator):
        self.observer = observer
        self.sample = ValueSample(_axis(observer), generator)
        self.tensors = 0

    def see(self, x: Tensor) -> None:
        self.observer(x)
        self.sample.add(x)
        self.tensors += 1


class _Seen(NamedTuple):
    """A tensor of a module, and what was seen of it."""

    module: str
    tensor: str
    observer: Any
    tensors: int
    values: Values


class _Calibration:
    """The observers of the chosen modules, and what they have seen so far."""

    def __init__(self, modules: dict[str, nn.Module]):
        self.modules = modules
        self.weights: list[_Seen] = []  # that wait for their scales
        self.sites: list[Site] = []
        self.kept: dict[str, Kept] = {}
        self.watches: dict[tuple[str, str], _Watch] = {}  # by module and tensor
        self.generators: dict[torch.device, torch.Generator] = {}
        self.called: set[str] = set()
        self.batches = 0

    def observe_weights(self, factory: Callable[..., Any]) -> None:
        pending = 0
        for name, module in self.modules.items():
            weight = weight_of(module)
            if weight is None:
                continue
            observer = _weight_observer(factory, module).to(weight.device)
            with _naming(name, "weight"):
                observer(weight.detach())
            sample = ValueSample(_axis(observer), _generator(weight.device))
            sample.add(weight.detach())
            values = Values(sample.taken(), weight.detach())
            self.weights.append(_Seen(name, "weight", observer, 1, values))
            pending += _bytes_of(observer)
            if pending > _BYTES_PENDING:
                self.choose(self.weights)
                self.weights, pending = [], 0

    def watch(self, name: str, factory: Callable[..., Any]) -> Iterator[RemovableHandle]:
        """Hook a module's inputs and outputs."""

        def see(path: str, x: Tensor) -> Tensor:
            watch = self.watches.get((name, path))
            if watch is None:
                watch = _Watch(factory().to(x.device), self._generator(x.device))
                self.watches[name, path] = watch
            with _naming(name, path):
                watch.see(x)
            return x

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.called.add(name)
            if not isinstance(module, EMBEDDINGS):
                map_inputs(args, kwargs, see)

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not isinstance(module, EMBEDDINGS):
                map_tensors("output", output, see)

        module = self.modules[name]
        yield module.register_forward_pre_hook(enter, with_kwargs=True)
        yield module.register_forward_hook(leave)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self.generators:
            self.generators[device] = _generator(device)
        return self.generators[device]

    def run(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        factory: Callable[..., Any],
        forward: Callable[[nn.Module, Any], Any],
        progress: bool,
    ) -> None:
        with ExitStack() as stack:
            for name in self.modules:
                for handle in self.watch(name, factory):
                    stack.callback(handle.remove)
            for batch in stack.enter_context(closing(track(batches, "calibrate", progress))):
                forward(model, batch)
                self.batches += 1
        if self.batches == 0:
            raise ValueError("calibrate: batches: expected at least one batch, got none")

    def result(self, run: bool) -> CalibrationResult:
        """What was seen so far, module by module; ``run``: whether they were to be called."""
        seen = [
            _Seen(*at, watch.observer, watch.tensors, Values(watch.sample.taken()))
            for at, watch in self.watches.items()
            if watch.tensors > 0
        ]
        self.choose(seen + self.weights)
        modules = list(self.modules)
        kinds = ("input", "weight", "output")
        order = sorted(
            self.sites, key=lambda site: (modules.index(site.module), kinds.index(site.kind))
        )
        never_called = [name for name in modules if run and name not in self.called]
        return CalibrationResult(order, self.batches, never_called, self.kept)

    def choose(self, seen: list[_Seen]) -> None:
        """The scales of what was seen, those of histograms in one call."""
        with warnings.catch_warnings():
            # of values that are not finite, calibrate warns once for all sites
            warnings.simplefilter("ignore")
            qparams = calculate_qparams(one.observer for one in seen)
        for one, (scale, zero_point) in zip(seen, qparams, strict=True):
            site, kept = _site(one, scale.detach().reshape(-1), zero_point.detach().reshape(-1))
            self.sites.append(site)
            if kept is not None:
                self.kept[site.name] = kept


def _site(seen: _Seen, scale: Tensor, zero_point: Tensor) -> tuple[Site, Kept | None]:
    """The choice of an observer, and the statistic that it is from."""
    observer, kept, predicted = seen.observer, None, math.nan
    quant_min, quant_max, axis = observer.quant_min, observer.quant_max, _axis(observer)
    none = scale.new_empty(0)
    scale, zero_point = scale.cpu().clone(), zero_point.cpu().clone()
    if isinstance(observer, HistogramObserverBase):
        packed = PackedHistogram.of(observer.statistic())
        grid = observer._grid()
        grid = grid._replace(eps=grid.eps.cpu().clone())
        kept = Kept(packed, seen.values, observer.method, dict(observer._options()), grid)
        predicted = packed.expected_sqnr(scale, zero_point, quant_min, quant_max)
    site = Site(
        module=seen.module,
        kind=cast(Kind, seen.tensor.partition(".")[0]),
        tensor=seen.tensor,
        observer=type(observer).__name__,
        method=None if kept is None else kept.method,
        dtype=observer.dtype,
        quant_min=quant_min,
        quant_max=quant_max,
        qscheme=observer.qscheme,
        ch_axis=axis,
        scale=scale,
        zero_point=zero_point,
        min_val=getattr(observer, "min_val", none).reshape(-1).cpu().clone(),
        max_val=getattr(observer, "max_val", none).reshape(-1).cpu().clone(),
        sqnr=seen.values.sqnr(scale, zero_point, quant_min, quant_max, axis),
        predicted_sqnr=predicted,
        tensors=seen.tensors,
        nonfinite=int(getattr(observer, "nonfinite_count", 0)),
    )
    return site, kept


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def _bytes_of(observer: nn.Module) -> int:
    return sum(buffer.numel() * buffer.element_size() for buffer in observer.buffers())


def _axis(observer: Any) -> int | None:
    """The channel axis of a per-channel observer."""
    return observer.ch_axis if observer.qscheme in PER_CHANNEL else None


def _weight_observer(factory: Callable[..., Any], module: nn.Module) -> Any:
    observer = factory()
    if isinstance(module, TRANSPOSED) and _axis(observer) is not None:
        bound = getattr(getattr(factory, "p", None), "keywords", None)
        if isinstance(factory, type) or (bound is not None and "ch_axis" not in bound):
            return factory(ch_axis=1)
    return observer


def _check_factory(argument: str, factory: Any) -> None:
    if not callable(factory) or isinstance(factory, nn.Module):
        raise TypeError(
            f"calibrate: {argument}: expected a class or factory of observers or None, "
            f"got {factory!r}"
        )
    observer = factory()
    bounds = (getattr(observer, "quant_min", None), getattr(observer, "quant_max", None))
    if (
        not isinstance(observer, nn.Module)
        or not hasattr(observer, "calculate_qparams")
        or not hasattr(observer, "qscheme")
        or not all(isinstance(bound, int) for bound in bounds)
    ):
        raise TypeError(
            f"calibrate: {argument}: expected an observer that chooses a scale and zero point on "
            f"an integer grid, got {observer!r}"
        )
    if getattr(observer, "block_size", None) is not None:
        raise TypeError(
            f"calibrate: {argument}: expected an observer of one scale, or of one a channel, "
            f"got {type(observer).__name__}"
        )
    dtype_bounds(cast(torch.dtype, observer.dtype))


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode for a while, and then in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _naming(module: str, tensor: str) -> Iterator[None]:
    """Put the name of the site before what an observer says to its tensor."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"calibrate: {site_name(module, tensor)}: {error}") from error


def _feed(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch)

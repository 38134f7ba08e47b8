"""What a calibration found, and its application to a model."""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import ranges
from ..dtypes import PER_CHANNEL, SYMMETRIC, dtype_bounds
from ..observers.base import StatisticsModule
from ..ops.fake_quantize import fake_quantize
from .comparison import Comparison, Sqnr
from .kept import Kept, choose_all
from .regrid import dtype_holding, regrid, scheme_of
from .sites import map_inputs, map_tensors, weight_of
from .table import aligned

Kind: TypeAlias = Literal["input", "output", "weight"]

_FORMAT = "pyobserver.calibration"
_VERSION = 2  # 2: a site's method and predicted_sqnr, and what was kept of it


@dataclass(frozen=True, eq=False)
class Site:
    """One tensor of the model, and how it is to be quantized.

    Attributes:
        module: the name of the module; "" for the model itself.
        kind: ``"input"``, ``"output"`` or ``"weight"``.
        tensor: which tensor of the module: ``input``, ``output`` or ``weight``, with the path to
            it where there are several: ``input.1``, ``output.0.hidden``, ``input.mask``.
        observer: the class name of the observer.
        method: the method that chose the scale from the observer's histogram, see
            :func:`pyobserver.ranges.solve`; None where it keeps none.
        dtype, quant_min, quant_max, qscheme: the quantized type, the integer grid, the scheme.
        ch_axis: the channel axis, or None for one scale.
        scale: float32 ``(1,)`` or ``(channels,)``, on the CPU.
        zero_point: as many elements; int32 or int64 (float32 for
            ``per_channel_affine_float_qparams``).
        min_val, max_val: float32, the range that the observer's statistics span, as many elements
            (none for an observer that keeps none).
        sqnr: signal-to-quantization-noise ratio in dB, as measured, see :func:`calibrate`.
        predicted_sqnr: the one that the histogram leads to expect; NaN where there is none.
        tensors: how many tensors were seen.
        nonfinite: how many NaN and infinite values were seen.
    """

    module: str
    kind: Kind
    tensor: str
    observer: str
    method: str | None
    dtype: torch.dtype
    quant_min: int
    quant_max: int
    qscheme: torch.qscheme
    ch_axis: int | None
    scale: Tensor
    zero_point: Tensor
    min_val: Tensor
    max_val: Tensor
    sqnr: float
    predicted_sqnr: float
    tensors: int
    nonfinite: int

    @property
    def name(self) -> str:
        """``<module>.<tensor>``."""
        return site_name(self.module, self.tensor)

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest value of the grid, shaped as scale; the rest is clipped."""
        zero = self.zero_point.double()
        low, high = (self.quant_min - zero) * self.scale, (self.quant_max - zero) * self.scale
        return low.float(), high.float()


def site_name(module: str, tensor: str) -> str:
    return f"{module}.{tensor}" if module else tensor


class CalibrationResult(Mapping[str, Site]):
    """The sites of a calibration by name: ``result["fc.weight"].scale``.

    ``print(result)`` shows a table; per-channel sites show the span of their scales and ranges.
    Sites with a histogram observer can be solved again: :meth:`solve`, :meth:`compare`.

    Attributes:
        batches: how many batches the model took without an error.
        never_called: the names of the chosen modules that no batch reached.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        batches: int,
        never_called: Sequence[str],
        kept: Mapping[str, Kept] | None = None,
    ):
        self._sites = {site.name: site for site in sites}
        self.batches = batches
        self.never_called = tuple(never_called)
        self._kept = dict(kept or {})

    def __getitem__(self, name: str) -> Site:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __repr__(self) -> str:
        return f"<CalibrationResult of {len(self)} sites, {self.batches} batches>"

    def __str__(self) -> str:
        shown = ("site", "observer", "method", "type", "scale", "zero point", "range")
        header = (*shown, "SQNR dB", "predicted", "seen")
        lines = aligned([header, *(_row(site) for site in self.values())], numbers=3)
        lines.append(f"{self.batches} batches")
        if self.never_called:
            lines.append(f"never called: {', '.join(self.never_called)}")
        nonfinite = [f"{site.name} {site.nonfinite}" for site in self.values() if site.nonfinite]
        if nonfinite:
            lines.append(f"NaN or infinite values: {', '.join(nonfinite)}")
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a file that ``torch.load(path, weights_only=True)`` reads, too.

        With the histograms, so that what is loaded can be solved again; of a weight, whose SQNR is
        exact here, the sample is saved.
        """
        sites = []
        for site in self.values():
            entry = asdict(site)
            entry.update(dtype=_short(site.dtype), qscheme=_short(site.qscheme))
            sites.append(entry)
        torch.save(
            {
                "format": _FORMAT,
                "version": _VERSION,
                "batches": self.batches,
                "never_called": list(self.never_called),
                "sites": sites,
                "kept": {name: kept.to_dict() for name, kept in self._kept.items()},
            },
            path,
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CalibrationResult:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file holds something else, or a later version of the format.
        """
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(saved, dict) or saved.get("format") != _FORMAT:
            raise ValueError(f"load: path: expected a saved CalibrationResult, got {path!r}")
        if saved["version"] > _VERSION:
            raise ValueError(
                f"load: path: expected format version {_VERSION} or earlier, "
                f"got {saved['version']} in {path!r}"
            )
        sites = []
        for entry in saved["sites"]:
            types = {key: getattr(torch, entry[key]) for key in ("dtype", "qscheme")}
            since_2 = {"method": None, "predicted_sqnr": math.nan}
            sites.append(Site(**{**since_2, **entry, **types}))
        kept = {name: Kept.from_dict(one) for name, one in saved.get("kept", {}).items()}
        return cls(sites, saved["batches"], saved["never_called"], kept)

    def histogram(self, name: str) -> ranges.Histogram:
        """What was collected of a site, for :mod:`pyobserver.ranges`: on the CPU, a copy.

        Raises:
            KeyError: there is no such site.
            ValueError: its observer keeps no histogram.
        """
        if name not in self._kept:
            raise ValueError(
                f"histogram: name: expected a site with a histogram, got {name!r} "
                f"of a {self[name].observer}"
            )
        return self._kept[name].histogram.unpacked()

    def solve(
        self,
        method: str | None = None,
        bits: int | None = None,
        *,
        sites: str | Sequence[str] | None = None,
        quant_min: int | None = None,
        quant_max: int | None = None,
        symmetric: bool | None = None,
        narrow_range: bool = False,
        scale_constraint: str | None = None,
        eps: float | None = None,
        **options: Any,
    ) -> CalibrationResult:
        """Choose the scales again from what was collected, by any method and for any grid.

        The same scales, to the bit, as calibrating again with that method and grid. What is left
        out is as each site has it; so ``solve()`` changes nothing. A site whose observer keeps no
        histogram stays as it is. It takes no data and no model, and leaves this result alone.

        Args:
            method, options: see :func:`pyobserver.ranges.solve`.
            bits: the grid ``0 .. 2^bits - 1``, or ``-2^(bits-1) .. 2^(bits-1) - 1`` where that of
                the site holds negative integers.
            sites: name patterns of the sites to solve (``"*.input"``, as of ``fnmatch``); None:
                all. The others stay as they are.
            quant_min, quant_max: both or neither: bounds instead of bits.
            symmetric: zero lies in the middle: 0, or half the levels where ``quant_min`` is 0.
            narrow_range, scale_constraint, eps: see :meth:`pyobserver.ranges.Grid.of`.

        Returns:
            A new result. A site's dtype stays, or is the next that holds the grid. Where SQNR is
            measured on a sample, it is the same one.

        Raises:
            ValueError: a pattern that matches nothing, no site with a histogram, or a bad argument.
            TypeError: an option that the method does not have.

        Warns:
            UserWarning: names the sites that were to be solved and keep no histogram.
        """
        names = self._matching("solve", sites)
        stays = [name for name in names if name not in self._kept]
        names = self._solvable("solve", names)
        again = {}
        for name in names:
            kept = self._kept[name]
            asked, of_method = method, options
            if asked is None:
                asked, of_method = kept.method, {**kept.options, **options}
            ranges.check_method("solve", asked, options)
            again[name] = replace(
                kept,
                grid=regrid(
                    kept.grid, bits, quant_min, quant_max, symmetric, narrow_range,
                    scale_constraint, eps,
                ),
                method=asked,
                options=of_method,
            )  # fmt: skip
        solved = self._solved(again)
        if stays:
            warnings.warn(
                "solve: these sites stay as they are, for their observers keep no histogram: "
                + ", ".join(f"{name} ({self[name].observer})" for name in stays),
                stacklevel=2,
            )
        return CalibrationResult(
            [solved.get(name, site) for name, site in self.items()],
            self.batches,
            self.never_called,
            {**self._kept, **again},
        )

    def compare(
        self,
        methods: str | Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
        bits: int | Sequence[int] = (4, 8),
        sites: str | Sequence[str] | None = None,
    ) -> Comparison:
        """The SQNR of every method at every width, predicted and measured, from what was collected.

        Predicted is what the histogram leads to expect, of all values. Measured is as
        :func:`calibrate` measures: exact on a weight (in the process that calibrated, while it is
        unchanged), elsewhere on the sample that the result keeps, which tells little of values
        that are clipped and rare.

        Args:
            methods: which, see :func:`pyobserver.ranges.solve`, or their options by method:
                ``{"minmax": {}, "percentile": {"percentile": 0.999}}``. None: all of them.
            bits: the widths; grids are as for :meth:`solve`.
            sites: name patterns; None: all sites with a histogram.

        Returns:
            The :class:`Comparison`; ``print`` shows it as a table.

        Raises:
            ValueError, TypeError: as :meth:`solve`.
        """
        names = self._solvable("compare", self._matching("compare", sites))
        if methods is None:
            methods = tuple(ranges.METHODS)
        elif isinstance(methods, str):
            methods = (methods,)
        if not isinstance(methods, Mapping):
            methods = {method: {} for method in methods}
        widths = (bits,) if isinstance(bits, int) else tuple(bits)
        for argument, given in (("methods", methods), ("bits", widths)):
            if not given:
                raise ValueError(f"compare: {argument}: expected at least one, got none")
        again: dict[tuple[str, int], dict[str, Kept]] = {}
        for method, options in methods.items():
            ranges.check_method("compare", method, options)
            for width in widths:
                again[method, width] = {
                    name: replace(
                        self._kept[name],
                        method=method,
                        options=options,
                        grid=regrid(self._kept[name].grid, width),
                    )
                    for name in names
                }
        return Comparison(
            {
                cell: {
                    name: Sqnr(site.predicted_sqnr, site.sqnr)
                    for name, site in self._solved(sites_of_cell).items()
                }
                for cell, sites_of_cell in again.items()
            }
        )

    def _matching(self, owner: str, sites: str | Sequence[str] | None) -> list[str]:
        """The sites that are meant, in order."""
        if sites is None:
            return list(self)
        patterns = (sites,) if isinstance(sites, str) else tuple(sites)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in self):
                raise ValueError(
                    f"{owner}: sites: expected a name pattern that matches, got {pattern!r}; "
                    f"the sites are {', '.join(self)}"
                )
        return [name for name in self if any(fnmatchcase(name, p) for p in patterns)]

    def _solvable(self, owner: str, names: Sequence[str]) -> list[str]:
        kept = [name for name in names if name in self._kept]
        if not kept:
            observers = sorted({self[name].observer for name in names})
            raise ValueError(
                f"{owner}: sites: expected one at least whose observer keeps a histogram, "
                f"got {', '.join(observers) or 'no sites'}"
            )
        return kept

    def _solved(self, again: Mapping[str, Kept]) -> dict[str, Site]:
        """Sites chosen anew."""
        solved = {}
        for (name, kept), chosen in zip(again.items(), choose_all([*again.values()]), strict=True):
            site, grid = self[name], kept.grid
            bounds = grid.quant_min, grid.quant_max
            solved[name] = replace(
                site,
                method=kept.method,
                dtype=dtype_holding(site.dtype, grid),
                quant_min=grid.quant_min,
                quant_max=grid.quant_max,
                qscheme=scheme_of(site.qscheme, grid),
                scale=chosen.scale,
                zero_point=chosen.zero_point,
                predicted_sqnr=chosen.predicted_sqnr,
                sqnr=kept.values.sqnr(chosen.scale, chosen.zero_point, *bounds, site.ch_axis),
            )
        return solved

    def apply(self, model: nn.Module, *, inplace: bool = False) -> nn.Module:
        """Fake-quantize the sites of a model with the scales that were found.

        Inputs and outputs go through :func:`pyobserver.ops.fake_quantize` in hooks, weights in a
        parametrization, so that gradients pass straight through to them and the optimizer still
        holds the float weights. A tensor that comes up where none was calibrated passes as it is.

        Args:
            model: the one calibrated, or another of the same architecture.
            inplace: change ``model`` itself instead of a deep copy. :meth:`remove` undoes it.

        Returns:
            The model that is fake-quantized. The scales are no part of its ``state_dict``.

        Raises:
            ValueError: the model lacks a site, has a weight of another shape, or is fake-quantized
                already, or a scale is not finite; it is left as it was.
        """
        if not inplace:
            model = copy.deepcopy(model)
        by_module: dict[str, list[Site]] = {}
        for site in self.values():
            by_module.setdefault(site.module, []).append(site)
        modules = dict(model.named_modules(remove_duplicate=False))
        _check_sites(modules, by_module)
        for name, sites in by_module.items():
            _quantize_module(modules[name], sites)
        return model

    @staticmethod
    def remove(model: nn.Module) -> None:
        """Take off, in place, what :meth:`apply` put on a model; its weights are the float ones."""
        for module in list(model.modules()):
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if isinstance(hook, _SiteHook)]:
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    module._forward_hooks_with_kwargs.pop(key, None)
            steps = _weight_parametrizations(module)
            ours = [i for i, step in enumerate(steps) if isinstance(step, _SiteFakeQuantize)]
            if ours and len(steps) == 1:
                # deep copies share the class that torch makes for a parametrized module, and it
                # strips the class: give it one of the module's own
                shared = type(module)
                module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            elif ours:
                del steps[ours[0]]  # the others are the caller's


class _SiteFakeQuantize(StatisticsModule):
    """The fake-quantize of one site."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, site: Site, device: torch.device | None = None):
        super().__init__()
        self.quant_min, self.quant_max = site.quant_min, site.quant_max
        self.ch_axis = site.ch_axis
        # copies: the result may be applied to several models
        self.register_buffer("scale", site.scale.clone().to(device), persistent=False)
        self.register_buffer("zero_point", site.zero_point.clone().to(device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(
            x, self.scale, self.zero_point, self.quant_min, self.quant_max, self.ch_axis
        )


class _SiteHook:
    """A hook that fake-quantizes the calibrated tensors among those that pass."""

    def __init__(self, sites: list[Site]):
        self.sites = {site.tensor: _SiteFakeQuantize(site) for site in sites}

    def quantize(self, path: str, x: Tensor) -> Tensor:
        site = self.sites.get(path)
        if site is None:
            return x
        # a hook is no submodule, so the scales do not follow the model to its device
        if site.scale.device != x.device:
            site.to(x.device)
        return site(x)


class _InputHook(_SiteHook):
    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return map_inputs(args, kwargs, self.quantize)


class _OutputHook(_SiteHook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return map_tensors("output", output, self.quantize)


def _quantize_module(module: nn.Module, sites: list[Site]) -> None:
    inputs = [site for site in sites if site.kind == "input"]
    outputs = [site for site in sites if site.kind == "output"]
    if inputs:
        module.register_forward_pre_hook(_InputHook(inputs), with_kwargs=True)
    if outputs:
        module.register_forward_hook(_OutputHook(outputs))
    for site in sites:
        if site.kind == "weight":
            step = _SiteFakeQuantize(site, module.weight.device)  # type: ignore[arg-type]
            parametrize.register_parametrization(module, "weight", step)


def _check_sites(modules: dict[str, nn.Module], by_module: dict[str, list[Site]]) -> None:
    problems = []
    for name, sites in by_module.items():
        module = modules.get(name)
        if module is None:
            problems.append(f"no module {name!r} for {', '.join(site.name for site in sites)}")
            continue
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        steps = (*hooks, *_weight_parametrizations(module))
        if any(isinstance(step, (_SiteHook, _SiteFakeQuantize)) for step in steps):
            problems.append(f"{name!r} is fake-quantized already (take that off with remove)")
        problems += [problem for site in sites for problem in _unfit(module, site)]
    if problems:
        raise ValueError(
            "apply: model: expected one with the sites of the calibration, got: "
            + "; ".join(problems)
        )


def _unfit(module: nn.Module, site: Site) -> Iterator[str]:
    """Why a tensor of a module cannot be quantized as the site says."""
    if not bool(((site.scale > 0) & site.scale.isfinite()).all()):
        yield f"{site.name} with a scale that is not positive and finite"
    if site.kind != "weight":
        return
    weight = weight_of(module)
    if weight is None:
        yield f"no weight for {site.name}"
    elif site.ch_axis is not None and weight.shape[site.ch_axis] != site.scale.numel():
        yield (
            f"{site.name} of shape {tuple(weight.shape)} for {site.scale.numel()} scales "
            f"on axis {site.ch_axis}"
        )


def _weight_parametrizations(module: nn.Module) -> Any:
    if not parametrize.is_parametrized(module, "weight"):
        return ()
    return module.parametrizations["weight"]  # type: ignore[index]


def _short(of_torch: torch.dtype | torch.qscheme) -> str:
    return str(of_torch).removeprefix("torch.")


def _row(site: Site) -> tuple[str, ...]:
    grid = (site.quant_min, site.quant_max)
    kind = _short(site.dtype)
    if grid != dtype_bounds(site.dtype):
        kind += f" {grid[0]}..{grid[1]}"
    kind += " symmetric" if site.qscheme in SYMMETRIC else " affine"
    if site.qscheme in PER_CHANNEL:
        kind += f" axis {site.ch_axis}"
    low, high = site.range
    return (
        site.name,
        site.observer,
        site.method or "-",
        kind,
        _span(site.scale),
        _span(site.zero_point),
        f"[{float(low.min()):.4g}, {float(high.max()):.4g}]",
        f"{site.sqnr:.1f}",
        "-" if site.method is None else f"{site.predicted_sqnr:.1f}",
        str(site.tensors),
    )


def _span(values: Tensor) -> str:
    least, greatest = float(values.min()), float(values.max())
    return f"{least:.4g}" if least == greatest else f"{least:.4g} .. {greatest:.4g}"

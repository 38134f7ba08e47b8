"""Which tensors a model minds being quantized."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..workflow.calibrate import eval_mode
from ..workflow.progress import track
from ..workflow.table import aligned
from .fake_quantize import FakeQuantize, calibrated
from .tracing import as_inputs

_ROLES = {"activation_post_process": "output", "weight_fake_quant": "weight"}
_ROW = 0.26  # inches of the picture


class Sensitive(NamedTuple):
    """What quantizing one tensor alone does to a model.

    Attributes:
        name, role: as a template names it.
        error: how far the model's outputs are then from those in float.
        dtype: the type that it was quantized to.
    """

    name: str
    role: str
    error: float
    dtype: str


class Sensitivity(Sequence[Sensitive]):
    """The tensors of a model, the most sensitive first; fit for a ``SensitivityTemplate``.

    ``print(sensitivity)`` shows a table.
    """

    def __init__(self, ranked: Iterable[Sensitive]):
        self._ranked = tuple(ranked)

    @overload
    def __getitem__(self, index: int) -> Sensitive: ...
    @overload
    def __getitem__(self, index: slice) -> Sensitivity: ...
    def __getitem__(self, index: int | slice) -> Sensitive | Sensitivity:
        if isinstance(index, slice):
            return Sensitivity(self._ranked[index])
        return self._ranked[index]

    def __len__(self) -> int:
        return len(self._ranked)

    def __repr__(self) -> str:
        return f"<Sensitivity of {len(self)} tensors>"

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("name", "role", "dtype", "error")]
        rows += [(one.name, one.role, one.dtype, f"{one.error:.3e}") for one in self]
        return "\n".join(aligned(rows, numbers=1))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the errors as bars, the most sensitive on top.

        Args:
            path: the file to write, PNG or whatever else its suffix says.

        Raises:
            ImportError: matplotlib is missing; says what to install.
        """
        try:
            figures = importlib.import_module("matplotlib.figure")
            backend = importlib.import_module("matplotlib.backends.backend_agg")
        except ImportError as error:
            raise ImportError(f"plot: {error}; try: pip install 'pyobserver[demo]'") from error
        colours = {"output": "#0072B2", "weight": "#E69F00"}  # of Okabe and Ito
        figure = figures.Figure(figsize=(9, 1.2 + _ROW * len(self)), dpi=110, layout="constrained")
        backend.FigureCanvasAgg(figure)
        ax = figure.subplots()
        for role, colour in colours.items():
            rows = [(row, one.error) for row, one in enumerate(self) if one.role == role]
            if rows:
                ax.barh(*zip(*rows, strict=True), color=colour, label=role)
        ax.set_yticks(range(len(self)), [one.name for one in self], fontsize=8)
        ax.invert_yaxis()
        ax.set_xlabel("error of the outputs with this tensor alone quantized")
        ax.legend(loc="lower right")
        ax.spines[["top", "right"]].set_visible(False)
        figure.savefig(path)


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    metric: Callable[[Any, Any], float] | None = None,
    *,
    progress: bool = True,
) -> Sensitivity:
    """Rank the tensors of a model by the error that quantizing each alone causes.

    The model is run in eval mode over the batches once in float and once for each fake-quantize,
    that one alone rounding; then it is in the state that it was in.

    Args:
        model: of :func:`prepare`, calibrated.
        batches: tuples of its arguments, or tensors; few will do.
        metric: of the outputs in float and quantized, how far they are apart. None: the squared
            error over the squared values, of each floating-point tensor among the outputs, and the
            mean of those. Over the batches, the mean.
        progress: show a bar on stderr, where that is a terminal.

    Raises:
        ValueError: a model that is not prepared, or fake-quantizes that were never fed; no batch.
    """
    found = calibrated("sensitivity", model)
    inputs = [as_inputs("sensitivity", batch) for batch in batches]
    if not inputs:
        raise ValueError("sensitivity: batches: expected at least one, got none")
    distance = _noise if metric is None else metric
    ranked = []
    with torch.no_grad(), eval_mode(model), _switched_off(found.values()):
        in_float = [model(*batch) for batch in inputs]
        for name, module in track(found.items(), "sensitivity", progress):
            module.enable_fake_quant()
            errors = [
                float(distance(wanted, model(*batch)))
                for wanted, batch in zip(in_float, inputs, strict=True)
            ]
            module.enable_fake_quant(False)
            holder, _, attribute = name.rpartition(".")
            error = sum(errors) / len(errors)
            ranked.append(Sensitive(holder, _ROLES[attribute], error, str(module.dtype)))
    return Sensitivity(sorted(ranked, key=lambda one: one.error, reverse=True))


def _noise(wanted: Any, got: Any) -> float:
    """The share of noise in each floating-point output, and their mean."""
    pairs = zip(tree_flatten(wanted)[0], tree_flatten(got)[0], strict=True)
    shares = []
    for a, b in pairs:
        if isinstance(a, Tensor) and a.is_floating_point():
            noise = (a.double() - b.double()).square().sum()
            shares.append(torch.where(noise == 0, 0.0, noise / a.double().square().sum()))
    return float(torch.stack(shares).mean()) if shares else 0.0


@contextmanager
def _switched_off(modules: Iterable[FakeQuantize]) -> Iterator[None]:
    """Neither observing nor rounding for a while, by the scales of the statistics so far."""
    before = [(module, module.state) for module in modules]
    for module, _ in before:
        module.enable_observer(False)
        module.enable_fake_quant(False)
    try:
        yield
    finally:
        for module, state in before:
            observes, quantizes = (False, False) if state is None else state.value
            module.enable_observer(observes)
            module.enable_fake_quant(quantizes)

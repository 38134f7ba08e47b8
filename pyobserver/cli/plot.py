"""The picture of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ..workflow import CalibrationResult

# Okabe and Ito's colours: told apart with every kind of colour vision
_COLOURS = ("#D55E00", "#0072B2", "#009E73")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1)))
_VALUES = "#B8B8B8"
_COLUMNS = 3
_BINS = 120
_LEVEL = 2.2  # the factor from one range's height to the next


def draw_ranges(
    activations: dict[str, Tensor], results: dict[str, CalibrationResult], output: Path
) -> None:
    """Draw the histogram of each site's values and the range that each observer chose for it.

    Args:
        activations: the values by site; one panel each.
        results: calibrations by the name of their observer, three at most.
        output: the file to write.
    """
    cells = len(activations) + 1  # the last holds the legend
    rows = -(-cells // _COLUMNS)
    figure = Figure(figsize=(4.4 * _COLUMNS, 3.3 * rows + 0.7), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Layer outputs, and the 8-bit range that each observer chose", fontsize=15)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
    for ax, (site, values) in zip(axes, activations.items(), strict=False):
        ax.hist(values.numpy(), bins=_BINS, log=True, color=_VALUES)
        _draw_spans(ax, site, results)
        ax.set_title(site, fontsize=12)
        ax.set_xlabel("value")
        ax.set_ylabel("count")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(activations) :]:
        ax.axis("off")
    handles = [Line2D([], [], color=_VALUES, linewidth=8, label="values of the layer")]
    handles += [
        Line2D([], [], color=colour, linestyle=dash, linewidth=2, label=f"range of {name}")
        for name, colour, dash in zip(results, _COLOURS, _DASHES, strict=False)
    ]
    axes[len(activations)].legend(
        handles=handles, loc="center", fontsize=12, frameon=False, handlelength=3, labelspacing=0.9
    )
    figure.savefig(output)


def _draw_spans(ax: Any, site: str, results: dict[str, CalibrationResult]) -> None:
    """Both ends as vertical lines, joined above the bars, each observer on a level of its own."""
    top = ax.get_ylim()[1]
    for level, (result, colour, dash) in enumerate(
        zip(results.values(), _COLOURS, _DASHES, strict=False)
    ):
        low, high = (float(end) for end in result[site].range)
        height = top * _LEVEL ** (len(results) - level - 0.5)
        ax.plot(
            [low, low, high, high], [0.5, height, height, 0.5],
            color=colour, linestyle=dash, linewidth=1.6,
        )  # fmt: skip
    ax.set_ylim(0.7, top * _LEVEL ** (len(results) + 0.5))

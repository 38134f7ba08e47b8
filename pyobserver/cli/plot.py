"""The pictures of the demo."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import SymmetricalLogLocator
from torch import Tensor

from ..ranges import Solution
from ..workflow import CalibrationResult

# Okabe and Ito's colours: told apart with every kind of colour vision
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)))
_VALUES = "#B8B8B8"
_COLUMNS = 3
_BINS = 120
_DECADES = 2  # that the second picture shows of either sign, whole ones below the greatest value
_LEVEL = 2.2  # the factor from one range's height to the next


def draw_ranges(
    activations: dict[str, Tensor], results: dict[str, CalibrationResult], output: Path
) -> None:
    """Draw the histogram of each site's values and the range that each observer chose for it.

    Args:
        activations: the values by site; one panel each.
        results: calibrations by the name of their observer, four at most.
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


def draw_methods(
    title: str, values: Tensor, solutions: Mapping[str, Solution], output: Path
) -> None:
    """Draw the histogram of values and below it the levels that each method places on them.

    Args:
        title: what the values are.
        values: any floats; few of them large.
        solutions: scales of one grid by method, six at most.
        output: the file to write.
    """
    figure = Figure(figsize=(11, 7.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}, and the 4-bit range of each method", fontsize=15)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2.4))
    reach = max(float(values.abs().max()), *(_reach(one) for one in solutions.values()))
    straight = 10.0 ** (math.floor(math.log10(reach)) - _DECADES)
    tail = np.geomspace(straight, reach, _BINS // 2)
    body = np.linspace(-straight, straight, _BINS // 8 + 1)[1:-1]
    above.hist(values.numpy(), bins=[*-tail[::-1], *body, *tail], log=True, color=_VALUES)
    above.set_ylabel("count")
    for row, (one, colour) in enumerate(zip(solutions.values(), _COLOURS, strict=False)):
        _draw_levels(below, row, one, colour)
        below.text(
            1.01, row, f"{float(one.sqnr):.1f} dB", transform=below.get_yaxis_transform(),
            va="center", fontsize=12,
        )  # fmt: skip
    below.set_yticks(range(len(solutions)), list(solutions), fontsize=12)
    below.set_ylim(len(solutions) - 0.4, -0.6)
    below.set_xscale("symlog", linthresh=straight, linscale=0.5)
    below.set_xlim(-1.3 * reach, 1.3 * reach)
    below.xaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=straight))
    below.set_xlabel(
        f"value (logarithmic beyond ±{straight:.0e}); ticks are the levels, dB the SQNR to expect"
    )
    for ax in (above, below):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(output)


def _reach(one: Solution) -> float:
    return max(-float(one.min_val), float(one.max_val))


def _draw_levels(ax: Any, row: int, one: Solution, colour: str) -> None:
    scale = float(one.scale)
    low, high = round(float(one.min_val) / scale), round(float(one.max_val) / scale)
    ax.plot([low * scale, high * scale], [row, row], color=colour, linewidth=2.5)
    levels = [level * scale for level in range(low, high + 1)]
    ax.plot(levels, [row] * len(levels), "|", color=colour, markersize=13, markeredgewidth=1.6)

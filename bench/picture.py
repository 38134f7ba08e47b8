"""``python -m bench.picture RECORD.json PICTURE.svg``: the ratios of a run over size."""

from __future__ import annotations

import argparse
from pathlib import Path

from .report import Record

# of Okabe and Ito: told apart by the colour-blind too
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "os^Dv"


def draw(record: Record, path: Path) -> None:
    """Reference time over ours, a line for each headline case."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "bench"  # the same file from the same figures
    from matplotlib import pyplot as plt

    ratios = record.headlines()
    if not ratios:
        raise SystemExit("the record has no ratio of native kernels to draw")
    # white, also where the page is dark
    figure, axes = plt.subplots(figsize=(8.5, 4.2), facecolor="white", layout="constrained")
    highest_first = sorted(ratios, key=lambda case: -ratios[case][max(ratios[case])])
    for index, case in enumerate(highest_first):
        axes.plot(
            ratios[case].keys(),
            ratios[case].values(),
            color=_COLOURS[index % len(_COLOURS)],
            linestyle="-" if index < len(_COLOURS) else ":",
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=4,
            linewidth=1.3,
            label=case,
        )
    axes.axhline(1, color="#888888", linestyle="--", linewidth=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="elements",
        ylabel="torch.ao's time / pyobserver's",
        title="Above the dashed line pyobserver is faster",
    )
    axes.title.set_fontsize(10)
    axes.yaxis.set_major_formatter("{x:g}x")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    reproducible = {"metadata": {"Date": None}} if path.suffix == ".svg" else {}
    figure.savefig(path, dpi=110, **reproducible)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.picture", description=__doc__)
    parser.add_argument("record", type=Path, help="that python -m bench --output wrote")
    parser.add_argument("picture", type=Path, help=".svg or .png")
    arguments = parser.parse_args()
    draw(Record.from_json(arguments.record.read_text(encoding="utf-8")), arguments.picture)


if __name__ == "__main__":
    main()

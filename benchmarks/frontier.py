"""Draws accuracy against speed-up from results/summary.json: the picture of README.md.

    python benchmarks/frontier.py --output docs/frontier.png

Left in FLOPs, right in measured time; each point is the mean over seeds. Runs no model.
"""

import argparse
import json
import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SUMMARY = Path(__file__).resolve().parents[1] / "results" / "summary.json"
CONFIG = "configs/imdb_minilm_plus.yaml"
FLOPS, TIMES = "flops_ratio", {"batch of 32": "time_ratio_batch_32", "batch of 1": "time_ratio_batch_1"}
SCORES = {  # key of a row -> label, style and color
    "reduced": ("learned tokens", "o-", "#0b6e4f"),
    "random": ("as many random tokens", "^-", "#c46a1b"),
    "first_k": ("as many first tokens", "v-", "#6b6b6b"),
}
BLUE, LIGHT, PAPER, INK = "#2f5f9e", "#6bb392", "#f6f5f1", "#22252a"

Means = dict[str, list[float]]  # key of a row -> means over seeds, slowest first


def read_means() -> Means:
    """Returns the means over seeds of each speed that was asked for."""
    rows = [row for row in json.loads(SUMMARY.read_text(encoding="utf-8")) if row["config"] == CONFIG]
    targets = sorted({row["target"] for row in rows})
    return {
        key: [statistics.mean(row[key] for row in rows if row["target"] == target) for target in targets]
        for key in ("dense", FLOPS, *TIMES.values(), *SCORES)
    }


def draw_flops(axes: Axes, means: Means) -> None:
    """Draws learned, random and first tokens at the same counts."""
    for key, (label, style, color) in SCORES.items():
        axes.plot(means[FLOPS], means[key], style, color=color, label=label, markersize=6, linewidth=1.8)
    axes.set_xlabel("times fewer encoder FLOPs", color=INK)
    axes.set_ylim(70, 89)
    axes.set_yticks(range(70, 90, 5))


def draw_times(axes: Axes, means: Means) -> None:
    """Draws the learned tokens against the time that they save."""
    for (label, key), color in zip(TIMES.items(), (SCORES["reduced"][2], LIGHT), strict=True):
        axes.plot(means[key], means["reduced"], "o-", color=color, label=label, markersize=6, linewidth=1.8)
    axes.set_xlabel("times as many texts per second, two CPU cores", color=INK)
    axes.set_ylim(84, 88)
    axes.set_yticks(range(84, 89))


def draw(path: Path) -> None:
    """Writes the picture, a PNG file."""
    figure, means = Figure(figsize=(9.6, 3.7), dpi=120, layout="constrained", facecolor=PAPER), read_means()
    canvas = FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, 2), (draw_flops, draw_times), strict=True):
        dense = statistics.mean(means["dense"])
        axes.axhline(dense, color=BLUE, linewidth=1, linestyle=":")
        axes.plot([1], [dense], "D", color=BLUE, markersize=6, label="dense model")
        panel(axes, means)
        axes.set_facecolor(PAPER)
        axes.set_ylabel("accuracy, %", color=INK)
        axes.set_xlim(0.85, 4.25)
        axes.set_xticks([1, 2, 3, 4], ["1x", "2x", "3x", "4x"])
        axes.grid(color="#dad8d0", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="lower left", frameon=False, fontsize=9, labelcolor=INK)
    with path.open("wb") as stream:
        canvas.print_png(stream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the PNG file to write")
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()

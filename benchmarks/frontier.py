"""Draws accuracy against FLOP speed-up from committed results: the picture of README.md.

    python benchmarks/frontier.py --output docs/frontier.png

Reads results/imdb_4000_reviews.json (left) and results/quickstart_seeds.json (right); runs no model.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

RESULTS = Path(__file__).resolve().parents[1] / "results"
RUNS = {  # model in imdb_4000_reviews.json -> label, color
    "seed 42, stage init with keep [0.5, 0.25], alpha 0.3, joint at 1e-4": ("learned, init.keep", "#0b6e4f"),
    "seed 42, stage init, alpha 0.3": ("learned, plain init", "#6bb392"),
}
DENSE, PUBLISHED = "seed 42, stage init, alpha 0.3, dense", "published code, trained as here, converted"
GREEN, BLUE, ORANGE, GRAY = "#0b6e4f", "#2f5f9e", "#c46a1b", "#6b6b6b"
PAPER, INK = "#f6f5f1", "#22252a"

Points = list[tuple[float, float, float]]  # speed-up, accuracy, error


def read(name: str) -> dict[str, Any]:
    """Reads one file of results/."""
    values: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return values


def draw_imdb(axes: Axes) -> None:
    """Draws thresholds of two runs, their dense model and the model of the published code."""
    models = read("imdb_4000_reviews.json")["models"]

    def points(name: str) -> Points:
        found = sorted((m["flops_speedup"], m["accuracy"]) for m in models if m["model"] == name)
        return [(x, y, math.sqrt(y * (1 - y) / 4000)) for x, y in found]

    for name, (label, color) in RUNS.items():
        draw_points(axes, points(name), label, "o-", color)
    draw_points(axes, points(PUBLISHED), "published PyTorch code", "s", ORANGE)
    draw_dense(axes, points(DENSE)[0][1])
    axes.set_title("IMDB, 4,000 reviews, ± standard error")
    axes.set_ylim(83, 87.8)


def draw_quickstart(axes: Axes) -> None:
    """Draws the learned selection beside as many random and as many first tokens."""
    spread = read("quickstart_seeds.json")["spread"]

    def points(*names: str) -> Points:
        accuracy = [spread[f"{name}.accuracy"] for name in names]
        speedup = [spread[f"{name}.flops_speedup"]["mean"] for name in names]
        return [(x, y["mean"], y["std"]) for x, y in zip(speedup, accuracy, strict=True)]

    draw_points(axes, points("thresholds.0.3", "reduced", "thresholds.0.7"), "learned", "o-", GREEN)
    draw_points(axes, points("baselines.random"), "as many random tokens", "^", ORANGE, shift=-0.025)
    draw_points(axes, points("baselines.first_k"), "as many first tokens", "v", GRAY, shift=0.025)
    draw_dense(axes, spread["dense.accuracy"]["mean"])
    axes.set_title("Quickstart, mean of five seeds ± deviation")
    axes.set_ylim(62, 75)


def draw_points(axes: Axes, points: Points, label: str, style: str, color: str, shift: float = 0.0) -> None:
    """Draws points with error bars; `shift` moves them sideways where two would overlap."""
    x, y, error = zip(*points, strict=True)
    axes.errorbar(
        [value + shift for value in x],
        [100 * value for value in y],
        [100 * value for value in error],
        fmt=style,
        color=color,
        label=label,
        markersize=7,
        linewidth=2,
        elinewidth=1,
        capsize=3,
    )


def draw_dense(axes: Axes, accuracy: float) -> None:
    """Draws the dense model, at speed-up 1, and a line at its accuracy."""
    axes.axhline(100 * accuracy, color=BLUE, linewidth=1, linestyle=":")
    axes.plot([1], [100 * accuracy], "D", color=BLUE, markersize=7, label="dense model")


def draw(path: Path) -> None:
    """Writes the picture, a PNG file."""
    figure = Figure(figsize=(9.6, 3.7), dpi=120, layout="constrained", facecolor=PAPER)
    canvas = FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, 2), (draw_imdb, draw_quickstart), strict=True):
        panel(axes)
        axes.set_facecolor(PAPER)
        axes.title.set(color=INK, fontsize=10.5, fontweight="bold")
        axes.set_xlabel("times fewer encoder FLOPs", color=INK)
        axes.set_ylabel("accuracy, %", color=INK)
        axes.set_xlim(0.85, 3.25)
        axes.set_xticks([1, 1.5, 2, 2.5, 3], ["1x", "1.5x", "2x", "2.5x", "3x"])
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

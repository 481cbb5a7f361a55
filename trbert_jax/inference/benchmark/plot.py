"""The picture of a benchmark: speed over batch size, and what became of the FLOPs that were saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trbert_jax.inference.benchmark.records import REFERENCE, Record
from trbert_jax.io import atomic_file

# Ways of one kind share a hue; the peer stands apart. Those who cannot tell colors have the markers.
_STYLES: dict[str, dict[str, Any]] = {
    "packed": {"color": "#0b6e4f", "marker": "o", "linewidth": 2.4},
    "batch_max": {"color": "#6bb392", "marker": "s", "linewidth": 1.4},
    "masked": {"color": "#d9822b", "marker": "^", "linewidth": 1.4},
    "masked_full": {"color": "#d9822b", "marker": "v", "linewidth": 1.4, "linestyle": "--"},
    "dense": {"color": "#3b6fb6", "marker": "D", "linewidth": 1.4},
    "dense_full": {"color": "#3b6fb6", "marker": "d", "linewidth": 1.4, "linestyle": "--"},
    "huggingface": {"color": "#777777", "marker": "x", "linewidth": 1.4, "linestyle": ":"},
}


def plot_benchmark(records: Sequence[Record], png_path: str | Path) -> None:
    """Draws texts a second of each way over the batch size, and what packed runs make of the FLOPs saved.

    The second panel, how much faster packed is beside how many fewer FLOPs it needs, is there where the
    masked run at full length was timed too.

    Args:
      records: of one benchmark.
      png_path: the image, written atomically.

    Raises:
      UserError: the image cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    ratios = _ratios(records)
    figure = Figure(figsize=(10.5 if ratios else 6.5, 4.4), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if ratios else 1, squeeze=False, width_ratios=[1.5, 1] if ratios else None)[
        0
    ]
    first = records[0]
    figure.suptitle(_title(first), fontsize=11, x=0.01, ha="left")
    _draw_speed(panels[0], records)
    if ratios:
        _draw_ratios(panels[1], ratios)
    with atomic_file(png_path, "wb") as stream:
        canvas.print_png(stream)


def _title(record: Record) -> str:
    name = Path(record["model"]).name
    replayed = f" keeping what {Path(record['replay']).name} keeps" if record["replay"] else ""
    device = "" if record["device"] == "cpu" else f", {record['device']}"
    return (
        f"{name}{replayed}\n"
        f"{record['dtype']}, {record['tokens']:.0f} tokens a text (at most {record['max_length']});"
        f" {record['processor']}, {record['cpus']} cores{device}"
    )


def _draw_speed(axes: Any, records: Sequence[Record]) -> None:
    # The fastest at the largest batch size first, so that the legend stands as the lines end.
    by_speed = sorted(records, key=lambda record: (-record["batch_size"], -record["examples_per_second"]))
    names = dict.fromkeys(record["execution"] for record in by_speed)
    sizes = sorted({record["batch_size"] for record in records})
    for name in names:
        points = [(r["batch_size"], r["examples_per_second"]) for r in records if r["execution"] == name]
        xs = [sizes.index(size) for size, _ in points]
        label = name.replace("_", " ")
        axes.plot(xs, [rate for _, rate in points], label=label, markersize=6, **_STYLES.get(name, {}))
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("batch size")
    axes.set_title("texts a second", loc="left", fontsize=10)
    axes.set_ylim(bottom=0)
    _finish(axes)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_ratios(axes: Any, ratios: Sequence[tuple[int, float, float]]) -> None:
    places = range(len(ratios))
    for shift, column, label, color in (
        (-0.2, 1, "fewer FLOPs (promised)", "#b9c7c0"),
        (0.2, 2, "faster (realised)", "#0b6e4f"),
    ):
        heights = [row[column] for row in ratios]
        bars = axes.bar([x + shift for x in places], heights, 0.38, label=label, color=color)
        axes.bar_label(bars, fmt="{:.2f}", fontsize=8, padding=2)
    axes.set_xticks(places, [str(row[0]) for row in ratios])
    axes.set_xlabel("batch size")
    axes.set_title("packed against masked at full length: times ...", loc="left", fontsize=10)
    axes.set_ylim(0, 1.28 * max(max(row[1:]) for row in ratios))
    _finish(axes)
    axes.legend(fontsize=8, frameon=False, loc="upper left", ncols=2)


def _finish(axes: Any) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _ratios(records: Sequence[Record]) -> list[tuple[int, float, float]]:
    """Batch size, promised and realised ratio of packed over full-length masked, where both were run."""
    by_size: dict[int, dict[str, Record]] = {}
    for record in records:
        by_size.setdefault(record["batch_size"], {})[record["execution"]] = record
    return [
        (
            size,
            ways[REFERENCE]["flops"] / ways["packed"]["flops"],
            ways["packed"]["examples_per_second"] / ways[REFERENCE]["examples_per_second"],
        )
        for size, ways in sorted(by_size.items())
        if {REFERENCE, "packed"} <= ways.keys()
    ]

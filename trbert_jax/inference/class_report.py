"""Show the scores of each class and the confusion matrix, as a table and as a picture."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.io.outputs import atomic_file

_WIDEST = 10  # classes of a matrix that fits into a terminal; of more, frequent confusions are listed
_LISTED = 10  # of them
_NAME = 24  # characters of a name that are shown
_LARGEST = 60  # classes of a picture that can be read


def class_table(summary: Mapping[str, Any]) -> Iterator[str]:
    """Yields lines for the `classes` and the `confusion_matrix` of an evaluation; none if it has none."""
    if "classes" not in summary:
        return
    classes, matrix = summary["classes"], np.array(summary["confusion_matrix"])
    names = list(map(_short, classes))
    width = max(map(len, ["class", *names]))
    yield f"{'class':<{width}}  precision     recall         f1   examples"
    for name, row in zip(names, classes.values(), strict=True):
        scores = "  ".join(f"{row[key]:>9.3f}" for key in ("precision", "recall", "f1"))
        yield f"{name:<{width}}  {scores}  {row['examples']:>9}"
    name, most = max(zip(names, matrix.sum(1), strict=True), key=lambda pair: int(pair[1]))
    yield f"always answering {name} would have an accuracy of {most / max(matrix.sum(), 1):.3f}"
    yield ""
    if len(names) <= _WIDEST:
        columns = [max(len(name), len(str(matrix.max()))) for name in names]
        yield f"{'label':<{width}}  predicted"
        yield "  ".join([" " * width, *(f"{name:>{n}}" for name, n in zip(names, columns, strict=True))])
        for name, row in zip(names, matrix, strict=True):
            yield "  ".join([f"{name:<{width}}", *(f"{x:>{n}}" for x, n in zip(row, columns, strict=True))])
        return
    yield "most frequent confusions"
    wrong = matrix * (1 - np.eye(len(names), dtype=int))
    for place in np.argsort(-wrong, axis=None, kind="stable")[:_LISTED].tolist():
        label, predicted = divmod(place, len(names))
        if wrong[label, predicted]:
            yield f"{wrong[label, predicted]:>9}  {names[label]} predicted as {names[predicted]}"


def plot_confusion(summaries: Mapping[str, Mapping[str, Any]], png_path: str | Path) -> None:
    """Draws the confusion matrices of evaluations, by title, side by side.

    Colors are shares of a label's examples, numbers are counts. Writes the image atomically; raises
    `UserError` if that fails.
    """
    from matplotlib.figure import Figure  # slow to import

    names = list(map(_short, next(iter(summaries.values()))["classes"]))
    size = min(max(3.2, 0.42 * len(names) + 1.6), 16.0)
    figure = Figure(figsize=(size * len(summaries), size), dpi=150, layout="constrained")
    panels = figure.subplots(ncols=len(summaries), squeeze=False)[0]
    for axes, (title, summary) in zip(panels, summaries.items(), strict=True):
        matrix = np.array(summary["confusion_matrix"])
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        axes.imshow(shares, cmap="Greens", vmin=0, vmax=1)
        axes.set_title(f"{title}: macro F1 {summary['macro_f1']:.3f}", loc="left", fontsize=10)
        ticks = range(len(names)) if len(names) <= _LARGEST else ()
        labels = [names[i].replace("$", r"\$") for i in ticks]
        axes.set_xticks(ticks, labels, rotation=90, fontsize=8)
        axes.set_yticks(ticks, labels, fontsize=8)
        axes.set(xlabel="predicted", ylabel="label")
        if len(names) <= 25:
            for (row, column), count in np.ndenumerate(matrix):
                color = "white" if shares[row, column] > 0.6 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=7)
    with atomic_file(png_path, "wb") as stream, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph ")  # a script that the font lacks is drawn as boxes
        figure.savefig(stream, format="png")


def _short(name: str) -> str:
    """Returns a name on one line, cut to `_NAME` characters."""
    name = " ".join(name.split())
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"

"""Measure a model at many speeds, store thresholds for some of them, and draw accuracy against speed."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.datasets import BadRecords
from trbert_jax.errors import UserError
from trbert_jax.inference import frontier
from trbert_jax.inference.benchmark_report import described
from trbert_jax.inference.copies import COPIES
from trbert_jax.inference.engine import InferenceEngine
from trbert_jax.inference.evaluate import read_examples, summarize
from trbert_jax.inference.outputs import Outputs
from trbert_jax.inference.predictor import TRBert
from trbert_jax.inference.promise import Wanted, promised_point
from trbert_jax.io.outputs import atomic_file, check_outputs
from trbert_jax.model.operating_points import OperatingPoint, store, to_dict
from trbert_jax.model.pretrained import write_card
from trbert_jax.reduction.rules import rule_names
from trbert_jax.tasks import Task, encode_usable, notes_of
from trbert_jax.tasks.examples import Examples

logger = logging.getLogger(__name__)

TARGETS = (2.0, 3.0, 4.0)  # speed-ups that get an operating point
POINTS_LOST = (0.5, 1.0)  # percentage points of the metric on development data, alike


def calibrate(
    engine: InferenceEngine,
    params: Any,
    examples: Examples,
    task: Task,
    dense: Outputs,
    speedups: Sequence[float] = TARGETS,
    points_lost: Sequence[float] = POINTS_LOST,
    **options: Any,
) -> tuple[list[frontier.Point], tuple[OperatingPoint, ...]]:
    """Finds a model's frontier on development data and names its operating points.

    `dense` are the dense model's outputs; for `options` see `find_frontier`. Without known answers the points
    are those of speeds alone, and their metric is `frontier.AGREEMENT`.
    """
    metrics = frontier.metrics_of(task, examples, dense, dense)
    metric = frontier.metric_name(task, metrics)
    if metric != task.metric:
        logger.info("no known answers: measures agreement with the dense model, and no points lost")
        points_lost = ()
    wanted = (*frontier.SPEEDUPS, *speedups)
    points = frontier.find_frontier(engine, params, examples, task, dense, wanted, **options)
    arguments = (metric, metrics[metric], len(examples), speedups, points_lost)
    named = frontier.operating_points(points, task, *arguments)
    return points, named


def copying(engine: InferenceEngine) -> InferenceEngine:
    """Returns an engine for passes with copies, which take the memory of a few plain ones."""
    size = max(1, 4 * engine.batch_size // COPIES)
    return InferenceEngine(engine.model, size, engine.programs, engine.after_batch)


def calibrate_file(
    model_dir: str | Path,
    data_file: str | Path,
    *,
    dense_dir: str | Path | None = None,
    speedups: Sequence[float] = TARGETS,
    points_lost: Sequence[float] = POINTS_LOST,
    max_disagreement: float | None = None,
    max_drop: float | None = None,
    confidence: float = 0.95,
    stored: bool = False,
    plot: Path | None = None,
    batch_size: int = 32,
    skip_bad_records: bool = False,
    max_length: int | None = None,
    text_field: str | None = None,
    text_pair_field: str | None = None,
    label_field: str | None = None,
) -> dict[str, Any]:
    """Measures a model on a file at many speeds, and stores its operating points if `stored`.

    Args:
      model_dir, data_file, batch_size, skip_bad_records, max_length: see `evaluate_file`.
      text_field, text_pair_field, label_field: fields of the file.
      dense_dir: the dense model to compare with; None for the same model without reduction.
      speedups, points_lost: operating points to name.
      max_disagreement, max_drop: a promise, as a share: of answers that differ from the dense model's, or of
        accuracy lost. Half of the file then finds thresholds, and the other half tests them.
      confidence: of the promise.
      plot: PNG file to draw.

    Returns `dense`, `frontier` (the numbers of each speed's best thresholds; of operating points also with
    `random` and `first_k` tokens) and `operating_points`. Raises `UserError` for a model or file that cannot
    be read or written.
    """
    check_outputs([plot], inputs=[data_file], models=[] if stored else [model_dir])
    bad, model = BadRecords(skip=skip_bad_records), TRBert.from_pretrained(model_dir, max_length=max_length)
    if "selectors" in model.newly_initialized:
        raise UserError(f"{model_dir}: its selectors are not trained; train them first: `trbert train`")
    fields = model.config.inputs.fields(text_field, text_pair_field, label_field)
    examples = read_examples(model, Path(data_file), bad, fields, may_lack_labels=stored)
    wanted, held_out = _wanted(max_disagreement, max_drop, confidence, Path(data_file), model), None
    if wanted:
        examples, held_out = _halves(model, examples, bad, str(data_file))
    reference = model if dense_dir is None else TRBert.from_pretrained(dense_dir, max_length=max_length)
    same = ("task", "labels", "inputs", "max_length", "vocab_size")
    if other := [name for name in same if getattr(reference.config, name) != getattr(model.config, name)]:
        raise UserError(f"{dense_dir}: its {', '.join(other)} differ from {model_dir}, so its inputs do too")
    dense = reference.engine(batch_size).run(reference.params, examples, rule="dense")
    engine, task = copying(model.engine(batch_size)), model.task
    points, named = calibrate(engine, model.params, examples, task, dense, speedups, points_lost)
    if wanted and held_out:
        on_others = reference.engine(batch_size).run(reference.params, held_out, rule="dense")
        tested = (held_out, task, on_others, frontier.best(points), wanted)
        named = (*named, promised_point(engine, model.params, *tested))
    metrics = frontier.metrics_of(task, examples, dense, dense)
    metric = frontier.metric_name(task, metrics)
    result: dict[str, Any] = {"metric": metric, "dense": summarize(dense, reference.config, metrics)}
    arguments = (engine, model.params, examples, task, frontier.best(points), dense)
    rows = frontier.evaluate_points(*arguments, rule_names("baseline"), named=named)
    result |= {"frontier": rows, "operating_points": to_dict(named)}
    if notes := notes_of(examples, bad):
        result["data"] = notes
    if stored:
        store(Path(model_dir), named)
        write_card(Path(model_dir), dataclasses.replace(model.config, operating_points=named))
    if plot is not None:
        plot_frontier(result, plot, metric, task.full_score)
    return result


def _wanted(
    disagreement: float | None, drop: float | None, confidence: float, path: Path, model: TRBert
) -> Wanted | None:
    if disagreement is None and drop is None:
        return None
    if disagreement is not None and drop is not None:
        raise UserError("--max-disagreement and --max-drop exclude each other: one promise a call")
    if drop is not None and model.answers_questions:
        raise UserError("--max-drop is for models that label texts; promise --max-disagreement")
    kind, most = ("drop", drop) if disagreement is None else ("disagreement", disagreement)
    for name, share in ((f"max_{kind}", most), ("confidence", confidence)):
        if share is None or not 0 < share < 1:
            raise UserError(f"{name} is {share}; expected a share above 0 and below 1")
    return Wanted(kind, float(most or 0), confidence, described(path)["data_sha256"])


def _halves(model: TRBert, examples: Examples, bad: BadRecords, source: str) -> tuple[Examples, Examples]:
    """Divides the examples at random, the same each time."""
    order = np.random.default_rng(0).permutation(len(examples.records))
    parts = [[examples.records[i] for i in half] for half in np.array_split(order, 2)]
    if not parts[1]:
        raise UserError(f"{source}: a promise needs more than one text")
    tokenizer = model.require_tokenizer()
    first, second = (encode_usable(model.task, part, tokenizer, bad, source) for part in parts)
    return first, second


def frontier_table(result: Mapping[str, Any]) -> Iterator[str]:
    """Yields lines of text for `frontier` and `operating_points` of a result of `calibrate_file`."""
    metric, baselines = result["metric"], rule_names("baseline")
    dense = f"{result['dense'][metric]:.4g}"
    others = ", ".join(baselines)
    yield f"{'speed-up':>8}  {metric:>9}  {'flips':>6}  {'tokens kept':<15}  threshold  ({others})"
    yield f"{'1.00x':>8}  {dense:>9}  dense"
    for row in result["frontier"]:
        kept = ", ".join(f"{x:.1f}" for x in row["kept"])
        flips = "-" if row["flips"] is None else f"{row['flips']:.3f}"
        thresholds = ",".join(f"{x:.4g}" for x in row["threshold"])
        others = ", ".join(f"{row[name][metric]:.4g}" for name in baselines if name in row)
        speedup, value = f"{row['flops_speedup']:.2f}x", f"{row[metric]:.4g}"
        others = f"  ({others})" if others else ""
        yield f"{speedup:>8}  {value:>9}  {flips:>6}  {kept:<15}  {thresholds}{others}"
    for name, point in result["operating_points"].items():
        promise = point.get("promise")
        words = {"disagreement": "of answers differ from the dense model's", "drop": "of accuracy is lost"}
        said = "on these examples"
        if promise:
            most, sure = 100 * promise["most"], 100 * promise["confidence"]
            said = (
                f"on {point['examples']} others; at most {most:g} % {words[promise['kind']]}, at {sure:g} %"
            )
        yield f"{name}: {point['speedup']:.2f}x, {metric} {point['value']:.4g} {said}"


_MARKERS = ("^--", "v--", "s--", "x--")
_COLORS = {"reduced": "#0b6e4f", "random": "#c46a1b", "first_k": "#6b6b6b", "dense": "#2f5f9e"}


def plot_frontier(result: Mapping[str, Any], path: Path, metric: str, full_score: float) -> None:
    """Draws the metric in % against the speed-up: the model, the baselines, and the dense model.

    Writes a PNG file atomically. Raises `UserError` if that fails.
    """
    from matplotlib.figure import Figure  # slow to import

    rows = result["frontier"]
    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, style in (("reduced", "o-"), *zip(rule_names("baseline"), _MARKERS, strict=False)):
        found = [(row["flops_speedup"], row if name == "reduced" else row.get(name, {})) for row in rows]
        values = [(x, 100 * metrics[metric] / full_score) for x, metrics in found if metric in metrics]
        if values:
            label = "model" if name == "reduced" else f"{name}, same counts"
            axes.plot(*zip(*values, strict=True), style, color=_COLORS.get(name), label=label)
    if metric in result["dense"]:  # the examples have answers
        dense = 100 * result["dense"][metric] / full_score
        axes.plot([1], [dense], "D", color=_COLORS["dense"], label="dense model")
        axes.axhline(dense, color=_COLORS["dense"], linewidth=1, linestyle=":")
    axes.set(xlabel="times fewer encoder FLOPs", ylabel=f"{metric}, %")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="lower left", frameon=False)
    with atomic_file(path, "wb") as stream:
        figure.savefig(stream, format="png")

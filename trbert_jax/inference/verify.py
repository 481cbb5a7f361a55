"""Verify that answers do not depend on how a model is run: alone, in a batch, in another order or engine."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from trbert_jax.datasets import BadRecords
from trbert_jax.inference.copies import judging_logits
from trbert_jax.inference.evaluate import read_examples
from trbert_jax.inference.outputs import Outputs
from trbert_jax.inference.predictor import TRBert
from trbert_jax.model.engines import ENGINES
from trbert_jax.model.operating_points import find_thresholds
from trbert_jax.model.packed import BACKENDS, DEFAULT_BACKEND
from trbert_jax.reduction.rules import DEFAULT_THRESHOLD, Threshold, point_thresholds
from trbert_jax.reduction.selection import min_logit
from trbert_jax.tasks.examples import Examples

TOLERANCE = 1e-4  # of a logit, relative to the largest one, or to 1
# A selector's logit this close to the threshold may be rounded to the other side; relative alike.
TIE = 1e-5


def verify_file(
    model_dir: str | Path,
    data_file: str | Path,
    *,
    batch_size: int = 32,
    max_texts: int = 256,
    threshold: Threshold = DEFAULT_THRESHOLD,
    operating_point: str | None = None,
    max_length: int | None = None,
    skip_bad_records: bool = False,
) -> list[dict[str, Any]]:
    """Runs the first `max_texts` texts or questions of a file in several ways, and compares each with alone.

    Returns for each way `way`, `logits` (the largest difference, over the largest logit or 1), `kept` (texts
    with other kept tokens), `ties` (those of them with a token whose logit is within rounding of the
    threshold, which excuses it), and `same`. Arguments and errors: see `evaluate_file`.
    """
    model = TRBert.from_pretrained(model_dir, max_length=max_length)
    examples = read_examples(model, Path(data_file), BadRecords(skip=skip_bad_records))
    examples = examples.take(range(len(examples))[:max_texts])
    rule = model.default_rule
    found = find_thresholds(model.config.operating_points, operating_point, rule, threshold)
    limits = point_thresholds(found, model.config.num_reductions)
    options: dict[str, Any] = {"rule": rule, "threshold": limits}
    alone = model.engine(1).run(model.params, examples, **options)
    near = _near(model, examples, limits) if alone.kept else np.zeros(examples.num_rows, bool)
    rows = []
    for way, outputs in _ways(model, model_dir, examples, batch_size, max_length, options):
        rows.append({"way": way, **compared(alone, outputs, near)})
    return rows


def _ways(
    model: TRBert,
    model_dir: str | Path,
    examples: Examples,
    batch_size: int,
    max_length: int | None,
    options: dict[str, Any],
) -> Iterator[tuple[str, Outputs]]:
    engine = model.engine(batch_size)
    yield f"batches of {batch_size}", engine.run(model.params, examples, **options)
    order = np.random.default_rng(0).permutation(len(examples))
    mixed, places = examples.take(order), np.argsort(order)
    yield "another order", taken(engine.run(model.params, mixed, **options), mixed, places, model)
    for backend in BACKENDS:
        if backend != DEFAULT_BACKEND:
            yield f"backend {backend}", engine.run(model.params, examples, backend=backend, **options)
    for name in ENGINES:
        if importlib.util.find_spec(name) and importlib.util.find_spec("spox"):
            other = TRBert.from_pretrained(model_dir, max_length=max_length, backend=name)
            yield f"backend {name}", other.engine(batch_size).run({}, examples, **options)


def taken(outputs: Outputs, examples: Examples, places: npt.NDArray[Any], model: TRBert) -> Outputs:
    """Returns the outputs of the examples at `places`, int [n]."""
    rows = examples.rows(places).reshape(-1)
    rows = rows[rows >= 0]
    by_row = rows if model.task.by_row else places
    kept = tuple([stage[row] for row in rows] for stage in outputs.kept)
    logits = jax.tree.map(lambda x: x[by_row], outputs.logits)
    return Outputs(logits, kept, outputs.lengths[rows], outputs.labels[places], outputs.seconds)


def _near(model: TRBert, examples: Examples, limits: Sequence[float]) -> npt.NDArray[np.bool_]:
    """Returns which rows have a token whose logit is within rounding of the threshold, bool [R]."""
    engine, near = model.engine(8), np.zeros(examples.num_rows, bool)
    logits = np.array([[min_logit(x) for x in limits]], np.float32)
    for stage, limit in enumerate(logits[0]):
        judged = judging_logits(engine, model.params, examples, logits, stage, DEFAULT_BACKEND)[0]
        finite = np.isfinite(judged)
        scale = max(1.0, np.abs(judged[finite]).max(initial=0))
        near |= (np.abs(np.where(finite, judged, np.inf) - limit) < TIE * scale).any(-1)
    return near


def compared(alone: Outputs, other: Outputs, near: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Compares the outputs of one way with those of texts alone; `near`, bool [R], excuses rows of ties."""
    pairs = zip(*map(jax.tree.leaves, (alone.logits, other.logits)), strict=True)
    differ = np.zeros(len(near), bool)
    for left, right in zip(alone.kept, other.kept, strict=True):
        differ |= [not np.array_equal(x, y) for x, y in zip(left, right, strict=True)]
    excused = differ & near
    worst = 0.0
    for ours, theirs in pairs:
        usable = ~excused if len(ours) == len(near) else np.full(len(ours), not excused.any())
        if ours.ndim == 3 and ours.shape[-1] >= alone.lengths.max():  # of positions: those behind a row's end
            real = np.arange(ours.shape[-1]) < alone.lengths[:, None, None]  # mean nothing
            ours, theirs = np.where(real, ours, 0), np.where(real, theirs, 0)
        change = np.abs(ours - theirs)[usable].max(initial=0)
        worst = max(worst, float(change / max(1.0, np.abs(ours).max(initial=0))))
    same = worst <= TOLERANCE and not (differ & ~near).any()
    return {"logits": worst, "kept": int(differ.sum()), "ties": int(excused.sum()), "same": bool(same)}


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yields lines of text for a result of `verify_file`."""
    yield f"{'compared with each text alone':<30}  {'logits':>8}  other tokens kept"
    for row in rows:
        ties = f" ({row['ties']} at the threshold)" if row["ties"] else ""
        verdict = "same" if row["same"] else "DIFFERENT"
        yield f"{row['way']:<30}  {row['logits']:>8.1e}  {row['kept']}{ties}  {verdict}"

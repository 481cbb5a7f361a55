"""Show which tokens of a text leave where, at many thresholds, beside the dense model and other selections.

    page = show(TRBert.from_pretrained("work/imdb/model"), ["a gripping film"])
    page.save("page.html")  # or the last line of a notebook's cell

Source: docs/show.md.
"""

import dataclasses
import datetime
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax import __version__
from trbert_jax.datasets import BadRecords
from trbert_jax.datasets.records import Example
from trbert_jax.errors import UserError, iterable, whole_number
from trbert_jax.inference.benchmark_report import described, model_name
from trbert_jax.inference.calibrate import copying
from trbert_jax.inference.copies import COPIES, judging_logits, run_copies
from trbert_jax.inference.engine import InferenceEngine
from trbert_jax.inference.evaluate import read_examples
from trbert_jax.inference.outputs import Outputs
from trbert_jax.inference.predictor import TRBert, check_texts
from trbert_jax.inference.show_corpus import corpus
from trbert_jax.inference.show_inputs import Array, answers, characters, owner_of, right, snippet
from trbert_jax.io import streams
from trbert_jax.model.operating_points import find_thresholds
from trbert_jax.model.packed import DEFAULT_BACKEND
from trbert_jax.pages import Page
from trbert_jax.reduction import flops
from trbert_jax.reduction.rules import (
    DEFAULT_RULE,
    DEFAULT_THRESHOLD,
    RULES,
    Threshold,
    point_thresholds,
    rule_names,
)
from trbert_jax.reduction.selection import min_logit
from trbert_jax.tasks.base import parse_requests
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.spans import SpanTask

DETAILED = 20  # inputs whose tokens a page shows
_GRID = np.linspace(0.1, 0.9, 17)  # thresholds of both points, or as far from others in the selector's logit


def show(
    model: TRBert,
    inputs: Iterable[Any],
    *,
    threshold: Threshold = DEFAULT_THRESHOLD,
    operating_point: str | None = None,
    batch_size: int = 32,
    repeats: int = 3,
) -> Page:
    """Draws a page of texts or questions.

    Args:
      model: labels texts, or answers questions with a span.
      inputs: texts, pairs of texts, or JSON objects with `question` and `context`.
      threshold, operating_point, batch_size: see `TRBert.predict`; the page starts with these thresholds, and
        has others around them, and all operating points of the model.
      repeats: times each input is timed alone, at each setting; 0 leaves time out.

    Raises UserError for another model, no inputs, or one that cannot be read.
    """
    records = input_records(model, inputs)
    return _page(model, records, threshold, operating_point, batch_size, repeats, {})


def show_file(
    model_dir: str | Path,
    data_file: str | Path,
    *,
    threshold: Threshold = DEFAULT_THRESHOLD,
    operating_point: str | None = None,
    batch_size: int = 32,
    repeats: int = 3,
    max_texts: int = 200,
    max_length: int | None = None,
    skip_bad_records: bool = False,
    command: str = "",
) -> Page:
    """Draws a page of the first `max_texts` texts or questions of a file, with or without labels.

    Shows the tokens of `DETAILED` inputs, those with changed answers first. For the other arguments and
    errors see `show` and `evaluate_file`; `command` is named in the footer.
    """
    model = TRBert.from_pretrained(model_dir, max_length=max_length)
    _check(model)
    path, bad = Path(data_file), BadRecords(skip=skip_bad_records)
    records = read_examples(model, path, bad, may_lack_labels=True).records[:max_texts]
    source = {"data": path.name, **described(path), "command": command}
    return _page(model, records, threshold, operating_point, batch_size, repeats, source)


def _check(model: TRBert) -> None:
    """Raises UserError for a model whose inputs no page shows."""
    model.check_use(model.answers_questions)
    advice = ""
    if model.answers_questions and not isinstance(model.task, SpanTask):
        advice = "a page shows texts, and questions answered with a span of a text"
    elif model.config.score:
        advice = "a page shows labels; this model has one output, a score"
    elif type(model.engine(1)) is not InferenceEngine:
        advice = "a page needs JAX in this process; load the model without backend, and not after a fork"
    elif "selectors" in model.newly_initialized:
        advice = "its selectors are not trained; train them first: `trbert train`"
    if advice:
        raise UserError(f"{model.source}: {advice}")


def input_records(model: TRBert, inputs: Iterable[Any]) -> list[Any]:
    """Returns records without answers of texts or questions; errors: see `show`."""
    given = list(iterable("inputs", inputs, "show(model, [text])"))
    _check(model)
    if model.answers_questions:
        placed = [(f"inputs[{i}]", request) for i, request in enumerate(given)]
        records = [record for _, record in parse_requests(model.task, placed, set())]
    else:
        check_texts(given, 0, pairs=bool(model.config.inputs.text_pair_field))
        pairs = [(text, None) if isinstance(text, str) else text for text in given]
        records = [Example(f"inputs[{i}]", text, -1, pair) for i, (text, pair) in enumerate(pairs)]
    if not records:
        raise UserError("nothing to show; give a text")
    return records


def _page(
    model: TRBert,
    records: Sequence[Any],
    threshold: Threshold,
    operating_point: str | None,
    batch_size: int,
    repeats: int,
    source: dict[str, Any],
) -> Page:
    engine = model.engine(whole_number("batch_size", batch_size, 1))
    repeats = whole_number("repeats", repeats, 0, 100)
    points = model.config.operating_points
    start = point_thresholds(
        find_thresholds(points, operating_point, DEFAULT_RULE, threshold), model.config.num_reductions
    )
    examples = model.task.encode(records, model.require_tokenizer())
    dense = engine.run(model.params, examples, rule="dense")
    now = engine.run(model.params, examples, threshold=start)
    dense_answers, now_answers = (answers(model, examples, x) for x in (dense, now))
    changed = [a["answer"] != b["answer"] for a, b in zip(dense_answers, now_answers, strict=True)]
    chosen = np.arange(len(records))
    if len(records) > DETAILED:  # changed answers first
        chosen = np.argsort(np.logical_not(changed), kind="stable")[:DETAILED]
    data = {
        "model": model_name(model.source),
        "kind": "questions" if model.answers_questions else "texts",
        "layers": model.config.num_layers,
        "points": [*model.config.reduction_layers],
        **_details(model, _taken(model, examples, chosen), start, operating_point, engine, repeats),
        "corpus": corpus(model, examples, dense, now, dense_answers, now_answers, chosen, engine),
        "source": {
            **source,
            "folder": model.source,
            "version": __version__,
            "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        },
    }
    return Page("show.html", data, title=f"Tokens that {data['model']} keeps")


# Tokens of some inputs at all settings ---------------------------------------------------------------


def _settings(model: TRBert, start: Sequence[float], name: str | None) -> list[dict[str, Any]]:
    """Returns thresholds around `start`, which come first, and those of the operating points."""
    limits = np.array([min_logit(x) for x in start])
    grid = [limits + min_logit(float(x)) for x in sorted(_GRID, key=lambda x: abs(x - 0.5))]
    settings = [{"name": "", "thresholds": (1 / (1 + np.exp(-x))).tolist()} for x in grid]
    settings[0] = {"name": name or "", "thresholds": [*start]}
    others = (point for point in model.config.operating_points if point.name != name)
    return settings + [{"name": point.name, "thresholds": [*point.thresholds]} for point in others]


def _taken(model: TRBert, examples: Examples, chosen: Array) -> Examples:
    """Returns the inputs made of some records, with these records."""
    records = [examples.records[i] for i in chosen]
    if model.answers_questions:
        return model.task.encode(records, model.require_tokenizer())  # the layout is that of all
    return dataclasses.replace(examples.take(chosen), records=records)


def _details(
    model: TRBert,
    examples: Examples,
    start: Sequence[float],
    name: str | None,
    engine: InferenceEngine,
    repeats: int,
) -> dict[str, Any]:
    """Returns `settings`, from slow to fast, the number of the first one shown, and `inputs`."""
    settings = _settings(model, start, name)
    limits = np.array([[min_logit(x) for x in s["thresholds"]] for s in settings], np.float32)
    copies, rule = copying(engine), RULES[DEFAULT_RULE]
    runs = [*run_copies(copies, model.params, examples, "min_logit", limits, rule, DEFAULT_BACKEND)]
    shape = flops.EncoderShape.of(model.config)
    dense_flops = flops.dense_flops(shape, examples.row_lengths)
    used = np.array([flops.reduced_flops(shape, run.lengths, run.num_kept) for run in runs])  # [n, R]
    order = np.argsort(-used.sum(1), kind="stable")
    judged = _probabilities(copies, model, examples, limits)
    outcomes = {
        "dense": [answers(model, examples, engine.run(model.params, examples, rule="dense"))],
        "reduced": [answers(model, examples, run) for run in runs],
    }
    kept = np.array([run.num_kept for run in runs], np.int32)
    for other in rule_names("baseline"):
        same = run_copies(
            copies, model.params, examples, "num_kept", kept, RULES[other], DEFAULT_BACKEND, seed=0
        )
        outcomes[other] = [answers(model, examples, run) for run in same]
    times = _times(model, examples, settings, repeats)
    owner = owner_of(model, examples)
    inputs = []
    for i, (record, time) in enumerate(zip(examples.records, times, strict=True)):
        rows = np.flatnonzero(owner == i)
        whole = dense_flops[rows].sum()
        inputs.append(
            {
                "id": str(record.id),
                "title": record.question if model.answers_questions else snippet(record.text),
                "right": right(model, record),
                "rows": [_row(model, examples, row, runs, judged, order) for row in rows.tolist()],
                "speedup": [round(float(whole / used[k, rows].sum()), 3) for k in order],
                "dense": outcomes["dense"][0][i],
                **{x: [outcomes[x][k][i] for k in order] for x in outcomes if x != "dense"},
                "ms": time and {"dense": time[0], "reduced": [time[1 + k] for k in order]},
            }
        )
    mean = dense_flops.sum() / used.sum(1)
    for setting, speedup in zip(settings, mean, strict=True):
        setting |= {"speedup": round(float(speedup), 3)}
        setting["thresholds"] = [round(x, 4) for x in setting["thresholds"]]
    first = int(np.flatnonzero(order == 0)[0])
    return {"settings": [settings[k] for k in order], "start": first, "inputs": inputs}


def _probabilities(engine: InferenceEngine, model: TRBert, examples: Examples, limits: Array) -> list[Array]:
    """Returns keep probabilities of each point of reduction, float [settings or 1, R, max_length].

    Those of the first point are the same at all settings. NaN: the token was dropped before.
    """
    found = []
    for stage in range(model.config.num_reductions):
        values = limits[:1] if stage == 0 else limits
        parts = [
            judging_logits(engine, model.params, examples, values[k : k + COPIES], stage, DEFAULT_BACKEND)
            for k in range(0, len(values), COPIES)
        ]
        logits = np.concatenate(parts).astype(np.float64)
        found.append(np.where(logits == -np.inf, np.nan, 1 / (1 + np.exp(-np.clip(logits, -700, None)))))
    return found


def _times(
    model: TRBert, examples: Examples, settings: Sequence[dict[str, Any]], repeats: int
) -> list[list[float] | None]:
    """Returns the milliseconds of each input alone: of the dense model, and of each setting; medians."""
    if not repeats:
        return [None] * len(examples.records)
    engine = model.engine(1)
    ways: list[dict[str, Any]] = [
        {"rule": "dense"},
        *({"threshold": tuple(s["thresholds"])} for s in settings),
    ]
    times: list[list[float] | None] = []
    owner = owner_of(model, examples)
    with streams.bar(len(examples.records), "timing", "input") as bar:
        for i in range(len(examples.records)):
            alone = examples.take(np.flatnonzero(owner == i))
            engine.run(model.params, alone, **ways[0])  # compiles, if nothing has
            engine.run(model.params, alone, **ways[1])
            seconds = [
                [engine.run(model.params, alone, **way).seconds for way in ways] for _ in range(repeats)
            ]
            times.append([round(float(1000 * x), 2) for x in np.median(seconds, 0)])
            bar.update()
    return times


def _row(
    model: TRBert,
    examples: Examples,
    row: int,
    runs: Sequence[Outputs],
    judged: Sequence[Array],
    order: Array,
) -> dict[str, Any]:
    """Returns the tokens of a row, its characters, and where each token left at each setting.

    `texts`, `at` and `begin` are those of `characters`, `p` the keep probabilities in percent at the first
    point. Of each setting `left` has a digit a token, the number of points that it passed, and `p` the
    probabilities at the other points, null for a token that left.
    """
    texts, at, begin = characters(model._encoder, examples, row)
    length = int(examples.row_lengths[row])
    settings = []
    for k in order:
        passed = np.zeros(length, int)
        for stage in runs[k].kept:
            passed[stage[row]] += 1
        later = [[_percent(x) for x in points[k, row, :length]] for points in judged[1:]]
        settings.append({"left": "".join(map(str, passed)), "p": later})
    words = model._encoder.words(examples.row(row))
    first = [_percent(x) for x in judged[0][0, row, :length]]
    return {"texts": texts, "begin": begin, "tokens": words, "at": at, "p": first, "settings": settings}


def _percent(p: float) -> int | None:
    return None if np.isnan(p) else round(100 * float(p))

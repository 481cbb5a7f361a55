"""Draw the page of a run: WORKDIR/report.html, from results.json and the files of its stages."""

import base64
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trbert_jax.config import RunConfig, build_config, without_defaults
from trbert_jax.config.loading import upgrade
from trbert_jax.errors import UserError
from trbert_jax.inference.show_inputs import characters
from trbert_jax.io import read_json
from trbert_jax.model.tokenizers import load_tokenizer
from trbert_jax.pages import Page
from trbert_jax.tasks import Task
from trbert_jax.tasks.text_encoder import TextEncoder
from trbert_jax.training.evaluation import FRONTIER
from trbert_jax.training.experiment import CONFUSION, CURVES, Experiment
from trbert_jax.training.stages import STAGES, compared_models

NUM_EXAMPLES = 5
PICTURES = {
    "frontier": (FRONTIER, "the metric against FLOPs, at the best thresholds for each speed"),
    "curves": (CURVES, "loss, metric, reward, kept tokens and learning rate of each stage"),
    "confusion": (CONFUSION, "confusion matrices of the dense and of the reduced model"),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One model or selection in the table of a run."""

    name: str
    score: float | None  # share of the full score; None: no question of the split has a known answer
    tokens: float  # of a row, mean
    kept: tuple[float, ...]  # after each point of reduction
    flops: float
    speedup: float  # in FLOPs


def compared_rows(config: RunConfig, results: Mapping[str, Any], task: Task) -> Iterator[Row]:
    """Yields the models and selections that a run has evaluated."""
    rows = {"dense": results.get("dense")}
    rows |= {f"after {stage.name}": results.get(stage.name) for stage in compared_models(config)}
    rows["reduced"] = results.get("reduced")
    rows |= {f"{name} tokens": summary for name, summary in results.get("baselines", {}).items()}
    rows |= {f"threshold {name}": summary for name, summary in results.get("thresholds", {}).items()}
    rows |= {f"at {row['target']:g}x": row for row in results.get("frontier", ())}
    for name, summary in rows.items():
        if summary and {"tokens", "flops"} <= summary.keys():  # a stage of one's own may report others
            score = summary.get(task.metric)
            yield Row(
                name=name,
                score=None if score is None else score / task.full_score,
                tokens=summary["tokens"],
                kept=tuple(summary.get("kept", ())),
                flops=summary["flops"],
                speedup=summary.get("flops_speedup", 1.0),
            )


def report(workdir: str | Path) -> Page:
    """Draws the page of a run with at least one finished stage.

    Raises UserError for a folder that is no run's, or has no results yet.
    """
    folder = Path(workdir)
    for name in ("config.json", "results.json"):
        if not (folder / name).is_file():
            advice = "expected the work directory of a run that `trbert train` has finished"
            raise UserError(f"{folder / name}: does not exist; {advice}")
    results, settings = (read_json(folder / name) for name in ("results.json", "config.json"))
    parts = {
        "results.json": (results, {"stages", "versions", "machine"}),
        "config.json": (settings, {"workdir"}),
    }
    for name, (value, keys) in parts.items():
        if not isinstance(value, dict) or not keys <= value.keys():
            raise UserError(f"{folder / name}: is no file of `trbert train`; run it again to mend it")
    config = build_config(upgrade(settings), origin=str(folder / "config.json"))
    experiment = Experiment(config)
    experiment.is_settled = True  # the task is that of the model, without a look at the data
    task = experiment.data.task
    longest = max(1.0, *(stage["seconds"] for stage in results["stages"].values()))
    stages = [
        {"name": name, "purpose": _purpose(name), "share": stage["seconds"] / longest, **stage}
        for name, stage in results["stages"].items()
    ]
    return Page(
        "report.html",
        results,
        title=f"Run {folder.resolve().name}",
        metric=task.metric.replace("_", " "),
        rows=[*compared_rows(config, results, task)],
        points=results.get("operating_points", {}),
        stages=stages,
        pictures=[*_pictures(folder, results)],
        examples=[*_examples(experiment, results.get("split"))],
        classes=_classes(results),
        settings=yaml.safe_dump(without_defaults(config), sort_keys=False, allow_unicode=True),
        notes=results.get("data", {}),
        environment={**results["versions"], **results["machine"]},
        folder=str(folder),
    )


def _purpose(name: str) -> str:
    doc = (STAGES[name].settings.__doc__ or "").splitlines()[0]
    return doc.removeprefix(f"Stage {name}: ").rstrip(".")


def _pictures(folder: Path, results: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yields name, description and address of the pictures that the run has drawn."""
    for name, (file, description) in PICTURES.items():
        if (folder / file).is_file() and (name != "frontier" or "frontier" in results):
            encoded = base64.b64encode((folder / file).read_bytes()).decode("ascii")
            yield name, description, f"data:image/png;base64,{encoded}"


def _classes(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = (results.get("reduced") or results.get("dense") or {}).get(
        "classes", {}
    )
    return found


def _examples(experiment: Experiment, split: str | None) -> Iterator[dict[str, Any]]:
    """Yields the first examples of a split of texts with what the last model predicts and keeps.

    `parts` are pieces of the text with the number of points of reduction they passed; -1 between tokens. None
    if the data or the model is elsewhere now.
    """
    predictions, model = (experiment.workdir / name for name in ("predictions.jsonl", "model"))
    if split is None or not (predictions.is_file() and model.is_dir()):
        return
    with predictions.open(encoding="utf-8") as stream:
        found = [json.loads(line) for line in itertools.islice(stream, NUM_EXAMPLES)]
    try:
        records = experiment.data.records(split)[: len(found)]
        tokenizer = load_tokenizer(str(model))
        examples = experiment.data.task.encode(records, tokenizer)
    except UserError:
        return
    encoder = TextEncoder(tokenizer)
    for row, (record, prediction) in enumerate(zip(examples.records, found, strict=True)):
        texts, at, _ = characters(encoder, examples, row)
        if len(at) != prediction["num_tokens"]:
            return  # other data than was evaluated
        passed = np.zeros(len(at), int)
        for kept in prediction["kept"]:
            passed[kept] += 1
        parts = list[tuple[str, int]]()
        for number, text in enumerate(texts):
            end = 0
            for (of, a, b), count in zip(at, passed.tolist(), strict=True):
                if of == number:
                    parts += [(text[end:a], -1), (text[a:b], count)]
                    end = b
            parts.append((text[end:] + "\n", -1))
        yield {"parts": parts, "points": len(prediction["kept"]), **prediction, "id": record.id}

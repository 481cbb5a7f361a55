"""Stage evaluate, and the evaluation of all checkpoints."""

import dataclasses
import functools
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trbert_jax.config import RunConfig
from trbert_jax.errors import UserError
from trbert_jax.inference import calibrate
from trbert_jax.inference.engine import InferenceEngine
from trbert_jax.inference.evaluate import baseline_runs, evaluate_runs, summarize, write_predictions
from trbert_jax.inference.frontier import best, evaluate_points
from trbert_jax.inference.outputs import Outputs
from trbert_jax.io import atomic_directory, write_json
from trbert_jax.model import operating_points
from trbert_jax.model.card import CARD
from trbert_jax.model.config import model_config_to_dict
from trbert_jax.model.heads import Logits
from trbert_jax.model.pretrained import Pretrained, check_replaceable, write_card
from trbert_jax.reduction.rules import threshold_name
from trbert_jax.tasks import Score
from trbert_jax.tasks.examples import Examples
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.logging import Progress
from trbert_jax.training.loop import saved_params
from trbert_jax.training.stages import Stage, compared_models, configured

logger = logging.getLogger(__name__)

FRONTIER = "frontier.png"


def evaluate_stage(experiment: Experiment, stage: Stage) -> dict[str, Any]:
    """Evaluates the dense model, the models that reduce, and the baselines; exports the last model."""
    settings, devices, task = experiment.config.evaluate, experiment.devices, experiment.data.task
    compared, result = compared_models(experiment.config), dict[str, Any]()
    passes = _Passes(experiment, stage.name, sum(num_passes(experiment.config)))
    for trained in compared:
        model = experiment.load(trained.name, stage.name)
        examples = experiment.features(settings.split, model)
        experiment.check_inputs(stage.name, model, (settings.split,))
        engine = experiment.engine(model.config, settings.batch_size, passes.after_batch)
        params, options = jax.device_put(model.params), trained.evaluation(experiment.config)
        run: Any = functools.partial(engine.run, params, **options)
        outputs = run(examples)
        score = task.score(examples, outputs.logits)
        first, last, threshold = trained is compared[0], trained is compared[-1], dict[str, Any]()
        if first or last:
            threshold = _tune_null_threshold(experiment, model, run, outputs, score)
        if first:
            dense_model, run_dense, dense = model, run, outputs
        name = "dense" if first else "reduced" if last else trained.name
        result[name] = summarize(outputs, model.config, score.report) | (threshold if first else {})
        write = functools.partial(_write_answers, outputs, examples, model, score)
        devices.on_main(functools.partial(write, experiment.workdir / stage.name, f"_{trained.name}"))
    devices.on_main(functools.partial(write, experiment.workdir, ""))
    if outputs.kept:  # of the last model
        variants = {
            "baselines": baseline_runs(outputs, settings.baselines, experiment.config.seed),
            "thresholds": {threshold_name(x): {**options, "threshold": x} for x in settings.thresholds},
        }
        for name, runs in variants.items():
            result[name] = evaluate_runs(
                engine, params, examples, lambda outputs: task.score(examples, outputs.logits).report, runs
            )
    points: tuple[operating_points.OperatingPoint, ...] = ()
    if settings.frontier and outputs.kept:
        dev_outputs = dense if settings.split == "dev" else run_dense(experiment.features("dev", dense_model))
        found, points = _frontier(experiment, engine, params, model, examples, dense, dev_outputs)
        result |= found
        picture = experiment.workdir / FRONTIER
        draw = functools.partial(calibrate.plot_frontier, result, picture, task.metric, task.full_score)
        devices.on_main(draw)
    result |= threshold
    source = experiment.output_of(compared[-1].name, "model", stage.name)
    numbers = {"operating_points": points, "evaluation": _numbers(experiment, result)}
    devices.on_main(functools.partial(_export, source, experiment.workdir / "model", model, result, numbers))
    return {"split": settings.split, "rule": settings.rule, "backend": settings.backend, **result}


def _frontier(
    experiment: Experiment,
    engine: InferenceEngine,
    params: Any,
    model: Pretrained,
    examples: Examples,
    dense: Outputs,
    dense_dev: Outputs,
) -> tuple[dict[str, Any], tuple[operating_points.OperatingPoint, ...]]:
    """Chooses thresholds for many speeds on dev, and evaluates them on the reported examples.

    `dense` and `dense_dev` are the dense model's outputs for these and for dev. Returns what results have of
    it, and the operating points.
    """
    settings, task, dev = experiment.config.evaluate, experiment.data.task, experiment.features("dev", model)
    copies, options = calibrate.copying(engine), dict[str, Any](backend=settings.backend)
    last = getattr(experiment.config, compared_models(experiment.config)[-1].name)
    target = getattr(last, "target_speedup", None)
    speedups = sorted({*settings.speedups, *([target] if target else [])})
    wanted = (speedups, settings.points_lost)
    found, points = calibrate.calibrate(copies, params, dev, task, dense_dev, *wanted, **options)
    options |= {"baselines": settings.baselines, "seed": experiment.config.seed, "named": points}
    rows = evaluate_points(copies, params, examples, task, best(found), dense, **options)
    tried = [dataclasses.asdict(point) for point in found]
    named = operating_points.to_dict(points)
    return {"frontier": rows, "operating_points": named, "frontier_on_dev": tried}, points


def num_passes(config: RunConfig) -> tuple[int, int]:
    """Returns the passes of stage evaluate with dense and reduced models, except to tune null thresholds."""
    compared = compared_models(config)
    reduced = sum(stage.reduces for stage in compared)
    variants = len(config.evaluate.baselines) + len(config.evaluate.thresholds) if reduced else 0
    return len(compared) - reduced, reduced + variants


class _Passes:
    """Shows the progress of stage evaluate, which makes `count` passes over the same examples."""

    def __init__(self, experiment: Experiment, stage: str, count: int) -> None:
        self._devices, self._stage, self._count = experiment.devices, stage, count
        self._size = self._devices.rounded(experiment.config.evaluate.batch_size)
        self._progress: Progress | None = None
        self._digest, self._step, self._total = "", 0, 0

    def after_batch(self, examples: Examples, index: np.ndarray, logits: Logits) -> None:
        """Moves the progress display; on SIGTERM all processes stop after the same batch."""
        if not self._total:
            self._digest, self._total = examples.digest, self._count * -(-len(examples) // self._size)
            self._progress = Progress(self._stage, self._total) if self._devices.is_main else None
        # Null thresholds are tuned on dev, which may be the same examples: no step after the last.
        if self._progress is not None and examples.digest == self._digest and self._step < self._total:
            self._step += 1
            self._progress.update(self._step, len(index))
            if self._step == self._total:
                self._progress.close()
        self._devices.stop_here(f"in {self._stage}")


def _tune_null_threshold(
    experiment: Experiment,
    model: Pretrained,
    run: Callable[[Examples], Outputs],
    outputs: Outputs,
    score: Score,
) -> dict[str, Any]:
    """Tunes the null threshold on the development set and applies it to the reported split; {} without one.

    The published results use 0, and so do `dense` and `reduced`.
    """
    data, split = experiment.data, experiment.config.evaluate.split
    if not data.task.inputs.unanswerable:
        return {}
    if split != "dev":
        dev = experiment.features("dev", model)
        score = data.task.score(dev, run(dev).logits)
    threshold = score.null_threshold
    if threshold is None:  # every question of the development set has an answer
        return {}
    common = len(data.ids("dev") & data.ids(split))
    metrics = data.task.score(experiment.features(split, model), outputs.logits, threshold).metrics
    tuned = {"value": threshold, "tuned_on": "dev", "questions_in_common": common, **metrics}
    return {"null_threshold": tuned}


def _write_answers(
    outputs: Outputs, examples: Examples, model: Pretrained, score: Score, directory: Path, suffix: str
) -> None:
    """Writes predictions in the official scorer's format; for labels, one JSON line per example."""
    if not score.files:
        write_predictions(directory / f"predictions{suffix}.jsonl", outputs, examples, model.config.labels)
    for name, content in score.files.items():
        path = directory / name
        write_json(path.with_stem(path.stem + suffix), content)


def _numbers(experiment: Experiment, result: Mapping[str, Any]) -> operating_points.Evaluation | None:
    """Returns what the model's card says of an evaluation; None without a reduced model and known answers."""
    dense, reduced = result["dense"], result.get("reduced", {})
    metric = experiment.data.task.metric
    if metric not in reduced or "flops_speedup" not in reduced:
        return None
    return operating_points.Evaluation(
        data=experiment.config.data.name,
        split=experiment.config.evaluate.split,
        examples=reduced["examples"],
        metric=metric,
        dense=dense[metric],
        reduced=reduced[metric],
        speedup=reduced["flops_speedup"],
    )


def _export(
    source: Path,
    target: Path,
    model: Pretrained,
    result: Mapping[str, Any],
    numbers: Mapping[str, Any],
) -> None:
    """Copies the model of the last stage and adds the tuned null threshold and the numbers of its config."""
    check_replaceable(target)
    with atomic_directory(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        inputs = model.config.inputs
        if "null_threshold" in result:
            inputs = dataclasses.replace(inputs, null_threshold=result["null_threshold"]["value"])
        config = dataclasses.replace(model.config, inputs=inputs, **numbers)
        if config != model.config:
            write_json(temporary / "config.json", model_config_to_dict(config))
            (temporary / CARD).unlink(missing_ok=True)
            write_card(temporary, config)


def evaluate_all_checkpoints(config: RunConfig, output: Path | None = None) -> dict[str, Any]:
    """Evaluates every checkpoint of the training stages on the configured split; `output` gets the numbers.

    Returns stage -> `step_N` -> the numbers of `summarize`; and `best` and `last`, numbers of steps. Raises
    `UserError` if the work directory belongs to another configuration or has no checkpoint, or `output` is a
    file of it or of the data.
    """
    experiment = Experiment(config)
    experiment.check_owner()
    experiment.check_paths(output)
    experiment.is_settled = True  # checkpoints are evaluated as they are
    results = dict[str, Any]()
    for stage in configured(config):
        if not (experiment.workdir / stage.name / "checkpoints").is_dir():
            continue
        model, store, params_at = saved_params(experiment, stage)
        engine = experiment.engine(model.config, config.evaluate.batch_size)
        examples = experiment.features(config.evaluate.split, model)
        results[stage.name] = {"best": store.best_step(), "last": store.latest_step()}
        for step in store.steps():
            logger.info("%s: evaluating step %d", stage.name, step)
            outputs = engine.run(params_at(step), examples, **stage.evaluation(config))
            metrics = experiment.data.task.score(examples, outputs.logits).report
            results[stage.name][f"step_{step}"] = summarize(outputs, model.config, metrics)
    if not results:
        advice = "run `trbert train` with this configuration first"
        raise UserError(f"{experiment.workdir}: has no checkpoints; {advice}")
    return results

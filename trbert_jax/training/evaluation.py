"""Stage evaluate: every model of a run on the same texts; and every checkpoint that a run has kept."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trbert_jax.config import RunConfig
from trbert_jax.errors import UserError
from trbert_jax.inference.engine import InferenceEngine, Outputs
from trbert_jax.inference.evaluate import run_baselines, run_thresholds, summarize, write_predictions
from trbert_jax.io import atomic_directory, write_json
from trbert_jax.model.config import model_config_to_dict
from trbert_jax.model.heads import Logits
from trbert_jax.model.pretrained import Pretrained
from trbert_jax.tasks import Score
from trbert_jax.tasks.examples import Examples
from trbert_jax.training import loop, stages
from trbert_jax.training.experiment import Announce, Experiment
from trbert_jax.training.logging import Progress
from trbert_jax.training.preemption import stop_here
from trbert_jax.training.step import init_state, merge_params, split_params


def evaluate_stage(run: Experiment) -> dict[str, Any]:
    """Evaluates the dense model, every model with selectors, and the baselines; exports the last one."""
    split, settings = run.config.evaluate.split, run.config.evaluate
    directory = run.directory("evaluate")
    result: dict[str, Any] = {}
    after = [s for s in ("policy", "joint") if s in run.config.stages]
    compared = list(dict.fromkeys(["finetune", *after, run.last_model_stage]))  # the last may be init
    others = len(settings.baselines) + len(settings.thresholds) if len(compared) > 1 else 0
    passes = _Passes(run, len(compared) + others)
    for stage in compared:
        model = run.load(stage, "evaluate")
        features = run.features(split, model)
        run.check_inputs("evaluate", model, (split,))
        runner = run.runner(model.config, settings.batch_size, passes.after_batch)
        params = jax.device_put(model.params)
        how = stages.rule_and_backend(run.config, stage)
        outputs = runner.run(params, features, **how)
        score = run.score(split, model, outputs)
        summary = summarize(outputs, model.config, score.metrics)
        last = stage == run.last_model_stage
        if stage == "finetune":
            result["dense"] = summary | _tune_null_threshold(run, model, runner, how, outputs, score)
        else:
            result["reduced" if last else stage] = summary
        _write_answers(directory, f"_{stage}", run, outputs, features, model, score)
        if last:
            _write_answers(run.workdir, "", run, outputs, features, model, score)
            if outputs.kept:

                def judge(found: Outputs, model: Pretrained = model) -> dict[str, float]:
                    return run.score(split, model, found).metrics

                result["baselines"] = run_baselines(
                    runner, params, features, outputs, settings.baselines, run.config.seed, judge
                )
                result["thresholds"] = run_thresholds(
                    runner, params, features, judge, settings.thresholds, **how
                )
            result |= _tune_null_threshold(run, model, runner, how, outputs, score)
    source = run.output_of(run.last_model_stage, "model", "evaluate")
    run.layout.on_main(lambda: _export(run, source, model, result))
    return {"split": split, "rule": settings.rule, "backend": settings.backend, **result}


class _Passes:
    """How far stage evaluate is, which goes over the same texts `count` times; of others nothing is shown."""

    def __init__(self, run: Experiment, count: int) -> None:
        self._layout, self._count = run.layout, count
        self._size = run.layout.rounded(run.config.evaluate.batch_size)
        self._progress: Progress | None = None
        self._digest, self._step, self._total = "", 0, 0

    def after_batch(self, features: Examples, index: np.ndarray, logits: Logits) -> None:
        """Shows it, and stops where that was asked for: of several processes all after the same batch."""
        if not self._total:
            self._digest, self._total = features.digest, self._count * -(-len(features) // self._size)
            self._progress = Progress("evaluate", self._total) if self._layout.is_main else None
        # Dev, which a null threshold is tuned on, may be the same texts: no step beyond the last.
        if self._progress is not None and features.digest == self._digest and self._step < self._total:
            self._step += 1
            self._progress.update(self._step, len(index))
            if self._step == self._total:
                self._progress.close()
        stop_here(self._layout, "in evaluate")


def _export(run: Experiment, source: Path, model: Pretrained, result: Mapping[str, Any]) -> None:
    """The run's own model: that of the last stage, with what evaluation found out."""
    with atomic_directory(run.workdir / "model") as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        if "null_threshold" in result:
            inputs = dataclasses.replace(
                model.config.inputs, null_threshold=result["null_threshold"]["value"]
            )
            config = dataclasses.replace(model.config, inputs=inputs)
            write_json(temporary / "config.json", model_config_to_dict(config))


def _tune_null_threshold(
    run: Experiment,
    model: Pretrained,
    runner: InferenceEngine,
    how: Mapping[str, Any],
    outputs: Outputs,
    reported: Score,
) -> dict[str, Any]:
    """The best null threshold on the development set, and what it gives on the split that is reported.

    The published results use 0, and so do `dense` and `reduced`. Empty for tasks without such a threshold.
    """
    data, split = run.data, run.config.evaluate.split
    if reported.null_threshold is None:
        return {}
    tuned_on = reported
    if split != "dev":
        outputs_on_dev = runner.run(model.params, run.features("dev", model), **how)
        tuned_on = run.score("dev", model, outputs_on_dev)
    threshold = tuned_on.null_threshold
    if threshold is None:  # a development set in which every question has an answer
        return {}
    common = len(data.ids("dev") & data.ids(split))
    metrics = run.score(split, model, outputs, threshold).metrics
    found = {"value": threshold, "tuned_on": "dev", "questions_in_common": common, **metrics}
    return {"null_threshold": found}


def _write_answers(
    directory: Path,
    suffix: str,
    run: Experiment,
    outputs: Outputs,
    features: Examples,
    model: Pretrained,
    score: Score,
) -> None:
    """Predictions as the official scorer reads them; of labels, one JSON line an example."""

    def write() -> None:
        if not score.files:
            path = directory / f"predictions{suffix}.jsonl"
            write_predictions(path, outputs, features, model.config.labels)
        for name, content in score.files.items():
            path = directory / name
            write_json(path.with_stem(path.stem + suffix), content)

    run.layout.on_main(write)


def evaluate_all_checkpoints(config: RunConfig, announce: Announce = print) -> dict[str, Any]:
    """Evaluates every checkpoint that the training stages have kept, on the configured split.

    Returns:
      stage -> `step_N` -> the numbers of `summarize`, and which step is `best` and which `last`.

    Raises:
      UserError: the work directory belongs to another configuration or has no checkpoint.
    """
    run = Experiment(config, announce)
    run.check_owner()
    results: dict[str, Any] = {}
    for stage in config.stages:
        if not (run.directory(stage) / "checkpoints").is_dir():
            continue
        prepared = stages.prepare(run, stage)
        training, model_config = prepared.training, prepared.start.config
        store = training.checkpoints()
        features = run.features(config.evaluate.split, prepared.start)
        runner = run.runner(model_config, config.evaluate.batch_size)
        how = stages.rule_and_backend(config, stage)
        trained, frozen = split_params(jax.device_put(prepared.start.params), training.trains)
        like = init_state(trained, training.optimizer()[0])
        results[stage] = {"best": store.best_step(), "last": store.latest_step()}
        for step in store.steps():
            announce(f"{stage}: evaluating step {step}")
            params = merge_params(loop.restore_state(store, step, like).trained, frozen)
            outputs = runner.run(params, features, **how)
            score = run.score(config.evaluate.split, prepared.start, outputs)
            results[stage][f"step_{step}"] = summarize(outputs, model_config, score.metrics)
    if not results:
        raise UserError(
            f"{run.workdir}: has no checkpoints; run `trbert train` with this configuration first"
        )
    return results

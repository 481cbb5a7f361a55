"""All stages of a run, in order, from one configuration; its results in one JSON and one table."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trbert_jax.config import STAGES, RunConfig, to_dict
from trbert_jax.data.features import FeatureSet
from trbert_jax.errors import UserError
from trbert_jax.evaluate import run_baselines, run_thresholds, summarize, write_predictions
from trbert_jax.files import atomic_directory, make_directory, write_json
from trbert_jax.modeling.heads import Logits
from trbert_jax.modeling.hf_config import model_config_to_dict
from trbert_jax.modeling.pretrained import Pretrained
from trbert_jax.parallel import check_batch
from trbert_jax.runner import Outputs, Runner
from trbert_jax.task_data import Score
from trbert_jax.task_data.base import QuestionData
from trbert_jax.training import loop, stages
from trbert_jax.training.batches import Announce
from trbert_jax.training.optimizer import merge_params, split_params
from trbert_jax.training.progress import Progress
from trbert_jax.training.report import plot_metrics
from trbert_jax.training.run import Run
from trbert_jax.training.steps import init_state
from trbert_jax.training.watch import stop_here

PACKAGES = (
    "trbert-jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "tokenizers",
    "numpy",
)


def train(
    config: RunConfig,
    only: Sequence[str] | None = None,
    announce: Announce = print,
    profile_steps: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Runs the stages of a configuration that are not finished yet.

    Of several processes each calls this, with the same work directory; the first one writes.

    Args:
      config: the run.
      only: the stages to run, in any order; None for all that the configuration names.
      announce: prints a line for the user.
      profile_steps: updates of each stage (0-based, first and one past the last) to record a profile of.

    Returns:
      What is written to `WORKDIR/results.json`.

    Raises:
      UserError: an unknown stage, a work directory of another configuration, missing inputs, bad data,
        devices that cannot share a batch, processes that do not agree.
      PreemptedError: the process was told to stop and has saved a checkpoint.
    """
    chosen = _chosen_stages(config, only)
    announce = announce if jax.process_index() == 0 else _say_nothing
    run = Run(config, announce, profile_steps)
    layout = run.layout
    for stage in (stage for stage in chosen if stage not in _RUN):
        check_batch(stage, getattr(config, stage).batch_size, layout.num_devices)
    if not layout.is_single:
        announce(layout.describe())
    if any(run.finished(stage) is None for stage in chosen if stage != "evaluate"):
        run.check_prepared()
    with run.claim(chosen):
        for stage in chosen:
            done = run.finished(stage)
            if done is not None:
                announce(f"{stage}: finished before, skipped (delete {run.directory(stage)} to run it again)")
                continue
            announce(f"{stage}: starting, files in {run.directory(stage)}")
            start = time.perf_counter()
            layout.on_main(functools.partial(make_directory, run.directory(stage)))
            stop_here(layout, f"before {stage}")
            summary = _RUN[stage](run) if stage in _RUN else stages.train_stage(run, stage)
            seconds = time.perf_counter() - start
            notes = {"data": run.data.notes} if run.data.notes else {}
            report = {**summary, **notes, "seconds": seconds}
            layout.on_main(functools.partial(write_json, run.directory(stage) / "done.json", report))
            announce(f"{stage}: done in {seconds:.1f} s")
        results = collect_results(run)
        layout.on_main(lambda: _write_results(run, results))
        announce("\n".join(results_table(run, results)))
        return results


def _write_results(run: Run, results: dict[str, Any]) -> None:
    write_json(run.workdir / "results.json", results)
    trained = [run.directory(stage) for stage in results["stages"] if stage not in _RUN]
    if trained:
        plot_metrics(trained, run.workdir / "curves.png")


def evaluate_stage(run: Run) -> dict[str, Any]:
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
        execution = "dense" if stage == "finetune" else settings.execution
        outputs = runner.run(params, features, execution)
        score = run.score(split, model, outputs)
        summary = summarize(outputs, model.config, score.metrics)
        last = stage == run.last_model_stage
        if stage == "finetune":
            result["dense"] = summary | _tune_null_threshold(run, model, runner, execution, outputs, score)
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
                    runner, params, features, execution, settings.thresholds, judge
                )
            result |= _tune_null_threshold(run, model, runner, execution, outputs, score)
    source = run.output_of(run.last_model_stage, "model", "evaluate")
    run.layout.on_main(lambda: _export(run, source, model, result))
    return {"split": split, "execution": settings.execution, **result}


class _Passes:
    """How far stage evaluate is, which goes over the same texts `count` times; of others nothing is shown."""

    def __init__(self, run: Run, count: int) -> None:
        self._layout, self._count = run.layout, count
        self._size = run.layout.rounded(run.config.evaluate.batch_size)
        self._progress: Progress | None = None
        self._digest, self._step, self._total = "", 0, 0

    def after_batch(self, features: FeatureSet, index: np.ndarray, logits: Logits) -> None:
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


def _export(run: Run, source: Path, model: Pretrained, result: Mapping[str, Any]) -> None:
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
    run: Run, model: Pretrained, runner: Runner, execution: str, outputs: Outputs, reported: Score
) -> dict[str, Any]:
    """The best null threshold on the development set, and what it gives on the split that is reported.

    The published results use 0, and so do `dense` and `reduced`. Empty for tasks without such a threshold.
    """
    data, split = run.data, run.config.evaluate.split
    if not isinstance(data, QuestionData) or data.best_null_threshold(reported.metrics) is None:
        return {}
    tuned_on = reported
    if split != "dev":
        outputs_on_dev = runner.run(model.params, run.features("dev", model), execution)
        tuned_on = run.score("dev", model, outputs_on_dev)
    threshold = data.best_null_threshold(tuned_on.metrics)
    if threshold is None:  # a development set in which every question has an answer
        return {}
    common = len(data.ids("dev") & data.ids(split))
    data.null_threshold = threshold
    try:
        metrics = run.score(split, model, outputs).metrics
    finally:
        data.null_threshold = QuestionData.null_threshold
    found = {"value": threshold, "tuned_on": "dev", "questions_in_common": common, **metrics}
    return {"null_threshold": found}


def _write_answers(
    directory: Path,
    suffix: str,
    run: Run,
    outputs: Outputs,
    features: FeatureSet,
    model: Pretrained,
    score: Score,
) -> None:
    """Predictions as the official scorer reads them; of labels, one JSON line an example."""

    def write() -> None:
        if run.data.task == "classification" and not score.files:
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
    run = Run(config, announce)
    run.check_owner()
    results: dict[str, Any] = {}
    for stage in config.stages:
        if stage in _RUN or not (run.directory(stage) / "checkpoints").is_dir():
            continue
        prepared = stages.prepare(run, stage)
        training, model_config = prepared.training, prepared.start.config
        store = training.checkpoints(announce)
        features = run.features(config.evaluate.split, prepared.start)
        runner = run.runner(model_config, config.evaluate.batch_size)
        execution = "dense" if stage == "finetune" else config.evaluate.execution
        trained, frozen = split_params(jax.device_put(prepared.start.params), training.trains)
        like = init_state(trained, training.optimizer()[0])
        results[stage] = {"best": store.best_step(), "last": store.latest_step()}
        for step in store.steps():
            announce(f"{stage}: evaluating step {step}")
            params = merge_params(loop.restore_state(store, step, like).trained, frozen)
            outputs = runner.run(params, features, execution)
            score = run.score(config.evaluate.split, prepared.start, outputs)
            results[stage][f"step_{step}"] = summarize(outputs, model_config, score.metrics)
    if not results:
        raise UserError(
            f"{run.workdir}: has no checkpoints; run `trbert train` with this configuration first"
        )
    return results


def collect_results(run: Run) -> dict[str, Any]:
    """Everything there is to say about a run so far."""
    done = {stage: summary for stage in run.config.stages if (summary := run.finished(stage)) is not None}
    notes: dict[str, Any] = {}
    for summary in done.values():
        notes |= summary.pop("data", {})
    evaluated = {k: v for k, v in done.pop("evaluate", {}).items() if k != "steps"}
    seconds = {"evaluate": {"seconds": evaluated.pop("seconds")}} if evaluated else {}
    return {
        **evaluated,
        **({"data": notes} if notes else {}),
        "stages": {**done, **seconds},
        "config": to_dict(run.config),
        "seed": run.config.seed,
        "versions": _versions(),
        "machine": _machine(),
    }


def results_table(run: Run, results: dict[str, Any]) -> Iterator[str]:
    """Lines for people: accuracy, tokens and FLOPs of each model, seconds of each stage, what is where."""
    metric = run.data.metric
    rows = [
        ("dense", results.get("dense")),
        ("after policy", results.get("policy")),
        ("reduced", results.get("reduced")),
    ]
    rows += [(f"{name} tokens", summary) for name, summary in results.get("baselines", {}).items()]
    rows += [(f"threshold {name}", summary) for name, summary in results.get("thresholds", {}).items()]
    yield ""
    if any(summary for _, summary in rows):
        yield f"{'model':<16} {metric:>9} {'tokens kept':>22} {'MFLOPs':>9} {'speed-up':>9}"
    for name, summary in rows:
        if summary:
            kept = " -> ".join(f"{x:.1f}" for x in [summary["tokens"], *summary.get("kept", [])])
            speedup = f"{summary.get('flops_speedup', 1.0):.2f}x"
            # Some official scorers count from 0 to 1, others from 0 to 100.
            worth = f"{summary[metric]:.1%}" if summary[metric] <= 1 else f"{summary[metric]:.1f}%"
            flops = f"{summary['flops'] / 1e6:.1f}"
            yield f"{name:<16} {worth:>9} {kept:>22} {flops:>9} {speedup:>9}"
    yield ""
    yield "seconds a stage:  " + ", ".join(f"{k} {v['seconds']:.0f}" for k, v in results["stages"].items())
    yield f"numbers           {run.workdir / 'results.json'}"
    if (run.workdir / "curves.png").exists():
        yield f"training curves   {run.workdir / 'curves.png'}"
    if (run.workdir / "model").is_dir():
        yield f"model             {run.workdir / 'model'}"
        what = "--file questions.jsonl" if isinstance(run.data, QuestionData) else '"some text"'
        yield f"next              trbert predict --model {run.workdir / 'model'} {what}"


_RUN: dict[str, Callable[[Run], dict[str, Any]]] = {
    "score": stages.score_stage,
    "teacher": stages.teacher_stage,
    "evaluate": evaluate_stage,
}


def _chosen_stages(config: RunConfig, only: Sequence[str] | None) -> list[str]:
    if only is None:
        return list(config.stages)
    for stage in only:
        if stage not in STAGES:
            raise UserError(f"--stages: no stage is called {stage!r}; expected some of {', '.join(STAGES)}")
        if stage not in config.stages:
            raise UserError(
                f"--stages: this configuration does not have the stage {stage}; "
                f"its stages are {', '.join(config.stages)}"
            )
    return [stage for stage in STAGES if stage in only]


def _say_nothing(message: str) -> None:
    """What a process says that is not the first."""


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "processes": jax.process_count(),
    }

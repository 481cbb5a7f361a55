"""Run the stages of an experiment in order, evaluate its models, and summarize the results."""

import dataclasses
import functools
import importlib.metadata
import logging
import os
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trbert_jax.config import RunConfig, to_dict, without_defaults
from trbert_jax.errors import UserError, iterable
from trbert_jax.inference.class_report import class_table, plot_confusion
from trbert_jax.inference.engine import Outputs
from trbert_jax.inference.evaluate import baseline_runs, evaluate_runs, summarize, write_predictions
from trbert_jax.io import atomic_directory, atomic_file, make_directory, write_json
from trbert_jax.model.config import model_config_to_dict
from trbert_jax.model.heads import Logits
from trbert_jax.model.pretrained import Pretrained, check_replaceable
from trbert_jax.parallel import check_batch, find_devices
from trbert_jax.reduction.rules import threshold_name
from trbert_jax.tasks import Score
from trbert_jax.tasks.examples import Examples
from trbert_jax.training import made_from
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.logging import Progress, plot_metrics
from trbert_jax.training.loop import saved_params, train_stage
from trbert_jax.training.prepared import read_provenance
from trbert_jax.training.stages import STAGES, Stage, compared_models, configured

logger = logging.getLogger(__name__)

SETTINGS = "run.yaml"
PACKAGES = ["trbert-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"]
PACKAGES += ["transformers", "tokenizers", "numpy"]


def train(
    config: RunConfig,
    only: Sequence[str] | None = None,
    profile_steps: tuple[int, int] | None = None,
    write_settings: bool = False,
) -> dict[str, Any]:
    """Runs the stages of a configuration that are not finished yet; returns `WORKDIR/results.json`.

    Each of several processes calls this with the same work directory; the first one writes. `only` names the
    stages to run, in any order (None: all configured stages). `profile_steps` are the updates of each stage
    to profile: the first (0-based) and one past the last. `write_settings` writes `WORKDIR/run.yaml`, with
    which `trbert train --config` does the same run.

    Raises `PreemptedError` after SIGTERM, with a checkpoint saved; `UserError` for an unknown stage, a work
    directory of another configuration, missing inputs, bad data, devices that cannot share a batch, or
    processes that do not agree.
    """
    only = None if only is None else list(iterable("only", only, "only=[stage]"))
    chosen = _chosen_stages(config, only)
    find_devices()  # before anything else asks JAX
    if jax.process_index() != 0:
        logging.getLogger("trbert_jax").setLevel(logging.ERROR)
    experiment = Experiment(config, profile_steps)
    devices = experiment.devices
    for stage in chosen:
        if not stage.evaluates:
            stage.max_examples(config)  # before any long computation
        if stage.trains:
            check_batch(stage.name, getattr(config, stage.name).batch_size, devices.num_devices)
    if not devices.is_single:
        logger.info(devices.describe())
    to_evaluate = any(stage.evaluates and experiment.finished(stage.name) is None for stage in chosen)
    if config.evaluate.split == "test" and to_evaluate:
        experiment.data.require_test_set()
    reads_train = [stage.name for stage in chosen if not stage.evaluates]
    if config.data.prepared and any(experiment.finished(name) is None for name in reads_train):
        read_provenance(config.data.prepared, "train")  # before any long computation
    with experiment.claim([stage.name for stage in chosen]):
        if write_settings:
            devices.on_main(functools.partial(_write_settings, config))
        for number, stage in enumerate(chosen):
            _run_stage(experiment, stage, [before.name for before in chosen[:number]])
        results = collect_results(experiment)
        devices.on_main(functools.partial(write_json, experiment.workdir / "results.json", results))
        trained = [experiment.workdir / name for name in results["stages"] if STAGES[name].trains]
        if trained:
            devices.on_main(functools.partial(plot_metrics, trained, experiment.workdir / "curves.png"))
        if evaluated := _with_classes(results):
            picture = experiment.workdir / "confusion.png"
            devices.on_main(functools.partial(plot_confusion, evaluated, picture))
    return results


def _write_settings(config: RunConfig) -> None:
    import yaml

    path = Path(config.workdir) / SETTINGS
    command = shlex.join(["trbert", "train", "--config", str(path)])
    settings = yaml.safe_dump(without_defaults(config), sort_keys=False, allow_unicode=True)
    with atomic_file(path) as stream:
        stream.write(f"# The settings of this run: {command}\n\n{settings}")


def _chosen_stages(config: RunConfig, only: Sequence[str] | None) -> list[Stage]:
    for name in only or ():
        if name not in STAGES:
            raise UserError(f"--stages: no stage is called {name!r}; expected some of {', '.join(STAGES)}")
        if name not in config.stages:
            missing = f"this configuration does not have the stage {name}"
            raise UserError(f"--stages: {missing}; its stages are {', '.join(config.stages)}")
    return [stage for stage in configured(config) if only is None or stage.name in only]


def _run_stage(experiment: Experiment, stage: Stage, done: Sequence[str]) -> None:
    """Runs a stage unless it is finished and not stale, and records its summary in `done.json`.

    `done` are the stages before it that are not stale.
    """
    devices, directory, finished = experiment.devices, experiment.workdir / stage.name, list[bool]()

    def settle() -> None:
        made_from.check_upstream(experiment, stage, STAGES, done, stage.name)
        finished.append(made_from.settle(experiment, stage, STAGES))

    experiment.is_settled = not stage.trains or bool(stage.starts_from)
    devices.on_main(settle)
    experiment.is_settled = True
    if devices.broadcast(str(finished)) == str([True]):
        logger.info("%s: finished before, skipped (delete %s to run it again)", stage.name, directory)
        return
    logger.info("%s: starting, files in %s", stage.name, directory)
    start = time.perf_counter()
    devices.on_main(functools.partial(make_directory, directory))
    devices.stop_here(f"before {stage.name}")
    summary = stage.run(experiment, stage) if stage.run else train_stage(experiment, stage)
    seconds = time.perf_counter() - start
    notes = {"data": experiment.data.notes} if experiment.data.notes else {}
    summary = {**summary, **notes, "seconds": seconds}

    def record() -> None:
        made_from.finish(experiment, stage)
        write_json(directory / "done.json", summary)

    devices.on_main(record)
    logger.info("%s: done in %.1f s", stage.name, seconds)


# Evaluation ---------------------------------------------------------------------------------------


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
    result |= threshold
    source = experiment.output_of(compared[-1].name, "model", stage.name)
    devices.on_main(functools.partial(_export, source, experiment.workdir / "model", model, result))
    return {"split": settings.split, "rule": settings.rule, "backend": settings.backend, **result}


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


def _export(source: Path, target: Path, model: Pretrained, result: Mapping[str, Any]) -> None:
    """Copies the model of the last stage and adds the tuned null threshold."""
    check_replaceable(target)
    with atomic_directory(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
        if "null_threshold" in result:
            value = result["null_threshold"]["value"]
            inputs = dataclasses.replace(model.config.inputs, null_threshold=value)
            config = dataclasses.replace(model.config, inputs=inputs)
            write_json(temporary / "config.json", model_config_to_dict(config))


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


# Results ------------------------------------------------------------------------------------------


def collect_results(experiment: Experiment) -> dict[str, Any]:
    """Collects the results of all finished stages that are not stale, with settings, versions and machine."""
    evaluated, notes, stages, stale = dict[str, Any](), dict[str, Any](), dict[str, Any](), set[str]()
    for stage in configured(experiment.config):
        summary = experiment.finished(stage.name)
        if summary is None:
            continue
        inherited = [f"stage {name} is stale" for name in stage.reads(experiment.config) if name in stale]
        if reasons := made_from.stale(experiment, stage, STAGES) or inherited:
            stale.add(stage.name)
            left_out = "left out of results.json; leave --stages out to make it again"
            logger.warning("%s: stale (%s), %s", stage.name, "; ".join(reasons), left_out)
            continue
        notes |= summary.pop("data", {})
        if stage.evaluates:
            evaluated, summary = summary, {"seconds": summary.pop("seconds")}
        stages[stage.name] = summary
    return {
        **evaluated,
        **({"data": notes} if notes else {}),
        "stages": stages,
        "config": to_dict(experiment.config),
        "seed": experiment.config.seed,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": {
            "platform": platform.platform(),
            "processor": platform.machine(),
            "cpus": os.cpu_count(),
            "devices": [device.device_kind for device in jax.devices()],
            "processes": jax.process_count(),
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _with_classes(results: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: results.get(name) for name in ("dense", "reduced")}
    return {name: summary for name, summary in found.items() if summary and "classes" in summary}


def results_table(config: RunConfig, results: dict[str, Any]) -> Iterator[str]:
    """Yields lines of text: metric, tokens and FLOPs of each model, seconds of each stage, written files.

    Only the first process gets lines.
    """
    if jax.process_index() != 0:
        return
    experiment = Experiment(config)
    experiment.is_settled = True
    task, workdir = experiment.data.task, experiment.workdir
    rows = {"dense": results.get("dense")}
    rows |= {f"after {stage.name}": results.get(stage.name) for stage in compared_models(config)}
    rows["reduced"] = results.get("reduced")
    rows |= {f"{name} tokens": summary for name, summary in results.get("baselines", {}).items()}
    rows |= {f"threshold {name}": summary for name, summary in results.get("thresholds", {}).items()}
    yield ""
    if any(rows.values()):
        yield f"{'model':<16} {task.metric:>9} {'tokens kept':>22} {'MFLOPs':>9} {'speed-up':>9}"
    for name, summary in rows.items():
        if summary:
            kept = " -> ".join(f"{x:.1f}" for x in [summary["tokens"], *summary.get("kept", [])])
            speedup = f"{summary.get('flops_speedup', 1.0):.2f}x"
            score = summary.get(task.metric)  # no question of the split has a known answer
            value = "-" if score is None else f"{score / task.full_score:.1%}"
            flops = f"{summary['flops'] / 1e6:.1f}"
            yield f"{name:<16} {value:>9} {kept:>22} {flops:>9} {speedup:>9}"
    yield ""
    evaluated = _with_classes(results)
    for name, summary in [*evaluated.items()][-1:]:
        yield f"{name}: macro F1 {summary['macro_f1']:.3f}"
        yield from class_table(summary)
        yield ""
    yield "seconds a stage:  " + ", ".join(f"{k} {v['seconds']:.0f}" for k, v in results["stages"].items())
    if (workdir / SETTINGS).exists():
        yield f"settings          {workdir / SETTINGS}"
    yield f"numbers           {workdir / 'results.json'}"
    if (workdir / "curves.png").exists():
        yield f"training curves   {workdir / 'curves.png'}"
    if evaluated:
        yield f"confusion matrix  {workdir / 'confusion.png'}"
    if any(STAGES[name].evaluates for name in results["stages"]) and (workdir / "model").is_dir():
        yield f"model             {workdir / 'model'}"
        request = "--file pairs.csv" if task.inputs.text_pair_field else '"some text"'
        request = "--file questions.jsonl" if task.inputs.data else request
        yield f"next              trbert predict --model {workdir / 'model'} {request}"

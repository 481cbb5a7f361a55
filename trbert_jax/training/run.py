"""Run the stages of an experiment in order, evaluate its models, and summarize the results."""

import functools
import importlib.metadata
import logging
import os
import platform
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from trbert_jax.config import RunConfig, to_dict, without_defaults
from trbert_jax.errors import UserError, iterable
from trbert_jax.inference.class_report import class_table, plot_confusion
from trbert_jax.io import atomic_file, make_directory, write_json
from trbert_jax.parallel import check_batch, find_devices
from trbert_jax.training import made_from
from trbert_jax.training.evaluation import FRONTIER
from trbert_jax.training.experiment import CONFUSION, CURVES, REPORT, Experiment
from trbert_jax.training.logging import plot_metrics
from trbert_jax.training.loop import train_stage
from trbert_jax.training.prepared import read_provenance
from trbert_jax.training.report import compared_rows, report
from trbert_jax.training.stages import STAGES, Stage, configured

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
            devices.on_main(functools.partial(plot_metrics, trained, experiment.workdir / CURVES))
        if evaluated := _with_classes(results):
            picture = experiment.workdir / CONFUSION
            devices.on_main(functools.partial(plot_confusion, evaluated, picture))
        devices.on_main(functools.partial(_write_report, experiment.workdir))
    return results


def _write_report(workdir: Path) -> None:
    try:
        report(workdir).save(workdir / REPORT)
    except UserError as error:  # the data may be elsewhere by now; the numbers are written
        logger.warning("%s: not drawn, %s", workdir / REPORT, error)


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
    rows = [*compared_rows(config, results, task)]
    yield ""
    if rows:
        yield f"{'model':<16} {task.metric:>9} {'tokens kept':>22} {'MFLOPs':>9} {'speed-up':>9}"
    for row in rows:
        kept = " -> ".join(f"{x:.1f}" for x in (row.tokens, *row.kept))
        value = "-" if row.score is None else f"{row.score:.1%}"
        yield f"{row.name:<16} {value:>9} {kept:>22} {row.flops / 1e6:>9.1f} {f'{row.speedup:.2f}x':>9}"
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
    if (workdir / REPORT).exists():
        yield f"report            {workdir / REPORT}"
    if (workdir / CURVES).exists():
        yield f"training curves   {workdir / CURVES}"
    if "frontier" in results and (workdir / FRONTIER).exists():
        yield f"frontier          {workdir / FRONTIER}"
        yield f"operating points  {', '.join(results['operating_points'])}"
    if evaluated:
        yield f"confusion matrix  {workdir / CONFUSION}"
    if any(STAGES[name].evaluates for name in results["stages"]) and (workdir / "model").is_dir():
        yield f"model             {workdir / 'model'}"
        request = "--file pairs.csv" if task.inputs.text_pair_field else '"some text"'
        request = "--file questions.jsonl" if task.inputs.data else request
        yield f"next              trbert predict --model {workdir / 'model'} {request}"

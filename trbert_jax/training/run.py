"""Run the stages of an experiment in order; write and summarize its results."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import platform
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from trbert_jax.config import RunConfig, to_dict
from trbert_jax.errors import UserError
from trbert_jax.io import make_directory, write_json
from trbert_jax.parallel import check_batch
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.logging import plot_metrics
from trbert_jax.training.loop import train_stage
from trbert_jax.training.prepared import read_provenance
from trbert_jax.training.stages import STAGES, Stage, compared_models, configured

logger = logging.getLogger(__name__)

PACKAGES: tuple[str, ...] = ("trbert-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
PACKAGES += ("transformers", "tokenizers", "numpy")


def train(
    config: RunConfig,
    only: Sequence[str] | None = None,
    profile_steps: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Runs the stages of a configuration that are not finished yet.

    Each of several processes calls this with the same work directory; the first one writes.

    Args:
      config: settings of all stages.
      only: names of the stages to run, in any order; None for all configured stages.
      profile_steps: updates of each stage to profile: the first (0-based) and one past the last.

    Returns:
      The content of `WORKDIR/results.json`.

    Raises:
      UserError: an unknown stage, a work directory of another configuration, missing inputs, bad data,
        devices that cannot share a batch, processes that do not agree.
      PreemptedError: the process received SIGTERM and has saved a checkpoint.
    """
    chosen = _chosen_stages(config, only)
    if jax.process_index() != 0:
        logging.getLogger("trbert_jax").setLevel(logging.ERROR)
    experiment = Experiment(config, profile_steps)
    devices = experiment.devices
    for stage in chosen:
        if stage.trains:
            check_batch(stage.name, getattr(config, stage.name).batch_size, devices.num_devices)
    if not devices.is_single:
        logger.info(devices.describe())
    reads_train = [stage.name for stage in chosen if not stage.evaluates]
    if config.data.prepared and any(experiment.finished(name) is None for name in reads_train):
        read_provenance(config.data.prepared, "train")  # before any long computation
    with experiment.claim([stage.name for stage in chosen]):
        for stage in chosen:
            _run_stage(experiment, stage)
        results = collect_results(experiment)
        devices.on_main(functools.partial(write_json, experiment.workdir / "results.json", results))
        trained = [experiment.workdir / name for name in results["stages"] if STAGES[name].trains]
        if trained:
            devices.on_main(functools.partial(plot_metrics, trained, experiment.workdir / "curves.png"))
    return results


def _chosen_stages(config: RunConfig, only: Sequence[str] | None) -> list[Stage]:
    for name in only or ():
        if name not in STAGES:
            raise UserError(f"--stages: no stage is called {name!r}; expected some of {', '.join(STAGES)}")
        if name not in config.stages:
            raise UserError(
                f"--stages: this configuration does not have the stage {name}; its stages are "
                + ", ".join(config.stages)
            )
    return [stage for stage in configured(config) if only is None or stage.name in only]


def _run_stage(experiment: Experiment, stage: Stage) -> None:
    """Runs a stage unless it is finished, and records its summary in `done.json`."""
    devices, directory = experiment.devices, experiment.workdir / stage.name
    if experiment.finished(stage.name) is not None:
        logger.info("%s: finished before, skipped (delete %s to run it again)", stage.name, directory)
        return
    logger.info("%s: starting, files in %s", stage.name, directory)
    start = time.perf_counter()
    devices.on_main(functools.partial(make_directory, directory))
    devices.stop_here(f"before {stage.name}")
    summary = stage.run(experiment, stage) if stage.run else train_stage(experiment, stage)
    seconds = time.perf_counter() - start
    notes = {"data": experiment.data.notes} if experiment.data.notes else {}
    devices.on_main(
        functools.partial(write_json, directory / "done.json", {**summary, **notes, "seconds": seconds})
    )
    logger.info("%s: done in %.1f s", stage.name, seconds)


# Results ------------------------------------------------------------------------------------------


def collect_results(experiment: Experiment) -> dict[str, Any]:
    """Collects the results of all finished stages, with settings, versions and machine."""
    evaluated, notes, stages = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for stage in configured(experiment.config):
        summary = experiment.finished(stage.name)
        if summary is None:
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


def results_table(config: RunConfig, results: dict[str, Any]) -> Iterator[str]:
    """Yields lines of text: metric, tokens and FLOPs of each model, seconds of each stage, written files.

    Only the first process gets lines.
    """
    if jax.process_index() != 0:
        return
    experiment = Experiment(config)
    task, workdir = experiment.data.task, experiment.workdir
    rows = {"dense": results.get("dense")}
    rows |= {f"after {stage.name}": results.get(stage.name) for stage in compared_models(config)}
    rows |= {"reduced": results.get("reduced")}
    rows |= {f"{name} tokens": summary for name, summary in results.get("baselines", {}).items()}
    rows |= {f"threshold {name}": summary for name, summary in results.get("thresholds", {}).items()}
    yield ""
    if any(rows.values()):
        yield f"{'model':<16} {task.metric:>9} {'tokens kept':>22} {'MFLOPs':>9} {'speed-up':>9}"
    for name, summary in rows.items():
        if summary:
            kept = " -> ".join(f"{x:.1f}" for x in [summary["tokens"], *summary.get("kept", [])])
            speedup = f"{summary.get('flops_speedup', 1.0):.2f}x"
            # Some official scorers count from 0 to 1, others from 0 to 100.
            score = summary[task.metric]
            value = f"{score:.1%}" if score <= 1 else f"{score:.1f}%"
            flops = f"{summary['flops'] / 1e6:.1f}"
            yield f"{name:<16} {value:>9} {kept:>22} {flops:>9} {speedup:>9}"
    yield ""
    yield "seconds a stage:  " + ", ".join(f"{k} {v['seconds']:.0f}" for k, v in results["stages"].items())
    yield f"numbers           {workdir / 'results.json'}"
    if (workdir / "curves.png").exists():
        yield f"training curves   {workdir / 'curves.png'}"
    if (workdir / "model").is_dir():
        yield f"model             {workdir / 'model'}"
        request = "--file questions.jsonl" if task.inputs.data else '"some text"'
        yield f"next              trbert predict --model {workdir / 'model'} {request}"

"""Run the stages of an experiment in order; write and print its results."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from trbert_jax.config import STAGES, RunConfig, to_dict
from trbert_jax.errors import UserError
from trbert_jax.io import make_directory, write_json
from trbert_jax.parallel import check_batch
from trbert_jax.training import stages
from trbert_jax.training.evaluation import evaluate_stage
from trbert_jax.training.experiment import Announce, Experiment
from trbert_jax.training.logging import plot_metrics
from trbert_jax.training.preemption import stop_here


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
    run = Experiment(config, announce, profile_steps)
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


def _write_results(run: Experiment, results: dict[str, Any]) -> None:
    write_json(run.workdir / "results.json", results)
    trained = [run.directory(stage) for stage in results["stages"] if stage not in _RUN]
    if trained:
        plot_metrics(trained, run.workdir / "curves.png")


_RUN: dict[str, Callable[[Experiment], dict[str, Any]]] = {
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


def collect_results(run: Experiment) -> dict[str, Any]:
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


def results_table(run: Experiment, results: dict[str, Any]) -> Iterator[str]:
    """Lines for people: accuracy, tokens and FLOPs of each model, seconds of each stage, what is where."""
    metric = run.data.task.metric
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
        what = "--file questions.jsonl" if run.data.task.inputs.data else '"some text"'
        yield f"next              trbert predict --model {run.workdir / 'model'} {what}"


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

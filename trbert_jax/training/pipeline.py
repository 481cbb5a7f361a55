"""All stages of a run, in order, from one configuration; its results in one JSON and one table."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from trbert_jax.config import STAGES, RunConfig
from trbert_jax.errors import UserError
from trbert_jax.io import make_directory, write_json
from trbert_jax.parallel import check_batch
from trbert_jax.training import stages
from trbert_jax.training.batches import Announce
from trbert_jax.training.evaluation import evaluate_stage
from trbert_jax.training.logging import plot_metrics
from trbert_jax.training.preemption import stop_here
from trbert_jax.training.results import collect_results, results_table
from trbert_jax.training.run import Run


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

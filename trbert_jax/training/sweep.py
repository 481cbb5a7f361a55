"""Train one run for each of several target speeds or penalties; the stages before them run once.

WORKDIR/shared/       the stages that the swept setting does not concern
WORKDIR/target_3/     a run of its own for `joint.target_speedup: 3`, or alpha_0.5/
WORKDIR/sweep.csv     metric, FLOPs and measured speed of all runs and of their operating points
WORKDIR/sweep.png     the metric against fewer FLOPs
"""

import csv
import dataclasses
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.config import RunConfig, build_config, to_dict
from trbert_jax.errors import UserError
from trbert_jax.io.outputs import atomic_directory, atomic_file, make_directory
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.run import train
from trbert_jax.training.stages import configured

logger = logging.getLogger(__name__)

SHARED, TABLE, PICTURE = "shared", "sweep.csv", "sweep.png"
# Settings that a sweep may change -> the stages whose key of that name it sets, as far as they run.
SWEPT = {"target_speedup": ("policy", "joint"), "alpha": ("policy", "joint")}


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """A model at some thresholds."""

    run: str
    thresholds: str  # `trained`: those of training; else the speed-up that they were chosen for
    score: float | None  # of the task's metric, share of the full score
    speedup: float  # dense FLOPs over reduced ones
    faster: float | None  # examples a second over those of the dense model, where both were timed


def sweep(config: RunConfig, key: str, values: Sequence[float]) -> list[SweepRow]:
    """Trains and evaluates a run for each value of `key`, of `SWEPT`; goes on where an earlier call stopped.

    Returns the rows of `WORKDIR/sweep.csv`. Raises `UserError` for a value twice, a configuration without
    such a stage or without evaluation, and what `train` raises.
    """
    of_key = [name for name in SWEPT[key] if name in config.stages]
    if not of_key:
        raise UserError(f"stages: has none of {', '.join(SWEPT[key])}, which have the setting {key}")
    if not any(stage.evaluates for stage in configured(config)):
        raise UserError("stages: a sweep compares models; add evaluate")
    if len(set(values)) < len(values):
        raise UserError(f"{key}: a value occurs twice in {', '.join(f'{x:g}' for x in values)}")
    workdir, shared = Path(config.workdir), _shared(config, of_key)
    runs = {f"{key.split('_')[0]}_{value:g}": value for value in values}
    settings = [
        _changed(config, workdir / name, {(stage, key): value for stage in of_key})
        for name, value in runs.items()
    ]
    if key == "target_speedup":  # one out of reach is refused before the shared stages
        fastest = Experiment(settings[values.index(max(values))])
        fastest.module(fastest.base_model().config)
    make_directory(workdir)
    if shared:
        train(_changed(config, workdir / SHARED, {}, shared))
    rows = list[SweepRow]()
    for name, run in zip(runs, settings, strict=True):
        logger.info("sweep: %s", name)
        for stage in shared:
            _share(workdir / SHARED / stage, workdir / name / stage)
        rows += _rows(run, name, train(run))
    _write_table(workdir / TABLE, rows)
    _plot(workdir / PICTURE, rows, Experiment(run).data.task.metric)
    return rows


def _changed(
    config: RunConfig, workdir: Path, values: dict[tuple[str, str], Any], stages: Sequence[str] | None = None
) -> RunConfig:
    """Returns the configuration of a run, checked: stage and key -> value."""
    settings = {**to_dict(config), "workdir": str(workdir)}
    if stages is not None:
        settings["stages"] = [*stages]
    for (stage, key), value in values.items():
        settings[stage] = {**settings[stage], key: value}
    return build_config(settings)


def _shared(config: RunConfig, of_key: Sequence[str]) -> list[str]:
    """Returns the stages that read nothing of those with the swept setting."""
    concerned, shared = set(of_key), list[str]()
    for stage in configured(config):
        if stage.name in concerned or stage.evaluates or concerned & set(stage.reads(config)):
            concerned.add(stage.name)
        else:
            shared.append(stage.name)
    return shared


def _share(source: Path, target: Path) -> None:
    """Links the files of a finished stage into another run, or copies them across file systems."""
    if target.exists():
        return
    make_directory(target.parent)
    with atomic_directory(target) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True, copy_function=_link)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _rows(config: RunConfig, name: str, results: dict[str, Any]) -> Iterator[SweepRow]:
    experiment = Experiment(config)
    experiment.is_settled = True
    task, dense = experiment.data.task, results["dense"]
    found = {"trained": results["reduced"]} | {f"{x['target']:g}x": x for x in results.get("frontier", ())}
    for thresholds, summary in found.items():
        score, speed = summary.get(task.metric), summary.get("examples_per_second")
        yield SweepRow(
            run=name,
            thresholds=thresholds,
            score=None if score is None else score / task.full_score,
            speedup=summary["flops_speedup"],
            faster=None if speed is None else speed / dense["examples_per_second"],
        )


def _write_table(path: Path, rows: Sequence[SweepRow]) -> None:
    with atomic_file(path) as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow([field.name for field in dataclasses.fields(SweepRow)])
        writer.writerows(dataclasses.astuple(row) for row in rows)


def _plot(path: Path, rows: Sequence[SweepRow], metric: str) -> None:
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row.run for row in rows):
        own = sorted((row for row in rows if row.run == name), key=lambda row: row.speedup)
        points = [(row.speedup, 100 * row.score) for row in own if row.score is not None]
        (line,) = axes.plot(
            *np.transpose(points).reshape(2, -1), ".-", label=name.replace("_", " "), linewidth=1
        )
        for row in own:
            if row.thresholds == "trained" and row.score is not None:
                axes.plot(row.speedup, 100 * row.score, "o", color=line.get_color(), markersize=8)
    axes.set(xlabel="times fewer encoder FLOPs", ylabel=f"{metric}, %")
    axes.set_title("large dots: the thresholds of training", loc="left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False)
    with atomic_file(path, "wb") as stream:
        figure.savefig(stream, format="png")


def sweep_table(rows: Sequence[SweepRow]) -> Iterator[str]:
    """Yields lines of text for a result of `sweep`."""
    yield f"{'run':<14} {'thresholds':<11} {'metric':>8} {'FLOPs':>7} {'time':>7}"
    for row in rows:
        score = "-" if row.score is None else f"{row.score:.1%}"
        faster = "-" if row.faster is None else f"{row.faster:.2f}x"
        yield f"{row.run:<14} {row.thresholds:<11} {score:>8} {row.speedup:>6.2f}x {faster:>7}"

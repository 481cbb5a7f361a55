"""What a run has found so far: `results.json`, and a table of it for people."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from typing import Any

import jax

from trbert_jax.config import to_dict
from trbert_jax.tasks.base import QuestionData
from trbert_jax.training.run import Run

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

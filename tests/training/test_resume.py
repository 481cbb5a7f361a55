"""Runs that are interrupted and started again end as if nothing had been; benchmarks/soak.py kills them."""

import collections
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

from trbert_jax.cli import main
from trbert_jax.config import upgrade
from trbert_jax.io import read_json, write_json
from trbert_jax.training import checkpoints, loop
from trbert_jax.training.logging import read_metrics


def manifests(stage: Path) -> dict[str, Any]:
    """Manifests of a stage's checkpoints in the keys of today."""
    return {name: upgrade({**x, "digest": None}) for name, x in tiny_runs.checkpoints(stage).items()}


def assert_same_run(left: Path, right: Path, stages: list[str]) -> None:
    """Metrics, models and results of two folders, bit by bit."""
    for stage in stages:
        one, two = left / "work" / stage, right / "work" / stage
        assert read_metrics(one / "metrics.jsonl") == read_metrics(two / "metrics.jsonl")
        name = "model/model.safetensors"
        assert (one / name).read_bytes() == (two / name).read_bytes()
        assert manifests(one) == manifests(two)
    results = (tiny_runs.without_times(tiny_runs.read_results(folder)) for folder in (left, right))
    assert next(results) == next(results)


# Shallow, masked, and three stages: compilation is most of the time.
# With a rate of the guide, `policy` would need stage score.
JOINT = {"rule": "threshold", "credit": "gate", "penalty_gradient": "exact", "jitter": 0.5}
SHORT: dict[str, Any] = {
    "stages": ["finetune", "policy", "joint"],
    "model": tiny_runs.ONE_LAYER,
    "finetune": {"backend": "masked"},
    "policy": {"backend": "masked", "guide_rate": 0},
    "joint": {**JOINT, "backend": "masked", "distill": False, "target_speedup": 1.2, "hard_fraction": 0.5},
}


class Interruptions:
    """Ctrl-C at the start of given updates, each once; counts the updates that were begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *where: tuple[str, int]) -> None:
        self.begun: collections.Counter[tuple[str, int]] = collections.Counter()
        left, original = set(where), loop.update_batches

        def update_batches(training: loop.Training, step: int) -> Any:
            if (training.stage.name, step) in left:
                left.remove((training.stage.name, step))
                raise KeyboardInterrupt
            self.begun[training.stage.name, step] += 1
            return original(training, step)

        monkeypatch.setattr(loop, "update_batches", update_batches)


def use_old_keys(work: Path) -> None:
    """Rewrites stored settings to the keys of version 0.1, where `execution` meant rule and backend."""
    if (work / "config.json").exists():
        config = read_json(work / "config.json")
        for stage in config["stages"]:
            config[stage]["execution"] = config[stage].pop("backend")
        config["evaluate"]["execution"] = config["evaluate"].pop("backend")
        assert config["evaluate"].pop("rule") == "threshold"
        del config["joint"]["temperature"]  # as if the key were newer than the run
        write_json(work / "config.json", config)
    for path in work.glob("*/checkpoints/step_*/manifest.json"):
        manifest = {name: value for name, value in read_json(path).items() if name != "digest"}
        settings = manifest["fingerprint"]["settings"]
        if "backend" in settings:
            settings["execution"] = settings.pop("backend")
        write_json(path, {**manifest, "digest": checkpoints._digest(manifest)})


@pytest.mark.slow
def test_interrupted_runs_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In updates 8 and 10 of 12, by an older version; checkpoints are of steps 4, 6, 8 and 12.

    Stage joint holds a target speed-up, and has begun its last part.
    """
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    tiny_runs.train(tiny_runs.write_config(tmp_path / "whole", **SHORT))
    config = tiny_runs.write_config(tmp_path / "parts", **SHORT)
    interruptions = Interruptions(monkeypatch, ("finetune", 7), ("policy", 9), ("joint", 9))
    capsys.readouterr()
    said = []
    for code in (130, 130, 130, 0):
        use_old_keys(tmp_path / "parts" / "work")
        assert main(["train", "--config", str(config)]) == code
        said.append([line for line in capsys.readouterr().err.splitlines() if "resuming" in line])
    resumed = [["finetune: resuming from step 6 of 12"], ["policy: resuming from step 8 of 12"]]
    resumed.append(["joint: resuming from step 8 of 12"])
    assert said == [[], *resumed]
    repeated = {place for place, times in interruptions.begun.items() if times > 1}
    assert repeated == {("finetune", 6), ("policy", 8), ("joint", 8)}
    assert {step for _, step in interruptions.begun} == set(range(12))
    assert_same_run(tmp_path / "whole", tmp_path / "parts", ["finetune", "policy", "joint"])
    one, two = (read_json(tmp_path / name / "work" / "config.json") for name in ("whole", "parts"))
    assert tiny_runs.without_times(two) == tiny_runs.without_times(one)

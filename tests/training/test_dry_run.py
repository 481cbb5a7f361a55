"""`trbert train --dry-run`: batches, updates, memory and FLOPs, for devices that are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_runs

from trbert_jax.cli import main
from trbert_jax.config import load_config
from trbert_jax.errors import UserError
from trbert_jax.model.model import init_params
from trbert_jax.reduction import flops
from trbert_jax.training import dry_run as plan
from trbert_jax.training.experiment import Experiment


def make_run(folder: Path, **changes: Any) -> Experiment:
    tiny_runs.write_dataset(folder / "data")
    return Experiment(load_config(tiny_runs.write_config(folder, **changes)), announce=lambda line: None)


def test_batches_and_updates(tmp_path: Path) -> None:
    changes = {"finetune": {"batch_size": 16, "accumulation_steps": 2}, "joint": {"max_steps": 7}}
    stages = {x.stage: x for x in plan.plan(make_run(tmp_path, **changes), devices=4, processes=2)}
    assert list(stages) == tiny_runs.STAGES
    finetune, joint = stages["finetune"], stages["joint"]
    assert (finetune.batch_size, finetune.per_process, finetune.per_device) == (16, 8, 4)
    assert finetune.steps == 2 * 2  # 42 examples, 32 an update, two epochs
    assert joint.steps == 7


def test_stages_without_updates(tmp_path: Path) -> None:
    changes = {"score": {"batch_size": 10}, "evaluate": {"batch_size": 4}}
    run = make_run(tmp_path, **changes)
    stages = {x.stage: x for x in plan.plan(run, devices=4, processes=2)}
    score, teacher, evaluate = stages["score"], stages["teacher"], stages["evaluate"]
    assert (score.batch_size, score.per_device, score.steps) == (12, 3, 4)  # rounded up; 42 examples
    assert (teacher.batch_size, teacher.steps, teacher.optimizer) == (8, 6, 0)
    model = run.base_model()
    lengths = run.features("train", model).row_lengths
    shape = flops.EncoderShape.of(model.config)
    dense = flops.exact_dense_flops(shape, lengths).sum()
    assert teacher.flops == dense
    assert dense < score.flops < 2 * dense  # the gradient goes back through a few layers
    # 17 texts: dense, after policy, after joint, two baselines, two thresholds.
    assert (evaluate.examples, evaluate.steps) == (17, 7 * 5)
    test = flops.exact_dense_flops(shape, run.features("test", model).row_lengths).sum()
    assert test < evaluate.flops < 7 * test
    # As many batches as the stages go through.
    assert teacher.steps == run.runner(model.config, 8).num_batches(run.features("train", model))


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "SMALLEST_DIVIDED", 1)
    (tmp_path / "divided").mkdir()
    whole = {x.stage: x for x in plan.plan(make_run(tmp_path), 1, 1)}
    model = make_run(tmp_path).base_model().config
    count = sum(x.size for x in jax.tree.leaves(init_params(model, jax.random.key(0))))
    assert whole["joint"].parameters == 4 * count
    assert whole["joint"].optimizer == 3 * 4 * count  # two moments and the gradient
    assert whole["policy"].optimizer < 0.2 * whole["joint"].optimizer  # the selectors alone
    divided = {x.stage: x for x in plan.plan(make_run(tmp_path / "divided", parallel={"fsdp": 4}), 4, 1)}
    assert 0.25 < divided["joint"].optimizer / whole["joint"].optimizer < 0.6  # the gradient stays whole
    assert divided["joint"].activations == whole["joint"].activations // 4


def test_remat_needs_less_activation_memory(tmp_path: Path) -> None:
    (tmp_path / "remat").mkdir()
    kept = plan.plan(make_run(tmp_path), 1, 1)
    again = plan.plan(make_run(tmp_path / "remat", parallel={"remat": True}), 1, 1)
    for one, other in zip(kept, again, strict=True):
        if one.stage in ("finetune", "init", "joint"):
            assert other.activations < one.activations


def test_flops_of_stages(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    model, lengths = run.base_model().config, np.array([12, 16])
    dense = flops.exact_dense_flops(flops.EncoderShape.of(model), lengths)
    np.testing.assert_array_equal(plan.stage_flops(run.config, "finetune", model, lengths), 3 * dense)
    policy = plan.stage_flops(run.config, "policy", model, lengths)
    joint = plan.stage_flops(run.config, "joint", model, lengths)
    np.testing.assert_allclose(joint, 3 * policy)  # as many samples, and a backward pass
    assert np.all(policy < 2 * dense)  # two samples that share the beginning and drop tokens


@pytest.mark.parametrize(
    ("devices", "processes", "message"),
    [
        (3, 1, "finetune.batch_size is 8, which 3 devices cannot share evenly; set it to a multiple of 3"),
        (4, 3, "--devices 4: 3 processes cannot have equally many of them"),
    ],
)
def test_devices_that_do_not_fit(tmp_path: Path, devices: int, processes: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan.plan(make_run(tmp_path), devices, processes)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"strategy": "pmap", "fsdp": 2}, "parallel.fsdp needs parallel.strategy jit"),
        ({"fsdp": 3}, "parallel.fsdp is 3, which does not divide the 4 devices"),
    ],
)
def test_layouts_that_a_run_refuses(tmp_path: Path, parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan.plan(make_run(tmp_path, parallel=parallel), 4, 1)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    tiny_runs.write_dataset(tmp_path / "data")
    config = str(tiny_runs.write_config(tmp_path, parallel={"fsdp": 2}))
    assert main(["train", "--config", config, "--dry-run", "--devices", "8", "--processes", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "8 devices of 2 processes, mesh data 4 x fsdp 2, strategy jit" in lines
    table = [line.split() for line in lines if line.startswith(("stage", "finetune", "joint"))]
    assert table[0][:7] == ["stage", "examples", "batch", "/process", "/device", "passes", "steps"]
    assert table[1][:7] == ["finetune", "42", "8", "4", "1", "1", "12"]
    assert not (tmp_path / "work" / "finetune").exists()
    assert main(["train", "--config", config, "--devices", "8"]) == 2
    assert "--devices and --processes go with --dry-run" in capsys.readouterr().err

"""`trbert train --dry-run`: batches, updates, memory and FLOPs on devices that do not exist."""

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
from trbert_jax.training import dry_run
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.stages import STAGES


def experiment(folder: Path, **changes: Any) -> Experiment:
    folder.mkdir(exist_ok=True)
    return Experiment(load_config(tiny_runs.write_config(folder, **changes)))


def plans(folder: Path, devices: int = 1, processes: int = 1, **changes: Any) -> dict[str, dry_run.StagePlan]:
    return {x.stage: x for x in dry_run.plan(experiment(folder, **changes), devices, processes)}


def test_batches_and_updates(tmp_path: Path) -> None:
    changes = {"finetune": {"batch_size": 16, "accumulation_steps": 2}, "joint": {"max_steps": 7}}
    changes |= {"score": {"batch_size": 10}, "evaluate": {"batch_size": 4}}
    stages = plans(tmp_path, devices=4, processes=2, **changes)
    assert list(stages) == tiny_runs.STAGES
    finetune, score, teacher = stages["finetune"], stages["score"], stages["teacher"]
    assert (finetune.batch_size, finetune.per_process, finetune.per_device) == (16, 8, 4)
    assert finetune.steps == 2 * 2  # 42 examples, 32 an update, two epochs
    assert stages["joint"].steps == 7
    assert (score.batch_size, score.per_device, score.steps) == (12, 3, 4)  # rounded up; 42 examples
    assert (teacher.batch_size, teacher.steps, teacher.optimizer) == (8, 6, 0)
    run = experiment(tmp_path, **changes)
    model = run.base_model()
    examples, shape = run.features("train", model), flops.EncoderShape.of(model.config)
    assert teacher.steps == run.engine(model.config, 8).num_batches(examples)
    assert teacher.flops == flops.exact_dense_flops(shape, examples.row_lengths).sum()
    assert teacher.flops < score.flops < 2 * teacher.flops  # the gradient goes back through a few layers
    # 17 texts: dense, after policy, after joint, two baselines, two thresholds.
    evaluate = stages["evaluate"]
    assert (evaluate.examples, evaluate.steps) == (17, 7 * 5)
    dense = flops.exact_dense_flops(shape, run.features("test", model).row_lengths).sum()
    assert dense < evaluate.flops < 7 * dense


def test_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "SMALLEST_DIVIDED", 1)
    whole = plans(tmp_path / "whole")
    model = experiment(tmp_path / "whole").base_model().config
    count = sum(x.size for x in jax.tree.leaves(init_params(model, jax.random.key(0))))
    assert whole["joint"].parameters == 4 * count
    assert whole["joint"].optimizer == 3 * 4 * count  # two moments and the gradient
    assert whole["policy"].optimizer < 0.2 * whole["joint"].optimizer  # the selectors alone
    divided = plans(tmp_path / "divided", devices=4, parallel={"fsdp": 4})
    assert 0.25 < divided["joint"].optimizer / whole["joint"].optimizer < 0.6  # the gradient stays whole
    assert divided["joint"].activations == whole["joint"].activations // 4
    remat = plans(tmp_path / "remat", parallel={"remat": True})
    for stage in ("finetune", "init", "joint"):
        assert remat[stage].activations < whole[stage].activations


def test_flops_of_stages(tmp_path: Path) -> None:
    run = experiment(tmp_path)
    model, lengths = run.base_model().config, np.array([12, 16])
    dense = flops.exact_dense_flops(flops.EncoderShape.of(model), lengths)
    finetune, policy, joint = (
        STAGES[name].flops(run.config, model, lengths, None) for name in ("finetune", "policy", "joint")
    )
    np.testing.assert_array_equal(finetune, 3 * dense)
    np.testing.assert_allclose(joint, 3 * policy)  # as many samples, and a backward pass
    assert np.all(policy < 2 * dense)  # two samples that share the beginning and drop tokens


def test_devices_that_do_not_fit(tmp_path: Path) -> None:
    for devices, processes, parallel, key in (
        (3, 1, {}, "finetune.batch_size"),
        (4, 3, {}, "--devices 4"),
        (4, 1, {"strategy": "pmap", "fsdp": 2}, "parallel.fsdp needs"),
    ):
        with pytest.raises(UserError, match=key):
            plans(tmp_path, devices, processes, parallel=parallel)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    config = str(tiny_runs.write_config(tmp_path, parallel={"fsdp": 2}, model=tiny_runs.ONE_LAYER))
    assert main(["train", "--config", config, "--dry-run", "--devices", "8", "--processes", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "8 devices of 2 processes, mesh data 4 x fsdp 2, strategy jit" in lines
    table = [line.split() for line in lines if line.startswith(("stage", "finetune", "joint"))]
    assert table[0][:7] == ["stage", "examples", "batch", "/process", "/device", "passes", "steps"]
    assert table[1][:7] == ["finetune", "42", "8", "4", "1", "1", "12"]
    assert not (tmp_path / "work" / "finetune").exists()
    assert main(["train", "--config", config, "--devices", "8"]) == 2
    assert "--dry-run" in capsys.readouterr().err

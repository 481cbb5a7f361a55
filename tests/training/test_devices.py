"""Eight devices compute what one does; see device_checks.py for what is run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import tiny_runs
from safetensors.numpy import load_file
from tiny_processes import TESTS, command, environment, run_processes

from trbert_jax import parallel
from trbert_jax.errors import UserError
from trbert_jax.parallel import make_layout

MODEL = "model.safetensors"
TRAINED = ("finetune", "init", "policy", "joint")
NO_DROPOUT = {stage: {"dropout": False, "learning_rate": 1e-2} for stage in TRAINED}


def check(name: str, *arguments: str) -> Any:
    process = subprocess.run(
        [sys.executable, "-W", "error", str(TESTS / "training" / "device_checks.py"), name, *arguments],
        env=environment(8),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def assert_same(found: dict[str, Any]) -> None:
    assert found.pop("moved") > 1e-3, "an update that changes nothing shows nothing"
    assert set(found) == {"jit 1", "fsdp 1", "pmap 1", "one 4", "jit 4"}
    for how, (loss, parameters) in found.items():
        assert loss < 1e-5, how
        assert parameters < 1e-4, how


def test_every_layout_trains_the_same() -> None:
    assert_same(check("same", "finetune", "masked"))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "execution"), [("policy", "masked"), ("joint", "packed")])
def test_every_layout_learns_a_policy_the_same(stage: str, execution: str) -> None:
    """The other stages are compared below, in whole runs."""
    assert_same(check("same", stage, execution))


def test_every_program_lowers_for_other_machines() -> None:
    done = check("exported")
    assert len(done) == 2 * (4 * 2 + 1)
    assert {(platform, devices) for platform, _, _, devices in done} == {("tpu", 8), ("cuda", 8)}


def test_no_activation_is_gathered() -> None:
    found = check("gathers")
    assert found["gathered"]
    assert set(found["gathered"]) <= set(found["parameters"])
    assert int(found["reductions"][0]) <= 3  # of all gradients together, not of each


def test_the_second_axis_divides_parameters_and_optimizer() -> None:
    size = check("divided")
    assert size["fsdp"] < 0.25 * size["data"]  # an eighth, but for what is too small


def test_bad_layouts() -> None:
    with pytest.raises(UserError, match=r"parallel.strategy is 'pjit'; expected one of jit, pmap"):
        make_layout("pjit")
    with pytest.raises(UserError, match=r"parallel.fsdp is 3, which does not divide the 1 devices"):
        make_layout(fsdp=3)


def test_a_process_reads_the_rows_of_its_own_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where JAX lists the devices of two processes in turn, as a TPU's topology may have it."""
    devices: list[Any] = [SimpleNamespace(process_index=i % 2, id=i) for i in range(4)]
    monkeypatch.setattr(
        parallel, "Mesh", lambda grid, *axes, **types: SimpleNamespace(devices=grid, size=grid.size)
    )
    layout = make_layout(devices=devices)
    order = [(device.process_index, device.id) for device in layout.mesh.devices.flat]
    assert order == [(0, 0), (0, 2), (1, 1), (1, 3)]
    for process, rows in enumerate((slice(0, 4), slice(4, 8))):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert layout.own_rows(8) == rows


# Whole runs -----------------------------------------------------------------------------------------


def run_all(config: Path, devices: int, *arguments: str) -> str:
    process = subprocess.run(
        command(config, *arguments), env=environment(devices), capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def assert_same_numbers(one: Path, other: Path) -> None:
    """Metrics, models, scores and predictions of two runs, but for times."""
    for stage in NO_DROPOUT:
        lines = [tiny_runs.read_lines(folder / "work" / stage / "metrics.jsonl") for folder in (one, other)]
        for left, right in zip(*lines, strict=True):
            assert left.keys() == right.keys()
            for name in left:
                # What is left of a gradient whose parts nearly cancel, as in distillation from the model
                # itself, shows the rounding of the updates before it; parameters are held to as much.
                close = 1e-4 if name == "gradient_norm" else 1e-5
                assert left[name] == pytest.approx(right[name], abs=close, rel=close), (stage, name)
    for stage in NO_DROPOUT:
        left_model, right_model = (load_file(f / "work" / stage / "model" / MODEL) for f in (one, other))
        assert left_model.keys() == right_model.keys()
        for name, array in left_model.items():
            np.testing.assert_allclose(right_model[name], array, rtol=0, atol=1e-4, err_msg=f"{stage} {name}")
    left_scores, right_scores = (np.load(f / "work" / "score" / "scores.npy") for f in (one, other))
    np.testing.assert_allclose(left_scores, right_scores, rtol=1e-4, atol=1e-6)
    records = [tiny_runs.read_lines(folder / "work" / "predictions.jsonl") for folder in (one, other)]
    assert len(records[0]) == tiny_runs.SIZES["test"]
    for left, right in zip(*records, strict=True):
        assert (left["id"], left["prediction"], left["kept"]) == (
            right["id"],
            right["prediction"],
            right["kept"],
        )


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    tiny_runs.write_dataset(folder / "data")
    run_all(tiny_runs.write_config(folder, **NO_DROPOUT), 1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"fsdp": 2}, {"strategy": "pmap"}], ids=["jit", "pmap"])
def test_all_stages_on_eight_devices(one_device: Path, tmp_path: Path, parallel: dict[str, Any]) -> None:
    """17 test texts, 11 of dev and 42 of training: no number that eight divides."""
    tiny_runs.write_dataset(tmp_path / "data")
    out = run_all(tiny_runs.write_config(tmp_path, parallel=parallel, **NO_DROPOUT), 8)
    assert "8 devices" in out
    assert_same_numbers(one_device, tmp_path)


@pytest.mark.slow
def test_two_processes_with_two_devices_each(one_device: Path, tmp_path: Path) -> None:
    tiny_runs.write_dataset(tmp_path / "data")
    config = tiny_runs.write_config(tmp_path, **NO_DROPOUT)
    outputs = run_processes([config, config])
    assert [code for code, _, _ in outputs] == [0, 0], outputs
    assert "4 devices" in outputs[0][1]
    said = [line for line in outputs[1][1].splitlines() if "[Gloo]" not in line]
    assert said == [], "only the first process speaks"
    assert_same_numbers(one_device, tmp_path)


def test_devices_that_cannot_share_a_batch(tmp_path: Path) -> None:
    tiny_runs.write_dataset(tmp_path / "data")
    process = subprocess.run(
        command(tiny_runs.write_config(tmp_path)),
        env=environment(3),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert "finetune.batch_size is 8, which 3 devices cannot share evenly; set it to a multiple of 3" in (
        process.stderr
    )


def test_a_later_stage_that_devices_cannot_share_is_told_first(tmp_path: Path) -> None:
    tiny_runs.write_dataset(tmp_path / "data")
    process = subprocess.run(
        command(tiny_runs.write_config(tmp_path, policy={"batch_size": 3})),
        env=environment(2),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert "policy.batch_size is 3, which 2 devices cannot share evenly" in process.stderr
    assert not (tmp_path / "work").exists()

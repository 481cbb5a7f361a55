"""Runs on several devices, of one process or two, end as one on a single device does."""

import re
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
from safetensors.numpy import load_file
from tiny_processes import finish, start_together, train, wait_for

# Adam makes much of how a gradient near zero is rounded: without optimization too much for the bounds here.
pytestmark = pytest.mark.usefixtures("optimized")
MODEL = "model.safetensors"
TRAINED = ("finetune", "init", "policy", "joint")
# Masked steps compile faster; device_checks.py has packed ones.
SETTINGS = {"dropout": False, "learning_rate": 1e-2, "backend": "masked"}
NO_DROPOUT: dict[str, Any] = dict.fromkeys(TRAINED, SETTINGS)
NO_DROPOUT["joint"] = {**SETTINGS, "target_speedup": 1.2, "hard_fraction": 0.3}  # holds it by sums
NO_DROPOUT["evaluate"] = {"baselines": [], "thresholds": []}  # programs to compile that show no more
# Nor do more layers; device_checks.py has updates with two points of reduction.
NO_DROPOUT["model"] = {"scratch": {**tiny_runs.SCRATCH, "num_layers": 2}}

# Before the command: arrays of a tiny model count as large enough to be divided, and each state says how many
# of its arrays are.
DIVIDING = """
import jax
from trbert_jax import parallel
from trbert_jax.training import step as steps

parallel.SMALLEST_DIVIDED = 64
first_state = steps.first_state

def placed(trained, adamw, layout, control):
    state = first_state(trained, adamw, layout, control)
    divided = [not x.sharding.is_fully_replicated for x in jax.tree.leaves(state)]
    print(sum(divided), "of", len(divided), "arrays divided")
    return state

steps.first_state = placed
"""
# Runs before the command: sends it a signal at the start of update 7.
STOPPING = """
import signal
from trbert_jax.training import loop

update_batches = loop.update_batches

def stopping(training, step):
    if step == 7:
        signal.raise_signal(signal.SIGTERM)
    return update_batches(training, step)

loop.update_batches = stopping
"""


def run_all(config: Path, devices: int, *arguments: str, before: str = "", code: int = 0) -> str:
    returned, out, err = train(config, devices, *arguments, before=before)
    assert returned == code, err
    return out + err


def assert_same_training(one: Path, other: Path, trained: Sequence[str] = TRAINED) -> None:
    """Metrics and models of the stages of two runs, but for times."""
    for stage in trained:
        lines = [tiny_runs.read_lines(folder / "work" / stage / "metrics.jsonl") for folder in (one, other)]
        for left, right in zip(*lines, strict=True):
            assert left.keys() == right.keys()
            for name in left:
                # The rest of a gradient whose parts nearly cancel, as in distillation from the model
                # itself, shows the rounding of the updates before it; parameters are held to as much.
                close = 1e-4 if name == "gradient_norm" else 1e-5
                assert left[name] == pytest.approx(right[name], abs=close, rel=close), (stage, name)
        left_model, right_model = (load_file(f / "work" / stage / "model" / MODEL) for f in (one, other))
        assert left_model.keys() == right_model.keys()
        for name, array in left_model.items():
            np.testing.assert_allclose(right_model[name], array, rtol=0, atol=1e-4, err_msg=f"{stage} {name}")


def assert_same_scores(one: Path, other: Path) -> None:
    left, right = (np.load(folder / "work" / "score" / "scores.npy") for folder in (one, other))
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-6)


def assert_same_numbers(one: Path, other: Path) -> None:
    """Metrics, models, scores and predictions of two whole runs."""
    assert_same_training(one, other)
    assert_same_scores(one, other)
    records = [tiny_runs.read_lines(folder / "work" / "predictions.jsonl") for folder in (one, other)]
    assert len(records[0]) == tiny_runs.SIZES["test"]
    for left, right in zip(*records, strict=True):
        assert all(left[name] == right[name] for name in ("id", "prediction", "kept"))


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    run_all(tiny_runs.write_config(folder, **NO_DROPOUT), 1)
    return folder


@pytest.mark.slow
def test_inference_on_eight_devices(one_device: Path, tmp_path: Path) -> None:
    """17 test texts and 42 of training: no number that eight divides; device_checks.py has the updates."""
    shutil.copytree(one_device / "work", tmp_path / "work")
    data, again = {"path": str(one_device / "data")}, ("score", "teacher", "evaluate")
    for stage in again:
        shutil.rmtree(tmp_path / "work" / stage)
    config = tiny_runs.write_config(tmp_path, data=data, parallel={"fsdp": 2}, **NO_DROPOUT)
    run_all(config, 8, f"--stages={','.join(again)}")
    assert_same_numbers(one_device, tmp_path)
    left, right = (np.load(folder / "work" / "teacher" / "logits.npy") for folder in (one_device, tmp_path))
    np.testing.assert_allclose(left, right, atol=1e-5)


@pytest.mark.slow
def test_two_processes_that_share_parameters(one_device: Path, tmp_path: Path) -> None:
    """All stages; each array is divided between the two devices of a process."""
    config = tiny_runs.write_config(tmp_path, parallel={"fsdp": 2}, **NO_DROPOUT)
    outputs = finish(start_together(config, before=DIVIDING))
    assert [code for code, _, _ in outputs] == [0, 0], outputs
    assert "4 devices" in "".join(outputs[0][1:])
    assert "finetune" not in "".join(outputs[1][1:]), "only the first process speaks"
    divided = re.findall(r"^(\d+) of \d+ arrays divided$", outputs[0][1], re.MULTILINE)
    assert len(divided) == len(TRAINED)
    assert min(map(int, divided)) > 0
    assert_same_numbers(one_device, tmp_path)


@pytest.mark.slow
def test_sigterm_stops_both_processes_wherever_they_are(tmp_path: Path) -> None:
    """To one of them: in updates, as a stage ends and the next one begins, in evaluation. With pmap."""
    changes = {**NO_DROPOUT, "stages": ["finetune", "score", "evaluate"], "model": tiny_runs.ONE_LAYER}
    one, two = tmp_path / "one", tmp_path / "two"
    tiny_runs.train(tiny_runs.write_config(one, **changes))
    config = tiny_runs.write_config(two, **changes, parallel={"strategy": "pmap"})
    for number, moment in enumerate(("finetune/metrics.jsonl", "finetune/done.json", "evaluate")):
        processes = start_together(config)
        wait_for(two / "work" / moment, processes)
        processes[number % 2].send_signal(signal.SIGTERM)
        asked = time.monotonic()
        outputs = finish(processes)
        assert [code for code, _, _ in outputs] == [143, 143], (moment, outputs)
        assert time.monotonic() - asked < 120, moment
        assert "stopped by a signal" in outputs[0][2]
        assert not (two / "work" / "evaluate" / "done.json").exists()
    outputs = finish(start_together(config))
    assert [code for code, _, _ in outputs] == [0, 0], outputs
    assert_same_training(one, two, ["finetune"])
    assert_same_scores(one, two)
    assert (
        tiny_runs.read_results(one)["dense"]["accuracy"] == tiny_runs.read_results(two)["dense"]["accuracy"]
    )


@pytest.mark.slow
def test_a_run_resumes_on_other_devices_by_another_strategy(one_device: Path, tmp_path: Path) -> None:
    """Begun on eight devices of which two share the state, stopped by a signal in update 8 of 12."""
    begun, finetune = tmp_path / "begun", "--stages=finetune"
    data = {"path": str(one_device / "data")}  # the folder moves, the data does not

    def config(folder: Path, **parallel: Any) -> Path:
        folder.mkdir(exist_ok=True)
        return tiny_runs.write_config(folder, data=data, parallel=parallel, **NO_DROPOUT)

    run_all(config(begun, fsdp=2), 8, finetune, before=DIVIDING + STOPPING, code=143)
    for devices, parallel in ((1, {}), (4, {"strategy": "pmap"})):
        folder = tmp_path / str(devices)
        shutil.copytree(begun, folder)
        assert "from step 8 of 12" in run_all(config(folder, **parallel), devices, finetune)
        assert_same_training(one_device, folder, ["finetune"])


def test_devices_that_cannot_share_a_batch(tmp_path: Path) -> None:
    """Of a later stage, before the first one starts."""
    err = run_all(tiny_runs.write_config(tmp_path, policy={"batch_size": 3}), 2, code=2)
    assert "policy.batch_size" in err
    assert not (tmp_path / "work").exists()

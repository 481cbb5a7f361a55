"""Runs on several devices, of one process or two, end as one on a single device does."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
from safetensors.numpy import load_file
from tiny_processes import finish, start_together, train

# Adam makes much of how a gradient near zero is rounded: without optimization too much for the bounds here.
pytestmark = pytest.mark.usefixtures("optimized")
MODEL = "model.safetensors"
TRAINED, FIRST = ("finetune", "init", "policy", "joint"), ["finetune", "score"]
NO_DROPOUT: dict[str, Any] = {stage: {"dropout": False, "learning_rate": 1e-2} for stage in TRAINED}

# Before the command: arrays of a tiny model count as large enough to be divided, and each state says how many
# of its arrays are.
DIVIDING = """
import jax
from trbert_jax import parallel
from trbert_jax.training import step as steps

parallel.SMALLEST_DIVIDED = 64
first_state = steps.first_state

def placed(trained, adamw, layout):
    state = first_state(trained, adamw, layout)
    divided = [not x.sharding.is_fully_replicated for x in jax.tree.leaves(state)]
    print(sum(divided), "of", len(divided), "arrays divided")
    return state

steps.first_state = placed
"""
# Before the command: at the start of the update number 7 it is told to stop.
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
                # What is left of a gradient whose parts nearly cancel, as in distillation from the model
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


def assert_divided(out: str) -> None:
    divided = re.findall(r"^(\d+) of \d+ arrays divided$", out, re.MULTILINE)
    assert len(divided) == len(TRAINED)
    assert min(map(int, divided)) > 0


@pytest.mark.slow
def test_all_stages_on_eight_devices_that_share_parameters(one_device: Path, tmp_path: Path) -> None:
    """17 test texts, 11 of dev and 42 of training: no number that eight divides."""
    config = tiny_runs.write_config(tmp_path, parallel={"fsdp": 2}, **NO_DROPOUT)
    assert_divided(run_all(config, 8, before=DIVIDING))
    assert_same_numbers(one_device, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["jit", "pmap"])
def test_two_processes_with_two_devices_each(one_device: Path, tmp_path: Path, strategy: str) -> None:
    """All four devices share the state in all stages, or each has its own in the first two."""
    shared = strategy == "jit"
    changes = {"parallel": {"fsdp": 4}} if shared else {"parallel": {"strategy": "pmap"}, "stages": FIRST}
    config = tiny_runs.write_config(tmp_path, **changes, **NO_DROPOUT)
    outputs = finish(start_together(config, before=DIVIDING if shared else ""))
    assert [code for code, _, _ in outputs] == [0, 0], outputs
    assert "4 devices" in "".join(outputs[0][1:])
    assert "finetune" not in "".join(outputs[1][1:]), "only the first process speaks"
    if shared:
        assert_divided(outputs[0][1])
        assert_same_numbers(one_device, tmp_path)
    else:
        assert_same_training(one_device, tmp_path, ["finetune"])
        assert_same_scores(one_device, tmp_path)


@pytest.mark.slow
def test_a_run_resumes_on_other_devices_by_another_strategy(one_device: Path, tmp_path: Path) -> None:
    """Begun on eight devices of which four share the state, told to stop in update 8 of 12."""
    begun, finetune = tmp_path / "begun", "--stages=finetune"
    tiny_runs.write_dataset(begun / "data")
    data = {"path": str(begun / "data")}  # the folder moves, the data does not

    def config(folder: Path, **parallel: Any) -> Path:
        return tiny_runs.write_config(folder, data=data, parallel=parallel, **NO_DROPOUT)

    run_all(config(begun, fsdp=4), 8, finetune, before=DIVIDING + STOPPING, code=143)
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

"""Training that is stopped by a signal, finds a damaged checkpoint, runs out of disk or of numbers."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_runs
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from trbert_jax.cli import main
from trbert_jax.errors import PreemptedError, UserError
from trbert_jax.io import only_process
from trbert_jax.parallel import single_device, stop_request
from trbert_jax.tasks.examples import Examples
from trbert_jax.training import loop
from trbert_jax.training.logging import read_metrics
from trbert_jax.training.stage_inputs import check_finite

# One stage of a shallow model: twelve updates, checkpoints of 4, 6 (an evaluation), 8 and 12.
ONE_STAGE = {"stages": ["finetune"], "finetune": {"backend": "masked"}, "model": tiny_runs.ONE_LAYER}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs; with a profile, which changes nothing."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_runs.train(tiny_runs.write_config(folder, **ONE_STAGE), "--profile-steps", "2:4")
    return folder / "work" / "finetune"


def assert_ended_alike(stage: Path, whole: Path) -> None:
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (stage / name).read_bytes() == (whole / name).read_bytes(), name
    assert tiny_runs.checkpoints(stage) == tiny_runs.checkpoints(whole)


def at_update(monkeypatch: pytest.MonkeyPatch, number: int, action: Any) -> None:
    """Does something at the start of an update (0-based), once."""
    original, left = loop.update_batches, [number]

    def update_batches(training: loop.Training, step: int) -> Any:
        if left == [step]:
            left.clear()
            action()
        return original(training, step)

    monkeypatch.setattr(loop, "update_batches", update_batches)


def test_sigterm_saves_and_the_next_run_resumes(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_runs.write_config(tmp_path, **ONE_STAGE)
    at_update(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGTERM))
    assert main(["train", "--config", str(config)]) == 143
    assert "step 5 of 12" in capsys.readouterr().err
    assert not issubclass(PreemptedError, Exception)  # `except Exception` does not catch the request
    assert main(["train", "--config", str(config)]) == 0
    assert "from step 5 of 12" in "".join(capsys.readouterr())
    assert_ended_alike(tmp_path / "work" / "finetune", whole)


def test_killed_after_the_last_checkpoint(whole: Path, tmp_path: Path) -> None:
    """Nothing is trained again, and the model is that checkpoint's."""
    shutil.copytree(whole.parent.parent, tmp_path, dirs_exist_ok=True)
    stage = tmp_path / "work" / "finetune"
    (stage / "done.json").unlink()
    (stage / "model" / "model.safetensors").write_bytes(b"half a file")
    data = {"path": str(whole.parent.parent / "data")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "update_batches", None)  # a call would fail
        tiny_runs.train(tiny_runs.write_config(tmp_path, **ONE_STAGE, data=data))
    assert_ended_alike(stage, whole)
    assert json.loads((stage / "done.json").read_text(encoding="utf-8"))["steps"] == 12


def test_a_signal_after_the_last_update_is_not_lost() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with stop_request(single_device()) as stop_requested:
            assert not stop_requested()
            signal.raise_signal(signal.SIGTERM)
            assert stop_requested()
            assert heard == []
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_generator_of_the_environment_changes_no_number(whole: Path, tmp_path: Path) -> None:
    with jax.default_prng_impl("rbg"):  # JAX_DEFAULT_PRNG_IMPL, usual on TPUs
        assert main(["train", "--config", str(tiny_runs.write_config(tmp_path, **ONE_STAGE))]) == 0
    assert_ended_alike(tmp_path / "work" / "finetune", whole)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that Ctrl-C ends in update 10; it has checkpoints of 6 and 8."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    config = tiny_runs.write_config(tmp_path_factory.mktemp("interrupted"), **ONE_STAGE)
    with pytest.MonkeyPatch.context() as patch:
        at_update(patch, 9, interrupt)
        assert main(["train", "--config", str(config)]) == 130
    return config.parent


@pytest.mark.parametrize(("damaged", "start"), [((8,), "from step 6 of 12"), ((6, 8), None)])
def test_damaged_checkpoints_are_set_aside(
    whole: Path, interrupted: Path, tmp_path: Path, damaged: Any, start: Any, capsys: Any
) -> None:
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    checkpoints = tmp_path / "work" / "finetune" / "checkpoints"
    for step in damaged:
        largest = max((checkpoints / f"step_{step:08d}").rglob("*"), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    data = {"path": str(interrupted / "data")}
    config = tiny_runs.write_config(tmp_path, **ONE_STAGE, data=data)
    assert main(["train", "--config", str(config)]) == 0
    out = "".join(capsys.readouterr())
    for step in damaged:
        assert f"step_{step:08d}: damaged checkpoint" in out
        assert (checkpoints / f"damaged_step_{step:08d}").is_dir()
    assert start in out if start else "from step" not in out
    assert_ended_alike(tmp_path / "work" / "finetune", whole)


def test_what_is_not_finite_is_named_and_never_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_runs.write_dataset(tmp_path / "data")
    changes = {**ONE_STAGE, "finetune": {"backend": "masked", "learning_rate": 1e38, "warmup_steps": 6}}
    assert main(["train", "--config", str(tiny_runs.write_config(tmp_path, **changes))]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"error: finetune: .* is nan at step .*; a smaller finetune\.learning_rate", err)
    assert not list((tmp_path / "work" / "finetune" / "checkpoints").glob("step_*"))


@pytest.mark.parametrize("stage", ["score", "teacher"])
def test_what_is_not_finite_is_never_handed_to_a_later_stage(
    whole: Path, tmp_path: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fine-tuned model that makes NaN of one word: the first text with it is named."""
    shutil.copytree(whole.parent.parent, tmp_path, dirs_exist_ok=True)
    changes = {"stages": ["finetune", stage], "data": {"path": str(whole.parent.parent / "data")}}
    config = tiny_runs.write_config(tmp_path, **ONE_STAGE | changes)
    model = tmp_path / "work" / "finetune" / "model"
    text = json.loads((tmp_path / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[3])["text"]
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    weights[name][tokenizer(text)["input_ids"][1]] = 3e38  # the sum over a token is not finite
    save_file(weights, model / "model.safetensors")
    (model.parent / "made_from.json").unlink()  # else the model is known to be another, and made again
    assert main(["train", "--config", str(config)]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"example \S+.* not finite", err)
    assert not list((tmp_path / "work" / stage).glob("*.npy"))


def test_an_example_with_a_value_that_is_not_finite_is_named() -> None:
    lengths = np.array([2, 3, 1, 2])
    offsets, labels = np.append(0, np.cumsum(lengths)), np.zeros(3, np.int32)
    plain = (np.zeros(8, np.int32), offsets, None, labels, ["a", "b", "c"], 0, "")
    features = Examples(*plain, first_row=np.array([0, 1, 3, 4]), group=2)
    index = np.array([2, 1])  # in a batch of three: c and a row that fills, both rows of b, fillers
    rows = np.zeros((6, 2, 4), np.float32)
    rows[[1, 4, 5]] = np.nan  # none of them is a row of an example
    check_finite("score", features, index, 3, {"score": rows, "loss": np.array([0, 0, np.nan])})
    rows[3, 1, 2] = np.inf
    with pytest.raises(UserError, match="score: score of example b is not finite"):
        check_finite("score", features, index, 3, {"score": rows})
    with pytest.raises(UserError, match="loss of example c is not finite"):
        check_finite("score", features, index, 3, {"loss": np.array([np.nan, 0, 0])})


def test_speed_and_a_profile_are_not_among_the_metrics(whole: Path) -> None:
    assert list((whole / "profile").rglob("*.xplane.pb"))
    speed = tiny_runs.read_lines(whole / "speed.jsonl")
    assert [row["step"] for row in speed] == [1, 10, 12]
    for row in speed:
        assert min(row[name] for name in ("seconds_compute", "seconds_input", "flops_per_second")) > 0
        assert row["tokens_per_second"] > row["examples_per_second"] > 0
        assert "flop_utilization" not in row  # the peak of a CPU is unknown
    assert not any("second" in name for row in read_metrics(whole / "metrics.jsonl") for name in row)


# Holds the lock of a work directory until it is killed.
HOLD = """
import sys
from trbert_jax.io import only_process
with only_process(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, work = tiny_runs.write_config(tmp_path), tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-c", HOLD, str(work)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        assert main(["train", "--config", str(config)]) == 2
        assert re.search(f"{work}: another process.*process {process.pid} on ", capsys.readouterr().err)
        assert [path.name for path in work.iterdir()] == [".lock"]
        with pytest.raises(UserError, match="another process"), only_process(work):
            pass
        process.kill()
    for _ in range(2):
        with only_process(work):
            assert (work / ".lock").exists()

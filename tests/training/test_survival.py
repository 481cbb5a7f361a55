"""Training that is told to stop, finds a damaged checkpoint, runs out of disk or of numbers."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from safetensors.numpy import load_file, save_file
from transformers import AutoTokenizer

from trbert_jax.cli import main
from trbert_jax.config import TrainingConfig
from trbert_jax.errors import PreemptedError, UserError
from trbert_jax.parallel import single_device
from trbert_jax.tasks.examples import Examples
from trbert_jax.training import loop
from trbert_jax.training.logging import read_metrics
from trbert_jax.training.preemption import Background, StepClock, StopRequest
from trbert_jax.training.stage_inputs import check_finite
from trbert_jax.training.step import TrainState

# One stage of a shallow model: twelve updates, checkpoints of 4, 6 (an evaluation), 8 and 12.
ONE_STAGE = {
    "stages": ["finetune"],
    "model": {"scratch": {**tiny_runs.SCRATCH, "num_layers": 1}},
    "finetune": {"backend": "masked"},
}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with tiny_runs.compilation_cache(tmp_path_factory.getbasetemp() / "jax"):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_runs.write_dataset(folder / "data")
    tiny_runs.train(tiny_runs.write_config(folder, **ONE_STAGE))
    return folder / "work" / "finetune"


def assert_ended_alike(stage: Path, whole: Path) -> None:
    for name in ("metrics.jsonl", "model/model.safetensors", "checkpoints/index.json"):
        assert (stage / name).read_bytes() == (whole / name).read_bytes(), name


def at_update(monkeypatch: pytest.MonkeyPatch, number: int, action: Any) -> None:
    """Does something at the start of an update (0-based), once."""
    original, left = loop.update_batches, [number]

    def update_batches(training: loop.Training, step: int, width: int) -> Any:
        if left == [step]:
            left.clear()
            action()
        return original(training, step, width)

    monkeypatch.setattr(loop, "update_batches", update_batches)


def test_sigterm_saves_and_the_next_run_goes_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_runs.write_dataset(tmp_path / "data")
    config = tiny_runs.write_config(tmp_path, **ONE_STAGE)
    at_update(monkeypatch, 4, lambda: signal.raise_signal(signal.SIGTERM))
    assert main(["train", "--config", str(config)]) == 143
    assert (
        "finetune: told to stop; saved at step 5 of 12; run the same command again" in capsys.readouterr().err
    )
    assert main(["train", "--config", str(config)]) == 0
    assert "finetune: going on from step 5 of 12" in capsys.readouterr().out
    assert_ended_alike(tmp_path / "work" / "finetune", whole)


def test_a_signal_after_the_last_update_is_not_lost() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with StopRequest() as stop:
            assert not stop.requested(single_device())
            signal.raise_signal(signal.SIGTERM)
            assert stop.requested(single_device())
            assert heard == []
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_no_except_clause_on_the_way_swallows_the_request() -> None:
    assert not issubclass(PreemptedError, Exception)


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_runs.write_dataset(tmp_path / "data")
    config = tiny_runs.write_config(tmp_path, **ONE_STAGE)

    def interrupt() -> None:
        raise KeyboardInterrupt

    at_update(monkeypatch, 9, interrupt)
    assert main(["train", "--config", str(config)]) == 130
    checkpoints = tmp_path / "work" / "finetune" / "checkpoints"
    os.truncate(checkpoints / "step_00000008" / "manifest.json", 100)
    capsys.readouterr()
    assert main(["train", "--config", str(config)]) == 0
    out = capsys.readouterr().out
    assert "step_00000008: damaged checkpoint (" in out
    assert f"set aside as {checkpoints / 'damaged_step_00000008'}" in out
    assert "finetune: going on from step 6 of 12" in out
    assert_ended_alike(tmp_path / "work" / "finetune", whole)


class Store(loop.Training):
    """A stage of which only the checkpoints matter."""

    def __init__(self, directory: Path) -> None:
        object.__setattr__(self, "name", "finetune")
        object.__setattr__(self, "directory", directory)
        object.__setattr__(self, "layout", single_device())
        object.__setattr__(self, "seed", 0)
        object.__setattr__(self, "fingerprint", {})
        config = TrainingConfig(keep_checkpoints=3, max_steps=9, batch_size=1, accumulation_steps=1)
        object.__setattr__(self, "config", config)
        object.__setattr__(self, "features", range(10))


def state(step: int) -> TrainState:
    rng = np.random.default_rng(step)
    trained = {"w": jnp.asarray(rng.normal(size=(40, 30)), jnp.float32), "b": jnp.full(7, float(step))}
    return TrainState(jnp.asarray(step, jnp.int32), trained, {"mu": jax.tree.map(jnp.square, trained)})


@pytest.mark.parametrize("seed", range(10))
def test_no_truncation_is_restored_silently(tmp_path: Path, seed: int) -> None:
    training, said, rng = Store(tmp_path), list[str](), random.Random(seed)
    store = training.checkpoints(said.append)
    for step in (3, 6):
        store.save(step, loop._checkpoint(training, state(step)))
    files = sorted(p for p in store.folder(6).rglob("*") if p.is_file() and p.stat().st_size)
    chosen = rng.choice(files)
    os.truncate(chosen, rng.randrange(chosen.stat().st_size))
    step, restored = loop._latest_state(training, store, state(0), said.append)
    assert step == 3
    assert any("step_00000006: damaged checkpoint" in line and "set aside" in line for line in said)
    jax.tree.map(np.testing.assert_array_equal, restored, state(3))
    assert store.steps() == (3,)
    store.save(6, loop._checkpoint(training, state(6)))  # the same step may be saved again
    jax.tree.map(np.testing.assert_array_equal, loop.restore_state(store, 6, state(0)), state(6))


def test_without_a_whole_checkpoint_the_stage_starts_again(tmp_path: Path) -> None:
    training, said = Store(tmp_path), list[str]()
    store = training.checkpoints(said.append)
    store.save(3, loop._checkpoint(training, state(3)))
    (store.folder(3) / "manifest.json").unlink()
    step, restored = loop._latest_state(training, store, state(0), said.append)
    assert (step, restored) == (0, None)


def test_what_is_not_finite_is_named_and_never_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_runs.write_dataset(tmp_path / "data")
    changes = {**ONE_STAGE, "finetune": {"backend": "masked", "learning_rate": 1e38, "warmup_steps": 6}}
    assert main(["train", "--config", str(tiny_runs.write_config(tmp_path, **changes))]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("trbert: error: finetune: ")
    assert "is nan at step" in err
    assert "no checkpoint is there; a smaller finetune.learning_rate" in err
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
    assert main(["train", "--config", str(config)]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert re.search(rf"error: {stage}: (loss|a logit) of example \S+ is not finite", err)
    assert not list((tmp_path / "work" / stage).glob("*.npy"))


def test_an_example_with_a_value_that_is_not_finite_is_named() -> None:
    lengths = np.array([2, 3, 1, 2])
    features = Examples(
        np.zeros(8, np.int32),
        np.append(0, np.cumsum(lengths)),
        None,
        np.zeros(3, np.int32),
        ["a", "b", "c"],
        0,
        "",
        first_row=np.array([0, 1, 3, 4]),
        group=2,
    )
    index = np.array([2, 1])  # in a batch of three: c and a row that fills, both rows of b, fillers
    rows = np.zeros((6, 2, 4), np.float32)
    rows[[1, 4, 5]] = np.nan  # none of them is a row of an example
    check_finite("score", features, index, 3, {"score": rows, "loss": np.array([0, 0, np.nan])})
    rows[3, 1, 2] = np.inf
    with pytest.raises(UserError, match="score: score of example b is not finite"):
        check_finite("score", features, index, 3, {"score": rows})
    with pytest.raises(UserError, match="teacher: a logit of example c is not finite"):
        check_finite("teacher", features, index, 3, {"a logit": {"kind": np.array([np.nan, 0, 0])}})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and sys.platform == "linux"
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)],
            check=False,
            capture_output=True,
        ).returncode
    )
    if not mounted:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# Orbax leaves other writes of the same checkpoint behind, which then find their event loop closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_a_clear_error_and_costs_no_checkpoint(small_disk: Path) -> None:
    training, said = Store(small_disk), list[str]()
    store = training.checkpoints(said.append)
    store.save(3, loop._checkpoint(training, state(3)))
    (small_disk / "others").write_bytes(
        bytes(os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize - 8192)
    )
    with pytest.raises(UserError, match=r"step_00000006: cannot be written.*([Nn]o space|quota)"):
        store.save(6, loop._checkpoint(training, state(6)))
    (small_disk / "others").unlink()
    assert store.steps() == (3,)
    jax.tree.map(np.testing.assert_array_equal, loop.restore_state(store, 3, state(0)), state(3))
    store.save(6, loop._checkpoint(training, state(6)))


def test_an_error_in_the_background_is_raised_at_the_next_call() -> None:
    def fail() -> None:
        raise UserError("disk full")

    with Background() as writer:
        writer.submit(fail)
        with pytest.raises(UserError, match="disk full"):
            writer.submit(lambda: None)

    def end_with(job: Callable[[], None], error: Exception | None = None) -> None:
        with Background() as writer:
            writer.submit(job)
            if error:
                raise error

    with pytest.raises(UserError, match="disk full"):
        end_with(fail)
    done = threading.Event()
    with pytest.raises(ZeroDivisionError):
        end_with(done.set, ZeroDivisionError())
    assert done.is_set(), "what was being written is written"


def test_speed_is_told_apart_from_the_metrics(whole: Path) -> None:
    speed = tiny_runs.read_lines(whole / "speed.jsonl")
    assert [row["step"] for row in speed] == [1, 10, 12]
    for row in speed:
        assert row["seconds_compute"] > 0
        assert row["seconds_input"] > 0
        assert row["tokens_per_second"] > row["examples_per_second"] > 0
        assert row["flops_per_second"] > 0
        assert "flop_utilization" not in row  # nobody has stated the peak of a CPU
    assert not any("second" in name for row in read_metrics(whole / "metrics.jsonl") for name in row)


def test_the_clock_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = StepClock()
    for _ in range(4):
        with clock.part("input"):
            now[0] += 1
        now[0] += 5
        clock.count(8, np.full(8, 25))
    with clock.part("checkpoint"):
        now[0] += 8
    with clock.part("evaluation"):
        now[0] += 1000
    shares: list[Any] = []

    def flops(lengths: np.ndarray, **given: Any) -> np.ndarray:
        shares.append(given["shares"])
        return 10.0 * lengths

    rates = clock.rates({"kept_tokens_0": 5.0, "loss": 1.0}, flops, peak=1000.0)
    assert shares == [[0.2]]
    assert rates == {
        "seconds_compute": 5.0,
        "seconds_input": 1.0,
        "seconds_checkpoint": 2.0,
        "examples_per_second": 1.0,
        "tokens_per_second": 25.0,
        "kept_tokens_0_per_second": 5.0,
        "flops_per_second": 250.0,
        "flop_utilization": 0.25,
    }
    now[0] += 2
    clock.count(1, np.array([1]))
    assert clock.rates({})["seconds_compute"] == 2.0


def test_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_runs.write_dataset(tmp_path / "data")
    config = tiny_runs.write_config(tmp_path, **ONE_STAGE)
    assert main(["train", "--config", str(config), "--profile-steps", "2:4"]) == 0
    folder = tmp_path / "work" / "finetune" / "profile"
    assert f"profile of updates (2, 4): {folder}" in capsys.readouterr().out
    assert list(folder.rglob("*.xplane.pb"))

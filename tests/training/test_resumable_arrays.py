"""Scores and logits on disk: written batch by batch, gone on with after a kill, read by rows."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_runs

from trbert_jax.config import load_config
from trbert_jax.errors import UserError
from trbert_jax.inference import engine as runner
from trbert_jax.model.pretrained import Pretrained
from trbert_jax.parallel import DeviceMesh, single_device
from trbert_jax.reduction.residual_scores import rank_targets
from trbert_jax.training import stage_inputs as row_files
from trbert_jax.training import stages
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.stage_inputs import GroupSums, RankTargets, ResumableArrays

BATCHES, SHAPE = 5, (10, 3)


class Killed(BaseException):
    """Stands for a process that is gone."""


def fill(folder: Path, fingerprint: Any = "a", kill_in: int | None = None) -> int:
    """Writes two entries a batch; returns where it began."""
    with ResumableArrays(folder, {"of": fingerprint}, BATCHES, single_device()) as files:
        array, helper = files.array("x.npy", SHAPE), files.array("helper.npy", (10,))
        for step in range(files.start, BATCHES):
            if step == kill_in:
                raise Killed
            array[2 * step : 2 * step + 2, :2] = step + 1
            helper[2 * step] = step
            files.progress(step + 1)
        files.finish("x.npy")
    return files.start


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes after every batch how far it is."""
    monkeypatch.setattr(row_files, "SAVE_SECONDS", 0.0)


@pytest.mark.usefixtures("eager")
def test_going_on(tmp_path: Path) -> None:
    assert fill(tmp_path / "whole") == 0
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["x.npy"]
    whole = np.load(tmp_path / "whole" / "x.npy")
    np.testing.assert_array_equal(whole[:, 0], np.repeat(np.arange(5) + 1, 2))
    np.testing.assert_array_equal(whole[:, 2], 0)
    assert whole.dtype == np.float32
    with pytest.raises(Killed):
        fill(tmp_path / "parts", kill_in=3)
    assert not (tmp_path / "parts" / "x.npy").exists()
    assert fill(tmp_path / "parts") == 3
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["x.npy"]
    assert (tmp_path / "parts" / "x.npy").read_bytes() == (tmp_path / "whole" / "x.npy").read_bytes()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("spoil", ["other fingerprint", "cut", "gone", "progress"])
def test_what_cannot_be_trusted_is_begun_anew(tmp_path: Path, spoil: str) -> None:
    fill(tmp_path / "whole")
    with pytest.raises(Killed):
        fill(tmp_path / "p", kill_in=3)
    partial, progress = tmp_path / "p" / "x.npy.partial", tmp_path / "p" / row_files.PROGRESS
    if spoil == "cut":
        os.truncate(partial, 150)
    elif spoil == "gone":
        partial.unlink()
    elif spoil == "progress":
        progress.write_text('{"batches": ', encoding="utf-8")
    assert fill(tmp_path / "p", fingerprint="b" if spoil == "other fingerprint" else "a") == 0
    assert (tmp_path / "p" / "x.npy").read_bytes() == (tmp_path / "whole" / "x.npy").read_bytes()


@pytest.mark.usefixtures("eager")
def test_progress_of_another_model_does_not_come_back(tmp_path: Path) -> None:
    """Files begun anew and killed at once are not those that the old progress was about."""
    fill(tmp_path / "whole")
    for fingerprint, kill_in in (("a", 3), ("b", 0)):
        with pytest.raises(Killed):
            fill(tmp_path / "p", fingerprint, kill_in)
    assert fill(tmp_path / "p", "a") == 0
    assert (tmp_path / "p" / "x.npy").read_bytes() == (tmp_path / "whole" / "x.npy").read_bytes()


def test_nothing_is_left_that_nobody_goes_on_from(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        fill(tmp_path, kill_in=3)  # before it has noted anything
    assert list(tmp_path.iterdir()) == []


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceMesh, "is_main", False)
    assert fill(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


# Room ---------------------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_before_the_first_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"x\.npy: cannot be written, No space left.*takes 248 bytes"):
        fill(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, None])
def test_file_systems_that_cannot_reserve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(code, "cannot do that")

    if code is None:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
    path = tmp_path / "x.npy.partial"
    row_files._reserve_npy(path, (1_000, 1_000))
    assert path.stat().st_size == 128 + 4_000_000
    assert path.stat().st_blocks * 512 >= 4_000_000, "no holes"
    assert not np.load(path).any()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    allowed = os.geteuid() == 0 and sys.platform == "linux"
    if not allowed or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_full_indeed(small_disk: Path) -> None:
    with ResumableArrays(small_disk, {}, BATCHES, single_device()) as files:
        with pytest.raises(UserError, match=r"big\.npy: cannot be written, No space.*takes 800,128 bytes"):
            files.array("big.npy", (1000, 200))
        assert list(small_disk.iterdir()) == []
        files.array("small.npy", (1000,))[:] = 1


# Reading ------------------------------------------------------------------------------------------


def test_ranks_and_sums_of_some_rows_are_those_of_all() -> None:
    scores = np.random.default_rng(0).random((12, 2, 7)).astype(np.float32)
    lengths = np.random.default_rng(1).integers(1, 8, 12)
    rows = np.array([7, 0, 3, 3, 11])
    whole = rank_targets(scores, lengths)
    np.testing.assert_array_equal(RankTargets(scores, lengths)[rows], whole[rows])
    sums = np.repeat(scores.reshape(4, 3, 2, 7).sum(1), 3, axis=0)
    np.testing.assert_array_equal(GroupSums(scores, 3)[rows], sums[rows])
    shared = RankTargets(GroupSums(scores, 3), lengths)
    np.testing.assert_array_equal(shared[rows], rank_targets(sums, lengths)[rows])


# Stages -------------------------------------------------------------------------------------------


class CountsBatches:
    """Stands for `pad_batch`; counts calls and is killed in one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        self.calls, self.kill_at, self.original = 0, -1, module.pad_batch
        monkeypatch.setattr(module, "pad_batch", self)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == self.kill_at:
            raise Killed
        return self.original(*arguments)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("stage", ["score", "teacher"])
def test_a_killed_stage_goes_on_and_ends_with_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    shape = dataclasses.replace(tiny_models.BERT, num_layers=2)
    model = Pretrained(shape, tiny_models.tiny_params(shape), tiny_models.tiny_tokenizer())
    monkeypatch.setattr(Experiment, "load", lambda run, stage, needed_by: model)
    config = load_config(tiny_runs.write_config(tmp_path, model={"max_length": shape.max_length}))
    said = list[str]()
    counted = CountsBatches(monkeypatch, stages if stage == "score" else runner)
    run_stage = stages.score_stage if stage == "score" else stages.teacher_stage

    def run(name: str) -> Any:
        return run_stage(Experiment(dataclasses.replace(config, workdir=str(tmp_path / name)), said.append))

    whole = run("whole")
    assert counted.calls == 6
    counted.calls, counted.kill_at = 0, 4
    with pytest.raises(Killed):
        run("parts")
    assert run("parts") == whole
    assert counted.calls == 4 + 3
    assert said[-1] == f"{stage}: going on from batch 3 of 6"
    for name in ("scores.npy" if stage == "score" else "logits.npy", "metrics.jsonl"):
        one, two = (tmp_path / folder / stage / name for folder in ("whole", "parts"))
        assert one.read_bytes() == two.read_bytes()
    assert not list((tmp_path / "parts" / stage).glob("*partial*"))
    assert not (tmp_path / "parts" / stage / row_files.PROGRESS).exists()

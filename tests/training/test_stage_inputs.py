"""Residual scores and teacher logits on disk: written batch by batch, resumed after a kill, read by rows."""

import dataclasses
import errno
import logging
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tiny_runs

from trbert_jax.config import load_config
from trbert_jax.errors import UserError
from trbert_jax.inference import engine
from trbert_jax.model.pretrained import Pretrained
from trbert_jax.parallel import DeviceMesh, single_device
from trbert_jax.reduction import selection
from trbert_jax.reduction.residual_scores import rank_targets
from trbert_jax.training import resumable_arrays, stage_inputs
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.objectives import Objective
from trbert_jax.training.resumable_arrays import ResumableArrays
from trbert_jax.training.stages import STAGES, objective_of

BATCHES, SHAPE = 5, (10, 3)


class Killed(BaseException):
    """Stands for the end of the process."""


def fill(folder: Path, fingerprint: Any = "a", kill_in: int | None = None) -> int:
    """Writes two entries per batch; returns the first batch it wrote."""
    with ResumableArrays(folder, {"of": fingerprint}, BATCHES, single_device()) as files:
        array, helper = files.array("x.npy", SHAPE), files.array("helper.npy", (10,))
        for step in range(files.start, BATCHES):
            if step == kill_in:
                raise Killed
            array[2 * step : 2 * step + 2, :2] = step + 1
            helper[2 * step] = step
            files.progress(step + 1)
        files.finish("helper.npy")
    return files.start


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records progress after every batch."""
    monkeypatch.setattr(resumable_arrays, "SAVE_SECONDS", 0.0)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("damage", ["other fingerprint", "replaced", "cut", "gone", "progress"])
def test_untrusted_files_are_replaced(tmp_path: Path, damage: str) -> None:
    fill(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["x.npy"]
    with pytest.raises(Killed):
        fill(tmp_path / "p", kill_in=3)
    partial, progress = tmp_path / "p" / "x.npy.partial", tmp_path / "p" / resumable_arrays.PROGRESS
    if damage == "cut":
        os.truncate(partial, 150)
    elif damage == "gone":
        partial.unlink()
    elif damage == "progress":
        progress.write_text('{"batches": ', encoding="utf-8")
    elif damage == "replaced":  # the old progress is not about the files of a later run
        with pytest.raises(Killed):
            fill(tmp_path / "p", "b", kill_in=0)
    assert fill(tmp_path / "p", fingerprint="b" if damage == "other fingerprint" else "a") == 0
    assert (tmp_path / "p" / "x.npy").read_bytes() == (tmp_path / "whole" / "x.npy").read_bytes()


def test_no_files_remain_without_progress_or_in_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Killed):
        fill(tmp_path, kill_in=3)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(DeviceMesh, "is_main", False)
    assert fill(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []


def test_space_is_reserved(tmp_path: Path) -> None:
    path = tmp_path / "x.npy.partial"
    resumable_arrays._reserve_npy(path, (1_000, 1_000))
    assert path.stat().st_size == 128 + 4_000_000
    assert path.stat().st_blocks * 512 >= 4_000_000, "the file is not sparse"
    assert not np.load(path).any()


def test_a_full_disk_fails_before_the_first_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"x\.npy: .*No space left.* 248 bytes"):
        fill(tmp_path)
    assert list(tmp_path.iterdir()) == []


OPTIONS, WIDTH, SHARED = 4, 7, [4, 5]  # two questions


def read(path: Path, row_targets: dict[str, Any], name: str = "guide") -> Callable[[np.ndarray], np.ndarray]:
    rows = 2 * OPTIONS
    experiment: Any = types.SimpleNamespace(output_of=lambda *_, **__: path, finished=lambda stage: {})
    shape = {
        "first_row": np.arange(0, rows + 1, OPTIONS),
        "num_rows": rows,
        "row_lengths": np.arange(1, 9) % WIDTH,
    }
    examples: Any = types.SimpleNamespace(row_targets=row_targets, digest="", **shape)
    reader = stage_inputs.guide if name == "guide" else stage_inputs.ranks
    stage_input = reader(experiment, "policy", examples, examples, "classification")[name]
    assert isinstance(stage_input, stage_inputs.StageInput)
    return stage_input.read


def test_rows_that_decide_together_have_one_guide(tmp_path: Path) -> None:
    """Their residual scores are summed, so that they keep the same shared tokens."""
    path, rows = tmp_path / "scores.npy", np.arange(2 * OPTIONS)
    scores = np.random.default_rng(0).random((2 * OPTIONS, 2, WIDTH)).astype(np.float32)
    np.save(path, scores)
    np.testing.assert_array_equal(read(path, {})(rows), scores)
    lengths = np.repeat(SHARED, OPTIONS)
    sums = read(path, {"shared_length": lengths})
    guide, some = sums(rows), np.array([6, 2, 6, 0])
    np.testing.assert_array_equal(sums(some), guide[some])
    np.testing.assert_allclose(guide, np.repeat(scores.reshape(2, 4, 2, WIDTH).sum(1), 4, 0), rtol=1e-6)
    ranks = read(path, {"shared_length": lengths}, "rank")
    np.testing.assert_array_equal(ranks(some), rank_targets(guide, lengths)[some])

    shared = jnp.arange(WIDTH) < lengths[:, None]
    valid = shared | (jnp.arange(WIDTH) < 6)
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 0.1, valid.shape).astype(np.float32))
    rule = selection.imitate(jnp.asarray(guide), jnp.ones(2 * OPTIONS, bool), selection.keep_all)
    passage = selection.SharedPassage(shared, OPTIONS)
    keep = np.asarray(selection.select(logits, valid, 0, rule, passage).keep).reshape(2, OPTIONS, WIDTH)
    for question, length in enumerate(SHARED):
        kept = keep[question]
        assert (kept[:, :length] == kept[0, :length]).all()
        assert 0 < kept[0, :length].sum() < length
        assert kept[:, length:6].all()


class CountedBatches:
    """Replaces `pad_batch`; counts its calls and raises in one."""

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
def test_a_killed_stage_resumes_and_ends_with_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    caplog.set_level(logging.INFO)
    shape = dataclasses.replace(tiny_models.BERT, num_layers=2)
    model = Pretrained(shape, tiny_models.tiny_params(shape), tiny_models.tiny_tokenizer())
    monkeypatch.setattr(Experiment, "load", lambda run, stage, needed_by: model)
    config = load_config(tiny_runs.write_config(tmp_path, model={"max_length": shape.max_length}))
    counted = CountedBatches(monkeypatch, stage_inputs if stage == "score" else engine)

    def run(name: str) -> Any:
        compute = STAGES[stage].run
        assert compute is not None
        return compute(Experiment(dataclasses.replace(config, workdir=str(tmp_path / name))), STAGES[stage])

    whole = run("whole")
    assert counted.calls == 6
    counted.calls, counted.kill_at = 0, 4
    with pytest.raises(Killed):
        run("parts")
    assert run("parts") == whole
    assert counted.calls == 4 + 3
    assert f"{stage}: resuming from batch 3 of 6" in caplog.messages
    for name in ("scores.npy" if stage == "score" else "logits.npy", "metrics.jsonl"):
        one, two = (tmp_path / folder / stage / name for folder in ("whole", "parts"))
        assert one.read_bytes() == two.read_bytes()
    names = [{path.name for path in (tmp_path / x / stage).iterdir()} for x in ("whole", "parts")]
    assert names[0] == names[1]


def test_balanced_classes_weigh_the_same(tmp_path: Path) -> None:
    """In every objective; metrics are not weighted."""
    weight = stage_inputs.class_weights(np.array([0, 0, 0, 1, 3, 0]), "joint").read(np.arange(6))
    assert weight.dtype == np.float32
    np.testing.assert_allclose(weight, [0.5, 0.5, 0.5, 2, 2, 0.5])  # of six, three classes of 4, 1 and 1
    config = load_config(tiny_runs.write_config(tmp_path, data={"class_weights": "balanced"}))
    valid, losses = jnp.array([1.0, 1, 0]), jnp.array([1.0, 2, 3])
    result = Objective(losses, valid, {"accuracy": jnp.array([1.0, 0, 0])})
    stage = dataclasses.replace(STAGES["finetune"], objective=lambda update: result)
    unused: Any = None
    compute = objective_of(stage, config, unused, 1)
    weighted = compute({}, {"class_weight": weight[2:5], "index": jnp.zeros(3)}, jax.random.key(0), unused)
    assert weighted.sums() == {"loss": 0.5 + 4, "accuracy": 1, "weight": 2}

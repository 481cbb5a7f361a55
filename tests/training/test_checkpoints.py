"""Checkpoints: exact, atomic, checked byte by byte, also those of the releases before this one."""

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from trbert_jax.errors import UserError
from trbert_jax.io import hash_file
from trbert_jax.training.checkpoints import CheckpointStore
from trbert_jax.training.step import TrainState


def make_state(value: float = 1.0, width: int = 3) -> dict[str, Any]:
    """Every kind of node and dtype that training has."""
    params = {"head": {"kernel": jnp.full((2, width), float(value)), "bias": jnp.zeros(width)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(0.1)))
    return {
        "state": TrainState(jnp.asarray(int(value), jnp.int32), params, optimizer.init(params)),
        "half": jnp.full(5, value, jnp.bfloat16),
        "order": np.random.default_rng(int(value)).permutation(7),  # int64, which jax would cut to 32 bits
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 4), np.float32),
        "position": np.asarray(2**40, np.int64),
    }


def assert_same(left: Any, right: Any) -> None:
    assert str(jax.tree.structure(left)) == str(jax.tree.structure(right))
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CheckpointStore]:
    with CheckpointStore(tmp_path / "c", keep=2, fingerprint={"seed": 1}) as store:
        yield store


def save(store: CheckpointStore, step: int, state: Any = None, metric: float | None = None) -> Path:
    store.save(step, make_state(step) if state is None else state, {"accuracy": metric or 0.0}, metric)
    store.wait()
    return store.folder(step)


def reopened(store: CheckpointStore, **fingerprint: Any) -> CheckpointStore:
    return CheckpointStore(store.directory, keep=2, fingerprint={"seed": 1, **fingerprint})


def test_restores_every_bit(store: CheckpointStore) -> None:
    save(store, 5)
    like = jax.eval_shape(lambda x: x, make_state(0.0)) | {"order": np.zeros(7, int), "position": np.int64(0)}
    assert_same(reopened(store).restore(5, like), jax.tree.map(np.asarray, make_state(5)))


def test_keeps_the_latest_and_the_best(store: CheckpointStore) -> None:
    assert (store.steps(), store.latest_step(), store.best_step()) == ((), None, None)
    assert not store.directory.exists()
    with pytest.raises(UserError, match="no such checkpoint"):
        store.restore(3, {})
    metrics = {10: 0.5, 20: 0.9, 30: None, 40: 0.9, 50: float("nan"), 60: 0.1}
    for step, metric in metrics.items():
        save(store, step, metric=metric)
    assert store.steps() == (20, 50, 60)  # 20 and 40 are equally good: the earlier one
    assert (store.latest_step(), store.best_step()) == (60, 20)
    assert sorted(os.listdir(store.directory)) == ["step_00000020", "step_00000050", "step_00000060"]
    with pytest.raises(ValueError, match="not after"):
        save(store, 60)


def test_the_next_save_removes_what_a_killed_run_left(store: CheckpointStore) -> None:
    folder = save(store, 1)
    for name in ("step_00000002.orbax-checkpoint-tmp", "deleted/step_00000000"):
        shutil.copytree(folder, store.directory / name)
    other = reopened(store)
    assert other.steps() == (1,)
    save(other, 2)
    assert sorted(os.listdir(store.directory)) == ["step_00000001", "step_00000002"]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, flip_bit, Path.unlink])
def test_damage_to_any_file_is_named(store: CheckpointStore, damage: Callable[[Path], None]) -> None:
    save(store, 1)
    folder = save(store, 2)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    hashed = {"manifest.json", *manifest["files"]}
    # Orbax's marks of completeness, which hold no data, are the only others.
    unhashed = {"_CHECKPOINT_METADATA", "commit_success.txt", "arrays/commit_success.txt"}
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == hashed | unhashed
    assert len(hashed) > 5
    for name in sorted(files):
        content = (folder / name).read_bytes()
        if not content and damage is not Path.unlink:
            continue  # nothing to damage
        damage(folder / name)
        if name in hashed:
            with pytest.raises(UserError) as error:
                reopened(store).restore(2, make_state())
            assert str(folder) in str(error.value)
            assert Path(name).name in str(error.value)
        else:
            assert_same(reopened(store).restore(2, make_state()), jax.tree.map(np.asarray, make_state(2)))
        (folder / name).write_bytes(content)
    assert store.set_aside(2) == store.directory / "damaged_step_00000002"
    assert store.steps() == (1,)
    save(store, 2)  # the step can be saved again
    assert_same(store.restore(2, make_state()), jax.tree.map(np.asarray, make_state(2)))


def test_a_format_of_another_version_is_not_called_damage(store: CheckpointStore) -> None:
    (save(store, 1) / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        store.steps()


def test_another_fingerprint_is_refused_with_the_differences(store: CheckpointStore) -> None:
    saved = reopened(store, policy={"alpha": 1.0, "epochs": 2}, widths=(1, 2), old=None)
    save(saved, 1)
    now = reopened(store, policy={"alpha": 2.0, "epochs": 2}, widths=(1, 2), new="a")
    with pytest.raises(UserError) as error:
        now.restore(1, make_state())
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:4]] == [
        "policy.alpha", "old", "new",
    ]  # fmt: skip


def test_settings_that_do_not_matter_may_change(store: CheckpointStore) -> None:
    about: dict[str, Any] = {"stage": "finetune", "settings": {"epochs": 2, "save_steps": 1}}
    save(reopened(store, **about), 1)
    settings = {"epochs": 2, "save_steps": 9, "max_steps": None}  # the last is newer than the checkpoint
    now = {"seed": 1, **about, "settings": settings}
    CheckpointStore(store.directory, 2, now, free=["settings.save_steps"]).restore(1, make_state())
    with pytest.raises(UserError, match=r"settings\.save_steps: 1 -> 9"):
        CheckpointStore(store.directory, 2, now).restore(1, make_state())


def test_other_arrays_are_refused_with_both_sides(store: CheckpointStore) -> None:
    save(store, 1, {"a": jnp.zeros((2, 3)), "b": [jnp.zeros(1)], "c": [np.zeros(1)] * 30})
    with pytest.raises(UserError) as error:
        store.restore(1, {"a": jnp.zeros((2, 4)), "b": [jnp.zeros(1, jnp.bfloat16)]})
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert lines[:2] == ["a: float32[2,3] -> float32[2,4]", "b/0: float32[1] -> bfloat16[1]"]
    assert "... and 20 more" in lines


def test_a_full_disk_is_an_error_and_loses_nothing(store: CheckpointStore) -> None:
    state = {"x": np.random.default_rng(0).random(100_000)}
    save(store, 1, state)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # bytes of a file
        with pytest.raises(UserError, match="step_00000002: cannot be written"):
            save(store, 2, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.steps() == (1,)
    save(store, 2, state)
    assert_same(store.restore(2, state), state)
    shutil.rmtree(store.directory)
    store.directory.write_text("")  # a file where the folder should be
    with pytest.raises(UserError, match=str(store.directory)):
        save(store, 1)


def write_old_checkpoint(folder: Path, arrays: dict[str, np.ndarray], **about: Any) -> None:
    """A checkpoint as releases before this one wrote it: no orbax step, settings of that time."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(folder.absolute() / "arrays", args=ocp.args.PyTreeSave(arrays))
    files = {p.relative_to(folder).as_posix(): hash_file(p) for p in folder.rglob("*") if p.is_file()}
    shapes = {k: f"{x.dtype}[{','.join(map(str, x.shape))}]" for k, x in arrays.items()}
    manifest = {"format": 1, **about, "arrays": shapes, "files": files}
    digest = hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": digest}), encoding="utf-8")


def test_old_checkpoints_are_restored_and_followed_by_new_ones(tmp_path: Path) -> None:
    arrays = {"trained/w": np.arange(6, dtype=np.float32), "step": np.asarray(1, np.int32)}
    old = {"stage": "finetune", "settings": {"execution": "packed", "epochs": 2}, "seed": 1}
    for step, metric in ((10, 0.9), (20, 0.1)):
        folder = tmp_path / f"step_{step:08d}"
        write_old_checkpoint(folder, arrays, step=step, metric=metric, metrics={}, fingerprint=old)
    (tmp_path / "index.json").write_text("{}")
    now = {"stage": "finetune", "settings": {"backend": "packed", "epochs": 2}, "seed": 1}
    like = {"trained": {"w": np.zeros(6, np.float32)}, "step": np.asarray(0, np.int32)}
    with CheckpointStore(tmp_path, keep=1, fingerprint=now) as store:
        assert (store.steps(), store.best_step()) == ((10, 20), 10)
        restored = store.restore(20, like)
        np.testing.assert_array_equal(restored["trained"]["w"], arrays["trained/w"])
        store.save(30, restored, metric=0.5)
        store.wait()
        assert (store.steps(), store.best_step()) == ((10, 30), 10)
        for step in (10, 30):
            assert_same(store.restore(step, like), restored)
    with pytest.raises(UserError, match=r"settings\.epochs"):
        CheckpointStore(tmp_path, 1, now | {"settings": {"backend": "packed"}}).restore(10, like)


# Saves arrays that hold the step's number, over and over.
WRITER = """
    import itertools, sys
    import numpy as np
    from trbert_jax.training.checkpoints import CheckpointStore

    store = CheckpointStore(sys.argv[1], keep=2, fingerprint={})
    start = store.latest_step() or 0
    if start:
        store.restore(start, {"a": np.zeros((300, 300)), "b": np.zeros(50_000)})
    for step in itertools.count(start + 1):
        state = {"a": np.full((300, 300), step * 1.0), "b": np.full(50_000, step * 2.0)}
        store.save(step, state, metric=step % 7)
        store.wait()
        print("saved", step, flush=True)
"""


def test_sigkill_at_any_moment_leaves_whole_checkpoints(tmp_path: Path) -> None:
    rng, latest = random.Random(0), 0
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)]
    store = CheckpointStore(tmp_path, 2, {})
    like = {"a": np.zeros((300, 300)), "b": np.zeros(50_000)}
    for _ in range(4):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first = next(line for line in process.stdout if line.startswith("saved"))
            time.sleep(rng.uniform(0.0, 0.15))
            process.send_signal(signal.SIGKILL)
            saved = [int(line.split()[1]) for line in [first, *process.stdout] if line.endswith("\n")]
        before, latest = latest, store.latest_step() or 0
        # It resumed where it was, and was killed in a save or between its end and the print.
        assert saved == list(range(before + 1, saved[-1] + 1))
        assert latest in (saved[-1], saved[-1] + 1)
        for step in store.steps():
            restored = store.restore(step, like)
            assert (restored["a"] == step).all()
            assert (restored["b"] == 2 * step).all()
        assert store.best_step() == max(range(1, latest + 1), key=lambda step: (step % 7, -step))
    with store:
        store.save(latest + 1, like)
    assert all(re.fullmatch(r"step_\d+", name) for name in os.listdir(tmp_path))

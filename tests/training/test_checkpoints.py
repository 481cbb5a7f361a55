from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from trbert_jax.errors import UserError
from trbert_jax.training.checkpoints import CheckpointStore


@struct.dataclass
class State:
    step: jax.Array
    params: Any


def make_state(value: float = 1.0, width: int = 3) -> dict[str, Any]:
    """A tree of every kind of leaf and node that training has."""
    params = {"head": {"kernel": jnp.full((2, width), value), "bias": jnp.zeros(width)}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(0.1)))
    updates, opt_state = optimizer.update(params, optimizer.init(params), params)
    return {
        "state": State(jnp.asarray(int(value), jnp.int32), params),
        "opt_state": opt_state,
        "half": updates["head"]["kernel"].astype(jnp.bfloat16),
        "rng": jax.random.fold_in(jax.random.key(0), int(value)),
        "raw_rng": jax.random.PRNGKey(int(value)),
        "order": np.random.default_rng(int(value)).permutation(7),  # int64, which jax would cut to 32 bits
        "mask": np.array([True, False]),
        "empty": np.zeros((0, 4), np.float32),
        "position": np.int64(2**40),
        "epoch": 3,
        "rate": 0.1,
        "done": False,
    }


def assert_same(left: Any, right: Any) -> None:
    assert str(jax.tree.structure(left)) == str(jax.tree.structure(right))
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert isinstance(x, jax.Array) == isinstance(y, jax.Array)
        assert isinstance(y, jax.Array) or type(x) is type(y)
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).dtype == np.asarray(y).dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def make_store(directory: Path, keep: int = 2) -> CheckpointStore:
    return CheckpointStore(directory, keep, {"seed": 1}, announce=lambda line: None)


def read_index(directory: Path) -> dict[str, Any]:
    index = json.loads((directory / "index.json").read_text())
    assert isinstance(index, dict)
    return index


def test_restores_every_kind_of_leaf_bit_for_bit(tmp_path: Path) -> None:
    make_store(tmp_path).save(5, make_state(2.0))
    assert_same(make_store(tmp_path).restore(5, make_state(0.0)), make_state(2.0))


def test_restores_into_shape_structs(tmp_path: Path) -> None:
    make_store(tmp_path).save(1, {"a": jnp.arange(4.0)})
    restored = make_store(tmp_path).restore(1, {"a": jax.ShapeDtypeStruct((4,), jnp.float32)})
    assert_same(restored, {"a": jnp.arange(4.0)})


def test_an_empty_or_missing_directory_has_no_checkpoints(tmp_path: Path) -> None:
    store = make_store(tmp_path / "missing")
    assert store.steps() == ()
    assert store.latest_step() is None
    assert store.best_step() is None
    assert not (tmp_path / "missing").exists()
    with pytest.raises(UserError, match="no such checkpoint; steps there are: none"):
        store.restore(3, {})


def test_keeps_the_last_and_the_best_and_names_them(tmp_path: Path) -> None:
    store = make_store(tmp_path, keep=2)
    for step, metric in [(10, 0.5), (20, 0.9), (30, None), (40, 0.9), (50, float("nan")), (60, 0.1)]:
        store.save(step, {"x": np.float32(step)}, {"accuracy": metric or 0.0}, metric)
    assert store.steps() == (20, 50, 60)  # 20 and 40 are equally good: the earlier one
    assert (store.latest_step(), store.best_step()) == (60, 20)
    assert store.metrics(20) == {"accuracy": 0.9}
    assert store.metrics(50) == {"accuracy": None}
    names = ["step_00000020", "step_00000050", "step_00000060"]
    assert sorted(os.listdir(tmp_path)) == ["index.json", *names]
    index = read_index(tmp_path)
    assert (index["best"], index["last"]) == (names[0], names[2])
    assert index["checkpoints"][names[0]] == {"step": 20, "metric": 0.9, "metrics": {"accuracy": 0.9}}
    assert list(index["checkpoints"]) == names


@pytest.mark.parametrize("index", [None, "{", '{"best": "step_00000009", "last": "step_00000009"}'])
def test_recovers_from_a_missing_or_stale_index(tmp_path: Path, index: str | None) -> None:
    for step in (1, 2, 3):
        make_store(tmp_path).save(step, {"x": step}, metric=-step)
    if index is None:
        (tmp_path / "index.json").unlink()
    else:
        (tmp_path / "index.json").write_text(index)
    store = make_store(tmp_path)
    assert (store.steps(), store.best_step(), store.latest_step()) == ((1, 2, 3), 1, 3)
    store.save(4, {"x": 4})
    assert read_index(tmp_path)["best"] == "step_00000001"
    assert store.steps() == (1, 3, 4)


def test_unfinished_folders_are_said_once_ignored_and_then_removed(tmp_path: Path) -> None:
    said: list[str] = []
    store = CheckpointStore(tmp_path, 2, {}, announce=said.append)
    store.save(1, {"x": 1})
    leftovers = ["step_00000002.partial-abc", "deleted.partial-step_00000000"]
    for name in leftovers:
        shutil.copytree(tmp_path / "step_00000001", tmp_path / name)
    (tmp_path / "index.json.partial-xyz").write_text("{")
    assert store.steps() == (1,)
    assert store.latest_step() == 1
    assert len(said) == 1
    assert leftovers[0] in said[0]
    store.save(2, {"x": 2})
    assert sorted(os.listdir(tmp_path)) == ["index.json", "step_00000001", "step_00000002"]
    assert len(said) == 1


def test_steps_only_grow(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.save(5, {"x": 1})
    with pytest.raises(ValueError, match="step 5 is not after the latest one, 5"):
        store.save(5, {"x": 2})
    assert store.restore(5, {"x": 0}) == {"x": 1}


@pytest.mark.parametrize("state", [{"a": "text"}, {"a": {"b": object()}}])
def test_refuses_leaves_that_are_not_data(tmp_path: Path, state: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"a.*: a checkpoint holds arrays and numbers, not"):
        make_store(tmp_path).save(1, state)
    assert os.listdir(tmp_path) == []


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [truncate, empty, flip_bit, Path.unlink])
def test_damage_anywhere_is_an_error_that_names_the_folder(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    store, folder = make_store(tmp_path), tmp_path / "step_00000002"
    for step in (1, 2):
        store.save(step, make_state(float(step)))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # An empty file can be damaged in one way only.
    files = [path for path in files if path.stat().st_size or damage is Path.unlink]
    assert len(files) > 5
    for file in files:
        content = file.read_bytes()
        damage(file)
        with pytest.raises(UserError) as error:
            store.restore(2, make_state())
        assert f"{folder}: damaged checkpoint (" in str(error.value)
        assert file.name in str(error.value)
        assert "delete this folder, the run then goes on from step 1" in str(error.value)
        file.write_bytes(content)
    assert_same(store.restore(2, make_state()), make_state(2.0))
    damage(folder / "manifest.json")
    shutil.rmtree(folder)
    assert store.latest_step() == 1
    assert_same(store.restore(1, make_state()), make_state(1.0))


def test_damage_to_the_only_checkpoint_starts_the_stage_again(tmp_path: Path) -> None:
    make_store(tmp_path).save(1, {"x": 1})
    (tmp_path / "step_00000001" / "manifest.json").unlink()
    with pytest.raises(UserError, match="the stage then starts again"):
        make_store(tmp_path).latest_step()


def test_a_format_of_another_version_is_not_called_damage(tmp_path: Path) -> None:
    path = make_store(tmp_path).save(1, {"x": 1}) / "manifest.json"
    path.write_text(json.dumps({"format": 99}))
    with pytest.raises(UserError, match="has format 99, 1 was expected"):
        make_store(tmp_path).steps()


def test_another_fingerprint_is_refused_with_what_differs(tmp_path: Path) -> None:
    saved = {"seed": 1, "policy": {"alpha": 1.0, "epochs": 2}, "widths": (1, 2), "old": None}
    CheckpointStore(tmp_path, 1, saved).save(1, {"x": 1})
    assert CheckpointStore(tmp_path, 1, saved).restore(1, {"x": 0}) == {"x": 1}
    other = {"seed": 1, "policy": {"alpha": 2.0, "epochs": 2}, "widths": (1, 2), "new": "a"}
    with pytest.raises(UserError) as error:
        CheckpointStore(tmp_path, 1, other).restore(1, {"x": 0})
    lines = str(error.value).splitlines()
    assert lines[0] == f"{tmp_path / 'step_00000001'}: saved by a run with other settings:"
    assert lines[1:4] == [
        "  policy.alpha: 1.0 then, 2.0 now",
        "  old: null then, nothing now",
        '  new: nothing then, "a" now',
    ]


def test_other_arrays_are_refused_with_both_sides(tmp_path: Path) -> None:
    make_store(tmp_path).save(1, {"a": jnp.zeros((2, 3)), "b": [jnp.zeros(1)], "d": jnp.zeros(5)})
    like = {"a": jnp.zeros((2, 4)), "c": 1, "d": jnp.zeros(5, jnp.bfloat16)}
    with pytest.raises(UserError) as error:
        make_store(tmp_path).restore(1, like)
    assert str(error.value).splitlines()[1:-1] == [
        "  a: float32[2,3] in the checkpoint, float32[2,4] expected",
        "  b/0: float32[1] in the checkpoint, nothing expected",
        "  d: float32[5] in the checkpoint, bfloat16[5] expected",
        "  c: nothing in the checkpoint, int expected",
    ]


def test_a_long_list_of_differences_is_cut(tmp_path: Path) -> None:
    make_store(tmp_path).save(1, [np.float32(i) for i in range(30)])
    with pytest.raises(UserError, match=r"\.\.\. and 18 more"):
        make_store(tmp_path).restore(1, [])


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        make_store(tmp_path / "file" / "checkpoints").save(1, {"x": 1})


def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path: Path) -> None:
    store, state = make_store(tmp_path), {"x": np.random.default_rng(0).random(100_000)}
    store.save(1, state)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # bytes a file may have
        with pytest.raises(UserError, match=r"step_00000002: cannot be written \(File too large\)"):
            store.save(2, state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert store.steps() == (1,)
    assert_same(store.restore(1, state), state)
    store.save(2, state)
    assert store.steps() == (1, 2)

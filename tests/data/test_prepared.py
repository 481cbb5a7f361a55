"""Data in shards: what is read back is what was written, and nothing else is ever read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_runs

from trbert_jax.cli import main
from trbert_jax.data.batching import pad_batch
from trbert_jax.data.features import FeatureSet
from trbert_jax.data.prepared import load_prepared, shard_paths, write_prepared
from trbert_jax.errors import UserError

SETTINGS = {"model.max_length": 9}


def make_features(seed: int = 0, grouped: bool = False, types: bool = False) -> FeatureSet:
    """Eleven examples of one row, or of one to three with targets of their own."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 4, 11) if grouped else np.ones(11, int)
    lengths = rng.integers(3, 10, counts.sum())
    tokens = rng.integers(5, 99, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens[offsets[:-1]] = 2
    row_targets = {"starts": rng.integers(-1, 9, (len(lengths), 2)).astype(np.int32)} if grouped else {}
    targets = {"weights": rng.normal(size=(11, 3)).astype(np.float32)} if grouped else {}
    return FeatureSet(
        tokens=tokens,
        offsets=offsets.astype(np.int64),
        token_types=rng.integers(0, 2, len(tokens)).astype(np.int8) if types else None,
        labels=rng.integers(-1, 3, 11).astype(np.int32),
        ids=[f"train.jsonl:{i} ü" for i in range(11)],
        num_truncated=2,
        digest=f"digest {seed}",
        first_row=np.concatenate([[0], np.cumsum(counts)]) if grouped else None,
        group=3 if grouped else 1,
        row_targets=row_targets,
        targets=targets,
    )


def write(folder: Path, features: FeatureSet, **options: int) -> Path:
    return write_prepared(
        folder, {"train": features}, SETTINGS, announce=lambda line: None, **{"shard_size": 4, **options}
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("grouped", [False, True], ids=["rows", "groups"])
@pytest.mark.parametrize("types", [False, True], ids=["", "types"])
def test_batches_are_those_of_the_set(tmp_path: Path, grouped: bool, types: bool) -> None:
    features = make_features(grouped=grouped, types=types)
    prepared = load_prepared(write(tmp_path / "p", features), "train", SETTINGS)
    assert len(prepared) == 11
    assert (prepared.ids, prepared.digest, prepared.num_truncated) == (features.ids, "digest 0", 2)
    np.testing.assert_array_equal(prepared.lengths, features.lengths)
    assert prepared.tokens.size == 0, "tokens stay on disk"
    for chosen in ([0], [10, 3, 3, 7], list(range(11)), []):
        index = np.array(chosen, np.int64)
        ours, expected = (pad_batch(x, index, 12, 9) for x in (prepared, features))
        assert ours.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(ours[name], expected[name], err_msg=name)
            assert ours[name].dtype == expected[name].dtype


def test_tensorflow_datasets_reads_it(tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    features = make_features(grouped=True, types=True)
    builder = tfds.builder_from_directory(str(write(tmp_path / "p", features)))
    source = builder.as_data_source("train")
    assert len(source) == 11
    assert features.first_row is not None
    assert features.token_types is not None
    begin, end = features.offsets[features.first_row[7]], features.offsets[features.first_row[8]]
    example = source[7]
    np.testing.assert_array_equal(example["input_ids"], features.tokens[begin:end])
    np.testing.assert_array_equal(example["token_type_ids"], features.token_types[begin:end])
    np.testing.assert_allclose(example["target_weights"], features.targets["weights"][7])
    assert example["id"].decode() == "train.jsonl:7 ü"
    assert example["label"] == features.labels[7]


def test_what_was_interrupted_ends_with_the_same_files(tmp_path: Path) -> None:
    features = make_features()
    whole = contents(write(tmp_path / "whole", features))
    assert sum("array_record" in name for name in whole) == 3
    parts, said = tmp_path / "parts", list[str]()
    write(parts, features)
    first, second, _ = shard_paths(parts, "train", 11, 4)
    first.unlink()
    os.truncate(second, 10)
    second.rename(f"{second}.partial")  # as a killed run leaves it
    (parts / "index-train.npz").unlink()
    (parts / "dataset_info.json").unlink()
    write_prepared(parts, {"train": features}, SETTINGS, shard_size=4, announce=said.append)
    assert "train: 1 of 3 shards are there already" in said
    assert contents(parts) == whole
    assert contents(write(tmp_path / "one at a time", features, workers=1)) == whole


def damage(name: str, action: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        action(folder / name)

    return apply


SHARD = "trbert-train.array_record-00001-of-00003"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage(SHARD, Path.unlink), f"{SHARD} is missing; run `trbert prepare-data` again"),
        (damage(SHARD, lambda p: os.truncate(p, 9)), f"{SHARD} is not as it was written; delete it"),
        (
            damage("index-train.npz", lambda p: p.write_bytes(b"x")),
            "index-train.npz is not as it was written",
        ),
        (
            damage("provenance.json", Path.unlink),
            "has no provenance.json; make it with `trbert prepare-data`",
        ),
    ],
)
def test_damage_is_named_before_training(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    folder = write(tmp_path / "p", make_features())
    change(folder)
    with pytest.raises(UserError, match=message):
        load_prepared(folder, "train", SETTINGS)


def test_other_settings_other_data_other_folders(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", make_features())
    with pytest.raises(UserError, match=r"made with other settings:\n  model.max_length: 9 then, 12 now"):
        load_prepared(folder, "train", {"model.max_length": 12})
    with pytest.raises(UserError, match="has no split dev"):
        load_prepared(folder, "dev", SETTINGS)
    with pytest.raises(UserError, match="prepared otherwise"):
        write(folder, make_features(seed=1))
    with pytest.raises(UserError, match="prepared otherwise"):
        write(folder, make_features(), shard_size=5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not empty and not prepared data"):
        write(tmp_path / "full", make_features())
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trbert_jax.data.prepared._write_index", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "p", make_features())
    with pytest.raises(UserError, match="is not finished; run `trbert prepare-data` again, it goes on"):
        load_prepared(tmp_path / "p", "train", SETTINGS)


def test_training_from_shards_is_training_from_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_runs.write_dataset(tmp_path / "data")
    changes = {
        "stages": ["finetune"],
        "model": {"scratch": {**tiny_runs.SCRATCH, "num_layers": 1}},
        "finetune": {"execution": "masked", "accumulation_steps": 2},
    }
    config, shards = str(tiny_runs.write_config(tmp_path, **changes)), str(tmp_path / "shards")
    with tiny_runs.compilation_cache(tmp_path / "programs"):
        assert main(["train", "--config", config]) == 0
        assert main(["prepare-data", "--config", config, "--output", shards, "--shard-size", "10"]) == 0
        assert "70 examples in 12 files" in capsys.readouterr().out
        other = [f"data.prepared={shards}", f"workdir={tmp_path / 'other'}"]
        assert main(["train", "--config", config, *other]) == 0
    for name in ("metrics.jsonl", "model/model.safetensors"):
        one, two = (tmp_path / work / "finetune" / name for work in ("work", "other"))
        assert one.read_bytes() == two.read_bytes()
    assert (
        main(["train", "--config", config, *other[:1], f"workdir={tmp_path / 'x'}", "model.max_length=12"])
        == 2
    )
    assert "was made with other settings:\n  model.max_length: 16 then, 12 now" in capsys.readouterr().err


def test_the_set_in_memory_is_replaced_whole() -> None:
    """Every field of a set is either in the index or read from the shards."""
    assert {field.name for field in dataclasses.fields(FeatureSet)} == {
        "tokens", "offsets", "token_types", "labels", "ids", "num_truncated", "digest", "first_row", "group",
        "row_targets", "targets",
    }  # fmt: skip

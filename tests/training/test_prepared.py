"""Data in shards: what is read back is what was written, and nothing else is ever read."""

import dataclasses
import os
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_runs

from trbert_jax.cli import main
from trbert_jax.config import load_config
from trbert_jax.errors import UserError
from trbert_jax.io import read_json
from trbert_jax.tasks.examples import Examples, pad_batch
from trbert_jax.training import prepared as prepared_module
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.prepared import load_prepared, shard_paths, write_prepared

SETTINGS = {"model.max_length": 9}


def make_features(seed: int = 0, grouped: bool = False, types: bool = False) -> Examples:
    """Eleven examples of one row, or of one to three with targets of their own."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 4, 11) if grouped else np.ones(11, int)
    lengths = rng.integers(3, 10, counts.sum())
    tokens = rng.integers(5, 99, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens[offsets[:-1]] = 2
    row_targets = {"starts": rng.integers(-1, 9, (len(lengths), 2)).astype(np.int32)} if grouped else {}
    targets = {"weights": rng.normal(size=(11, 3)).astype(np.float32)} if grouped else {}
    return Examples(
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


def write(folder: Path, features: Examples, **options: Any) -> Path:
    return write_prepared(folder, {"train": features}, SETTINGS, **{"shard_size": 4, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(("grouped", "types"), [(False, False), (True, True)])
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


def test_a_killed_call_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three shards the first is good, the second damaged later, the third without a hash."""
    features, parts = make_features(), tmp_path / "parts"
    whole = contents(write(tmp_path / "whole", features))
    first, second, third = shard_paths(parts, "train", 11, 4)
    original = prepared_module._write_shard

    def killed_at_third(schema: Any, path: Path, *arguments: Any) -> dict[str, Any]:
        if path == third:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        return original(schema, path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(prepared_module, "_write_shard", killed_at_third)
        with pytest.raises(KeyboardInterrupt):
            write(parts, features, workers=1)
    with pytest.raises(UserError, match="not finished"):
        load_prepared(parts, "train", SETTINGS)
    os.truncate(second, 10)
    before = first.stat().st_mtime_ns
    write(parts, features)
    assert first.stat().st_mtime_ns == before
    assert contents(parts) == whole


@pytest.mark.parametrize("action", ["truncate", "flip", "remove"])
@pytest.mark.parametrize("name", ["trbert-train.array_record-00001-of-00003", "index-train.npz"])
def test_damage_is_named_and_mended(tmp_path: Path, name: str, action: str) -> None:
    folder = write(tmp_path / "p", make_features())
    whole = contents(folder)
    path = folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content if action == "flip" else content[:9])
    if action == "remove":
        path.unlink()
    with pytest.raises(UserError, match=f"{name} is (not as it was written|missing)"):
        load_prepared(folder, "train", SETTINGS)
    assert contents(write(folder, make_features())) == whole
    assert len(load_prepared(folder, "train", SETTINGS)) == 11


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writer:
        def __init__(self, path: str, options: str) -> None:
            Path(path).write_bytes(b"half")

        def write(self, record: bytes) -> None:
            pass

        def close(self) -> None:
            raise RuntimeError("write() failed: No space left on device; writing x")

    with monkeypatch.context() as patch:
        patch.setattr("array_record.python.array_record_module.ArrayRecordWriter", Writer)
        with pytest.raises(UserError, match=r"record-0000\d.*: cannot be written.*No space left on device"):
            write(tmp_path / "p", make_features(), workers=1)
    assert not list((tmp_path / "p").glob("*array_record*"))
    assert len(load_prepared(write(tmp_path / "p", make_features()), "train", SETTINGS)) == 11


def test_tensorflow_datasets_reads_it(tmp_path: Path) -> None:
    """Also splits whose targets differ in width; it has one description for all of them."""
    import tensorflow_datasets as tfds

    train, dev = (make_features(seed, grouped=True, types=not seed) for seed in (0, 1))
    wide = np.arange(4 * len(dev.row_lengths), dtype=np.int32).reshape(-1, 4)
    dev = dataclasses.replace(dev, row_targets={"starts": wide}, targets={})
    write_prepared(tmp_path / "p", {"train": train, "dev": dev}, SETTINGS, shard_size=4)
    builder = tfds.builder_from_directory(str(tmp_path / "p"))
    for split, features in {"train": train, "dev": dev}.items():
        source = builder.as_data_source(split)
        assert len(source) == 11
        for index, example in enumerate(source):
            assert features.first_row is not None
            rows = slice(features.first_row[index], features.first_row[index + 1])
            tokens = slice(features.offsets[rows.start], features.offsets[rows.stop])
            assert example["id"].decode() == features.ids[index]
            assert example["label"] == features.labels[index]
            types = features.token_types
            for name, values in {
                "input_ids": features.tokens[tokens],
                "token_type_ids": 0 * features.tokens[tokens] if types is None else types[tokens],
                "row_lengths": features.row_lengths[rows],
                "target_weights": features.targets.get("weights", np.zeros((11, 3), np.float32))[index],
            }.items():
                np.testing.assert_array_equal(example[name], values)
            expected = np.full((rows.stop - rows.start, 4), -1)
            values = features.row_targets["starts"][rows]
            expected[:, : values.shape[1]] = values
            np.testing.assert_array_equal(example["row_starts"], expected)
        loaded = load_prepared(tmp_path / "p", split, SETTINGS)
        np.testing.assert_array_equal(loaded.row_targets["starts"], features.row_targets["starts"])


def test_other_settings_other_data_other_folders(tmp_path: Path) -> None:
    folder = write(tmp_path / "p", make_features())
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("years of work")
    cases: list[tuple[str, Any, tuple]] = [
        (r"model\.max_length: 9 -> 12", load_prepared, (folder, "train", {"model.max_length": 12})),
        (r"no-data/provenance\.json", load_prepared, (tmp_path / "no-data", "train", SETTINGS)),
        ("has no split dev", load_prepared, (folder, "dev", SETTINGS)),
        ("prepared otherwise", write, (folder, make_features(seed=1))),
        ("prepared otherwise", write_prepared, (folder, {"train": make_features()}, SETTINGS)),
        ("not empty and not prepared data", write, (full, make_features())),
    ]
    for message, action, arguments in cases:
        with pytest.raises(UserError, match=message):
            action(*arguments)
    assert [path.name for path in full.iterdir()] == ["thesis.txt"]


def test_training_from_shards_is_training_from_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_runs.write_dataset(tmp_path / "data")
    changes = {"stages": ["finetune"], "model": tiny_runs.ONE_LAYER, "finetune": {"backend": "masked"}}
    config, shards = str(tiny_runs.write_config(tmp_path, **changes)), str(tmp_path / "shards")
    assert main(["train", "--config", config]) == 0
    assert main(["prepare-data", "--config", config, "--output", shards, "--shard-size", "10"]) == 0
    assert len(list((tmp_path / "shards").iterdir())) == 12 + 3  # and the descriptions
    other = [f"data.prepared={shards}", f"workdir={tmp_path / 'other'}"]
    assert main(["train", "--config", config, *other]) == 0
    for name in ("metrics.jsonl", "model/model.safetensors"):
        one, two = (tmp_path / work / "finetune" / name for work in ("work", "other"))
        assert one.read_bytes() == two.read_bytes()
    other = [other[0], f"workdir={tmp_path / 'x'}", "model.max_length=12"]
    assert main(["train", "--config", config, *other]) == 2
    assert "model.max_length: 16 -> 12" in capsys.readouterr().err


def test_what_the_settings_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed counts where it decides which examples a limit leaves; data may move."""
    tiny_runs.write_dataset(tmp_path / "data")

    def settings(**data: Any) -> dict[str, Any]:
        seed = data.pop("seed", 3)
        changes = {"data": {"name": "imdb", "path": str(tmp_path / "data"), **data}, "seed": seed}
        run = Experiment(load_config(tiny_runs.write_config(tmp_path, **changes)))
        return run.preparation(tiny_models.tiny_tokenizer())

    plain = settings()
    assert settings(seed=4) == plain
    assert settings(path=str(tmp_path)) == plain
    assert settings(max_train_examples=9) != settings(max_train_examples=9, seed=4)
    assert settings(name="race", skip_bad_records=True) != settings(name="race")


def test_only_a_split_that_does_not_exist_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(tiny_runs.write_config(tmp_path))
    model = types.SimpleNamespace(tokenizer=tiny_models.tiny_tokenizer())
    monkeypatch.setattr(Experiment, "base_model", lambda run: model)
    test = tmp_path / "data" / "test.jsonl"
    test.unlink()
    Experiment(config).prepare_data(tmp_path / "shards", 50, 1)
    assert list(read_json(tmp_path / "shards" / "provenance.json")["splits"]) == ["train", "dev"]
    test.write_text('{"text": "cut sho', encoding="utf-8")
    with pytest.raises(UserError, match=r"test\.jsonl:1"):
        Experiment(config).prepare_data(tmp_path / "other", 50, 1)
    assert not (tmp_path / "other").exists()

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import VOCABULARY, tiny_tokenizer

from trbert_jax.datasets.dataset import Dataset, Example
from trbert_jax.errors import UserError
from trbert_jax.tasks.examples import Examples, build_features

TEXTS = ["the film was good", "it", "the plot was bad and dull and not good !", "a film"]
CLS, SEP = VOCABULARY.index("[CLS]"), VOCABULARY.index("[SEP]")


def make(texts: list[str] = TEXTS) -> Dataset:
    examples = tuple(Example(f"t.jsonl:{i + 1}", text, i % 2) for i, text in enumerate(texts))
    return Dataset(examples, ("bad", "good"))


def row(features: Examples, i: int) -> list[str]:
    return [VOCABULARY[t] for t in features.tokens[features.offsets[i] : features.offsets[i + 1]]]


def test_layout() -> None:
    said = list[str]()
    features = build_features(make(), tiny_tokenizer(), 8, announce=said.append)
    assert row(features, 0) == ["[CLS]", "the", "film", "was", "good", "[SEP]"]
    assert row(features, 2) == ["[CLS]", "the", "plot", "was", "bad", "and", "dull", "[SEP]"]
    assert features.lengths.tolist() == [6, 3, 8, 4]
    assert features.labels.tolist() == [0, 1, 0, 1]
    assert features.ids[2] == "t.jsonl:3"
    assert features.token_types is None
    assert len(features) == 4
    dtypes = [array.dtype for array in (features.tokens, features.offsets, features.labels)]
    assert dtypes == [np.dtype(np.int32), np.dtype(np.int64), np.dtype(np.int32)]
    assert features.num_truncated == 1
    assert said == ["1 of 4 texts are longer than 8 tokens and were cut"]


@pytest.mark.parametrize(("max_length", "cut"), [(12, 0), (11, 1), (6, 1), (5, 2), (3, 3)])
def test_truncation_is_counted_and_said(max_length: int, cut: int) -> None:
    said = list[str]()
    features = build_features(make(), tiny_tokenizer(), max_length, announce=said.append)
    assert features.num_truncated == cut
    assert features.lengths.max() <= max_length
    assert bool(said) == bool(cut)


def test_what_is_stored_with_a_tokenizer_does_not_count() -> None:
    plain, stored = tiny_tokenizer(), tiny_tokenizer()
    stored.backend_tokenizer.enable_truncation(4)
    stored.backend_tokenizer.enable_padding(length=10)
    expected, features = (build_features(make(), t, 16) for t in (plain, stored))
    assert features.tokens.tolist() == expected.tokens.tolist()
    assert features.digest == expected.digest
    assert stored.backend_tokenizer.truncation["max_length"] == 4  # nor is it changed


def test_same_ids_as_the_tokenizer_itself() -> None:
    tokenizer = tiny_tokenizer()
    features = build_features(make(), tokenizer, 64)
    for i, text in enumerate(TEXTS):
        ids = features.tokens[features.offsets[i] : features.offsets[i + 1]].tolist()
        assert ids == tokenizer(text)["input_ids"]


def test_cache_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = list[str]()
    first = build_features(make(), tiny_tokenizer(), 8, tmp_path / "cache", announce=said.append)
    files = list((tmp_path / "cache").iterdir())
    assert [path.suffix for path in files] == [".npz"]
    monkeypatch.setattr("trbert_jax.tasks.examples._tokenize", None)  # the cache has to do
    second = build_features(make(), tiny_tokenizer(), 8, tmp_path / "cache", announce=said.append)
    for field in dataclasses.fields(Examples):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
    assert said == ["1 of 4 texts are longer than 8 tokens and were cut"] * 2


def changed_tokenizer() -> Any:
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


def changed_example(**values: Any) -> Dataset:
    data = make()
    first = dataclasses.replace(data.examples[0], **values)
    return dataclasses.replace(data, examples=(first, *data.examples[1:]))


MORE = make([*TEXTS, "a plot"])
OTHER_BORDER = make(["the film was goodi", "t", *TEXTS[2:]])  # the same characters in all


@pytest.mark.parametrize(
    "changed",
    [
        {"dataset": changed_example(text="the film was bad")},
        {"dataset": changed_example(label=1)},
        {"dataset": changed_example(id="u.jsonl:1")},
        {"dataset": MORE},
        {"dataset": OTHER_BORDER},
        {"dataset": make(TEXTS[::-1])},
        {"tokenizer": changed_tokenizer()},
        {"max_length": 9},
    ],
)
def test_whatever_changes_the_cache_is_not_read(tmp_path: Path, changed: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"dataset": make(), "tokenizer": tiny_tokenizer(), "max_length": 8}
    first = build_features(**arguments, cache_dir=tmp_path)
    second = build_features(**{**arguments, **changed}, cache_dir=tmp_path)
    assert first.digest != second.digest
    assert len(list(tmp_path.iterdir())) == 2
    fresh = build_features(**{**arguments, **changed})
    assert second.tokens.tolist() == fresh.tokens.tolist()
    assert second.labels.tolist() == fresh.labels.tolist()


def truncate(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    middle = content.index(b"NUMPY") + 200
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def forget(content: bytes) -> bytes:
    return content.replace(b"offsets.npy", b"offzets.npy")


@pytest.mark.parametrize("damage", [truncate, flip, forget, lambda _: b"", lambda _: b"not an archive"])
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, damage: Any) -> None:
    first = build_features(make(), tiny_tokenizer(), 20, tmp_path)
    (path,) = tmp_path.iterdir()
    intact = path.read_bytes()
    path.write_bytes(damage(intact))
    assert path.read_bytes() != intact
    said = list[str]()
    second = build_features(make(), tiny_tokenizer(), 20, tmp_path, announce=said.append)
    assert said == [f"{path}: this cache file is damaged; tokenizing again"]
    assert second.tokens.tolist() == first.tokens.tolist()
    build_features(make(), tiny_tokenizer(), 20, tmp_path, announce=said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("name", "array"),
    [("offsets", [0, 6, 9, 17]), ("offsets", [0, 6, 9, 17, 99]), ("offsets", [0, 9, 6, 17, 21])],
)
def test_a_cache_that_contradicts_itself_is_rebuilt(tmp_path: Path, name: str, array: list[int]) -> None:
    first = build_features(make(), tiny_tokenizer(), 8, tmp_path, announce=str)
    (path,) = tmp_path.iterdir()
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, allow_pickle=False, **{**arrays, name: np.array(array, np.int64)})
    second = build_features(make(), tiny_tokenizer(), 8, tmp_path, announce=str)
    assert second.offsets.tolist() == first.offsets.tolist()


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        build_features(make(), tiny_tokenizer(), 8, tmp_path / "file" / "cache", announce=str)


def test_a_text_without_tokens() -> None:
    with pytest.raises(UserError, match=r"t.jsonl:2: the text has no tokens"):
        build_features(make(["good", "\u200b\u0000"]), tiny_tokenizer(), 8)


def test_a_tokenizer_without_special_tokens() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.sep_token = None
    with pytest.raises(UserError, match=r"has no \[CLS\] or no \[SEP\]"):
        build_features(make(), tokenizer, 8)


def test_too_short() -> None:
    with pytest.raises(ValueError, match="max_length is 2"):
        build_features(make(), tiny_tokenizer(), 2)


@pytest.mark.parametrize("with_types", [False, True])
def test_take(with_types: bool) -> None:
    features = build_features(make(), tiny_tokenizer(), 64)
    if with_types:
        types = np.arange(len(features.tokens)).astype(np.int8)
        features = dataclasses.replace(features, token_types=types)
    some = features.take([2, 0, 2])
    assert [row(some, i) for i in range(3)] == [row(features, i) for i in (2, 0, 2)]
    assert some.labels.tolist() == features.labels[[2, 0, 2]].tolist()
    assert some.ids == ["t.jsonl:3", "t.jsonl:1", "t.jsonl:3"]
    assert some.digest not in (features.digest, features.take([2, 0]).digest)
    if with_types:
        expected = np.concatenate([np.arange(*features.offsets[i : i + 2]) for i in (2, 0, 2)])
        assert some.token_types is not None
        assert some.token_types.tolist() == expected.tolist()
    assert len(features.take(np.zeros(0, np.int64))) == 0

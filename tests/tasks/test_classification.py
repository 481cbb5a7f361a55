import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import VOCABULARY, tiny_tokenizer
from tiny_qa import qa_tokenizer

from trbert_jax.datasets.records import Example
from trbert_jax.errors import UserError
from trbert_jax.model.config import InputConfig
from trbert_jax.tasks import classification
from trbert_jax.tasks.classification import encode_texts
from trbert_jax.tasks.examples import Examples

TEXTS = ["the film was good", "it", "the plot was bad and dull and not good !", "a film"]


def make(texts: list[str] = TEXTS) -> list[Example]:
    return [Example(f"t.jsonl:{i + 1}", text, i % 2) for i, text in enumerate(texts)]


def test_rows_labels_and_cut_texts() -> None:
    examples = encode_texts(make(), tiny_tokenizer(), 8)
    rows = [" ".join(VOCABULARY[t] for t in examples.row(i)) for i in (0, 2)]
    assert rows == ["[CLS] the film was good [SEP]", "[CLS] the plot was bad and dull [SEP]"]
    for max_length, cut in ((12, 0), (11, 1), (6, 1), (5, 2), (3, 3)):
        assert encode_texts(make(), tiny_tokenizer(), max_length).num_truncated == cut
    assert examples.labels.tolist() == [0, 1, 0, 1]
    assert (examples.ids[2], examples.token_types, examples.num_truncated) == ("t.jsonl:3", None, 1)


def test_truncation_and_padding_stored_with_a_tokenizer_are_ignored() -> None:
    plain, stored = tiny_tokenizer(), tiny_tokenizer()
    stored.backend_tokenizer.enable_truncation(4)
    stored.backend_tokenizer.enable_padding(length=10)
    expected, examples = (encode_texts(make(), t, 16) for t in (plain, stored))
    assert examples.tokens.tolist() == expected.tokens.tolist()
    assert examples.digest == expected.digest
    assert stored.backend_tokenizer.truncation["max_length"] == 4
    for i, text in enumerate(TEXTS):
        assert expected.row(i).tolist() == plain(text)["input_ids"]


def test_the_cache_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encode_texts(make(), tiny_tokenizer(), 8, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".npz"]
    monkeypatch.setattr(classification, "_tokenize", None)  # the cache has to do
    second = encode_texts(make(), tiny_tokenizer(), 8, tmp_path / "cache")
    for field in dataclasses.fields(Examples):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def labeled(*labels: int) -> list[Example]:
    return [Example(f"{i}", f"text {i} of {label}", label) for i, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("split", "records", "expected"),
    [
        ("train", labeled(0, 0, 0), "all 3 examples are 'a'"),
        ("test", labeled(1, 1), "all 2 examples are 'b'"),
        ("train", labeled(0, 1), "no example is 'c'"),
        ("train", labeled(*[0] * 20, 1, 2, 2), "20 are 'a' and 1 are 'b'; judge by macro F1"),
        ("train", labeled(*[0] * 19, 1, 1, 2, 2), None),
        ("test", labeled(*[0] * 20, 1), None),
        ("dev", [*labeled(0, 1), Example("x", "known", 2)], "1 of 3 texts are in train too"),
        ("dev", [*labeled(0, 1), Example("x", "known", 2, "second")], None),
        ("test", labeled(-1, -1), None),  # withheld
    ],
)
def test_warnings(split: str, records: list[Example], expected: str | None) -> None:
    others = {} if split == "train" else {"train": [Example("y", "known", 0)]}
    task = classification.ClassificationTask(InputConfig(), 8, ("a", "b", "c"))
    found = [*task.warnings(split, records, others)]
    assert len(found) == (expected is not None)
    assert (expected or "") in "".join(found)


def changed(**values: Any) -> list[Example]:
    first, *others = make()
    return [dataclasses.replace(first, **values), *others]


def test_another_input_does_not_read_the_cache(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"records": changed(text="the film was bad")},
        {"records": changed(label=1)},
        {"records": changed(id="u.jsonl:1")},
        {"records": make([*TEXTS, "a plot"])},
        {"records": make(["the film was goodi", "t", *TEXTS[2:]])},  # the same characters in all
        {"records": make(TEXTS[::-1])},
        {"tokenizer": qa_tokenizer()},
        {"max_length": 9},
    ]
    defaults: dict[str, Any] = {"records": make(), "tokenizer": tiny_tokenizer(), "max_length": 8}
    digests = {encode_texts(**defaults | change, cache_dir=tmp_path).digest for change in changes}
    assert len(digests) == len(list(tmp_path.iterdir())) == len(changes)


def flip(content: bytes) -> bytes:
    middle = content.index(b"NUMPY") + 200
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def with_offsets(*offsets: int) -> Any:
    def damage(content: bytes) -> bytes:
        with np.load(io.BytesIO(content)) as archive:
            arrays = {**archive, "offsets": np.array(offsets, np.int64)}
        stream = io.BytesIO()
        np.savez(stream, allow_pickle=False, **arrays)
        return stream.getvalue()

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        flip,
        lambda content: content.replace(b"offsets.npy", b"offzets.npy"),
        lambda _: b"not an archive",
        with_offsets(0, 6, 9, 21),
        with_offsets(0, 6, 9, 21, 99),
        with_offsets(0, 9, 6, 21, 25),
    ],
)
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any) -> None:
    first = encode_texts(make(), tiny_tokenizer(), 20, tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    second = encode_texts(make(), tiny_tokenizer(), 20, tmp_path)
    assert str(path) in caplog.text
    for name in ("tokens", "offsets"):
        np.testing.assert_array_equal(getattr(second, name), getattr(first, name))
    caplog.clear()
    encode_texts(make(), tiny_tokenizer(), 20, tmp_path)
    assert not caplog.text


def test_unusable_inputs_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        encode_texts(make(), tiny_tokenizer(), 8, tmp_path / "file" / "cache")
    with pytest.raises(UserError, match=r"t.jsonl:2: .*no tokens"):
        encode_texts(make(["good", "\u200b\u0000"]), tiny_tokenizer(), 8)
    with pytest.raises(ValueError, match="max_length is 2"):
        encode_texts(make(), tiny_tokenizer(), 2)
    tokenizer = tiny_tokenizer()
    tokenizer.sep_token = None
    with pytest.raises(UserError, match=r"\[SEP\]"):
        encode_texts(make(), tokenizer, 8)

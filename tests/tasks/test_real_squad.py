"""Gold answers of real questions are the same after the way into tokens and back."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from trbert_jax.datasets import find_dataset
from trbert_jax.model.tokenizers import find_tokenizer
from trbert_jax.tasks.scorers import normalize
from trbert_jax.tasks.spans import SQUAD, encode_windows

FOLDERS = [parent / "shared/data" for parent in Path(__file__).resolve().parents]
DATA = next((folder for folder in FOLDERS if (folder / "squad2.tar.xz").is_file()), None)
# This answer ends inside a word piece, a word without its last letter; the piece is longer.
EXCEPTIONS = {"573735e8c3c5551400e51e72"}


def extract(archive: Path, suffix: str, target: Path) -> Path:
    with tarfile.open(archive) as tar:
        stream = tar.extractfile(next(m for m in tar.getmembers() if m.name.endswith(suffix)))
        assert stream is not None
        target.write_bytes(stream.read())
    return target


@pytest.mark.skipif(DATA is None, reason="needs the SQuAD files")
def test_a_thousand_gold_answers(tmp_path: Path) -> None:
    assert DATA is not None
    extract(DATA / "small_samples.tar.xz", "bert-base-uncased-vocab.txt", tmp_path / "vocab.txt")
    path = extract(DATA / "squad2.tar.xz", "train-v2.0.json", tmp_path / "train-v2.0.json")
    answerable = [record for record in find_dataset("squad").read_file(path) if record.spans]
    questions = answerable[:: len(answerable) // 1000][:1000]
    examples = encode_windows(questions, find_tokenizer(tmp_path), SQUAD, training=True)
    assert examples.counts is not None
    assert examples.counts.num_dropped == 0
    gold = {record.id: normalize(record.answers[0]) for record in questions}
    ends = zip(*(examples.row_targets[name][:, 0] for name in ("starts", "ends")), strict=True)
    found = [
        (id, normalize(examples.layout.text(i, start, end)))
        for i, (id, (start, end)) in enumerate(zip(examples.ids, ends, strict=True))
        if start
    ]
    assert len({id for id, _ in found}) == 1000
    assert all(gold[id] in text for id, text in found)
    assert {id for id, text in found if text != gold[id]} == EXCEPTIONS

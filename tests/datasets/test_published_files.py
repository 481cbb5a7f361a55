"""Reads published files beside the repository or in TRBERT_DATA_DIR, if they exist, without a bad record."""

import itertools
import os
import tarfile
from pathlib import Path

import pytest

from trbert_jax.datasets import DATASETS
from trbert_jax.model.tokenizers import find_tokenizer
from trbert_jax.tasks.scorers import normalize
from trbert_jax.tasks.spans import SQUAD, encode_windows

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("TRBERT_DATA_DIR", ROOT.parent / "shared" / "data"))


def unpack(archive: str, folder: Path, prefix: str) -> Path:
    """Unpacks what begins with `prefix`, at most 800 files."""
    if not (DATA / archive).exists():
        pytest.skip(f"{DATA / archive} does not exist")
    with tarfile.open(DATA / archive) as tar:
        members = (member for member in tar if member.isfile() and member.name.startswith(prefix))
        # Python 3.11.2 and 3.11.3 have neither this nor an argument for it.
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder, itertools.islice(members, 800))
    return folder / prefix


@pytest.mark.parametrize(
    ("archive", "file", "name", "count"),
    [
        ("squad2", "squad2/train-v2.0.json", "squad", 13_342),
        ("squad2", "squad2/dev-v2.0.json", "squad", 3_088),
        ("mrqa_subjqa", "mrqa_subjqa/train.jsonl", "newsqa", 2615),
        ("mrqa_subjqa", "mrqa_subjqa/dev.jsonl", "newsqa", 545),
        ("mrqa_subjqa", "mrqa_subjqa/test.jsonl", "newsqa", 1272),
        ("small_samples", "mrqa_newsqa_sample/sample.jsonl", "newsqa", 17),
        ("small_samples", "hotpot/hotpot_dev_distractor_100.json", "hotpotqa", 100),
        ("race", "race/dev", "race_high", 2024),
    ],
)
def test_number_of_questions(tmp_path: Path, archive: str, file: str, name: str, count: int) -> None:
    assert len(DATASETS[name].read_file(unpack(f"{archive}.tar.xz", tmp_path, file))) == count


def test_gold_answers_of_squad_survive_the_tokens(tmp_path: Path) -> None:
    vocabulary = unpack("small_samples.tar.xz", tmp_path, "vocab/bert-base-uncased-vocab.txt")
    vocabulary.rename(tmp_path / "vocab.txt")
    path = unpack("squad2.tar.xz", tmp_path, "squad2/train-v2.0.json")
    answerable = [record for record in DATASETS["squad"].read_file(path) if record.spans]
    gold = {record.id: record for record in answerable[:: len(answerable) // 1000][:1000]}
    examples = encode_windows(list(gold.values()), find_tokenizer(tmp_path), SQUAD, training=True)
    places = zip(
        examples.ids, *(examples.row_targets[name][:, 0] for name in ("starts", "ends")), strict=True
    )
    found = [(id, examples.layout.text(i, a, b)) for i, (id, a, b) in enumerate(places) if a]
    assert len({id for id, _ in found}) == 1000
    wrong = {id for id, text in found if normalize(text) != normalize(gold[id].answers[0])}
    assert wrong == {"573735e8c3c5551400e51e72"}  # ends inside a word piece

"""Files that cannot be read raise, whether bad records are skipped or not."""

import gzip
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tiny_qa_files import DOCUMENTS, SAMPLES, mrqa_document, read_sample, write_lines

from trbert_jax.datasets import DATASETS, BadRecords
from trbert_jax.datasets.reading import load_json, load_json_lines
from trbert_jax.errors import UserError

NO_QUESTION = {"article": "a", "questions": [], "options": []}


@pytest.mark.parametrize(
    ("name", "documents"),
    [
        ("squad", [{"data": []}, {"version": "2.0"}, []]),
        ("mrqa", [[{"header": {}}]]),
        ("race", [{"high/1.txt": {}, "middle/1.txt": NO_QUESTION}]),
        ("hotpotqa", [[], {}]),
        ("hotpotqa_graph", [[]]),
        ("triviaqa", [{"Data": []}, {"data": []}]),
        ("triviaqa_list", [[]]),
        ("wikihop", [[], {}]),
    ],
)
def test_no_records(tmp_path: Path, name: str, documents: list[Any]) -> None:
    for document in documents:
        with pytest.raises(UserError, match=str(tmp_path / SAMPLES[name].path)):
            read_sample(name, tmp_path, document, BadRecords(skip=True))


@pytest.mark.parametrize("name", [name for name in SAMPLES if name not in ("race", "mrqa_gz")])
def test_unreadable_files(tmp_path: Path, name: str) -> None:
    read_sample(name, tmp_path)
    sample = SAMPLES[name]
    path = tmp_path / sample.path
    content = path.read_bytes()

    def raises(match: str) -> None:
        with pytest.raises(UserError, match=rf"{path.name}:{match}"):
            sample.read(path, BadRecords(skip=True))

    path.write_bytes(content.replace("é".encode(), b"\xe9").replace("東".encode(), b"\xe9"))
    raises(r"\d+: not UTF-8")
    if sample.write is not write_lines:
        path.write_bytes(content[: len(content) * 7 // 10])
        raises(".*not valid JSON")
    path.unlink()
    raises(" no such file")
    path.mkdir()
    raises(" is a directory")


def test_unreadable_race(tmp_path: Path) -> None:
    read_sample("race", tmp_path)
    folder = tmp_path / SAMPLES["race"].path

    def raises(match: str) -> None:
        with pytest.raises(UserError, match=match):
            SAMPLES["race"].read(folder, BadRecords(skip=True))

    (folder / "high/2.txt").write_text('{"article"')
    raises(r"high/2\.txt: not valid JSON")
    (folder / "middle/1.txt").unlink()
    raises(r"dev/middle: has no \*\.txt")
    (folder / "middle").rmdir()
    raises(r"dev/middle: no such folder")


def test_evidence_whose_names_a_mac_has_decomposed(tmp_path: Path) -> None:
    expected = read_sample("triviaqa", tmp_path)
    for name in DOCUMENTS:
        path = tmp_path / "evidence" / name
        path.rename(path.with_name(unicodedata.normalize("NFD", path.name)))
    assert SAMPLES["triviaqa"].read(tmp_path / SAMPLES["triviaqa"].path) == expected


def test_unusable_evidence(tmp_path: Path) -> None:
    read_sample("triviaqa", tmp_path)
    empty, broken, missing = (tmp_path / "evidence" / name for name in DOCUMENTS)
    empty.write_bytes(b" \n")
    broken.write_bytes(b"caf\xe9")
    missing.unlink()
    bad, sample = BadRecords(skip=True), SAMPLES["triviaqa"]
    with pytest.raises(UserError, match=r"wikipedia-dev.json: .*4 of 4 records skipped"):
        sample.read(tmp_path / sample.path, bad)
    reasons = ("Lloyd_Webber.txt is empty", "Élysée.txt: not UTF-8", "35_995.txt: no such file")
    assert all(reason in str(record) for reason, record in zip(reasons, bad.skipped[:3], strict=True))
    (tmp_path / "evidence").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"wikipedia-dev.json: no evidence"):
        sample.read(tmp_path / sample.path, bad)


WHOLE = gzip.compress("".join(json.dumps(line) + "\n" for line in mrqa_document() * 50).encode())


@pytest.mark.parametrize(
    "content",
    [
        *(WHOLE[: int(len(WHOLE) * share)] for share in (0.9, 0.5, 0.02)),
        b'{"context": "not compressed"}',
        gzip.compress(b"{}", mtime=0)[:10] + b"\xff" * 20,
    ],
    ids=["most", "half", "head", "plain", "header"],  # the bytes would be ids of their own
)
def test_damaged_gzip(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "dev.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"dev\.jsonl\.gz: damaged or cut short after line \d+"):
        list(load_json_lines(path, BadRecords(skip=True)))


@pytest.mark.parametrize("line", ['{"context": "cut', "[" * 100_000, '{"context": ' + "1" * 5000 + "}"])
def test_line_that_is_not_json(tmp_path: Path, line: str) -> None:
    path = write_lines(tmp_path / "dev.jsonl", mrqa_document())
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line)
    with pytest.raises(UserError, match=r"dev.jsonl:4: not valid JSON"):
        DATASETS["newsqa"].read_file(path)
    bad = BadRecords(skip=True)
    assert len(DATASETS["newsqa"].read_file(path, bad)) == 3
    assert len(bad.skipped) == 1
    path.write_text(line)
    with pytest.raises(UserError, match=r"dev.jsonl: not valid JSON"):
        load_json(path)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, suffix: str, character: str) -> None:
    text = json.dumps(f"before{character}after", ensure_ascii=character < " ")
    content = f'\n{{"a": {text}}}\r\n\n{{"a": {text}}}' if "l" in suffix else f'{{"a":\n{text}}}\n'
    path = tmp_path / f"t{suffix}"
    data = b"\xef\xbb\xbf" + content.encode()  # a byte order mark does no harm
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    values = [load_json(path)] * 2 if suffix == ".json" else [value for _, value in load_json_lines(path)]
    assert values == [{"a": f"before{character}after"}] * 2

"""Files that cannot be read stop every reader, skipping or not; lines end at a line feed only."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_qa_files import DOCUMENTS, SAMPLES, mrqa_document, read_sample, write_lines

from trbert_jax.datasets import BadRecords, mrqa
from trbert_jax.datasets.json_files import load_json, load_json_lines
from trbert_jax.errors import UserError

FILES = [name for name, sample in SAMPLES.items() if name not in ("race", "mrqa_gz")]


def cut_short(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize("name", FILES)
def test_unreadable(tmp_path: Path, name: str) -> None:
    read_sample(name, tmp_path)
    sample = SAMPLES[name]
    path = tmp_path / sample.path
    content = path.read_bytes()
    path.write_bytes(content.replace("é".encode(), b"\xe9").replace("東".encode(), b"\xe9"))
    with pytest.raises(UserError, match=rf"{path.name}:\d+: not UTF-8 \(byte \d+ of the line\)"):
        sample.read(path, BadRecords(skip=True))
    path.unlink()
    with pytest.raises(UserError, match=rf"{path.name}: no such file"):
        sample.read(path, BadRecords(skip=True))
    path.mkdir()
    with pytest.raises(UserError, match=rf"{path.name}: is a directory, a file was expected"):
        sample.read(path, BadRecords(skip=True))


@pytest.mark.parametrize("name", ["squad", "hotpotqa", "triviaqa", "triviaqa_list", "wikihop"])
def test_json_cut_short(tmp_path: Path, name: str) -> None:
    read_sample(name, tmp_path)
    path = tmp_path / SAMPLES[name].path
    cut_short(path, 0.7)
    with pytest.raises(
        UserError, match=rf"{path.name}:1: not valid JSON \(.*; if the file was cut short, down"
    ):
        SAMPLES[name].read(path, BadRecords(skip=True))


def test_race_file_that_is_not_json(tmp_path: Path) -> None:
    read_sample("race", tmp_path)
    (tmp_path / "dev/high/2.txt").write_text('{"article"')
    with pytest.raises(UserError, match=r"high/2\.txt:1: not valid JSON"):
        SAMPLES["race"].read(tmp_path / "dev", BadRecords(skip=True))


def test_evidence_that_cannot_be_used(tmp_path: Path) -> None:
    read_sample("triviaqa", tmp_path)
    files = dict(zip(DOCUMENTS, (b" \n", b"caf\xe9", None), strict=True))
    for name, content in files.items():
        path = tmp_path / "evidence" / name
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    bad = BadRecords(skip=True)
    with pytest.raises(
        UserError, match=r"wikipedia-dev.json: has no usable record; 4 of 4 records skipped: "
    ):
        SAMPLES["triviaqa"].read(tmp_path / SAMPLES["triviaqa"].path, bad)
    reasons = [skipped.reason for skipped in bad.skipped]
    assert (
        reasons[0] == f"the evidence {tmp_path}/evidence/wikipedia/Lloyd_Webber.txt is empty; expected a text"
    )
    assert "Élysée.txt: not UTF-8 (byte 3)" in reasons[1]
    assert "web/35/35_995.txt: no such file" in reasons[2]


def test_no_evidence_folder(tmp_path: Path) -> None:
    path = read_sample("triviaqa", tmp_path) and tmp_path / SAMPLES["triviaqa"].path
    (tmp_path / "evidence").rename(tmp_path / "elsewhere")
    with pytest.raises(
        UserError, match=r"no evidence documents; expected them in .*evidence or .*qa/evidence"
    ):
        SAMPLES["triviaqa"].read(path, BadRecords(skip=True))


@pytest.mark.parametrize("level", ["high", "middle"])
def test_race_folders(tmp_path: Path, level: str) -> None:
    read_sample("race", tmp_path)
    path = tmp_path / SAMPLES["race"].path
    for file in (path / level).glob("*.txt"):
        file.unlink()
    with pytest.raises(UserError, match=rf"dev/{level}: has no \*.txt; expected files"):
        SAMPLES["race"].read(path, BadRecords(skip=True))
    (path / level).rmdir()
    with pytest.raises(
        UserError, match=rf"dev/{level}: no such folder; expected files \*.txt in the folders high"
    ):
        SAMPLES["race"].read(path, BadRecords(skip=True))


@pytest.mark.parametrize("share", [0.9, 0.5, 0.02])
def test_gz_cut_short(tmp_path: Path, share: float) -> None:
    path = write_lines(tmp_path / "dev.jsonl.gz", mrqa_document() * 50)
    cut_short(path, share)
    with pytest.raises(
        UserError, match=r"dev.jsonl.gz: damaged or cut short after line \d+ .*download it again"
    ):
        list(load_json_lines(path, BadRecords(skip=True)))
    with pytest.raises(UserError, match="cut short"):
        mrqa.read(path, BadRecords(skip=True))


def test_damaged_gz(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "dev.jsonl.gz", mrqa_document())
    content = bytearray(path.read_bytes())
    for position in range(20, len(content) - 8):  # header and trailer stay
        content[position] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"dev\.jsonl\.gz: damaged or cut short after line 0"):
        mrqa.read(path, BadRecords(skip=True))
    path.write_bytes(b'{"context": "not compressed"}')
    with pytest.raises(UserError, match="damaged or cut short after line 0"):
        mrqa.read(path, BadRecords(skip=True))
    path.unlink()
    with pytest.raises(UserError, match=r"dev\.jsonl\.gz: no such file"):
        mrqa.read(path, BadRecords(skip=True))
    path.mkdir()
    with pytest.raises(UserError, match=r"dev\.jsonl\.gz: is a directory"):
        mrqa.read(path, BadRecords(skip=True))
    path.rmdir()
    path.write_bytes(gzip.compress(b"\xe9\n"))
    with pytest.raises(UserError, match=r"dev\.jsonl\.gz:1: not UTF-8"):
        mrqa.read(path, BadRecords(skip=True))


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # chmod does not stop the superuser
    monkeypatch.setattr(gzip, "open", refuse)
    for name in ("dev.jsonl", "dev.jsonl.gz"):
        with pytest.raises(UserError, match=rf"{name}: no permission to read it"):
            mrqa.read(tmp_path / name, BadRecords())


@pytest.mark.parametrize("line", ['{"context": "cut', "[" * 100_000, '{"context": ' + "1" * 5000 + "}"])
def test_line_that_is_not_json(tmp_path: Path, line: str) -> None:
    """A record among others, in JSON lines."""
    path = write_lines(tmp_path / "dev.jsonl", mrqa_document())
    with path.open("a", encoding="utf-8") as stream:
        stream.write(line)
    with pytest.raises(
        UserError, match=r"dev.jsonl:4: not (valid|readable) JSON \(.*; expected one object a line"
    ):
        mrqa.read(path, BadRecords())
    bad = BadRecords(skip=True)
    assert len(mrqa.read(path, bad)) == 3
    assert [skipped.place.line for skipped in bad.skipped] == [4]


@pytest.mark.parametrize("content", ["[" * 100_000, "[" + "1" * 5000 + "]"])
def test_json_beyond_limits(tmp_path: Path, content: str) -> None:
    path = tmp_path / "dev.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"dev\.json: not readable JSON"):
        load_json(path)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, suffix: str, character: str) -> None:
    text = json.dumps(f"before{character}after", ensure_ascii=character < " ")
    content = f'\n{{"a": {text}}}\r\n\n{{"a": {text}}}' if "l" in suffix else f'{{"a":\n{text}}}\n'
    path = tmp_path / f"t{suffix}"
    data = b"\xef\xbb\xbf" + content.encode()  # a byte order mark does no harm
    path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    values: list[Any]
    if suffix == ".json":
        values = [load_json(path)]
    else:
        values = list(load_json_lines(path, BadRecords()))
        assert [value.place.line for value in values] == [2, 4]
    assert {value["a"].text() for value in values} == {f"before{character}after"}

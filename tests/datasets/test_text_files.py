from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from trbert_jax.datasets.text_files import read_dataset as read_file
from trbert_jax.errors import UserError

NAMES = ("bad", "fine", "good")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_jsonl(tmp_path: Path) -> None:
    lines = ['{"text": "a film", "label": 2}', "", '{"label": 0, "text": "b", "stars": 1}\r', ""]
    data = read_file(write(tmp_path / "t.jsonl", "\n".join(lines)), NAMES)
    assert [(e.id, e.text, e.label) for e in data.examples] == [
        ("t.jsonl:1", "a film", 2),
        ("t.jsonl:3", "b", 0),
    ]
    assert data.label_names == NAMES


def test_csv(tmp_path: Path) -> None:
    rows = '1,plain\r\n"3","two, ""quoted""\nlines"\n\n2,last'
    data = read_file(write(tmp_path / "t.csv", rows), NAMES)
    assert [(e.id, e.text, e.label) for e in data.examples] == [
        ("t.csv:1", "plain", 0),
        ("t.csv:2", 'two, "quoted"\nlines', 2),
        ("t.csv:5", "last", 1),
    ]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_only_a_line_feed_ends_a_line(tmp_path: Path, suffix: str, character: str) -> None:
    text = f"before{character}after"
    if suffix == ".jsonl":
        line = json.dumps({"text": text, "label": 1}, ensure_ascii=character < " ")
    else:
        line = f'2,"{text}"'
    data = read_file(write(tmp_path / f"t{suffix}", f"{line}\n{line}\n"), NAMES)
    assert [e.text for e in data.examples] == [text, text]


@pytest.mark.parametrize(("suffix", "line"), [(".jsonl", '{"text": "a", "label": 0}'), (".csv", "1,a")])
def test_byte_order_mark(tmp_path: Path, suffix: str, line: str) -> None:
    data = read_file(write(tmp_path / f"t{suffix}", b"\xef\xbb\xbf" + line.encode()), NAMES)
    assert (data.examples[0].text, data.examples[0].label) == ("a", 0)


def test_very_long_csv_text(tmp_path: Path) -> None:
    limit, text = csv.field_size_limit(), "word " * 50_000
    data = read_file(write(tmp_path / "t.csv", f'1,"{text}"\n'), NAMES)
    assert data.examples[0].text == text
    assert csv.field_size_limit() == limit


GOOD_JSON, GOOD_CSV = '{"text": "a", "label": 0}\n', "1,a\n"
# fmt: off
JSON_MISTAKES = [
    ("", "has no examples"),
    ("\n \n", "has no examples"),
    (GOOD_JSON + '{"text": "a", "label"\n', r":2: not valid JSON \(.* at column 22\)"),
    (GOOD_JSON + '{"text": "a\u2028b"', ":2: not valid JSON"),
    ("[" * 100_000, ":1: not readable JSON"),
    ('{"text": "a", "label": ' + "1" * 5000 + "}", ":1: not readable JSON"),
    ('["a", 1]', r":1: a JSON list; expected one object a line"),
    ('{"body": "a", "label": 1}', r":1: no field 'text' \(it has: 'body', 'label'\)"),
    ('{"text": "a"}', r":1: no field 'label' \(it has: 'text'\)"),
    ("{}", r":1: no field 'text' \(it has: none\)"),
    (GOOD_JSON + '{"text": 7, "label": 1}', r":2: the text is a number \(7\); expected a string"),
    ('{"text": null, "label": 1}', ":1: the text is null; expected a string"),
    ('{"text": "", "label": 1}', ":1: the text is empty"),
    ('{"text": " \\u2028\\t", "label": 1}', ":1: the text is empty"),
    ('{"text": "a\\ud800", "label": 1}', ":1: the text is not valid Unicode .* at character 1"),
    ('{"text": "a", "label": "1"}', r":1: the label is text \('1'\); expected a whole number 0..2"),
    ('{"text": "a", "label": 1.0}', r":1: the label is a fraction \(1.0\); expected a whole number 0..2"),
    ('{"text": "a", "label": true}', ":1: the label is true or false"),
    ('{"text": "a", "label": null}', ":1: the label is null"),
    (GOOD_JSON * 2 + '{"text": "a", "label": 3}', r":3: .* is 3; expected 0..2 for 3 classes \(bad, fine"),
    ('{"text": "a", "label": -1}', ":1: the label is -1; expected 0..2"),
    (GOOD_JSON.encode() + b'{"text": "caf\xe9", "label": 1}', r":2: not UTF-8 \(byte 13 of the line\)"),
    (GOOD_JSON.encode("utf-16"), ":1: not UTF-8"),
]
CSV_MISTAKES = [
    ("", "has no examples"),
    ("label,text\n1,a\n", r":1: the label is text \('label'\); .* 1..3; if the line is a header, remove it"),
    (GOOD_CSV + "label,text\n", r":2: the label is text \('label'\); expected a whole number 1..3$"),
    (GOOD_CSV + "0,a\n", ":2: the label is 0; expected 1..3"),
    (GOOD_CSV + "4,a\n", ":2: the label is 4; expected 1..3"),
    ("1.0,a\n", ":1: the label is text"),
    ("9999999999999,a\n", ":1: the label is text"),
    (GOOD_CSV + "1\n", ":2: 1 columns; expected 2, label and text$"),
    ("1,a, b\n", ":1: 3 columns; expected 2, label and text; put a text with commas into double quotes"),
    ('1,""\n', ":1: the text is empty"),
    (GOOD_CSV + '1,"no end\n1,b\n', r":2: not a valid CSV row \(unexpected end of data\)"),
    (GOOD_CSV + '1,"a\nb"\n1,"a" b\n', ":4: not a valid CSV row"),
    (b"1,a\n1,caf\xe9\n", r":2: not UTF-8 \(byte 5 of the line\)"),
]
# fmt: on


@pytest.mark.parametrize(("content", "message"), JSON_MISTAKES)
def test_mistakes_in_jsonl(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = write(tmp_path / "t.jsonl", content)
    with pytest.raises(UserError, match=message) as caught:
        read_file(path, NAMES)
    assert str(caught.value).startswith(f"{path}:")


@pytest.mark.parametrize(("content", "message"), CSV_MISTAKES)
def test_mistakes_in_csv(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = write(tmp_path / "t.csv", content)
    with pytest.raises(UserError, match=message) as caught:
        read_file(path, NAMES)
    assert str(caught.value).startswith(f"{path}:")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_file(tmp_path / "t.jsonl", NAMES)
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(UserError, match="is a directory, a file was expected"):
        read_file(tmp_path / "d.csv", NAMES)
    with pytest.raises(UserError, match=r"expected a .jsonl file \(text, label\) or a .csv file"):
        read_file(tmp_path / "t.tsv", NAMES)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)  # chmod does not stop the superuser
    with pytest.raises(UserError, match="no permission to read it"):
        read_file(tmp_path / "t.jsonl", NAMES)

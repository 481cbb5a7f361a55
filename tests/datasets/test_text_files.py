import csv
from pathlib import Path

import pytest

from trbert_jax.datasets import DATASETS
from trbert_jax.datasets.records import Example
from trbert_jax.errors import UserError

NAMES = ("bad", "fine", "good")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(path: Path) -> list[Example]:
    return DATASETS["imdb"].read_file(path, labels=NAMES)


SIGNS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"  # none ends a line


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("t.jsonl", '{"text": "a film", "label": 2}\n\n', [(1, "a film", 2)]),
        ("t.jsonl", '\n{"label": 0, "text": "b", "stars": 1}\r', [(2, "b", 0)]),
        (
            "t.csv",
            '1,plain\r\n"3","two, ""quoted""\nlines"\n',
            [(1, "plain", 0), (2, 'two, "quoted"\nlines', 2)],
        ),
        ("t.csv", '2,"a\nb"\n\n2,last', [(1, "a\nb", 1), (4, "last", 1)]),
        ("t.csv", f'\ufeff2,"{SIGNS}"\n2,"{SIGNS}"\n', [(1, SIGNS, 1), (2, SIGNS, 1)]),  # a byte order mark
    ],
)
def test_good_files(tmp_path: Path, name: str, content: str, expected: list[tuple[int, str, int]]) -> None:
    found = [(e.id, e.text, e.label) for e in read(write(tmp_path / name, content))]
    assert found == [(f"{name}:{line}", text, label) for line, text, label in expected]


def test_very_long_csv_text(tmp_path: Path) -> None:
    limit, text = csv.field_size_limit(), "word " * 50_000
    data = read(write(tmp_path / "t.csv", f'1,"{text}"\n'))
    assert data[0].text == text
    assert csv.field_size_limit() == limit


GOOD_JSON, GOOD_CSV = '{"text": "a", "label": 0}\n', "1,a\n"
# Content, words of the message; tests/test_bad_input.py has more of JSON lines.
JSON_MISTAKES: list[tuple[str | bytes, str]] = [
    ('["a", 1]', ":1: list object 'text'"),
    (GOOD_JSON * 2 + '{"text": "a", "label": 3}', ":3: label 3 0 2 bad, fine"),
]
CSV_MISTAKES: list[tuple[str | bytes, str]] = [
    ("", "no usable"),
    ("label,text\n1,a\n", ":1: label ('label') header"),
    (GOOD_CSV + "label,text\n", ":2: label ('label') 1 3"),
    (GOOD_CSV + "0,a\n", ":2: label 0 1 3"),
    (GOOD_CSV + "4,a\n", ":2: label 4 1 3"),
    (GOOD_CSV + "1.5,a\n", ":2: label 1 3"),
    (GOOD_CSV + "9999999999999,a\n", ":2: label 1 3"),
    (GOOD_CSV + "1\n", ":2: 1 2 columns"),
    ("1,a, b\n", ":1: 3 2 columns quotes"),
    ('1,""\n', ":1: text empty"),
    (GOOD_CSV + '1,"no end\n1,b\n', ":2: CSV"),
    (GOOD_CSV + '1,"a\nb"\n1,"a" b\n', ":4: CSV"),
    (b"1,a\n1,caf\xe9\n", ":2: UTF-8 5"),
]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [("t.jsonl", *case) for case in JSON_MISTAKES] + [("t.csv", *case) for case in CSV_MISTAKES],
)
def test_mistakes(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:")
    for word in words.split():
        assert word in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    (tmp_path / "d.csv").mkdir()
    for name in ("t.jsonl", "d.csv", "t.tsv"):
        with pytest.raises(UserError, match=name):
            read(tmp_path / name)

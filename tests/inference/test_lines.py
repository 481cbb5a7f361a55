"""Texts from a file, as `trbert predict` and `trbert benchmark` read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from trbert_jax.errors import UserError
from trbert_jax.inference.lines import input_lines, read_texts


def texts(path: Path) -> list[str]:
    return list(read_texts(input_lines([], path), path))


def test_blank_lines_are_texts_but_between_records(tmp_path: Path) -> None:
    plain, records = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    plain.write_text("one\n\n two \n", encoding="utf-8")
    records.write_text('{"text": "one"}\n\n \n{"text": ""}\n\n', encoding="utf-8")
    assert texts(plain) == ["one", "", " two "]
    assert texts(records) == ["one", ""]


def test_a_bad_record_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": 1}\n', encoding="utf-8")
    found = read_texts(input_lines([], path), path)
    assert next(found) == "one"
    with pytest.raises(UserError, match=r'texts\.jsonl:3: expected an object with a string "text"'):
        next(found)


@pytest.mark.parametrize(("content", "message"), [("", "is empty"), ("\n \n", "only blank lines")])
def test_a_file_without_texts(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        texts(path)

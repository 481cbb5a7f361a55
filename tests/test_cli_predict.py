"""`trbert predict`: texts from anywhere, one JSON line each. A fake plays the model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from fake_model import FakeModel, lines_of, type_in

from trbert_jax.cli import main


def test_predict_texts_from_arguments(predictor: type[FakeModel], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "one", "--model", "m", "three"]) == 0
    expected = {
        "label": "gut",
        "label_id": 1,
        "scores": {"bad": 0.25, "gut": 0.75},
        "kept": [[0, 1, 2], [0]],
        "num_tokens": 3,
        "truncated": False,
    }
    assert lines_of(capsys.readouterr().out) == [
        expected,
        {**expected, "kept": [[0, 1, 2, 3, 4], [0]], "num_tokens": 5},
    ]


@pytest.mark.parametrize("arguments", [["--model", "m", "--", "-x", "y"], ["y", "--model", "m", "--", "-x"]])
def test_predict_text_with_a_dash(
    arguments: list[str], predictor: type[FakeModel], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "--with-text", *arguments]) == 0
    assert sorted(line["text"] for line in lines_of(capsys.readouterr().out)) == ["-x", "y"]


TRICKY = "gr\u00fcn \u2028 und \u0085 rot \x0c oder \x1c blau"


@pytest.mark.parametrize("final", ["", "\n"])
def test_predict_lines_end_at_newlines_only(
    final: str, predictor: type[FakeModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "texts.txt"
    source.write_bytes(f"{TRICKY}\nsecond{final}".encode())
    assert main(["predict", "--model", "m", "--file", str(source), "--with-text"]) == 0
    assert [line["text"] for line in lines_of(capsys.readouterr().out)] == [TRICKY, "second"]


def test_predict_reads_standard_input(
    predictor: type[FakeModel], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, f"{TRICKY}\nsecond\n".encode())
    assert main(["predict", "--model", "m", "--with-text"]) == 0
    assert [line["text"] for line in lines_of(capsys.readouterr().out)] == [TRICKY, "second"]


def test_predict_jsonl_to_a_file(
    predictor: type[FakeModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "texts.jsonl", tmp_path / "out" / "predictions.jsonl"
    records = [{"text": TRICKY, "label": 0}, {"text": "two\nlines"}]
    source.write_text(
        "\n".join(json.dumps(r, ensure_ascii=False) for r in records), encoding="utf-8", newline=""
    )
    arguments = ["--model", "m", "--file", str(source), "--output", str(target), "--with-text"]
    assert main(["predict", *arguments]) == 0
    assert capsys.readouterr().out == ""
    assert [line["text"] for line in lines_of(target.read_text(encoding="utf-8"))] == [TRICKY, "two\nlines"]
    assert os.listdir(target.parent) == ["predictions.jsonl"]


def test_predict_hands_options_and_lines_on(
    predictor: type[FakeModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "texts.txt"
    source.write_text("".join(f"{'x' * n}\n" for n in range(1, 71)), encoding="utf-8")
    options = ["--batch-size", "1", "--backend", "masked", "--threshold", "0.4"]
    assert main(["predict", "--model", "m", "--file", str(source), *options]) == 0
    assert predictor.asked == [{"batch_size": 1, "threshold": 0.4, "rule": None, "backend": "masked"}]
    assert [line["num_tokens"] for line in lines_of(capsys.readouterr().out)] == list(range(1, 71))


def test_predict_says_how_many_texts_were_cut(
    predictor: type[FakeModel], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["predict", "--model", "m", "short"]) == 0
    assert caplog.messages == []
    capsys.readouterr()
    assert main(["predict", "--model", "m", "short", "x" * 100, "y" * 200]) == 0
    assert [line["truncated"] for line in lines_of(capsys.readouterr().out)] == [False, True, True]
    assert caplog.messages == ["2 of 3 texts are longer than 99 tokens and were cut"]


@pytest.mark.parametrize(
    ("content", "place"), [(b"", "standard input: "), (b"ok\ncaf\xe9", "standard input:2: ")]
)
def test_predict_refuses_bad_standard_input(
    content: bytes,
    place: str,
    predictor: type[FakeModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    type_in(monkeypatch, content)
    assert main(["predict", "--model", "m", "--output", str(tmp_path / "out.jsonl")]) == 2
    assert capsys.readouterr().err.startswith(f"trbert: error: {place}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("text --file f", "--file"),
        ("--file nowhere.txt", "nowhere.txt: "),
        ("text --model missing", "missing: "),
    ],
)
def test_predict_mistakes(
    arguments: str, named: str, predictor: type[FakeModel], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "--model", "m", *arguments.split()]) == 2
    assert named in capsys.readouterr().err

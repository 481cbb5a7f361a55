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


def test_predict_leaves_out_blank_lines_between_records_only(
    predictor: type[FakeModel], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line of text may be empty; between JSON objects it is nothing, as for `evaluate`."""
    (tmp_path / "texts.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    (tmp_path / "texts.jsonl").write_text('\n{"text": "one"}\n \n{"text": ""}\n\n', encoding="utf-8")
    for name, texts in (("texts.txt", ["one", "", "two"]), ("texts.jsonl", ["one", ""])):
        assert main(["predict", "--model", "m", "--file", str(tmp_path / name), "--with-text"]) == 0
        assert [line["text"] for line in lines_of(capsys.readouterr().out)] == texts


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
    ("name", "content", "message"),
    [
        ("texts.txt", b"", "texts.txt: is empty"),
        ("texts.txt", b"ok\n\xff\n", "texts.txt:2: not UTF-8 (byte 0 of the line)"),
        ("texts.jsonl", b'{"text": "ok"}\n{"text": \n', "texts.jsonl:2: not valid JSON"),
        ("texts.jsonl", b'{"text": "ok"}\n{"body": "x"}\n', "texts.jsonl:2: "),
        ("texts.jsonl", b'{"text": 3}\n', "texts.jsonl:1: "),
        ("texts.jsonl", b'["text"]\n', "texts.jsonl:1: "),
        ("texts.jsonl", b" \n\n", "texts.jsonl: "),
    ],
)
def test_predict_refuses_bad_files(
    name: str,
    content: bytes,
    message: str,
    predictor: type[FakeModel],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / name).write_bytes(content)
    output = tmp_path / "out.jsonl"
    assert main(["predict", "--model", "m", "--file", str(tmp_path / name), "--output", str(output)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("trbert: error: ")
    assert message in err
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "standard input: is empty"), (b"caf\xe9", "standard input:1: not UTF-8 (byte 3 of the line)")],
)
def test_predict_refuses_bad_standard_input(
    content: bytes,
    message: str,
    predictor: type[FakeModel],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    type_in(monkeypatch, content)
    assert main(["predict", "--model", "m"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "m", "text", "--file", "f"], "both as arguments and by --file"),
        (["--model", "m", "--file", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--model", "missing", "text"], "missing: no such directory"),
    ],
)
def test_predict_mistakes(
    arguments: list[str], message: str, predictor: type[FakeModel], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *arguments]) == 2
    assert message in capsys.readouterr().err

"""The command line: what it accepts, what it prints, how it ends. Fakes play the library."""

import csv
import io
import json
import logging
import os
import subprocess
import sys
import types
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from fake_trbert import FakeModel
from tiny_models import tiny_model

from trbert_jax import __version__
from trbert_jax.cli import COMMANDS, main
from trbert_jax.cli.doctor import FEATURES

Capture = pytest.CaptureFixture[str]
Fake = Callable[..., None]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Puts a module of given contents in the place of one of the package."""

    def put(name: str, **contents: Any) -> None:
        module = types.ModuleType(f"trbert_jax.{name}")
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return put


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_explains_itself(command: str, capsys: Capture) -> None:
    assert main([*command.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "xample" in out
    assert f"  trbert {command}" in out
    if not command:
        assert all(name in out for name in COMMANDS)


def test_help_answers_at_once() -> None:
    seconds = []
    for _ in range(3):
        before = sum(os.times()[2:4])  # of the processor: the machine may be busy
        shown = subprocess.check_output([sys.executable, "-m", "trbert_jax", "--help"], text=True)
        assert shown.startswith("usage: trbert")
        seconds.append(sum(os.times()[2:4]) - before)
    assert min(seconds) < 0.5


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trbert {__version__}\n"


TRAIN, EVALUATE = "train --config c", "evaluate --model m --data d"
JOIN = f"{TRAIN} --coordinator a:1 --num-processes 2 --process-id"


# A part of the message, and commands that are wrong there.
WRONG: dict[str, list[str]] = {
    "COMMAND": [""],
    "'fly'": ["fly"],
    "--config": ["train", "prepare-data --output o", "evaluate --all-checkpoints"],
    "arguments: --conf": ["train --conf c.yaml"],
    "--config alone": [
        f"evaluate --all-checkpoints --config c {o}" for o in ("--data d", "--threshold 0.4", "--frontier")
    ],
    "--fast": [f"{TRAIN} --fast"],
    "--stages": [f"{TRAIN} --stages a,,b"],
    "--num-processes": [f"{TRAIN} --coordinator a:1"],
    "--coordinator": [f"{TRAIN} --process-id 0 --num-processes 2"],
    "--distributed": [f"{JOIN} 1 --distributed"],
    "--process-id 2": [f"{JOIN} 2"],
    "FIRST:END": [f"{TRAIN} --profile-steps 5:3"],
    "--dry-run": [f"{TRAIN} --devices 2"],
    "--model and --data": ["evaluate", "evaluate --model m"],
    "--all-checkpoints": [f"{EVALUATE} seed=1"],
    "--batch-size": [f"{EVALUATE} --batch-size 0", "predict --model m --batch-size many"],
    "'warp'": [f"{EVALUATE} --rule warp"],
    "--rule and --backend": [f"{EVALUATE} --execution masked"],
    "--threshold": [
        f"{EVALUATE} --threshold 1",
        "predict --model m --threshold half a",
        f"{EVALUATE} --threshold .5,",
    ],
    "--rule dense": [f"{EVALUATE} --rule dense --baselines"],
    "for --frontier": [f"{EVALUATE} --frontier {o}" for o in ("--threshold 0.4", "--operating-point 3x")],
    "a number above 1": ["calibrate --model m --data d --speedups 3,1"],
    "--model": ["predict text"],
    "--file": ["predict --model m text --file f"],
    "nowhere.txt: ": ["predict --model m --file nowhere.txt"],
    "--random": ["benchmark --data d", "benchmark --data d --model m --random minilm"],
    "--batch-sizes": ["benchmark --data d --model m --batch-sizes 1,0"],
    "--variants": ["benchmark --data d --model m --executions packed"],
    "'float16'": ["benchmark --data d --model m --dtype float16"],
    "--keep-layers": ["convert --input a --output b --keep-layers 0,x"],
    "stray": ["convert --input a --output b stray"],
    "--output": ["split-hyperpartisan --input a"],
    "JAX_COMPILATION_CACHE_DIR": ["compile --model m"],
}


@pytest.mark.parametrize(("named", "command"), [(n, c) for n, commands in WRONG.items() for c in commands])
def test_wrong_arguments(command: str, named: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("trbert: error: ")
    assert named in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        "--config c.yaml a.b=1 c=2 --stages score,policy",
        "--config c.yaml a.b=1 --stages score,policy c=2",
        "a.b=1 --stages score,policy c=2 --config c.yaml",
    ],
)
def test_train_takes_overrides_anywhere(arguments: str, fake: Fake) -> None:
    calls: list[Any] = []
    fake("config", load_config=lambda path, overrides: (path, overrides))
    fake(
        "training.run",
        train=lambda config, stages, profile_steps: calls.append((config, stages, profile_steps)),
        results_table=lambda *arguments: [],
    )
    assert main(["train", "--profile-steps", "3:5", *arguments.split()]) == 0
    assert calls == [((Path("c.yaml"), ["a.b=1", "c=2"]), ["score", "policy"], (3, 5))]


def test_messages_go_to_stderr_once_and_unexpected_errors_show_a_traceback(
    fake: Fake, capsys: Capture
) -> None:
    def train(config: Any, stages: Any, profile_steps: Any) -> None:
        for level, message in ((logging.DEBUG, "detail"), (logging.INFO, "step 1"), (logging.INFO, "step 1")):
            logging.getLogger("trbert_jax.training.loop").log(level, message)
        if stages:
            raise ZeroDivisionError

    fake("config", load_config=lambda path, overrides: None)
    fake("training.run", train=train, results_table=lambda *arguments: ["accuracy 1"])
    for _ in range(2):  # each run says it again
        assert main(["train", "--config", "c.yaml"]) == 0
        assert capsys.readouterr() == ("accuracy 1\n", "step 1\n")
    with pytest.raises(ZeroDivisionError):
        main(["train", "--config", "c.yaml", "--stages", "policy"])


def test_convert_then_predict(tmp_path: Path, capsys: Capture) -> None:
    """With the real library."""
    source, target = tiny_model(tmp_path / "source"), tmp_path / "target"
    changes = ["--keep-layers", "0,3", "--max-positions", "32", "--labels", "good,bad"]
    for overwrite in ([], ["--overwrite"]):
        assert main(["convert", "--input", str(source), "--output", str(target), *changes, *overwrite]) == 0
        out = capsys.readouterr().out
        assert out == f"{target}: bert, 2 layers of width 16, 32 positions, 2 labels\n"

    assert main(["predict", "--model", str(target), "the film was good .", ""]) == 0
    full, empty = lines_of(capsys.readouterr().out)
    assert (full["num_tokens"], empty["num_tokens"], full["truncated"]) == (7, 2, False)
    assert full["label"] == max(full["scores"], key=full["scores"].__getitem__)
    assert set(full["scores"]) == {"good", "bad"}
    assert sum(full["scores"].values()) == pytest.approx(1)
    assert len(full["kept"]) == 1  # a model of two layers has one point of reduction
    assert full["kept"][0][0] == 0


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


Predict = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def predict(fake: Fake, capsys: Capture) -> Predict:
    """Runs `trbert predict`; returns the lines it prints."""
    FakeModel.asked = []
    fake("inference.predictor", TRBert=FakeModel)

    def run(*arguments: str, code: int = 0) -> list[dict[str, Any]]:
        assert main(["predict", "--model", "m", *arguments]) == code
        out = capsys.readouterr().out
        return lines_of(out) if out else []

    return run


def type_in(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


TRICKY = "gr\u00fcn \u2028 und \u0085 rot \x0c oder \x1c blau"


def test_predict_texts_from_arguments(predict: Predict, caplog: pytest.LogCaptureFixture) -> None:
    expected = {"label": "gut", "label_id": 1, "scores": {"bad": 0.25, "gut": 0.75}, "truncated": False}
    three = {"kept": [[0, 1, 2], [0]], "num_tokens": 3}
    five = {"kept": [[0, 1, 2, 3, 4], [0]], "num_tokens": 5}
    options = ["--batch-size", "1", "--backend", "masked", "--threshold", "0.4"]
    assert predict("one", *options, "three") == [{**expected, **three}, {**expected, **five}]
    assert FakeModel.asked == [
        {"batch_size": 1, "threshold": 0.4, "rule": None, "backend": "masked", "operating_point": None}
    ]
    assert caplog.messages == []
    assert [line["truncated"] for line in predict("short", "x" * 100, "y" * 200)] == [False, True, True]
    assert caplog.messages == ["2 of 3 texts are longer than 99 tokens and were cut"]


@pytest.mark.parametrize("arguments", [["--", "-x", "y"], ["y", "--batch-size", "2", "--", "-x"]])
def test_predict_text_with_a_dash(arguments: list[str], predict: Predict) -> None:
    assert sorted(line["text"] for line in predict("--with-text", *arguments)) == ["-x", "y"]


def test_predict_lines_end_at_newlines_only(
    predict: Predict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "texts.txt"
    for final in ("", "\n"):
        source.write_bytes(f"{TRICKY}\n\nsecond{final}".encode())
        type_in(monkeypatch, source.read_bytes())
        for place in (["--file", str(source)], []):  # else standard input
            assert [line["text"] for line in predict("--with-text", *place)] == [TRICKY, "", "second"]


def test_predict_jsonl_to_a_file(predict: Predict, tmp_path: Path) -> None:
    source, target = tmp_path / "texts.jsonl", tmp_path / "out" / "predictions.jsonl"
    records = [{"text": TRICKY, "label": 0}, {"text": "two\nlines"}]
    content = "\n\n \n".join(json.dumps(r, ensure_ascii=False) for r in records)
    source.write_text(content, encoding="utf-8", newline="")
    assert predict("--file", str(source), "--output", str(target), "--with-text") == []
    assert [line["text"] for line in lines_of(target.read_text(encoding="utf-8"))] == [TRICKY, "two\nlines"]
    assert os.listdir(target.parent) == ["predictions.jsonl"]


TWO = [{"id": "a", "text": "one", "label": "x"}, {"id": "b", "text": "two\nlines", "label": "y"}]
TWO_LINES = "".join(json.dumps(record) + "\n" for record in TWO)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'id,text\na,one\nb,"two\nlines"\n'),
        ("T.TSV", 'id\tTEXT\na\tone\nb\t"two\nlines"\n'),
        ("T.JSONL", TWO_LINES),
        ("t.ndjson", TWO_LINES),
        ("t.json", TWO_LINES),
        ("u.json", json.dumps(TWO)),
        ("-jsonl", TWO_LINES),
        ("-csv", 'id,text\na,one\nb,"two\nlines"\n'),
    ],
)
def test_predict_reads_each_format_and_keeps_ids(
    name: str,
    content: str,
    predict: Predict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    type_in(monkeypatch, content.encode())
    place = ["--file", "-", "--format", name[1:]] if name[0] == "-" else ["--file", str(tmp_path / name)]
    found = [(line["id"], line["text"], line["label"]) for line in predict("--with-text", *place)]
    assert found == [("a", "one", "gut"), ("b", "two\nlines", "gut")]


@pytest.mark.parametrize("name", ["t.xlsx", "t.md", "plain", "t.parquet", "t.csv", "lines.txt", "-"])
def test_predict_reads_no_file_as_what_it_is_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake: Fake, capsys: Capture
) -> None:
    fake("inference.predictor", TRBert=FakeModel)
    monkeypatch.chdir(tmp_path)
    Path("x").joinpath(name).parent.mkdir()
    Path(name).write_text(TWO_LINES, encoding="utf-8")
    type_in(monkeypatch, TWO_LINES.encode())
    assert main(["predict", "--model", "m", "--file", name, "--output", "x/o.jsonl"]) == 2
    assert capsys.readouterr().err.startswith(f"trbert: error: {'standard input' if name == '-' else name}:")
    assert os.listdir("x") == []


def test_predict_writes_a_table_that_can_be_read_again(predict: Predict, tmp_path: Path) -> None:
    source, table, again = tmp_path / "t.jsonl", tmp_path / "p.csv", tmp_path / "q.tsv"
    source.write_text(TWO_LINES, encoding="utf-8")
    assert predict("--file", str(source), "--output", str(table), "--with-text") == []
    assert table.read_text(encoding="utf-8") == (
        "id,text,label,label_id,score_bad,score_gut,kept,num_tokens,truncated\n"
        'a,one,gut,1,0.25,0.75,"[[0, 1, 2], [0]]",3,False\n'
        'b,"two\nlines",gut,1,0.25,0.75,"[[0, 1, 2, 3, 4, 5, 6, 7, 8], [0]]",9,False\n'
    )
    predict("--file", str(table), "--output", str(again), "--with-text")
    rows = [
        [*csv.reader(io.StringIO(path.read_text()), delimiter=x)] for path, x in ((table, ","), (again, "\t"))
    ]
    assert rows[0] == rows[1]
    assert predict("one", "--output", str(tmp_path / "p.parquet"), code=2) == []


def test_predict_skips_bad_records_or_keeps_those_before(
    predict: Predict, tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = tmp_path / "t.jsonl", tmp_path / "o.jsonl"
    source.write_text(TWO_LINES + '{"text": null}\n' + TWO_LINES, encoding="utf-8")
    assert predict("--file", str(source), "--output", str(target), code=2) == []
    assert [line["id"] for line in lines_of(target.read_text())] == ["a", "b"]
    assert len(predict("--file", str(source), "--skip-bad-records")) == 4
    assert "1 of 5 records skipped" in caplog.text
    source.write_text('{"text": null}\n', encoding="utf-8")
    assert predict("--file", str(source), "--skip-bad-records", code=2) == []


def test_predict_answers_a_pipe_before_it_ends(tmp_path: Path) -> None:
    """With the real library."""
    code = (
        "import sys; sys.path[:0] = ['tests']; import pathlib, tiny_models; from trbert_jax.cli import main\n"
        "model = tiny_models.tiny_model(pathlib.Path(sys.argv[1]))\n"
        "sys.exit(main(['predict', '--model', str(model), '--with-text', '--file', '-']))\n"
    )
    command, pipe = [sys.executable, "-c", code, str(tmp_path / "model")], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin
        assert process.stdout
        for texts in (["the film"], ["a plot", "bad"]):
            process.stdin.write("".join(f"{text}\n" for text in texts).encode())
            process.stdin.flush()
            assert [json.loads(process.stdout.readline())["text"] for _ in texts] == texts
        process.stdin.write(b"the end")
        process.stdin.close()
        assert json.loads(process.stdout.readline())["text"] == "the end"
        assert process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    ("content", "place", "kept"), [(b"", "standard input: ", 0), (b"ok\ncaf\xe9", "standard input:2: ", 1)]
)
def test_predict_refuses_bad_standard_input(
    content: bytes,
    place: str,
    kept: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake: Fake,
    capsys: Capture,
) -> None:
    fake("inference.predictor", TRBert=FakeModel)
    type_in(monkeypatch, content)
    assert main(["predict", "--model", "m", "--output", str(tmp_path / "out.jsonl")]) == 2
    assert capsys.readouterr().err.startswith(f"trbert: error: {place}")
    # Predictions made before the mistake are not lost.
    assert [len(lines_of(path.read_text())) for path in tmp_path.iterdir()] == [kept] * bool(kept)


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_missing_device_is_one_line(tmp_path: Path, platform: str) -> None:
    tiny_runs.write_dataset(tmp_path / "data")
    model, config = str(tiny_model(tmp_path / "model")), str(tiny_runs.write_config(tmp_path))
    data = str(tmp_path / "data/test.jsonl")
    commands = [
        ["predict", "--model", model, "a film"],
        ["evaluate", "--model", model, "--data", data],
        ["compile", "--model", model],
        ["train", "--config", config],
        ["prepare-data", "--config", config, "--output", str(tmp_path / "prepared")],
    ]
    code = "import sys; from trbert_jax.cli import main; print([main(c) for c in eval(sys.argv[1])])"
    run = subprocess.run(
        [sys.executable, "-c", code, repr(commands)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": platform},
    )
    assert json.loads(run.stdout) == [2] * len(commands)
    errors = [line for line in run.stderr.splitlines() if "error" in line]
    assert len(errors) == len(commands)
    assert all(f"no device of JAX_PLATFORMS={platform}" in line for line in errors)
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "prepared").exists()


def test_closed_pipe(tmp_path: Path) -> None:
    """The reader takes one line of very many; the writer ends without a traceback."""
    (tmp_path / "texts.txt").write_text("some text that is not short\n" * 20_000, encoding="utf-8")
    arguments = ["predict", "--model", "m", "--batch-size", "1", "--file", str(tmp_path / "texts.txt")]
    command, pipe = [sys.executable, "tests/fake_trbert.py", *arguments], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert json.loads(process.stdout.readline())["label"] == "gut"
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 141
    assert errors == ""


def test_messages_as_json(tmp_path: Path) -> None:
    """Each line on standard error is an object, from the first message to the error."""
    folder = tiny_model(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("good\n" + "very " * 90)
    options = ["predict", "--model", str(folder), "--log-format", "json", "--file"]
    for file, code, level, said in (
        ("texts.txt", 0, "warning", "1 of 2"),
        ("none.txt", 2, "error", "none.txt"),
    ):
        command = [sys.executable, "-m", "trbert_jax", *options, str(tmp_path / file)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code
        events = [json.loads(line) for line in done.stderr.splitlines()]
        assert [event["level"] for event in events] == [level]
        assert said in events[0]["event"]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion(shell: str, capsys: Capture) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "--operating-point" in script


def test_bash_completes(tmp_path: Path) -> None:
    script = f'eval "$({sys.executable} -m trbert_jax completion bash)"; '
    for words, found in (("trbert pred", "predict"), ("trbert evaluate --thr", "--threshold")):
        line = f"COMP_WORDS=({words}); COMP_CWORD={words.count(' ')}; _shtab_trbert; echo ${{COMPREPLY[@]}}"
        assert subprocess.check_output(["bash", "-c", script + line], text=True).split() == [found]


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for words in (f"{'jax':<18} {metadata.version('jax')}", "1 cpu; ", "trbert serve: ready", "programs "):
        assert words in out
    extras = set(metadata.metadata("trbert-jax").get_all("Provides-Extra") or ())
    assert {*FEATURES} == extras - {"test", "tpu", "cuda"}
    known = metadata.version

    def without(name: str) -> str:
        if name in ("optax", "uvicorn", "chex"):
            raise metadata.PackageNotFoundError(name)
        return known(name)

    monkeypatch.setattr(metadata, "version", without)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "optax              MISSING" in out
    assert "MISSING: chex; run: pip install trbert-jax" in out
    assert "trbert serve: missing uvicorn: pip install 'trbert-jax[serve]'" in out

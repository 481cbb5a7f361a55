"""The command line: what it accepts, what it prints, how it ends. Fakes play the library."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_model import FakeModel, lines_of
from tiny_models import tiny_model

from trbert_jax import __version__, config
from trbert_jax.cli import main
from trbert_jax.errors import PreemptedError, UserError

COMMANDS = (
    "train",
    "evaluate",
    "predict",
    "compile",
    "benchmark",
    "convert",
    "prepare-data",
    "split-hyperpartisan",
)


# Arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_explains_itself(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "xample" in out
    assert f"  trbert {' '.join(command)}" in out
    if not command:
        assert all(name in out for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trbert {__version__}\n"


TRAIN, EVALUATE = "train --config c", "evaluate --model m --data d"
JOIN = f"{TRAIN} --coordinator a:1 --num-processes 2 --process-id"


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("", "COMMAND"),
        ("fly", "'fly'"),
        ("train", "--config"),
        (f"{TRAIN} --fast", "--fast"),
        ("train --conf c.yaml", "--config"),
        (f"{TRAIN} --stages a,,b", "--stages"),
        (f"{TRAIN} --coordinator a:1", "--num-processes"),
        (f"{TRAIN} --process-id 0 --num-processes 2", "--coordinator"),
        (f"{JOIN} 1 --distributed", "--distributed"),
        (f"{JOIN} 2", "--process-id 2"),
        (f"{TRAIN} --profile-steps 5:3", "FIRST:END"),
        (f"{TRAIN} --devices 2", "--dry-run"),
        ("evaluate", "--model and --data"),
        ("evaluate --model m", "--model and --data"),
        (f"{EVALUATE} seed=1", "--all-checkpoints"),
        ("evaluate --all-checkpoints", "--config"),
        ("evaluate --all-checkpoints --config c --data d", "--config"),
        ("evaluate --all-checkpoints --config c --threshold 0.4", "--config"),
        (f"{EVALUATE} --batch-size 0", "--batch-size"),
        (f"{EVALUATE} --rule warp", "'warp'"),
        (f"{EVALUATE} --execution masked", "--rule and --backend"),
        (f"{EVALUATE} --threshold 1", "--threshold"),
        (f"{EVALUATE} --rule dense --baselines", "--rule dense"),
        ("predict --model m --threshold half a", "--threshold"),
        ("predict text", "--model"),
        ("predict --model m --batch-size many", "--batch-size"),
        ("benchmark --data d", "--random"),
        ("benchmark --data d --model m --random minilm", "--random"),
        ("benchmark --data d --model m --batch-sizes 1,0", "--batch-sizes"),
        ("benchmark --data d --model m --executions packed", "--variants"),
        ("benchmark --data d --model m --dtype float16", "'float16'"),
        ("convert --input a --output b --keep-layers 0,x", "--keep-layers"),
        ("convert --input a --output b stray", "stray"),
        ("split-hyperpartisan --input a", "--output"),
    ],
)
def test_wrong_arguments(command: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("trbert: error: ")
    assert named in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "c.yaml", "a.b=1", "c=2", "--stages", "score, policy"],
        ["--config", "c.yaml", "a.b=1", "--stages", "score,policy", "c=2"],
        ["a.b=1", "--stages", "score,policy", "c=2", "--config", "c.yaml"],
    ],
)
def test_train_takes_overrides_anywhere(arguments: list[str], fake: Callable[..., None]) -> None:
    calls: list[Any] = []
    fake("config", load_config=lambda path, overrides: (path, overrides))

    def train(config: Any, stages: Any, profile_steps: Any) -> None:
        calls.append((config, stages, profile_steps))

    fake("training.run", train=train, results_table=lambda *arguments: [])
    assert main(["train", "--profile-steps", "3:5", *arguments]) == 0
    assert calls == [((Path("c.yaml"), ["a.b=1", "c=2"]), ["score", "policy"], (3, 5))]


# How a command ends -------------------------------------------------------------------------------


def end_training(fake: Callable[..., None], error: BaseException) -> int:
    def train(config: Any, stages: Any, profile_steps: Any) -> None:
        raise error

    fake("config", load_config=lambda path, overrides: None)
    fake("training.run", train=train, results_table=lambda *arguments: [])
    return main(["train", "--config", "c.yaml"])


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("c.yaml: seed: expected a number"), 2, "error: c.yaml: seed: expected a number"),
        (KeyboardInterrupt(), 130, "run the same command again"),
        (PreemptedError("policy: told to stop; saved at step 3 of 9"), 143, "step 3 of 9; run the same"),
    ],
)
def test_training_ends_with_one_line(
    error: BaseException,
    code: int,
    words: str,
    fake: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert end_training(fake, error) == code
    err = capsys.readouterr().err
    assert err.startswith("trbert: ")
    assert words in err
    assert err.count("\n") == 1


def test_other_errors_show_a_traceback(fake: Callable[..., None]) -> None:
    with pytest.raises(ZeroDivisionError):
        end_training(fake, ZeroDivisionError())


def test_closed_pipe(tmp_path: Path) -> None:
    # The reader takes one line of very many; the writer ends without a traceback.
    code = (
        "import sys, types; sys.path[:0] = ['tests']\n"
        "import test_cli; from trbert_jax.cli import main\n"
        "module = types.ModuleType('trbert_jax.inference.predictor'); module.TRBert = test_cli.FakeModel\n"
        "sys.modules[module.__name__] = module\n"
        "sys.exit(main(['predict', '--model', 'm', '--batch-size', '1']))\n"
    )
    root = Path(__file__).parent.parent
    (tmp_path / "texts.txt").write_text("some text that is not short\n" * 20_000, encoding="utf-8")
    with (
        (tmp_path / "texts.txt").open("rb") as texts,
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=root,
            stdin=texts,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stdout
        assert process.stderr
        assert json.loads(process.stdout.readline())["label"] == "gut"
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 141
    assert errors == ""


def test_messages_go_to_stderr_once(fake: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def train(config: Any, stages: Any, profile_steps: Any) -> None:
        for level, message in ((logging.DEBUG, "detail"), (logging.INFO, "step 1"), (logging.INFO, "step 1")):
            logging.getLogger("trbert_jax.training.loop").log(level, message)

    fake("config", load_config=lambda path, overrides: None)
    fake("training.run", train=train, results_table=lambda *arguments: ["accuracy 1"])
    for _ in range(2):  # each run says it again
        assert main(["train", "--config", "c.yaml"]) == 0
        assert capsys.readouterr() == ("accuracy 1\n", "step 1\n")


# evaluate -----------------------------------------------------------------------------------------


RESULT = {"accuracy": 0.868, "flops": 1234567890.0, "kept": [99.25, 47.0], "dense": {"examples": 1000}}


def test_evaluate_prints_a_table_and_writes_json(
    fake: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []

    def evaluate_file(model: str, data: Path, **options: Any) -> dict[str, Any]:
        calls.append((model, data, options))
        return RESULT

    fake("inference.evaluate", evaluate_file=evaluate_file)
    target = tmp_path / "new" / "result.json"
    arguments = "--model m --data d.jsonl --batch-size 4 --baselines --threshold 0.4 --rule batch_max"
    outputs = ["--json", str(target), "--predictions", "p.jsonl"]
    assert main(["evaluate", *arguments.split(), *outputs]) == 0
    options = {
        "batch_size": 4,
        "rule": "batch_max",
        "backend": "packed",
        "threshold": 0.4,
        "predictions": Path("p.jsonl"),
        "baselines": ("random", "first_k"),
        "skip_bad_records": False,
    }
    assert calls == [("m", Path("d.jsonl"), options)]
    assert json.loads(target.read_text(encoding="utf-8")) == RESULT
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["accuracy", "0.868"],
        ["flops", "1.235e+09"],
        ["kept", "99.25, 47"],
        ["dense.examples", "1000"],
    ]


def test_evaluate_all_checkpoints(
    fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config, "load_config", lambda path, overrides: [path, *overrides])
    fake("training.evaluation", evaluate_all_checkpoints=lambda config: {str(config[0]): config[1:]})
    assert main(["evaluate", "--config", "c.yaml", "--all-checkpoints", "seed=1"]) == 0
    assert capsys.readouterr().out.split() == ["c.yaml", "seed=1"]


# compile ------------------------------------------------------------------------------------------


def test_compile_prints_times_and_folder(
    predictor: type[FakeModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert main(["compile", "--model", "m", "--batch-size", "5", "--rule", "dense"]) == 0
    lines = ["dense, packed, 5 x 8 tokens  1.5 s", f"{tmp_path}: programs ready, 1.5 s"]
    assert capsys.readouterr().out.splitlines() == lines


def test_compile_needs_a_folder(
    predictor: type[FakeModel], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert main(["compile", "--model", "m"]) == 2
    assert "JAX_COMPILATION_CACHE_DIR" in capsys.readouterr().err


# With the real library ----------------------------------------------------------------------------


def test_convert_then_predict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tiny_model(tmp_path / "source"), tmp_path / "target"
    changes = ["--keep-layers", "0,3", "--max-positions", "32", "--labels", "good,bad"]
    assert main(["convert", "--input", str(source), "--output", str(target), *changes]) == 0
    out = capsys.readouterr().out
    assert out == f"{target}: bert, 2 layers of width 16, 32 positions, 2 labels\n"
    assert main(["convert", "--input", str(source), "--output", str(target), *changes, "--overwrite"]) == 0
    capsys.readouterr()

    assert main(["predict", "--model", str(target), "the film was good .", ""]) == 0
    full, empty = lines_of(capsys.readouterr().out)
    assert (full["num_tokens"], empty["num_tokens"], full["truncated"]) == (7, 2, False)
    assert full["label"] == max(full["scores"], key=full["scores"].__getitem__)
    assert set(full["scores"]) == {"good", "bad"}
    assert sum(full["scores"].values()) == pytest.approx(1)
    assert len(full["kept"]) == 1  # a model of two layers has one point of reduction
    assert full["kept"][0][0] == 0


# Speed --------------------------------------------------------------------------------------------


def test_help_answers_at_once() -> None:
    code = "import sys; from trbert_jax.cli import main; sys.exit(main(['--help']))"

    def seconds() -> float:
        start = time.perf_counter()
        shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
        assert shown.stdout.startswith("usage: trbert")
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.5


def test_as_a_module() -> None:
    """`python -m trbert_jax` is the same command, by the same name."""
    shown = subprocess.run(
        [sys.executable, "-m", "trbert_jax", "train", "--help"], check=True, capture_output=True, text=True
    )
    assert shown.stdout.startswith("usage: trbert train")
    wrong = subprocess.run([sys.executable, "-m", "trbert_jax", "fly"], check=False, capture_output=True)
    assert wrong.returncode == 2

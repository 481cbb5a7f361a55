"""Mistakes of users: each ends in one clear line and code 2, and nothing is half written.

Paths are relative to a folder that holds config.yaml, data/, model/ and, once a run has begun, work/.
"""

import builtins
import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from tiny_models import BERT, edit_json, edit_weights, tiny_model

from trbert_jax.cli import main
from trbert_jax.training import loop

TEXTS = ["the film was good .", "a dull plot !", "it is very bright and good", "I saw a bad film yesterday"]
RECORDS = [{"text": text, "label": label} for text, label in zip(TEXTS, (1, 0, 1, 0), strict=True)]
LINE = json.dumps(RECORDS[0]) + "\n"
SIZES = {"train": 8, "dev": 2, "test": 3}
WEIGHTS = "model/model.safetensors"
CONFIG = """\
workdir: work
data: {name: imdb, path: data}
model:
  init: model
  max_length: 16
  keep_layers: [0, 1]
finetune:
  {batch_size: 4, accumulation_steps: 1, epochs: 2, save_steps: 1, keep_checkpoints: 9, dropout: false}
"""
TRAIN = "train --config config.yaml"
FINETUNE = f"{TRAIN} --stages finetune"
CHECKPOINTS = "evaluate --config config.yaml --all-checkpoints"
OUT = "--json out/result.json --predictions out/lines.jsonl"
EVALUATE = f"evaluate --model model --data data/test.jsonl {OUT}"
PREDICT = "predict --model model --output out/lines.jsonl good"
TIMES = "benchmark --model model --data data/test.jsonl --batch-sizes 1 --variants packed"
BENCHMARK = f"{TIMES} --json out/speed.json --plot out/speed.png"
CONVERT = "convert --input model --output out/model"
STEP_2 = "work/finetune/checkpoints/step_00000002"
Spoil = Callable[[], Any]  # makes a mistake in the current folder


def write(path: str, content: str | bytes) -> Spoil:
    def spoil() -> None:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def change(path: str, to: Callable[[bytes], bytes]) -> Spoil:
    return lambda: Path(path).write_bytes(to(Path(path).read_bytes()))


def append(path: str, content: str) -> Spoil:
    return change(path, lambda old: old + content.encode())


def cut(path: str, share: float) -> Spoil:
    """Leaves the first part of a file, as a full disk or a broken download does."""
    return change(path, lambda old: old[: int(share * len(old))])


def corrupt(path: str, start: int, stop: int) -> Spoil:
    return change(path, lambda old: old[:start] + b"\xff" * (stop - start) + old[stop:])


def set_config(**values: Any) -> Spoil:
    return lambda: edit_json(Path("model/config.json"), **values)


def overflow() -> None:
    """The classifier's weights become a finite number with which its logits overflow."""
    edit_weights(Path("model"), lambda weights: weights["classifier.weight"].fill(3e38))


def of_transformers(task: str = "classification", num_labels: int = 2, **settings: Any) -> Spoil:
    """The model becomes one that this project has not saved."""

    def spoil() -> None:
        tiny_model(Path("model"), dataclasses.replace(BERT, task=task, labels=tuple("abcde"[:num_labels])))
        edit_json(Path("model/config.json"), remove=("trbert",), **settings)

    return spoil


def headless() -> None:
    kept = ("bert.encoder", "bert.embeddings", "bert.pooler")
    edit_weights(Path("model"), lambda weights: {k: v for k, v in weights.items() if k.startswith(kept)})


def make_other(**changes: Any) -> Spoil:
    return lambda: tiny_model(Path("other"), dataclasses.replace(BERT, **changes))


def scores(content: bytes | None) -> Spoil:
    """Scores that are damaged, or, for None, of other data."""

    def spoil() -> None:
        write("work/score/done.json", '{"data_digest": "another"}')()
        np.save("work/score/scores.npy", np.zeros((SIZES["train"], 2, 16), np.float32))
        if content is not None:
            Path("work/score/scores.npy").write_bytes(content)

    return spoil


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    command: str  # after `trbert`
    named: tuple[str, ...]  # what the message has to name: file and line, key, option, advice
    spoil: Spoil = lambda: None
    start: str = "fresh"  # the folder before it: fresh, interrupted (in update 3 of 4) or finetuned
    made_by: str | None = None  # the fixture that has run the command already
    code: int = 2  # of the exit; if it is another, `named` may be in either stream
    # New files, which do no harm.
    leaves: str = r"work/\.lock|work/config\.json|work/\w+/made_from\.json|work/cache/features-\w+\.npz"
    denied: str | None = None  # what the system lets the command neither read nor write


# One case per line or two.
# fmt: off
CONFIG_CASES = [
    Case("unknown key", FINETUNE, ("config.yaml:9: policy.alpah: ", "policy.alpha?"),
        append("config.yaml", "policy: {alpah: 2}\n"), leaves=""),
    Case("missing config", FINETUNE, ("config.yaml: ",), Path("config.yaml").unlink, leaves=""),
    Case("unknown stage", f"{TRAIN} --stages finetune,polish", ("--stages", "'polish'", "finetune, score")),
    Case("stage that is not configured", f"{TRAIN} --stages init stages=[finetune,score]", ("stage init",)),
    Case("shares for two points of reduction, of which two layers have one", f"{TRAIN} init.keep=[0.9,0.3]",
        ("init.keep",)),
]

# Contents of a data file, and what is named after the file.
BAD_DATA: dict[str, tuple[str | bytes, str]] = {
    "empty file": ("", ": "),
    "malformed line": (LINE + '{"text": "a"\n' + LINE, ":2: "),
    "malformed line after odd line ends": ('{"text": "good\u2028and\u0085bad", "label": 1}\n' * 2 + "x\n",
        ":3: "),
    "label out of range": (LINE + '{"text": "a", "label": 2}\n', ":2: "),
    "missing field": (LINE + '{"text": "a"}\n', ":2: "),
    "unreadable encoding": (LINE.encode() + '{"text": "caf\u00e9", "label": 1}\n'.encode("latin-1"), ":2: "),
    "empty text": (LINE + '{"text": "", "label": 1}\n', ":2: "),
    "text without tokens": (LINE + '{"text": "\u200b", "label": 1}\n' + LINE * 8, ":2: "),
}
DATA_CASES = [
    # A text without tokens is found after reading, and is called as in predictions.jsonl.
    Case(f"{name}, {command.split()[0]}", command, (file + place,), write(f"data/{file}", content))
    for name, (content, place) in BAD_DATA.items()
    for command, file in ((FINETUNE, "train.jsonl"), (EVALUATE, "test.jsonl"))
] + [
    Case("missing data, train", FINETUNE, ("data: ", "train.jsonl"), Path("data/train.jsonl").unlink),
    Case("missing data, evaluate", EVALUATE, ("data/test.jsonl: ",), Path("data/test.jsonl").unlink),
    Case("missing test set", TRAIN, ("data: ", "test.jsonl"), Path("data/test.jsonl").unlink, leaves=""),
    Case("missing data folder", f"{FINETUNE} data.path=dada", ("data.path: dada: ", "train.jsonl")),
    Case("other kind of data", EVALUATE.replace("test.jsonl", "test.txt"),
        ("data/test.txt", ".jsonl", ".csv")),
    Case("line ends of other kinds are part of a text", EVALUATE, ("examples                          2\n",),
        write("data/test.jsonl", '{"text": "good\u2028film\u0085bad", "label": 1}\n' * 2), code=0,
        leaves=r"out/(result\.json|lines\.jsonl)"),
    Case("a long text is cut, counted and reported", EVALUATE,
        ("1 of 4 texts", "18 tokens", "examples                          4\n"),
        append("data/test.jsonl", json.dumps({"text": "very " * 5000, "label": 1})), code=0,
        leaves=r"out/(result\.json|lines\.jsonl)"),
]

# How a model's folder is spoiled, and what is named.
BAD_MODELS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "other shapes": (set_config(intermediate_size=32),
        ("layer.3.intermediate.dense.weight", "[24, 16]", "[32, 16]")),
    "fewer layers": (set_config(num_hidden_layers=5),
        ("layer.4.attention.self.query.weight [16, 16]: missing", "... and 6 more")),
    "truncated weights": (cut(WEIGHTS, 0.5), (f"{WEIGHTS}: ",)),
    "truncated header": (cut(WEIGHTS, 0.01), (f"{WEIGHTS}: ",)),
    "no bytes": (cut(WEIGHTS, 0), (f"{WEIGHTS}: ",)),
    "corrupt weights": (corrupt(WEIGHTS, 8, 40), (f"{WEIGHTS}: ",)),
    "corrupt length": (corrupt(WEIGHTS, 0, 8), (f"{WEIGHTS}: ",)),
    "corrupt values": (corrupt(WEIGHTS, -400, -1), ("finite",)),
    "unfinished, no config": (Path("model/config.json").unlink, ("model: ", "config.json")),
    "unfinished, no weights": (Path(WEIGHTS).unlink, ("model: ", "model.safetensors")),
    "no folder": (lambda: shutil.rmtree("model"), ("model: ",)),
}
MODEL_CASES = [
    Case(f"{name}, {command.split()[0]}", command, named, spoil)
    for name, (spoil, named) in BAD_MODELS.items()
    for command in (EVALUATE, PREDICT, BENCHMARK, CONVERT)
] + [
    Case("logits that overflow, evaluate", EVALUATE, ("finite",), overflow),
    Case("logits that overflow, predict", PREDICT, ("finite",), overflow),
    Case("half a character in a file", PREDICT.replace("good", "--file data/half.jsonl --batch-size 1"),
        ("data/half.jsonl:40: ", "39 predictions"),  # which are kept
        write("data/half.jsonl", LINE * 39 + '{"text": "a \\ud800"}\n'), leaves=r"out/lines\.jsonl"),
]

# A head that does not do what the command asks: how it gets there, and what is named.
TAGS = "BertForTokenClassification"
MISFITS: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "multiple choice": (of_transformers("multiple_choice"), ("model: ", "multiple_choice", "trbert.inputs")),
    "token classification": (of_transformers(num_labels=5, architectures=[TAGS]), ("model: ", TAGS)),
    "several labels": (of_transformers(num_labels=3, problem_type="multi_label_classification"),
        ("model: ", "multi_label_classification")),
    "no head": (headless, ("model: ", "no classifier", "model.init")),
    "inputs of another head": (lambda: (of_transformers("multiple_choice")(),
        set_config(trbert={"inputs": {"data": "race"}})()),
        ("trbert.inputs", "'race'", "multiple_choice")),
}
MISFIT_CASES = [
    Case(f"{name}, {command.split()[0]}", command, named, spoil)
    for name, (spoil, named) in MISFITS.items() for command in (EVALUATE, PREDICT)
] + [
    Case("questions, evaluate", EVALUATE, ("data/test.jsonl", "data"), of_transformers("span")),
    Case("questions, predict", PREDICT, ("argument 1", "answers questions"), of_transformers("span")),
    Case("a score has no accuracy", EVALUATE, ("model: ", "score", "`trbert predict`"),
        of_transformers(num_labels=1)),
]

OTHER = ("work: ", "seed: 42 -> 7")
RUN_CASES = [
    Case("work directory of another config", f"{FINETUNE} finetune.learning_rate=0.01 seed=7",
        (*OTHER, "finetune.learning_rate: 3e-05 -> 0.01", "`workdir`"), start="interrupted", leaves=""),
    Case("checkpoints of another config", f"{CHECKPOINTS} seed=7 {OUT[:22]}", OTHER, start="interrupted",
        leaves=""),
    Case("no checkpoints", CHECKPOINTS, ("work: ", "`trbert train`"), leaves=""),
    Case("prepared data that is missing", f"{FINETUNE} data.prepared=nowhere",
        ("data.prepared: nowhere", "`trbert prepare-data --output nowhere`"), leaves=""),
    Case("prepared data that is unfinished", f"{FINETUNE} data.prepared=shards",
        ("data.prepared: shards", "`trbert prepare-data`"), write("shards/provenance.json", '{"format": 1}'),
        leaves=""),
    Case("missing inputs of a stage", f"{TRAIN} --stages policy",
        ("work/finetune/model", "`--stages finetune,policy`")),
    Case("missing inputs of evaluate", f"{TRAIN} --stages evaluate",
        ("work/policy/model", "`--stages policy,evaluate`"), start="finetuned",
        leaves="nothing"),
    Case("a stage that the config leaves out", f"{TRAIN} stages=[joint]", ("work/policy/model", "`stages`")),
    Case("damaged scores", f"{TRAIN} --stages policy", ("work/score/scores.npy: ", "delete work/score"),
        scores(b"\x93NUMPY\x01\x00v\x00{'descr'"), start="finetuned"),
    Case("scores of other data", f"{TRAIN} --stages policy", ("work/score/scores.npy: ", "delete work/score"),
        scores(None), start="finetuned"),
    Case("damaged model of an earlier stage", f"{TRAIN} --stages score",
        ("work/finetune: ", "`--stages finetune,score`"), cut("work/finetune/model/model.safetensors", 0.5),
        start="finetuned"),
    Case("damaged checkpoint", CHECKPOINTS, (f"{STEP_2}: ", "delete this folder"),
        Path(f"{STEP_2}/manifest.json").unlink, start="interrupted"),
    Case("changed data under a checkpoint", FINETUNE,
        ("finetune: stale (data train changed)", "work/finetune.old", "finetune: done"),
        append("data/train.jsonl", LINE), start="interrupted", code=0, leaves="work/.*"),
    Case("checkpoints without the training data", CHECKPOINTS, ("accuracy",), Path("data/train.jsonl").unlink,
        start="interrupted", code=0),
    Case("work directory as a model", PREDICT.replace("model model", "model work"),
        ("work: ", "work/finetune/model"), start="finetuned"),
    Case("stage as a model", EVALUATE.replace("model model", "model work/finetune"),
        ("work/finetune: ", "work/finetune/model"), start="finetuned"),
    Case("half-written checkpoint", FINETUNE, ("step 2 of 4", "finetune: done"), made_by="finetuned", code=0,
        leaves="work/.*"),
]

WRITE_CASES = [
    Case("Ctrl-C", FINETUNE, ("trbert: interrupted; run the same command again",), made_by="interrupted",
        code=130, leaves="work/.*"),
    Case("work directory is a file", f"{FINETUNE} workdir=config.yaml", ("config.yaml: ",)),
    Case("work directory is a model", f"{FINETUNE} workdir=model", ("model/config.json: ", "`workdir`"),
        leaves=""),
    Case("work directory around its own model", f"{FINETUNE} workdir=.", ("model: ", "would replace model")),
    Case("work directory with another model", f"{FINETUNE} workdir=other", ("other/model: ", "`workdir`"),
        lambda: shutil.copytree("model", "other/model"), leaves=r"other/\.lock"),
    Case("a name that is not UTF-8", EVALUATE.replace("test.jsonl", "caf\udce9.jsonl"), ("accuracy",),
        write("data/caf\udce9.jsonl", LINE), code=0, leaves=r"out/(result\.json|lines\.jsonl)"),
    Case("result below a file", EVALUATE.replace("out/result", "config.yaml/result"),
        ("config.yaml/result.json: ",)),
    Case("predictions into a folder", PREDICT.replace("out/lines.jsonl", "data"), ("data: ",)),
    Case("model in place of a file", CONVERT.replace("out/model", "config.yaml"), ("config.yaml: ",)),
    Case("model in place of other files", CONVERT.replace("out/model", "data"), ("data: ", "--output")),
    Case("model in place of other files, with --overwrite", CONVERT.replace("out/model", "data --overwrite"),
        ("data: ", "dev.jsonl, test.jsonl, train.jsonl")),
    Case("two outputs in one file", EVALUATE.replace("out/lines.jsonl", "out/../out/result.json"),
        ("out/../out/result.json: ",)),
]

# The same for root, to whom the system refuses nothing by itself, and for what is read.
CLOSED = Path("closed").mkdir
DENIED_CASES = [
    Case("denied work folder", f"{FINETUNE} workdir=closed/w", ("closed/w: ",), CLOSED, denied="closed"),
    Case("denied result", EVALUATE.replace("out/", "closed/"), ("closed/r",), CLOSED, denied="closed"),
    Case("denied model", CONVERT.replace("out/", "closed/"), ("closed/model: ",), CLOSED, denied="closed"),
    Case("denied config", FINETUNE, ("config.yaml: ",), denied="config.yaml", leaves=""),
    Case("denied data", EVALUATE, ("data/test.jsonl: ",), denied="data/test.jsonl"),
]

REPLAY = f"{BENCHMARK} --replay other"
RANDOM = BENCHMARK.replace("--model model", "--random")
BENCHMARK_CASES = [
    Case("malformed line, benchmark", BENCHMARK, ("data/test.jsonl:2: ",),
        write("data/test.jsonl", LINE + '{"text": "a"\n')),
    Case("text without tokens, benchmark", BENCHMARK, ("data/test.jsonl",),
        write("data/test.jsonl", LINE + '{"text": ""}\n')),
    Case("unknown variant", BENCHMARK.replace("packed", "packed,warp"),
        ("--variants: ", "'warp'", "packed, masked")),
    Case("batch larger than the file", BENCHMARK.replace("sizes 1", "sizes 1,4"),
        ("--batch-sizes: 4 ", "3 texts of data/test.jsonl")),
    Case("random weights without a tokenizer", RANDOM.replace("--random", "--random minilm"),
        ("--random ", "--replay")),
    Case("random weights of an unknown size", RANDOM.replace("--random", "--random large --replay model"),
        ("--random: ", "'large'", "bert-base, minilm")),
    Case("nothing to replay", f"{BENCHMARK} --replay models/other", ("models/other: ",)),
    Case("replay of another depth", REPLAY,
        ("--replay: ", "other has num_reductions 1, the model under test 2"), make_other(num_layers=2)),
    Case("replay of another length", REPLAY,
        ("--replay: ", "other has max_length 12, the model under test 18"), make_other(max_length=12)),
    Case("replay of other tokens", REPLAY, ("--replay: ", "other splits the texts into other tokens"),
        lambda: (make_other()(), change("other/tokenizer.json", lambda x: x.replace(b"film", b"seen"))())),
    Case("longer than the positions", f"{BENCHMARK} --max-length 99", ("max_length", "99", "20 positions")),
]
# fmt: on
CASES = [
    *CONFIG_CASES,
    *DATA_CASES,
    *MODEL_CASES,
    *MISFIT_CASES,
    *RUN_CASES,
    *WRITE_CASES,
    *DENIED_CASES,
    *BENCHMARK_CASES,
]


@contextlib.contextmanager
def denying(denied: Path) -> Iterator[None]:
    """Refuses a file or folder to anyone: to root the system refuses nothing by itself."""

    def is_denied(path: Any) -> bool:
        names_file = isinstance(path, str | os.PathLike)  # else the number of an open file
        return names_file and Path(os.path.abspath(path)).is_relative_to(denied)

    def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if is_denied(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return function(path, *arguments, **options)

        return call

    access = os.access
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda path, *mode: not is_denied(path) and access(path, *mode))
        for module, name in ((os, "mkdir"), (os, "open"), (io, "open"), (builtins, "open")):
            patch.setattr(module, name, refusing(getattr(module, name)))
        yield


class Outcome(NamedTuple):
    folder: Path
    code: int
    out: str
    err: str
    before: dict[str, bytes]  # the files around the command
    after: dict[str, bytes]


def run(folder: Path, command: str, denied: str | None = None) -> Outcome:
    before = files(folder)
    out, err = io.StringIO(), io.StringIO()
    refusals = denying(folder / denied) if denied else contextlib.nullcontext()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), refusals:
        code = main(shlex.split(command))
    return Outcome(folder, code, out.getvalue(), err.getvalue(), before, files(folder))


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    (folder / "data").mkdir()
    for split, size in SIZES.items():
        lines = "".join(json.dumps(RECORDS[i % 4]) + "\n" for i in range(size))
        (folder / "data" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    tiny_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def interrupted(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Ctrl-C in the third of four updates."""
    original = loop.update_batches

    def interrupting(training: loop.Training, step: int) -> Any:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return original(training, step)

    folder = shutil.copytree(fresh, tmp_path_factory.mktemp("runs") / "interrupted")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(loop, "update_batches", interrupting)
        return run(folder, FINETUNE)


@pytest.fixture(scope="module")
def finetuned(interrupted: Outcome, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The same command again, after it was also stopped while saving."""
    folder = shutil.copytree(interrupted.folder, tmp_path_factory.mktemp("runs") / "finetuned")
    checkpoints = folder / "work/finetune/checkpoints"
    half = checkpoints / "step_00000003.orbax-checkpoint-tmp-7"
    shutil.copytree(checkpoints / "step_00000002", half)
    (half / "manifest.json").unlink()
    return run(folder, FINETUNE)


@pytest.fixture
def outcome(request: pytest.FixtureRequest, case: Case, tmp_path: Path) -> Outcome:
    if case.made_by:
        return request.getfixturevalue(case.made_by)
    start = request.getfixturevalue(case.start)
    folder = shutil.copytree(start if isinstance(start, Path) else start.folder, tmp_path / "folder")
    with contextlib.chdir(folder):
        case.spoil()
    return run(folder, case.command, case.denied)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, outcome: Outcome) -> None:
    assert outcome.code == case.code
    assert "Traceback" not in outcome.out + outcome.err
    said = outcome.err.partition("trbert: error: ")[2] if case.code == 2 else outcome.out + outcome.err
    assert "trbert: error: " not in said
    for word in case.named:
        assert word in said

    new = sorted(outcome.after.keys() - outcome.before.keys())
    assert [name for name in new if not re.fullmatch(case.leaves, name)] == []
    assert [name for name in outcome.after if ".partial-" in name or "-tmp-" in name] == []
    if case.code != 0:
        assert {name: outcome.after.get(name) for name in outcome.before} == outcome.before
        assert [name for name in new if name.endswith(("done.json", "results.json"))] == []


def test_a_corrected_config_reuses_an_empty_work_directory(fresh: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fresh, tmp_path / "folder")
    command = "train --config config.yaml --stages policy"
    assert "which stage finetune makes" in run(folder, command).err
    again = run(folder, f"{command} seed=7")
    assert "another configuration" not in again.err
    assert "which stage finetune makes" in again.err


def test_resuming_repeats_no_saved_step(interrupted: Outcome, finetuned: Outcome) -> None:
    checkpoints = {name for name in interrupted.after if "/checkpoints/step_" in name}
    assert {name.split("/")[3] for name in checkpoints} == {"step_00000001", "step_00000002"}
    for name in checkpoints:
        assert finetuned.after[name] == interrupted.after[name]
    lines = finetuned.after["work/finetune/metrics.jsonl"].decode().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "learning_rate" in line]
    assert steps == [1, 4]
    assert json.loads(finetuned.after["work/finetune/done.json"])["steps"] == 4

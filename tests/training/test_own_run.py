"""Training on one's own texts without a YAML file."""

import csv
import dataclasses
import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import yaml

from trbert_jax import TRBert
from trbert_jax.cli import main
from trbert_jax.config import RunConfig, load_config, load_stored, to_dict
from trbert_jax.errors import UserError
from trbert_jax.tasks import Splits
from trbert_jax.training import own_run
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.own_run import choose_settings
from trbert_jax.training.stages import STAGES

TEAMS = {"billing": ("invoice", "refund"), "shipping": ("parcel", "courier")}
TEAMS["account"] = ("password", "login")
NOISE = "hello please can you help me with the thing from last week it did not work and i would like to know"


def write_tickets(path: Path, count: int, text: str = "text", label: str = "label") -> Path:
    """Texts whose label, the name of a team, hangs on two words among noise."""
    rng = random.Random(count)
    with path.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow([text, label])
        for i in range(count):
            team = [*TEAMS][i % len(TEAMS)]
            words = rng.choices(NOISE.split(), k=rng.randint(5, 25))
            for _ in range(2):
                words.insert(rng.randrange(len(words)), rng.choice(TEAMS[team]))
            rows.writerow([" ".join(words) + ", thanks", team])
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.tiny_model(tmp_path / "model")


def choose(
    data: Path | str, model: Path | str, *overrides: str, speedup: float | None = None, **given: Any
) -> RunConfig:
    return choose_settings(str(data), str(model), "runs/x", given, overrides, speedup)


def test_settings_follow_from_the_texts(tmp_path: Path, model: Path) -> None:
    data = write_tickets(tmp_path / "t.csv", 40, "message", "team")
    fields: Any = {"text_field": "message", "label_field": "team"}
    config = choose(data, model, "joint.jitter=2", "stages=[finetune,evaluate]", **fields)
    assert (config.data.name, config.data.train, config.data.path) == ("text", str(data), None)
    assert (config.data.text_field, config.data.label_field) == ("message", "team")
    assert (config.model.max_length, config.evaluate.split) == (tiny_models.BERT.max_positions, "dev")
    assert (config.joint.jitter, config.joint.temperature) == (2, 2)
    assert config.stages == ("finetune", "evaluate")
    assert (config.finetune.epochs, config.finetune.backend) == (20, "masked")
    assert config.joint.target_speedup == tiny_models.BERT.num_layers / 2
    assert choose(data, model, "model.keep_layers=[0,1]", **fields).joint.target_speedup == 1.5
    assert choose(data, "scratch", **fields, speedup=2.5).joint.target_speedup == 2.5
    # With a test set the results are those of it, unless it is without labels.
    assert choose(data, "scratch", **fields, test=str(data)).evaluate.split == "test"
    (tmp_path / "unknown.csv").write_text("message\na text\n")
    assert choose(data, "scratch", **fields, test=str(tmp_path / "unknown.csv")).evaluate.split == "dev"
    write_tickets(tmp_path / "train.csv", 30)
    write_tickets(tmp_path / "test.csv", 9)
    config = choose(tmp_path, "scratch")
    assert (config.data.path, config.evaluate.split) == (str(tmp_path), "test")
    assert config.model.scratch.hidden_size == 128
    assert config.model.max_length == 32  # 25 words, the keywords, a comma, thanks, the ends


def test_one_long_text_does_not_widen_all(tmp_path: Path) -> None:
    rows = [{"text": "a b c", "pair": "d e", "label": i % 2} for i in range(99)]
    file = tmp_path / "x.jsonl"
    for last, longest in (("a " * 5, 16), ("a " * 300, 16), ("a " * 9, 16)):
        lines = [*rows, {"text": last, "pair": last, "label": 0}]
        file.write_text("".join(json.dumps(row) + "\n" for row in lines))
        assert choose(file, "scratch", text_pair_field="pair").model.max_length == longest
    file.write_text("".join(json.dumps({"text": f"{i} " * 600, "label": i % 2}) + "\n" for i in range(9)))
    assert choose(file, "scratch").model.max_length == 512


def test_the_recipe_is_that_of_the_configs() -> None:
    plus = yaml.safe_load((Path(__file__).parents[2] / "configs/base/plus.yaml").read_text(encoding="utf-8"))
    assert {name: {**plus[name], **keys} for name, keys in own_run.RECIPE.items()} == {
        name: plus[name] for name in own_run.RECIPE
    }


@pytest.mark.parametrize(
    ("count", "max_length", "width", "batch", "epochs", "rate"),
    [
        (300, 64, 768, (8, 1), (5, 8), 5e-5),
        (300, 64, 128, (8, 1), (16, 10), 5e-4),
        (5_000, 512, 768, (8, 2), (2, 3), 5e-5),
        (100_000, 64, 384, (32, 1), (2, 2), 5e-5),
    ],
)
def test_training_by_size(
    count: int, max_length: int, width: int, batch: tuple[int, int], epochs: tuple[int, int], rate: float
) -> None:
    sections = own_run._training(count, count, max_length, width)
    trained = [sections[name] for name in ("finetune", "init", "joint")]
    assert {(s["batch_size"], s["accumulation_steps"]) for s in trained} == {batch}
    assert (sections["finetune"]["epochs"], sections["joint"]["epochs"]) == epochs
    assert sections["finetune"]["learning_rate"] == rate


def test_texts_without_labels(tmp_path: Path, model: Path) -> None:
    """They follow those with labels, so that the first examples of any number have one."""
    data, more = write_tickets(tmp_path / "t.csv", 40), tmp_path / "more.jsonl"
    lines = [{"text": f"text {i}", "label": "unknown"} for i in range(30)]
    more.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"text": " "}]))
    config = choose(data, model, unlabeled=str(more))
    splits, count = Splits(config), config.finetune.max_examples
    assert count is not None
    records = splits.records("train")
    assert [record.label >= 0 for record in records] == [True] * count + [False] * 30
    assert [record.text for record in records[count:]] == [line["text"] for line in lines]
    assert splits.records(splits.part(count)) == records[:count]
    parts = [
        {record.id for record in splits.records(splits.part(n))} for n in (count - 5, count + 4, count + 9)
    ]
    assert [len(part) for part in parts] == [count - 5, count + 4, count + 9]
    assert parts[0] < {record.id for record in records[:count]} < parts[1] < parts[2]
    assert splits.task.labels == tuple(sorted(TEAMS))
    with pytest.raises(UserError, match=r"finetune.max_examples: missing"):
        choose(data, model, f"data.unlabeled={more}")
    with pytest.raises(UserError, match=r"data.unlabeled: .*no such file"):
        choose(data, model, unlabeled="absent.csv")
    (tmp_path / "empty.csv").write_text("text\n")
    with pytest.raises(UserError, match=r"empty.csv: has no usable record; expected rows with a text, in"):
        choose(data, model, unlabeled=str(tmp_path / "empty.csv"))
    with pytest.raises(UserError, match=r"data.unlabeled: is for text only"):
        choose("hf:imdb", model, unlabeled=str(more))
    many = Experiment(
        dataclasses.replace(config, finetune=dataclasses.replace(config.finetune, max_examples=50))
    )
    with pytest.raises(UserError, match=f"finetune.max_examples: 50 is more than the {count} training texts"):
        STAGES["finetune"].examples(many, many.base_model())


def test_the_settings_used_are_written_and_run_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a model of two other classes; in a folder whose name YAML would read otherwise."""
    monkeypatch.chdir(tmp_path)
    data = write_tickets(tmp_path / "no #1.csv", 24)
    quick = ["stages=[finetune,evaluate]", "finetune.epochs=1", "model.max_length=16"]
    command = ["train", "--data", data.name, "--model", "model", "--output", "my runs/1", *quick]
    assert main([*command, "data.class_weights=balanced"]) == 0
    out = capsys.readouterr().out
    written = tmp_path / "my runs" / "1" / "run.yaml"
    assert "my runs/1/run.yaml" in out
    assert to_dict(load_config(written)) == to_dict(load_stored(written.with_name("config.json")))
    trained = TRBert.from_pretrained(written.with_name("model"))
    assert sorted(trained.config.labels) == sorted(TEAMS)
    results = json.loads(written.with_name("results.json").read_text())
    assert set(results["dense"]["classes"]) == set(TEAMS)
    assert main(["train", "--config", str(written)]) == 0
    assert "finetune: finished before" in capsys.readouterr().err


WRONG = {
    "--data FILE": ["--model m --output o", "--data t.csv --model model", "--text-field x --output o"],
    "--config": ["", "--data t.csv --model model --output o --config c.yaml", "--config c.yaml --speedup 2"],
    "none.csv": ["--data none.csv --model model --output o"],
    "t.csv:1: no column 'body'": ["--data t.csv --model model --output o --text-field body"],
    "t.txt": ["--data t.txt --model model --output o"],
    "no-model": ["--data t.csv --model no-model --output o"],
    "polciy": ["--data t.csv --model model --output o polciy.alpha=1"],
    "--speedup": ["--data t.csv --model model --output o --speedup 1"],
    "folder: has no train": ["--data folder --model model --output o"],
    "model": ["--data t.csv --model o/model --output o", "--data t.csv --model model --output model"],
}


@pytest.mark.parametrize(("named", "options"), [(n, o) for n, several in WRONG.items() for o in several])
def test_mistakes(
    named: str,
    options: str,
    tmp_path: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tickets(Path("t.csv"), 9)
    Path("t.txt").write_text("a\n")
    Path("folder").mkdir()
    tiny_models.tiny_model(Path("o/model"))
    before = sorted(map(str, tmp_path.rglob("*")))
    assert main(["train", *options.split()]) == 2
    err = capsys.readouterr().err
    assert named in err.splitlines()[-1]
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_a_speed_out_of_reach_is_refused_before_training(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four layers, of which the first reads all tokens."""
    data, output = str(write_tickets(tmp_path / "t.csv", 24)), tmp_path / "run"
    own = ["train", "--data", data, "--model", str(model), "--output", str(output), "finetune.max_steps=1"]
    assert main([*own, "--speedup", "9"]) == 2
    assert "joint.target_speedup: out of reach; 4 layers allow less than 3." in capsys.readouterr().err
    assert not list(output.glob("*/model"))
    assert main([*own, "--speedup", "2", "--stages", "finetune"]) == 0


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_a_csv_becomes_a_reduced_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of docs/quick_start.md, from random weights; `serve` would not end."""
    monkeypatch.chdir(tmp_path)
    write_tickets(tmp_path / "reviews.csv", 300)
    write_tickets(tmp_path / "dev.csv", 90)
    page = (Path(__file__).parents[2] / "docs/quick_start.md").read_text(encoding="utf-8")
    commands = page[page.index("trbert train --data reviews.csv") :].partition("```")[0].splitlines()
    assert [command.split()[1] for command in commands[::6]] == ["train", "serve"]
    for command in commands[:-1]:
        assert main(shlex.split(command)[1:]) == 0, command
    assert Path("page.html").exists()
    assert Path("onnx/reviews/model.onnx").exists()
    results = json.loads(Path("runs/reviews/results.json").read_text())
    dense, reduced = results["dense"], results["reduced"]
    assert dense["macro_f1"] > 0.9
    assert reduced["macro_f1"] > 0.9
    assert reduced["flops_speedup"] == pytest.approx(2, rel=0.1)
    (row,) = TRBert.from_pretrained("runs/reviews/model").predict(["where is my parcel, says the courier"])
    assert row.label == "shipping"

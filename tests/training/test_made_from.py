"""Which stages run again after a change; the stages write small files that follow from what they read."""

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs

from trbert_jax.config import load_config
from trbert_jax.errors import UserError
from trbert_jax.io import read_json, write_json
from trbert_jax.model.config import ModelConfig, model_config_to_dict
from trbert_jax.training import run
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.stages import STAGES, Stage

ALL = ["finetune", "score", "policy", "teacher", "joint", "evaluate"]
Change = Callable[[Path], Any]  # of the folder that holds config.yaml, data and work


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The stages that have run."""
    caplog.set_level(logging.INFO)
    names: list[str] = []

    def work(experiment: Experiment, stage: Stage) -> dict[str, Any]:
        names.append(stage.name)
        directory, config = experiment.workdir / stage.name, experiment.config
        records = experiment.data.records(config.evaluate.split if stage.evaluates else "train")
        texts = [(record.text, record.label) for record in records]
        read = [(experiment.workdir / name / "out").read_text() for name in stage.reads(config)]
        content = json.dumps([texts, read, config.policy.alpha if stage.name == "policy" else None])
        folder = experiment.workdir / "model" if stage.evaluates else directory / "model"
        if stage.trains or stage.evaluates:
            write_json(
                folder / "config.json", model_config_to_dict(ModelConfig(labels=experiment.data.task.labels))
            )
            (folder / "model.safetensors").write_text(content)
        else:
            np.save(directory / "values.npy", np.zeros(len(texts)))
        (directory / "out").write_text(content)
        return {"dense": {"of": content}} if stage.evaluates else {"steps": 1}

    for name, stage in list(STAGES.items()):
        monkeypatch.setitem(STAGES, name, dataclasses.replace(stage, run=work))
    monkeypatch.setattr(run, "plot_metrics", lambda *_: None)
    return names


@pytest.fixture
def folder(tmp_path: Path, ran: list[str]) -> Path:
    """A finished run."""
    tiny_runs.write_config(tmp_path, stages=ALL)
    train(tmp_path)
    assert ran == ALL
    ran.clear()
    return tmp_path


def train(folder: Path, overrides: str = "", only: Sequence[str] | None = None) -> dict[str, Any]:
    return run.train(load_config(folder / "config.yaml", overrides.split()), only)


def append(split: str) -> Change:
    def change(folder: Path) -> None:
        with (folder / "data" / f"{split}.jsonl").open("a", encoding="utf-8") as stream:
            stream.write('{"text": "a new film", "label": 0}\n')

    return change


def remove(name: str) -> Change:
    return lambda folder: (
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    )


def reformat(folder: Path) -> None:
    """The same records in other bytes, without a file that says what the run is."""
    file = folder / "data/train.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("\n".join(json.dumps({"label": r["label"], "text": r["text"], "x": 1}) for r in rows))
    (folder / "work/config.json").unlink()


def leave(name: str) -> Change:
    """The data is moved, except for one file."""

    def change(folder: Path) -> None:
        (folder / "data" / name).unlink()
        (folder / "data").rename(folder / "moved")

    return change


def move(folder: Path) -> None:
    (folder / "data").rename(folder / "moved")
    (folder / "work").rename(folder / "work2")


def damage(folder: Path) -> None:
    (folder / "work/finetune/model/model.safetensors").write_text("other")


def age(folder: Path) -> None:
    """As a version left it that recorded nothing."""
    for path in (folder / "work").glob("*/made_from.json"):
        path.unlink()


def twice(first: Change, second: Change) -> Change:
    return lambda folder: (first(folder), second(folder))


NEW = ["score", "init", "policy", "joint", "evaluate"]
FREE = "score.batch_size=2 teacher.batch_size=2 evaluate.batch_size=2 finetune.keep_checkpoints=1 "
FREE += "joint.save_steps=7 init.keep=[0.3] data.skip_bad_records=true"
MOVED = "data.path={folder}/moved workdir={folder}/work2"
# Change, settings, --stages; the stages that run, and what is said.
CASES: dict[str, tuple[Change | None, str, str, list[str], str]] = {
    "nothing": (None, "", "", [], "joint: finished before"),
    "test set": (append("test"), "", "", ["evaluate"], r"evaluate: stale \(data test changed"),
    "training set": (append("train"), "", "", ALL, r"finetune: stale \(data train changed.*finetune\.old"),
    "dev set, which decides nothing": (append("dev"), "", "", [], ""),
    "bytes": (reformat, "", "", [], ""),
    "places": (move, MOVED, "", [], ""),
    "settings that do not matter": (None, FREE, "", [], ""),
    "a stage deleted": (remove("work/finetune"), "", "", ["finetune"], ""),
    "scores deleted": (remove("work/score/values.npy"), "", "", ["score"], "score: its output is missing"),
    "model damaged": (damage, "", "", ["finetune"], "finetune: its output is not as it was written"),
    "exported model deleted": (remove("work/model"), "", "", ["evaluate"], ""),
    "another stage": (None, "stages=[finetune,score,init,policy,teacher,joint,evaluate]", "", NEW[1:],
        "policy: stale .*it now reads stage init; it no longer reads stage finetune"),
    "fewer stages": (None, "stages=[finetune,evaluate]", "", ["evaluate"], "no longer reads stage joint"),
    "evaluation": (None, "evaluate.split=dev", "", ["evaluate"], "evaluate.split: test -> dev"),
    "a deleted stage with other settings": (remove("work/policy"), "policy.alpha=2", "",
        ["policy", "joint", "evaluate"], "joint: stale .stage policy changed"),
    "no training set": (twice(remove("data/train.jsonl"), remove("work/evaluate")), "", "evaluate",
        ["evaluate"], ""),
    "places, without the training set": (leave("train.jsonl"), MOVED.split()[0], "evaluate", [], ""),
    "no training set, all stages": (remove("data/train.jsonl"), "", "", [], "finetune: .*cannot be seen"),
    "no data": (remove("data"), "", "", [], "evaluate: .*cannot be seen"),
    "an older version": (age, "", "", [], ""),
}  # fmt: skip

NEW_NUMBERS = {"test set", "training set", "another stage", "fewer stages", "evaluation"}
NEW_NUMBERS |= {"a deleted stage with other settings"}


@pytest.mark.parametrize("case", CASES)
def test_what_is_stale_is_named_and_made_again(
    folder: Path, ran: list[str], caplog: pytest.LogCaptureFixture, case: str
) -> None:
    change, overrides, only, expected, said = CASES[case]
    before = read_json(folder / "work/results.json")
    caplog.clear()
    if change:
        change(folder)
    results = train(folder, overrides.format(folder=folder), only.split() or None)
    assert ran == expected
    assert re.search(said, "\n".join(caplog.messages))
    assert list(results["stages"]) == results["config"]["stages"]
    assert (results["dense"] != before["dense"]) == (case in NEW_NUMBERS)
    ran.clear()
    train(folder, overrides.format(folder=folder), only.split() or None)
    assert ran == []


REFUSED: dict[str, tuple[Change | None, str, str, tuple[str, ...]]] = {
    "settings": (None, "policy.alpha=2", "", ("policy.alpha: 1.0 -> 2.0", "or delete {work}/policy to")),
    "other data elsewhere": (twice(append("train"), move), MOVED, "", ("data.path: ", "finetune, ")),
    "an older version": (age, "seed=4", "", ("seed: 3 -> 4",)),
    "an older version, evaluation": (age, "evaluate.split=dev", "", ("evaluate.split: test -> dev",)),
    "fewer data, which cannot be compared": (remove("data/train.jsonl"), "data.max_train_examples=9", "",
        ("data.max_train_examples: None -> 9",)),
    "malformed data": (lambda folder: (folder / "data/test.jsonl").write_text("{}\n"), "", "",
        ("data/test.jsonl:1: ",)),
    "a stage before": (twice(append("train"), remove("work/policy")), "", "policy",
        ("{work}/finetune: ", "data train changed", "`--stages finetune,policy`")),
    "a stage before, damaged": (twice(damage, remove("work/evaluate")), "", "evaluate",
        ("{work}/finetune: ", "not as it was written", "`--stages finetune,evaluate`")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_made_again_is_refused(folder: Path, ran: list[str], case: str) -> None:
    change, overrides, only, named = REFUSED[case]
    if change:
        change(folder)
    for _ in range(2):  # the first try leaves nothing that makes the second one pass
        with pytest.raises(UserError) as error:
            train(folder, overrides.format(folder=folder), only.split() or None)
        for words in named:
            work = folder / ("work2" if "moved" in overrides else "work")
            assert words.format(work=work) in str(error.value)
    assert ran == []


def test_data_that_is_moved_and_changed_later_is_stale(folder: Path, ran: list[str]) -> None:
    move(folder)
    train(folder, MOVED.format(folder=folder))
    (folder / "moved").rename(folder / "data")
    append("train")(folder)
    (folder / "data").rename(folder / "moved")
    assert ran == []
    train(folder, MOVED.format(folder=folder))
    assert ran == ALL


def test_data_that_is_set_back_takes_the_stages_back(folder: Path, ran: list[str]) -> None:
    file = folder / "data/train.jsonl"
    old, results = file.read_bytes(), read_json(folder / "work/results.json")
    append("train")(folder)
    only_finetune = train(folder, only=["finetune"])
    assert list(only_finetune["stages"]) == ["finetune"]  # never two runs in one
    assert "dense" not in only_finetune
    file.write_bytes(old)
    ran.clear()
    again = train(folder)
    assert ran == []
    assert tiny_runs.without_times(again) == tiny_runs.without_times(results)

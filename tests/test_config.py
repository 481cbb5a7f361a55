"""A file becomes typed settings; every mistake in it is an error that names its place."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trbert_jax.config import (
    RunConfig,
    diff_configs,
    load_config,
    load_stored,
    to_dict,
    upgrade,
    upgrade_fingerprint,
)
from trbert_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
MINIMAL = "workdir: runs/x\ndata: {name: stdlib}\nmodel: {init: scratch}\n"


def load_text(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def test_values_keep_their_types(tmp_path: Path) -> None:
    config = load_text(
        tmp_path,
        MINIMAL.replace("runs/x", "2024-01-01")  # a date to YAML 1.1
        + "finetune: {learning_rate: 3e-5, clip_norm: 2, max_steps: null}\n"
        + "policy:  # a section left empty\n",
        "data.cache_dir=~/no",
        "joint.alpha=1",
        "joint.alpha=.5",
        "stages=[finetune, evaluate]",
        "model.scratch={num_layers: 4, num_heads: 4}",
    )
    assert config.workdir == "2024-01-01"
    assert config.finetune.learning_rate == 3e-5
    assert isinstance(config.finetune.clip_norm, float)
    assert config.finetune.max_steps is None
    assert config.data.cache_dir == "~/no"
    assert config.joint.alpha == 0.5
    assert config.stages == ("finetune", "evaluate")
    assert (config.model.scratch.num_layers, config.model.scratch.hidden_size) == (4, 768)


def test_base_is_relative_to_its_file_and_weaker_than_it(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/a.yaml").write_text("policy: {alpha: 2, num_samples: 4}\nbase: b.yaml\n")
    (tmp_path / "shared/b.yaml").write_text("policy: {alpha: 3, epochs: 9}\n")
    config = load_text(tmp_path, MINIMAL + "base: shared/a.yaml\npolicy: {num_samples: 6}\n", "seed=7")
    assert (config.policy.alpha, config.policy.num_samples, config.policy.epochs) == (2, 6, 9)
    assert config.seed == 7


@pytest.mark.parametrize("dump", [yaml.safe_dump, json.dumps])
def test_to_dict_is_read_back(tmp_path: Path, dump) -> None:  # type: ignore[no-untyped-def]
    config = load_config(ROOT / "configs/imdb_distilbert3.yaml", ["finetune.learning_rate=1e-5"])
    assert load_text(tmp_path, dump(to_dict(config))) == config


def test_configurations_cannot_be_changed(tmp_path: Path) -> None:
    config = load_text(tmp_path, MINIMAL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.policy.alpha = 2.0  # type: ignore[misc]


def test_diff_names_each_key_that_differs(tmp_path: Path) -> None:
    old = to_dict(load_text(tmp_path, MINIMAL))
    new = to_dict(load_text(tmp_path, MINIMAL, "policy.alpha=2", "stages=[finetune]"))
    del new["joint"]["distill"]
    assert diff_configs(old, old) == []
    assert diff_configs(old, new) == [
        "stages: ['finetune', 'score', 'policy', 'teacher', 'joint', 'evaluate'] -> ['finetune']",
        "policy.alpha: 1.0 -> 2.0",
        "joint.distill: True -> (absent)",
    ]


def test_old_names_of_keys_are_refused_and_stored_ones_upgraded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run.yaml:4: finetune.execution: .* finetune.backend: masked"):
        load_text(tmp_path, MINIMAL + "finetune: {execution: masked}\n")
    with pytest.raises(UserError, match=r"command line: evaluate.execution: .* evaluate.rule: batch_max"):
        load_text(tmp_path, MINIMAL, "evaluate.execution=batch_max")
    new = to_dict(load_text(tmp_path, MINIMAL, "evaluate.rule=dense", "joint.backend=masked"))
    old = json.loads(json.dumps(new))
    del old["evaluate"]["rule"], old["evaluate"]["backend"], old["joint"]["backend"]
    old["evaluate"]["execution"], old["joint"]["execution"] = "dense", "masked"
    assert upgrade(old) == upgrade(new) == new
    assert upgrade_fingerprint({"stage": "joint", "settings": old["joint"], "seed": 1}) == {
        "stage": "joint",
        "settings": new["joint"],
        "seed": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert to_dict(load_stored(tmp_path / "config.json")) == new


# Mistakes: the file and the line, the key, what was expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("polcy: {alpha: 1}", ":4: polcy: unknown key; did you mean policy?"),
        ("policy:\n  aplha: 1", ":5: policy.aplha: unknown key; did you mean policy.alpha?"),
        ("guide_rate: 1", ":4: guide_rate: unknown key; did you mean policy.guide_rate?"),
        ("score: {qqq: 1}", ":4: score.qqq: unknown key; known here: batch_size"),
        ("1: 2", ":4: 1: unknown key"),
        ("policy:\n\n  epochs: many", ":6: policy.epochs: expected a whole number of at least 1, got 'many'"),
        ("policy: {epochs: 1.5}", "policy.epochs: expected a whole number of at least 1, got 1.5"),
        ("policy: {epochs: true}", "policy.epochs: expected a whole number of at least 1, got true"),
        ("policy: {epochs: null}", "policy.epochs: expected a whole number of at least 1, got null"),
        ("policy: {alpha: '1'}", "policy.alpha: expected a number of at least 0, got '1' (text)"),
        ("policy: {alpha: .inf}", "policy.alpha: expected a number of at least 0, got '.inf'"),
        ("policy: {alpha: 1e999}", "policy.alpha: expected a number of at least 0, got inf"),
        ("policy: {alpha: {a: 1}}", "policy.alpha: expected a number of at least 0, got a section"),
        ("joint: {distill: yes}", "joint.distill: expected true or false, got 'yes' (text)"),
        ("joint: {num_samples: x}", "joint.num_samples: expected a whole number of at least 2 or null, got"),
        ("policy: 3", ":4: policy: expected a section with keys such as batch_size"),
        ("stages: finetune", ":4: stages: expected a list in brackets, each item one of finetune, score"),
        ("stages: [finetuen]", ":4: stages: expected one of finetune, score"),
        ("stages: [finetuen]", "got 'finetuen' (text); did you mean finetune?"),
        ("stages: []", ":4: stages: is empty"),
        ("stages: [policy, score]", ":4: stages: expected each stage once, in this order: finetune, score"),
        ("stages: [score, score]", ":4: stages: expected each stage once"),
        (
            "evaluate: {rule: dens}",
            "rule: expected one of threshold, batch_max, dense, got 'dens'; did you mean dense?",
        ),
        (
            "finetune: {learning_rate: -1e-5}",
            "-1e-05 is out of range, expected a number above 0",
        ),
        ("finetune: {batch_size: 0}", "batch_size: 0 is out of range, expected a whole number of at least 1"),
        ("policy: {num_samples: 1}", "num_samples: 1 is out of range, expected a whole number of at least 2"),
        ("policy: {guide_rate: 1.1}", "guide_rate: 1.1 is out of range, expected a number from 0 to 1"),
        ("seed: -1", ":4: seed: -1 is out of range, expected a whole number from 0 to 2147483647"),
        ("policy: {epochs: 1, epochs: 2}", ":4: policy.epochs: given twice (first on line 4); keep one"),
        ("seed: 1\nseed: 1", ":5: seed: given twice (first on line 4)"),
        ("seed: [1", ":5: not valid YAML ("),
        ("seed: 1\n\tx: 1", ":5: not valid YAML ("),
        ("a: *b", ":4: not valid YAML (found undefined alias 'b')"),
        ("seed: \x00", ": not valid YAML (special characters are not allowed)"),
        ("seed: !!python/name:os.system", ":4: seed: the YAML tag"),
        ("seed: !!int x", ":4: seed: 'x' cannot be read as int"),
        ("a: &a\n  b: *a", ": nested too deeply"),
        ("? [1]\n: 2", ":4: a key must be text"),
        ("base: 3", ":4: base: expected the path of a YAML file, got 3"),
        ("base: nowhere.yaml", ":4: base: "),
        ("base: run.yaml", "run.yaml:4: base: files build on each other in a circle"),
    ],
)
def test_mistake_in_a_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_text(tmp_path, MINIMAL + text + "\n")
    assert str(error.value).startswith(str(tmp_path / "run.yaml") + ":")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": is empty, settings were expected"),
        ("# nothing\n", ": is empty, settings were expected"),
        ("- 1\n", ": expected `key: value` lines, got a list"),
        ("seed: 1\n---\nseed: 2\n", ":2: not valid YAML"),
        ("seed: 1\n", ": workdir: missing, expected text"),
        ("workdir: ''\n", ":1: workdir: expected text, got ''"),
        ("workdir: 12\n", ':1: workdir: expected text, got 12; quote it to have it as text: "12"'),
        ("workdir: x\ndata: {path: d}\n", ":2: data.name: missing, expected text"),
    ],
)
def test_file_that_is_no_configuration(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_text(tmp_path, text)
    assert f"{tmp_path / 'run.yaml'}{message}" in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.aplha=1", "policy.aplha: unknown key; did you mean policy.alpha?"),
        ("policy.alpha=x", "policy.alpha: expected a number of at least 0, got 'x' (text)"),
        ("policy.alpha.x=1", "policy.alpha: expected a number of at least 0, got a section of keys"),
        ("policy=3", "policy: expected a section"),
        ("policy.alpha", "'policy.alpha' is not a setting; write section.key=value"),
        ("policy.alpha=", "'policy.alpha=' is not a setting"),
        ("=1", "'=1' is not a setting"),
        ("policy..alpha=1", "'policy..alpha=1' is not a setting"),
        ("stages=[score", "not valid YAML ("),
        ("base=x.yaml", "base: can only be set in a file"),
        (
            "data.name=imbd",
            "data.name: expected imdb, yelp_f, yelp_polarity, 20news, hyperpartisan",
        ),
        ("data.name=imbd", "got 'imbd'; did you mean imdb?"),
        ("data.name='tfds:'", "data.name: expected imdb"),
        ("data.text_field=body", "data.text_field: is for tfds:NAME only"),
        ("data.label_field=y", "data.label_field: is for tfds:NAME only"),
        ("model.max_positions=511", "model.max_positions: 511 is less than model.max_length 512"),
        ("model.keep_layers=[0, 2]", "model.keep_layers: is for a pretrained model"),
        ("model.scratch.hidden_size=100", "model.scratch.hidden_size: 100 is not a multiple of"),
    ],
)
def test_mistake_on_the_command_line(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_text(tmp_path, MINIMAL, override)
    assert str(error.value).startswith("command line: ")
    assert message in str(error.value)


@pytest.mark.parametrize("layers", ["[]", "[2, 0]", "[0, 0]"])
def test_kept_layers_rise(tmp_path: Path, layers: str) -> None:
    with pytest.raises(UserError, match=r"^command line: model.keep_layers: expected rising layer numbers"):
        load_text(tmp_path, MINIMAL, "model.init=models/x", f"model.keep_layers={layers}")


def test_path_is_needed_where_there_are_files(tmp_path: Path) -> None:
    assert load_text(tmp_path, MINIMAL, "data.name=tfds:ag_news", "data.text_field=description")
    with pytest.raises(UserError, match=r"run.yaml:2: data.path: missing, expected the folder .* of imdb"):
        load_text(tmp_path, MINIMAL.replace("stdlib", "imdb"))


def test_mistake_in_a_base_names_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 1\npolicy:\n  epochs: 0\n")
    with pytest.raises(UserError, match=r"base.yaml:3: policy.epochs: 0 is out of range"):
        load_text(tmp_path, MINIMAL + "base: base.yaml\n", "policy.alpha=2")


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(UserError, match="is a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("workdir: é\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.yaml: not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_import_is_light() -> None:
    code = (
        "import sys, trbert_jax.config; print(*sorted({'jax', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []

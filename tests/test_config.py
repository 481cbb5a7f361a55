"""A file becomes typed settings; every mistake in it is an error that names its place."""

import ast
import json
import os
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from trbert_jax.config import (
    RunConfig,
    diff_configs,
    dotted_keys,
    load_config,
    load_stored,
    sections,
    to_dict,
    upgrade,
)
from trbert_jax.errors import UserError
from trbert_jax.model.packed import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
BASES = sorted((ROOT / "configs/base").glob("*.yaml"))
REQUIRED = ["workdir=runs/x", "data.name=stdlib", "model.init=scratch"]
MINIMAL = "workdir: runs/x\ndata: {name: stdlib}\nmodel: {init: scratch}\n"


def load_text(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def test_values_keep_their_types(tmp_path: Path) -> None:
    text = MINIMAL.replace("runs/x", "2024-01-01")  # a date to YAML 1.1
    text += "finetune: {learning_rate: 3e-5, clip_norm: 2, max_steps: null}\npolicy:  # an empty section\n"
    overrides = ["data.cache_dir=~/no", "joint.alpha=1", "joint.alpha=.5", "stages=[finetune, evaluate]"]
    config = load_text(tmp_path, text, *overrides, "model.scratch={num_layers: 4, num_heads: 4}")
    assert (config.workdir, config.data.cache_dir, config.joint.alpha) == (
        "2024-01-01",
        os.path.expanduser("~/no"),
        0.5,
    )
    assert (config.finetune.learning_rate, config.finetune.max_steps) == (3e-5, None)
    assert isinstance(config.finetune.clip_norm, float)
    assert config.stages == ("finetune", "evaluate")
    assert (config.model.scratch.num_layers, config.model.scratch.hidden_size) == (4, 768)


def test_bases_are_relative_and_the_later_wins(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/a.yaml").write_text("policy: {alpha: 2, num_samples: 4}\nbase: b.yaml\n")
    (tmp_path / "shared/b.yaml").write_text("policy: {alpha: 3, epochs: 9}\nseed: 1\n")
    (tmp_path / "c.yaml").write_text("joint: {alpha: 5}\nseed: 2\n")
    text = MINIMAL + "base: [shared/a.yaml, c.yaml]\npolicy: {num_samples: 6}\njoint: {epochs: 7}\n"
    config = load_text(tmp_path, text, "joint.epochs=8")
    assert (config.policy.alpha, config.policy.num_samples, config.policy.epochs) == (2, 6, 9)
    assert (config.joint.alpha, config.joint.epochs, config.seed) == (5, 8, 2)


@pytest.mark.parametrize("dump", [yaml.safe_dump, json.dumps])
def test_to_dict_is_read_back(tmp_path: Path, dump) -> None:  # type: ignore[no-untyped-def]
    config = load_config(ROOT / "configs/imdb_distilbert3.yaml", ["finetune.learning_rate=1e-5"])
    assert load_text(tmp_path, dump(to_dict(config))) == config


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


def test_renamed_keys_are_refused_and_stored_ones_upgraded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run.yaml:4: finetune.execution: .* backend: masked"):
        load_text(tmp_path, MINIMAL + "finetune: {execution: masked}\n")
    with pytest.raises(UserError, match=r"command line: evaluate.execution: .* rule: batch_max"):
        load_text(tmp_path, MINIMAL, "evaluate.execution=batch_max")
    new = to_dict(load_text(tmp_path, MINIMAL, "evaluate.rule=dense", "joint.backend=masked"))
    old = json.loads(json.dumps(new))
    del old["evaluate"]["rule"], old["evaluate"]["backend"], old["joint"]["backend"]
    old["evaluate"]["execution"], old["joint"]["execution"] = "dense", "masked"
    assert upgrade(new) == new
    fingerprint = {"stage": "joint", "settings": old["joint"], "seed": 1}
    assert upgrade(fingerprint) == {"stage": "joint", "settings": new["joint"], "seed": 1}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert to_dict(load_stored(tmp_path / "config.json")) == new


def test_backends_are_those_of_the_model() -> None:
    assert set(get_args(sections.Backend)) == set(BACKENDS)


def mistake(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_text(tmp_path, text, *overrides)
    return str(error.value).removeprefix(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("text", "line", "key", "hint"),
    [
        ("polcy: {alpha: 1}", 4, "polcy", "did you mean policy?"),
        ("policy:\n  aplha: 1", 5, "policy.aplha", "did you mean policy.alpha?"),
        ("guide_rate: 1", 4, "guide_rate", "did you mean policy.guide_rate?"),
        ("1: 2", 4, "1", "unknown key"),
        ("policy:\n\n  epochs: many", 6, "policy.epochs", 'integer, got "many"'),
        ("policy: {epochs: 1.5}", 4, "policy.epochs", "1.5"),
        ("policy: {alpha: '1'}", 4, "policy.alpha", 'number, got "1"'),
        ("policy: {alpha: 1e999}", 4, "policy.alpha", "finite"),
        ("joint: {distill: yes}", 4, "joint.distill", '"yes"'),
        ("policy: 3", 4, "policy", "section"),
        ("stages: finetune", 4, "stages", "list"),
        ("stages: [finetuen]", 4, "stages", "did you mean finetune?"),
        ("stages: []", 4, "stages", "finetune, score"),
        ("stages: [policy, score]", 4, "stages", "in this order"),
        ("evaluate: {rule: dens}", 4, "evaluate.rule", 'batch_max, dense, got "dens"; did you mean dense?'),
        ("evaluate: {baselines: [sample]}", 4, "evaluate.baselines", "random, first_k"),
        (
            "evaluate: {thresholds: [0.3, [0.5, 1.0]]}",
            4,
            "evaluate.thresholds",
            "point of reduction, got [0.5, 1.0]",
        ),
        ("evaluate: {rule: batch_max, thresholds: [0.3]}", 4, "evaluate.thresholds", "batch_max"),
        ("joint: {backend: mask}", 4, "joint.backend", "did you mean masked?"),
        ("joint: {published_padding: true}", 4, "joint.published_padding", "stdlib"),
        ("finetune: {learning_rate: -1e-5}", 4, "finetune.learning_rate", "greater than 0"),
        ("finetune: {batch_size: 0}", 4, "finetune.batch_size", "at least 1|or equal to 1"),
        ("policy: {guide_rate: 1.1}", 4, "policy.guide_rate", "or equal to 1"),
        ("policy: {epochs: 1, epochs: 2}", 4, "epochs", "twice"),
        ("seed: 1\nseed: 1", 5, "seed", "run.yaml:4"),
        ("seed: [1", 5, "", "YAML"),
        ("a: *b", 4, "", "aliases"),
        ("seed: &a 1", 4, "", "anchors"),
        ("seed: !!python/name:os.system", 4, "", "tags"),
        ("? [1]\n: 2", 4, "", "text"),
        ("base: 3", 4, "base", "path"),
        ("base: nowhere.yaml", 4, "base", "nowhere.yaml"),
        ("base: run.yaml", 4, "base", "circle"),
    ],
)
def test_mistake_in_a_file(tmp_path: Path, text: str, line: int, key: str, hint: str) -> None:
    message = mistake(tmp_path, MINIMAL + text + "\n")
    assert message.startswith(f"run.yaml:{line}: " + (f"{key}: " if key else ""))
    assert re.search(hint if "|" in hint else re.escape(hint), message)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", ": "),
        ("- 1\n", ": "),
        ("seed: 1\n---\nseed: 2\n", ":2: "),
        ("seed: \x00\n", ": "),
        ("seed: " + "[" * 10_000, ": "),
        ("seed: 1\n", ": workdir: "),
        ("workdir: ''\n", ":1: workdir: "),
        ("workdir: x\ndata: {path: d}\n", ":2: data.name: "),
        (MINIMAL.replace("stdlib", "imdb"), ":2: data.path: "),
        (MINIMAL.replace("runs/x", "runs/my #1 x"), ":1: workdir: "),  # else it would be `runs/my`
        (MINIMAL.replace("runs/x", "~no-such-user/x"), ":1: workdir: "),
    ],
)
def test_file_that_is_no_configuration(tmp_path: Path, text: str, place: str) -> None:
    assert mistake(tmp_path, text).startswith(f"run.yaml{place}")


@pytest.mark.parametrize(
    ("overrides", "key", "hint"),
    [
        ("policy.alpha.x=1", "policy.alpha", '{"x": 1}'),
        ("policy.alpha", "'policy.alpha' ", "section.key=value"),
        ("policy.alpha=", "'policy.alpha=' ", "section.key=value"),
        ("policy..alpha=1", "'policy..alpha=1' ", "section.key=value"),
        ("stages=[score", "not valid YAML", ""),
        ("base=x.yaml", "base", "file"),
        ("data.name=imbd", "data.name", "did you mean imdb?"),
        ("data.name='tfds:'", "data.name", "tfds:NAME"),
        ("data.text_field=body", "data.text_field", "tfds:NAME"),
        ("data.train=a.csv", "data.train", "is for text only"),
        ("data.name=text data.path=d data.labels=[1,1.0]", "data.labels", "different"),
        ("data.name=tickets", "data.name", "`text`"),
        ("data.prepared=d joint.max_examples=3", "joint.max_examples", "data.prepared"),
        ("joint.distill=false joint.temperature=2", "joint.temperature", "joint.distill"),
        ("joint.distill_states=1", "joint.distill_states", "teacher.states"),
        ("joint.target_speedup=1", "joint.target_speedup", "greater than 1"),
        ("model.max_positions=511", "model.max_positions", "512"),
        ("model.keep_layers=[0,2]", "model.keep_layers", "pretrained"),
        ("model.init=m model.keep_layers=[0,0]", "model.keep_layers", "rising"),
        ("model.scratch.hidden_size=100", "model.scratch.hidden_size", "12"),
    ],
)
def test_mistake_on_the_command_line(tmp_path: Path, overrides: str, key: str, hint: str) -> None:
    message = mistake(tmp_path, MINIMAL, *overrides.split())
    assert message.startswith(f"command line: {key}")
    assert hint in message


def test_paths_are_found_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quotes and the command line keep ` #`; `~` and a name that a Mac has stored decomposed are resolved."""
    monkeypatch.setenv("HOME", str(tmp_path))
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    (tmp_path / decomposed / composed).mkdir(parents=True)
    quoted = MINIMAL.replace("runs/x", "'runs/my #1 x'")
    config = load_text(tmp_path, quoted, "data.path=a #1", f"model.tokenizer=~/{composed}/{composed}/new")
    assert (config.workdir, config.data.path) == ("runs/my #1 x", "a #1")
    assert config.model.tokenizer == f"{tmp_path}/{decomposed}/{composed}/new"
    (tmp_path / "runs # old").mkdir()  # written as a comment, but there is such a folder
    assert "runs # old" in mistake(tmp_path, MINIMAL.replace("runs/x", f"{tmp_path}/runs # old"))
    assert load_text(tmp_path, MINIMAL.replace("runs/x", "runs # comment")).workdir == "runs"


def test_tfds_has_fields_and_needs_no_path(tmp_path: Path) -> None:
    config = load_text(tmp_path, MINIMAL, "data.name=tfds:ag_news", "data.text_field=description")
    assert config.data.path is None


def test_mistake_in_a_base_names_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 1\npolicy:\n  epochs: 0\n")
    message = mistake(tmp_path, MINIMAL + "base: base.yaml\n", "policy.alpha=2")
    assert message.startswith("base.yaml:3: policy.epochs: ")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_configuration_loads_and_its_header_says_what_it_is(path: Path) -> None:
    assert load_config(path).workdir == f"runs/{path.stem}"
    header = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    assert all(line.startswith("#") for line in header)
    assert f"trbert train --config configs/{path.name}" in "".join(header)
    for item in ("command", "data", "hardware", "time", "result"):
        assert any(line.startswith(f"#   {item} ") for line in header), item


@pytest.mark.parametrize("path", BASES, ids=lambda p: p.stem)
def test_base_loads_and_something_builds_on_it(path: Path) -> None:
    keep_layers = ["model.keep_layers=null"]  # cannot go with init: scratch
    assert load_config(path, REQUIRED + keep_layers).policy.num_samples == 8
    users = [p for p in CONFIGS if f"base/{path.name}" in p.read_text(encoding="utf-8")]
    users += [p for p in BASES if f"base: {path.name}" in p.read_text(encoding="utf-8")]
    assert users


def test_defaults_are_the_published_hyper_parameters(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("workdir: runs/x\n")
    published = load_config(ROOT / "configs/base/classification.yaml", REQUIRED)
    assert load_config(tmp_path / "run.yaml", REQUIRED) == published


# Data set -> length, question, harmonic coefficients, learning rate, epochs, warm-up, batch, guide rate.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "imdb": (512, None, 1, 1, 3e-5, (5, 3), None, 32, 0.5),
    "yelp_f": (512, None, 2, 0.5, 3e-5, (5, 3), None, 32, 0.5),
    "20news": (512, None, 1, 1, 3e-5, (5, 3), None, 32, 0.5),
    "hyperpartisan": (1024, None, 0.01, 0.01, 3e-5, (5, 3), None, 32, 0.5),
    "squad": (384, 64, 5, 5, 5e-5, (3, 3), None, 8, 0.2),
    "newsqa": (512, 40, 3, 5, 5e-5, (3, 3), None, 2, 0.2),
    "naturalqa": (512, 40, 2, 2, 5e-5, (3, 3), None, 2, 0.2),
    "race": (512, 128, 0.5, 0.1, 2e-5, (3, 3), None, 8, 0.5),
    "hotpotqa": (1024, 80, 0.1, 4, 5e-5, (3, 3), 1000, 4, 0.3334),
    "triviaqa": (1024, 55, 0.5, 1, 3e-5, (5, 5), 1000, 8, 0.2),
    "wikihop": (1024, None, 1, 1, 5e-5, (5, 5), None, 2, 0.5),
}


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if re.search("_(distil)?bert$", p.stem)], ids=lambda p: p.stem
)
def test_published_run(path: Path) -> None:
    run, (data, _, backbone) = load_config(path), path.stem.rpartition("_")
    length, question, policy, joint, rate, (first, epochs), warmup, batch_size, guide = PUBLISHED[data]
    assert (run.data.name, run.policy.alpha, run.joint.alpha) == (data, policy, joint)
    assert ("init" in run.stages) == (data == "imdb")
    if (data, backbone) == ("hyperpartisan", "distilbert"):
        length = 512
    assert (run.model.max_length, run.model.max_positions) == (length, 1024 if length == 1024 else None)
    assert run.model.max_question_length in (None, question)  # None: what the data set has by itself
    assert run.policy.guide_rate == guide
    for stage, passes in ((run.finetune, first), (run.policy, epochs), (run.joint, epochs)):
        assert (stage.learning_rate, stage.epochs, stage.warmup_steps) == (rate, passes, warmup)
        assert stage.batch_size * stage.accumulation_steps == batch_size
        assert batch_size < 32 or stage.warmup_fraction == 0.1


def test_three_layer_runs_are_dense() -> None:
    run = load_config(ROOT / "configs/imdb_distilbert3.yaml")
    assert run.model.keep_layers == (0, 2, 4)
    assert (run.stages, run.evaluate.rule) == (("finetune", "evaluate"), "dense")


def test_every_field_is_explained() -> None:
    """By a comment on its line, or on the one before."""
    lines = Path(sections.__file__).read_text(encoding="utf-8").splitlines()
    fields = {key.rpartition(".")[2] for key in dotted_keys(RunConfig)} - {"stages"}
    for number, line in enumerate(lines):
        name, _, value = line.partition(":")
        if name[:4] == "    " and name.strip() in fields and " = " in value and "Config()" not in value:
            assert "  # " in line or lines[number - 1].startswith("    # "), line


def test_every_key_is_read_by_something() -> None:
    """As an attribute or by its name."""
    read = set[str]()
    for path in (ROOT / "trbert_jax").rglob("*.py"):
        if path.parent.name not in ("trbert_jax", "config"):
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
            read |= {str(node.value) for node in nodes if isinstance(node, ast.Constant)}
    assert [key for key in dotted_keys(RunConfig) if key.rpartition(".")[2] not in read] == []

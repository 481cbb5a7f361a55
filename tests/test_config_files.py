"""The configurations of the project load, their keys are explained, and each is read by something."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from trbert_jax import config as config_module
from trbert_jax.config import RunConfig, dotted_keys, load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
BASES = sorted((ROOT / "configs/base").glob("*.yaml"))
REQUIRED = ["workdir=runs/x", "data.name=stdlib", "model.init=scratch"]


def test_the_configurations_are_there() -> None:
    backbones = ("bert", "distilbert", "distilbert3")
    published = {f"{data}_{b}" for data in ("imdb", "yelp_f", "20news", "hyperpartisan") for b in backbones}
    published |= {f"{data}_{b}" for data in ("squad", "newsqa", "naturalqa", "race") for b in backbones[:2]}
    published |= {"hotpotqa_bert", "triviaqa_bert", "wikihop_bert"}
    small = {f"{data}_minilm_cpu" for data in ("imdb", "20news", "squad", "newsqa", "race")}
    assert published | small | {"quickstart"} == {p.stem for p in CONFIGS}


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
    users = [p for p in CONFIGS if f"base: base/{path.name}" in p.read_text(encoding="utf-8")]
    users += [p for p in BASES if f"base: {path.name}" in p.read_text(encoding="utf-8")]
    assert users


def test_defaults_are_the_published_hyper_parameters(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("workdir: runs/x\n")
    published = load_config(ROOT / "configs/base/classification.yaml", REQUIRED)
    assert load_config(tmp_path / "run.yaml", REQUIRED) == published


@pytest.mark.parametrize(
    ("data", "policy", "joint"),
    [("imdb", 1, 1), ("yelp_f", 2, 0.5), ("20news", 1, 1), ("hyperpartisan", 0.01, 0.01)],
)
@pytest.mark.parametrize("backbone", ["bert", "distilbert"])
def test_published_run(data: str, backbone: str, policy: float, joint: float) -> None:
    config = load_config(ROOT / f"configs/{data}_{backbone}.yaml")
    assert (config.data.name, config.policy.alpha, config.joint.alpha) == (data, policy, joint)
    assert ("init" in config.stages) == (data == "imdb")
    for stage, epochs in ((config.finetune, 5), (config.init, 3), (config.policy, 3), (config.joint, 3)):
        assert (stage.learning_rate, stage.epochs, stage.warmup_fraction) == (3e-5, epochs, 0.1)
        assert stage.batch_size * stage.accumulation_steps == 32
    long_input = (data, backbone) == ("hyperpartisan", "bert")
    assert config.model.max_length == (1024 if long_input else 512)
    assert config.model.max_positions == (1024 if long_input else None)


# Data set, length, question, harmonic coefficients, learning rate, epochs, batch size, guide rate.
QUESTIONS = [
    ("squad", 384, 64, 5, 5, 5e-5, 3, 8, 0.2),
    ("newsqa", 512, 40, 3, 5, 5e-5, 3, 2, 0.2),
    ("naturalqa", 512, 40, 2, 2, 5e-5, 3, 2, 0.2),
    ("race", 512, 128, 0.5, 0.1, 2e-5, 3, 8, 0.5),
    ("hotpotqa", 1024, 80, 0.1, 4, 5e-5, 3, 4, 0.3334),
    ("triviaqa", 1024, 55, 0.5, 1, 3e-5, 5, 8, 0.2),
    ("wikihop", 1024, None, 1, 1, 5e-5, 5, 2, 0.5),
]


@pytest.mark.parametrize("row", QUESTIONS, ids=lambda row: row[0])
def test_published_run_of_questions(row: tuple[Any, ...]) -> None:
    data, length, question, policy, joint, rate, epochs, batch_size, guide = row
    paths = [p for p in CONFIGS if p.stem in (f"{data}_bert", f"{data}_distilbert")]
    assert len(paths) == (1 if length == 1024 else 2)
    for path in paths:
        config = load_config(path)
        assert (config.data.name, config.policy.alpha, config.joint.alpha) == (data, policy, joint)
        assert config.model.max_length == length
        assert config.model.max_positions == (1024 if length == 1024 else None)
        assert config.model.max_question_length in (None, question)  # None: what the data set has by itself
        assert config.policy.guide_rate == guide
        for stage in (config.finetune, config.policy, config.joint):
            assert (stage.learning_rate, stage.epochs, stage.batch_size) == (rate, epochs, batch_size)
            assert stage.accumulation_steps == 1
            assert stage.warmup_steps == (1000 if data in ("hotpotqa", "triviaqa") else None)


def test_three_layer_runs_are_dense() -> None:
    config = load_config(ROOT / "configs/imdb_distilbert3.yaml")
    assert config.model.keep_layers == (0, 2, 4)
    assert (config.stages, config.evaluate.rule) == (("finetune", "evaluate"), "dense")


def test_every_field_is_explained() -> None:
    """By a comment on its line, or on the one before."""
    lines = Path(config_module.__file__).read_text(encoding="utf-8").splitlines()
    fields = {key.rpartition(".")[2] for key in dotted_keys(RunConfig)} - {"stages"}
    for number, line in enumerate(lines):
        name, _, value = line.partition(":")
        if name[:4] == "    " and name.strip() in fields and " = " in value and "Config()" not in value:
            assert "  # " in line or lines[number - 1].startswith("    # "), line


def test_every_key_is_read_by_something() -> None:
    """As an attribute or by its name."""
    read = set[str]()
    for path in (ROOT / "trbert_jax").rglob("*.py"):
        if path.parent.name != "trbert_jax":
            nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
            read |= {node.attr for node in nodes if isinstance(node, ast.Attribute)}
            read |= {str(node.value) for node in nodes if isinstance(node, ast.Constant)}
    assert [key for key in dotted_keys(RunConfig) if key.rpartition(".")[2] not in read] == []

"""A new object of each registry works end to end after one registration."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from safetensors import safe_open
from tiny_models import BERT, tiny_model, tiny_params, tiny_tokenizer

from trbert_jax import TRBert, answer_questions
from trbert_jax.cli import main
from trbert_jax.config import load_config
from trbert_jax.config import sections as settings
from trbert_jax.datasets import DATASETS, BadRecords, DataSet, find_dataset, reading, register_dataset
from trbert_jax.datasets.reading import read_lines
from trbert_jax.datasets.records import Example
from trbert_jax.datasets.registry import each_split
from trbert_jax.errors import UserError
from trbert_jax.model.backbones import BACKBONES, register_backbone
from trbert_jax.model.pretrained import load_pretrained, save_pretrained
from trbert_jax.reduction.rules import RULES, RuleSpec, register_rule
from trbert_jax.tasks import TASKS, register_task
from trbert_jax.tasks.classification import ClassificationTask
from trbert_jax.tasks.examples import Examples
from trbert_jax.training import objectives, step
from trbert_jax.training.stage_objectives import Update
from trbert_jax.training.stages import STAGES, Stage, register_stage

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
# Compiled once for most tests that only need some run.
FINETUNE = {"backend": "masked"}
SHALLOW: dict[str, Any] = {"stages": ["finetune"], "model": tiny_runs.ONE_LAYER, "finetune": FINETUNE}
TWO_LAYERS = dataclasses.replace(BERT, num_layers=2)
TEXTS = ["the film was not good", "I saw it yesterday and the plot was very dull"]


@pytest.fixture(autouse=True)
def _registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Removes what a test registers."""
    monkeypatch.setattr(settings, "_run_class", settings._run_class)
    registries: list[dict[str, Any]] = [DATASETS, TASKS, STAGES, settings.STAGES, RULES, BACKBONES]
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


def test_dataset(tmp_path: Path) -> None:
    def read(path: Path, bad: BadRecords, labels: Sequence[str]) -> Iterator[Example]:
        for number, line in read_lines(path):
            with bad.record(f"{path}:{number}"):
                label, text = line.rstrip("\n").split("\t")
                yield Example(f"{path.name}:{number}", text, labels.index(label))

    files, labels = each_split("{split}.tsv"), ("bad", "good")
    dummy = DataSet(name="dummy", task="classification", read=read, files=files, labels=labels)
    register_dataset(dataclasses.replace(dummy, dev_from_train=True))
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 40), ("test", 8)):
        texts = [record["text"] for record in tiny_runs.records(count, seed=count)]
        lines = (f"{'good' if 'good' in text else 'bad'}\t{text}\n" for text in texts)
        (data / f"{split}.tsv").write_text("".join(lines))
    tiny_runs.train(tiny_runs.write_config(tmp_path, data={"name": "dummy"}, **SHALLOW))
    saved = json.loads((tmp_path / "work/finetune/model/config.json").read_text())
    assert list(saved["id2label"].values()) == ["bad", "good"]
    (data / "test.tsv").write_text("fine\ta film\n")
    with pytest.raises(UserError, match=r"test.tsv:1: "):
        DATASETS["dummy"].read_split(data, "test")
    with pytest.raises(ValueError, match="dummy"):
        register_dataset(DATASETS["dummy"])
    with pytest.raises(UserError, match="did you mean dummy"):
        find_dataset("dumy")


def test_task(tmp_path: Path) -> None:
    """Labels of the first words of a text: a task with the head, and so the loss, of classification."""

    @register_task
    class DummyTask(ClassificationTask):
        name = "dummy"
        shortest_request: ClassVar[dict[str, Any]] = {"review": "a"}

        @property
        def head(self) -> str:
            return "classification"

        def encode(self, records: Sequence[Any], tokenizer: Any, **options: Any) -> Examples:
            halves = [dataclasses.replace(r, text=" ".join(r.text.split()[:5])) for r in records]
            return super().encode(halves, tokenizer, **options)

        def parse_request(self, request: Mapping[str, Any], id: str, where: str) -> Example:
            return Example(id, reading.text(request, "review"), -1)

    register_dataset(dataclasses.replace(DATASETS["imdb"], name="dummy", task="dummy"))
    shallow = {**SHALLOW, "stages": ["finetune", "evaluate"]}
    results = tiny_runs.train(tiny_runs.write_config(tmp_path, data={"name": "dummy"}, **shallow))
    assert results["dense"]["tokens"] <= 2 + 5
    answers = json.loads((tmp_path / "work/predictions.json").read_text())
    assert set(answers.values()) <= {"negative", "positive"}
    model = TRBert.from_pretrained(tmp_path / "work/model")
    (answer,) = answer_questions(model, [{"review": "the film was very good and bad"}])
    assert answer["answer"] in ("negative", "positive")
    assert answer["num_tokens"] == 2 + 5
    with pytest.raises(UserError, match="question:1: review"):
        answer_questions(model, [{"text": "a film"}])


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolishConfig(settings.TrainingConfig):
    """Train everything once more, without reduction."""

    weight: settings.Positive = 1.0


def test_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def objective(update: Update) -> objectives.Objective:
        dense = objectives.dense_objective(**update.forward)
        return dense.replace(total=update.config.polish.weight * dense.total)  # type: ignore[attr-defined]

    kind: dict[str, Any] = {"starts_from": ("finetune",), "trains": step.trains_all, "reduces": True}
    register_stage(Stage(settings=PolishConfig, objective=objective, **kind))
    polish = {**FINETUNE, "batch_size": 8, "accumulation_steps": 1, "max_steps": 3, "weight": 0.5}
    changes = {**SHALLOW, "stages": ["finetune", "polish", "evaluate"], "polish": polish}
    path = tiny_runs.write_config(tmp_path, **changes)
    results = tiny_runs.train(path)
    assert results["stages"]["polish"]["steps"] == 3
    assert results["config"]["polish"]["weight"] == 0.5
    assert len(results["reduced"]["kept"]) == 1
    assert (tmp_path / "work" / "polish" / "model").is_dir()
    capsys.readouterr()
    assert main(["train", "--config", str(path), "--dry-run"]) == 0
    assert any(line.startswith("polish ") for line in capsys.readouterr().out.splitlines())


def test_rule(tmp_path: Path) -> None:
    """A rule of evaluation: known to the settings, used by both backends."""

    def keep_even(inputs: Any) -> Any:
        return lambda stage, logits, valid: valid & (jnp.arange(valid.shape[1]) % 2 == 0)

    register_rule(RuleSpec("even_positions", "keep every second token", keep_even))
    config = load_config(QUICKSTART, ["evaluate.rule=even_positions", "evaluate.thresholds=[]"])
    model = TRBert.from_pretrained(tiny_model(tmp_path, TWO_LAYERS))
    for backend in ("packed", "masked"):
        for prediction in model.predict(TEXTS, rule=config.evaluate.rule, backend=backend):
            expected = np.arange(0, prediction.num_tokens, 2)
            assert all(np.array_equal(kept, expected) for kept in prediction.kept)
    with pytest.raises(UserError, match="threshold"):
        model.predict(TEXTS, rule="even_positions", threshold=0.4)
    with pytest.raises(ValueError, match="even_positions"):
        register_rule(RULES["even_positions"])


def test_backbone(tmp_path: Path) -> None:
    """A folder in the format of another family: its own keys, names and alias, no pooler, no token types."""
    bert = BACKBONES["bert"]
    register_backbone(
        dataclasses.replace(
            bert,
            name="robot",
            aliases=("robot-v1",),
            class_name="Robot",
            keys={**{k: v for k, v in bert.keys.items() if k != "type_vocab_size"}, "hidden_size": "width"},
            defaults={"type_vocab_size": 0},
            embeddings=(("word", "words"), ("position", "places"), ("norm", "norm")),
            stack="tower",
            layer=tuple((key, f"block.{key}") for key, _ in bert.layer),
            pooler=False,
        )
    )
    config = dataclasses.replace(TWO_LAYERS, model_type="robot", type_vocab_size=0)
    save_pretrained(tmp_path / "model", config, tiny_params(config), tiny_tokenizer())
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (values["architectures"], values["width"]) == (["RobotForSequenceClassification"], 16)
    with safe_open(tmp_path / "model" / "model.safetensors", "np") as weights:
        names = set(weights.keys())
    assert {"robot.embeddings.words.weight", "robot.tower.layer.1.block.query.bias"} < names
    assert {"robot.tower.linear_1.0.weight", "pre_classifier.weight"} < names

    (tmp_path / "model" / "config.json").write_text(json.dumps({**values, "model_type": "robot-v1"}))
    assert load_pretrained(tmp_path / "model").config == config
    assert load_config(QUICKSTART, ["model.scratch.model_type=robot"]).model.scratch.model_type == "robot"
    model = TRBert.from_pretrained(tmp_path / "model")
    assert [len(p.scores) for p in model.predict(TEXTS)] == [2, 2]
    with pytest.raises(ValueError, match="robot-v1"):
        register_backbone(dataclasses.replace(bert, name="another", aliases=("robot-v1",)))

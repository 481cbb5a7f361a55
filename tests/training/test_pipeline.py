"""Whole runs through the command line: what each stage leaves, and what results.json says."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny_runs
from safetensors.numpy import load_file

from trbert_jax import TRBert
from trbert_jax.cli import main
from trbert_jax.datasets import DATASETS
from trbert_jax.inference.frontier import SPEEDUPS
from trbert_jax.model.operating_points import to_dict
from trbert_jax.reduction import flops
from trbert_jax.training import stage_objectives, stages
from trbert_jax.training.logging import read_metrics
from trbert_jax.training.stages import Stage

TRAINED = ["finetune", "init", "policy", "joint"]
NUM_TRAIN, NUM_TEST = tiny_runs.SIZES["train"], tiny_runs.SIZES["test"]
# Packed steps take long to compile: the other two stages have them.
MASKED: dict[str, Any] = {stage: {"backend": "masked"} for stage in ("finetune", "init")}
STEPS = 12  # updates of every stage: 2 epochs of 6, the last of each not full


class Finished:
    """A run of all seven stages: its folder, what it printed, how often each objective was traced."""

    def __init__(self, folder: Path, out: str, traces: dict[str, int]) -> None:
        self.folder, self.out, self.traces = folder, out, traces
        self.work, self.results = folder / "work", tiny_runs.read_results(folder)

    def model(self, stage: str) -> TRBert:
        return TRBert.from_pretrained(self.work / stage / "model")


pytestmark = pytest.mark.slow  # trains all stages, several times


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder, traces, out = tmp_path_factory.mktemp("all"), Counter[str](), io.StringIO()

    def counting(stage: Stage) -> Stage:
        def objective(update: stage_objectives.Update) -> Any:
            traces[stage.name] += 1
            return stage.objective(update) if stage.objective else None

        return dataclasses.replace(stage, objective=objective)

    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(out):
        for name in TRAINED:
            monkeypatch.setitem(stages.STAGES, name, counting(stages.STAGES[name]))
        tiny_runs.train(tiny_runs.write_config(folder, **MASKED))
    return Finished(folder, out.getvalue(), dict(traces))


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Path:
    """The finished run moved elsewhere; returns its configuration."""
    shutil.copytree(finished.folder, tmp_path / "run")
    return tiny_runs.write_config(tmp_path / "run", data={"path": str(finished.folder / "data")}, **MASKED)


def test_results(finished: Finished) -> None:
    results = finished.results
    assert set(results) == {
        *("split", "rule", "backend", "dense", "policy", "reduced", "baselines", "thresholds"),
        *("stages", "config", "seed", "versions", "machine"),
    }
    reduced = results["reduced"]
    assert [results[name]["examples"] for name in ("dense", "policy", "reduced")] == [NUM_TEST] * 3
    assert reduced["flops_speedup"] >= 1
    assert len(reduced["kept"]) == 2
    assert list(results["stages"]) == tiny_runs.STAGES
    assert all(stage["seconds"] > 0 for stage in results["stages"].values())
    assert results["seed"] == results["config"]["seed"] == 3
    assert results["config"]["policy"]["num_samples"] == 2
    assert results["versions"]["jax"] == jax.__version__
    assert "not installed" not in results["versions"].values()
    assert results["machine"]["cpus"] >= 1
    assert set(results["baselines"]) == {"random", "first_k"}
    for baseline in results["baselines"].values():
        assert (baseline["kept"], baseline["flops"]) == (reduced["kept"], reduced["flops"])
    assert results["thresholds"]["0.3"]["flops"] > reduced["flops"]
    assert tiny_runs.without_times(results["thresholds"]["0.5"]) == tiny_runs.without_times(reduced)


@pytest.mark.parametrize(
    ("name", "stage"), [("dense", "finetune"), ("policy", "policy"), ("reduced", "joint")]
)
def test_numbers_follow_from_the_predictions(finished: Finished, name: str, stage: str) -> None:
    result, work = finished.results[name], finished.work
    lines = tiny_runs.read_lines(work / "evaluate" / f"predictions_{stage}.jsonl")
    lengths = [line["num_tokens"] for line in lines]
    shape = flops.EncoderShape.of(finished.model("joint").config)
    dense = flops.dense_flops(shape, lengths).mean()
    assert result["accuracy"] == np.mean([line["prediction"] == line["label"] for line in lines])
    assert result["tokens"] == pytest.approx(np.mean(lengths))
    if name == "dense":
        assert result["flops"] == pytest.approx(dense)
        assert [line["kept"] for line in lines] == [[]] * NUM_TEST
        return
    kept = [[len(stage) for stage in line["kept"]] for line in lines]
    assert result["kept"] == pytest.approx(np.mean(kept, axis=0).tolist())
    assert result["flops"] == pytest.approx(flops.reduced_flops(shape, lengths, kept).mean())
    assert result["flops_exact"] == pytest.approx(flops.exact_flops(shape, lengths, kept).mean())
    assert result["flops_speedup"] == pytest.approx(dense / result["flops"])


def test_the_model_is_ready_for_use(finished: Finished) -> None:
    """It predicts what predictions.jsonl holds, and `trbert evaluate` finds the same numbers."""
    lines = tiny_runs.read_lines(finished.work / "predictions.jsonl")
    model = TRBert.from_pretrained(finished.work / "model")
    assert model.default_rule == "threshold"
    for line, prediction in zip(lines, model.predict(texts(finished, "test")), strict=True):
        assert (line["prediction"], line["num_tokens"]) == (prediction.label, prediction.num_tokens)
        assert line["kept"] == [stage.tolist() for stage in prediction.kept]
        np.testing.assert_allclose(list(line["scores"].values()), prediction.scores, atol=1e-5)

    target = finished.folder / "evaluate.json"
    arguments = ("--model", finished.work / "model", "--data", finished.folder / "data/test.jsonl")
    assert main(["evaluate", *map(str, arguments), "--json", str(target)]) == 0
    evaluated, reduced = json.loads(target.read_text(encoding="utf-8")), finished.results["reduced"]
    for name in ("accuracy", "kept", "flops", "flops_speedup"):
        assert evaluated[name] == pytest.approx(reduced[name])


def texts(finished: Finished, split: str) -> list[str]:
    examples = DATASETS["imdb"].read_file(finished.folder / "data" / f"{split}.jsonl")
    return [example.text for example in examples]


@pytest.mark.parametrize("stage", TRAINED)
def test_metrics(finished: Finished, stage: str) -> None:
    rows = read_metrics(finished.work / stage / "metrics.jsonl")
    trained = [row for row in rows if "loss" in row]
    evaluated = [row for row in rows if "dev_accuracy" in row]
    assert [row["step"] for row in trained] == [1, 10, STEPS]
    assert [row["step"] for row in evaluated] == [6, STEPS]
    kept = {"kept_tokens_0", "kept_tokens_1"}
    expected = {"step", "loss", "gradient_norm", "learning_rate"}
    if stage == "finetune":
        expected |= {"accuracy"}
    if stage in ("policy", "joint"):
        expected |= {"task_loss", "policy_loss", "reward", "kept_ratio"} | kept
    assert all(set(row) == expected and row["gradient_norm"] > 0 for row in trained)
    # One step of warm-up, which has rate 0, then down to 0.
    rates = [row["learning_rate"] for row in trained]
    np.testing.assert_allclose(rates, [0, 3e-3 / 11, 1e-3 / 11], rtol=1e-5)
    counts = set() if stage == "finetune" else {f"dev_{k}" for k in kept}
    assert all(set(row) == {"step", "dev_accuracy", "dev_macro_f1"} | counts for row in evaluated)
    assert any((finished.work / stage / "tensorboard").iterdir())


def test_each_stage_trains_its_own(finished: Finished) -> None:
    weights = {s: load_file(finished.work / s / "model" / "model.safetensors") for s in TRAINED}
    selectors = {name for name in weights["joint"] if name not in weights["finetune"]}
    assert selectors
    changed = {
        stage: {k for k, x in weights[before].items() if not np.array_equal(weights[stage][k], x)}
        for before, stage in [("finetune", "init"), ("init", "policy"), ("policy", "joint")]
    }
    assert changed["init"] == set()
    assert changed["policy"] <= selectors
    assert len(changed["policy"]) >= len(selectors) / 2
    assert changed["joint"] > {name for name in weights["finetune"] if "token_type" not in name}


def test_scores_and_teacher_logits(finished: Finished) -> None:
    model = finished.model("finetune")
    predictions = model.predict(texts(finished, "train"), rule="dense")
    logits = np.load(finished.work / "teacher" / "logits.npy")
    np.testing.assert_allclose(jax.nn.softmax(logits), [p.scores for p in predictions], atol=1e-5)
    scores = np.load(finished.work / "score" / "scores.npy")
    assert scores.shape == (NUM_TRAIN, 2, tiny_runs.MAX_LENGTH)
    real = np.arange(tiny_runs.MAX_LENGTH) < np.array([p.num_tokens for p in predictions])[:, None, None]
    assert (scores[~np.broadcast_to(real, scores.shape)] == 0).all()
    assert (scores >= 0).all()
    assert (np.where(real, scores, 0).sum(-1) > 0).all()


def test_curves_table_and_compilation(finished: Finished) -> None:
    """Batches that are not full, epochs and evaluations change no shape: a step is compiled once."""
    assert finished.traces == dict.fromkeys(TRAINED, 1)
    for name in ("curves.png", "confusion.png"):
        assert (finished.work / name).read_bytes().startswith(b"\x89PNG")
    page = (finished.work / "report.html").read_text(encoding="utf-8")
    assert [
        word
        for word in ("random tokens", "data:image/png", "joint", "learning_rate", "jaxlib")
        if word not in page
    ] == []
    assert page.count('class="example"') == 5
    marked = "".join(re.findall('<span class="k">(.*?)</span>', page.split('class="example"')[1]))
    (first,) = finished.model("joint").predict(texts(finished, "test")[:1])
    assert marked == "".join(
        first.tokens[i] for i in first.kept[-1] if first.tokens[i] not in ("[CLS]", "[SEP]")
    )
    words = ["dense", "after policy", "reduced", "random tokens", "first_k tokens", "seconds a stage"]
    words += ["reduced: macro F1", "precision", "predicted"]
    for word in [
        *words,
        *map(str, (finished.work / name for name in ("results.json", "report.html", "model"))),
    ]:
        assert word in finished.out
    assert [path for path in finished.work.rglob("*") if ".partial-" in path.name] == []


def test_finished_stages_are_skipped(
    copy: Path, finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (copy.parent / "work" / "joint" / "done.json").stat().st_mtime_ns
    assert tiny_runs.without_times(tiny_runs.train(copy)) == tiny_runs.without_times(finished.results)
    out = capsys.readouterr().err
    assert [line.split(":")[0] for line in out.splitlines() if "skipped" in line] == tiny_runs.STAGES
    assert (copy.parent / "work" / "joint" / "done.json").stat().st_mtime_ns == before


FRONTIER = ("evaluate.frontier=true", "evaluate.speedups=[1.5]", "evaluate.points_lost=[100]")


def test_evaluation_settings_may_change(copy: Path, finished: Finished) -> None:
    changes = ("evaluate.thresholds=[0.6, [0.3, 0.6]]", "evaluate.batch_size=5", *FRONTIER)
    results = tiny_runs.train(copy, *changes)
    assert list(results["thresholds"]) == ["0.6", "0.3,0.6"]
    both, second = (results["thresholds"][name]["kept"] for name in ("0.6", "0.3,0.6"))
    assert second[0] > both[0]
    targets = [row["target"] for row in results["frontier"]]
    assert 1.5 in targets
    assert targets == [*SPEEDUPS[: len(targets)]]
    assert all({"accuracy", "flips"} <= set(row) for row in results["frontier"])
    assert {"random", "first_k"} <= set(results["frontier"][targets.index(1.5)])
    model = TRBert.from_pretrained(copy.parent / "work" / "model")
    assert to_dict(model.config.operating_points).keys() == {"1.5x", "within_100"}
    assert (copy.parent / "work" / "frontier.png").is_file()
    row = next(row for row in results["frontier"] if row["target"] == 1.5)
    texts = [record["text"] for record in tiny_runs.records(NUM_TEST, 2)]
    kept = [prediction.kept[0] for prediction in model.predict(texts, operating_point="1.5x")]
    assert np.mean([*map(len, kept)]) == pytest.approx(row["kept"][0])
    for name in ("dense", "policy", "reduced"):
        assert results[name]["accuracy"] == finished.results[name]["accuracy"]
        assert results[name]["flops"] == pytest.approx(finished.results[name]["flops"])


def test_thresholds_that_the_model_cannot_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Are refused before the training."""
    command = ["train", "--config", str(tiny_runs.write_config(tmp_path)), "--stages", "finetune"]
    assert main([*command, "evaluate.thresholds=[[0.3, 0.4, 0.5]]"]) == 2
    assert "evaluate.thresholds is (0.3, 0.4, 0.5); expected 1 or 2" in capsys.readouterr().err


def test_some_stages(copy: Path, finished: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("evaluate", "model", "teacher"):
        shutil.rmtree(copy.parent / "work" / name)
    results = tiny_runs.train(copy, "--stages", "evaluate,teacher")
    assert tiny_runs.without_times(results) == tiny_runs.without_times(finished.results)
    out = capsys.readouterr().err
    assert next(line for line in out.splitlines() if "starting" in line).startswith("teacher:")
    assert "skipped" not in out
    assert TRBert.from_pretrained(copy.parent / "work" / "model").config.labels == ("negative", "positive")


def test_all_checkpoints(copy: Path, finished: Finished) -> None:
    target = copy.parent / "checkpoints.json"
    assert main(["evaluate", "--config", str(copy), "--all-checkpoints", "--json", str(target)]) == 0
    found = json.loads(target.read_text(encoding="utf-8"))
    assert list(found) == TRAINED
    for stage, entry in found.items():
        folder = finished.work / stage / "checkpoints"
        kept = {int(path.name.removeprefix("step_")) for path in folder.glob("step_*")}
        assert set(entry) == {"best", "last", *(f"step_{step}" for step in kept)}
        done = json.loads((finished.work / stage / "done.json").read_text(encoding="utf-8"))
        assert entry["best"] == done["best_step"]
        assert entry["last"] == STEPS
        assert len(kept) >= 2
    # The last ones are those that the run went on with.
    for stage, name in (("finetune", "dense"), ("policy", "policy"), ("joint", "reduced")):
        last, used = found[stage][f"step_{STEPS}"], finished.results[name]
        assert tiny_runs.without_times(last) == tiny_runs.without_times(used)

"""Runs of other shapes: DistilBERT, fewer stages, a start from a saved model, the best checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_runs
from safetensors.numpy import load_file

from trbert_jax import TRBert
from trbert_jax.training import loop

SHALLOW = {**tiny_runs.SCRATCH, "model_type": "distilbert", "num_layers": 3}
TRAINING = {"batch_size": 16, "epochs": 1, "backend": "masked"}  # packed takes long to compile
pytestmark = pytest.mark.slow  # each compiles a run of its own


def weights(folder: Path, name: str) -> dict[str, np.ndarray]:
    return load_file(folder / "work" / name / "model.safetensors")


def train(folder: Path, **changes: Any) -> dict[str, Any]:
    return tiny_runs.train(tiny_runs.write_config(folder, **changes))


def test_dense_run_that_takes_the_best_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 3-layer DistilBERT; on dev it is best after the second of four updates."""
    accuracy = iter([0.5, 0.75, 0.75, 0.625])
    seen: list[np.ndarray] = []

    def evaluate(training: loop.Training, params: Any) -> dict[str, float]:
        seen.append(np.asarray(params["head"]["classifier"]["kernel"]))
        return {"accuracy": next(accuracy)}

    monkeypatch.setattr(loop.Training, "evaluate", evaluate)
    every = {**TRAINING, "max_steps": 4, "eval_steps": 1, "save_steps": 1}
    results = train(
        tmp_path,
        stages=["finetune", "evaluate"],
        model={"scratch": SHALLOW},
        finetune={**every, "output": "best", "keep_checkpoints": 1},
    )
    done = json.loads((tmp_path / "work" / "finetune" / "done.json").read_text(encoding="utf-8"))
    assert (done["steps"], done["best_step"], done["output_step"]) == (4, 2, 2)
    kept = sorted(path.name for path in (tmp_path / "work" / "finetune" / "checkpoints").glob("step_*"))
    assert kept == ["step_00000002", "step_00000004"]
    best = weights(tmp_path, "finetune/model")["classifier.weight"].T
    np.testing.assert_array_equal(best, seen[1])
    assert (best != seen[3]).any()

    assert not results.keys() & {"reduced", "baselines"}
    assert not results["dense"].keys() & {"kept", "flops_speedup"}
    model = TRBert.from_pretrained(tmp_path / "work" / "model")
    assert (model.config.model_type, model.config.num_layers) == ("distilbert", 3)
    assert model.default_rule == "dense"
    lines = tiny_runs.read_lines(tmp_path / "work" / "predictions.jsonl")
    assert [line["prediction"] for line in lines] == [p.label for p in model.predict(texts_of(tmp_path))]


def test_one_point_of_reduction_without_joint(tmp_path: Path) -> None:
    """A 3-layer DistilBERT through score and policy: the policy's model is the run's."""
    results = train(
        tmp_path,
        stages=["finetune", "score", "policy", "evaluate"],
        model={"scratch": SHALLOW, "line_breaks_as_spaces": True},
        finetune=TRAINING,
        policy={**TRAINING, "accumulation_steps": 2, "output": "best"},
    )
    assert "policy" not in results
    assert len(results["reduced"]["kept"]) == 1
    assert results["baselines"]["random"]["kept"] == results["reduced"]["kept"]
    scores = np.load(tmp_path / "work" / "score" / "scores.npy")
    assert scores.shape[:2] == (tiny_runs.SIZES["train"], 2)
    model = TRBert.from_pretrained(tmp_path / "work" / "model")
    lines = tiny_runs.read_lines(tmp_path / "work" / "predictions.jsonl")
    for line, prediction in zip(lines, model.predict(texts_of(tmp_path)), strict=True):
        assert line["kept"] == [prediction.kept[0].tolist()]
    # The model reads new texts as it was trained to.
    text = texts_of(tmp_path)[0]
    broken = model.predict([text.replace(" ", "<br /><br />"), text])
    np.testing.assert_array_equal(broken[0].input_ids, broken[1].input_ids)
    before, after = weights(tmp_path, "finetune/model"), weights(tmp_path, "model")
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_a_run_may_end_with_init(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And start from a saved model, with layers left out."""
    tiny_models.tiny_model(tmp_path / "start", tiny_models.DISTILBERT)
    results = train(
        tmp_path,
        stages=["finetune", "score", "init", "evaluate"],
        model={"init": str(tmp_path / "start"), "keep_layers": [0, 2, 4]},
        finetune=TRAINING,
        init={**TRAINING, "keep": [0.7]},
    )
    # Two models, two baselines, two thresholds; 17 texts in batches of 8.
    assert "evaluate: step 18/18" in capsys.readouterr().err
    assert len(results["reduced"]["kept"]) == 1
    assert len(tiny_runs.read_lines(tmp_path / "work" / "predictions.jsonl")) == tiny_runs.SIZES["test"]
    start, after = load_file(tmp_path / "start" / "model.safetensors"), weights(tmp_path, "finetune/model")
    place = "distilbert.transformer.layer.{}.attention.q_lin.weight"
    assert place.format(3) not in after
    for layer, source in enumerate((0, 2, 4)):
        near = np.abs(after[place.format(layer)] - start[place.format(source)]).max()
        assert 0 < near < 0.02


def texts_of(folder: Path) -> list[str]:
    return [record["text"] for record in tiny_runs.read_lines(folder / "data" / "test.jsonl")]

"""The page of a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_runs
from tiny_browser import SCREENS, accessible_tab, browser, violations

from trbert_jax import TRBert
from trbert_jax.cli import main
from trbert_jax.config import load_config, to_dict
from trbert_jax.training.report import report

__all__ = ["browser"]  # a fixture

SUMMARY = {"accuracy": 0.75, "tokens": 9.0, "flops": 2e6, "flops_speedup": 2.0, "kept": [5.0, 3.0]}
CLASSES = {"0": {"precision": 0.5, "recall": 1.0, "f1": 0.667, "examples": 9}}
RESULTS = {
    "split": "test",
    "dense": {**SUMMARY, "flops_speedup": 1.0, "kept": []},
    "reduced": {**SUMMARY, "classes": CLASSES},
    "baselines": {"random": {**SUMMARY, "accuracy": None}},
    "stages": {"finetune": {"steps": 12, "seconds": 3.25}, "evaluate": {"seconds": 0.5}},
    "data": {"test": {"num_truncated": 3}},
    "versions": {"jax": "0.10"},
    "machine": {"devices": ["cpu", "<b>cpu</b>"]},
}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A run's folder: settings, results, and the predictions of a model for its first texts."""
    folder = tmp_path / "work"
    config = to_dict(load_config(tiny_runs.write_config(tmp_path)))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    model = TRBert.from_pretrained(tiny_models.tiny_model(folder / "model"))
    texts = [record["text"] for record in tiny_runs.read_lines(tmp_path / "data" / "test.jsonl")]
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as stream:
        for p in TRBert(model.config, model.params, model.tokenizer).predict(texts):
            if p.num_tokens <= tiny_runs.MAX_LENGTH:
                kept = [positions.tolist() for positions in p.kept]
                line = {"prediction": p.label, "label": "positive", "kept": kept, "num_tokens": p.num_tokens}
                stream.write(json.dumps(line) + "\n")
    return folder


def test_the_command(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--workdir", str(work)]) == 0
    assert "report.html" in capsys.readouterr().out
    html = (work / "report.html").read_text(encoding="utf-8")
    for word in (
        "Run work",
        "75.0 %",
        "5.0 → 3.0",
        "2.00×",
        "random tokens",
        "3.2",
        "num_layers: 4",
        "truncated 3",
    ):
        assert word in html
    assert "<b>cpu" not in html.split('<script type="application/json"')[0]
    for name in ("results.json", "config.json"):
        (work / name).rename(work / "gone")
        assert main(["report", "--workdir", str(work)]) == 2
        assert f"{name}: does not exist" in capsys.readouterr().err
        (work / "gone").rename(work / name)
    (work / "results.json").write_text("[]", encoding="utf-8")
    assert main(["report", "--workdir", str(work)]) == 2
    assert "results.json" in capsys.readouterr().err


@pytest.mark.browser
@SCREENS
def test_everyone_can_read_it(browser: Any, work: Path, scheme: str, width: int) -> None:
    assert violations(accessible_tab(browser, report(work), work / "report.html", scheme, width)) == []

"""Promises: exact tests, their level, and the points that calibrate stores."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import tiny_runs

from trbert_jax.cli import main
from trbert_jax.inference.promise import disagreement_p_value, drop_p_value, last_kept, texts_needed

LEVEL = 0.05


def test_binomial_test() -> None:
    differ = np.arange(40) < 3
    exact = sum(math.comb(40, k) * 0.2**k * 0.8 ** (40 - k) for k in range(4))
    assert disagreement_p_value(differ, 0.2) == pytest.approx(exact)
    # None of 299 texts differs: the fewest that show 1 % with 95 %.
    p_values = [disagreement_p_value(np.zeros(n, bool), 0.01) for n in (298, 299)]
    assert p_values[1] <= LEVEL < p_values[0]
    assert texts_needed(0, 0.01, LEVEL) == 299
    assert texts_needed(0.02, 0.01, LEVEL) is None


def test_betting_test_has_its_level() -> None:
    """Of runs whose true drop is the bound, few are called smaller; of runs without a drop, most."""
    rng, n, lost = np.random.default_rng(0), 2000, 0.02

    def rejected(drop: float, most: float) -> float:
        draws = rng.random((400, n))
        runs = np.where(draws < lost + drop, 1, np.where(draws < 2 * lost + drop, -1, 0))
        return float(np.mean([drop_p_value(run, most, LEVEL) <= LEVEL for run in runs]))

    # Three standard deviations of a share of 5 % in 400 runs.
    assert rejected(0.01, 0.01) <= LEVEL + 3 * (LEVEL * (1 - LEVEL) / 400) ** 0.5
    assert rejected(0, 0.03) > 0.9


def test_the_first_failure_ends() -> None:
    assert last_kept([0.01, 0.05, 0.06, 0.0], LEVEL) == 1
    assert last_kept([0.06, 0.0], LEVEL) is None


def test_calibrate_stores_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tiny_models.tiny_model(tmp_path / "model"), tmp_path / "dev.jsonl"
    lines = (json.dumps(record) + "\n" for record in tiny_runs.records(60, seed=7))
    data.write_text("".join(lines), encoding="utf-8")
    command = ["calibrate", "--model", str(model), "--data", str(data)]
    before = (model / "config.json").read_bytes()
    assert main([*command, "--max-disagreement", "0.1%"]) == 2
    assert "no thresholds keep at most 0.1 % with confidence 95 %" in capsys.readouterr().err
    assert (model / "config.json").read_bytes() == before
    assert main([*command, "--max-disagreement", "60%", "--confidence", "90%"]) == 0
    assert "agrees_40" in capsys.readouterr().out
    points = json.loads((model / "config.json").read_text())["trbert"]["operating_points"]
    promise = points["agrees_40"].pop("promise")
    assert promise["found"] <= promise["most"] == 0.6
    assert (promise["kind"], promise["confidence"]) == ("disagreement", 0.9)
    assert points["agrees_40"]["examples"] == 30
    assert main(["predict", "--model", str(model), "--operating-point", "agrees_40", "a good film"]) == 0
    for wrong in ("--max-disagreement 1% --max-drop 1", "--max-drop 0", "--confidence 2"):
        assert main([*command, *wrong.split()]) == 2


def test_calibrate_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tiny_models.tiny_model(tmp_path / "model"), tmp_path / "texts.jsonl"
    lines = (json.dumps({"text": record["text"]}) + "\n" for record in tiny_runs.records(60, seed=7))
    data.write_text("".join(lines), encoding="utf-8")
    command = ["calibrate", "--model", str(model), "--data", str(data), "--speedups", "1.3"]
    assert main([*command, "--max-drop", "5"]) == 2
    assert "need" in capsys.readouterr().err
    assert main([*command, "--max-disagreement", "60%"]) == 0
    points = json.loads((model / "config.json").read_text())["trbert"]["operating_points"]
    assert [*points] == ["1.3x", "agrees_40"]
    assert all(point["metric"] == "agreement" for point in points.values())
    promised = points["agrees_40"]
    assert promised["value"] == pytest.approx(1 - promised["promise"]["found"])
    assert promised["dense"] == 1

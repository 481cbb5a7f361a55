"""Sweeps over one setting."""

import csv
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

from trbert_jax.cli import main

CHANGES: dict[str, Any] = {
    "stages": ["finetune", "score", "policy", "teacher", "joint", "evaluate"],
    **{name: {"backend": "masked", "epochs": 1} for name in ("finetune", "policy", "joint")},
    "evaluate": {"thresholds": [], "frontier": True, "speedups": [1.5], "points_lost": []},
}


@pytest.mark.slow
def test_runs_share_what_they_can_and_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_runs.write_config(tmp_path, **CHANGES)
    command = ["sweep", "--config", str(config), "--alphas", "0.1,2"]
    assert main(command) == 0
    out, log = capsys.readouterr()
    work = tmp_path / "work"
    with (work / "sweep.csv").open(encoding="utf-8") as stream:
        rows = [*csv.DictReader(stream)]
    assert [row["run"] for row in rows if row["thresholds"] == "trained"] == ["alpha_0.1", "alpha_2"]
    assert "1.5x" in [row["thresholds"] for row in rows]
    assert all(float(row["speedup"]) >= 1 and 0 <= float(row["score"]) <= 1 for row in rows)
    assert all(float(row["faster"]) > 0 for row in rows if row["thresholds"] == "trained")
    assert (work / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "alpha_0.1" in out
    # The stages that alpha does not concern have run once.
    assert sorted(path.name for path in (work / "shared").iterdir() if (path / "done.json").exists()) == [
        "finetune",
        "score",
        "teacher",
    ]
    assert [log.count(f"{stage}: starting") for stage in ("finetune", "teacher", "policy", "joint")] == [
        1,
        1,
        2,
        2,
    ]
    weights = [work / name / "finetune" / "model" / "model.safetensors" for name in ("shared", "alpha_2")]
    assert weights[0].samefile(weights[1])
    before = (work / "sweep.csv").read_text(encoding="utf-8")
    assert main(command) == 0
    assert "starting" not in capsys.readouterr().err
    assert (work / "sweep.csv").read_text(encoding="utf-8") == before


def test_bad_sweeps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(tiny_runs.write_config(tmp_path, **CHANGES))
    dense = "stages=[finetune,evaluate]"
    for arguments, reason in (
        ([], "one of --targets and --alphas"),
        (["--targets", "2", "--alphas", "1"], "one of --targets and --alphas"),
        (["--targets", "0.5"], "expected a number above 1"),
        (["--targets", "1.5,9"], "policy.target_speedup: out of reach"),
        (["--alphas", "1,1.0"], "alpha: a value occurs twice in 1, 1"),
        (["--targets", "2", dense], "stages: has none of policy, joint"),
        (["--targets", "2", "stages=[finetune,score,policy]"], "add evaluate"),
    ):
        assert main(["sweep", "--config", config, *arguments]) == 2
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "work").exists()

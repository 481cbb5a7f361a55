"""The scripts in benchmarks/ run, each in a process of its own, on models too small to say anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
TINY = ["--size", "tiny", "--max-length", "32", "--batch-size", "2", "--repeats", "1"]


def run(script: str, *arguments: str, target: Path) -> Any:
    command = [sys.executable, f"benchmarks/{script}.py", *arguments, "--json", str(target)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=ROOT, check=True, env=environment, capture_output=True)
    return json.loads(target.read_text(encoding="utf-8"))


def test_token_cost(tmp_path: Path) -> None:
    options = [*TINY, "--texts", "4"]
    result = run("token_cost", *options, "--plot", str(tmp_path / "p.png"), target=tmp_path / "r.json")
    kept = [point["kept_tokens"] for point in result["points"]]
    assert len(kept) == 10
    assert kept == sorted(kept)
    assert kept[-1] == result["tokens"]
    assert result["embeddings_and_layer_0_seconds"] > 0
    assert result["r_squared"] <= 1
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_compile_time(tmp_path: Path) -> None:
    options = ["--sizes", "tiny", "--max-length", "32", "--batch-size", "2", "--repeats", "1"]
    programs = run("compile_time", *options, target=tmp_path / "r.json")["programs"]
    names = [record["program"] for record in programs]
    assert names == [f"threshold, packed, {rows} x 32 tokens" for rows in (1, 2)]
    assert all(record["compiled_seconds"] > record["read_seconds"] for record in programs)


def test_training_steps(tmp_path: Path) -> None:
    steps = run("training_steps", *TINY, target=tmp_path / "r.json")["steps"]
    assert [(step["stage"], step["backend"]) for step in steps] == [
        (stage, backend) for stage in ("finetune", "policy", "joint") for backend in ("packed", "masked")
    ]
    for packed, masked in zip(steps[::2], steps[1::2], strict=True):
        assert packed["model_flops_per_step"] == masked["model_flops_per_step"] > 0
        assert masked["faster"] == 1
        # Dropout has masks of its own, but the loss is that of the same examples.
        assert packed["loss"] == pytest.approx(masked["loss"], abs=0.2 if packed["dropout"] else 1e-5)


def test_accelerator(tmp_path: Path) -> None:
    result = run("accelerator", "--tiny", target=tmp_path / "r.json")
    assert result["finished"]
    assert result["left_out"] == []
    assert [check["ok"] for check in result["checks"]] == [True] * 3
    variants = [record["variant"] for record in result["inference"]]
    assert variants == ["packed", "masked_full", "batch_max", "dense", "dense_full"]
    assert {record["dtype"] for record in result["inference"] + result["training"]} == {"bfloat16"}
    trained = [(r["backend"], r["strategy"]) for r in result["training"]]
    assert trained == [("packed", "jit"), ("masked", "jit"), ("packed", "pmap")]
    assert result["machine"]["peak_tflops"] is None


def test_accelerator_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    result = run("accelerator", "--tiny", "--minutes", "0", target=tmp_path / "r.json")
    assert result["finished"]
    assert len(result["left_out"]) == 3
    assert result["checks"] == result["inference"] == result["training"] == []


def test_soak(tmp_path: Path) -> None:
    """A signal of either kind."""
    options = ["--kills", "1", "--terms", "1", "--steps", "20"]
    result = run("soak", *options, target=tmp_path / "r.json")
    assert result["identical"]
    assert (result["sigkill"], result["sigterm"]) == (1, 1)
    assert result["compared_files"] >= 14
    assert len(result["endings"]) == 2
    assert {ending["when"] for ending in result["endings"]} <= {"within", "after"}
    assert set(result["stages_hit"]) == {ending["stage"] for ending in result["endings"]} | set(
        result["seconds_a_stage"]
    )
    assert max(result["stages_hit"].values()) <= 2, "of a stage before another had one"


def test_scaling(tmp_path: Path) -> None:
    result = run("scaling", target=tmp_path / "r.json")
    assert len(result["records"]) == 3 * 2 * 3
    measured = result["measured"]
    for stage, update in measured["update_seconds"].items():
        assert 0 < update < measured["seconds_per_step"][stage]
    for record in result["records"]:
        assert 0 < record["efficiency"] < 1
        assert record["input_seconds"] >= 0
    by_devices = [r["efficiency"] for r in result["records"] if (r["stage"], r["passes"]) == ("joint", 4)]
    assert by_devices == sorted(by_devices, reverse=True)

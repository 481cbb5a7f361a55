"""The scripts in benchmarks/ run, each in a process of its own, on models too small to say anything."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import tiny_processes
import tiny_runs

from trbert_jax import TRBert

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
TINY = ["--size", "tiny", "--max-length", "32", "--batch-size", "2", "--repeats", "1"]


def start(script: str, *arguments: str) -> None:
    command = [sys.executable, f"benchmarks/{script}.py", *arguments]
    environment = tiny_processes.environment(PYTHONPATH=str(ROOT))
    subprocess.run(command, cwd=ROOT, check=True, env=environment, capture_output=True)


def run(script: str, *arguments: str, target: Path, flag: str = "--json") -> Any:
    start(script, *arguments, flag, str(target))
    return json.loads(target.read_text(encoding="utf-8"))


def test_token_cost(tmp_path: Path) -> None:
    options = [*TINY, "--texts", "4", "--plot", str(tmp_path / "p.png")]
    result = run("token_cost", *options, target=tmp_path / "r.json")
    kept = [point["kept_tokens"] for point in result["points"]]
    assert kept == sorted(kept)
    assert (len(kept), kept[-1]) == (10, result["tokens"])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_compile_time(tmp_path: Path) -> None:
    programs = run("compile_time", "--sizes", *TINY[1:], target=tmp_path / "r.json")["programs"]
    names = [record["program"] for record in programs]
    assert names == [f"threshold, packed, {rows} x 32 tokens" for rows in (1, 2)]
    assert all(record["compiled_seconds"] > record["read_seconds"] for record in programs)


def test_training_steps(tmp_path: Path) -> None:
    steps = run("training_steps", *TINY, "--stages", "finetune,policy", target=tmp_path / "r.json")["steps"]
    steps = [step for step in steps if step["backend"] != "huggingface"]  # where PyTorch is installed
    assert [(step["stage"], step["backend"]) for step in steps] == [
        (stage, backend) for stage in ("finetune", "policy") for backend in ("packed", "masked")
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
    assert {record["dtype"] for record in result["inference"] + result["training"]} == {"bfloat16"}
    assert (len(result["inference"]), len(result["training"])) == (5, 3)


def test_soak(tmp_path: Path) -> None:
    """Runs that SIGKILL and SIGTERM end, each in some stage, end with the bits of an undisturbed one."""
    result = run("soak", "--kills", "1", "--terms", "1", "--steps", "20", target=tmp_path / "r.json")
    assert result["identical"]
    assert (result["sigkill"], result["sigterm"]) == (1, 1)
    assert result["compared_files"] >= 14
    assert len(result["endings"]) == 2


def test_scaling(tmp_path: Path) -> None:
    result = run("scaling", target=tmp_path / "r.json")
    assert len(result["records"]) == 3 * 2 * 3
    assert all(0 < record["efficiency"] < 1 for record in result["records"])


def test_diagnose(tmp_path: Path) -> None:
    """All selections at the model's counts, on both encoders; the model's own have recall 1."""
    dense, model = (tiny_models.tiny_model(tmp_path / str(seed), seed=seed) for seed in (1, tiny_models.SEED))
    lines = (json.dumps(record) + "\n" for record in tiny_runs.records(24, seed=7))
    (tmp_path / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    files = ["--dense", str(dense), "--model", str(model), "--data", str(tmp_path / "data.jsonl")]
    options = ["--signal-texts", "4", "--signal-seeds", "2", "--speedups", "1.5", "--batch-size", "8"]
    result = run("diagnose", *files, *options, target=tmp_path / "r.json")
    kinds = ["residual", "gate", "attention", "learned", "random", "first_k"]
    records = result["selection"]
    assert [r["selection"] for r in records] == kinds * 4
    assert {(r["point"], r["encoder"]) for r in records} == {
        (point, encoder) for point in ("0.5", "1.5x") for encoder in ("dense", "reducing")
    }
    for first in range(0, len(records), 6):
        assert len({tuple(r["kept"]) for r in records[first : first + 6]}) == 1
    assert all(r["recall"] == [1, 1] for r in records if r["selection"] == "learned")
    own = TRBert.from_pretrained(model)
    texts = [record["text"] for record in tiny_runs.records(24, seed=7)]
    found = [prediction.label for prediction in own.predict(texts)]
    other = [prediction.label for prediction in TRBert.from_pretrained(dense).predict(texts, rule="dense")]
    assert records[9]["flips"] == sum(a != b for a, b in zip(found, other, strict=True)) / 24
    matched = result["sampling"]["same counts"]["kept"]
    assert matched == pytest.approx(result["sampling"]["sampled"]["kept"], abs=0.1)
    assert all(sum(p["histogram"]) == pytest.approx(1) for p in result["sampling"]["keep_probability"])
    assert {"reward, K=8", "reward, K=2", "gate, K=2", "secant, K=2"} < result["signal"].keys()


def test_learned(tmp_path: Path) -> None:
    """A recipe, a change of it that learns nothing, and its dense student, each with its numbers."""
    work, data = tmp_path / "work", tmp_path / "data"
    stages = ["finetune", "score", "init", "teacher", "joint"]
    config = tiny_runs.write_config(
        tmp_path, stages=stages, finetune={"max_examples": 30}, score={"kind": "gate"}
    )
    tiny_runs.train(config)
    changes = ["stages=[finetune,teacher,distill]", "distill.max_steps=2"]
    start("distilled_dense", "train", "--config", str(config), *changes, f"workdir={tmp_path / 'student'}")
    options = ["--dev", str(data / "train.jsonl"), "--test", str(data / "test.jsonl"), "--speedups=1.2,1.5"]
    learned = ["learned", "--run", str(work), *options, "--command", f"trbert train --config {config}"]
    result = run(*learned, target=tmp_path / "r.json")
    run(*learned, "--time", "--timed=4", "--repeats=1", "--batch-sizes=1,4", target=tmp_path / "r.json")
    run("learned", "--distilled", str(tmp_path / "student"), *options[2:4], target=tmp_path / "r.json")
    rows = run("learned", target=tmp_path / "summary.json", flag="--summary")
    for target, row, point in zip((1.2, 1.5), rows, result["points"], strict=True):
        assert [row[x] for x in ("labels", "seed", "test_examples", "target")] == [30, 3, 17, target]
        found = [100 * x["accuracy"] for x in (result["dense"], point["random"])]
        assert [row["dense"], row["random"]] == pytest.approx(found, abs=0.01)
        assert row["flops_ratio"] == pytest.approx(target, rel=0.3)
        assert min(row["time_ratio_batch_1"], row["time_ratio_batch_4"]) > 0
        assert 0 <= row["distilled_dense"] <= 100
    variants = ["--set", "joint.max_steps=2", "--variant", "still", "joint.learning_rate=1e-12"]
    folders = ["--base", str(work), "--config", str(config), "--work", str(tmp_path / "variants")]
    result = run("ablate", *folders, *options, *variants, target=tmp_path / "ablations.json")
    for point in result["variants"]["recipe"]["points"]:
        assert (point["difference"], point["standard_error"]) == (0, 0)
    for one, other in zip(*(result["variants"][x]["points"] for x in ("still", "recipe")), strict=True):
        assert one["difference"] == pytest.approx(100 * (one["accuracy"] - other["accuracy"]))


def test_serving(tmp_path: Path) -> None:
    model = tiny_models.tiny_model(tmp_path / "model")
    lines = [{"text": text, "label": "positive"} for text in ("good film", "a bad plot.", "it was very dull")]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--model", str(model), "--data", str(data), "--backend", "onnxruntime", "--seconds", "1"]
    options += ["--overload-seconds", "1", "--overload-parts", "1", "--max-waiting", "8"]
    result = run("serving", *options, target=tmp_path / "r.json")
    loads = [result["maximum"], *(result[f"load_{share}"] for share in ("0.5", "0.8", "0.95"))]
    for load in (*loads, *result["overload"]["parts"]):
        assert load["wrong"] == 0
        assert {*load["statuses"]} <= {"200", "429"}
        assert load["p50_ms"] <= load["p99_ms"]
    assert result["sigterm"]["exit_code"] == 0
    assert result["sigterm"]["wrong"] == 0
    assert {*result["sigterm"]["statuses"]} <= {"200", "429", "0"}  # 0: a connection after the end


def test_promise(tmp_path: Path) -> None:
    model = tiny_models.tiny_model(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in tiny_runs.records(40, seed=1)))
    folders = ["--model", str(model), "--dense", str(model), "--dev", str(data), "--data", str(data)]
    options = ["--speedups", "1.2,1.5", "--splits", "20", "--confidence", "0.9"]
    result = run("promises", *folders, *options, target=tmp_path / "r.json")
    assert result["texts"] == 40
    for row in result["promises"]:
        assert row["broken"] <= row["promised"] == sum(row["points"]) <= row["splits"] == 20
        assert len(row["truth"]) == len(result["points"])


def test_precision(tmp_path: Path) -> None:
    model = tiny_models.tiny_model(tmp_path / "model")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in tiny_runs.records(30, seed=1)))
    options = ["--model", str(model), "--data", str(data), "--threshold", "0.4,0.6"]
    forms = run("precision", *options, target=tmp_path / "r.json")["forms"]
    assert len(forms) == 10
    for rule in ("threshold", "dense"):
        for name in ("onnxruntime", "openvino"):
            assert forms[f"{name}, {rule}"]["largest_difference"] < 1e-5
            assert forms[f"{name}, {rule}"]["accuracy"] == forms[f"jax, {rule}"]["accuracy"]
        assert forms[f"onnxruntime_int8, {rule}"]["largest_difference"] > 1e-5

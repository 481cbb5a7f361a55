"""Committed results: their commands still mean the same settings, and README quotes their numbers."""

import json
import re
import runpy
import shlex
import statistics
from pathlib import Path

import learned
import pytest
from test_docs import table

from trbert_jax.config import diff_configs, load_config, to_dict, upgrade

ROOT = Path(__file__).resolve().parents[1]
RESULTS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in ROOT.glob("results/*.json")}
REPEATABLE = sorted(
    name
    for name, result in RESULTS.items()
    if "config" in result and result.get("command", "").startswith("trbert train --config ")
)
TRAINED = {"finetune", "init", "policy", "joint"}


@pytest.mark.parametrize("name", REPEATABLE)
def test_the_command_gives_the_settings(name: str) -> None:
    result = RESULTS[name]
    _, _, flag, config, *overrides = shlex.split(result["command"])
    assert flag == "--config"
    now = json.loads(json.dumps(to_dict(load_config(ROOT / config, overrides))))
    changed = diff_configs(upgrade(result["config"]), now)
    # Any folder will do for the files. Keys that are new or gone since then say nothing.
    free = {"workdir", *TRAINED} - set(result["config"]["stages"])
    assert [d for d in changed if re.split("[.:]", d)[0] not in free and "(absent)" not in d] == []


def test_summary_gathers_the_files() -> None:
    """Rows of results/summary.json are those of the files, and their means stand in docs/results.md."""
    rows = learned.gather(ROOT / "results")
    assert json.loads((ROOT / "results/summary.json").read_text(encoding="utf-8")) == rows
    assert all(line in (ROOT / "docs/results.md").read_text(encoding="utf-8") for line in learned.table(rows))


def test_results_of_readme() -> None:
    """One row an experiment: dense, reduced, speed-up and random tokens are those of the file named last."""
    rows = table("README.md", "data (metric)")
    assert len(rows) >= 5
    for name, *cells, config, file in rows:
        result = json.loads((ROOT / re.findall(r"\((.+)\)", file)[0]).read_text(encoding="utf-8"))
        metric, percent = ("f1", 1) if "F1" in name else ("accuracy", 100)
        if isinstance(result, list):  # the summary: the speed with these FLOPs
            same = [row for row in result if row["config"] == f"configs/{config.strip('`')}.yaml"]
            near = min(same, key=lambda row: abs(row["flops_ratio"] - float(cells[2].rstrip("x"))))
            same = [row for row in same if row["target"] == near["target"]]
            keys, percent = ("dense", "reduced", "random", "flops_ratio"), 1
            *values, flops = (statistics.mean(row[key] for row in same) for key in keys)
        elif "spread" in result:
            mean = {key: values["mean"] for key, values in result["spread"].items()}
            flops = mean["reduced.flops_speedup"]
            values = [mean[f"{part}.{metric}"] for part in ("dense", "reduced", "baselines.random")]
        else:
            flops = result["reduced"]["flops_speedup"]
            parts = (result["dense"], result["reduced"], result["baselines"]["random"])
            values = [part[metric] for part in parts]
        dense, reduced, random = (f"{percent * value:.1f}" for value in values)
        assert cells == [dense, reduced, f"{flops:.2f}x", random], name
        assert (ROOT / f"configs/{config.strip('`')}.yaml").is_file()


def test_speeds_of_readme() -> None:
    """One row a way to run, one column a batch size."""
    records = json.loads((ROOT / "benchmarks/engines_minilm.json").read_text(encoding="utf-8"))
    reduced = ("onnxruntime_int8", "openvino_bfloat16", "openvino", "packed")
    dense = ("dense_onnxruntime_int8", "dense_openvino_bfloat16", "dense_openvino", "huggingface")
    for (name, *cells), variant in zip(table("README.md", "batch size"), (*reduced, *dense), strict=True):
        speeds = {r["batch_size"]: r["examples_per_second"] for r in records if r["variant"] == variant}
        assert cells == [f"{speeds[size]:.0f}" for size in (1, 32)], name


def test_picture_of_readme_is_drawn(tmp_path: Path) -> None:
    draw = runpy.run_path(str(ROOT / "benchmarks/frontier.py"))["draw"]
    draw(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert (ROOT / "docs/frontier.png").stat().st_size < 100_000

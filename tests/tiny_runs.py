"""Whole runs in miniature: texts whose label hangs on one word, and a model of a few thousand weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trbert_jax.cli import main

NOISE = ("the", "a", "film", "plot", "was", "is", "very", "and", "it", "saw", "yesterday")
KEYWORDS = ("bad", "good")  # of label 0 and 1
SIZES = {"train": 42, "dev": 11, "test": 17}
MAX_LENGTH = 16
SCRATCH = {"vocab_size": 200, "hidden_size": 16, "num_layers": 4, "num_heads": 2, "intermediate_size": 24}
ONE_LAYER = {"scratch": {**SCRATCH, "num_layers": 1}}
STAGES = ["finetune", "score", "init", "policy", "teacher", "joint", "evaluate"]


def records(count: int, seed: int, fewest: int = 3, most: int = 16) -> Iterator[dict[str, Any]]:
    """Noise words and, anywhere among them, the keyword of the label; some texts are to be cut."""
    rng = np.random.default_rng(seed)
    for label in rng.permutation(np.arange(count) % 2).tolist():
        words = rng.choice(NOISE, rng.integers(fewest, most)).tolist()
        words.insert(int(rng.integers(0, min(len(words), MAX_LENGTH - 3) + 1)), KEYWORDS[label])
        yield {"text": " ".join(words), "label": label}


def write_dataset(folder: Path, sizes: dict[str, int] = SIZES, **options: int) -> Path:
    """train.jsonl, dev.jsonl and test.jsonl, as imdb is published."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, size) in enumerate(sizes.items()):
        lines = (json.dumps(record) + "\n" for record in records(size, seed, **options))
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """A configuration of all stages; changes of a section are merged into it."""
    training = {"batch_size": 8, "accumulation_steps": 1, "epochs": 2, "learning_rate": 1e-3}
    config: dict[str, Any] = {
        "workdir": str(folder / "work"),
        "seed": 3,
        "stages": STAGES,
        "data": {"name": "imdb", "path": str(folder / "data")},
        "model": {"init": "scratch", "max_length": MAX_LENGTH, "scratch": SCRATCH},
        "finetune": {**training, "save_steps": 4},
        "score": {"batch_size": 8},
        "init": {**training, "save_steps": 100},
        "policy": {**training, "save_steps": 4, "num_samples": 2},
        "teacher": {"batch_size": 8},
        "joint": {**training, "save_steps": 4},
        "evaluate": {"batch_size": 8, "baselines": ["random", "first_k"], "thresholds": [0.3, 0.5]},
    }
    for name, value in changes.items():
        section = config.get(name)
        config[name] = {**section, **value} if isinstance(section, dict) else value
    return config


def write_config(folder: Path, **changes: Any) -> Path:
    """The same as a file; writes the data set too unless there is one."""
    if not (folder / "data").exists():
        write_dataset(folder / "data")
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings(folder, **changes)), encoding="utf-8")
    return path


def train(config: Path, *arguments: str) -> dict[str, Any]:
    """Runs `trbert train`; returns results.json."""
    code = main(["train", "--config", str(config), *arguments])
    if code != 0:
        raise RuntimeError(f"trbert train ended with {code}")
    return read_results(config.parent)


def read_results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "work" / "results.json").read_text(encoding="utf-8"))


def checkpoints(stage: Path) -> dict[str, Any]:
    """Folder name -> what the checkpoint of a stage says of itself, but for the files it has."""
    manifests = {p.parent.name: json.loads(p.read_text()) for p in stage.glob("checkpoints/step_*/*.json")}
    return {k: {**m, "files": None, "digest": None} for k, m in sorted(manifests.items())}


def without_times(value: Any) -> Any:
    """Results without what differs from run to run and from folder to folder."""
    if isinstance(value, dict):
        times = ("seconds", "examples_per_second", "workdir", "path")
        return {k: without_times(v) for k, v in value.items() if k not in times}
    return value


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

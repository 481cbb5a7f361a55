"""The point of it all, on texts whose label hangs on one word: keep the word that decides."""

import collections
import dataclasses
from pathlib import Path

import jax
import numpy as np
import tiny_models
import tiny_runs

from trbert_jax.model.pretrained import save_pretrained


def save_deaf_model(folder: Path) -> None:
    """A model whose first layer lets no token hear another, and never learns to.

    With these weights 0 their gradients are too. Else [CLS] could learn the label before any token
    is dropped, and every selection would do.
    """
    config = dataclasses.replace(tiny_models.BERT, num_layers=2)
    params = tiny_models.tiny_params(config, seed=0, scale=0.2)
    layer = params["encoder"]["layer_0"]
    for name in ("value", "attention_output"):
        layer[name] = jax.tree.map(np.zeros_like, layer[name])
    save_pretrained(folder, config, params, tiny_models.tiny_tokenizer())


def test_policy_keeps_what_decides(tmp_path: Path) -> None:
    """The policy finds the word, and other selections of as many tokens do not."""
    tiny_runs.write_dataset(tmp_path / "data", {"train": 400, "dev": 20, "test": 200})
    save_deaf_model(tmp_path / "start")
    training = {"batch_size": 16, "save_steps": 1000, "backend": "masked"}  # packed takes long to compile
    config = tiny_runs.write_config(
        tmp_path,
        seed=1,
        stages=["finetune", "score", "policy", "evaluate"],
        model={"init": str(tmp_path / "start")},
        finetune={**training, "learning_rate": 5e-3, "epochs": 8, "dropout": False},
        policy={**training, "learning_rate": 1e-2, "epochs": 4, "num_samples": 8},
    )
    results = tiny_runs.train(config)
    dense, reduced = results["dense"], results["reduced"]
    assert dense["accuracy"] > 0.97
    assert reduced["accuracy"] > 0.95
    assert reduced["kept"][0] < dense["tokens"] / 2
    assert reduced["flops_speedup"] > 1.3
    for baseline in results["baselines"].values():
        assert baseline["kept"] == reduced["kept"]
        assert baseline["accuracy"] < 0.8
    records = tiny_runs.read_lines(tmp_path / "data" / "test.jsonl")
    lines = tiny_runs.read_lines(tmp_path / "work" / "predictions.jsonl")
    # To keep one of the two words would do: its absence tells the other label.
    kept = collections.Counter[str]()
    for record, line in zip(records, lines, strict=True):
        tokens = ["[CLS]", *record["text"].split()[: tiny_runs.MAX_LENGTH - 2], "[SEP]"]
        kept.update(tokens[position] for position in line["kept"][0][1:])
    assert sum(kept[word] for word in tiny_runs.KEYWORDS) > 0.8 * kept.total()

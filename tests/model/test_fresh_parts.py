"""What a checkpoint lacks or is asked to change: made anew, cut or repeated, and announced."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoints import assert_same_params, edit_json, edit_weights, quietly
from tiny_models import BERT, DISTILBERT, tiny_model, tiny_params

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.names import to_original_names
from trbert_jax.model.pretrained import load_pretrained, save_pretrained


def without(*parts: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda weights: {k: v for k, v in weights.items() if not any(part in k for part in parts)}


@pytest.mark.parametrize(
    ("config", "parts", "fresh", "words"),
    [
        (BERT, ("linear_",), ("selectors",), "token selectors"),
        (BERT, ("classifier",), ("classifier",), "classifier"),
        (BERT, ("pooler", "linear_", "classifier"), ("selectors", "pooler", "classifier"), "pooler"),
        (DISTILBERT, ("classifier",), ("pre_classifier", "classifier"), "hidden layer of the classifier"),
    ],
)
def test_fresh_parts(
    tmp_path: Path, config: ModelConfig, parts: tuple[str, ...], fresh: tuple[str, ...], words: str
) -> None:
    config = dataclasses.replace(config, initializer_range=0.05)
    tiny_model(tmp_path, config)
    edit_weights(tmp_path, without(*parts))
    said: list[str] = []
    loaded = load_pretrained(tmp_path, announce=said.append, seed=3)
    assert loaded.fresh == fresh
    assert len(said) == 1
    assert words in said[0]
    assert "random" in said[0]
    new = {k: v for k, v in to_original_names(loaded.params, config).items() if any(p in k for p in parts)}
    drawn = np.concatenate([v.ravel() for k, v in new.items() if k.endswith(".weight")])
    assert 0.03 < drawn.std() < 0.07
    assert all((v == 0).all() for k, v in new.items() if k.endswith(".bias"))
    again = load_pretrained(tmp_path, announce=said.append, seed=3)
    assert_same_params(loaded.params, again.params)
    other = to_original_names(load_pretrained(tmp_path, announce=said.append, seed=4).params, config)
    assert all((other[k] != v).any() for k, v in new.items() if k.endswith(".weight"))


def test_nothing_new_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(tmp_path)
    load_pretrained(tmp_path, labels=BERT.labels, max_positions=20, max_length=18)
    assert capsys.readouterr() == ("", "")
    edit_weights(tmp_path, without("linear_"))
    load_pretrained(tmp_path)
    out, err = capsys.readouterr()
    assert out == ""
    assert "selectors" in err


def test_other_number_of_labels_makes_a_new_classifier(tmp_path: Path) -> None:
    said: list[str] = []
    loaded = load_pretrained(tiny_model(tmp_path), labels=["a", "b", "c"], announce=said.append)
    assert loaded.config.labels == ("a", "b", "c")
    assert loaded.fresh == ("classifier",)
    assert loaded.params["head"]["classifier"]["kernel"].shape == (16, 3)
    assert "2 labels" in said[0]
    assert "random" in said[1]


def test_same_labels_in_another_order(tmp_path: Path) -> None:
    said: list[str] = []
    loaded = load_pretrained(tiny_model(tmp_path), labels=["positive", "negative"], announce=said.append)
    assert loaded.fresh == ()
    assert "order" in said[0]
    old = tiny_params(BERT)["head"]["classifier"]
    np.testing.assert_array_equal(loaded.params["head"]["classifier"]["kernel"], old["kernel"][:, ::-1])
    np.testing.assert_array_equal(loaded.params["head"]["classifier"]["bias"], old["bias"][::-1])


@pytest.mark.parametrize(
    ("old", "renamed"), [(("LABEL_0", "LABEL_1"), 0), (("0", "1"), 0), (("no", "yes"), 1)]
)
def test_as_many_labels_under_other_names(tmp_path: Path, old: tuple[str, str], renamed: int) -> None:
    tiny_model(tmp_path, dataclasses.replace(BERT, labels=old))
    said: list[str] = []
    loaded = load_pretrained(tmp_path, labels=["negative", "positive"], announce=said.append)
    assert loaded.config == BERT
    assert len(said) == renamed
    assert_same_params(loaded.params, tiny_params(BERT))


def test_number_of_labels_from_the_classifier(tmp_path: Path) -> None:
    tiny_model(tmp_path, dataclasses.replace(BERT, labels=("x", "y", "z")))
    edit_json(tmp_path / "config.json", remove=("id2label", "label2id"))
    assert quietly(tmp_path).config.labels == ("0", "1", "2")


def test_longer_position_table_repeats_the_pretrained_one(tmp_path: Path) -> None:
    said: list[str] = []
    loaded = load_pretrained(tiny_model(tmp_path), max_positions=50, max_length=48, announce=said.append)
    assert (loaded.config.max_positions, loaded.config.max_length) == (50, 48)
    table = loaded.params["encoder"]["embeddings"]["position"]["embedding"]
    old = tiny_params(BERT)["encoder"]["embeddings"]["position"]["embedding"]
    np.testing.assert_array_equal(table, np.concatenate([old, old, old[:10]]))
    assert "20 rows" in said[0]


def test_shorter_position_table(tmp_path: Path) -> None:
    said: list[str] = []
    loaded = load_pretrained(tiny_model(tmp_path), max_positions=8, announce=said.append)
    assert (loaded.config.max_positions, loaded.config.max_length) == (8, 8)
    assert len(said) == 1


def test_layer_dropping(tmp_path: Path) -> None:
    said: list[str] = []
    loaded = load_pretrained(tiny_model(tmp_path, DISTILBERT), keep_layers=[0, 2, 4], announce=said.append)
    assert loaded.config == dataclasses.replace(DISTILBERT, num_layers=3)
    assert loaded.config.num_reductions == 1
    old = tiny_params(DISTILBERT)["encoder"]
    for new, index in enumerate([0, 2, 4]):
        assert_same_params(loaded.params["encoder"][f"layer_{new}"], old[f"layer_{index}"])
    assert {k for k in loaded.params["encoder"] if "layer" in k} == {"layer_0", "layer_1", "layer_2"}
    assert "0, 2, 4" in said[0]
    save_pretrained(tmp_path / "three", loaded.config, loaded.params, loaded.tokenizer)
    assert_same_params(quietly(tmp_path / "three").params, loaded.params)

"""Loading a checkpoint that lacks parts or is to be changed."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
from tiny_models import BERT, DISTILBERT, assert_same_params, edit_weights, quietly, tiny_model, tiny_params

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.pretrained import load_pretrained, save_pretrained
from trbert_jax.model.weights import to_original_names


@pytest.fixture(autouse=True)
def log_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trbert_jax")


@pytest.mark.parametrize(
    ("config", "parts", "new"),
    [
        (BERT, ("linear_",), ("selectors",)),
        (BERT, ("pooler", "linear_", "classifier"), ("selectors", "pooler", "classifier")),
        (DISTILBERT, ("classifier",), ("pre_classifier", "classifier")),
    ],
)
def test_missing_parts(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    config: ModelConfig,
    parts: tuple[str, ...],
    new: tuple[str, ...],
) -> None:
    config = dataclasses.replace(config, initializer_range=0.05)
    tiny_model(tmp_path, config)
    edit_weights(tmp_path, lambda w: {k: v for k, v in w.items() if not any(part in k for part in parts)})
    loaded = load_pretrained(tmp_path, seed=3)
    assert loaded.newly_initialized == new
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert all(part in record.getMessage() for part in new)
    drawn = {k: v for k, v in to_original_names(loaded.params, config).items() if any(p in k for p in parts)}
    values = np.concatenate([v.ravel() for k, v in drawn.items() if k.endswith(".weight")])
    assert 0.03 < values.std() < 0.07
    assert all((v == 0).all() for k, v in drawn.items() if k.endswith(".bias"))
    assert_same_params(loaded.params, load_pretrained(tmp_path, seed=3).params)
    other = to_original_names(load_pretrained(tmp_path, seed=4).params, config)
    assert all((other[k] != v).any() for k, v in drawn.items() if k.endswith(".weight"))


def test_other_number_of_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_pretrained(tiny_model(tmp_path), labels=["a", "b", "c"])
    assert loaded.config.labels == ("a", "b", "c")
    assert loaded.newly_initialized == ("classifier",)
    assert loaded.params["head"]["classifier"]["kernel"].shape == (16, 3)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


def test_labels_in_another_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_pretrained(tiny_model(tmp_path), labels=["positive", "negative"])
    assert loaded.newly_initialized == ()
    assert len(caplog.records) == 1
    old = tiny_params(BERT)["head"]["classifier"]
    np.testing.assert_array_equal(loaded.params["head"]["classifier"]["kernel"], old["kernel"][:, ::-1])
    np.testing.assert_array_equal(loaded.params["head"]["classifier"]["bias"], old["bias"][::-1])


@pytest.mark.parametrize(
    ("old", "renamed"), [(("LABEL_0", "LABEL_1"), 0), (("0", "1"), 0), (("no", "yes"), 1)]
)
def test_renamed_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, old: tuple[str, str], renamed: int
) -> None:
    tiny_model(tmp_path, dataclasses.replace(BERT, labels=old))
    loaded = load_pretrained(tmp_path, labels=["negative", "positive"])
    assert loaded.config == BERT
    assert [record.levelname for record in caplog.records] == ["WARNING"] * renamed
    assert_same_params(loaded.params, tiny_params(BERT))


def test_another_task(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_pretrained(tiny_model(tmp_path), task="span")
    assert loaded.newly_initialized == ("qa_outputs",)
    assert "pooler" not in loaded.params["encoder"]
    assert "classifier.weight" in caplog.messages[0]


@pytest.mark.parametrize(("rows", "max_length"), [(50, 48), (8, 8)])
def test_position_table(tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: int, max_length: int) -> None:
    """A longer table repeats the pretrained one, a shorter one is its beginning."""
    loaded = load_pretrained(tiny_model(tmp_path), max_positions=rows, max_length=max_length)
    assert (loaded.config.max_positions, loaded.config.max_length) == (rows, max_length)
    table = loaded.params["encoder"]["embeddings"]["position"]["embedding"]
    old = tiny_params(BERT)["encoder"]["embeddings"]["position"]["embedding"]
    np.testing.assert_array_equal(table, np.concatenate([old, old, old])[:rows])
    assert len(caplog.records) == 1
    assert load_pretrained(tmp_path, max_positions=8).config.max_length == 8


def test_layer_dropping(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load_pretrained(tiny_model(tmp_path, DISTILBERT), keep_layers=[0, 2, 4])
    assert loaded.config == dataclasses.replace(DISTILBERT, num_layers=3)
    assert loaded.config.num_reductions == 1
    old = tiny_params(DISTILBERT)["encoder"]
    for new, index in enumerate([0, 2, 4]):
        assert_same_params(loaded.params["encoder"][f"layer_{new}"], old[f"layer_{index}"])
    assert {k for k in loaded.params["encoder"] if "layer" in k} == {"layer_0", "layer_1", "layer_2"}
    assert "0, 2, 4" in caplog.messages[0]
    assert (caplog.records[1].levelname, len(caplog.records)) == ("WARNING", 2)
    assert "selectors, which were trained before layers 1 and 3 of 6" in caplog.messages[1]
    assert "now drop tokens before layer 1 of 3" in caplog.messages[1]
    save_pretrained(tmp_path / "three", loaded.config, loaded.params, loaded.tokenizer)
    assert_same_params(quietly(tmp_path / "three").params, loaded.params)

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import init_params
from trbert_jax.model.weights import (
    NameReport,
    from_original_names,
    original_name,
    parameters,
    to_original_names,
)

BERT = ModelConfig(
    vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12, max_positions=7
)
DISTILBERT = dataclasses.replace(BERT, model_type="distilbert", type_vocab_size=0, labels=("a", "b", "c"))
CONFIGS = pytest.mark.parametrize("config", [BERT, DISTILBERT], ids=lambda c: c.model_type)


def random_weights(config: ModelConfig) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {p.name: rng.normal(size=p.shape).astype(np.float32) for p in parameters(config)}


@CONFIGS
@pytest.mark.parametrize("num_layers", [1, 2, 3, 6])
def test_tree_is_the_models(config: ModelConfig, num_layers: int) -> None:
    config = dataclasses.replace(config, num_layers=num_layers)
    tree, report = from_original_names(random_weights(config), config)
    expected = jax.eval_shape(lambda rng: init_params(config, rng), jax.random.key(0))
    assert jax.tree.map(np.shape, tree) == jax.tree.map(np.shape, expected)
    assert report == NameReport()


@CONFIGS
def test_names_and_back(config: ModelConfig) -> None:
    weights = random_weights(config)
    again = to_original_names(from_original_names(weights, config)[0], config)
    assert again.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(again[name], array)


def test_published_names() -> None:
    shapes = {p.name: p.shape for p in parameters(BERT)}
    assert shapes["bert.encoder.linear_1.1.weight"] == (32, 8)
    assert shapes["bert.encoder.linear_2.0.weight"] == (1, 32)
    assert shapes["bert.encoder.layer.1.intermediate.dense.weight"] == (12, 8)
    assert shapes["bert.pooler.dense.bias"] == (8,)
    shapes = {p.name: p.shape for p in parameters(DISTILBERT)}
    assert shapes["distilbert.transformer.linear_1.0.weight"] == (32, 8)
    assert shapes["distilbert.transformer.layer.0.ffn.lin2.weight"] == (8, 12)
    assert shapes["pre_classifier.weight"] == (8, 8)
    assert not any("token_type" in name or "pooler" in name for name in shapes)


def test_linear_layers_are_transposed() -> None:
    weights = random_weights(BERT)
    tree, _ = from_original_names(weights, BERT)
    np.testing.assert_array_equal(
        tree["encoder"]["layer_1"]["output"]["kernel"],
        weights["bert.encoder.layer.1.output.dense.weight"].T,
    )
    np.testing.assert_array_equal(tree["head"]["classifier"]["kernel"], weights["classifier.weight"].T)


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("embeddings.LayerNorm.gamma", BERT, "bert.embeddings.LayerNorm.weight"),
        ("bert.encoder.layer.0.output.LayerNorm.beta", BERT, "bert.encoder.layer.0.output.LayerNorm.bias"),
        ("encoder.layer.0.attention.self.key.bias", BERT, "bert.encoder.layer.0.attention.self.key.bias"),
        ("encoder.linear_1.0.bias", BERT, "bert.encoder.linear_1.0.bias"),
        ("pooler.dense.bias", BERT, "bert.pooler.dense.bias"),
        ("transformer.layer.0.ffn.lin1.bias", DISTILBERT, "distilbert.transformer.layer.0.ffn.lin1.bias"),
        ("classifier.bias", DISTILBERT, "classifier.bias"),
        ("bert.embeddings.position_ids", BERT, None),
        ("embeddings.position_ids", DISTILBERT, None),
        ("cls.predictions.decoder.weight", BERT, None),
        ("cls.seq_relationship.bias", BERT, None),
        ("vocab_transform.weight", DISTILBERT, None),
        ("vocab_layer_norm.bias", DISTILBERT, None),
        ("vocab_projector.weight", DISTILBERT, None),
    ],
)
def test_original_name(name: str, config: ModelConfig, expected: str | None) -> None:
    assert original_name(name, config) == expected


def test_differences_are_reported_on_both_sides() -> None:
    weights = random_weights(BERT)
    del weights["bert.pooler.dense.bias"]
    weights["qa_outputs.weight"] = np.zeros((2, 8), np.float32)
    weights["embeddings.LayerNorm.weight"] = np.zeros(8, np.float32)  # there with the prefix already
    weights["classifier.bias"] = np.zeros(5, np.float32)
    tree, report = from_original_names(weights, BERT)
    assert [p.name for p in report.missing] == ["bert.pooler.dense.bias"]
    assert set(report.unexpected) == {"qa_outputs.weight", "embeddings.LayerNorm.weight"}
    assert report.mismatched == (("classifier.bias", (5,), (2,)),)
    assert "bias" not in tree["encoder"]["pooler"]
    assert "bias" not in tree["head"]["classifier"]


@pytest.mark.torch
@CONFIGS
def test_names_are_those_of_transformers(config: ModelConfig) -> None:
    transformers = pytest.importorskip("transformers")
    if config.model_type == "bert":
        shape = transformers.BertConfig(
            vocab_size=11,
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=7,
            num_labels=2,
        )
        model = transformers.BertForSequenceClassification(shape)
    else:
        shape = transformers.DistilBertConfig(
            vocab_size=11,
            dim=8,
            n_layers=2,
            n_heads=2,
            hidden_dim=12,
            max_position_embeddings=7,
            num_labels=3,
        )
        model = transformers.DistilBertForSequenceClassification(shape)
    ours = {p.name: p.shape for p in parameters(config) if p.part != "selectors"}
    assert ours == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

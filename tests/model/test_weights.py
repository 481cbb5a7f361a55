from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tiny_models import BERT, DISTILBERT, tiny_weights

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.weights import from_original_names, original_name, parameters


@pytest.mark.parametrize(
    ("name", "config", "expected"),
    [
        ("embeddings.LayerNorm.gamma", BERT, "bert.embeddings.LayerNorm.weight"),
        ("bert.encoder.layer.0.output.LayerNorm.beta", BERT, "bert.encoder.layer.0.output.LayerNorm.bias"),
        ("encoder.linear_1.0.bias", BERT, "bert.encoder.linear_1.0.bias"),
        ("pooler.dense.bias", BERT, "bert.pooler.dense.bias"),
        ("transformer.layer.0.ffn.lin1.bias", DISTILBERT, "distilbert.transformer.layer.0.ffn.lin1.bias"),
        ("classifier.bias", DISTILBERT, "classifier.bias"),
        ("bert.embeddings.position_ids", BERT, None),
        ("embeddings.position_ids", DISTILBERT, None),
        ("cls.seq_relationship.bias", BERT, None),
        ("vocab_transform.weight", DISTILBERT, None),
        ("vocab_layer_norm.bias", DISTILBERT, None),
        ("vocab_projector.weight", DISTILBERT, None),
    ],
)
def test_original_name(name: str, config: ModelConfig, expected: str | None) -> None:
    assert original_name(name, config) == expected


def test_differences_on_both_sides() -> None:
    weights = tiny_weights(BERT)
    del weights["bert.pooler.dense.bias"]
    weights["qa_outputs.weight"] = np.zeros((2, 8), np.float32)
    weights["embeddings.LayerNorm.weight"] = np.zeros(16, np.float32)  # also there with its prefix
    weights["classifier.bias"] = np.zeros(5, np.float32)
    tree, differences = from_original_names(weights, BERT)
    names = {difference.split(":")[0].split(" ")[0] for difference in differences}
    assert names == {
        "bert.pooler.dense.bias",
        "qa_outputs.weight",
        "embeddings.LayerNorm.weight",
        "classifier.bias",
    }
    assert "bias" not in tree["encoder"]["pooler"]
    assert "bias" not in tree["head"]["classifier"]


@pytest.mark.parametrize("part", ["linear_", "pooler", "classifier"])
def test_whole_parts_may_be_missing(part: str) -> None:
    weights = {name: array for name, array in tiny_weights(BERT).items() if part not in name}
    assert from_original_names(weights, BERT)[1] == []


@pytest.mark.torch
def test_names_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    bert = transformers.BertConfig(
        vocab_size=27,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
    )
    distilbert = transformers.DistilBertConfig(
        vocab_size=27, dim=16, n_layers=6, n_heads=2, hidden_dim=24, max_position_embeddings=20, num_labels=3
    )
    for config, model in (
        (BERT, transformers.BertForSequenceClassification(bert)),
        (
            dataclasses.replace(DISTILBERT, labels=("a", "b", "c")),
            transformers.DistilBertForSequenceClassification(distilbert),
        ),
    ):
        ours = {p.name: p.shape for p in parameters(config) if p.part != "selectors"}
        assert ours == {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

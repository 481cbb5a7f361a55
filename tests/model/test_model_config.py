"""`config.json`: what is read from it, what is refused."""

from typing import Any

import pytest

from trbert_jax.errors import UserError
from trbert_jax.model.config import model_config_from_dict, model_config_to_dict

OF_2019 = {"model_type": None, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_defaults_are_the_frameworks() -> None:
    transformers = pytest.importorskip("transformers")
    for theirs in (transformers.BertConfig(), transformers.DistilBertConfig()):
        ours = model_config_to_dict(model_config_from_dict({"model_type": theirs.model_type}))
        for key in set(ours) - {"architectures", "trbert", "id2label", "label2id", "classifier_dropout"}:
            assert ours[key] == getattr(theirs, key), key


def test_config_of_bert() -> None:
    config = model_config_from_dict(
        {
            "model_type": "bert",
            "num_hidden_layers": 5,
            "max_position_embeddings": 1024,
            "hidden_dropout_prob": 0.3,
            "classifier_dropout": None,
            "layer_norm_eps": 1e-6,
            "id2label": {"1": "pos", "0": "neg"},
            "use_cache": True,
        }
    )
    assert (config.num_layers, config.layer_norm_eps) == (5, 1e-6)
    assert (config.max_positions, config.max_length) == (1024, 512)
    assert (config.classifier_dropout, config.labels) == (0.3, ("neg", "pos"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "roberta"}, "roberta"),
        ({"model_type": None}, "model_type"),
        ({"model_type": "", "hidden_size": 16, "num_hidden_layers": 2}, "model_type"),
        ({**OF_2019, "architectures": ["RobertaForMaskedLM"]}, "model_type"),
        ({"hidden_act": "gelu_10"}, "gelu_new, "),
        ({"model_type": "distilbert", "activation": ["relu"]}, "activation"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.ReLU"}}, "torch.nn.ReLU"),
        ({"hidden_size": "768"}, "hidden_size"),
        ({"hidden_size": 770}, "multiple"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"num_hidden_layers": 2.5}, "whole"),
        ({"hidden_dropout_prob": 1.5}, "dropout"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label"),
        ({"id2label": ["a", "b"]}, "id2label"),
        ({"id2label": {"0": "a", "1": "a"}}, "twice"),
        ({"id2label": {"0": "a", "1": "b"}, "num_labels": 3}, "num_labels"),
        ({"trbert": {"selector_widht": 3}}, "selector_widht"),
        ({"trbert": 3}, "trbert"),
        ({"trbert": {"max_length": 1024}}, "512 positions"),
    ],
)
def test_bad_config(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        model_config_from_dict({"model_type": "bert", **values}, "there/config.json")
    assert "there/config.json" in str(error.value)

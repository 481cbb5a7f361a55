"""Tiny model directories for the tests of everything that reads them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.pretrained import save_pretrained
from trbert_jax.model.tokenizers import Tokenizer, wrap_tokenizer
from trbert_jax.model.weights import from_original_names, parameters

# fmt: off
VOCABULARY = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
    "the", "a", "film", "plot", "was", "is", "good", "bad", "dull", "bright", "very", "not", "and", "but",
    "it", "I", "saw", "yesterday", ".", "!", "##s", "##ly",
]
# fmt: on

BERT = ModelConfig(
    vocab_size=len(VOCABULARY),
    hidden_size=16,
    num_layers=4,
    num_heads=2,
    intermediate_size=24,
    max_positions=20,
    labels=("negative", "positive"),
    max_length=18,
)
DISTILBERT = dataclasses.replace(
    BERT, model_type="distilbert", type_vocab_size=0, num_layers=6, classifier_dropout=0.2
)


def tiny_tokenizer() -> Tokenizer:
    """WordPiece over `VOCABULARY`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {token: i for i, token in enumerate(VOCABULARY)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=False)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return wrap_tokenizer(backend)


# With these parameters both backbones, 4 layers deep, drop some tokens at either point of reduction
# and predict either label.
SEED = 34


def tiny_weights(config: ModelConfig, seed: int = SEED, scale: float = 0.4) -> dict[str, np.ndarray]:
    """Random arrays by their name on disk, large enough that tokens differ."""
    rng = np.random.default_rng(seed)
    weights = {p.name: rng.normal(0, scale, p.shape).astype(np.float32) for p in parameters(config)}
    for p in parameters(config):
        if p.path[-1] == "scale":
            weights[p.name] += 1
        elif p.path[-1] == "bias":
            weights[p.name] *= np.float32(0.1)
    return weights


def tiny_params(config: ModelConfig, seed: int = SEED, scale: float = 0.4) -> dict[str, Any]:
    """The same as a parameter tree."""
    return from_original_names(tiny_weights(config, seed, scale), config)[0]


def tiny_model(directory: Path, config: ModelConfig = BERT, seed: int = SEED) -> Path:
    """Writes a whole model directory, tokenizer included."""
    save_pretrained(directory, config, tiny_params(config, seed), tiny_tokenizer())
    return directory

"""Shapes of well-known models, for benchmarks with random weights."""

from __future__ import annotations

from trbert_jax.model.config import ModelConfig

SIZES = {
    "bert-base": ModelConfig(),
    "minilm": ModelConfig(hidden_size=384, num_layers=6, num_heads=12, intermediate_size=1536),
    # Says nothing about speed: shows that a benchmark runs.
    "tiny": ModelConfig(
        vocab_size=100,
        hidden_size=16,
        num_layers=4,
        num_heads=2,
        intermediate_size=32,
        max_positions=256,
        max_length=256,
    ),
}

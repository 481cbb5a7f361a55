"""Tiny models, folders of them, and random batches."""

import dataclasses
import functools
import json
import unittest
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Batch
from trbert_jax.model.operating_points import OperatingPoint
from trbert_jax.model.pretrained import load_pretrained, save_pretrained
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
POINT = OperatingPoint(
    name="2x",
    thresholds=(0.3, 0.6),
    speedup=2.0,
    kept=(4.0, 2.0),
    metric="accuracy",
    value=0.5,
    dense=0.5,
    examples=9,
)
CONFIGS = pytest.mark.parametrize("config", [BERT, DISTILBERT], ids=lambda c: c.model_type)


def word_pieces(vocabulary: Iterable[str], lowercase: bool) -> Tokenizer:
    """Returns WordPiece as of BERT; lower case also strips accents."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {token: i for i, token in enumerate(vocabulary)}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", ids["[SEP]"]), ("[CLS]", ids["[CLS]"]))
    return wrap_tokenizer(backend)


def tiny_tokenizer() -> Tokenizer:
    return word_pieces(VOCABULARY, lowercase=False)


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
    return from_original_names(tiny_weights(config, seed, scale), config).tree


@functools.cache
def params_of(config: ModelConfig) -> Any:
    """Parameters on the device, the same objects for every caller."""
    return jax.tree.map(jnp.asarray, tiny_params(config))


def tiny_model(directory: Path, config: ModelConfig = BERT, seed: int = SEED) -> Path:
    """Writes a whole model directory, tokenizer included."""
    save_pretrained(directory, config, tiny_params(config, seed), tiny_tokenizer())
    return directory


def quietly(path: str | Path, **options: Any) -> Any:
    """Loads a checkpoint and fails if that logs anything."""
    with unittest.TestCase().assertNoLogs("trbert_jax", level="DEBUG"):
        return load_pretrained(path, **options)


def edit_json(path: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    values = {k: v for k, v in json.loads(path.read_text()).items() if k not in remove}
    path.write_text(json.dumps({**values, **changes}))


def edit_weights(path: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    weights = load_file(path / "model.safetensors")
    changed = change(weights)
    save_file(weights if changed is None else changed, path / "model.safetensors")


def to_flax(path: Path) -> None:
    """Replaces the weights by the file that a Flax model of transformers saves."""
    tree: dict[tuple[str, ...], np.ndarray] = {}
    for name, array in load_file(path / "model.safetensors").items():
        *modules, leaf = name.split(".")
        table, norm = modules[-1].endswith("embeddings"), modules[-1].endswith(("LayerNorm", "layer_norm"))
        if leaf == "weight":
            leaf = "embedding" if table else "scale" if norm else "kernel"
        tree[(*modules, leaf)] = array.T if leaf == "kernel" else array
    content = serialization.msgpack_serialize(unflatten_dict(tree))
    (path / "flax_model.msgpack").write_bytes(content)
    (path / "model.safetensors").unlink()


def assert_same_params(left: Any, right: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_same_gradients(found: Any, expected: Any) -> None:
    """Two trees, but for the rounding of sums whose parts are as large as the largest entries.

    Gradients that are 0 in exact arithmetic (key biases) are rounding noise of all others.
    """
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(found), strict=True
    ):
        tolerance = 1e-4 * np.abs(one).max() + 1e-6 * largest
        np.testing.assert_allclose(other, one, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path))


def random_batch(config: ModelConfig, lengths: Sequence[int], width: int, seed: int = 0) -> Batch:
    """Rows of the given lengths, padded to `width`, with all that any training stage reads.

    A row's contents follow from `seed` and its number alone: the same whatever `width`, and whoever
    its neighbors are.
    """

    def make_row(length: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        row = {
            "input_ids": rng.integers(1, config.vocab_size, length).astype(np.int32),
            "token_type_ids": rng.integers(0, 2, length).astype(np.int32),
            "mask": np.ones(length, bool),
            "guide": rng.uniform(size=(2, length)).astype(np.float32),
            "rank": rng.uniform(size=(2, length)).astype(np.float32),
        }
        row = {k: np.pad(v, [(0, 0)] * (v.ndim - 1) + [(0, width - length)]) for k, v in row.items()}
        if not config.type_vocab_size:
            row.pop("token_type_ids")
        row["labels"] = np.asarray(rng.integers(0, config.num_labels), np.int32)
        row["teacher_logits"] = rng.normal(size=config.num_labels).astype(np.float32)
        return row

    rows = [make_row(length, np.random.default_rng((seed, i))) for i, length in enumerate(lengths)]
    batch = {key: jnp.asarray(np.stack([row[key] for row in rows])) for key in rows[0]}
    return {**batch, "index": jnp.arange(len(rows)), "valid": jnp.ones(len(rows), bool)}


def take(batch: Batch, rows: Sequence[int] | np.ndarray) -> Batch:
    return {key: value[np.asarray(rows)] for key, value in batch.items()}

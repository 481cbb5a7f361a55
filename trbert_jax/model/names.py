"""Parameter names: what a checkpoint calls a tensor, and where it stands in the parameter tree.

The names on disk are those of the published models and of Hugging Face's BERT and DistilBERT, with
the token selectors as `bert.encoder.linear_1.{0,1}` (hidden layer) and `bert.encoder.linear_2.{0,1}`
(output); DistilBERT has `distilbert.transformer.` in front instead. A linear layer's matrix is
[out, in] on disk and [in, out] in the tree. Source: docs/method.md, "Checkpoints".
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from trbert_jax.model.config import ModelConfig

Tree = dict[str, Any]  # nested dict of arrays

# (tree name, name on disk below the layer, kind)
_BERT_LAYER = (
    ("query", "attention.self.query", "attention"),
    ("key", "attention.self.key", "attention"),
    ("value", "attention.self.value", "attention"),
    ("attention_output", "attention.output.dense", "attention"),
    ("attention_norm", "attention.output.LayerNorm", "norm"),
    ("intermediate", "intermediate.dense", "widen"),
    ("output", "output.dense", "narrow"),
    ("output_norm", "output.LayerNorm", "norm"),
)
_DISTILBERT_LAYER = (
    ("query", "attention.q_lin", "attention"),
    ("key", "attention.k_lin", "attention"),
    ("value", "attention.v_lin", "attention"),
    ("attention_output", "attention.out_lin", "attention"),
    ("attention_norm", "sa_layer_norm", "norm"),
    ("intermediate", "ffn.lin1", "widen"),
    ("output", "ffn.lin2", "narrow"),
    ("output_norm", "output_layer_norm", "norm"),
)

# Heads of the pre-training tasks: of no use to a classifier.
_PRETRAINING_HEADS = ("cls.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.")
# Constants that some versions of the frameworks stored as tensors.
_BUFFERS = ("position_ids", "token_type_ids")
# What only a head that reads [CLS] has a use for.
_SENTENCE_PARTS = ("bert.pooler.", "pre_classifier.")
# What the first TensorFlow checkpoints called LayerNorm's parameters.
_OLD_SUFFIXES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
      name: on disk.
      path: keys of the nested parameter tree.
      shape: on disk.
      part: `encoder`, `selectors`, `pooler`, `pre_classifier`, or a linear layer of the task's head
        (`classifier`, `qa_outputs`, ...): what a checkpoint has or lacks as a whole.
    """

    name: str
    path: tuple[str, ...]
    shape: tuple[int, ...]
    part: str

    @property
    def transposed(self) -> bool:
        """Whether the tree holds the transpose of what is on disk."""
        return self.path[-1] == "kernel"


@dataclasses.dataclass(frozen=True)
class NameReport:
    """How a checkpoint's names differ from a model's; all empty where they agree.

    Attributes:
      missing: parameters the checkpoint lacks.
      unexpected: names on disk that the model has no place for.
      mismatched: `(name, shape on disk, shape of the model)`.
    """

    missing: tuple[Parameter, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()


@functools.lru_cache(maxsize=32)
def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Every parameter of a model, in the order of the computation."""
    return tuple(_parameters(config))


def from_original_names(weights: Mapping[str, np.ndarray], config: ModelConfig) -> tuple[Tree, NameReport]:
    """Builds a parameter tree from a checkpoint.

    Names may stand with or without the model's prefix (`bert.`, `distilbert.`). Pre-training heads
    and stored constants are left out without a word, because no classifier uses them.

    Args:
      weights: arrays by their name on disk.
      config: the model's shape.

    Returns:
      The tree of all parameters that were found with the right shape, and the differences.
    """
    found: dict[str, np.ndarray] = {}
    unexpected = []
    expected = {p.name: p for p in parameters(config)}
    for name, array in weights.items():
        full = original_name(name, config.model_type)
        if full is None or (config.reads_all_tokens and full.startswith(_SENTENCE_PARTS)):
            continue
        if full not in expected or full in found:
            unexpected.append(name)
        else:
            found[full] = array

    tree: Tree = {}
    missing, mismatched = [], []
    for p in expected.values():
        if p.name not in found:
            missing.append(p)
        elif found[p.name].shape != p.shape:
            mismatched.append((p.name, tuple(found[p.name].shape), p.shape))
        else:
            array = found[p.name]
            set_leaf(tree, p.path, np.ascontiguousarray(array.T) if p.transposed else array)
    return tree, NameReport(tuple(missing), tuple(unexpected), tuple(mismatched))


def to_original_names(tree: Tree, config: ModelConfig) -> dict[str, Any]:
    """The inverse of `from_original_names`: whatever arrays the tree has, by their name on disk."""
    arrays = {}
    for p in parameters(config):
        array = get_leaf(tree, p.path)
        if array is not None:
            arrays[p.name] = array.T if p.transposed else array
    return arrays


def original_name(name: str, model_type: str) -> str | None:
    """The full name of a tensor on disk, prefix included; None for one that no classifier uses."""
    if name.startswith(_PRETRAINING_HEADS) or name.rpartition(".")[2] in _BUFFERS:
        return None
    for old, new in _OLD_SUFFIXES.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    layers = "transformer." if model_type == "distilbert" else "encoder."
    if name.startswith(("embeddings.", layers, "pooler.")):
        return f"{model_type}.{name}"
    return name


def get_leaf(tree: Tree, path: tuple[str, ...]) -> Any:
    """The array at a path, None where there is none."""
    for key in path[:-1]:
        tree = tree.get(key, {})
    return tree.get(path[-1])


def set_leaf(tree: Tree, path: tuple[str, ...], array: Any) -> None:
    """Puts an array at a path, making the dicts on the way."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = array


def _parameters(config: ModelConfig) -> Iterator[Parameter]:
    bert = config.model_type == "bert"
    hidden = config.hidden_size
    prefix = config.model_type
    stack = f"{prefix}.encoder" if bert else f"{prefix}.transformer"

    embeddings = ("encoder", "embeddings")
    yield from _table(
        f"{prefix}.embeddings.word_embeddings", (*embeddings, "word"), config.vocab_size, hidden
    )
    yield from _table(
        f"{prefix}.embeddings.position_embeddings", (*embeddings, "position"), config.max_positions, hidden
    )
    if bert:
        yield from _table(
            f"{prefix}.embeddings.token_type_embeddings",
            (*embeddings, "token_type"),
            config.type_vocab_size,
            hidden,
        )
    yield from _norm(f"{prefix}.embeddings.LayerNorm", (*embeddings, "norm"), hidden)

    sizes = {
        "attention": (hidden, hidden),
        "widen": (hidden, config.intermediate_size),
        "narrow": (config.intermediate_size, hidden),
    }
    for i in range(config.num_layers):
        for key, module, kind in _BERT_LAYER if bert else _DISTILBERT_LAYER:
            name, path = f"{stack}.layer.{i}.{module}", ("encoder", f"layer_{i}", key)
            if kind == "norm":
                yield from _norm(name, path, hidden)
            else:
                yield from _linear(name, path, *sizes[kind])

    for s in range(config.num_selectors):
        selector, width = ("encoder", f"selector_{s}"), config.selector_hidden
        yield from _linear(f"{stack}.linear_1.{s}", (*selector, "hidden"), hidden, width, "selectors")
        yield from _linear(f"{stack}.linear_2.{s}", (*selector, "output"), width, 1, "selectors")

    if not config.reads_all_tokens and bert:
        yield from _linear(f"{prefix}.pooler.dense", ("encoder", "pooler"), hidden, hidden, "pooler")
    elif not config.reads_all_tokens:
        yield from _linear("pre_classifier", ("head", "pre_classifier"), hidden, hidden, "pre_classifier")
    for name, inputs, outputs in _HEADS[config.task](hidden, config.num_labels):
        yield from _linear(name, ("head", name), inputs, outputs, name)


# The last linear layers of each task's head: (name, inputs, outputs).
_HEADS: dict[str, Callable[[int, int], list[tuple[str, int, int]]]] = {
    "classification": lambda hidden, labels: [("classifier", hidden, labels)],
    "multiple_choice": lambda hidden, labels: [("classifier", hidden, 1)],
    "span": lambda hidden, labels: [("qa_outputs", hidden, 2)],
    "candidates": lambda hidden, labels: [("qa_outputs", hidden, 1)],
    "multi_hop": lambda hidden, labels: [
        ("qa_outputs", hidden, 2),
        ("qa_classifier", hidden, 3),
        ("sent_linear", 2 * hidden, hidden),
        ("sent_classifier", hidden, 2),
    ],
}


def _linear(
    name: str, path: tuple[str, ...], inputs: int, outputs: int, part: str = "encoder"
) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (*path, "kernel"), (outputs, inputs), part)
    yield Parameter(f"{name}.bias", (*path, "bias"), (outputs,), part)


def _norm(name: str, path: tuple[str, ...], size: int) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (*path, "scale"), (size,), "encoder")
    yield Parameter(f"{name}.bias", (*path, "bias"), (size,), "encoder")


def _table(name: str, path: tuple[str, ...], rows: int, size: int) -> Iterator[Parameter]:
    yield Parameter(f"{name}.weight", (*path, "embedding"), (rows, size), "encoder")

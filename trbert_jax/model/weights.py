"""Find, read and write a checkpoint's weights, and translate their names on disk to the parameter tree.

The names are those of Hugging Face's models and of the published TR-BERT, which adds the selectors as
`bert.encoder.linear_1.{0,1}` (hidden layer) and `bert.encoder.linear_2.{0,1}` (output). A linear layer's
matrix is [out, in] on disk and [in, out] in the tree. Source: docs/method.md, "Checkpoints".
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import init_params

Tree = dict[str, Any]  # nested dict of arrays

# Heads of the pre-training tasks, and constants that some versions of the frameworks stored as tensors.
_IGNORED_HEADS = ("cls.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.")
_IGNORED_TENSORS = ("position_ids", "token_type_ids")
# The first TensorFlow checkpoints call LayerNorm's parameters gamma and beta.
_OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
# Parts of names that wrappers add: of parallel, compiled, sharded and checkpointed modules, and Flax's.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "params"}


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter."""

    name: str  # on disk
    path: tuple[str, ...]  # keys of the nested parameter tree
    shape: tuple[int, ...]  # on disk
    # `encoder`, `selectors`, `pooler` or a layer of the head. A checkpoint has or lacks a part as a whole.
    part: str

    @property
    def transposed(self) -> bool:
        """Whether the tree holds the transpose of the array on disk."""
        return self.path[-1] == "kernel"


@functools.lru_cache(maxsize=32)
def parameters(config: ModelConfig) -> tuple[Parameter, ...]:
    """Lists every parameter of a model, in the order of the computation."""
    shapes = flatten_dict(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    found = []
    for path, module, part in _modules(config):
        for leaf in ("embedding", "kernel", "scale", "bias"):
            if (*path, leaf) in shapes:  # absent: a pooler that the head does not read
                shape = shapes[*path, leaf].shape
                name = f"{module}.{'bias' if leaf == 'bias' else 'weight'}"
                found.append(Parameter(name, (*path, leaf), shape[::-1] if leaf == "kernel" else shape, part))
    if len(found) != len(shapes):
        raise ValueError(f"a parameter of {config.backbone.name} or its head has no name on disk")
    return tuple(found)


def _modules(config: ModelConfig) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Yields (path in the tree, name on disk, part) of everything that has parameters."""
    backbone = config.backbone
    prefix, stack = backbone.name, f"{backbone.name}.{backbone.stack}"
    for key, name in backbone.embeddings:
        yield ("encoder", "embeddings", key), f"{prefix}.embeddings.{name}", "encoder"
    for i in range(config.num_layers):
        for key, name in backbone.layer:
            yield ("encoder", f"layer_{i}", key), f"{stack}.layer.{i}.{name}", "encoder"
    for i in range(config.num_selectors):
        yield ("encoder", f"selector_{i}", "hidden"), f"{stack}.linear_1.{i}", "selectors"
        yield ("encoder", f"selector_{i}", "output"), f"{stack}.linear_2.{i}", "selectors"
    yield ("encoder", "pooler"), f"{prefix}.pooler.dense", "pooler"
    for layer in ("pre_classifier", *config.head.layers):
        yield ("head", layer), layer, layer


class Translation(NamedTuple):
    """A checkpoint in the names of the parameter tree."""

    tree: Tree  # the parameters found with the right shape
    differences: list[str]  # why the checkpoint is not one of this model, one line each
    unused: list[str]  # other tensors, by their names on disk, which the model does not need


def from_original_names(weights: Mapping[str, np.ndarray], config: ModelConfig) -> Translation:
    """Builds a parameter tree from a checkpoint's arrays by their name on disk.

    See `original_names` for what names may look like. Ignores pre-training heads, stored constants and, for a
    head that reads all tokens, the layers that read [CLS]. It is no difference if a whole part other than the
    encoder is missing, or if there are tensors beside the encoder and the head.
    """
    expected = {p.name: p for p in parameters(config)}
    of_sentence = (f"{config.backbone.name}.pooler.", "pre_classifier.") if config.reads_all_tokens else ()
    found: dict[str, tuple[str, np.ndarray]] = {}
    unknown = dict[str, str]()
    for name, full in original_names(weights, config).items():
        if full is None or full.startswith(of_sentence):
            continue
        if full not in expected or full in found:
            unknown[name] = full
        else:
            found[full] = name, weights[name]

    tree, shapes, missing = {}, list[str](), list[str]()
    present = {"encoder", *(expected[name].part for name in found)}
    for p in expected.values():
        name, stored = found.get(p.name, ("", None))
        if stored is None:
            if p.part in present:
                missing.append(f"{p.name} {list(p.shape)}: missing")
        elif stored.shape != p.shape:
            shapes.append(
                f"{_both(name, p.name)}: {list(stored.shape)} in the checkpoint, {list(p.shape)} expected"
            )
        else:
            tree[p.path] = np.ascontiguousarray(stored.T) if p.transposed else stored
    # More parameters of the encoder, or of a head that is there, would change what the model computes.
    layers = config.head.layers if present.issuperset(config.head.layers) else ()
    computing = tuple(f"{module}." for module in (config.backbone.name, "pre_classifier", *layers))
    unused = [name for name, full in unknown.items() if not full.startswith(computing)]
    extra = [name for name in unknown if name not in unused]
    if shapes or missing or extra:
        extra += unused
    why = {True: "stored twice", False: "not a parameter of this model"}
    unexpected = [f"{_both(name, unknown[name])}: {why[unknown[name] in found]}" for name in extra]
    lines = itertools.zip_longest(shapes, missing, unexpected)  # so that the first lines show each kind
    return Translation(unflatten_dict(tree), [line for row in lines for line in row if line], unused)


def _both(name: str, full: str) -> str:
    return name if name == full else f"{name} (read as {full})"


def to_original_names(tree: Tree, config: ModelConfig) -> dict[str, Any]:
    """Inverts `from_original_names`: returns the arrays of the tree by their name on disk."""
    arrays = flatten_dict(tree)
    known = (p for p in parameters(config) if p.path in arrays)
    return {p.name: arrays[p.path].T if p.transposed else arrays[p.path] for p in known}


def original_names(names: Iterable[str], config: ModelConfig) -> dict[str, str | None]:
    """Returns the full name of each tensor on disk, `bert.encoder...`; None for one that is ignored.

    The model's prefix (`bert.`, `distilbert.`) is optional. Removes `module.`, `_orig_mod.` and other parts
    that wrappers add anywhere, and the name of one module that holds the model, such as `model.`.
    """
    backbone = config.backbone
    inside = ("embeddings.", f"{backbone.stack}.", "pooler.")
    bare = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names}
    outer, full = _outer(bare.values(), backbone.name), dict[str, str | None]()
    for name, shown in bare.items():
        shown = shown.removeprefix(outer)
        if shown.startswith(_IGNORED_HEADS) or shown.rpartition(".")[2] in _IGNORED_TENSORS:
            full[name] = None
            continue
        for old, new in _OLD_NAMES:
            shown = shown.replace(old, new)
        full[name] = f"{backbone.name}.{shown}" if shown.startswith(inside) else shown
    return full


def _outer(names: Iterable[str], prefix: str) -> str:
    """Returns the prefix of the one module that holds the model, with its dot; "" if there is none."""
    table, found = "embeddings.word_embeddings.weight", set[str]()
    for name in names:
        if name.endswith(whole := f"{prefix}.{table}"):
            found.add(name.removesuffix(whole))
        elif name in (table, f"model.{table}"):  # other names may be those of another kind of model
            found.add(name.removesuffix(table))
    return found.pop() if len(found) == 1 else ""

"""Checkpoints in and out: Hugging Face's BERT and DistilBERT, published TR-BERT models, and our own.

Whatever is new in a loaded model (a classifier, the token selectors, a longer position table) is
announced; whatever does not fit is an error that lists every difference.
Source: docs/method.md, "Checkpoints".
"""

from __future__ import annotations

import dataclasses
import sys
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.io import atomic_directory, read_json, write_json
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.hf_config import labels_from_dict, model_config_from_dict, model_config_to_dict
from trbert_jax.model.hub import local_directory
from trbert_jax.model.names import (
    NameReport,
    Parameter,
    Tree,
    from_original_names,
    get_leaf,
    parameters,
    set_leaf,
    to_original_names,
)
from trbert_jax.model.tokenizer_files import (
    Tokenizer,
    check_vocabulary,
    find_tokenizer,
    load_tokenizer,
    save_tokenizer,
)
from trbert_jax.model.weight_files import SAFETENSORS, read_weights, write_weights

__all__ = [
    "Pretrained",
    "load_pretrained",
    "load_tokenizer",
    "model_config_from_dict",
    "model_config_to_dict",
    "read_weights",
    "save_pretrained",
]

Announce = Callable[[str], Any]

# What a model's directory consists of.
_MODEL_FILES = frozenset(
    (
        "config.json",
        SAFETENSORS,
        "pytorch_model.bin",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.txt",
    )
)

# Parts that a checkpoint of another origin may lack as a whole; they start at random.
_OPTIONAL_PARTS = {
    "selectors": "token selectors",
    "pooler": "pooler",
    "pre_classifier": "hidden layer of the classifier",
    "classifier": "classifier",
    "qa_outputs": "output layer of the question answering head",
    "qa_classifier": "classifier of answer kinds",
    "sent_linear": "hidden layer of the sentence classifier",
    "sent_classifier": "sentence classifier",
}
# Heads of other tasks that a checkpoint may bring, by the beginning of their names on disk.
_HEADS = tuple(f"{name}." for name in _OPTIONAL_PARTS if name not in ("selectors", "pooler"))


def to_stderr(message: str) -> None:
    """Writes a message where it does not mix with a program's output."""
    sys.stderr.write(f"{message}\n")


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A loaded checkpoint.

    Attributes:
      config: the model's shape, as loaded.
      params: nested dict of float32 numpy arrays.
      tokenizer: a `transformers.PreTrainedTokenizerFast`; None where the directory has none.
      fresh: parts that were initialized at random, of `selectors`, `pooler`, `pre_classifier` and the
        linear layers of the task's head (`classifier`, `qa_outputs`, ...).
    """

    config: ModelConfig
    params: Tree
    tokenizer: Tokenizer | None
    fresh: tuple[str, ...] = ()


def load_pretrained(
    path_or_id: str | Path,
    *,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    max_positions: int | None = None,
    keep_layers: Sequence[int] | None = None,
    max_length: int | None = None,
    announce: Announce = to_stderr,
    seed: int = 0,
) -> Pretrained:
    """Loads a checkpoint from a directory or the Hugging Face hub.

    Args:
      path_or_id: a directory, or the name of a model on the hub.
      task: one of `modeling.config.TASKS`. A head of another task is left out. None takes the checkpoint's.
      labels: label names in the order of their ids. The checkpoint's classifier is kept if it has
        as many (reordered if it has the same names in another order), else a new one is made.
        None takes the checkpoint's.
      max_positions: rows of the position table. A longer table repeats the pretrained one from its
        start; a shorter one is its beginning. None takes the checkpoint's.
      keep_layers: indices of the layers to keep, in the order they shall run. None keeps all.
      max_length: padded length for training, see `ModelConfig.max_length`. None takes the
        checkpoint's.
      announce: called with a line of text for everything that is not simply taken over.
      seed: of the random initialization: normal(0, initializer_range), biases 0.

    Raises:
      UserError: no such checkpoint, a damaged or unfinished one, names or shapes that do not fit.
    """
    directory = local_directory(path_or_id)
    if not (directory / "config.json").is_file():
        raise UserError(
            f"{directory}: no config.json here, so this is not a finished model directory "
            "(an unfinished download or an interrupted run leaves a folder like this)"
        )
    values = read_json(directory / "config.json")
    if not isinstance(values, Mapping):
        raise UserError(f"{directory / 'config.json'}: expected a JSON object")
    config = model_config_from_dict(values, str(directory / "config.json"))
    weights = read_weights(directory)

    def say(message: str) -> None:
        announce(f"{directory}: {message}")

    if task is not None and task != config.task:
        config = _change_task(config, weights, task, say)
    counts_labels = config.task == "classification" and "classifier.weight" in weights
    if labels_from_dict(values) is None and counts_labels:
        rows = weights["classifier.weight"].shape[0]
        config = dataclasses.replace(config, labels=tuple(str(i) for i in range(rows)))
    tree, report = from_original_names(weights, config)
    _check_report(report, config, directory)

    if labels is not None:
        config = _change_labels(config, tree, tuple(labels), say)
    if keep_layers is not None:
        config = _keep_layers(config, tree, keep_layers, say)
    if max_positions is not None:
        config = _resize_positions(config, tree, max_positions, say)
    config = _set_max_length(config, max_length)
    fresh = _initialize_missing(config, tree, seed, say)

    tokenizer = find_tokenizer(directory)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config, str(directory))
    return Pretrained(config, tree, tokenizer, fresh)


def save_pretrained(
    directory: str | Path,
    config: ModelConfig,
    params: Tree,
    tokenizer: Tokenizer | None,
    *,
    exclude: Collection[str] = (),
) -> None:
    """Writes a model directory, whole or not at all.

    It holds `config.json` (Hugging Face's, with our settings under `trbert`), `model.safetensors`
    (float32, original names) and the tokenizer's files. `load_pretrained` returns every bit of it;
    `transformers` loads the dense model from it. A model's directory already there is replaced.

    Args:
      directory: where.
      config: the model's shape.
      params: nested dict of arrays.
      tokenizer: None writes no tokenizer files.
      exclude: parts that nothing has trained, named as in `Pretrained.fresh`; whoever loads the
        model is told that they start afresh.

    Raises:
      UserError: the place cannot be written, or holds files that are not a model's.
      ValueError: `params` lacks parameters of the model.
    """
    _check_replaceable(Path(directory))
    wanted = {p.name for p in parameters(config) if p.part not in exclude}
    weights = {k: v for k, v in to_original_names(params, config).items() if k in wanted}
    lacking = sorted(wanted - set(weights))
    if lacking:
        raise ValueError(f"parameters are missing: {', '.join(lacking)}")
    with atomic_directory(directory) as temporary:
        write_json(temporary / "config.json", model_config_to_dict(config))
        write_weights(temporary / SAFETENSORS, weights)
        if tokenizer is not None:
            save_tokenizer(temporary, tokenizer, config)


def _check_replaceable(directory: Path) -> None:
    """Raises where replacing a directory would take with it what is no part of a model."""
    if not directory.is_dir():
        return
    others = sorted(p.name for p in directory.iterdir() if p.is_dir() or p.name not in _MODEL_FILES)
    if others:
        more = ", ..." if len(others) > 3 else ""
        raise UserError(
            f"{directory}: holds what is no part of a model and would go ({', '.join(others[:3])}{more});"
            " choose another directory, or move that away"
        )


def _check_report(report: NameReport, config: ModelConfig, directory: Path) -> None:
    """Raises where the checkpoint is not this model; parts that lack as a whole are no error."""
    whole = {part: {p for p in parameters(config) if p.part == part} for part in _OPTIONAL_PARTS}
    absent = {part for part, members in whole.items() if members <= set(report.missing)}
    missing = [p for p in report.missing if p.part not in absent]
    problems = []
    if report.mismatched:
        problems.append("parameters with another shape than config.json says:")
        problems += [
            f"  {name}: {list(found)} in the checkpoint, {list(expected)} expected"
            for name, found, expected in report.mismatched
        ]
    if missing:
        problems.append("parameters missing from the checkpoint:")
        problems += [f"  {p.name} {list(p.shape)}" for p in missing]
    if report.unexpected:
        problems.append("names in the checkpoint that this model has no place for:")
        problems += [f"  {name}" for name in report.unexpected]
    if problems:
        raise UserError(
            f"{directory}: the weights are not those of a {config.model_type} model for {config.task} "
            f"with {config.num_layers} layers\n" + "\n".join(problems)
        )


def _change_task(
    config: ModelConfig, weights: dict[str, np.ndarray], task: str, say: Announce
) -> ModelConfig:
    """The configuration for another task; takes the checkpoint's own head out of its weights."""
    head = [name for name in weights if name.startswith(_HEADS)]
    for name in head:
        del weights[name]
    if head:
        say(f"its head is for {config.task}, {task} is wanted; left out: {', '.join(sorted(head))}")
    return dataclasses.replace(config, task=task)


def _change_labels(config: ModelConfig, tree: Tree, labels: tuple[str, ...], say: Announce) -> ModelConfig:
    if len(set(labels)) < len(labels) or not labels:
        raise UserError(f"label names have to be there and to differ: {', '.join(labels) or 'none given'}")
    old, new = config.labels, dataclasses.replace(config, labels=labels)
    classifier = tree.get("head", {}).get("classifier")
    # The classifier of a multiple choice has one output, whatever the options are called.
    if classifier is None or old == labels or config.task != "classification":
        return new
    if len(old) != len(labels):
        say(f"the classifier has {len(old)} labels, {len(labels)} are wanted; it is left out")
        del tree["head"]["classifier"]
    elif set(old) == set(labels):
        say(f"the classifier's labels are put into the order {', '.join(labels)}")
        order = [old.index(label) for label in labels]
        tree["head"]["classifier"] = {
            "kernel": np.ascontiguousarray(classifier["kernel"][:, order]),
            "bias": classifier["bias"][order],
        }
    elif not all(_is_generic(label, i) for i, label in enumerate(old)):
        say(f"the classifier's labels, {', '.join(old)}, are renamed to {', '.join(labels)}, in this order")
    return new


def _is_generic(label: str, index: int) -> bool:
    """A name that only repeats the id, as the frameworks write where nobody named the labels."""
    return label in (str(index), f"LABEL_{index}")


def _keep_layers(config: ModelConfig, tree: Tree, layers: Sequence[int], say: Announce) -> ModelConfig:
    layers = list(layers)
    if not layers or len(set(layers)) < len(layers) or not all(0 <= i < config.num_layers for i in layers):
        raise UserError(
            f"keep_layers is {layers}; expected different numbers from 0 to {config.num_layers - 1}, "
            "the checkpoint's layers"
        )
    kept = {f"layer_{new}": tree["encoder"][f"layer_{old}"] for new, old in enumerate(layers)}
    for i in range(config.num_layers):
        del tree["encoder"][f"layer_{i}"]
    tree["encoder"].update(kept)
    say(f"keeping layers {', '.join(map(str, layers))} of {config.num_layers}")
    return dataclasses.replace(config, num_layers=len(layers))


def _resize_positions(config: ModelConfig, tree: Tree, rows: int, say: Announce) -> ModelConfig:
    if rows < 2:
        raise UserError(f"max_positions is {rows}; at least 2 are needed, for [CLS] and [SEP]")
    if rows == config.max_positions:
        return config
    # Repeating the table keeps what it knows about neighbors; only the seams are new.
    position = tree["encoder"]["embeddings"]["position"]
    position["embedding"] = position["embedding"][np.arange(rows) % config.max_positions]
    how = "repeated from its start" if rows > config.max_positions else "cut"
    say(f"the position table of {config.max_positions} rows is {how} to make {rows}")
    return dataclasses.replace(config, max_positions=rows, max_length=min(rows, config.max_length))


def _set_max_length(config: ModelConfig, max_length: int | None) -> ModelConfig:
    if max_length is None:
        return config
    if not 2 <= max_length <= config.max_positions:
        raise UserError(
            f"max_length is {max_length}; the model has {config.max_positions} positions, so expected "
            f"2 to {config.max_positions}. Set max_positions to extend the position table"
        )
    return dataclasses.replace(config, max_length=max_length)


def _initialize_missing(config: ModelConfig, tree: Tree, seed: int, say: Announce) -> tuple[str, ...]:
    fresh: dict[str, None] = {}
    for p in parameters(config):
        if get_leaf(tree, p.path) is None:
            set_leaf(tree, p.path, _initial_value(p, config, seed))
            fresh[p.part] = None
    if fresh:
        parts = ", ".join(_OPTIONAL_PARTS[part] for part in fresh)
        say(f"not in the checkpoint, initialized at random, to be trained before use: {parts}")
    return tuple(fresh)


def _initial_value(p: Parameter, config: ModelConfig, seed: int) -> np.ndarray:
    if not p.transposed:
        return np.zeros(p.shape, np.float32)
    # A generator for each parameter: its values do not depend on what else is missing.
    rng = np.random.default_rng([seed, zlib.crc32(p.name.encode())])
    return rng.normal(0.0, config.initializer_range, p.shape[::-1]).astype(np.float32)

"""Load and save model directories: Hugging Face's BERT and DistilBERT, published TR-BERT models, our own.

Logs every part of a loaded model that is new (a classifier, the token selectors, a longer position table);
raises an error that lists every difference if the weights do not fit. Source: docs/method.md, "Checkpoints".
"""

import dataclasses
import logging
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from trbert_jax import io
from trbert_jax.errors import UserError, first_lines, iterable, whole_number
from trbert_jax.io import read_json, write_json
from trbert_jax.io.outputs import atomic_directory, atomic_file, contents
from trbert_jax.model.card import CARD, model_card, with_numbers
from trbert_jax.model.config import (
    ModelConfig,
    foreign_head,
    labels_from_dict,
    model_config_from_dict,
    model_config_to_dict,
)
from trbert_jax.model.heads import HEADS
from trbert_jax.model.tokenizers import Tokenizer, check_vocabulary, find_tokenizer, save_tokenizer
from trbert_jax.model.weight_files import (
    FLAX,
    SAFETENSORS,
    SMALL_FILES,
    TORCH,
    UNFINISHED,
    local_directory,
    read_weights,
    write_weights,
)
from trbert_jax.model.weights import (
    Tree,
    from_original_names,
    original_names,
    parameters,
    to_original_names,
)

logger = logging.getLogger(__name__)

_MODEL_FILES = {*SMALL_FILES, CARD, SAFETENSORS, TORCH, FLAX}


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A loaded checkpoint."""

    config: ModelConfig  # the model's shape, as loaded
    params: Tree  # nested dict of float32 numpy arrays
    tokenizer: Tokenizer | None  # None if the directory has none
    newly_initialized: tuple[str, ...] = ()  # parts with random values, see `weights.Parameter.part`
    left_out: str = ""  # kind of the checkpoint's head if it is of another kind and was left out


def load_pretrained(
    path_or_id: str | Path,
    *,
    task: str | None = None,
    labels: Sequence[str] | None = None,
    max_positions: int | None = None,
    keep_layers: Sequence[int] | None = None,
    max_length: int | None = None,
    selector_match: bool | None = None,
    seed: int = 0,
) -> Pretrained:
    """Loads a checkpoint from a directory or the Hugging Face hub; None takes what the checkpoint has.

    Logs a warning if parts are newly initialized or labels renamed, and every other change as info.

    Args:
      task: a key of `HEADS`. The head of another task is left out.
      labels: label names in the order of their ids. The checkpoint's classifier is kept if it has
        as many (reordered if it has the same names in another order), else a new one is made.
      max_positions: rows of the position table, which repeats the pretrained one or is its beginning.
      keep_layers: indices of the layers to keep, in the order of the new model.
      max_length: padded length for training, see `ModelConfig.max_length`.
      selector_match: see `ModelConfig.selector_match`. Selectors of the other kind are left out.
      seed: of the random initialization: normal(0, initializer_range), biases 0.

    Raises `UserError` for no checkpoint, a damaged or unfinished one, names or shapes that do not fit.
    """
    directory = local_directory(path_or_id)
    values, source = read_config(directory), str(directory / "config.json")
    config, weights = model_config_from_dict(values, source), read_weights(directory)
    names = original_names(weights, config)
    if known := _known_from(weights, names, config, values):
        values = {**values, **known}
        config = model_config_from_dict(values, source)
    left_out = foreign_head(values) or ""
    if left_out or task not in (None, config.task):
        kind = left_out or f"task {config.task}"
        config = _leave_out_head(config, weights, names, kind, task or ModelConfig.task)
    tree, differences, unused = from_original_names(weights, config)
    if differences:
        kind = f"{config.model_type} model for {config.task} with {config.num_layers} layers"
        lines = (f"{directory}: the weights are not those of a {kind}", *first_lines(differences))
        raise UserError("\n  ".join(lines))
    if unused:
        listed = ", ".join(first_lines(unused, 3))
        logger.warning("%s: left out tensors that are no part of the model: %s", directory, listed)

    if labels is not None:
        config = _change_labels(config, tree, tuple(iterable("labels", labels, "labels=[label]")))
    if keep_layers is not None:
        layers = [whole_number("keep_layers", layer, 0) for layer in keep_layers]
        config = _keep_layers(config, tree, layers)
    if max_positions is not None:
        config = _resize_positions(config, tree, whole_number("max_positions", max_positions, 1))
    if max_length is not None:
        max_length = whole_number("max_length", max_length, 3)  # [CLS], one token, [SEP]
        if max_length > config.max_positions:
            expected = f"3 up to the model's {config.max_positions} positions; set max_positions to have more"
            raise UserError(f"max_length is {max_length}; expected {expected}")
        config = dataclasses.replace(config, max_length=max_length)
    if selector_match is not None and selector_match != config.selector_match:
        config = _change_selectors(config, tree, selector_match)
    _check_finite(config, tree, directory)
    tree, new = _initialize_missing(config, tree, seed)
    if new:
        logger.warning("%s: initialized at random, to be trained before use: %s", directory, ", ".join(new))
    tokenizer = find_tokenizer(directory, config.backbone.special_tokens)
    if tokenizer is not None:
        check_vocabulary(tokenizer, config, str(directory))
    return Pretrained(config, tree, tokenizer, new, left_out if set(new) - {"selectors"} else "")


def read_config(directory: Path) -> dict[str, Any]:
    """Reads the config.json of a model. Raises `UserError` if the folder is that of a run, or no model's."""
    file, inner = directory / "config.json", directory / "model"
    values = read_json(file) if file.is_file() else None
    if values is None or (isinstance(values, Mapping) and "workdir" in values):  # or the folder of a run
        if (inner / "config.json").is_file():
            raise UserError(f"{directory}: the model is in a folder of this one; give {inner}")
        if values is not None:
            others = sorted(str(path.parent) for path in directory.glob("*/model/config.json"))
            has = f"; it has {', '.join(others)}" if others else "; finish the run first"
            raise UserError(f"{directory}: a work directory, whose run has no {inner} yet{has}")
        raise UserError(f"{directory}: no config.json here, so this is no finished model {UNFINISHED}")
    if not isinstance(values, Mapping):
        raise UserError(f"{directory / 'config.json'}: expected a JSON object")
    return dict(values)


def save_pretrained(
    directory: str | Path,
    config: ModelConfig,
    params: Tree,
    tokenizer: Tokenizer | None,
    *,
    exclude: Collection[str] = (),
    **card: Any,
) -> None:
    """Writes a model directory, whole or not at all.

    It holds `config.json` (Hugging Face's, with our settings under `trbert`), `model.safetensors`
    (float32, original names), the tokenizer's files, if any, and `README.md`, a card with the options `card`
    of `model_card`. `load_pretrained` returns every bit of it; `transformers` loads the dense model from it.
    Replaces an existing model directory. Leaves out the untrained parts that `exclude` names as in
    `Pretrained.newly_initialized`; loading initializes them anew.

    Raises `UserError` if the directory cannot be written or holds files that are not a model's, `ValueError`
    if `params` lacks parameters of the model.
    """
    check_replaceable(Path(directory))
    wanted = {p.name for p in parameters(config) if p.part not in exclude}
    weights = {k: v for k, v in to_original_names(params, config).items() if k in wanted}
    missing = sorted(wanted - set(weights))
    if missing:
        raise ValueError(f"parameters are missing: {', '.join(missing)}")
    with atomic_directory(directory) as temporary:
        write_json(temporary / "config.json", model_config_to_dict(config))
        write_weights(temporary / SAFETENSORS, weights)
        write_card(temporary, config, reduces="selectors" not in exclude, **card)
        if tokenizer is not None:
            save_tokenizer(temporary, tokenizer, config)


def write_card(directory: Path, config: ModelConfig, **options: Any) -> None:
    """Writes README.md of a model directory, with the options of `model_card`.

    One that is there gets the numbers of `config` alone, if it still has a place for them.
    """
    path = directory / CARD
    old = io.read_text(path) if path.exists() else None
    with atomic_file(path) as stream:
        stream.write(model_card(config, **options) if old is None else with_numbers(old, config))


def check_replaceable(directory: Path) -> None:
    """Raises `UserError` if replacing a directory would delete files that are not a model's."""
    if not directory.is_dir():
        return
    others = sorted(p.name for p in contents(directory) if p.is_dir() or p.name not in _MODEL_FILES)
    if others:
        more = ", ..." if len(others) > 3 else ""
        files = f"files that are no part of a model and would be deleted ({', '.join(others[:3])}{more})"
        raise UserError(f"{directory}: holds {files}; choose another directory, or move them away")


def _known_from(
    weights: Mapping[str, np.ndarray],
    names: Mapping[str, str | None],
    config: ModelConfig,
    values: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns what config.json leaves out and the weights decide: the class, or the number of labels."""
    heads = {full: weights[name] for name, full in names.items() if full}
    classifier, span = heads.get("classifier.weight"), heads.get("qa_outputs.weight")
    if config.task != "classification":
        return {}
    if classifier is not None:
        return {} if labels_from_dict(values) else {"num_labels": len(classifier)}
    if span is None or len(span) != 2 or values.get("architectures") or "trbert" in values:
        return {}
    return {"architectures": [config.backbone.class_name + HEADS["span"].class_suffix]}


def _leave_out_head(
    config: ModelConfig, weights: dict[str, np.ndarray], names: Mapping[str, str | None], kind: str, task: str
) -> ModelConfig:
    """Removes the checkpoint's head from its weights; returns the configuration for another task.

    `names` has the full names of the weights, from `original_names`.
    """
    layers = {"pre_classifier", *(layer for head in HEADS.values() for layer in head.layers)}
    removed = sorted(name for name, full in names.items() if full and full.partition(".")[0] in layers)
    for name in removed:
        del weights[name]
    if removed:
        logger.info("left out the head, which is that of %s: %s", kind, ", ".join(removed))
    return dataclasses.replace(
        config, task=task, labels=ModelConfig.labels, score="", inputs=ModelConfig.inputs
    )


def _check_finite(config: ModelConfig, tree: Tree, directory: Path) -> None:
    weights = to_original_names(tree, config)
    bad = sorted(name for name, array in weights.items() if not np.isfinite(array).all())
    if bad:
        causes = "the training that wrote them diverged, or the file is damaged"
        names = ", ".join(first_lines(bad))
        raise UserError(f"{directory}: weights that are not finite numbers: {names}; {causes}")


def _change_labels(config: ModelConfig, tree: Tree, labels: tuple[str, ...]) -> ModelConfig:
    if len(set(labels)) < len(labels) or not labels:
        raise UserError(f"label names must be given and differ: {', '.join(labels) or 'none given'}")
    old, score = config.labels, config.score if len(labels) == 1 else ""
    new = dataclasses.replace(config, labels=labels, score=score)
    classifier = tree.get("head", {}).get("classifier")
    # The classifier of a multiple choice has one output, whatever the options are called.
    if classifier is None or old == labels or config.task != "classification":
        return new
    if len(old) != len(labels):
        logger.info("left out the classifier, which has %d labels instead of %d", len(old), len(labels))
        del tree["head"]["classifier"]
    elif set(old) == set(labels):
        logger.info("reordered the classifier's labels: %s", ", ".join(first_lines(labels)))
        order = [old.index(label) for label in labels]
        kernel = np.ascontiguousarray(classifier["kernel"][:, order])
        tree["head"]["classifier"] = {"kernel": kernel, "bias": classifier["bias"][order]}
    elif any(label not in (str(i), f"LABEL_{i}") for i, label in enumerate(old)):
        # The frameworks write LABEL_0, ... for labels without a name.
        before, now = (", ".join(first_lines(names)) for names in (old, labels))
        logger.warning("renamed the classifier's labels, %s, to %s", before, now)
    return new


def _keep_layers(config: ModelConfig, tree: Tree, layers: list[int]) -> ModelConfig:
    if not layers or len(set(layers)) < len(layers) or not all(0 <= i < config.num_layers for i in layers):
        expected = f"different numbers from 0 to {config.num_layers - 1}, the checkpoint's layers"
        raise UserError(f"keep_layers is {layers}; expected {expected}")
    all_layers = [tree["encoder"].pop(f"layer_{i}") for i in range(config.num_layers)]
    tree["encoder"].update({f"layer_{new}": all_layers[old] for new, old in enumerate(layers)})
    logger.info("kept layers %s of %d", ", ".join(map(str, layers)), config.num_layers)
    new = dataclasses.replace(config, num_layers=len(layers), operating_points=())
    if "selector_0" in tree["encoder"] and layers != list(range(config.num_layers)):
        before, now = (f"before {_layers(x.reduction_layers)} of {x.num_layers}" for x in (config, new))
        logger.warning(
            "kept the selectors, which were trained %s and now drop tokens %s; train them again", before, now
        )
    return new


def _change_selectors(config: ModelConfig, tree: Tree, match: bool) -> ModelConfig:
    if match and not config.type_vocab_size:
        raise UserError(f"selector_match is true, but {config.backbone.name} has no token types; use bert")
    for stage in range(config.num_selectors):
        if tree["encoder"].pop(f"selector_{stage}", None):
            logger.info("left out selector %d, which reads other inputs", stage)
    return dataclasses.replace(config, selector_match=match, operating_points=())


def _layers(numbers: Sequence[int]) -> str:
    return f"layer{'s' * (len(numbers) > 1)} {' and '.join(map(str, numbers))}"


def _resize_positions(config: ModelConfig, tree: Tree, rows: int) -> ModelConfig:
    if rows < 2:
        raise UserError(f"max_positions is {rows}; at least 2 are needed, for [CLS] and [SEP]")
    if rows == config.max_positions:
        return config
    # Repeating the table keeps what it knows about neighbors; only the seams are new.
    position = tree["encoder"]["embeddings"]["position"]
    position["embedding"] = position["embedding"][np.arange(rows) % config.max_positions]
    how = "repeated" if rows > config.max_positions else "cut"
    logger.info("%s the position table of %d rows to make %d", how, config.max_positions, rows)
    return dataclasses.replace(config, max_positions=rows, max_length=min(rows, config.max_length))


def _initialize_missing(config: ModelConfig, tree: Tree, seed: int) -> tuple[Tree, tuple[str, ...]]:
    """Adds missing parameters; returns the tree and the parts they belong to."""
    arrays = flatten_dict(tree)
    missing = [p for p in parameters(config) if p.path not in arrays]
    for p in missing:
        # A generator for each parameter: its values do not depend on what else is missing.
        rng = np.random.default_rng([seed, zlib.crc32(p.name.encode())])
        drawn = rng.normal(0.0, config.initializer_range, p.shape[::-1])
        arrays[p.path] = (drawn if p.transposed else np.zeros(p.shape)).astype(np.float32)
    return unflatten_dict(arrays), tuple(dict.fromkeys(p.part for p in missing))

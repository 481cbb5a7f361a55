"""`config.json`: Hugging Face's description of a model and `ModelConfig`, one to the other.

What this project adds stands under the key `trbert`, which other readers of the file ignore.
Source: docs/method.md, "Checkpoints".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from trbert_jax.errors import UserError
from trbert_jax.model.config import TASKS, InputConfig, ModelConfig

# The published code names a model after what it does; the parameters are those of the backbone.
_MODEL_TYPES = {
    "bert": "bert",
    "autobert": "bert",
    "initbert": "bert",
    "distilbert": "distilbert",
    "distilautobert": "distilbert",
    "initdistilbert": "distilbert",
}

# ModelConfig field -> key of config.json.
_BERT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps",
    "hidden_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "classifier_dropout": "classifier_dropout",
    "initializer_range": "initializer_range",
    "pad_token_id": "pad_token_id",
}
_DISTILBERT_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "max_positions": "max_position_embeddings",
    "hidden_dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "classifier_dropout": "seq_classif_dropout",
    "initializer_range": "initializer_range",
    "pad_token_id": "pad_token_id",
}
# What the frameworks assume where config.json is silent and ModelConfig's default differs.
_DISTILBERT_DEFAULTS = {"num_layers": 6, "type_vocab_size": 0, "classifier_dropout": 0.2}
_ACTIVATION_KEYS = {"bert": "hidden_act", "distilbert": "activation"}
_CLASSES = {"bert": "Bert", "distilbert": "DistilBert"}
# What follows the class's name for each task; the frameworks have no model for the last two.
_ARCHITECTURES = {
    "classification": "ForSequenceClassification",
    "multiple_choice": "ForMultipleChoice",
    "span": "ForQuestionAnswering",
    "candidates": "Model",
    "multi_hop": "Model",
}
# Settings that change the computation in ways this encoder does not offer.
_ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("absolute", None),
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "problem_type": ("single_label_classification", None),
}
_OWN_KEYS = ("task", "selector_hidden", "max_length", "inputs")
_DEFAULT_MAX_LENGTH = 512
_ZERO_ALLOWED = ("pad_token_id",)


def model_config_from_dict(values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads a model's shape from the contents of a `config.json`.

    Args:
      values: BERT's or DistilBERT's configuration, or that of a published TR-BERT (`autobert`,
        `distilautobert`, `initbert`, `initdistilbert`).
      source: named in errors.

    Raises:
      UserError: a model of another type, a setting this encoder does not have, a bad value.
    """
    model_type = _MODEL_TYPES.get(values.get("model_type", ""))
    if model_type is None:
        raise UserError(
            f"{source}: model_type is {values.get('model_type')!r}; expected one of {', '.join(_MODEL_TYPES)}"
        )
    _check_supported(values, model_type, source)
    fields: dict[str, Any] = {"model_type": model_type}
    if model_type == "distilbert":
        fields.update(_DISTILBERT_DEFAULTS)
    for field, key in (_BERT_KEYS if model_type == "bert" else _DISTILBERT_KEYS).items():
        if values.get(key) is not None:
            fields[field] = _number(values[key], getattr(ModelConfig, field), field, f"{source}: {key}")
    if model_type == "bert" and values.get("classifier_dropout") is None and "hidden_dropout" in fields:
        fields["classifier_dropout"] = fields["hidden_dropout"]
    labels = labels_from_dict(values, source)
    if labels:
        fields["labels"] = labels
    fields["task"] = _task_of(values)
    fields.update(_own_section(values.get("trbert", {}), source))

    config = ModelConfig(**{"max_length": _default_max_length(fields), **fields})
    if config.hidden_size % config.num_heads:
        raise UserError(
            f"{source}: the hidden size, {config.hidden_size}, is not a multiple of the number of "
            f"attention heads, {config.num_heads}"
        )
    if config.max_length > config.max_positions:
        raise UserError(
            f"{source}: trbert.max_length is {config.max_length}, but the model has only "
            f"{config.max_positions} positions"
        )
    return config


def model_config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """The contents of a `config.json` that Hugging Face's classes read; the inverse of the above."""
    keys = _BERT_KEYS if config.model_type == "bert" else _DISTILBERT_KEYS
    return {
        "architectures": [_CLASSES[config.model_type] + _ARCHITECTURES[config.task]],
        "model_type": config.model_type,
        **{key: getattr(config, field) for field, key in keys.items()},
        _ACTIVATION_KEYS[config.model_type]: "gelu",
        "id2label": {str(i): label for i, label in enumerate(config.labels)},
        "label2id": {label: i for i, label in enumerate(config.labels)},
        "trbert": _own_values(config),
    }


def _own_values(config: ModelConfig) -> dict[str, Any]:
    values = {key: getattr(config, key) for key in _OWN_KEYS if key != "inputs"}
    return {**values, "inputs": dataclasses.asdict(config.inputs)} if config.inputs.data else values


def labels_from_dict(values: Mapping[str, Any], source: str = "config.json") -> tuple[str, ...] | None:
    """Label names in the order of their ids; numbers where only their count is known, else None."""
    count = values.get("num_labels")
    if count is not None:
        count = _number(count, 2, "num_labels", f"{source}: num_labels")
    names = values.get("id2label")
    if not names:
        return None if count is None else tuple(str(i) for i in range(count))
    try:
        by_id = {int(i): str(label) for i, label in names.items()}
        labels = tuple(by_id[i] for i in range(len(names)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{source}: id2label is {names!r}; expected an object from the ids 0, 1, ... to label names"
        ) from error
    if len(set(labels)) < len(labels):
        raise UserError(f"{source}: id2label names a label twice: {', '.join(labels)}")
    if count not in (None, len(labels)):
        raise UserError(f"{source}: num_labels is {count}, but id2label has {len(labels)} labels")
    return labels


def _check_supported(values: Mapping[str, Any], model_type: str, source: str) -> None:
    key = _ACTIVATION_KEYS[model_type]
    if values.get(key, "gelu") not in ("gelu", "gelu_python"):
        raise UserError(f"{source}: {key} is {values[key]!r}; only 'gelu' is supported")
    for key, allowed in _ONLY_VALUES.items():
        if values.get(key) not in allowed:
            raise UserError(f"{source}: {key} is {values[key]!r}; only {allowed[0]!r} is supported")


def _own_section(section: Any, source: str) -> dict[str, Any]:
    if not isinstance(section, Mapping):
        raise UserError(f"{source}: trbert is {section!r}; expected an object with {', '.join(_OWN_KEYS)}")
    unknown = sorted(set(section) - set(_OWN_KEYS))
    if unknown:
        raise UserError(
            f"{source}: trbert has keys that this version does not know: {', '.join(unknown)}; "
            "was it written by a later version of trbert_jax?"
        )
    task = section.get("task", TASKS[0])
    if task not in TASKS:
        raise UserError(f"{source}: trbert.task is {task!r}; expected one of {', '.join(TASKS)}")
    numbers = {
        key: _number(value, getattr(ModelConfig, key), key, f"{source}: trbert.{key}")
        for key, value in section.items()
        if key not in ("task", "inputs")
    }
    found = {**numbers, "task": task} if "task" in section else numbers
    return {**found, "inputs": _inputs(section["inputs"], source)} if "inputs" in section else found


def _inputs(section: Any, source: str) -> InputConfig:
    defaults = dataclasses.asdict(InputConfig())
    where = f"{source}: trbert.inputs"
    if not isinstance(section, Mapping) or not set(section) <= set(defaults):
        raise UserError(f"{where} is {section!r}; expected an object with some of {', '.join(defaults)}")
    for key, value in section.items():
        like = type(defaults[key])
        if isinstance(value, bool) != (like is bool) or not isinstance(
            value, (int, float) if like is float else like
        ):
            raise UserError(f"{where}.{key} is {value!r}; expected {like.__name__}")
        if like is int and value < 0:
            raise UserError(f"{where}.{key} is {value!r}; expected a whole number from 0 on")
    return InputConfig(**section)


def _task_of(values: Mapping[str, Any]) -> str:
    """The task that a checkpoint of another origin was made for, by the name of its class."""
    for name in values.get("architectures") or ():
        for task, ending in _ARCHITECTURES.items():
            if ending != "Model" and str(name).endswith(ending):
                return task
    return TASKS[0]


def _default_max_length(fields: Mapping[str, Any]) -> int:
    return min(_DEFAULT_MAX_LENGTH, fields.get("max_positions", ModelConfig.max_positions))


def _number(value: Any, like: Any, field: str, where: str) -> Any:
    """A number of the type of `like`: a count, or a real number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where} is {value!r}; expected a number")
    if isinstance(like, float):
        if not (value >= 0 and (value <= 1 or not field.endswith("dropout"))):
            raise UserError(f"{where} is {value!r}; expected a number from 0 on (a probability for dropout)")
        return float(value)
    least = 0 if field in _ZERO_ALLOWED else 1
    if value != int(value) or value < least:
        raise UserError(f"{where} is {value!r}; expected a whole number, at least {least}")
    return int(value)

"""Describe a model: its sizes under one set of names for all backbones, read from and written to config.json.

The file is Hugging Face's; settings of this project are under its key `trbert`, which other readers ignore.
Source: docs/method.md, "Checkpoints".
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trbert_jax.datasets.tables import Fields
from trbert_jax.errors import UserError, first_lines
from trbert_jax.model import operating_points
from trbert_jax.model.backbones import BACKBONES, Backbone, find_backbone
from trbert_jax.model.operating_points import Evaluation, OperatingPoint

if TYPE_CHECKING:
    from trbert_jax.model.heads import Head

# Settings of Hugging Face that change the computation in ways this encoder does not offer.
_ONLY_VALUES = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
# Classes that train an encoder alone: whatever head is in their checkpoint, it is not theirs.
_PRETRAINING = ("PreTraining", "MaskedLM", "NextSentencePrediction")
# How one output becomes a score -> `problem_type` in config.json.
_SCORES = {"sigmoid": "multi_label_classification", "identity": "regression"}
_LABELS = "single_label_classification"
_OWN_KEYS = (
    "task",
    "selector_hidden",
    "selector_match",
    "max_length",
    "inputs",
    "operating_points",
    "evaluation",
)
_IF_USED = (
    "selector_match",
    "inputs",
    "operating_points",
    "evaluation",
)  # of these, left out where they say nothing


@dataclasses.dataclass(frozen=True)
class InputConfig:
    """How records become inputs; stored with the model, which must be asked as it was trained."""

    data: str = ""  # name of the data set of questions it was trained on, which decides their form
    choices: str = "pairs"  # form of a multiple choice, see `config.DataConfig.choices`
    # See `config.BackboneConfig`; 0 for the data set's default.
    max_question_length: int = 0
    window_step: int = 0
    max_segments: int = 1
    unanswerable: bool = False  # whether questions may have no answer, as in SQuAD 2.0
    null_threshold: float = 0.0  # null odds above which such a question gets no answer
    # Fields of the texts it was trained on; the second is empty for single texts.
    text_field: str = "text"
    text_pair_field: str = ""
    label_field: str = "label"

    def fields(self, text: str | None = None, pair: str | None = None, label: str | None = None) -> Fields:
        """Returns the fields to read: the given names, else those of training, else the default ones."""
        given = {"text": text, "pair": pair, "label": label}
        return Fields(
            text or self.text_field,
            pair or self.text_pair_field or None,
            label or self.label_field,
            or_default=tuple(name for name, value in given.items() if value is None),
        )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A post-LN encoder with token selectors and the head of a task.

    Sizes are counts, dropouts are probabilities. See docs/method.md, "Encoder".
    """

    model_type: str = "bert"  # key of `BACKBONES`
    task: str = "classification"  # key of `HEADS`
    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512  # rows of the position table; the longest input, special tokens included
    type_vocab_size: int = 2  # rows of the token type table; 0 for none
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"  # key of `layers.ACTIVATIONS`, in the layers; the selectors' is the exact GELU
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.1  # before the last linear layer of the classification head
    initializer_range: float = 0.02
    pad_token_id: int = 0
    labels: tuple[str, ...] = ("0", "1")  # label names in the order of their ids, one per class
    # How one output of a classifier becomes a score, not a label: `sigmoid` or `identity`; else empty.
    score: str = ""
    selector_hidden: int = 32  # width of a selector's hidden layer
    # Whether selectors read how well a token matches the other segment, see `reduction.match`.
    selector_match: bool = False
    max_length: int = 512  # padded length the selectors were trained with, the unit of the length penalty
    inputs: InputConfig = InputConfig()  # how records become inputs
    operating_points: tuple[OperatingPoint, ...] = ()  # thresholds for known speeds
    evaluation: Evaluation | None = None  # numbers of stage evaluate

    @property
    def backbone(self) -> Backbone:
        """The record of the model type."""
        return BACKBONES[self.model_type]

    @property
    def head(self) -> Head:
        """The record of the task's head."""
        from trbert_jax.model.heads import HEADS

        return HEADS[self.task]

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @property
    def num_outputs(self) -> int:
        """Outputs of the head's last layer, per token or per `[CLS]`."""
        return self.head.num_outputs or self.num_labels

    @property
    def reads_all_tokens(self) -> bool:
        """Whether the head reads the state of every token, dropped ones too."""
        return self.head.reads_all_tokens

    @property
    def reduction_layers(self) -> tuple[int, ...]:
        """Layers before which tokens are dropped, 0-based: 1 and L//2, once each (paper, section 3)."""
        return tuple(sorted({i for i in (1, self.num_layers // 2) if i < self.num_layers}))

    @property
    def num_reductions(self) -> int:
        """Points of reduction that run; a 2- or 3-layer model has one."""
        return len(self.reduction_layers)

    @property
    def num_selectors(self) -> int:
        """Selectors that exist: always two on disk, the second of a shallow model unused."""
        return 2


def model_config_from_dict(values: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads a model's shape from the `config.json` of a Hugging Face, published TR-BERT or saved model.

    Raises `UserError`, naming `source`, for an unknown model type, an unsupported setting or a bad value.
    """
    backbone = _backbone(values, source)
    for key, only in _ONLY_VALUES.items():
        if values.get(key) not in (only, None):
            raise UserError(f"{source}: {key} is {values[key]!r}; only {only!r} is supported")

    fields: dict[str, Any] = {"model_type": backbone.name, **backbone.defaults}
    for field, key in backbone.keys.items():
        if values.get(key) is not None:
            fields[field] = _number(values[key], field, f"{source}: {key}")
    if "hidden_dropout" in fields:
        fields.setdefault("classifier_dropout", fields["hidden_dropout"])
    fields["activation"] = _activation(values, backbone.activation_key, source)
    fields["labels"] = labels_from_dict(values, source) or ModelConfig.labels
    fields["task"] = _task_of(values)
    fields["max_length"] = min(ModelConfig.max_length, fields.get("max_positions", ModelConfig.max_positions))
    config = ModelConfig(**{**fields, **_own_section(values.get("trbert", {}), source)})
    if config.task == "classification" and config.num_labels == 1:
        config = dataclasses.replace(config, score=_score(values, source))
    if config.head.data and not config.inputs.data:
        config = dataclasses.replace(config, inputs=dataclasses.replace(config.inputs, data=config.head.data))
    if config.hidden_size % config.num_heads:
        sizes = (
            f"hidden size, {config.hidden_size}, is not a multiple of the attention heads, {config.num_heads}"
        )
        raise UserError(f"{source}: the {sizes}")
    if config.selector_match and not config.type_vocab_size:
        raise UserError(f"{source}: trbert.selector_match needs token types, which {backbone.name} lacks")
    if config.max_length > config.max_positions:
        problem = f"{config.max_length}, but the model has only {config.max_positions} positions"
        raise UserError(f"{source}: trbert.max_length is {problem}")
    return config


def model_config_to_dict(config: ModelConfig) -> dict[str, Any]:
    """Builds the contents of a `config.json` that Hugging Face's classes read."""
    backbone = config.backbone
    own = {key: getattr(config, key) for key in _OWN_KEYS if key not in _IF_USED}
    if config.selector_match:
        own["selector_match"] = True
    if config.operating_points:
        own["operating_points"] = operating_points.to_dict(config.operating_points)
    if config.evaluation:
        own["evaluation"] = dataclasses.asdict(config.evaluation)
    if config.inputs != InputConfig():
        own["inputs"] = dataclasses.asdict(config.inputs)
    return {
        "architectures": [backbone.class_name + config.head.class_suffix],
        "model_type": backbone.name,
        **{key: getattr(config, field) for field, key in backbone.keys.items()},
        backbone.activation_key: config.activation,
        "id2label": {str(i): label for i, label in enumerate(config.labels)},
        "label2id": {label: i for i, label in enumerate(config.labels)},
        **({"problem_type": _SCORES.get(config.score, _LABELS)} if config.num_labels == 1 else {}),
        "trbert": own,
    }


def labels_from_dict(values: Mapping[str, Any], source: str = "config.json") -> tuple[str, ...] | None:
    """Returns label names in the order of their ids, numbers if only their count is known, else None."""
    if (count := values.get("num_labels")) is not None:
        count = _number(count, "num_labels", f"{source}: num_labels")
    names = values.get("id2label")
    if not names:
        return None if count is None else tuple(str(i) for i in range(count))
    try:
        by_id = {int(i): str(label) for i, label in names.items()}
        labels = tuple(by_id[i] for i in range(len(names)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        expected = "an object from the ids 0, 1, ... to label names"
        raise UserError(f"{source}: id2label is {reprlib.repr(names)}; expected {expected}") from error
    if twice := [label for label, count in Counter(labels).items() if count > 1]:
        raise UserError(f"{source}: id2label names a label twice: {', '.join(first_lines(twice))}")
    if count not in (None, len(labels)):
        raise UserError(f"{source}: num_labels is {count}, but id2label has {len(labels)} labels")
    return labels


def foreign_head(values: Mapping[str, Any]) -> str | None:
    """Returns the kind of a checkpoint's head if it is none of `HEADS`, else None."""
    if "trbert" in values:
        return None
    from trbert_jax.model.heads import HEADS

    known = (*(head.class_suffix.removeprefix("For") for head in HEADS.values()), *_PRETRAINING)
    for name in _classes(values):
        kind = name.partition("For")[2]
        if kind and kind not in known:
            return name
    problem, count = values.get("problem_type"), len(labels_from_dict(values) or ModelConfig.labels)
    if problem not in (None, _LABELS) and (count > 1 or problem not in _SCORES.values()):
        return f"{problem} with {count} outputs"
    return None


def _backbone(values: Mapping[str, Any], source: str) -> Backbone:
    """Returns the backbone of `model_type`, or of the classes and keys of a config.json without it."""
    model_type = values.get("model_type")
    if backbone := find_backbone(model_type):
        return backbone
    if not model_type:  # the first versions of transformers did not write it
        for backbone in BACKBONES.values():
            sizes = {backbone.keys[field] for field in ("hidden_size", "num_layers", "num_heads")}
            fits = all(name.startswith(backbone.class_name) for name in _classes(values))
            if fits and sizes <= set(values):
                return backbone
    known = ", ".join(name for b in BACKBONES.values() for name in (b.name, *b.aliases))
    raise UserError(f"{source}: model_type is {model_type!r}; expected one of {known}")


def _activation(values: Mapping[str, Any], key: str, source: str) -> str:
    from trbert_jax.model.layers import ACTIVATIONS

    name = values.get(key) or ModelConfig.activation
    if name not in tuple(ACTIVATIONS):
        raise UserError(f"{source}: {key} is {name!r}; expected one of {', '.join(ACTIVATIONS)}")
    return str(name)


def _score(values: Mapping[str, Any], source: str) -> str:
    """Returns what makes a score of a classifier's one output."""
    problem, section = values.get("problem_type"), values.get("sentence_transformers")
    if problem == _LABELS and "trbert" in values:  # trained here on one class
        return ""
    function = section.get("activation_fn") if isinstance(section, Mapping) else None
    function = function or values.get("sbert_ce_default_activation_function")
    if function is None:
        return "identity" if problem == _SCORES["identity"] else "sigmoid"
    if (name := str(function).rpartition(".")[2].lower()) not in _SCORES:
        expected = ", ".join(_SCORES)
        raise UserError(f"{source}: the activation of the score is {function!r}; expected one of {expected}")
    return name


def _task_of(values: Mapping[str, Any]) -> str:
    """Returns the task that a checkpoint of another origin was made for, by the name of its class."""
    from trbert_jax.model.heads import HEADS

    heads = [head for head in HEADS.values() if head.class_suffix != "Model"]
    found = (h.name for name in _classes(values) for h in heads if name.endswith(h.class_suffix))
    return next(found, ModelConfig.task)


def _classes(values: Mapping[str, Any]) -> list[str]:
    names = values.get("architectures") or []
    names = [names] if isinstance(names, str) else [*map(str, names)] if isinstance(names, list) else []
    return [name.removeprefix("Flax").removeprefix("TF") for name in names]


def _own_section(section: Any, source: str) -> dict[str, Any]:
    from trbert_jax.model.heads import HEADS

    if not isinstance(section, Mapping):
        raise UserError(f"{source}: trbert is {section!r}; expected an object with {', '.join(_OWN_KEYS)}")
    unknown = sorted(set(section) - set(_OWN_KEYS))
    if unknown:
        question = "was it written by a later version of trbert_jax?"
        raise UserError(f"{source}: trbert has unknown keys: {', '.join(unknown)}; {question}")
    fields = dict(section)
    if fields.get("task", ModelConfig.task) not in tuple(HEADS):
        raise UserError(f"{source}: trbert.task is {fields['task']!r}; expected one of {', '.join(HEADS)}")
    if fields.get("selector_match", False) not in (True, False):
        raise UserError(
            f"{source}: trbert.selector_match is {fields['selector_match']!r}; expected true or false"
        )
    for key in {"selector_hidden", "max_length"} & set(fields):
        fields[key] = _number(fields[key], key, f"{source}: trbert.{key}")
    if "inputs" in fields:
        fields["inputs"] = _inputs(fields["inputs"], f"{source}: trbert.inputs")
    if "operating_points" in fields:
        where = f"{source}: trbert.operating_points"
        fields["operating_points"] = operating_points.from_dict(fields["operating_points"], where)
    if "evaluation" in fields:
        where = f"{source}: trbert.evaluation"
        fields["evaluation"] = Evaluation.from_dict(fields["evaluation"], where)
    return fields


def _inputs(section: Any, where: str) -> InputConfig:
    defaults = dataclasses.asdict(InputConfig())
    if not isinstance(section, Mapping) or not set(section) <= set(defaults):
        raise UserError(f"{where} is {section!r}; expected an object with some of {', '.join(defaults)}")
    for key, value in section.items():
        kind = type(defaults[key])
        kinds = (int, float) if kind is float else (kind,)
        if not isinstance(value, kinds) or isinstance(value, bool) != (kind is bool):
            raise UserError(f"{where}.{key} is {value!r}; expected {kind.__name__}")
        if kind is int and value < 0:
            raise UserError(f"{where}.{key} is {value!r}; expected a whole number, at least 0")
    return InputConfig(**section)


def _number(value: Any, field: str, where: str) -> Any:
    """Checks a number: a count, or for a field whose default is a float a number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where} is {value!r}; expected a number")
    if isinstance(getattr(ModelConfig, field), float):
        if not 0 <= value <= (1 if field.endswith("dropout") else math.inf):
            raise UserError(f"{where} is {value!r}; expected a number from 0 on (a probability for dropout)")
        return float(value)
    least = 0 if field == "pad_token_id" else 1
    if value != int(value) or value < least:
        raise UserError(f"{where} is {value!r}; expected a whole number, at least {least}")
    return int(value)

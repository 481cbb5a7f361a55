"""Define the settings of a run and load them from YAML files and `key=value` overrides.

The defaults are the hyper-parameters published for classification (docs/method.md, "Hyper-parameters").
YAML is read strictly: `3e-5` is a number, `no` and `2024-01-01` are text, a key given twice is an error, and
tags and anchors are refused. A file may build on others: `base: OTHER.yaml` or `base: [A.yaml, B.yaml]`.
"""

import dataclasses
import difflib
import functools
import json
import re
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from trbert_jax.datasets import find_dataset
from trbert_jax.datasets.labels import class_name
from trbert_jax.datasets.registry import DEV_SHARE, FIELD_KEYS, OWN_KEYS, SPLITS
from trbert_jax.errors import UserError, iterable
from trbert_jax.io import YamlKey, find_path, parse_yaml, read_json, read_text
from trbert_jax.model.backbones import BACKBONES
from trbert_jax.reduction.rules import DEFAULT_RULE, RULES, rule_names


def _name_from(names: Callable[[], Collection[str]]) -> AfterValidator:
    """Restricts a text to the names of a registry, as they are when the settings are loaded."""

    def check(value: str) -> str:
        if value not in names():
            raise PydanticCustomError("name", "should be one of {expected}", {"expected": ", ".join(names())})
        return value

    return AfterValidator(check)


def _find(path: str) -> str:
    try:
        return str(find_path(path)) if path.startswith("~") or not path.isascii() else path
    except UserError as error:
        raise PydanticCustomError("path", "{reason}", {"reason": str(error)}) from error


def _label(value: Any) -> Any:
    """Returns the class name of a number or boolean, as `datasets.labels` names it."""
    return class_name(value) if isinstance(value, bool | int | float) else value


# Strict: a quoted "8" is not a number, 1 is not true.
Text = Annotated[str, Field(strict=True, min_length=1)]
FilePath = Annotated[Text, AfterValidator(_find)]  # a file or folder, `~` expanded; or a name on the hub
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Index = Annotated[int, Field(strict=True, ge=0)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Threshold = Annotated[Number, Field(gt=0, lt=1)]
Labels = tuple[Annotated[Text, BeforeValidator(_label)], ...]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
# The baseline of a sample is the mean over all samples of its example: with one, every advantage is 0.
NumSamples = Annotated[int, Field(strict=True, ge=2)]
MaxLength = Annotated[int, Field(strict=True, ge=3)]  # [CLS], one token, [SEP]
Backend = Literal["packed", "masked"]  # see `model.packed`
StageName = Annotated[Text, _name_from(lambda: STAGES)]
RuleName = Annotated[Text, _name_from(rule_names)]
BackboneName = Annotated[Text, _name_from(lambda: tuple(BACKBONES))]
BaselineName = Annotated[Text, _name_from(lambda: rule_names("baseline"))]


class Section:
    """A group of settings. A comment explains each field: on its line, or on the lines before it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The examples."""

    name: Text  # a registered data set, text for one's own texts, hf:NAME or tfds:NAME for a library's
    path: FilePath | None = None  # folder of the files; hf, tfds and stdlib have their own unless it is given
    train: FilePath | None = None  # file of rows, or a folder of some; text only; null for that of `path`
    dev: FilePath | None = None  # the same; without a dev set, a part of the training examples serves as one
    test: FilePath | None = None  # the same; without a test set, set evaluate.split to dev
    text_field: Text = "text"  # field of the text; text, hf and tfds only, as the next two
    text_pair_field: Text | None = None  # field of a second text; null for single texts
    label_field: Text = "label"  # field of the label
    labels: Labels | None = None  # names of the classes in order, text and hf only; null for those of train
    dev_share: Threshold = DEV_SHARE  # share of the training examples for dev, without a dev set; text, hf
    # balanced: weight the loss of an example by the inverse share of its class, 1 on average; texts only
    class_weights: Literal["balanced"] | None = None
    max_train_examples: Count | None = None  # largest number of training examples; null for all
    max_eval_examples: Count | None = None  # the same for the dev split and for the test split
    cache_dir: FilePath | None = None  # folder for tokenized examples; null for WORKDIR/cache
    # Folder of `trbert prepare-data`, from which training reads in the background; null to read `path`.
    prepared: FilePath | None = None
    skip_bad_records: Flag = False  # skip and count invalid records; else the first is an error
    # Form of a multiple choice, race only. pairs: each option is an example, right or wrong; independent: a
    # softmax over the options, each with its own selection; shared: one selection for the tokens they share.
    choices: Literal["pairs", "independent", "shared"] = "pairs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScratchConfig(Section):
    """The shape of a model with random weights; used only if model.init is scratch."""

    model_type: BackboneName = "bert"  # the architecture, see `model.backbones`
    vocab_size: Count = 30522  # entries of the vocabulary; an upper limit if the tokenizer is trained
    hidden_size: Count = 768  # width, a multiple of num_heads
    num_layers: Count = 12  # encoder layers
    num_heads: Count = 12  # attention heads
    intermediate_size: Count = 3072  # width of the feed-forward layers
    initializer_range: Positive = 0.02  # of the random weights; a narrow model learns faster with more


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig(Section):
    """The model before training."""

    init: FilePath  # folder or hub id of a Hugging Face BERT or DistilBERT, or scratch for random weights
    max_length: MaxLength = 512  # in tokens, special tokens included; longer texts are cut
    max_positions: Count | None = None  # rows of the position table; null for the checkpoint's, or max_length
    keep_layers: tuple[Index, ...] | None = None  # layers to take from the checkpoint, 0-based; null for all
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters and losses are float32
    # Folder or hub id; null for the one of the checkpoint, or from scratch one trained on the training texts.
    tokenizer: FilePath | None = None
    line_breaks_as_spaces: Flag = False  # read `<br />` as one space, here and in the trained model
    # Longest question in word pieces (with its options for race); null for the data set's default.
    max_question_length: Count | None = None
    # Word pieces between the starts of the windows over a long context; null for the data set's default.
    window_step: Count | None = None
    max_segments: Count = 1  # largest number of segments of a long document; triviaqa and wikihop only
    scratch: ScratchConfig = ScratchConfig()  # the shape if init is scratch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """How all devices of all processes share each batch; affects no result but dropout's masks."""

    strategy: Literal["jit", "pmap"] = "jit"  # one program over a mesh of all devices, or one per device
    fsdp: Count = 1  # devices that share one copy of parameters and optimizer state; more than 1 needs jit
    remat: Flag = False  # recompute activations in the backward pass: less memory, more time


class StageConfig(Section):
    """The settings of a stage. Each field of `RunConfig` of such a type is a stage of that name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(StageConfig):
    """The settings that all trained stages share. A step is one update of the parameters."""

    batch_size: Count = 8  # examples per forward and backward pass
    accumulation_steps: Count = 4  # passes per update, of batch_size x accumulation_steps examples
    learning_rate: Positive = 3e-5  # the peak; the rate rises linearly from 0, then falls linearly to 0
    epochs: Count = 3  # passes over the training examples
    max_steps: Count | None = None  # number of steps in place of epochs
    warmup_fraction: Fraction = 0.1  # share of the steps in which the learning rate rises
    warmup_steps: Count | None = None  # number of these steps, in place of the share
    weight_decay: NonNegative = 0.0  # of AdamW, on everything except biases and LayerNorm weights
    clip_norm: Positive = 1.0  # largest global L2 norm of a gradient; larger ones are scaled down to it
    adam_epsilon: Positive = 1e-8  # of AdamW
    eval_steps: Count | None = None  # steps between evaluations on the dev split; null for once per epoch
    save_steps: Count = 2000  # steps between checkpoints, about the most that an interruption loses
    keep_checkpoints: Count = 2  # number of latest checkpoints to keep, in addition to the best one
    output: Literal["last", "best"] = "last"  # the checkpoint that the next stage starts from, best on dev
    dropout: Flag = True  # whether dropout is on
    # Let padding, as states of zeros, take part in the softmax and the maximum over positions and in
    # distillation, as in the published code. Not for classification.
    published_padding: Flag = False
    # packed computes the kept tokens only; masked all of them, with the same results but for dropout's masks.
    backend: Backend = "packed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Stage finetune: train the dense model on the task."""

    epochs: Count = 5  # as in TrainingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig(StageConfig):
    """Stage score: compute the residual score of every training token."""

    batch_size: Count = 8  # examples per forward and backward pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig(TrainingConfig):
    """Stage init: train the selectors to rank tokens like the residual scores."""

    dropout: Flag = False  # as in TrainingConfig
    per_length_scale: Flag = False  # multiply the loss by the batch's mean of 1 / length, see docs/method.md
    keep: tuple[Threshold, ...] | None = None  # share of tokens that each point keeps; null for one half


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig(TrainingConfig):
    """Stage policy: train the selectors with REINFORCE; everything else is frozen."""

    dropout: Flag = False  # as in TrainingConfig
    num_samples: NumSamples = 8  # selections drawn per example, K in the paper
    alpha: NonNegative = 1.0  # weight of the length penalty (harmonic coefficient); a larger one drops more
    guide_rate: Fraction = 0.5  # share of the steps in which one sample imitates the residual scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig(StageConfig):
    """Stage teacher: store the fine-tuned model's logits for the training examples."""

    batch_size: Count = 32  # examples per forward pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointConfig(TrainingConfig):
    """Stage joint: train selectors and encoder together."""

    num_samples: NumSamples | None = None  # selections drawn per example; null for policy.num_samples
    alpha: NonNegative = 1.0  # weight of the length penalty, as in PolicyConfig
    distill: Flag = True  # learn from the fine-tuned model's logits (stage teacher), not from the labels
    temperature: Positive = 1.0  # divides teacher and student logits in distillation


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(StageConfig):
    """Stage evaluate: evaluate the models; also the evaluations during training."""

    batch_size: Count = 32  # examples per forward pass; affects predictions only under rule batch_max
    split: Literal["test", "dev"] = "test"  # evaluations during training always use dev
    rule: RuleName = DEFAULT_RULE  # how tokens are selected, see `reduction.rules`
    backend: Backend = "packed"  # as in TrainingConfig
    baselines: tuple[BaselineName, ...] = ()  # untrained selections to evaluate at the same kept counts
    thresholds: tuple[Threshold, ...] = ()  # keep probabilities to evaluate at, besides 0.5; lower keeps more


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """A whole run, from raw text to results, with a section for each stage."""

    workdir: FilePath  # folder for all outputs of the run, relative to the current directory
    data: DataConfig
    model: BackboneConfig
    seed: Seed = 42  # of data order, new weights, dropout and sampled selections
    # The stages to run, in the order of their sections; init is optional.
    stages: tuple[StageName, ...] = ("finetune", "score", "policy", "teacher", "joint", "evaluate")
    finetune: FinetuneConfig = FinetuneConfig()
    score: ScoreConfig = ScoreConfig()
    init: InitConfig = InitConfig()
    policy: PolicyConfig = PolicyConfig()
    teacher: TeacherConfig = TeacherConfig()
    joint: JointConfig = JointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    parallel: ParallelConfig = ParallelConfig()  # may change between calls of one run


# The stages in their order: name -> settings.
STAGES: dict[str, type[StageConfig]] = {
    f.name: type(f.default) for f in dataclasses.fields(RunConfig) if isinstance(f.default, StageConfig)
}
_run_class: type[RunConfig] = RunConfig


def add_section(name: str, settings: type[StageConfig]) -> None:
    """Adds the section of a new stage, before that of stage evaluate; all its fields need defaults."""
    global _run_class
    section, options = (name, settings, settings()), dict[str, Any](frozen=True, kw_only=True)
    _run_class = dataclasses.make_dataclass("RunConfig", [section], bases=(_run_class,), **options)
    STAGES.update({name: settings, "evaluate": STAGES.pop("evaluate")})


# Former name of a key, in any section -> each of its values -> the key that has this value today.
RENAMED = {"execution": {"packed": "backend", "masked": "backend", "batch_max": "rule", "dense": "rule"}}


_adapter: Callable[[Any], TypeAdapter[Any]] = functools.cache(TypeAdapter)  # takes time to make


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, which wins over its `base` files; `section.key=value` overrides win over both.

    Raises `UserError`, which names file and line (or the command line), the key and what is expected.
    """
    return build_config(_read_file(Path(path), ()), overrides, str(path))


def build_config(
    values: Mapping[str, Any], overrides: Sequence[str] = (), origin: str = YamlKey.origin
) -> RunConfig:
    """Returns the configuration of nested settings, as `load_config` does; `origin` is for messages."""
    for override in iterable("overrides", overrides, "[key=value]"):
        values = _merged(values, _parse_override(override))
    return _build(values, origin)


def load_stored(path: str | Path) -> RunConfig:
    """Reads the settings that a run stored as JSON. Raises `UserError` as `load_config` does."""
    return build_stored(read_json(path), path)


def build_stored(values: Any, path: str | Path) -> RunConfig:
    """Returns the settings that a result of `to_dict` holds. Raises like `load_config`, naming `path`."""
    return _build(upgrade(values) if isinstance(values, dict) else {}, str(path))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the settings as nested dicts and lists, for JSON and YAML; `load_config` reads them back."""
    return dict(_adapter(type(config)).dump_python(config, mode="json"))


def without_defaults(config: RunConfig) -> dict[str, Any]:
    """Returns the settings that differ from their defaults, as nested dicts and lists."""
    required = {"workdir": config.workdir, "data": {"name": "text"}, "model": {"init": "scratch"}}
    defaults = flat(to_dict(_adapter(_run_class).validate_python(required)))
    result: dict[str, Any] = {}
    for key, value in flat(to_dict(config)).items():
        if value != defaults.get(key) or key in ("workdir", "data.name", "model.init"):
            *sections, name = key.split(".")
            inner = functools.reduce(lambda section, key: section.setdefault(key, {}), sections, result)
            inner[name] = value
    return result


def upgrade(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns stored settings, or a fingerprint that contains some, with the keys of today."""
    result = {key: upgrade(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    for old, values in RENAMED.items():
        if str(result.get(old)) in values:
            value = str(result.pop(old))
            result[values[value]] = value
    return result


def with_defaults(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fingerprint of a stage's checkpoint; keys that are newer than it have their defaults."""
    result = upgrade(fingerprint)
    section = STAGES.get(str(result.get("stage")))
    defaults = {"settings": section and section(), "model": BackboneConfig(init="")}
    for part in defaults.keys() & result.keys():
        default = _adapter(type(defaults[part])).dump_python(defaults[part], mode="json") or {}
        result[part] = {**default, **result[part]}
    return result


def diff_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Compares two results of `to_dict`; returns a line `key: old -> new` for each difference."""
    before, after, absent = flat(old), flat(new), "(absent)"
    values = ((key, before.get(key, absent), after.get(key, absent)) for key in before | after)
    return [f"{key}: {was} -> {now}" for key, was, now in values if was != now]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested settings by dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return result


def _tree(cls: type) -> dict[str, Any]:
    """Maps the keys of a section to the trees of the sections in it, or to None for a value."""
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    return {name: _tree(hints[name]) if dataclasses.is_dataclass(hints[name]) else None for name in names}


def path_keys(cls: type | None = None, prefix: str = "") -> list[str]:
    """Lists the keys of `RunConfig`, or of a section, that are files or folders: `data.path`, ..."""
    hints, found = typing.get_type_hints(cls or _run_class, include_extras=True), list[str]()
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            found += path_keys(typing.cast(type, hint), f"{prefix}{name}.")
        elif FilePath in (hint, *typing.get_args(hint)):
            found.append(prefix + name)
    return found


def dotted_keys(cls: type) -> list[str]:
    """Lists the keys of a section and of the sections in it: `policy.alpha`, ..."""
    return list(flat(_tree(cls)))


def _build(values: Mapping[str, Any], path: str) -> RunConfig:
    def written(key: str) -> tuple[str, str, Any]:
        """Returns place, comment and value of a key, or those of the section that lacks it."""
        origin, comment, inner = path, "", values
        for name in key.split("."):
            found = next((k for k in inner if k == name), "") if isinstance(inner, Mapping) else ""
            if not found:
                break
            origin, comment = getattr(found, "origin", path), getattr(found, "comment", "")
            inner = inner[found]
        return origin, comment, inner

    def problem(key: str, text: str) -> UserError:
        return UserError(f"{written(key)[0]}: {key}: {text}")

    for key in path_keys():
        _, comment, value = written(key)
        if comment[1:2].strip() or (comment and Path(f"{value} {comment}").exists()):
            quoted = f'if it belongs to the path, write "{value} {comment}" with the quotes'
            raise problem(key, f"{comment!r} is a comment to YAML; {quoted}; if not, put a space after #")
    tree = _tree(_run_class)
    given = {key: value for key, value in values.items() if value is not None or not tree.get(key)}
    try:
        config = _adapter(_run_class).validate_python(given)
    except ValidationError as error:
        # An unknown key first: a misspelled one is the reason why another is missing.
        first = min(error.errors(), key=lambda e: e["type"] != _UNKNOWN)
        key = ".".join(part for part in first["loc"] if isinstance(part, str))
        raise problem(key, _explain(key, dict(first))) from None
    for key, text in _conflicts(config):
        raise problem(key, text)
    return config


_UNKNOWN = "unexpected_keyword_argument"  # pydantic's name of this mistake


def _explain(key: str, error: Mapping[str, Any]) -> str:
    kind, value = error["type"], error["input"]
    if kind == _UNKNOWN:
        return f"unknown key{_suggest(key, value)}"
    if kind == "missing":
        return "missing, a value is required"
    text = "Input should be a section of keys" if kind == "dataclass_type" else error["msg"]
    text = text.removeprefix("Input ").removeprefix("String ").replace("valid tuple", "list")
    known = re.findall(r"[\w:]+", error.get("ctx", {}).get("expected", ""))
    shown = json.dumps(value, default=str, ensure_ascii=False)
    quote = f"; quote it: '{shown}'" if kind == "string_type" and not isinstance(value, (dict, list)) else ""
    return f"{text}, got {shown[:60]}{quote}{_did_you_mean(value, known)}"


def _did_you_mean(name: Any, known: Sequence[str], prefix: str = "") -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _suggest(key: str, value: Any) -> str:
    *sections, name = key.split(".")
    if name in RENAMED:
        now = [f"{new}: {old}" for old, new in RENAMED[name].items() if old == value]
        return f"; it is now {' or '.join(now or sorted({*RENAMED[name].values()}))}"
    here = _tree(_run_class)
    for section in sections:
        here = here[section]
    elsewhere = [other for other in dotted_keys(_run_class) if other.split(".")[-1] == name.lower()]
    return _did_you_mean(name, list(here), "".join(f"{section}." for section in sections)) or (
        f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else f"; known here: {', '.join(here)}"
    )


def _conflicts(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Finds settings that are valid alone but not together; yields dotted key and problem."""
    if list(config.stages) != [stage for stage in STAGES if stage in config.stages] or not config.stages:
        yield "stages", f"expected some of {', '.join(STAGES)}, each once and in this order"
    data, model, scratch = config.data, config.model, config.model.scratch
    try:
        dataset = find_dataset(data.name)
    except UserError as error:
        yield "data.name", str(error)
        return
    if data.path is None and dataset.needs_path:
        yield "data.path", f"missing, expected the folder that holds the files of {data.name}"
    for key in OWN_KEYS:
        if key not in dataset.reads and getattr(data, key) != getattr(DataConfig, key):
            readers = "text, hf:NAME and tfds:NAME" if key in FIELD_KEYS else "text and hf:NAME"
            readers = "text" if key in SPLITS else readers
            yield f"data.{key}", f"is for {readers} only; {data.name} has its own, remove it"
    if "train" in dataset.reads and not data.train and not data.path:
        yield "data.train", "missing, expected a file of texts with labels, or its folder in data.path"
    if data.labels is not None and len(set(data.labels)) < max(2, len(data.labels)):
        yield "data.labels", f"expected two or more different names, got {list(data.labels)}"
    if model.max_positions is not None and model.max_positions < model.max_length:
        yield "model.max_positions", f"{model.max_positions} is less than model.max_length {model.max_length}"
    layers = model.keep_layers
    if layers is not None and model.init == "scratch":
        yield "model.keep_layers", "is for a pretrained model; from scratch set model.scratch.num_layers"
    if layers is not None and (not layers or list(layers) != sorted(set(layers))):
        yield "model.keep_layers", f"expected rising layer numbers, got {list(layers)}"
    if model.init == "scratch" and scratch.hidden_size % scratch.num_heads:
        yield "model.scratch.hidden_size", f"is not a multiple of model.scratch.num_heads {scratch.num_heads}"
    for stage in STAGES if dataset.task == "classification" else ():
        if getattr(getattr(config, stage), "published_padding", False):
            yield f"{stage}.published_padding", f"padding takes no part for {data.name}, remove it"
    evaluate, rule = config.evaluate, RULES[config.evaluate.rule]
    if evaluate.thresholds and not rule.has_threshold:
        yield "evaluate.thresholds", f"rule {rule.name} has none; use {DEFAULT_RULE}, or remove them"
    if evaluate.baselines and not rule.drops:
        yield "evaluate.baselines", f"rule {rule.name} drops nothing to compare with, remove them"


def _read_file(path: Path, parents: tuple[Path, ...]) -> dict[str, Any]:
    """Reads a file and the files that it names as `base`."""
    values = parse_yaml(read_text(path), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines (start from a file in configs/)")
    origin = next((key.origin for key in values if key == "base"), "")
    base, chain, result = values.pop("base", None), (*parents, path), dict[str, Any]()
    for name in base if isinstance(base, list) else [] if base is None else [base]:
        if not isinstance(name, str) or not name:
            raise UserError(f"{origin}: base: expected the path of a YAML file, or a list of them")
        target = path.parent / name
        if target.resolve() in [p.resolve() for p in chain]:
            circle = " -> ".join(map(str, (*chain, target)))
            raise UserError(f"{origin}: base: files build on each other in a circle ({circle})")
        if not target.is_file():
            raise UserError(f"{origin}: base: {target}: no such file (paths are relative to {path.parent})")
        result = _merged(result, _read_file(target, chain))
    return _merged(result, values)


def _parse_override(text: str) -> dict[str, Any]:
    """Reads `section.key=value` into nested settings."""
    key, equals, value = text.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names) or not value.strip():
        expected = "section.key=value, policy.alpha=0.5 for example (null for no value)"
        raise UserError(f"{YamlKey.origin}: {text!r} is not a setting; write {expected}")
    if names[0] == "base":
        raise UserError(f"{YamlKey.origin}: base: can only be set in a file; give that file to --config")
    return functools.reduce(lambda inner, name: {YamlKey(name): inner}, reversed(names), parse_yaml(value))


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Joins nested settings; those of `new` win, but an empty section changes nothing."""
    result = dict(old)
    for key, value in new.items():
        if isinstance(old.get(key), dict) and (value is None or isinstance(value, dict)):
            result[key] = _merged(old[key], value or {})
        else:
            result.pop(key, None)  # with the origin of the old value
            result[key] = value
    return result

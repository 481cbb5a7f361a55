"""One YAML file, plus `key=value` overrides, becomes one frozen `RunConfig`.

What can be set is in `trbert_jax.config_schema`. Every mistake in a file or an override is a
`UserError` that names its place.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trbert_jax.config_schema import (
    DATA_NAMES,
    STAGES,
    TEXT_DATA,
    TFDS_PREFIX,
    BackboneConfig,
    DataConfig,
    EvaluateConfig,
    FinetuneConfig,
    InitConfig,
    JointConfig,
    ParallelConfig,
    PolicyConfig,
    RunConfig,
    ScoreConfig,
    ScratchConfig,
    StageName,
    TeacherConfig,
    TrainingConfig,
)
from trbert_jax.config_tree import Node, merge, origin_of, parse_override, read_tree
from trbert_jax.config_typing import build
from trbert_jax.errors import UserError
from trbert_jax.io import read_json
from trbert_jax.reduction.rules import DEFAULT_RULE, RULES, rule_names

__all__ = [
    "DATA_NAMES",
    "RENAMED",
    "STAGES",
    "TFDS_PREFIX",
    "BackboneConfig",
    "DataConfig",
    "EvaluateConfig",
    "FinetuneConfig",
    "InitConfig",
    "JointConfig",
    "ParallelConfig",
    "PolicyConfig",
    "RunConfig",
    "ScoreConfig",
    "ScratchConfig",
    "StageName",
    "TeacherConfig",
    "TrainingConfig",
    "diff_configs",
    "load_config",
    "load_stored",
    "to_dict",
    "upgrade",
    "upgrade_fingerprint",
]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a configuration file.

    Args:
      path: a YAML file; with `base: OTHER.yaml` (relative to it) it builds on that file.
      overrides: `section.key=value` settings that win over the file's; of two for one key the
        later.

    Raises:
      UserError: the file cannot be read, or a key or value is wrong; the message names file and
        line (or the command line), key, value, and what was expected.
    """
    tree = read_tree(path)
    for override in overrides:
        tree = merge(tree, parse_override(override))
    for key, new in RENAMED.items():
        section, _, name = key.partition(".")
        settings = tree.value[section].value if section in tree.value else None
        if isinstance(settings, dict) and name in settings:
            value = settings[name].value
            now = new.get(value, {}) if isinstance(value, str) else {}
            hint = ", ".join(f"{section}.{name}: {setting}" for name, setting in now.items())
            raise UserError(f"{origin_of(tree, key)}: {key}: renamed, write {hint or f'{section}.backend'}")
    config = build(RunConfig, tree)
    for key, problem in _conflicts(config):
        raise UserError(f"{origin_of(tree, key)}: {key}: {problem}")
    return config


def load_stored(path: str | Path) -> RunConfig:
    """Reads the settings that a run wrote as JSON (`to_dict`), in today's keys and with today's defaults.

    Raises:
      UserError: the file cannot be read, or holds a key or value that is not known.
    """

    def tree(value: Any) -> Node:
        if isinstance(value, dict):
            return Node({key: tree(item) for key, item in value.items()}, str(path))
        return Node(value, str(path))

    values = read_json(path)
    return build(RunConfig, tree(upgrade(values) if isinstance(values, dict) else values))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The settings as nested dicts and lists that JSON and YAML can hold; `load_config` reads them back."""
    return _plain(dataclasses.asdict(config))


# Keys that have another name now: the old dotted key -> for each old value the new keys of the section and
# their values.
_BACKENDS = {name: {"backend": name} for name in ("packed", "masked")}
RENAMED: dict[str, dict[str, dict[str, str]]] = {
    **{f"{stage}.execution": _BACKENDS for stage in ("finetune", "init", "policy", "joint")},
    "evaluate.execution": {
        "packed": {"rule": "threshold", "backend": "packed"},
        "masked": {"rule": "threshold", "backend": "masked"},
        "batch_max": {"rule": "batch_max", "backend": "packed"},
        "dense": {"rule": "dense", "backend": "packed"},
    },
}


def upgrade(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrites stored settings, nested as by `to_dict`, to the keys of today. Leaves others as they are."""
    result = {key: dict(value) if isinstance(value, Mapping) else value for key, value in settings.items()}
    for key, new in RENAMED.items():
        section, _, name = key.partition(".")
        values = result.get(section)
        if isinstance(values, dict) and values.get(name) in new:
            values |= new[values.pop(name)]
    return result


def upgrade_fingerprint(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrites a stored fingerprint of a stage (`stage`, `settings`, ...) to the keys of today."""
    stage, settings = fingerprint.get("stage"), fingerprint.get("settings")
    if not isinstance(stage, str) or not isinstance(settings, Mapping):
        return dict(fingerprint)
    return {**fingerprint, "settings": upgrade({stage: settings})[stage]}


def diff_configs(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two results of `to_dict`, a `key: old -> new` line for each key."""
    before, after = dict(_flatten(old)), dict(_flatten(new))
    keys = [*before, *(key for key in after if key not in before)]
    absent = "(absent)"
    return [
        f"{key}: {before.get(key, absent)} -> {after.get(key, absent)}"
        for key in keys
        if before.get(key, absent) != after.get(key, absent)
    ]


def _conflicts(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Settings that are fine alone but not together: (dotted key, what is wrong)."""
    order = [STAGES.index(stage) for stage in config.stages]
    if not order:
        yield "stages", f"is empty, expected some of {', '.join(STAGES)}"
    elif order != sorted(set(order)):
        yield "stages", f"expected each stage once, in this order: {', '.join(STAGES)}"

    data, is_tfds = config.data, config.data.name.startswith(TFDS_PREFIX)
    if data.name not in DATA_NAMES and (not is_tfds or data.name == TFDS_PREFIX):
        close = difflib.get_close_matches(data.name, DATA_NAMES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        yield "data.name", f"expected {', '.join(DATA_NAMES)} or tfds:NAME, got {data.name!r}{hint}"
    if data.path is None and data.name != "stdlib" and not is_tfds:
        yield "data.path", f"missing, expected the folder that holds the files of {data.name}"
    for key in ("text_field", "label_field"):
        if not is_tfds and getattr(data, key) != getattr(DataConfig, key):
            yield f"data.{key}", f"is for tfds:NAME only; the fields of {data.name} are fixed, remove it"

    model, scratch = config.model, config.model.scratch
    if model.max_positions is not None and model.max_positions < model.max_length:
        yield "model.max_positions", f"{model.max_positions} is less than model.max_length {model.max_length}"
    if model.keep_layers is not None:
        if model.init == "scratch":
            yield "model.keep_layers", "is for a pretrained model; from scratch set model.scratch.num_layers"
        if not model.keep_layers or list(model.keep_layers) != sorted(set(model.keep_layers)):
            yield "model.keep_layers", f"expected rising layer numbers, got {list(model.keep_layers)}"
    if model.init == "scratch" and scratch.hidden_size % scratch.num_heads:
        yield (
            "model.scratch.hidden_size",
            f"{scratch.hidden_size} is not a multiple of model.scratch.num_heads {scratch.num_heads}",
        )

    if data.name in TEXT_DATA:
        for stage in ("finetune", "init", "policy", "joint"):
            if getattr(config, stage).published_padding:
                yield f"{stage}.published_padding", f"padding takes no part for {data.name}, remove it"
    evaluate, rules = config.evaluate, rule_names("evaluate")
    if evaluate.rule not in rules:
        close = difflib.get_close_matches(evaluate.rule, rules, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        yield "evaluate.rule", f"expected one of {', '.join(rules)}, got {evaluate.rule!r}{hint}"
    rule = RULES.get(evaluate.rule)
    if rule and evaluate.thresholds and not rule.has_threshold:
        yield "evaluate.thresholds", f"rule {rule.name} has none; use {DEFAULT_RULE}, or remove them"
    if rule and evaluate.baselines and not rule.drops:
        yield "evaluate.baselines", f"rule {rule.name} drops nothing to compare with, remove them"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

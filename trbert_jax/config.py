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
from trbert_jax.config_tree import merge, origin_of, parse_override, read_tree
from trbert_jax.config_typing import build
from trbert_jax.errors import UserError

__all__ = [
    "DATA_NAMES",
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
    "to_dict",
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
    config = build(RunConfig, tree)
    for key, problem in _conflicts(config):
        raise UserError(f"{origin_of(tree, key)}: {key}: {problem}")
    return config


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The settings as nested dicts and lists that JSON and YAML can hold; `load_config` reads them back."""
    return _plain(dataclasses.asdict(config))


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
    evaluate = config.evaluate
    if evaluate.thresholds and evaluate.execution in ("batch_max", "dense"):
        yield "evaluate.thresholds", f"{evaluate.execution} execution has none; use packed, or remove them"
    if evaluate.baselines and evaluate.execution == "dense":
        yield "evaluate.baselines", "dense execution drops nothing to compare with, remove them"


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

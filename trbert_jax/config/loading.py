"""Load settings from YAML files and `key=value` overrides, and from what a run stored.

YAML is read strictly: `3e-5` is a number, `no` and `2024-01-01` are text, a key given twice is an error, and
tags and anchors are refused. A file may build on others: `base: OTHER.yaml` or `base: [A.yaml, B.yaml]`.
"""

import dataclasses
import difflib
import functools
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trbert_jax.config.conflicts import find_conflicts
from trbert_jax.config.sections import STAGES, BackboneConfig, FilePath, RunConfig, run_class
from trbert_jax.errors import UserError, iterable
from trbert_jax.io import YamlKey, parse_yaml, read_json, read_text

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
    defaults = flat(to_dict(_adapter(run_class()).validate_python(required)))
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
    hints, found = typing.get_type_hints(cls or run_class(), include_extras=True), list[str]()
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
    tree = _tree(run_class())
    given = {key: value for key, value in values.items() if value is not None or not tree.get(key)}
    try:
        config = _adapter(run_class()).validate_python(given)
    except ValidationError as error:
        # An unknown key first: a misspelled one is the reason why another is missing.
        first = min(error.errors(), key=lambda e: e["type"] != _UNKNOWN)
        key = ".".join(part for part in first["loc"] if isinstance(part, str))
        raise problem(key, _explain(key, dict(first))) from None
    for key, text in find_conflicts(config):
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
    here = _tree(run_class())
    for section in sections:
        here = here[section]
    elsewhere = [other for other in dotted_keys(run_class()) if other.split(".")[-1] == name.lower()]
    return _did_you_mean(name, list(here), "".join(f"{section}." for section in sections)) or (
        f"; did you mean {' or '.join(elsewhere)}?" if elsewhere else f"; known here: {', '.join(here)}"
    )


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

"""Reads settings as a tree that remembers where each value was written.

YAML, but of the strict kind: `3e-5` is a number, `no` and `2024-01-01` are text, a key given twice
is an error, and there are no tags, anchors or merge keys. A file may name another as its `base`.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml

from trbert_jax.errors import UserError
from trbert_jax.io import read_text

COMMAND_LINE = "command line"
_MAX_DEPTH = 8  # far more than any setting has; stops text nested without end


@dataclasses.dataclass(frozen=True)
class Node:
    """A value and its origin.

    Attributes:
      value: text, number, bool, None, a list of those, or a dict of key -> `Node`.
      origin: `FILE:LINE`, or `command line`.
    """

    value: Any
    origin: str


class _Loader(yaml.SafeLoader):
    """Resolves plain text to null, bool, int or float as YAML 1.2's core schema does."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - overrides the class variable of PyYAML


_TAG = "tag:yaml.org,2002:"
for _name, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


def read_tree(path: str | Path) -> Node:
    """Reads a YAML file and the files it builds on; its own values win over those of its `base`.

    Raises:
      UserError: a file is missing, unreadable, empty or malformed, a key stands twice, or files
        name each other as base in a circle.
    """
    return _read_tree(Path(path), ())


def _read_tree(path: Path, parents: tuple[Path, ...]) -> Node:
    tree = _parse(read_text(path), str(path))
    if tree.value is None:
        raise UserError(f"{path}: is empty, settings were expected (start from a file in configs/)")
    if not isinstance(tree.value, dict):
        raise UserError(f"{path}: expected `key: value` lines, got {describe(tree.value)}")
    settings = dict(tree.value)
    base = settings.pop("base", None)
    own = Node(settings, tree.origin)
    if base is None:
        return own
    if not isinstance(base.value, str) or not base.value:
        raise UserError(f"{base.origin}: base: expected the path of a YAML file, got {describe(base.value)}")
    target, chain = path.parent / base.value, (*parents, path)
    if target.resolve() in [p.resolve() for p in chain]:
        circle = " -> ".join(map(str, (*chain, target)))
        raise UserError(f"{base.origin}: base: files build on each other in a circle ({circle})")
    if not target.is_file():
        raise UserError(f"{base.origin}: base: {target}: no such file (paths are relative to {path.parent})")
    return merge(_read_tree(target, chain), own)


def parse_override(text: str) -> Node:
    """Reads `section.key=value`, the value as YAML, into a tree that holds this one setting.

    Raises:
      UserError: it has another form, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not equals or not all(names) or not value.strip():
        raise UserError(
            f"{COMMAND_LINE}: {text!r} is not a setting; write section.key=value, "
            "policy.alpha=0.5 for example (null stands for no value)"
        )
    if names[0] == "base":
        raise UserError(f"{COMMAND_LINE}: base: can only be set in a file; give that file to --config")
    node = _parse(value, COMMAND_LINE)
    for name in reversed(names):
        node = Node({name: node}, COMMAND_LINE)
    return node


def merge(old: Node, new: Node) -> Node:
    """The settings of both, those of `new` where both have one; a section left empty changes nothing."""
    if not isinstance(old.value, dict):
        return new
    if new.value is None:
        return old
    if not isinstance(new.value, dict):
        return new
    both = dict(old.value)
    for key, node in new.value.items():
        both[key] = merge(both[key], node) if key in both else node
    return Node(both, old.origin if new.origin == COMMAND_LINE else new.origin)


def origin_of(tree: Node, key: str) -> str:
    """Where a dotted key was set; where it was not, the origin of the nearest section around it."""
    for name in key.split("."):
        if not isinstance(tree.value, dict) or name not in tree.value:
            break
        tree = tree.value[name]
    return tree.origin


def describe(value: Any) -> str:
    """A value as a message shows it: `'3e-5' (text)`, `null`, `a section`."""
    if isinstance(value, dict):
        return "a section of keys"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value!r} (text)" if isinstance(value, str) else repr(value)


def _parse(text: str, source: str) -> Node:
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}:{mark.line + 1}" if mark and source != COMMAND_LINE else source
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
        raise UserError(f"{place}: not valid YAML ({problem})") from error
    if root is None:
        return Node(None, source)
    return Node(_convert(root, source, ()).value, source)


def _convert(node: yaml.Node, source: str, path: tuple[str, ...]) -> Node:
    origin = source if source == COMMAND_LINE else f"{source}:{node.start_mark.line + 1}"
    key = ".".join(path)
    if len(path) > _MAX_DEPTH:
        raise UserError(f"{origin}: {key}: nested too deeply")
    if isinstance(node, yaml.MappingNode):
        return _convert_mapping(node, source, path)
    if isinstance(node, yaml.SequenceNode):
        items = [_convert(item, source, (*path, str(i))).value for i, item in enumerate(node.value)]
        return Node(items, origin)
    kind, text = node.tag.removeprefix(_TAG), node.value
    if kind == "null":
        return Node(None, origin)
    if kind == "bool":
        return Node(text.lower() == "true", origin)
    if kind in ("int", "float", "str"):
        try:
            return Node({"int": int, "float": float, "str": str}[kind](text), origin)
        except ValueError as error:  # a tag that the text does not fit, or an endless number
            raise UserError(f"{origin}: {key}: {text[:40]!r} cannot be read as {kind}") from error
    raise UserError(f"{origin}: {key}: the YAML tag {node.tag} is not supported; remove it")


def _convert_mapping(node: yaml.MappingNode, source: str, path: tuple[str, ...]) -> Node:
    settings: dict[str, Node] = {}
    first_line: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        origin = source if source == COMMAND_LINE else f"{source}:{line}"
        name = key_node.value
        if not isinstance(name, str):
            raise UserError(f"{origin}: a key must be text")
        dotted = ".".join((*path, name))
        if name in settings:
            raise UserError(f"{origin}: {dotted}: given twice (first on line {first_line[name]}); keep one")
        first_line[name] = line
        # The key's line, not the value's: a section starts on the line after its key.
        settings[name] = Node(_convert(value_node, source, (*path, name)).value, origin)
    return Node(settings, source)

"""Which fields of the configuration's classes a package reads, found in its source.

A small reading of types, one function at a time: arguments, variables and class attributes that are annotated
with a class of the configuration, or assigned from an expression that has one, are followed through
attributes such as `run.config.policy.alpha`. What cannot be followed counts as no read.
"""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Types = frozenset[type]
Scope = dict[str, Types]
NOTHING: Types = frozenset()


def reads(paths: Iterable[Path], root: type) -> set[tuple[type, str]]:
    """Pairs of a class and a field of it that some expression reads.

    Args:
      paths: Python files.
      root: dataclass of the whole configuration, whose fields may be dataclasses.
    """
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in paths]
    known = _Known(root)
    for tree in trees:
        known.learn_attributes(tree)
    found: set[tuple[type, str]] = set()
    for tree in trees:
        _Reader(known, found, {}).visit(tree)
    return found


class _Known:
    """The classes by name, the classes of their fields, and those of attributes elsewhere by name."""

    def __init__(self, root: type) -> None:
        self.fields: dict[type, dict[str, Any]] = {}
        self._add(root)
        self.classes = {cls.__name__: cls for section in self.fields for cls in section.__mro__[:-1]}
        for cls in self.classes.values():
            self._add(cls)
        self.attributes: Scope = {}

    def _add(self, cls: type) -> None:
        self.fields[cls] = typing.get_type_hints(cls)
        for kind in self.fields[cls].values():
            if dataclasses.is_dataclass(kind) and kind not in self.fields:
                self._add(typing.cast(type, kind))

    def of_annotation(self, node: ast.expr | None) -> Types:
        names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)] if node else []
        return frozenset(self.classes[name] for name in names if name in self.classes)

    def learn_attributes(self, tree: ast.Module) -> None:
        """`name: Class` in the body of a class, and `self.name = argument` in one of its methods."""
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for line in node.body:
                    if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                        self._add_attribute(line.target.id, self.of_annotation(line.annotation))
            elif isinstance(node, ast.FunctionDef):
                scope = _Reader(self, set(), {}).arguments(node)
                for line in node.body:
                    for target, value in _pairs(line):
                        if isinstance(target, ast.Attribute) and isinstance(value, ast.Name):
                            self._add_attribute(target.attr, scope.get(value.id, NOTHING))

    def _add_attribute(self, name: str, types: Types) -> None:
        if types:
            self.attributes[name] = self.attributes.get(name, NOTHING) | types


class _Reader(ast.NodeVisitor):
    """Visits the code of one scope, and with a reader of its own every function in it."""

    def __init__(self, known: _Known, found: set[tuple[type, str]], scope: Scope) -> None:
        self._known, self._found, self._scope = known, found, scope

    def arguments(self, node: ast.FunctionDef) -> Scope:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        return {a.arg: self._known.of_annotation(a.annotation) for a in arguments}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        inner = _Reader(self._known, self._found, {**self._scope, **self.arguments(node)})
        for line in node.body:
            inner.visit(line)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target, value in _pairs(node):
            if isinstance(target, ast.Name):
                self._scope[target.id] = self._types(value)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if isinstance(node.target, ast.Name):
            self._scope[node.target.id] = self._known.of_annotation(node.annotation)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Load):
            owners = self._types(node.value)
            self._found.update((cls, node.attr) for cls in owners if node.attr in self._known.fields[cls])

    def _types(self, node: ast.expr) -> Types:
        if isinstance(node, ast.Name):
            return self._scope.get(node.id, NOTHING)
        if not isinstance(node, ast.Attribute):
            return NOTHING
        owners = self._types(node.value)
        if not owners:  # an attribute of something else, as in `run.config`
            return self._known.attributes.get(node.attr, NOTHING)
        kinds = [self._known.fields[cls].get(node.attr) for cls in owners]
        return frozenset(kind for kind in kinds if isinstance(kind, type) and kind in self._known.fields)


def _pairs(node: ast.stmt) -> list[tuple[ast.expr, ast.expr]]:
    """Target and value of an assignment, those of a tuple one by one."""
    if not isinstance(node, ast.Assign) or len(node.targets) != 1:
        return []
    target, value = node.targets[0], node.value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return list(zip(target.elts, value.elts, strict=False))
    return [(target, value)]

"""Writes the reference pages of the site: commands, settings and Python, from the code."""

import argparse
import ast
import dataclasses
import inspect
import json
import pydoc
import re
from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter

from trbert_jax.cli.arguments import COMMANDS, Option, describe_stages
from trbert_jax.config import STAGES, RunConfig
from trbert_jax.config.sections import BackboneConfig, DataConfig, ParallelConfig, ScratchConfig

# Heading -> classes, functions, and modules whose public members are listed.
PYTHON = {
    "Use a model": (
        "TRBert",
        "inference.predictor.Prediction",
        "answer_questions",
        "load_config",
        "UserError",
    ),
    "Add a part": (
        *("reduction.rules.RuleSpec", "reduction.rules.register_rule"),
        *("training.stages.Stage", "training.stages.register_stage"),
        *("model.backbones.Backbone", "model.backbones.register_backbone"),
        *("datasets.registry.DataSet", "datasets.registry.register_dataset"),
        *("tasks.base.Task", "tasks.base.register_task"),
    ),
    "Token reduction": ("reduction.selection", "reduction.policy_loss", "reduction.gate", "model.packed"),
}


def commands_page() -> str:
    """Returns the page of all commands and options, from the table of the command line."""
    lines = [
        "# Commands",
        "",
        "`trbert COMMAND --help` shows the same in a terminal. With `--log-format json`,",
    ]
    lines += ["each command writes messages and progress to standard error as JSON lines."]
    for name, (run, options) in COMMANDS.items():
        summary, _, details = inspect.cleandoc(run.__doc__ or "").partition("\n\n")
        lines += ["", f"## trbert {name}", "", summary, "", *_paragraphs(details)]
        rows = [_option_row(option) for option in options if option[1]["help"] is not argparse.SUPPRESS]
        lines += ["", "| argument | meaning |", "|---|---|", *rows] if rows else []
    return "\n".join(lines) + "\n"


def _paragraphs(help: str) -> Iterator[str]:
    """Yields the lines of a help text; those that start with two blanks become a block of code."""
    code = False
    for line in help.replace("{stages}", describe_stages()).splitlines():
        indented = line.startswith("  ") or (code and not line)
        if indented != code:
            yield "```" if code else "\n```"
        code = indented
        yield line.removeprefix("  ")
    if code:
        yield "```"


def _option_row(option: Option) -> str:
    name, settings = option
    choices, help = (x() if callable(x) else x for x in (settings.get("choices"), settings["help"]))
    value = "{" + ",".join(choices) + "}" if choices else settings.get("metavar")
    written = f"{name} {value}" if value and name.startswith("-") else name
    needed = "; required" if settings.get("required") else ""
    return _row(f"`{written}`", f"{str(help).replace('%%', '%')}{needed}")


def settings_page() -> str:
    """Returns the page of all settings: values and defaults from the schema, meanings from comments."""
    lines = ["# Settings", "", "A YAML file with these keys is a run. On the command line, `policy.alpha=2`"]
    lines += ["sets one of them. A key whose default is – must be given."]
    sections = {"": RunConfig, "data": DataConfig, "model": BackboneConfig, "model.scratch": ScratchConfig}
    for name, section in {**sections, **STAGES, "parallel": ParallelConfig}.items():
        schema, meanings = TypeAdapter(section).json_schema()["properties"], comments(section)
        lines += ["", f"## {name or 'Whole run'}", "", inspect.cleandoc(section.__doc__ or ""), ""]
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
        for field in dataclasses.fields(section):
            if "$ref" not in schema[field.name]:  # a section has a table of its own
                needed = field.default is dataclasses.MISSING
                default = "–" if needed else f"`{json.dumps(field.default)}`"
                key = f"`{name}.{field.name}`" if name else f"`{field.name}`"
                lines.append(_row(key, _values(schema[field.name]), default, meanings[field.name]))
    return "\n".join(lines) + "\n"


def comments(section: type) -> dict[str, str]:
    """Returns the comment on each setting: on its line, or on the lines before it."""
    found = dict[str, str]()
    for base in reversed(section.__mro__[:-1]):
        source = inspect.getsource(base).splitlines()
        (definition,) = ast.parse("\n".join(source)).body
        for node in ast.walk(definition):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                first = node.lineno - 1
                while source[first - 1].lstrip().startswith("#"):
                    first -= 1
                lines = [*source[first : node.lineno - 1], source[node.lineno - 1].partition("  #")[2]]
                comment = " ".join(line.strip(" #") for line in lines).strip()
                inherited = re.fullmatch(r"[Aa]s in \w+", comment) and found.get(node.target.id)
                comment = re.sub(r"\b(\w+)Config\b", lambda name: f"`{name[1].lower()}`", comment)
                found[node.target.id] = inherited or comment
    return found


def _values(schema: dict[str, Any]) -> str:
    """Describes the values that a JSON schema accepts."""
    if "anyOf" in schema:
        return " or ".join(map(_values, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list: {_values(schema['items'])}" if schema["items"] else "list"
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {schema[key]}" for key, sign in limits.items() if key in schema]
    return f"{schema['type']} {', '.join(bounds)}".strip()


def python_page() -> str:
    """Returns the page of the classes and functions that programs use; autodoc fills in their docstrings."""
    lines = ["# Python"]
    for title, names in PYTHON.items():
        lines += ["", f"## {title}"]
        for name in names:
            found = pydoc.locate(f"trbert_jax.{name}")
            kind = "class" if isinstance(found, type) else "module" if inspect.ismodule(found) else "function"
            members = [] if kind == "function" else ["   :members:"]
            lines += ["", "```{eval-rst}", f".. auto{kind}:: trbert_jax.{name}", *members, "```"]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return "| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|") for cell in cells) + " |"

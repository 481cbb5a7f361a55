"""Options, the parser, and the table of commands. A command's docstring is its help."""

import argparse
import contextlib
import inspect
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from trbert_jax import __version__, io
from trbert_jax.errors import UserError
from trbert_jax.io import streams
from trbert_jax.io.outputs import is_stream
from trbert_jax.model.engines import ENGINES
from trbert_jax.reduction.rules import DEFAULT_THRESHOLD, RULES, rule_names

if TYPE_CHECKING:
    from trbert_jax.config import RunConfig

PROGRAM = "trbert"
DESCRIPTION = "Trains and runs BERT models that drop the words of a text they no longer need (TR-BERT)."
EXAMPLES = """\
examples:
  trbert train --config configs/quickstart.yaml
  trbert predict --model runs/quickstart/model "some text"
"""

Arguments = argparse.Namespace


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)
        self._negative_number_matcher = re.compile(r"-\.?\d[\d.]*([eE][-+]?\d+)?$")  # -1e9 is one too

    def _print_message(self, message: str, file: Any = None) -> None:  # argparse's own ignores errors
        if file is not sys.stdout:
            streams.write_message(message)
            return
        try:
            streams.StandardOutput().write(message)
        except UserError as error:
            self.exit(streams.USER_ERROR, f"{PROGRAM}: error: {error}\n")
        except BrokenPipeError:
            self.exit(streams.BROKEN_PIPE)

    def error(self, message: str) -> NoReturn:
        self.exit(streams.USER_ERROR, f"{PROGRAM}: error: {message} (see `{self.prog} --help`)\n")


Type = Callable[[str], Any]
Option = tuple[str, dict[str, Any]]  # for `add_argument`; its choices and help may be functions
Run = Callable[[Arguments], int | None]  # the exit code, None for 0
COMMANDS: dict[str, tuple[Run, tuple[Option, ...]]] = {}


def option(name: str, metavar: str | None, convert: Type, help: Any, **rest: Any) -> Option:
    """Returns an option with a value; `convert` parses it."""
    return name, {"metavar": metavar, "type": convert, "help": help, **rest}


def path_option(role: str, name: str, metavar: str, help: Any, **rest: Any) -> Option:
    """An option for a path; `role` is the argument of `check_outputs` for it."""
    converts: dict[str, Type] = {"outputs": _output_file, "models": str}
    return option(name, metavar, converts.get(role, found_path), help, role=role, **rest)


def paths_of(args: Arguments) -> dict[str, list[Any]]:
    """Returns the paths of the chosen options by their role."""
    paths: dict[str, list[Any]] = {}
    for name, settings in COMMANDS[args.command][1]:
        path = getattr(args, name.lstrip("-").replace("-", "_"))
        if "role" in settings and path:
            paths.setdefault(settings["role"], []).append(path)
            if "beside" in settings and not is_stream(path):
                paths[settings["role"]].append(path.with_suffix(settings["beside"]))
    return paths


def switch(name: str, help: Any) -> Option:
    """Returns an option without a value."""
    return name, {"action": "store_true", "help": help}


def command(name: str, *options: Option) -> Callable[[Run], Run]:
    """Registers a function as a command; its docstring is the help."""

    def register(run: Run) -> Run:
        COMMANDS[name] = run, options
        return run

    return register


def chosen(args: Arguments, names: str) -> dict[str, Any]:
    """Returns the arguments of these names, which are separated by blanks."""
    return {name: getattr(args, name) for name in names.split()}


def config_of(args: Arguments) -> "RunConfig":
    """Loads the settings of `--config`."""
    from trbert_jax.config import load_config  # takes time to load

    skip = ["data.skip_bad_records=true"] if args.skip_bad_records else []
    return load_config(args.config, [*args.overrides, *skip])


Parsers = Mapping[str, argparse.ArgumentParser]


def make_parser(names: Iterable[str]) -> tuple[argparse.ArgumentParser, Parsers]:
    """Returns the parser of the program, with the options of these commands, and those of all commands."""
    parser = _Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, (run, _) in COMMANDS.items():
        summary, _, details = inspect.cleandoc(run.__doc__ or "").partition("\n\n")
        subparsers.add_parser(name, help=summary, description=summary, epilog=details)
    for name in names:
        for option, settings in (*COMMANDS[name][1], LOG_FORMAT):
            found = {key: settings[key]() for key in ("choices", "help") if callable(settings.get(key))}
            ours = {key: value for key, value in settings.items() if key not in ("role", "beside")}
            subparsers.choices[name].add_argument(option, **ours | found)
    return parser, subparsers.choices


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parses a command line: `command`, `command_line`, and the options of that command by their names.

    Raises `SystemExit` after help or the version (code 0), or an error message about an argument (code 2).
    """
    named = [name for name in COMMANDS if name in argv]
    parser, commands = make_parser(named)
    for command in map(commands.__getitem__, named):
        if "{stages}" in (command.epilog or "") and {"-h", "--help"} & set(argv):
            command.epilog = str(command.epilog).replace("{stages}", describe_stages())
    args, rest = parser.parse_known_args(argv)
    chosen = commands[args.command]
    # argparse does not accept positional arguments after options; they belong to the same list.
    positional = next((action.dest for action in chosen._actions if action.nargs == "*"), None)
    end_of_options = rest.index("--") if "--" in rest else len(rest)
    late, literal = rest[:end_of_options], rest[end_of_options + 1 :]
    unknown = [word for word in late if positional is None or word.startswith("-")]
    if unknown:
        chosen.error(f"unrecognized arguments: {' '.join(unknown)}")
    if positional:
        getattr(args, positional).extend(late + literal)
    args.command_line = shlex.join([PROGRAM, *argv])
    return args


def describe_stages() -> str:
    """Returns a line for each stage, for the help of `train`."""
    from trbert_jax.config import STAGES  # takes time to load

    docs = {name: (settings.__doc__ or "").splitlines()[0] for name, settings in STAGES.items()}
    return "\n".join(f"  {name}: {doc.removeprefix(f'Stage {name}: ')}" for name, doc in docs.items())


def backends() -> tuple[str, ...]:
    """Returns the choices of `--backend`."""
    from trbert_jax.config import Backend  # takes time to load

    return get_args(Backend)


def rules_help() -> str:
    """Returns the help of `--rule`."""
    rules = "; ".join(f"{name}: {RULES[name].description}" for name in rule_names())
    return f"how tokens are selected. {rules}. Default threshold, or dense if the selectors are untrained"


def formats() -> tuple[str, ...]:
    """Returns the choices of `--format`."""
    from trbert_jax.datasets.tables import FORMATS  # takes time to load

    return FORMATS


def file_help() -> str:
    """Returns the help of a file of texts."""
    rows = ", ".join(f".{name}" for name in formats())
    return f".txt: one text per line; {rows}: rows with a text; each also in .gz"


def data_help() -> str:
    """Returns the help of a file of texts or questions."""
    return f"{file_help()}, and for evaluate a label; or questions as published"


def kind(expected: str, convert: Type, accepts: Callable[[Any], bool]) -> Type:
    """Builds the type of an argument, which names what is expected if a text is anything else."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = convert(text)
            if accepts(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


def list_of(convert: Type) -> Type:
    """Builds the type of a list with commas."""
    return lambda text: [convert(word.strip()) for word in text.split(",")]


def digits(text: str) -> int:
    """Converts a whole number; -1 for any other text."""
    return int(text) if text.isascii() and text.isdigit() else -1


def former(name: str, new: str) -> Option:
    """Returns a hidden option that names its successor."""
    return option(name, None, kind(f"{new} instead", str, lambda _: False), argparse.SUPPRESS)


def _output_file(text: str) -> Path:
    if os.path.basename(text) in ("", ".", ".."):  # a path would forget the slash at the end
        raise argparse.ArgumentTypeError(f"expected a file, got {text!r}")
    return found_path(text)


def found_path(text: str) -> Path:
    """Converts a path as a user writes it, `~` included."""
    try:
        return io.find_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


NAME = kind("names with commas between them", str, bool)
INDEX = kind("a number of at least 0", digits, lambda n: n >= 0)
COUNT = kind("a number of at least 1", digits, lambda n: n >= 1)
FACTOR = kind("a number above 1", float, lambda x: 1 < x < math.inf)
AMOUNT = kind("a number of at least 0", float, lambda x: 0 <= x < math.inf)
PROBABILITY = kind("a number above 0 and below 1", float, lambda p: 0 < p < 1)
SHARE = kind(
    "a share above 0 and below 1, such as 1% or 0.01",
    lambda text: float(text.removesuffix("%")) / (100 if text.endswith("%") else 1),
    lambda share: 0 < share < 1,
)
POINTS = kind("percentage points above 0 and below 100", float, lambda x: 0 < x < 100)
NUMBER = kind("a number", float, math.isfinite)
SECONDS = kind("a number above 0", float, lambda x: 0 < x < math.inf)
WORD = kind("letters, digits, -, _ and .", str, lambda word: bool(re.fullmatch(r"[\w.-]+", word, re.ASCII)))
PORT = kind("a number from 0 to 65535", digits, lambda n: 0 <= n < 2**16)
N_BEST = kind("a number from 1 to 20", digits, lambda n: 1 <= n <= 20)
STEPS = kind(
    "FIRST:END, such as 10:15",
    lambda text: tuple(map(digits, text.split(":"))),
    lambda steps: len(steps) == 2 and 0 <= steps[0] < steps[1],
)


def thresholds(text: str) -> float | tuple[float, ...]:
    """Converts the keep probability of all points of reduction, or one for each."""
    values = list_of(PROBABILITY)(text)
    return values[0] if len(values) == 1 else tuple(values)


BACKEND_HELP = "packed: compute only the kept tokens (default); masked: compute all, with the same results"
ENGINE_HELP = f"{BACKEND_HELP}; or another engine than JAX, see `trbert export`"
THRESHOLD_HELP = (
    "keep tokens whose keep probability is at least P (default 0.5, as published), or P at each point"
)
PREDICTIONS_HELP = "write a JSON line per text, or the official scorer's input"
LOG_FORMAT = option(
    "--log-format",
    None,
    str,
    "form of messages and progress on standard error (default text)",
    choices=streams.LOG_FORMATS,
    default="text",
)
CONFIG = path_option("inputs", "--config", "FILE", "YAML file with the settings of the run", required=True)
OVERRIDES = option("overrides", "key=value", str, "settings that replace those of the file", nargs="*")
SKIP = switch("--skip-bad-records", "skip, count and list invalid records, rather than stop")
MODEL = path_option("models", "--model", "DIR", "folder of a trained model", required=True)
BATCH_SIZE = option("--batch-size", "N", COUNT, "texts per batch (default 32)", default=32)
DTYPE = option(
    "--dtype",
    None,
    str,
    "of activations (default float32)",
    choices=("float32", "bfloat16"),
    default="float32",
)
_RULE = option("--rule", None, str, rules_help, choices=rule_names)
_FORMER = former("--execution", "--rule and --backend")
RULE = (
    _RULE,
    option("--backend", None, str, BACKEND_HELP, choices=backends, default="packed"),
    _FORMER,
)
ENGINE = (
    _RULE,
    option("--backend", None, str, ENGINE_HELP, choices=lambda: (*backends(), *ENGINES), default="packed"),
    DTYPE,
    _FORMER,
)
THRESHOLD = option("--threshold", "P[,P]", thresholds, THRESHOLD_HELP, default=DEFAULT_THRESHOLD)
OPERATING_POINT = option(
    "--operating-point", "NAME", str, "use thresholds that are stored with the model, 3x say (see calibrate)"
)
FIELDS = (
    option("--text-field", "NAME", str, "field of the text (default that of the training data, or text)"),
    option("--text-pair-field", "NAME", str, "field of a second text"),
)
LABEL_FIELD = option(
    "--label-field", "NAME", str, "field of the label (default that of the training data, or label)"
)
ANSWERS = (
    option("--null-threshold", "X", NUMBER, "no answer to a question with null odds above X"),
    option("--max-answer-length", "N", COUNT, "word pieces of an answer at most (default 30)"),
)
MAX_LENGTH = option("--max-length", "N", COUNT, "tokens after which texts are cut (default the model's)")

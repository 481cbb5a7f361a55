"""The command line: `trbert train`, `evaluate`, `predict`, `compile`, `benchmark`, `convert`, ...

A command imports slow modules itself, so that help and wrong arguments are answered at once. Its docstring
is its help.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from trbert_jax import __version__, io
from trbert_jax.errors import PreemptedError, UserError
from trbert_jax.io import streams
from trbert_jax.io.outputs import atomic_file, check_outputs, contents, is_stream
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
RESUME = "run the same command again to go on from the last checkpoint"

Arguments = argparse.Namespace


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command, with the arguments of the process by default.

    Returns the exit code: 0; 2 after a mistake of the user; 130 after Ctrl-C; 141 if the reader of the output
    has closed it; 143 after SIGTERM, 129 after SIGHUP.
    """
    streams.prepare()
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:  # argparse has printed help, the version or an error
        return streams.finish(stop.code if isinstance(stop.code, int) else streams.USER_ERROR)
    # JAX handles SIGTERM if several processes have to agree on when to stop.
    several = args.command == "train" and (args.distributed or args.coordinator is not None)
    return streams.finish(_run(args, streams.signals(ended_by_sigterm=not several, last=argv is None)))


def _run(args: Arguments, signals: contextlib.AbstractContextManager[None]) -> int:
    # transformers without PyTorch is intended; its advice to install it is no help.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    streams.setup_logging()
    advice = f"; {RESUME}" if args.command == "train" else ""
    try:
        with signals:
            check_outputs(**_paths(args))
            COMMANDS[args.command][0](args)
    except UserError as error:
        streams.say(f"error: {error}")
        return streams.USER_ERROR
    except KeyboardInterrupt:
        streams.say(f"interrupted{advice}")
        return streams.INTERRUPTED
    except PreemptedError as stop:
        streams.say(f"{stop}{advice}")
        return 128 + stop.signal
    except BrokenPipeError:
        return streams.BROKEN_PIPE
    except UnicodeEncodeError as error:
        if not any("\udc80" <= letter <= "\udcff" for letter in error.object):  # a byte of a name
            raise
        streams.say(f"error: {error.object}: the name is not UTF-8; rename it")
        return streams.USER_ERROR
    except ValueError as error:  # of JAX, which checks the variables of its settings as it is imported
        if "jax" in sys.modules or "JAX_" not in str(error).upper():
            raise
        streams.say(f"error: {error}; correct or unset the environment variable")
        return streams.USER_ERROR
    except OSError as error:
        if error.filename is None and streams.in_a_folder():
            raise
        streams.say(f"error: {error.filename or 'the current folder'}: {error.strerror}")
        return streams.USER_ERROR
    return 0


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
Run = Callable[[Arguments], None]
COMMANDS: dict[str, tuple[Run, tuple[Option, ...]]] = {}


def _option(name: str, metavar: str | None, convert: Type, help: Any, **rest: Any) -> Option:
    return name, {"metavar": metavar, "type": convert, "help": help, **rest}


def _path(role: str, name: str, metavar: str, help: Any, **rest: Any) -> Option:
    """An option for a path; `role` is the argument of `check_outputs` for it."""
    converts: dict[str, Type] = {"outputs": _output_file, "models": str}
    return _option(name, metavar, converts.get(role, _expanded), help, role=role, **rest)


def _paths(args: Arguments) -> dict[str, list[Any]]:
    """Returns the paths of the chosen options by their role."""
    paths: dict[str, list[Any]] = {}
    for name, settings in COMMANDS[args.command][1]:
        path = getattr(args, name.lstrip("-").replace("-", "_"))
        if "role" in settings and path:
            paths.setdefault(settings["role"], []).append(path)
            if "beside" in settings and not is_stream(path):
                paths[settings["role"]].append(path.with_suffix(settings["beside"]))
    return paths


def _switch(name: str, help: Any) -> Option:
    return name, {"action": "store_true", "help": help}


def _command(name: str, *options: Option) -> Callable[[Run], Run]:
    """Registers a function as a command; its docstring is the help."""

    def register(run: Run) -> Run:
        COMMANDS[name] = run, options
        return run

    return register


def parse_arguments(argv: Sequence[str]) -> Arguments:
    """Parses a command line: `command`, `command_line`, and the options of that command by their names.

    Raises `SystemExit` after help or the version (code 0), or an error message about an argument (code 2).
    """
    parser = _Parser(prog=PROGRAM, description=DESCRIPTION, epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, (run, options) in COMMANDS.items():
        summary, _, details = inspect.cleandoc(run.__doc__ or "").partition("\n\n")
        subparser = subparsers.add_parser(name, help=summary, description=summary, epilog=details)
        if name in argv:
            if "{stages}" in details and {"-h", "--help"} & set(argv):
                subparser.epilog = details.format(stages=_describe_stages())
            for option, settings in options:
                names = {key: settings[key]() for key in ("choices", "help") if callable(settings.get(key))}
                ours = {key: value for key, value in settings.items() if key not in ("role", "beside")}
                subparser.add_argument(option, **ours | names)
    args, rest = parser.parse_known_args(argv)
    chosen = subparsers.choices[args.command]
    # argparse does not accept positional arguments after options; they belong to the same list.
    positional = next((action.dest for action in chosen._actions if not action.option_strings), None)
    end_of_options = rest.index("--") if "--" in rest else len(rest)
    late, literal = rest[:end_of_options], rest[end_of_options + 1 :]
    unknown = [word for word in late if positional is None or word.startswith("-")]
    if unknown:
        chosen.error(f"unrecognized arguments: {' '.join(unknown)}")
    if positional:
        getattr(args, positional).extend(late + literal)
    args.command_line = shlex.join([PROGRAM, *argv])
    return args


def _describe_stages() -> str:
    from trbert_jax.config import STAGES  # takes time to load

    docs = {name: (settings.__doc__ or "").splitlines()[0] for name, settings in STAGES.items()}
    return "\n".join(f"  {name}: {doc.removeprefix(f'Stage {name}: ')}" for name, doc in docs.items())


def _backends() -> tuple[str, ...]:
    from trbert_jax.config import Backend  # takes time to load

    return get_args(Backend)


def _rules_help() -> str:
    rules = "; ".join(f"{name}: {RULES[name].description}" for name in rule_names())
    return f"how tokens are selected. {rules}. Default threshold, or dense if the selectors are untrained"


def _formats() -> tuple[str, ...]:
    from trbert_jax.datasets.tables import FORMATS  # takes time to load

    return FORMATS


def _file_help() -> str:
    rows = ", ".join(f".{name}" for name in _formats())
    return f".txt: one text per line; {rows}: rows with a text; each also in .gz"


def _data_help() -> str:
    return f"{_file_help()}, and for evaluate a label; or questions as published"


def _type(expected: str, convert: Type, accepts: Callable[[Any], bool]) -> Type:
    """Builds the type of an argument, which names what is expected if a text is anything else."""

    def parse(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = convert(text)
            if accepts(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return parse


def _list_of(convert: Type) -> Type:
    return lambda text: [convert(word.strip()) for word in text.split(",")]


def _digits(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else -1


def _former(name: str, new: str) -> Option:
    return _option(name, None, _type(f"{new} instead", str, lambda _: False), argparse.SUPPRESS)


def _output_file(text: str) -> Path:
    if os.path.basename(text) in ("", ".", ".."):  # a path would forget the slash at the end
        raise argparse.ArgumentTypeError(f"expected a file, got {text!r}")
    return _expanded(text)


def _expanded(text: str) -> Path:
    try:
        return io.find_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


_name = _type("names with commas between them", str, bool)
_index = _type("a number of at least 0", _digits, lambda n: n >= 0)
_count = _type("a number of at least 1", _digits, lambda n: n >= 1)
_probability = _type("a number above 0 and below 1", float, lambda p: 0 < p < 1)
_number_type = _type("a number", float, math.isfinite)
_n_best = _type("a number from 1 to 20", _digits, lambda n: 1 <= n <= 20)
_steps = _type(
    "FIRST:END, such as 10:15",
    lambda text: tuple(map(_digits, text.split(":"))),
    lambda steps: len(steps) == 2 and 0 <= steps[0] < steps[1],
)

BACKEND_HELP = "packed: compute only the kept tokens (default); masked: compute all, with the same results"
THRESHOLD_HELP = "keep tokens whose keep probability is at least P (default 0.5, as published)"
PREDICTIONS_HELP = "write a JSON line per text, or the official scorer's input"
CONFIG = _path("inputs", "--config", "FILE", "YAML file with the settings of the run", required=True)
OVERRIDES = _option("overrides", "key=value", str, "settings that replace those of the file", nargs="*")
SKIP = _switch("--skip-bad-records", "skip, count and list invalid records, rather than stop")
MODEL = _path("models", "--model", "DIR", "folder of a trained model", required=True)
BATCH_SIZE = _option("--batch-size", "N", _count, "texts per batch (default 32)", default=32)
RULE = (
    _option("--rule", None, str, _rules_help, choices=rule_names),
    _option("--backend", None, str, BACKEND_HELP, choices=_backends, default="packed"),
    _former("--execution", "--rule and --backend"),
)
THRESHOLD = _option("--threshold", "P", _probability, THRESHOLD_HELP, default=DEFAULT_THRESHOLD)
FIELDS = (
    _option("--text-field", "NAME", str, "field of the text (default that of the training data, or text)"),
    _option("--text-pair-field", "NAME", str, "field of a second text"),
)
LABEL_FIELD = _option(
    "--label-field", "NAME", str, "field of the label (default that of the training data, or label)"
)
ANSWERS = (
    _option("--null-threshold", "X", _number_type, "no answer to a question with null odds above X"),
    _option("--max-answer-length", "N", _count, "word pieces of an answer at most (default 30)"),
)
MAX_LENGTH = _option("--max-length", "N", _count, "tokens after which texts are cut (default the model's)")


def _chosen(args: Arguments, names: str) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names.split()}


def _config(args: Arguments) -> RunConfig:
    from trbert_jax.config import load_config

    skip = ["data.skip_bad_records=true"] if args.skip_bad_records else []
    return load_config(args.config, [*args.overrides, *skip])


def _own_run(args: Arguments) -> RunConfig:
    """Returns the settings of `train --data`."""
    from trbert_jax.training.own_run import choose_settings

    data = {key: value for key, value in _chosen(args, OWN).items() if value}
    if args.skip_bad_records:
        data["skip_bad_records"] = True
    return choose_settings(args.data, args.model, args.output, data, args.overrides)


OWN = "dev test text_field text_pair_field label_field"


@_command(
    "train",
    _path("inputs", "--config", "FILE", "YAML file with the settings of the run"),
    _option("--data", "FILE", str, "labeled texts, a folder with train.csv and the like, or hf:NAME"),
    _option("--model", "DIR", str, "for --data: folder or hub id of the model to start from, or scratch"),
    _option("--output", "DIR", str, "for --data: folder of the run; the model will be in DIR/model"),
    *(_option(f"--{name}", "FILE", str, f"for --data: {name} set") for name in ("dev", "test")),
    *FIELDS,
    LABEL_FIELD,
    _option("--stages", "A,B", _list_of(_name), "run only these stages"),
    _switch("--dry-run", "print the plan for --devices of --processes, and do nothing"),
    _option("--devices", "N", _count, "devices, for --dry-run (default 1)"),
    _option("--processes", "P", _count, "processes, for --dry-run (default 1)"),
    _option("--profile-steps", "A:B", _steps, "record a profile of updates A to B of each stage"),
    _switch("--distributed", "join the processes that SLURM, Open MPI, Kubernetes or Cloud TPU has started"),
    _option("--coordinator", "HOST:PORT", str, "join several processes: address of process 0"),
    _option("--num-processes", "N", _count, "number of processes, for --coordinator"),
    _option("--process-id", "I", _index, "number of this process, for --coordinator"),
    _option("--join-timeout", "S", _count, "seconds to wait for the others (default 300)", default=300),
    SKIP,
    OVERRIDES,
)
def _train(args: Arguments) -> None:
    """Train a model through all stages, or continue an interrupted run.

    --data, --model and --output train on your own texts without a YAML file. Settings are chosen by the
    number and length of the texts, and written to OUTPUT/run.yaml; key=value replaces them.

    The stages run in order:
    {stages}
    Run again, the command skips finished stages and continues the one that was interrupted.

    Examples:
      trbert train --data reviews.csv --model google-bert/bert-base-uncased --output runs/reviews
      trbert train --config configs/imdb_bert.yaml data.path=~/imdb workdir=/tmp/imdb policy.alpha=2
      trbert train --config configs/imdb_bert.yaml --stages finetune,score
    """
    if not args.dry_run and (args.devices or args.processes):
        raise UserError("--devices and --processes need --dry-run; a run uses all devices")
    given = [x is not None for x in (args.coordinator, args.num_processes, args.process_id)]
    if any(given) and (args.distributed or not all(given)):
        raise UserError("--coordinator, --num-processes and --process-id go together, without --distributed")
    if all(given) and args.process_id >= args.num_processes:
        raise UserError(f"--process-id {args.process_id} is not below --num-processes {args.num_processes}")
    own = [name for name, value in _chosen(args, f"data model output {OWN}").items() if value]
    if bool(own) == bool(args.config):
        raise UserError("expected --config, or --data with --model and --output")
    if own and not (args.data and args.model and args.output):
        option, needed = own[0].replace("_", "-"), "--data FILE --model DIR --output DIR"
        raise UserError(f"--{option} is for training on your own texts, which needs {needed}")
    if args.dry_run:
        os.environ["JAX_PLATFORMS"] = "cpu"  # leave accelerators to others
    config = _own_run(args) if own else _config(args)  # before the slow import
    if args.dry_run:
        from trbert_jax.training import dry_run
        from trbert_jax.training.experiment import Experiment

        streams.show(*dry_run.lines(Experiment(config), args.devices or 1, args.processes or 1))
        return
    io.enable_compilation_cache()
    if args.distributed or args.coordinator is not None:
        from trbert_jax.parallel import join

        join(args.coordinator, args.num_processes, args.process_id, args.join_timeout)
    from trbert_jax.training.run import results_table, train

    options = {"write_settings": True} if own else {}
    results = train(config, args.stages, profile_steps=args.profile_steps, **options)
    streams.show(*results_table(config, results))


@_command(
    "evaluate",
    _path("models", "--model", "DIR", "folder of a trained model"),
    _path("inputs", "--data", "FILE", _data_help),
    *FIELDS,
    LABEL_FIELD,
    MAX_LENGTH,
    BATCH_SIZE,
    *RULE,
    THRESHOLD,
    *ANSWERS,
    _path("outputs", "--json", "FILE", "write the numbers to this file"),
    _path("outputs", "--predictions", "FILE", PREDICTIONS_HELP, beside=".null_odds.json"),
    _path("outputs", "--plot", "FILE", "draw the confusion matrix to this PNG file"),
    _switch("--baselines", lambda: f"also {', '.join(rule_names('baseline'))}, at the same kept counts"),
    SKIP,
    _path("inputs", "--config", "FILE", "settings, for --all-checkpoints"),
    _switch("--all-checkpoints", "evaluate all checkpoints of a run"),
    OVERRIDES,
)
def _evaluate(args: Arguments) -> None:
    """Evaluate a model on labeled texts or questions.

    Prints the metrics, tokens kept at each reduction, FLOPs and speed; of texts also the scores of each class
    and the confusion matrix.

    Examples:
      trbert evaluate --model work/imdb/model --data test.jsonl --json result.json
      trbert evaluate --model work/imdb/model --data test.jsonl --threshold 0.4
      trbert evaluate --config configs/imdb_bert.yaml --all-checkpoints --json checkpoints.json
    """
    if args.all_checkpoints:
        if not args.config:
            raise UserError("--all-checkpoints needs --config, the settings the model was trained with")
        others = args.model or args.data or args.predictions or args.plot or args.baselines
        if others or args.threshold != DEFAULT_THRESHOLD:
            raise UserError("--all-checkpoints takes model, data and settings from --config alone")
    elif args.config or args.overrides:
        raise UserError("--config and key=value need --all-checkpoints; one model takes --model and --data")
    elif not (args.model and args.data):
        raise UserError("--model and --data are needed, or --config with --all-checkpoints")
    elif args.baselines and args.rule is not None and not RULES[args.rule].drops:
        raise UserError(f"--baselines keep as many tokens as the model; --rule {args.rule} drops none")
    if not (args.json or args.predictions):
        streams.check_output_is_read("--json")
    io.enable_compilation_cache()
    if args.all_checkpoints:
        from trbert_jax.training.run import evaluate_all_checkpoints

        result = evaluate_all_checkpoints(_config(args), args.json)
    else:
        from trbert_jax.inference.evaluate import evaluate_file

        baselines = rule_names("baseline") if args.baselines else ()
        names = "batch_size rule backend threshold predictions plot skip_bad_records max_length"
        names += " null_threshold max_answer_length"
        options = _chosen(args, f"{names} text_field text_pair_field label_field")
        result = evaluate_file(args.model, args.data, baselines=baselines, **options)
    if args.json:
        io.write_json(args.json, result)
    from trbert_jax.inference.class_report import class_table

    shown = {name: value for name, value in result.items() if name != "data"}  # logged while it was read
    streams.show(*_table(shown))
    if lines := [*class_table(result)]:
        streams.show("", *lines)


@_command(
    "predict",
    MODEL,
    _option("texts", "TEXT", str, "texts (after `--` if one begins with a dash)", nargs="*"),
    _path("inputs", "--file", "FILE", _file_help),
    _option(
        "--format",
        None,
        str,
        "format of --file, if its name has no ending",
        choices=lambda: ("txt", *_formats()),
    ),
    _path("outputs", "--output", "FILE", "write to this file; .csv, .tsv: a table; else JSON lines"),
    *FIELDS,
    MAX_LENGTH,
    BATCH_SIZE,
    *RULE,
    THRESHOLD,
    _option("--n-best", "N", _n_best, "list the N best answers to each question"),
    *ANSWERS,
    _switch("--with-text", "repeat the text, or the question, in each line"),
    SKIP,
)
def _predict(args: Arguments) -> None:
    """Label texts or answer questions.

    Texts are arguments, or those of --file or standard input (--file -). Prints one JSON object per text, in
    order: "id" (if the row has one), "label", "label_id", "scores" (a probability per label), "kept" (for
    each reduction the positions of the tokens that remained; 0 is [CLS]), "num_tokens" (special tokens
    included), "truncated" (the text was too long). A model with one output gives "score" and "logit", and no
    label. The ending of --file decides its format.

    A model that answers questions takes a JSON object per line ("question" and "context", say; see
    docs/question_answering.md) and prints "id", "answer", "score", "num_tokens" and "num_kept"; of an answer
    cut from a text "start" and "end", its characters; "null_odds" if questions may have no answer.

    Examples:
      trbert predict --model work/imdb/model --file reviews.jsonl --output predictions.jsonl
      cat reviews.txt | trbert predict --model work/imdb/model
      trbert predict --model work/squad/model '{"question": "Who wrote it?", "context": "Ada wrote it."}'
    """
    from trbert_jax.datasets import BadRecords
    from trbert_jax.inference.lines import RecordWriter, Source, check_kind, output_records

    if args.texts and (args.file or args.format):
        raise UserError("texts are given as arguments; --file and --format are for other texts")
    if not args.texts and str(args.file or "-") == "-" and sys.stdin.isatty():
        streams.say("reading texts from the keyboard, one per line; Ctrl-D ends")
    check_kind(args.output)
    source = Source(args.texts, args.file, args.format)
    if not args.output:
        streams.check_output_is_read("--output")
    io.enable_compilation_cache()
    from trbert_jax.inference.predictor import TRBert

    model = TRBert.from_pretrained(args.model, max_length=args.max_length)
    fields, bad = (
        model.config.inputs.fields(args.text_field, args.text_pair_field),
        BadRecords(args.skip_bad_records),
    )
    options = _chosen(args, "batch_size rule backend threshold")
    asked = _chosen(args, "n_best null_threshold max_answer_length")
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked and not model.answers_questions:
        raise UserError(f"--{next(iter(asked)).replace('_', '-')} is for models that answer questions")
    options |= asked
    records, count = output_records(model, source, fields, bad, args.with_text, **options), 0
    printed = contextlib.nullcontext(streams.StandardOutput())
    with atomic_file(args.output) if args.output else printed as stream:
        failed, writer = None, RecordWriter(stream, args.output)
        try:
            for record in records:
                writer.write(record)
                stream.flush()
                count += 1
        except UserError as error:
            if not count:  # else what was predicted before it is kept
                raise
            failed = error
    if failed:
        kept = f"; {args.output} has the {count} predictions before it" if args.output else ""
        raise UserError(f"{failed}{kept}") from failed


@_command("compile", MODEL, BATCH_SIZE, *RULE)
def _compile(args: Arguments) -> None:
    """Compile a model ahead of its use.

    Compiles what predict and evaluate need with this batch size, and keeps the programs in
    ~/.cache/trbert_jax (or $JAX_COMPILATION_CACHE_DIR), so that the next process starts at once.

    Example:
      trbert compile --model work/imdb/model --batch-size 32
    """
    io.enable_compilation_cache()
    from trbert_jax.inference.predictor import TRBert

    if not (folder := io.compilation_cache()):
        raise UserError(f"no folder for compiled programs; name a writable one in {io.CACHE_VARIABLE}")
    model = TRBert.from_pretrained(args.model)
    total = 0.0
    for program, seconds in model.compile(args.batch_size, args.rule, args.backend):
        total += seconds
        streams.show(f"{program}  {seconds:.1f} s")
    streams.show(f"{folder}: programs ready, {total:.1f} s")


@_command(
    "benchmark",
    _path("models", "--model", "DIR", "folder of a trained model"),
    _option("--random", "SIZE", str, "bert-base, minilm or tiny: random weights, the tokenizer of --replay"),
    _path("inputs", "--data", "FILE", _data_help, required=True),
    _path("models", "--replay", "DIR", "keep the tokens that this model keeps, instead of the model's own"),
    _option("--batch-sizes", "N,N", _list_of(_count), "default 1,8,32,128, up to the number of texts"),
    _option("--variants", "A,B", _list_of(_name), "variants to time (default all)"),
    _former("--executions", "--variants"),
    _option("--max-texts", "N", _count, "use only the first N texts of the file"),
    SKIP,
    MAX_LENGTH,
    _option("--repeats", "N", _count, "time everything N times (default 5)", default=5),
    _option("--dtype", None, str, "of activations", choices=("float32", "bfloat16"), default="float32"),
    _path("outputs", "--json", "FILE", "write a list of records to this file"),
    _path("outputs", "--plot", "FILE", "plot the records to this PNG file"),
)
def _benchmark(args: Arguments) -> None:
    """Time the variants of running a model side by side.

    All variants take the same batches: packed (computes the kept tokens only), masked (computes all),
    masked_full (pads texts to the model's longest), batch_max (the published evaluation), dense and
    dense_full (drop nothing) and, if PyTorch is installed, huggingface. "realized" in the table is the
    speed-up over masked_full divided by the ratio of FLOPs: 1 if each FLOP saved saves its time.

    Examples:
      trbert benchmark --model work/imdb/model --data test.jsonl --batch-sizes 32 --plot speed.png
      trbert benchmark --random bert-base --replay work/imdb/model --data test.jsonl --max-length 256
    """
    if bool(args.model) == bool(args.random):
        raise UserError("one of --model and --random is needed")
    if not (args.json or args.plot):
        streams.check_output_is_read("--json")
    from trbert_jax.inference.benchmark import benchmark_file
    from trbert_jax.inference.benchmark_report import plot_benchmark, table

    names = "random batch_sizes variants max_texts max_length repeats dtype skip_bad_records"
    options = _chosen(args, names) | {"model_dir": args.model, "replay_dir": args.replay}
    records = benchmark_file(args.data, command=args.command_line, **options)
    streams.show(*table(records))
    if args.json:
        io.write_json(args.json, records)
    if args.plot:
        plot_benchmark(records, args.plot)


@_command(
    "convert",
    _path("models", "--input", "DIR", "folder of a checkpoint, or a hub id", required=True),
    _path("folders", "--output", "DIR", "folder to write", required=True),
    _switch("--overwrite", "replace --output if it exists"),
    _option("--max-positions", "N", _count, "longest input in tokens; a longer one repeats positions"),
    _option("--max-length", "N", _count, "tokens after which texts are cut (not stored as published)"),
    _option("--keep-layers", "0,2,4", _list_of(_index), "drop all other layers"),
    _option("--labels", "A,B", _list_of(_name), "names of the labels, in order of their ids"),
)
def _convert(args: Arguments) -> None:
    """Convert a checkpoint to this project's form.

    Reads a Hugging Face BERT or DistilBERT, or a checkpoint of the published TR-BERT code.

    Examples:
      trbert convert --input bert-base-uncased --output models/bert-1024 --max-positions 1024
      trbert convert --input distilbert-base-uncased --output models/distil3 --keep-layers 0,2,4
    """
    from trbert_jax.model.pretrained import load_pretrained, save_pretrained

    output: Path = args.output
    if output.is_dir() and contents(output) and not args.overwrite:
        raise UserError(f"{output}: exists and is not empty; choose another --output or give --overwrite")
    model = load_pretrained(args.input, **_chosen(args, "labels max_positions max_length keep_layers"))
    save_pretrained(output, model.config, model.params, model.tokenizer, exclude=model.newly_initialized)
    shape = model.config
    layers = f"{shape.model_type}, {shape.num_layers} layers of width {shape.hidden_size}"
    head = f"{shape.num_labels} labels" if shape.task == "classification" else f"head for {shape.task}"
    streams.show(f"{output}: {layers}, {shape.max_positions} positions, {'a score' if shape.score else head}")


@_command(
    "prepare-data",
    CONFIG,
    _option("--output", "DIR", _expanded, "folder of the shards", required=True),
    _option("--shard-size", "N", _count, "examples per shard (default 4096)", default=4096),
    _option("--workers", "N", _count, "shards written at a time (default 2)", default=2),
    SKIP,
    OVERRIDES,
)
def _prepare_data(args: Arguments) -> None:
    """Tokenize a data set once, into shards.

    Training reads the shards with data.prepared=DIR, as TensorFlow Datasets does. Started again, the command
    continues.

    Example:
      trbert prepare-data --config configs/yelp_f_bert.yaml --output prepared/yelp_f data.path=data/yelp_f
    """
    config = _config(args)
    from trbert_jax.training.experiment import Experiment

    Experiment(config).prepare_data(args.output, args.shard_size, args.workers)


@_command(
    "split-hyperpartisan",
    _option("--input", "PATH", Path, "original_data.txt, articles-*.xml, or a folder", required=True),
    _option("--output", "DIR", Path, "folder for the three files", required=True),
)
def _split_hyperpartisan(args: Arguments) -> None:
    """Split the Hyperpartisan articles.

    Writes the published split, shuffled with a fixed seed: train.jsonl, dev.jsonl and test.jsonl.

    Example:
      trbert split-hyperpartisan --input original_data.txt --output data/hyperpartisan
    """
    from trbert_jax.datasets.hyperpartisan import split_hyperpartisan

    for name, count in split_hyperpartisan(args.input, args.output).items():
        streams.show(f"{args.output}/{name}.jsonl: {count} articles")


def _table(result: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields lines `name  value`; dots join nested names."""
    for name, value in result.items():
        if name in ("classes", "confusion_matrix"):  # `class_table` shows them
            continue
        if isinstance(value, dict):
            yield from _table(value, f"{prefix}{name}.")
        else:
            values = value if isinstance(value, list | tuple) else [value]
            yield f"{prefix + name:<32}  {', '.join(map(_number, values))}"


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.3e}"

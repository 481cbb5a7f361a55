"""What the command line accepts: commands, options and the help that explains them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from trbert_jax import __version__, help_texts
from trbert_jax.reduction.rules import RULES, rule_names

PROGRAM = "trbert"
BACKENDS = ("packed", "masked")


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{PROGRAM}: error: {message} (see `{self.prog} --help`)\n")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses a command line.

    Args:
      argv: arguments without the program's name; those of the process by default.

    Returns:
      `command` and, under their own names, the options of that command.

    Raises:
      SystemExit: after help or the version (code 0), or a message about a wrong argument (code 2).
    """
    parser, commands = _build()
    args, rest = parser.parse_known_args(argv)
    command = commands[args.command]
    # argparse gives up on positional arguments that stand after an option; they belong to the same list.
    positional = {
        "train": "overrides",
        "prepare-data": "overrides",
        "evaluate": "overrides",
        "predict": "texts",
    }.get(args.command)
    end_of_options = rest.index("--") if "--" in rest else len(rest)
    late, literal = rest[:end_of_options], rest[end_of_options + 1 :]
    strange = [word for word in late if positional is None or word.startswith("-")]
    if strange:
        command.error(f"unrecognized arguments: {' '.join(strange)}")
    if positional:
        getattr(args, positional).extend(late + literal)
    if args.command == "evaluate":
        _check_evaluate(command, args)
    if args.command == "train":
        _check_processes(command, args)
    if args.command == "benchmark" and bool(args.model) == bool(args.random):
        command.error("one of --model and --random is needed")
    return args


def _add_processes(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("several processes, each with its own devices")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find the other processes in the environment (SLURM, Open MPI, Kubernetes, Cloud TPU)",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is to be reached")
    group.add_argument("--num-processes", metavar="N", type=_count, help="how many processes there are")
    group.add_argument("--process-id", metavar="I", type=_index, help="which one this is, from 0 on")
    group.add_argument(
        "--join-timeout", metavar="S", type=_count, default=300, help="seconds to wait for the others (300)"
    )


def _check_processes(command: _Parser, args: argparse.Namespace) -> None:
    if not args.dry_run and (args.devices or args.processes):
        command.error("--devices and --processes go with --dry-run; a run uses all devices there are")
    given = [x is not None for x in (args.coordinator, args.num_processes, args.process_id)]
    if any(given) and (args.distributed or not all(given)):
        command.error("--coordinator, --num-processes and --process-id go together, without --distributed")
    if all(given) and args.process_id >= args.num_processes:
        command.error(f"--process-id {args.process_id} is not below --num-processes {args.num_processes}")


def _check_evaluate(command: _Parser, args: argparse.Namespace) -> None:
    if args.all_checkpoints:
        if not args.config:
            command.error("--all-checkpoints needs --config, the settings the model was trained with")
        if args.model or args.data or args.predictions or args.baselines or args.threshold != 0.5:
            command.error("--all-checkpoints takes model, data and settings from --config alone")
    elif args.config or args.overrides:
        command.error(
            "--config and key=value go with --all-checkpoints; for one model give --model and --data"
        )
    elif not (args.model and args.data):
        command.error("--model and --data are needed (or --config with --all-checkpoints)")
    elif args.baselines and args.rule == "dense":
        command.error("--baselines keep as many tokens as the model; --rule dense drops none")


def _build() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(prog=PROGRAM, description=help_texts.DESCRIPTION, epilog=help_texts.EXAMPLES)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")

    def command(name: str, summary: str, details: str) -> _Parser:
        title = f"{summary[0].upper()}{summary[1:]}."
        return subparsers.add_parser(name, help=summary, description=title, epilog=details)

    train = command("train", "train a model through all stages, or go on with it", help_texts.TRAIN_EXAMPLES)
    train.add_argument(
        "--config", required=True, metavar="FILE", type=Path, help="YAML file with the settings"
    )
    train.add_argument("--stages", metavar="A,B", type=_names, help="run only these stages")
    _add_processes(train)
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="say what would be done on --devices of --processes, and do nothing",
    )
    train.add_argument("--devices", metavar="N", type=_count, help="devices, for --dry-run (default 1)")
    train.add_argument("--processes", metavar="P", type=_count, help="processes, for --dry-run (default 1)")
    train.add_argument(
        "--profile-steps",
        metavar="A:B",
        type=_step_range,
        help="record a profile of updates A to B of each stage, for TensorBoard or Perfetto",
    )
    _add_skip(train)
    _add_overrides(train)

    evaluate = command("evaluate", "measure a model on labeled texts", help_texts.EVALUATE_EXAMPLES)
    evaluate.add_argument("--model", metavar="DIR", help="folder of a trained model")
    evaluate.add_argument(
        "--data",
        metavar="FILE",
        type=Path,
        help=".jsonl (text, label) or .csv (label, text); of questions a file as published",
    )
    evaluate.add_argument(
        "--batch-size", metavar="N", type=_count, default=32, help="texts at a time (default 32)"
    )
    evaluate.add_argument("--json", metavar="FILE", type=Path, help="write the numbers there, as JSON")
    _add_rule(evaluate)
    _add_threshold(evaluate)
    evaluate.add_argument(
        "--predictions",
        metavar="FILE",
        type=Path,
        help="write a JSON line for each text there; of questions what the official scorer reads,"
        " and FILE.null_odds.json where there may be no answer",
    )
    evaluate.add_argument(
        "--baselines",
        action="store_const",
        const=rule_names("baseline"),
        default=(),
        help="also measure random tokens and the first tokens, as many as the model keeps",
    )
    _add_skip(evaluate)
    evaluate.add_argument("--config", metavar="FILE", type=Path, help="settings, for --all-checkpoints")
    evaluate.add_argument(
        "--all-checkpoints", action="store_true", help="measure every checkpoint that was kept"
    )
    _add_overrides(evaluate)

    predict = command("predict", "label texts or answer questions", help_texts.PREDICT_EXAMPLES)
    predict.add_argument("--model", required=True, metavar="DIR", help="folder of a trained model")
    predict.add_argument(
        "texts", nargs="*", metavar="TEXT", help="texts (after `--` if one begins with a dash)"
    )
    predict.add_argument(
        "--file", metavar="FILE", type=Path, help='one text a line; .jsonl: objects with "text"'
    )
    predict.add_argument("--output", metavar="FILE", type=Path, help="write there rather than print")
    predict.add_argument(
        "--batch-size", metavar="N", type=_count, default=32, help="texts at a time (default 32)"
    )
    _add_rule(predict)
    _add_threshold(predict)
    predict.add_argument(
        "--with-text", action="store_true", help="repeat the text, or the question, in each line"
    )

    compile_ = command("compile", "compile a model ahead of its use", help_texts.COMPILE_EXAMPLES)
    compile_.add_argument("--model", required=True, metavar="DIR", help="folder of a trained model")
    compile_.add_argument(
        "--batch-size", metavar="N", type=_count, default=32, help="texts at a time (default 32)"
    )
    _add_rule(compile_)
    _add_benchmark(
        command("benchmark", "time the ways to run a model side by side", help_texts.BENCHMARK_EXAMPLES)
    )

    convert = command("convert", "bring a checkpoint into this project's form", help_texts.CONVERT_EXAMPLES)
    convert.add_argument("--input", required=True, metavar="DIR", help="folder of a checkpoint, or a hub id")
    convert.add_argument("--output", required=True, metavar="DIR", type=Path, help="folder to write")
    convert.add_argument("--overwrite", action="store_true", help="replace --output if it is there")
    convert.add_argument(
        "--max-positions",
        metavar="N",
        type=_count,
        help="longest input, in tokens; a longer one repeats positions",
    )
    convert.add_argument(
        "--max-length",
        metavar="N",
        type=_count,
        help="tokens after which texts are cut; published checkpoints do not say what they were trained with",
    )
    convert.add_argument("--keep-layers", metavar="0,2,4", type=_integers, help="drop all other layers")
    convert.add_argument(
        "--labels", metavar="A,B", type=_names, help="names of the labels, in order of their ids"
    )

    prepare = command("prepare-data", "tokenize a data set once, into shards", help_texts.PREPARE_EXAMPLES)
    prepare.add_argument("--config", required=True, metavar="FILE", type=Path, help="settings of the run")
    prepare.add_argument("--output", required=True, metavar="DIR", type=Path, help="folder of the shards")
    prepare.add_argument(
        "--shard-size", metavar="N", type=_count, default=4096, help="examples of a shard (default 4096)"
    )
    prepare.add_argument(
        "--workers", metavar="N", type=_count, default=2, help="shards written at a time (default 2)"
    )
    _add_skip(prepare)
    _add_overrides(prepare)

    split = command("split-hyperpartisan", "split the Hyperpartisan articles", help_texts.SPLIT_EXAMPLES)
    split.add_argument(
        "--input",
        required=True,
        metavar="PATH",
        type=Path,
        help="original_data.txt, articles-*.xml, or a folder",
    )
    split.add_argument("--output", required=True, metavar="DIR", type=Path, help="folder for the three files")
    return parser, subparsers.choices


def _add_benchmark(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="folder of a trained model")
    parser.add_argument(
        "--random",
        metavar="SIZE",
        help="bert-base, minilm or tiny: random weights as the model; the tokenizer is that of --replay",
    )
    parser.add_argument(
        "--data",
        required=True,
        metavar="FILE",
        type=Path,
        help='one text a line; .jsonl: objects with "text"; for a model that answers questions a file in the'
        " published format of its data set",
    )
    parser.add_argument(
        "--replay",
        metavar="DIR",
        help="keep the tokens that this model keeps, rather than the model's own choice",
    )
    parser.add_argument(
        "--batch-sizes", metavar="N,N", type=_counts, help="default 1,8,32,128, as far as there are texts"
    )
    parser.add_argument("--variants", metavar="A,B", type=_names, help="what to time; default all")
    parser.add_argument("--executions", type=_renamed_executions, help=argparse.SUPPRESS)
    parser.add_argument("--max-texts", metavar="N", type=_count, help="only the first N texts of the file")
    _add_skip(parser)
    parser.add_argument(
        "--max-length", metavar="N", type=_count, help="tokens after which a text is cut; default the model's"
    )
    parser.add_argument(
        "--repeats", metavar="N", type=_count, default=5, help="times everything N times (default 5)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="what to compute in (default float32)",
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write a list of records there, as JSON")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw them there, as PNG")


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings that replace those of the file"
    )


def _add_skip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--skip-bad-records",
        action="store_true",
        help="leave out questions that are not as they should be, count and list them; without it the first"
        " one ends the command",
    )


def _add_rule(parser: _Parser) -> None:
    parser.add_argument(
        "--rule",
        choices=rule_names(),
        help="; ".join(f"{name}: {RULES[name].description}" for name in rule_names())
        + " (default threshold for a model with trained selectors, else dense)",
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help="packed: compute the kept tokens only (default); masked: compute all, the same numbers",
    )
    parser.add_argument("--execution", type=_renamed_execution, help=argparse.SUPPRESS)


def _renamed_execution(text: str) -> str:
    raise argparse.ArgumentTypeError("was divided into --rule and --backend")


def _renamed_executions(text: str) -> str:
    raise argparse.ArgumentTypeError("is named --variants now")


def _add_threshold(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threshold",
        metavar="P",
        type=_probability,
        default=0.5,
        help="keep tokens whose keep probability is at least P (default 0.5, the published rule); a lower one"
        " keeps more tokens",
    )


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"names with commas between them were expected, not {text!r}")
    return names


def _integers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"numbers with commas between them were expected, not {text!r}"
        ) from None


def _counts(text: str) -> list[int]:
    return [_count(number.strip()) for number in text.split(",")]


def _probability(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"a number above 0 and below 1 was expected, not {text!r}")
    return value


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1 was expected, not {text!r}")
    return int(text)


def _index(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"a number of at least 0 was expected, not {text!r}")
    return int(text)


def _step_range(text: str) -> tuple[int, int]:
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(f"FIRST:END was expected, such as 10:15, not {text!r}")
    return int(first), int(end)

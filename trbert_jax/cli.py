"""The command line: `trbert train`, `evaluate`, `predict`, `compile`, `benchmark`, `convert`, ...

Reads arguments, calls the library, prints. Whatever is slow to import is imported by the command
that needs it, so that help and a mistyped argument answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from trbert_jax import compilation_cache
from trbert_jax.arguments import parse_arguments
from trbert_jax.errors import PreemptedError, UserError
from trbert_jax.io import atomic_file, check_writable, setup_logging, write_json

if TYPE_CHECKING:
    from trbert_jax.config import RunConfig

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
EXIT_TERMINATED = 143  # 128 + SIGTERM: launchers take it for a job to start again
USES_MODEL = ("train", "evaluate", "predict", "compile")
RESUME = "run the same command again to go on from the last checkpoint"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: arguments without the program's name; those of the process by default.

    Returns:
      The exit code: 0, or 2 where the user has to mend something, 130 after Ctrl-C, 141 where the
      reader of the output has gone, 143 after SIGTERM.
    """
    try:
        args = parse_arguments(argv)
    except SystemExit as stop:  # argparse has printed help, the version or what is wrong
        return stop.code if isinstance(stop.code, int) else EXIT_USER_ERROR
    args.command_line = shlex.join(["trbert", *(sys.argv[1:] if argv is None else argv)])
    if args.command in USES_MODEL:
        compilation_cache.enable()
    # Importing transformers without PyTorch is what we mean to do; its advice is no news.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    setup_logging()
    try:
        COMMANDS[args.command](args)
        sys.stdout.flush()
    except UserError as error:
        _say(f"error: {error}")
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        _say(f"interrupted; {RESUME}" if args.command == "train" else "interrupted")
        return EXIT_INTERRUPTED
    except PreemptedError as stop:
        _say(f"{stop}; {RESUME}")
        return EXIT_TERMINATED
    except BrokenPipeError:
        # The interpreter flushes stdout once more at exit; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return 0


# Commands -----------------------------------------------------------------------------------------


def _config(args: argparse.Namespace) -> RunConfig:
    from trbert_jax.config import load_config

    skip = ["data.skip_bad_records=true"] if args.skip_bad_records else []
    return load_config(args.config, [*args.overrides, *skip])


def _train(args: argparse.Namespace) -> None:
    config = _config(args)  # mistakes in it show before the slow import
    if args.dry_run:
        os.environ["JAX_PLATFORMS"] = "cpu"  # a plan needs no accelerator, and takes none from others
        from trbert_jax.training import dry_run as plan
        from trbert_jax.training.experiment import Experiment

        print("\n".join(plan.lines(Experiment(config), args.devices or 1, args.processes or 1)))
        return
    if args.distributed or args.coordinator:
        from trbert_jax.parallel import join

        join(args.coordinator, args.num_processes, args.process_id, args.join_timeout)
    from trbert_jax.training.run import results_table, train

    # Several processes agree on when to stop, which JAX listens for.
    with contextlib.nullcontext() if args.distributed or args.coordinator else _stopped_by_sigterm():
        results = train(config, args.stages, profile_steps=args.profile_steps)
        print("\n".join(results_table(config, results)))


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Ends what needs no saving; in updates `training.preemption.StopRequest` takes over."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise PreemptedError("told to stop")

    if threading.current_thread() is not threading.main_thread():  # may not say what signals do
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_outputs(*paths: Path | None) -> None:
    """Raises a UserError where a file cannot be written, or two outputs would be the same."""
    seen = set[Path]()
    for path in filter(None, paths):
        check_writable(path)
        if path.resolve() in seen:
            raise UserError(f"{path}: is named for two outputs; give each a file of its own")
        seen.add(path.resolve())


def _evaluate(args: argparse.Namespace) -> None:
    _check_outputs(args.json, args.predictions)
    if args.all_checkpoints:
        from trbert_jax.training.evaluation import evaluate_all_checkpoints

        result = evaluate_all_checkpoints(_config(args))
    else:
        from trbert_jax.inference.evaluate import evaluate_file

        result = evaluate_file(
            args.model,
            args.data,
            batch_size=args.batch_size,
            rule=args.rule,
            backend=args.backend,
            threshold=args.threshold,
            predictions=args.predictions,
            baselines=args.baselines,
            skip_bad_records=args.skip_bad_records,
        )
    if args.json:
        write_json(args.json, result)
    shown = {name: value for name, value in result.items() if name != "data"}  # said while it was read
    print("\n".join(_table(shown)))


def _predict(args: argparse.Namespace) -> None:
    from trbert_jax.inference.predict_lines import answer_lines, input_lines, prediction_lines

    if args.texts and args.file:
        raise UserError("texts are given both as arguments and by --file; give one of the two")
    if not args.texts and not args.file and sys.stdin.isatty():
        _say("reading texts from the keyboard, one a line; Ctrl-D ends")
    lines_in = input_lines(args.texts, args.file)
    _check_outputs(args.output)
    from trbert_jax.inference.predictor import TRBert

    model = TRBert.from_pretrained(args.model)
    options = {"batch_size": args.batch_size, "rule": args.rule, "backend": args.backend}
    options["threshold"] = args.threshold
    lines_out = answer_lines if model.config.inputs.data else prediction_lines
    lines = lines_out(model, lines_in, args.file, args.with_text, _say, **options)
    if args.output:
        with atomic_file(args.output) as stream:
            _write_lines(stream, lines)
    else:
        _write_lines(sys.stdout, lines)


def _compile(args: argparse.Namespace) -> None:
    from trbert_jax.inference.predictor import TRBert

    if not (directory := compilation_cache.directory()):
        raise UserError(
            "nothing would be kept: no folder for compiled programs; name one that can be written to in"
            f" {compilation_cache.VARIABLE}"
        )
    model = TRBert.from_pretrained(args.model)
    if model.config.inputs.data:
        from trbert_jax.inference.answering import compile_questions

        programs = compile_questions(model, args.batch_size, args.rule, args.backend)
    else:
        programs = model.compile(args.batch_size, args.rule, args.backend)
    total = 0.0
    for program, seconds in programs:
        total += seconds
        print(f"{program}  {seconds:.1f} s", flush=True)
    print(f"{directory}: programs ready, {total:.1f} s")


def _benchmark(args: argparse.Namespace) -> None:
    _check_outputs(args.json, args.plot)
    from trbert_jax.inference.benchmark import benchmark_file
    from trbert_jax.inference.benchmark_report import plot_benchmark, table

    records = benchmark_file(
        args.data,
        model_dir=args.model,
        random=args.random,
        replay_dir=args.replay,
        batch_sizes=args.batch_sizes,
        variants=args.variants,
        max_texts=args.max_texts,
        max_length=args.max_length,
        repeats=args.repeats,
        dtype=args.dtype,
        command=args.command_line,
        skip_bad_records=args.skip_bad_records,
    )
    print("\n".join(table(records)))
    if args.json:
        write_json(args.json, records)
    if args.plot:
        plot_benchmark(records, args.plot)


def _convert(args: argparse.Namespace) -> None:
    from trbert_jax.model.pretrained import load_pretrained, save_pretrained

    output = Path(args.output)
    if output.is_dir() and any(output.iterdir()) and not args.overwrite:
        raise UserError(
            f"{output}: exists and is not empty; choose another --output or replace it with --overwrite"
        )
    model = load_pretrained(
        args.input,
        labels=args.labels,
        max_positions=args.max_positions,
        max_length=args.max_length,
        keep_layers=args.keep_layers,
    )
    save_pretrained(output, model.config, model.params, model.tokenizer, exclude=model.newly_initialized)
    shape = model.config
    print(
        f"{output}: {shape.model_type}, {shape.num_layers} layers of width {shape.hidden_size},"
        f" {shape.max_positions} positions, {shape.num_labels} labels"
    )


def _prepare_data(args: argparse.Namespace) -> None:
    config = _config(args)
    from trbert_jax.training.experiment import Experiment

    Experiment(config).prepare_data(args.output, args.shard_size, args.workers)


def _split_hyperpartisan(args: argparse.Namespace) -> None:
    from trbert_jax.datasets.hyperpartisan import split_hyperpartisan

    for name, count in split_hyperpartisan(args.input, args.output).items():
        print(f"{args.output}/{name}.jsonl: {count} articles")


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "compile": _compile,
    "benchmark": _benchmark,
    "convert": _convert,
    "prepare-data": _prepare_data,
    "split-hyperpartisan": _split_hyperpartisan,
}


# Output of predict and evaluate ---------------------------------------------------------------------


def _write_lines(stream: IO[str], lines: Iterable[str]) -> None:
    for line in lines:
        stream.write(line + "\n")
        stream.flush()


def _table(result: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Lines `name  value`, nested names joined by dots."""
    for name, value in result.items():
        if isinstance(value, dict):
            yield from _table(value, f"{prefix}{name}.")
        else:
            values = value if isinstance(value, list | tuple) else [value]
            yield f"{prefix + name:<32}  {', '.join(_number(v) for v in values)}"


def _number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e6 else f"{value:.3e}"


def _say(message: str) -> None:
    print(f"trbert: {message}", file=sys.stderr)

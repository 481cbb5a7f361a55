"""Commands that draw pages: `show`, `report`."""

from __future__ import annotations

import os
import sys
from typing import Any

from trbert_jax import io
from trbert_jax.cli.arguments import (
    BATCH_SIZE,
    COUNT,
    INDEX,
    MAX_LENGTH,
    MODEL,
    OPERATING_POINT,
    SKIP,
    THRESHOLD,
    Arguments,
    chosen,
    command,
    data_help,
    option,
    path_option,
)
from trbert_jax.errors import UserError
from trbert_jax.io import streams


@command(
    "show",
    MODEL,
    option("texts", "TEXT", str, 'texts, or questions: {"question": "...", "context": "..."}', nargs="*"),
    path_option("inputs", "--data", "FILE", data_help),
    path_option("outputs", "--output", "FILE", "write a page of HTML to this file"),
    option("--max-texts", "N", COUNT, "read only the first N inputs of --data (default 200)", default=200),
    option("--repeats", "N", INDEX, "time each input N times (default 3; 0: leave out time)", default=3),
    THRESHOLD,
    OPERATING_POINT,
    MAX_LENGTH,
    BATCH_SIZE,
    SKIP,
)
def _show(args: Arguments) -> None:
    """Show which tokens a model keeps.

    Prints texts with the dropped tokens dim, or writes one self-contained page: each token colored by where
    it leaves, a slider of thresholds that moves tokens, answers, FLOPs and time together, the dense model,
    random and first tokens beside it, and, of --data, the words kept and dropped and the changed answers.
    Shows 20 inputs of --data in full, those with changed answers first.

    Examples:
      trbert show --model work/imdb/model "a gripping film"
      trbert show --model work/imdb/model --data test.jsonl --operating-point 3x --output page.html
    """
    if bool(args.texts) == bool(args.data):
        raise UserError("one of TEXT and --data is needed")
    if args.data and not args.output:
        raise UserError("--data needs --output, the page to write")
    io.enable_compilation_cache()
    from trbert_jax.inference import show, show_terminal
    from trbert_jax.inference.predictor import TRBert

    options = chosen(args, "threshold operating_point batch_size repeats")
    if args.data:
        rest = chosen(args, "max_texts max_length skip_bad_records")
        page = show.show_file(args.model, args.data, command=args.command_line, **options, **rest)
    else:
        model = TRBert.from_pretrained(args.model, max_length=args.max_length)
        inputs: list[Any] = args.texts
        if model.answers_questions:
            inputs = [_question(text) for text in args.texts]
        if not args.output:
            color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
            limits = chosen(args, "threshold operating_point")
            streams.show(*show_terminal.terminal_lines(model, inputs, **limits, color=color))
            return
        page = show.show(model, inputs, **options)
    page.save(args.output)
    streams.show(f"{args.output}: {len(page.html.encode()) / 1e6:.2f} MB; open it in a browser")


@command(
    "report",
    path_option("inputs", "--workdir", "DIR", "work directory of a run", required=True),
    path_option("outputs", "--output", "FILE", "page to write (default DIR/report.html)"),
)
def _report(args: Arguments) -> None:
    """Draw the page of a training run.

    One self-contained page of HTML: the models and what they were compared with, operating points, frontier,
    training curves, confusion matrix, stages with their times, settings and environment. `trbert train`
    writes it at the end of a run.

    Example:
      trbert report --workdir runs/quickstart
    """
    from trbert_jax.training.experiment import REPORT
    from trbert_jax.training.report import report

    output = args.output or args.workdir / REPORT
    report(args.workdir).save(output)
    streams.show(f"{output}: open it in a browser")


def _question(text: str) -> Any:
    try:
        return io.parse_json(text)
    except ValueError as error:
        expected = 'expected JSON, {"question": "...", "context": "..."}'
        raise UserError(f"{text[:60]!r}: {error}; {expected}") from error

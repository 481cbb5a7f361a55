"""Commands that use a model: `predict`, `evaluate`, `calibrate`, `serve`, `benchmark`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from trbert_jax import io
from trbert_jax.cli.arguments import (
    AMOUNT,
    ANSWERS,
    BATCH_SIZE,
    COUNT,
    DTYPE,
    ENGINE,
    FACTOR,
    FIELDS,
    LABEL_FIELD,
    MAX_LENGTH,
    MODEL,
    N_BEST,
    NAME,
    OPERATING_POINT,
    OVERRIDES,
    POINTS,
    PORT,
    PREDICTIONS_HELP,
    SECONDS,
    SHARE,
    SKIP,
    THRESHOLD,
    WORD,
    Arguments,
    chosen,
    command,
    config_of,
    data_help,
    file_help,
    formats,
    former,
    list_of,
    option,
    path_option,
    switch,
)
from trbert_jax.errors import UserError
from trbert_jax.io import streams
from trbert_jax.io.outputs import atomic_file
from trbert_jax.model.engines import ENGINES
from trbert_jax.reduction.rules import DEFAULT_THRESHOLD, RULES, rule_names


@command(
    "evaluate",
    path_option("models", "--model", "DIR", "folder of a trained model"),
    path_option("inputs", "--data", "FILE", data_help),
    *FIELDS,
    LABEL_FIELD,
    MAX_LENGTH,
    BATCH_SIZE,
    *ENGINE,
    THRESHOLD,
    OPERATING_POINT,
    *ANSWERS,
    path_option("outputs", "--json", "FILE", "write the numbers to this file"),
    path_option("outputs", "--predictions", "FILE", PREDICTIONS_HELP, beside=".null_odds.json"),
    path_option("outputs", "--plot", "FILE", "draw the confusion matrix, or the frontier, to this PNG file"),
    switch("--frontier", "find the best thresholds for many speeds instead; calibrate stores some"),
    switch("--baselines", lambda: f"also {', '.join(rule_names('baseline'))}, at the same kept counts"),
    SKIP,
    path_option("inputs", "--config", "FILE", "settings, for --all-checkpoints"),
    switch("--all-checkpoints", "evaluate all checkpoints of a run"),
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
        others = others or args.frontier or args.operating_point
        if others or args.threshold != DEFAULT_THRESHOLD:
            raise UserError("--all-checkpoints takes model, data and settings from --config alone")
        if args.backend in ENGINES:
            raise UserError(f"--backend {args.backend} is not for --all-checkpoints, which runs in JAX")
    elif args.config or args.overrides:
        raise UserError("--config and key=value need --all-checkpoints; one model takes --model and --data")
    elif not (args.model and args.data):
        raise UserError("--model and --data are needed, or --config with --all-checkpoints")
    elif args.frontier and args.backend in ENGINES:
        raise UserError(f"--backend {args.backend} is not for --frontier, which runs in JAX")
    elif args.frontier and args.threshold != DEFAULT_THRESHOLD:
        raise UserError("--threshold is not for --frontier, which tries many thresholds")
    elif args.frontier and (other := [name for name in _SINGLE if getattr(args, name)]):
        raise UserError(f"--{other[0].replace('_', '-')} is not for --frontier, which tries many thresholds")
    elif args.baselines and args.rule is not None and not RULES[args.rule].drops:
        raise UserError(f"--baselines keep as many tokens as the model; --rule {args.rule} drops none")
    if args.frontier:
        _calibrate(args)
        return
    if not (args.json or args.predictions):
        streams.check_output_is_read("--json")
    io.enable_compilation_cache()
    if args.all_checkpoints:
        from trbert_jax.training.evaluation import evaluate_all_checkpoints

        result = evaluate_all_checkpoints(config_of(args), args.json)
    else:
        from trbert_jax.inference.evaluate import evaluate_file

        baselines = rule_names("baseline") if args.baselines else ()
        names = "batch_size rule backend dtype threshold operating_point predictions plot skip_bad_records"
        names += " max_length null_threshold max_answer_length"
        options = chosen(args, f"{names} text_field text_pair_field label_field")
        result = evaluate_file(args.model, args.data, baselines=baselines, **options)
    if args.json:
        io.write_json(args.json, result)
    from trbert_jax.inference.class_report import class_table

    shown = {name: value for name, value in result.items() if name != "data"}  # logged while it was read
    streams.show(*_table(shown))
    if lines := [*class_table(result)]:
        streams.show("", *lines)


_SINGLE = ("rule", "operating_point", "predictions", "null_threshold", "max_answer_length")


@command(
    "calibrate",
    MODEL,
    path_option("inputs", "--data", "FILE", data_help, required=True),
    *FIELDS,
    LABEL_FIELD,
    MAX_LENGTH,
    BATCH_SIZE,
    path_option("models", "--dense", "DIR", "dense model to compare with (default the model, unreduced)"),
    option("--speedups", "X,X", list_of(FACTOR), "times fewer FLOPs, of operating points (default 2,3,4)"),
    option("--max-disagreement", "P%", SHARE, "promise: this share of answers differ from dense at most"),
    option("--max-drop", "X", POINTS, "promise: at most X points of accuracy are lost"),
    option("--confidence", "P%", SHARE, "of the promise (default 95%%)", default=0.95),
    option("--points-lost", "X,X", list_of(AMOUNT), "points of the metric, of others (default 0.5,1)"),
    path_option("outputs", "--json", "FILE", "write the numbers to this file"),
    path_option("outputs", "--plot", "FILE", "draw the metric against the speed-up to this PNG file"),
    SKIP,
)
def _calibrate(args: Arguments) -> None:
    """Store thresholds for wanted speeds with a model.

    Finds the best thresholds for each speed on development data, not those that measure the result, and
    stores operating points in DIR/config.json: 2x, 3x and 4x fewer FLOPs, and the fastest within 0.5 and
    within 1 point of the dense model. --operating-point of other commands uses them. Without labels it finds
    speeds only, by agreement with the dense model.

    --max-disagreement 1% and --max-drop 0.5 also store the fastest point that keeps this promise on new
    texts, agrees_99 and drops_0.5: half of the file finds thresholds, the other half tests them.

    Examples:
      trbert calibrate --model work/imdb/model --data dev.jsonl --plot frontier.png
      trbert calibrate --model work/imdb/model --data texts.jsonl --max-disagreement 1% --confidence 95%
      trbert predict --model work/imdb/model --operating-point 3x "some text"
    """
    io.enable_compilation_cache()
    from trbert_jax.inference.calibrate import calibrate_file, frontier_table

    names = "batch_size plot skip_bad_records max_length text_field text_pair_field label_field"
    options = chosen(args, names)
    if args.command == "calibrate":
        given = {"dense_dir": args.dense, **chosen(args, "speedups points_lost max_disagreement confidence")}
        given["max_drop"] = args.max_drop and args.max_drop / 100
        options |= {"stored": True, **{name: value for name, value in given.items() if value}}
    result = calibrate_file(args.model, args.data, **options)
    if args.json:
        io.write_json(args.json, result)
    streams.show(*frontier_table(result))


@command(
    "predict",
    MODEL,
    option("texts", "TEXT", str, "texts (after `--` if one begins with a dash)", nargs="*"),
    path_option("inputs", "--file", "FILE", file_help),
    option(
        "--format",
        None,
        str,
        "format of --file, if its name has no ending",
        choices=lambda: ("txt", *formats()),
    ),
    path_option("outputs", "--output", "FILE", "write to this file; .csv, .tsv: a table; else JSON lines"),
    *FIELDS,
    MAX_LENGTH,
    BATCH_SIZE,
    *ENGINE,
    THRESHOLD,
    OPERATING_POINT,
    option("--n-best", "N", N_BEST, "list the N best answers to each question"),
    *ANSWERS,
    switch("--with-text", "repeat the text, or the question, in each line"),
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
        streams.say("reading texts from the keyboard, one per line; Ctrl-D ends", "info")
    check_kind(args.output)
    source = Source(args.texts, args.file, args.format)
    if not args.output:
        streams.check_output_is_read("--output")
    io.enable_compilation_cache()
    from trbert_jax.inference.predictor import TRBert

    model = TRBert.from_pretrained(args.model, **chosen(args, "max_length dtype backend"))
    fields = model.config.inputs.fields(args.text_field, args.text_pair_field)
    bad = BadRecords(args.skip_bad_records)
    options = chosen(args, "batch_size rule backend threshold operating_point")
    asked = chosen(args, "n_best null_threshold max_answer_length")
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


@command(
    "serve",
    MODEL,
    option(
        "--name",
        "NAME",
        WORD,
        "of the model, in the Open Inference Protocol (default model)",
        default="model",
    ),
    option(
        "--host",
        "ADDRESS",
        str,
        "to listen at (default 127.0.0.1; 0.0.0.0: all)",
        default="127.0.0.1",
    ),
    option("--port", "N", PORT, "port to listen at (default 8000; 0: any free one)", default=8000),
    MAX_LENGTH,
    *ENGINE,
    THRESHOLD,
    OPERATING_POINT,
    option("--batch-tokens", "N", COUNT, "tokens of a batch at most (default 8192)"),
    option("--max-waiting", "N", COUNT, "texts that wait at most; more get 429 (default 512)"),
    option("--timeout", "SECONDS", SECONDS, "to receive, and to answer a request (default 30)"),
)
def _serve(args: Arguments) -> None:
    """Serve a model over HTTP.

    Answers POST /predict, {"inputs": "some text"}, like text-embeddings-inference, and the Open Inference
    Protocol under /v2; /docs describes all requests, /metrics is for Prometheus. Requests share batches and
    may choose "operating_point" or "threshold". SIGTERM ends the server after the requests that it has.

    Examples:
      trbert serve --model work/imdb/model --operating-point 3x
      curl localhost:8000/predict -H 'content-type: application/json' -d '{"inputs": "some text"}'
    """
    io.enable_compilation_cache()
    try:
        from trbert_jax.serving.server import serve
        from trbert_jax.serving.service import Limits
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'trbert-jax[serve]'") from error
    from trbert_jax.inference.predictor import TRBert

    model = TRBert.from_pretrained(args.model, **chosen(args, "max_length dtype backend"))
    given = {"batch_tokens": args.batch_tokens, "waiting": args.max_waiting, "timeout": args.timeout}
    limits = Limits(**{name: value for name, value in given.items() if value})
    options = chosen(args, "host port rule backend threshold operating_point")
    serve(model, args.name, limits=limits, **options)


@command(
    "benchmark",
    path_option("models", "--model", "DIR", "folder of a trained model"),
    option("--random", "SIZE", str, "bert-base, minilm or tiny: random weights, the tokenizer of --replay"),
    path_option("inputs", "--data", "FILE", data_help, required=True),
    path_option(
        "models", "--replay", "DIR", "keep the tokens that this model keeps, instead of the model's own"
    ),
    option("--batch-sizes", "N,N", list_of(COUNT), "default 1,8,32,128, up to the number of texts"),
    option("--variants", "A,B", list_of(NAME), "variants to time (default all)"),
    former("--executions", "--variants"),
    option("--max-texts", "N", COUNT, "use only the first N texts of the file"),
    SKIP,
    MAX_LENGTH,
    THRESHOLD,
    OPERATING_POINT,
    option("--repeats", "N", COUNT, "time everything N times (default 5)", default=5),
    DTYPE,
    path_option("outputs", "--json", "FILE", "write a list of records to this file"),
    path_option("outputs", "--plot", "FILE", "plot the records to this PNG file"),
)
def _benchmark(args: Arguments) -> None:
    """Time the variants of running a model side by side.

    All variants take the same batches: packed (computes the kept tokens only), masked (computes all),
    masked_full (pads texts to the model's longest), batch_max (the published evaluation), dense and
    dense_full (drop nothing). As far as they are installed also huggingface (PyTorch, dense) and exported
    graphs: onnxruntime, onnxruntime_int8, openvino, openvino_bfloat16, and each of them dense
    (dense_onnxruntime, ...). "realized" in the table is the speed-up over masked_full, or over the dense
    graph of the same engine, divided by the ratio of FLOPs: 1 if each FLOP saved saves its time.

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

    names = "random batch_sizes variants max_texts max_length repeats dtype skip_bad_records threshold"
    names += " operating_point"
    options = chosen(args, names) | {"model_dir": args.model, "replay_dir": args.replay}
    records = benchmark_file(args.data, command=args.command_line, **options)
    streams.show(*table(records))
    if args.json:
        io.write_json(args.json, records)
    if args.plot:
        plot_benchmark(records, args.plot)


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

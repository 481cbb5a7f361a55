"""The commands: each a function that reads its arguments and calls the package."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trbert_jax import io
from trbert_jax.cli.arguments import (
    AMOUNT,
    ANSWERS,
    BATCH_SIZE,
    CONFIG,
    COUNT,
    FACTOR,
    FIELDS,
    INDEX,
    LABEL_FIELD,
    MAX_LENGTH,
    MODEL,
    N_BEST,
    NAME,
    OPERATING_POINT,
    OVERRIDES,
    PREDICTIONS_HELP,
    RULE,
    SKIP,
    STEPS,
    THRESHOLD,
    Arguments,
    command,
    data_help,
    file_help,
    formats,
    former,
    found_path,
    list_of,
    option,
    path_option,
    switch,
)
from trbert_jax.errors import UserError
from trbert_jax.io import streams
from trbert_jax.io.outputs import atomic_file, contents
from trbert_jax.reduction.rules import DEFAULT_THRESHOLD, RULES, rule_names

if TYPE_CHECKING:
    from trbert_jax.config import RunConfig


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


@command(
    "train",
    path_option("inputs", "--config", "FILE", "YAML file with the settings of the run"),
    option("--data", "FILE", str, "labeled texts, a folder with train.csv and the like, or hf:NAME"),
    option("--model", "DIR", str, "for --data: folder or hub id of the model to start from, or scratch"),
    option("--output", "DIR", str, "for --data: folder of the run; the model will be in DIR/model"),
    *(option(f"--{name}", "FILE", str, f"for --data: {name} set") for name in ("dev", "test")),
    *FIELDS,
    LABEL_FIELD,
    option("--stages", "A,B", list_of(NAME), "run only these stages"),
    switch("--dry-run", "print the plan for --devices of --processes, and do nothing"),
    option("--devices", "N", COUNT, "devices, for --dry-run (default 1)"),
    option("--processes", "P", COUNT, "processes, for --dry-run (default 1)"),
    option("--profile-steps", "A:B", STEPS, "record a profile of updates A to B of each stage"),
    switch("--distributed", "join the processes that SLURM, Open MPI, Kubernetes or Cloud TPU has started"),
    option("--coordinator", "HOST:PORT", str, "join several processes: address of process 0"),
    option("--num-processes", "N", COUNT, "number of processes, for --coordinator"),
    option("--process-id", "I", INDEX, "number of this process, for --coordinator"),
    option("--join-timeout", "S", COUNT, "seconds to wait for the others (default 300)", default=300),
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


@command(
    "evaluate",
    path_option("models", "--model", "DIR", "folder of a trained model"),
    path_option("inputs", "--data", "FILE", data_help),
    *FIELDS,
    LABEL_FIELD,
    MAX_LENGTH,
    BATCH_SIZE,
    *RULE,
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
    elif args.config or args.overrides:
        raise UserError("--config and key=value need --all-checkpoints; one model takes --model and --data")
    elif not (args.model and args.data):
        raise UserError("--model and --data are needed, or --config with --all-checkpoints")
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

        result = evaluate_all_checkpoints(_config(args), args.json)
    else:
        from trbert_jax.inference.evaluate import evaluate_file

        baselines = rule_names("baseline") if args.baselines else ()
        names = "batch_size rule backend threshold operating_point predictions plot skip_bad_records"
        names += " max_length null_threshold max_answer_length"
        options = _chosen(args, f"{names} text_field text_pair_field label_field")
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
    option("--points-lost", "X,X", list_of(AMOUNT), "points of the metric, of others (default 0.5,1)"),
    path_option("outputs", "--json", "FILE", "write the numbers to this file"),
    path_option("outputs", "--plot", "FILE", "draw the metric against the speed-up to this PNG file"),
    SKIP,
)
def _calibrate(args: Arguments) -> None:
    """Store thresholds for wanted speeds with a model.

    Finds the best thresholds for each speed on development data, not those that measure the result, and
    stores operating points in DIR/config.json: 2x, 3x and 4x fewer FLOPs, and the fastest within 0.5 and
    within 1 point of the dense model. --operating-point of predict, evaluate and benchmark uses them.

    Examples:
      trbert calibrate --model work/imdb/model --data dev.jsonl --plot frontier.png
      trbert predict --model work/imdb/model --operating-point 3x "some text"
    """
    io.enable_compilation_cache()
    from trbert_jax.inference.calibrate import calibrate_file, frontier_table

    names = "batch_size plot skip_bad_records max_length text_field text_pair_field label_field"
    options = _chosen(args, names)
    if args.command == "calibrate":
        given = {"dense_dir": args.dense, "speedups": args.speedups, "points_lost": args.points_lost}
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
    *RULE,
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
        streams.say("reading texts from the keyboard, one per line; Ctrl-D ends")
    check_kind(args.output)
    source = Source(args.texts, args.file, args.format)
    if not args.output:
        streams.check_output_is_read("--output")
    io.enable_compilation_cache()
    from trbert_jax.inference.predictor import TRBert

    model = TRBert.from_pretrained(args.model, max_length=args.max_length)
    fields = model.config.inputs.fields(args.text_field, args.text_pair_field)
    bad = BadRecords(args.skip_bad_records)
    options = _chosen(args, "batch_size rule backend threshold operating_point")
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


@command("compile", MODEL, BATCH_SIZE, *RULE)
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
    option("--dtype", None, str, "of activations", choices=("float32", "bfloat16"), default="float32"),
    path_option("outputs", "--json", "FILE", "write a list of records to this file"),
    path_option("outputs", "--plot", "FILE", "plot the records to this PNG file"),
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

    names = "random batch_sizes variants max_texts max_length repeats dtype skip_bad_records threshold"
    names += " operating_point"
    options = _chosen(args, names) | {"model_dir": args.model, "replay_dir": args.replay}
    records = benchmark_file(args.data, command=args.command_line, **options)
    streams.show(*table(records))
    if args.json:
        io.write_json(args.json, records)
    if args.plot:
        plot_benchmark(records, args.plot)


@command(
    "convert",
    path_option("models", "--input", "DIR", "folder of a checkpoint, or a hub id", required=True),
    path_option("folders", "--output", "DIR", "folder to write", required=True),
    switch("--overwrite", "replace --output if it exists"),
    option("--max-positions", "N", COUNT, "longest input in tokens; a longer one repeats positions"),
    option("--max-length", "N", COUNT, "tokens after which texts are cut (not stored as published)"),
    option("--keep-layers", "0,2,4", list_of(INDEX), "drop all other layers"),
    option("--labels", "A,B", list_of(NAME), "names of the labels, in order of their ids"),
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


@command(
    "prepare-data",
    CONFIG,
    option("--output", "DIR", found_path, "folder of the shards", required=True),
    option("--shard-size", "N", COUNT, "examples per shard (default 4096)", default=4096),
    option("--workers", "N", COUNT, "shards written at a time (default 2)", default=2),
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


@command(
    "split-hyperpartisan",
    option("--input", "PATH", Path, "original_data.txt, articles-*.xml, or a folder", required=True),
    option("--output", "DIR", Path, "folder for the three files", required=True),
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

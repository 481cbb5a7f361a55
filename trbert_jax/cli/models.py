"""Commands that turn a model into another form: `convert`, `export`, `push`, `verify`, `compile`."""

from __future__ import annotations

from pathlib import Path

from trbert_jax import io
from trbert_jax.cli.arguments import (
    BATCH_SIZE,
    COUNT,
    INDEX,
    MAX_LENGTH,
    MODEL,
    NAME,
    OPERATING_POINT,
    RULE,
    SKIP,
    THRESHOLD,
    WORD,
    Arguments,
    chosen,
    command,
    data_help,
    list_of,
    option,
    path_option,
    switch,
)
from trbert_jax.errors import UserError
from trbert_jax.io import streams
from trbert_jax.io.outputs import contents
from trbert_jax.model.engines import FORMATS, PLATFORMS, RULES_OF_GRAPHS, STORED


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
    model = load_pretrained(args.input, **chosen(args, "labels max_positions max_length keep_layers"))
    save_pretrained(output, model.config, model.params, model.tokenizer, exclude=model.newly_initialized)
    shape = model.config
    layers = f"{shape.model_type}, {shape.num_layers} layers of width {shape.hidden_size}"
    head = f"{shape.num_labels} labels" if shape.task == "classification" else f"head for {shape.task}"
    streams.show(f"{output}: {layers}, {shape.max_positions} positions, {'a score' if shape.score else head}")


@command(
    "export",
    MODEL,
    path_option("folders", "--output", "DIR", "folder to write", required=True),
    option("--format", None, str, "onnx (default), or stablehlo for JAX", choices=tuple(FORMATS)),
    option("--rule", None, str, "dense: a graph that drops no tokens", choices=RULES_OF_GRAPHS),
    THRESHOLD,
    OPERATING_POINT,
    switch("--quantize", "int8 weights and products; the selectors stay float32"),
    option("--dtype", None, str, "of the stored weights (default float32)", choices=STORED),
    option("--platform", None, str, "that runs StableHLO (default cpu)", choices=tuple(PLATFORMS)),
    MAX_LENGTH,
)
def _export(args: Arguments) -> None:
    """Export a model for engines that need neither JAX nor this package.

    DIR gets model.onnx, which drops tokens itself, config.json, the tokenizer, and a README.md with a program
    that runs it. Shapes are dynamic, and results are those of JAX. The threshold is an input of the graph;
    --threshold and --operating-point set its default. predict and evaluate run the folder with --backend
    onnxruntime or openvino. --format stablehlo writes programs of a few fixed shapes for jax.export, and the
    weights.

    Examples:
      trbert export --model work/imdb/model --output onnx/imdb --operating-point 3x
      trbert predict --model onnx/imdb --backend onnxruntime "some text"
    """
    from trbert_jax.inference.export import export_model
    from trbert_jax.model.pretrained import load_pretrained

    model = load_pretrained(args.model, max_length=args.max_length)
    options = chosen(args, "format rule threshold operating_point quantize dtype platform")
    options = {name: value for name, value in options.items() if value is not None}
    path = export_model(model, args.output, source=args.model, **options)
    size = sum(file.stat().st_size for file in path.iterdir()) / 1e6
    streams.show(f"{path}: {', '.join(sorted(file.name for file in path.iterdir()))}; {size:.0f} MB")


@command(
    "push",
    MODEL,
    option("--repo", "OWNER/NAME", str, "repository of the hub, made unless it exists", required=True),
    switch("--private", "make a private repository"),
    option("--license", "ID", WORD, "identifier of the license, such as apache-2.0, for the card"),
)
def _push(args: Arguments) -> None:
    """Upload a model to the Hugging Face hub.

    Writes a card with the model's numbers, operating points and use. `hf auth login` stores the token that
    the hub needs; $HF_ENDPOINT names another hub.

    Example:
      trbert push --model work/imdb/model --repo ann/imdb-minilm --license apache-2.0
    """
    from trbert_jax.inference.predictor import TRBert

    model = TRBert.from_pretrained(args.model)
    streams.show(model.push_to_hub(args.repo, **chosen(args, "private license")))


@command(
    "verify",
    MODEL,
    path_option("inputs", "--data", "FILE", data_help, required=True),
    option("--max-texts", "N", COUNT, "texts or questions to run (default 256)", default=256),
    BATCH_SIZE,
    THRESHOLD,
    OPERATING_POINT,
    MAX_LENGTH,
    path_option("outputs", "--json", "FILE", "write the numbers to this file"),
    SKIP,
)
def _verify(args: Arguments) -> int:
    """Verify that answers do not depend on how a model is run.

    Runs each text alone, in batches, in another order, with the other backend and with each engine that is
    installed, and compares logits and kept tokens. Exits with code 1 if they differ by more than rounding.

    Example:
      trbert verify --model work/imdb/model --data test.jsonl
    """
    io.enable_compilation_cache()
    from trbert_jax.inference import verify

    options = chosen(args, "max_texts batch_size threshold operating_point max_length skip_bad_records")
    rows = verify.verify_file(args.model, args.data, **options)
    streams.show(*verify.table(rows))
    if args.json:
        io.write_json(args.json, rows)
    return 0 if all(row["same"] for row in rows) else 1


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

"""Export a model to a folder that ONNX Runtime, OpenVINO, Optimum or JAX load without this package.

The folder has `model.onnx` (`model.onnx_graph`) or programs and weights (`model.stablehlo`), `config.json`,
the files of the tokenizer, and `README.md` with a program that runs it.
"""

import dataclasses
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trbert_jax.errors import UserError, first_lines
from trbert_jax.io import find_path, write_json
from trbert_jax.io.outputs import atomic_directory, contents
from trbert_jax.model.card import CARD, model_card
from trbert_jax.model.config import ModelConfig, model_config_from_dict, model_config_to_dict
from trbert_jax.model.engines import FILE, FORMATS, PLATFORMS, RULES_OF_GRAPHS, STORED, Graph
from trbert_jax.model.operating_points import find_thresholds
from trbert_jax.model.pretrained import Pretrained, load_pretrained, read_config
from trbert_jax.model.stablehlo import INDEX, SUFFIX, write_programs
from trbert_jax.model.tokenizers import Tokenizer, find_tokenizer, save_tokenizer
from trbert_jax.model.weight_files import SAFETENSORS, SMALL_FILES, write_weights
from trbert_jax.model.weights import to_original_names
from trbert_jax.reduction.rules import DEFAULT_RULE, DEFAULT_THRESHOLD, Threshold, point_thresholds


def export_model(
    model: Pretrained,
    output: str | Path,
    *,
    source: str = "this model",
    format: str = "onnx",
    rule: str = DEFAULT_RULE,
    threshold: Threshold = DEFAULT_THRESHOLD,
    operating_point: str | None = None,
    quantize: bool = False,
    dtype: str = "float32",
    platform: str = "cpu",
) -> Path:
    """Writes the folder, whole or not at all, and returns it.

    Args:
      model, source: the model, and its name in messages.
      output: folder; replaces one of a model.
      format: `onnx`, or `stablehlo` for programs that JAX runs (`model.stablehlo`).
      rule: `threshold`, or `dense` for a graph that drops nothing.
      threshold, operating_point: the default of the graph's input `threshold`.
      quantize: of onnx, int8 weights, and int8 products of activations with them; selectors stay float32.
      dtype: of onnx, of the stored weights, see `onnx_model`.
      platform: of stablehlo, the one that runs the programs, of `engines.PLATFORMS`.

    Raises `UserError` for a model whose selectors are not trained, a rule or an option that is not exported,
    a folder that cannot be written, or packages that are not installed.
    """
    _check_folder(Path(output))
    config, params = model.config, jax.tree.map(np.asarray, model.params)
    for name, value, known in (
        ("format", format, FORMATS),
        ("rule", rule, RULES_OF_GRAPHS),
        ("dtype", dtype, STORED),
        ("platform", platform, PLATFORMS),
    ):
        if value not in known:
            raise UserError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    if "selectors" in model.newly_initialized and rule == DEFAULT_RULE:
        raise UserError(f"{source}: its selectors are not trained; train them, or export with --rule dense")
    if quantize and dtype != "float32":
        raise UserError("--quantize and --dtype exclude each other")
    if format == "stablehlo" and (quantize or dtype != "float32"):
        raise UserError("--quantize and --dtype are for --format onnx; StableHLO is exported in float32")
    if format == "onnx" and platform != "cpu":
        raise UserError("--platform is for --format stablehlo; an ONNX graph runs on any")
    chosen = None
    if rule == DEFAULT_RULE:
        found = find_thresholds(config.operating_points, operating_point, rule, threshold)
        chosen = point_thresholds(found, config.num_reductions)
    with atomic_directory(output) as folder:
        if format == "onnx":
            build(folder / FILE, config, params, chosen, dtype, quantize)
        else:
            write_programs(folder, config, chosen, platform)
            write_weights(folder / SAFETENSORS, to_original_names(params, config))
        write_json(folder / "config.json", model_config_to_dict(config))
        if model.tokenizer is not None:
            save_tokenizer(folder, model.tokenizer, config)
        (folder / CARD).write_text(card(config, chosen, format), encoding="utf-8")
    return Path(output)


def _check_folder(folder: Path) -> None:
    """Raises `UserError` for a folder with files that an export would delete."""
    ours = {FILE, CARD, INDEX, SAFETENSORS, *SMALL_FILES}
    found = {x.name for x in contents(folder)} if folder.is_dir() else set[str]()
    if others := sorted(name for name in found - ours if not name.endswith(SUFFIX)):
        held = ", ".join(first_lines(others, 3))
        raise UserError(f"{folder}: holds files that an export would delete ({held}); choose another folder")


_ONNX = """
```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({max_length})
tokenizer.enable_padding()
texts = tokenizer.encode_batch(["a gripping film", "two hours I want back"])
inputs = {{"input_ids": [x.ids for x in texts], "attention_mask": [x.attention_mask for x in texts]}}
{types}onnxruntime.set_default_logger_severity(3)  # no warning of the threshold, an input with a default
session = onnxruntime.InferenceSession("model.onnx")
outputs = session.run(None, {{name: np.array(x, np.int64) for name, x in inputs.items()}})
logits, *kept = outputs  # float32 [texts, labels]; for each point of reduction bool [texts, tokens]
```
"""
_STABLEHLO = """
```python
import json
from pathlib import Path

import numpy as np
from jax import export
from safetensors.numpy import load_file
from tokenizers import Tokenizer

about = json.loads(Path("stablehlo.json").read_text())
print(f"made by jax {{about['jax']}}; jax promises to read it until {{about['expires']}}")
stored = load_file("model.safetensors")
weights = [stored[x["name"]].T if x["transposed"] else stored[x["name"]] for x in about["weights"]]
tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({max_length})
texts = tokenizer.encode_batch(["a gripping film", "two hours I want back"])
longest = max(len(x.ids) for x in texts)
shape = next(x for x in about["programs"] if x["rows"] >= len(texts) and x["tokens"] >= longest)
inputs = {{name: np.zeros((shape["rows"], shape["tokens"]), np.int32) for name in about["inputs"]}}
for row, x in enumerate(texts):
    inputs["input_ids"][row, : len(x.ids)] = x.ids
    inputs["attention_mask"][row, : len(x.ids)] = 1
{threshold}program = export.deserialize(bytearray(Path(shape["file"]).read_bytes()))
outputs = program.call(weights, inputs)
logits = np.asarray(outputs["logits"])[: len(texts)]  # float32 [texts, labels]
kept = np.asarray(outputs["kept"])[:, : len(texts)]  # bool [points of reduction, texts, tokens]
```
"""
_TYPES = 'inputs["token_type_ids"] = [x.type_ids for x in texts]\n'
_THRESHOLD = 'inputs["threshold"] = np.array(about["threshold"], np.float32)\n'


def card(config: ModelConfig, thresholds: Sequence[float] | None, format: str = "onnx") -> str:
    """Returns README.md: what the model is, and a program that runs it."""
    use = "docs/serving.md of trbert_jax describes the inputs."
    if config.task == "classification" and not config.inputs.text_pair_field:
        types, limits = _TYPES * bool(config.type_vocab_size), _THRESHOLD * (thresholds is not None)
        program = {"onnx": _ONNX, "stablehlo": _STABLEHLO}[format]
        use = program.format(max_length=config.max_length, types=types, threshold=limits)
    reduces = thresholds is not None
    return model_card(config, library=FORMATS[format], use=use, thresholds=thresholds, reduces=reduces)


def build(
    path: Path,
    config: ModelConfig,
    params: Any,
    thresholds: Sequence[float] | None,
    dtype: str = "float32",
    quantize: bool = False,
    given: bool = False,
    padded: bool = False,
) -> None:
    """Writes the graph of a model to a file, see `export_model` and `onnx_model`."""
    try:
        import onnx

        from trbert_jax.model.onnx_graph import onnx_model, selector_products
    except ImportError as error:
        raise UserError("exporting needs more packages: pip install 'trbert-jax[onnxruntime]'") from error
    model = onnx_model(config, jax.tree.map(np.asarray, params), thresholds, dtype, given, padded)
    if quantize:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        logging.disable(logging.WARNING)  # of steps before that make no difference here
        quantize_dynamic(
            model,
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=selector_products(model),
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        logging.disable(logging.NOTSET)
    else:
        onnx.save(model, path)


def load_exported(
    path_or_id: str | Path, engine: str, dtype: str, max_length: int | None
) -> tuple[ModelConfig, Tokenizer | None, Graph]:
    """Loads a folder of `export_model`, or any other model, whose graph is then built."""
    folder = find_path(path_or_id)
    if (folder / FILE).is_file():
        source = str(folder / "config.json")
        config = model_config_from_dict(read_config(folder), source)
        config = dataclasses.replace(config, max_length=max_length or config.max_length)
        tokenizer = find_tokenizer(folder, config.backbone.special_tokens)
        return config, tokenizer, Graph(folder / FILE, engine, dtype)
    loaded = load_pretrained(path_or_id, max_length=max_length)
    reduces = "selectors" not in loaded.newly_initialized
    thresholds = point_thresholds(DEFAULT_THRESHOLD, loaded.config.num_reductions) if reduces else None
    with tempfile.TemporaryDirectory() as folder_name:
        path = Path(folder_name) / FILE
        build(path, loaded.config, loaded.params, thresholds)
        return loaded.config, loaded.tokenizer, Graph(path.read_bytes(), engine, dtype)

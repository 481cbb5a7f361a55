"""Export a model to a folder that ONNX Runtime, OpenVINO or Optimum load without this package.

The folder has `model.onnx` (`model.onnx_graph`), `config.json`, the files of the tokenizer, and `README.md`
with a program that runs it.
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
from trbert_jax.model.config import ModelConfig, model_config_from_dict, model_config_to_dict
from trbert_jax.model.engines import FILE, RULES_OF_GRAPHS, STORED, Graph
from trbert_jax.model.operating_points import find_thresholds
from trbert_jax.model.pretrained import load_pretrained, read_config
from trbert_jax.model.tokenizers import Tokenizer, find_tokenizer, save_tokenizer
from trbert_jax.model.weight_files import SMALL_FILES
from trbert_jax.reduction.rules import DEFAULT_RULE, DEFAULT_THRESHOLD, Threshold, point_thresholds

CARD = "README.md"


def export_onnx(
    model_dir: str | Path,
    output: str | Path,
    *,
    rule: str = DEFAULT_RULE,
    threshold: Threshold = DEFAULT_THRESHOLD,
    operating_point: str | None = None,
    quantize: bool = False,
    dtype: str = "float32",
    max_length: int | None = None,
) -> Path:
    """Writes the folder, whole or not at all, and returns it.

    Args:
      model_dir, max_length: see `TRBert.from_pretrained`.
      output: folder; replaces one of a model.
      rule: `threshold`, or `dense` for a graph that drops nothing.
      threshold, operating_point: the default of the graph's input `threshold`.
      quantize: int8 weights, and int8 products of activations with them; selectors stay float32.
      dtype: of the stored weights, see `onnx_model`.

    Raises `UserError` for a model that cannot be read, or whose selectors are not trained, a rule that is not
    exported, a folder that cannot be written, or packages that are not installed.
    """
    if Path(output).is_dir():
        others = sorted({x.name for x in contents(Path(output))} - {FILE, CARD, *SMALL_FILES})
        if others:
            held = ", ".join(first_lines(others, 3))
            raise UserError(
                f"{output}: holds files that an export would delete ({held}); choose another folder"
            )
    loaded = load_pretrained(model_dir, max_length=max_length)
    if rule not in RULES_OF_GRAPHS:
        raise UserError(
            f"rule is {rule!r}; expected {' or '.join(RULES_OF_GRAPHS)}, the ones that are exported"
        )
    if rule == DEFAULT_RULE and "selectors" in loaded.newly_initialized:
        raise UserError(
            f"{model_dir}: its selectors are not trained; train them, or export with --rule dense"
        )
    if dtype not in STORED:
        raise UserError(f"dtype is {dtype!r}; expected one of {', '.join(STORED)}")
    if quantize and dtype != "float32":
        raise UserError("--quantize and --dtype exclude each other")
    config, chosen = loaded.config, None
    if rule == DEFAULT_RULE:
        found = find_thresholds(config.operating_points, operating_point, rule, threshold)
        chosen = point_thresholds(found, config.num_reductions)
    with atomic_directory(output) as folder:
        build(folder / FILE, config, loaded.params, chosen, dtype, quantize)
        write_json(folder / "config.json", model_config_to_dict(config))
        if loaded.tokenizer is not None:
            save_tokenizer(folder, loaded.tokenizer, config)
        (folder / CARD).write_text(card(config, chosen), encoding="utf-8")
    return Path(output)


_USE = """
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
_TYPES = 'inputs["token_type_ids"] = [x.type_ids for x in texts]\n'


def card(config: ModelConfig, thresholds: Sequence[float] | None) -> str:
    """Returns README.md: what the model is, and how to run it."""
    kind = f"{config.model_type}, {config.num_layers} layers of width {config.hidden_size}, for {config.task}"
    lines = ["---", "library_name: onnx", "tags: [trbert_jax, token-reduction]", "---", "", f"# {kind}", ""]
    if config.task == "classification" and not config.score:
        lines += [f"Labels: {', '.join(config.labels)}.", ""]
    if thresholds is None:
        lines.append("Drops no tokens: exported with `--rule dense`.")
    else:
        layers = " and ".join(map(str, config.reduction_layers))
        lines.append(
            f"Drops tokens before layers {layers}, counted from 0: those whose keep probability is below the "
            f"input `threshold`, by default {', '.join(f'{x:.4g}' for x in thresholds)}."
        )
    if config.operating_points and thresholds is not None:
        lines += [
            "",
            "| operating point | threshold | fewer FLOPs | metric | dense |",
            "|---|---|---|---|---|",
        ]
        for point in config.operating_points:
            limits = ", ".join(f"{x:.4g}" for x in point.thresholds)
            numbers = f"{point.speedup:.2f}x | {point.metric} {point.value:.4g} | {point.dense:.4g}"
            lines.append(f"| {point.name} | {limits} | {numbers} |")
    if config.task == "classification" and not config.inputs.text_pair_field:
        lines.append(
            _USE.format(max_length=config.max_length, types=_TYPES if config.type_vocab_size else "")
        )
    return "\n".join(lines) + "\n"


def build(
    path: Path,
    config: ModelConfig,
    params: Any,
    thresholds: Sequence[float] | None,
    dtype: str = "float32",
    quantize: bool = False,
    given: bool = False,
) -> None:
    """Writes the graph of a model to a file, see `export_onnx` and `onnx_model`."""
    try:
        import onnx

        from trbert_jax.model.onnx_graph import onnx_model, selector_products
    except ImportError as error:
        raise UserError("exporting needs more packages: pip install 'trbert-jax[onnxruntime]'") from error
    model = onnx_model(config, jax.tree.map(np.asarray, params), thresholds, dtype, given)
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
    """Loads a folder of `export_onnx`, or any other model, whose graph is then built."""
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

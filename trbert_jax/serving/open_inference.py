"""Read requests and write answers in the Open Inference Protocol, version 2.

Source: https://github.com/open-inference-protocol/specification; docs/serving.md.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from trbert_jax import __version__
from trbert_jax.errors import UserError
from trbert_jax.model.config import ModelConfig

SERVER = {"name": "trbert", "version": __version__, "extensions": []}
_SINGLE = {"label", "answer", "score", "num_tokens"}  # outputs with one value an input


class Tensor(BaseModel):
    """An input."""

    model_config = ConfigDict(extra="forbid")

    name: str
    shape: list[int]
    datatype: Literal["BYTES"]
    data: list[Any]
    parameters: dict[str, Any] | None = None


class InferRequest(BaseModel):
    """Texts in an input `text`, the second ones of pairs in `text_pair`; or JSON objects in `question`.

    Parameters are `operating_point` and `threshold`.
    """

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    inputs: list[Tensor]
    outputs: list[dict[str, Any]] | None = None
    parameters: dict[str, Any] | None = None


def metadata(config: ModelConfig, name: str, backend: str) -> dict[str, Any]:
    """Describes the inputs and outputs of a model."""
    given = ["question"] if config.inputs.data else ["text"]
    given += ["text_pair"] if config.inputs.text_pair_field else []
    shapes = {key: [-1] if key in _SINGLE else [-1, -1] for key, _ in _outputs(config)}
    return {
        "name": name,
        "versions": ["1"],
        "platform": f"trbert_{backend}",
        "inputs": [{"name": x, "datatype": "BYTES", "shape": [-1]} for x in given],
        "outputs": [{"name": key, "datatype": kind, "shape": shapes[key]} for key, kind in _outputs(config)],
    }


def read_inputs(tensors: Sequence[Tensor], questions: bool) -> list[Any]:
    """Returns texts, pairs of texts or questions. Raises `UserError` for tensors that are none of these."""
    found = {tensor.name: tensor for tensor in tensors}
    names = ["question"] if questions else ["text", *(["text_pair"] if "text_pair" in found else [])]
    if {*found} != {*names} or len(found) != len(tensors):
        raise UserError(f"inputs: named {', '.join(x.name for x in tensors)}; expected {' and '.join(names)}")
    columns = [found[name].data for name in names]
    for name, data in zip(names, columns, strict=True):
        if math.prod(found[name].shape) != len(data):
            raise UserError(f"inputs: {name} has {len(data)} values, and its shape is {found[name].shape}")
    if len({*map(len, columns)}) > 1:
        raise UserError("inputs: text and text_pair have different numbers of values")
    if questions:
        try:
            return [json.loads(x) if isinstance(x, str) else x for x in columns[0]]
        except ValueError as error:
            raise UserError(f"inputs: question: not JSON: {error}") from error
    return [*columns[0]] if len(columns) == 1 else [*zip(*columns, strict=True)]


def write_outputs(config: ModelConfig, results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the tensors of some results."""
    return [_tensor(name, kind, results) for name, kind in _outputs(config)]


def _outputs(config: ModelConfig) -> list[tuple[str, str]]:
    """Returns names and data types."""
    counts = [("num_tokens", "INT32"), ("num_kept", "INT32")]
    if config.inputs.data:
        return [("answer", "BYTES"), ("score", "FP32"), *counts]
    if config.score:
        return [("score", "FP32"), ("logits", "FP32"), *counts]
    return [("label", "BYTES"), ("scores", "FP32"), ("logits", "FP32"), *counts]


def _tensor(name: str, datatype: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = [result[name] for result in results]
    if name == "scores":
        values = [[*scores.values()] for scores in values]
    if name in _SINGLE:
        return {"name": name, "datatype": datatype, "shape": [len(values)], "data": values}
    shape = [len(values), len(values[0]) if values else 0]
    return {"name": name, "datatype": datatype, "shape": shape, "data": [x for row in values for x in row]}

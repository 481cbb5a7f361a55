"""Run an ONNX graph with ONNX Runtime or OpenVINO. To add an engine, add a function to `ENGINES`.

Free of JAX, because the command line lists the engines.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from trbert_jax.errors import UserError

Arrays = Mapping[str, npt.NDArray[Any]]
FILE = "model.onnx"  # of an exported folder
FORMATS = {"onnx": "onnx", "stablehlo": "jax"}  # of exported files, the default first -> what loads them
PLATFORMS = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}  # of StableHLO -> JAX's name of the backend
RULES_OF_GRAPHS = ("threshold", "dense")  # those that are exported
STORED = ("float32", "float16", "bfloat16")  # types of the weights in an exported file
Run = Callable[[Arrays], dict[str, npt.NDArray[Any]]]  # inputs by name -> outputs by name


class Graph:
    """An ONNX graph, as a file or as bytes, and the engine that runs it. Can be pickled.

    `dtype` bfloat16 lets OpenVINO compute in that type. Raises `UserError` if the engine is not installed, or
    does not read the graph.
    """

    def __init__(self, source: Path | bytes, engine: str, dtype: str = "float32") -> None:
        self._source, self.engine, self._dtype = source, engine, dtype
        if engine not in ENGINES:
            raise UserError(f"backend is {engine!r}; expected jax, {' or '.join(ENGINES)}")
        if engine == "onnxruntime" and dtype != "float32":
            problem = "computes in the types of the graph; export with --dtype or --quantize"
            raise UserError(f"dtype is {dtype!r}, but onnxruntime {problem}")
        self.inputs, self._run = self._start()

    def __reduce__(self) -> tuple[Any, ...]:
        return Graph, (self._source, self.engine, self._dtype)

    @property
    def reduces(self) -> bool:
        """Whether it drops tokens."""
        return "threshold" in self.inputs

    def run(self, inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        """Runs the graph; takes at least its inputs, but `threshold`, which has a default."""
        return self._run({name: inputs[name] for name in self.inputs if name in inputs})

    def _start(self) -> tuple[list[str], Run]:
        try:
            return ENGINES[self.engine](self._source, self._dtype)
        except ImportError as error:
            install = f"pip install 'trbert-jax[{self.engine}]'"
            raise UserError(f"backend {self.engine} is not installed: {install}") from error
        except (RuntimeError, ValueError) as error:
            name = self._source if isinstance(self._source, Path) else "the exported graph"
            raise UserError(f"{name}: {self.engine} cannot read it: {error}") from error


def _onnxruntime(source: Path | bytes, dtype: str) -> tuple[list[str], Run]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    given = source if isinstance(source, bytes) else str(source)
    providers = onnxruntime.get_available_providers()
    try:
        session = onnxruntime.InferenceSession(given, options, providers=providers)
    except Exception as error:  # of several classes without a base of their own
        raise ValueError(error) from error
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Arrays) -> dict[str, npt.NDArray[Any]]:
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))

    # The threshold has a default, so it is not among the inputs that must be given.
    return [x.name for x in (*session.get_inputs(), *session.get_overridable_initializers())], run


def _openvino(source: Path | bytes, dtype: str) -> tuple[list[str], Run]:
    # Else OpenVINO reports its use over the network, from a fork of this process, which JAX does not survive.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import onnx
    import openvino

    graph = onnx.load_model_from_string(source) if isinstance(source, bytes) else onnx.load(source)
    names = {x.name for x in (*graph.graph.input, *graph.graph.output)}
    defaults = {x.name: onnx.numpy_helper.to_array(x) for x in graph.graph.initializer if x.name in names}
    for default in [x for x in graph.graph.initializer if x.name in names]:
        graph.graph.initializer.remove(default)  # else OpenVINO takes it for a constant
    core, precision = openvino.Core(), {"float32": "f32", "bfloat16": "bf16"}[dtype]
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(core.read_model(graph.SerializeToString()), "CPU", hints)
    inputs, outputs = (
        [next(iter(names & x.get_names())) for x in y] for y in (compiled.inputs, compiled.outputs)
    )

    def run(given: Arrays) -> dict[str, npt.NDArray[Any]]:
        return dict(zip(outputs, compiled({**defaults, **given}).values(), strict=True))

    return inputs, run


# Engine, and extra of the package that installs it -> function of a graph and a dtype that starts it.
ENGINES: dict[str, Callable[[Path | bytes, str], tuple[list[str], Run]]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}

"""Run a model in a process that was forked after JAX had started.

A forked process has none of JAX's threads and would wait for them without end. A helper, a process of its own
with its own JAX, runs the model in its place.
"""

import multiprocessing
import os
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any

import jax
import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.inference.engine import InferenceEngine
from trbert_jax.inference.outputs import Outputs
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Params, TokenReducingModel
from trbert_jax.parallel import FORKED
from trbert_jax.tasks.examples import Examples

_START = "import sys; sys.path[:] = {}; from trbert_jax.inference.forked import serve; serve({})"


class Helper:
    """A process that runs one model for a forked one. Ends with the process that started it.

    Raises `UserError` if the parameters are on an accelerator, which a forked process cannot read.
    """

    def __init__(self, config: ModelConfig, params: Params, dtype: str) -> None:
        arrays = [x for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
        if any(device.platform != "cpu" for x in arrays for device in x.devices()):
            raise UserError(FORKED)
        self.process, self._lock = os.getpid(), threading.Lock()
        self._pipe, theirs = multiprocessing.Pipe()
        with theirs:
            number = theirs.fileno()
            command = [sys.executable, "-c", _START.format(repr(sys.path), number)]
            subprocess.Popen(command, pass_fds=[number], stdin=subprocess.DEVNULL, start_new_session=True)
        self._pipe.send((config, jax.tree.map(np.asarray, params), dtype))

    def run(self, batch_size: int, examples: Examples, options: dict[str, Any]) -> Outputs:
        """Does what `InferenceEngine.run` does, and raises what it raises."""
        try:
            with self._lock:
                self._pipe.send((batch_size, examples, options))
                result = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise UserError(f"the helper of a forked process has ended; {FORKED}") from error
        if isinstance(result, Exception):
            raise result
        return result


class ForkedEngine(InferenceEngine):
    """The engine of a model in a forked process; parameters are the helper's."""

    def __init__(self, helper: Helper, model: TokenReducingModel, batch_size: int) -> None:
        self.model, self.batch_size, self._helper = model, batch_size, helper  # and no programs

    def run(self, params: Params, examples: Examples, **options: Any) -> Outputs:
        """Runs the model, see `InferenceEngine.run`."""
        return self._helper.run(self.batch_size, examples, options)

    def compile(self, *_: Any, **__: Any) -> Any:
        """Raises `UserError`: the programs belong to the helper."""
        raise UserError(FORKED)


def serve(descriptor: int) -> None:
    """Runs the model that comes through a pipe, until the other end is closed."""
    from trbert_jax.inference.predictor import TRBert

    pipe: Connection[Any, Any] = Connection(descriptor)
    config, params, dtype = pipe.recv()
    model = TRBert(config, params, dtype=dtype)
    while True:
        try:
            batch_size, examples, options = pipe.recv()
        except EOFError:
            return
        try:
            result: Any = model.engine(batch_size).run(model.params, examples, **options)
        except Exception as error:  # the forked process raises it
            result = error
        pipe.send(result)

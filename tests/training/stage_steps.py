"""The update of a stage as a run makes it, for the tests that look at it on many devices."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tiny_models import random_batch

from trbert_jax.config import load_config
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Batch, Params
from trbert_jax.parallel import DeviceMesh
from trbert_jax.training import stages
from trbert_jax.training import step as steps
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.step import ObjectiveFn, TrainState, init_state

STAGES = ("finetune", "init", "policy", "joint")
EXECUTIONS = ("masked", "packed")
UPDATES, ROWS_AN_UPDATE = 20, 32
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
# Outputs of earlier stages in each stage's batches.
EXTRAS = {"finetune": (), "init": ("rank",), "policy": ("guide",), "joint": ("teacher_logits",)}
_ALL_EXTRAS = {name for names in EXTRAS.values() for name in names}


@dataclasses.dataclass(frozen=True, eq=False)
class StageStep:
    """A stage of the quickstart, on batches of random tokens."""

    stage: str
    execution: str  # packed or masked
    model: ModelConfig  # its shape
    dropout: bool = False
    settings: tuple[str, ...] = ()  # further `key=value` settings

    @property
    def experiment(self) -> Experiment:
        overrides = [
            f"{self.stage}.backend={self.execution}",
            f"{self.stage}.dropout={str(self.dropout).lower()}",
            "policy.num_samples=3",
        ]
        return Experiment(load_config(QUICKSTART, [*overrides, *self.settings]))

    @property
    def objective(self) -> ObjectiveFn:
        """As the stage has it; the first half of the policy's updates imitates the guide."""
        experiment = self.experiment
        module = experiment.module(self.model)
        return stages.objective_of(stages.STAGES[self.stage], experiment.config, module, UPDATES)

    @property
    def adamw(self) -> Any:
        """The optimizer, its epsilon so large that what rounding leaves of a gradient of 0 moves nothing."""
        schedule = steps.linear_schedule(1e-2, UPDATES, 2)  # so large that 20 updates change the parameters
        return steps.adamw(schedule, self.model, epsilon=1e-4)

    def split(self, params: Params) -> tuple[TrainState, Params]:
        """The state before the first update, and the parameters that the stage does not train."""
        trained, frozen = steps.split_params(params, stages.STAGES[self.stage].trained(self.model))
        return init_state(trained, self.adamw), frozen

    def step(self, layout: DeviceMesh) -> Any:
        return steps.update_step(self.objective, self.adamw, layout)

    def place(self, params: Params, layout: DeviceMesh) -> tuple[TrainState, Params, jax.Array]:
        first, frozen = self.split(jax.tree.map(np.asarray, params))
        state = steps.first_state(first.trained, self.adamw, layout)
        rng = jax.random.key(3)
        rng = rng if layout.strategy == "pmap" else layout.replicate(rng)
        return state, steps.place(frozen, layout), rng

    def batch(self, number: int, passes: int = 1, rows: int = ROWS_AN_UPDATE) -> dict[str, np.ndarray]:
        """An update's examples, [passes, rows / passes, ...].

        Lengths are spread unevenly over devices and passes, and so are the rows that only fill.
        """
        rng, width = np.random.default_rng(number), self.model.max_length
        lengths = np.clip(rng.geometric(3 / width, rows), 1, width)
        lengths[rng.integers(rows)] = width
        batch: Batch = random_batch(self.model, lengths.tolist(), width, seed=number)
        left_out = _ALL_EXTRAS - set(EXTRAS[self.stage])
        found = {k: np.asarray(v) for k, v in batch.items() if k not in left_out}
        found["valid"] = np.arange(rows) < rows - 5
        return {k: v.reshape(passes, -1, *v.shape[1:]) for k, v in found.items()}

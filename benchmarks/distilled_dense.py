"""Trains a dense model on the logits of the fine-tuned one: a baseline for joint, which learns from them too.

    python benchmarks/distilled_dense.py train --config configs/imdb_minilm_plus.yaml workdir=DIR \
        'stages=[finetune,teacher,distill]'

Takes the arguments of `trbert`, to which it adds the stage `distill`: from the pretrained weights, without
reduction, on all texts that the teacher has read. Started from the teacher it would have nothing to learn.
Writes the model to DIR/distill/model, for `benchmarks/learned.py --distilled DIR`.
"""

import dataclasses
import sys

from trbert_jax import config
from trbert_jax.cli import main
from trbert_jax.tasks import TASKS
from trbert_jax.tasks.losses import Rows
from trbert_jax.training import stage_inputs, step
from trbert_jax.training.objectives import Objective
from trbert_jax.training.stage_objectives import Update
from trbert_jax.training.stages import Stage, register_stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(config.TrainingConfig):
    """Stage distill: train the dense model on the teacher's logits. Defaults as in configs/base/plus.yaml."""

    batch_size: config.Count = 16
    accumulation_steps: config.Count = 1
    epochs: config.Count = 2
    learning_rate: config.Positive = 1e-4
    dropout: config.Flag = False
    temperature: config.Positive = 2.0


def objective(update: Update) -> Objective:
    """Returns the distillation loss of the dense model."""
    section = update.config.distill  # type: ignore[attr-defined]  # registered below
    forward, rows = dict(update.forward), Rows(update.batch)
    execute, task = forward.pop("execute"), TASKS[update.forward["model"].config.task]
    loss = task.distillation_loss(execute(**forward, rule=None).logits, rows, section.temperature)
    return Objective(loss, update.batch["valid"].astype("float32"), {})


register_stage(
    Stage(
        settings=DistillConfig,
        trains=step.trains_dense,
        objective=objective,
        inputs=lambda section: ("teacher", stage_inputs.teacher_logits),
        reads_labels=lambda section: False,
    )
)

if __name__ == "__main__":
    sys.exit(main())

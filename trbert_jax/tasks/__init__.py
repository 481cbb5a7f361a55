"""What a task is made of outside the model: examples, inputs, answers and their score, one module a kind.

`load_task_data` finds the module for a configuration. Everything that runs a model sees a `TaskData` and no
data set by name.
"""

from __future__ import annotations

from trbert_jax.config import BackboneConfig, DataConfig, RunConfig
from trbert_jax.datasets import find_dataset
from trbert_jax.datasets.dataset import Announce
from trbert_jax.errors import UserError
from trbert_jax.tasks import candidates, classification, multi_hop, segments, spans
from trbert_jax.tasks import multiple_choice as choices
from trbert_jax.tasks.base import Score, TaskData

__all__ = ["Score", "TaskData", "load_task_data"]

_KINDS: dict[str, type[TaskData]] = {
    "classification": classification.ClassificationData,
    "multiple_choice": choices.ChoiceData,
    "span": spans.SpanData,
    "candidates": candidates.CandidateData,
    "multi_hop": multi_hop.MultiHopData,
}
# Settings that only some data sets read, and what they are where nobody sets them.
_SETTINGS = {
    "data.choices": DataConfig.choices,
    "data.skip_bad_records": DataConfig.skip_bad_records,
    "model.max_question_length": BackboneConfig.max_question_length,
    "model.window_step": BackboneConfig.window_step,
    "model.max_segments": BackboneConfig.max_segments,
}


def load_task_data(config: RunConfig, announce: Announce) -> TaskData:
    """The task of a configuration; texts with a label where the data set is not one of questions.

    Raises:
      UserError: a setting that this data set does not read.
    """
    name = config.data.name
    dataset = find_dataset(name)
    kind = segments.SegmentData if dataset.style == "triviaqa" else _KINDS[dataset.task]
    for key in _SETTINGS:
        section, _, field = key.partition(".")
        value, default = getattr(getattr(config, section), field), _SETTINGS[key]
        if value != default and key not in kind.own_settings:
            raise UserError(f"{key} is {value!r}, which {name} does not read; leave it out")
    return kind(config, announce)

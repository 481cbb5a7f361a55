"""What a task is made of outside the model: examples, inputs, answers and their score, one module a kind.

`load_task_data` finds the module for a configuration. Everything that runs a model sees a `TaskData` and no
data set by name.
"""

from __future__ import annotations

from trbert_jax.config_schema import TFDS_PREFIX, BackboneConfig, DataConfig, RunConfig
from trbert_jax.datasets.dataset import Announce
from trbert_jax.errors import UserError
from trbert_jax.tasks import candidates, classification, multi_hop, segments, spans
from trbert_jax.tasks import multiple_choice as choices
from trbert_jax.tasks.base import Score, TaskData

__all__ = ["Score", "TaskData", "load_task_data"]

_KINDS: dict[str, type[TaskData]] = {
    "squad": spans.SpanData,
    "newsqa": spans.SpanData,
    "naturalqa": spans.SpanData,
    "triviaqa": segments.SegmentData,
    "triviaqa_web": segments.SegmentData,
    "race": choices.ChoiceData,
    "race_high": choices.ChoiceData,
    "race_middle": choices.ChoiceData,
    "wikihop": candidates.CandidateData,
    "hotpotqa": multi_hop.MultiHopData,
    "hotpotqa_fullwiki": multi_hop.MultiHopData,
    "hotpotqa_graph": multi_hop.MultiHopData,
}
# Names of the catalog of TensorFlow Datasets.
_TFDS_KINDS: dict[str, type[TaskData]] = {
    "squad": spans.SpanData,
    "mrqa": spans.SpanData,
    "trivia_qa": segments.SegmentData,
    "race": choices.ChoiceData,
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
    if name.startswith(TFDS_PREFIX):
        catalog = name.removeprefix(TFDS_PREFIX).partition("/")[0].partition(":")[0]
        kind = _TFDS_KINDS.get(catalog, classification.ClassificationData)
    else:
        kind = _KINDS.get(name, classification.ClassificationData)
    for key in _SETTINGS:
        section, _, field = key.partition(".")
        value, default = getattr(getattr(config, section), field), _SETTINGS[key]
        if value != default and key not in kind.own_settings:
            raise UserError(f"{key} is {value!r}, which {name} does not read; leave it out")
    return kind(config, announce)

"""Texts with a label."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from trbert_jax.config import RunConfig
from trbert_jax.datasets import find_dataset
from trbert_jax.datasets.dataset import Announce, Dataset
from trbert_jax.tasks.base import Score, TaskData
from trbert_jax.tasks.examples import Examples, build_features
from trbert_jax.tasks.score_classification import accuracy


class ClassificationData(TaskData):
    """IMDB and its like: the label with the highest logit."""

    task = "classification"
    metric = "accuracy"

    def __init__(self, config: RunConfig, announce: Announce) -> None:
        super().__init__(config, announce)
        data = config.data
        self._source = find_dataset(data.name)
        self.labels = self._source.read_labels(data.path, data.label_field)

    @functools.cache  # noqa: B019 - lives as long as the run
    def dataset(self, split: str) -> Dataset:
        """Raw examples of `train`, `dev` or `test`."""
        data = self.config.data
        examples = self._source.read_split(
            data.path,
            split,
            limit=data.max_train_examples if split == "train" else data.max_eval_examples,
            seed=self.config.seed,
            text_field=data.text_field,
            label_field=data.label_field,
        )
        return Dataset(tuple(examples), self.labels)

    def texts(self, split: str) -> list[str]:
        return [example.text for example in self.dataset(split).examples]

    def features(self, split: str, tokenizer: Any, cache_dir: Path) -> Examples:
        return build_features(
            self.dataset(split),
            tokenizer,
            self.config.model.max_length,
            cache_dir,
            announce=self.announce,
        )

    def score(self, split: str, features: Examples, tokenizer: Any, logits: Any) -> Score:
        return Score({"accuracy": accuracy(logits.argmax(-1), features.labels)}, {})

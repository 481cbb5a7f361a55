"""Reads published data sets, and files of their formats, as records.

`find_dataset(name)` returns the entry of a data set: its task, its classes, and what reads its splits
and single files. `register_dataset` adds one.
"""

from trbert_jax.datasets import (  # noqa: F401 - each registers its data sets
    choice_files,
    hotpotqa,
    huggingface,
    hyperpartisan,
    own_texts,
    python_source,
    span_files,
    text_files,
    tfds,
    triviaqa,
)
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.datasets.registry import DATASETS, DataSet, dataset_names, find_dataset, register_dataset

__all__ = ["DATASETS", "BadRecords", "DataSet", "dataset_names", "find_dataset", "register_dataset"]

"""Reads WikiHop of QAngaroo as published: a JSON list a split.

`[{"id", "query", "candidates": [str], "supports": [str], "answer"}]`. Published at
http://qangaroo.cs.ucl.ac.uk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trbert_jax.datasets import reading
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.datasets.records import CandidateQuestion
from trbert_jax.datasets.registry import DataSet, register_dataset


def read(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> Iterator[CandidateQuestion]:
    """Yields the queries of a file."""
    values = reading.load_records(path)
    with_answer = reading.any_has(values, "answer")
    for i, item in enumerate(values):
        with bad.record(f"{path}: [{i}]", item):
            yield _make_question(item, f"{path}: [{i}]", with_answer)


def _make_question(item: Any, where: str, with_answer: bool) -> CandidateQuestion:
    question_id, candidates = reading.text(item, "id"), reading.texts(item, "candidates", some=True)
    if len(set(candidates)) != len(candidates):
        twice = next(c for i, c in enumerate(candidates) if c in candidates[:i])
        raise ValueError(f"candidates: has {twice!r} twice; expected different candidates")
    supports = reading.texts(item, "supports", may_be_empty=True)
    if not any(map(str.strip, supports)):
        raise ValueError("supports: has no text; expected at least one document")
    query = reading.text(item, "query")
    text = reading.text(item, "answer") if with_answer else None
    if text is not None and text not in candidates:
        raise ValueError(
            f"answer: {text!r} is not among the {len(candidates)} candidates "
            f"({reading.shorten(', '.join(candidates))}); expected one of them"
        )
    answer = None if text is None else candidates.index(text)
    return CandidateQuestion(question_id, query, candidates, supports, answer, where)


register_dataset(
    DataSet(
        name="wikihop",
        task="candidates",
        read=read,
        format='[{"id": ..., "query": ..., "candidates": [...], "supports": [...], "answer": ...}]',
        files={"train": ("train.json",), "dev": ("dev.json", "dev_sort.json"), "test": ("test.json",)},
        dev_as_test=True,
    )
)

"""WikiHop of QAngaroo as published: a JSON list a split.

`[{"id", "query", "candidates": [str], "supports": [str], "answer"}]`; published at
http://qangaroo.cs.ucl.ac.uk.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trbert_jax.datasets.bad_records import BadRecords
from trbert_jax.datasets.json_files import load_json
from trbert_jax.datasets.json_values import JsonValue, any_has, shorten
from trbert_jax.datasets.record_list import RecordList
from trbert_jax.datasets.records import CandidateQuestion
from trbert_jax.datasets.registry import DataSet, register_dataset

_FORMAT = '[{"id": ..., "query": ..., "candidates": [...], "supports": [...], "answer": ...}]'


def read(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> list[CandidateQuestion]:
    """Reads a file of WikiHop.

    Args:
      path: the JSON file.
      bad: what to do about bad records: an answer that is not among the candidates, a candidate
        given twice, a missing or repeated id, supports without a text, ...

    Raises:
      UserError: the file cannot be read, has no query, or has a bad record that is not skipped.
    """
    values = load_json(path).items()
    with_answer = any_has(values, "answer")
    records = RecordList[CandidateQuestion](path, bad)
    for value in values:
        with bad.record():
            question = _make_question(value, with_answer)
            records.add(question, value)
    return records.finish(_FORMAT)


def _make_question(value: JsonValue, with_answer: bool) -> CandidateQuestion:
    question_id = value["id"].text()
    value = value.named(f"question {question_id!r}")
    candidates = value["candidates"].texts()
    if not candidates:
        raise value["candidates"].bad("is empty; expected at least one candidate")
    if len(set(candidates)) != len(candidates):
        twice = next(c for i, c in enumerate(candidates) if c in candidates[:i])
        raise value["candidates"].bad(f"has {twice!r} twice; expected different candidates")
    supports = value["supports"].texts(may_be_empty=True)
    if not any(map(str.strip, supports)):
        raise value["supports"].bad("has no text; expected at least one document")
    return CandidateQuestion(
        id=question_id,
        query=value["query"].text(),
        candidates=candidates,
        supports=supports,
        answer=_answer(value["answer"], candidates) if with_answer else None,
        where=value.where,
    )


def _answer(value: JsonValue, candidates: tuple[str, ...]) -> int:
    answer = value.text()
    if answer not in candidates:
        raise value.bad(
            f"{answer!r} is not among the {len(candidates)} candidates ({shorten(', '.join(candidates))}); "
            "expected one of them"
        )
    return candidates.index(answer)


register_dataset(
    DataSet(
        name="wikihop",
        task="candidates",
        read=read,
        files={"train": ("train.json",), "dev": ("dev.json", "dev_sort.json"), "test": ("test.json",)},
        dev_as_test=True,
    )
)

"""HotpotQA as its authors publish it: a JSON list a split, with the "distractor" or "fullwiki" contexts.

`[{"_id", "question", "answer", "context": [[title, [sentence]]], "supporting_facts": [[title,
number]]}]`; the test set has neither answers nor supporting facts. Published at
https://hotpotqa.github.io.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trbert_jax.datasets.bad_records import BadRecords
from trbert_jax.datasets.json_files import load_json
from trbert_jax.datasets.json_values import JsonValue, any_has
from trbert_jax.datasets.record_list import RecordList
from trbert_jax.datasets.records import MultiHopQuestion, Paragraph
from trbert_jax.datasets.registry import DataSet, register_dataset

_FORMAT = '[{"_id": ..., "question": ..., "answer": ..., "context": [...], "supporting_facts": [...]}]'


def read(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> list[MultiHopQuestion]:
    """Reads the training file, or one with the distractor contexts.

    A few of the published records have a supporting fact that names a sentence which does not exist;
    they are bad records like others.

    Args:
      path: the JSON file.
      bad: what to do about bad records: a supporting fact without its sentence, a missing or
        repeated id, a context without a text, ...

    Raises:
      UserError: the file cannot be read, has no question, or has a bad record that is not skipped.
    """
    return _read(path, bad, all_titles=True)


def read_fullwiki(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> list[MultiHopQuestion]:
    """As `read`, of a file with the fullwiki contexts.

    Retrieval may have missed a supporting paragraph. Its facts are kept, since the official scorer
    counts them.
    """
    return _read(path, bad, all_titles=False)


def _read(path: Path, bad: BadRecords, all_titles: bool) -> list[MultiHopQuestion]:
    values = load_json(path).items()
    with_answer, with_facts = any_has(values, "answer"), any_has(values, "supporting_facts")
    records = RecordList[MultiHopQuestion](path, bad)
    for value in values:
        with bad.record():
            question_id = value["_id"].text()
            named = value.named(f"question {question_id!r}")
            paragraphs = _paragraphs(named["context"])
            facts = named["supporting_facts"].items() if with_facts else []
            question = MultiHopQuestion(
                id=question_id,
                question=named["question"].text(),
                answer=named["answer"].text() if with_answer else None,
                paragraphs=paragraphs,
                supporting=tuple(_fact(fact, paragraphs, all_titles) for fact in facts),
                where=value.where,
            )
            records.add(question, named)
    return records.finish(_FORMAT)


def _paragraphs(value: JsonValue) -> tuple[Paragraph, ...]:
    paragraphs = []
    for item in value.items():
        title, sentences = item.items(2)
        # Some published sentences are empty. They stay, they count.
        paragraphs.append(Paragraph(title.text(), sentences.texts(may_be_empty=True)))
    if not any(sentence.strip() for paragraph in paragraphs for sentence in paragraph.sentences):
        raise value.bad("has no text; expected at least one paragraph")
    return tuple(paragraphs)


def _fact(value: JsonValue, paragraphs: tuple[Paragraph, ...], all_titles: bool) -> tuple[str, int]:
    first, second = value.items(2)
    title, number = first.text(), second.integer()
    lengths = [len(paragraph.sentences) for paragraph in paragraphs if paragraph.title == title]
    if not lengths and all_titles:
        raise value.bad(f"no paragraph is titled {title!r}; expected the title of one")
    if lengths and number >= max(lengths):
        raise value.bad(
            f"sentence {number} of {title!r} does not exist; expected one of {max(lengths)}, counted from 0"
        )
    return title, number


register_dataset(
    DataSet(
        name="hotpotqa",
        task="multi_hop",
        read=read,
        files={
            "train": ("hotpot_train_v1.1.json", "train.json"),
            "dev": ("hotpot_dev_distractor_v1.json", "dev.json"),
            "test": ("test.json",),
        },
        dev_as_test=True,
    )
)
register_dataset(
    DataSet(
        name="hotpotqa_fullwiki",
        task="multi_hop",
        read=read_fullwiki,
        files={
            "train": ("hotpot_train_v1.1.json", "train.json"),
            "dev": ("hotpot_dev_fullwiki_v1.json", "dev.json"),
            "test": ("test.json",),
        },
        dev_as_test=True,
    )
)

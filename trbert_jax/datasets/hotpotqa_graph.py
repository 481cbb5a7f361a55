"""HotpotQA in the graph format: JSON lines of questions with paragraphs cut into wordpieces.

This is the form in which TR-BERT's authors train on HotpotQA: `hotpot_train_graph.json` and, for dev,
`rerank_dev_tok.json` with paragraphs chosen and ordered by a reranker. A line is `{"question",
"answer", "node": [...]}`, for dev with `qid` too. A node is `{"name", "context": [wordpiece],
"sent_pos": [[start, end]], "supp_label": [0 or 1], "has_supp"}`, where `end` does not belong to the
sentence; in training also `"spans": [[first, last]]`, where `last` does belong to the answer; in dev
also `"doc_tokens": [word]` and `"tok_to_orig_index": [word's number]`. `edge` is not read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from trbert_jax.datasets.bad_records import BadRecords
from trbert_jax.datasets.json_files import load_json_lines
from trbert_jax.datasets.json_values import JsonValue
from trbert_jax.datasets.record_list import RecordList
from trbert_jax.datasets.registry import DataSet, register_dataset

_FORMAT = '{"question": ..., "answer": ..., "node": [...]} a line'
_GOLD = 2


@dataclasses.dataclass(frozen=True, slots=True)
class PieceRange:
    """Wordpieces `[start, end)` of a paragraph; `start == end` only for a sentence without any."""

    start: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class GraphParagraph:
    """A paragraph in wordpieces.

    Attributes:
      title: as published, with underscores for spaces.
      wordpieces: of the paragraph without its title; never empty.
      sentences: the wordpieces of each sentence, in order.
      supporting: whether the sentence supports the answer, one a sentence; empty where withheld.
      answers: where the answer stands; empty where it does not, and always in dev files.
      words: of the original text; empty in training files.
      word_of: the word that each wordpiece is part of, an index into `words`, -1 for none; empty in
        training files.
    """

    title: str
    wordpieces: tuple[str, ...]
    sentences: tuple[PieceRange, ...]
    supporting: tuple[bool, ...]
    answers: tuple[PieceRange, ...]
    words: tuple[str, ...]
    word_of: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class GraphQuestion:
    """A question over paragraphs in wordpieces.

    Attributes:
      id: `qid`, or file and line (`hotpot_train_graph.json:17`) where there is none; unique.
      question: text, never empty.
      answer: `yes`, `no` or a text.
      paragraphs: in the order of the file; of a training file the first two are the gold ones.
      where: file and line, for messages.
    """

    id: str
    question: str
    answer: str
    paragraphs: tuple[GraphParagraph, ...]
    where: str


def read(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> list[GraphQuestion]:
    """Reads a training or dev file; which of them it is, each paragraph shows by its fields.

    Args:
      path: the JSON lines file; its name ends in `.json` as published.
      bad: what to do about bad records: a line that is not JSON, a range outside its paragraph, one
        of the first two paragraphs without support in training, ...

    Raises:
      UserError: the file cannot be read, has no question, or has a bad record that is not skipped.
    """
    records = RecordList[GraphQuestion](path, bad)
    for line in load_json_lines(path, bad):
        with bad.record():
            records.add(_make_question(line, path), line)
    return records.finish(_FORMAT)


def _make_question(line: JsonValue, path: Path) -> GraphQuestion:
    question_id = f"{path.name}:{line.place.line}"
    if line.has("qid"):
        question_id = line["qid"].text()
        line = line.named(f"question {question_id!r}")
    nodes = line["node"].items()
    if not nodes:
        raise line["node"].bad("is empty; expected paragraphs")
    if any(node.has("spans") for node in nodes):
        _check_gold(line["node"], nodes)
    return GraphQuestion(
        id=question_id,
        question=line["question"].text(),
        answer=line["answer"].text(),
        paragraphs=tuple(map(_paragraph, nodes)),
        where=line.where,
    )


def _check_gold(value: JsonValue, nodes: list[JsonValue]) -> None:
    """Training relies on the order: the gold paragraphs are always kept, the others fill up."""
    if len(nodes) < _GOLD:
        raise value.bad(f"has {len(nodes)} paragraph; expected the {_GOLD} gold ones first")
    for node in nodes[:_GOLD]:
        if not node["has_supp"].flag():
            raise node["has_supp"].bad(f"is false; expected the {_GOLD} gold paragraphs first")


def _paragraph(node: JsonValue) -> GraphParagraph:
    pieces = node["context"].texts()
    if not pieces:
        raise node["context"].bad("is empty; expected wordpieces")
    sentences = tuple(_range(value, len(pieces), last=False) for value in node["sent_pos"].items())
    labels = node["supp_label"].items(len(sentences)) if node.has("supp_label") else []
    words: tuple[str, ...] = ()
    word_of: tuple[int, ...] = ()
    if node.has("doc_tokens") or not node.has("spans"):
        words = node["doc_tokens"].texts()
        numbers = node["tok_to_orig_index"].items(len(pieces))
        word_of = tuple(number.integer(-1, len(words) - 1) for number in numbers)
    spans = node["spans"].items() if node.has("spans") else []
    return GraphParagraph(
        title=node["name"].text(),
        wordpieces=pieces,
        sentences=sentences,
        supporting=tuple(label.flag() for label in labels),
        answers=tuple(_range(value, len(pieces), last=True) for value in spans),
        words=words,
        word_of=word_of,
    )


def _range(value: JsonValue, length: int, last: bool) -> PieceRange:
    """A range of wordpieces; `last` if its second number is that of the last one, not of the next."""
    first, second = value.items(2)
    start = first.integer(0, length - 1 if last else length)
    return PieceRange(start, second.integer(start, length - last) + last)


register_dataset(
    DataSet(
        name="hotpotqa_graph",
        task="multi_hop",
        read=read,
        files={
            "train": ("hotpot_train_graph.json",),
            "dev": ("rerank_dev_tok.json",),
            "test": ("test.json",),
        },
        dev_as_test=True,
    )
)

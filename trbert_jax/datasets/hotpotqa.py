"""Reads HotpotQA: as published, and in the graph format of TR-BERT's authors.

Published at https://hotpotqa.github.io, with the "distractor" or "fullwiki" contexts: a JSON list a
split, `[{"_id", "question", "answer", "context": [[title, [sentence]]], "supporting_facts": [[title,
number]]}]`. The test set has neither answers nor supporting facts.

The graph format has JSON lines of questions with paragraphs in wordpieces: `hotpot_train_graph.json` and,
for dev, `rerank_dev_tok.json` with paragraphs chosen and ordered by a reranker. A line is `{"question",
"answer", "node": [...]}`, for dev with `qid` too. A node is `{"name", "context": [wordpiece],
"sent_pos": [[start, end]], "supp_label": [0 or 1], "has_supp"}`, where `end` does not belong to the
sentence; in training also `"spans": [[first, last]]`, where `last` does belong to the answer; in dev also
`"doc_tokens": [word]` and `"tok_to_orig_index": [number of the word]`. `edge` is not read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from trbert_jax.datasets import reading
from trbert_jax.datasets.reading import BadRecords
from trbert_jax.datasets.records import GraphParagraph, GraphQuestion, MultiHopQuestion, Paragraph, Span
from trbert_jax.datasets.registry import DataSet, Reader, register_dataset

_GOLD = 2  # paragraphs


def read(
    path: Path, bad: BadRecords, labels: Sequence[str] = (), *, all_titles: bool = True
) -> Iterator[MultiHopQuestion]:
    """Yields the questions of the training file, or of one with the distractor or fullwiki contexts.

    A few of the published records have a supporting fact that names a sentence which does not exist; they
    are bad records like others.

    Args:
      path: the JSON file.
      bad: how to handle bad records.
      labels: ignored.
      all_titles: whether each supporting fact must have its paragraph. False for fullwiki: retrieval may
        have missed a paragraph, and its facts are kept since the official scorer counts them.
    """
    with reading.record(str(path)):
        values = reading.items(reading.load_json(path))
    with_answer, with_facts = reading.any_has(values, "answer"), reading.any_has(values, "supporting_facts")
    for i, item in enumerate(values):
        where = f"{path}: [{i}]"
        with bad.record(where, item, "_id"):
            question_id, question = reading.text(item, "_id"), reading.text(item, "question")
            answer = reading.text(item, "answer") if with_answer else None
            paragraphs = _paragraphs(item)
            facts = _facts(item, paragraphs, all_titles) if with_facts else ()
            yield MultiHopQuestion(question_id, question, answer, paragraphs, facts, where)


def _paragraphs(item: Any) -> tuple[Paragraph, ...]:
    paragraphs = []
    for i, pair in enumerate(reading.items(item, "context")):
        with reading.within(f"context[{i}]"):
            reading.items(pair, count=2)
            # Some published sentences are empty. They stay, since sentence numbers count them.
            paragraphs.append(Paragraph(reading.text(pair, 0), reading.texts(pair, 1, may_be_empty=True)))
    if not any(sentence.strip() for paragraph in paragraphs for sentence in paragraph.sentences):
        raise ValueError("context: has no text; expected at least one paragraph")
    return tuple(paragraphs)


def _facts(item: Any, paragraphs: tuple[Paragraph, ...], all_titles: bool) -> tuple[tuple[str, int], ...]:
    facts = []
    for i, pair in enumerate(reading.items(item, "supporting_facts")):
        with reading.within(f"supporting_facts[{i}]"):
            reading.items(pair, count=2)
            title, number = reading.text(pair, 0), reading.integer(pair, 1)
            lengths = [len(paragraph.sentences) for paragraph in paragraphs if paragraph.title == title]
            if not lengths and all_titles:
                raise ValueError(f"no paragraph is titled {title!r}; expected the title of one")
            if lengths and number >= max(lengths):
                raise ValueError(
                    f"sentence {number} of {title!r} does not exist; expected one of {max(lengths)}, "
                    "counted from 0"
                )
            facts.append((title, number))
    return tuple(facts)


def read_graph(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> Iterator[GraphQuestion]:
    """Yields the questions of a training or dev file of the graph format; the fields tell which it is."""
    for number, item in reading.load_json_lines(path, bad):
        where = f"{path}:{number}"
        with bad.record(where, item, "qid"):
            yield _graph_question(item, f"{path.name}:{number}", where)


def _graph_question(item: Any, name: str, where: str) -> GraphQuestion:
    nodes = reading.items(item, "node", some=True)
    if reading.any_has(nodes, "spans"):
        # Training relies on the order: the gold paragraphs are always kept, the others fill up.
        if len(nodes) < _GOLD:
            raise ValueError(f"node: has {len(nodes)} paragraph; expected the {_GOLD} gold ones first")
        for i in range(_GOLD):
            with reading.within(f"node[{i}]"):
                if not reading.flag(nodes[i], "has_supp"):
                    raise ValueError(f"has_supp: is false; expected the {_GOLD} gold paragraphs first")
    paragraphs = []
    for i, node in enumerate(nodes):
        with reading.within(f"node[{i}]"):
            paragraphs.append(_graph_paragraph(node))
    question_id = reading.text(item, "qid") if reading.has(item, "qid") else name
    question, answer = reading.text(item, "question"), reading.text(item, "answer")
    return GraphQuestion(question_id, question, answer, tuple(paragraphs), where)


def _graph_paragraph(node: Any) -> GraphParagraph:
    pieces = reading.texts(node, "context", some=True)
    sentences = _ranges(node, "sent_pos", len(pieces), inclusive=False)
    labels = reading.items(node, "supp_label", len(sentences)) if reading.has(node, "supp_label") else []
    with reading.within("supp_label"):
        supporting = tuple(reading.flag(labels, i) for i in range(len(labels)))
    words: tuple[str, ...] = ()
    word_of: tuple[int, ...] = ()
    if reading.has(node, "doc_tokens") or not reading.has(node, "spans"):
        words = reading.texts(node, "doc_tokens")
        numbers = reading.items(node, "tok_to_orig_index", len(pieces))
        with reading.within("tok_to_orig_index"):
            word_of = tuple(reading.integer(numbers, i, -1, len(words) - 1) for i in range(len(numbers)))
    answers = _ranges(node, "spans", len(pieces), inclusive=True) if reading.has(node, "spans") else ()
    title = reading.text(node, "name")
    return GraphParagraph(title, pieces, sentences, supporting, answers, words, word_of)


def _ranges(node: Any, field: str, length: int, *, inclusive: bool) -> tuple[Span, ...]:
    """Returns ranges of wordpieces; `inclusive` if the second number belongs to the range."""
    ranges = []
    for i, pair in enumerate(reading.items(node, field)):
        with reading.within(f"{field}[{i}]"):
            reading.items(pair, count=2)
            start = reading.integer(pair, 0, 0, length - 1 if inclusive else length)
            ranges.append(Span(start, reading.integer(pair, 1, start, length - inclusive) + inclusive))
    return tuple(ranges)


def _register(name: str, read: Reader, form: str, train: tuple[str, ...], dev: tuple[str, ...]) -> None:
    files = {"train": train, "dev": dev, "test": ("test.json",)}
    register_dataset(
        DataSet(name=name, task="multi_hop", read=read, format=form, files=files, dev_as_test=True)
    )


_FORMAT = '[{"_id": ..., "question": ..., "answer": ..., "context": [...], "supporting_facts": [...]}]'
_GRAPH_FORMAT = '{"question": ..., "answer": ..., "node": [...]} a line'
_TRAIN = ("hotpot_train_v1.1.json", "train.json")
_register("hotpotqa", read, _FORMAT, _TRAIN, ("hotpot_dev_distractor_v1.json", "dev.json"))
_register(
    "hotpotqa_fullwiki",
    partial(read, all_titles=False),
    _FORMAT,
    _TRAIN,
    ("hotpot_dev_fullwiki_v1.json", "dev.json"),
)
_register("hotpotqa_graph", read_graph, _GRAPH_FORMAT, ("hotpot_train_graph.json",), ("rerank_dev_tok.json",))

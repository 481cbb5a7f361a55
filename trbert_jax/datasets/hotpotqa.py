"""Reads HotpotQA: as published, and in the graph format of TR-BERT's authors.

Published at https://hotpotqa.github.io, with the "distractor" or "fullwiki" contexts: a JSON list a split,
`[{"_id", "question", "answer", "context": [[title, [sentence]]], "supporting_facts": [[title, number]]}]`.
The test set has neither answers nor supporting facts.

The graph format has JSON lines of questions with paragraphs in wordpieces: `hotpot_train_graph.json` and,
for dev, `rerank_dev_tok.json` with paragraphs chosen and ordered by a reranker. A line is `{"question",
"answer", "node": [...]}`, for dev with `qid` too. A node is `{"name", "context": [wordpiece], "sent_pos":
[[start, end]], "supp_label": [0 or 1], "has_supp"}`, `end` exclusive; in training also `"spans": [[first,
last]]`, `last` inclusive; in dev also `"doc_tokens": [word]` and `"tok_to_orig_index": [number of the word]`.
"""

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
    are bad records like others. `all_titles`: each supporting fact must have its paragraph. Not for
    fullwiki: retrieval may have missed a paragraph, and the official scorer counts its facts.
    """
    values = reading.load_records(path)
    with_answer, with_facts = (reading.any_given(values, key) for key in ("answer", "supporting_facts"))
    for i, item in enumerate(values):
        where = f"{path}: [{i}]"
        with bad.record(where, item):
            question_id, question = reading.identifier(item, "_id"), reading.text(item, "question")
            answer = reading.answer(item, "answer") if with_answer else None
            paragraphs = _paragraphs(item)
            facts = _facts(item, paragraphs, all_titles) if with_facts else ()
            yield MultiHopQuestion(question_id, question, answer, paragraphs, facts, where)


def _paragraphs(item: Any) -> tuple[Paragraph, ...]:
    def read_paragraph(pair: Any) -> Paragraph:
        reading.items(pair, count=2)
        # Some published sentences are empty. They stay, since sentence numbers count them.
        return Paragraph(reading.text(pair, 0), reading.texts(pair, 1, may_be_empty=True))

    paragraphs = reading.each(item, "context", read_paragraph)
    if not any(sentence.strip() for paragraph in paragraphs for sentence in paragraph.sentences):
        raise ValueError("context: has no text; expected at least one paragraph")
    return paragraphs


def _facts(item: Any, paragraphs: tuple[Paragraph, ...], all_titles: bool) -> tuple[tuple[str, int], ...]:
    def read_fact(pair: Any) -> tuple[str, int]:
        reading.items(pair, count=2)
        title, number = reading.text(pair, 0), reading.integer(pair, 1)
        lengths = [len(paragraph.sentences) for paragraph in paragraphs if paragraph.title == title]
        if not lengths and all_titles:
            raise ValueError(f"no paragraph is titled {title!r}; expected the title of one")
        if lengths and number >= max(lengths):
            raise ValueError(f"{title!r} has no sentence {number}; expected 0 to {max(lengths) - 1}")
        return title, number

    return reading.each(item, "supporting_facts", read_fact)


def read_graph(path: Path, bad: BadRecords, labels: Sequence[str] = ()) -> Iterator[GraphQuestion]:
    """Yields the questions of a training or dev file of the graph format; the fields tell which it is."""
    found = list[GraphQuestion]()
    for number, item in reading.load_json_lines(path, bad):
        where = f"{path}:{number}"
        with bad.record(where, item):
            found.append(_graph_question(item, f"{path.name}:{number}", where))
    with_answer = any(question.answer is not None for question in found)
    for question in found:
        if with_answer and question.answer is None:
            bad.add(reading.unusable(question, "answer", "missing; other questions of the file have one"))
        else:
            yield question


def _graph_question(item: Any, name: str, where: str) -> GraphQuestion:
    nodes = reading.items(item, "node", some=True)
    if reading.any_has(nodes, "spans"):
        # Training relies on the order: the gold paragraphs are always kept, the others fill up.
        if len(nodes) < _GOLD:
            raise ValueError(f"node: has {len(nodes)} paragraph; expected the {_GOLD} gold ones first")
        for i, node in enumerate(nodes[:_GOLD]):
            with reading.within(f"node[{i}]"):
                if not reading.flag(node, "has_supp"):
                    raise ValueError(f"has_supp: is false; expected the {_GOLD} gold paragraphs first")
    paragraphs = reading.each(item, "node", _graph_paragraph)
    question_id = reading.identifier(item, "qid") if reading.has(item, "qid") else name
    question = reading.text(item, "question")
    answer = reading.answer(item, "answer") if reading.any_given([item], "answer") else None
    return GraphQuestion(question_id, question, answer, paragraphs, where)


def _graph_paragraph(node: Any) -> GraphParagraph:
    pieces = reading.texts(node, "context", some=True)
    sentences = _ranges(node, "sent_pos", len(pieces), inclusive=False)
    supporting, words, word_of = tuple[bool, ...](), tuple[str, ...](), tuple[int, ...]()
    if reading.has(node, "supp_label"):
        supporting = reading.each(node, "supp_label", reading.flag, count=len(sentences))
    if reading.has(node, "doc_tokens") or not reading.has(node, "spans"):
        words = reading.texts(node, "doc_tokens")
        numbers = reading.items(node, "tok_to_orig_index", len(pieces))
        with reading.within("tok_to_orig_index"):  # not `each`: these lists are long
            word_of = tuple(reading.integer(numbers, i, -1, len(words) - 1) for i in range(len(numbers)))
    answers = _ranges(node, "spans", len(pieces), inclusive=True) if reading.has(node, "spans") else ()
    title = reading.text(node, "name")
    return GraphParagraph(title, pieces, sentences, supporting, answers, words, word_of)


def _ranges(node: Any, field: str, length: int, *, inclusive: bool) -> tuple[Span, ...]:
    """Returns ranges of wordpieces; `inclusive` if the second number belongs to the range."""

    def read_range(pair: Any) -> Span:
        reading.items(pair, count=2)
        start = reading.integer(pair, 0, 0, length - inclusive)
        return Span(start, reading.integer(pair, 1, start, length - inclusive) + inclusive)

    return reading.each(node, field, read_range)


def _register(name: str, read: Reader, form: str, train: tuple[str, ...], dev: tuple[str, ...]) -> None:
    files = {"train": train, "dev": dev, "test": ("test.json",)}
    register_dataset(
        DataSet(name=name, task="multi_hop", read=read, format=form, files=files, dev_as_test=True)
    )


_FORMAT = '[{"_id": ..., "question": ..., "answer": ..., "context": [...], "supporting_facts": [...]}]'
_GRAPH_FORMAT = '{"question": ..., "answer": ..., "node": [...]} a line'
_TRAIN = ("hotpot_train_v1.1.json", "train.json")
_read_fullwiki = partial(read, all_titles=False)
_register("hotpotqa", read, _FORMAT, _TRAIN, ("hotpot_dev_distractor_v1.json", "dev.json"))
_register("hotpotqa_fullwiki", _read_fullwiki, _FORMAT, _TRAIN, ("hotpot_dev_fullwiki_v1.json", "dev.json"))
_register("hotpotqa_graph", read_graph, _GRAPH_FORMAT, ("hotpot_train_graph.json",), ("rerank_dev_tok.json",))

"""Defines the records: labeled texts, and questions of each kind.

Text is kept as published. Offsets are character offsets into it, `start` inclusive, `end` exclusive.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol


class Identified(Protocol):
    """A record with an id and a place for messages (file and line, or path in the file)."""

    @property
    def id(self) -> str: ...
    @property
    def where(self) -> str: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One labeled text.

    Attributes:
      id: `train.jsonl:17` (the line) for files.
      text: never empty.
      label: class index, 0-based.
    """

    id: str
    text: str
    label: int

    @property
    def where(self) -> str:
        """Place for messages."""
        return self.id


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Characters `[start, end)` of a context, never empty; or wordpieces of a paragraph."""

    start: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class SpanQuestion:
    """A question whose answer is a span of a context: SQuAD, MRQA, TriviaQA.

    Attributes:
      id: unique.
      question: never empty.
      context: never empty.
      spans: the answers in the context, in the order of the source; empty if the context has none, and
        always if `impossible`.
      answers: strings that the official scorer accepts, in the order of the source; empty if `impossible`
        or if the source withholds them.
      impossible: whether the source says that the context holds no answer.
      where: file and line or field, for messages.
      scored_as: id by which the official scorer looks up the prediction, if several records (a question
        with each of its documents) share one answer.
    """

    id: str
    question: str
    context: str
    spans: tuple[Span, ...]
    answers: tuple[str, ...]
    impossible: bool
    where: str = dataclasses.field(compare=False)
    scored_as: str | None = None

    @property
    def scored_id(self) -> str:
        """Id of the prediction."""
        return self.id if self.scored_as is None else self.scored_as


@dataclasses.dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A question about an article with options, one of which is right: RACE.

    Attributes:
      id: unique; file and number of the question for RACE, `high/1.txt:0`.
      article: never empty.
      question: may be empty.
      options: four texts.
      answer: index of the right option; None if the source withholds it.
      where: file and field, for messages.
    """

    id: str
    article: str
    question: str
    options: tuple[str, ...]
    answer: int | None
    where: str = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class CandidateQuestion:
    """A query over documents with candidate answers, one of which is right: WikiHop.

    Attributes:
      id: unique.
      query: never empty, as published (`relation subject`).
      candidates: at least one, each different.
      supports: the documents.
      answer: index of the right candidate; None if the source withholds it.
      where: file and record, for messages.
    """

    id: str
    query: str
    candidates: tuple[str, ...]
    supports: tuple[str, ...]
    answer: int | None
    where: str = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Paragraph:
    """A titled paragraph.

    Attributes:
      title: as published.
      sentences: in order; concatenated they are the paragraph.
    """

    title: str
    sentences: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class MultiHopQuestion:
    """A question over several paragraphs, with the sentences that support its answer: HotpotQA.

    Attributes:
      id: unique.
      question: never empty.
      answer: `yes`, `no` or a span of a paragraph; None if the source withholds it.
      paragraphs: in the order of the source.
      supporting: (title, sentence number) of each supporting sentence; empty if withheld.
      where: file and record, for messages.
    """

    id: str
    question: str
    answer: str | None
    paragraphs: tuple[Paragraph, ...]
    supporting: tuple[tuple[str, int], ...]
    where: str = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class GraphParagraph:
    """A paragraph in wordpieces.

    Attributes:
      title: as published, with underscores for spaces.
      wordpieces: of the paragraph without its title; never empty.
      sentences: the wordpieces of each sentence, in order; empty for a sentence without wordpieces.
      supporting: whether each sentence supports the answer; empty if withheld.
      answers: where the answer is; empty if it is not in the paragraph, and always in dev files.
      words: of the original text; empty in training files.
      word_of: index into `words` of the word of each wordpiece, -1 for none; empty in training files.
    """

    title: str
    wordpieces: tuple[str, ...]
    sentences: tuple[Span, ...]
    supporting: tuple[bool, ...]
    answers: tuple[Span, ...]
    words: tuple[str, ...]
    word_of: tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class GraphQuestion:
    """A question over paragraphs in wordpieces: HotpotQA in the graph format.

    Attributes:
      id: `qid`, or file and line (`hotpot_train_graph.json:17`) without one; unique.
      question: never empty.
      answer: `yes`, `no` or a text.
      paragraphs: in the order of the file; in a training file the first two are the gold ones.
      where: file and line, for messages.
    """

    id: str
    question: str
    answer: str
    paragraphs: tuple[GraphParagraph, ...]
    where: str = dataclasses.field(compare=False)


def trim_span(context: str, start: int, end: int) -> Span | None:
    """Returns the span without white space at its ends; None if nothing remains."""
    text = context[start:end]
    left, right = len(text) - len(text.lstrip()), len(text) - len(text.rstrip())
    return Span(start + left, end - right) if left < len(text) else None

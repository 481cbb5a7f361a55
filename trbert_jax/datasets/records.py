"""Defines the records: labeled texts, and questions of each kind.

Text is kept as published. Ids are unique in a data set. `where` names file and line, or file and path in the
file, in messages.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any, Protocol

# White space and characters without width: control characters, soft hyphens, joiners, direction marks.
UNSEEN = r"[\s\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]+"
_AT_ENDS = re.compile(rf"\A{UNSEEN}|{UNSEEN}\Z")


class Identified(Protocol):
    """Any record."""

    @property
    def id(self) -> str: ...
    @property
    def where(self) -> str: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """A labeled text, or pair of texts."""

    id: str  # `train.jsonl:17` (the line) for files
    text: str  # never empty
    label: int  # class index, 0-based; -1 if the source withholds it
    pair: str | None = None  # the second text, never empty; None for single texts
    given_id: Any = None  # the id that the source gives; None if it gives none

    @property
    def where(self) -> str:
        return self.id


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Characters `[start, end)` of a context, never empty; or wordpieces of a paragraph."""

    start: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class SpanQuestion:
    """A question whose answer is a span of a context: SQuAD, MRQA, TriviaQA."""

    id: str
    question: str  # never empty
    context: str  # never empty
    spans: tuple[Span, ...]  # of the answers in the context, in the order of the source; may be empty
    answers: tuple[str, ...]  # that the official scorer accepts; empty if impossible or withheld
    impossible: bool  # whether the source says that the context holds no answer
    where: str = dataclasses.field(compare=False)
    scored_as: str | None = None  # id of the prediction, if a question shares it with several documents

    @property
    def scored_id(self) -> str:
        """Id by which the official scorer looks up the prediction."""
        return self.id if self.scored_as is None else self.scored_as


@dataclasses.dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A question about an article with options, one of which is right: RACE."""

    id: str  # file and number of the question, `high/1.txt:0`
    article: str  # never empty
    question: str  # may be empty
    options: tuple[str, ...]
    answer: int | None  # index of the right option; None if the source withholds it
    where: str = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class CandidateQuestion:
    """A query over documents with candidate answers, one of which is right: WikiHop."""

    id: str
    query: str  # never empty, as published (`relation subject`)
    candidates: tuple[str, ...]  # at least one, each different
    supports: tuple[str, ...]  # the documents
    answer: int | None  # index of the right candidate; None if the source withholds it
    where: str = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Paragraph:
    """A titled paragraph, which its sentences are when concatenated."""

    title: str
    sentences: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class MultiHopQuestion:
    """A question over several paragraphs, with the sentences that support its answer: HotpotQA."""

    id: str
    question: str  # never empty
    answer: str | None  # `yes`, `no` or a span of a paragraph; None if the source withholds it
    paragraphs: tuple[Paragraph, ...]
    supporting: tuple[tuple[str, int], ...]  # title and sentence number; empty if withheld
    where: str = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class GraphParagraph:
    """A paragraph in wordpieces."""

    title: str  # with underscores for spaces
    wordpieces: tuple[str, ...]  # without those of the title; never empty
    sentences: tuple[Span, ...]  # wordpieces of each sentence, which may have none
    supporting: tuple[bool, ...]  # whether each sentence supports the answer; empty if withheld
    answers: tuple[Span, ...]  # wordpieces of the answer; empty if not in here, and in dev files
    words: tuple[str, ...]  # of the original text; empty in training files
    word_of: tuple[int, ...]  # index of each wordpiece's word, -1 for none; empty in training files


@dataclasses.dataclass(frozen=True, slots=True)
class GraphQuestion:
    """A question over paragraphs in wordpieces: HotpotQA in the graph format."""

    id: str  # `qid`, or file and line (`hotpot_train_graph.json:17`) without one
    question: str  # never empty
    answer: str | None  # `yes`, `no` or a text; None if the source withholds it
    paragraphs: tuple[GraphParagraph, ...]  # in a training file the first two are the gold ones
    where: str = dataclasses.field(compare=False)


def content_digest(records: Iterable[Any]) -> str:
    """Hashes what records say, wherever they are stored: without `id` and `where`.

    Fields with their default are left out, so that a new field does not change the hash of what lacks it.
    """
    digest = hashlib.blake2b(digest_size=16)

    def plain(value: Any) -> dict[str, Any]:
        values = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {f.name: x for f, x in values if f.name not in ("id", "where") and x != f.default}

    for record in records:
        digest.update(json.dumps(record, default=plain).encode() + b"\n")
    return digest.hexdigest()


def trim(text: str) -> str:
    """Returns an answer without white space and characters of no width at its ends.

    No tokenizer keeps them, so no prediction could equal an answer that has some.
    """
    return _AT_ENDS.sub("", text)


def trim_span(context: str, start: int, end: int) -> Span | None:
    """Returns the span that `trim` leaves, or without it `str.strip`; None if nothing remains."""
    text = context[start:end]
    kept = trim(text) or text.strip()
    begin = start + text.find(kept)
    return Span(begin, begin + len(kept)) if kept else None

"""What the readers of question answering and multiple choice return: one question, checked.

Text is kept as published. Offsets are character offsets into it, `start` inclusive, `end` exclusive.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Characters `[start, end)` of a context; never empty, always inside it."""

    start: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class SpanQuestion:
    """A question whose answer is a stretch of a text: SQuAD, MRQA, TriviaQA.

    Attributes:
      id: of the data set, unique.
      question: never empty.
      context: never empty.
      spans: where answers stand in the context, in the order of the source; empty where the question
        has none there, and always where `impossible`.
      answers: strings that the official scorer accepts, in the order of the source; empty where
        `impossible` or where the source gives none.
      impossible: whether the source says that the context holds no answer.
      where: file and line or field, for messages.
      scored_as: the id by which the official scorer looks the prediction up where that is another one,
        since several records (a question with each of its documents) have one answer together.
    """

    id: str
    question: str
    context: str
    spans: tuple[Span, ...]
    answers: tuple[str, ...]
    impossible: bool
    where: str
    scored_as: str | None = None

    @property
    def scored_id(self) -> str:
        """The id that predictions go by."""
        return self.id if self.scored_as is None else self.scored_as


@dataclasses.dataclass(frozen=True, slots=True)
class ChoiceQuestion:
    """A question about an article with options of which one is right: RACE.

    Attributes:
      id: unique, `high/1.txt:0` (file and number of the question) for RACE.
      article, question: the article is never empty; the question may be.
      options: four.
      answer: index of the right option; None where the source withholds it.
      where: file and field, for messages.
    """

    id: str
    article: str
    question: str
    options: tuple[str, ...]
    answer: int | None
    where: str


@dataclasses.dataclass(frozen=True, slots=True)
class Paragraph:
    """A titled paragraph.

    Attributes:
      title: as published.
      sentences: in order; joined without anything between them they are the paragraph.
    """

    title: str
    sentences: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class MultiHopQuestion:
    """A question over several paragraphs, with the sentences that support its answer: HotpotQA.

    Attributes:
      id: unique.
      question: never empty.
      answer: `yes`, `no` or a stretch of a paragraph; None where the source withholds it.
      paragraphs: in the order of the source.
      supporting: (title, number of the sentence) of each supporting sentence; empty where withheld.
      where: file and record, for messages.
    """

    id: str
    question: str
    answer: str | None
    paragraphs: tuple[Paragraph, ...]
    supporting: tuple[tuple[str, int], ...]
    where: str


@dataclasses.dataclass(frozen=True, slots=True)
class CandidateQuestion:
    """A query over several documents with candidate answers of which one is right: WikiHop.

    Attributes:
      id: unique.
      query: never empty, as published (`relation subject`).
      candidates: at least one, each different.
      supports: the documents.
      answer: index of the right candidate; None where the source withholds it.
      where: file and record, for messages.
    """

    id: str
    query: str
    candidates: tuple[str, ...]
    supports: tuple[str, ...]
    answer: int | None
    where: str

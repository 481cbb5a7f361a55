"""Questions over several paragraphs: HotpotQA. docs/question_answering.md, "Paragraphs of a question".

The paragraphs are tokenized once and kept apart; `packing` puts them into inputs, in training in an
order that is drawn anew for every epoch.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trbert_jax.datasets.dataset import Announce
from trbert_jax.datasets.reading import BadRecord, UnusableRecords, unusable
from trbert_jax.datasets.records import MultiHopQuestion
from trbert_jax.tasks.encoding import TextEncoder
from trbert_jax.tasks.paragraphs import TokenizedQuestion, is_yes_or_no, tokenize_questions
from trbert_jax.tasks.ragged import Counts, digest_of

MAX_LENGTH = 1024
MAX_QUESTION_LENGTH = 80
_TITLE, _CONTEXT = "[unused1]", "[unused2]"
_CHUNK = 1000  # questions in separate arrays at a time

SPAN, YES, NO = range(3)  # kinds of answers


@dataclasses.dataclass(frozen=True, eq=False)
class MultiHopFeatures:
    """n questions with p paragraphs in all, `[unused1] title [unused2] context` each.

    Positions in a paragraph count from its [unused1].

    Attributes:
      queries: int32 [total], word pieces of the questions.
      query_offsets: int64 [n + 1].
      tokens: int32 [total], the paragraphs.
      token_offsets: int64 [p + 1].
      paragraph_offsets: int64 [n + 1], question i has the paragraphs
        `paragraph_offsets[i]:paragraph_offsets[i + 1]`.
      chars: int32 [total, 2], see `TokenizedParagraph`; -1 for markers and titles. int32 [0, 2] in
        training, which needs none.
      sentences: int32 [total, 2], `[start, end)` in the paragraph.
      supporting: int8 [total], see `TokenizedParagraph`.
      sentence_offsets: int64 [p + 1], of `sentences` and `supporting`.
      spans: int32 [total, 2], answers, `[start, end)` in the paragraph.
      span_offsets: int64 [p + 1].
      gold: bool [p].
      switch: int8 [n], kind of the answer: 0 a span, 1 yes, 2 no, -1 where it is withheld.
      ids: n ids.
      titles, texts: p of each.
      max_length, cls_id, sep_id: int.
      counts: what became of the questions; `num_truncated` are those not all of whose paragraphs
        fit into one input.
      digest: identifies records, tokenizer and settings.
    """

    queries: np.ndarray
    query_offsets: np.ndarray
    tokens: np.ndarray
    token_offsets: np.ndarray
    paragraph_offsets: np.ndarray
    chars: np.ndarray
    sentences: np.ndarray
    supporting: np.ndarray
    sentence_offsets: np.ndarray
    spans: np.ndarray
    span_offsets: np.ndarray
    gold: np.ndarray
    switch: np.ndarray
    ids: list[str]
    titles: list[str]
    texts: list[str]
    max_length: int
    cls_id: int
    sep_id: int
    counts: Counts
    digest: str

    def __len__(self) -> int:
        return len(self.ids)

    def room(self, i: int) -> int:
        """Tokens that question i leaves for paragraphs."""
        return int(self.max_length - 3 - (self.query_offsets[i + 1] - self.query_offsets[i]))


def build_multi_hop_features(
    questions: Sequence[MultiHopQuestion | TokenizedQuestion],
    tokenizer: Any,
    max_length: int = MAX_LENGTH,
    max_question_length: int = MAX_QUESTION_LENGTH,
    *,
    training: bool = False,
    announce: Announce = print,
) -> MultiHopFeatures:
    """Tokenizes questions and their paragraphs.

    Args:
      questions: of one split, as text or with paragraphs already in word pieces.
      tokenizer: a `transformers.PreTrainedTokenizerFast` whose vocabulary has [unused1] and
        [unused2]; not changed.
      max_length: tokens of an input at most.
      max_question_length: word pieces of a question at most; the rest is cut.
      training: whether to leave out questions whose answer is neither yes or no nor found in a
        paragraph, and to keep no characters. A question without an answer is then an error.
      announce: called with a line of text that says what became of the questions.

    Raises:
      UserError: a vocabulary without the markers.
      UnusableRecords: a question without word pieces, one that leaves no room for paragraphs, or in
        training one without an answer; all such questions.
    """
    encoder = TextEncoder(tokenizer)
    title_id, context_id = encoder.id_of(_TITLE), encoder.id_of(_CONTEXT)
    columns: dict[str, list[np.ndarray]] = defaultdict(list)
    ids, titles, texts = list[str](), list[str](), list[str]()
    truncated = questions_cut = dropped = 0
    bad = dict[str, BadRecord]()
    for some in _chunks(questions, encoder):
        chunk: dict[str, list[np.ndarray]] = defaultdict(list)
        queries = encoder.encode([q.question for q in some], max_tokens=max_question_length)
        names = encoder.encode([p.title.replace("_", " ") for q in some for p in q.paragraphs])
        ends = np.cumsum([0, *(len(q.paragraphs) for q in some)])
        questions_cut += int((queries.num_tokens > max_question_length).sum())
        for i, question in enumerate(some):
            query = queries.tokens_of(i)
            error = _check(question, len(query), max_length, training)
            if error is not None:
                bad[question.id] = error
                continue
            found = any(len(p.spans) for p in question.paragraphs)
            if training and not found and not is_yes_or_no(question.answer):
                dropped += 1
                continue
            length = 0
            for paragraph, name in zip(question.paragraphs, range(ends[i], ends[i + 1]), strict=True):
                head = np.array([title_id, *names.tokens_of(name), context_id], np.int32)
                chunk["tokens"] += (head, paragraph.tokens)
                chunk["token_counts"].append(np.array([len(head) + len(paragraph.tokens)]))
                if not training:
                    chunk["chars"] += (np.full((len(head), 2), -1, np.int32), paragraph.chars)
                for column in ("sentences", "spans"):
                    ranges = getattr(paragraph, column)
                    chunk[column].append(ranges + len(head))
                    chunk[f"{column}_counts"].append(np.array([len(ranges)]))
                chunk["supporting"].append(paragraph.supporting)
                chunk["gold"].append(np.array([paragraph.gold]))
                titles.append(paragraph.title)
                texts.append("" if training else paragraph.text)
                length += len(head) + len(paragraph.tokens)
            chunk["queries"].append(query)
            chunk["query_counts"].append(np.array([len(query)]))
            chunk["paragraph_counts"].append(np.array([len(question.paragraphs)]))
            chunk["switch"].append(np.array([_kind(question.answer)], np.int8))
            ids.append(question.id)
            truncated += length > max_length - 3 - len(query)
        for column, arrays in chunk.items():
            columns[column].append(np.concatenate(arrays))
    if bad:
        raise UnusableRecords(bad)
    counts = Counts(
        num_examples=len(questions),
        num_rows=len(ids),
        num_truncated=truncated,
        num_questions_cut=questions_cut,
        num_dropped=dropped,
    )
    announce(counts.describe())
    return MultiHopFeatures(
        queries=_join(columns["queries"], np.int32),
        query_offsets=_offsets(columns["query_counts"]),
        tokens=_join(columns["tokens"], np.int32),
        token_offsets=_offsets(columns["token_counts"]),
        paragraph_offsets=_offsets(columns["paragraph_counts"]),
        chars=_join(columns["chars"], np.int32, 2),
        sentences=_join(columns["sentences"], np.int32, 2),
        supporting=_join(columns["supporting"], np.int8),
        sentence_offsets=_offsets(columns["sentences_counts"]),
        spans=_join(columns["spans"], np.int32, 2),
        span_offsets=_offsets(columns["spans_counts"]),
        gold=_join(columns["gold"], np.bool_),
        switch=_join(columns["switch"], np.int8),
        ids=ids,
        titles=titles,
        texts=texts,
        max_length=max_length,
        cls_id=encoder.cls_id,
        sep_id=encoder.sep_id,
        counts=counts,
        digest=digest_of(
            "multi hop", encoder.description, max_length, max_question_length, training, list(questions)
        ),
    )


def _chunks(
    questions: Sequence[MultiHopQuestion | TokenizedQuestion], encoder: TextEncoder
) -> Iterator[list[TokenizedQuestion]]:
    for start in range(0, len(questions), _CHUNK):
        some = questions[start : start + _CHUNK]
        texts = [question for question in some if isinstance(question, MultiHopQuestion)]
        tokenized = tokenize_questions(texts, encoder)
        yield [q if isinstance(q, TokenizedQuestion) else next(tokenized) for q in some]


def _check(
    question: TokenizedQuestion, query_length: int, max_length: int, training: bool
) -> BadRecord | None:
    """What keeps a question from having an input."""
    if training and question.answer is None:
        return unusable(question, "answer", "missing; training needs one")
    if not query_length:
        return unusable(question, "question", "has no tokens; expected a text that the tokenizer keeps")
    if max_length - 3 - query_length < 1:
        return unusable(
            question,
            "question",
            f"has {query_length} tokens, which leaves none of {max_length} for its paragraphs; give a larger "
            "max_length or a smaller max_question_length",
        )
    return None


def _kind(answer: str | None) -> int:
    if answer is None:
        return -1
    return {"yes": YES, "no": NO}.get(answer.lower(), SPAN)


def _join(arrays: list[np.ndarray], dtype: type[np.generic], width: int | None = None) -> np.ndarray:
    empty = np.zeros((0,) if width is None else (0, width), dtype)
    return np.concatenate([empty, *arrays]).astype(dtype, copy=False)


def _offsets(counts: list[np.ndarray]) -> np.ndarray:
    return np.cumsum(np.concatenate([[0], *counts]), dtype=np.int64)

"""Paragraphs as word pieces with their sentences and answers: what every HotpotQA source comes to.

From text they are tokenized here (`tokenize_questions`); some sources bring word pieces along
(`paragraph_from_pieces`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trbert_jax.datasets.records import MultiHopQuestion, Paragraph
from trbert_jax.errors import UserError
from trbert_jax.tasks.encoding import TextEncoder, locate


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class TokenizedParagraph:
    """A titled paragraph of k word pieces and s sentences, with g occurrences of the answer.

    Attributes:
      title: as published.
      text: what answers are cut from; empty where the source does not give it.
      tokens: int32 [k], title not included.
      chars: int32 [k, 2], the characters `[start, end)` of `text` that a piece stands for; -1 where
        it stands for none, and an answer does not reach across it.
      sentences: int32 [s, 2], pieces `[start, end)` of each sentence, which may be none.
      supporting: int8 [s], 1 for a supporting sentence, else 0, or -1 where the source withholds it.
      spans: int32 [g, 2], pieces `[start, end)`, in order.
      gold: whether it is one of the paragraphs the answer follows from, which training always shows.
    """

    title: str
    text: str
    tokens: np.ndarray
    chars: np.ndarray
    sentences: np.ndarray
    supporting: np.ndarray
    spans: np.ndarray
    gold: bool


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class TokenizedQuestion:
    """A question over such paragraphs; otherwise like `MultiHopQuestion`."""

    id: str
    question: str
    answer: str | None
    paragraphs: tuple[TokenizedParagraph, ...]
    where: str


def is_yes_or_no(answer: str | None) -> bool:
    """Whether an answer is one of the two that stand in no text."""
    return answer is not None and answer.lower() in ("yes", "no")


def tokenize_questions(
    questions: Sequence[MultiHopQuestion], encoder: TextEncoder
) -> Iterator[TokenizedQuestion]:
    """Tokenizes the paragraphs of questions and finds supporting sentences and answers in them.

    Answers are looked for letter by letter, where they are whole words: in the supporting sentences;
    if they are not there, in the paragraphs of these sentences; if not there either, in these
    paragraphs whatever the case of letters. Every occurrence counts. Where the source gives no
    supporting sentences, every paragraph takes their place.
    """
    texts = ["".join(p.sentences) for q in questions for p in q.paragraphs]
    encoded = encoder.encode(texts, chars=True)
    place = 0
    for question in questions:
        gold = {title for title, _ in question.supporting}
        paragraphs = [
            _paragraph(
                p, encoded.tokens_of(place + k), encoded.chars_of(place + k), question, p.title in gold
            )
            for k, p in enumerate(question.paragraphs)
        ]
        place += len(paragraphs)
        yield TokenizedQuestion(
            id=question.id,
            question=question.question,
            answer=question.answer,
            paragraphs=tuple(_with_answers(paragraphs, question.answer, encoder)),
            where=question.where,
        )


def _paragraph(
    paragraph: Paragraph, tokens: np.ndarray, chars: np.ndarray, question: MultiHopQuestion, gold: bool
) -> TokenizedParagraph:
    ends = np.cumsum([0, *map(len, paragraph.sentences)])
    borders = np.searchsorted(chars[:, 0], ends)  # a piece belongs to the sentence it begins in
    count = len(paragraph.sentences)
    supporting = np.full(count, 0 if question.supporting else -1, np.int8)
    supporting[[k for title, k in question.supporting if title == paragraph.title and k < count]] = 1
    return TokenizedParagraph(
        title=paragraph.title,
        text="".join(paragraph.sentences),
        tokens=tokens,
        chars=chars,
        sentences=np.stack([borders[:-1], borders[1:]], axis=1).astype(np.int32),
        supporting=supporting,
        spans=np.zeros((0, 2), np.int32),
        gold=gold,
    )


def _with_answers(
    paragraphs: list[TokenizedParagraph], answer: str | None, encoder: TextEncoder
) -> list[TokenizedParagraph]:
    def search(pattern: re.Pattern[str]) -> list[list[tuple[int, int]]]:
        pairs = zip(paragraphs, shown, strict=True)
        return [_occurrences(p, pattern, encoder) if ok else [] for p, ok in pairs]

    if answer is None or is_yes_or_no(answer):
        return paragraphs
    shown = [p.gold for p in paragraphs] if any(p.gold for p in paragraphs) else [True] * len(paragraphs)
    found = search(re.compile(re.escape(answer)))
    supported = [_in_supporting(p, spans) for p, spans in zip(paragraphs, found, strict=True)]
    if any(supported):
        found = supported
    elif not any(found):
        found = search(re.compile(re.escape(answer), re.IGNORECASE))
    return [
        dataclasses.replace(p, spans=np.array(spans, np.int32).reshape(-1, 2))
        for p, spans in zip(paragraphs, found, strict=True)
    ]


def _occurrences(
    paragraph: TokenizedParagraph, pattern: re.Pattern[str], encoder: TextEncoder
) -> list[tuple[int, int]]:
    """Pieces `[start, end)` of every match that is whole words; `art` in `party` or `arts` is none."""
    spans, chars = list[tuple[int, int]](), paragraph.chars
    matches = list(pattern.finditer(paragraph.text))
    if not matches:
        return spans
    inside_word = np.append(encoder.continues(paragraph.tokens), False)
    for match in matches:
        place = locate(chars, match.start(), match.end())
        if place is None or chars[place[0], 0] < match.start() or chars[place[1], 1] > match.end():
            continue
        if not inside_word[place[0]] and not inside_word[place[1] + 1]:
            spans.append((place[0], place[1] + 1))
    return spans


def _in_supporting(paragraph: TokenizedParagraph, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    ranges = paragraph.sentences[paragraph.supporting == 1].tolist()
    return [(start, end) for start, end in spans if any(a <= start and end <= b for a, b in ranges)]


def paragraph_from_pieces(
    tokenizer: Any,
    title: str,
    pieces: Sequence[str],
    *,
    sentences: Sequence[tuple[int, int]] = (),
    supporting: Sequence[int] | None = None,
    spans: Sequence[tuple[int, int]] = (),
    gold: bool = False,
    words: Sequence[str] = (),
    piece_words: Sequence[int] = (),
) -> TokenizedParagraph:
    """A paragraph whose source has divided it into word pieces.

    Args:
      tokenizer: a `transformers.PreTrainedTokenizerFast`.
      title: as published.
      pieces: k entries of the vocabulary.
      sentences: s ranges `[start, end)` of pieces.
      supporting: s times 0 or 1; None where the source withholds them.
      spans: ranges `[start, end)` of pieces that are the answer.
      gold: see `TokenizedParagraph`.
      words: words of the text; joined by spaces they are the paragraph's text. None may be given.
      piece_words: k numbers, the word each piece belongs to, -1 for none; empty where no words are
        given. An answer is then whole words.

    Raises:
      UserError: a piece that the vocabulary does not have.
      ValueError: ranges or numbers of words that are not there.
    """
    vocabulary = tokenizer.get_vocab()
    missing = next((piece for piece in pieces if piece not in vocabulary), None)
    if missing is not None:
        raise UserError(
            f"{title}: the word piece {missing!r} is not in the vocabulary; choose the tokenizer that the "
            "file was made with"
        )
    k = len(pieces)
    owner = np.array(piece_words if len(words) else [-1] * k, np.int64)
    if len(owner) != k or (owner >= len(words)).any():
        raise ValueError(f"{title}: piece_words names words that are not there, or is not {k} numbers")
    ranges = [np.array(some, np.int32).reshape(-1, 2) for some in (sentences, spans)]
    for some in ranges:
        if ((some[:, 0] > some[:, 1]) | (some[:, 0] < 0) | (some[:, 1] > k)).any():
            raise ValueError(f"{title}: a range of word pieces lies outside the {k} of the paragraph")
    ends = np.cumsum([len(word) + 1 for word in words], dtype=np.int64) - 1
    starts = ends - [len(word) for word in words]
    chars = np.full((k, 2), -1, np.int32)
    chars[owner >= 0] = np.stack([starts, ends], axis=1)[owner[owner >= 0]]
    return TokenizedParagraph(
        title=title,
        text=" ".join(words),
        tokens=np.array([vocabulary[piece] for piece in pieces], np.int32),
        chars=chars,
        sentences=ranges[0],
        supporting=np.array([-1] * len(sentences) if supporting is None else supporting, np.int8),
        spans=ranges[1],
        gold=gold,
    )

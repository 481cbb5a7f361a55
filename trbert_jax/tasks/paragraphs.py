"""Tokenize the paragraphs of multi-hop questions and find sentences and answers in them.

See docs/question_answering.md, "Paragraphs of a question".
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trbert_jax.datasets.records import GraphParagraph, GraphQuestion, MultiHopQuestion, Paragraph
from trbert_jax.errors import UserError
from trbert_jax.tasks.base import RecordErrors
from trbert_jax.tasks.examples import Counts, Ragged, digest_of
from trbert_jax.tasks.text_encoder import TextEncoder, locate

SPAN, YES, NO = range(3)  # kinds of answers
_CHUNK = 1000  # questions whose paragraphs are separate arrays at a time


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class TokenizedParagraph:
    """A titled paragraph of k word pieces and s sentences, with g occurrences of the answer."""

    title: str  # as published
    text: str  # answers are cut from it; empty if the source lacks it
    tokens: np.ndarray  # int32 [k], without the title
    # int32 [k, 2], the characters `[start, end)` of `text` that a piece stands for; -1 if it stands for none,
    # and no answer reaches across it
    chars: np.ndarray
    sentences: np.ndarray  # int32 [s, 2], pieces `[start, end)` of each sentence, which may be empty
    supporting: np.ndarray  # int8 [s], 1 for a supporting sentence, else 0; -1 if the source withholds it
    spans: np.ndarray  # int32 [g, 2], pieces `[start, end)` of each occurrence, in order
    gold: bool  # whether the answer follows from it; training always shows such paragraphs


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class TokenizedQuestion:
    """A question with such paragraphs; otherwise like `MultiHopQuestion`."""

    id: str
    question: str
    answer: str | None
    paragraphs: tuple[TokenizedParagraph, ...]
    where: str


def tokenize_questions(
    questions: Sequence[MultiHopQuestion], encoder: TextEncoder
) -> Iterator[TokenizedQuestion]:
    """Tokenizes the paragraphs of questions and finds supporting sentences and answers in them.

    Answers are whole words. They are searched for in the supporting sentences; if not found, in the
    paragraphs of these sentences; if not found, in these paragraphs with case ignored. Every occurrence
    counts. If the source gives no supporting sentences, all paragraphs are searched.
    """
    texts = ["".join(p.sentences) for q in questions for p in q.paragraphs]
    encoded = encoder.encode(texts, chars=True)
    pieces = zip(encoded.tokens, encoded.chars, strict=True)
    for question in questions:
        paragraphs = [_tokenized(p, *next(pieces), question) for p in question.paragraphs]
        paragraphs = _with_answers(paragraphs, question.answer, encoder)
        asked = (question.id, question.question, question.answer)
        yield TokenizedQuestion(*asked, tuple(paragraphs), question.where)


def _tokenized(
    paragraph: Paragraph, tokens: np.ndarray, chars: np.ndarray, question: MultiHopQuestion
) -> TokenizedParagraph:
    ends = np.cumsum([0, *map(len, paragraph.sentences)])
    borders = np.searchsorted(chars[:, 0], ends)  # a piece belongs to the sentence that it begins in
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
        gold=any(title == paragraph.title for title, _ in question.supporting),
    )


def _with_answers(
    paragraphs: list[TokenizedParagraph], answer: str | None, encoder: TextEncoder
) -> list[TokenizedParagraph]:
    def search(flags: int = 0) -> list[list[tuple[int, int]]]:
        pattern = re.compile(re.escape(answer or ""), flags)
        pairs = zip(paragraphs, searched, strict=True)
        return [_occurrences(p, pattern, encoder) if ok else [] for p, ok in pairs]

    if kind_of(answer) != SPAN:
        return paragraphs
    searched = [p.gold or not any(p.gold for p in paragraphs) for p in paragraphs]
    found = search()
    supported = [_in_supporting(p, spans) for p, spans in zip(paragraphs, found, strict=True)]
    if any(supported):
        found = supported
    elif not any(found):
        found = search(re.IGNORECASE)
    return [
        dataclasses.replace(p, spans=np.array(spans, np.int32).reshape(-1, 2))
        for p, spans in zip(paragraphs, found, strict=True)
    ]


def _occurrences(
    paragraph: TokenizedParagraph, pattern: re.Pattern[str], encoder: TextEncoder
) -> list[tuple[int, int]]:
    """Returns the pieces `[start, end)` of every match of whole words; `art` in `party` does not count."""
    spans, chars = list[tuple[int, int]](), paragraph.chars
    matches = list(pattern.finditer(paragraph.text))
    if not matches:
        return spans
    inside_word = np.append(encoder.continues[paragraph.tokens], False)
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


def kind_of(answer: str | None) -> int:
    """Returns the kind of an answer: 0 a span, 1 yes, 2 no, -1 if it is withheld."""
    return -1 if answer is None else {"yes": YES, "no": NO}.get(answer.lower(), SPAN)


def question_from_graph(question: GraphQuestion, tokenizer: Any) -> TokenizedQuestion:
    """Converts a question whose source has already divided its paragraphs into word pieces.

    Raises `UserError` for a piece that the tokenizer's vocabulary lacks.
    """
    vocabulary = tokenizer.get_vocab()
    paragraphs = tuple(  # in a training file the first two are the gold ones
        _from_graph(p, vocabulary, gold=k < 2 and any(p.supporting))
        for k, p in enumerate(question.paragraphs)
    )
    return TokenizedQuestion(question.id, question.question, question.answer, paragraphs, question.where)


def _from_graph(paragraph: GraphParagraph, vocabulary: dict[str, int], gold: bool) -> TokenizedParagraph:
    pieces, words = paragraph.wordpieces, paragraph.words
    missing = next((piece for piece in pieces if piece not in vocabulary), None)
    if missing is not None:
        raise UserError(
            f"{paragraph.title}: the word piece {missing!r} is not in the vocabulary; choose the tokenizer "
            "that the file was made with"
        )
    # The text is the words joined by spaces. A piece stands for its whole word.
    owner = np.array(paragraph.word_of if words else [-1] * len(pieces), np.int64)
    ends = np.cumsum([len(word) + 1 for word in words], dtype=np.int64) - 1
    starts = ends - [len(word) for word in words]
    chars = np.full((len(pieces), 2), -1, np.int32)
    chars[owner >= 0] = np.stack([starts, ends], axis=1)[owner[owner >= 0]]
    sentences, spans = (
        np.array([(span.start, span.end) for span in ranges], np.int32).reshape(-1, 2)
        for ranges in (paragraph.sentences, paragraph.answers)
    )
    return TokenizedParagraph(
        title=paragraph.title,
        text=" ".join(words),
        tokens=np.array([vocabulary[piece] for piece in pieces], np.int32),
        chars=chars,
        sentences=sentences,
        supporting=np.array(paragraph.supporting or [-1] * len(sentences), np.int8),
        spans=spans,
        gold=gold,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class MultiHopParagraphs:
    """n questions with p paragraphs in all, `[unused1] title [unused2] text` each.

    Positions in a paragraph count from its [unused1]. See `TokenizedParagraph` for the arrays.
    """

    queries: Ragged  # int32, word pieces of each question
    offsets: np.ndarray  # int64 [n + 1]; question i has the paragraphs `offsets[i]` to `offsets[i + 1] - 1`
    # Of each paragraph:
    tokens: Ragged  # int32
    chars: Ragged  # int32 [tokens, 2]; -1 for markers and titles; empty in training
    sentences: Ragged  # int32 [sentences, 2], `[start, end)` in the paragraph
    supporting: Ragged  # int8 [sentences]
    spans: Ragged  # int32 [spans, 2], answers, `[start, end)` in the paragraph
    gold: np.ndarray  # bool [p]
    titles: list[str]
    texts: list[str]  # "" in training
    # Of each question:
    kinds: np.ndarray  # int8 [n], see `kind_of`
    ids: list[str]
    room: np.ndarray  # int64 [n], tokens left for paragraphs
    cls: np.ndarray  # int32 [1]
    sep: np.ndarray  # int32 [1]
    counts: Counts
    digest: str

    def __len__(self) -> int:
        return len(self.ids)


# Columns of `MultiHopParagraphs` -> dtype and width.
_COLUMNS: dict[str, tuple[Any, int | None]] = {
    **dict.fromkeys(("queries", "tokens"), (np.int32, None)),
    "supporting": (np.int8, None),
    **dict.fromkeys(("chars", "sentences", "spans"), (np.int32, 2)),
}


def encode_paragraphs(
    questions: Sequence[MultiHopQuestion | TokenizedQuestion],
    tokenizer: Any,
    max_length: int,
    max_question_length: int,
    *,
    training: bool = False,
) -> MultiHopParagraphs:
    """Tokenizes questions, as text or with paragraphs already in word pieces, for inputs of `max_length`.

    Training keeps no characters, and leaves out questions whose answer is neither yes or no nor found in a
    paragraph. Tokenizer (its vocabulary needs [unused1] and [unused2]) and errors: see `Task.encode`.
    """
    encoder = TextEncoder(tokenizer)
    title_id, context_id = encoder.id_of("[unused1]"), encoder.id_of("[unused2]")
    columns: dict[str, list[Ragged]] = {name: [Ragged.of([], *_COLUMNS[name])] for name in _COLUMNS}
    ids, kinds, gold = list[str](), list[int](), list[bool]()
    titles, texts = list[str](), list[str]()
    counts, truncated, questions_cut, dropped = [0], 0, 0, 0
    errors = RecordErrors(training)
    for start in range(0, len(questions), _CHUNK):
        given = questions[start : start + _CHUNK]
        tokenized = tokenize_questions([q for q in given if isinstance(q, MultiHopQuestion)], encoder)
        chunk = [q if isinstance(q, TokenizedQuestion) else next(tokenized) for q in given]
        arrays: dict[str, list[np.ndarray]] = defaultdict(list)
        queries = encoder.encode([q.question for q in chunk], max_tokens=max_question_length)
        names = iter(encoder.encode([p.title.replace("_", " ") for q in chunk for p in q.paragraphs]).tokens)
        questions_cut += int((queries.num_tokens > max_question_length).sum())
        for question, query in zip(chunk, queries.tokens, strict=True):
            heads = [np.array([title_id, *next(names), context_id], np.int32) for _ in question.paragraphs]
            room = max_length - 3 - len(query)
            if not errors.check(question, {"question": len(query)}, room, max_length):
                continue
            found = any(len(p.spans) for p in question.paragraphs)
            if training and not found and kind_of(question.answer) == SPAN:
                dropped += 1
                continue
            for paragraph, head in zip(question.paragraphs, heads, strict=True):
                arrays["tokens"].append(np.concatenate([head, paragraph.tokens]))
                if not training:
                    no_chars = np.full((len(head), 2), -1, np.int32)
                    arrays["chars"].append(np.concatenate([no_chars, paragraph.chars]))
                arrays["sentences"].append(paragraph.sentences + len(head))
                arrays["spans"].append(paragraph.spans + len(head))
                arrays["supporting"].append(paragraph.supporting)
                gold.append(paragraph.gold)
                titles.append(paragraph.title)
                texts.append("" if training else paragraph.text)
            arrays["queries"].append(query)
            ids.append(question.id)
            kinds.append(kind_of(question.answer))
            counts.append(len(question.paragraphs))
            truncated += sum(map(len, (*heads, *(p.tokens for p in question.paragraphs)))) > room
        for name, parts in arrays.items():
            columns[name].append(Ragged.of(parts, *_COLUMNS[name]))
    errors.raise_if_any()
    joined = {name: Ragged.join(parts) for name, parts in columns.items()}
    settings = (encoder.description, max_length, max_question_length, training)
    return MultiHopParagraphs(
        **joined,
        offsets=np.cumsum(counts, dtype=np.int64),
        gold=np.array(gold, bool),
        kinds=np.array(kinds, np.int8),
        ids=ids,
        titles=titles,
        texts=texts,
        room=max_length - 3 - joined["queries"].lengths,
        cls=encoder.cls,
        sep=encoder.sep,
        counts=Counts(len(questions), len(ids), truncated, questions_cut, num_dropped=dropped),
        digest=digest_of("multi hop", *settings, list(questions)),
    )

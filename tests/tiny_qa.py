"""A small uncased WordPiece vocabulary for question answering, and texts made of it."""

from __future__ import annotations

import string

import numpy as np
from hypothesis import strategies as st

from trbert_jax.datasets.records import Span, SpanQuestion
from trbert_jax.model.tokenizers import Tokenizer, wrap_tokenizer
from trbert_jax.tasks.ragged import TokenRows
from trbert_jax.tasks.windows import Windows

LETTERS = string.ascii_lowercase + string.digits
# fmt: off
VOCABULARY = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]", "[unused2]", "[unused3]",
    *LETTERS, *("##" + c for c in LETTERS), *".,!?-()[]'",
    "who", "where", "is", "was", "the", "king", "queen", "of", "france", "paris", "in", "cafe", "born",
    "japan", "##ese", "party", "art", "東", "京", "##s",
]
# fmt: on


def qa_tokenizer(exclude: tuple[str, ...] = ()) -> Tokenizer:
    """WordPiece over `VOCABULARY`, uncased, accents stripped, as of bert-base-uncased."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    ids = {token: i for i, token in enumerate(VOCABULARY) if token not in exclude}
    backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return wrap_tokenizer(backend)


def pieces(tokens: np.ndarray) -> list[str]:
    return [VOCABULARY[t] for t in tokens]


def row(rows: TokenRows, i: int) -> str:
    """A row as one string, pieces apart."""
    return " ".join(pieces(rows.row(i)))


def types(rows: TokenRows, i: int) -> list[int]:
    return rows.token_types[rows.offsets[i] : rows.offsets[i + 1]].tolist()


def span_question(
    context: str,
    *answers: str,
    question: str = "who ?",
    id: str = "q",
    impossible: bool = False,
    spans: tuple[Span, ...] | None = None,
) -> SpanQuestion:
    """Each answer stands where the context first has it."""
    if spans is None:
        spans = tuple(Span(context.index(a), context.index(a) + len(a)) for a in answers)
    return SpanQuestion(id, question, context, spans, answers, impossible, "f.json: data[0]")


def context_chars(windows: Windows, i: int) -> np.ndarray:
    """The characters of each context token of row i, [pieces, 2]."""
    context = windows.contexts.chars_of(int(windows.context_index[windows.question[i]]))
    first = int(windows.first_piece[i])
    return context[first : first + int(windows.num_pieces[i])]


def one_hot(windows: Windows, row: int, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are 1 at one start and one end of one row, else 0."""
    logits = np.zeros((2, len(windows.rows.tokens)), np.float32)
    logits[0, windows.rows.offsets[row] + start] = logits[1, windows.rows.offsets[row] + end] = 1
    return logits[0], logits[1]


WORDS = [
    "the",
    "king",
    "Paris",
    "japanese",
    "café",
    "cafe\u0301",
    "東京",
    "🎉",
    "❤️",
    "was",
    "a-b",
    "Zürich",
    "x",
]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=30).flatmap(
    lambda words: st.lists(
        st.sampled_from([" ", "\n", "  ", "\u00a0"]), min_size=len(words), max_size=len(words)
    ).map(lambda gaps: "".join(w + g for w, g in zip(words, gaps, strict=True)))
)

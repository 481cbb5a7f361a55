"""A small uncased WordPiece vocabulary for question answering, and texts made of it."""

import string

import numpy as np
from hypothesis import strategies as st
from tiny_models import word_pieces

from trbert_jax.datasets.records import Span, SpanQuestion
from trbert_jax.model.tokenizers import Tokenizer
from trbert_jax.tasks.examples import Examples

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
    return word_pieces([f"-{token}" if token in exclude else token for token in VOCABULARY], lowercase=True)


def pieces(tokens: np.ndarray) -> list[str]:
    return [VOCABULARY[t] for t in tokens]


def row(examples: Examples, i: int) -> str:
    """A row as one string, pieces apart."""
    return " ".join(pieces(examples.row(i)))


def types(examples: Examples, i: int) -> list[int]:
    assert examples.token_types is not None
    return examples.token_types[examples.offsets[i] : examples.offsets[i + 1]].tolist()


def span_question(
    context: str,
    *answers: str,
    question: str = "who ?",
    id: str = "q",
    impossible: bool = False,
    spans: tuple[Span, ...] | None = None,
) -> SpanQuestion:
    """The span of each answer is its first place in the context."""
    if spans is None:
        spans = tuple(Span(context.index(a), context.index(a) + len(a)) for a in answers)
    return SpanQuestion(id, question, context, spans, answers, impossible, "f.json: data[0]")


def context_chars(examples: Examples, i: int) -> np.ndarray:
    """The characters of each context token of row i, [pieces, 2]."""
    windows = examples.layout
    context = windows.chars[int(windows.context_index[windows.question[i]])]
    first = int(windows.first_piece[i])
    return context[first : first + int(windows.num_pieces[i])]


def one_hot(examples: Examples, row: int, start: int, end: int) -> np.ndarray:
    """Logits [R, 2, S] that are 1 at one start and one end of one row, else 0."""
    logits = np.zeros((examples.num_rows, 2, int(examples.row_lengths.max())), np.float32)
    logits[row, 0, start] = logits[row, 1, end] = 1
    return logits


WORDS = ["the", "king", "Paris", "japanese", "café", "café", "東京", "🎉", "❤️", "was", "a-b", "Zürich", "x"]
GAPS = (" ", "\n", "  ", "\u00a0")
texts = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(GAPS)), min_size=1, max_size=30).map(
    lambda words: "".join(word + gap for word, gap in words)
)

from __future__ import annotations

import dataclasses
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from tiny_qa import VOCABULARY, pieces, qa_tokenizer, span_question, texts

from trbert_jax.datasets.records import Span
from trbert_jax.errors import UserError
from trbert_jax.tasks.encoding import TextEncoder, cut_text, locate
from trbert_jax.tasks.ragged import Counts, digest_of, join_rows

ENCODER = TextEncoder(qa_tokenizer())
MARKERS = {"[PAR]": "[unused1]", "[DOC]": "[unused3]"}


def test_pieces_and_their_characters() -> None:
    text = "The Japanese café, 東京"
    encoded = ENCODER.encode([text, "", "x"], chars=True)
    assert pieces(encoded.tokens_of(0)) == ["the", "japan", "##ese", "cafe", ",", "東", "京"]
    assert [text[a:b] for a, b in encoded.chars_of(0)] == ["The", "Japan", "ese", "café", ",", "東", "京"]
    assert encoded.offsets.tolist() == [0, 7, 7, 8]
    assert encoded.num_tokens.tolist() == [7, 0, 1]
    assert len(encoded) == 3
    kinds = [a.dtype for a in (encoded.tokens, encoded.chars, encoded.offsets, encoded.num_tokens)]
    assert kinds == [np.dtype(t) for t in (np.int32, np.int32, np.int64, np.int32)]


def test_cut_and_without_characters() -> None:
    encoded = ENCODER.encode(["a b c", "d"], max_tokens=2)
    assert pieces(encoded.tokens) == ["a", "b", "d"]
    assert encoded.num_tokens.tolist() == [3, 1]
    assert encoded.chars.shape == (0, 2)
    assert len(ENCODER.encode([])) == 0


def test_distinct_texts_are_kept_once() -> None:
    encoded, index = ENCODER.encode_distinct(["a", "b", "a", "a"])
    assert pieces(encoded.tokens) == ["a", "b"]
    assert index.tolist() == [0, 1, 0, 0]


def test_same_tokens_as_the_tokenizer_itself() -> None:
    text = "Who was the King of France?"
    ids = qa_tokenizer()(text)["input_ids"]
    assert [2, *ENCODER.encode([text]).tokens, 3] == ids


def test_markers_are_read_as_entries_of_the_vocabulary() -> None:
    text = "[DOC] Café [PAR] [par] x[PAR]"
    encoded = TextEncoder(qa_tokenizer(), MARKERS).encode([text], chars=True)
    plain = ["[", "p", "##a", "##r", "]"]
    assert pieces(encoded.tokens) == ["[unused3]", "cafe", "[unused1]", *plain, "x", *plain]
    assert [text[a:b] for a, b in encoded.chars[:3]] == ["[DOC]", "Café", "[PAR]"]
    # The words themselves are no entries of the vocabulary, so without markers they fall apart.
    assert pieces(ENCODER.encode(["[PAR]"]).tokens) == plain


def test_a_marker_that_the_vocabulary_has_nothing_for() -> None:
    encoder = TextEncoder(qa_tokenizer(exclude=("[unused1]",)), MARKERS)
    assert len(encoder.encode(["no marker"]).tokens)
    with pytest.raises(UserError, match=r"holds \[PAR\], which is read as \[unused1\]"):
        encoder.encode(["a [PAR] b"])
    with pytest.raises(UserError, match=r"vocabulary has no \[unused1\]"):
        encoder.id_of("[unused1]")
    assert ENCODER.id_of("[unused2]") == VOCABULARY.index("[unused2]")


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0, 3, (0, 0)),
        (4, 9, (1, 1)),
        (4, 12, (1, 2)),
        (5, 6, (1, 1)),  # inside a piece: the whole piece
        (8, 10, (1, 2)),  # a part of either
        (3, 4, None),  # a space
        (0, 13, (0, 3)),
        (12, 13, (3, 3)),
    ],
)
def test_locate(start: int, end: int, expected: tuple[int, int] | None) -> None:
    encoded = ENCODER.encode(["the japanese."], chars=True)
    assert locate(encoded.chars, start, end) == expected


def test_an_accent_that_is_a_character_of_its_own_stays_with_its_letter() -> None:
    text = "cafe\u0301 x"
    encoded = ENCODER.encode([text], chars=True)
    assert encoded.chars.tolist() == [[0, 4], [6, 7]]
    assert cut_text(text, 0, 4) == "cafe\u0301"
    assert cut_text(text, 6, 7) == "x"
    assert cut_text("❤️ y", 0, 1) == "❤️"  # two characters, the second says how to draw the first


@settings(deadline=None)
@given(texts)
def test_every_piece_spells_its_characters(text: str) -> None:
    encoded = ENCODER.encode([text], chars=True)
    for piece, (start, end) in zip(pieces(encoded.tokens), encoded.chars, strict=True):
        if piece != "[UNK]":
            letters = unicodedata.normalize("NFD", text[start:end].lower())
            bare = "".join(c for c in letters if unicodedata.category(c) != "Mn")
            assert bare == piece.removeprefix("##")
    assert (encoded.chars[:-1, 1] <= encoded.chars[1:, 0]).all()


def test_rows_of_two_parts() -> None:
    a, b = np.array([1, 2], np.int32), np.array([3], np.int32)
    rows = join_rows([((a, b), (b,)), ((b,), ()), ((b,), (a, a))])
    assert [rows.row(i).tolist() for i in range(3)] == [[1, 2, 3, 3], [3], [3, 1, 2, 1, 2]]
    assert rows.token_types.tolist() == [0, 0, 0, 1, 0, 0, 1, 1, 1, 1]
    assert rows.lengths.tolist() == [4, 1, 5]
    assert [rows.tokens.dtype, rows.token_types.dtype] == [np.dtype(np.int32), np.dtype(np.int8)]
    assert len(join_rows([])) == 0


def test_counts_in_words() -> None:
    assert Counts(3, 5).describe() == "3 questions, 5 inputs"
    assert Counts(3, 5, num_dropped=1).describe() == (
        "3 questions, 5 inputs; 1 questions left out, their answer cannot be found in the tokens"
    )


def test_digest() -> None:
    question = span_question("a b", "a")
    different = [
        ("ab", "c"),
        ("a", "bc"),
        (("ab", "c"),),
        (1,),
        ("1",),
        (1.0,),
        (True,),
        (None,),
        (np.array([1], np.int32),),
        (np.array([1], np.int64),),
        (np.array([[1]], np.int64),),
        (question,),
        (dataclasses.replace(question, spans=(Span(2, 3),)),),
        (dataclasses.replace(question, answers=("A",)),),
        (dataclasses.replace(question, impossible=True),),
    ]
    assert len({digest_of(*values) for values in different}) == len(different)
    assert digest_of(question) == digest_of(dataclasses.replace(question, where="elsewhere"))
    assert digest_of([1, "x"]) == digest_of((1, "x"))
    with pytest.raises(TypeError, match="set has no digest"):
        digest_of({1})

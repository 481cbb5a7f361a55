import random
import unicodedata

import pytest
from hypothesis import given, settings
from tiny_qa import pieces, qa_tokenizer, texts

from trbert_jax.errors import UserError
from trbert_jax.tasks.text_encoder import TextEncoder, cut_span, locate

ENCODER = TextEncoder(qa_tokenizer())
MARKERS = {"[PAR]": "[unused1]", "[DOC]": "[unused3]"}


def test_pieces_and_their_characters() -> None:
    text = "The Japanese café, 東京"
    encoded = ENCODER.encode([text, "", "x"], chars=True)
    assert pieces(encoded.tokens[0]) == ["the", "japan", "##ese", "cafe", ",", "東", "京"]
    assert [text[a:b] for a, b in encoded.chars[0]] == ["The", "Japan", "ese", "café", ",", "東", "京"]
    assert [2, *encoded.tokens[0], 3] == qa_tokenizer()(text)["input_ids"]
    cut = ENCODER.encode(["a b c", "", "d"], max_tokens=2)
    assert [pieces(tokens) for tokens in cut.tokens] == [["a", "b"], [], ["d"]]
    assert (cut.num_tokens.tolist(), cut.chars.values.shape) == ([3, 0, 1], (0, 2))


def test_a_long_text_is_read_only_as_far_as_it_is_kept() -> None:
    rng = random.Random(0)
    # No white space, words of other characters, words too long for the vocabulary, marks, added tokens.
    parts = [
        "the ",
        "japanese",
        "cafe\u0301 ",
        "\u6771",
        ", ",
        "x" * 150,
        "\n\n",
        "[SEP]",
        "[PAR] ",
        "[",
        "PAR",
    ]
    encoder = TextEncoder(qa_tokenizer(), MARKERS)
    for limit in (0, 1, 7, 40):
        texts = ["".join(rng.choices(parts, k=rng.choice((5, 300, 3000)))) for _ in range(20)]
        texts += ["the " * 20_000, "x" * 50_000, "\u6771" * 5000, " " * 9000 + "the"]
        whole, cut = encoder.encode(texts, chars=True), encoder.encode(texts, chars=True, max_tokens=limit)
        fast = encoder.encode(texts, max_tokens=limit)
        for i in range(len(texts)):
            assert fast.tokens[i].tolist() == cut.tokens[i].tolist() == whole.tokens[i][:limit].tolist()
            assert cut.chars[i].tolist() == whole.chars[i][:limit].tolist()
            assert (cut.num_tokens[i] > limit) == (whole.num_tokens[i] > limit)
        assert fast.num_tokens[20] == cut.num_tokens[20] < 1000 < whole.num_tokens[20]


def test_markers_are_read_as_vocabulary_entries() -> None:
    text = "[DOC] Café [PAR] [par] x[PAR]"
    encoded = TextEncoder(qa_tokenizer(), MARKERS).encode([text], chars=True)
    plain = ["[", "p", "##a", "##r", "]"]
    assert pieces(encoded.tokens[0]) == ["[unused3]", "cafe", "[unused1]", *plain, "x", *plain]
    assert [text[a:b] for a, b in encoded.chars[0][:3]] == ["[DOC]", "Café", "[PAR]"]
    encoder = TextEncoder(qa_tokenizer(exclude=("[unused1]",)), MARKERS)
    assert len(encoder.encode(["no marker"]).tokens[0])
    with pytest.raises(UserError, match=r"\[PAR\].*\[unused1\]"):
        encoder.encode(["a [PAR] b"])


def test_places_of_characters() -> None:
    text = "the japanese. cafe\u0301"
    chars = ENCODER.encode([text], chars=True).chars[0]
    places = {(0, 3): (0, 0), (4, 12): (1, 2), (12, 13): (3, 3), (3, 4): None}  # the last is a space
    places |= {(5, 6): (1, 1), (8, 10): (1, 2)}  # a piece that lies partly inside counts
    assert {span: locate(chars, *span) for span in places} == places
    assert text[slice(*cut_span(text, *chars[4]))] == "cafe\u0301"  # combining marks stay with their letter
    assert cut_span("❤️ y", 0, 1) == (0, 2)  # two characters, the second says how to draw the first


@settings(deadline=None)
@given(texts)
def test_every_piece_spells_its_characters(text: str) -> None:
    encoded = ENCODER.encode([text], chars=True)
    for piece, (start, end) in zip(pieces(encoded.tokens[0]), encoded.chars[0], strict=True):
        if piece != "[UNK]":
            letters = unicodedata.normalize("NFD", text[start:end].lower())
            bare = "".join(c for c in letters if unicodedata.category(c) != "Mn")
            assert bare == piece.removeprefix("##")
    assert (encoded.chars[0][:-1, 1] <= encoded.chars[0][1:, 0]).all()


def test_pairs_are_those_of_transformers() -> None:
    """Of a pair that is too long the longer text is cut first."""
    rng, tokenizer = random.Random(1), qa_tokenizer()

    def some() -> str:
        return " ".join(rng.choices(["the", "japan", "cafe", ","], k=rng.randint(1, 40)))

    texts = [(some(), some()) for _ in range(200)]
    encoder, first, second = TextEncoder(tokenizer), [a for a, _ in texts], [b for _, b in texts]
    for length in (8, 9, 20):
        expected = tokenizer(first, second, truncation=True, max_length=length, return_token_type_ids=True)
        rows = encoder.rows(texts, length)
        assert [row.tolist() for row in rows.tokens] == expected["input_ids"]
        assert rows.token_types is not None
        assert rows.token_types.tolist() == [x for row in expected["token_type_ids"] for x in row]
        assert rows.cut.tolist() == [len(tokenizer(*pair)["input_ids"]) > length for pair in texts]

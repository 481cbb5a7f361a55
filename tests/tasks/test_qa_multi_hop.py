from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_qa import VOCABULARY, pieces, qa_tokenizer, row, texts, types

from trbert_jax.datasets.records import MultiHopQuestion, Paragraph
from trbert_jax.errors import UserError
from trbert_jax.tasks.encoding import TextEncoder
from trbert_jax.tasks.multi_hop_features import MultiHopFeatures, build_multi_hop_features
from trbert_jax.tasks.paragraph_selection import (
    MAX_ANSWERS,
    MAX_SENTENCES,
    PackedQuestions,
    drawn_orders,
    file_orders,
    pack,
)
from trbert_jax.tasks.paragraphs import TokenizedQuestion, paragraph_from_pieces, tokenize_questions

TOKENIZER = qa_tokenizer()
QUESTION = MultiHopQuestion(
    id="h0",
    question="Where was the king born?",
    answer="Paris",
    paragraphs=(
        Paragraph("x_y", ("a b.", " Paris.")),
        Paragraph("King", ("The king was in Paris.", " Born in Paris, the king.", " Café.")),
        Paragraph("Paris", ("Paris is in France.",)),
    ),
    supporting=(("King", 1), ("Paris", 0)),
    where="dev.json: [0]",
)
HEAD = "[CLS] where was the king born ? [SEP]"
PARAGRAPHS = (
    "[unused1] x y [unused2] a b . paris .",
    "[unused1] king [unused2] the king was in paris . born in paris , the king . cafe .",
    "[unused1] paris [unused2] paris is in france .",
)


def build(*questions: MultiHopQuestion | TokenizedQuestion, **options: Any) -> MultiHopFeatures:
    return build_multi_hop_features(questions, TOKENIZER, **options, announce=str)


def targets(packed: PackedQuestions, i: int = 0) -> list[tuple[int, int]]:
    some = slice(packed.target_offsets[i], packed.target_offsets[i + 1])
    return list(zip(packed.starts[some].tolist(), packed.ends[some].tolist(), strict=True))


def tokenized(question: MultiHopQuestion) -> TokenizedQuestion:
    return next(tokenize_questions([question], TextEncoder(TOKENIZER)))


def answers(question: MultiHopQuestion) -> list[list[str]]:
    """What the spans of each paragraph say."""
    return [
        [p.text[p.chars[a, 0] : p.chars[b - 1, 1]] for a, b in p.spans]
        for p in tokenized(question).paragraphs
    ]


def test_paragraphs_in_file_order() -> None:
    packed = pack(features := build(QUESTION), file_orders(features))
    assert row(packed.rows, 0) == " ".join([HEAD, *PARAGRAPHS, "[SEP]"])
    assert types(packed.rows, 0) == [0] * 8 + [1] * (len(packed.rows.tokens) - 8)
    # [CLS] … [SEP] are 8, the first paragraph is 9, the second 18.
    second, third = 8 + 9, 8 + 9 + 18
    assert targets(packed) == [(second + 11, second + 11), (third + 3, third + 3)]
    assert packed.switch.tolist() == [0]
    assert packed.sentences.tolist() == [
        [8 + 4, 8 + 6],
        [8 + 7, 8 + 8],
        [second + 3, second + 8],
        [second + 9, second + 15],
        [second + 16, second + 17],
        [third + 3, third + 7],
    ]
    assert packed.sentence_labels.tolist() == [0, 0, 0, 1, 0, 1]
    assert packed.facts.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2], [2, 0]]
    assert packed.paragraphs.tolist() == [0, 1, 2]
    assert (packed.num_without_answer, features.counts.num_truncated) == (0, 0)
    kinds = [a.dtype for a in (packed.starts, packed.sentences, packed.sentence_labels, packed.facts)]
    assert kinds == [np.dtype(t) for t in (np.int32, np.int32, np.int8, np.int32)]


def test_a_full_input_is_cut() -> None:
    features = build(QUESTION, max_length=8 + 9 + 15 + 1)
    packed = pack(features, file_orders(features))
    assert row(packed.rows, 0) == f"{HEAD} {PARAGRAPHS[0]} {PARAGRAPHS[1].rsplit(' ', 3)[0]} [SEP]"
    assert packed.paragraphs.tolist() == [0, 1]  # the third would not even begin
    assert targets(packed) == [(8 + 9 + 11, 8 + 9 + 11)]
    assert packed.facts.tolist() == [[0, 0], [0, 1], [1, 0]]  # the sentence that was cut is no sentence
    assert features.counts.num_truncated == 1


@pytest.mark.parametrize(("max_length", "expected"), [(8 + 9 + 16 + 1, 3), (8 + 9 + 15 + 1, 2)])
def test_what_ends_with_the_input_is_in_it(max_length: int, expected: int) -> None:
    features = build(QUESTION, max_length=max_length)
    packed = pack(features, file_orders(features))
    assert int((packed.facts[:, 0] == 1).sum()) == expected - 1
    assert packed.sentences.max() <= max_length - 2


def test_without_room_for_an_answer() -> None:
    features = build(QUESTION, max_length=20)
    packed = pack(features, file_orders(features))
    assert targets(packed) == [(0, 0)]
    assert packed.num_without_answer == 1


@pytest.mark.parametrize(
    ("answer", "switch"), [("yes", 1), ("Yes", 1), ("no", 2), ("NO", 2), (None, -1), ("no one", 0)]
)
def test_kinds_of_answers(answer: str | None, switch: int) -> None:
    question = dataclasses.replace(QUESTION, answer=answer)
    packed = pack(features := build(question), file_orders(features))
    assert packed.switch.tolist() == [switch]
    assert targets(packed) == [(0, 0)]
    assert packed.num_without_answer == 0


def test_the_answer_is_looked_for_in_supporting_sentences_first() -> None:
    assert answers(QUESTION) == [[], ["Paris"], ["Paris"]]
    # Not there: every occurrence in their paragraphs.
    elsewhere = dataclasses.replace(QUESTION, supporting=(("King", 2), ("King", 2)))
    assert answers(elsewhere) == [[], ["Paris", "Paris"], []]
    # Not there letter by letter: whatever the case.
    assert answers(dataclasses.replace(elsewhere, answer="THE KING")) == [[], ["The king", "the king"], []]
    # No supporting sentences given: every paragraph.
    assert answers(dataclasses.replace(QUESTION, supporting=())) == [["Paris"], ["Paris", "Paris"], ["Paris"]]
    # Not in any of them: not found, though another paragraph has it.
    assert answers(dataclasses.replace(QUESTION, answer="a b")) == [[], [], []]


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("A party of art.", "art", ["art"]),
        ("Japanese", "Japan", []),  # `japan ##ese`
        ("A king. Kings", "king", ["king"]),
        ("in the Café.", "Café", ["Café"]),
        ("(1985-86)", "1985", ["1985"]),
        ("x 東京。", "東京", ["東京"]),
        ("a+b (c) a+b", "a+b (c)", ["a+b (c)"]),
    ],
)
def test_occurrences_are_whole_words(text: str, answer: str, expected: list[str]) -> None:
    question = dataclasses.replace(
        QUESTION, answer=answer, paragraphs=(Paragraph("t", (text,)),), supporting=(("t", 0),)
    )
    assert answers(question) == [expected]


def test_sentences_without_tokens_keep_their_number() -> None:
    paragraph = Paragraph("t", ("a.", "  ", " b."))
    question = dataclasses.replace(QUESTION, paragraphs=(paragraph,), supporting=(("t", 2),), answer="b")
    packed = pack(features := build(question), file_orders(features))
    assert packed.facts.tolist() == [[0, 0], [0, 2]]
    assert packed.sentence_labels.tolist() == [0, 1]


def test_withheld_supporting_sentences() -> None:
    packed = pack(features := build(dataclasses.replace(QUESTION, supporting=())), file_orders(features))
    assert set(packed.sentence_labels.tolist()) == {-1}


def test_limits() -> None:
    paragraph = Paragraph("t", ("b.",) * 100)
    question = dataclasses.replace(QUESTION, paragraphs=(paragraph,), supporting=(), answer="b")
    packed = pack(features := build(question), file_orders(features))
    assert len(packed.sentences) == MAX_SENTENCES == 80
    assert len(packed.starts) == MAX_ANSWERS == 8
    assert packed.starts.tolist() == [11 + 2 * k for k in range(8)]


def test_training_leaves_out_answers_it_cannot_find() -> None:
    lost = dataclasses.replace(QUESTION, id="h1", answer="nowhere")
    features = build(lost, QUESTION, training=True)
    assert features.ids == ["h0"]
    assert (features.counts.num_dropped, features.chars.shape) == (1, (0, 2))
    packed = pack(features, drawn_orders(features, 42, 0))
    assert len(targets(packed)) == 2
    assert build(lost, QUESTION).ids == ["h1", "h0"]
    assert len(build(lost, training=True)) == 0


def many(n: int = 8, length: int = 10) -> MultiHopQuestion:
    """Two supporting paragraphs and n others, each of which is `length` tokens with its markers."""
    words = " ".join("abcdefghij"[: length - 3])
    paragraphs = [Paragraph(VOCABULARY[8 + k], (words,)) for k in range(n + 2)]
    supporting = ((paragraphs[3].title, 0), (paragraphs[5].title, 0))
    return dataclasses.replace(QUESTION, answer="a", paragraphs=tuple(paragraphs), supporting=supporting)


def test_training_draws_paragraphs() -> None:
    # Room for 4 and a bit: the two supporting ones, two others whole, the last one cut.
    features = build(many(), max_length=8 + 45 + 1, training=True)
    assert features.room(0) == 45
    seen, last = set[int](), set[int]()
    for epoch in range(50):
        (order,) = drawn_orders(features, 42, epoch)
        assert len(set(order.tolist())) == len(order) == 5
        assert {3, 5} <= set(order[:-1].tolist())
        seen |= set(order.tolist())
        last.add(int(order[-1]))
    assert seen == set(range(10))
    assert last == seen - {3, 5}


@pytest.mark.parametrize(
    ("room", "count"), [(15, 2), (20, 2), (21, 3), (30, 3), (31, 4), (100, 10), (500, 10)]
)
def test_paragraphs_are_added_until_the_input_is_full(room: int, count: int) -> None:
    features = build(many(), max_length=8 + room + 1, training=True)
    (order,) = drawn_orders(features, 1, 0)
    assert len(order) == count
    if count == 2:  # nothing but the supporting ones, in either order
        found = {tuple(drawn_orders(features, 1, epoch)[0].tolist()) for epoch in range(20)}
        assert found == {(3, 5), (5, 3)}


def test_draws_depend_on_seed_epoch_and_question_alone() -> None:
    questions = [dataclasses.replace(many(), id=str(i)) for i in range(6)]
    features = build(*questions, max_length=54, training=True)

    def relative(orders: list[np.ndarray]) -> list[list[int]]:
        firsts = features.paragraph_offsets[:-1]
        return [(order - first).tolist() for order, first in zip(orders, firsts, strict=False)]

    first = relative(drawn_orders(features, 42, 0))
    assert relative(drawn_orders(features, 42, 0)) == first
    assert relative(drawn_orders(features, 42, 1)) != first
    assert relative(drawn_orders(features, 43, 0)) != first
    assert len({tuple(order) for order in first}) > 1
    fewer = build(*questions[:3], max_length=54, training=True)
    assert relative(drawn_orders(fewer, 42, 0)) == first[:3]


def test_pretokenized_paragraphs_become_the_same_inputs() -> None:
    source = tokenized(QUESTION)
    paragraphs = tuple(
        paragraph_from_pieces(
            TOKENIZER,
            p.title,
            pieces(p.tokens),
            sentences=[(int(a), int(b)) for a, b in p.sentences],
            supporting=p.supporting.tolist(),
            spans=[(int(a), int(b)) for a, b in p.spans],
            gold=p.gold,
        )
        for p in source.paragraphs
    )
    expected, features = build(QUESTION), build(dataclasses.replace(source, paragraphs=paragraphs))
    ours, theirs = (pack(f, file_orders(f)) for f in (features, expected))
    for field in dataclasses.fields(PackedQuestions):
        if field.name not in ("rows", "digest"):
            np.testing.assert_array_equal(getattr(ours, field.name), getattr(theirs, field.name))
    assert ours.rows.tokens.tolist() == theirs.rows.tokens.tolist()
    assert features.gold.tolist() == expected.gold.tolist() == [False, True, True]
    assert (features.chars == -1).all()


def test_words_of_pretokenized_paragraphs() -> None:
    paragraph = paragraph_from_pieces(
        TOKENIZER,
        "t",
        ["the", "japan", "##ese", ".", "king"],
        words=["The", "Japanese.", "King"],
        piece_words=[0, 1, 1, 1, -1],
    )
    assert paragraph.text == "The Japanese. King"
    assert paragraph.chars.tolist() == [[0, 3], [4, 13], [4, 13], [4, 13], [-1, -1]]
    assert paragraph.supporting.tolist() == []


def test_mistakes_in_pretokenized_paragraphs() -> None:
    with pytest.raises(UserError, match="t: the word piece '##zz' is not in the vocabulary"):
        paragraph_from_pieces(TOKENIZER, "t", ["the", "##zz"])
    for values in (
        {"words": ["a"], "piece_words": [1]},
        {"words": ["a"], "piece_words": []},
        {"spans": [(0, 2)]},
        {"spans": [(1, 0)]},
        {"sentences": [(-1, 1)]},
    ):
        with pytest.raises(ValueError, match="t: "):
            paragraph_from_pieces(TOKENIZER, "t", ["the"], **values)


@pytest.mark.parametrize(
    ("changes", "max_length", "message"),
    [
        ({}, 9, "question 'h0': question: has 6 tokens, which leaves none of 9"),
        ({"question": "\u200b"}, 99, "question 'h0': question: has no tokens"),
        ({"answer": None}, 99, "question 'h0': answer: missing; training needs one"),
    ],
)
def test_errors_name_the_question(changes: dict[str, Any], max_length: int, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build(dataclasses.replace(QUESTION, **changes), max_length=max_length, training=True)
    assert str(caught.value).startswith("dev.json: [0]: ")


def test_long_questions_are_cut_and_counted() -> None:
    features = build(QUESTION, max_question_length=3)
    packed = pack(features, file_orders(features))
    assert row(packed.rows, 0).startswith("[CLS] where was the [SEP] [unused1] x y")
    assert features.counts.num_questions_cut == 1


def test_a_vocabulary_without_markers() -> None:
    with pytest.raises(UserError, match=r"vocabulary has no \[unused1\]"):
        build_multi_hop_features([QUESTION], qa_tokenizer(("[unused1]",)), announce=str)


def test_digests() -> None:
    features = build(QUESTION)
    variants = [
        features,
        build(QUESTION, max_length=90),
        build(QUESTION, max_question_length=3),
        build(QUESTION, training=True),
        build(dataclasses.replace(QUESTION, supporting=())),
        build(tokenized(QUESTION)),
        build(tokenized(dataclasses.replace(QUESTION, answer="yes"))),
    ]
    assert len({f.digest for f in variants}) == len(variants)
    one, other = pack(features, [np.array([0, 1])]), pack(features, [np.array([1, 0])])
    assert one.digest != other.digest
    assert pack(features, [np.array([0, 1])]).digest == one.digest


@settings(deadline=None)
@given(
    st.lists(st.lists(texts, min_size=1, max_size=3), min_size=1, max_size=4), st.integers(12, 80), st.data()
)
def test_targets_and_sentences_are_what_the_paragraphs_say(
    paragraphs: list[list[str]], max_length: int, data: st.DataObject
) -> None:
    titled = tuple(Paragraph(f"t{i}", tuple(p)) for i, p in enumerate(paragraphs))
    question = dataclasses.replace(QUESTION, paragraphs=titled, supporting=(), answer="king")
    features = build(question, max_length=max_length)
    seed = data.draw(st.integers(0, 5))
    for order in (file_orders(features)[0], drawn_orders(features, seed, 0)[0]):
        packed = pack(features, [order])
        tokens = packed.rows.row(0)
        assert len(tokens) <= max_length
        assert len(tokens) == min(max_length, 9 + sum(len(paragraph(features, p)) for p in order))
        whole = np.concatenate([paragraph(features, p) for p in order])
        assert tokens[8:-1].tolist() == whole[: max_length - 9].tolist()
        for start, end in targets(packed):
            assert (start, end) == (0, 0) or pieces(tokens[start : end + 1]) == ["king"]
        for (start, end), (p, k) in zip(packed.sentences, packed.facts, strict=True):
            text = titled[p].sentences[k]
            expected = TextEncoder(TOKENIZER).encode([text]).tokens
            assert tokens[start : end + 1].tolist() == expected.tolist()


def paragraph(features: MultiHopFeatures, p: int) -> np.ndarray:
    return features.tokens[features.token_offsets[p] : features.token_offsets[p + 1]]

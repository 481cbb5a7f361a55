from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_qa import VOCABULARY, pieces, qa_tokenizer, row, texts

from trbert_jax.datasets.records import GraphParagraph, GraphQuestion, MultiHopQuestion, Paragraph, Span
from trbert_jax.errors import UserError
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.multi_hop import decode_multi_hop, drawn_orders, file_orders, pack
from trbert_jax.tasks.paragraphs import (
    MultiHopParagraphs,
    TokenizedQuestion,
    encode_paragraphs,
    question_from_graph,
    tokenize_questions,
)
from trbert_jax.tasks.text_encoder import TextEncoder

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
SECOND, THIRD = 8 + 9, 8 + 9 + 18  # where the paragraphs begin: [CLS] ... [SEP] are 8 tokens


def build(
    *questions: MultiHopQuestion | TokenizedQuestion,
    max_length: int = 1024,
    max_question_length: int = 80,
    training: bool = False,
) -> MultiHopParagraphs:
    return encode_paragraphs(questions, TOKENIZER, max_length, max_question_length, training=training)


def packed(*questions: MultiHopQuestion | TokenizedQuestion, **options: Any) -> Examples:
    paragraphs = build(*questions, **options)
    return pack(paragraphs, file_orders(paragraphs), questions)


def real(targets: np.ndarray) -> list[Any]:
    """One question's targets without the padding."""
    return [x for x in targets.tolist() if x not in (-1, [-1, -1])]


def ends(examples: Examples) -> list[tuple[int, int]]:
    return list(zip(real(examples.targets["starts"][0]), real(examples.targets["ends"][0]), strict=True))


def test_a_full_input_is_cut() -> None:
    examples = packed(QUESTION, max_length=8 + 9 + 15 + 1)
    assert row(examples, 0) == f"{HEAD} {PARAGRAPHS[0]} {PARAGRAPHS[1].rsplit(' ', 3)[0]} [SEP]"
    assert examples.layout.orders[0].tolist() == [0, 1]  # the third would not even begin
    assert ends(examples) == [(SECOND + 11, SECOND + 11)]
    assert examples.layout.facts[0].tolist() == [[0, 0], [0, 1], [1, 0]]  # the cut sentence does not count
    assert examples.num_truncated == 1
    # One token more, and the sentence ends with the input.
    whole = packed(QUESTION, max_length=8 + 9 + 16 + 1)
    assert whole.layout.facts[0].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    short = packed(QUESTION, max_length=20)
    assert short.counts is not None
    assert (ends(short), short.counts.num_without_answer) == ([(0, 0)], 1)


@pytest.mark.parametrize(
    ("answer", "kind"), [("yes", 1), ("Yes", 1), ("no", 2), ("NO", 2), (None, -1), ("no one", 0)]
)
def test_kinds_of_answers(answer: str | None, kind: int) -> None:
    question = dataclasses.replace(QUESTION, answer=answer)
    assert build(question).kinds.tolist() == [kind]
    examples = packed(question)
    assert examples.counts is not None
    assert (ends(examples), examples.counts.num_without_answer) == ([(0, 0)], 0)


def tokenized(question: MultiHopQuestion) -> TokenizedQuestion:
    return next(tokenize_questions([question], TextEncoder(TOKENIZER)))


def answers(**changes: Any) -> list[list[str]]:
    """The answers found in each paragraph."""
    paragraphs = tokenized(dataclasses.replace(QUESTION, **changes)).paragraphs
    return [[p.text[p.chars[a, 0] : p.chars[b - 1, 1]] for a, b in p.spans] for p in paragraphs]


def test_the_answer_is_searched_in_supporting_sentences_first() -> None:
    assert answers() == [[], ["Paris"], ["Paris"]]
    elsewhere = (("King", 2), ("King", 2))  # not there: every occurrence in their paragraphs
    assert answers(supporting=elsewhere) == [[], ["Paris", "Paris"], []]
    assert answers(supporting=elsewhere, answer="THE KING") == [[], ["The king", "the king"], []]
    assert answers(supporting=()) == [["Paris"], ["Paris", "Paris"], ["Paris"]]
    assert answers(answer="a b") == [[], [], []]  # in a paragraph that supports nothing


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
def test_answers_are_whole_words(text: str, answer: str, expected: list[str]) -> None:
    paragraphs = (Paragraph("t", (text,)),)
    assert answers(answer=answer, paragraphs=paragraphs, supporting=(("t", 0),)) == [expected]


def test_sentences_without_tokens_and_withheld_labels() -> None:
    paragraph = Paragraph("t", ("a.", "  ", " b."))
    question = dataclasses.replace(QUESTION, paragraphs=(paragraph,), supporting=(("t", 2),), answer="b")
    examples = packed(question)
    assert examples.layout.facts[0].tolist() == [[0, 0], [0, 2]]
    assert real(examples.targets["sentence_labels"][0]) == [0, 1]
    withheld = packed(dataclasses.replace(QUESTION, supporting=()))
    assert set(withheld.targets["sentence_labels"].ravel().tolist()) == {-1}


def test_slots_of_an_input() -> None:
    paragraph = Paragraph("t", ("b.",) * 100)
    question = dataclasses.replace(QUESTION, paragraphs=(paragraph,), supporting=(), answer="b")
    examples = packed(question)
    assert examples.targets["sentences"].shape == (1, 80, 2)
    assert len(real(examples.targets["sentences"][0])) == 80
    assert examples.targets["starts"].tolist() == [[11 + 2 * k for k in range(8)]]


def test_training_leaves_out_answers_it_cannot_find() -> None:
    lost = dataclasses.replace(QUESTION, id="h1", answer="nowhere")
    paragraphs = build(lost, QUESTION, training=True)
    assert (paragraphs.ids, paragraphs.counts.num_dropped) == (["h0"], 1)
    assert len(ends(pack(paragraphs, drawn_orders(paragraphs, 42, 0), [QUESTION]))) == 2
    assert build(lost, QUESTION).ids == ["h1", "h0"]
    assert len(build(lost, training=True)) == 0


def many(n: int = 8) -> MultiHopQuestion:
    """Two supporting paragraphs and n others, each of 10 tokens with its markers."""
    paragraphs = [Paragraph(VOCABULARY[8 + k], ("a b c d e f g",)) for k in range(n + 2)]
    supporting = ((paragraphs[3].title, 0), (paragraphs[5].title, 0))
    return dataclasses.replace(QUESTION, answer="a", paragraphs=tuple(paragraphs), supporting=supporting)


def test_training_draws_paragraphs() -> None:
    # Room for 4 and a bit: the two supporting ones, two others, and the last one cut.
    paragraphs = build(many(), max_length=8 + 45 + 1, training=True)
    seen, last = set[int](), set[int]()
    for epoch in range(50):
        (order,) = drawn_orders(paragraphs, 42, epoch)
        assert len(set(order.tolist())) == len(order) == 5
        assert {3, 5} <= set(order[:-1].tolist())
        seen |= set(order.tolist())
        last.add(int(order[-1]))
    assert seen == set(range(10))
    assert last == seen - {3, 5}


@pytest.mark.parametrize(("room", "count"), [(15, 2), (20, 2), (21, 3), (30, 3), (31, 4), (100, 10)])
def test_paragraphs_are_added_until_the_input_is_full(room: int, count: int) -> None:
    paragraphs = build(many(), max_length=8 + room + 1, training=True)
    orders = [drawn_orders(paragraphs, 1, epoch)[0].tolist() for epoch in range(20)]
    assert {len(order) for order in orders} == {count}
    if count == 2:  # nothing but the supporting ones, in either order
        assert {tuple(order) for order in orders} == {(3, 5), (5, 3)}


def test_draws_depend_on_seed_epoch_and_question_alone() -> None:
    questions = [dataclasses.replace(many(), id=str(i)) for i in range(6)]

    def relative(count: int, seed: int, epoch: int) -> list[list[int]]:
        paragraphs = build(*questions[:count], max_length=54, training=True)
        orders = drawn_orders(paragraphs, seed, epoch)
        return [(order - 10 * i).tolist() for i, order in enumerate(orders)]

    first = relative(6, 42, 0)
    assert relative(6, 42, 0) == first
    assert first not in (relative(6, 42, 1), relative(6, 43, 0))
    assert len({tuple(order) for order in first}) > 1
    assert relative(3, 42, 0) == first[:3]


def graph(*paragraphs: GraphParagraph) -> TokenizedQuestion:
    question = GraphQuestion("h0", QUESTION.question, QUESTION.answer or "", paragraphs, QUESTION.where)
    return question_from_graph(question, TOKENIZER)


def test_pretokenized_paragraphs_become_the_same_inputs() -> None:
    def ranges(pairs: np.ndarray) -> tuple[Span, ...]:
        return tuple(Span(int(a), int(b)) for a, b in pairs)

    source = tokenized(QUESTION).paragraphs
    order = (1, 2, 0)  # the gold ones first
    question = graph(
        *(
            GraphParagraph(
                source[k].title,
                tuple(pieces(source[k].tokens)),
                ranges(source[k].sentences),
                tuple(map(bool, source[k].supporting)),
                ranges(source[k].spans),
                (),
                (),
            )
            for k in order
        )
    )
    paragraphs = tuple(QUESTION.paragraphs[k] for k in order)
    ours, theirs = packed(question), packed(dataclasses.replace(QUESTION, paragraphs=paragraphs))
    assert ours.tokens.tolist() == theirs.tokens.tolist()
    for name, targets in theirs.targets.items():
        np.testing.assert_array_equal(ours.targets[name], targets)
    assert ours.layout.paragraphs.gold.tolist() == [True, True, False]
    assert (ours.layout.paragraphs.chars.values == -1).all()


def test_words_and_withheld_labels_of_pretokenized_paragraphs() -> None:
    words = ("The", "Japanese.", "King")
    wordpieces = ("the", "japan", "##ese", ".", "king")
    (paragraph,) = graph(
        GraphParagraph("t", wordpieces, (Span(0, 4),), (), (), words, (0, 1, 1, 1, -1))
    ).paragraphs
    assert paragraph.text == "The Japanese. King"
    assert paragraph.chars.tolist() == [[0, 3], [4, 13], [4, 13], [4, 13], [-1, -1]]
    assert (paragraph.supporting.tolist(), paragraph.gold) == ([-1], False)
    with pytest.raises(UserError, match=r"t: .*'##zz'"):
        graph(GraphParagraph("t", ("the", "##zz"), (), (), (), (), ()))


@pytest.mark.parametrize(
    ("changes", "max_length", "field"),
    [({}, 9, "question"), ({"question": "\u200b"}, 99, "question"), ({"answer": None}, 99, "answer")],
)
def test_unusable_questions_are_named(changes: dict[str, Any], max_length: int, field: str) -> None:
    with pytest.raises(UserError, match=rf"dev.json: \[0\]: question 'h0': {field}: "):
        build(dataclasses.replace(QUESTION, **changes), max_length=max_length, training=True)


def test_digest_follows_the_inputs() -> None:
    paragraphs = build(QUESTION)
    variants = [
        paragraphs,
        build(QUESTION, max_length=90),
        build(QUESTION, max_question_length=3),
        build(QUESTION, training=True),
        build(dataclasses.replace(QUESTION, supporting=())),
        build(tokenized(QUESTION)),
        build(tokenized(dataclasses.replace(QUESTION, answer="yes"))),
    ]
    assert len({variant.digest for variant in variants}) == len(variants)
    one, other = (pack(paragraphs, [np.array(order)], [QUESTION]) for order in ([0, 1], [1, 0]))
    assert one.digest != other.digest


@settings(deadline=None)
@given(
    st.lists(st.lists(texts, min_size=1, max_size=3), min_size=1, max_size=4),
    st.integers(12, 80),
    st.integers(0, 5),
)
def test_targets_and_sentences_are_those_of_the_paragraphs(
    sentences: list[list[str]], max_length: int, seed: int
) -> None:
    titled = tuple(Paragraph(f"t{i}", tuple(p)) for i, p in enumerate(sentences))
    question = dataclasses.replace(QUESTION, paragraphs=titled, supporting=(), answer="king")
    paragraphs = build(question, max_length=max_length)
    for order in (file_orders(paragraphs)[0], drawn_orders(paragraphs, seed, 0)[0]):
        examples = pack(paragraphs, [order], [question])
        tokens = examples.row(0)
        whole = np.concatenate([paragraphs.tokens[p] for p in order])
        assert tokens[8:-1].tolist() == whole[: max_length - 9].tolist()
        for start, end in ends(examples):
            assert (start, end) == (0, 0) or pieces(tokens[start : end + 1]) == ["king"]
        places = real(examples.targets["sentences"][0])
        for (start, end), (p, k) in zip(places, examples.layout.facts[0], strict=True):
            expected = TextEncoder(TOKENIZER).encode([titled[p].sentences[k]]).tokens[0]
            assert tokens[start : end + 1].tolist() == expected.tolist()


# Answers ---------------------------------------------------------------------------------------------

ASKED = MultiHopQuestion(
    id="h0",
    question="who ?",
    answer="King",
    paragraphs=(Paragraph("A_b", ("The King.", " Born in Paris.")), Paragraph("Café", ("a b.",))),
    supporting=(("A_b", 1),),
    where="f",
)
# [CLS] who ? [SEP] are 0 to 3; [unused1] a b [unused2] 4 to 7; the king . 8 to 10, born in paris . 11 to
# 14; [unused1] cafe [unused2] 15 to 17; a b . 18 to 20; [SEP] 21


def decode(
    examples: Examples,
    start: dict[int, float],
    end: dict[int, float],
    kind: tuple[float, float, float] = (1, 0, 0),
    max_answer_length: int = 30,
) -> dict[str, dict[str, Any]]:
    span = np.full((1, 2, len(examples.tokens)), -9, np.float32)
    for k, values in enumerate((start, end)):
        span[0, k, list(values)] = list(values.values())
    sentence = np.eye(2)[np.maximum(examples.targets["sentence_labels"], 0)]
    logits = {"span": span, "kind": np.array([kind]), "sentence": sentence}
    return decode_multi_hop(examples, logits, max_answer_length)


@pytest.mark.parametrize(("kind", "answer"), [((0, 1, 0), "yes"), ((0, 0, 1), "no"), ((1, 1, 0), "King")])
def test_an_answer_and_its_facts(kind: tuple[float, float, float], answer: str) -> None:
    found = decode(packed(ASKED), {8: 1.0, 9: 2.0}, {9: 2.0, 10: 1.0}, kind)
    assert found == {"answer": {"h0": answer}, "sp": {"h0": [["A_b", 1]]}}
    json.dumps(found)


def test_a_span_stays_in_the_text_of_its_paragraph() -> None:
    examples = packed(ASKED)
    # From one paragraph into the next; in a title; at special tokens; backwards.
    start = {14: 9.0, 5: 9.0, 0: 9.0, 21: 9.0, 4: 9.0, 7: 9.0, 12: 1.0}
    end = {18: 8.0, 6: 9.0, 0: 9.0, 21: 9.0, 16: 9.0, 4: 9.0, 13: 1.0}
    assert decode(examples, start, end)["answer"] == {"h0": "in Paris"}
    # Across sentences is within the paragraph.
    start, end = {8: 5.0}, {9: 1.0, 13: 4.0}
    assert decode(examples, start, end)["answer"] == {"h0": "The King. Born in Paris"}
    assert decode(examples, start, end, max_answer_length=5)["answer"] == {"h0": "The King"}


def test_a_cut_input_and_one_without_text() -> None:
    examples = packed(ASKED, max_length=12)  # [CLS] who ? [SEP] [unused1] a b [unused2] the king . [SEP]
    found = decode(examples, {9: 1.0, 11: 9.0}, {9: 1.0, 11: 9.0})
    assert found == {"answer": {"h0": "King"}, "sp": {"h0": []}}
    assert decode(packed(ASKED, max_length=7), {4: 1.0}, {4: 1.0})["answer"] == {"h0": ""}
    with pytest.raises(ValueError, match="training"):
        decode(packed(ASKED, training=True), {9: 1.0}, {9: 1.0})


def test_gaps_in_pretokenized_text() -> None:
    wordpieces = ("the", "[UNK]", "king", "##s")
    question = graph(GraphParagraph("t", wordpieces, (), (), (), ("The", "Kings"), (0, -1, 1, 1)))
    examples = packed(dataclasses.replace(question, question="who ?", answer="x"))
    # 4 to 6 are markers and title; the 7, a gap 8, king ##s 9 and 10.
    found = decode(examples, {7: 5.0, 9: 1.0}, {9: 5.0, 10: 1.0, 7: 0.0})
    assert found["answer"] == {"h0": "Kings"}
    assert decode(examples, {7: 5.0}, {9: 1.0, 7: 0.0})["answer"] == {"h0": "The"}


@settings(deadline=None)
@given(
    st.lists(st.lists(texts, min_size=1, max_size=2), min_size=1, max_size=3),
    st.integers(10, 60),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_the_best_of_all_spans(
    sentences: list[list[str]], max_length: int, longest: int, seed: int, ties: bool
) -> None:
    titled = tuple(Paragraph(f"t{i}", tuple(p)) for i, p in enumerate(sentences))
    question = dataclasses.replace(ASKED, paragraphs=titled, supporting=())
    paragraphs = build(question, max_length=max_length)
    order = drawn_orders(paragraphs, seed, 0)[0]
    examples = pack(paragraphs, [order], [question])
    drawn = np.random.default_rng(seed).normal(size=(1, 2, len(examples.tokens)))
    span = np.round(drawn) if ties else drawn
    best, text, place = -np.inf, "", 4  # one candidate after the other, in the order of the paragraphs
    for p in order:
        chars = paragraphs.chars[p]
        for i in range(len(chars)):
            for j in range(i, min(i + longest, len(chars))):
                inside = place + j < len(examples.tokens) - 1
                score = span[0, 0, place + i] + span[0, 1, place + j] if inside else -np.inf
                if chars[i, 0] >= 0 and score > best:
                    best, text = score, paragraphs.texts[p][chars[i, 0] : chars[j, 1]]
        place += len(chars)
    logits = {"span": span, "kind": np.array([[1, 0, 0]]), "sentence": np.zeros((1, 80, 2))}
    answer = decode_multi_hop(examples, logits, longest)["answer"]["h0"]
    assert answer.startswith(text)  # and maybe a combining mark
    assert len(answer) <= len(text) + 1

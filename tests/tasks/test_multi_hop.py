import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_qa import VOCABULARY, pieces, qa_tokenizer, texts

from trbert_jax.datasets.records import GraphParagraph, GraphQuestion, MultiHopQuestion, Paragraph
from trbert_jax.errors import UserError
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.multi_hop import decode_multi_hop, drawn_orders, file_orders, pack
from trbert_jax.tasks.paragraphs import (
    MultiHopParagraphs,
    TokenizedQuestion,
    encode_paragraphs,
    kind_of,
    question_from_graph,
    tokenize_questions,
)
from trbert_jax.tasks.text_encoder import TextEncoder

Question = MultiHopQuestion | TokenizedQuestion
TOKENIZER = qa_tokenizer()
ASKED = "Where was the king born?"  # 8 tokens with [CLS] and [SEP]
PARAGRAPHS = (
    Paragraph("x_y", ("a b.", " Paris.")),
    Paragraph("King", ("The king was in Paris.", " Born in Paris, the king.", " Café.")),
    Paragraph("Paris", ("Paris is in France.",)),
)
FACTS = (("King", 1), ("Paris", 0))
QUESTION = MultiHopQuestion("h0", ASKED, "Paris", PARAGRAPHS, FACTS, "dev.json: [0]")


def build(
    *questions: Question, max_length: int = 1024, max_question_length: int = 80, training: bool = False
) -> MultiHopParagraphs:
    return encode_paragraphs(questions, TOKENIZER, max_length, max_question_length, training=training)


def packed(*questions: Question, **options: Any) -> Examples:
    paragraphs = build(*questions, **options)
    return pack(paragraphs, file_orders(paragraphs), questions)


def real(targets: np.ndarray) -> list[Any]:
    return [x for x in targets.tolist() if x not in (-1, [-1, -1])]


def tokenized(question: MultiHopQuestion) -> TokenizedQuestion:
    return next(tokenize_questions([question], TextEncoder(TOKENIZER)))


def answers(**changes: Any) -> list[list[str]]:
    paragraphs = tokenized(dataclasses.replace(QUESTION, **changes)).paragraphs
    return [[p.text[p.chars[a, 0] : p.chars[b - 1, 1]] for a, b in p.spans] for p in paragraphs]


def test_kinds_of_answers() -> None:
    assert [kind_of(a) for a in ("no one", "Yes", "NO", None)] == [0, 1, 2, -1]


def test_the_answer_is_searched_in_supporting_sentences_first() -> None:
    assert answers() == [[], ["Paris"], ["Paris"]]
    elsewhere = (("King", 2), ("King", 2))  # not there: every occurrence in their paragraphs
    assert answers(supporting=elsewhere) == [[], ["Paris", "Paris"], []]
    assert answers(supporting=elsewhere, answer="THE KING") == [[], ["The king", "the king"], []]
    assert answers(supporting=()) == [["Paris"], ["Paris", "Paris"], ["Paris"]]
    assert answers(answer="a b") == [[], [], []]  # in a paragraph that supports nothing


def test_answers_are_whole_words() -> None:
    text = "A party of art. Japanese. A king. Kings in the Café. (1985-86) x 東京。 a+b (c) a+b"
    paragraphs = (Paragraph("t", (text,)),)
    for answer in ("art", "Japan", "king", "Café", "1985", "東京", "a+b (c)"):  # Japanese is `japan ##ese`
        expected = [] if answer == "Japan" else [answer]
        assert answers(answer=answer, paragraphs=paragraphs, supporting=(("t", 0),)) == [expected]


def test_slots_of_an_input_and_withheld_labels() -> None:
    paragraph = Paragraph("t", ("b.",) * 100)
    question = dataclasses.replace(QUESTION, paragraphs=(paragraph,), supporting=(), answer="b")
    examples = packed(question)
    assert examples.targets["sentences"].shape == (1, 80, 2)
    assert len(real(examples.targets["sentences"][0])) == 80
    assert examples.targets["starts"].tolist() == [[11 + 2 * k for k in range(8)]]
    assert (examples.targets["sentence_labels"] == -1).all()


# Ten paragraphs, each of 10 tokens with its markers, of which the numbers 3 and 5 support the answer.
TEN = tuple(Paragraph(VOCABULARY[8 + k], ("a b c d e f g",)) for k in range(10))
MANY = dataclasses.replace(
    QUESTION, answer="a", paragraphs=TEN, supporting=((TEN[3].title, 0), (TEN[5].title, 0))
)


@pytest.mark.parametrize(("room", "count"), [(15, 2), (20, 2), (21, 3), (31, 4), (45, 5), (100, 10)])
def test_paragraphs_are_drawn_until_the_input_is_full(room: int, count: int) -> None:
    """The two supporting ones always, in any order; the last of the others, which may be cut, at the end."""
    paragraphs = build(MANY, max_length=8 + room + 1, training=True)
    orders = [tuple(drawn_orders(paragraphs, 42, epoch)[0].tolist()) for epoch in range(50)]
    assert {len(set(order)) for order in orders} == {len(order) for order in orders} == {count}
    if count == 2:
        assert set(orders) == {(3, 5), (5, 3)}
    else:
        assert all({3, 5} <= set(order[:-1]) for order in orders)
        assert {order[-1] for order in orders} == set(range(10)) - {3, 5}


def test_draws_depend_on_seed_epoch_and_question_alone() -> None:
    questions = [dataclasses.replace(MANY, id=str(i)) for i in range(6)]

    def relative(count: int, seed: int, epoch: int) -> list[list[int]]:
        paragraphs = build(*questions[:count], max_length=54, training=True)
        orders = drawn_orders(paragraphs, seed, epoch)
        return [(order - 10 * i).tolist() for i, order in enumerate(orders)]

    first = relative(6, 42, 0)
    assert relative(6, 42, 0) == first
    assert first not in (relative(6, 42, 1), relative(6, 43, 0))
    assert len({tuple(order) for order in first}) > 1
    assert relative(3, 42, 0) == first[:3]


def graph(wordpieces: tuple[str, ...], words: tuple[str, ...], word_of: tuple[int, ...]) -> TokenizedQuestion:
    paragraph = GraphParagraph("t", wordpieces, (), (), (), words, word_of)
    return question_from_graph(GraphQuestion("h0", "who ?", "x", (paragraph,), "f"), TOKENIZER)


def test_unusable_questions_are_named() -> None:
    for answer, max_length, field in (("Paris", 9, "question"), (None, 99, "answer")):
        with pytest.raises(UserError, match=rf"dev.json: \[0\]: question 'h0': {field}: "):
            build(dataclasses.replace(QUESTION, answer=answer), max_length=max_length, training=True)
    with pytest.raises(UserError, match=r"t: .*'##zz'"):
        graph(("the", "##zz"), (), ())


def test_digest_follows_the_inputs() -> None:
    paragraphs = build(QUESTION)
    options: list[dict[str, Any]] = [{}, {"max_length": 90}, {"max_question_length": 3}, {"training": True}]
    questions = [
        dataclasses.replace(QUESTION, **change) for change in ({"supporting": ()}, {"answer": "yes"})
    ]
    variants: list[MultiHopParagraphs | Examples] = [build(QUESTION, **option) for option in options]
    variants += [build(question) for question in questions]
    variants += [build(tokenized(question)) for question in (QUESTION, questions[1])]
    variants += [pack(paragraphs, [np.array(order)], [QUESTION]) for order in ([0, 1], [1, 0])]
    assert len({variant.digest for variant in variants}) == len(variants)


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
        for start, end in zip(*(real(examples.targets[k][0]) for k in ("starts", "ends")), strict=True):
            assert (start, end) == (0, 0) or pieces(tokens[start : end + 1]) == ["king"]
        places = real(examples.targets["sentences"][0])
        for (start, end), (p, k) in zip(places, examples.layout.facts[0], strict=True):
            expected = TextEncoder(TOKENIZER).encode([titled[p].sentences[k]]).tokens[0]
            assert tokens[start : end + 1].tolist() == expected.tolist()


def decode(examples: Examples, span: np.ndarray, longest: int = 30) -> str:
    logits = {"span": span, "kind": np.array([[1, 0, 0]]), "sentence": np.zeros((1, 80, 2))}
    return decode_multi_hop(examples, logits, longest)["answer"]["h0"]


def test_gaps_in_pretokenized_text() -> None:
    """4 to 6 are markers and title; the 7, a piece of no word 8, king ##s 9 and 10."""
    examples = packed(graph(("the", "[UNK]", "king", "##s"), ("The", "Kings"), (0, -1, 1, 1)))
    span = np.full((1, 2, len(examples.tokens)), -9.0)
    span[0, 0, [7, 9]] = 5, 1
    span[0, 1, [7, 9, 10]] = 0, 5, 1
    assert decode(examples, span) == "Kings"
    span[0, 0, 9] = -9
    assert decode(examples, span) == "The"


@settings(deadline=None)
@given(
    st.lists(st.lists(texts, min_size=1, max_size=2), min_size=1, max_size=3),
    st.integers(7, 60),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_the_best_of_all_spans(
    sentences: list[list[str]], max_length: int, longest: int, seed: int, ties: bool
) -> None:
    titled = tuple(Paragraph(f"t{i}", tuple(p)) for i, p in enumerate(sentences))
    question = dataclasses.replace(QUESTION, question="who ?", paragraphs=titled, supporting=())
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
    answer = decode(examples, span, longest)
    assert answer.startswith(text)  # and maybe a combining mark
    assert len(answer) <= len(text) + 1

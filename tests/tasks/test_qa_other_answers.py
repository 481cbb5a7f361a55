from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_qa import qa_tokenizer, texts

from trbert_jax.datasets.records import CandidateQuestion, MultiHopQuestion, Paragraph
from trbert_jax.tasks.candidate_features import build_candidate_features
from trbert_jax.tasks.choice_answers import (
    candidate_answers,
    choose_by_pairs,
    choose_candidate,
    choose_option,
)
from trbert_jax.tasks.multi_hop_answers import decode_multi_hop
from trbert_jax.tasks.multi_hop_features import MultiHopFeatures, build_multi_hop_features
from trbert_jax.tasks.paragraph_selection import PackedQuestions, drawn_orders, file_orders, pack
from trbert_jax.tasks.paragraphs import TokenizedQuestion, paragraph_from_pieces

TOKENIZER = qa_tokenizer()


def test_pairs_of_options() -> None:
    right = [[0.1, 0.3, 0.2, 0.0], [0.5, 0.1, 0.5, 0.2], [-3.0, -1.0, -2.0, -4.0]]
    logits = np.stack([np.full(12, 9.0), np.ravel(right)], axis=1)
    assert choose_by_pairs(logits).tolist() == [1, 2, 1]  # of two equal ones the later
    # The other class has no say.
    logits[:, 0] = np.arange(12)
    assert choose_by_pairs(logits).tolist() == [1, 2, 1]


def test_one_of_four() -> None:
    assert choose_option(np.array([[0.0, 2.0, 2.0, 1.0], [3.0, 0.0, 0.0, 0.0]])).tolist() == [1, 0]


def test_one_of_the_candidates() -> None:
    questions = [
        CandidateQuestion("a", "who", ("paris", "the king"), (), 0, "f"),
        CandidateQuestion("b", "who", ("x", "y", "東京"), (), None, "f"),
    ]
    features = build_candidate_features(questions, TOKENIZER, announce=str)
    logits = np.zeros((2, 79), np.float32)
    logits[0, :3] = -2, -1, 5  # the third stands for nothing
    logits[1, 2] = 1
    chosen = choose_candidate(features, logits)
    assert chosen.tolist() == [1, 2]
    assert candidate_answers(features, chosen) == {"a": "the king", "b": "東京"}
    with pytest.raises(ValueError, match=r"expected \(2, 79\)"):
        choose_candidate(features, logits[:, :3])


@pytest.mark.parametrize("shape", [(4, 3), (3, 2), (8,)])
def test_wrong_shapes_of_choices(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="logits have the shape"):
        choose_by_pairs(np.zeros(shape))
    with pytest.raises(ValueError, match="logits have the shape"):
        choose_option(np.zeros(shape))


QUESTION = MultiHopQuestion(
    id="h0",
    question="who ?",
    answer="King",
    paragraphs=(Paragraph("A_b", ("The King.", " Born in Paris.")), Paragraph("Café", ("a b.",))),
    supporting=(("A_b", 1),),
    where="f",
)
# [CLS] who ? [SEP] are 0 to 3; [unused1] a b [unused2] 4 to 7; the king . 8 to 10, born in paris . 11 to
# 14; [unused1] cafe [unused2] 15 to 17; a b . 18 to 20; [SEP] 21


def built(
    *questions: MultiHopQuestion | TokenizedQuestion, max_length: int = 64
) -> tuple[MultiHopFeatures, PackedQuestions]:
    features = build_multi_hop_features(questions, TOKENIZER, max_length, announce=str)
    return features, pack(features, file_orders(features))


def decode(
    features: MultiHopFeatures,
    packed: PackedQuestions,
    start: dict[int, float],
    end: dict[int, float],
    switch: tuple[float, float, float] = (1, 0, 0),
    max_answer_length: int = 30,
) -> dict[str, dict[str, Any]]:
    found = np.full((2, len(packed.rows.tokens)), -9, np.float32)
    for k, values in enumerate((start, end)):
        found[k, list(values)] = list(values.values())
    sentences = np.eye(2)[np.maximum(packed.sentence_labels, 0)]
    return decode_multi_hop(
        features, packed, found[0], found[1], np.array([switch]), sentences, max_answer_length
    )


def test_a_span_and_its_facts() -> None:
    found = decode(*built(QUESTION), {8: 1.0, 9: 2.0}, {9: 2.0, 10: 1.0})
    assert found == {"answer": {"h0": "King"}, "sp": {"h0": [["A_b", 1]]}}
    json.dumps(found)


@pytest.mark.parametrize(("switch", "answer"), [((0, 1, 0), "yes"), ((0, 0, 1), "no"), ((1, 1, 0), "King")])
def test_switch(switch: tuple[float, float, float], answer: str) -> None:
    assert decode(*built(QUESTION), {9: 2.0}, {9: 2.0}, switch)["answer"] == {"h0": answer}


def test_a_span_does_not_leave_the_text_of_its_paragraph() -> None:
    features, packed = built(QUESTION)
    # From one paragraph into the next; in a title; at special tokens; backwards.
    start = {14: 9.0, 5: 9.0, 0: 9.0, 21: 9.0, 4: 9.0, 7: 9.0, 12: 1.0}
    end = {18: 8.0, 6: 9.0, 0: 9.0, 21: 9.0, 16: 9.0, 4: 9.0, 13: 1.0}
    assert decode(features, packed, start, end)["answer"] == {"h0": "in Paris"}
    # Across sentences is within the paragraph.
    assert decode(features, packed, {9: 1.0}, {13: 1.0})["answer"] == {"h0": "King. Born in Paris"}


def test_longest_answer() -> None:
    features, packed = built(QUESTION)
    start, end = {8: 5.0}, {9: 1.0, 13: 4.0}
    assert decode(features, packed, start, end)["answer"] == {"h0": "The King. Born in Paris"}
    assert decode(features, packed, start, end, max_answer_length=5)["answer"] == {"h0": "The King"}


def test_a_cut_input_and_one_without_text() -> None:
    features, packed = built(
        QUESTION, max_length=12
    )  # [CLS] who ? [SEP] [unused1] a b [unused2] the king . [SEP]
    found = decode(features, packed, {9: 1.0, 11: 9.0}, {9: 1.0, 11: 9.0})
    assert found == {"answer": {"h0": "King"}, "sp": {"h0": []}}
    features, packed = built(QUESTION, max_length=7)
    assert decode(features, packed, {4: 1.0}, {4: 1.0})["answer"] == {"h0": ""}


def test_gaps_in_pretokenized_text() -> None:
    paragraph = paragraph_from_pieces(
        TOKENIZER,
        "t",
        ["the", "[UNK]", "king", "##s"],
        words=["The", "Kings"],
        piece_words=[0, -1, 1, 1],
    )
    features, packed = built(TokenizedQuestion("h0", "who ?", "x", (paragraph,), "f"))
    # 4 to 6 are markers and title; the 7, a gap 8, king ##s 9 and 10.
    assert decode(features, packed, {7: 5.0, 9: 1.0}, {9: 5.0, 10: 1.0, 7: 0.0})["answer"] == {"h0": "Kings"}
    assert decode(features, packed, {7: 5.0}, {9: 1.0, 7: 0.0})["answer"] == {"h0": "The"}


def test_wrong_arrays() -> None:
    features, packed = built(QUESTION)
    fine = np.zeros(len(packed.rows.tokens))
    with pytest.raises(ValueError, match=r"switch_logits has the shape \(1, 2\); expected \(1, 3\)"):
        decode_multi_hop(features, packed, fine, fine, np.zeros((1, 2)), np.zeros((3, 2)))
    training = build_multi_hop_features([QUESTION], TOKENIZER, training=True, announce=str)
    with pytest.raises(ValueError, match="built for training"):
        decode_multi_hop(training, packed, fine, fine, np.zeros((1, 3)), np.zeros((3, 2)))


@settings(deadline=None)
@given(
    st.lists(st.lists(texts, min_size=1, max_size=2), min_size=1, max_size=3),
    st.integers(10, 60),
    st.integers(1, 6),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_the_best_of_all_stretches(
    paragraphs: list[list[str]], max_length: int, longest: int, seed: int, ties: bool
) -> None:
    titled = tuple(Paragraph(f"t{i}", tuple(p)) for i, p in enumerate(paragraphs))
    question = dataclasses.replace(QUESTION, paragraphs=titled, supporting=())
    features = build_multi_hop_features([question], TOKENIZER, max_length, announce=str)
    order = drawn_orders(features, seed, 0)[0]
    packed = pack(features, [order])
    drawn = np.random.default_rng(seed).normal(size=(2, len(packed.rows.tokens)))
    start, end = np.round(drawn) if ties else drawn
    best, text = -np.inf, ""
    place = 4  # one candidate after the other, where the order puts the paragraphs
    for p in order:
        first, last = features.token_offsets[p : p + 2]
        for i in range(first, last):
            for j in range(i, min(i + longest, last)):
                inside = place + j - first < len(packed.rows.tokens) - 1
                score = start[place + i - first] + end[place + j - first] if inside else -np.inf
                if features.chars[i, 0] >= 0 and score > best:
                    best = score
                    text = features.texts[p][features.chars[i, 0] : features.chars[j, 1]]
        place += last - first
    sentences = np.zeros((len(packed.sentences), 2))
    found = decode_multi_hop(features, packed, start, end, np.array([[1, 0, 0]]), sentences, longest)
    assert found["answer"]["h0"].startswith(text)  # and maybe combining marks
    assert len(found["answer"]["h0"]) <= len(text) + 1

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_qa import pieces, qa_tokenizer, row, texts, types

from trbert_jax.datasets.records import CandidateQuestion
from trbert_jax.errors import UserError
from trbert_jax.tasks.candidate_features import CandidateFeatures, build_candidate_features

TOKENIZER = qa_tokenizer()
QUERY = CandidateQuestion(
    id="WH_0",
    query="born_in king",
    candidates=("paris", "the queen of france", "東京"),
    supports=("the king was born in paris .", "x"),
    answer=0,
    where="train.json: [0]",
)
HEAD = "[CLS] born [UNK] in king [unused1] paris [unused1] the queen of france [unused1] 東 京"


def build(*questions: CandidateQuestion, **options: Any) -> CandidateFeatures:
    return build_candidate_features(questions, TOKENIZER, **options, announce=str)


def test_one_segment() -> None:
    features = build(QUERY)
    assert row(features.rows, 0) == f"{HEAD} [unused2] the king was born in paris . [unused2] x [SEP]"
    assert types(features.rows, 0) == [0] * 15 + [1] * 11
    assert features.candidate_positions[0, :4].tolist() == [5, 7, 12, -1]
    assert features.candidate_positions.shape == (1, 79)
    assert (features.candidate_positions[0, 3:] == -1).all()
    assert {pieces(features.rows.row(0))[k] for k in (5, 7, 12)} == {"[unused1]"}
    assert features.labels.tolist() == [0]
    assert features.segment_offsets.tolist() == [0, 1]
    assert features.counts.num_truncated == 0


def test_several_segments_share_their_head() -> None:
    short = dataclasses.replace(QUERY, id="WH_1", supports=("x",))
    features = build(QUERY, short, max_length=20, max_segments=3)  # 20 - 15 - 1 = 4 pieces of documents
    assert [row(features.rows, i) for i in range(4)] == [
        f"{HEAD} [unused2] the king was [SEP]",
        f"{HEAD} born in paris . [SEP]",
        f"{HEAD} [unused2] x [SEP]",
        f"{HEAD} [unused2] x [SEP]",
    ]
    assert features.segment_offsets.tolist() == [0, 3, 4]
    assert features.counts.num_truncated == 0


@pytest.mark.parametrize(
    ("options", "rows"),
    [({"max_length": 20, "max_segments": 2}, 2), ({"max_document_length": 9}, 1), ({"max_length": 25}, 1)],
)
def test_documents_that_do_not_fit_are_counted(options: dict[str, int], rows: int) -> None:
    features = build(QUERY, **options)
    assert len(features.rows) == rows
    assert features.counts.num_truncated == 1


def test_without_documents() -> None:
    features = build(dataclasses.replace(QUERY, supports=()), max_length=17)
    assert row(features.rows, 0) == f"{HEAD} [SEP]"


def test_a_query_that_leaves_no_room() -> None:
    assert len(build(QUERY, max_length=17).rows) == 1
    message = r"train.json: \[0\]: question 'WH_0': query: has with its candidates 15 tokens, .* none of 16"
    with pytest.raises(UserError, match=message):
        build(QUERY, max_length=16)


def test_too_many_candidates() -> None:
    many = dataclasses.replace(QUERY, candidates=tuple(f"x{i}" for i in range(80)))
    with pytest.raises(UserError, match="question 'WH_0': candidates: has 80 items; expected at most 79"):
        build(many)
    features = build(dataclasses.replace(many, candidates=many.candidates[:79]))
    assert (features.candidate_positions >= 0).all()


def test_an_answer_that_is_withheld() -> None:
    withheld = dataclasses.replace(QUERY, answer=None)
    assert build(withheld).labels.tolist() == [-1]
    with pytest.raises(UserError, match="question 'WH_0': answer: missing; training needs one"):
        build(withheld, training=True)


def test_a_vocabulary_without_markers() -> None:
    with pytest.raises(UserError, match=r"vocabulary has no \[unused2\]"):
        build_candidate_features([QUERY], qa_tokenizer(("[unused2]",)), announce=str)


def test_digest_follows_what_decides_the_contents() -> None:
    variants = [
        build(QUERY),
        build(QUERY, max_length=40),
        build(QUERY, max_segments=2),
        build(QUERY, max_document_length=40),
        build(dataclasses.replace(QUERY, candidates=("a", "b"))),
    ]
    assert len({features.digest for features in variants}) == len(variants)


@settings(deadline=None)
@given(st.lists(texts, min_size=1, max_size=5), st.lists(texts, max_size=3), st.integers(1, 3))
def test_segments_hold_the_documents(candidates: list[str], supports: list[str], segments: int) -> None:
    question = dataclasses.replace(QUERY, candidates=tuple(candidates), supports=tuple(supports))
    whole = build(question, max_length=10_000, max_document_length=10_000)
    head = int((whole.rows.token_types == 0).sum())
    features = build(question, max_length=head + 8, max_segments=segments)
    parts = [features.rows.row(i)[head:-1] for i in range(len(features.rows))]
    document = whole.rows.row(0)[head:-1]
    assert np.concatenate(parts).tolist() == document[: segments * 7].tolist()
    assert features.counts.num_truncated == (len(document) > segments * 7)
    for position in features.candidate_positions[0][: len(candidates)]:
        assert pieces(features.rows.row(0))[position] == "[unused1]"

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_qa import qa_tokenizer, row, span_question

from trbert_jax.datasets.records import Span, SpanQuestion
from trbert_jax.tasks.segment_features import MAX_ANSWERS, TRIVIAQA, SegmentFeatures, build_segment_features
from trbert_jax.tasks.windows import WindowSettings

TOKENIZER = qa_tokenizer()
# Room for 4 pieces beside "who ?"; two segments.
SMALL = WindowSettings(max_length=9, max_question_length=3, step=None, max_windows=2)


def build(
    *questions: SpanQuestion, settings: WindowSettings = SMALL, training: bool = False
) -> SegmentFeatures:
    return build_segment_features(questions, TOKENIZER, settings, training=training, announce=str)


def mentions(context: str, word: str) -> SpanQuestion:
    """A question whose answer is every occurrence of a word."""
    found = [i for i in range(len(context)) if context.startswith(word, i)]
    return span_question(context, word, spans=tuple(Span(i, i + len(word)) for i in found))


def targets(features: SegmentFeatures) -> list[list[tuple[int, int]]]:
    pairs = list(zip(features.starts.tolist(), features.ends.tolist(), strict=True))
    offsets = features.target_offsets.tolist()
    return [pairs[a:b] for a, b in itertools.pairwise(offsets)]


def test_published_settings() -> None:
    settings = (TRIVIAQA.max_length, TRIVIAQA.max_question_length, TRIVIAQA.step, TRIVIAQA.max_windows)
    assert settings == (1024, 55, None, 1)


def test_segments_follow_each_other() -> None:
    features = build(mentions("x b x d e x", "x"))
    assert [row(features.windows.rows, i) for i in range(2)] == [
        "[CLS] who ? [SEP] x b x d [SEP]",
        "[CLS] who ? [SEP] e x [SEP]",
    ]
    assert targets(features) == [[(4, 4), (6, 6)], [(5, 5)]]
    assert features.windows.question_rows.tolist() == [0, 2]
    assert (len(features), features.counts.num_truncated) == (1, 0)
    assert [features.starts.dtype, features.target_offsets.dtype] == [np.dtype(np.int32), np.dtype(np.int64)]


def test_what_is_behind_the_last_segment_is_cut_and_counted() -> None:
    features = build(mentions("a b c x d x e f x h", "x"))
    assert features.windows.rows.row(1).tolist()[-5:-1] == features.windows.contexts.tokens[4:8].tolist()
    assert targets(features) == [[(7, 7)], [(5, 5)]]
    assert (len(features.windows), features.counts.num_truncated) == (2, 1)


@pytest.mark.parametrize(
    ("context", "answer", "expected"),
    [
        ("a b c x y z", "x y", [[(0, 0)], [(0, 0)]]),  # across the border: in neither
        ("a b x y z", "x y", [[(6, 7)], []]),  # ends with the segment, does not reach its [SEP]
        ("a b c d x y", "x y", [[], [(4, 5)]]),  # begins with the next
    ],
)
def test_an_answer_at_the_border_of_a_segment(
    context: str, answer: str, expected: list[list[tuple[int, int]]]
) -> None:
    assert targets(build(mentions(context, answer))) == expected


def test_no_answer_in_any_segment() -> None:
    behind = mentions("a b c d e f g h x", "x")
    unknown = dataclasses.replace(behind, spans=())
    for training in (False, True):
        features = build(behind, unknown, training=training)
        assert targets(features) == [[(0, 0)]] * 4
        assert (features.counts.num_without_answer, features.counts.num_dropped) == (2, 0)


def test_training_leaves_out_what_the_tokenizer_does_not_keep() -> None:
    lost = span_question("a \u200b b", spans=(Span(2, 3),))
    assert build(lost, training=True).counts.num_dropped == 1
    assert targets(build(lost)) == [[(0, 0)]]


def test_repeated_starts_and_ends() -> None:
    spans = (Span(0, 1), Span(0, 3), Span(2, 3), Span(0, 1))
    features = build(span_question("a b c", spans=spans))
    assert targets(features) == [[(4, 4), (-1, 5), (5, -1), (-1, -1)]]


def test_the_first_64_answers() -> None:
    settings = WindowSettings(max_length=200, max_question_length=3, step=None, max_windows=1)
    features = build(mentions("x " * 100, "x"), settings=settings)
    assert targets(features)[0] == [(4 + i, 4 + i) for i in range(MAX_ANSWERS)]


def test_the_step_may_overlap() -> None:
    features = build(mentions("a b c x d", "x"), settings=dataclasses.replace(SMALL, step=1))
    assert targets(features) == [[(7, 7)], [(6, 6)]]


@settings(deadline=None)
@given(st.lists(st.sampled_from("abx"), min_size=1, max_size=30), st.integers(6, 20), st.integers(1, 4))
def test_every_mention_in_a_segment_is_a_target(letters: list[str], length: int, count: int) -> None:
    settings = WindowSettings(length, 2, None, count)
    features = build(mentions(" ".join(letters), "x"), settings=settings)
    room = length - 5
    kept = letters[: room * count]
    assert "".join(features.windows.text(i, 4 + k, 4 + k) for i, k in places(features)) == "".join(kept)
    expected = sum(letter == "x" for letter in kept)
    found = [pair for some in targets(features) for pair in some if pair != (0, 0)]
    assert len(found) == expected
    assert features.counts.num_truncated == (len(letters) > room * count)
    if not expected:
        assert targets(features) == [[(0, 0)]] * len(features.windows)


def places(features: SegmentFeatures) -> list[tuple[int, int]]:
    return [(i, k) for i, n in enumerate(features.windows.num_pieces.tolist()) for k in range(n)]

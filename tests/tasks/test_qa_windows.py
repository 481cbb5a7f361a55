from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_qa import context_chars, one_hot, qa_tokenizer, row, span_question, texts, types

from trbert_jax.datasets.records import Span, SpanQuestion
from trbert_jax.errors import UserError
from trbert_jax.tasks.span_answers import decode_spans
from trbert_jax.tasks.span_features import MRQA, SQUAD, SpanFeatures, build_span_features
from trbert_jax.tasks.windows import WindowSettings, most_context

TOKENIZER = qa_tokenizer()
# Room for 4 pieces of the context beside "who ?": windows begin at 0, 2, 4, ...
SMALL = WindowSettings(max_length=9, max_question_length=3, step=2)


def build(
    *questions: SpanQuestion, settings: WindowSettings = SMALL, said: list[str] | None = None, **options: bool
) -> SpanFeatures:
    announce = (lambda _: None) if said is None else said.append
    return build_span_features(questions, TOKENIZER, settings, announce=announce, **options)


def test_published_settings() -> None:
    assert (SQUAD.max_length, SQUAD.max_question_length, SQUAD.step) == (384, 64, 128)
    assert (MRQA.max_length, MRQA.max_question_length, MRQA.step) == (512, 40, 128)


def test_one_window() -> None:
    features = build(span_question("Paris is in France", "France", question="Where?"), settings=SQUAD)
    assert row(features.windows.rows, 0) == "[CLS] where ? [SEP] paris is in france [SEP]"
    assert types(features.windows.rows, 0) == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert (features.starts.tolist(), features.ends.tolist()) == ([7], [7])
    assert features.windows.max_context.tolist() == [False] * 4 + [True] * 4 + [False]
    assert features.windows.text(0, 4, 7) == "Paris is in France"
    assert features.windows.num_pieces.tolist() == [4]
    assert len(features) == 1
    assert [a.dtype for a in (features.starts, features.ends)] == [np.dtype(np.int32)] * 2


def test_windows_of_a_long_context() -> None:
    features = build(span_question("a b c d e f g h i", "e f"))
    windows = features.windows
    assert [row(windows.rows, i) for i in range(4)] == [
        "[CLS] who ? [SEP] a b c d [SEP]",
        "[CLS] who ? [SEP] c d e f [SEP]",
        "[CLS] who ? [SEP] e f g h [SEP]",
        "[CLS] who ? [SEP] g h i [SEP]",
    ]
    assert windows.first_piece.tolist() == [0, 2, 4, 6]
    assert windows.question_rows.tolist() == [0, 4]
    assert features.starts.tolist() == [0, 6, 4, 0]
    assert features.ends.tolist() == [0, 7, 5, 0]
    assert features.counts.num_without_answer == 2
    # c d: by 0.01 · size they are even, so the first window has them; i stands in the last one only.
    flags = [windows.max_context[windows.rows.offsets[i] + 4 :][: windows.num_pieces[i]] for i in range(4)]
    assert ["".join("x" if f else "." for f in some) for some in flags] == ["xxx.", ".xx.", ".xx.", ".xx"]


def test_a_context_that_just_fits() -> None:
    assert len(build(span_question("a b c d", "a"))) == 1
    features = build(span_question("a b c d e", "e"))
    assert [row(features.windows.rows, i) for i in range(2)] == [
        "[CLS] who ? [SEP] a b c d [SEP]",
        "[CLS] who ? [SEP] c d e [SEP]",
    ]
    assert features.starts.tolist() == [0, 6]


@pytest.mark.parametrize(
    ("answer", "starts"), [("d", [7, 5]), ("c d", [6, 4]), ("b c", [5, 0]), ("d e", [0, 5])]
)
def test_an_answer_at_the_border_of_a_window(answer: str, starts: list[int]) -> None:
    assert build(span_question("a b c d e", answer)).starts.tolist() == starts


def test_steps_leave_no_gap_where_a_window_is_short() -> None:
    settings = dataclasses.replace(SMALL, step=128)
    windows = build(span_question("a b c d e f", "a"), settings=settings).windows
    assert [row(windows.rows, i) for i in range(2)] == [
        "[CLS] who ? [SEP] a b c d [SEP]",
        "[CLS] who ? [SEP] e f [SEP]",
    ]


def test_a_long_question_is_cut_and_counted() -> None:
    said = list[str]()
    features = build(span_question("a", "a", question="who is the king"), said=said)
    assert row(features.windows.rows, 0) == "[CLS] who is the [SEP] a [SEP]"
    assert features.counts.num_questions_cut == 1
    assert said == ["1 questions, 1 inputs; 1 questions cut"]


def test_impossible_questions_point_at_cls_and_stay() -> None:
    for training in (False, True):
        features = build(
            span_question("a b c d e", impossible=True), training=training, discard_without_answer=True
        )
        assert features.starts.tolist() == features.ends.tolist() == [0, 0]
        assert (features.counts.num_without_answer, features.counts.num_discarded) == (0, 0)


NOTHING = "a b \u200b\u200b c"  # the tokenizer removes the characters between b and c


def test_training_leaves_out_what_cannot_be_found() -> None:
    lost = span_question(NOTHING, spans=(Span(4, 6),), id="lost")
    none = span_question("a b", id="none")
    fine = span_question("a b", "b", id="fine")
    said = list[str]()
    features = build(lost, none, fine, training=True, said=said)
    assert features.windows.ids == ["fine"]
    assert features.counts.num_dropped == 2
    assert "2 questions left out" in said[0]
    features = build(lost, none, fine)
    assert features.windows.ids == ["lost", "none", "fine"]
    assert features.starts.tolist() == [0, 0, 5]
    assert features.counts.num_dropped == 0


def test_training_may_discard_windows_without_the_answer() -> None:
    question = span_question("a b c d e f g h i", "e f")
    kept = build(question, training=True, discard_without_answer=True)
    assert kept.windows.first_piece.tolist() == [2, 4]
    assert kept.starts.tolist() == [6, 4]
    assert (kept.counts.num_discarded, kept.counts.num_without_answer) == (2, 0)
    # The flags are those of all windows.
    everything = build(question).windows
    window = slice(everything.rows.offsets[1], everything.rows.offsets[3])
    assert kept.windows.max_context.tolist() == everything.max_context[window].tolist()
    assert len(build(question, discard_without_answer=True)) == 4  # in evaluation all stay


def test_an_answer_that_no_window_holds() -> None:
    question = span_question("a b c d e", "a b c d e")
    assert build(question, training=True, discard_without_answer=True).counts.num_dropped == 1
    features = build(question, training=True)
    assert (features.starts.tolist(), features.counts.num_without_answer) == ([0, 0], 2)
    assert len(build(question, training=True, discard_without_answer=True)) == 0


def test_the_first_answer_counts() -> None:
    assert build(span_question("a b c", "c", "a")).starts.tolist() == [6]


@pytest.mark.parametrize(
    ("context", "answer", "text"),
    [
        ("In the Café.", "Café", "Café"),
        ("cafe\u0301 x", "cafe\u0301", "cafe\u0301"),
        ("x 東京。", "東京", "東京"),
        ("in 東京", "京", "京"),
        ("ok 🎉 ok", "🎉", "🎉"),
        ("I ❤️ it", "❤️", "❤️"),
        ("a\u202fb", "b", "b"),
        ("Japanese", "Japan", "Japan"),
        ("Zürich", "Zür", "Zür"),
    ],
)
def test_answers_of_other_scripts(context: str, answer: str, text: str) -> None:
    features = build(span_question(context, answer), settings=SQUAD)
    assert features.windows.text(0, features.starts[0], features.ends[0]) == text


def test_mrqa_markers() -> None:
    features = build(span_question("[DOC] [TLE] Paris [PAR] x", "x"), settings=MRQA)
    assert row(features.windows.rows, 0) == ("[CLS] who ? [SEP] [unused3] [unused2] paris [unused1] x [SEP]")
    assert features.starts.tolist() == [8]
    assert features.windows.text(0, 6, 8) == "Paris [PAR] x"


def test_contexts_are_stored_once() -> None:
    windows = build(*(span_question("a b", "a", id=str(i)) for i in range(3))).windows
    assert len(windows.contexts) == 1
    assert windows.context_index.tolist() == [0, 0, 0]
    assert windows.ids == ["0", "1", "2"]


def test_a_question_that_leaves_no_room() -> None:
    settings = WindowSettings(max_length=6, max_question_length=3, step=2)
    assert len(build(span_question("a", "a", question="who ?"), settings=settings)) == 1
    with pytest.raises(
        UserError, match=r"f.json: data\[0\]: question 'q7': question: has 3 tokens, which leaves none of 6"
    ):
        build(span_question("a", "a", question="who is the king", id="q7"), settings=settings)


def test_questions_and_contexts_without_tokens() -> None:
    with pytest.raises(UserError, match="question 'q': question: has no tokens"):
        build(span_question("a", question="\u200b"))
    with pytest.raises(UserError, match="question 'q': context: has no tokens"):
        build(span_question("\u200b"))


@pytest.mark.parametrize("name", ["max_question_length", "step", "max_windows"])
def test_settings_that_make_no_sense(name: str) -> None:
    values: dict[str, Any] = {"max_length": 9, "max_question_length": 3, "step": 2, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        WindowSettings(**values)


def test_digest_follows_what_decides_the_contents() -> None:
    question = span_question("a b c", "c")
    variants = [
        build(question),
        build(question, training=True),
        build(question, training=True, discard_without_answer=True),
        build(question, settings=dataclasses.replace(SMALL, step=1)),
        build(dataclasses.replace(question, id="r")),
        build_span_features([question], qa_tokenizer(("##s",)), SMALL, announce=str),
    ]
    assert len({features.digest for features in variants}) == len(variants)
    assert build(question).digest == variants[0].digest


def test_no_questions() -> None:
    features = build()
    assert (len(features), features.windows.question_rows.tolist()) == (0, [0])


@st.composite
def questions(draw: st.DrawFn) -> tuple[SpanQuestion, WindowSettings]:
    """An answer that is whole pieces, and windows of any size."""
    context = draw(texts)
    chars = build(span_question(context), settings=SQUAD).windows.contexts.chars
    first = draw(st.integers(0, len(chars) - 1))
    last = draw(st.integers(first, min(first + 5, len(chars) - 1)))
    span = Span(int(chars[first, 0]), int(chars[last, 1]))
    step = draw(st.one_of(st.none(), st.integers(1, 12)))
    settings = WindowSettings(draw(st.integers(6, 40)), 2, step)
    return span_question(context, context[span.start : span.end], spans=(span,)), settings


@settings(deadline=None)
@given(questions())
def test_windows_cover_the_context_and_keep_the_text(example: tuple[SpanQuestion, WindowSettings]) -> None:
    question, settings = example
    features = build(question, settings=settings)
    windows = features.windows
    assert windows.rows.lengths.max() <= settings.max_length
    covered, owned = set[int](), list[int]()
    for i in range(len(windows)):
        first, count = int(windows.first_piece[i]), int(windows.num_pieces[i])
        begin = int(windows.rows.offsets[i] + windows.context_start[i])
        assert windows.rows.tokens[begin : begin + count].tolist() == (
            windows.contexts.tokens[first : first + count].tolist()
        )
        covered |= set(range(first, first + count))
        owned += (first + np.flatnonzero(windows.max_context[begin : begin + count])).tolist()
        for k, (start, end) in enumerate(context_chars(windows, i)):
            place = int(windows.context_start[i]) + k
            assert windows.text(i, place, place).startswith(question.context[start:end])
    assert covered == set(range(len(windows.contexts.tokens)))
    assert sorted(owned) == sorted(covered)  # every piece has most context in exactly one window


@settings(deadline=None)
@given(questions())
def test_targets_are_the_answer_wherever_it_fits(example: tuple[SpanQuestion, WindowSettings]) -> None:
    question, settings = example
    features = build(question, settings=settings)
    windows, span = features.windows, question.spans[0]
    for i in range(len(windows)):
        chars = context_chars(windows, i)
        begins, ends = np.flatnonzero(chars[:, 0] == span.start), np.flatnonzero(chars[:, 1] == span.end)
        fits = len(begins) and len(ends)
        assert bool(fits) == (features.starts[i] > 0)
        if fits:
            text = windows.text(i, features.starts[i], features.ends[i])
            assert text.startswith(question.answers[0])  # and maybe combining marks


@settings(deadline=None)
@given(questions())
def test_one_hot_logits_give_the_answer_back(example: tuple[SpanQuestion, WindowSettings]) -> None:
    question, settings = example
    features = build(question, settings=settings)
    windows = features.windows
    flags = windows.max_context[windows.rows.offsets[:-1] + features.starts] & (features.starts > 0)
    assume(flags.any())
    i = int(np.flatnonzero(flags)[0])
    start, end = one_hot(windows, i, features.starts[i], features.ends[i])
    for threshold in (None, 0.0):
        found = decode_spans(windows, start, end, threshold)
        assert found.answers["q"] == windows.text(i, features.starts[i], features.ends[i])


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 12))
def test_most_context_is_the_published_rule(steps: list[int], size: int) -> None:
    starts = np.cumsum([0, *(min(step, size) for step in steps)])
    sizes = np.full(len(starts), size)
    sizes[-1] = max(1, size - 2)

    def published(piece: int) -> int:
        best, owner = -np.inf, -1
        for k, (start, length) in enumerate(zip(starts, sizes, strict=True)):
            if start <= piece < start + length:
                score = min(piece - start, start + length - 1 - piece) + 0.01 * length
                if score > best:
                    best, owner = score, k
        return owner

    flags = most_context(starts, sizes)
    for piece in range(flags.shape[1]):
        owner = published(piece)
        if owner >= 0:
            assert np.flatnonzero(flags[:, piece]).tolist() == [owner]

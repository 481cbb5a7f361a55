from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_qa import context_chars, one_hot, qa_tokenizer, span_question, texts

from trbert_jax.datasets.records import Span, SpanQuestion
from trbert_jax.errors import UserError
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.spans import SQUAD, decode_spans, encode_windows
from trbert_jax.tasks.windows import WindowSettings, most_context

TOKENIZER = qa_tokenizer()
# Room for 4 pieces of the context beside "who ?": windows begin at 0, 2, 4, ...
SMALL = WindowSettings(max_length=9, max_question_length=3, step=2)


def build(*questions: SpanQuestion, settings: WindowSettings = SMALL, **options: bool) -> Examples:
    return encode_windows(questions, TOKENIZER, settings, **options)


def starts(examples: Examples) -> list[int]:
    return examples.row_targets["starts"][:, 0].tolist()


def test_training_leaves_out_answers_that_cannot_be_found() -> None:
    # The tokenizer removes the characters between b and c.
    lost = span_question("a b \u200b\u200b c", spans=(Span(4, 6),), id="lost")
    none, fine = span_question("a b", id="none"), span_question("a b", "b", id="fine")
    assert build(lost, none, fine, training=True).ids == ["fine"]
    examples = build(lost, none, fine)
    assert (examples.ids, starts(examples)) == (["lost", "none", "fine"], [0, 0, 5])


@pytest.mark.parametrize(
    ("context", "answer"),
    [
        ("In the Café.", "Café"),
        ("cafe\u0301 x", "cafe\u0301"),
        ("x 東京。", "東京"),
        ("in 東京", "京"),
        ("ok 🎉 ok", "🎉"),
        ("I ❤️ it", "❤️"),
        ("a\u202fb", "b"),
        ("Japanese", "Japan"),
        ("Zürich", "Zür"),
    ],
)
def test_answers_of_other_scripts(context: str, answer: str) -> None:
    examples = build(span_question(context, answer), settings=SQUAD)
    (start,), (end,) = examples.row_targets["starts"][0], examples.row_targets["ends"][0]
    assert examples.layout.text(0, start, end) == answer


def test_unusable_questions_are_named() -> None:
    for question, max_length, match in (
        (span_question("a", question="who is the king"), 6, "question: .*none of 6"),
        (span_question("a", question="\u200b"), 9, "question: has no tokens"),
        (span_question("\u200b"), 9, "context: has no tokens"),
    ):
        with pytest.raises(UserError, match=rf"f.json: data\[0\]: question 'q': {match}"):
            build(question, settings=dataclasses.replace(SMALL, max_length=max_length))


def test_digest_follows_the_inputs() -> None:
    question = span_question("a b c", "c")
    variants = [
        build(question),
        build(question, training=True),
        build(question, training=True, discard=True),
        build(question, settings=dataclasses.replace(SMALL, step=1)),
        build(dataclasses.replace(question, id="r")),
        encode_windows([question], qa_tokenizer(("##s",)), SMALL),
    ]
    assert len({examples.digest for examples in variants}) == len(variants)
    assert build(question).digest == variants[0].digest


@st.composite
def questions(draw: st.DrawFn) -> tuple[SpanQuestion, WindowSettings]:
    """An answer of whole pieces, and windows of any size."""
    context = draw(texts)
    chars = build(span_question(context), settings=SQUAD).layout.chars.values
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
    examples = build(question, settings=settings)
    whole = build(question, settings=dataclasses.replace(SQUAD, max_length=10_000)).row(0)[4:-1].tolist()
    windows, covered, owned = examples.layout, set[int](), list[int]()
    assert examples.lengths.max() <= settings.max_length
    for i in range(len(windows)):
        first, count, begin = (
            int(a[i]) for a in (windows.first_piece, windows.num_pieces, windows.context_start)
        )
        assert examples.row(i)[begin : begin + count].tolist() == whole[first : first + count]
        covered |= set(range(first, first + count))
        flags = windows.max_context[examples.offsets[i] + begin :][:count]
        owned += (first + np.flatnonzero(flags)).tolist()
        for k, (start, end) in enumerate(context_chars(examples, i)):
            assert windows.text(i, begin + k, begin + k).startswith(question.context[start:end])
    assert covered == set(range(len(whole)))
    assert sorted(owned) == sorted(covered)  # every piece has most context in exactly one window


@settings(deadline=None)
@given(questions())
def test_targets_are_the_answer_where_it_fits(example: tuple[SpanQuestion, WindowSettings]) -> None:
    question, settings = example
    examples = build(question, settings=settings)
    span, ends = question.spans[0], examples.row_targets["ends"][:, 0]
    for i, start in enumerate(starts(examples)):
        chars = context_chars(examples, i)
        fits = (chars[:, 0] == span.start).any() and (chars[:, 1] == span.end).any()
        assert fits == (start > 0)
        if fits:  # the text may have combining marks besides
            assert examples.layout.text(i, start, ends[i]).startswith(question.answers[0])


@settings(deadline=None)
@given(questions())
def test_sure_logits_give_the_answer_back(example: tuple[SpanQuestion, WindowSettings]) -> None:
    question, settings = example
    examples = build(question, settings=settings)
    first = np.array(starts(examples))
    flags = examples.layout.max_context[examples.offsets[:-1] + first] & (first > 0)
    assume(flags.any())
    i = int(np.flatnonzero(flags)[0])
    start, end = first[i], examples.row_targets["ends"][i, 0]
    n_best, _ = decode_spans(examples, one_hot(examples, i, start, end))
    assert n_best["q"][0]["text"] == examples.layout.text(i, start, end)


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 12))
def test_most_context_is_the_published_rule(steps: list[int], size: int) -> None:
    starts = np.cumsum([0, *(min(step, size) for step in steps)])
    sizes = np.full(len(starts), size)
    sizes[-1] = max(1, size - 2)
    flags = most_context(starts, sizes)
    for piece in range(flags.shape[1]):
        best, owner = -np.inf, -1
        for k, (start, length) in enumerate(zip(starts, sizes, strict=True)):
            if start <= piece < start + length:
                score = min(piece - start, start + length - 1 - piece) + 0.01 * length
                if score > best:
                    best, owner = score, k
        if owner >= 0:
            assert np.flatnonzero(flags[:, piece]).tolist() == [owner]

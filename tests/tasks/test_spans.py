from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_qa import one_hot, qa_tokenizer, row, span_question, texts

from trbert_jax.datasets.records import Span, SpanQuestion
from trbert_jax.model.config import InputConfig
from trbert_jax.tasks import windows as windows_module
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.spans import (
    MAX_ANSWERS,
    SQUAD,
    SpanTask,
    choose_texts,
    decode_segments,
    decode_spans,
    encode_segments,
    encode_windows,
)
from trbert_jax.tasks.windows import WindowSettings, best_pairs

TOKENIZER = qa_tokenizer()
SMALL = WindowSettings(max_length=9, max_question_length=3, step=2)  # room for 4 pieces beside "who ?"
SEGMENTS = WindowSettings(max_length=9, max_question_length=3, step=None, max_windows=2)


def build(*questions: SpanQuestion, settings: WindowSettings = SQUAD) -> Examples:
    return encode_windows(questions, TOKENIZER, settings)


def logits(examples: Examples, **values: dict[tuple[int, int], float]) -> np.ndarray:
    """-9 everywhere but at the rows and tokens given."""
    found = np.full((examples.num_rows, 2, int(examples.row_lengths.max())), -9, np.float32)
    for k, name in enumerate(("start", "end")):
        for (i, place), value in values[name].items():
            found[i, k, place] = value
    return found


def test_the_best_threshold_is_searched_among_all_answers() -> None:
    """It may lie above the present one, whose "" hides what the model would have answered."""
    questions = [span_question("king.", "king", id="a"), span_question("queen.", impossible=True, id="b")]
    examples = build(*questions)
    # The null odds of a are 0.4, those of b 2.
    values = logits(examples, start={(0, 0): 2.4, (1, 0): 4}, end={(0, 0): 0, (1, 0): 0})
    values[:, :, 4:6] = 1
    task = SpanTask(InputConfig(data="squad", unanswerable=True), 384)
    for threshold, exact in ((None, 50), (1.0, 100)):
        score = task.score(examples, values, threshold)
        assert (score.metrics["exact"], score.metrics["best_exact"]) == (exact, 100)
        assert score.null_threshold == pytest.approx(0.4, abs=1e-6)
    assert score.files["predictions.json"]["b"] == ""


def published(
    examples: Examples, logits: np.ndarray, n_best: int, longest: int, threshold: float | None
) -> tuple[dict[str, str], dict[str, Any], dict[str, float]]:
    """The published procedure, one step at a time."""
    windows = examples.layout
    answers, lists, odds = {}, {}, {}
    for q, question in enumerate(windows.ids):
        found, null = list[tuple[str, float, float]](), (math.inf, math.inf)
        for r in range(windows.question_rows[q], windows.question_rows[q + 1]):
            s, e = (part[: examples.row_lengths[r]].astype(np.float64) for part in logits[r])
            if s[0] + e[0] < sum(null):
                null = (float(s[0]), float(e[0]))
            best_starts, best_ends = (np.argsort(-x, kind="stable")[:n_best] for x in (s, e))
            first, count = windows.context_start[r], windows.num_pieces[r]
            for i in best_starts:
                for j in best_ends:
                    inside = first <= i <= j < first + count and j - i < longest
                    if inside and windows.max_context[examples.offsets[r] + i]:
                        found.append((windows.text(r, i, j), s[i], e[j]))
        if threshold is not None:
            found.append(("", *null))
        found.sort(key=lambda f: f[1] + f[2], reverse=True)
        entries = list[tuple[str, float, float]]()
        for entry in found:
            if len(entries) < n_best and entry[0] not in [text for text, _, _ in entries]:
                entries.append(entry)
        if threshold is not None and "" not in [text for text, _, _ in entries]:
            entries.append(("", *null))
        if not [text for text, _, _ in entries if text]:
            entries.insert(0, ("empty", 0.0, 0.0))
        scores = [math.exp(s + e) for _, s, e in entries]
        lists[question] = [
            {"text": t, "probability": p / sum(scores), "start_logit": s, "end_logit": e}
            for (t, s, e), p in zip(entries, scores, strict=True)
        ]
        best = next(entry for entry in entries if entry[0])
        answers[question] = best[0]
        if threshold is not None:
            odds[question] = sum(null) - best[1] - best[2]
            answers[question] = "" if odds[question] > threshold else best[0]
    return answers, lists, odds


@settings(deadline=None)
@given(
    st.lists(texts, min_size=1, max_size=4),
    st.integers(6, 24),
    st.integers(1, 6),
    st.integers(1, 25),
    st.integers(1, 8),
    st.sampled_from([None, 0.0, 0.7]),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_like_the_published_procedure(
    contexts: list[str],
    max_length: int,
    step: int,
    n_best: int,
    longest: int,
    threshold: float | None,
    seed: int,
    ties: bool,
) -> None:
    questions = [span_question(context, id=str(i)) for i, context in enumerate(contexts)]
    examples = build(*questions, settings=WindowSettings(max_length, 2, step))
    drawn = np.random.default_rng(seed).normal(size=(examples.num_rows, 2, max_length)).astype(np.float32)
    values = np.round(drawn) if ties else drawn
    lists, odds = decode_spans(examples, values, threshold is not None, n_best, longest)
    answers, expected_lists, expected_odds = published(examples, values, n_best, longest, threshold)
    assert choose_texts(lists, odds, threshold or 0.0) == answers
    assert odds == pytest.approx(expected_odds)
    for entries, expected in zip(lists.values(), expected_lists.values(), strict=True):
        assert [e["text"] for e in entries] == [e["text"] for e in expected]
        for name in ("probability", "start_logit", "end_logit"):
            assert [e[name] for e in entries] == pytest.approx([e[name] for e in expected])


def test_chunks_of_windows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = build(*(span_question("a b c d e f g h i", id=str(i)) for i in range(5)), settings=SMALL)
    values = np.random.default_rng(0).normal(size=(examples.num_rows, 2, 9))
    whole = best_pairs(examples, values, 20, 30, True)
    monkeypatch.setattr(windows_module, "_CHUNK", 3)
    parts = best_pairs(examples, values, 20, 30, True)
    for field in dataclasses.fields(whole):
        assert getattr(whole, field.name).tolist() == getattr(parts, field.name).tolist()


# Segments --------------------------------------------------------------------------------------------


def segments(
    *questions: SpanQuestion, settings: WindowSettings = SEGMENTS, training: bool = False
) -> Examples:
    return encode_segments(questions, TOKENIZER, settings, training=training)


def mentions(context: str, word: str) -> SpanQuestion:
    """A question whose answer is every occurrence of a word."""
    found = [i for i in range(len(context)) if context.startswith(word, i)]
    return span_question(context, word, spans=tuple(Span(i, i + len(word)) for i in found))


def targets(examples: Examples) -> list[list[tuple[int, int]]]:
    """Starts and ends of each segment, without the padding."""
    ends = np.stack([examples.row_targets["starts"], examples.row_targets["ends"]], axis=-1)
    return [[(a, b) for a, b in some if (a, b) != (-1, -1)] for some in ends.tolist()]


@pytest.mark.parametrize(
    ("context", "answer", "expected"),
    [
        ("a b c x y z", "x y", [[(0, 0)], [(0, 0)]]),  # across the border: in neither
        ("a b x y z", "x y", [[(6, 7)], []]),  # ends with the segment, does not reach its [SEP]
        ("a b c d x y", "x y", [[], [(4, 5)]]),  # begins with the next
        ("a b c d e f g h x", "x", [[(0, 0)], [(0, 0)]]),  # behind the last segment
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_an_answer_at_the_border_of_a_segment(
    context: str, answer: str, expected: list[list[tuple[int, int]]], training: bool
) -> None:
    assert targets(segments(mentions(context, answer), training=training)) == expected


def test_training_leaves_out_what_the_tokenizer_does_not_keep() -> None:
    lost = span_question("a \u200b b", spans=(Span(2, 3),))
    assert len(segments(lost, training=True)) == 0
    assert targets(segments(lost)) == [[(0, 0)]]


def test_repeated_starts_and_ends_and_the_first_64_answers() -> None:
    spans = (Span(0, 1), Span(0, 3), Span(2, 3), Span(0, 1))
    assert targets(segments(span_question("a b c", spans=spans))) == [[(4, 4), (-1, 5), (5, -1)]]
    settings = WindowSettings(max_length=200, max_question_length=3, step=None, max_windows=1)
    many = segments(mentions("x " * 100, "x"), settings=settings)
    assert targets(many)[0] == [(4 + i, 4 + i) for i in range(MAX_ANSWERS)]


@settings(deadline=None)
@given(st.lists(st.sampled_from("abx"), min_size=1, max_size=30), st.integers(6, 20), st.integers(1, 4))
def test_every_mention_in_a_segment_is_a_target(letters: list[str], length: int, count: int) -> None:
    examples = segments(mentions(" ".join(letters), "x"), settings=WindowSettings(length, 2, None, count))
    kept = letters[: (length - 5) * count]
    rows = [row(examples, i).split()[4:-1] for i in range(examples.num_rows)]
    assert [letter for some in rows for letter in some] == kept
    found = [pair for some in targets(examples) for pair in some if pair != (0, 0)]
    assert len(found) == sum(letter == "x" for letter in kept)
    assert examples.num_truncated == (len(letters) > len(kept))
    if not found:
        assert targets(examples) == [[(0, 0)]] * examples.num_rows


@settings(deadline=None)
@given(st.lists(texts, min_size=1, max_size=3), st.integers(6, 20), st.data())
def test_a_segment_gives_its_answer_back(contexts: list[str], max_length: int, data: st.DataObject) -> None:
    questions = [span_question(context, id=str(i)) for i, context in enumerate(contexts)]
    examples = segments(*questions, settings=WindowSettings(max_length, 2, None, 2))
    windows = examples.layout
    i = data.draw(st.integers(0, len(windows) - 1))
    begin, count = int(windows.context_start[i]), int(windows.num_pieces[i])
    first = data.draw(st.integers(begin, begin + count - 1))
    last = data.draw(st.integers(first, begin + count - 1))
    found = decode_segments(examples, one_hot(examples, i, first, last))
    assert found[windows.ids[windows.question[i]]] == windows.text(i, first, last)


def test_the_best_of_records_that_are_scored_together() -> None:
    """The first among equals; "" where no answer is possible."""
    records = [dataclasses.replace(span_question(c, id=c), scored_as=s) for c, s in ("aq", "bq", "cz")]
    examples = segments(*records)
    for second, answer in ((2.0, "b"), (1.0, "a")):
        start = {(0, 4): 1.0, (1, 4): second, (2, 0): 9.0}
        values = logits(examples, start=start, end=start)
        assert decode_segments(examples, values, n_best=1) == {"q": answer, "z": ""}

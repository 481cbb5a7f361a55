from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_qa import one_hot, qa_tokenizer, span_question, texts

from trbert_jax.datasets.records import SpanQuestion
from trbert_jax.tasks.pairs import best_pairs
from trbert_jax.tasks.segment_features import build_segment_features
from trbert_jax.tasks.span_answers import (
    SegmentAnswers,
    SpanAnswers,
    best_of_records,
    decode_segments,
    decode_spans,
    with_null_threshold,
)
from trbert_jax.tasks.span_features import SQUAD, build_span_features
from trbert_jax.tasks.windows import Windows, WindowSettings

TOKENIZER = qa_tokenizer()
SMALL = WindowSettings(max_length=9, max_question_length=3, step=2)


def windows_of(*questions: SpanQuestion, settings: WindowSettings = SQUAD) -> Windows:
    return build_span_features(questions, TOKENIZER, settings, announce=str).windows


def logits(windows: Windows, **values: dict[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """-9 everywhere but at the tokens given."""
    found = np.full((2, len(windows.rows.tokens)), -9, np.float32)
    for k, name in enumerate(("start", "end")):
        for place, value in values[name].items():
            found[k, place] = value
    return found[0], found[1]


# [CLS] who ? [SEP] the king of france . [SEP]: the context is tokens 4 to 8.
KING = span_question("The King of France.")


def test_best_answer_and_its_probability() -> None:
    windows = windows_of(KING)
    start, end = logits(windows, start={4: 1.0, 5: 2.0}, end={5: 3.0, 7: 2.5})
    found = decode_spans(windows, start, end)
    assert found.answers == {"q": "King"}
    assert found.null_odds == {}
    entries = found.n_best["q"]
    assert [e["text"] for e in entries[:4]] == ["King", "King of France", "The King", "The King of France"]
    assert [e["start_logit"] for e in entries[:4]] == [2, 2, 1, 1]
    assert [e["end_logit"] for e in entries[:4]] == [3, 2.5, 3, 2.5]
    weights = [math.exp(e["start_logit"] + e["end_logit"]) for e in entries]
    assert [e["probability"] for e in entries] == pytest.approx([w / sum(weights) for w in weights])
    json.dumps([found.answers, found.n_best])  # what is written to a file


@pytest.mark.parametrize(
    ("null", "threshold", "answer"),
    [(4.9, 0.0, "King"), (5.0, 0.0, "King"), (5.1, 0.0, ""), (5.1, 0.2, "King"), (4.9, -0.2, "")],
)
def test_no_answer_above_the_threshold(null: float, threshold: float, answer: str) -> None:
    windows = windows_of(KING)
    start, end = logits(windows, start={5: 2.0, 0: null}, end={5: 3.0, 0: 0.0})
    found = decode_spans(windows, start, end, threshold)
    assert found.answers == {"q": answer}
    assert found.null_odds["q"] == pytest.approx(null - 5, abs=1e-6)
    assert sorted(e["text"] for e in found.n_best["q"][:2]) == ["", "King"]
    assert found.n_best["q"][0]["text"] == ("" if null > 5 else "King")
    other = with_null_threshold(found, 1e9)
    assert (other.answers, other.n_best) == ({"q": "King"}, found.n_best)


def test_the_least_null_score_of_all_windows_counts() -> None:
    windows = windows_of(span_question("a b c d e f"), settings=SMALL)
    second = int(windows.rows.offsets[1])
    start, end = logits(windows, start={0: 8.0, second: 3.0, 5: 1.0}, end={0: 8.0, second: 1.0, 5: 1.0})
    found = decode_spans(windows, start, end, 0.0)
    assert found.null_odds["q"] == pytest.approx(3.0 + 1.0 - 2.0)


def test_what_cannot_be_an_answer() -> None:
    windows = windows_of(KING)
    start, end = logits(
        windows,
        start={0: 9, 1: 9, 3: 9, 9: 9, 7: 5, 5: 1},  # [CLS], question, [SEP]s; one behind the best end
        end={0: 9, 2: 9, 3: 9, 9: 9, 6: 5},
    )
    assert decode_spans(windows, start, end).answers == {"q": "King of"}


def test_max_answer_length() -> None:
    windows = windows_of(span_question(" ".join("abcdefghij" * 5)))
    start, end = logits(windows, start={4: 5.0}, end={4 + 29: 1.0, 4 + 30: 2.0})
    assert decode_spans(windows, start, end).answers["q"] == " ".join("abcdefghij" * 3)
    assert decode_spans(windows, start, end, max_answer_length=31).answers["q"].endswith("j a")


def test_only_where_a_start_has_most_context() -> None:
    # Windows a b c d, c d e f: c belongs to the first.
    windows = windows_of(span_question("a b c d e f"), settings=SMALL)
    second = int(windows.rows.offsets[1])
    start, end = logits(windows, start={second + 4: 5.0, 6: 1.0}, end={second + 4: 5.0, 6: 1.0})
    found = decode_spans(windows, start, end)
    assert (found.n_best["q"][0]["text"], found.n_best["q"][0]["start_logit"]) == ("c", 1.0)


def test_texts_occur_once() -> None:
    windows = windows_of(span_question("x b x"))
    start, end = logits(windows, start={4: 2.0, 6: 3.0}, end={4: 2.0, 6: 3.0})
    found = decode_spans(windows, start, end).n_best["q"]
    assert [e["text"] for e in found].count("x") == 1
    assert found[0]["start_logit"] == 3.0


def test_nothing_found() -> None:
    windows = windows_of(span_question("a b"))
    start, end = logits(windows, start={0: 1.0}, end={0: 1.0})
    found = decode_spans(windows, start, end, n_best=1)
    assert found.answers == {"q": "empty"}
    assert found.n_best["q"] == [{"text": "empty", "probability": 1.0, "start_logit": 0.0, "end_logit": 0.0}]
    found = decode_spans(windows, start, end, 0.0, n_best=1)
    assert (found.answers, found.null_odds) == ({"q": ""}, {"q": 2.0})


def test_wrong_logits() -> None:
    windows = windows_of(KING)
    fine = np.zeros(len(windows.rows.tokens), np.float32)
    with pytest.raises(ValueError, match=r"end_logits has the shape \(3,\); expected \(10,\)"):
        decode_spans(windows, fine, fine[:3])
    with pytest.raises(ValueError, match="start_logits has values that are not finite"):
        decode_spans(windows, fine * np.nan, fine)


def published(
    windows: Windows, start: np.ndarray, end: np.ndarray, n_best: int, longest: int, threshold: float | None
) -> SpanAnswers:
    """The published procedure, one step at a time."""
    answers, lists, odds = {}, {}, {}
    for q, question in enumerate(windows.ids):
        found, null = list[tuple[str, float, float]](), (math.inf, math.inf)
        for r in range(windows.question_rows[q], windows.question_rows[q + 1]):
            a, b = windows.rows.offsets[r : r + 2]
            s, e = start[a:b].astype(float).tolist(), end[a:b].astype(float).tolist()
            if s[0] + e[0] < sum(null):
                null = (s[0], e[0])
            context = range(windows.context_start[r], b - a - 1)
            for i in sorted(range(b - a), key=lambda k: s[k], reverse=True)[:n_best]:
                for j in sorted(range(b - a), key=lambda k: e[k], reverse=True)[:n_best]:
                    fits = i in context and j in context and i <= j < i + longest
                    if fits and windows.max_context[a + i]:
                        found.append((windows.text(r, i, j), s[i], e[j]))
        if threshold is not None:
            found.append(("", *null))
        found.sort(key=lambda f: f[1] + f[2], reverse=True)
        entries = list[tuple[str, float, float]]()
        for entry in found:
            if len(entries) >= n_best:
                break
            if entry[0] not in [text for text, _, _ in entries]:
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
    return SpanAnswers(answers, lists, odds)


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
    windows = windows_of(*questions, settings=WindowSettings(max_length, 2, step))
    drawn = np.random.default_rng(seed).normal(size=(2, len(windows.rows.tokens))).astype(np.float32)
    start, end = np.round(drawn) if ties else drawn
    ours = decode_spans(windows, start, end, threshold, n_best, longest)
    theirs = published(windows, start, end, n_best, longest, threshold)
    assert ours.answers == theirs.answers
    assert ours.null_odds == pytest.approx(theirs.null_odds)
    for question, entries in ours.n_best.items():
        expected = theirs.n_best[question]
        assert [e["text"] for e in entries] == [e["text"] for e in expected]
        assert [e["probability"] for e in entries] == pytest.approx([e["probability"] for e in expected])


def test_chunks_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [span_question("a b c d e f g h i", id=str(i)) for i in range(5)]
    windows = windows_of(*questions, settings=SMALL)
    start, end = np.random.default_rng(0).normal(size=(2, len(windows.rows.tokens)))
    whole = best_pairs(windows, start, end, 20, 30, True)
    monkeypatch.setattr("trbert_jax.tasks.pairs._CHUNK", 3)
    parts = best_pairs(windows, start, end, 20, 30, True)
    for name in ("row", "start", "end", "start_logit", "end_logit", "question_offsets"):
        assert getattr(whole, name).tolist() == getattr(parts, name).tolist()


SEGMENTS = WindowSettings(max_length=9, max_question_length=3, step=None, max_windows=3)


def test_the_best_segment_answers() -> None:
    questions = [span_question("a b c d Café f", id="x"), span_question("g", id="y")]
    features = build_segment_features(questions, TOKENIZER, SEGMENTS, announce=str)
    second = int(features.windows.rows.offsets[1])
    start, end = logits(features.windows, start={4: 2.0, second + 4: 3.0}, end={5: 2.0, second + 5: 1.5})
    assert decode_segments(features, start, end).answers == {"x": "Café f", "y": "g"}
    end[second + 5] = 1.0
    assert decode_segments(features, start, end).answers["x"] == "a b"  # equal: the first


def test_a_segment_without_an_answer() -> None:
    features = build_segment_features([span_question("a b")], TOKENIZER, SEGMENTS, announce=str)
    start, end = logits(features.windows, start={0: 2.0}, end={0: 2.0})
    found = decode_segments(features, start, end, n_best=1)
    assert found == SegmentAnswers({"q": ""}, {"q": -np.inf})
    records = SegmentAnswers({"x": "", "y": "b", "z": "c"}, {"x": -np.inf, "y": 1.0, "z": 2.0})
    assert best_of_records(records, {"x": "q", "y": "q", "z": "q"}) == {"q": "c"}
    assert best_of_records(records, {"x": "p", "y": "q", "z": "r"}) == {"p": "", "q": "b", "r": "c"}
    tied = SegmentAnswers({"x": "a", "y": "b"}, {"x": 1.0, "y": 1.0})
    assert best_of_records(tied, {"x": "q", "y": "q"}) == {"q": "a"}


@settings(deadline=None)
@given(st.lists(texts, min_size=1, max_size=3), st.integers(6, 20), st.data())
def test_a_segment_gives_its_answer_back(contexts: list[str], max_length: int, data: st.DataObject) -> None:
    questions = [span_question(context, id=str(i)) for i, context in enumerate(contexts)]
    segments = WindowSettings(max_length, 2, None, 2)
    windows = (features := build_segment_features(questions, TOKENIZER, segments, announce=str)).windows
    row = data.draw(st.integers(0, len(windows) - 1))
    begin, count = int(windows.context_start[row]), int(windows.num_pieces[row])
    first = data.draw(st.integers(begin, begin + count - 1))
    last = data.draw(st.integers(first, begin + count - 1))
    found = decode_segments(features, *one_hot(windows, row, first, last)).answers
    assert found[windows.ids[windows.question[row]]] == windows.text(row, first, last)

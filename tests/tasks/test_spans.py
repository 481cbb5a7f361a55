import dataclasses
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_qa import context_chars, one_hot, qa_tokenizer, row, span_question, texts

from trbert_jax.datasets.records import Span, SpanQuestion
from trbert_jax.errors import UserError
from trbert_jax.model.config import InputConfig
from trbert_jax.tasks import spans as spans_module
from trbert_jax.tasks import windows as windows_module
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.spans import MAX_ANSWERS, SQUAD, SpanTask, encode_segments, encode_windows
from trbert_jax.tasks.windows import WindowSettings, best_pairs, most_context

TOKENIZER = qa_tokenizer()
# Room for 4 pieces of the context beside "who ?": windows begin at 0, 2, 4, ...; segments at 0 and 4.
SMALL = WindowSettings(max_length=9, max_question_length=3, step=2)
SEGMENTS = WindowSettings(max_length=9, max_question_length=3, step=None, max_windows=2)


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
    assert len(segments(lost, training=True)) == 0
    assert targets(segments(lost)) == [[(0, 0)]]


def test_answers_of_other_scripts() -> None:
    answers = ["Café", "cafe\u0301", "東京", "京", "🎉", "❤️", "b", "Japan", "Zür"]
    context = "In the Café. cafe\u0301 x 東京。 ok 🎉 ok I ❤️ it a\u202fb Japanese Zürich"
    for answer in answers:
        examples = build(span_question(context, answer), settings=SQUAD)
        (start,), (end,) = examples.row_targets["starts"][0], examples.row_targets["ends"][0]
        assert examples.layout.text(0, start, end) == answer


def test_unusable_questions_are_named() -> None:
    for question, match in (
        (span_question("a", question="who is the king"), "question: .*none of 6"),
        (span_question("\u200b"), "context: has no tokens"),
    ):
        with pytest.raises(UserError, match=rf"f.json: data\[0\]: question 'q': {match}"):
            build(question, settings=dataclasses.replace(SMALL, max_length=6))


def test_digest_follows_the_inputs() -> None:
    question = span_question("a b c", "c")
    variants = [build(question, training=k > 0, discard=k > 1) for k in range(3)]
    variants += [build(question, settings=dataclasses.replace(SMALL, step=1))]
    variants += [build(dataclasses.replace(question, id="r"))]
    variants += [encode_windows([question], qa_tokenizer(("##s",)), SMALL)]
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
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 12))
def test_most_context_is_the_published_rule(steps: list[int], size: int) -> None:
    starts = np.cumsum([0, *(min(step, size) for step in steps)])
    sizes = np.full(len(starts), size)
    sizes[-1] = max(1, size - 2)
    owners = most_context(starts, sizes)
    for piece in range(len(owners)):
        best, owner = -np.inf, -1
        for k, (start, length) in enumerate(zip(starts, sizes, strict=True)):
            if start <= piece < start + length:
                score = min(piece - start, start + length - 1 - piece) + 0.01 * length
                if score > best:
                    best, owner = score, k
        if owner >= 0:
            assert owners[piece] == owner


def test_the_best_threshold_is_searched_among_all_answers() -> None:
    """It may lie above the present one, whose "" hides what the model would have answered."""
    questions = [span_question("king.", "king", id="a"), span_question("queen.", impossible=True, id="b")]
    examples = build(*questions, settings=SQUAD)
    values = one_hot(examples, 0, 4, 4) + one_hot(examples, 1, 4, 4)
    values[:, 0, 0] = 2.4, 4  # the null odds of a are 0.4, those of b 2
    task = SpanTask(InputConfig(data="squad", unanswerable=True), 384)
    for threshold, exact in ((None, 50), (1.0, 100)):
        score = task.score(examples, values, threshold)
        assert (score.metrics["exact"], score.metrics["best_exact"]) == (exact, 100)
        assert score.null_threshold == pytest.approx(0.4, abs=1e-6)
    assert score.files["predictions.json"]["b"] == ""


def test_words_of_the_published_code_are_no_answers() -> None:
    """Without a possible pair nothing is the answer; the official scorer counts it as wrong, like "empty"."""
    examples = build(span_question("king.", "king"), settings=SQUAD)
    values = one_hot(examples, 0, 1, 1)
    values[0, 0, 5], values[0, 1, 4] = 9, 9  # ends before it starts
    for unanswerable in (False, True):
        found = spans_module.decode_spans(examples, values, unanswerable, n_best=1)
        assert [entry["text"] for entry in found[0]["q"]] == [""]
        assert spans_module.choose_texts(*found) == {"q": ""}


def test_answers_of_requests() -> None:
    """Score, characters, n-best and null odds; a null threshold and the longest answer can be given."""
    examples = build(span_question("the king was born", "king"), settings=SQUAD)
    values = one_hot(examples, 0, 5, 6)  # "king was"
    task = SpanTask(InputConfig(data="squad"), 384)
    answer = task.answers(examples, values, n_best=3)["q"]
    assert (answer["answer"], answer["start"], answer["end"]) == ("king was", 4, 12)
    assert len(answer["n_best"]) == 3
    assert answer["n_best"][0]["answer"] == "king was"
    assert answer["n_best"][0]["score"] == answer["score"] < 1
    task.max_answer_length = 1
    assert task.answers(examples, values)["q"]["answer"] == "king"
    for threshold, found in ((-1.5, ""), (0.0, "king")):
        task.inputs = InputConfig(data="squad", unanswerable=True, null_threshold=threshold)
        answer = task.answers(examples, values)["q"]
        assert (answer["answer"], answer["null_odds"]) == (found, -1)
        assert ("start" in answer) == bool(found)


def test_memory_grows_with_the_context_not_its_square() -> None:
    starts = np.arange(4000) * 8
    tracemalloc.start()
    owners = most_context(starts, np.full(4000, 16))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert owners[:10].tolist() == [0] * 10
    assert len(owners) == 3999 * 8 + 16
    assert peak < 4e6  # a table of windows and pieces would take 128 MB and more


def test_questions_without_answer_in_mrqa() -> None:
    """As in SQuAD 2.0: such a question needs the answer "", and a null threshold is tuned."""
    questions = [span_question("king.", "king", id="a"), span_question("queen.", impossible=True, id="b")]
    examples = build(*questions, settings=SQUAD)
    values = one_hot(examples, 0, 4, 4) + one_hot(examples, 1, 4, 4)
    values[:, 0, 0] = 0, 4
    inputs = SpanTask.complete(InputConfig(data="newsqa"), lambda: questions)
    task = SpanTask(inputs, 384)
    score = task.score(examples, values)
    assert score.metrics == {"exact_match": 100, "f1": 100}
    assert score.files["predictions.json"] == {"a": "king", "b": ""}
    assert score.null_threshold == pytest.approx(-2)
    assert SpanTask(InputConfig(data="newsqa"), 384).score(examples, values).metrics["f1"] == 50


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
        no_answer = [("", *null)] if threshold is not None else []
        entries = list[tuple[str, float, float]]()
        for entry in sorted([*found, *no_answer], key=lambda f: f[1] + f[2], reverse=True):
            if len(entries) < n_best and entry[0] not in [text for text, _, _ in entries]:
                entries.append(entry)
        if "" not in [text for text, _, _ in entries]:
            entries += no_answer
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
    st.builds(WindowSettings, st.integers(6, 24), st.just(2), st.integers(1, 6)),
    st.integers(1, 25),
    st.integers(1, 8),
    st.sampled_from([None, 0.0, 0.7]),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_like_the_published_procedure(
    contexts: list[str],
    settings: WindowSettings,
    n_best: int,
    longest: int,
    threshold: float | None,
    seed: int,
    ties: bool,
) -> None:
    questions = [span_question(context, id=str(i)) for i, context in enumerate(contexts)]
    examples = build(*questions, settings=settings)
    shape = (examples.num_rows, 2, settings.max_length)
    drawn = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    values = np.round(drawn) if ties else drawn
    lists, odds = spans_module.decode_spans(examples, values, threshold is not None, n_best, longest, "empty")
    answers, expected_lists, expected_odds = published(examples, values, n_best, longest, threshold)
    assert spans_module.choose_texts(lists, odds, threshold or 0.0) == answers
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


def segments(
    *questions: SpanQuestion, settings: WindowSettings = SEGMENTS, training: bool = False
) -> Examples:
    return encode_segments(questions, TOKENIZER, settings, training=training)


def mentions(context: str, word: str) -> SpanQuestion:
    """A question whose answer is every occurrence of a word."""
    found = [i for i in range(len(context)) if context.startswith(word, i)]
    return span_question(context, word, spans=tuple(Span(i, i + len(word)) for i in found))


def targets(examples: Examples) -> list[list[tuple[int, int]]]:
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


def test_repeated_starts_and_ends_and_the_first_64_answers() -> None:
    spans = (Span(0, 1), Span(0, 3), Span(2, 3), Span(0, 1))
    assert targets(segments(span_question("a b c", spans=spans))) == [[(4, 4), (-1, 5), (5, -1)]]
    settings = WindowSettings(200, 3, None, 1)
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


def test_the_best_of_records_that_are_scored_together() -> None:
    """The first among equals; "" where no answer is possible."""
    records = [dataclasses.replace(span_question(c, id=c), scored_as=s) for c, s in ("aq", "bq", "cz")]
    examples = segments(*records)
    values = one_hot(examples, 0, 4, 4) + one_hot(examples, 1, 4, 4) + one_hot(examples, 2, 0, 0)
    assert spans_module.decode_segments(examples, values, n_best=1) == {"q": "a", "z": ""}
    values[1] *= 2
    assert spans_module.decode_segments(examples, values, n_best=1) == {"q": "b", "z": ""}

"""Answer questions with a span of a text: SQuAD, the data sets of MRQA, and TriviaQA.

A long context is divided into windows. For SQuAD and MRQA each window is an example, and the windows of a
question are combined when it is answered. For TriviaQA the windows of a document, its segments, form one
example: they share a softmax, and every mention of the answer in them is right.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.datasets import find_dataset, reading
from trbert_jax.datasets.records import SpanQuestion
from trbert_jax.model.config import InputConfig
from trbert_jax.tasks.base import Score, Task, register_task
from trbert_jax.tasks.examples import Examples, Ragged
from trbert_jax.tasks.losses import Rows, any_of, distillation, margin
from trbert_jax.tasks.scorers import best_null_threshold, score_mrqa, score_squad, score_triviaqa
from trbert_jax.tasks.windows import Pairs, WindowBuilder, Windows, WindowSettings, best_pairs

N_BEST = 20
N_BEST_SEGMENTS = 10
MAX_ANSWER_LENGTH = 30  # word pieces
MAX_ANSWERS = 64  # of a segment in training

SQUAD = WindowSettings(max_length=384, max_question_length=64, step=128)
# MRQA marks paragraphs, titles and documents by words of their own.
MRQA = WindowSettings(
    max_length=512,
    max_question_length=40,
    step=128,
    markers=(("[PAR]", "[unused1]"), ("[TLE]", "[unused2]"), ("[DOC]", "[unused3]")),
)
TRIVIAQA = WindowSettings(max_length=1024, max_question_length=55, step=None, max_windows=1)
NBest = dict[str, list[dict[str, Any]]]  # id -> entries, see `decode_spans`
SETTINGS = {"squad": SQUAD, "mrqa": MRQA, "triviaqa": TRIVIAQA}  # by style of the data set


@register_task
class SpanTask(Task):
    """Finds the start and end of an answer; settings and scorer depend on the style of the data set."""

    name = "span"
    metric, full_score = "f1", 100.0
    settings = frozenset({"data.skip_bad_records", "model.max_question_length", "model.window_step"})
    markers = ("[unused1]", "[unused2]", "[unused3]")
    shortest_request: ClassVar[dict[str, Any]] = {"question": "a", "context": "a"}
    by_row = True

    def __init__(self, inputs: InputConfig, max_length: int, labels: Sequence[str] = ()) -> None:
        super().__init__(inputs, max_length)
        style = style_of(inputs.data)
        self.is_squad, self.is_segmented = style == "squad", style == "triviaqa"
        self.max_answer_length, self.may_answer_nothing = MAX_ANSWER_LENGTH, not self.is_segmented
        published = SETTINGS[style]
        self.windows = dataclasses.replace(
            published,
            max_length=max_length,
            max_question_length=inputs.max_question_length or published.max_question_length,
            step=inputs.window_step or published.step,
            max_windows=inputs.max_segments if self.is_segmented else None,
        )

    @classmethod
    def settings_of(cls, data: str) -> frozenset[str]:
        return cls.settings | {"model.max_segments"} if style_of(data) == "triviaqa" else cls.settings

    @classmethod
    def complete(cls, inputs: InputConfig, train: Callable[[], Sequence[SpanQuestion]]) -> InputConfig:
        # All questions of SQuAD 1.1 have an answer; some of SQuAD 2.0 have none.
        if style_of(inputs.data) == "triviaqa":
            return inputs
        return dataclasses.replace(inputs, unanswerable=any(record.impossible for record in train()))

    def texts(self, records: Sequence[SpanQuestion]) -> list[str]:
        contexts = dict.fromkeys(record.context for record in records)
        return [record.question for record in records] + list(contexts)

    def encode(
        self, records: Sequence[SpanQuestion], tokenizer: Any, *, training: bool = False, **_: Any
    ) -> Examples:
        """Calls `encode_segments` or `encode_windows`; see `Task.encode`."""
        if self.is_segmented:
            return encode_segments(records, tokenizer, self.windows, training=training)
        discard = training and not self.is_squad  # as published for MRQA
        return encode_windows(records, tokenizer, self.windows, training=training, discard=discard)

    # Row targets `starts` and `ends` int32 [B * G, A], -1 for padding.

    @classmethod
    def loss(cls, logits: jax.Array, rows: Rows) -> jax.Array:
        mask, gold = rows.grouped(rows.mask), (rows.grouped(rows.get(key)) for key in ("starts", "ends"))
        ends = (any_of(rows.grouped(logits[:, i]), positions, mask) for i, positions in enumerate(gold))
        return sum(ends, start=jnp.zeros(())) / 2

    @classmethod
    def distillation_loss(cls, logits: jax.Array, rows: Rows, temperature: float) -> jax.Array:
        loss = distillation(logits, rows.get("teacher_logits"), temperature, rows.mask[:, None])
        return rows.mean(loss.sum(1))  # not halved, as published

    @classmethod
    def margin(cls, logits: jax.Array, rows: Rows) -> jax.Array:
        return rows.mean(margin(logits, rows.mask[:, None]).sum(1))

    @staticmethod
    def is_by_token(name: str | None = None) -> bool:
        return True

    def score(self, examples: Examples, logits: Any, null_threshold: float | None = None) -> Score:
        logits, records = np.asarray(logits), examples.records
        if self.is_segmented:
            best = decode_segments(examples, logits, max_answer_length=self._longest)
            gold = {record.scored_id: list(record.answers) for record in records if record.answers}
            return Score(score_triviaqa(gold, best) if gold else {}, {"predictions.json": best})
        n_best, null_odds = self._decode(examples, logits)
        threshold = self.inputs.null_threshold if null_threshold is None else null_threshold
        texts = choose_texts(n_best, null_odds, threshold)
        files: dict[str, Any] = {"predictions.json": texts, "nbest_predictions.json": n_best}
        if self.inputs.unanswerable:
            files["null_odds.json"] = null_odds
        gold = {r.id: list(r.answers) for r in records if r.answers or r.impossible}
        if not gold:
            return Score({}, files)
        # The best threshold can only be found among answers that no threshold has turned into "".
        raw, odds = choose_texts(n_best, null_odds), {id: null_odds[id] for id in gold if id in null_odds}
        tuned = best_null_threshold(gold, raw, odds) if odds else None
        if not self.is_squad:
            return Score(score_mrqa(gold, texts), files, tuned)
        metrics = score_squad(gold, raw, odds, threshold) if odds else score_squad(gold, texts)
        return Score(metrics, files, tuned)

    @property
    def _longest(self) -> int:
        return self.max_answer_length or MAX_ANSWER_LENGTH

    def _decode(self, examples: Examples, logits: Any) -> tuple[NBest, dict[str, float]]:
        if not self.is_segmented:
            return decode_spans(examples, np.asarray(logits), self.inputs.unanswerable, N_BEST, self._longest)
        pairs = best_pairs(examples, np.asarray(logits), N_BEST_SEGMENTS, self._longest, False)
        ids = examples.layout.ids
        return {id: _entries(examples.layout, pairs, i, N_BEST_SEGMENTS) for i, id in enumerate(ids)}, {}

    def answers(self, examples: Examples, logits: Any, n_best: int = 0) -> dict[str, dict[str, Any]]:
        lists, null_odds = self._decode(examples, logits)
        texts = choose_texts(lists, null_odds, self.inputs.null_threshold)
        found = dict[str, dict[str, Any]]()
        for id, entries in lists.items():
            shown = [_shown(entry) for entry in entries]
            odds = {"null_odds": null_odds[id]} if id in null_odds else {}
            chosen = next(entry for entry in shown if entry["answer"] == texts[id])
            if not odds and not texts[id]:  # nothing was found
                chosen["score"] = 0.0
            found[id] = chosen | odds | ({"n_best": shown[:n_best]} if n_best else {})
        return found

    def parse_request(self, request: Mapping[str, Any], id: str, where: str) -> SpanQuestion:
        question, context = reading.text(request, "question"), reading.text(request, "context")
        return SpanQuestion(id, question, context, (), (), False, where)


def _shown(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns what a request gets of an entry of `decode_spans`."""
    place = {"start": entry["start"], "end": entry["end"]} if entry["text"] else {}
    return {"answer": entry["text"], "score": entry["probability"], **place}


def style_of(data: str) -> str:
    """Returns the key of `SETTINGS` for a data set; `mrqa` for one that names no style."""
    return find_dataset(data).style or "mrqa"


# Inputs ----------------------------------------------------------------------------------------------


def encode_windows(
    questions: Sequence[SpanQuestion],
    tokenizer: Any,
    settings: WindowSettings,
    *,
    training: bool = False,
    discard: bool = False,
) -> Examples:
    """Divides contexts into windows and finds the first answer of each question in them.

    Training leaves out questions whose answer is missing or not kept by the tokenizer and, with `discard`,
    windows of an answerable question without its answer.

    Returns:
      An example a window, with row targets `starts` and `ends` int32 [R, 1], both inclusive; 0, [CLS],
      if the answer is not in the window as a whole. `layout` is a `Windows`.
    """
    builder = WindowBuilder(questions, tokenizer, settings)
    targets = list[np.ndarray]()
    without = discarded = dropped = 0
    for i, question in enumerate(questions):
        answer = builder.locate(i, question.spans[0]) if question.spans else None
        firsts, sizes = builder.windows_of(i)
        inside = np.zeros(len(firsts), bool)
        if answer is not None:
            inside = (firsts <= answer[0]) & (answer[1] < firsts + sizes)
        wanted = np.ones(len(firsts), bool)
        if training and not question.impossible:
            wanted = inside if discard else wanted & (answer is not None)
            if not wanted.any():
                dropped += 1
                continue
        builder.keep(i, wanted)
        shift = builder.context_start(i) - firsts[wanted]
        targets.append(np.where(inside[wanted, None], np.array(answer or (0, 0)) + shift[:, None], 0))
        discarded += int((~wanted).sum())
        without += int((~inside[wanted]).sum()) if question.spans else 0
    ends = Ragged.of(targets, width=2).values[:, None]
    lost: dict[str, Any] = {"num_without_answer": without, "num_discarded": discarded, "num_dropped": dropped}
    return builder.finish(ends, training, discard, **lost)


def encode_segments(
    questions: Sequence[SpanQuestion], tokenizer: Any, settings: WindowSettings, *, training: bool = False
) -> Examples:
    """Divides documents into segments and finds every answer in them.

    Training leaves out questions whose answers the tokenizer does not keep. One whose answers all lie behind
    its last segment stays, and points at [CLS].

    Returns:
      An example a question, with row targets `starts` and `ends` int32 [R, A], both inclusive, in the
      order of the source. A start (an end) that occurs twice in a row is -1 the second time. If no
      segment of a question holds an answer, all point at 0, [CLS]. `layout` is a `Windows`.
    """
    builder = WindowBuilder(questions, tokenizer, settings)
    targets = list[np.ndarray]()
    without = dropped = 0
    for i, question in enumerate(questions):
        # The last pieces of an answer across the end of the stored pieces are unknown.
        stored = [span for span in question.spans if not builder.is_cut(i, span)]
        located = [pieces for span in stored if (pieces := builder.locate(i, span))]
        if training and question.spans and not located and len(stored) == len(question.spans):
            dropped += 1
            continue
        answers = np.array(located, np.int64).reshape(-1, 2)
        firsts, sizes = builder.windows_of(i)
        builder.keep(i, np.ones(len(firsts), bool))
        in_segments = [
            _without_repeats(answers[(first <= answers[:, 0]) & (answers[:, 1] < first + size)])
            for first, size in zip(firsts.tolist(), sizes.tolist(), strict=True)
        ]
        if any(map(len, in_segments)):
            shifts = (builder.context_start(i) - firsts).tolist()
            targets += [np.where(a < 0, -1, a + k) for a, k in zip(in_segments, shifts, strict=True)]
        else:
            without += len(firsts) if question.spans else 0
            targets += [np.zeros((1, 2), np.int64)] * len(firsts)
    ends = Ragged.of(targets, width=2).padded()
    return builder.finish(ends, training, grouped=True, num_without_answer=without, num_dropped=dropped)


def _without_repeats(answers: np.ndarray) -> np.ndarray:
    """Returns the first 64 answers; a start, or an end, that occurs again becomes -1."""
    kept = answers[:MAX_ANSWERS].copy()
    for column in kept.T:
        _, first = np.unique(column, return_index=True)
        repeated = np.ones(len(column), bool)
        repeated[first] = False
        column[repeated] = -1
    return kept


# Answers ---------------------------------------------------------------------------------------------


def decode_spans(
    examples: Examples,
    logits: np.ndarray,
    unanswerable: bool = False,
    n_best: int = N_BEST,
    max_answer_length: int = MAX_ANSWER_LENGTH,
    nothing: str = "",
) -> tuple[NBest, dict[str, float]]:
    """Finds the best answers to every question.

    Args:
      examples, logits: from `encode_windows`; float [R, 2, S], of starts and ends.
      unanswerable: whether some questions have no answer.
      n_best: starts and ends of a window that are combined, and entries of a question.
      max_answer_length: word pieces of an answer at most.
      nothing: the answer if no pair of start and end can be one; the published code says "empty".

    Returns:
      Id -> entries of different texts, best first: `text`, `probability` (a softmax over the entries),
      `start_logit`, `end_logit`, and of a text its characters of the context, `start` and `end`; and id ->
      null odds, the score of "no answer" less that of the best answer, empty unless `unanswerable`.

    Source: docs/question_answering.md, "From logits to answers".
    """
    windows: Windows = examples.layout
    pairs = best_pairs(examples, logits, n_best, max_answer_length, max_context_only=True)
    n_best_entries, null_odds = {}, {}
    for i, id in enumerate(windows.ids):
        null = None
        if unanswerable:  # the least sum at [CLS] in any window
            first, last = windows.question_rows[i : i + 2]
            at_cls = logits[first:last, :, 0].astype(np.float64)
            start, end = at_cls[np.argmin(at_cls[:, 0] + at_cls[:, 1])].tolist()
            null = (start, end)
        entries = n_best_entries[id] = _entries(windows, pairs, i, n_best, null, nothing)
        if null is not None:
            best = (entry["start_logit"] + entry["end_logit"] for entry in entries if entry["text"])
            null_odds[id] = sum(null) - next(best, 0.0)
    return n_best_entries, null_odds


def choose_texts(
    n_best: NBest, null_odds: dict[str, float], null_threshold: float = math.inf
) -> dict[str, str]:
    """Returns id -> the best answer of `decode_spans`, "" if its null odds are above the threshold."""
    best = {id: next((e["text"] for e in entries if e["text"]), "") for id, entries in n_best.items()}
    return best | {id: "" for id, odds in null_odds.items() if odds > null_threshold}


def _entries(
    windows: Windows,
    pairs: Pairs,
    i: int,
    n_best: int,
    null: tuple[float, float] | None = None,
    nothing: str = "",
) -> list[dict[str, Any]]:
    """Returns the entries of question i, best first, each text once; see `decode_spans`."""
    first, last = pairs.question_offsets[i : i + 2]
    starts, ends = pairs.start_logit[first:last], pairs.end_logit[first:last]
    if null is not None:
        starts, ends = np.append(starts, null[0]), np.append(ends, null[1])
    found, places = dict[str, tuple[float, float]](), dict[str, tuple[int, int]]()  # text -> logits
    for k in np.argsort(-(starts + ends), kind="stable"):
        if len(found) >= n_best:
            break
        at = first + k
        text = ""
        if at != last:
            place = windows.span(pairs.row[at], pairs.start[at], pairs.end[at])
            text = windows.texts[i][slice(*place)]
            places.setdefault(text, place)
        found.setdefault(text, (float(starts[k]), float(ends[k])))
    if null is not None:
        found.setdefault("", null)
    if not any(found):
        found = {nothing: (0.0, 0.0), **found}
    scores = np.array([start + end for start, end in found.values()])
    weights = np.exp(scores - scores.max())
    return [
        {"text": text, "probability": float(p), "start_logit": start, "end_logit": end}
        | dict(zip(("start", "end"), places.get(text, ()), strict=False))
        for (text, (start, end)), p in zip(found.items(), weights / weights.sum(), strict=True)
    ]


def decode_segments(
    examples: Examples,
    logits: np.ndarray,
    n_best: int = N_BEST_SEGMENTS,
    max_answer_length: int = MAX_ANSWER_LENGTH,
) -> dict[str, str]:
    """Finds the best answer in all segments of the records that are scored together.

    Takes examples of `encode_segments`; see `decode_spans` for the other arguments.

    Returns:
      Id by which a record is scored (`SpanQuestion.scored_as`) -> answer, "" if no pair of start and end
      can be one; the official scorer counts it as wrong, like the published "NoAnswerFound". The first
      record wins among equals.
    """
    windows: Windows = examples.layout
    pairs = best_pairs(examples, logits, n_best, max_answer_length, max_context_only=False)
    sums = pairs.start_logit + pairs.end_logit
    scored_ids = {record.id: record.scored_id for record in examples.records}
    texts, scores = dict[str, str](), dict[str, float]()
    for i, id in enumerate(windows.ids):
        first, last = pairs.question_offsets[i : i + 2]
        text, score = "", -math.inf
        if first < last:
            best = first + int(np.argmax(sums[first:last]))
            text = windows.text(pairs.row[best], pairs.start[best], pairs.end[best])
            score = float(sums[best])
        scored_id = scored_ids[id]
        if scored_id not in texts or score > scores[scored_id]:
            texts[scored_id], scores[scored_id] = text, score
    return texts

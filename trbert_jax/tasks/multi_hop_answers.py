"""From logits to answers and supporting facts: HotpotQA.

docs/question_answering.md, "From logits to answers".
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trbert_jax.tasks.encoding import cut_text
from trbert_jax.tasks.multi_hop_features import NO, YES, MultiHopFeatures
from trbert_jax.tasks.paragraph_selection import PackedQuestions

MAX_ANSWER_LENGTH = 30  # word pieces


def decode_multi_hop(
    features: MultiHopFeatures,
    packed: PackedQuestions,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    switch_logits: np.ndarray,
    sentence_logits: np.ndarray,
    max_answer_length: int = MAX_ANSWER_LENGTH,
) -> dict[str, dict[str, Any]]:
    """Chooses an answer and supporting sentences for every question.

    Args:
      features: n questions, with characters (not built for training).
      packed: of these.
      start_logits, end_logits: float [total tokens], aligned with `packed.rows.tokens`.
      switch_logits: float [n, 3], a span, yes, no.
      sentence_logits: float [total sentences, 2], aligned with `packed.sentences`; the second is for
        supporting.
      max_answer_length: word pieces of an answer at most.

    Returns:
      What the official scorer reads: `{"answer": {id: text}, "sp": {id: [[title, number], ...]}}`. The
      answer is "" where there is no text.

    Raises:
      ValueError: arrays of another shape, or features without characters.
    """
    _check_shapes(features, packed, start_logits, end_logits, switch_logits, sentence_logits)
    kinds = np.argmax(switch_logits, axis=1)
    supporting = np.argmax(sentence_logits, axis=1) == 1
    answers, facts = dict[str, str](), dict[str, list[list[Any]]]()
    for i, question in enumerate(features.ids):
        if kinds[i] in (YES, NO):
            answers[question] = "yes" if kinds[i] == YES else "no"
        else:
            first, last = packed.rows.offsets[i : i + 2]
            answers[question] = _best_span(
                features, packed, i, start_logits[first:last], end_logits[first:last], max_answer_length
            )
        first, last = packed.sentence_offsets[i : i + 2]
        chosen = packed.facts[first:last][supporting[first:last]]
        facts[question] = [[features.titles[p], k] for p, k in chosen.tolist()]
    return {"answer": answers, "sp": facts}


def _check_shapes(
    features: MultiHopFeatures,
    packed: PackedQuestions,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    switch_logits: np.ndarray,
    sentence_logits: np.ndarray,
) -> None:
    if len(features.chars) != len(features.tokens):
        raise ValueError("features built for training have no characters to cut answers from")
    for name, array, shape in (
        ("start_logits", start_logits, packed.rows.tokens.shape),
        ("end_logits", end_logits, packed.rows.tokens.shape),
        ("switch_logits", switch_logits, (len(packed), 3)),
        ("sentence_logits", sentence_logits, packed.sentences.shape),
    ):
        if array.shape != shape:
            raise ValueError(f"{name} has the shape {array.shape}; expected {shape}")


def _best_span(
    features: MultiHopFeatures,
    packed: PackedQuestions,
    i: int,
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    max_answer_length: int,
) -> str:
    """The text of the best stretch that lies within the text of one paragraph, "" if there is none.

    Titles, markers and pieces that stand for no text end a stretch. Among equals the one that begins
    first wins, then the shortest.
    """
    order = packed.paragraphs[packed.paragraph_offsets[i] : packed.paragraph_offsets[i + 1]]
    ranges = [np.arange(*features.token_offsets[p : p + 2]) for p in order]
    source = np.concatenate([np.zeros(0, np.int64), *ranges])[: features.room(i)]
    owner = np.repeat(order, [len(some) for some in ranges])[: len(source)]
    begin = len(packed.rows.row(i)) - 1 - len(source)  # the paragraphs stand before the last [SEP]
    chars = features.chars[source]  # [t, 2]
    is_text = chars[:, 0] >= 0
    if not is_text.any():
        return ""
    # Stretches without a gap have the same number of gaps before their start and their end.
    gaps = np.cumsum(~is_text)
    last = np.arange(len(source))[:, None] + np.arange(max_answer_length)  # [t, lengths]
    inside = np.minimum(last, len(source) - 1)
    fits = (last < len(source)) & is_text[:, None] & is_text[inside] & (gaps[:, None] == gaps[inside])
    scores = start_logits[begin : begin + len(source), None].astype(np.float64)
    scores = scores + end_logits[begin : begin + len(source)].astype(np.float64)[inside]
    start, length = np.unravel_index(np.argmax(np.where(fits, scores, -np.inf)), scores.shape)
    return cut_text(features.texts[owner[start]], chars[start, 0], chars[start + length, 1])

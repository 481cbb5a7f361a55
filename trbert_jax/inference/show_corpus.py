"""Count over all inputs of a page, at its first thresholds: tokens, words, changed answers, deletions.

Source: docs/show.md.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from trbert_jax.inference.engine import InferenceEngine
from trbert_jax.inference.outputs import Outputs
from trbert_jax.inference.predictor import TRBert
from trbert_jax.inference.questions import MAX_N_BEST
from trbert_jax.inference.show_inputs import Array, owner_of, right, snippet
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.text_encoder import TextEncoder

_WORDS = 15  # words listed
_DELETED = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)  # shares of a text's tokens
_TEXTS = 100  # of the deletion curve


def corpus(
    model: TRBert,
    examples: Examples,
    dense_outputs: Outputs,
    now: Outputs,
    dense: Sequence[dict[str, Any]],
    reduced: Sequence[dict[str, Any]],
    chosen: Array,
    engine: InferenceEngine,
) -> dict[str, Any]:
    """Returns an entry for each input, the words most often kept and dropped, and a deletion curve."""
    shown = {int(i): place for place, i in enumerate(chosen)}
    owner, records = owner_of(model, examples), examples.records
    lost = _lost(model, examples, dense_outputs, now)
    tokens = np.bincount(owner, examples.row_lengths, len(records)).astype(int)
    kept = np.bincount(owner, now.num_kept[:, -1], len(records)).astype(int)
    entries = [
        {
            "title": record.question if model.answers_questions else snippet(record.text),
            "tokens": int(tokens[i]),
            "kept": int(kept[i]),
            "dense": dense[i]["answer"],
            "reduced": reduced[i]["answer"],
            "lost": round(lost[i], 4),
            "right": right(model, record),
            "shown": shown.get(i),
        }
        for i, record in enumerate(records)
    ]
    curve = None if model.answers_questions else _deletion(model, examples, dense_outputs, now, engine)
    return {"inputs": entries, "deletion": curve, **_words(model._encoder, examples, now)}


def _lost(model: TRBert, examples: Examples, dense: Outputs, now: Outputs) -> list[float]:
    """Returns how much less probable the dense model's answers are to the reduced one."""
    if not model.answers_questions:
        rows, labels = np.arange(len(examples)), dense.logits.argmax(-1)
        lost: list[float] = (dense.probabilities - now.probabilities)[rows, labels].tolist()
        return lost
    found = model.task.answers(examples, dense.logits)
    lists = model.task.answers(examples, now.logits, MAX_N_BEST)
    lost = []
    for record in examples.records:
        known = {entry["answer"]: entry["score"] for entry in lists[record.id]["n_best"]}
        best = found[record.id]
        lost.append(best["score"] - known.get(best["answer"], 0.0))
    return lost


def _words(encoder: TextEncoder, examples: Examples, now: Outputs) -> dict[str, Any]:
    """Returns the words of several occurrences with the largest and the smallest share kept to the end."""
    count, kept = collections.Counter[str](), collections.Counter[str]()
    special = _special(encoder)
    for row in range(examples.num_rows):
        ids, alive = examples.row(row), np.zeros(examples.row_lengths[row], bool)
        alive[now.kept[-1][row]] = True
        begins = np.flatnonzero(~encoder.continues[ids])
        entries = encoder.words(ids)
        for a, b in zip(begins, [*begins[1:], len(ids)], strict=True):
            if int(ids[a]) not in special:
                word = "".join(entry.removeprefix("##") for entry in entries[a:b])
                count[word] += 1
                kept[word] += bool(alive[a:b].any())
    least = max(3, sum(count.values()) // 5000)
    found = [(kept[word] / number, number, word) for word, number in count.items() if number >= least]
    # The share kept, held back by two occurrences of the mean: a rare word needs more.
    mean = sum(kept.values()) / max(1, sum(count.values()))
    found.sort(key=lambda x: (x[0] * x[1] + 2 * mean) / (x[1] + 2))
    listed = [{"word": word, "share": round(share, 3), "count": number} for share, number, word in found]
    return {"dropped": listed[:_WORDS], "kept": listed[::-1][:_WORDS], "least": least}


def _deletion(
    model: TRBert, examples: Examples, dense: Outputs, now: Outputs, engine: InferenceEngine
) -> dict[str, Any]:
    """Returns how probable the dense model's answers remain as tokens are deleted, a mean over some texts.

    The order is that of keeping, the longest kept first, that of dropping, or random. Special tokens stay.
    """
    count = min(len(examples), _TEXTS)
    texts, labels = examples.take(np.arange(count)), dense.logits[:count].argmax(-1)
    curves: dict[str, list[float]] = {"kept": [], "dropped": [], "random": []}
    orders = [*_orders(texts, now, _special(model._encoder))]
    for name, curve in curves.items():
        for share in _DELETED:
            stays = np.ones(len(texts.tokens), bool)
            for order in orders:
                stays[order[name][: round(share * len(order[name]))]] = False
            rest = engine.run(model.params, _remaining(texts, stays), rule="dense")
            curve.append(round(float(rest.probabilities[np.arange(count), labels].mean()), 4))
    return {"texts": count, "shares": [*_DELETED], **curves}


def _orders(texts: Examples, now: Outputs, special: set[int]) -> Iterator[dict[str, Array]]:
    """Yields for each text the places of its tokens, in the orders of deletion; ties are random."""
    rng = np.random.default_rng(0)
    for row in range(texts.num_rows):
        places = np.arange(texts.offsets[row], texts.offsets[row + 1])
        passed = np.bincount(np.concatenate([stage[row] for stage in now.kept]), minlength=len(places))
        words = np.flatnonzero([int(token) not in special for token in texts.row(row)])
        any_first = rng.permutation(words)
        kept, dropped = (any_first[np.argsort(sign * passed[any_first], kind="stable")] for sign in (-1, 1))
        yield {"kept": places[kept], "dropped": places[dropped], "random": places[any_first]}


def _special(encoder: TextEncoder) -> set[int]:
    """Returns the ids of [CLS] and [SEP]."""
    return {int(encoder.cls[0]), int(encoder.sep[0])}


def _remaining(texts: Examples, stays: Array) -> Examples:
    """Returns texts without the tokens where `stays`, bool [total], is False."""
    return dataclasses.replace(
        texts,
        tokens=texts.tokens[stays],
        offsets=np.concatenate([[0], np.cumsum(stays)])[texts.offsets],
        token_types=None if texts.token_types is None else texts.token_types[stays],
    )

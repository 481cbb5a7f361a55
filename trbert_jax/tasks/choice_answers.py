"""From logits to one of several options or candidates: RACE and WikiHop.

docs/question_answering.md, "From logits to answers".
"""

from __future__ import annotations

import numpy as np

from trbert_jax.tasks.candidate_features import CandidateFeatures


def choose_by_pairs(logits: np.ndarray) -> np.ndarray:
    """The option that is most "right" among rows judged one by one.

    The logit of "right" decides by itself, as published, not what is left of it beside "wrong";
    among equals the later option wins, again as published.

    Args:
      logits: float [4 n, 2], rows as in `ChoiceFeatures`.

    Returns:
      int64 [n].
    """
    if logits.ndim != 2 or logits.shape[1] != 2 or len(logits) % 4:
        raise ValueError(f"logits have the shape {logits.shape}; expected [4 n, 2]")
    right = logits[:, 1].reshape(-1, 4)
    return 3 - np.argmax(right[:, ::-1], axis=1)


def choose_option(logits: np.ndarray) -> np.ndarray:
    """The option with the largest logit, among equals the first; float [n, 4] -> int64 [n]."""
    if logits.ndim != 2 or logits.shape[1] != 4:
        raise ValueError(f"logits have the shape {logits.shape}; expected [n, 4]")
    return np.argmax(logits, axis=1)


def choose_candidate(features: CandidateFeatures, logits: np.ndarray) -> np.ndarray:
    """The candidate with the largest logit among those a query has, among equals the first.

    Args:
      features: n queries.
      logits: float [n, 79], the mean over a query's segments; what stands for no candidate is ignored.

    Returns:
      int64 [n].
    """
    present = features.candidate_positions >= 0
    if logits.shape != present.shape:
        raise ValueError(f"logits have the shape {logits.shape}; expected {present.shape}")
    return np.argmax(np.where(present, logits, -np.inf), axis=1)


def candidate_answers(features: CandidateFeatures, chosen: np.ndarray) -> dict[str, str]:
    """id -> text of the chosen candidate, the form of QAngaroo's predictions.

    Args:
      features: n queries.
      chosen: int [n].
    """
    return {
        query: names[k]
        for query, names, k in zip(features.ids, features.candidates, chosen.tolist(), strict=True)
    }

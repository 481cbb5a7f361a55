"""Inputs that the benchmark scripts share: texts of random tokens, and random tokens to keep of them."""

import numpy as np

from trbert_jax.model.config import ModelConfig
from trbert_jax.tasks.examples import Examples

# Film reviews cut at 256 tokens: the logarithm of their length is close to normal, and two in five are cut.
# With these numbers the mean is 203.
_LOG_MEDIAN, _LOG_SPREAD = 5.42, 0.55
_SHORTEST, _LONGEST = 16, 256


def review_lengths(num: int, rng: np.random.Generator, max_length: int = _LONGEST) -> np.ndarray:
    """Draws lengths like those of film reviews cut at 256 tokens, scaled to `max_length`: int [num]."""
    lengths = np.clip(rng.lognormal(_LOG_MEDIAN, _LOG_SPREAD, num), _SHORTEST, _LONGEST)
    return np.maximum(np.round(lengths * (max_length / _LONGEST)).astype(np.int64), 3)


def random_examples(config: ModelConfig, lengths: np.ndarray, rng: np.random.Generator) -> Examples:
    """Draws token ids for texts of these lengths, and labels."""
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Examples(
        tokens=rng.integers(1, config.vocab_size, offsets[-1]).astype(np.int32),
        offsets=offsets,
        token_types=None,
        labels=rng.integers(0, config.num_labels, len(lengths)).astype(np.int32),
        ids=[str(i) for i in range(len(lengths))],
        num_truncated=0,
        digest="",
    )


def random_actions(
    lengths: np.ndarray, max_length: int, shares: tuple[float, ...], rng: np.random.Generator
) -> np.ndarray:
    """Draws tokens to keep; their number varies from text to text as it does with a trained model.

    Args:
      lengths: int [n].
      max_length: W.
      shares: mean share of a text's tokens to keep at each point of reduction, not ascending.
      rng: random numbers.

    Returns:
      bool [n, stages, W]. The first token is always kept; each point keeps some of what the one before kept.
    """
    # One order of preference per text: a token that a later point keeps was kept by the earlier ones.
    preference = np.where(np.arange(max_length) < lengths[:, None], rng.random((len(lengths), max_length)), 2)
    preference[:, 0] = -1
    rank = preference.argsort(-1).argsort(-1)
    deviation = np.clip(rng.normal(0, 0.25, len(lengths)), -0.6, 0.6)
    deviation -= deviation.mean()
    limits = [np.clip(share * (1 + (1 - share) * deviation), 0, 1) for share in shares]
    counts = [np.clip(np.round(limit * lengths), 1, lengths) for limit in limits]
    return np.stack([rank < count[:, None] for count in counts], axis=1)

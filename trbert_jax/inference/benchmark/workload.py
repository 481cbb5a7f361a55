"""What a benchmark runs: the same token ids in the same batches, however they are run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from trbert_jax.inference.engine import Inputs, Outputs
from trbert_jax.model.config import ModelConfig
from trbert_jax.tasks.batching import pad_batch
from trbert_jax.tasks.examples import Examples

# Film reviews cut at 256 tokens: the logarithm of their length is close to normal, and two in five
# are cut. With these the mean is 203.
_LOG_MEDIAN, _LOG_SPREAD = 5.42, 0.55
_SHORTEST, _LONGEST = 16, 256
# What models read of a batch; the rest are labels.
_READ = ("input_ids", "mask", "token_type_ids", "valid", "shared", "segment", "candidates", "sentences")


@dataclasses.dataclass(frozen=True, eq=False)
class Workload:
    """Texts, or questions, in the order in which they arrive.

    Attributes:
      features: n tokenized texts; of questions n in R rows.
      max_length: width to which the full-length executions pad.
      actions: bool [n, stages, max_length], the tokens to keep at each point of reduction; None lets the
        model decide.
    """

    features: Examples
    max_length: int
    actions: np.ndarray | None = None

    def num_texts(self, batch_size: int) -> int:
        """Texts in whole batches; the others are not run, so that every batch is a full one."""
        return len(self.features) // batch_size * batch_size

    def indices(self, batch_size: int) -> list[np.ndarray]:
        """The texts of each batch, int [batch_size]."""
        numbers = np.arange(self.num_texts(batch_size))
        return list(numbers.reshape(-1, batch_size))

    def batches(self, batch_size: int, widths: Sequence[int]) -> list[Inputs]:
        """The whole batches, in order.

        Args:
          batch_size: B, texts of a batch.
          widths: padded lengths to choose from, ascending, the last one `max_length`.

        Returns:
          `input_ids` int32 [B, W], `mask` bool [B, W], `min_logit` float32 [B], what the head of a task reads
          besides and, where there are actions, `actions` bool [B, stages, W].
        """
        found: list[Inputs] = []
        for index in self.indices(batch_size):
            longest = self.features.lengths[index].max()
            width = next(width for width in widths if width >= longest)
            padded = pad_batch(self.features, index, batch_size, width)
            batch = {key: padded[key] for key in _READ if key in padded}
            batch["min_logit"] = np.zeros(len(batch["input_ids"]), np.float32)
            if self.actions is not None:
                batch["actions"] = self.actions[index, :, :width]
            found.append(batch)
        return found


def kept_masks(outputs: Outputs, max_length: int) -> np.ndarray:
    """The positions that a run kept as masks: bool [n, stages, max_length]."""
    masks = np.zeros((len(outputs.labels), len(outputs.kept), max_length), bool)
    for stage, rows in enumerate(outputs.kept):
        for row, positions in enumerate(rows):
            masks[row, stage, positions] = True
    return masks


def review_lengths(num: int, rng: np.random.Generator, max_length: int = _LONGEST) -> np.ndarray:
    """Lengths like those of film reviews cut at 256 tokens (203 on average), scaled: int [num]."""
    lengths = np.clip(rng.lognormal(_LOG_MEDIAN, _LOG_SPREAD, num), _SHORTEST, _LONGEST)
    return np.maximum(np.round(lengths * (max_length / _LONGEST)).astype(np.int64), 3)


def random_features(config: ModelConfig, lengths: np.ndarray, rng: np.random.Generator) -> Examples:
    """Random token ids in texts of given lengths, labels at random."""
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
    """Random tokens to keep, in numbers that vary from text to text as a trained model's do.

    Args:
      lengths: int [n].
      max_length: W.
      shares: what is kept at each point of reduction, on average, of a text's tokens; not ascending.
      rng: decides.

    Returns:
      bool [n, stages, W]; the first token is always kept, and each point keeps some of what the one before
      it kept.
    """
    # One order of preference a text: a token that a later point keeps was kept by the earlier ones.
    preference = np.where(np.arange(max_length) < lengths[:, None], rng.random((len(lengths), max_length)), 2)
    preference[:, 0] = -1
    rank = preference.argsort(-1).argsort(-1)
    deviation = np.clip(rng.normal(0, 0.25, len(lengths)), -0.6, 0.6)
    deviation -= deviation.mean()
    limits = [np.clip(share * (1 + (1 - share) * deviation), 0, 1) for share in shares]
    counts = [np.clip(np.round(limit * lengths), 1, lengths) for limit in limits]
    return np.stack([rank < count[:, None] for count in counts], axis=1)

"""Count the FLOPs of an encoder for an example, in closed form.

FLOPs are 2 x the multiply-accumulates (MACs) of the matrix products for an example's real tokens; padding,
embeddings, biases, softmax and layer norm do not count. A reduced model has two counts: the *reported* one,
comparable with published numbers, and the *exact* one. They differ in the selectors (charged for the tokens
they keep, or for those they read) and in the H x H product between encoder and classifier (excluded or
included). Source: docs/method.md, "FLOPs".
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trbert_jax.reduction.match import NUM_FEATURES

Counts = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class EncoderShape:
    """Sizes of an encoder and its classifier."""

    num_layers: int  # L
    hidden_size: int  # H
    intermediate_size: int  # I, width of the feed-forward layer
    num_outputs: int  # C, outputs of the classifier
    reduction_layers: tuple[int, ...] = ()  # 0-based layers before which tokens are dropped, ascending
    selector_hidden: int = 32  # width of a selector's hidden layer
    selector_match: bool = False  # whether selectors read `match.NUM_FEATURES` more numbers

    @classmethod
    def of(cls, config: Any) -> "EncoderShape":
        """Takes the sizes of a configured model, `model.config.ModelConfig`."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    @property
    def segments(self) -> tuple[int, ...]:
        """Number of layers before the first point of reduction, between the points, and after the last.

        They sum to L: a 12-layer BERT has (1, 5, 6), a 3-layer DistilBERT (1, 2).
        """
        bounds = (0, *self.reduction_layers, self.num_layers)
        return tuple(end - start for start, end in itertools.pairwise(bounds))

    def layer_macs(self, num_tokens: npt.ArrayLike) -> Counts:
        """Counts MACs of one layer over n tokens, integers of any shape: 4nH^2 + 2nHI + 2n^2H.

        Query, key, value and output projections, then the feed-forward layer, then the two products of
        attention.
        """
        counts: Counts = self.macs(np.asarray(num_tokens, np.int64))
        return counts

    def macs(self, n: Any) -> Any:
        """Counts as `layer_macs` in any arithmetic."""
        hidden = self.hidden_size
        return n * (4 * hidden**2 + 2 * hidden * self.intermediate_size) + 2 * n**2 * hidden

    def selector_macs(self, n: Any) -> Any:
        """Counts MACs of one selector for n tokens, in any arithmetic.

        The match of two segments takes most if both have n/2 tokens, and is charged like that.
        """
        read = self.hidden_size + NUM_FEATURES * self.selector_match
        match = self.selector_match * (self.hidden_size // 4)
        return n * (read * self.selector_hidden + self.selector_hidden) + n**2 * match

    @property
    def classifier_macs(self) -> int:
        """MACs of the last linear layer, on [CLS] alone."""
        return self.hidden_size * self.num_outputs

    @property
    def pooler_macs(self) -> int:
        """MACs of BERT's pooler or DistilBERT's pre-classifier, on [CLS] alone."""
        return self.hidden_size**2


def dense_flops(shape: EncoderShape, lengths: npt.ArrayLike) -> Counts:
    """Counts FLOPs without reduction, as published work reports them, int64 [n].

    `lengths`, int [n], are the tokens of each example, special ones included.
    """
    return 2 * (shape.num_layers * shape.layer_macs(lengths) + shape.classifier_macs)


def exact_dense_flops(shape: EncoderShape, lengths: npt.ArrayLike) -> Counts:
    """Counts FLOPs without reduction, pooler or pre-classifier included, to compare with `exact_flops`."""
    return dense_flops(shape, lengths) + 2 * shape.pooler_macs


def bert_base_flops(lengths: npt.ArrayLike, num_outputs: int) -> Counts:
    """Counts reported FLOPs of a dense BERT-base, the reference for models of all sizes."""
    return dense_flops(EncoderShape(12, 768, 3072, num_outputs), lengths)


def reduced_flops(shape: EncoderShape, lengths: npt.ArrayLike, kept: npt.ArrayLike) -> Counts:
    """Counts FLOPs with reduction, as published work reports them: selectors pay for what they keep.

    `lengths`, int [n], are the tokens of each example, special ones included; `kept`, int [n, T], those that
    remain after each point of reduction. Returns int64 [n]. Raises `ValueError` if `kept` has another shape
    or exceeds the number of tokens before.
    """
    macs, tokens = _encoder_macs(shape, lengths, kept)
    return 2 * (macs + shape.selector_macs(tokens[:, 1:]).sum(1) + shape.classifier_macs)


def exact_flops(shape: EncoderShape, lengths: npt.ArrayLike, kept: npt.ArrayLike) -> Counts:
    """Counts all FLOPs with reduction: selectors pay for the tokens they read, and the pooler counts.

    Arguments, result and errors are those of `reduced_flops`.
    """
    macs, tokens = _encoder_macs(shape, lengths, kept)
    selectors = shape.selector_macs(tokens[:, :-1]).sum(1)
    return 2 * (macs + selectors + shape.pooler_macs + shape.classifier_macs)


def _encoder_macs(shape: EncoderShape, lengths: npt.ArrayLike, kept: npt.ArrayLike) -> tuple[Counts, Counts]:
    """Returns MACs of all layers, int64 [n], and the tokens of each segment, int64 [n, T + 1]."""
    lengths, kept = np.asarray(lengths, np.int64), np.asarray(kept, np.int64)
    expected = (*lengths.shape, len(shape.reduction_layers))
    if lengths.ndim != 1 or kept.shape != expected:
        shapes = f"{list(kept.shape)}, expected {list(expected)}"
        raise ValueError(f"kept is {shapes}: a column per point of reduction")
    tokens = np.column_stack([lengths, kept])
    if np.any(np.diff(tokens, axis=1) > 0):
        raise ValueError("an example keeps more tokens than it had")
    return np.sum(shape.layer_macs(tokens) * np.asarray(shape.segments, np.int64), axis=1), tokens


ASSUMED_KEPT = 0.5  # share of the tokens that a point of reduction keeps, before training has shown it


def assumed_flops(
    shape: EncoderShape, lengths: npt.NDArray[Any], shares: Sequence[float] | None = None
) -> npt.NDArray[np.float64]:
    """Counts exact FLOPs with reduction if each point keeps a share of the tokens, float64 [n].

    `lengths`, int [n], are the tokens of each example; `shares` of them remain after each point. None assumes
    that each point keeps `ASSUMED_KEPT` of its tokens.
    """
    if shares is None:
        shares = [ASSUMED_KEPT ** (i + 1) for i in range(len(shape.reduction_layers))]
    kept = np.stack([np.maximum(1, lengths * share).astype(int) for share in shares], 1)
    return exact_flops(shape, lengths, np.minimum(kept, lengths[:, None])).astype(np.float64)


def sampled_flops(
    shape: EncoderShape, lengths: npt.NDArray[Any], num_samples: int, shares: Sequence[float] | None = None
) -> npt.NDArray[np.float64]:
    """Counts FLOPs of several sampled selections of an example; they share the layers before the first point.

    Arguments and result are those of `assumed_flops`.
    """
    shared = 2.0 * shape.segments[0] * shape.layer_macs(lengths)
    return shared + num_samples * (assumed_flops(shape, lengths, shares) - shared)


# bfloat16 TFLOP/s without sparsity; the first part of a device's name that fits.
PEAK_TFLOPS = {
    "NVIDIA B200": 2250,
    "NVIDIA H200": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA A100": 312,
    "TPU v6 lite": 918,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v4": 275,
}


def known_peak(device: str) -> float | None:
    """Returns bfloat16 TFLOP/s of a device by its name; None if it is not in the table, such as a CPU."""
    return next((float(peak) for name, peak in PEAK_TFLOPS.items() if name in device), None)

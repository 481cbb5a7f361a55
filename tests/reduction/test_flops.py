"""FLOPs accounting; the numbers are worked out by hand, not taken from the code."""

import pytest

from trbert_jax.model.config import ModelConfig
from trbert_jax.reduction import flops

BERT_BASE = flops.EncoderShape(12, 768, 3072, num_outputs=2, reduction_layers=(1, 6))
# H = 2, I = 3: a layer over n tokens takes 4n*4 + 2n*6 + 4n^2 = 28n + 4n^2 MACs; a selector of width
# 5 takes 2*5 + 5 = 15 a token; the classifier 2*3 = 6; the pooler 2*2 = 4.
SMALL = flops.EncoderShape(4, 2, 3, num_outputs=3, reduction_layers=(1, 2), selector_hidden=5)


def test_published_costs_of_a_bert_base_layer() -> None:
    macs = BERT_BASE.layer_macs([0, 1, 128, 512, 10**6])
    assert macs.tolist() == [0, 7_079_424, 931_135_488, 4_026_531_840, 1_543_077_888_000_000]


@pytest.mark.parametrize(
    ("num_layers", "segments"),
    [(12, (1, 5, 6)), (6, (1, 2, 3)), (5, (1, 1, 3)), (4, (1, 1, 2)), (3, (1, 2)), (2, (1, 1)), (1, (0, 1))],
)
def test_every_layer_belongs_to_one_segment(num_layers: int, segments: tuple[int, ...]) -> None:
    shape = flops.EncoderShape.of(ModelConfig(num_layers=num_layers))
    assert shape.segments == segments
    assert sum(shape.segments) == num_layers
    assert shape.num_outputs == 2


def test_dense_counts_by_hand() -> None:
    # n = 10: 280 + 400 = 680 a layer, four layers, the classifier; n = 1: 32 a layer.
    assert flops.dense_flops(SMALL, [10, 1]).tolist() == [2 * (4 * 680 + 6), 2 * (4 * 32 + 6)]
    assert flops.exact_dense_flops(SMALL, [10]).tolist() == [2 * (4 * 680 + 6 + 4)]


def test_bert_base_reference() -> None:
    assert flops.bert_base_flops([512], num_outputs=5).tolist() == [2 * (12 * 4_026_531_840 + 768 * 5)]


def test_reduced_counts_by_hand() -> None:
    # Row 1: 10 tokens, 4 kept (28*4 + 4*16 = 176), then 2 (72). Row 2: 10, all kept. Row 3: [CLS] only.
    lengths, kept = [10, 10, 10], [[4, 2], [10, 10], [1, 1]]
    encoder = [680 + 176 + 2 * 72, 4 * 680, 680 + 3 * 32]
    reported = [2 * (macs + 15 * judged + 6) for macs, judged in zip(encoder, (6, 20, 2), strict=True)]
    assert flops.reduced_flops(SMALL, lengths, kept).tolist() == reported
    # Exact: the first selector looks at all 10 tokens, the second at those the first kept.
    exact = [2 * (macs + 15 * judged + 10) for macs, judged in zip(encoder, (14, 20, 11), strict=True)]
    assert flops.exact_flops(SMALL, lengths, kept).tolist() == exact


@pytest.mark.parametrize("count", [flops.reduced_flops, flops.exact_flops])
@pytest.mark.parametrize(
    ("lengths", "kept"),
    [
        ([10], [[4]]),
        ([10], [[4, 2, 1]]),
        ([10, 9], [[4, 2]]),
        (10, [4, 2]),
        ([10], [[11, 2]]),
        ([10], [[4, 5]]),
    ],
)
def test_impossible_counts_are_refused(count, lengths, kept) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"kept|keeps"):
        count(SMALL, lengths, kept)

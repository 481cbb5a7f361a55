"""The shape of a model: what `config.json` says about it, under one set of names for all backbones."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A post-LN encoder with token selectors and a head.

    BERT and DistilBERT are the same computation up to token types, the pooler and the head; see
    docs/method.md, "Encoder". Sizes are counts, dropouts are probabilities.

    Attributes:
      model_type: `bert` or `distilbert`; decides parameter names on disk, token types and the head.
      max_positions: rows of the position table; the longest input, special tokens included.
      type_vocab_size: rows of the token type table; 0 for DistilBERT, which has none.
      classifier_dropout: dropout before the last linear layer of the head.
      labels: label names in the order of their ids; its length is the number of classes.
      selector_hidden: width of a selector's hidden layer.
      max_length: padded length the selectors were trained with, the unit of the length penalty.
    """

    model_type: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.1
    initializer_range: float = 0.02
    pad_token_id: int = 0
    labels: tuple[str, ...] = ("0", "1")
    selector_hidden: int = 32
    max_length: int = 512

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @property
    def reduction_layers(self) -> tuple[int, ...]:
        """Layers before which tokens are dropped, 0-based: 1 and L//2, once each (paper, section 3)."""
        return tuple(sorted({i for i in (1, self.num_layers // 2) if i < self.num_layers}))

    @property
    def num_reductions(self) -> int:
        """Points of reduction that run; a 2- or 3-layer model has one."""
        return len(self.reduction_layers)

    @property
    def num_selectors(self) -> int:
        """Selectors that exist: always two on disk, the second of a shallow model unused."""
        return 2

"""The shape of a model: what `config.json` says about it, under one set of names for all backbones."""

from __future__ import annotations

import dataclasses

# What a head answers with. The first two read [CLS] alone; the others read every token, and a token that was
# dropped has the state with which it was.
TASKS = ("classification", "multiple_choice", "span", "candidates", "multi_hop")


@dataclasses.dataclass(frozen=True)
class InputConfig:
    """How questions become inputs; kept with the model, which has to be asked as it was trained.

    Attributes:
      data: name of the data set that it was trained on, which decides what a question looks like.
      choices: form of a multiple choice, see `config.DataConfig.choices`.
      max_question_length, window_step, max_segments: see `config.BackboneConfig`; 0 for what is usual for the
        data set.
      unanswerable: whether questions may have no answer, as in SQuAD 2.0.
      null_threshold: null odds above which such a question is taken to have none.
    """

    data: str = ""
    choices: str = "pairs"
    max_question_length: int = 0
    window_step: int = 0
    max_segments: int = 1
    unanswerable: bool = False
    null_threshold: float = 0.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A post-LN encoder with token selectors and the head of a task.

    BERT and DistilBERT are the same computation up to token types, the pooler and the head; see
    docs/method.md, "Encoder". Sizes are counts, dropouts are probabilities.

    Attributes:
      model_type: `bert` or `distilbert`; decides parameter names on disk, token types and the head.
      task: one of `TASKS`; decides the head, and whether dropped tokens are restored for it.
      max_positions: rows of the position table; the longest input, special tokens included.
      type_vocab_size: rows of the token type table; 0 for DistilBERT, which has none.
      classifier_dropout: dropout before the last linear layer of the head.
      labels: label names in the order of their ids; its length is the number of classes.
      selector_hidden: width of a selector's hidden layer.
      max_length: padded length the selectors were trained with, the unit of the length penalty.
      inputs: how questions become inputs; not for texts with a label.
    """

    model_type: str = "bert"
    task: str = "classification"
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
    inputs: InputConfig = InputConfig()

    @property
    def num_outputs(self) -> int:
        """Outputs of the head's last Linear for a token, or for `[CLS]`."""
        return 1 if self.task in ("multiple_choice", "candidates") else self.num_labels

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @property
    def reads_all_tokens(self) -> bool:
        """Whether the head reads the state of every token, dropped ones too."""
        return self.task not in ("classification", "multiple_choice")

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

"""The settings of a run: what each means, its type, range and default.

The defaults are the hyper-parameters published for classification (docs/method.md,
"Hyper-parameters"). `trbert_jax.config` reads them from YAML.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

from trbert_jax.config_typing import Range
from trbert_jax.reduction.rules import DEFAULT_RULE

Backend = Literal["packed", "masked"]
StageName = Literal["finetune", "score", "init", "policy", "teacher", "joint", "evaluate"]
STAGES: tuple[StageName, ...] = ("finetune", "score", "init", "policy", "teacher", "joint", "evaluate")
TEXT_DATA = ("imdb", "yelp_f", "yelp_polarity", "20news", "hyperpartisan", "stdlib")
QUESTION_DATA = (
    "squad",
    "newsqa",
    "naturalqa",
    "race",
    "race_high",
    "race_middle",
    "hotpotqa",
    "hotpotqa_fullwiki",
    "hotpotqa_graph",
    "triviaqa",
    "triviaqa_web",
    "wikihop",
)
DATA_NAMES = TEXT_DATA + QUESTION_DATA
TFDS_PREFIX = "tfds:"

Count = Annotated[int, Range(minimum=1)]
Seed = Annotated[int, Range(minimum=0, maximum=2**31 - 1)]
Index = Annotated[int, Range(minimum=0)]
Fraction = Annotated[float, Range(minimum=0, maximum=1)]
Threshold = Annotated[float, Range(above=0, below=1)]
Positive = Annotated[float, Range(above=0)]
NonNegative = Annotated[float, Range(minimum=0)]
# The baseline of a sample is the mean over all samples of its example: with one, every advantage is 0.
NumSamples = Annotated[int, Range(minimum=2)]
# [CLS], one token, [SEP].
MaxLength = Annotated[int, Range(minimum=3)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The examples.

    Attributes:
      name: imdb, yelp_f, yelp_polarity, 20news, hyperpartisan, stdlib (source text of Python's
        standard library), squad, newsqa, naturalqa, race (race_high, race_middle), hotpotqa
        (hotpotqa_fullwiki, hotpotqa_graph), triviaqa (triviaqa_web), wikihop, or tfds:NAME (a data set of
        TensorFlow Datasets).
      path: folder of the files, relative to the current directory; for tfds the data folder
        (null: the library's own), for stdlib the library's folder (null: the running Python's).
      max_train_examples: use at most so many for training; null for all.
      max_eval_examples: use at most so many of the dev split, and of the test split; null for all.
      cache_dir: folder of tokenized examples; null for WORKDIR/cache.
      prepared: folder that `trbert prepare-data` wrote: training reads its examples there, in the background
        and never all at once; null to read the files in `path`.
      text_field: field that holds the text; tfds only.
      label_field: field that holds the label; tfds only.
      skip_bad_records: leave out records of question answering that are not as they should be, and say how
        many and why, rather than stop at the first.
      choices: form of a multiple choice, race only: pairs (each option an example, right or wrong),
        independent (a softmax over the options, each of which selects tokens by itself) or shared (a softmax,
        and one selection of the tokens that the options have in common).
    """

    name: str
    path: str | None = None
    max_train_examples: Count | None = None
    max_eval_examples: Count | None = None
    cache_dir: str | None = None
    prepared: str | None = None
    text_field: str = "text"
    label_field: str = "label"
    skip_bad_records: bool = False
    choices: Literal["pairs", "independent", "shared"] = "pairs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScratchConfig:
    """The shape of a model that starts from random weights; read only where model.init is scratch.

    Attributes:
      model_type: bert or distilbert.
      vocab_size: entries of the vocabulary, at most so many where the tokenizer is trained.
      hidden_size: width, a multiple of num_heads.
      num_layers: encoder layers.
      num_heads: attention heads.
      intermediate_size: width of the feed-forward layers.
      initializer_range: standard deviation of the random weights; a narrow model starts faster with
        more than BERT's 0.02.
    """

    model_type: Literal["bert", "distilbert"] = "bert"
    vocab_size: Count = 30522
    hidden_size: Count = 768
    num_layers: Count = 12
    num_heads: Count = 12
    intermediate_size: Count = 3072
    initializer_range: Positive = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The model before training.

    Attributes:
      init: folder or hub id of a Hugging Face BERT or DistilBERT, or scratch for random weights.
      max_length: tokens of an input, special ones included; longer texts are cut. Also the unit of
        the length penalty.
      max_positions: rows of the position table; a longer table than the checkpoint's is made by
        repeating its rows. null for the checkpoint's own, or max_length from scratch.
      keep_layers: encoder layers to take from the checkpoint, 0-based; null for all.
      dtype: of activations, float32 or bfloat16; parameters and losses are always float32.
      tokenizer: folder or hub id; null for the one beside the weights, or from scratch for a
        WordPiece vocabulary trained on the training texts.
      line_breaks_as_spaces: read HTML line breaks, `<br />`, as a space rather than as four tokens. Kept
        in the tokenizer of the trained model, which then reads all texts so.
      max_question_length: word pieces of a question at most, the rest is cut; null for what is usual for the
        data set. With its options for race.
      window_step: word pieces between the beginnings of the windows over a long context; null for what is
        usual for the data set.
      max_segments: segments of a long document at most; triviaqa and wikihop only.
      scratch: the shape where init is scratch.
    """

    init: str
    max_length: MaxLength = 512
    max_positions: Count | None = None
    keep_layers: tuple[Index, ...] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    tokenizer: str | None = None
    line_breaks_as_spaces: bool = False
    max_question_length: Count | None = None
    window_step: Count | None = None
    max_segments: Count = 1
    scratch: ScratchConfig = ScratchConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What all trained stages have in common. A step is one update of the parameters.

    Attributes:
      batch_size: examples of one forward and backward pass.
      accumulation_steps: passes whose gradients make one update of batch_size x
        accumulation_steps examples.
      learning_rate: its peak; it rises linearly from 0, then falls linearly to 0.
      epochs: passes over the training examples.
      max_steps: steps in place of epochs; null to go by epochs.
      warmup_fraction: share of the steps in which the learning rate rises.
      warmup_steps: steps in which it rises, in place of the share; null to go by that.
      weight_decay: of AdamW, on all but biases and LayerNorm weights.
      clip_norm: largest global L2 norm of a gradient; longer ones are scaled down to it.
      adam_epsilon: of AdamW.
      eval_steps: steps between evaluations on the dev split; null for once an epoch.
      save_steps: steps between checkpoints. An interruption loses at most so many, and those taken while the
        latest checkpoint was still being written.
      keep_checkpoints: latest checkpoints to keep; the best one is kept besides.
      output: the checkpoint that the next stage starts from, the last or the best on dev.
      dropout: whether dropout is on.
      published_padding: let padding take part where the published code does, as states of zeros: in the
        softmax over positions, in distillation, in the largest value over positions. Not for classification.
      backend: packed computes the kept tokens only; masked computes every position of the padded batch and
        masks the dropped ones. The numbers are the same but for dropout's masks.
    """

    batch_size: Count = 8
    accumulation_steps: Count = 4
    learning_rate: Positive = 3e-5
    epochs: Count = 3
    max_steps: Count | None = None
    warmup_fraction: Fraction = 0.1
    warmup_steps: Count | None = None
    weight_decay: NonNegative = 0.0
    clip_norm: Positive = 1.0
    adam_epsilon: Positive = 1e-8
    eval_steps: Count | None = None
    save_steps: Count = 2000
    keep_checkpoints: Count = 2
    output: Literal["last", "best"] = "last"
    dropout: bool = True
    published_padding: bool = False
    backend: Backend = "packed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Stage finetune: the dense model on the task. Fields as in `TrainingConfig`."""

    epochs: Count = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig(TrainingConfig):
    """Stage init: the selectors learn to rank tokens as the residual scores do.

    Attributes:
      per_length_scale: also multiply the loss by the batch's mean of 1 / length, as the published
        code does (docs/method.md, "Selector initialization").
      keep: share of the tokens that each point of reduction is to keep after this stage, in their order; null
        for one half everywhere, as published.
    """

    dropout: bool = False
    per_length_scale: bool = False
    keep: tuple[Threshold, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig(TrainingConfig):
    """Stage policy: the selectors learn by REINFORCE, all else is frozen.

    Attributes:
      num_samples: selections drawn for each example, K in the paper; at least 2.
      alpha: weight of the length penalty, the harmonic coefficient of the paper; a larger one
        drops more tokens.
      guide_rate: share of the steps in which one sample of each example imitates the residual
        scores.
    """

    dropout: bool = False
    num_samples: NumSamples = 8
    alpha: NonNegative = 1.0
    guide_rate: Fraction = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointConfig(TrainingConfig):
    """Stage joint: selectors and encoder together.

    Attributes:
      num_samples: selections drawn for each example; null for policy.num_samples.
      alpha: weight of the length penalty, as in `PolicyConfig`.
      distill: learn from the logits of the fine-tuned model (stage teacher) in place of the labels.
      temperature: divides teacher and student logits in distillation.
    """

    num_samples: NumSamples | None = None
    alpha: NonNegative = 1.0
    distill: bool = True
    temperature: Positive = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Stage score: the residual score of every training token.

    Attributes:
      batch_size: examples of one forward and backward pass.
    """

    batch_size: Count = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Stage teacher: the fine-tuned model's logits on the training examples.

    Attributes:
      batch_size: examples of one forward pass.
    """

    batch_size: Count = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Stage evaluate, and the evaluations during training.

    Attributes:
      batch_size: examples of one forward pass; predictions do not depend on it unless rule is
        batch_max.
      split: test or dev; evaluations during training always use dev.
      rule: how tokens are selected, a rule of `reduction.rules` for evaluation: threshold, batch_max, dense.
      backend: how the model runs, packed or masked, as in `TrainingConfig`.
      baselines: selections that learned nothing, evaluated at the same kept counts: random, first_k.
      thresholds: keep probabilities from which a token is kept, at which the final model is evaluated
        too; a low one keeps more tokens. Everything else uses 0.5.
    """

    batch_size: Count = 32
    split: Literal["test", "dev"] = "test"
    rule: str = DEFAULT_RULE
    backend: Backend = "packed"
    baselines: tuple[Literal["random", "first_k"], ...] = ()
    thresholds: tuple[Threshold, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the devices share the work. Changes nothing of what is computed but dropout's masks.

    Batches are divided over all devices of all processes: batch_size is what they take together.

    Attributes:
      strategy: jit (one program over a mesh of all devices) or pmap (a program a device).
      fsdp: devices that share one copy of the parameters and the optimizer's state; 1 gives each its own. jit
        only.
      remat: compute the layers' inner values again in the backward pass rather than keep them: less memory,
        more time.
    """

    strategy: Literal["jit", "pmap"] = "jit"
    fsdp: Count = 1
    remat: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run, from raw text to results.

    Attributes:
      workdir: folder of everything the run writes, relative to the current directory.
      seed: of data order, fresh weights, dropout and sampled selections.
      stages: what to run, in this order: finetune, score, init (optional), policy, teacher, joint,
        evaluate.
      data, model: the examples, the model before training.
      finetune, score, init, policy, teacher, joint, evaluate: a section for each stage.
      parallel: how the devices share the work; may change between calls of one run.
    """

    workdir: str
    data: DataConfig
    model: BackboneConfig
    seed: Seed = 42
    stages: tuple[StageName, ...] = ("finetune", "score", "policy", "teacher", "joint", "evaluate")
    finetune: FinetuneConfig = FinetuneConfig()
    score: ScoreConfig = ScoreConfig()
    init: InitConfig = InitConfig()
    policy: PolicyConfig = PolicyConfig()
    teacher: TeacherConfig = TeacherConfig()
    joint: JointConfig = JointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    parallel: ParallelConfig = ParallelConfig()

"""Define the settings of a run, a class a section.

The defaults are the hyper-parameters published for classification (docs/method.md, "Hyper-parameters").
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from trbert_jax.datasets.labels import class_name
from trbert_jax.datasets.registry import DEV_SHARE
from trbert_jax.errors import UserError
from trbert_jax.io import find_path
from trbert_jax.model.backbones import BACKBONES
from trbert_jax.reduction.rules import DEFAULT_RULE, point_thresholds, rule_names


def _name_from(names: Callable[[], Collection[str]]) -> AfterValidator:
    """Restricts a text to the names of a registry, as they are when the settings are loaded."""

    def check(value: str) -> str:
        if value not in names():
            raise PydanticCustomError("name", "should be one of {expected}", {"expected": ", ".join(names())})
        return value

    return AfterValidator(check)


def _find(path: str) -> str:
    try:
        return str(find_path(path)) if path.startswith("~") or not path.isascii() else path
    except UserError as error:
        raise PydanticCustomError("path", "{reason}", {"reason": str(error)}) from error


def _label(value: Any) -> Any:
    """Returns the class name of a number or boolean, as `datasets.labels` names it."""
    return class_name(value) if isinstance(value, bool | int | float) else value


def _thresholds(value: Any) -> float | tuple[float, ...]:
    try:
        values = point_thresholds(value)
    except UserError:
        expected = "should be a probability above 0 and below 1, or a list of one for each point of reduction"
        raise PydanticCustomError("threshold", expected) from None
    return values if isinstance(value, list | tuple) else values[0]


# Strict: a quoted "8" is not a number, 1 is not true.
Text = Annotated[str, Field(strict=True, min_length=1)]
FilePath = Annotated[Text, AfterValidator(_find)]  # a file or folder, `~` expanded; or a name on the hub
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Index = Annotated[int, Field(strict=True, ge=0)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Threshold = Annotated[Number, Field(gt=0, lt=1)]
PointThresholds = Annotated[Any, PlainValidator(_thresholds)]  # a number, or one for each point
Labels = tuple[Annotated[Text, BeforeValidator(_label)], ...]
Positive = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
MaxLength = Annotated[int, Field(strict=True, ge=3)]  # [CLS], one token, [SEP]
Backend = Literal["packed", "masked"]  # see `model.packed`
Speedup = Annotated[Number, Field(gt=1)]
Penalty = Literal["ratio", "flops"]  # see `reduction.budget`
PenaltyGradient = Literal["reward", "exact"]
Credit = Literal["reward", "gate", "secant"]  # see `reduction.gate`
StageName = Annotated[Text, _name_from(lambda: STAGES)]
RuleName = Annotated[Text, _name_from(rule_names)]
BackboneName = Annotated[Text, _name_from(lambda: tuple(BACKBONES))]
BaselineName = Annotated[Text, _name_from(lambda: rule_names("baseline"))]


class Section:
    """A group of settings. A comment explains each field: on its line, or on the lines before it."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """The examples."""

    name: Text  # a registered data set, text for one's own texts, hf:NAME or tfds:NAME for a library's
    path: FilePath | None = None  # folder of the files; hf, tfds and stdlib have their own unless it is given
    train: FilePath | None = None  # file of rows, or a folder of some; text only; null for that of `path`
    dev: FilePath | None = None  # the same; without a dev set, a part of the training examples serves as one
    test: FilePath | None = None  # the same; without a test set, set evaluate.split to dev
    unlabeled: FilePath | None = None  # the same, for stages that read no labels; needs finetune.max_examples
    text_field: Text = "text"  # field of the text; text, hf and tfds only, as the next two
    text_pair_field: Text | None = None  # field of a second text; null for single texts
    label_field: Text = "label"  # field of the label
    labels: Labels | None = None  # names of the classes in order, text and hf only; null for those of train
    dev_share: Threshold = DEV_SHARE  # share of the training examples for dev, without a dev set; text, hf
    # balanced: weight the loss of an example by the inverse share of its class, 1 on average; texts only
    class_weights: Literal["balanced"] | None = None
    max_train_examples: Count | None = None  # largest number of training examples; null for all
    max_eval_examples: Count | None = None  # the same for the dev split and for the test split
    cache_dir: FilePath | None = None  # folder for tokenized examples; null for WORKDIR/cache
    # Folder of `trbert prepare-data`, from which training reads in the background; null to read `path`.
    prepared: FilePath | None = None
    skip_bad_records: Flag = False  # skip and count invalid records; else the first is an error
    # Form of a multiple choice, race only. pairs: each option is an example, right or wrong; independent: a
    # softmax over the options, each with its own selection; shared: one selection for the tokens they share.
    choices: Literal["pairs", "independent", "shared"] = "pairs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScratchConfig(Section):
    """The shape of a model with random weights; used only if model.init is scratch."""

    model_type: BackboneName = "bert"  # the architecture, see `model.backbones`
    vocab_size: Count = 30522  # entries of the vocabulary; an upper limit if the tokenizer is trained
    hidden_size: Count = 768  # width, a multiple of num_heads
    num_layers: Count = 12  # encoder layers
    num_heads: Count = 12  # attention heads
    intermediate_size: Count = 3072  # width of the feed-forward layers
    initializer_range: Positive = 0.02  # of the random weights; a narrow model learns faster with more


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneConfig(Section):
    """The model before training."""

    init: FilePath  # folder or hub id of a Hugging Face BERT or DistilBERT, or scratch for random weights
    max_length: MaxLength = 512  # in tokens, special tokens included; longer texts are cut
    max_positions: Count | None = None  # rows of the position table; null for the checkpoint's, or max_length
    keep_layers: tuple[Index, ...] | None = None  # layers to take from the checkpoint, 0-based; null for all
    dtype: Literal["float32", "bfloat16"] = "float32"  # of activations; parameters and losses are float32
    # Folder or hub id; null for the one of the checkpoint, or from scratch one trained on the training texts.
    tokenizer: FilePath | None = None
    line_breaks_as_spaces: Flag = False  # read `<br />` as one space, here and in the trained model
    # Longest question in word pieces (with its options for race); null for the data set's default.
    max_question_length: Count | None = None
    # Word pieces between the starts of the windows over a long context; null for the data set's default.
    window_step: Count | None = None
    max_segments: Count = 1  # largest number of segments of a long document; triviaqa and wikihop only
    # Whether selectors also read how well a token matches the other segment, the question; not in the paper.
    selector_match: Flag = False
    scratch: ScratchConfig = ScratchConfig()  # the shape if init is scratch


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section):
    """How all devices of all processes share each batch; affects no result but dropout's masks."""

    strategy: Literal["jit", "pmap"] = "jit"  # one program over a mesh of all devices, or one per device
    fsdp: Count = 1  # devices that share one copy of parameters and optimizer state; more than 1 needs jit
    remat: Flag = False  # recompute activations in the backward pass: less memory, more time
    activation_memory: NonNegative = 4.0  # GiB of a device that the packed backward pass may keep instead


class StageConfig(Section):
    """The settings of a stage. Each field of `RunConfig` of such a type is a stage of that name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadingConfig(StageConfig):
    """The settings that all stages share that read the training examples."""

    # Largest number of training examples; fewer are a part of more. null for all that have what the stage
    # needs: labels, of which only finetune.max_examples are read, or scores, or a teacher's logits.
    max_examples: Count | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(ReadingConfig):
    """The settings that all trained stages share. A step is one update of the parameters."""

    batch_size: Count = 8  # examples per forward and backward pass
    accumulation_steps: Count = 4  # passes per update, of batch_size x accumulation_steps examples
    learning_rate: Positive = 3e-5  # the peak; the rate rises linearly from 0, then falls linearly to 0
    epochs: Count = 3  # passes over the training examples
    max_steps: Count | None = None  # number of steps in place of epochs
    warmup_fraction: Fraction = 0.1  # share of the steps in which the learning rate rises
    warmup_steps: Count | None = None  # number of these steps, in place of the share
    weight_decay: NonNegative = 0.0  # of AdamW, on everything except biases and LayerNorm weights
    clip_norm: Positive = 1.0  # largest global L2 norm of a gradient; larger ones are scaled down to it
    adam_epsilon: Positive = 1e-8  # of AdamW
    eval_steps: Count | None = None  # steps between evaluations on the dev split; null for once per epoch
    save_steps: Count = 2000  # steps between checkpoints, about the most that an interruption loses
    keep_checkpoints: Count = 2  # number of latest checkpoints to keep, in addition to the best one
    output: Literal["last", "best"] = "last"  # the checkpoint that the next stage starts from, best on dev
    dropout: Flag = True  # whether dropout is on
    # Let padding, as states of zeros, take part in the softmax and the maximum over positions and in
    # distillation, as in the published code. Not for classification.
    published_padding: Flag = False
    # packed computes the kept tokens only; masked all of them, with the same results but for dropout's masks.
    backend: Backend = "packed"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainingConfig):
    """Stage finetune: train the dense model on the task."""

    epochs: Count = 5  # as in TrainingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig(ReadingConfig):
    """Stage score: compute the score of every training token."""

    batch_size: Count = 8  # examples per forward and backward pass
    # residual: how much the loss depends on the later work on a token; gate: how much the model's confidence
    # depends on attention to it, without labels.
    kind: Literal["residual", "gate"] = "residual"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig(TrainingConfig):
    """Stage init: train the selectors to rank tokens like the residual scores."""

    dropout: Flag = False  # as in TrainingConfig
    per_length_scale: Flag = False  # multiply the loss by the batch's mean of 1 / length, see docs/method.md
    keep: tuple[Threshold, ...] | None = None  # share of tokens that each point keeps; null for one half
    # l1: the keep probability learns the rank of the token; bce: whether it is in the share to keep.
    loss: Literal["l1", "bce"] = "l1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig(TrainingConfig):
    """Stage policy: train the selectors with REINFORCE; everything else is frozen."""

    dropout: Flag = False  # as in TrainingConfig
    num_samples: Count = 8  # selections drawn per example, K in the paper
    alpha: NonNegative = 1.0  # weight of the length penalty (harmonic coefficient); a larger one drops more
    # Speed-up in FLOPs to reach: the weight of the penalty starts at alpha and follows; null for alpha alone.
    target_speedup: Speedup | None = None
    # Cost that the penalty counts. ratio: kept tokens over model.max_length, the mean over the points of
    # reduction; flops: those of the encoder over the dense ones of model.max_length tokens.
    penalty: Penalty = "ratio"
    # How the selectors learn from the penalty. reward: as a part of the reward; exact: by the derivative of
    # its expectation, without the noise of the samples.
    penalty_gradient: PenaltyGradient = "reward"
    # How the selectors learn from the task loss. reward: by REINFORCE, from the loss of each sample; gate: by
    # its derivative by the weight of each kept token, which takes a backward pass and needs fewer samples;
    # secant: gate to second order.
    credit: Credit = "reward"
    guide_rate: Fraction = 0.5  # share of the steps in which one sample imitates the residual scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherConfig(ReadingConfig):
    """Stage teacher: store the fine-tuned model's logits for the training examples."""

    batch_size: Count = 32  # examples per forward pass
    states: Flag = False  # store the last layer's states of [CLS] too, for joint.distill_states


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointConfig(TrainingConfig):
    """Stage joint: train selectors and encoder together."""

    num_samples: Count | None = None  # selections drawn per example; null for policy.num_samples
    alpha: NonNegative = 1.0  # weight of the length penalty, as in PolicyConfig
    target_speedup: Speedup | None = None  # as in PolicyConfig
    penalty: Penalty = "ratio"  # as in PolicyConfig
    penalty_gradient: PenaltyGradient = "reward"  # as in PolicyConfig
    # As in PolicyConfig; with rule threshold, from the selection of prediction, and no samples are drawn.
    credit: Credit = "reward"
    distill: Flag = True  # learn from the fine-tuned model's logits (stage teacher), not from the labels
    temperature: Positive = 1.0  # divides teacher and student logits in distillation
    # Selections that the task or distillation loss is computed on. sample: num_samples drawn ones; threshold:
    # the one of prediction, with drawn ones, which train only the selectors, beside it.
    rule: Literal["sample", "threshold"] = "sample"
    # Last share of the steps, in which the selectors stay as they are, but for a shift of their logits that
    # holds target_speedup, and the encoder trains on the selection of prediction.
    hard_fraction: Fraction = 0.0
    distill_states: NonNegative = 0.0  # weight of the distance to the teacher's state of [CLS]
    # Largest shift of the selectors' logits, drawn for each point and selection but the first of an example,
    # or for half of the examples if they have one: the encoder then learns to work with other thresholds too.
    jitter: NonNegative = 0.0
    selector_learning_rate: Positive | None = None  # peak for the selectors; null for learning_rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig(StageConfig):
    """Stage evaluate: evaluate the models; also the evaluations during training."""

    batch_size: Count = 32  # examples per forward pass; affects predictions only under rule batch_max
    split: Literal["test", "dev"] = "test"  # evaluations during training always use dev
    rule: RuleName = DEFAULT_RULE  # how tokens are selected, see `reduction.rules`
    backend: Backend = "packed"  # packed computes the kept tokens only; masked all, with the same results
    baselines: tuple[BaselineName, ...] = ()  # untrained selections to evaluate at the same kept counts
    # Keep probabilities to evaluate at, besides 0.5; lower keeps more. [0.5, 0.7] has one for each point.
    thresholds: tuple[PointThresholds, ...] = ()
    # Find the best thresholds for many speeds on dev, report them, and store operating points with the model.
    frontier: Flag = False
    speedups: tuple[Speedup, ...] = (2.0, 3.0, 4.0)  # of the operating points: dense FLOPs over reduced ones
    points_lost: tuple[NonNegative, ...] = (0.5, 1.0)  # of others: percentage points of the metric, on dev


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """A whole run, from raw text to results, with a section for each stage."""

    workdir: FilePath  # folder for all outputs of the run, relative to the current directory
    data: DataConfig
    model: BackboneConfig
    seed: Seed = 42  # of data order, new weights, dropout and sampled selections
    # The stages to run, in the order of their sections; init is optional.
    stages: tuple[StageName, ...] = ("finetune", "score", "policy", "teacher", "joint", "evaluate")
    finetune: FinetuneConfig = FinetuneConfig()
    score: ScoreConfig = ScoreConfig()
    init: InitConfig = InitConfig()
    policy: PolicyConfig = PolicyConfig()
    teacher: TeacherConfig = TeacherConfig()
    joint: JointConfig = JointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    parallel: ParallelConfig = ParallelConfig()  # may change between calls of one run


# The stages in their order: name -> settings.
STAGES: dict[str, type[StageConfig]] = {
    f.name: type(f.default) for f in dataclasses.fields(RunConfig) if isinstance(f.default, StageConfig)
}
_run_class: type[RunConfig] = RunConfig


def run_class() -> type[RunConfig]:
    """Returns `RunConfig` with the sections of all stages added so far."""
    return _run_class


def add_section(name: str, settings: type[StageConfig]) -> None:
    """Adds the section of a new stage, before that of stage evaluate; all its fields need defaults."""
    global _run_class
    section, options = (name, settings, settings()), dict[str, Any](frozen=True, kw_only=True)
    _run_class = dataclasses.make_dataclass("RunConfig", [section], bases=(_run_class,), **options)
    STAGES.update({name: settings, "evaluate": STAGES.pop("evaluate")})

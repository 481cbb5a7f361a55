"""Define the stages of an experiment: `finetune, score, [init], policy, teacher, joint, evaluate`.

To add a stage, register one `Stage`. Source: docs/method.md, "Training stages".
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax import config as settings
from trbert_jax.config import RunConfig, TrainingConfig
from trbert_jax.errors import UserError
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Batch, Params, TokenReducingModel
from trbert_jax.model.packed import BACKENDS
from trbert_jax.model.pretrained import Pretrained
from trbert_jax.reduction import budget, flops
from trbert_jax.reduction import residual_scores as residual
from trbert_jax.reduction.budget import Control, first_control
from trbert_jax.reduction.flops import EncoderShape
from trbert_jax.tasks.examples import Examples
from trbert_jax.training import stage_inputs, stage_objectives, step
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.objectives import Objective
from trbert_jax.training.stage_inputs import StageInputs
from trbert_jax.training.stage_objectives import Update, joint_samples
from trbert_jax.training.step import Hold, ObjectiveFn, Rates, Trains, shift_selectors

ReadInputs = Callable[[Experiment, str, Examples, Examples, str], StageInputs]
StageFlops = Callable[[RunConfig, ModelConfig, np.ndarray, Sequence[float] | None], np.ndarray]


def _dense(passes: int) -> StageFlops:
    """Returns the FLOPs of passes of the dense model; a backward pass counts as two forward passes."""
    return lambda config, model, lengths, shares: (
        passes * flops.exact_dense_flops(EncoderShape.of(model), lengths).astype(np.float64)
    )


_DENSE_UPDATE = _dense(3)


def _sampled(passes: int, num_samples: Callable[[RunConfig], int]) -> StageFlops:
    """Returns the FLOPs of passes of several sampled selections of each example."""
    return lambda config, model, lengths, shares: (
        passes * flops.sampled_flops(EncoderShape.of(model), lengths, num_samples(config), shares)
    )


def _scored_layers(config: RunConfig, model: ModelConfig) -> int:
    first = {"residual": residual.score_layers(model)[1] + 1, "gate": model.reduction_layers[0]}
    return model.num_layers - first[config.score.kind]


def _score_flops(
    config: RunConfig, model: ModelConfig, lengths: np.ndarray, shares: Sequence[float] | None
) -> np.ndarray:
    """Adds the gradient of states, not of parameters, through the layers that the scores depend on."""
    layers = _scored_layers(config, model)
    layer = EncoderShape.of(model).layer_macs(lengths)
    return _dense(1)(config, model, lengths, shares) + 2.0 * layers * layer


def _policy_flops(
    config: RunConfig, model: ModelConfig, lengths: np.ndarray, shares: Sequence[float] | None
) -> np.ndarray:
    """Counts the samples, and the gradient of their states if gates give credit."""
    passes = 1 if config.policy.credit == "reward" else 2
    return _sampled(passes, lambda config: config.policy.num_samples)(config, model, lengths, shares)


def _joint_flops(
    config: RunConfig, model: ModelConfig, lengths: np.ndarray, shares: Sequence[float] | None
) -> np.ndarray:
    """Counts the samples, the selection of prediction, or both, over all updates of the stage."""
    hard, arguments = config.joint.hard_fraction, (config, model, lengths, shares)
    kept = _sampled(3, lambda config: 1)(*arguments)
    if config.joint.rule == "sample":
        return (1 - hard) * _sampled(3, joint_samples)(*arguments) + hard * kept
    drawn = (1 - hard) * _sampled(1, joint_samples)(*arguments) if config.joint.credit == "reward" else 0
    return drawn + kept


def _joint_layers(config: RunConfig, model: ModelConfig) -> float:
    joint, samples = config.joint, joint_samples(config)
    copies = samples if joint.rule == "sample" and joint.hard_fraction < 1 else 1
    return EncoderShape.of(model).segments[0] + _reduced_layers(model, copies)


def _policy_layers(config: RunConfig, model: ModelConfig) -> float | None:
    reward = config.policy.credit == "reward"
    return None if reward else _reduced_layers(model, config.policy.num_samples)


def _reduced_layers(model: ModelConfig, copies: int) -> float:
    others = EncoderShape.of(model).segments[1:]
    return sum(copies * n * flops.ASSUMED_KEPT ** (i + 1) for i, n in enumerate(others))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of an experiment: a training stage has `trains` and `objective`, any other stage `run`."""

    settings: type  # class of its section in the configuration, which gives the stage its name
    # Stages whose model it starts from; the first configured one is used. () for the model before training.
    starts_from: tuple[str, ...] = ()
    # Which components of the parameters an update changes.
    trains: Callable[[ModelConfig], Trains] | None = None
    objective: Callable[[Update], Objective] | None = None
    # Settings -> another stage, and the function of `stage_inputs` that reads its outputs for batches.
    inputs: Callable[[Any], tuple[str, ReadInputs] | None] = lambda _: None
    # Settings -> whether it reads the labels of the training examples, or other answers.
    reads_labels: Callable[[Any], bool] = lambda _: True
    # Computes the stage, given the stage itself, writes its files and returns its summary.
    run: Callable[[Experiment, Any], dict[str, Any]] | None = None
    reduces: bool = False  # whether its model is evaluated with token reduction
    compared: bool = False  # whether its model is reported even if later stages train it further
    evaluates: bool = False  # whether it evaluates the models of the other stages, on `SECTION.split`
    # Settings, model, row lengths int [R], kept shares (`flops.assumed_flops`) -> FLOPs of one pass [R].
    flops: StageFlops = _DENSE_UPDATE
    # Layers whose inner values the backward pass keeps, for all tokens; None without an encoder gradient.
    kept_layers: Callable[[RunConfig, ModelConfig], float | None] | None = lambda _, model: model.num_layers

    @property
    def name(self) -> str:
        """Name of the stage and of its section: `joint` for settings of class `JointConfig`."""
        return self.settings.__name__.removesuffix("Config").lower()

    def trained(self, model: ModelConfig) -> Trains:
        """Returns which components of the parameters an update changes. Raises ValueError if none."""
        if self.trains is None:
            raise ValueError(f"stage {self.name} trains nothing")
        return self.trains(model)

    def evaluation(self, config: RunConfig) -> dict[str, Any]:
        """Returns rule and backend with which its model is evaluated."""
        rule = config.evaluate.rule if self.reduces else "dense"
        return {"rule": rule, "backend": config.evaluate.backend}

    def start(self, experiment: Experiment) -> Pretrained:
        """Loads the model that the stage starts from. Raises `UserError` if that stage has not been run."""
        name = self._start(experiment.config)
        return experiment.load(name, self.name) if name else experiment.base_model()

    def _start(self, config: RunConfig) -> str | None:
        return next((x for x in self.starts_from if x in config.stages), [None, *self.starts_from][-1])

    def hard_from(self, config: RunConfig, total_steps: int) -> int:
        """Returns the first update of the last part of the stage, in which selectors do not change."""
        share = getattr(getattr(config, self.name), "hard_fraction", 0.0)
        return total_steps - int(share * total_steps)

    def rates(self, config: RunConfig, hard: bool = False) -> Rates | None:
        """Returns the rate of each component as a multiple of the learning rate; None if all are 1."""
        section = getattr(config, self.name)
        own = getattr(section, "selector_learning_rate", None)
        if own is None and not hard:
            return None
        selectors = 0.0 if hard else own / section.learning_rate
        return lambda name: selectors if name.startswith("selector_") else 1.0

    def control(self, config: RunConfig) -> Control | None:
        """Returns the control before the first update if the stage has a target speed-up."""
        section = getattr(config, self.name)
        return first_control(section.alpha) if getattr(section, "target_speedup", None) else None

    def hold(self, config: RunConfig, total_steps: int, hard: bool = False) -> Hold | None:
        """Returns what holds the target speed-up: the penalty, and in the last part a shift of logits."""
        section = getattr(config, self.name)
        target = getattr(section, "target_speedup", None)
        if target is None:
            return None
        learning = self.hard_from(config, total_steps)

        def hold(
            trained: Params, control: Control, speedup: jax.Array, step: jax.Array
        ) -> tuple[Params, Control]:
            if hard:
                return shift_selectors(trained, budget.shift(speedup, target)), control
            return trained, budget.follow(control, speedup, target, step, learning, section.alpha)

        return hold

    def max_examples(self, config: RunConfig) -> int | None:
        """Returns how many training examples it reads at most; None for all that there are.

        Raises `UserError` if its settings ask for more than have a label, or an output of the stage it reads.
        """
        section = getattr(config, self.name)
        limits, source = dict[str, int | None](), self.inputs(section)
        if self.reads_labels(section):
            limits["finetune.max_examples"] = config.finetune.max_examples
        if source:
            limits[f"{source[0]}.max_examples"] = STAGES[source[0]].max_examples(config)
        most, key = min((limit, key) for key, limit in [*limits.items(), ("", math.inf)] if limit is not None)
        asked = getattr(section, "max_examples", None)
        if asked is not None and min(asked, config.data.max_train_examples or asked) > most:
            raise UserError(f"{self.name}.max_examples: {asked} is more than the {most} of {key}")
        return asked if asked is not None else int(most) if key else None

    def examples(self, experiment: Experiment, model: Pretrained) -> Examples:
        """Returns the training examples that it reads; labels beyond `finetune.max_examples` are -1."""
        labeled = experiment.config.finetune.max_examples
        return experiment.training_examples(model, self.max_examples(experiment.config), labeled)

    def reads(self, config: RunConfig) -> tuple[str, ...]:
        """Returns the stages whose outputs decide its result."""
        if self.evaluates:
            return tuple(stage.name for stage in compared_models(config))
        source = self.inputs(getattr(config, self.name))
        return tuple(name for name in (self._start(config), source and source[0]) if name)

    def reads_data(self, experiment: Experiment) -> tuple[str, ...]:
        """Returns the data that decides its result, see `Experiment.data_digest`."""
        section = getattr(experiment.config, self.name)
        if not self.evaluates:
            train = experiment.data.part(self.max_examples(experiment.config))
            return (train, "labels", *["dev"] * (getattr(section, "output", "last") == "best"))
        tunes = (experiment.data.task.inputs.unanswerable or section.frontier) and section.split != "dev"
        return (section.split, f"{section.split}.ids", *["dev"] * tunes)


def configured(config: RunConfig) -> list[Stage]:
    """Returns the configured stages, in order."""
    return [STAGES[name] for name in config.stages]


def compared_models(config: RunConfig) -> list[Stage]:
    """Returns the stages whose models are compared: the dense one first, the final one last."""
    trained = [stage for stage in configured(config) if stage.trains]
    compared = [stage for stage in trained if stage.compared or stage is trained[-1]]
    if compared and not compared[0].reduces:
        return compared
    dense = next(stage for stage in STAGES.values() if stage.trains and not stage.starts_from)
    return [dense, *compared]


def objective_of(
    stage: Stage, config: RunConfig, model: TokenReducingModel, total_steps: int, hard: bool = False
) -> ObjectiveFn:
    """Returns a training stage's objective as a function of parameters, micro-batch, key and step.

    `hard` asks for that of the last part of the stage, see `Stage.hard_from`.
    """
    section: TrainingConfig = getattr(config, stage.name)
    compute = stage.objective
    if compute is None:
        raise ValueError(f"stage {stage.name} has no objective")

    def objective(
        params: Params, batch: Batch, rng: jax.Array, step: jax.Array, multiplier: jax.Array | None = None
    ) -> Objective:
        if section.published_padding and model.config.reads_all_tokens:
            batch = {**batch, "head_mask": jnp.ones_like(batch["mask"])}
        forward = {
            "model": model,
            "params": params,
            "batch": batch,
            "dropout_rng": _dropout_rng(rng, batch) if section.dropout else None,
            "execute": BACKENDS[section.backend],
        }
        result = compute(Update(config, batch, rng, step, total_steps, hard, multiplier, forward))
        if "class_weight" in batch:
            result = dataclasses.replace(result, total=result.total * batch["class_weight"])
        return result

    return objective


def _dropout_rng(rng: jax.Array, batch: Batch) -> jax.Array:
    """Returns the dropout key of a micro-batch; those of one update differ by their examples."""
    return jax.random.fold_in(jax.random.fold_in(rng, 1), batch["index"][0])


# The stages ---------------------------------------------------------------------------------------


def _evaluate(experiment: Experiment, stage: Stage) -> dict[str, Any]:
    from trbert_jax.training.evaluation import evaluate_stage  # imports this module

    return evaluate_stage(experiment, stage)


STAGES: dict[str, Stage] = {}  # in the order in which they run


def register_stage(stage: Stage) -> None:
    """Adds a stage to `STAGES`, and its section to the configuration if that is missing, before evaluate.

    Raises `ValueError` if the stage is registered already.
    """
    if stage.name in STAGES:
        raise ValueError(f"stage {stage.name} is registered already")
    if stage.name not in settings.STAGES:
        settings.add_section(stage.name, stage.settings)
    STAGES[stage.name] = stage
    for name in [name for name in settings.STAGES if name in STAGES]:
        STAGES[name] = STAGES.pop(name)


for _stage in (
    Stage(
        settings=settings.FinetuneConfig,
        trains=step.trains_dense,
        objective=stage_objectives.finetune,
        compared=True,
    ),
    Stage(
        settings=settings.ScoreConfig,
        starts_from=("finetune",),
        run=stage_inputs.score_stage,
        flops=_score_flops,
        reads_labels=lambda section: section.kind == "residual",
        kept_layers=lambda config, model: 1 + _scored_layers(config, model),
    ),
    Stage(
        settings=settings.InitConfig,
        starts_from=("finetune",),
        trains=step.trains_selectors,
        objective=stage_objectives.init,
        reads_labels=lambda section: False,
        inputs=lambda section: ("score", stage_inputs.ranks),
        reduces=True,
    ),
    Stage(
        settings=settings.PolicyConfig,
        starts_from=("init", "finetune"),
        trains=step.trains_selectors,
        objective=stage_objectives.policy,
        inputs=lambda section: ("score", stage_inputs.guide) if section.guide_rate > 0 else None,
        reduces=True,
        compared=True,
        flops=_policy_flops,
        kept_layers=_policy_layers,
    ),
    Stage(
        settings=settings.TeacherConfig,
        starts_from=("finetune",),
        run=stage_inputs.teacher_stage,
        reads_labels=lambda section: False,
        flops=_dense(1),
        kept_layers=None,
    ),
    Stage(
        settings=settings.JointConfig,
        starts_from=("policy", "init", "policy"),  # policy too if neither is configured
        trains=step.trains_all,
        objective=stage_objectives.joint,
        reads_labels=lambda section: not section.distill,
        inputs=lambda section: ("teacher", stage_inputs.teacher_logits) if section.distill else None,
        reduces=True,
        compared=True,
        flops=_joint_flops,
        kept_layers=_joint_layers,
    ),
    Stage(settings=settings.EvaluateConfig, run=_evaluate, evaluates=True, flops=_dense(1), kept_layers=None),
):
    register_stage(_stage)

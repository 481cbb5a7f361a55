"""Define the objective of each training stage on a micro-batch, from its settings.

`objectives` has the pieces. Source: docs/method.md, "Training stages" and "Beyond the paper".
"""

import dataclasses
import math
from typing import Any

import jax

from trbert_jax.config import JointConfig, PolicyConfig, RunConfig
from trbert_jax.model.model import Batch
from trbert_jax.reduction.selection import Rule, keep_probable
from trbert_jax.training import objectives
from trbert_jax.training.objectives import Objective


@dataclasses.dataclass(frozen=True)
class Update:
    """One micro-batch of an update, as a stage's objective receives it."""

    config: RunConfig
    batch: Batch
    rng: jax.Array  # key of the update
    step: jax.Array  # int32 scalar, number of the update (0-based)
    total_steps: int  # updates of the stage
    hard: bool  # whether it belongs to the last part of the stage, in which selectors do not change
    multiplier: jax.Array | None  # of the length penalty in place of alpha, if a target speed-up is held
    forward: dict[str, Any]  # arguments of the model's pass, for the functions of `objectives`


def finetune(update: Update) -> Objective:
    """Stage finetune: the task's loss of the dense model."""
    return objectives.dense_objective(**update.forward)


def joint_samples(config: RunConfig) -> int:
    """Returns the selections that stage joint draws per example."""
    return config.joint.num_samples or config.policy.num_samples


def init(update: Update) -> Objective:
    """Stage init: the selectors learn the ranks of the residual scores."""
    section = update.config.init
    return objectives.initialization_objective(
        **update.forward, per_length_scale=section.per_length_scale, keep=section.keep, loss=section.loss
    )


def policy(update: Update) -> Objective:
    """Stage policy: REINFORCE or credit by gates, in the first updates with one imitating sample."""
    section = update.config.policy
    guided = update.step < math.ceil(section.guide_rate * update.total_steps)
    imitating = "guide" in update.batch and guided
    options = {**_penalty(update, section), "credit": section.credit}
    samples = _samples(update, section.num_samples, imitating, **options)
    return _counted(update, objectives.policy_objective(update.batch, samples), samples)


def joint(update: Update) -> Objective:
    """Stage joint: task and policy loss of samples, of the selection of prediction, or both."""
    section, num_samples = update.config.joint, joint_samples(update.config)
    options: dict[str, Any] = {"temperature": section.temperature, "state_weight": section.distill_states}
    if update.hard:  # nothing is priced: the encoder alone learns
        kept = _kept(update, section.jitter, alpha=0.0, **options)
        return _counted(update, objectives.joint_objective(update.batch, kept), kept)
    options |= {**_penalty(update, section), "credit": section.credit}
    if section.rule == "sample":
        samples = _samples(update, num_samples, False, section.jitter, **options)
        return _counted(update, objectives.joint_objective(update.batch, samples), samples)
    kept = _kept(update, section.jitter, **options)
    if section.credit != "reward":
        return _counted(update, objectives.joint_objective(update.batch, kept), kept)
    params = objectives.only_selectors(update.forward["params"])
    drawn = dataclasses.replace(update, forward={**update.forward, "params": params})
    samples = _samples(drawn, num_samples, False, **options)
    return _counted(update, objectives.thresholded_joint_objective(update.batch, kept, samples), kept)


def _penalty(update: Update, section: PolicyConfig | JointConfig) -> dict[str, Any]:
    weight = section.alpha if update.multiplier is None else update.multiplier
    return {"alpha": weight, "penalty": section.penalty, "penalty_gradient": section.penalty_gradient}


def _counted(update: Update, objective: Objective, samples: objectives.PolicySamples) -> Objective:
    return objective if update.multiplier is None else objectives.with_speed(objective, samples)


def _kept(update: Update, jitter: float, **options: Any) -> objectives.PolicySamples:
    """Runs every example once, with the selection of prediction."""
    return _run(update, keep_probable, 1, jitter, {"sampled": False, **options})


def _samples(
    update: Update, num_samples: int, imitating: jax.Array | bool, jitter: float = 0.0, **options: Any
) -> objectives.PolicySamples:
    rule = objectives.sampling_rule(update.rng, update.batch, num_samples, imitating)
    sampled = imitating is False or ~objectives.imitators(update.batch, num_samples, imitating)
    return _run(update, rule, num_samples, jitter, {"sampled": sampled, **options})


def _run(
    update: Update, rule: Rule, num_samples: int, jitter: float, options: dict[str, Any]
) -> objectives.PolicySamples:
    model = update.forward["model"].config
    if jitter:
        rng = jax.random.fold_in(update.rng, 2)
        options["shift"] = objectives.draw_shift(rng, update.batch, num_samples, model.num_reductions, jitter)
    return objectives.sample_policy(
        **update.forward, rule=rule, num_samples=num_samples, max_length=model.max_length, **options
    )

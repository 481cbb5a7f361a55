"""Compute the objective of each stage: pure functions from parameters and a batch to one value per example.

A batch is a dict of arrays of B examples with G rows each (`trbert_jax.tasks.losses.Rows`; G is 1 for most
tasks): `input_ids` int32 [B * G, S], `mask` bool [B * G, S], optional `token_type_ids` int32 [B * G, S],
`valid` bool [B] (False for padding examples), the task's targets, such as `labels` int32 [B], and the
stage's inputs: `guide` float32 [B * G, stages, S] (residual scores), `rank` (same shape), `teacher_logits`
(shaped as the logits of the examples).

Examples are averaged only in `mean_over_examples`: micro-batches and devices do not change the result.
`execute` runs the model: `model.model.forward` or `model.packed.packed_forward`.
Source: paper, section 3.3; docs/method.md, "Training stages".
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from flax import struct

from trbert_jax.model.heads import Logits
from trbert_jax.model.model import Batch, ModelOutput, Params, TokenReducingModel, forward, head_inputs
from trbert_jax.model.packed import PackedEncoder, PackedTokens, packed_forward
from trbert_jax.reduction import budget
from trbert_jax.reduction import policy_loss as policy
from trbert_jax.reduction import residual_scores as residual
from trbert_jax.reduction import selection as tokens
from trbert_jax.reduction import selector_init as initialization
from trbert_jax.reduction.flops import EncoderShape
from trbert_jax.reduction.gate import gates, num_judged, secants, with_taps
from trbert_jax.reduction.rules import RULES
from trbert_jax.tasks import TASKS
from trbert_jax.tasks.losses import Rows, state_distance

Execute = Callable[..., ModelOutput]
sg = jax.lax.stop_gradient


@struct.dataclass
class Objective:
    """Per-example values of one stage, float32 [B] each."""

    total: jax.Array  # the minimized value
    weight: jax.Array  # in the mean: 1; 0 for padding; in stage init, a mean over tokens, their number
    metrics: dict[str, jax.Array]  # logged as means over examples

    def sums(self) -> dict[str, jax.Array]:
        """Returns weighted sums over examples, to be added up over micro-batches and devices."""
        values = {"loss": self.total, **self.metrics}
        # `where`, not a product: a padding row may hold NaN.
        summed = {k: jnp.sum(jnp.where(self.weight > 0, v * self.weight, 0.0)) for k, v in values.items()}
        return {**summed, "weight": jnp.sum(self.weight)}


def mean_over_examples(sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns means over examples from `Objective.sums`."""
    weight = jnp.maximum(sums["weight"], 1.0)
    return {k: v / weight for k, v in sums.items() if k != "weight"}


def dense_objective(
    model: TokenReducingModel,
    params: Params,
    batch: Batch,
    *,
    dropout_rng: jax.Array | None = None,
    execute: Execute = forward,
) -> Objective:
    """Returns the task's loss of the dense model (stage finetune)."""
    task, rows = TASKS[model.config.task], Rows(batch)
    logits = execute(model, params, batch, rule=None, dropout_rng=dropout_rng).logits
    loss, metrics = task.loss(logits, rows), {}
    if "labels" in batch:
        answers = task.example_logits(logits, rows).argmax(-1)
        metrics["accuracy"] = (answers == batch["labels"]).astype(jnp.float32)
    return Objective(loss, batch["valid"].astype(jnp.float32), metrics)


def score_tokens(
    model: TokenReducingModel, params: Params, batch: Batch
) -> tuple[jax.Array, Logits, jax.Array]:
    """Computes the residual scores float32 [B * G, stages, S] of a batch, the dense logits and losses [B]."""
    encoder = PackedEncoder.of(model, len(batch["input_ids"]))

    def loss(tokens: PackedTokens, layers: range) -> tuple[jax.Array, Logits]:
        logits, _ = encoder.finish(params, tokens, layers, head_inputs(batch))
        return TASKS[model.config.task].loss(logits, Rows(batch)), logits

    return residual.residual_scores(model.config, encoder, params, batch, loss)


def gate_scores(
    model: TokenReducingModel, params: Params, batch: Batch
) -> tuple[jax.Array, Logits, jax.Array]:
    """Computes the gate scores of a batch, `| d margin / d b |`, with the dense model and without labels.

    b is the log of a token's gate from a point of reduction on (`reduction.gate`), 0 here, and the margin is
    how sure the model is (`Task.margin`). Returns scores float32 [B * G, stages, S], 0 on padding, the dense
    logits, and the margins [B].
    """
    config = model.config

    def total(bias: jax.Array) -> tuple[jax.Array, tuple[Logits, jax.Array]]:
        logits = packed_forward(
            model, params, batch, rule=tokens.keep_all, gate=lambda stage, selection: bias[stage]
        ).logits
        margins = TASKS[config.task].margin(logits, Rows(batch))
        return margins.sum(), (logits, margins)

    bias = jnp.zeros((config.num_reductions, *batch["mask"].shape))
    gradient, (logits, margins) = jax.grad(total, has_aux=True)(bias)
    # As residual scores, one for each selector, also of a shallow model with a single point.
    points = jnp.minimum(jnp.arange(config.num_selectors), config.num_reductions - 1)
    score = jnp.where(batch["mask"], jnp.abs(gradient[points]), 0.0)
    return score.swapaxes(0, 1), logits, margins


# Kinds of scores -> the function (model, parameters, batch) that computes them, the logits and a value [B].
SCORES = {"residual": score_tokens, "gate": gate_scores}


def initialization_objective(
    model: TokenReducingModel,
    params: Params,
    batch: Batch,
    *,
    per_length_scale: bool = False,
    keep: Sequence[float] | None = None,
    loss: str = "l1",
    dropout_rng: jax.Array | None = None,
    execute: Execute = forward,
) -> Objective:
    """Returns the mean over tokens of the probability's error (`rank_error`), summed over selectors.

    `per_length_scale` multiplies by the mean of 1 / length over the micro-batch, as the published code does.
    """
    output = execute(model, params, batch, rule=tokens.keep_all, dropout_rng=dropout_rng)
    rows = Rows(batch)
    judged = output.selections[0].scored & rows.valid[:, None]
    num_tokens = jnp.maximum(rows.grouped(judged.sum(-1)).sum(1), 1)
    valid = batch["valid"].astype(jnp.float32)
    error = initialization.rank_error(output.selections, batch["rank"], keep, loss)
    error = rows.grouped(jnp.where(judged, error, 0.0).sum(-1)).sum(1) / num_tokens
    if per_length_scale:
        error = error * jnp.sum(valid / num_tokens) / jnp.maximum(valid.sum(), 1.0)
    return Objective(error, num_tokens * valid, {})


@struct.dataclass
class PolicySamples:
    """K sampled runs of a batch: arrays [K, B], but `logits` and `selections` have K * B * G rows."""

    task_loss: jax.Array
    selector_nll: jax.Array
    kept_ratio: jax.Array
    reward: jax.Array
    penalty: jax.Array  # to be minimized directly; 0 if it is a part of the reward
    flops: jax.Array  # reported, over those of a dense text of the maximum length
    dense_flops: jax.Array  # of the dense model
    logits: Logits
    selections: tuple[tokens.Selection, ...]
    credit: str = struct.field(pytree_node=False, default="reward")  # or gate, secant


def sample_policy(
    model: TokenReducingModel,
    params: Params,
    batch: Batch,
    *,
    rule: tokens.Rule,
    num_samples: int,
    alpha: float | jax.Array,
    max_length: int,
    penalty: str = "ratio",
    penalty_gradient: str = "reward",
    credit: str = "reward",
    sampled: bool | jax.Array = True,
    temperature: float = 1.0,
    state_weight: float = 0.0,
    shift: jax.Array | None = None,
    dropout_rng: jax.Array | None = None,
    execute: Execute = forward,
) -> PolicySamples:
    """Runs every example K times with a sampling rule and computes the rewards.

    Their task loss is the distillation loss if the batch has `teacher_logits`, else that of the labels. To it
    adds `state_weight` times the distance to `teacher_state`, if the batch has that. The length penalty is
    `alpha` times the kept ratio or share of FLOPs; `exact`, it is no part of the reward. With other `credit`
    the task loss is differentiable in the selectors, see `reduction.gate.gates`, which also explains
    `sampled`, bool or bool [K * B * G]. `shift`, float32 [K * B * G, stages], is added to the logits of the
    selectors.
    """
    rule = rule if shift is None else tokens.shifted(rule, shift)
    taps: list[jax.Array] = []
    gate = None if credit == "reward" else gates(sampled, shift)
    gate = secants(gate, taps) if gate and credit == "secant" else gate
    output = execute(
        model, params, batch, rule=rule, num_copies=num_samples, gate=gate, dropout_rng=dropout_rng
    )
    task, rows, selections = TASKS[model.config.task], Rows(batch, num_samples), output.selections
    if shift is not None:
        selections = tuple(s.shifted(x) for s, x in zip(selections, shift.T, strict=True))
    if "teacher_logits" in batch:
        loss = task.distillation_loss(output.logits, rows, temperature)
    else:
        loss = task.loss(output.logits, rows)
    if "teacher_state" in batch:
        loss += state_weight * rows.mean(state_distance(output.first, rows.get("teacher_state")))
    if taps:
        distils = "teacher_logits" in batch
        least = task.distillation_loss(rows.get("teacher_logits"), rows, temperature) if distils else 0.0
        loss = with_taps(loss, [rows.grouped(tap).sum(1) for tap in taps], loss - least)
    kept = rows.kept(selections)
    nll = policy.selector_nll(selections)
    ratio = policy.kept_ratio([s.num_kept for s in kept], max_length)
    shape, length = EncoderShape.of(model.config), rows.get("mask").sum(-1)
    flops = budget.flops_share(shape, [length, *(s.num_kept for s in kept)], max_length)
    dense = budget.flops_share(shape, [length], max_length)
    expected = jnp.zeros_like(flops)
    if penalty_gradient == "exact":
        # As the policy loss, which is a mean over tokens and whose baseline includes the sample itself.
        whole = 1 - (credit == "reward") / num_samples
        counts = budget.expected_counts(kept, [whole / num_judged(s) for s in kept], sampled)
        if penalty == "ratio":
            expected = policy.kept_ratio(counts, max_length)
        else:
            expected = budget.flops_share(shape, [length, *counts], max_length)
    values = (loss, *map(rows.mean, (nll, ratio, expected, flops, dense)))
    loss, nll, ratio, expected, flops, dense = (x.reshape(num_samples, -1) for x in values)
    cost = {"ratio": ratio, "flops": flops}[penalty]
    if shift is not None:  # the speed-up is that of the logits as they are, if any of these runs has them
        plain = rows.mean((shift == 0).all(-1).astype(jnp.float32)).reshape(num_samples, -1)
        flops, dense = (jnp.where(plain > 0, x, 1e-6 * x) for x in (flops, dense))
    reward = policy.reward(loss, cost, 0.0 if penalty_gradient == "exact" else alpha)
    values = (loss, nll, ratio, reward, alpha * expected, flops, dense)
    return PolicySamples(*values, output.logits, kept, credit)


def policy_objective(batch: Batch, samples: PolicySamples) -> Objective:
    """Returns the loss that trains the selectors (stage policy).

    With credit reward this is the REINFORCE loss, with the exact penalty if any; with credit gate or
    secant the task loss, which then has a derivative by the selectors, and the penalty.
    """
    loss, task_loss = samples.penalty.mean(0), samples.task_loss.mean(0)
    if samples.credit == "reward":
        loss += policy.policy_loss(samples.selector_nll, samples.reward)
        task_loss = jnp.zeros(())
    metrics = {"task_loss": samples.task_loss.mean(0), "policy_loss": loss}
    metrics |= {"reward": samples.reward.mean(0), "kept_ratio": samples.kept_ratio.mean(0)}
    for stage, selection in enumerate(samples.selections):
        # The kept tokens of each sample of an example, a mean over its rows, [K, B].
        kept = selection.num_kept.reshape(*samples.task_loss.shape, -1).astype(jnp.float32).mean(-1)
        metrics[f"kept_tokens_{stage}"] = kept.mean(0)
    return Objective(loss + task_loss, batch["valid"].astype(jnp.float32), metrics)


def joint_objective(batch: Batch, samples: PolicySamples) -> Objective:
    """Returns the task or distillation loss plus the loss of the selectors (stage joint)."""
    objective = policy_objective(batch, samples)
    total = samples.task_loss.mean(0) + objective.metrics["policy_loss"]
    return Objective(total, objective.weight, objective.metrics)


def thresholded_joint_objective(batch: Batch, kept: PolicySamples, samples: PolicySamples) -> Objective:
    """Returns the task or distillation loss of the selections of prediction, `kept`, plus the REINFORCE loss.

    `samples` are of the same batch and train the selectors only, see `only_selectors`.
    """
    encoder, selectors = policy_objective(batch, kept), policy_objective(batch, samples)
    learning = {name: selectors.metrics[name] for name in ("policy_loss", "reward")}
    total = kept.task_loss.mean(0) + selectors.total
    return Objective(total, encoder.weight, {**encoder.metrics, **learning})


def draw_shift(rng: jax.Array, batch: Batch, num_samples: int, num_points: int, largest: float) -> jax.Array:
    """Draws a shift of the selectors' logits for each point: float32 [K * B * G, stages], uniform.

    The first of several selections of an example has none, and neither has half of the examples with one.
    """
    rows = Rows(batch)

    def one(key: jax.Array) -> jax.Array:
        coin, value = jax.random.split(key)
        shift = jax.random.uniform(value, (num_points,), minval=-largest, maxval=largest)
        return jnp.where((num_samples > 1) | jax.random.bernoulli(coin), shift, 0.0)

    keys = [tokens.row_keys(key, batch["index"]) for key in jax.random.split(rng, num_samples)]
    shifts = jnp.stack([jax.vmap(one)(k) for k in keys])  # [K, B, stages]
    if num_samples > 1:
        shifts = shifts.at[0].set(0.0)
    return jnp.repeat(shifts.reshape(-1, num_points), rows.group, axis=0)


def with_speed(objective: Objective, samples: PolicySamples) -> Objective:
    """Adds the FLOPs of the samples to the metrics, from which `step.train_step` computes a speed-up."""
    flops = {"flops": samples.flops.mean(0), "dense_flops": samples.dense_flops.mean(0)}
    return dataclasses.replace(objective, metrics={**objective.metrics, **flops})


def only_selectors(params: Params) -> Params:
    """Returns the parameters without gradient except of the selectors."""
    encoder = {k: x if k.startswith("selector_") else sg(x) for k, x in params["encoder"].items()}
    return {**sg(params), "encoder": encoder}


def sampling_rule(rng: jax.Array, batch: Batch, num_samples: int, imitating: jax.Array | bool) -> tokens.Rule:
    """Returns a rule that samples; while `imitating`, the first copy of each example follows the guide.

    `rng` is the key of this step's actions; the keys of the examples are derived from it and `index` in
    `batch`, which also has `guide` unless `imitating`, a bool scalar, maybe traced, is the literal False.
    """
    copy_rngs = jax.random.split(rng, num_samples)
    inputs = {"row_keys": jax.vmap(Rows(batch).keys)(copy_rngs).reshape(-1)}
    if imitating is False:
        return cast(tokens.Rule, RULES["sample"].build(inputs))
    guide, follow = jnp.tile(batch["guide"], (num_samples, 1, 1)), imitators(batch, num_samples, imitating)
    rule = RULES["imitate"].build({**inputs, "guide": guide, "imitating": follow})
    return cast(tokens.Rule, rule)


def imitators(batch: Batch, num_samples: int, imitating: jax.Array | bool) -> jax.Array:
    """Returns the rows that follow the guide while `imitating`: those of the first copy, bool [K * B * G]."""
    rows = batch["input_ids"].shape[0]
    return (jnp.arange(num_samples * rows) < rows) & imitating

"""Price the kept tokens, and hold a target speed-up by that price.

Source: docs/method.md, "Target speed-up" and "Exact gradient of the penalty".
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from trbert_jax.reduction.flops import EncoderShape
from trbert_jax.reduction.gate import log_gate
from trbert_jax.reduction.selection import Selection

RATE = 0.05  # relative change of the multiplier in an update for a relative error of 1
DAMPING = 5.0  # relative change of the weight for the error of the last update
SHIFT = 0.1  # change of the selectors' logits in an update for a relative error of 1
RANGE = 1e-3, 100.0  # of the multiplier
RAMP = 0.5  # share of the updates in which the asked speed-up rises to the target


@struct.dataclass
class Control:
    """Holds the speed-up; part of the train state. Float32 scalars."""

    weight: jax.Array  # of the length penalty in the next update, in place of alpha; may be negative
    multiplier: jax.Array  # the part of it that changes slowly
    start: jax.Array  # speed-up in the first update


def first_control(alpha: float) -> Control:
    """Returns the control before the first update."""
    return Control(jnp.float32(alpha), jnp.float32(alpha), jnp.float32(1))


def follow(
    control: Control, speedup: jax.Array, target: float, step: jax.Array, total_steps: int, alpha: float
) -> Control:
    """Raises the weight of the penalty if an update was slower than asked, lowers it if it was faster.

    `speedup` is the dense model's FLOPs over those of the update; `step` is its number of `total_steps`. The
    asked speed-up rises from that of the first update to the `target` in the first half, unless it starts
    higher. `alpha` is the first weight and the scale of the others.
    """
    start = jnp.where(step == 0, speedup, control.start)
    share = jnp.minimum(step / max(RAMP * total_steps, 1), 1)
    asked = jnp.where(start < target, start + share * (target - start), target)
    error = jnp.clip(asked / speedup - 1, -1, 1)
    multiplier = jnp.clip(control.multiplier * jnp.exp(RATE * error), *RANGE)
    # Where dropping does no harm, no positive weight brings tokens back.
    return Control(multiplier + DAMPING * jnp.maximum(multiplier, alpha) * error, multiplier, start)


def shift(speedup: jax.Array, target: float) -> jax.Array:
    """Returns the change of the selectors' logits after an update of this speed-up: lower if it was slow."""
    return -SHIFT * jnp.clip(target / speedup - 1, -1, 1)


def expected_counts(
    selections: Sequence[Selection], scale: Sequence[jax.Array], sampled: bool | jax.Array = True
) -> list[jax.Array]:
    """Computes the tokens that each point keeps on average, given the tokens it judges: float32 [rows] each.

    Differentiable in the logits of the point, and in those of earlier points: a token kept there with
    probability p has a gate (`reduction.gate.log_gate`, also for `sampled`). `scale`, [rows] for each point,
    multiplies the gradients.
    """
    gate, counts = jnp.zeros(()), []
    for selection, factor in zip(selections, scale, strict=True):
        first = jnp.arange(selection.logits.shape[-1]) == 0  # [CLS], always kept
        drawn = selection.scored & ~first
        fixed = jax.lax.stop_gradient(selection.logits)
        logits = fixed + factor[:, None] * (selection.logits - fixed)
        prob, kept = jax.nn.sigmoid(logits), selection.keep.astype(jnp.float32)
        change = jnp.where(drawn, prob * (1 + gate) - kept, 0.0)
        # [CLS] and tokens that are not judged here may have been drawn at an earlier point.
        others = jnp.where(selection.keep & ~drawn, gate, 0.0)
        counts.append(jnp.sum(kept + change + others, axis=-1))
        gate = gate + factor[:, None] * log_gate(selection, sampled)
    return counts


def largest_speedup(shape: EncoderShape, max_length: int) -> float:
    """Returns the speed-up of a text of the maximum length whose tokens, except `[CLS]`, are all dropped."""
    ones = [jnp.ones(())] * len(shape.reduction_layers)
    return float(1 / flops_share(shape, [jnp.float32(max_length), *ones], max_length))


def flops_share(shape: EncoderShape, tokens: Sequence[jax.Array], max_length: int) -> jax.Array:
    """Computes reported FLOPs over those of the dense model for `max_length` tokens, float32.

    `tokens` are the numbers before reduction and after each point, or the first alone for the dense model;
    arrays of one shape, and so is the result.
    """
    dense = float(shape.num_layers * shape.layer_macs(max_length) + shape.classifier_macs)  # above int32
    counts = [jnp.asarray(x, jnp.float32) for x in tokens]
    layers = shape.segments if len(counts) > 1 else (shape.num_layers,)
    macs = sum(q * shape.macs(n) for q, n in zip(layers, counts, strict=True))
    return (macs + sum(map(shape.selector_macs, counts[1:])) + shape.classifier_macs) / dense

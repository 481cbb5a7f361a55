"""Let the task loss tell each kept token's selector what the token is worth: credit by gates.

A gate g scales the weight of a token as a key; 1 keeps it, 0 drops it. A run with gates of 1 has the values
of a run without; its derivative by b = log g is, to first order, what the token was worth. In attention b is
a bias of the key's scores. Source: docs/method.md, "Credit by gates".
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from trbert_jax.reduction.selection import Selection, TokenSet

# (point of reduction, its decisions) -> b float32 [B, S], with value 0
Gate = Callable[[int, Selection], jax.Array]


def log_gate(selection: Selection, sampled: bool | jax.Array = True) -> jax.Array:
    """Computes b = log g of each token: 0, but differentiable in the selector's logits; float32 [B, S].

    The derivative of the expected loss by a logit is `p (1 - p) E[f(kept) - f(dropped)]`, with `df/db` of a
    kept token for the difference. A token is drawn with probability p, so the derivative of b is `1 - p`; in
    rows that are not `sampled`, bool or bool [B], but follow a threshold, it is `p (1 - p)`. It is 0 for
    dropped tokens, [CLS], and tokens that are not judged.
    """
    logits = selection.logits
    keep_prob = jax.nn.sigmoid(jax.lax.stop_gradient(logits))
    chance = jnp.where(jnp.expand_dims(sampled, -1), 1.0, keep_prob)
    chosen = selection.keep & selection.scored & (jnp.arange(logits.shape[-1]) > 0)
    slope = jnp.where(chosen, chance * (1 - keep_prob), 0.0)
    return slope * (logits - jax.lax.stop_gradient(logits))


def gates(sampled: bool | jax.Array = True, shift: jax.Array | None = None) -> Gate:
    """Returns the gates of a run that trains its selectors, see `log_gate`.

    Divides by the number of tokens judged, as the policy loss is a mean over them. `shift`, float32
    [B, stages], has been added to the logits when the tokens were chosen.
    """

    def gate(stage: int, selection: Selection) -> jax.Array:
        selection = selection if shift is None else selection.shifted(shift[:, stage])
        return log_gate(selection, sampled) / num_judged(selection)[:, None]

    return gate


def secants(gate: Gate, taps: list[jax.Array]) -> Gate:
    """Returns gates that give a token `g - g^2 / 4f` for its derivative g of the loss, see `with_taps`.

    With the token the loss is f above its minimum; without it, to second order, f - g + g^2 / 4f. Appends to
    `taps` one array for each point.
    """

    def curved(stage: int, selection: Selection) -> jax.Array:
        bias, tap = _tap(gate(stage, selection))
        taps.append(tap)
        return bias

    return curved


def with_taps(loss: jax.Array, taps: Sequence[jax.Array], excess: jax.Array) -> jax.Array:
    """Connects the taps of `secants` with the loss of each row, [B], and what it is above its minimum, [B].

    Changes no value.
    """
    curvature = jax.lax.stop_gradient(1 / (4 * jnp.maximum(excess, 1e-5)))
    return loss + sum((tap[:, 0] + tap[:, 1] * curvature for tap in taps), start=jnp.zeros(()))


@jax.custom_vjp
def _tap(bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    return bias, jnp.zeros((len(bias), 2))


def _tap_backward(_: None, cotangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array]:
    # Of b, and of the taps: the weight of the row's loss in the mean, and that over 4f.
    slope, (weight, curved) = cotangents[0], cotangents[1].T[..., None]
    curvature = jnp.where(weight > 0, curved / jnp.where(weight > 0, weight, 1) ** 2, 0.0)
    return (slope - slope**2 * curvature,)


_tap.defvjp(lambda bias: (_tap(bias), None), _tap_backward)


def num_judged(selection: Selection) -> jax.Array:
    """Counts the tokens judged at a point, at least 1: int32 [B]."""
    return jnp.maximum(selection.scored.sum(-1), 1)


def add_bias(bias: jax.Array | None, gate: jax.Array) -> jax.Array:
    """Adds the gates of one more point: a token dropped there is missing in all layers that follow."""
    return gate if bias is None else bias + gate


def gate_states(tokens: TokenSet, points: Sequence[tuple[jax.Array, jax.Array]]) -> TokenSet:
    """Gates the states that a head reads: a token dropped at a point would have returned as it was there.

    `points` are b, float32 [B, S], and states [B, S, H] at each point of reduction. Changes no value.
    """
    last = jax.lax.stop_gradient(tokens.states)
    states = tokens.states
    for gate, before in points:
        lost = (last - jax.lax.stop_gradient(before)).astype(jnp.float32)
        states = states + (gate[..., None] * lost).astype(states.dtype)
    return TokenSet(states, tokens.valid)

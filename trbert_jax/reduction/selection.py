"""Select the tokens that an encoder keeps.

Everything here is a pure function of small `[B, S]` arrays (B rows, S padded positions), shared by all
backends. A *rule* decides at one point of reduction; it is any function `(stage, logits, valid) -> keep` with

    stage   int, 0 for the first point of reduction,
    logits  float32 [B, S], the selector's logit of every token,
    valid   bool [B, S], tokens not yet dropped,
    keep    bool [B, S], tokens the rule wants to keep.

A row always keeps its first token ([CLS]) and never gets a token back; `select` ensures both.
`trbert_jax.reduction.rules` lists the rules by name. Source: paper, section 3; docs/method.md, "Selection".
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

Rule = Callable[[int, jax.Array, jax.Array], jax.Array]

# Keeps the logarithm of a saturated probability finite; the published value, and part of the loss.
LOG_EPSILON = 1e-6


@struct.dataclass
class TokenSet:
    """Hidden states, and which of them are remaining tokens."""

    states: jax.Array  # float [B, S, H]
    valid: jax.Array  # bool [B, S]; False for padding and for dropped tokens
    key_bias: jax.Array | None = None  # float32 [B, S], added to the attention scores of a key; None: nothing

    def repeat(self, num_copies: int) -> "TokenSet":
        """Stacks copies of the batch: row `j * B + i` is copy j of example i."""
        return jax.tree.map(lambda x: jnp.tile(x, (num_copies,) + (1,) * (x.ndim - 1)), self)


@struct.dataclass
class SharedPassage:
    """Tokens that consecutive rows share: the article and the question of a multiple choice.

    The rows decide on them together, by the mean of their selector logits, and keep the same tokens. A rule
    must treat rows with the same logits alike, and draw the same random numbers for them.
    """

    shared: jax.Array  # bool [B, S], the same in all rows of a group; False in rows that fill a group up
    group: int = struct.field(pytree_node=False)  # rows of a group

    def mean(self, logits: jax.Array) -> jax.Array:
        """Averages over each group: [B, S] -> [B, S], the same in all rows of a group."""
        real = self.shared.any(-1).reshape(-1, self.group, 1)
        groups = jnp.where(real, logits.reshape(-1, self.group, logits.shape[-1]), 0)
        return jnp.repeat(groups.sum(1) / jnp.maximum(real.sum(1), 1), self.group, axis=0)

    def repeat(self, num_copies: int) -> "SharedPassage":
        """Repeats the rows like `TokenSet.repeat`."""
        return dataclasses.replace(self, shared=jnp.tile(self.shared, (num_copies, 1)))


@struct.dataclass
class Selection:
    """The decisions at one point of reduction."""

    logits: jax.Array  # float32 [B, S], selector logits
    scored: jax.Array  # bool [B, S], tokens that were judged
    keep: jax.Array  # bool [B, S], tokens that were kept; always the first

    @property
    def num_kept(self) -> jax.Array:
        """int32 [B]."""
        return jnp.sum(self.keep, axis=-1, dtype=jnp.int32)

    def shifted(self, shift: jax.Array) -> "Selection":
        """Adds `shift`, float32 [B], to the logits of the rows."""
        return dataclasses.replace(self, logits=self.logits + shift[:, None])


def select(
    logits: jax.Array, valid: jax.Array, stage: int, rule: Rule, passage: SharedPassage | None = None
) -> Selection:
    """Decides at one point of reduction.

    Args:
      logits, valid, stage, rule: see the module's docstring.
      passage: tokens that several rows share and decide on together; all others are kept. None: every row
        decides on all its tokens.
    """
    scored = valid
    if passage is not None:
        logits, scored = passage.mean(logits), valid & passage.shared
    chosen = rule(stage, logits, scored) & scored
    is_first = jnp.arange(valid.shape[-1]) == 0  # [CLS]
    not_judged = ~scored  # the row's own tokens, if rows decide on shared ones
    keep = valid & (chosen | is_first | not_judged)
    # No gradient passes through the decision: the selectors learn from the policy loss alone.
    return Selection(logits=logits, scored=scored, keep=jax.lax.stop_gradient(keep))


def drop_tokens(
    tokens: TokenSet, logits: jax.Array, stage: int, rule: Rule, passage: SharedPassage | None = None
) -> tuple[TokenSet, Selection]:
    """Applies a rule at one point of reduction to a padded batch.

    Takes the tokens before it, states [B, S, H]; the other arguments are those of `select`. Returns the
    tokens after it (same shape, dropped ones no longer valid) and the `Selection`.
    """
    selection = select(logits, tokens.valid, stage, rule, passage)
    return dataclasses.replace(tokens, valid=selection.keep), selection


def restore(dropped: TokenSet, tokens: TokenSet) -> TokenSet:
    """Restores dropped tokens in the state they had when dropped, without gradient.

    `dropped` holds all tokens of a batch, each in the state to restore; `tokens` are its remaining tokens.
    """
    left = jax.lax.stop_gradient(dropped.states)
    return dataclasses.replace(dropped, states=jnp.where(tokens.valid[..., None], tokens.states, left))


def keep_all(stage: int, logits: jax.Array, valid: jax.Array) -> jax.Array:
    """Keeps all tokens, but runs the selectors (their initialization needs the logits)."""
    return valid


def keep_probable(stage: int, logits: jax.Array, valid: jax.Array) -> jax.Array:
    """Keeps every token with a keep probability of at least one half, the default of evaluation.

    Depends only on the token's own row, so a prediction does not depend on the rest of the batch.
    """
    return (logits >= 0) & valid


def keep_above(min_logit: jax.Array) -> Rule:
    """Returns `keep_probable` with other thresholds, see `min_logit`; float32 [B, stages], each row's own."""
    return lambda stage, logits, valid: (logits >= min_logit[:, stage, None]) & valid


def shifted(rule: Rule, shift: jax.Array) -> Rule:
    """Adds `shift`, float32 [B, stages], to the logits that a rule reads."""
    return lambda stage, logits, valid: rule(stage, logits + shift[:, stage, None], valid)


def min_logit(threshold: float) -> float:
    """Returns the logit of a keep probability between 0 and 1; one half gives exactly 0."""
    return math.log(threshold) - math.log(1 - threshold)


def keep_batch_max(stage: int, logits: jax.Array, valid: jax.Array) -> jax.Array:
    """Keeps as many tokens in every row as in the row that keeps most, as in the published evaluation.

    Fills the other rows up with their most probable remaining tokens, so results depend on the composition
    of the batch. For comparison only.
    """
    chosen = keep_probable(stage, logits, valid).at[:, 0].set(True)
    most = jnp.max(jnp.sum(chosen & valid, axis=-1))
    return top_tokens(logits.at[:, 0].set(jnp.inf), valid, jnp.broadcast_to(most, logits.shape[:1]))


def replay(actions: jax.Array) -> Rule:
    """Returns a rule that repeats given actions, bool [stages, B, S]."""
    return lambda stage, logits, valid: actions[stage] & valid


def sample(row_keys: jax.Array) -> Rule:
    """Draws every token's action from its own keep probability.

    `row_keys` are PRNG keys [B], one per row, so that a row's draws do not depend on the batch.
    """

    def rule(stage: int, logits: jax.Array, valid: jax.Array) -> jax.Array:
        def draw(key: jax.Array) -> jax.Array:
            return jax.random.uniform(jax.random.fold_in(key, stage), logits.shape[1:])

        return (jax.vmap(draw)(row_keys) < jax.nn.sigmoid(logits)) & valid

    return rule


def imitate(guide: jax.Array, imitating: jax.Array, otherwise: Rule) -> Rule:
    """Lets some rows follow the residual scores instead of the selector (the warm-up of the policy).

    A row that is `imitating`, bool [B], keeps the tokens with the highest scores in `guide`, float32
    [B, stages, S] (not negative), as many as its probabilities sum to, rounded; others follow `otherwise`.
    Paper, section 3.3; docs/method.md, "Imitation".
    """

    def rule(stage: int, logits: jax.Array, valid: jax.Array) -> jax.Array:
        expected = jnp.sum(jnp.where(valid, jax.nn.sigmoid(logits), 0.0), axis=-1)
        count = jnp.floor(expected + 0.5).astype(jnp.int32)
        best = top_tokens(guide[:, stage], valid, count)
        return jnp.where(imitating[:, None], best, otherwise(stage, logits, valid))

    return rule


def random_key(seed: int | jax.Array) -> jax.Array:
    """Makes the PRNG key of a seed: threefry, so that numbers do not follow JAX_DEFAULT_PRNG_IMPL."""
    return jax.random.key(seed, impl="threefry2x32")


def row_keys(rng: jax.Array, index: jax.Array) -> jax.Array:
    """Makes one PRNG key per row from the rows' indices in their data set, int32 [B] -> keys [B]."""
    return jax.vmap(lambda i: jax.random.fold_in(rng, i))(index)


def keep_first(counts: jax.Array) -> Rule:
    """Baseline: keeps the first `counts[stage, row]` tokens of a row; counts int32 [stages, B]."""

    def rule(stage: int, logits: jax.Array, valid: jax.Array) -> jax.Array:
        position = jnp.broadcast_to(jnp.arange(logits.shape[1]), logits.shape)
        return top_tokens(-position, valid, counts[stage])

    return rule


def keep_random(counts: jax.Array, row_keys: jax.Array) -> Rule:
    """Baseline: keeps [CLS] and random others, `counts[stage, row]` tokens in all; counts int32 [stages, B].

    Each row draws one order of preference, so that the second point chooses uniformly among the tokens that
    the first kept. `row_keys` are PRNG keys [B].
    """

    def rule(stage: int, logits: jax.Array, valid: jax.Array) -> jax.Array:
        preference = jax.vmap(lambda key: jax.random.uniform(key, logits.shape[1:]))(row_keys)
        return top_tokens(preference.at[:, 0].set(jnp.inf), valid, counts[stage])

    return rule


def keep_scored(counts: jax.Array, scores: jax.Array) -> Rule:
    """Keeps [CLS] and the tokens with the highest scores, `counts[stage, row]` in all.

    `counts` int32 [stages, B], `scores` float32 [B, stages, S]. With scores of the dense model, an oracle.
    """

    def rule(stage: int, logits: jax.Array, valid: jax.Array) -> jax.Array:
        return top_tokens(scores[:, stage].at[:, 0].set(jnp.inf), valid, counts[stage])

    return rule


def top_tokens(score: jax.Array, valid: jax.Array, count: jax.Array) -> jax.Array:
    """Selects the `count[row]` valid tokens with the highest score; among equals, the first ones.

    `score` [B, S] is finite or +inf on `valid` tokens, bool [B, S]. A row with fewer than `count`, int32 [B],
    keeps all of them. Returns bool [B, S].
    """
    # Two stable sorts give each token its rank; invalid ones come last. Sorting along a row needs
    # no communication when rows are sharded, which lax.top_k would.
    order = jnp.argsort(jnp.where(valid, -score, jnp.inf), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True)
    return (rank < count[:, None]) & valid

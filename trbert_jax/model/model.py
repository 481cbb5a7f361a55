"""Join the encoder with token reduction and the head of a task."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.encoder import Encoder
from trbert_jax.model.heads import HEADS, Logits
from trbert_jax.reduction.gate import Gate
from trbert_jax.reduction.match import NUM_FEATURES
from trbert_jax.reduction.selection import Rule, Selection, SharedPassage, TokenSet, keep_all

Params = Any  # nested dict of arrays
Batch = Mapping[str, jax.Array]  # `input_ids`, `mask`, ... of B rows


@struct.dataclass
class ModelOutput:
    """Logits of the task's head and one `Selection` per point of reduction (none for the dense encoder)."""

    logits: Logits
    selections: tuple[Selection, ...]
    first: jax.Array  # the last layer's state of each row's first token, [rows, H]


class TokenReducingModel(nn.Module):
    """An encoder that drops tokens between its layers, and the head of a task."""

    config: ModelConfig
    # Compute dtype; parameters, selector logits, softmax, LayerNorm statistics and logits stay float32.
    dtype: Any = jnp.float32
    remat: bool = False  # recompute a layer's inner values in the backward pass instead of storing them
    activation_memory: float = 4 * 2**30  # bytes that the packed backward pass may store instead

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.dtype, self.remat)
        self.head = self.config.head.module(self.config, self.dtype)

    def __call__(
        self,
        batch: Batch,
        *,
        rule: Rule | None,
        num_copies: int = 1,
        gate: Gate | None = None,
        deterministic: bool = True,
    ) -> ModelOutput:
        """Runs a batch.

        Args:
          batch: `input_ids` int32 [B, S], `mask` bool [B, S] (True for real tokens), optional
            `token_type_ids` int32 [B, S] and the inputs of the head (`Head.inputs`). `shared` bool [B, S]
            marks the tokens that the options of a multiple choice share, if they decide on them together;
            the length of `valid` bool [examples] then says how many rows an example has.
          rule: how tokens are selected (`trbert_jax.reduction.selection`); None runs the dense encoder.
          num_copies: samples of each example, K. The layers before the first point of reduction run once
            for all; outputs have K * B rows, row `j * B + i` is copy j of example i.
          gate: makes the output differentiable in the selectors' logits (`trbert_jax.reduction.gate`).
          deterministic: no dropout; otherwise the `dropout` RNG is needed.
        """
        tokens = self.encoder.embed(
            batch["input_ids"], batch["mask"], batch.get("token_type_ids"), deterministic
        )
        tokens = self.encoder.before_selection(tokens, deterministic)
        if num_copies > 1:
            tokens = tokens.repeat(num_copies)
        passage = shared_passage(batch, num_copies)
        segments = segments_of(batch, num_copies)
        tokens, selections = self.encoder.from_selection(tokens, rule, deterministic, passage, gate, segments)
        logits = self.answer(tokens, head_inputs(batch, num_copies), deterministic)
        return ModelOutput(logits, selections, tokens.states[:, 0])

    def answer(self, tokens: TokenSet, inputs: Batch, deterministic: bool = True) -> Logits:
        """Computes float32 logits from the encoder's output and the `head_inputs`.

        The output needs only its first token if the head reads [CLS] alone.
        """
        if not self.config.reads_all_tokens:
            return self.head(self.encoder.sentence_state(tokens), deterministic)
        states = jnp.where(tokens.valid[..., None], tokens.states, 0)
        return self.head(states, inputs.get("head_mask", tokens.valid), inputs, deterministic)


def forward(
    model: TokenReducingModel,
    params: Params,
    batch: Batch,
    *,
    rule: Rule | None,
    num_copies: int = 1,
    gate: Gate | None = None,
    dropout_rng: jax.Array | None = None,
) -> ModelOutput:
    """Runs the model on a batch, with dropout if given a key for it."""
    return model.apply(
        {"params": params},
        batch,
        rule=rule,
        num_copies=num_copies,
        gate=gate,
        deterministic=dropout_rng is None,
        rngs=None if dropout_rng is None else {"dropout": dropout_rng},
    )


def head_inputs(batch: Batch, num_copies: int = 1) -> dict[str, jax.Array]:
    """Returns the entries that heads read besides the states, for `num_copies` copies of the rows.

    These are `Head.inputs` and `head_mask` bool [B, S], the positions that head and losses see, where they
    differ from the real tokens.
    """
    keys = [*(key for head in HEADS.values() for key in head.inputs), "head_mask"]
    inputs = {key: batch[key] for key in keys if key in batch}
    return {key: jnp.tile(x, (num_copies, *(1,) * (x.ndim - 1))) for key, x in inputs.items()}


def segments_of(batch: Batch, num_copies: int) -> jax.Array | None:
    """Returns the token types of `num_copies` copies of the rows, int32 [K * B, S]; None without any."""
    types = batch.get("token_type_ids")
    return None if types is None else jnp.tile(types, (num_copies, 1))


def shared_passage(batch: Batch, num_copies: int = 1) -> SharedPassage | None:
    """Returns the tokens that rows of a multiple choice decide on together; None if each decides alone."""
    if "shared" not in batch:
        return None
    passage = SharedPassage(batch["shared"], len(batch["shared"]) // len(batch["valid"]))
    return passage.repeat(num_copies) if num_copies > 1 else passage


def init_params(config: ModelConfig, rng: jax.Array) -> Params:
    """Draws float32 parameters, every selector included: normal(0, initializer_range), biases 0."""
    model = TokenReducingModel(config)
    batch = {"input_ids": jnp.zeros((1, 2), jnp.int32), "mask": jnp.ones((1, 2), bool)}
    if config.selector_match:
        batch["token_type_ids"] = jnp.zeros((1, 2), jnp.int32)
    batch |= {key: jnp.zeros((1, *shape), jnp.int32) for key, shape in config.head.inputs.items()}

    def everything(module: TokenReducingModel) -> jax.Array:
        output = module(batch, rule=keep_all)
        # A shallow model never uses its second selector, but checkpoints hold it.
        read = jnp.zeros((1, config.hidden_size)), *[jnp.zeros((1, NUM_FEATURES))] * config.selector_match
        unused = [selector(*read) for selector in module.encoder.selector]
        return sum(x.sum() for x in [*jax.tree.leaves(output.logits), *unused])

    return jax.jit(nn.init(everything, model))(rng)["params"]  # one compilation, not one an array

"""Models of the published sizes, by their shapes alone: no arrays, no memory."""

import jax
import jax.numpy as jnp
import pytest

from trbert_jax.inference.benchmark import SIZES
from trbert_jax.inference.engine import CompiledForward
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import TokenReducingModel, init_params


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        ModelConfig(max_positions=1024, max_length=1024, labels=tuple("abcde")),
        ModelConfig(model_type="distilbert", num_layers=6, type_vocab_size=0),
    ],
    ids=["bert_base", "bert_1024", "distilbert"],
)
def test_published_sizes(config: ModelConfig) -> None:
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    count = sum(x.size for x in jax.tree.leaves(params))
    selectors = 2 * (768 * 32 + 32 + 32 + 1)
    if config.model_type == "bert":
        base = 109_482_240 + (config.max_positions - 512) * 768  # BERT-base, pooler included
        assert count == base + selectors + (768 + 1) * config.num_labels
    else:
        assert count == 66_362_880 + selectors + (768 + 1) * 768 + (768 + 1) * config.num_labels


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_packed_execution_needs_less_memory_than_masked() -> None:
    """As the compiler planned it, of 128 texts padded to 512 tokens; nothing is run."""
    config, rows, width = SIZES["minilm"], 128, 512
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    batch = {
        "input_ids": jax.ShapeDtypeStruct((rows, width), jnp.int32),
        "mask": jax.ShapeDtypeStruct((rows, width), bool),
        "valid": jax.ShapeDtypeStruct((rows,), bool),
        "min_logit": jax.ShapeDtypeStruct((rows, 2), jnp.float32),
    }
    programs, peak = CompiledForward(TokenReducingModel(config)), {}
    for backend in ("packed", "masked"):
        plan = programs.get(params, batch, backend=backend).memory_analysis()  # type: ignore[attr-defined]
        peak[backend] = plan.temp_size_in_bytes + plan.output_size_in_bytes
    # The masked path has attention probabilities of all pairs: B x heads x S x S, four bytes each.
    assert peak["masked"] > rows * config.num_heads * width**2 * 4
    assert peak["packed"] < 0.5 * peak["masked"]

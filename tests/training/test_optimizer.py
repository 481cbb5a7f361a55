from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_models

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import init_params
from trbert_jax.training import step as optimizer

BETA1, BETA2 = 0.9, 0.999


def shapes(config: ModelConfig) -> Any:
    """A parameter tree without memory."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def named(tree: Any) -> dict[str, Any]:
    """Leaves by their path, as in `encoder/layer_0/query/kernel`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


@pytest.mark.parametrize(
    ("total", "warmup", "expected"),
    [(10, 4, [0, 0.5, 1, 1.5, 2, 5 / 3, 4 / 3, 1, 2 / 3, 1 / 3, 0]), (2, 1, [0, 2, 0]), (1, 0, [2, 0])],
)
def test_schedule(total: int, warmup: int, expected: list[float]) -> None:
    """Up from 0 and down to 0; the last value is what an update beyond the end would get."""
    schedule = optimizer.linear_schedule(2.0, total, warmup)
    np.testing.assert_allclose([schedule(t) for t in range(total + 1)], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("clip_norm", [1.0, 100.0])
def test_adamw_against_a_loop(clip_norm: float) -> None:
    """Clipped by the norm of all gradients together, decayed without the moments, scheduled."""
    config, decay, epsilon = tiny_models.BERT, 0.1, 0.5
    rng = np.random.default_rng(1)
    values = {"kernel": rng.normal(size=(2, 3)), "bias": rng.normal(size=3)}
    schedule = optimizer.linear_schedule(0.1, 6, 2)
    adamw = optimizer.adamw(schedule, config, weight_decay=decay, clip_norm=clip_norm, epsilon=epsilon)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"head": values})
    state = adamw.init(params)
    m, v = ({k: np.zeros_like(x) for k, x in values.items()} for _ in range(2))
    for t in range(6):
        grads = {k: 5 * rng.normal(size=x.shape) for k, x in values.items()}
        arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {"head": grads})
        updates, state = adamw.update(arrays, state, params)
        params = optax.apply_updates(params, updates)

        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        assert 1 < norm < 100
        for k, grad in grads.items():
            clipped = grad * min(1, clip_norm / norm)
            m[k] = BETA1 * m[k] + (1 - BETA1) * clipped
            v[k] = BETA2 * v[k] + (1 - BETA2) * clipped**2
            step = np.sqrt(1 - BETA2 ** (t + 1)) / (1 - BETA1 ** (t + 1)) * m[k] / (np.sqrt(v[k]) + epsilon)
            rate = [0, 0.05, 0.1, 0.075, 0.05, 0.025][t]
            values[k] = values[k] - rate * (step + (decay * values[k] if k == "kernel" else 0))
            np.testing.assert_allclose(params["head"][k], values[k], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [tiny_models.BERT, tiny_models.DISTILBERT], ids=lambda c: c.model_type)
def test_decay_mask(config: ModelConfig) -> None:
    """No bias decays. A LayerNorm's scale does only inside DistilBERT's layers, as published."""
    mask = named(optimizer.decay_mask(shapes(config), config))
    assert mask.keys() == named(shapes(config)).keys()
    for name, decays in mask.items():
        quirk = name.endswith("scale") and config.model_type == "distilbert" and "layer_" in name
        assert name.endswith(("kernel", "embedding", "scale", "bias")), name
        assert decays == (quirk or name.endswith(("kernel", "embedding"))), name


@pytest.mark.parametrize("num_layers", [2, 3, 4])
@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_stages_train_their_own(model_type: str, num_layers: int) -> None:
    config = ModelConfig(
        model_type=model_type, num_layers=num_layers, type_vocab_size=2 if model_type == "bert" else 0
    )
    params = shapes(config)
    selectors = {"selector_0", "selector_1"}
    asked = selectors if num_layers == 4 else {"selector_0"}
    dense = params["encoder"].keys() - selectors
    for trains, encoder, head in [
        (optimizer.trains_dense, dense, True),
        (optimizer.trains_selectors, asked, False),
        (optimizer.trains_all, dense | asked, True),
    ]:
        trained, frozen = optimizer.split_params(params, trains(config))
        assert trained["encoder"].keys() == encoder
        assert frozen["encoder"].keys() == params["encoder"].keys() - encoder
        assert ("head" in trained, "head" in frozen) == (head, not head)
        again = named(optimizer.merge_params(trained, frozen))
        assert again.keys() == named(params).keys()
        assert all(again[name] is value for name, value in named(params).items())

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trbert_jax.tasks import losses as task


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("missing", [0, 2])
def test_distillation(temperature: float, missing: int) -> None:
    """The published logit of missing candidates, -10000, does not swallow the digits of the others."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 4, 3))
    target = np.exp(teacher / temperature)
    target /= target.sum(-1, keepdims=True)
    log_prob = student / temperature - np.log(np.exp(student / temperature).sum(-1, keepdims=True))
    absent = np.full((4, missing), task.NO_CANDIDATE)
    ours, theirs = (jnp.asarray(np.append(x, absent, 1), jnp.float32) for x in (student, teacher))
    loss = task.distillation(ours, theirs, temperature)
    np.testing.assert_allclose(loss, -(target * log_prob).sum(-1), rtol=1e-6)
    total = jax.grad(lambda a, b: task.distillation(a, b, temperature).sum(), argnums=(0, 1))
    to_student, to_teacher = total(ours, theirs)
    assert (to_student[:, :3] != 0).all()
    np.testing.assert_array_equal(to_teacher, 0)

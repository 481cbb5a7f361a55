import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trbert_jax.tasks import losses as task


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation(temperature: float) -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 4, 3))
    target = np.exp(teacher / temperature)
    target /= target.sum(-1, keepdims=True)
    log_prob = student / temperature - np.log(np.exp(student / temperature).sum(-1, keepdims=True))
    loss = task.distillation(jnp.asarray(student), jnp.asarray(teacher), temperature)
    np.testing.assert_allclose(loss, -(target * log_prob).sum(-1), rtol=1e-5)
    total = jax.grad(lambda a, b: task.distillation(a, b, temperature).sum(), argnums=(0, 1))
    to_student, to_teacher = total(jnp.asarray(student), jnp.asarray(teacher))
    assert (to_student != 0).all()
    np.testing.assert_array_equal(to_teacher, 0)


def test_distillation_beside_missing_candidates() -> None:
    """Their published logit, -10000, must not swallow the digits of the others."""
    student, teacher = np.array([[0.14, 0.85, 0.78]]), np.array([[1.01, 2.84, 0.19]])
    absent = np.full((1, 2), task.NO_CANDIDATE)
    logits, teacher_logits = (jnp.asarray(np.append(x, absent, 1), jnp.float32) for x in (student, teacher))
    loss = task.distillation(logits, teacher_logits)
    probability = np.exp(teacher) / np.exp(teacher).sum()
    expected = -(probability * (student - np.log(np.exp(student).sum()))).sum(-1)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)

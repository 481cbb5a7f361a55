"""Rows that decide together on a passage imitate one guide, and so keep the same of it."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from trbert_jax.reduction import selection as tokens
from trbert_jax.training import stage_inputs as extras

OPTIONS, WIDTH, SHARED = 4, 7, [4, 5]  # two questions


def read(path: Path, row_targets: dict[str, Any]) -> Any:
    run = types.SimpleNamespace(output_of=lambda stage, name, needed_by: path, finished=lambda stage: {})
    features = types.SimpleNamespace(row_targets=row_targets, group=OPTIONS, num_rows=2 * OPTIONS, digest="")
    return extras.residual_scores(cast(Any, run), "policy", cast(Any, features))


def test_scores_are_summed_over_the_rows_of_a_question(tmp_path: Path) -> None:
    scores = np.random.default_rng(0).random((2 * OPTIONS, 2, WIDTH)).astype(np.float32)
    np.save(tmp_path / "scores.npy", scores)
    np.testing.assert_array_equal(read(tmp_path / "scores.npy", {})[:], scores)
    lengths = np.repeat(SHARED, OPTIONS)
    sums = read(tmp_path / "scores.npy", {"shared_length": lengths})
    guide = sums[np.arange(2 * OPTIONS)]
    np.testing.assert_array_equal(sums[np.array([6, 2, 6, 0])], guide[[6, 2, 6, 0]])
    assert isinstance(sums.values, np.memmap), "read by rows, not held whole"
    np.testing.assert_allclose(guide[2], scores[:4].sum(0), rtol=1e-6)
    np.testing.assert_allclose(guide[7], scores[4:].sum(0), rtol=1e-6)

    shared = jnp.arange(WIDTH) < lengths[:, None]
    valid = shared | (jnp.arange(WIDTH) < 6)
    logits = jnp.asarray(np.random.default_rng(1).normal(0, 0.1, valid.shape).astype(np.float32))
    rule = tokens.imitate(jnp.asarray(guide), jnp.ones(2 * OPTIONS, bool), tokens.keep_all)
    passage = tokens.SharedPassage(shared, OPTIONS)
    keep = np.asarray(tokens.select(logits, valid, 0, rule, passage).keep).reshape(2, OPTIONS, WIDTH)
    for question, length in enumerate(SHARED):
        kept = keep[question]
        assert (kept[:, :length] == kept[0, :length]).all()
        assert 0 < kept[0, :length].sum() < length
        assert kept[:, length:6].all()

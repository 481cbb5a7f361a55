"""Checkpoint folders in tests: load one without messages, edit its files, compare parameters."""

from __future__ import annotations

import json
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import BERT, DISTILBERT

from trbert_jax.model.pretrained import load_pretrained

CONFIGS = pytest.mark.parametrize("config", [BERT, DISTILBERT], ids=lambda c: c.model_type)


def quietly(path: str | Path, **options: Any) -> Any:
    """Loads a checkpoint and fails if that logs anything."""
    with unittest.TestCase().assertNoLogs("trbert_jax", level="DEBUG"):
        return load_pretrained(path, **options)


def edit_json(path: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    values = {k: v for k, v in json.loads(path.read_text()).items() if k not in remove}
    path.write_text(json.dumps({**values, **changes}))


def edit_weights(path: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    weights = load_file(path / "model.safetensors")
    changed = change(weights)
    save_file(weights if changed is None else changed, path / "model.safetensors")


def assert_same_params(left: Any, right: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)

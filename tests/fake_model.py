"""A model for tests of the command line, and what goes in and out there."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

from trbert_jax.errors import UserError
from trbert_jax.model.config import InputConfig


@dataclasses.dataclass
class Prediction:
    label: str
    label_id: int
    scores: np.ndarray
    kept: tuple[np.ndarray, ...]
    num_tokens: int
    truncated: bool
    text: str


class FakeModel:
    """Finds every text positive and keeps as many tokens as it has letters."""

    config = types.SimpleNamespace(labels=("bad", "gut"), inputs=InputConfig(), max_length=99)
    asked: list[dict[str, Any]] = []  # noqa: RUF012 - reset by the fixture

    @classmethod
    def from_pretrained(cls, path: str) -> FakeModel:
        if path == "missing":
            raise UserError("missing: no such directory")
        return cls()

    def predict_stream(self, texts: Iterable[str], **options: Any) -> Iterator[Prediction]:
        self.asked.append(options)
        scores = np.array([0.25, 0.75], np.float32)
        for t in texts:
            kept = (np.arange(len(t)), np.array([0], np.int32))
            yield Prediction("gut", 1, scores, kept, len(t), len(t) > 99, t)

    def compile(self, batch_size: int, rule: str, backend: str) -> Iterator[tuple[str, float]]:
        yield f"{rule}, {backend}, {batch_size} x 8 tokens", 1.5


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def type_in(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

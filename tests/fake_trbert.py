"""`trbert` with a model that needs no time: for what a command reads, prints, and how it ends."""

import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from trbert_jax.cli import main
from trbert_jax.model.config import InputConfig


class FakeModel:
    """Finds every text positive and keeps as many tokens as it has letters."""

    config = types.SimpleNamespace(labels=("bad", "gut"), inputs=InputConfig(), max_length=99)
    asked: list[dict[str, Any]] = []  # noqa: RUF012 - reset by the fixture

    @classmethod
    def from_pretrained(cls, path: str, **options: Any) -> "FakeModel":
        return cls()

    def predict_stream(self, texts: Iterable[str], **options: Any) -> Iterator[Any]:
        self.asked.append(options)
        rest = {"label": "gut", "label_id": 1, "scores": np.array([0.25, 0.75], np.float32)}
        for t in texts:
            kept = (np.arange(len(t)), np.array([0], np.int32))
            yield types.SimpleNamespace(kept=kept, num_tokens=len(t), truncated=len(t) > 99, text=t, **rest)


if __name__ == "__main__":
    module: Any = types.ModuleType("trbert_jax.inference.predictor")
    module.TRBert = FakeModel
    sys.modules[module.__name__] = module
    raise SystemExit(main())

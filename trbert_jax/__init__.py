"""TR-BERT in JAX: encoders that learn which tokens they can stop reading early.

    from trbert_jax import TRBert

    model = TRBert.from_pretrained("work/model")
    model.predict(["a gripping film", "two hours I want back"])[0].label

A model that answers questions: `answer_questions(model, [{"question": "...", "context": "..."}])`.
Nothing heavy is imported before it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trbert_jax.config import load_config
    from trbert_jax.errors import UserError
    from trbert_jax.inference.predictor import TRBert
    from trbert_jax.inference.questions import answer_questions

__version__ = "0.1.0"
__all__ = ["TRBert", "UserError", "__version__", "answer_questions", "load_config"]
_MODULES = {
    "UserError": "errors",
    "TRBert": "inference.predictor",
    "answer_questions": "inference.questions",
    "load_config": "config",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"trbert_jax.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})

"""Ways to make a mistake in the current folder, for test_bad_input.py."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trbert_jax.training import batches

TEXTS = ["the film was good .", "a dull plot !", "it is very bright and good", "I saw a bad film yesterday"]
RECORDS = [{"text": text, "label": label} for text, label in zip(TEXTS, (1, 0, 1, 0), strict=True)]
SIZES = {"train": 8, "dev": 2, "test": 3}
WEIGHTS = "model/model.safetensors"


def write(path: str, content: str | bytes) -> Callable[[], Any]:
    return lambda: Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def append(path: str, content: str) -> Callable[[], Any]:
    return lambda: Path(path).write_bytes(Path(path).read_bytes() + content.encode())


def remove(path: str) -> Callable[[], Any]:
    return Path(path).unlink


def cut(path: str, share: float) -> Callable[[], Any]:
    """Leaves the first part of a file, as a full disk or a broken download does."""

    def spoil() -> None:
        os.truncate(path, int(share * os.path.getsize(path)))

    return spoil


def corrupt(path: str, start: int, stop: int) -> Callable[[], Any]:
    def spoil() -> None:
        content = bytearray(Path(path).read_bytes())
        content[start:stop] = b"\xff" * (stop - start)
        Path(path).write_bytes(content)

    return spoil


def scale_weights(value: float) -> Callable[[], Any]:
    """The classifier's weights become a finite number with which its logits overflow."""

    def spoil() -> None:
        weights = load_file(WEIGHTS)
        save_file(
            {**weights, "classifier.weight": np.full_like(weights["classifier.weight"], value)}, WEIGHTS
        )

    return spoil


def set_json(path: str, **values: Any) -> Callable[[], Any]:
    def spoil() -> None:
        old = json.loads(Path(path).read_text(encoding="utf-8"))
        Path(path).write_text(json.dumps({**old, **values}), encoding="utf-8")

    return spoil


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C at the start of an update."""
    original = batches.update_batches

    def interrupted(training: batches.Training, at: int, width: int) -> Any:
        if at == step:
            signal.raise_signal(signal.SIGINT)
        return original(training, at, width)

    monkeypatch.setattr(batches, "update_batches", interrupted)


def scores(content: bytes | None) -> Callable[[], Any]:
    """Scores that are damaged, or, for None, of other data."""

    def spoil() -> None:
        Path("work/score").mkdir()
        Path("work/score/done.json").write_text('{"data_digest": "another"}', encoding="utf-8")
        np.save("work/score/scores.npy", np.zeros((SIZES["train"], 2, 16), np.float32))
        if content is not None:
            Path("work/score/scores.npy").write_bytes(content)

    return spoil


def make(path: str, content: str) -> Callable[[], Any]:
    def spoil() -> None:
        Path(path).parent.mkdir()
        Path(path).write_text(content, encoding="utf-8")

    return spoil


@contextlib.contextmanager
def denying(denied: Path) -> Iterator[None]:
    """The system's refusals for a file or a folder, to whomever: to root it refuses nothing by itself."""

    def is_denied(path: Any) -> bool:
        if not isinstance(path, str | os.PathLike):  # an open file's number
            return False
        absolute = Path(os.path.abspath(path))
        return denied in (absolute, *absolute.parents)

    def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if is_denied(path):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return function(path, *arguments, **options)

        return call

    access = os.access
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            os, "access", lambda path, *mode, **how: not is_denied(path) and access(path, *mode, **how)
        )
        for module, name in ((os, "mkdir"), (os, "open"), (io, "open"), (builtins, "open")):
            patch.setattr(module, name, refusing(getattr(module, name)))
        yield

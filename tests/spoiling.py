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
from safetensors import numpy as safetensors

from trbert_jax.training import batches

TEXTS = ["the film was good .", "a dull plot !", "it is very bright and good", "I saw a bad film yesterday"]
RECORDS = [{"text": text, "label": label} for text, label in zip(TEXTS, (1, 0, 1, 0), strict=True)]
SIZES = {"train": 8, "dev": 2, "test": 3}
WEIGHTS = "model/model.safetensors"
Spoil = Callable[[], Any]


def write(path: str, content: str | bytes) -> Spoil:
    def spoil() -> None:
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def remove(path: str) -> Spoil:
    return Path(path).unlink


def change(path: str, to: Callable[[bytes], bytes]) -> Spoil:
    return lambda: Path(path).write_bytes(to(Path(path).read_bytes()))


def append(path: str, content: str) -> Spoil:
    return change(path, lambda old: old + content.encode())


def cut(path: str, share: float) -> Spoil:
    """Leaves the first part of a file, as a full disk or a broken download does."""
    return change(path, lambda old: old[: int(share * len(old))])


def corrupt(path: str, start: int, stop: int) -> Spoil:
    return change(path, lambda old: old[:start] + b"\xff" * (stop - start) + old[stop:])


def set_json(path: str, **values: Any) -> Spoil:
    return change(path, lambda old: json.dumps({**json.loads(old), **values}).encode())


def scale_weights(value: float) -> Spoil:
    """The classifier's weights become a finite number with which its logits overflow."""

    def scaled(old: bytes) -> bytes:
        weights = safetensors.load(old)
        weights["classifier.weight"][:] = value
        return safetensors.save(weights)

    return change(WEIGHTS, scaled)


def scores(content: bytes | None) -> Spoil:
    """Scores that are damaged, or, for None, of other data."""

    def spoil() -> None:
        write("work/score/done.json", '{"data_digest": "another"}')()
        np.save("work/score/scores.npy", np.zeros((SIZES["train"], 2, 16), np.float32))
        if content is not None:
            Path("work/score/scores.npy").write_bytes(content)

    return spoil


def press_ctrl_c(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C at the start of an update."""
    original = batches.update_batches

    def interrupted(training: batches.Training, at: int, width: int) -> Any:
        if at == step:
            signal.raise_signal(signal.SIGINT)
        return original(training, at, width)

    monkeypatch.setattr(batches, "update_batches", interrupted)


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

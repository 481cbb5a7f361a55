"""Compiled programs on disk, so that the next process need not compile them again.

JAX keeps them. This module says where, for a command that has not imported JAX yet: its settings
are environment variables.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_SHORTEST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


def enable() -> None:
    """Has JAX keep compiled programs, in `~/.cache/trbert_jax/xla` unless the environment says otherwise.

    To be called before JAX is imported. Without a folder that can be written to, nothing is kept.
    """
    if VARIABLE in os.environ:
        return
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trbert_jax" / "xla" / _machine()
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # the latter: no home
        return
    if os.access(folder, os.W_OK | os.X_OK):
        os.environ[VARIABLE] = str(folder)
        os.environ.setdefault(_SHORTEST, "0.5")


def directory() -> str | None:
    """Where programs are kept, None if they are not."""
    return os.environ.get(VARIABLE) or None


def _machine() -> str:
    """Names the kind of processor: machine code made for one may stop another, in a home shared by both."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    features = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return f"{platform.machine()}-{hashlib.sha256(chr(10).join(features).encode()).hexdigest()[:12]}"

"""Notice SIGTERM, which launchers send before they kill, and stop at the same update in all processes."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from trbert_jax.errors import PreemptedError
from trbert_jax.parallel import DeviceMesh

# JAX answers yes at one number only, one above the highest that any process has asked with: the numbers must
# rise through all stages, and no yes may be ignored.
_ASKED = itertools.count(1)


def _processes_told_to_stop(devices: DeviceMesh) -> bool:
    """Returns whether SIGTERM has reached one of several processes, the same answer in all of them.

    Collective: all processes must call it equally often. It returns True once; the caller must then stop.
    """
    return devices.num_processes > 1 and bool(multihost_utils.reached_preemption_sync_point(next(_ASKED)))


def stop_here(devices: DeviceMesh, where: str) -> None:
    """Raises a PreemptedError in all of several processes after one was told to stop. Collective."""
    if _processes_told_to_stop(devices):
        raise PreemptedError(f"told to stop {where}")


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Raises a PreemptedError on SIGTERM; during updates, `StopRequest` first saves what they did."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise PreemptedError("told to stop")

    if threading.current_thread() is not threading.main_thread():  # only it may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class StopRequest:
    """Notices SIGTERM; a context manager.

    With several processes JAX notices it, and all stop at the same update.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._before: Any = None
        # Signal handlers can be set in the main thread only.
        self._listens = threading.current_thread() is threading.main_thread() and jax.process_count() == 1

    def requested(self, devices: DeviceMesh) -> bool:
        """Returns whether to stop after this update. Collective."""
        return self._asked.is_set() or _processes_told_to_stop(devices)

    def __enter__(self) -> Self:
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)
            if self._asked.is_set() and exc_type is None:  # after the last update: pass the signal on
                signal.raise_signal(signal.SIGTERM)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked.set()

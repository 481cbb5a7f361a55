"""Notice SIGTERM, which launchers send before they kill, and stop at the same update in all processes."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from trbert_jax.errors import PreemptedError
from trbert_jax.parallel import DeviceMesh

# JAX answers yes at one number only, one above the highest that any process has asked with: the numbers must
# rise through all stages, and no yes may be ignored.
_ASKED = itertools.count(1)


def _told_to_stop(devices: DeviceMesh) -> bool:
    """Returns whether SIGTERM has reached one of several processes, equally in all. Collective."""
    return devices.num_processes > 1 and bool(multihost_utils.reached_preemption_sync_point(next(_ASKED)))


def stop_here(devices: DeviceMesh, where: str) -> None:
    """Raises a PreemptedError in all of several processes after one was told to stop. Collective."""
    if _told_to_stop(devices):
        raise PreemptedError(f"told to stop {where}")


@contextlib.contextmanager
def _on_sigterm(handler: Callable[..., None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only it may handle signals
        yield
        return
    before: Any = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ended_by_sigterm() -> contextlib.AbstractContextManager[None]:
    """Raises a PreemptedError on SIGTERM; during updates, `stop_request` first saves what they did."""

    def stop(*_: Any) -> None:
        raise PreemptedError("told to stop")

    return _on_sigterm(stop)


@contextlib.contextmanager
def stop_request(devices: DeviceMesh) -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether to stop after this update (collective).

    With several processes JAX notices SIGTERM, and all stop at the same update.
    """
    asked = threading.Event()
    alone = jax.process_count() == 1
    with _on_sigterm(lambda *_: asked.set()) if alone else contextlib.nullcontext():
        yield lambda: asked.is_set() or _told_to_stop(devices)
    if asked.is_set():  # after the last update: pass the signal on
        signal.raise_signal(signal.SIGTERM)

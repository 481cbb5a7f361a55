"""What goes on beside the updates: saving in the background, timing, profiles, being told to stop."""

from __future__ import annotations

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self

import jax
import numpy as np

from trbert_jax.errors import PreemptedError
from trbert_jax.parallel import DeviceMesh

Announce = Callable[[str], None]


# How often this process has asked JAX whether to stop. JAX answers yes at one number only, one above the
# highest that any process has asked with: the numbers must rise, through all stages, and no yes be ignored.
_ASKED = itertools.count(1)


def all_told_to_stop(layout: DeviceMesh) -> bool:
    """Whether SIGTERM has reached one of several processes; all must ask, equally often.

    They get the same answer, and yes only once: whoever asks has to stop then. Of a single process always
    no, `StopRequest` and the command line listen there.
    """
    if layout.num_processes == 1:
        return False
    from jax.experimental import multihost_utils

    return bool(multihost_utils.reached_preemption_sync_point(next(_ASKED)))


def stop_here(layout: DeviceMesh, where: str) -> None:
    """Raises a PreemptedError in all of several processes once one was told to stop; nothing needs saving."""
    if all_told_to_stop(layout):
        raise PreemptedError(f"told to stop {where}")


class StopRequest:
    """Notices SIGTERM, which launchers send before they kill; a context manager.

    Where several processes run together, JAX notices it, and all stop at the same update.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._before: Any = None
        # Only the main thread may say what signals do; elsewhere nobody is listened to.
        self._listens = threading.current_thread() is threading.main_thread() and jax.process_count() == 1

    def requested(self, layout: DeviceMesh) -> bool:
        """Whether to stop after this update; the same in every process."""
        return self._asked.is_set() or all_told_to_stop(layout)

    def __enter__(self) -> Self:
        if self._listens:
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        if self._listens:
            signal.signal(signal.SIGTERM, self._before)
            if self._asked.is_set() and exc_type is None:  # after the last update: to whoever listened before
                signal.raise_signal(signal.SIGTERM)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked.set()


class StepClock:
    """Where the time since the last report went, and how much was done in it."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._began = time.perf_counter()
        self._seconds = {"input": 0.0, "checkpoint": 0.0, "evaluation": 0.0}
        self._updates, self._examples = 0, 0
        self._lengths: list[np.ndarray] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts what is done inside as `input`, `checkpoint` or `evaluation`; all else is computation."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def count(self, examples: int, lengths: np.ndarray) -> None:
        """One update of so many examples, with the tokens of each of their rows, int [R]."""
        self._updates += 1
        self._examples += examples
        self._lengths.append(lengths)

    def rates(
        self,
        metrics: Mapping[str, float],
        flops: Callable[..., np.ndarray] | None = None,
        peak: float | None = None,
    ) -> dict[str, float]:
        """Seconds an update and their parts, examples and tokens a second since the last call.

        Evaluation is not counted. Compilation is: the first report of a stage is slow.

        Args:
          metrics: of an update; with `kept_tokens_N` (tokens of an example that are left after a point of
            reduction) also kept tokens a second.
          flops: see `batches.Training.flops`; adds `flops_per_second`, what the method asks for, padding and
            recomputing not counted.
          peak: FLOP/s of all devices; adds `flop_utilization`, a share of it.
        """
        total = time.perf_counter() - self._began - self._seconds["evaluation"]
        seconds = {k: v for k, v in self._seconds.items() if k != "evaluation"}
        compute = max(total - sum(seconds.values()), 0.0)
        per_update = {"compute": compute, **seconds}
        found = {f"seconds_{name}": value / self._updates for name, value in per_update.items()}
        lengths, total = np.concatenate(self._lengths), max(total, 1e-9)
        found |= {"examples_per_second": self._examples / total, "tokens_per_second": lengths.sum() / total}
        kept = {name: x for name, x in sorted(metrics.items()) if name.startswith("kept_tokens_")}
        rows = len(lengths) / self._examples
        # `kept_tokens` are means over the rows of an example.
        found |= {f"{name}_per_second": x * rows * self._examples / total for name, x in kept.items()}
        if flops is not None:
            shares = [x / lengths.mean() for x in kept.values()]
            found["flops_per_second"] = flops(lengths, shares=shares or None).sum() / total
            if peak is not None:
                found["flop_utilization"] = found["flops_per_second"] / peak
        self._start()
        return found


class Profile:
    """Records a profile of some updates, to look at with TensorBoard or Perfetto; a context manager."""

    def __init__(self, directory: Path, steps: tuple[int, int] | None, announce: Announce) -> None:
        self._directory, self._steps, self._announce = directory, steps, announce
        self._runs = False

    def at(self, step: int) -> None:
        """Starts or stops at the beginning of this update, 0-based."""
        if self._steps is None:
            return
        first, end = self._steps
        if self._runs and step >= end:
            self._stop()
        elif not self._runs and first <= step < end:
            jax.profiler.start_trace(str(self._directory))
            self._runs = True

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        self._runs = False
        self._announce(f"profile of updates {self._steps}: {self._directory}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._runs:
            self._stop()

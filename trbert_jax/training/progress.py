"""How far a stage is, how fast it goes and how long it still takes, on stderr."""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Mapping
from typing import Any

LINE_SECONDS = 10.0  # between lines where stderr is not a terminal
RATE_SECONDS = 120.0  # the rate is that of the last two minutes: how busy a machine is changes
# ... or of as many updates: they are waited for in groups of 10, one of which may take longer than that.
RATE_UPDATES = 20


class Progress:
    """The progress display of one stage: a bar on a terminal, elsewhere a line every 10 seconds.

    The first update, which compiles the program, counts neither in the rate nor in the time left.

    Args:
      name: of the stage.
      total_steps: updates in all.
      start_step: updates done before.
    """

    def __init__(self, name: str, total_steps: int, start_step: int = 0) -> None:
        self._name = name
        self._total = total_steps
        self._step = start_step
        self._began = time.monotonic()
        # When updates ended, their numbers, and the examples until then; the oldest is where the rate begins.
        self._ended: collections.deque[tuple[float, int, int]] = collections.deque()
        self._scalars: dict[str, float] = {}
        self._line_time, self._line_step = self._began, start_step
        self._bar = _open_bar(name, total_steps, start_step) if sys.stderr.isatty() else None

    def update(self, step: int, num_examples: int) -> None:
        """Moves to `step`, whose update took `num_examples` examples."""
        self._step, now = step, time.monotonic()
        done = self._ended[-1][2] + num_examples if self._ended else 0
        self._ended.append((now, step, done))
        while len(self._ended) > RATE_UPDATES + 1 and self._ended[1][0] <= now - RATE_SECONDS:
            self._ended.popleft()
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(self._details()), refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._line_time >= LINE_SECONDS:
            self._print_line()

    def show(self, scalars: Mapping[str, float]) -> None:
        """Sets scalars to stand beside the progress from now on."""
        self._scalars.update(scalars)

    def close(self) -> None:
        """Leaves the last state on the screen. Does nothing the second time."""
        if self._bar is not None:
            self._bar.close()
        elif self._step != self._line_step:
            self._print_line()

    def _print_line(self) -> None:
        percent = 100 * self._step // max(self._total, 1)
        position = f"{self._name}: step {self._step}/{self._total} ({percent} %)"
        sys.stderr.write(", ".join([position, *self._details()]) + "\n")
        sys.stderr.flush()
        self._line_time, self._line_step = time.monotonic(), self._step

    def _details(self) -> list[str]:
        """`35.2 examples/s`, `1:05 left`, `loss 0.312`."""
        details, now = [], time.monotonic()
        if len(self._ended) > 1:
            since, first_step, before = self._ended[0]
            seconds = max(now - since, 1e-9)
            details.append(f"{_short((self._ended[-1][2] - before) / seconds)} examples/s")
            if self._step < self._total:
                left = (self._total - self._step) * seconds / (self._step - first_step)
                details.append(f"{_clock(left)} left")
        if self._step >= self._total:
            details.append(f"{_clock(now - self._began)} taken")
        return details + [f"{name} {_short(value)}" for name, value in self._scalars.items()]


def _open_bar(name: str, total_steps: int, start_step: int) -> Any:
    from tqdm import tqdm  # where it is needed only

    return tqdm(
        desc=name,
        total=total_steps,
        initial=start_step,
        file=sys.stderr,
        dynamic_ncols=True,
        bar_format="{desc} {percentage:3.0f} % |{bar}| {n_fmt}/{total_fmt}{postfix}",
    )


def _short(value: float) -> str:
    """Three digits: 0.0312, 35.2, 1830."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    """`1:05` for 65 seconds, `2:00:00` for two hours."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"

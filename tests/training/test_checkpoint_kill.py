"""A process that saves checkpoints is killed at random moments, again and again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np

from trbert_jax.training.checkpoints import CheckpointStore

# Saves arrays that hold the step's number, over and over.
WRITER = """
    import itertools, sys
    import numpy as np
    from trbert_jax.training.checkpoints import CheckpointStore

    store = CheckpointStore(sys.argv[1], keep=2, fingerprint={}, announce=print)
    start = store.latest_step() or 0
    if start:
        store.restore(start, {"a": np.zeros((300, 300)), "b": np.zeros(50_000), "step": 0})
    for step in itertools.count(start + 1):
        state = {"a": np.full((300, 300), step * 1.0), "b": np.full(50_000, step * 2.0), "step": step}
        store.save(step, state, metric=step % 7)
        print("saved", step, flush=True)
"""


def test_sigkill_at_any_moment_leaves_a_set_to_go_on_from(tmp_path: Path) -> None:
    rng = random.Random(0)
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)]
    store = CheckpointStore(tmp_path, 2, {}, announce=lambda line: None)
    latest = 0
    for _ in range(5):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first = next(line for line in process.stdout if line.startswith("saved"))
            time.sleep(rng.uniform(0.0, 0.1))
            process.send_signal(signal.SIGKILL)
            saved = [int(line.split()[1]) for line in [first, *process.stdout] if line.endswith("\n")]
        before, latest = latest, store.latest_step() or 0
        # It went on from where it was, and was killed in a save or between its end and the print.
        assert saved == list(range(before + 1, saved[-1] + 1))
        assert latest in (saved[-1], saved[-1] + 1)
        for step in store.steps():
            restored = store.restore(step, {"a": np.zeros((300, 300)), "b": np.zeros(50_000), "step": 0})
            assert restored["step"] == step
            assert (restored["a"] == step).all()
            assert (restored["b"] == 2 * step).all()
        assert store.best_step() == max(range(1, latest + 1), key=lambda step: (step % 7, -step))
    store.save(latest + 1, {"x": 1})
    assert [name for name in os.listdir(tmp_path) if "partial" in name] == []

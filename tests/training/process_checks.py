"""What two processes tell each other; a program, started twice.

python tests/training/process_checks.py PORT NUMBER CONFIG    prints one JSON value
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from trbert_jax.config import load_config
from trbert_jax.errors import UserError
from trbert_jax.parallel import join
from trbert_jax.training import experiment as run_module
from trbert_jax.training.experiment import Experiment


def outcome(work: Callable[[], Any]) -> str:
    """What `work` raises."""
    try:
        work()
    except (UserError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def fail(error: Exception) -> None:
    raise error


class FakeRun(Experiment):
    """A run whose data has the digest that `digests` says."""

    digests: dict[str, str]

    def features(self, split: str, model: Any) -> Any:
        return SimpleNamespace(digest=self.digests[split])


def claim(run: Experiment, stages: list[str]) -> None:
    with run.claim(stages):
        pass


def main(port: str, number: int, config: str) -> dict[str, str]:
    join(f"127.0.0.1:{port}", 2, number, 60)
    settings = load_config(config)
    run = FakeRun(settings)
    layout = run.devices
    found = {
        "fine": outcome(lambda: layout.on_main(lambda: None)),
        "user": outcome(lambda: layout.on_main(lambda: fail(UserError("no räum left")))),
        "long": outcome(lambda: layout.on_main(lambda: fail(UserError("x" * 9999)))),
        "other": outcome(lambda: layout.on_main(lambda: fail(ValueError("what is that")))),
        "one fails": outcome(lambda: layout.together(lambda: fail(UserError("no file")) if number else None)),
        "same directory": outcome(lambda: claim(run, ["finetune"])),
        "stages": outcome(lambda: claim(run, ["finetune", "score"][: number + 1])),
    }

    model: Any = SimpleNamespace(params={"a": {"b": np.arange(6.0)}})
    other: Any = SimpleNamespace(params={"a": {"b": np.arange(6.0) + number}})
    run.digests.update(train="t", dev=f"d{number}")
    found["inputs"] = outcome(lambda: run.check_inputs("score", model, ("train",)))
    found["parameters"] = outcome(lambda: run.check_inputs("score", other, ("train",)))
    found["dev"] = outcome(lambda: run.check_inputs("policy", model, ("train", "dev")))

    run_module.SHARED_TIMEOUT = 1
    own = f"{settings.workdir}-{number}"
    apart = Experiment(dataclasses.replace(settings, workdir=own))
    found["apart"] = outcome(apart._check_shared)
    return found


FakeRun.digests = {}

if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3])) + "\n")

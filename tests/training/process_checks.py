"""Messages between two processes; a program, started twice.

python tests/training/process_checks.py PORT NUMBER CONFIG CONFIG_OF_ANOTHER_SEED    prints one JSON value
"""

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from trbert_jax.config import load_config
from trbert_jax.errors import UserError
from trbert_jax.parallel import join
from trbert_jax.training import experiment
from trbert_jax.training.experiment import Experiment


def outcome(work: Callable[[], Any]) -> str:
    """Returns what `work` raises."""
    try:
        work()
    except (UserError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def fail(error: Exception) -> None:
    raise error


def claim(run: Experiment, *stages: str) -> None:
    with run.claim(stages):
        pass


def main(port: str, number: int, config: str, other: str) -> dict[str, str]:
    join(f"127.0.0.1:{port}", 2, number, 60)
    run, reseeded = (Experiment(load_config(path)) for path in (config, other))
    layout = run.devices
    found = {
        "fine": outcome(lambda: layout.on_main(lambda: None)),
        "user": outcome(lambda: layout.on_main(lambda: fail(UserError("no räum left")))),
        "long": outcome(lambda: layout.on_main(lambda: fail(UserError("x" * 9999)))),
        "other": outcome(lambda: layout.on_main(lambda: fail(ValueError("what is that")))),
        "one fails": outcome(lambda: layout.together(lambda: fail(UserError("no file")) if number else None)),
        "same": outcome(lambda: claim(run, "finetune")),
        "stages": outcome(lambda: claim(run, *("finetune", "score")[: number + 1])),
        "configuration": outcome(lambda: claim(reseeded if number else run, "finetune")),
    }
    if layout.is_main:  # the work directory is another configuration's from here on
        (run.workdir / "finetune").mkdir()
        (run.workdir / "finetune" / "metrics.jsonl").touch()
    found["owner"] = outcome(lambda: claim(reseeded, "finetune"))

    model: Any = SimpleNamespace(params={"a": {"b": np.arange(6.0)}})
    changed: Any = SimpleNamespace(params={"a": {"b": np.arange(6.0) + number}})
    digests = {"train": "t", "dev": f"d{number}"}
    Experiment.features = lambda run, split, model: SimpleNamespace(digest=digests[split])  # type: ignore
    found["inputs"] = outcome(lambda: run.check_inputs("score", model, ("train",)))
    found["parameters"] = outcome(lambda: run.check_inputs("score", changed, ("train",)))
    found["dev"] = outcome(lambda: run.check_inputs("policy", model, ("train", "dev")))

    experiment.SHARED_TIMEOUT = 1
    apart = Experiment(load_config(config, [f"workdir={run.workdir}-{number}"]))
    found["apart"] = outcome(apart._check_shared)
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])) + "\n")

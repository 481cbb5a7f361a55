"""The command that a committed result names still means the settings it was made with."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from trbert_jax.config import load_config, to_dict, upgrade

ROOT = Path(__file__).resolve().parents[1]
RESULTS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in ROOT.glob("results/*.json")}
REPEATABLE = sorted(
    name
    for name, result in RESULTS.items()
    if "config" in result and result.get("command", "").startswith("trbert train ")
)
TRAINED = {"finetune", "init", "policy", "joint"}


def differences(now: dict[str, Any], then: dict[str, Any], without: set[str]) -> dict[str, Any]:
    """Setting -> what it was and is, of those that differ; what there was no setting for then is left out."""
    found: dict[str, Any] = {}
    for key in then.keys() - without:
        if isinstance(then[key], dict):
            inner = differences(now[key], then[key], without=set())
            found |= {f"{key}.{name}": values for name, values in inner.items()}
        elif key in now and now[key] != then[key]:
            found[key] = (then[key], now[key])
    return found


@pytest.mark.parametrize("name", REPEATABLE)
def test_the_command_gives_the_settings(name: str) -> None:
    result = RESULTS[name]
    _, _, flag, config, *overrides = shlex.split(result["command"])
    assert flag == "--config"
    now = json.loads(json.dumps(to_dict(load_config(ROOT / config, overrides))))
    not_run = TRAINED - set(result["config"]["stages"])
    # Any folder will do for the files.
    assert differences(now, upgrade(result["config"]), without={"workdir", *not_run}) == {}

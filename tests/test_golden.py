"""Parity with the published models on cases of `TRBERT_GOLDEN_DIR`, else `tests/golden`; no bound grows."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import golden_cases
import golden_checks
import numpy as np
import pytest

DIRECTORY = golden_cases.DIRECTORY
FOLDERS = sorted(p for p in DIRECTORY.glob("*") if p.is_dir())
# Programs of users for the cases that a user names, unless many are to compile faster.
OPTIMIZED = os.environ.get("TRBERT_GOLDEN_DIR") and not os.environ.get("TRBERT_GOLDEN_HURRIED")
pytestmark = [pytest.mark.usefixtures("optimized")] if OPTIMIZED else []


def test_there_are_cases() -> None:
    assert FOLDERS, f"no golden case in {DIRECTORY}"  # must not pass for agreement


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_golden(folder: Path) -> None:
    for execution in golden_cases.EXECUTIONS:
        golden_checks.check(golden_cases.load(folder, execution))


# The test of the test ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outputs() -> dict[str, tuple]:
    """Each kind of case once, run once: outputs of the first folder of its kind."""
    kinds: dict[str, tuple] = {}
    for folder in FOLDERS:
        case = golden_cases.load(folder)
        run = golden_cases.kind_of(case)
        if run.__name__ not in kinds:
            kinds[run.__name__] = (case, run(case))
    return kinds


def test_perturbed_arrays_are_refused(outputs: dict[str, tuple]) -> None:
    """An output array that is off by 1e-3 (a flipped token, for kept sets) fails, whichever it is."""
    tried = 0
    for case, result in outputs.values():
        slack = golden_checks.conditioning(case, result)
        for name, expected in case.outputs.items():
            if name.startswith("after:") and name.endswith(("key.bias", "k_lin.bias")):
                continue
            extra = slack.get(name, 0.0)
            golden_checks.compare(name, np.asarray(result[name]), expected, extra)
            wrong = np.array(expected)
            if name.startswith(("action_stage", "kept_stage")):
                wrong[-1, 0] = ~wrong[-1, 0] if wrong.dtype == bool else 1 - wrong[-1, 0]
            elif name.startswith("grad:"):
                wrong = wrong + 1e-3 * np.abs(wrong).max() + 1e-3
            else:
                wrong = wrong + 1e-3 * max(1.0, np.nanmax(np.abs(wrong)))
            with pytest.raises(AssertionError):
                golden_checks.compare(name, np.asarray(result[name]), wrong, extra)
            tried += 1
    assert tried > 0


@pytest.mark.parametrize(
    ("constants", "arrays", "error", "message"),
    [
        ({}, {"something_new": np.zeros(2)}, AssertionError, "something_new"),
        ({"name": "summarisation_bert_eval"}, {}, KeyError, "summarisation"),
        ({"beta": 0.5}, {}, AssertionError, "unknown constants: beta"),
    ],
)
def test_what_nobody_compares_fails(
    tmp_path: Path, constants: dict[str, Any], arrays: dict[str, Any], error: Any, message: str
) -> None:
    case = {**json.loads((FOLDERS[0] / "case.json").read_text(encoding="utf-8")), **constants}
    folder = shutil.copytree(FOLDERS[0], tmp_path / case["name"], copy_function=shutil.copyfile)
    (folder / "case.json").write_text(json.dumps(case), encoding="utf-8")
    with np.load(FOLDERS[0] / "arrays.npz") as old:
        np.savez(folder / "arrays.npz", **{**old, **arrays})
    with pytest.raises(error, match=message):
        golden_checks.check(golden_cases.load(folder))


@pytest.mark.parametrize("name", ["logits", "task_loss", "selector_nll", "kept_ratio", "score"])
def test_the_tolerance_is_not_relative_plus_absolute(name: str) -> None:
    expected = np.array([[0.9, 50.0]])
    within = np.array([[0.9e-5, 49e-5]])
    golden_checks.compare(name, expected + within, expected)
    for beyond in ([[1.5e-5, 0.0]], [[0.0, 50.8e-5]]):
        with pytest.raises(AssertionError):
            golden_checks.compare(name, expected + np.array(beyond), expected)

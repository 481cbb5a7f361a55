"""Parity with the official scorers of question answering: one test a file, 1e-9 relative.

Files come from `TRBERT_GOLDEN_METRICS_DIR` if set, else from `tests/golden_metrics`. Each holds
predictions, gold and `expected`, what the official scorer prints; its keys say which scorer that is.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trbert_jax.tasks import scorers

OWN = Path(__file__).parent / "golden_metrics"
DIRECTORY = Path(os.environ.get("TRBERT_GOLDEN_METRICS_DIR") or OWN)
FILES = sorted(DIRECTORY.glob("*.json"))


def run_squad(case: dict[str, Any]) -> dict[str, float]:
    questions = [qa for page in case["gold"]["data"] for part in page["paragraphs"] for qa in part["qas"]]
    gold = {qa["id"]: [answer["text"] for answer in qa["answers"]] for qa in questions}
    assert len(gold) == len(questions), "two questions have the same id"
    odds = case.get("na_probs")
    # The official default: "" where the probability is above.
    threshold = None if odds is None else case.get("na_prob_thresh", 1.0)
    return scorers.score_squad(gold, case["predictions"], odds, threshold)


def run_mrqa(case: dict[str, Any]) -> dict[str, float]:
    return scorers.score_mrqa(case["answers"], case["predictions"])


def run_hotpotqa(case: dict[str, Any]) -> dict[str, float]:
    gold = {question["_id"]: question for question in case["gold"]}
    assert len(gold) == len(case["gold"]), "two questions have the same id"
    return scorers.score_hotpotqa(gold, case["predictions"])


def run_triviaqa(case: dict[str, Any]) -> dict[str, float]:
    gold = {
        question: [*answer["NormalizedAliases"], *answer.get("HumanAnswers", [])]
        for question, answer in case["ground_truth"].items()
    }
    return scorers.score_triviaqa(gold, case["predictions"])


# Scorer -> whether a file is one of its, by what only its gold looks like.
SCORERS: dict[Callable[[dict[str, Any]], dict[str, float]], Callable[[dict[str, Any]], bool]] = {
    run_squad: lambda case: isinstance(case.get("gold"), dict) and "data" in case["gold"],
    run_mrqa: lambda case: "answers" in case,
    run_hotpotqa: lambda case: isinstance(case.get("gold"), list) and "sp" in case["predictions"],
    run_triviaqa: lambda case: "ground_truth" in case,
}


def check(path: Path) -> None:
    """Fails unless every number of a file's `expected` comes out."""
    case = json.loads(path.read_text(encoding="utf-8"))
    fitting = [scorer for scorer, fits in SCORERS.items() if fits(case)]
    assert len(fitting) == 1, f"{path.name}: no kind of file that a scorer here knows, has {sorted(case)}"
    assert case["expected"], f"{path.name}: expects nothing"
    found = fitting[0](case)
    unknown = case["expected"].keys() - found.keys()
    assert not unknown, f"{path.name}: no scorer computes {sorted(unknown)}"
    for name, expected in case["expected"].items():
        close = math.isclose(found[name], expected, rel_tol=1e-9, abs_tol=0)
        assert close, f"{path.name}: {name} is {found[name]!r}, the official scorer says {expected!r}"


def test_there_are_files() -> None:
    """An empty or mistyped directory must not pass for agreement."""
    assert FILES, f"no golden metric file in {DIRECTORY}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden_metrics(path: Path) -> None:
    check(path)


# The test of the test ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_wrong_expectations_are_refused(path: Path, tmp_path: Path) -> None:
    """A number that is off by 1e-8, whichever it is; NaN; a number of no scorer; no number."""
    case = json.loads(path.read_text(encoding="utf-8"))
    wrong: list[tuple[str, dict[str, float]]] = [("expects nothing", {})]
    wrong.append(("no scorer computes", {**case["expected"], "bleu": 1.0}))
    for name, value in case["expected"].items():
        off = value * (1 + 1e-8) if value else 1e-8
        wrong += [(f": {name} is", {**case["expected"], name: changed}) for changed in (off, math.nan)]
    for message, expected in wrong:
        (tmp_path / path.name).write_text(json.dumps({**case, "expected": expected}), encoding="utf-8")
        with pytest.raises(AssertionError, match=message):
            check(tmp_path / path.name)


def test_an_unknown_kind_fails(tmp_path: Path) -> None:
    path = tmp_path / "squad_v2.json"
    path.write_text(json.dumps({"predictions": {}, "references": {}, "expected": {"f1": 1.0}}))
    with pytest.raises(AssertionError, match="no kind of file"):
        check(path)


def test_every_kind_is_among_our_files() -> None:
    cases = [json.loads(path.read_text(encoding="utf-8")) for path in OWN.glob("*.json")]
    assert {scorer for scorer, fits in SCORERS.items() for case in cases if fits(case)} == SCORERS.keys()

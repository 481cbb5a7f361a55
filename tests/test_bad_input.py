"""What a user can get wrong, each through the command line: what it says, and that nothing is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_inputs import CASES
from spoiling import CONFIG, FINETUNE, RECORDS, SIZES, Case, denying, press_ctrl_c
from tiny_models import tiny_model

from trbert_jax.cli import main


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a command has printed, its exit code, and the files around it before and after."""

    folder: Path
    code: int
    out: str
    err: str
    before: dict[str, bytes]
    after: dict[str, bytes]


def run(folder: Path, command: str, denied: str | None = None) -> Outcome:
    before = files(folder)
    out, err = io.StringIO(), io.StringIO()
    refusals = denying(folder / denied) if denied else contextlib.nullcontext()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), refusals:
        code = main(shlex.split(command))
    return Outcome(folder, code, out.getvalue(), err.getvalue(), before, files(folder))


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh")
    (folder / "config.yaml").write_text(CONFIG, encoding="utf-8")
    (folder / "data").mkdir()
    for split, size in SIZES.items():
        lines = "".join(json.dumps(RECORDS[i % 4]) + "\n" for i in range(size))
        (folder / "data" / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    tiny_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def interrupted(fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Ctrl-C in the third of four updates."""
    folder = shutil.copytree(fresh, tmp_path_factory.mktemp("runs") / "interrupted")
    with pytest.MonkeyPatch.context() as monkeypatch:
        press_ctrl_c(monkeypatch, step=2)
        return run(folder, FINETUNE)


@pytest.fixture(scope="module")
def finetuned(interrupted: Outcome, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """The same command again, after it was also stopped while saving."""
    folder = shutil.copytree(interrupted.folder, tmp_path_factory.mktemp("runs") / "finetuned")
    checkpoints = folder / "work/finetune/checkpoints"
    half = shutil.copytree(checkpoints / "step_00000002", checkpoints / "step_00000003.partial-x7")
    (half / "manifest.json").unlink()
    return run(folder, FINETUNE)


@pytest.fixture
def outcome(request: pytest.FixtureRequest, case: Case, tmp_path: Path) -> Iterator[Outcome]:
    if case.made_by:
        yield request.getfixturevalue(case.made_by)
        return
    start = request.getfixturevalue(case.start)
    folder = shutil.copytree(start if isinstance(start, Path) else start.folder, tmp_path / "folder")
    with contextlib.chdir(folder):
        case.spoil()
    yield run(folder, case.command, case.denied)
    if (folder / "closed").exists():
        (folder / "closed").chmod(0o755)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, outcome: Outcome) -> None:
    assert outcome.code == case.code
    assert "Traceback" not in outcome.out + outcome.err
    if case.code == 2:
        assert outcome.err.startswith("trbert: error: ")
    for word in case.words:
        assert word in (outcome.err if case.code == 2 else outcome.out + outcome.err)

    new = sorted(outcome.after.keys() - outcome.before.keys())
    assert [name for name in new if not re.fullmatch(case.leaves, name)] == []
    assert [name for name in outcome.after if ".partial-" in name] == []
    if case.code != 0:
        assert {name: outcome.after.get(name) for name in outcome.before} == outcome.before
        assert [name for name in new if name.endswith(("done.json", "results.json"))] == []


def test_a_mended_config_takes_over_a_run_that_never_began(fresh: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fresh, tmp_path / "folder")
    command = "train --config config.yaml --stages policy"
    assert "which stage finetune makes" in run(folder, command).err
    again = run(folder, f"{command} seed=7")
    assert "another configuration" not in again.err
    assert "which stage finetune makes" in again.err


def test_going_on_repeats_nothing_that_was_saved(interrupted: Outcome, finetuned: Outcome) -> None:
    checkpoints = {name for name in interrupted.after if "/checkpoints/step_" in name}
    assert {name.split("/")[3] for name in checkpoints} == {"step_00000001", "step_00000002"}
    for name in checkpoints:
        assert finetuned.after[name] == interrupted.after[name]
    lines = finetuned.after["work/finetune/metrics.jsonl"].decode().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "learning_rate" in line]
    assert steps == [1, 4]
    assert json.loads(finetuned.after["work/finetune/done.json"])["steps"] == 4

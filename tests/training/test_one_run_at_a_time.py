"""A work directory is one run's at a time; what a killed one leaves locks nobody out."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_runs

from trbert_jax.cli import main
from trbert_jax.errors import UserError
from trbert_jax.io import only_process

HOLD = """
import sys
from trbert_jax.io import only_process
with only_process(sys.argv[1]):
    print("there", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is at work in tmp_path/work."""
    (tmp_path / "work").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "work")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "there\n"
        yield process
        process.kill()


def test_a_second_run_is_refused(
    tmp_path: Path, other: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_runs.write_config(tmp_path)
    assert main(["train", "--config", str(config)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'work'}: another process works in this directory (process {other.pid} on " in error
    assert "choose another" in error
    assert [path.name for path in (tmp_path / "work").iterdir()] == [".lock"]


def test_a_killed_process_locks_nobody_out(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match="another process"), only_process(tmp_path / "work"):
        pass
    other.kill()
    other.wait()
    for _ in range(2):  # nor does this one, when it has left
        with only_process(tmp_path / "work"):
            assert (tmp_path / "work" / ".lock").exists()
        assert (tmp_path / "work" / ".lock").read_text() == ""

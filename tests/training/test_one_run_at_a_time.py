"""One run at a time works in a work directory; the lock of a killed run does not remain."""

import re
import subprocess
import sys
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
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, work = tiny_runs.write_config(tmp_path), tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-c", HOLD, str(work)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        assert main(["train", "--config", str(config)]) == 2
        assert re.search(f"{work}: another process.*process {process.pid} on ", capsys.readouterr().err)
        assert [path.name for path in work.iterdir()] == [".lock"]
        with pytest.raises(UserError, match="another process"), only_process(work):
            pass
        process.kill()
    for _ in range(2):
        with only_process(work):
            assert (work / ".lock").exists()

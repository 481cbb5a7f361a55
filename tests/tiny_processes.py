"""Programs in processes of their own, alone or several that join each other."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
# Settings of XLA that halve the time to compile, in programs that are slower and round differently.
HURRIED: dict[str, Any] = {"xla_cpu_parallel_codegen_split_count": 1}
if version("jaxlib") < "0.11":  # later ones compile fusions in one way
    HURRIED["xla_cpu_use_fusion_emitters"] = False
Ended = tuple[int, str, str]  # exit code, stdout, stderr


def environment(**variables: str) -> dict[str, str]:
    """Returns the variables of a program that compiles as the tests do."""
    hurried = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
    flags = [f"--{name}={str(value).lower()}" for name, value in HURRIED.items() if hurried]
    flags += [x["XLA_FLAGS"] for x in (os.environ, variables) if "XLA_FLAGS" in x]
    return {**os.environ, **variables, "XLA_FLAGS": " ".join(flags)}


def start(command: Sequence[str], devices: int, folder: Path | None = None) -> Any:
    """Starts a Python program that finds the tests' helpers, and in which warnings are errors."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-W", "error", *command],
        env=environment(XLA_FLAGS=flags, PYTHONPATH=path),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_command(config: Path, *arguments: str, before: str = "") -> list[str]:
    """Returns the arguments of `trbert train`, after some lines of Python."""
    call = f"{before}\nimport sys; from trbert_jax.cli import main; sys.exit(main())"
    return ["-c", call, "train", "--config", str(config), *arguments]


def train(config: Path, devices: int, *arguments: str, before: str = "") -> Ended:
    """Runs `trbert train` alone."""
    return finish([start(train_command(config, *arguments, before=before), devices)])[0]


def start_together(
    config: Path, folders: Sequence[Path | None] = (None, None), before: str = ""
) -> list[Any]:
    """Starts `trbert train` in two processes of two devices each, which join each other."""
    joining = [f"--coordinator=127.0.0.1:{free_port()}", "--num-processes=2", "--join-timeout=60"]
    return [
        start(train_command(config, *joining, f"--process-id={i}", before=before), 2, folder)
        for i, folder in enumerate(folders)
    ]


def finish(processes: Sequence[Any], timeout: int = 1200) -> list[Ended]:
    """Waits for the end of all."""
    try:
        ended = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *out) for process, out in zip(processes, ended, strict=True)]


def wait_for(path: Path, processes: Sequence[Any]) -> None:
    """Returns as soon as a file or folder exists."""
    while not path.exists():
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

"""`trbert train` in processes of their own, alone or several that join each other."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many devices, which finds the helpers of the tests."""
    return {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
    }


def command(config: Path, *arguments: str, before: str = "") -> list[str]:
    """`trbert train`, after some lines of Python where a test needs them."""
    call = f"{before}\nimport sys; from trbert_jax.cli import main; sys.exit(main())"
    return [sys.executable, "-W", "error", "-c", call, "train", "--config", str(config), *arguments]


def run_processes(
    configs: list[Path], *arguments: str, folders: list[Path] | None = None
) -> list[tuple[int, str, str]]:
    """One process a configuration, together: exit code, stdout and stderr of each."""
    return finish(start_processes(configs, environment(2), *arguments, folders=folders))


def start_processes(
    configs: list[Path], environment: dict[str, str], *arguments: str, folders: list[Path] | None = None
) -> list[subprocess.Popen[str]]:
    """One process a configuration, which are to join each other."""
    port = free_port()
    return [
        subprocess.Popen(
            command(
                config,
                f"--coordinator=127.0.0.1:{port}",
                f"--num-processes={len(configs)}",
                f"--process-id={number}",
                "--join-timeout=60",
                *arguments,
            ),
            env=environment,
            cwd=folders[number] if folders else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, config in enumerate(configs)
    ]


def finish(processes: list[subprocess.Popen[str]], timeout: int = 1200) -> list[tuple[int, str, str]]:
    """Waits for them: exit code, stdout and stderr of each."""
    try:
        ended = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *out) for process, out in zip(processes, ended, strict=True)]


def wait_for(path: Path, processes: list[subprocess.Popen[str]]) -> None:
    """Returns once a file or folder is there."""
    while not path.exists():
        assert all(process.poll() is None for process in processes), finish(processes)
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])

"""Makes this process one of several that train together, by JAX's own multi-controller runtime."""

from __future__ import annotations

import contextlib
import socket
import sys
import time

from trbert_jax.errors import UserError

TIMEOUT = 300  # seconds to wait for the others


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = TIMEOUT,
) -> None:
    """Joins the other processes of a run; to be called before anything asks JAX for its devices.

    Args:
      coordinator: HOST:PORT of process 0; None to find everything in the environment (SLURM, Open MPI,
        Kubernetes, Cloud TPU), as JAX does.
      num_processes: how many there are.
      process_id: which one this is, from 0 on.
      timeout: seconds to wait for the others.

    Raises:
      UserError: nothing in the environment says what to join, or the coordinator cannot be reached.
    """
    import jax

    if coordinator is None:
        try:
            jax.distributed.initialize(initialization_timeout=timeout)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--distributed: the environment does not say which processes run together ({error}); it is "
                "for SLURM, Open MPI, Kubernetes and Cloud TPU; elsewhere give --coordinator HOST:PORT, "
                "--num-processes and --process-id"
            ) from error
        return
    host, port = _address(coordinator)
    if process_id == 0:
        waiting = f"process 0 of {num_processes} waits at {coordinator} for the others, at most {timeout} s"
        sys.stderr.write(waiting + "\n")
        sys.stderr.flush()
    else:
        # JAX itself would end the process with a stack trace.
        _wait_for(host, port, timeout)
    jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=timeout)


def _address(coordinator: str) -> tuple[str, int]:
    host, separator, port = coordinator.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator is {coordinator!r}; expected HOST:PORT, such as node0:8476")
    return host.strip("[]"), int(port)


def _wait_for(host: str, port: int, timeout: int) -> None:
    """Returns once somebody listens there."""
    end, reason = time.monotonic() + timeout, ""
    while time.monotonic() < end:
        try:
            with contextlib.closing(socket.create_connection((host, port), timeout=min(5, timeout))):
                return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(min(0.5, timeout))
    raise UserError(
        f"the coordinator at {host}:{port} could not be reached within {timeout} s ({reason}); start process "
        "0 there, check address and firewall, or wait longer with --join-timeout"
    )

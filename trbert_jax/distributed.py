"""Makes this process one of several that train together, by JAX's own multi-controller runtime."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

from trbert_jax.errors import UserError

TIMEOUT = 300  # seconds to wait for the others
LONGER = 120  # seconds by which JAX's patience exceeds ours
EXIT_USER_ERROR = 2


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = TIMEOUT,
) -> None:
    """Joins the other processes of a run; to be called before anything asks JAX for its devices.

    Where the others do not come in time, says so on stderr and ends the process with code 2: nothing can be
    raised while JAX waits.

    Args:
      coordinator: HOST:PORT of process 0; None to find everything in the environment (SLURM, Open MPI,
        Kubernetes, Cloud TPU), as JAX does.
      num_processes: how many there are.
      process_id: which one this is, from 0 on.
      timeout: seconds to wait for the others.

    Raises:
      UserError: nothing in the environment says what to join, nobody listens at the coordinator's address, or
        somebody else does where process 0 should.
    """
    import jax

    if coordinator is None:
        late = (
            f"the processes that the environment names did not join each other within {timeout} s; look "
            "whether all of them were started, at their network, or wait longer with --join-timeout"
        )
        try:
            with _ended_after(timeout, late):
                jax.distributed.initialize(initialization_timeout=timeout + LONGER)
        except (ValueError, RuntimeError) as error:
            raise UserError(
                f"--distributed: the environment does not say which processes run together ({error}); it is "
                "for SLURM, Open MPI, Kubernetes and Cloud TPU; elsewhere give --coordinator HOST:PORT, "
                "--num-processes and --process-id"
            ) from error
        return
    host, port = _address(coordinator)
    end = time.monotonic() + timeout
    late = (
        f"process {process_id} could not join within {timeout} s: {num_processes} processes were to meet at "
        f"{coordinator}; "
    )
    if process_id == 0:
        waiting = f"process 0 of {num_processes} waits at {coordinator} for the others, at most {timeout} s"
        sys.stderr.write(waiting + "\n")
        sys.stderr.flush()
        _check_port_free(coordinator, port, num_processes)
        late += "start the others, with the same address and --num-processes and each its own --process-id"
    else:
        _wait_for(host, port, timeout)
        late += "something listens there, look whether it is process 0 of this run and the others are started"
    try:
        with _ended_after(max(end - time.monotonic(), 1), late + ", or wait longer with --join-timeout"):
            jax.distributed.initialize(
                coordinator, num_processes, process_id, initialization_timeout=timeout + LONGER
            )
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise _cannot_join(coordinator, num_processes, process_id, reason) from error


@contextlib.contextmanager
def _ended_after(seconds: float, message: str) -> Iterator[None]:
    """Ends the process with a message unless the block ends in time.

    JAX, once its own time is over, would abort with a stack trace, which cannot be caught.
    """

    def end() -> None:
        sys.stderr.write(f"trbert: error: {message}\n")
        sys.stderr.flush()
        os._exit(EXIT_USER_ERROR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _address(coordinator: str) -> tuple[str, int]:
    host, separator, port = coordinator.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator is {coordinator!r}; expected HOST:PORT, such as node0:8476")
    return host.strip("[]"), int(port)


def _check_port_free(coordinator: str, port: int, num_processes: int | None) -> None:
    """Raises a UserError where another program has the port: JAX's own attempt may crash the process then."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise _cannot_join(coordinator, num_processes, 0, str(error.strerror)) from error


def _cannot_join(
    coordinator: str, num_processes: int | None, process_id: int | None, reason: str
) -> UserError:
    return UserError(
        f"process {process_id} of {num_processes} cannot join at {coordinator} ({reason}); look whether "
        "another program has that port, and give each process its own --process-id"
    )


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

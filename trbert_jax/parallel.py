"""Devices and processes of a run: mesh, sharding, exchange between processes, how they start and stop.

All devices of all processes form a mesh with the axes `data` and `fsdp`. Batches are sharded over both.
Parameters and optimizer state are sharded over `fsdp` (size 1 by default) and replicated over `data`.
Each device computes its rows without the others, so that packed batches stay local; only gradients and sums
over examples are reduced across devices. Source: docs/scaling.md.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trbert_jax.errors import PreemptedError, UserError

logger = logging.getLogger(__name__)

DATA, FSDP = "data", "fsdp"
AXES = (DATA, FSDP)
STRATEGIES = ("jit", "pmap")
SMALLEST_DIVIDED = 4096  # elements; smaller arrays stay replicated, sharding them only costs messages
LONGEST_MESSAGE = 4096  # bytes of a text that processes exchange
TIMEOUT = 300  # seconds to wait for other processes
# JAX says at one number only that SIGTERM came, one above the highest that any process has asked with: the
# numbers must rise through all stages, and no yes may be ignored.
_ASKED = itertools.count(1)

FORKED = (
    "this process was forked after JAX had started, which JAX does not survive; start workers with "
    'multiprocessing.get_context("spawn"), or load the model in each worker only'
)
_started_in: int | None = None  # id of the process in which JAX's devices were first asked for

Tree = Any
T = TypeVar("T")
ROWS = PartitionSpec(AXES)  # the first axis is rows
WHOLE = PartitionSpec()
KEPT = PartitionSpec(None, AXES)  # [points of reduction, rows, positions]


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceMesh:
    """The devices of a run and how they share its work."""

    mesh: Mesh  # all devices, axes `data` and `fsdp`
    strategy: str = "jit"  # one program over the mesh; pmap: one per device, parameters replicated

    @property
    def num_devices(self) -> int:
        """Devices of all processes."""
        return int(self.mesh.size)

    @property
    def num_processes(self) -> int:
        """Processes of the run."""
        return len({device.process_index for device in self.mesh.devices.flat})

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and logs."""
        return jax.process_index() == 0

    @property
    def is_single(self) -> bool:
        """Whether the mesh has one device."""
        return self.num_devices == 1

    @property
    def whole(self) -> NamedSharding:
        """The sharding of a replicated array."""
        return NamedSharding(self.mesh, WHOLE)

    @property
    def local_devices(self) -> list[jax.Device]:
        """The devices of this process, in mesh order."""
        return [d for d in self.mesh.devices.flat if d.process_index == jax.process_index()]

    def rounded(self, rows: int) -> int:
        """Rounds up to a multiple of the number of devices."""
        return -(-rows // self.num_devices) * self.num_devices

    def own_rows(self, num_rows: int) -> slice:
        """Returns the rows of a batch that this process's devices compute."""
        mine = [i for i, d in enumerate(self.mesh.devices.flat) if d.process_index == jax.process_index()]
        each = num_rows // self.num_devices
        return slice(mine[0] * each, (mine[-1] + 1) * each)  # contiguous, see `make_mesh`

    def by_rows(self, function: Callable[..., Any], out_specs: Any, batch_spec: Any = ROWS) -> Callable:
        """Maps `function(params, batch, *others)` over the rows of `batch`; the rest is replicated."""
        if self.is_single:
            return function

        @functools.wraps(function)
        def mapped(params: Tree, batch: Tree, *others: Any) -> Any:
            specs = (WHOLE, batch_spec, *(WHOLE for _ in others))
            sharded = jax.shard_map(
                function, mesh=self.mesh, in_specs=specs, out_specs=out_specs, check_vma=False
            )
            return sharded(params, batch, *others)

        return mapped

    def describe(self) -> str:
        """Returns one line for the log."""
        kind, processes = self.mesh.devices.flat[0].device_kind, self.num_processes
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        count = f"{self.num_devices} devices ({kind}) of {processes} process{'es' if processes > 1 else ''}"
        return f"{count}, mesh {axes}, strategy {self.strategy}"

    # Arrays ---------------------------------------------------------------------------------------

    def replicate(self, tree: Tree) -> Tree:
        """Places arrays that are equal in every process on every device."""
        return self._place(tree, lambda _: WHOLE)

    def divide(self, tree: Tree) -> Tree:
        """Places arrays that are equal in every process, sharded over `fsdp`."""
        return self._place(tree, self.spec_of)

    def place_rows(self, tree: Tree) -> Tree:
        """Places host arrays that hold all rows, sharded along the first axis."""
        return tree if self.is_single else self._place(tree, lambda _: ROWS)

    def place_own_rows(self, tree: Tree, axis: int = 0) -> Tree:
        """Places host arrays that hold this process's rows (`own_rows`), sharded along `axis`."""
        if self.is_single:
            return tree
        sharding = NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXES))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)

    def keep_divided(self, tree: Tree) -> Tree:
        """Constrains results of a program to the sharding of `divide`."""
        if self.is_single:
            return tree
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self.sharding_of(x)), tree)

    def sharding_of(self, array: Any) -> NamedSharding:
        """Returns the sharding that `divide` gives an array (or anything with its shape)."""
        return NamedSharding(self.mesh, self.spec_of(array))

    def spec_of(self, array: Any) -> PartitionSpec:
        """Shards an array's longest axis that `fsdp` divides; small arrays stay replicated."""
        parts = self.mesh.shape[FSDP]
        axes = [i for i, size in enumerate(array.shape) if size % parts == 0]
        if parts == 1 or not axes or np.prod(array.shape) < SMALLEST_DIVIDED:
            return WHOLE
        longest = max(axes, key=lambda i: array.shape[i])
        return PartitionSpec(*(FSDP if i == longest else None for i in range(len(array.shape))))

    def _place(self, tree: Tree, spec_of: Callable[[Any], PartitionSpec]) -> Tree:
        def one(x: Any) -> jax.Array:
            sharding = NamedSharding(self.mesh, spec_of(x))
            if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
                data, impl = jax.random.key_data(x), jax.random.key_impl(x)
                return jax.jit(lambda: jax.random.wrap_key_data(data, impl=impl), out_shardings=sharding)()
            if isinstance(x, jax.Array) and not x.is_fully_addressable:
                return jax.jit(lambda a: a, out_shardings=sharding)(x)
            values = np.asarray(x)
            return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

        if not self.is_single:
            return jax.tree.map(one, tree)
        # Looking at each array costs a small request more than anything else outside the model.
        placed = all(isinstance(x, jax.Array) for x in jax.tree.leaves(tree))
        return tree if placed else jax.device_put(tree)

    def fetch(self, tree: Tree) -> Tree:
        """Returns NumPy copies of whole arrays, equal in every process."""

        def one(x: Any) -> np.ndarray:
            if isinstance(x, jax.Array) and not x.is_fully_addressable:
                x = jax.jit(lambda a: a, out_shardings=self.whole)(x)
                x = x.addressable_data(0)
            # A view would keep the next step from reusing the buffer, or be overwritten by it.
            return np.array(x)

        return jax.tree.map(one, tree)

    # Processes ------------------------------------------------------------------------------------

    def barrier(self, name: str) -> None:
        """Waits until every process calls this."""
        if self.num_processes > 1:
            multihost_utils.sync_global_devices(name)

    def together(self, work: Callable[[], T]) -> T:
        """Runs `work` in every process, waits for all and returns this process's result.

        Raises what `work` raised in this process, or a UserError if it failed in another. `work` must not
        synchronize with other processes.
        """
        if self.num_processes == 1:
            return work()
        try:
            result = work()
        except Exception as error:  # the other processes must know before it is raised
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self._exchange(f"{kind}{error}")
            raise
        for process, message in enumerate(self._exchange("")):
            if message:
                raise UserError(f"in process {process}: {message}")
        return result

    def on_main(self, work: Callable[[], Any]) -> None:
        """Runs `work` in the first process while the others wait; raises like `together`."""
        self.together(work if self.is_main else lambda: None)

    def told_to_stop(self) -> bool:
        """Returns whether SIGTERM has reached one of several processes, equally in all. Collective."""
        return self.num_processes > 1 and multihost_utils.reached_preemption_sync_point(next(_ASKED))

    def stop_here(self, where: str) -> None:
        """Raises a PreemptedError in all of several processes once a signal stopped one. Collective."""
        if self.told_to_stop():
            raise PreemptedError(f"stopped by a signal {where}")

    def broadcast(self, text: str) -> str:
        """Returns the first process's `text`, at most `LONGEST_MESSAGE` bytes of it, in every process."""
        return self._exchange(text)[0]

    def gather(self, value: np.ndarray) -> np.ndarray:
        """Returns the arrays of all processes, [processes, ...]; their shapes must be equal."""
        alone = self.num_processes == 1
        return value[None] if alone else np.asarray(multihost_utils.process_allgather(value))

    def check_agreement(self, what: str, value: Any) -> None:
        """Raises a UserError in every process unless `value` (JSON-like) is equal in all of them."""
        text = json.dumps(value, sort_keys=True, default=str)
        digests = self._exchange(hashlib.blake2b(text.encode(), digest_size=16).hexdigest())
        if different := ", ".join(str(i) for i, digest in enumerate(digests) if digest != digests[0]):
            differ = f"{different} of {self.num_processes} differ from process 0"
            raise UserError(f"the processes do not agree on {what}: {differ}; start all with the same one")

    def _exchange(self, text: str) -> list[str]:
        """Returns the texts of all processes, each cut to `LONGEST_MESSAGE` bytes."""
        encoded = text.encode(errors="backslashreplace")[:LONGEST_MESSAGE].ljust(LONGEST_MESSAGE, b"\0")
        rows = self.gather(np.frombuffer(encoded, np.uint8)).astype(np.uint8)
        return [row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in rows]


def check_mesh(strategy: str, fsdp: int, num_devices: int) -> None:
    """Raises a UserError if the strategy is unknown or `fsdp` does not divide the number of devices."""
    if strategy not in STRATEGIES:
        raise UserError(f"parallel.strategy is {strategy!r}; expected one of {', '.join(STRATEGIES)}")
    if num_devices % fsdp:
        wrong = f"parallel.fsdp is {fsdp}, which does not divide the {num_devices} devices"
        raise UserError(f"{wrong}; set it to 1 or to a divisor")
    if strategy == "pmap" and fsdp > 1:
        raise UserError("parallel.fsdp needs parallel.strategy jit: pmap gives each device all parameters")


def check_batch(stage: str, batch_size: int, num_devices: int) -> None:
    """Raises a UserError unless the devices divide a training stage's batch size."""
    if batch_size % num_devices:
        cannot = f"{stage}.batch_size is {batch_size}, which {num_devices} devices cannot share evenly"
        product = f"(and {stage}.accumulation_steps so that their product stays)"
        raise UserError(f"{cannot}; set it to a multiple of {num_devices} {product}")


def is_forked() -> bool:
    """Returns whether this process was forked after its parent had started JAX; nothing can compute here."""
    return _started_in not in (None, os.getpid())


def find_devices() -> list[jax.Device]:
    """Returns the devices of all processes.

    Raises `UserError` if JAX finds none, or in a process that was forked after JAX had started.
    """
    global _started_in
    if is_forked():
        raise UserError(FORKED)
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError) as error:  # a bare AssertionError for cuda without its plugin
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        asked = getattr(jax.config, "jax_platforms", None)
        wanted = f"of JAX_PLATFORMS={asked}" if asked else "at all"
        advice = "unset JAX_PLATFORMS, or install JAX for the device, such as trbert-jax[cuda]"
        raise UserError(f"JAX finds no device {wanted}{reason}; {advice}") from error
    _started_in = os.getpid()
    return devices


def make_mesh(strategy: str = "jit", fsdp: int = 1, devices: list[jax.Device] | None = None) -> DeviceMesh:
    """Builds the mesh of all devices; `fsdp` of them share one copy of the state. See `check_mesh`."""
    devices = find_devices() if devices is None else devices
    check_mesh(strategy, fsdp, len(devices))
    # JAX does not promise to list a process's devices together; `own_rows` needs that.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.array(devices).reshape(-1, fsdp)
    return DeviceMesh(Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2), strategy)


def single_device() -> DeviceMesh:
    """Builds a mesh of this process's first device."""
    find_devices()
    return make_mesh(devices=jax.local_devices()[:1])


# Starting and stopping ----------------------------------------------------------------------------


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int = TIMEOUT,
) -> None:
    """Joins the other processes of a run; call it before anything asks JAX for devices.

    `coordinator` is HOST:PORT of process 0; None to detect everything from the environment (SLURM, Open MPI,
    Kubernetes, Cloud TPU). `process_id` counts from 0. If the others do not come within `timeout` seconds,
    prints an error to stderr and ends the process with code 2: nothing can be raised while JAX waits. Raises
    `UserError` if the environment does not describe a run, or another program uses the port.
    """
    late = f"processes did not join within {timeout} s; check that all were started and their network"
    cannot = "--distributed: the environment does not describe a run; it must be that of SLURM, Open MPI, "
    cannot += "Kubernetes or Cloud TPU; elsewhere give --coordinator HOST:PORT, --num-processes, --process-id"
    if coordinator is not None:
        who = f"process {process_id} of {num_processes}"
        late = f"{who} could not join at {coordinator} within {timeout} s; check that the others were started"
        check = "check that no other program uses the port and that each process has its own --process-id"
        cannot = f"{who} cannot join at {coordinator}; {check}"
        port = _port(coordinator)
        if process_id == 0:
            logger.info("%s waits at %s for the others, at most %d s", who, coordinator, timeout)
            _check_port_free(port, cannot)
        else:
            late += ", that process 0 of this run listens there, and the firewall"
    try:
        with _exit_after(timeout, f"{late}, or raise --join-timeout"):
            later = timeout + 120  # JAX's own timeout
            jax.distributed.initialize(coordinator, num_processes, process_id, initialization_timeout=later)
    except Exception as error:  # JAX reads the variables of many launchers, and trusts that they are complete
        reason = str(error).partition("\n")[0]
        if isinstance(error, KeyError):
            reason = f"{error.args[0]} is not set"
        raise UserError(f"{cannot} ({reason or type(error).__name__})") from error


@contextlib.contextmanager
def _exit_after(seconds: float, message: str) -> Iterator[None]:
    """Ends the process unless the block ends in time: JAX's own timeout aborts with a stack trace."""

    def end() -> None:
        os.write(2, f"trbert: error: {message}\n".encode(errors="backslashreplace"))
        os._exit(2)  # as the command line does for a UserError

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _port(coordinator: str) -> int:
    host, separator, port = coordinator.rpartition(":")
    if not separator or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator is {coordinator!r}; expected HOST:PORT, such as node0:8476")
    return int(port)


def _check_port_free(port: int, cannot: str) -> None:
    """Raises a UserError if another program has the port; JAX may crash the process then."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"{cannot} ({error.strerror})") from error


@contextlib.contextmanager
def _on_sigterm(handler: Callable[..., None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only it may handle signals
        yield
        return
    before: Any = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def stop_request(devices: DeviceMesh) -> Iterator[Callable[[], bool]]:
    """Yields a function that returns whether to stop after this update, equally in all processes."""
    asked = threading.Event()
    with contextlib.nullcontext() if jax.process_count() > 1 else _on_sigterm(lambda *_: asked.set()):
        yield lambda: asked.is_set() or devices.told_to_stop()
    if asked.is_set():  # after the last update: pass the signal on
        signal.raise_signal(signal.SIGTERM)

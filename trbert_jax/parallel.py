"""The devices of a run, and how its arrays lie on them.

All devices of all processes form a mesh with two axes. Batches are divided over both. Parameters and
optimizer state are divided over `fsdp` (of one device unless asked for) and repeated over `data`. What a
device computes of its rows needs nothing of another's, so that packed execution picks the work of each
device by itself; devices only add up sums over examples and gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trbert_jax.errors import UserError

DATA, FSDP = "data", "fsdp"
AXES = (DATA, FSDP)
STRATEGIES = ("jit", "pmap")
# Arrays with fewer elements stay whole on every device: dividing them saves nothing and costs a message each.
SMALLEST_DIVIDED = 4096
LONGEST_MESSAGE = 4096  # bytes of a text that one process tells the others

Tree = Any
T = TypeVar("T")
ROWS = PartitionSpec(AXES)  # the first axis are rows
WHOLE = PartitionSpec()
KEPT = PartitionSpec(None, AXES)  # [points of reduction, rows, positions]


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceMesh:
    """Devices and how they share the work.

    Attributes:
      mesh: all devices, axes `data` and `fsdp`.
      strategy: jit (one program over the mesh) or pmap (a program a device, parameters on each).
    """

    mesh: Mesh
    strategy: str = "jit"

    @property
    def num_devices(self) -> int:
        """Devices of all processes."""
        return int(self.mesh.size)

    @property
    def num_processes(self) -> int:
        """Processes that run together."""
        return len({device.process_index for device in self.mesh.devices.flat})

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return jax.process_index() == 0

    @property
    def is_single(self) -> bool:
        """Whether there is nothing to share."""
        return self.num_devices == 1

    @property
    def whole(self) -> NamedSharding:
        """Of an array that every device has all of."""
        return NamedSharding(self.mesh, WHOLE)

    @property
    def local_devices(self) -> list[jax.Device]:
        """The devices of this process, in the order of the mesh."""
        return [d for d in self.mesh.devices.flat if d.process_index == jax.process_index()]

    def rounded(self, rows: int) -> int:
        """The next number of rows that the devices can share evenly."""
        return -(-rows // self.num_devices) * self.num_devices

    def own_rows(self, num_rows: int) -> slice:
        """Which of the rows of a batch, shared evenly by all devices, this process's devices get."""
        all_devices = list(self.mesh.devices.flat)
        mine = [i for i, device in enumerate(all_devices) if device.process_index == jax.process_index()]
        each = num_rows // len(all_devices)
        return slice(mine[0] * each, (mine[-1] + 1) * each)  # `make_mesh` puts them beside each other

    def by_rows(self, function: Callable[..., Any], out_specs: Any, batch_spec: Any = ROWS) -> Callable:
        """`function(params, batch, *others)` on each device's rows of `batch`; all else is whole on each."""
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
        """One line for the user."""
        kind = self.mesh.devices.flat[0].device_kind
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items())
        return (
            f"{self.num_devices} devices ({kind}) of {self.num_processes} process"
            f"{'es' if self.num_processes > 1 else ''}, mesh {axes}, strategy {self.strategy}"
        )

    # Onto the devices ---------------------------------------------------------------------------

    def replicate(self, tree: Tree) -> Tree:
        """Arrays that are the same in every process, whole on every device."""
        if self.is_single:
            return jax.device_put(tree)
        return jax.tree.map(functools.partial(self._place, spec=WHOLE), tree)

    def divide(self, tree: Tree) -> Tree:
        """Arrays that are the same in every process, divided over `fsdp`."""
        if self.is_single:
            return jax.device_put(tree)
        return jax.tree.map(lambda x: self._place(x, self.spec_of(x)), tree)

    def place_rows(self, tree: Tree, axis: int = 0) -> Tree:
        """Host arrays of all rows, of which each device gets its own; `axis` is that of the rows."""
        if self.is_single:
            return tree
        spec = PartitionSpec(*[None] * axis, AXES)
        return jax.tree.map(lambda x: self._place(np.asarray(x), spec), tree)

    def place_own_rows(self, tree: Tree, axis: int = 0) -> Tree:
        """Host arrays of this process's own rows (`own_rows`), each device gets its part."""
        if self.num_processes == 1:
            return self.place_rows(tree, axis)
        sharding = NamedSharding(self.mesh, PartitionSpec(*[None] * axis, AXES))
        return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)

    def keep_divided(self, tree: Tree) -> Tree:
        """Inside a program: results divided over `fsdp` as `divide` does."""
        if self.is_single:
            return tree
        return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, self.sharding_of(x)), tree)

    def sharding_of(self, array: Any) -> NamedSharding:
        """How `divide` lays an array (or what has its shape)."""
        return NamedSharding(self.mesh, self.spec_of(array))

    def spec_of(self, array: Any) -> PartitionSpec:
        """Where an array is divided: along its longest axis that `fsdp` divides, if it is worth it."""
        parts = self.mesh.shape[FSDP]
        axes = [i for i, size in enumerate(array.shape) if size % parts == 0]
        if parts == 1 or not axes or np.prod(array.shape) < SMALLEST_DIVIDED:
            return WHOLE
        longest = max(axes, key=lambda i: array.shape[i])
        return PartitionSpec(*(FSDP if i == longest else None for i in range(len(array.shape))))

    def _place(self, x: Any, spec: PartitionSpec) -> jax.Array:
        sharding = NamedSharding(self.mesh, spec)
        if isinstance(x, jax.Array) and jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = jax.random.key_data(x)
            implementation = jax.random.key_impl(x)
            return jax.jit(
                lambda: jax.random.wrap_key_data(data, impl=implementation), out_shardings=sharding
            )()
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.jit(lambda a: a, out_shardings=sharding)(x)
        values = np.asarray(x)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    # Off the devices ----------------------------------------------------------------------------

    def fetch(self, tree: Tree) -> Tree:
        """NumPy copies of arrays, however they are divided; in every process the same."""

        def one(x: Any) -> np.ndarray:
            if isinstance(x, jax.Array) and not x.is_fully_addressable:
                x = jax.jit(lambda a: a, out_shardings=self.whole)(x)
                x = x.addressable_data(0)
            # A copy: a view would keep the step from reusing the buffer, or be overwritten by it.
            return np.array(x)

        return jax.tree.map(one, tree)

    # Between processes --------------------------------------------------------------------------

    def barrier(self, name: str) -> None:
        """Waits until every process is here."""
        if self.num_processes > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(name)

    def on_main(self, work: Callable[[], Any]) -> None:
        """Has the first process do something while the others wait.

        Raises:
          UserError: `work` raised one there; in every process the same, so that none waits for another.
          Exception: what else `work` raised, in the first process; a UserError in the others.
        """
        if self.num_processes == 1:
            work()
            return
        from jax.experimental import multihost_utils

        error: Exception | None = None
        if self.is_main:
            try:
                work()
            except Exception as caught:  # raised again below, once the others know
                error = caught
        found = multihost_utils.broadcast_one_to_all(_encoded(_told(error, 0)))
        if error is not None:
            raise error
        if message := _decoded(np.asarray(found)):
            raise UserError(message)

    def together(self, work: Callable[[], T]) -> T:
        """What `work`, which waits for no other process, returns in this one, once it has ended in all.

        Raises:
          UserError: `work` raised an error in another process.
          Exception: `work` raised it here.
        """
        if self.num_processes == 1:
            return work()
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:  # raised again below, once the others know
            error = caught
        said = [_decoded(text) for text in self.gather(_encoded(_told(error, jax.process_index())))]
        if error is not None:
            raise error
        for number, message in enumerate(said):
            if message:
                raise UserError(f"in process {number}: {message}")
        return result

    def broadcast(self, text: str) -> str:
        """What the first process says here, in every process; at most `LONGEST_MESSAGE` bytes of it."""
        if self.num_processes == 1:
            return text
        from jax.experimental import multihost_utils

        return _decoded(np.asarray(multihost_utils.broadcast_one_to_all(_encoded(text))))

    def gather(self, value: np.ndarray) -> np.ndarray:
        """The arrays of all processes, of equal shapes, [processes, ...]."""
        if self.num_processes == 1:
            return value[None]
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(value))

    def check_agreement(self, what: str, value: Any) -> None:
        """Raises a UserError in every process unless `value` (JSON-like) is the same in all."""
        if self.num_processes == 1:
            return
        text = json.dumps(value, sort_keys=True, default=str)
        found = self.gather(np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), np.uint8))
        strange = [i for i, other in enumerate(found) if not np.array_equal(other, found[0])]
        if strange:
            raise UserError(
                f"the processes do not agree on {what}: {', '.join(map(str, strange))} "
                f"of {self.num_processes} differ from process 0; start all with the same one"
            )


def _told(error: Exception | None, process: int) -> str:
    """What other processes are told of an error."""
    if error is None:
        return ""
    if isinstance(error, UserError):
        return str(error)
    return f"process {process} failed, {type(error).__name__}: {error}"


def _encoded(text: str) -> np.ndarray:
    """A text in a fixed number of bytes, uint8 [LONGEST_MESSAGE], as processes can exchange it."""
    return np.frombuffer(text.encode()[:LONGEST_MESSAGE].ljust(LONGEST_MESSAGE, b"\0"), np.uint8)


def _decoded(values: np.ndarray) -> str:
    return values.astype(np.uint8).tobytes().rstrip(b"\0").decode(errors="ignore")


def check_mesh(strategy: str, fsdp: int, num_devices: int) -> None:
    """Raises a UserError unless so many devices can be laid out so.

    Args:
      strategy: jit or pmap.
      fsdp: devices that share one copy of parameters and optimizer state.
      num_devices: of all processes.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"parallel.strategy is {strategy!r}; expected one of {', '.join(STRATEGIES)}")
    if num_devices % fsdp:
        raise UserError(
            f"parallel.fsdp is {fsdp}, which does not divide the {num_devices} devices there are; "
            "set it to 1 or to a divisor"
        )
    if strategy == "pmap" and fsdp > 1:
        raise UserError(
            "parallel.fsdp needs parallel.strategy jit: with pmap every device holds all parameters"
        )


def check_batch(stage: str, batch_size: int, num_devices: int) -> None:
    """Raises a UserError unless so many devices can share a training stage's batches evenly."""
    if batch_size % num_devices:
        raise UserError(
            f"{stage}.batch_size is {batch_size}, which {num_devices} devices cannot share evenly; set it to "
            f"a multiple of {num_devices} (and {stage}.accumulation_steps so that their product stays)"
        )


def make_mesh(strategy: str = "jit", fsdp: int = 1, devices: list[jax.Device] | None = None) -> DeviceMesh:
    """The layout of a run over all devices.

    Args:
      strategy: jit or pmap.
      fsdp: devices that share one copy of parameters and optimizer state.
      devices: None for all devices of all processes.

    Raises:
      UserError: an unknown strategy, or `fsdp` does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    check_mesh(strategy, fsdp, len(devices))
    # Of a process one after the other, which JAX does not promise: each reads its own rows in one piece.
    devices = sorted(devices, key=lambda device: (device.process_index, device.id))
    grid = np.array(devices).reshape(-1, fsdp)
    return DeviceMesh(Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2), strategy)


def single_device() -> DeviceMesh:
    """The layout of a computation that shares nothing: this process's first device."""
    return make_mesh(devices=jax.local_devices()[:1])

"""Eight devices compute what one does; see device_checks.py for what is run."""

import json
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from tiny_processes import TESTS, finish, start

from trbert_jax import parallel
from trbert_jax.errors import UserError
from trbert_jax.parallel import make_mesh

# What is sent between devices, and what rounding does, are those of the programs that users run.
pytestmark = pytest.mark.usefixtures("optimized")


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


def check(name: str, *arguments: str) -> Any:
    program = str(TESTS / "training" / "device_checks.py")
    ((code, out, err),) = finish([start([program, name, *arguments], 8)])
    assert code == 0, err
    return json.loads(out)


def assert_same(found: dict[str, Any], ways: tuple[str, ...]) -> None:
    assert found.pop("moved") > 1e-3, "updates that change nothing show nothing"
    assert set(found) == set(ways)
    for how, (loss, parameters) in found.items():
        assert loss < 1e-5, how
        assert parameters < 1e-4, how


@pytest.mark.parametrize(
    ("stage", "execution", "ways"),  # `fsdp 4`: with the second axis, an update in 4 passes
    [
        ("finetune", "masked", ("fsdp 4", "pmap 1")),
        slow("finetune", "packed", ("jit 1", "one 4")),
        slow("init", "packed", ("jit 1", "fsdp 1", "pmap 1")),
        slow("policy", "masked", ("jit 4", "fsdp 1", "pmap 1")),
        slow("joint", "packed", ("jit 1", "fsdp 4", "pmap 1")),
    ],
)
def test_eight_devices_train_as_one_does(stage: str, execution: str, ways: tuple[str, ...]) -> None:
    """Every stage by every strategy."""
    assert_same(check("same", stage, execution, *ways), ways)


@pytest.mark.parametrize(
    ("stage", "execution"),
    [
        ("finetune", "masked"),
        *(slow(*case) for case in [("policy", "packed"), ("joint", "masked"), ("joint", "packed")]),
    ],
)
def test_no_activation_is_sent_to_another_device(stage: str, execution: str) -> None:
    """Devices gather parameters, and add up gradients and sums over examples; nothing else."""
    found = check("collectives", stage, execution)
    assert found["all-gather"]
    assert {shape for shapes in found["all-gather"] for shape in shapes.split()} <= set(found["parameters"])
    assert 1 <= len(found["all-reduce"]) <= 3  # of all gradients together, not of each
    assert {x for shapes in found["all-reduce"] for x in shapes.split()} <= {*found["parameters"], "f32[]"}
    assert found["all-to-all"] == found["collective-permute"] == []


def test_the_second_axis_divides_parameters_and_optimizer() -> None:
    size = check("divided")
    assert size["fsdp"] < 0.25 * size["data"]  # an eighth, but for what is too small


def test_bad_layouts() -> None:
    with pytest.raises(UserError, match=r"parallel.strategy is 'pjit'; expected one of jit, pmap"):
        make_mesh("pjit")
    with pytest.raises(UserError, match=r"parallel.fsdp is 3, which does not divide the 1 devices"):
        make_mesh(fsdp=3)


def test_a_process_reads_the_rows_of_its_own_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where JAX lists the devices of two processes in turn, as a TPU's topology may have it."""
    devices: list[Any] = [SimpleNamespace(process_index=i % 2, id=i) for i in range(4)]
    monkeypatch.setattr(
        parallel, "Mesh", lambda grid, *axes, **types: SimpleNamespace(devices=grid, size=grid.size)
    )
    layout = make_mesh(devices=devices)
    order = [(device.process_index, device.id) for device in layout.mesh.devices.flat]
    assert order == [(0, 0), (0, 2), (1, 1), (1, 3)]
    for process, rows in enumerate((slice(0, 4), slice(4, 8))):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert layout.own_rows(8) == rows

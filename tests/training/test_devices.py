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

# Communication between devices, and rounding, are those of the programs that users run.
pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "backend", "ways"),  # `fsdp 4`: with the second axis, an update in 4 passes
    [
        ("finetune", "masked", ("fsdp 1", "pmap 4")),
        ("finetune", "packed", ("jit 4",)),
        ("init", "packed", ("fsdp 1", "pmap 1")),
        ("policy", "masked", ("fsdp 4", "pmap 1")),
        ("joint", "packed", ("fsdp 4",)),
    ],
)
def test_eight_devices_train_as_one_does(stage: str, backend: str, ways: tuple[str, ...]) -> None:
    """Every stage, and no activation is sent to another device."""
    program = str(TESTS / "training" / "device_checks.py")
    ((code, out, err),) = finish([start([program, stage, backend, *ways], 8)])
    assert code == 0, err
    found = json.loads(out)
    assert found["moved"] > 1e-3, "updates that change nothing show nothing"
    assert set(found["differences"]) == set(ways)
    for way, (loss, parameters) in found["differences"].items():
        assert loss < 1e-5, way
        assert parameters < 1e-4, way
    if sent := found["sent"]:
        # Devices gather parameters, and add up gradients and sums over examples; nothing else.
        gathered, added = (
            {x for one in sent[name] for x in one.split()} for name in ("all-gather", "all-reduce")
        )
        assert gathered
        assert gathered <= set(found["parameters"])
        assert 1 <= len(sent["all-reduce"]) <= 3  # of all gradients together, not of each
        assert added <= {*found["parameters"], "f32[]"}
        assert sent["all-to-all"] == sent["collective-permute"] == []
    if stage == "finetune":  # the second axis divides the state: an eighth, but for what is too small
        assert found["bytes"]["divided"] < 0.25 * found["bytes"]["whole"]


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

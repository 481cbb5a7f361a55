"""Every program lowers for TPUs and GPUs that are not here, each over eight abstract devices.

What a TPU alone would refuse to lower shows here. Nothing is compiled or run: that needs the machines.
`pmap` cannot be exported ("must be the result of jit"); what it runs on each device is, under `shard_map`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from jax import export
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from stage_steps import EXECUTIONS, STAGES, StageStep

from trbert_jax import parallel
from trbert_jax.inference.engine import CompiledForward
from trbert_jax.model.model import TokenReducingModel, init_params
from trbert_jax.model.tiles import Tiling
from trbert_jax.parallel import AXES, KEPT, ROWS, WHOLE, DeviceMesh
from trbert_jax.reduction.rules import rule_names
from trbert_jax.training import objectives
from trbert_jax.training import step as steps

DEVICES, ROWS_A_DEVICE = 8, 4
MODEL = dataclasses.replace(tiny_models.BERT, num_layers=2)
PLATFORMS = ("tpu", "cuda")  # together: what is lowered differently is lowered for each
FULL = ("model.dtype=bfloat16", "parallel.remat=true")


@pytest.fixture
def layout(monkeypatch: pytest.MonkeyPatch) -> DeviceMesh:
    monkeypatch.setattr(parallel, "SMALLEST_DIVIDED", 64)  # so that a tiny model has something to divide
    mesh = AbstractMesh((DEVICES // 2, 2), AXES, axis_types=(AxisType.Auto,) * 2)
    return DeviceMesh(mesh)  # type: ignore[arg-type]  # all that lowering asks of a mesh


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Packed execution takes the tiles of accelerators; the numbers of rows that it asks them for."""
    rows, for_backend = list[int](), Tiling.for_backend
    assert for_backend("tpu", 1) == for_backend("gpu", 1), "what serves both here"

    def chosen(backend: str, num_rows: int) -> Tiling:
        rows.append(num_rows)
        return for_backend("tpu", num_rows)

    monkeypatch.setattr(Tiling, "for_backend", chosen)
    return rows


def shapes(tree: Any, layout: Any, spec: Callable[[Any], PartitionSpec] | PartitionSpec) -> Any:
    """The arrays' shapes, and where they lie."""

    def one(x: Any) -> jax.ShapeDtypeStruct:
        place = spec(x) if callable(spec) else spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(layout.mesh, place))

    return jax.tree.map(one, tree)


def check(program: Any, *arguments: Any) -> None:
    exported = export.export(program, platforms=PLATFORMS)(*arguments)
    assert exported.platforms == PLATFORMS
    assert exported.nr_devices == DEVICES


def params_of() -> Any:
    return jax.eval_shape(lambda: init_params(MODEL, jax.random.key(0)))


def export_update(step: StageStep, layout: DeviceMesh, passes: int) -> None:
    """A stage's update as the strategy jit runs it, state and frozen parameters divided."""
    state, frozen = jax.eval_shape(step.split, params_of())
    state, frozen = (shapes(x, layout, layout.spec_of) for x in (state, frozen))
    assert any(parallel.FSDP in x.sharding.spec for x in jax.tree.leaves((state, frozen)))
    batch = step.batch(0, passes, passes * DEVICES * ROWS_A_DEVICE)
    rng = shapes(jax.eval_shape(lambda: jax.random.key(0)), layout, WHOLE)
    check(step.step(layout), state, frozen, shapes(batch, layout, PartitionSpec(None, AXES)), rng)


def export_device_update(step: StageStep, passes: int) -> None:
    """The program of strategy pmap on each device: copies of the state in, its own rows, copies out."""
    axis = steps._DEVICES
    each, mesh = PartitionSpec(axis), AbstractMesh((DEVICES,), (axis,), axis_types=(AxisType.Auto,))
    layout: Any = SimpleNamespace(local_devices=range(DEVICES), mesh=mesh, strategy="pmap")
    train_step = functools.partial(steps.train_step, step.objective, step.adamw, axis_name=axis)

    def on_a_device(state: Any, frozen: Any, batches: Any, rng: Any) -> Any:
        state, frozen, batches = jax.tree.map(lambda x: x[0], (state, frozen, batches))
        return jax.tree.map(lambda x: x[None], train_step(state, frozen, batches, rng))

    program = jax.shard_map(
        on_a_device, mesh=mesh, in_specs=(each, each, each, WHOLE), out_specs=each, check_vma=False
    )
    batch = steps.place_batches(step.batch(0, passes, passes * DEVICES * ROWS_A_DEVICE), layout)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((DEVICES, *x.shape), x.dtype), jax.eval_shape(step.split, params_of())
    )
    placed = [shapes(x, layout, each) for x in (*arguments, batch)]
    rng = shapes(jax.eval_shape(lambda: jax.random.key(0)), layout, WHOLE)
    check(jax.jit(program, donate_argnums=0), *placed, rng)


PREDICTORS = [("threshold", "masked")]
PREDICTORS += [(rule, "packed") for rule in ("threshold", "batch_max", "dense", "random", "first_k")]


class Exporting(CompiledForward):
    """Lowers for another platform where `CompiledForward` would compile."""

    def _compile(self, program: Any, params: Any, batch: Any, divide: bool) -> Any:
        mapped = self.devices.by_rows(program, out_specs=(ROWS, KEPT)) if divide else program
        placed = shapes(batch, self.devices, ROWS if divide else WHOLE)
        check(jax.jit(mapped, out_shardings=self.devices.whole), params, placed)


def export_predictor(rule: str, backend: str, layout: DeviceMesh, dtype: Any) -> None:
    rows = DEVICES * ROWS_A_DEVICE
    batch = StageStep("finetune", "packed", MODEL).batch(0, 1, rows)
    inputs = {k: v[0] for k, v in batch.items()} | {
        "min_logit": np.zeros((rows, MODEL.num_reductions), np.float32),
        "num_kept": np.ones((rows, MODEL.num_reductions), np.int32),
        "seed": np.zeros(rows, np.int32),
    }
    programs = Exporting(TokenReducingModel(MODEL, dtype), layout)
    programs.get(shapes(params_of(), layout, WHOLE), inputs, rule, backend)


def export_scores(layout: DeviceMesh, dtype: Any) -> None:
    """Stage score's program."""
    model = TokenReducingModel(MODEL, dtype)

    def scores_and_losses(params: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
        values, _, loss = objectives.score_tokens(model, params, batch)
        return values, loss

    mapped = layout.by_rows(scores_and_losses, out_specs=ROWS)
    batch = {k: v[0] for k, v in StageStep("finetune", "packed", MODEL).batch(0).items()}
    program = jax.jit(mapped, out_shardings=layout.whole)
    check(program, shapes(params_of(), layout, WHOLE), shapes(batch, layout, ROWS))


@pytest.mark.parametrize(
    ("stage", "backend"),
    [
        case if case == ("joint", "packed") else pytest.param(*case, marks=pytest.mark.slow)
        for case in itertools.product(STAGES, EXECUTIONS)
    ],
)
def test_every_update(stage: str, backend: str, layout: DeviceMesh, asked: list[int]) -> None:
    """Plain; and with dropout, bfloat16, remat and accumulation at once, by either strategy."""
    export_update(StageStep(stage, backend, MODEL), layout, 1)
    full = StageStep(stage, backend, MODEL, dropout=True, settings=FULL)
    export_update(full, layout, 2)
    export_device_update(full, 2)
    assert bool(asked) == (backend == "packed")


@pytest.mark.slow
def test_every_predictor_and_the_scores(layout: DeviceMesh, asked: list[int]) -> None:
    """`dense` is the teacher's."""
    assert {rule for rule, _ in PREDICTORS} == {*rule_names(), *rule_names("baseline")}
    for dtype in (jnp.float32, jnp.bfloat16):
        for rule, backend in PREDICTORS:
            export_predictor(rule, backend, layout, dtype)
        export_scores(layout, dtype)
    assert asked

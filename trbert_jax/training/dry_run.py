"""What a run would do on devices that need not be here: `trbert train --dry-run`.

Memory and FLOPs are estimates by closed forms, for planning; each is named where it is computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from trbert_jax.config import RunConfig, TrainingConfig
from trbert_jax.errors import UserError
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import init_params
from trbert_jax.parallel import SMALLEST_DIVIDED, check_batch, check_mesh
from trbert_jax.reduction import flops
from trbert_jax.reduction.residual_scores import score_layers
from trbert_jax.tasks.examples import Examples
from trbert_jax.training import step as optimizer
from trbert_jax.training.experiment import Experiment

TRAINS = {
    "finetune": optimizer.trains_dense,
    "init": optimizer.trains_selectors,
    "policy": optimizer.trains_selectors,
    "joint": optimizer.trains_all,
}
ASSUMED_KEPT = 0.5  # share of the tokens that a point of reduction keeps; only training tells
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """A stage on given devices.

    Attributes:
      examples: it reads; in evaluate those of the evaluated split.
      batch_size: examples of one pass over all devices.
      per_process, per_device: their shares.
      accumulation_steps: passes an update.
      steps: updates; in score, teacher and evaluate batches.
      flops: of the whole stage.
      parameters, optimizer, activations: bytes on one device.
    """

    stage: str
    examples: int
    batch_size: int
    per_process: int
    per_device: int
    accumulation_steps: int
    steps: int
    flops: float
    parameters: int
    optimizer: int
    activations: int

    @property
    def memory(self) -> int:
        """Bytes on one device, gradients (as many as trained parameters) counted with the optimizer."""
        return self.parameters + self.optimizer + self.activations


def plan(run: Experiment, devices: int, processes: int) -> list[StagePlan]:
    """Every stage of a run on so many devices of so many processes.

    Raises:
      UserError: devices that do not divide a batch, the processes or the axes of the mesh.
    """
    config = run.config
    _check(config, devices, processes)
    model = run.base_model()
    plans = []
    for stage in config.stages:
        features = run.features(config.evaluate.split if stage == "evaluate" else "train", model)
        plan_one = _plan_stage if stage in TRAINS else _plan_computation
        plans.append(plan_one(run, stage, model.config, features, devices, processes))
    return plans


def _check(config: RunConfig, devices: int, processes: int) -> None:
    """What a run on these devices refuses before its first stage."""
    if devices % processes:
        raise UserError(f"--devices {devices}: {processes} processes cannot have equally many of them")
    check_mesh(config.parallel.strategy, config.parallel.fsdp, devices)
    for stage in (stage for stage in config.stages if stage in TRAINS):
        check_batch(stage, getattr(config, stage).batch_size, devices)


def _plan_stage(
    run: Experiment, stage: str, model: ModelConfig, features: Examples, devices: int, processes: int
) -> StagePlan:
    config: TrainingConfig = getattr(run.config, stage)
    size, update = config.batch_size, config.batch_size * config.accumulation_steps
    steps = config.max_steps or -(-len(features) // update) * config.epochs
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    trained, _ = optimizer.split_params(shapes, TRAINS[stage](model))
    parts = run.config.parallel.fsdp
    per_example = stage_flops(run.config, stage, model, features.row_lengths).sum() / len(features)
    return StagePlan(
        stage=stage,
        examples=len(features),
        batch_size=size,
        per_process=size // processes,
        per_device=size // devices,
        accumulation_steps=config.accumulation_steps,
        steps=steps,
        flops=float(per_example * steps * update),
        # Where they are divided, a step gathers them whole and makes the gradient whole before dividing it.
        parameters=_bytes(shapes, parts) + (_bytes(shapes, 1) if parts > 1 else 0),
        optimizer=2 * _bytes(trained, parts) + _bytes(trained, 1),  # two moments, the gradient
        activations=_activation_bytes(run.config, stage, model, size // devices * features.group),
    )


def _plan_computation(
    run: Experiment, stage: str, model: ModelConfig, features: Examples, devices: int, processes: int
) -> StagePlan:
    """A stage without updates: batches are rounded up to what the devices share, parameters are on each."""
    size = -(-getattr(run.config, stage).batch_size // devices) * devices
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    passes = _evaluations(run) if stage == "evaluate" else (1, 0)
    dense = stage_flops(run.config, "score" if stage == "score" else "teacher", model, features.row_lengths)
    total = passes[0] * dense.sum()
    if passes[1]:
        total += passes[1] * _reduced_flops(model, features.row_lengths).sum()
    rows = size // devices * features.group
    return StagePlan(
        stage=stage,
        examples=len(features),
        batch_size=size,
        per_process=size // processes,
        per_device=size // devices,
        accumulation_steps=1,
        steps=sum(passes) * -(-len(features) // size),
        flops=float(total),
        parameters=_bytes(shapes, 1),
        optimizer=0,
        activations=_activation_bytes(run.config, stage, model, rows),
    )


def _evaluations(run: Experiment) -> tuple[int, int]:
    """How often `evaluate` goes through its split, with a dense model and with a reduced one.

    What questions without an answer need besides, to find their threshold, is not counted.
    """
    stages, settings = run.config.stages, run.config.evaluate
    reduced: set[str] = {stage for stage in ("policy", "joint") if stage in stages}
    if run.last_model_stage != "finetune":
        reduced.add(run.last_model_stage)
    others = len(settings.baselines) + len(settings.thresholds) if reduced else 0
    return 1, len(reduced) + others


def _reduced_flops(
    model: ModelConfig, lengths: np.ndarray, shares: Sequence[float] | None = None
) -> np.ndarray:
    """FLOPs of a forward pass over rows of these lengths that drops tokens, float64 [R]."""
    shape = flops.EncoderShape.of(model)
    points = len(shape.reduction_layers)
    shares = [ASSUMED_KEPT ** (i + 1) for i in range(points)] if shares is None else shares
    kept = np.stack([np.maximum(1, lengths * share).astype(int) for share in shares], 1)
    return flops.exact_flops(shape, lengths, np.minimum(kept, lengths[:, None])).astype(np.float64)


def stage_flops(
    config: RunConfig,
    stage: str,
    model: ModelConfig,
    lengths: np.ndarray,
    shares: Sequence[float] | None = None,
) -> np.ndarray:
    """FLOPs of one pass over rows of these lengths in a stage, float64 [R].

    A backward pass counts as two forward passes. Before the first point of reduction the samples of a row
    share their work.

    Args:
      config: of the run.
      stage: a training stage, score or teacher.
      model: its model.
      lengths: int [R], tokens of each row.
      shares: which part of a row's tokens is left after each point of reduction; None assumes that each point
        keeps `ASSUMED_KEPT` of what it gets.
    """
    shape = flops.EncoderShape.of(model)
    dense = flops.exact_dense_flops(shape, lengths).astype(np.float64)
    layer = flops.layer_macs(lengths, shape.hidden_size, shape.intermediate_size)
    if stage == "teacher":
        return dense
    if stage == "score":  # the gradient of states, not of parameters, by a few layers
        return dense + 2.0 * (model.num_layers - 1 - score_layers(model)[1]) * layer
    if stage in ("finetune", "init"):
        return 3 * dense
    samples = config.policy.num_samples
    if stage == "joint":
        samples = config.joint.num_samples or samples
    reduced = _reduced_flops(model, lengths, shares)
    shared = 2.0 * shape.segments[0] * layer
    backward = 3 if stage == "joint" else 1  # the policy's gradient ends at the selectors
    return backward * (shared + samples * (reduced - shared))


def _bytes(tree: Any, parts: int) -> int:
    """float32 bytes on one device where `parts` devices share what can be divided."""

    def one(x: Any) -> int:
        divides = parts > 1 and x.size >= SMALLEST_DIVIDED and any(n % parts == 0 for n in x.shape)
        return int(4 * x.size // (parts if divides else 1))

    return sum(one(x) for x in jax.tree.leaves(tree))


def _activation_bytes(config: RunConfig, stage: str, model: ModelConfig, rows: int) -> int:
    """What the backward pass of one micro-batch keeps on a device, rows as long as they can be.

    (34 H + 5 heads S) bytes a token and layer in 16 bit (Korthikanti et al., 2022, equation 1), twice that in
    32 bit; with `remat` 2 H, and one layer in full. The policy keeps nothing: its encoder has no gradient;
    nor do teacher and evaluate. Score keeps the layers behind the one that it looks back to.
    """
    length, hidden = model.max_length, model.hidden_size
    size = 1 if config.model.dtype == "bfloat16" else 2
    full = size * (34 * hidden + 5 * model.num_heads * length)
    layers = model.num_layers
    tokens: float = rows * length
    if stage in ("policy", "teacher", "evaluate"):
        return int(tokens * full)
    if stage == "score":
        return int(tokens * full * (layers - score_layers(model)[1]))
    if stage == "joint":
        samples = config.joint.num_samples or config.policy.num_samples
        segments = flops.EncoderShape.of(model).segments
        kept = [segments[0], *(samples * n * ASSUMED_KEPT ** (i + 1) for i, n in enumerate(segments[1:]))]
        tokens, layers = tokens * sum(kept) / layers, layers
    a_layer = 2 * size * hidden if config.parallel.remat else full
    return int(tokens * (layers * a_layer + (full if config.parallel.remat else 0)))


def lines(run: Experiment, devices: int, processes: int) -> Iterator[str]:
    """The plan as text."""
    run.check_prepared()
    parallel = run.config.parallel
    stages = plan(run, devices, processes)
    fsdp = parallel.fsdp
    yield (
        f"{devices} devices of {processes} process{'es' if processes > 1 else ''}, "
        f"mesh data {devices // fsdp} x fsdp {fsdp}, strategy {parallel.strategy}"
    )
    yield (
        f"{'stage':<9} {'examples':>9} {'batch':>6} {'/process':>8} {'/device':>7} {'passes':>6} "
        f"{'steps':>8} {'PFLOPs':>9} {'parameters':>10} {'optimizer':>10} {'activations':>11}"
    )
    for x in stages:
        yield (
            f"{x.stage:<9} {x.examples:>9} {x.batch_size:>6} {x.per_process:>8} {x.per_device:>7} "
            f"{x.accumulation_steps:>6} {x.steps:>8} {x.flops / 1e15:>9.3g} {_gib(x.parameters):>10} "
            f"{_gib(x.optimizer):>10} {_gib(x.activations):>11}"
        )
    yield (
        "steps: updates, in score, teacher and evaluate batches; estimates: "
        "memory on one device, gradients with the optimizer; activations of rows as long as they "
        f"can be; {ASSUMED_KEPT:.0%} of the tokens kept at each point of reduction"
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"

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
from trbert_jax.data.features import FeatureSet
from trbert_jax.errors import UserError
from trbert_jax.metrics import flops
from trbert_jax.modeling.config import ModelConfig
from trbert_jax.modeling.model import init_params
from trbert_jax.parallel import SMALLEST_DIVIDED, STRATEGIES
from trbert_jax.training import optimizer
from trbert_jax.training.run import Run

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
    """A training stage on given devices.

    Attributes:
      examples: in the training split.
      batch_size: examples of one pass over all devices.
      per_process, per_device: their shares.
      accumulation_steps: passes an update.
      steps: updates.
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


def plan(run: Run, devices: int, processes: int) -> list[StagePlan]:
    """Every training stage of a run on so many devices of so many processes.

    Raises:
      UserError: devices that do not divide a batch, the processes or the axes of the mesh.
    """
    config = run.config
    _check(config, devices, processes)
    model = run.base_model()
    features = run.features("train", model)
    trained = [stage for stage in config.stages if stage in TRAINS]
    return [_plan_stage(run, stage, model.config, features, devices, processes) for stage in trained]


def _check(config: RunConfig, devices: int, processes: int) -> None:
    if config.parallel.strategy not in STRATEGIES:
        raise UserError(f"parallel.strategy is {config.parallel.strategy!r}")
    if devices % processes:
        raise UserError(f"--devices {devices}: {processes} processes cannot have equally many of them")
    if devices % config.parallel.fsdp:
        raise UserError(f"parallel.fsdp is {config.parallel.fsdp}, which does not divide {devices} devices")


def _plan_stage(
    run: Run, stage: str, model: ModelConfig, features: FeatureSet, devices: int, processes: int
) -> StagePlan:
    config: TrainingConfig = getattr(run.config, stage)
    size, update = config.batch_size, config.batch_size * config.accumulation_steps
    if size % devices:
        raise UserError(
            f"{stage}.batch_size is {size}, which {devices} devices cannot share evenly; "
            f"set it to a multiple of {devices}"
        )
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
      stage: a training stage.
      model: its model.
      lengths: int [R], tokens of each row.
      shares: which part of a row's tokens is left after each point of reduction; None assumes that each point
        keeps `ASSUMED_KEPT` of what it gets.
    """
    shape = flops.EncoderShape.of(model)
    dense = flops.exact_dense_flops(shape, lengths).astype(np.float64)
    if stage in ("finetune", "init"):
        return 3 * dense
    samples = config.policy.num_samples
    if stage == "joint":
        samples = config.joint.num_samples or samples
    points = len(shape.reduction_layers)
    shares = [ASSUMED_KEPT ** (i + 1) for i in range(points)] if shares is None else shares
    kept = np.stack([np.maximum(1, lengths * share).astype(int) for share in shares], 1)
    reduced = flops.exact_flops(shape, lengths, np.minimum(kept, lengths[:, None])).astype(np.float64)
    layer = flops.layer_macs(lengths, shape.hidden_size, shape.intermediate_size)
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
    32 bit; with `remat` 2 H, and one layer in full. The policy keeps nothing: its encoder has no gradient.
    """
    length, hidden = model.max_length, model.hidden_size
    size = 1 if config.model.dtype == "bfloat16" else 2
    full = size * (34 * hidden + 5 * model.num_heads * length)
    layers = model.num_layers
    tokens: float = rows * length
    if stage == "policy":
        return int(tokens * full)
    if stage == "joint":
        samples = config.joint.num_samples or config.policy.num_samples
        segments = flops.EncoderShape.of(model).segments
        kept = [segments[0], *(samples * n * ASSUMED_KEPT ** (i + 1) for i, n in enumerate(segments[1:]))]
        tokens, layers = tokens * sum(kept) / layers, layers
    a_layer = 2 * size * hidden if config.parallel.remat else full
    return int(tokens * (layers * a_layer + (full if config.parallel.remat else 0)))


def lines(run: Run, devices: int, processes: int) -> Iterator[str]:
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
        f"{'updates':>8} {'PFLOPs':>9} {'parameters':>10} {'optimizer':>10} {'activations':>11}"
    )
    for x in stages:
        yield (
            f"{x.stage:<9} {x.examples:>9} {x.batch_size:>6} {x.per_process:>8} {x.per_device:>7} "
            f"{x.accumulation_steps:>6} {x.steps:>8} {x.flops / 1e15:>9.3g} {_gib(x.parameters):>10} "
            f"{_gib(x.optimizer):>10} {_gib(x.activations):>11}"
        )
    yield (
        "estimates: memory on one device, gradients with the optimizer; activations of rows as long as they "
        f"can be; {ASSUMED_KEPT:.0%} of the tokens kept at each point of reduction"
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"

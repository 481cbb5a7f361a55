"""Plan an experiment on devices that need not exist: `trbert train --dry-run`.

Memory and FLOPs are estimates by closed forms; each names its source.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from trbert_jax.config import RunConfig
from trbert_jax.errors import UserError
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import init_params
from trbert_jax.model.segment import kept_numbers
from trbert_jax.parallel import SMALLEST_DIVIDED, check_batch, check_mesh
from trbert_jax.reduction import flops
from trbert_jax.tasks.examples import Examples
from trbert_jax.training.evaluation import num_passes
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.stages import Stage, configured
from trbert_jax.training.step import split_params

GIB = 2**30


class StagePlan(NamedTuple):
    """A stage on given devices; bytes are those on one device."""

    stage: str
    examples: int  # that it reads; in stage evaluate, of the evaluated split
    batch_size: int  # examples of one pass over all devices
    per_process: int
    per_device: int
    accumulation_steps: int  # passes of an update
    steps: int  # updates; batches in a stage without updates
    flops: float  # of the whole stage
    parameters: int
    optimizer: int  # with gradients
    activations: int


def plan(experiment: Experiment, devices: int, processes: int) -> list[StagePlan]:
    """Plans every stage; raises `UserError` if the devices do not divide a batch, processes or the mesh."""
    config = experiment.config
    if devices % processes:
        raise UserError(f"--devices {devices}: {processes} processes cannot have equally many of them")
    check_mesh(config.parallel.strategy, config.parallel.fsdp, devices)
    stages = configured(config)
    for stage in stages:
        if stage.trains:
            check_batch(stage.name, getattr(config, stage.name).batch_size, devices)
    model, plans = experiment.base_model(), []
    for stage in stages:
        if stage.evaluates:
            examples = experiment.features(getattr(config, stage.name).split, model)
        else:
            examples = stage.examples(experiment, model)
        plans.append(_plan_stage(config, stage, model.config, examples, devices, processes))
    return plans


def _plan_stage(
    config: RunConfig, stage: Stage, model: ModelConfig, examples: Examples, devices: int, processes: int
) -> StagePlan:
    settings, parts = getattr(config, stage.name), config.parallel.fsdp
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    lengths = examples.row_lengths
    total = stage.flops(config, model, lengths, None).sum()
    if stage.trains:
        size, passes = settings.batch_size, settings.accumulation_steps
        steps = settings.max_steps or -(-len(examples) // (size * passes)) * settings.epochs
        total *= steps * size * passes / len(examples)
        # A step gathers divided parameters, and divides the gradient after it is complete.
        parameters = _bytes(shapes, parts) + (_bytes(shapes, 1) if parts > 1 else 0)
        trained, _ = split_params(shapes, stage.trains(model))
        optimizer = 2 * _bytes(trained, parts) + _bytes(trained, 1)  # two moments and the gradient
    else:  # batches are rounded up, each device has all parameters
        size, passes = -(-settings.batch_size // devices) * devices, 1
        steps = -(-len(examples) // size)
        parameters, optimizer = _bytes(shapes, 1), 0
        if stage.evaluates:
            dense, reduced = num_passes(config)
            steps *= dense + reduced
            total *= dense
            total += reduced * flops.assumed_flops(flops.EncoderShape.of(model), lengths).sum()
    return StagePlan(
        stage=stage.name,
        examples=len(examples),
        batch_size=size,
        per_process=size // processes,
        per_device=size // devices,
        accumulation_steps=passes,
        steps=steps,
        flops=float(total),
        parameters=parameters,
        optimizer=optimizer,
        activations=_activation_bytes(config, stage, model, size // devices * examples.group),
    )


def _bytes(tree: Any, parts: int) -> int:
    """Returns the float32 bytes on one device if `parts` devices share what can be divided."""

    def one(x: Any) -> int:
        divides = parts > 1 and x.size >= SMALLEST_DIVIDED and any(n % parts == 0 for n in x.shape)
        return int(4 * x.size // (parts if divides else 1))

    return sum(one(x) for x in jax.tree.leaves(tree))


def _activation_bytes(config: RunConfig, stage: Stage, model: ModelConfig, rows: int) -> int:
    """Returns the bytes that the backward pass of one micro-batch keeps on a device, for rows of full length.

    A packed stage keeps what `model.segment` says. Others keep (34 H + 5 heads S) bytes per token and layer
    in 16 bit (Korthikanti et al., 2022, equation 1), twice that in 32 bit; with `remat` 2 H, and one layer in
    full.
    """
    size = 1 if config.model.dtype == "bfloat16" else 2
    kept = stage.kept_layers(config, model) if stage.kept_layers else None
    layers = kept or 1
    tokens = rows * model.max_length
    if stage.trains and kept and getattr(config, stage.name).backend == "packed":
        least, *_, most = (2 * size * tokens * layers * x for x in kept_numbers(model).values())
        limit = 0.0 if config.parallel.remat else config.parallel.activation_memory * GIB
        return int(max(least, min(most, limit)))
    full = size * (34 * model.hidden_size + 5 * model.num_heads * model.max_length)
    per_token = layers * full
    if config.parallel.remat and stage.trains and kept:
        per_token = layers * 2 * size * model.hidden_size + layers / model.num_layers * full
    return int(tokens * per_token)


def lines(experiment: Experiment, devices: int, processes: int) -> Iterator[str]:
    """Yields the plan as lines of text."""
    plans, parallel = plan(experiment, devices, processes), experiment.config.parallel
    yield (
        f"{devices} devices of {processes} process{'es' if processes > 1 else ''}, "
        f"mesh data {devices // parallel.fsdp} x fsdp {parallel.fsdp}, strategy {parallel.strategy}"
    )
    titles = ("stage", "examples", "batch", "/process", "/device", "passes", "steps", "PFLOPs")
    rows: list[tuple[Any, ...]] = [(*titles, "parameters", "optimizer", "activations")]
    for x in plans:
        sizes = [f"{n / GIB:.2f} GiB" if n >= GIB / 10 else f"{n / 2**20:.1f} MiB" for n in x[8:]]
        rows.append((*x[:7], f"{x.flops / 1e15:.3g}", *sizes))
    widths = (9, 9, 6, 8, 7, 6, 8, 9, 10, 10, 11)
    for stage, *values in rows:
        columns = [f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True)]
        yield " ".join([f"{stage:<{widths[0]}}", *columns])
    yield (
        "steps are updates, or batches in a stage without updates; estimates: memory on one device, "
        "gradients with the optimizer; activations of rows of full length; "
        f"{flops.ASSUMED_KEPT:.0%} of the tokens kept at each point of reduction"
    )

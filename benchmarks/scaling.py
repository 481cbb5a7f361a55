"""Estimates the weak scaling of a training step to 8, 64 and 256 devices; docs/scaling.md explains it.

    python benchmarks/scaling.py --json benchmarks/scaling.json

Measured on this CPU: seconds for each FLOP of a stage's packed step (training_steps.json), the optimizer's
update and a copy of memory (this script, in CPU seconds, which other work on the machine hardly affects),
and reading (prepared_data.json). Assumed: how much faster a device is in each, and the time to add
gradients over devices. The wait for the device whose rows have the most tokens is simulated with the
lengths of film reviews.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import review_lengths

from trbert_jax.config import RunConfig, load_config
from trbert_jax.inference.benchmark import SIZES
from trbert_jax.inference.benchmark_report import machine
from trbert_jax.io import check_outputs, read_json, write_json
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import init_params
from trbert_jax.reduction.flops import ASSUMED_KEPT
from trbert_jax.training import stages
from trbert_jax.training import step as optimizer

HERE = Path(__file__).parent
DEVICES = (8, 64, 256)
STAGES = ("finetune", "policy", "joint")
MEASURED_WITH = "minilm"  # the model of training_steps.json
# Assumptions, not measurements.
FLOPS_PER_SECOND = 3e14  # a device in a step of finetune: 30 % of 1e15 in bfloat16
MEMORY_BYTES_PER_SECOND = 2e12  # a copy in the memory of a device
BYTES_PER_SECOND = 5e10  # the links of a device in an all-reduce
LATENCY = 2e-5  # seconds of an empty all-reduce, for each doubling of the devices
DRAWS = 200
REPEATS = 5


@dataclasses.dataclass(frozen=True)
class Measured:
    """Measurements of this machine.

    Attributes:
      seconds_per_step: the packed step of each stage.
      update_seconds: the optimizer's part of it; an overestimate if several cores share an update.
      compute_flops_per_second: rate of the rest of it.
      update_seconds_per_parameter: the optimizer of each stage.
      copy_bytes_per_second: a copy of memory, read and written.
      read_examples_per_second: from shards, in the background.
    """

    seconds_per_step: dict[str, float]
    update_seconds: dict[str, float]
    compute_flops_per_second: dict[str, float]
    update_seconds_per_parameter: dict[str, float]
    copy_bytes_per_second: float
    read_examples_per_second: float


def measure(steps_file: Path, prepared_file: Path) -> Measured:
    """Reads the measurements of the other scripts and measures the rest."""
    records = [r for r in read_json(steps_file)["steps"] if r["backend"] == "packed"]
    seconds, update, rate, each = {}, {}, {}, {}
    for stage in STAGES:
        record = next(r for r in records if r["stage"] == stage)
        model = dataclasses.replace(SIZES[MEASURED_WITH], max_length=record["max_length"])
        if (record["hidden_size"], record["num_layers"]) != (model.hidden_size, model.num_layers):
            raise SystemExit(f"{steps_file}: is of another model than {MEASURED_WITH}")
        seconds[stage], update[stage] = record["seconds_per_step"], update_seconds(stage, model)
        rate[stage] = record["model_flops_per_step"] / (seconds[stage] - update[stage])
        each[stage] = update[stage] / num_trained(stage, model)
    read = read_json(prepared_file)["read"]["examples_per_second"]
    return Measured(seconds, update, rate, each, copy_speed(), read)


def update_seconds(stage: str, model: ModelConfig) -> float:
    """Times an update of AdamW alone, with clipping."""
    trained, _ = optimizer.split_params(
        init_params(model, jax.random.key(0)), stages.STAGES[stage].trained(model)
    )
    adamw = optimizer.adamw(optimizer.linear_schedule(3e-5, 1000, 0), model)

    def update(grads: Any, state: Any, params: Any) -> Any:
        updates, state = adamw.update(grads, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    state, step = adamw.init(trained), jax.jit(update)
    grads = jax.tree.map(jnp.ones_like, trained)
    return least_seconds(lambda: step(grads, state, trained))


def copy_speed() -> float:
    """Returns bytes per second, read and written, of a copy too large for a cache."""
    array, copy = jnp.zeros(2**26, jnp.float32), jax.jit(lambda x: x + 1)
    return 2 * array.nbytes / least_seconds(lambda: copy(array))


def least_seconds(run: Callable[[], Any]) -> float:
    """Returns the minimum CPU seconds of a few repeats after the first."""
    jax.block_until_ready(run())
    found = []
    for _ in range(REPEATS):
        start = time.process_time()
        jax.block_until_ready(run())
        found.append(time.process_time() - start)
    return min(found)


def num_trained(stage: str, model: ModelConfig) -> int:
    """Returns the number of parameters that a stage trains."""
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    trained, _ = optimizer.split_params(shapes, stages.STAGES[stage].trained(model))
    return sum(x.size for x in jax.tree.leaves(trained))


def estimate(
    config: RunConfig, stage: str, model: ModelConfig, measured: Measured, rows: int, passes: int
) -> list[dict[str, Any]]:
    """Returns a record for each number of devices: seconds of each part of an update, and its efficiency."""
    rng = np.random.default_rng(0)
    parameters = num_trained(stage, model)
    size = 4 * parameters  # bytes of gradients in float32
    # A stage that uses this CPU less well than finetune uses a device less well.
    relative = measured.compute_flops_per_second[stage] / measured.compute_flops_per_second["finetune"]
    rate = FLOPS_PER_SECOND * relative
    slower = measured.copy_bytes_per_second / MEMORY_BYTES_PER_SECOND
    update = parameters * measured.update_seconds_per_parameter[stage] * slower
    reading = rows * passes / measured.read_examples_per_second
    records = []
    for devices in DEVICES:
        lengths = review_lengths(DRAWS * devices * passes * rows, rng, model.max_length)
        flops = stages.STAGES[stage].flops(config, model, lengths, None)
        flops = flops.reshape(DRAWS, devices, passes * rows).sum(-1)
        mean = float(flops.mean())
        # A device runs its passes without waiting; all devices meet once per update.
        slowest = float(flops.max(1).mean())
        reduction = float(2 * (devices - 1) / devices * size / BYTES_PER_SECOND + LATENCY * np.log2(devices))
        compute, waiting = mean / rate, (slowest - mean) / rate
        busy = compute + waiting + reduction + update
        total = max(busy, reading)  # reading overlaps with computation
        records.append(
            {
                "stage": stage,
                "devices": devices,
                "rows_a_device": rows,
                "passes": passes,
                "compute_seconds": compute,
                "waiting_seconds": waiting,
                "reduction_seconds": reduction,
                "update_seconds": update,
                "input_seconds": total - busy,
                "gradient_bytes": size,
                # One device alone with its rows: no waiting, no adding.
                "efficiency": max(compute + update, reading) / total,
            }
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="result file")
    parser.add_argument("--steps", type=Path, default=HERE / "training_steps.json", help="measured steps")
    parser.add_argument("--prepared", type=Path, default=HERE / "prepared_data.json", help="measured reading")
    args = parser.parse_args()
    check_outputs([args.json])
    config = load_config(HERE.parent / "configs" / "imdb_bert.yaml")
    model = SIZES["bert-base"]
    measured = measure(args.steps, args.prepared)
    records = [
        record
        for stage in STAGES
        for passes in (1, 4)
        for record in estimate(config, stage, model, measured, rows=8, passes=passes)
    ]
    assumed = {
        "flops_per_second": FLOPS_PER_SECOND,
        "memory_bytes_per_second": MEMORY_BYTES_PER_SECOND,
        "bytes_per_second": BYTES_PER_SECOND,
        "latency_seconds": LATENCY,
        "kept_at_each_point": ASSUMED_KEPT,
    }
    write_json(
        args.json,
        {
            "assumed": assumed,
            "measured": dataclasses.asdict(measured),
            "model": "bert-base",
            "measured_model": MEASURED_WITH,
            "records": records,
            "machine": machine(),
        },
    )
    for stage in STAGES:
        share = measured.update_seconds[stage] / measured.seconds_per_step[stage]
        print(
            f"{stage:<9} measured: {measured.compute_flops_per_second[stage]:.3g} FLOP/s, update {share:.1%}"
        )
    for r in records:
        print(
            f"{r['stage']:<9} {r['passes']} x 8 rows, {r['devices']:>4} devices: compute "
            f"{1e3 * r['compute_seconds']:7.1f} ms, update {1e3 * r['update_seconds']:4.1f}, waiting "
            f"{1e3 * r['waiting_seconds']:6.1f}, adding up {1e3 * r['reduction_seconds']:5.1f}, input "
            f"{1e3 * r['input_seconds']:5.1f}, efficiency {r['efficiency']:.0%}"
        )


if __name__ == "__main__":
    main()

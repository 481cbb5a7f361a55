"""Weak scaling on paper: what a training step costs on 8, 64 and 256 devices; docs/scaling.md explains it.

    python benchmarks/scaling.py --json benchmarks/scaling.json

Nothing is run on devices. Three parts: FLOPs of a device's own rows by the closed form, at an assumed rate;
the sum of gradients over devices, at an assumed bandwidth; and waiting for the device whose rows have the
most tokens, which is simulated with lengths like those of film reviews.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trbert_jax.benchmark.sizes import SIZES
from trbert_jax.benchmark.workload import review_lengths
from trbert_jax.config import RunConfig, load_config
from trbert_jax.files import check_writable, write_json
from trbert_jax.modeling.config import ModelConfig
from trbert_jax.modeling.model import init_params
from trbert_jax.training import optimizer
from trbert_jax.training.plan import ASSUMED_KEPT, TRAINS, stage_flops

DEVICES = (8, 64, 256)
# Assumptions, not measurements.
FLOPS_PER_SECOND = 3e14  # of a device in a training step: 30 % of 1e15 in bfloat16
BYTES_PER_SECOND = 5e10  # of a device's links in an all-reduce
LATENCY = 2e-5  # seconds of an all-reduce of nothing, per doubling of the devices
DRAWS = 200


def gradient_bytes(stage: str, model: ModelConfig) -> int:
    """float32 bytes that the devices add up in an update."""
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    trained, _ = optimizer.split_params(shapes, TRAINS[stage](model))
    return sum(4 * x.size for x in jax.tree.leaves(trained))


def estimate(
    config: RunConfig, stage: str, model: ModelConfig, rows: int, passes: int
) -> list[dict[str, Any]]:
    """One record a number of devices: seconds of the parts of an update, and its efficiency."""
    rng = np.random.default_rng(0)
    size = gradient_bytes(stage, model)
    records = []
    for devices in DEVICES:
        lengths = review_lengths(DRAWS * devices * passes * rows, rng, model.max_length)
        flops = stage_flops(config, stage, model, lengths).reshape(DRAWS, devices, passes * rows).sum(-1)
        mean = float(flops.mean())
        # A device goes from pass to pass without waiting; all meet once an update.
        slowest = float(flops.max(1).mean())
        reduction = 2 * (devices - 1) / devices * size / BYTES_PER_SECOND + LATENCY * np.log2(devices)
        compute = mean / FLOPS_PER_SECOND
        waiting = (slowest - mean) / FLOPS_PER_SECOND
        records.append(
            {
                "stage": stage,
                "devices": devices,
                "rows_a_device": rows,
                "passes": passes,
                "compute_seconds": compute,
                "waiting_seconds": waiting,
                "reduction_seconds": float(reduction),
                "gradient_bytes": size,
                "efficiency": compute / (compute + waiting + float(reduction)),
            }
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the numbers are written")
    args = parser.parse_args()
    check_writable(args.json)
    config = load_config("configs/imdb_bert.yaml")
    model = SIZES["bert-base"]
    records = [
        record
        for stage in ("finetune", "policy", "joint")
        for passes in (1, 4)
        for record in estimate(config, stage, model, rows=8, passes=passes)
    ]
    assumed = {
        "flops_per_second": FLOPS_PER_SECOND,
        "bytes_per_second": BYTES_PER_SECOND,
        "latency_seconds": LATENCY,
        "kept_at_each_point": ASSUMED_KEPT,
    }
    write_json(args.json, {"assumed": assumed, "model": "bert-base", "records": records})
    for r in records:
        print(
            f"{r['stage']:<9} {r['passes']} x 8 rows, {r['devices']:>4} devices: compute "
            f"{1e3 * r['compute_seconds']:7.1f} ms, waiting {1e3 * r['waiting_seconds']:6.1f}, adding up "
            f"{1e3 * r['reduction_seconds']:5.1f}, efficiency {r['efficiency']:.0%}"
        )


if __name__ == "__main__":
    main()

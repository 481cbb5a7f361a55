"""Times packed runs against the number of kept tokens, and fits a line.

    python benchmarks/token_cost.py --json benchmarks/token_cost.json --plot benchmarks/token_cost.png

Uses random weights of MiniLM's size, texts with the lengths of film reviews, and random tokens to keep,
from a tenth to all of them, the same at both points of reduction. The intercept of the line is the fixed
cost of a text: embeddings and layer 0, which are also timed alone, with and without the first selector.
"""

import argparse
import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from common import random_actions, random_examples, review_lengths

from trbert_jax.inference.benchmark import SIZES, Workload, prepare, time_runs
from trbert_jax.inference.benchmark_report import machine
from trbert_jax.inference.engine import CompiledForward, Inputs
from trbert_jax.io import atomic_file, check_outputs, write_json
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Params, TokenReducingModel, init_params
from trbert_jax.model.packed import PackedEncoder

SHARES = tuple(round(0.1 * i, 1) for i in range(1, 11))
PREFIX = "embeddings_and_layer_0"


def prepare_prefix(
    model: TokenReducingModel, params: Params, workload: Workload, batch_size: int, selector: bool
) -> Sequence[Callable[[], Any]]:
    """Compiles the part of a packed run before the first reduction, with or without the first selector."""
    encoder = PackedEncoder.of(model, batch_size)

    @jax.jit
    def program(params: Params, batch: Inputs) -> tuple[jax.Array, ...]:
        packed = encoder.embed(params, batch)
        packed = encoder.run_layers(params, packed, range(model.config.reduction_layers[0]))
        first = packed.states[packed.start]
        return (first, encoder.selector_logits(params, packed, 0, batch)) if selector else (first,)

    def run(batch: Inputs) -> Any:
        return jax.block_until_ready(program(params, batch))

    batches = workload.batches(batch_size, (workload.max_length,))
    calls = [functools.partial(run, batch) for _, batch in batches]
    for call in calls:
        call()  # compiles
    return calls


def measure(config: ModelConfig, num_texts: int, batch_size: int, repeats: int) -> dict[str, Any]:
    """Times all shares, interleaved, and fits the line."""
    rng = np.random.default_rng(0)
    lengths = review_lengths(num_texts, rng, config.max_length)
    features = random_examples(config, lengths, rng)
    params = init_params(config, jax.random.key(0))
    model = TokenReducingModel(config)
    programs, runs = CompiledForward(model), []
    for share in SHARES:
        actions = random_actions(lengths, config.max_length, (share, share), rng)
        workload = Workload(features, config.max_length, actions)
        runs.append(prepare("packed", programs, params, workload, batch_size))
    plain = Workload(features, config.max_length)
    calls = {str(share): run.calls for share, run in zip(SHARES, runs, strict=True)}
    prefixes = {PREFIX: False, f"{PREFIX}_and_selector": True}
    calls |= {name: prepare_prefix(model, params, plain, batch_size, x) for name, x in prefixes.items()}
    timed = time_runs(calls, repeats)
    seconds = {name: float(np.median(times.sum(-1))) for name, times in timed.items()}
    kept = np.array([run.keep.sum(-1)[:, 0].sum() for run in runs if run.keep is not None])
    times = np.array([seconds[str(share)] for share in SHARES])
    slope, intercept = np.polyfit(kept, times, 1)
    residual = times - (slope * kept + intercept)
    return {
        "points": [{"kept_tokens": int(k), "seconds": float(t)} for k, t in zip(kept, times, strict=True)],
        "seconds_per_kept_token": float(slope),
        "intercept_seconds": float(intercept),
        "r_squared": float(1 - (residual**2).sum() / ((times - times.mean()) ** 2).sum()),
        **{f"{name}_seconds": seconds[name] for name in prefixes},
        "intercept_over_embeddings_and_layer_0": float(intercept / seconds[PREFIX]),
        "texts": runs[0].num_texts,
        "tokens": int(lengths[: runs[0].num_texts].sum()),
        "batch_size": batch_size,
        "max_length": config.max_length,
        "hidden_size": config.hidden_size,
        "num_layers": config.num_layers,
        "repeats": repeats,
        "machine": machine(),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Draws the points, the line through them and the cost before the first reduction."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    kept = np.array([point["kept_tokens"] for point in result["points"]]) / 1000
    line = np.array([0, kept.max()])
    slope, intercept = 1000 * result["seconds_per_kept_token"], result["intercept_seconds"]
    label = f"{intercept:.3f} s + {slope * 1000:.1f} µs a token, R² = {result['r_squared']:.4f}"
    axes.plot(line, intercept + slope * line, color="#b9c7c0", linewidth=2, label=label, zorder=1)
    axes.plot(kept, [p["seconds"] for p in result["points"]], "o", color="#0b6e4f", label="packed")
    prefix = result[f"{PREFIX}_seconds"]
    axes.axhline(prefix, color="#3b6fb6", linestyle="--", linewidth=1.2)
    axes.annotate(
        f"embeddings and layer 0 alone: {prefix:.3f} s",
        (kept.max(), prefix),
        xytext=(0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
        color="#3b6fb6",
    )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"thousand tokens kept of {result['tokens'] / 1000:.0f} thousand")
    axes.set_ylabel(f"seconds for {result['texts']} texts")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    with atomic_file(path, "wb") as stream:
        canvas.print_png(stream)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there, as PNG")
    parser.add_argument("--size", choices=tuple(SIZES), default="minilm")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--texts", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    for path in filter(None, (args.json, args.plot)):
        check_outputs([path])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    config = dataclasses.replace(SIZES[args.size], max_length=args.max_length)
    result = measure(config, args.texts, args.batch_size, args.repeats)
    for point in result["points"]:
        print(f"{point['kept_tokens']:>8} tokens {point['seconds']:8.3f} s")
    for name in ("intercept_seconds", f"{PREFIX}_seconds", f"{PREFIX}_and_selector_seconds", "r_squared"):
        print(f"{name:<44} {result[name]:.4f}")
    if args.json:
        write_json(args.json, result)
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()

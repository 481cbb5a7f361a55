"""Measures what a run has learned: the metric on all test data, FLOPs and speed, at a few thresholds.

    python benchmarks/learned.py --run DIR --dev FILE --test FILE --speedups 3,4 --command TEXT --json FILE
    python benchmarks/learned.py --time --run DIR --test FILE --json FILE
    python benchmarks/learned.py --distilled DIR --test FILE --json FILE
    python benchmarks/learned.py --summary results/summary.json

The first finds thresholds on --dev, and measures them, random and first tokens on --test, beside the dense
model of the same run. The second adds times to its file: of the reducing model with and without reduction, in
turns, on the first --timed texts. The third adds the dense model of `distilled_dense.py`. The last gathers
all such files in a folder, and prints the table of docs/results.md.
"""

import argparse
import itertools
import json
import logging
import operator
import shlex
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trbert_jax import TRBert
from trbert_jax.config import load_config, to_dict
from trbert_jax.datasets import BadRecords
from trbert_jax.inference import calibrate, frontier
from trbert_jax.inference.benchmark import benchmark_file
from trbert_jax.inference.evaluate import read_examples, summarize
from trbert_jax.io import read_json, write_json
from trbert_jax.reduction.rules import rule_names

KIND = "learned"  # marks the files that --summary gathers
TIME = "time_ratio_batch_"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates and times the models of a work directory."""
    config, trained = load_config(args.run / "config.json"), read_json(args.run / "results.json")
    dense, model = (TRBert.from_pretrained(args.run / stage / "model") for stage in ("finetune", args.stage))
    task = model.task
    dev, test = (read_examples(model, path, BadRecords()) for path in (args.dev, args.test))
    engine = dense.engine(args.batch_size)
    on_dev, on_test = (engine.run(dense.params, examples, rule="dense") for examples in (dev, test))
    copies = calibrate.copying(model.engine(args.batch_size))
    points = frontier.find_frontier(copies, model.params, dev, task, on_dev, args.speedups)
    rows = frontier.evaluate_points(
        copies, model.params, test, task, frontier.best(points), on_test, rule_names("baseline")
    )
    metrics = task.score(test, on_test.logits).metrics
    return {
        "kind": KIND,
        "command": args.command,
        "measured": shlex.join(["python", "benchmarks/learned.py", *sys.argv[1:]]),
        "seed": config.seed,
        "data": config.data.name,
        "labels": args.labels or config.finetune.max_examples or config.data.max_train_examples,
        "metric": task.metric,
        "full_score": task.full_score,
        "dense": summarize(on_test, dense.config, metrics),
        "points": rows,
        "config": to_dict(config),
        **{name: trained[name] for name in ("stages", "versions", "machine")},
    }


def distilled(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates the dense model that `distilled_dense.py` trained."""
    model = TRBert.from_pretrained(args.distilled / "distill" / "model")
    test = read_examples(model, args.test, BadRecords())
    outputs = model.engine(args.batch_size).run(model.params, test, rule="dense")
    metrics = model.task.score(test, outputs.logits).metrics
    return {"distilled_dense": summarize(outputs, model.config, metrics)}


def timed(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the points of --json with batch size -> texts per second over those with all tokens kept."""
    points = read_json(args.json)["points"]
    for point in points:
        records = benchmark_file(
            args.test,
            model_dir=args.run / args.stage / "model",
            batch_sizes=args.batch_sizes,
            variants=("packed", "dense"),
            max_texts=args.timed,
            repeats=args.repeats,
            threshold=tuple(point["threshold"]),
        )
        speed = {(r["variant"], r["batch_size"]): r["examples_per_second"] for r in records}
        point["faster"] = {str(n): speed["packed", n] / speed["dense", n] for n in args.batch_sizes}
    return {"points": points}


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yields a row of the summary for each speed in a file."""
    result = json.loads(path.read_text(encoding="utf-8"))
    if result.get("kind") != KIND:
        return
    metric = result["metric"]

    def percent(values: dict[str, Any]) -> float:
        return round(100 * values[metric] / result["full_score"], 2)

    for point in result["points"]:
        yield {
            "data": result["data"],
            "labels": result["labels"],
            "seed": result["seed"],
            "test_examples": result["dense"]["examples"],
            "metric": metric,
            "dense": percent(result["dense"]),
            "reduced": percent(point),
            "target": point["target"],
            "flops_ratio": round(point["flops_speedup"], 3),
            **{f"{TIME}{size}": round(x, 2) for size, x in point.get("faster", {}).items()},
            "flips": point["flips"],
            "distilled_dense": percent(result["distilled_dense"]) if "distilled_dense" in result else None,
            **{name: percent(point[name]) for name in rule_names("baseline")},
            "config": shlex.split(result["command"])[3],
            "command": result["command"],
            "file": f"results/{path.name}",
        }


def gather(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of all files of a folder, by data, target and seed."""
    rows = [
        row for path in sorted(folder.glob("*.json")) if path.name != "summary.json" for row in rows_of(path)
    ]
    return sorted(rows, key=lambda row: (row["data"], row["labels"], row["target"], row["seed"]))


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yields a Markdown table: a row for each data set, number of labels and speed, means over seeds."""
    columns = ("dense", "distilled_dense", "reduced", "random", "first_k")
    header = ("data (metric), labels", "seeds", *columns, "fewer FLOPs", "faster, by batch size")
    yield f"| {' | '.join(header)} |"
    yield "|" + "---|" * len(header)
    key = operator.itemgetter("data", "metric", "labels", "target")
    for (data, metric, labels, _), group in itertools.groupby(rows, key):
        same = [*group]
        times = [name for name in same[0] if name.startswith(TIME)]
        known = {
            name: [row[name] for row in same if row[name] is not None]
            for name in (*columns, "flops_ratio", *times)
        }
        mean = {name: statistics.mean(values) for name, values in known.items() if values}
        scores = " | ".join(f"{mean[name]:.1f}" if name in mean else "–" for name in columns)
        flops = f"{mean['flops_ratio']:.2f}x"
        speeds = [f"{mean[name]:.2f}x ({name.removeprefix(TIME)})" for name in times]
        seeds = ", ".join(str(row["seed"]) for row in same)
        yield f"| {data} ({metric}), {labels:,} | {seeds} | {scores} | {flops} | {', '.join(speeds)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--summary", type=Path, metavar="FILE", help="gather the results beside FILE into it")
    parser.add_argument("--run", type=Path, metavar="DIR", help="work directory")
    parser.add_argument("--stage", default="joint", help="stage whose model reduces (default joint)")
    parser.add_argument("--time", action="store_true", help="add times to --json")
    parser.add_argument("--distilled", type=Path, metavar="DIR", help="work directory of distilled_dense.py")
    parser.add_argument("--dev", type=Path, metavar="FILE")
    parser.add_argument("--test", type=Path, metavar="FILE")
    parser.add_argument("--speedups", type=lambda x: [*map(float, x.split(","))], metavar="X,X")
    parser.add_argument("--labels", type=int, help="training labels, where the configuration allows more")
    parser.add_argument("--command", metavar="TEXT", help="the command that trained the models")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--timed", type=int, default=64, help="texts to time (default 64)")
    parser.add_argument("--batch-sizes", type=lambda x: [*map(int, x.split(","))], default=[1, 32])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.summary:
        write_json(args.summary, rows := gather(args.summary.parent))
        print(*table(rows), sep="\n")
        return
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    adds = timed if args.time else distilled if args.distilled else None
    needed = [
        "test",
        "json",
        *(["run"] if args.time else [] if adds else ["run", "dev", "speedups", "command"]),
    ]
    if missing := [name for name in needed if getattr(args, name) is None]:
        parser.error(f"--{missing[0]} is missing")
    write_json(args.json, {**read_json(args.json), **adds(args)} if adds else measure(args))


if __name__ == "__main__":
    main()

"""Trains a recipe with one setting changed at a time, and compares the models text by text.

    python benchmarks/ablate.py --base RUN --config configs/imdb_minilm_plus.yaml --work DIR \
        --dev dev.jsonl --test test.jsonl --speedups 2.3,3.5 --set joint.max_examples=8000 joint.epochs=1 \
        --variant no_hard_part joint.hard_fraction=0 --json ablations.json

All variants start from the stages before joint of --base, and change what joint does with them. Each is
measured on --test, with the thresholds that give its speeds on --dev, and compared text by text with the
variant `recipe`, which has the settings of --set alone. --only names variants to train in this process;
others may train in another one. The file is written when all have been measured. For models that label texts.
"""

import argparse
import json
import logging
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax import TRBert
from trbert_jax.datasets import BadRecords
from trbert_jax.inference import calibrate, frontier
from trbert_jax.inference.copies import run_copies
from trbert_jax.inference.evaluate import read_examples, summarize
from trbert_jax.inference.outputs import Outputs
from trbert_jax.io import read_json, write_json
from trbert_jax.model.packed import DEFAULT_BACKEND
from trbert_jax.reduction.rules import DEFAULT_RULE, RULES
from trbert_jax.reduction.selection import min_logit
from trbert_jax.tasks.examples import Examples

RECIPE = "recipe"  # the variant without a change
RIGHT = "right.npy"  # bool [speeds, test texts], of a variant


def command(args: argparse.Namespace, changes: list[str]) -> list[str]:
    """Returns the arguments of `trbert` that train a variant."""
    stages = [name for name in read_json(args.base / "config.json")["stages"] if name != "evaluate"]
    return ["train", "--config", args.config, f"stages=[{','.join(stages)}]", *args.set, *changes]


def train(args: argparse.Namespace, folder: Path, changes: list[str]) -> None:
    """Trains a variant's joint stage from copies of the stages before it; goes on where it stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in args.base.iterdir():
        if (
            part.is_dir()
            and part.name not in ("joint", "evaluate", "model")
            and not (folder / part.name).exists()
        ):
            shutil.copytree(part, folder / part.name)
    arguments = [*command(args, changes), f"workdir={folder}"]
    subprocess.run([sys.executable, "-m", "trbert_jax", *arguments], check=True)


def run_dense(args: argparse.Namespace, model: TRBert, data: dict[str, Examples]) -> dict[str, Outputs]:
    """Runs the dense model of --base on both files."""
    engine = model.engine(args.batch_size)
    return {name: engine.run(model.params, examples, rule="dense") for name, examples in data.items()}


def measure(
    args: argparse.Namespace, folder: Path, data: dict[str, Examples], dense: dict[str, Outputs]
) -> None:
    """Writes a variant's numbers and its right answers on --test."""
    model = TRBert.from_pretrained(folder / "joint" / "model")
    copies, test = calibrate.copying(model.engine(args.batch_size)), data["test"]
    tried = frontier.find_frontier(copies, model.params, data["dev"], model.task, dense["dev"], args.speedups)
    points, right, rows = frontier.best(tried), list[np.ndarray](), list[dict[str, Any]]()
    limits = np.array([[min_logit(x) for x in point.thresholds] for point in points], np.float32)
    rule = RULES[DEFAULT_RULE]
    outputs = run_copies(copies, model.params, test, "min_logit", limits, rule, DEFAULT_BACKEND)
    for point, output in zip(points, outputs, strict=True):
        divergence, flips = frontier.compare(dense["test"], output)
        metrics = model.task.score(test, output.logits).metrics
        numbers = summarize(output, model.config, {model.task.metric: metrics[model.task.metric]})
        del numbers["examples_per_second"]
        rows.append({"target": point.target, **numbers, "divergence": divergence, "flips": flips})
        right.append(output.logits.argmax(-1) == test.labels)
    np.save(folder / RIGHT, np.stack(right))
    seconds = read_json(folder / "results.json")["stages"]["joint"]["seconds"]
    write_json(folder / "measured.json", {"seconds": seconds, "points": rows})


def compared(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """Returns a variant's numbers beside the differences from the recipe, in percentage points."""
    right, recipe = (np.load(args.work / x / RIGHT).astype(float) for x in (name, RECIPE))
    measured = json.loads((args.work / name / "measured.json").read_text(encoding="utf-8"))
    for point, one, other in zip(measured["points"], right, recipe, strict=True):
        change = 100 * (one - other)
        point["difference"] = change.mean()
        point["standard_error"] = change.std(ddof=1) / len(change) ** 0.5
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="work directory of a run")
    parser.add_argument("--config", required=True, metavar="FILE", help="configuration of that run")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="folder for the variants")
    parser.add_argument("--dev", type=Path, required=True, metavar="FILE")
    parser.add_argument("--test", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--speedups", type=lambda x: [*map(float, x.split(","))], metavar="X,X", required=True
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of all variants")
    parser.add_argument("--variant", nargs="+", action="append", default=[], metavar="NAME KEY=VALUE")
    parser.add_argument("--only", type=lambda x: x.split(","), metavar="NAME,NAME", help="variants to train")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    variants = {RECIPE: [], **{name: changes for name, *changes in args.variant}}
    model = TRBert.from_pretrained(args.base / "finetune" / "model")
    paths = {"dev": args.dev, "test": args.test}
    data = {name: read_examples(model, path, BadRecords()) for name, path in paths.items()}
    dense = None
    for name in args.only or variants:
        folder = args.work / name
        if not (folder / "measured.json").exists():
            train(args, folder, variants[name])
            dense = dense or run_dense(args, model, data)
            measure(args, folder, data, dense)
    if all((args.work / name / "measured.json").exists() for name in variants):
        result = {
            "command": shlex.join(["python", "benchmarks/ablate.py", *sys.argv[1:]]),
            "trains": {
                name: shlex.join(["trbert", *command(args, changes)]) for name, changes in variants.items()
            },
            "test_examples": len(data["test"]),
            "variants": {name: compared(args, name) for name in variants},
        }
        write_json(args.json, result)


if __name__ == "__main__":
    main()

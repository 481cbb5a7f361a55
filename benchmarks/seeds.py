"""Trains one configuration with several seeds, and reports mean and standard deviation.

    python benchmarks/seeds.py --config configs/quickstart.yaml --seeds 11,12,13 --json FILE [key=value ...]

Each seed is a run of `trbert train` in its own process and work directory under --workdir; finished runs
are not repeated. FILE gets the numbers of each seed with mean and standard deviation, which are printed
too.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def run(config: Path, seed: int, workdir: Path, overrides: list[str]) -> dict[str, Any]:
    """Trains with one seed; returns its results.json."""
    program = "import sys; from trbert_jax.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "train", "--config", str(config), f"workdir={workdir}"]
    subprocess.run([*command, f"seed={seed}", *overrides], check=True)
    return json.loads((workdir / "results.json").read_text(encoding="utf-8"))


def numbers(results: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of one run to average."""
    found = {
        "dense.accuracy": results["dense"]["accuracy"],
        "policy.accuracy": results["policy"]["accuracy"],
        "policy.flops_speedup": results["policy"]["flops_speedup"],
        "reduced.accuracy": results["reduced"]["accuracy"],
        "reduced.flops_speedup": results["reduced"]["flops_speedup"],
        "reduced.tokens": results["reduced"]["tokens"],
    }
    found |= {f"reduced.kept_{i}": count for i, count in enumerate(results["reduced"]["kept"])}
    for group in ("baselines", "thresholds"):
        for name, values in results[group].items():
            found[f"{group}.{name}.accuracy"] = values["accuracy"]
            found[f"{group}.{name}.flops_speedup"] = values["flops_speedup"]
    reduced = results["reduced"]["accuracy"]
    found["reduced_minus_dense"] = reduced - results["dense"]["accuracy"]
    for name, values in results["baselines"].items():
        found[f"reduced_minus_{name}"] = reduced - values["accuracy"]
    found["seconds"] = sum(stage["seconds"] for stage in results["stages"].values())
    return found


def table(seeds: dict[str, dict[str, float]], spread: dict[str, dict[str, float]]) -> Iterator[str]:
    """Yields the lines of a table: one row for each number, one column for each seed."""
    yield f"{'':<34}" + "".join(f"{'seed ' + seed:>10}" for seed in seeds) + f"{'mean':>10}{'std':>8}"
    for name, values in spread.items():
        row = "".join(f"{one[name]:>10.3f}" for one in seeds.values())
        yield f"{name:<34}{row}{values['mean']:>10.3f}{values['std']:>8.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE")
    parser.add_argument("--seeds", required=True, metavar="A,B", help="at least two seeds")
    parser.add_argument("--json", required=True, type=Path, metavar="FILE")
    parser.add_argument("--workdir", type=Path, default=Path("runs/seeds"), metavar="DIR")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    if len(seeds) < 2:
        parser.error("--seeds needs at least two seeds")
    every = {seed: run(args.config, seed, args.workdir / f"seed{seed}", args.overrides) for seed in seeds}
    each = {str(seed): numbers(results) for seed, results in every.items()}
    names = list(each[str(seeds[0])])
    spread = {
        name: {
            "mean": statistics.mean(one[name] for one in each.values()),
            "std": statistics.stdev(one[name] for one in each.values()),
        }
        for name in names
    }
    last = every[seeds[-1]]
    config = {key: value for key, value in last["config"].items() if key not in ("seed", "workdir")}
    record = {
        "command": " ".join(["python", "benchmarks/seeds.py", *sys.argv[1:]]),
        "examples": last["reduced"]["examples"],
        "split": last["split"],
        "spread": spread,
        "seeds": each,
        "config": config,
        "versions": last["versions"],
        "machine": last["machine"],
    }
    args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(each, spread)))


if __name__ == "__main__":
    main()

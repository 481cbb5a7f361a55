"""Repeats a row of the results table, from the data to the number, and compares it with the committed file.

    python benchmarks/reproduce.py                    # lists the names
    python benchmarks/reproduce.py imdb_minilm_plus_seed1

Runs the commands that results/NAME.json has, in the repository's folder: the training, which goes on where it
stopped, and the measurement, whose file goes to runs/NAME.json. Data and pretrained model are those of the
configuration's header. The same seed on another kind of processor rounds otherwise, so the metric may differ
as it does between seeds, by `POINTS`, and FLOPs by `SHARE`; more ends with exit code 1.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
POINTS = 1.5  # of the metric, in percent
SHARE = 0.05


def known() -> dict[str, dict[str, Any]]:
    """Returns the results that have both commands, by name."""
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in (ROOT / "results").glob("*.json")
    }
    return {
        k: v for k, v in sorted(found.items()) if isinstance(v, dict) and {"command", "measured"} <= v.keys()
    }


def commands(name: str, result: dict[str, Any], output: Path) -> Iterator[list[str]]:
    """Yields the commands that train and measure a result, which goes to `output`."""
    train, measure = (shlex.split(result[key]) for key in ("command", "measured"))
    folder = f"runs/{name}"
    yield [sys.executable, "-m", "trbert_jax", *train[1:], f"workdir={folder}"]
    options = dict(zip(measure[2::2], measure[3::2], strict=True))
    options |= {"--run": folder, "--json": str(output)}
    yield [sys.executable, *measure[1:2], *(word for pair in options.items() for word in pair)]


def compared(expected: dict[str, Any], found: dict[str, Any]) -> Iterator[tuple[str, float, float, bool]]:
    """Yields each number's name, expected and found value, and whether they are close enough."""
    metric, full = expected["metric"], expected["full_score"]
    pairs = [("dense", expected["dense"], found["dense"])]
    for left, right in zip(expected["points"], found["points"], strict=True):
        pairs.append((f"at {left['target']:g}x", left, right))
    for name, left, right in pairs:
        values = [100 * x[metric] / full for x in (left, right)]
        yield f"{metric} {name}", *values, abs(values[0] - values[1]) <= POINTS
        if "flops_speedup" in left:
            ratios = [x["flops_speedup"] for x in (left, right)]
            yield f"fewer FLOPs {name}", *ratios, abs(ratios[1] / ratios[0] - 1) <= SHARE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "name", nargs="?", choices=known(), metavar="NAME", help="file in results/, without .json"
    )
    parser.add_argument("--compare", type=Path, metavar="FILE", help="compare this measurement; run nothing")
    args = parser.parse_args()
    if args.name is None:
        for name, result in known().items():
            hours = sum(stage["seconds"] for stage in result["stages"].values()) / 3600
            print(f"{name:<32} {hours:4.1f} h on one core  {result['command']}")
        return 0
    expected, output = known()[args.name], args.compare or ROOT / "runs" / f"{args.name}.json"
    if args.compare is None:
        for command in commands(args.name, expected, output):
            print(shlex.join(command), flush=True)
            subprocess.run(command, cwd=ROOT, check=True)
    rows = [*compared(expected, json.loads(output.read_text(encoding="utf-8")))]
    print(f"{'number':<24} expected     found")
    for name, left, right, close in rows:
        print(f"{name:<24} {left:>8.2f}  {right:>8.2f}  {'' if close else 'DIFFERS'}")
    return 0 if all(close for *_, close in rows) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Times the compilation of a model's programs, and reading them from the cache on disk.

    python benchmarks/compile_time.py --json benchmarks/compile_time.json

Runs `trbert compile` on random weights in new processes with an empty cache: the first compiles, the others
read. The seconds are those that the command reports.
"""

import argparse
import dataclasses
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from trbert_jax.inference.benchmark import SIZES
from trbert_jax.inference.benchmark_report import machine
from trbert_jax.io import check_outputs, write_json
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import init_params
from trbert_jax.model.pretrained import save_pretrained

PROGRAM = re.compile(r"^(?P<name>\w+, \w+, \d+ x \d+ tokens) +(?P<seconds>[\d.]+) s$", re.MULTILINE)


def compile_once(model: Path, cache: Path, options: list[str]) -> dict[str, float]:
    """Runs `trbert compile` in a new process; returns program -> seconds."""
    command = [sys.executable, "-m", "trbert_jax", "compile", "--model", str(model), *options]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return {found["name"]: float(found["seconds"]) for found in PROGRAM.finditer(done.stdout)}


def measure(size: str, config: ModelConfig, batch_size: int, repeats: int) -> list[dict[str, Any]]:
    """Returns a record for each program: the first process, and the median of `repeats` later ones."""
    options = ["--batch-size", str(batch_size), "--backend", "packed"]
    with tempfile.TemporaryDirectory() as folder:
        model, cache = Path(folder) / "model", Path(folder) / "programs"
        save_pretrained(model, config, init_params(config, jax.random.key(0)), None)
        first = compile_once(model, cache, options)
        later = [compile_once(model, cache, options) for _ in range(repeats)]
    return [
        {
            "size": size,
            "program": name,
            "compiled_seconds": seconds,
            "read_seconds": statistics.median(found[name] for found in later),
        }
        for name, seconds in first.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", default="minilm,bert-base", help=f"of {', '.join(SIZES)}; separated by commas"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="processes that read")
    parser.add_argument("--json", type=Path, required=True, help="where the numbers are written")
    args = parser.parse_args()
    check_outputs([args.json])
    sizes, records = args.sizes.split(","), []
    if unknown := [size for size in sizes if size not in SIZES]:
        parser.error(f"--sizes: there is no size {', '.join(unknown)}; expected some of {', '.join(SIZES)}")
    for size in sizes:
        config = dataclasses.replace(SIZES[size], max_length=args.max_length)
        for record in measure(size, config, args.batch_size, args.repeats):
            print(
                f"{size}: {record['program']}: compiled in {record['compiled_seconds']:.1f} s, "
                f"read in {record['read_seconds']:.1f} s"
            )
            records.append(record)
    settings = {"batch_size": args.batch_size, "max_length": args.max_length, "repeats": args.repeats}
    write_json(args.json, {**settings, "programs": records, "machine": machine()})


if __name__ == "__main__":
    main()

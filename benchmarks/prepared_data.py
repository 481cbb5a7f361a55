"""Measures prepared data: seconds and memory to write the shards, examples per second to read them.

    python benchmarks/prepared_data.py --config configs/imdb_bert.yaml --json benchmarks/prepared_data.json \
        data.path=data/imdb model.init=models/minilm

Runs `trbert prepare-data` in a new process, once undisturbed and once killed after half of its shards and
started again; both must write the same files. Then reads the batches as training does, as fast as possible.
"""

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from trbert_jax.config import RunConfig, load_config
from trbert_jax.inference.benchmark_report import machine
from trbert_jax.io import check_outputs, hash_file, write_json
from trbert_jax.training import loop
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.stages import STAGES

COMMAND = [sys.executable, "-c", "import sys; from trbert_jax.cli import main; sys.exit(main())"]


def prepare(arguments: list[str], output: Path, kill_at: int | None = None) -> dict[str, float]:
    """Runs the command, or kills it after `kill_at` shards; returns seconds and peak memory."""
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        [*COMMAND, "prepare-data", "--output", str(output), *arguments], stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        peak = max(peak, _resident(process.pid))
        if kill_at is not None and len(list(output.glob("*.array_record-*-of-?????"))) >= kill_at:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return {"seconds": time.perf_counter() - start, "killed": process.returncode}
        time.sleep(0.01)
    if process.returncode:
        raise SystemExit(f"prepare-data ended with {process.returncode}")
    return {"seconds": time.perf_counter() - start, "peak_memory_bytes": peak}


def _resident(pid: int) -> int:
    """Returns the peak memory of a process so far, bytes; Linux only, 0 elsewhere."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM")), 0)


def read_speed(config: RunConfig, folder: Path, seconds: float) -> dict[str, float]:
    """Returns examples per second of training batches, read and padded but not computed on."""
    training = loop.prepare(Experiment(config), STAGES["finetune"])
    stream = loop.read_ahead(training, 0)
    next(stream)
    count, start = 0, time.perf_counter()
    for batch in stream:
        count += batch.num_examples
        if time.perf_counter() - start > seconds:
            break
    return {"examples_per_second": count / (time.perf_counter() - start)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="settings of the run")
    parser.add_argument("--json", type=Path, required=True, help="result file")
    parser.add_argument("--shard-size", type=int, default=1024, help="examples of a shard (default 1024)")
    parser.add_argument("--seconds", type=float, default=10, help="time to read (default 10)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that override the file")
    args = parser.parse_args()
    check_outputs([args.json])
    with tempfile.TemporaryDirectory(prefix="trbert-prepared-") as name:
        folder = Path(name)
        # Each run tokenizes: the cache is not measured.
        common = ["--config", args.config, "--shard-size", str(args.shard_size), *args.overrides]
        whole = prepare([*common, f"workdir={folder / 'work1'}"], folder / "whole")
        shards = len(list((folder / "whole").glob("*.array_record-*")))
        parts = [*common, f"workdir={folder / 'work2'}"]
        prepare(parts, folder / "parts", kill_at=max(1, shards // 2))
        found = len(list((folder / "parts").glob("*.array_record-*-of-?????")))
        prepare(parts, folder / "parts")
        files = [
            {path.name: hash_file(path) for path in sorted((folder / part).iterdir())}
            for part in ("whole", "parts")
        ]
        overrides = [*args.overrides, f"data.prepared={folder / 'whole'}", f"workdir={folder / 'work3'}"]
        config = load_config(args.config, overrides)
        examples = len(Experiment(config).data.examples("train", _tokenizer(config)))
        result: dict[str, Any] = {
            "config": args.config,
            "overrides": args.overrides,
            "shard_size": args.shard_size,
            "train_examples": examples,
            "shards": shards,
            "bytes": sum(file["bytes"] for file in files[0].values()),
            "prepare": {**whole, "train_examples_per_second": examples / whole["seconds"]},
            "killed_with_shards": found,
            "resumed_is_identical": files[0] == files[1],
            "read": read_speed(config, folder, args.seconds),
            "machine": machine(),
        }
    write_json(args.json, result)
    print(
        f"{examples} examples prepared in {whole['seconds']:.1f} s, "
        f"at most {whole['peak_memory_bytes'] / 2**20:.0f} MiB"
    )
    print(f"resumed is identical: {result['resumed_is_identical']}")
    print(f"read at {result['read']['examples_per_second']:.0f} examples/s; numbers: {args.json}")
    if not result["resumed_is_identical"]:
        raise SystemExit("the files of the interrupted run differ")


def _tokenizer(config: RunConfig) -> Any:
    return Experiment(config).base_model().tokenizer


if __name__ == "__main__":
    main()

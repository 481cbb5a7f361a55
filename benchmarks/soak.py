"""A run that is killed again and again must end as one that was left alone, bit for bit.

    python benchmarks/soak.py --json benchmarks/soak.json

A tiny model goes through all stages on the standard library's source texts, twice: once undisturbed, and
once with a process that is ended after a random time and started again with the same command, by SIGKILL,
which leaves it no time, or SIGTERM, at which it saves. When the disturbed run ends before all signals are
spent, another one begins. Compared are metrics, models, residual scores, teacher logits and predictions.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from trbert_jax.benchmark.records import machine
from trbert_jax.files import check_writable, write_json

STAGES = ("finetune", "score", "init", "policy", "teacher", "joint", "evaluate")
TRAINED = {"batch_size": 8, "accumulation_steps": 1, "learning_rate": 1e-3, "save_steps": 2, "eval_steps": 8}
COMMAND = [sys.executable, "-c", "import sys; from trbert_jax.cli import main; sys.exit(main())"]


def write_config(folder: Path, steps: int) -> Path:
    """A configuration of all stages with its work directory in `folder`."""
    settings: dict[str, Any] = {
        "workdir": str(folder / "work"),
        "stages": list(STAGES),
        "data": {"name": "stdlib", "max_train_examples": 64, "max_eval_examples": 16},
        "model": {
            "init": "scratch",
            "max_length": 16,
            "scratch": {
                "vocab_size": 200,
                "hidden_size": 16,
                "num_layers": 4,
                "num_heads": 2,
                "intermediate_size": 32,
            },
        },
        "policy": {"num_samples": 2},
    }
    for stage in ("finetune", "init", "policy", "joint"):
        settings[stage] = {**settings.get(stage, {}), **TRAINED, "max_steps": steps}
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def start(config: Path, log: Path, cache: Path) -> subprocess.Popen[bytes]:
    """The run, or the rest of it, in a process of its own."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with log.open("ab") as stream:
        return subprocess.Popen(
            [*COMMAND, "train", "--config", str(config)], stdout=stream, stderr=stream, env=environment
        )


def digests(work: Path) -> dict[str, str]:
    """File -> digest, of those that a repeated run writes again bit for bit."""
    found = {}
    for path in sorted(work.rglob("*")):
        name = path.relative_to(work).as_posix()
        if path.suffix in (".safetensors", ".npy") or path.name in ("metrics.jsonl", "predictions.jsonl"):
            found[name] = _digest(path.read_bytes())
    return found


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def stage_of(work: Path) -> str:
    """The stage that is not finished yet."""
    unfinished = [stage for stage in STAGES if not (work / stage / "done.json").exists()]
    return unfinished[0] if unfinished else "end"


def soak(
    kills: int, terminations: int, steps: int, seed: int, longest: float, folder: Path
) -> dict[str, Any]:
    """Both runs; `longest` is the most seconds a process gets before it is ended."""
    rng = random.Random(seed)
    began = time.perf_counter()
    cache, log = folder / "programs", folder / "log.txt"
    whole = write_config(folder / "whole", steps)
    if start(whole, log, cache).wait() != 0:
        raise SystemExit(f"the undisturbed run failed: {log.read_text(encoding='utf-8')[-2000:]}")
    expected = digests(folder / "whole" / "work")

    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * terminations
    rng.shuffle(signals)
    endings: list[dict[str, Any]] = []
    differing: set[str] = set()
    runs, saved = 0, 0
    while signals:
        runs += 1
        config = write_config(folder / f"parts{runs}", steps)
        work = config.parent / "work"
        while True:
            size = log.stat().st_size
            process = start(config, log, cache)
            code = None
            if signals:
                try:
                    code = process.wait(rng.uniform(1, longest))
                except subprocess.TimeoutExpired:
                    sent = signals.pop()
                    stage = stage_of(work)
                    process.send_signal(sent)
                    code = process.wait()
                    endings.append({"signal": sent.name, "stage": stage, "code": code})
            else:
                code = process.wait()
            text = log.read_bytes()[size:].decode("utf-8", "replace")
            saved += len(re.findall(r"told to stop; saved at step", text))
            if code == 0:
                break
            if code not in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
                raise SystemExit(f"a run that was started again failed with {code}: {text[-2000:]}")
        found = digests(work)
        differing |= {n for n in {*expected, *found} if expected.get(n) != found.get(n)}
        shutil.rmtree(config.parent)
    return {
        "identical": not differing,
        "differing": sorted(differing),
        "compared_files": len(expected),
        "sigkill": sum(e["signal"] == "SIGKILL" for e in endings),
        "sigterm": sum(e["signal"] == "SIGTERM" for e in endings),
        "sigterm_that_saved": saved,
        "stages_hit": dict(Counter(e["stage"] for e in endings)),
        "endings": endings,
        "runs": runs,
        "steps_a_stage": steps,
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 1),
        "machine": machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    parser.add_argument("--kills", type=int, default=30, help="times SIGKILL (default 30)")
    parser.add_argument("--terms", type=int, default=5, help="times SIGTERM (default 5)")
    parser.add_argument("--steps", type=int, default=40, help="updates a stage (default 40)")
    parser.add_argument("--longest", type=float, default=12, help="most seconds between signals (default 12)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default 0)")
    args = parser.parse_args()
    check_writable(args.json)
    with tempfile.TemporaryDirectory(prefix="trbert-soak-") as folder:
        result = soak(args.kills, args.terms, args.steps, args.seed, args.longest, Path(folder))
    write_json(args.json, result)
    print(f"{result['sigkill']} SIGKILL, {result['sigterm']} SIGTERM, identical: {result['identical']}")
    print(f"numbers: {args.json}")
    if not result["identical"]:
        raise SystemExit(f"these files differ: {', '.join(result['differing'])}")


if __name__ == "__main__":
    main()

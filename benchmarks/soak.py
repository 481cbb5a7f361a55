"""Checks that a run killed many times ends with the same bits as an undisturbed one.

    python benchmarks/soak.py --json benchmarks/soak.json

A tiny model goes through all stages on the source texts of the standard library: twice undisturbed (the
second time to learn how long each stage takes with compiled programs), then with a process that is ended
and started again with the same command. SIGKILL gives it no time; at SIGTERM it saves. Each signal has a
random stage, among the next ones that were hit least, and a random moment in it; if the stage ends before
that moment, the next moment in it comes from a shorter time. A new run begins if one ends before all
signals are sent. The comparison covers metrics, models, residual scores, teacher logits and predictions.
"""

import argparse
import dataclasses
import hashlib
import json
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

from trbert_jax.inference.benchmark_report import machine
from trbert_jax.io import check_outputs, write_json
from trbert_jax.training.stages import STAGES

NEXT = 3  # stages to choose from for a signal, so that one run is hit several times
EARLIER = 0.7  # factor of the time to draw from, after a stage that ended too early
TRAINED = {"batch_size": 8, "accumulation_steps": 1, "learning_rate": 1e-3, "save_steps": 2, "eval_steps": 8}
COMMAND = [sys.executable, "-c", "import sys; from trbert_jax.cli import main; sys.exit(main())"]


def write_config(folder: Path, steps: int) -> Path:
    """Writes a configuration of all stages with its work directory in `folder`."""
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
    for stage in (name for name, stage in STAGES.items() if stage.trains):
        settings[stage] = {**settings.get(stage, {}), **TRAINED, "max_steps": steps}
    folder.mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def start(config: Path, log: Path, cache: Path) -> subprocess.Popen[bytes]:
    """Starts or resumes the run in a new process."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONUNBUFFERED": "1",  # the log names the running stage at once
    }
    with log.open("ab") as stream:
        return subprocess.Popen(
            [*COMMAND, "train", "--config", str(config)], stdout=stream, stderr=stream, env=environment
        )


def digests(work: Path) -> dict[str, str]:
    """Returns file -> digest for the files that a repeated run reproduces bit by bit."""
    found = {}
    for path in sorted(work.rglob("*")):
        name = path.relative_to(work).as_posix()
        if path.suffix in (".safetensors", ".npy") or path.name in ("metrics.jsonl", "predictions.jsonl"):
            found[name] = _digest(path.read_bytes())
    return found


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def unfinished(work: Path) -> list[str]:
    """Returns the unfinished stages, in order."""
    return [stage for stage in STAGES if not (work / stage / "done.json").exists()]


@dataclasses.dataclass
class Soak:
    """Disturbed and undisturbed runs, and their endings.

    Attributes:
      folder: holds all files.
      steps: updates of each stage.
      rng: draws stages and moments.
      seconds: duration of each stage, undisturbed.
      within: seconds of each stage to draw moments from; shorter after a stage that ended before its moment,
        such as the rest of an interrupted one.
      endings: one record for each signal.
      saved: number of runs that reported saving before they stopped.
    """

    folder: Path
    steps: int
    rng: random.Random
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    within: dict[str, float] = dataclasses.field(default_factory=dict)
    endings: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    saved: int = 0

    @property
    def log(self) -> Path:
        """Log of all processes."""
        return self.folder / "log.txt"

    @property
    def hits(self) -> Counter[str]:
        """Number of signals that arrived while their stage was running, by stage."""
        return Counter(e["stage"] for e in self.endings if e["when"] == "within")

    def start(self, config: Path) -> subprocess.Popen[bytes]:
        """Starts or resumes the run."""
        return start(config, self.log, self.folder / "programs")

    def undisturbed(self, name: str) -> dict[str, str]:
        """Returns the digests of an undisturbed run."""
        config = write_config(self.folder / name, self.steps)
        if self.start(config).wait() != 0:
            raise SystemExit(f"an undisturbed run failed: {self.log.read_text(encoding='utf-8')[-2000:]}")
        work = config.parent / "work"
        for stage in STAGES:
            done = json.loads((work / stage / "done.json").read_text(encoding="utf-8"))
            self.seconds[stage] = self.within[stage] = done["seconds"]
        return digests(work)

    def disturbed(self, name: str, signals: list[signal.Signals]) -> dict[str, str]:
        """Returns the digests of a run disturbed until it ends; removes the signals it used from the list."""
        config = write_config(self.folder / name, self.steps)
        work = config.parent / "work"
        while True:
            size = self.log.stat().st_size if self.log.exists() else 0
            process = self.start(config)
            left = unfinished(work)
            if signals and left:
                self._hit(process, signals, left, work, size)
            code = process.wait()
            text = self._said(size)
            self.saved += len(re.findall(r"stopped by a signal; saved at step", text))
            if code == 0:
                found = digests(work)
                shutil.rmtree(config.parent)
                return found
            if code not in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
                raise SystemExit(f"a run that was started again failed with {code}: {text[-2000:]}")

    def _hit(
        self,
        process: subprocess.Popen[bytes],
        signals: list[signal.Signals],
        left: list[str],
        work: Path,
        size: int,
    ) -> None:
        """Draws a stage, waits until it runs and a while longer, and ends the process."""
        # No stage gets far ahead of the others; a run with no stage left to hit is not disturbed.
        most = min(self.hits[stage] for stage in STAGES) + 1
        candidates = [stage for stage in left if self.hits[stage] <= most][:NEXT]
        if not candidates:
            return
        stage = self.rng.choice(candidates)
        delay = self.rng.uniform(0, self.within[stage])
        while f"{stage}: starting" not in self._said(size):
            if process.poll() is not None:
                return
            time.sleep(0.005)
        try:
            process.wait(delay)
            self.within[stage] *= EARLIER
            return
        except subprocess.TimeoutExpired:
            sent = signals.pop()
            process.send_signal(sent)
        done = f"{stage}: done in" in self._said(size)
        if done:
            self.within[stage] *= EARLIER
        code = process.wait()
        self.endings.append(
            {
                "signal": sent.name,
                "stage": stage,
                "seconds_into_it": round(delay, 3),
                "when": "after" if done else "within",
                "in_stage": (unfinished(work) or ["end"])[0],
                "checkpoint": _latest_checkpoint(work / stage),
                "code": code,
            }
        )
        print(f"{sent.name} {self.endings[-1]['when']} {stage}; {len(signals)} signals left", flush=True)

    def _said(self, size: int) -> str:
        """Returns the text of the log after this size."""
        with self.log.open("rb") as stream:
            stream.seek(size)
            return stream.read().decode("utf-8", "replace")


def _latest_checkpoint(stage: Path) -> int | None:
    """Returns the update of the last checkpoint; None for a stage without any."""
    names = [re.fullmatch(r"step_(\d+)", path.name) for path in (stage / "checkpoints").glob("step_*")]
    return max((int(match[1]) for match in names if match), default=None)


def soak(kills: int, terminations: int, steps: int, seed: int, folder: Path) -> dict[str, Any]:
    """Runs everything and returns the record."""
    began = time.perf_counter()
    runs = Soak(folder, steps, random.Random(seed))
    expected = runs.undisturbed("whole")
    differing = _differing(expected, runs.undisturbed("again"))
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * terminations
    runs.rng.shuffle(signals)
    count = 0
    while signals:
        count += 1
        differing |= _differing(expected, runs.disturbed(f"parts{count}", signals))
    endings = runs.endings
    return {
        "identical": not differing,
        "differing": sorted(differing),
        "compared_files": len(expected),
        "sigkill": sum(e["signal"] == "SIGKILL" for e in endings),
        "sigterm": sum(e["signal"] == "SIGTERM" for e in endings),
        "sigterm_that_saved": runs.saved,
        "stages_hit": {stage: runs.hits[stage] for stage in STAGES},
        "endings": endings,
        "runs": count,
        "steps_a_stage": steps,
        "seconds_a_stage": {stage: round(seconds, 2) for stage, seconds in runs.seconds.items()},
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 1),
        "machine": machine(),
    }


def _differing(left: dict[str, str], right: dict[str, str]) -> set[str]:
    return {name for name in {*left, *right} if left.get(name) != right.get(name)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, help="result file")
    parser.add_argument("--kills", type=int, default=30, help="number of SIGKILLs (default 30)")
    parser.add_argument("--terms", type=int, default=5, help="number of SIGTERMs (default 5)")
    parser.add_argument("--steps", type=int, default=40, help="updates of each stage (default 40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    args = parser.parse_args()
    check_outputs([args.json])
    with tempfile.TemporaryDirectory(prefix="trbert-soak-") as folder:
        result = soak(args.kills, args.terms, args.steps, args.seed, Path(folder))
    write_json(args.json, result)
    missed = [stage for stage, hits in result["stages_hit"].items() if not hits]
    print(f"hits: {result['stages_hit']}" + (f"; none in {', '.join(missed)}" if missed else ""))
    print(f"{result['sigkill']} SIGKILL, {result['sigterm']} SIGTERM, identical: {result['identical']}")
    print(f"numbers: {args.json}")
    if not result["identical"]:
        raise SystemExit(f"these files differ: {', '.join(result['differing'])}")


if __name__ == "__main__":
    main()

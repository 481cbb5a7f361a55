"""What a benchmark says: one record a way to run and batch size, for files, and a table for people."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trbert_jax import compilation_cache
from trbert_jax.inference.benchmark.huggingface import num_cores
from trbert_jax.inference.benchmark.runs import PreparedRun
from trbert_jax.model.heads import Logits

Record = dict[str, Any]

REFERENCE = "masked_full"  # what the FLOPs saved are promised against


def make_records(
    runs: Sequence[PreparedRun], seconds: Mapping[str, np.ndarray], batch_size: int
) -> list[Record]:
    """One record a run.

    Args:
      runs: of one workload.
      seconds: name -> seconds of each batch, [repeats, num_batches].
      batch_size: texts of a batch.

    Returns:
      Records with `execution`, `batch_size`, `texts` (how many were run), `examples_per_second` (median of
      the repeats), `p50_ms`, `p99_ms` (of a batch), `flops` (of a text), `flops_per_second`,
      `realised_over_promised` (how much faster than `masked_full` as a share of how many fewer FLOPs; None
      for that itself, for another library, and where it was not run), `compile_seconds`,
      `peak_memory_bytes` and `kept` (tokens a text after each point of reduction, None for dense runs).
    """
    total = {run.name: float(np.median(seconds[run.name].sum(-1))) for run in runs}
    flops = {run.name: run.flops for run in runs}
    records = []
    for run in runs:
        rate = run.num_texts / total[run.name]
        realised = None
        if REFERENCE in total and run.name != REFERENCE and run.compile_seconds is not None:
            faster, fewer = total[REFERENCE] / total[run.name], flops[REFERENCE] / run.flops
            realised = faster / fewer
        milliseconds = 1000 * seconds[run.name].ravel()
        records.append(
            {
                "execution": run.name,
                "batch_size": batch_size,
                "texts": run.num_texts,
                "examples_per_second": rate,
                "p50_ms": float(np.percentile(milliseconds, 50)),
                "p99_ms": float(np.percentile(milliseconds, 99)),
                "flops": run.flops,
                "flops_per_second": run.flops * rate,
                "realised_over_promised": realised,
                "compile_seconds": run.compile_seconds,
                "peak_memory_bytes": run.peak_memory_bytes,
                "kept": None if run.keep is None else run.keep.sum(-1).mean(0).tolist(),
            }
        )
    return records


def drift(
    run: PreparedRun, logits: Logits, keep: np.ndarray | None, lengths: np.ndarray
) -> dict[str, float | None]:
    """How far a run is from the same in float32, on the texts that both have run.

    Args:
      run: n texts.
      logits: of the float32 run of m texts.
      keep: bool [m, stages, max_length], likewise, or None where nothing decides about tokens; an entry a row
        where texts have several.
      lengths: int [rows], tokens of each.

    Returns:
      `kept_changed_tokens`, the share of tokens that some point of reduction decides otherwise about;
      `kept_changed_texts`, the share of rows that have such a token; `labels_changed`, the share of texts
      that get another label (of answers in a text: of rows in which another token is the likeliest).
    """
    found: dict[str, float | None] = {"kept_changed_tokens": None, "kept_changed_texts": None}
    if run.keep is not None and keep is not None:
        count = min(len(run.keep), len(keep))
        changed = (run.keep[:count] != keep[:count]).any(1)  # [rows, max_length]
        found["kept_changed_tokens"] = float(changed.sum() / lengths[:count].sum())
        found["kept_changed_texts"] = float(changed.any(-1).mean())
    others = []
    for ours, theirs in zip(jax.tree.leaves(run.logits), jax.tree.leaves(logits), strict=True):
        count = min(len(ours), len(theirs))
        other = ours[:count].argmax(-1) != theirs[:count].argmax(-1)
        others.append(other.reshape(count, -1).any(-1))
    return {**found, "labels_changed": float(np.any(others, axis=0).mean())}


def described(data: Path) -> Record:
    """Which texts: the name of a file, or folder, and what `sha256sum` says of the file.

    Of a folder the sum is that of a line a file, `sum  path inside the folder`, in the order of the paths.
    """
    if not data.is_dir():
        return {"data": data.name, "data_sha256": _sha256(data)}
    names = sorted(path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file())
    lines = "".join(f"{_sha256(data / name)}  {name}\n" for name in names)
    return {"data": data.name, "data_sha256": hashlib.sha256(lines.encode()).hexdigest()}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def machine() -> Record:
    """Where it ran, and on which versions."""
    versions = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "torch", "transformers"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cpus": num_cores(),
        "platform": platform.platform(),
        # How the allocator hands out XLA's buffers tells on a CPU.
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
        # With a cache on disk, compiling may have been reading.
        "compilation_cache": compilation_cache.directory() is not None,
        **versions,
    }


def table(records: Sequence[Record]) -> Iterator[str]:
    """Lines for people: a row a record."""
    yield (
        f"{'batch':>5}  {'execution':<12} {'texts/s':>9} {'p50 ms':>9} {'p99 ms':>9} {'GFLOPs':>8} "
        f"{'GFLOP/s':>9} {'realised':>8} {'compile s':>9} {'MB':>7}"
    )
    last = None
    for record in records:
        if last not in (None, record["batch_size"]):
            yield ""
        last = record["batch_size"]
        yield (
            f"{last:>5}  {record['execution']:<12} {record['examples_per_second']:>9.1f} "
            f"{record['p50_ms']:>9.2f} {record['p99_ms']:>9.2f} {record['flops'] / 1e9:>8.3g} "
            f"{record['flops_per_second'] / 1e9:>9.3g} "
            f"{_or_dash(record['realised_over_promised'], '.2f'):>8} "
            f"{_or_dash(record['compile_seconds'], '.1f'):>9} "
            f"{_or_dash(record['peak_memory_bytes'], '.0f', 1e-6):>7}"
        )


def _or_dash(value: float | None, form: str, scale: float = 1.0) -> str:
    return "–" if value is None else format(value * scale, form)


def _processor() -> str:
    """The processor's name where the system tells, otherwise its architecture."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()

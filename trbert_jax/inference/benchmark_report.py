"""Turn timed runs into records, a table and a picture."""

import dataclasses
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from trbert_jax.io import atomic_file, compilation_cache
from trbert_jax.model.engines import ENGINES
from trbert_jax.model.heads import Logits

Record = dict[str, Any]


class Variant(NamedTuple):
    """A way to run the batches of a workload."""

    rule: str  # key of `RULES`
    backend: str  # key of `BACKENDS` or `ENGINES`; `torch` is Hugging Face's model
    full_length: bool  # whether all batches are padded to the longest length
    line: dict[str, Any]  # the look of its line in the picture
    dtype: str = "float32"  # that an engine computes in; of the others that of the model
    quantize: bool = False  # whether an exported graph has int8 products


DENSE = "dense_"  # before the name of an exported variant
REFERENCE = "masked_full"  # the variant that speed-ups are measured against
# Variants of one rule share a color; the markers are for those who cannot tell colors.
VARIANTS = {
    "packed": Variant("threshold", "packed", False, {"color": "#0b6e4f", "marker": "o", "linewidth": 2.4}),
    "masked": Variant("threshold", "masked", False, {"color": "#d9822b", "marker": "^"}),
    REFERENCE: Variant("threshold", "masked", True, {"color": "#d9822b", "marker": "v", "linestyle": "--"}),
    "batch_max": Variant("batch_max", "packed", False, {"color": "#6bb392", "marker": "s"}),
    "dense": Variant("dense", "packed", False, {"color": "#3b6fb6", "marker": "D"}),
    "dense_full": Variant("dense", "masked", True, {"color": "#3b6fb6", "marker": "d", "linestyle": "--"}),
    "huggingface": Variant("dense", "torch", False, {"color": "#777777", "marker": "x", "linestyle": ":"}),
}
# Exported graphs, each beside the dense one that the same engine runs.
for _name, _engine, _options, _marker in (
    ("onnxruntime", "onnxruntime", {}, "P"),
    ("onnxruntime_int8", "onnxruntime", {"quantize": True}, "X"),
    ("openvino", "openvino", {}, "<"),
    ("openvino_bfloat16", "openvino", {"dtype": "bfloat16"}, ">"),
):
    for _prefix, _rule, _color in (("", "threshold", "#0b6e4f"), (DENSE, "dense", "#3b6fb6")):
        _line = {"color": _color, "marker": _marker, "linestyle": "-."}
        VARIANTS[_prefix + _name] = Variant(_rule, _engine, False, _line, **_options)


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedRun:
    """A variant that is compiled and has run every batch of a workload once."""

    name: str  # key of `VARIANTS`
    calls: Sequence[Callable[[], Any]]  # for each batch a function that runs it and waits for its logits
    num_texts: int  # n, in whole batches
    flops: float  # mean of a text, by the published count; padding counts if it is computed
    logits: Logits  # float32 [n, C], or those of another head, see `inference.engine.Outputs`
    keep: np.ndarray | None = None  # bool [rows, stages, max_length]; None if nothing is dropped
    compile_seconds: float | None = None  # of all shapes; None if nothing is compiled
    # Of the largest program, by the compiler: a device's own counter cannot be reset between programs.
    peak_memory_bytes: int | None = None


def make_records(
    runs: Sequence[PreparedRun], seconds: Mapping[str, np.ndarray], batch_size: int
) -> list[Record]:
    """Makes one record per run of a workload from its seconds, [repeats, num_batches].

    Returns:
      Records with `variant`, `batch_size`, `texts` (how many were run), `examples_per_second` (median of the
      repeats), `p50_ms` and `p99_ms` (of a batch), `flops` (of a text), `flops_per_second`,
      `speedup_per_flop_saved` (speed-up over `masked_full`, of an exported graph over the dense one of the
      same engine, divided by the ratio of FLOPs; None for these variants, for Hugging Face's, and if the
      other was not run), `compile_seconds`, `peak_memory_bytes` and `kept`
      (tokens of a text after each point of reduction, None for dense runs).
    """
    total = {run.name: float(np.median(seconds[run.name].sum(-1))) for run in runs}
    flops = {run.name: run.flops for run in runs}
    records = []
    for run in runs:
        rate, ratio = run.num_texts / total[run.name], None
        reference = DENSE + run.name if VARIANTS[run.name].backend in ENGINES else REFERENCE
        if reference in total and reference != run.name and VARIANTS[run.name].backend != "torch":
            ratio = (total[reference] / total[run.name]) / (flops[reference] / run.flops)
        p50, p99 = np.percentile(1000 * seconds[run.name], (50, 99)).tolist()
        records.append(
            {
                "variant": run.name,
                "batch_size": batch_size,
                "texts": run.num_texts,
                "examples_per_second": rate,
                "p50_ms": p50,
                "p99_ms": p99,
                "flops": run.flops,
                "flops_per_second": run.flops * rate,
                "speedup_per_flop_saved": ratio,
                "compile_seconds": run.compile_seconds,
                "peak_memory_bytes": run.peak_memory_bytes,
                "kept": None if run.keep is None else run.keep.sum(-1).mean(0).tolist(),
            }
        )
    return records


def drift(
    run: PreparedRun, reference: PreparedRun | None, lengths: np.ndarray, given: bool = False
) -> dict[str, float | None]:
    """Compares a run with the same in float32, on the texts that both have run.

    Args:
      run, reference: the run, and the one in float32; None if no such run had the same batches.
      lengths: int [rows], tokens of each row.
      given: whether both keep given tokens, so that selections are not compared.

    Returns:
      `kept_changed_tokens`, the share of tokens decided differently at any point of reduction;
      `kept_changed_texts`, the share of rows with such a token; `labels_changed`, the share of texts with
      another label (of spans: of rows with another likeliest token). Each is None if not compared.
    """
    tokens = texts = labels = None
    if reference and run.keep is not None and reference.keep is not None and not given:
        count = min(len(run.keep), len(reference.keep))
        changed = (run.keep[:count] != reference.keep[:count]).any(1)  # [rows, max_length]
        tokens, texts = float(changed.sum() / lengths[:count].sum()), float(changed.any(-1).mean())
    if reference:
        others = []
        for ours, theirs in zip(jax.tree.leaves(run.logits), jax.tree.leaves(reference.logits), strict=True):
            count = min(len(ours), len(theirs))
            other = ours[:count].argmax(-1) != theirs[:count].argmax(-1)
            others.append(other.reshape(count, -1).any(-1))
        labels = float(np.any(others, axis=0).mean())
    return {"kept_changed_tokens": tokens, "kept_changed_texts": texts, "labels_changed": labels}


def described(data: Path) -> Record:
    """Identifies the data: name of the file or folder, and its SHA-256.

    A folder's is that of one line per file, `SHA-256  path inside the folder`, sorted by path.
    """

    def sha256(path: Path) -> str:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    if not data.is_dir():
        return {"data": data.name, "data_sha256": sha256(data)}
    names = sorted(path.relative_to(data).as_posix() for path in data.rglob("*") if path.is_file())
    lines = "".join(f"{sha256(data / name)}  {name}\n" for name in names)
    return {"data": data.name, "data_sha256": hashlib.sha256(os.fsencode(lines)).hexdigest()}


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def machine() -> Record:
    """Describes the machine and the versions of the libraries."""
    versions = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "torch", "transformers", *ENGINES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    processors = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "device": jax.devices()[0].device_kind,
        "processor": next(processors, platform.machine()),
        "cpus": num_cores(),
        "platform": platform.platform(),
        # On a CPU, speed depends on how the allocator hands out XLA's buffers.
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
        # With a cache on disk, compile times may be read times.
        "compilation_cache": compilation_cache() is not None,
        **versions,
    }


def table(records: Sequence[Record]) -> Iterator[str]:
    """Formats records as lines of text, one row each."""
    columns = (
        ("texts/s", "examples_per_second", 1, "9.1f"),
        ("p50 ms", "p50_ms", 1, "9.2f"),
        ("p99 ms", "p99_ms", 1, "9.2f"),
        ("GFLOPs", "flops", 1e-9, "8.3g"),
        ("GFLOP/s", "flops_per_second", 1e-9, "9.3g"),
        ("realized", "speedup_per_flop_saved", 1, "8.2f"),
        ("compile s", "compile_seconds", 1, "9.1f"),
        ("MB", "peak_memory_bytes", 1e-6, "7.0f"),
    )
    width = max(12, *(len(record["variant"]) for record in records))
    yield f"batch  {'variant':<{width}} " + " ".join(f"{title:>{form[0]}}" for title, *_, form in columns)
    last = None
    for record in records:
        if last not in (None, record["batch_size"]):
            yield ""
        last = record["batch_size"]
        cells = (
            f"{'–':>{form[0]}}" if record[key] is None else f"{record[key] * scale:{form}}"
            for _, key, scale, form in columns
        )
        yield f"{last:>5}  {record['variant']:<{width}} {' '.join(cells)}"


def model_name(folder: str) -> str:
    """Returns the name of a model folder, or of the run that it belongs to."""
    path = Path(folder)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def plot_benchmark(records: Sequence[Record], png_path: str | Path) -> None:
    """Draws texts per second over the batch size, and the speed-up of packed beside its saving of FLOPs.

    The second panel needs the variants `packed` and `masked_full`. Writes the image atomically; raises
    `UserError` if that fails.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    by = {(record["batch_size"], record["variant"]): record for record in records}
    sizes = sorted({size for size, _ in by})
    ratios = [size for size in sizes if {(size, "packed"), (size, REFERENCE)} <= by.keys()]
    shape: dict[str, Any] = {"ncols": 2, "width_ratios": [1.5, 1]} if ratios else {}
    figure = Figure(figsize=(10.5 if ratios else 6.5, 4.4), dpi=150, layout="constrained")
    canvas, panels = FigureCanvasAgg(figure), figure.subplots(squeeze=False, **shape)[0]
    first = records[0]
    replayed = f" keeping what {model_name(first['replay'])} keeps" if first["replay"] else ""
    device = "" if first["device"] == "cpu" else f", {first['device']}"
    heading = (
        f"{model_name(first['model'])}{replayed}\n"
        f"{first['dtype']}, {first['tokens']:.0f} tokens a text (at most {first['max_length']}); "
        f"{first['processor']}, {first['cpus']} cores{device}"
    )
    figure.suptitle(heading, fontsize=11, x=0.01, ha="left")
    titles = ("texts per second", "packed against masked at full length: times ...")
    for axes, title, ticks in zip(panels, titles, (sizes, ratios), strict=False):
        axes.set_title(title, loc="left", fontsize=10)
        axes.set(xlabel="batch size", xticks=range(len(ticks)), xticklabels=ticks)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", alpha=0.25)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    # The legend lists the lines as they end, the fastest first.
    fastest = sorted(records, key=lambda record: (-record["batch_size"], -record["examples_per_second"]))
    for name in dict.fromkeys(record["variant"] for record in fastest):
        xs = [place for place, size in enumerate(sizes) if (size, name) in by]
        speeds = [by[sizes[x], name]["examples_per_second"] for x in xs]
        style = {"linewidth": 1.4, "markersize": 6, **VARIANTS[name].line}
        panels[0].plot(xs, speeds, label=name.replace("_", " "), **style)
    panels[0].set_ylim(0, None)
    panels[0].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if ratios:
        pairs = [(by[size, "packed"], by[size, REFERENCE]) for size in ratios]
        fewer = [full["flops"] / packed["flops"] for packed, full in pairs]
        faster = [packed["examples_per_second"] / full["examples_per_second"] for packed, full in pairs]
        bars = ((-0.2, fewer, "fewer FLOPs", "#b9c7c0"), (0.2, faster, "faster", "#0b6e4f"))
        for shift, heights, label, color in bars:
            drawn = panels[1].bar(np.arange(len(ratios)) + shift, heights, 0.38, label=label, color=color)
            panels[1].bar_label(drawn, fmt="{:.2f}", fontsize=8, padding=2)
        panels[1].set_ylim(0, 1.28 * max(fewer + faster))
        panels[1].legend(fontsize=8, frameon=False, loc="upper left", ncols=2)
    with atomic_file(png_path, "wb") as stream:
        canvas.print_png(stream)

"""Write metrics, speed, progress and training curves of a stage.

STAGE/metrics.jsonl   one JSON object per line, {"step": 40, "loss": 0.31, ...}, equal in repeated runs
STAGE/speed.jsonl     times and rates, which are not
STAGE/tensorboard/    both as TensorBoard events
"""

import contextlib
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.io import atomic_file, make_directory, read_text, streams

logger = logging.getLogger(__name__)

METRICS_NAME, SPEED_NAME = "metrics.jsonl", "speed.jsonl"
LINE_SECONDS = 10.0  # between lines of progress if stderr is not a terminal
# Scalars shown beside the progress, as are those of the development set.
_SHOWN = {"loss", "task_loss", "policy_loss", "reward", "kept_ratio"}
_SHOWN |= {"accuracy", "exact", "exact_match", "f1", "joint_f1"}
# Panels of the training curves, left to right: title, and which scalars it shows.
_PANELS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("loss", lambda name: "loss" in name),
    ("accuracy", lambda name: any(x in name for x in ("accuracy", "exact", "f1")) and "thresh" not in name),
    ("reward", lambda name: "reward" in name),
    ("tokens kept", lambda name: "kept" in name and "ratio" not in name),
    ("learning rate", lambda name: name == "learning_rate"),
)


class Progress:
    """Progress of a stage on stderr; the first update, which compiles, does not count in the rate."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total = name, total
        self._bar: Any = None
        self._step = 0
        self._scalars: dict[str, float] = {}

    def update(self, step: int, num_examples: int) -> None:
        from tqdm import tqdm

        self._step = step
        if self._bar is None:
            terminal = streams.shows_bars()
            bar = "|{bar}|" if terminal else "step"
            self._bar = tqdm(
                desc=self._name,
                total=self._total,
                initial=step,
                postfix=self._text(),
                file=sys.stderr if terminal else _Lines(self),
                dynamic_ncols=terminal,
                mininterval=0.1 if terminal else LINE_SECONDS,
                miniters=1,
                bar_format=f"{{desc}}: {bar} {{n_fmt}}/{{total_fmt}} [{{elapsed}}<{{remaining}}{{postfix}}]",
            )
            return
        rate = self._bar.format_dict["rate"]
        speed = [f"{rate * num_examples:.3g} examples/s"] if rate else []
        self._bar.set_postfix_str(self._text(*speed), refresh=False)
        self._bar.update(step - self._bar.n)

    def show(self, scalars: Mapping[str, float]) -> None:
        """Shows those of these scalars that matter most from now on."""
        shown = {k: float(v) for k, v in scalars.items() if k.removeprefix("dev_") in _SHOWN}
        self._scalars.update(shown)

    def close(self) -> None:
        """Leaves the last state on the screen."""
        if self._bar is not None:
            self._bar.close()

    def write(self, line: str) -> None:
        """Writes the state as a line: where stderr is no terminal."""
        streams.progress(self._step, self._total, line, stage=self._name, **self._scalars)

    def _text(self, *speed: str) -> str:
        return ", ".join([*speed, *(f"{name} {value:.3g}" for name, value in self._scalars.items())])


class _Lines:
    """A file for tqdm that writes lines where it would overwrite one."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def write(self, text: str) -> None:
        if text.strip():
            self._progress.write(text.strip())

    def flush(self) -> None:
        """Does nothing: each message is flushed."""


class StageReport(contextlib.ExitStack):
    """Metrics and progress of one stage; a context manager. If `silent`, nothing is written or shown.

    A stage that resumes from `start_step` loses the metrics of later steps, which it writes again. Raises
    `UserError` if the folder cannot be written to, or its metrics.jsonl is malformed.
    """

    def __init__(
        self,
        stage_dir: str | Path,
        stage_name: str,
        total_steps: int,
        start_step: int = 0,
        silent: bool = False,
    ) -> None:
        super().__init__()
        self._silent = silent
        if silent:
            return
        from tensorboardX import SummaryWriter  # slow to import

        folder = make_directory(stage_dir)
        metrics, speed = folder / METRICS_NAME, folder / SPEED_NAME
        # Keeps whole lines of steps up to the start.
        rows = read_metrics(metrics) if start_step and metrics.exists() else []
        with atomic_file(metrics) as stream:
            stream.writelines(_to_line(row) for row in rows if row["step"] <= start_step)
        self._metrics = self.enter_context(metrics.open("a", encoding="utf-8"))
        self._speed = self.enter_context(speed.open("a", encoding="utf-8"))
        # TensorBoard hides older events of later steps. Files are named by the second; the suffix keeps a
        # quick restart from overwriting the last one.
        suffix, events = f".step_{start_step:08d}", str(folder / "tensorboard")
        self._tensorboard = SummaryWriter(
            events, purge_step=start_step + 1, flush_secs=10, filename_suffix=suffix
        )
        self._progress = Progress(stage_name, total_steps)
        self.callback(self._tensorboard.close)
        self.callback(self._progress.close)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of a step as one line, its training metrics or its evaluation; NaN becomes null."""
        if not self._silent:
            self._write(self._metrics, step, scalars)
            self._progress.show(scalars)

    def log_speed(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes times and rates up to a step."""
        if not self._silent:
            self._write(self._speed, step, scalars)

    def progress(self, step: int, num_examples: int) -> None:
        """Shows that the update of `step`, of `num_examples` examples, is done."""
        if not self._silent:
            self._progress.update(step, num_examples)

    def _write(self, stream: IO[str], step: int, scalars: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in scalars.items()}
        try:
            stream.write(_to_line({"step": int(step), **values}))
            stream.flush()
        except OSError as error:
            raise UserError(f"{stream.name}: cannot be written, {error.strerror}") from error
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, int(step))


def _to_line(row: Mapping[str, float]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"


# Speed --------------------------------------------------------------------------------------------


class StepClock:
    """Measures where the time since the last report went, and the work done in it."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._began = time.perf_counter()
        self._seconds = {"input": 0.0, "checkpoint": 0.0, "evaluation": 0.0}
        self._examples = 0
        self._lengths: list[np.ndarray] = []  # of each update

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the block as `input`, `checkpoint` or `evaluation`; everything else is computation."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[name] += time.perf_counter() - start

    def count(self, examples: int, lengths: np.ndarray) -> None:
        """Counts one update of `examples` examples, whose rows have `lengths` tokens, int [R]."""
        self._examples += examples
        self._lengths.append(lengths)

    def rates(
        self, metrics: Mapping[str, float], flops: Callable[..., Any] | None = None, peak: float | None = None
    ) -> dict[str, float]:
        """Returns seconds per update by part, and examples and tokens per second, since the last call.

        Evaluation is not counted. Compilation is: the first report of a stage is slow. `metrics` of an update
        may have `kept_tokens_N`, tokens of an example after a point of reduction. `flops` returns the FLOPs
        of rows by their lengths, without padding and recomputation; `peak` is the FLOP/s of all devices.
        """
        seconds = dict(self._seconds)
        total = time.perf_counter() - self._began - seconds.pop("evaluation")
        parts = {"compute": max(total - sum(seconds.values()), 0.0), **seconds}
        rates = {f"seconds_{name}": value / len(self._lengths) for name, value in parts.items()}
        lengths, total = np.concatenate(self._lengths), max(total, 1e-9)
        rates |= {"examples_per_second": self._examples / total, "tokens_per_second": lengths.sum() / total}
        # `kept_tokens` are means over the rows of an example.
        kept = {name: x for name, x in sorted(metrics.items()) if name.startswith("kept_tokens_")}
        rates |= {f"{name}_per_second": x * len(lengths) / total for name, x in kept.items()}
        if flops is not None:
            shares = [x / lengths.mean() for x in kept.values()]
            rates["flops_per_second"] = flops(lengths, shares=shares or None).sum() / total
            if peak is not None:
                rates["flop_utilization"] = rates["flops_per_second"] / peak
        self._start()
        return rates


class Profile(contextlib.ExitStack):
    """Records a profile of the updates from `steps[0]` to before `steps[1]`, for TensorBoard and Perfetto."""

    def __init__(self, directory: Path, steps: tuple[int, int] | None) -> None:
        super().__init__()
        self._directory, self._steps, self._began = directory, steps or (0, 0), False

    def at(self, step: int) -> None:
        """Starts or stops at the beginning of this update, 0-based."""
        first, end = self._steps
        if step >= end:
            self.close()
        elif first <= step and not self._began:
            self._began = True
            self.callback(logger.info, "profile of updates %s: %s", self._steps, self._directory)
            self.enter_context(jax.profiler.trace(self._directory))


# Reading and drawing ------------------------------------------------------------------------------


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Reads a metrics.jsonl: one dict per line, `step` an int, null as NaN.

    Ignores an incomplete last line, as of a kill. Raises `UserError` for a missing file or a malformed line.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        try:
            row = {k: math.nan if value is None else value for k, value in json.loads(line).items()}
            if not isinstance(row["step"], int):
                raise TypeError("step is not an integer")
            math.fsum(row.values())
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            expected = f'expected a JSON object with an integer "step" and numbers ({error})'
            raise UserError(f"{path}:{number}: {expected}; delete the line") from error
        rows.append(row)
    return rows


def plot_metrics(stage_dirs: Sequence[str | Path], png_path: str | Path) -> None:
    """Draws the training curves of all stages that have metrics: a row per stage, a panel per kind of metric.

    Training metrics, which are noisy, are drawn faint below their running mean; evaluations (`dev_*`) as
    points. Raises `UserError` without any metrics, or if the image cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import

    paths = [Path(directory) / METRICS_NAME for directory in stage_dirs]
    stages = {path.parent.name: read_metrics(path) for path in paths if path.exists()}
    names = {stage: {name for row in rows for name in row} for stage, rows in stages.items()}
    shown = {stage: any(shows(x) for x in xs for _, shows in _PANELS) for stage, xs in names.items()}
    stages = {stage: rows for stage, rows in stages.items() if shown[stage]}
    if not stages:
        raise UserError(f"no metrics to draw in {', '.join(map(str, paths))}; train a stage first")
    panels = [panel for panel in _PANELS if any(map(panel[1], set().union(*names.values())))]
    figure = Figure(figsize=(3.4 * len(panels), 2.5 * len(stages) + 0.3), layout="constrained")
    grid = figure.subplots(len(stages), len(panels), sharex="row", squeeze=False)
    for row, (stage, rows) in zip(grid, stages.items(), strict=True):
        for axes, (title, shows) in zip(row, panels, strict=True):
            _draw(axes, f"{stage}: {title}", rows, list(filter(shows, sorted(names[stage]))))
    with atomic_file(png_path, "wb") as stream:
        figure.savefig(stream, format="png")


def _draw(axes: Any, title: str, rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> None:
    if not names:
        axes.set_axis_off()
        return
    for name in names:
        label, points = name.replace("_", " "), [row for row in rows if name in row]
        steps, values = [row["step"] for row in points], [row[name] for row in points]
        if name.startswith("dev_"):
            axes.plot(steps, values, "o--", label=label, markersize=4, linewidth=1)
        elif name == "learning_rate":
            axes.plot(steps, values, label=label)
        else:
            (line,) = axes.plot(steps, _running_mean(values), label=label)
            axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.8, zorder=1)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if names != ["learning_rate"]:
        axes.legend(fontsize=7, frameon=False)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Averages over a window around each point, a tenth of the curve wide; NaN where a value is."""
    half, means = len(values) // 20, []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)  # the window stays symmetric at the ends
        means.append(float(np.mean(values[i - reach : i + reach + 1])))
    return means

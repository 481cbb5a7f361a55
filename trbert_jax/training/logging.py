"""What a training stage reports: metrics on disk, progress on the terminal, curves to look at.

`STAGE/metrics.jsonl` has one JSON object a line, {"step": 40, "loss": 0.31, ...}, the same whenever the
run is repeated; `STAGE/speed.jsonl` where the time went, which is not;
`STAGE/tensorboard/` the same as TensorBoard events.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from trbert_jax.errors import UserError
from trbert_jax.io import atomic_file, make_directory, read_text
from trbert_jax.training.progress import Progress

METRICS_NAME, SPEED_NAME = "metrics.jsonl", "speed.jsonl"
# Shown beside the progress, and what the development set says of them.
_SHOWN = (
    "loss",
    "task_loss",
    "policy_loss",
    "accuracy",
    "exact",
    "exact_match",
    "f1",
    "joint_f1",
    "reward",
    "kept_ratio",
)

# Panels of the training curves, left to right: title, and which scalars are drawn in it.
_PANELS = (
    ("loss", lambda name: "loss" in name),
    ("accuracy", lambda name: any(x in name for x in ("accuracy", "exact", "f1")) and "thresh" not in name),
    ("reward", lambda name: "reward" in name),
    ("tokens kept", lambda name: "kept" in name and "ratio" not in name),
    ("learning rate", lambda name: name == "learning_rate"),
)


class StageReport:
    """Metrics and progress of one stage, a context manager.

    A stage that goes on from `start_step` loses what a killed run had written about later steps,
    so that no step is told twice.

    Args:
      stage_dir: the stage's folder; made if needed.
      stage_name: what the progress display begins with.
      total_steps: updates in all.
      start_step: updates already done.
      silent: write and show nothing, in a process that is not the one to do so.

    Raises:
      UserError: the folder cannot be written to, or its metrics.jsonl is malformed.
    """

    def __init__(
        self,
        stage_dir: str | Path,
        stage_name: str,
        total_steps: int,
        start_step: int = 0,
        silent: bool = False,
    ) -> None:
        self._silent = silent
        if silent:
            return
        self._path = Path(stage_dir) / METRICS_NAME
        _drop_after(self._path, start_step)
        self._writer = _open_tensorboard(Path(stage_dir) / "tensorboard", start_step)
        self._stream = self._path.open("a", encoding="utf-8")
        self._speed = self._path.with_name(SPEED_NAME).open("a", encoding="utf-8")
        self._progress = Progress(stage_name, total_steps, start_step)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes scalars of a step at once, as one line; a value that is not finite as null.

        A step may be logged more than once, its training metrics and its evaluation for example.
        """
        if self._silent:
            return
        self._write(self._stream, step, scalars)
        self._progress.show({k: float(v) for k, v in scalars.items() if k.removeprefix("dev_") in _SHOWN})

    def log_speed(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes times and rates up to a step, apart from the metrics, which they would make unrepeatable."""
        if not self._silent:
            self._write(self._speed, step, scalars)

    def _write(self, stream: IO[str], step: int, scalars: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in scalars.items()}
        try:
            stream.write(_to_line({"step": int(step), **values}))
            stream.flush()
        except OSError as error:
            raise UserError(f"{stream.name}: cannot be written, {error.strerror}") from error
        for name, value in values.items():
            self._writer.add_scalar(name, value, int(step))

    def progress(self, step: int, num_examples: int) -> None:
        """Moves the progress display to `step`, whose update took `num_examples` examples."""
        if not self._silent:
            self._progress.update(step, num_examples)

    def close(self) -> None:
        """Ends the display and closes the files. Does nothing the second time."""
        if self._silent:
            return
        self._progress.close()
        self._stream.close()
        self._speed.close()
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Reads a metrics.jsonl: one dict a line, `step` an int, null as NaN.

    A last line without its end, which a killed run may leave, is left out.

    Raises:
      UserError: the file is missing, or a line is not a JSON object with a step and numbers.
    """
    rows = []
    for number, line in enumerate(read_text(path).split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON ({error.msg}); delete the line") from error
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f'{path}:{number}: expected an object with an integer "step"; delete the line')
        row = {name: math.nan if value is None else value for name, value in row.items()}
        for name, value in row.items():
            if not isinstance(value, (int, float)):
                raise UserError(f"{path}:{number}: {name!r} is not a number; delete the line")
        rows.append(row)
    return rows


def plot_metrics(stage_dirs: Sequence[str | Path], png_path: str | Path) -> None:
    """Draws the training curves of all stages: a row a stage, a panel a kind of metric.

    Training metrics, which are noisy, are drawn faint with their running mean over them;
    evaluations (`dev_*`) as points.

    Args:
      stage_dirs: folders of stages; those without metrics are left out.
      png_path: the image, written atomically.

    Raises:
      UserError: no stage has metrics, one's are malformed, or the image cannot be written.
    """
    stages = {}
    for path in (Path(directory) / METRICS_NAME for directory in stage_dirs):
        curves = _curves(read_metrics(path)) if path.exists() else {}
        if any(shows(name) for name in curves for _, shows in _PANELS):
            stages[path.parent.name] = curves
    if not stages:
        looked = ", ".join(str(Path(directory) / METRICS_NAME) for directory in stage_dirs)
        raise UserError(f"no metrics to draw, looked for {looked}; train a stage first")
    names = {name for curves in stages.values() for name in curves}
    panels = [(title, shows) for title, shows in _PANELS if any(map(shows, names))]

    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(panels), 2.5 * len(stages) + 0.3), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(len(stages), len(panels), sharex="row", squeeze=False)
    for axes_row, (stage, curves) in zip(grid, stages.items(), strict=True):
        labeled = False
        for axes, (title, shows) in zip(axes_row, panels, strict=True):
            shown = {name: curve for name, curve in curves.items() if shows(name)}
            if not shown:
                axes.set_axis_off()
                continue
            axes.set_title(title if labeled else f"{stage}: {title}", loc="left", fontsize=10)
            labeled = True
            _draw(axes, shown)
    with atomic_file(png_path, "wb") as stream:
        canvas.print_png(stream)


def _draw(axes: Any, curves: Mapping[str, tuple[list[int], list[float]]]) -> None:
    for name, (steps, values) in curves.items():
        label = name.replace("_", " ")
        if name.startswith("dev_"):
            axes.plot(steps, values, "o--", label=label, markersize=4, linewidth=1)
        elif name == "learning_rate":
            axes.plot(steps, values, label=label)
        else:
            (line,) = axes.plot(steps, _running_mean(values), label=label)
            axes.plot(steps, values, color=line.get_color(), alpha=0.25, linewidth=0.8, zorder=1)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.yaxis.set_major_formatter("{x:.4g}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1 or "learning_rate" not in curves:
        axes.legend(fontsize=7, frameon=False)


def _curves(rows: Sequence[Mapping[str, float]]) -> dict[str, tuple[list[int], list[float]]]:
    """Name of a scalar -> (steps, values)."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step":
                steps, values = curves.setdefault(name, ([], []))
                steps.append(int(row["step"]))
                values.append(value)
    return curves


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a window around each point, a tenth of the curve wide; NaN where a value is."""
    half = len(values) // 20
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)  # the window stays symmetric at the ends
        window = values[i - reach : i + reach + 1]
        means.append(sum(window) / len(window))
    return means


def _to_line(row: Mapping[str, float]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite, ensure_ascii=False) + "\n"


def _drop_after(path: Path, step: int) -> None:
    """Leaves in metrics.jsonl only whole lines of steps up to `step`; makes the file if needed."""
    rows = [row for row in read_metrics(path) if row["step"] <= step] if step and path.exists() else []
    with atomic_file(path) as stream:
        stream.writelines(map(_to_line, rows))


def _open_tensorboard(directory: Path, start_step: int) -> Any:
    """A writer of TensorBoard events; TensorBoard hides older events of steps after `start_step`."""
    from tensorboardX import SummaryWriter  # without TensorFlow; slow to import

    make_directory(directory)
    # Files are named by the second; the suffix keeps a quick restart from writing over the last one.
    suffix = f".step_{start_step:08d}"
    return SummaryWriter(
        logdir=str(directory), purge_step=start_step + 1, flush_secs=10, filename_suffix=suffix
    )

from __future__ import annotations

import io
import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from trbert_jax.errors import UserError
from trbert_jax.training import progress
from trbert_jax.training.logging import StageReport, plot_metrics, read_metrics


class Clock:
    """Stands in for the time module: time passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def read_events(directory: Path) -> list[Any]:
    """The events of all files of a TensorBoard folder, oldest file first (TFRecord framing)."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(directory.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_metrics_are_on_disk_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "policy" / "metrics.jsonl"
    with StageReport(path.parent, "policy", 10) as report:
        report.log(5, {"loss": 0.5, "reward": math.nan})
        assert json.loads(path.read_text()) == {"step": 5, "loss": 0.5, "reward": None}
        report.log(5, {"dev_accuracy": 1})
        rows = read_metrics(path)
    assert math.isnan(rows[0].pop("reward"))
    assert rows == [{"step": 5, "loss": 0.5}, {"step": 5, "dev_accuracy": 1.0}]


def test_tensorboard_gets_the_same(tmp_path: Path) -> None:
    with StageReport(tmp_path, "policy", 10) as report:
        report.log(1, {"loss": 0.5, "reward": -1.0})
        report.log(2, {"loss": 0.25})
    events = read_events(tmp_path / "tensorboard")
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars == [(1, "loss", 0.5), (1, "reward", -1.0), (2, "loss", 0.25)]


def test_tensorboard_hides_what_a_resumed_stage_repeats(tmp_path: Path) -> None:
    with StageReport(tmp_path, "policy", 10) as report:
        report.log(1, {"loss": 0.5})
        report.log(4, {"loss": 0.4})
    with StageReport(tmp_path, "policy", 10, start_step=3) as report:
        report.log(4, {"loss": 0.3})
    starts = [e.step for e in read_events(tmp_path / "tensorboard") if e.HasField("session_log")]
    assert starts == [1, 4]  # TensorBoard drops earlier events from these steps on


@pytest.mark.parametrize("end", ["", '{"step": 4, "lo', '{"step": 3, "loss": 9'])
def test_a_resumed_stage_tells_no_step_twice(tmp_path: Path, end: str) -> None:
    path = tmp_path / "metrics.jsonl"
    with StageReport(tmp_path, "joint", 6) as report:
        for step in range(1, 6):
            report.log(step, {"loss": float(step) if step != 2 else math.inf})
    with path.open("a") as stream:
        stream.write(end)
    with StageReport(tmp_path, "joint", 6, start_step=3) as report:
        assert [row["step"] for row in read_metrics(path)] == [1, 2, 3]
        for step in (4, 5, 6):
            report.log(step, {"loss": -float(step)})
    rows = read_metrics(path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [rows[i]["loss"] for i in (0, 2, 3, 5)] == [1.0, 3.0, -4.0, -6.0]
    assert math.isnan(rows[1]["loss"])


def test_a_stage_started_anew_forgets_the_old_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("not JSON\n")
    with StageReport(tmp_path, "joint", 6):
        assert read_metrics(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "not valid JSON"),
        ("[1]", 'an integer "step"'),
        ('{"loss": 1}', 'an integer "step"'),
        ('{"step": 1, "loss": "low"}', "'loss' is not a number"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=expected) as error:
        StageReport(tmp_path, "joint", 6, start_step=2)
    assert f"{path}:2: " in str(error.value)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        StageReport(tmp_path / "file", "joint", 6)


def test_closing_twice_does_no_harm(tmp_path: Path) -> None:
    report = StageReport(tmp_path, "joint", 6)
    report.close()
    report.close()


def test_a_log_file_gets_a_line_every_ten_seconds(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with StageReport(tmp_path, "policy", 200, start_step=100) as report:
        clock.now += 30  # compilation
        for step in range(101, 107):
            report.log(step, {"loss": 1 / step, "dev_accuracy": 0.5, "learning_rate": 1e-3})
            report.progress(step, 8)
            clock.now += 4
    lines = capsys.readouterr().err.splitlines()
    scalars = "loss {loss:.3g}, dev_accuracy 0.5"
    assert lines == [
        "policy: step 101/200 (50 %), " + scalars.format(loss=1 / 101),
        # 24 examples in 12 seconds; 96 steps of 4 seconds are left
        "policy: step 104/200 (52 %), 2 examples/s, 6:24 left, " + scalars.format(loss=1 / 104),
        "policy: step 106/200 (53 %), 1.67 examples/s, 7:31 left, " + scalars.format(loss=1 / 106),
    ]


def test_the_last_line_says_how_long_it_took(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with StageReport(tmp_path, "policy", 2) as report:
        for step in (1, 2):
            clock.now += 3700
            report.progress(step, 7_400_000)
    assert capsys.readouterr().err.splitlines()[-1] == (
        "policy: step 2/2 (100 %), 2000 examples/s, 2:03:20 taken"
    )


def test_the_rate_is_that_of_the_last_two_minutes(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """A machine that was busy with something else, and is not any more."""
    with StageReport(tmp_path, "policy", 200) as report:
        for step in range(1, 101):
            clock.now += 10 if step <= 60 else 5
            report.progress(step, 8)
    # 24 steps of 5 seconds make two minutes.
    assert (
        capsys.readouterr().err.splitlines()[-1] == "policy: step 100/200 (50 %), 1.6 examples/s, 8:20 left"
    )


def test_nothing_is_said_of_a_stage_that_did_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with StageReport(tmp_path, "policy", 5, start_step=5):
        pass
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with StageReport(tmp_path, "policy", 10, start_step=4) as report:
        for step in range(5, 11):
            clock.now += 2
            report.log(step, {"loss": 0.25})
            report.progress(step, 8)
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("policy 100 % |")
    for part in ("10/10", "4 examples/s", "0:12 taken", "loss 0.25"):
        assert part in last


def test_curves_of_all_stages_in_one_image(tmp_path: Path) -> None:
    for stage, names in {"finetune": ["loss"], "policy": ["loss", "reward", "kept_tokens_0"]}.items():
        with StageReport(tmp_path / stage, stage, 30) as report:
            for step in range(1, 31):
                report.log(step, {**dict.fromkeys(names, 1 / step), "learning_rate": 1e-3})
            report.log(30, {"dev_accuracy": math.nan})
    (tmp_path / "score").mkdir()
    target = tmp_path / "plots" / "curves.png"
    plot_metrics([tmp_path / stage for stage in ("finetune", "score", "policy")], target)
    data = target.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    # Five kinds of metrics, two stages that have any.
    assert (width, height) == (5 * 340, 2 * 250 + 30)


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "seconds": 2.0}\n'])
def test_no_curves_without_metrics(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match="no metrics to draw") as error:
        plot_metrics([tmp_path], tmp_path / "curves.png")
    assert str(tmp_path / "metrics.jsonl") in str(error.value)
    assert not (tmp_path / "curves.png").exists()

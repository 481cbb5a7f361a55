"""Metrics on disk, progress on stderr, speed, curves."""

import io
import json
import math
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trbert_jax.errors import UserError
from trbert_jax.io import streams
from trbert_jax.training import logging
from trbert_jax.training.logging import StageReport, StepClock, plot_metrics, read_metrics


def read_events(directory: Path) -> list[Any]:
    """The events of a TensorBoard folder, oldest file first (TFRecord framing)."""
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
    path.parent.mkdir()
    path.write_text("not JSON\n")  # of a run that starts anew
    with StageReport(path.parent, "policy", 10) as report:
        report.log(5, {"loss": 0.5, "reward": math.nan})
        assert json.loads(path.read_text()) == {"step": 5, "loss": 0.5, "reward": None}
        report.log(5, {"dev_accuracy": 1})
        rows = read_metrics(path)
    report.close()  # does no harm
    assert math.isnan(rows[0].pop("reward"))
    assert rows == [{"step": 5, "loss": 0.5}, {"step": 5, "dev_accuracy": 1.0}]


@pytest.mark.parametrize("end", ["", '{"step": 4, "lo', '{"step": 3, "loss": 9'])
def test_a_resumed_stage_writes_no_step_twice(tmp_path: Path, end: str) -> None:
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
    events = read_events(tmp_path / "tensorboard")
    assert [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value] == [
        *((step, "loss", step if step != 2 else math.inf) for step in range(1, 6)),
        *((step, "loss", -step) for step in (4, 5, 6)),
    ]
    # TensorBoard drops earlier events from these steps on.
    assert [e.step for e in events if e.HasField("session_log")] == [1, 4]


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": 1.5}', '{"step": 1, "loss": "low"}'])
def test_a_malformed_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=f"{path}:2: "):
        StageReport(tmp_path, "joint", 6, start_step=2)
    with pytest.raises(UserError, match=str(path)):
        StageReport(path, "joint", 6)  # a file where a folder is expected


def report_some(folder: Path) -> None:
    """Three of nine updates of 16 examples."""
    with StageReport(folder, "policy", 9, start_step=6) as report:
        for step in (7, 8, 9):
            report.log(step, {"loss": 1 / step, "learning_rate": 1e-3})
            report.progress(step, 16)


def test_a_log_file_gets_few_lines(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    report_some(tmp_path)
    _, line = capsys.readouterr().err.splitlines()  # the first and the last: ten seconds have not passed
    monkeypatch.setattr(logging, "LINE_SECONDS", 0.0)
    report_some(tmp_path / "often")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3
    for text in (line, lines[-1]):
        assert text.startswith("policy: step 9/9 [")
        assert "loss 0.111" in text
    assert " examples/s" in lines[-1]
    with StageReport(tmp_path, "policy", 5, start_step=5):
        pass
    assert capsys.readouterr().err == "", "nothing was done"


def test_progress_as_json(tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(streams, "_log_format", "json")
    with caplog.at_level("INFO", "trbert_jax"):
        report_some(tmp_path)
    first, last = (json.loads(streams.JsonLines().format(record)) for record in caplog.records)
    assert (first["event"], first["stage"], first["step"], first["total"]) == ("progress", "policy", 7, 9)
    assert (last["step"], last["loss"]) == (9, pytest.approx(1 / 9))


def test_a_terminal_gets_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    report_some(tmp_path)
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("policy: |")
    assert "9/9" in last


def test_the_clock_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = StepClock()
    for _ in range(4):
        with clock.part("input"):
            now[0] += 1
        now[0] += 5
        clock.count(8, np.full(8, 25))
    with clock.part("checkpoint"):
        now[0] += 8
    with clock.part("evaluation"):
        now[0] += 1000
    shares: list[Any] = []

    def flops(lengths: np.ndarray, **given: Any) -> np.ndarray:
        shares.append(given["shares"])
        return 10.0 * lengths

    rates = clock.rates({"kept_tokens_0": 5.0, "loss": 1.0}, flops, peak=1000.0)
    assert shares == [[0.2]]
    seconds = {"seconds_compute": 5.0, "seconds_input": 1.0, "seconds_checkpoint": 2.0}
    speed = {"examples_per_second": 1.0, "tokens_per_second": 25.0, "kept_tokens_0_per_second": 5.0}
    assert rates == {**seconds, **speed, "flops_per_second": 250.0, "flop_utilization": 0.25}
    now[0] += 2
    clock.count(1, np.array([1]))
    assert clock.rates({})["seconds_compute"] == 2.0


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
    # Five kinds of metrics, two stages that have any.
    assert struct.unpack(">II", data[16:24]) == (5 * 340, 2 * 250 + 30)


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "seconds": 2.0}\n'])
def test_no_curves_without_metrics(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=str(tmp_path / "metrics.jsonl")):
        plot_metrics([tmp_path], tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()

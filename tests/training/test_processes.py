"""Several processes that train together: what they must agree on, and how they end together."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_runs
from tiny_processes import (
    TESTS,
    command,
    environment,
    finish,
    free_port,
    run_processes,
    start_processes,
    wait_for,
)

from trbert_jax.config import load_config, to_dict


@pytest.mark.slow
def test_sigterm_stops_both_processes_wherever_they_are(tmp_path: Path) -> None:
    """To one of them: in updates, as a stage ends and the next one begins, in evaluation."""
    changes = {
        "stages": ["finetune", "score", "evaluate"],
        "model": {"scratch": {**tiny_runs.SCRATCH, "num_layers": 2}},
        "finetune": {"dropout": False, "backend": "masked"},
    }
    folders = tmp_path / "whole", tmp_path / "stopped"
    configs = []
    for folder in folders:
        tiny_runs.write_dataset(folder / "data")
        configs.append(tiny_runs.write_config(folder, **changes))
    both = environment(2) | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "jax")}
    outputs = finish(start_processes([configs[0]] * 2, both))
    assert [code for code, _, _ in outputs] == [0, 0], outputs
    for number, moment in enumerate(("finetune/metrics.jsonl", "finetune/done.json", "evaluate")):
        processes = start_processes([configs[1]] * 2, both)
        wait_for(folders[1] / "work" / moment, processes)
        processes[number % 2].send_signal(signal.SIGTERM)
        asked = time.monotonic()
        outputs = finish(processes)
        assert [code for code, _, _ in outputs] == [143, 143], (moment, outputs)
        assert time.monotonic() - asked < 120, moment
        assert "told to stop" in outputs[0][2]
        assert not (folders[1] / "work" / "evaluate" / "done.json").exists()
    outputs = finish(start_processes([configs[1]] * 2, both))
    assert [code for code, _, _ in outputs] == [0, 0], outputs
    for name in ("finetune/metrics.jsonl", "finetune/model/model.safetensors", "score/scores.npy"):
        one, other = ((folder / "work" / name).read_bytes() for folder in folders)
        assert one == other, name
    results = [tiny_runs.without_times(tiny_runs.read_results(folder)) for folder in folders]
    assert results[0]["dense"] == results[1]["dense"]


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    tiny_runs.write_dataset(tmp_path / "data")
    config, port = tiny_runs.write_config(tmp_path), free_port()
    program = [sys.executable, "-W", "error", str(TESTS / "training" / "process_checks.py")]
    processes = [
        subprocess.Popen(
            [*program, str(port), str(number), str(config)],
            env=environment(2),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    ended = finish(processes)
    assert [code for code, _, _ in ended] == [0, 0], ended
    main, other = (json.loads(out.splitlines()[-1]) for _, out, _ in ended)
    assert main.pop("other") == "ValueError: what is that"
    assert other.pop("other") == "UserError: in process 0: ValueError: what is that"
    assert len(main.pop("long")) > len(other.pop("long")) > 4000
    assert main.pop("one fails") == "UserError: in process 1: no file"
    assert other.pop("one fails") == "UserError: no file"
    assert main.pop("user") == "UserError: no räum left"
    assert other.pop("user") == "UserError: in process 0: no räum left"
    for found in (main, other):
        assert "process 1 of 2 has another directory of that name than process 0" in found.pop("apart")
    assert main == other
    assert main["fine"] == main["same directory"] == main["inputs"] == "done"
    assert "the processes do not agree on the stages to run (--stages): 1 of 2 differ" in main["stages"]
    assert "do not agree on the parameters that stage score starts from: 1 of 2" in main["parameters"]
    assert "do not agree on the data of split dev in stage policy: 1 of 2" in main["dev"]
    assert not list((tmp_path / "work").glob(".seen*"))


def test_a_work_directory_of_another_configuration_ends_all_processes(tmp_path: Path) -> None:
    """Only process 0 looks at it; the others are not left waiting."""
    tiny_runs.write_dataset(tmp_path / "data")
    work = tmp_path / "work"
    (work / "finetune").mkdir(parents=True)
    (work / "finetune" / "metrics.jsonl").touch()
    stored = to_dict(load_config(tiny_runs.write_config(tmp_path, seed=99)))
    (work / "config.json").write_text(json.dumps(stored), encoding="utf-8")
    processes = start_processes([tiny_runs.write_config(tmp_path)] * 2, environment(1))
    ended = finish(processes, timeout=120)
    assert [code for code, _, _ in ended] == [2, 2], ended
    for _, _, err in ended:
        assert "this work directory belongs to another configuration, which differs in\n  seed: " in err
        assert "Traceback" not in err


def test_processes_that_do_not_agree_are_told_before_the_first_step(tmp_path: Path) -> None:
    tiny_runs.write_dataset(tmp_path / "data")
    configs = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        workdir, data = str(tmp_path / "work"), {"name": "imdb", "path": str(tmp_path / "data")}
        configs.append(
            tiny_runs.write_config(tmp_path / str(number), workdir=workdir, data=data, seed=number)
        )
    outputs = run_processes(configs)
    assert [code for code, _, _ in outputs] == [2, 2], outputs
    for _, _, err in outputs:
        assert "the processes do not agree on the configuration: 1 of 2 differ from process 0" in err
    assert not (tmp_path / "work" / "finetune").exists()


def test_processes_that_read_different_data_are_told_before_the_first_step(tmp_path: Path) -> None:
    """As when one machine has an older copy: equal settings, one label changed."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        tiny_runs.write_dataset(folder / "data")
    file = folders[1] / "data" / "train.jsonl"
    first, rest = file.read_text(encoding="utf-8").split("\n", 1)
    record = json.loads(first)
    file.write_text(json.dumps(record | {"label": 1 - record["label"]}) + "\n" + rest, encoding="utf-8")
    config = tiny_runs.write_config(tmp_path, data={"name": "imdb", "path": "data"})
    outputs = run_processes([config, config], folders=folders)
    assert [code for code, _, _ in outputs] == [2, 2], outputs
    for _, _, err in outputs:
        assert "the processes do not agree on what stage finetune trains on (settings, data): 1 of 2" in err
    assert not (tmp_path / "work" / "finetune" / "checkpoints").exists()


def test_a_coordinator_that_is_not_there(tmp_path: Path) -> None:
    tiny_runs.write_dataset(tmp_path / "data")
    port = free_port()
    arguments = (f"--coordinator=127.0.0.1:{port}", "--num-processes=2", "--process-id=1", "--join-timeout=1")
    process = subprocess.run(
        command(tiny_runs.write_config(tmp_path), *arguments),
        env=environment(1),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert f"the coordinator at 127.0.0.1:{port} could not be reached within 1 s" in process.stderr
    assert "Traceback" not in process.stderr


def join(number: int, port: int) -> subprocess.CompletedProcess[str]:
    """One of two processes, which does not wait long for the other."""
    code = (
        f"from trbert_jax.parallel import join; from trbert_jax.errors import UserError\n"
        f"try: join('127.0.0.1:{port}', 2, {number}, 2)\nexcept UserError as error: exit(str(error))"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment(1),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_process_whose_peer_never_comes() -> None:
    port = free_port()
    process = join(0, port)
    assert process.returncode == 2
    assert f"process 0 of 2 could not join at 127.0.0.1:{port} within 2 s" in process.stderr
    assert "stack trace" not in process.stderr


def test_an_address_where_something_else_listens() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        process, taken = join(1, port), join(0, port)
    assert process.returncode == 2
    assert f"process 1 of 2 could not join at 127.0.0.1:{port} within 2 s" in process.stderr
    assert "stack trace" not in process.stderr
    assert f"process 0 of 2 cannot join at 127.0.0.1:{port}" in taken.stderr
    assert "Address already in use" in taken.stderr

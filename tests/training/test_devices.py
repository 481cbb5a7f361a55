"""Eight devices compute what one does; see device_checks.py for what is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
from safetensors.numpy import load_file

from trbert_jax.errors import UserError
from trbert_jax.parallel import make_layout

TESTS = Path(__file__).parent.parent
MODEL = "model.safetensors"
TRAINED = ("finetune", "init", "policy", "joint")
NO_DROPOUT = {stage: {"dropout": False, "learning_rate": 1e-2} for stage in TRAINED}


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many devices, which finds the helpers of the tests."""
    return {
        **os.environ,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")])),
    }


def check(name: str, *arguments: str) -> Any:
    process = subprocess.run(
        [sys.executable, "-W", "error", str(TESTS / "training" / "device_checks.py"), name, *arguments],
        env=environment(8),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def assert_same(found: dict[str, Any]) -> None:
    assert found.pop("moved") > 1e-3, "an update that changes nothing shows nothing"
    assert set(found) == {"jit 1", "fsdp 1", "pmap 1", "one 4", "jit 4"}
    for how, (loss, parameters) in found.items():
        assert loss < 1e-5, how
        assert parameters < 1e-4, how


def test_every_layout_trains_the_same() -> None:
    assert_same(check("same", "finetune", "masked"))


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "execution"), [("policy", "masked"), ("joint", "packed")])
def test_every_layout_learns_a_policy_the_same(stage: str, execution: str) -> None:
    """The other stages are compared below, in whole runs."""
    assert_same(check("same", stage, execution))


def test_every_program_lowers_for_other_machines() -> None:
    done = check("exported")
    assert len(done) == 2 * (4 * 2 + 1)
    assert {(platform, devices) for platform, _, _, devices in done} == {("tpu", 8), ("cuda", 8)}


def test_no_activation_is_gathered() -> None:
    found = check("gathers")
    assert found["gathered"]
    assert set(found["gathered"]) <= set(found["parameters"])
    assert int(found["reductions"][0]) <= 3  # of all gradients together, not of each


def test_the_second_axis_divides_parameters_and_optimizer() -> None:
    size = check("divided")
    assert size["fsdp"] < 0.25 * size["data"]  # an eighth, but for what is too small


def test_bad_layouts() -> None:
    with pytest.raises(UserError, match=r"parallel.strategy is 'pjit'; expected one of jit, pmap"):
        make_layout("pjit")
    with pytest.raises(UserError, match=r"parallel.fsdp is 3, which does not divide the 1 devices"):
        make_layout(fsdp=3)


# Whole runs -----------------------------------------------------------------------------------------


def command(config: Path, *arguments: str) -> list[str]:
    call = "import sys; from trbert_jax.cli import main; sys.exit(main())"
    return [sys.executable, "-W", "error", "-c", call, "train", "--config", str(config), *arguments]


def run_all(config: Path, devices: int, *arguments: str) -> str:
    process = subprocess.run(
        command(config, *arguments), env=environment(devices), capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def assert_same_numbers(one: Path, other: Path) -> None:
    """Metrics, models, scores and predictions of two runs, but for times."""
    for stage in NO_DROPOUT:
        lines = [tiny_runs.read_lines(folder / "work" / stage / "metrics.jsonl") for folder in (one, other)]
        for left, right in zip(*lines, strict=True):
            assert left.keys() == right.keys()
            for name in left:
                # What is left of a gradient whose parts nearly cancel, as in distillation from the model
                # itself, shows the rounding of the updates before it; parameters are held to as much.
                close = 1e-4 if name == "gradient_norm" else 1e-5
                assert left[name] == pytest.approx(right[name], abs=close, rel=close), (stage, name)
    for stage in NO_DROPOUT:
        left_model, right_model = (load_file(f / "work" / stage / "model" / MODEL) for f in (one, other))
        assert left_model.keys() == right_model.keys()
        for name, array in left_model.items():
            np.testing.assert_allclose(right_model[name], array, rtol=0, atol=1e-4, err_msg=f"{stage} {name}")
    left_scores, right_scores = (np.load(f / "work" / "score" / "scores.npy") for f in (one, other))
    np.testing.assert_allclose(left_scores, right_scores, rtol=1e-4, atol=1e-6)
    records = [tiny_runs.read_lines(folder / "work" / "predictions.jsonl") for folder in (one, other)]
    assert len(records[0]) == tiny_runs.SIZES["test"]
    for left, right in zip(*records, strict=True):
        assert (left["id"], left["prediction"], left["kept"]) == (
            right["id"],
            right["prediction"],
            right["kept"],
        )


@pytest.fixture(scope="module")
def one_device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    tiny_runs.write_dataset(folder / "data")
    run_all(tiny_runs.write_config(folder, **NO_DROPOUT), 1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{"fsdp": 2}, {"strategy": "pmap"}], ids=["jit", "pmap"])
def test_all_stages_on_eight_devices(one_device: Path, tmp_path: Path, parallel: dict[str, Any]) -> None:
    """17 test texts, 11 of dev and 42 of training: no number that eight divides."""
    tiny_runs.write_dataset(tmp_path / "data")
    out = run_all(tiny_runs.write_config(tmp_path, parallel=parallel, **NO_DROPOUT), 8)
    assert "8 devices" in out
    assert_same_numbers(one_device, tmp_path)


@pytest.mark.slow
def test_two_processes_with_two_devices_each(one_device: Path, tmp_path: Path) -> None:
    tiny_runs.write_dataset(tmp_path / "data")
    config = tiny_runs.write_config(tmp_path, **NO_DROPOUT)
    outputs = run_processes([config, config])
    assert [code for code, _, _ in outputs] == [0, 0], outputs
    assert "4 devices" in outputs[0][1]
    said = [line for line in outputs[1][1].splitlines() if "[Gloo]" not in line]
    assert said == [], "only the first process speaks"
    assert_same_numbers(one_device, tmp_path)


def run_processes(
    configs: list[Path], *arguments: str, folders: list[Path] | None = None
) -> list[tuple[int, str, str]]:
    """One process a configuration, together: exit code, stdout and stderr of each."""
    port = free_port()
    processes = [
        subprocess.Popen(
            command(
                config,
                f"--coordinator=127.0.0.1:{port}",
                f"--num-processes={len(configs)}",
                f"--process-id={number}",
                "--join-timeout=60",
                *arguments,
            ),
            env=environment(2),
            cwd=folders[number] if folders else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, config in enumerate(configs)
    ]
    try:
        ended = [process.communicate(timeout=500) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *out) for process, out in zip(processes, ended, strict=True)]


def free_port() -> int:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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


def test_devices_that_cannot_share_a_batch(tmp_path: Path) -> None:
    tiny_runs.write_dataset(tmp_path / "data")
    process = subprocess.run(
        command(tiny_runs.write_config(tmp_path)),
        env=environment(3),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    assert "finetune.batch_size is 8, which 3 devices cannot share evenly; set it to a multiple of 3" in (
        process.stderr
    )

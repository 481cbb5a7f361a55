"""The scripts in launch/, with a `trbert` that only says how it was called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trbert_jax.cli import parse_arguments

LAUNCH = Path(__file__).parents[1] / "launch"
FAKE = """#!/usr/bin/env bash
echo "$@ [$XLA_FLAGS]"
exit "${CODE:-0}"
"""


def launch(folder: Path, script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    fake = folder / "trbert"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "XLA_FLAGS": "", **variables}
    command = [str(LAUNCH / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_local(tmp_path: Path) -> None:
    done = launch(tmp_path, "local.sh", "--config", "a b.yaml")
    assert (done.returncode, done.stdout) == (0, "train --config a b.yaml []\n")


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="the processes would divide GPUs")
def test_local_multiprocess(tmp_path: Path) -> None:
    done = launch(tmp_path, "local_multiprocess.sh", "2", "--config", "c", DEVICES="3", PORT="999")
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [
        f"train --config c --coordinator 127.0.0.1:999 --num-processes 2 --process-id {i} "
        "[ --xla_force_host_platform_device_count=3]"
        for i in range(2)
    ]
    assert launch(tmp_path, "local_multiprocess.sh", "2", "--config", "c", CODE="143").returncode == 143
    assert "usage: " in launch(tmp_path, "local_multiprocess.sh", "--config", "c").stderr


def test_tpu_pod(tmp_path: Path) -> None:
    gcloud = tmp_path / "gcloud"
    gcloud.write_text('#!/usr/bin/env bash\nprintf "%s|" "$@"\n')
    gcloud.chmod(0o755)
    done = launch(tmp_path, "tpu_pod.sh", "--config", "a b.yaml", TPU="t", ZONE="z", PROJECT="p")
    assert done.returncode == 0
    assert "|ssh|t|--zone|z|--project|p|--worker=all|--command|" in done.stdout
    assert "trbert train --distributed --config a\\ b.yaml|" in done.stdout
    assert "set TPU to the name" in launch(tmp_path, "tpu_pod.sh").stderr


def test_reproduce(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return launch(tmp_path, "reproduce.sh", *arguments, PYTHON=sys.executable)

    name = "imdb_minilm_plus_seed1"
    listed = run()
    assert listed.returncode == 0
    assert f"{name} " in listed.stdout
    file = LAUNCH.parent / "results" / f"{name}.json"
    assert run(name, "--compare", str(file)).returncode == 0
    found = json.loads(file.read_text(encoding="utf-8"))
    found["points"][0]["accuracy"] -= 0.016
    (tmp_path / "found.json").write_text(json.dumps(found), encoding="utf-8")
    done = run(name, "--compare", str(tmp_path / "found.json"))
    assert done.returncode == 1
    assert done.stdout.count("DIFFERS") == 1
    assert run("nothing").returncode == 2


def test_every_script_says_what_it_needs_and_what_it_was_run_on() -> None:
    scripts = sorted(LAUNCH.iterdir())
    names = "Dockerfile gke_jobset.yaml local.sh local_multiprocess.sh serve_kubernetes.yaml slurm.sbatch"
    names = names.replace("serve", "reproduce.sh serve") + " tpu_pod.sh"
    assert " ".join(path.name for path in scripts) == names
    for path in scripts:
        text = path.read_text(encoding="utf-8")
        assert "\n# needs " in text
        assert "\n# run on " in text
        if path.suffix == ".yaml":
            assert {x["kind"] for x in yaml.safe_load_all(text)} <= {"JobSet", "Deployment", "Service"}
        elif path.name == "Dockerfile":
            command = json.loads(text.rpartition("ENTRYPOINT ")[2])
            assert parse_arguments(command[1:]).backend == "onnxruntime"
        else:
            subprocess.run(["bash", "-n", str(path)], check=True)
            assert os.access(path, os.X_OK)

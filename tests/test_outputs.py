"""Outputs and standard streams as people have them: nothing is destroyed, lost or half written."""

import errno
import gc
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from trbert_jax.cli import main
from trbert_jax.errors import UserError
from trbert_jax.io import outputs, streams
from trbert_jax.io.outputs import atomic_directory, atomic_file

ROOT = Path(__file__).parents[1]


def mode_of(path: Path) -> str:
    return f"{stat.S_IMODE(path.stat().st_mode):o}"


# Inputs -------------------------------------------------------------------------------------------

EVALUATE = "evaluate --model mod --data d.jsonl"
TRAIN = "evaluate --all-checkpoints --config c.yaml"
# The path that is named, and commands that would destroy it or write two outputs into it.
REFUSED: dict[str, list[str]] = {
    "d.jsonl": [f"{EVALUATE} --predictions d.jsonl", f"{EVALUATE} --json ../here/./d.jsonl"],
    "link": [f"{EVALUATE} --json link", "predict --model mod --file d.jsonl --output link"],
    "hard": ["benchmark --model mod --data d.jsonl --plot hard", f"{EVALUATE} --json hard"],
    "mod/model.safetensors": [f"{EVALUATE} --predictions mod/model.safetensors"],
    "mod/vocab.txt": ["predict --model mod a --output mod/vocab.txt"],  # would become a file of the model
    "weights": [
        f"{EVALUATE} --json weights",
        "benchmark --replay mod --random tiny --data d.jsonl --json weights",
    ],
    "c.yaml": [f"{TRAIN} --json c.yaml"],
    "data/train.jsonl": [
        f"{TRAIN} --json data/train.jsonl",
        "benchmark --model mod --data data --json data/train.jsonl",
    ],
    "p.null_odds.json": [f"{EVALUATE} --predictions p.json --json p.null_odds.json"],
    "mod": [f"convert --input {name} --output mod --overwrite" for name in ("mod", "folder/")],
    "'new/'": [f"{EVALUATE} --json new/", "predict --model mod a --output new/"],
    "''": ["predict --model mod a --output ''"],
    "loop": ["predict --model mod a --output loop"],
}


@pytest.mark.parametrize(("named", "command"), [(n, c) for n, commands in REFUSED.items() for c in commands])
def test_no_output_destroys_an_input(
    named: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    folder = tmp_path / "here"
    for name in ("mod/config.json", "mod/model.safetensors", "data/train.jsonl", "d.jsonl", "c.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, encoding="utf-8")
    (folder / "c.yaml").write_text("workdir: work\ndata: {name: imdb, path: data}\nmodel: {init: mod}\n")
    (folder / "hard").hardlink_to(folder / "d.jsonl")
    links = {"link": "d.jsonl", "weights": "mod/model.safetensors", "folder": "mod", "loop": "loop"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert main(shlex.split(command)) == 2
    err = capsys.readouterr().err
    assert err.startswith("trbert: error: ")
    assert named in err
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()} == before


# Kinds of outputs ---------------------------------------------------------------------------------


def test_a_file_is_written_where_its_name_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "folder" / "target"
    (tmp_path / "link").symlink_to(target)  # that does not exist yet
    for content in ("first", "second"):
        with atomic_file(tmp_path / "link") as stream:
            stream.write(content)
        assert target.read_text() == content
    assert (tmp_path / "link").is_symlink()
    os.chmod(target, 0o640)
    with atomic_file(target):
        (partial,) = set(target.parent.iterdir()) - {target}
        assert mode_of(partial) == "640"  # nobody else reads it in the meantime
    assert mode_of(target) == "640"
    with atomic_file(target.with_name("é" * 127)) as stream:  # a name of 254 bytes
        stream.write("a")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the system lets root write anything
    with pytest.raises(UserError, match="no permission"), atomic_file(target):
        pass
    assert sorted(path.name for path in target.parent.iterdir()) == ["target", "é" * 127]


def test_pipes_and_devices_are_written_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    with atomic_file(tmp_path / "pipe") as stream:
        stream.write("a line")
    reader.join()
    assert got == ["a line"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    with (tmp_path / "file").open("w+") as file:
        file.write("head ")
        file.flush()
        with atomic_file(f"/dev/fd/{file.fileno()}") as stream:  # what `>(command)` gives, and /dev/stdout
            stream.write("and tail")
    assert (tmp_path / "file").read_text() == "head and tail"
    with atomic_file("/dev/null", "wb") as stream:
        stream.write(b"a")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    outputs.check_outputs(["/dev/null", "/dev/null"])


@pytest.mark.parametrize("mounted", [False, True])
def test_a_folder_is_written_where_its_name_leads(
    mounted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, link = tmp_path / "store", tmp_path / "link"
    (store / "old").mkdir(parents=True)
    (store / "lost+found").mkdir()
    (store / "weights").write_text("old")
    os.chmod(store / "weights", 0o600)
    os.chmod(store, 0o750)
    link.symlink_to("store")
    rename = os.replace

    def refusing(source: Any, target: Any) -> None:
        if mounted and Path(source) == store:
            raise OSError(errno.EBUSY, "busy")
        rename(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    with pytest.raises(ZeroDivisionError), atomic_directory(link):
        raise ZeroDivisionError
    assert (store / "weights").read_text() == "old"
    with atomic_directory(link) as temporary:
        (temporary / "weights").write_text("new")
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_text("a")
    assert link.is_symlink()
    kept = ["lost+found"] if mounted else []
    assert sorted(path.name for path in store.iterdir()) == ["inner", *kept, "weights"]
    assert (store / "weights").read_text() == "new"
    assert (mode_of(store), mode_of(store / "weights")) == ("750", "600")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "store"]


# Standard streams and signals: a fake plays the model ---------------------------------------------

TEXT = "é 日本 😀 \\"


def shell(tmp_path: Path, arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs `trbert` in a shell, with its redirections."""
    command = f"{sys.executable} tests/fake_trbert.py {arguments}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "W": str(tmp_path), **variables}
    return subprocess.run(["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("predict --model m a > /dev/full", 2, "standard output: "),
        ("--help > /dev/full", 2, "standard output: "),
        ("predict --model m a >&-", 2, "--output"),
        ("predict --model m <&-", 2, "standard input: "),
        ("predict --model m 0> $W/new", 2, "standard input: "),
        ("predict --model m a --output $W/out <&- >&- 2>&-", 0, ""),
        ("predict --model m a --output $W/out 2> /dev/full", 0, ""),
        ("predict --model m --output $W/t < $W/t", 2, "standard input"),
        ("predict --model m --file $W/t >> $W/t", 2, "standard output"),
    ],
)
def test_standard_streams(arguments: str, code: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_text("text\n", encoding="utf-8")
    for unbuffered in ("", "1") if "full" in arguments else ("",):
        done = shell(tmp_path, arguments, PYTHONUNBUFFERED=unbuffered)
        assert done.returncode == code
        assert done.stderr.count("\n") == (1 if said else 0)
        assert said in done.stderr
        assert (tmp_path / "t").read_text(encoding="utf-8") == "text\n"
    if code == 0:
        assert json.loads((tmp_path / "out").read_text(encoding="utf-8"))["label"] == "gut"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_json_keeps_its_value_in_any_encoding(encoding: str, tmp_path: Path) -> None:
    arguments = f"predict --model m --with-text {shlex.quote(TEXT)} > $W/out"
    assert shell(tmp_path, arguments, PYTHONIOENCODING=encoding).returncode == 0
    assert json.loads((tmp_path / "out").read_text(encoding=encoding))["text"] == TEXT


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT, signal.SIGINT], [signal.SIGHUP]])
def test_a_signal_leaves_nothing_partial(numbers: list[signal.Signals], tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("text\n" * 10**6, encoding="utf-8")
    command: list[Any] = [sys.executable, "tests/fake_trbert.py", "predict", "--model", "m", "--file"]
    command += [tmp_path / "t.txt", "--output", tmp_path / "out"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 30
        while len(os.listdir(tmp_path)) == 1 and time.monotonic() < end:
            time.sleep(0.01)
        assert len(os.listdir(tmp_path)) == 2
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.02)
        # The second may come when all is done; to a shell both are the same.
        assert process.wait(timeout=60) in (128 + numbers[0], -numbers[-1])
        assert process.stderr
        assert process.stderr.read().count("\n") == 1
    assert os.listdir(tmp_path) == ["t.txt"]


# Environment --------------------------------------------------------------------------------------

OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:34911"}
JOIN = "train --config configs/quickstart.yaml --distributed --join-timeout 20"


@pytest.mark.parametrize(
    ("arguments", "variables", "said"),
    [
        (JOIN, OPEN_MPI, "OMPI_COMM_WORLD_SIZE"),
        (JOIN, {"OMPI_MCA_orte_hnp_uri": "none"}, "Open MPI"),
        (JOIN, {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "first"}, "'first'"),
        ("train --config configs/quickstart.yaml", {"JAX_DEFAULT_PRNG_IMPL": "dice"}, "dice"),
    ],
)
def test_odd_variables_are_named(
    arguments: str, variables: dict[str, str], said: str, tmp_path: Path
) -> None:
    done = shell(tmp_path, arguments, **variables)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_signal_lost_in_a_callback_is_raised_again() -> None:
    """Python drops exceptions of callbacks of its garbage collector, and jax has one."""
    seen = list[str]()

    def callback(phase: str, _: object) -> None:
        if not seen:
            seen.append("lost")
            signal.raise_signal(signal.SIGINT)

    def command() -> None:
        with streams.signals(ended_by_sigterm=False, last=False):
            gc.collect()
            seen.append("going on")
            time.sleep(5)

    gc.callbacks.append(callback)
    try:
        with pytest.raises(KeyboardInterrupt):
            command()
    finally:
        gc.callbacks.remove(callback)
    assert seen == ["lost", "going on"]

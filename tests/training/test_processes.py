"""Several processes that train together: what they must agree on, and how they end together."""

import json
import socket
from pathlib import Path

import tiny_runs
from tiny_processes import TESTS, Ended, finish, free_port, start, start_together, train


def test_what_processes_tell_each_other(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    config, port = tiny_runs.write_config(tmp_path), free_port()
    workdir, data = str(tmp_path / "work"), {"path": str(tmp_path / "data")}
    other = tiny_runs.write_config(tmp_path / "other", workdir=workdir, data=data, seed=99)
    program = str(TESTS / "training" / "process_checks.py")
    processes = [start([program, str(port), str(i), str(config), str(other)], 2) for i in range(2)]
    ended = finish(processes)
    assert [code for code, _, _ in ended] == [0, 0], ended
    first, second = (json.loads(out.splitlines()[-1]) for _, out, _ in ended)
    prefix = "UserError: in process 0: "
    assert (first.pop("user"), second.pop("user")) == ("UserError: no räum left", f"{prefix}no räum left")
    assert first.pop("other") == "ValueError: what is that"
    assert second.pop("other") == f"{prefix}ValueError: what is that"
    assert len(first.pop("long")) > len(second.pop("long")) > 4000
    assert first.pop("one fails") == "UserError: in process 1: no file"
    assert second.pop("one fails") == "UserError: no file"
    for found in (first, second):  # only process 0 looks at the directory; the other is not left waiting
        owner = found.pop("owner")
        assert str(tmp_path / "work") in owner
        assert "seed: 3 -> 99" in owner
        assert "process 1 of 2" in found.pop("apart")
    assert first == second
    assert first["fine"] == first["same"] == first["inputs"] == "done"
    for what in ("stages", "configuration", "parameters", "dev"):
        assert "1 of 2 differ from process 0" in first[what]
        assert what in first[what].partition("differ")[0]
    assert not list((tmp_path / "work").glob(".seen*"))


def test_processes_that_read_different_data_end_before_the_first_step(tmp_path: Path) -> None:
    """As if one machine had an older copy: equal settings, one label changed."""
    folders = [tmp_path / "0", tmp_path / "1"]
    for folder in folders:
        tiny_runs.write_dataset(folder / "data")
    file = folders[1] / "data" / "train.jsonl"
    first, rest = file.read_text(encoding="utf-8").split("\n", 1)
    record = json.loads(first)
    file.write_text(json.dumps(record | {"label": 1 - record["label"]}) + "\n" + rest, encoding="utf-8")
    data, model = {"name": "imdb", "path": "data"}, tiny_runs.ONE_LAYER
    config = tiny_runs.write_config(tmp_path, data=data, model=model, stages=["finetune"])
    outputs = finish(start_together(config, folders))
    assert [code for code, _, _ in outputs] == [2, 2], outputs
    for _, _, err in outputs:
        assert "1 of 2 differ from process 0" in err
    assert not (tmp_path / "work" / "finetune" / "checkpoints").exists()


def test_a_coordinator_that_is_not_there(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    arguments = (f"--coordinator={address}", "--num-processes=2", "--process-id=1", "--join-timeout=1")
    code, _, err = train(tiny_runs.write_config(tmp_path), 1, *arguments)
    assert code == 2
    assert address in err
    assert "Traceback" not in err


def join(number: int, port: int) -> Ended:
    """One of two processes, which does not wait long for the other."""
    code = (
        "from trbert_jax.parallel import join; from trbert_jax.errors import UserError\n"
        f"try: join('127.0.0.1:{port}', 2, {number}, 2)\nexcept UserError as error: exit(str(error))"
    )
    return finish([start(["-c", code], 1)], timeout=60)[0]


def test_a_process_whose_peer_never_comes() -> None:
    port = free_port()
    code, _, err = join(0, port)
    assert code == 2
    assert f"process 0 of 2 could not join at 127.0.0.1:{port} within 2 s" in err
    assert "stack trace" not in err


def test_an_address_where_something_else_listens() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        (code, _, err), (_, _, taken) = join(1, port), join(0, port)
    assert code == 2
    assert f"process 1 of 2 could not join at 127.0.0.1:{port} within 2 s" in err
    assert "stack trace" not in err
    assert f"process 0 of 2 cannot join at 127.0.0.1:{port}" in taken
    assert "Address already in use" in taken

"""A model goes to a hub and comes back: against a stand-in for the Hugging Face hub on this machine."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tiny_models
import yaml

from trbert_jax.cli import main
from trbert_jax.model.card import model_card, with_numbers
from trbert_jax.model.config import model_config_from_dict, model_config_to_dict
from trbert_jax.model.operating_points import Evaluation

NUMBERS = Evaluation(
    data="imdb", split="test", examples=25, metric="accuracy", dense=0.75, reduced=0.7, speedup=3.5
)
CONFIG = dataclasses.replace(tiny_models.BERT, evaluation=NUMBERS, operating_points=(tiny_models.POINT,))
SHA = "0" * 40
TASK = """
import os
import sys
from trbert_jax import TRBert
from trbert_jax.cli import main
model = TRBert.from_pretrained(sys.argv[1])
assert model.push_to_hub("ann/film", license="apache-2.0").endswith("/ann/film")
again = TRBert.from_pretrained("ann/film")
assert again.config == model.config
(one,), (other,) = (x.predict(["the film was good"]) for x in (model, again))
assert one.logits.tobytes() == other.logits.tobytes()
command = ["push", "--model", sys.argv[1], "--repo", "ann/film", "--private", "--license", "apache-2.0"]
assert main(command) == 0
os.environ["HF_TOKEN"] = "hf_wrong"
sys.exit(main(command))
"""


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as uploading small files and downloading them takes."""

    files: dict[str, bytes]
    private: list[bool]

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://{self.headers['Host']}/ann/film"
        if self.headers["Authorization"] != "Bearer hf_right":
            self._answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.private.append(b"private" in body)
            self._answer({"url": url})
        elif self.path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            self._answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = [
                {"path": x["path"], "uploadMode": "regular", "shouldIgnore": False}
                for x in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._answer({"success": True, "commitOid": SHA, "commitUrl": f"{url}/commit/{SHA}"})

    def do_GET(self) -> None:
        if self.path.startswith("/api/"):
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
            siblings = [{"rfilename": name} for name in self.files]
            whole = {"id": "ann/film", "sha": SHA, "siblings": siblings}
            self._answer(tree if "/tree/" in self.path else whole)
            return
        content = self.files[self.path.rpartition("/")[2]]
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[tuple[type[Hub], dict[str, str]]]:
    handler = type("Handler", (Hub,), {"files": {}, "private": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield (
        handler,
        {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"},
    )
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_goes_up_and_comes_down(hub: tuple[type[Hub], dict[str, str]], tmp_path: Path) -> None:
    handler, address = hub
    folder = tiny_models.tiny_model(tmp_path / "model", CONFIG)
    environment = {**os.environ, **address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_right"}
    done = subprocess.run(
        [sys.executable, "-c", TASK, str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "/ann/film" in done.stdout
    assert "hf auth login" in done.stderr
    assert {"config.json", "model.safetensors", "README.md"} < handler.files.keys()
    card = handler.files["README.md"].decode()
    assert "license: apache-2.0" in card
    assert 'TRBert.from_pretrained("ann/film")' in card
    assert handler.private == [False, True]
    nowhere = {**environment, "HF_ENDPOINT": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "trbert_jax", "push", "--repo", "ann/film", "--model", str(folder)]
    gone = subprocess.run(command, env=nowhere, capture_output=True, text=True)
    assert gone.returncode == 2
    assert "no connection to the Hugging Face hub" in gone.stderr
    assert "Traceback" not in done.stderr + gone.stderr


def test_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_models.tiny_model(tmp_path / "model", CONFIG)
    card = (folder / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "trbert_jax"
    assert front["pipeline_tag"] == "text-classification"
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.7
    for words in ("| reduced | 0.7 | 3.50x |", "| 2x | 0.3, 0.6 | 2.00x |", "25 examples of imdb, test"):
        assert words in card
    # Text that an owner writes around the numbers stays.
    point = dataclasses.replace(tiny_models.POINT, name="4x")
    new = dataclasses.replace(CONFIG, operating_points=(point,))
    assert with_numbers(card + "Mine.", new) == model_card(new) + "Mine."
    assert with_numbers("Mine.", new) == "Mine."
    # The numbers are part of the settings.
    values = json.loads(json.dumps(model_config_to_dict(CONFIG)))
    assert model_config_from_dict(values) == CONFIG
    tiny_models.edit_json(folder / "config.json", trbert={**values["trbert"], "evaluation": {"data": 1}})
    assert main(["predict", "--model", str(folder), "a"]) == 2
    assert "trbert.evaluation is {'data': 1}; expected an object with data, split" in capsys.readouterr().err


def test_bad_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_models.tiny_model(tmp_path / "model")
    assert main(["push", "--model", str(folder), "--repo", "a/b/c"]) == 2
    assert "'a/b/c' is no name on the hub; expected OWNER/NAME" in capsys.readouterr().err

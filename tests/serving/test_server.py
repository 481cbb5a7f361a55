"""`trbert serve`, asked over the network: answers, errors, limits and the end."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from tiny_qa import VOCABULARY, qa_tokenizer

from trbert_jax import TRBert
from trbert_jax.inference.questions import answer_questions
from trbert_jax.model.config import InputConfig
from trbert_jax.model.pretrained import save_pretrained
from trbert_jax.serving.server import guarded_app
from trbert_jax.serving.service import Limits

TEXTS = ["the plot was not dull.", "good!", "a very bad film", ""]
JSON = {"content-type": "application/json"}
MODEL = dataclasses.replace(tiny_models.BERT, labels=("bad", "good"))


class Server:
    """A server in a process of its own."""

    def __init__(self, *options: str) -> None:
        command = [sys.executable, "-m", "trbert_jax", "serve", "--port", "0", "--backend", "onnxruntime"]
        self.process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        self.lines = [self.process.stderr.readline()]
        found = re.search(r"http://127.0.0.1:(\d+) ", self.lines[0])
        assert found, self.lines + self.process.stderr.readlines()
        self.port = int(found[1])
        self.reader = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or ()))
        self.reader.start()
        while self.get("/health")[0] != 200:
            time.sleep(0.05)

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(self, method: str, path: str, body: Any = None, headers: Any = JSON) -> tuple[int, Any]:
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            text = response.read().decode()
        is_json = response.getheader("content-type", "").startswith("application/json")
        return response.status, json.loads(text) if is_json else text

    def get(self, path: str) -> tuple[int, Any]:
        return self.ask("GET", path)

    def post(self, path: str, value: Any) -> tuple[int, Any]:
        return self.ask("POST", path, json.dumps(value))

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines[1:] if line.startswith("{")]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> int:
        code = self.process.wait(20)
        self.reader.join()
        assert self.process.stderr
        self.process.stderr.close()
        return code


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_model(tmp_path_factory.mktemp("serving") / "model", MODEL)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    server = Server("--model", str(folder), "--timeout", "2", "--name", "film")
    yield server
    if server.process.poll() is None:
        server.stop()


@pytest.fixture(scope="module")
def model(folder: Path) -> TRBert:
    return TRBert.from_pretrained(folder, backend="onnxruntime")


def test_predict_as_text_embeddings_inference(server: Server, model: TRBert) -> None:
    status, found = server.post("/predict", {"inputs": TEXTS})
    assert status == 200
    for answer, prediction in zip(found, model.predict(TEXTS), strict=True):
        scores = {x["label"]: x["score"] for x in answer}
        assert answer[0]["label"] == prediction.label
        np.testing.assert_allclose([scores["bad"], scores["good"]], prediction.scores, atol=1e-6)
    assert server.post("/predict", {"inputs": TEXTS[0]}) == (200, found[0])
    assert server.post("/predict", {"inputs": [[text] for text in TEXTS]}) == (200, found)
    raw = server.post("/predict", {"inputs": TEXTS[0], "raw_scores": True})[1]
    assert raw[0]["score"] == pytest.approx(float(model.predict(TEXTS[:1])[0].logits.max()), abs=1e-5)
    assert server.post("/predict", {"inputs": []}) == (200, [])


def test_details_and_thresholds(server: Server, model: TRBert) -> None:
    for threshold in (0.4, (0.5, 0.6)):
        body = {"inputs": TEXTS, "details": True, "threshold": threshold}
        found = server.post("/predict", body)[1]
        expected = model.predict(TEXTS, threshold=threshold)
        kept = [[positions.tolist() for positions in prediction.kept] for prediction in expected]
        assert [answer["kept"] for answer in found] == kept
        assert {*found[0]} == {"label", "label_id", "scores", "kept", "num_tokens", "truncated"}


def test_open_inference_protocol(server: Server, model: TRBert) -> None:
    text = {"name": "text", "shape": [len(TEXTS)], "datatype": "BYTES", "data": TEXTS}
    status, found = server.post("/v2/models/film/infer", {"id": "7", "inputs": [text]})
    assert (status, found["id"], found["model_name"]) == (200, "7", "film")
    outputs = {x["name"]: x for x in found["outputs"]}
    described = server.get("/v2/models/film")[1]
    assert [x["name"] for x in described["outputs"]] == [*outputs]
    predictions = model.predict(TEXTS)
    assert outputs["label"]["data"] == [x.label for x in predictions]
    scores = np.reshape(outputs["scores"]["data"], outputs["scores"]["shape"])
    np.testing.assert_allclose(scores, [x.scores for x in predictions], atol=1e-6)
    assert outputs["num_kept"]["data"] == [len(kept) for x in predictions for kept in x.kept]
    assert server.get("/v2/health/live")[0] == server.get("/v2/models/film/ready")[0] == 200
    assert server.get("/v2")[1]["name"] == "trbert"


def test_many_clients_get_the_answers_they_would_get_alone(server: Server, model: TRBert) -> None:
    words = tiny_models.VOCABULARY[5:20]
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(words, rng.integers(1, 16))) for _ in range(200)]
    alone = [model.predict([text])[0] for text in texts]
    answers: dict[int, Any] = {}

    def client(numbers: range) -> None:
        for number in numbers:
            body = {"inputs": texts[number], "details": True}
            answers[number] = server.post("/predict", body)[1]

    clients = [threading.Thread(target=client, args=(range(k, 200, 20),)) for k in range(20)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    for number, prediction in enumerate(alone):
        assert answers[number]["kept"] == [kept.tolist() for kept in prediction.kept]
        scores = [*answers[number]["scores"].values()]
        np.testing.assert_allclose(scores, prediction.scores, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ('{"inputs": ', 400, "JSON"),
        ("[" * 100_000, 400, "body"),
        ("\xff", 400, "body"),
        ('{"inputs": 5}', 422, "inputs"),
        ('{"texts": "a"}', 422, "inputs"),
        ('{"inputs": "a", "treshold": 1}', 422, "treshold"),
        ('{"inputs": [["a", "b", "c"]]}', 422, "pair"),
        ('{"inputs": {"question": "a"}}', 422, "takes texts"),
        ('{"inputs": "\\ud800"}', 422, "texts"),
        ('{"inputs": "a", "operating_point": "9x"}', 422, "9x"),
        ('{"inputs": "a", "threshold": 2}', 422, "threshold"),
        (json.dumps({"inputs": ["a"] * 129}), 413, "128"),
        (json.dumps({"inputs": "very " * 30, "truncate": False}), 422, "longer"),
        (json.dumps({"inputs": "a" * (1 << 20)}), 413, "bytes"),
    ],
)
def test_bad_requests(server: Server, body: str, status: int, words: str) -> None:
    found, answer = server.ask("POST", "/predict", body.encode("latin-1"))
    assert found == status, answer
    assert words in answer["error"]
    assert answer["error_type"] in ("validation", "request")


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("GET", "/predict", JSON, 405),
        ("GET", "/../../etc/passwd", JSON, 404),
        ("GET", "/%2e%2e/%2e%2e/etc/passwd", JSON, 404),
        ("POST", "/v2/models/other/infer", JSON, 404),
        ("POST", "/predict", {"content-type": "text/plain"}, 415),
        ("POST", "/predict", {}, 415),
    ],
)
def test_other_requests(server: Server, method: str, path: str, headers: Any, status: int) -> None:
    assert server.ask(method, path, '{"inputs": "a"}', headers)[0] == status


def test_bad_tensors(server: Server) -> None:
    text = {"name": "text", "shape": [2], "datatype": "BYTES", "data": ["a"]}
    for change, words in (({}, "shape"), ({"name": "texts"}, "texts"), ({"data": [1, 2]}, "texts")):
        status, answer = server.post("/v2/models/film/infer", {"inputs": [{**text, **change}]})
        assert status == 422
        assert words in answer["error"]


def test_bad_clients(server: Server) -> None:
    """Slow, silent and leaving ones, and a body that is too long; others are served meanwhile."""
    head = b"POST /predict HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
    slow = socket.create_connection(("127.0.0.1", server.port))
    slow.sendall(head + b'content-length: 100\r\n\r\n{"inputs"')
    leaving = socket.create_connection(("127.0.0.1", server.port))
    leaving.sendall(head + b'content-length: 15\r\n\r\n{"inputs": "a"}')
    leaving.close()
    broken = socket.create_connection(("127.0.0.1", server.port))
    broken.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 no HTTP\r\n\r\n")
    endless = socket.create_connection(("127.0.0.1", server.port))
    endless.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
    chunk = b"10000\r\n" + b"a" * 0x10000 + b"\r\n"
    for _ in range(17):
        endless.sendall(chunk)
    assert b" 413 " in endless.recv(100)
    assert server.post("/predict", {"inputs": "a"})[0] == 200
    assert b" 400 " in broken.recv(100)
    assert b" 408 " in slow.recv(100)
    for client in (*idle, slow, broken, endless):
        client.close()
    assert server.get("/health")[0] == 200


def test_metrics(server: Server) -> None:
    def read() -> dict[str, float]:
        lines = [line.rsplit(" ", 1) for line in server.get("/metrics")[1].splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in lines}

    before = read()
    server.post("/predict", {"inputs": TEXTS})
    after = read()
    name = 'trbert_requests_total{code="200",path="/predict"}'
    assert after[name] == before.get(name, 0) + 1
    assert after["trbert_batch_inputs_sum"] == before["trbert_batch_inputs_sum"] + len(TEXTS)
    assert after['trbert_flops_total{kind="computed"}'] < after['trbert_flops_total{kind="dense"}']
    assert 0 < after['trbert_kept_tokens_total{point="1"}'] < after["trbert_tokens_total"]
    assert after["trbert_waiting_inputs"] == 0


def test_openapi(server: Server) -> None:
    paths = server.get("/openapi.json")[1]["paths"]
    assert {"/predict", "/v2/models/film/infer", "/health", "/metrics", "/info"} <= {*paths}
    assert server.get("/docs")[0] == 200
    assert server.get("/info")[1]["labels"] == ["bad", "good"]


def test_sigterm_answers_what_was_asked(folder: Path) -> None:
    server = Server("--model", str(folder))
    connection = server.connect()
    connection.putrequest("POST", "/predict")
    connection.putheader("content-type", "application/json")
    connection.putheader("content-length", "20")
    connection.putheader("x-request-id", "mine")
    connection.endheaders(b'{"inputs": "a ')
    time.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    with pytest.raises(OSError):  # noqa: PT011 - refused, or reset
        server.get("/health")
    connection.send(b'film"}')
    response = connection.getresponse()
    assert (response.status, response.getheader("x-request-id")) == (200, "mine")
    connection.close()
    assert server.ended() == 0
    events = server.events()
    requests = [event for event in events if event["event"] == "request"]
    assert [(x["id"], x["path"], x["status"]) for x in requests] == [("mine", "/predict", 200)]
    assert events[-1]["event"] == "stopped"
    assert "film" not in "".join(server.lines[1:])  # no text in the log


def test_address_in_use(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        command = [sys.executable, "-m", "trbert_jax", "serve", "--model", str(folder), "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr


def test_questions(tmp_path: Path) -> None:
    sizes: Any = {"num_layers": 2, "hidden_size": 8, "max_positions": 64, "max_length": 64}
    inputs = InputConfig(data="squad")
    kind: Any = {"task": "span", "labels": (), "inputs": inputs, "vocab_size": len(VOCABULARY)}
    config = dataclasses.replace(tiny_models.BERT, **sizes, **kind)
    save_pretrained(tmp_path, config, tiny_models.tiny_params(config), qa_tokenizer())
    context = "the king was born in paris . the queen was not"
    questions = [{"question": f"who {word} ?", "context": context, "id": "same"} for word in ("was", "is")]
    server = Server("--model", str(tmp_path))
    try:
        status, found = server.post("/predict", {"inputs": questions})
        model = TRBert.from_pretrained(tmp_path, backend="onnxruntime")
        for answer, question in zip(found, questions, strict=True):
            expected = answer_questions(model, [question])[0]
            assert (status, answer.pop("score")) == (200, pytest.approx(expected.pop("score"), abs=1e-5))
            assert answer == expected
        data = [json.dumps(question) for question in questions]
        tensor = {"name": "question", "shape": [2], "datatype": "BYTES", "data": data}
        outputs = server.post("/v2/models/model/infer", {"inputs": [tensor]})[1]["outputs"]
        assert outputs[0]["data"] == [answer["answer"] for answer in found]
        assert server.post("/predict", {"inputs": "a text"})[0] == 422
        status, answer = server.post("/predict", {"inputs": {"question": "who ?"}})
        assert (status, "context" in answer["error"]) == (422, True)
    finally:
        server.stop()


def test_overload_timeout_and_failure(model: TRBert, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks the application itself, with a model that waits."""
    may_run, predict = threading.Event(), model.predict

    def waiting(texts: list[str], **options: Any) -> Any:
        assert may_run.wait(20)
        if "fail" in texts:
            raise ZeroDivisionError
        return predict(texts, **options)

    monkeypatch.setattr(model, "predict", waiting)

    async def ask(app: Any, text: str, leave: bool = False) -> tuple[int, dict[bytes, bytes], Any]:
        body = json.dumps({"inputs": [text, text]}).encode()
        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "root_path": ""}
        scope |= {"headers": [(b"content-type", b"application/json")], "http_version": "1.1"}
        received, sent = [{"type": "http.request", "body": body}], list[Any]()

        async def receive() -> Any:
            if received:
                return received.pop()
            await asyncio.sleep(0 if leave else 60)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"]), json.loads(sent[1]["body"])

    async def main() -> None:
        limits = Limits(waiting=4, timeout=0.5)
        app = guarded_app(model, "model", {"backend": "onnxruntime"}, limits, failed=lambda _: None)
        async with app.router.lifespan_context(app):
            while (first := await ask(app, "a"))[0] == 503:  # until it is ready
                await asyncio.sleep(0.01)
            assert first[0] == 504  # taken by the model, which is busy from now on
            assert (await ask(app, "b", leave=True))[0] == 499
            jobs = [asyncio.ensure_future(ask(app, text)) for text in "cde"]
            refused = await jobs[2]
            assert (refused[0], int(refused[1][b"retry-after"]) >= 1) == (429, True)
            may_run.set()
            assert [(await job)[0] for job in jobs[:2]] == [200, 200]
            status, _, answer = await ask(app, "fail")
            assert (status, answer["error_type"]) == (500, "backend")
            assert (await ask(app, "f"))[0] == 200

    asyncio.run(main())

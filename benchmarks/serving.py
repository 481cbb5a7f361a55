"""Loads `trbert serve` over the network and checks each of its answers.

    python benchmarks/serving.py --model runs/imdb/model --data test.jsonl --backend onnxruntime \
        --json benchmarks/serving.json

The server is a process of its own on this machine. First, clients that always ask again find its maximum;
then texts arrive at random (a Poisson process) at shares of the maximum, whether or not the server keeps up,
and latency counts from the moment they were due. At twice the maximum all that is not answered must be
refused with 429. In the end SIGTERM must let it finish what it has. Every answer is compared with that of
the text alone: the same label and tokens, and scores within `TOLERANCE`.
"""

import argparse
import asyncio
import dataclasses
import json
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.datasets import BadRecords
from trbert_jax.inference.benchmark_report import machine
from trbert_jax.inference.evaluate import read_examples
from trbert_jax.inference.lines import prediction_record
from trbert_jax.inference.predictor import TRBert
from trbert_jax.io import write_json

CLIENTS = 64  # that look for the maximum
SHARES = (0.5, 0.8, 0.95)  # of the maximum, at which texts arrive
OVERLOAD = 2.0
TOLERANCE = 1e-4  # of a score: the rounding of other shapes
PERCENTILES = (50, 95, 99)


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer for a text."""

    text: int  # its number
    due: float  # seconds
    done: float
    status: int  # 0: the connection failed
    body: Any


class Clients:
    """Connections to a server, kept open and used in turn."""

    def __init__(self, port: int, texts: Sequence[str]) -> None:
        self._port, self._idle = port, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]()
        self._requests = [self._request(text) for text in texts]

    @staticmethod
    def _request(text: str) -> bytes:
        body = json.dumps({"inputs": text, "details": True}).encode()
        lines = ["POST /predict HTTP/1.1", "host: localhost", "content-type: application/json"]
        head = "\r\n".join([*lines, f"content-length: {len(body)}", "", ""])
        return head.encode() + body

    async def ask(self, text: int, due: float) -> Answer:
        """Asks for a text."""
        status, body = 0, None
        try:
            reader, writer = self._idle.pop() if self._idle else await self._connect()
            writer.write(self._requests[text])
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head.split(b" ", 2)[1])
            length = re.search(rb"content-length: (\d+)", head)
            body = json.loads(await reader.readexactly(int(length[1]) if length else 0))
            self._idle.append((reader, writer))
        except (OSError, asyncio.IncompleteReadError):
            pass
        return Answer(text, due, time.perf_counter(), status, body)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self._port)

    def close(self) -> None:
        """Closes all connections."""
        for _, writer in self._idle:
            writer.close()


async def busy(port: int, texts: Sequence[str], seconds: float) -> list[Answer]:
    """Asks with clients that always ask again."""
    clients, end, found = Clients(port, texts), time.perf_counter() + seconds, list[Answer]()

    async def client(number: int) -> None:
        while (now := time.perf_counter()) < end:
            number = (number + CLIENTS) % len(texts)
            found.append(await clients.ask(number, now))

    await asyncio.gather(*map(client, range(CLIENTS)))
    clients.close()
    return found


async def arriving(port: int, texts: Sequence[str], rate: float, seconds: float) -> list[Answer]:
    """Asks at random moments, `rate` a second."""
    rng, clients = np.random.default_rng(0), Clients(port, texts)
    dues = np.cumsum(rng.exponential(1 / rate, round(1.5 * rate * seconds) + 10))
    numbers = rng.integers(0, len(texts), len(dues))
    start, jobs = time.perf_counter(), list[asyncio.Task[Answer]]()
    for due, number in zip(dues[dues < seconds], numbers, strict=False):
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        jobs.append(asyncio.ensure_future(clients.ask(int(number), start + due)))
    found = await asyncio.gather(*jobs)
    clients.close()
    return found


def memory(process: int) -> float:
    """Returns the resident memory of a process in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def wrong(answers: Sequence[Answer], alone: Sequence[dict[str, Any]]) -> int:
    """Counts answers that differ from those of the texts alone."""
    count = 0
    for answer in answers:
        if answer.status == 200:
            expected = alone[answer.text]
            same = all(answer.body[key] == expected[key] for key in ("label", "kept", "num_tokens"))
            pairs = zip(answer.body["scores"].values(), expected["scores"].values(), strict=True)
            count += not (same and all(abs(x - y) <= TOLERANCE for x, y in pairs))
    return count


def described(answers: Sequence[Answer], alone: Sequence[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Returns the numbers of one load; latencies in ms, of the texts that were answered."""
    accepted = [answer for answer in answers if answer.status == 200]
    latency = np.array([1000 * (answer.done - answer.due) for answer in accepted])
    times = {f"p{x}_ms": float(np.percentile(latency, x)) for x in PERCENTILES} if accepted else {}
    last = max((answer.done for answer in answers), default=0) - min((x.due for x in answers), default=0)
    return {
        "asked": len(answers),
        "answered_per_second": len(accepted) / max(last, seconds),
        "statuses": {str(k): n for k, n in sorted(Counter(x.status for x in answers).items())},
        "wrong": wrong(answers, alone),
        **times,
    }


class Server:
    """A server in a process of its own."""

    def __init__(self, options: Sequence[str]) -> None:
        self.command = [sys.executable, "-m", "trbert_jax", "serve", "--port", "0", *options]
        self._log = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115 - until `close`
        self.process = subprocess.Popen(self.command, stderr=self._log)
        ready = re.compile(r"http://127.0.0.1:(\d+) .*\"ready\"", re.DOTALL)
        while not (found := ready.search(self._read())):
            if self.process.poll() is not None:
                sys.exit(self._read())
            time.sleep(0.1)
        self.port = int(found[1])

    def _read(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8")

    async def end_while_asked(self, texts: Sequence[str]) -> tuple[int, list[Answer]]:
        """Sends SIGTERM while it has requests; returns its exit code and their answers."""
        clients = Clients(self.port, texts)
        jobs = [asyncio.ensure_future(clients.ask(i % len(texts), time.perf_counter())) for i in range(100)]
        await asyncio.sleep(0.5)
        self.process.send_signal(signal.SIGTERM)
        found = await asyncio.gather(*jobs)
        return self.process.wait(60), found

    def close(self) -> None:
        """Ends the process, if it runs, and removes its log."""
        self.process.kill()
        self.process.wait()
        self._log.close()


def offline(model: TRBert, texts: list[str], repeats: int, **options: Any) -> float:
    """Returns the texts a second of `TRBert.predict`, the best of some repeats."""
    model.predict(texts, **options)
    seconds = list[float]()
    for _ in range(repeats):
        start = time.perf_counter()
        model.predict(texts, **options)
        seconds.append(time.perf_counter() - start)
    return len(texts) / min(seconds)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs all loads and returns their numbers."""
    backend = args.backend
    model = TRBert.from_pretrained(args.model, backend=backend, max_length=args.max_length)
    options = {"backend": backend, "operating_point": args.operating_point}
    records = read_examples(model, args.data, BadRecords()).records
    texts = [record.text for record in records[: args.max_texts]]
    alone = [prediction_record(model.predict([text], **options)[0], model.config.labels) for text in texts]
    result: dict[str, Any] = {"command": shlex.join(["python", "benchmarks/serving.py", *sys.argv[1:]])}
    result |= {"machine": machine(), "texts": len(texts), "tokens": np.mean([x["num_tokens"] for x in alone])}
    result["offline_per_second"] = offline(model, texts, args.repeats, **options)
    given = ["--model", str(args.model), "--backend", backend, "--max-waiting", str(args.max_waiting)]
    given += ["--operating-point", args.operating_point] if args.operating_point else []
    given += ["--max-length", str(args.max_length)] if args.max_length else []
    server = Server(given)
    try:
        asyncio.run(busy(server.port, texts, min(args.seconds, 10)))  # warms up
        found = described(asyncio.run(busy(server.port, texts, args.seconds)), alone, args.seconds)
        result["maximum"], most = found, found["answered_per_second"]
        for share in SHARES:
            print(f"{share:.0%} of {most:.0f} texts a second", file=sys.stderr)
            answers = asyncio.run(arriving(server.port, texts, share * most, args.seconds))
            result[f"load_{share:g}"] = described(answers, alone, args.seconds)
        before, parts = memory(server.process.pid), list[dict[str, Any]]()
        for _ in range(args.overload_parts):
            answers = asyncio.run(arriving(server.port, texts, OVERLOAD * most, args.overload_seconds))
            part = described(answers, alone, args.overload_seconds)
            parts.append({**part, "memory_mib": memory(server.process.pid)})
            print(f"overload: {parts[-1]}", file=sys.stderr)
        about = {"seconds_each": args.overload_seconds, "memory_before_mib": before}
        result["overload"] = {**about, "parts": parts}
        code, answers = asyncio.run(server.end_while_asked(texts))
        statuses = Counter(str(answer.status) for answer in answers)
        result["sigterm"] = {"exit_code": code, "statuses": dict(statuses), "wrong": wrong(answers, alone)}
    finally:
        server.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="folder that labels texts")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="labeled texts")
    parser.add_argument("--backend", default="packed", help="as of trbert serve")
    parser.add_argument("--operating-point", metavar="NAME")
    parser.add_argument("--max-length", type=int, metavar="N")
    parser.add_argument("--max-texts", type=int, default=256, metavar="N")
    parser.add_argument("--max-waiting", type=int, default=64, metavar="N", help="as of trbert serve")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of offline prediction")
    parser.add_argument("--seconds", type=float, default=60, help="of each load")
    parser.add_argument("--overload-seconds", type=float, default=60, help="of each part of the overload")
    parser.add_argument("--overload-parts", type=int, default=10, metavar="N")
    parser.add_argument("--json", required=True, type=Path, metavar="FILE", help="where to write the numbers")
    args = parser.parse_args()
    write_json(args.json, measure(args))


if __name__ == "__main__":
    main()

"""Answer requests: texts to label, or questions.

Requests of all clients share batches (`serving.batching`); an answer does not depend on the others.
Source: docs/serving.md.
"""

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import prometheus_client as prometheus
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from trbert_jax import __version__
from trbert_jax.errors import UserError
from trbert_jax.inference.lines import prediction_record
from trbert_jax.inference.predictor import Prediction, TRBert, check_texts
from trbert_jax.model.config import ModelConfig
from trbert_jax.reduction import flops
from trbert_jax.reduction.rules import DEFAULT_THRESHOLD, Threshold
from trbert_jax.serving import open_inference
from trbert_jax.serving.batching import Batcher

logger = logging.getLogger(__name__)

BATCH_SIZE = 32  # texts of a forward pass
_CHARACTERS = 4  # of a token, to estimate the size of a batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that a server takes."""

    batch_tokens: int = 8192  # of a batch
    waiting: int = 512  # texts that wait for a batch; more get 429
    texts: int = 128  # of a request; more get 413
    body: int = 1 << 20  # bytes of a request; more get 413
    timeout: float = 30.0  # seconds to receive a request (408), and to answer it (504)


# Requests and metrics ------------------------------------------------------------------------------

Question = dict[str, Any]


class PredictRequest(BaseModel):
    """Texts to label, or questions to answer."""

    model_config = ConfigDict(extra="forbid")

    inputs: Annotated[
        str | list[str] | list[list[str]] | Question | list[Question],
        Field(
            description="A text, a list of texts, or a list of lists of one text or a pair; of a model that "
            "reads pairs, a list of two strings is one pair. Or a question, or a list of questions.",
            examples=["a gripping film"],
        ),
    ]
    operating_point: str | None = Field(None, description="Stored thresholds, such as 3x.")
    threshold: float | list[float] | None = Field(
        None, description="Keep probability, or one for each point."
    )
    details: bool = Field(False, description="Answer as `trbert predict` does, with the tokens kept.")
    raw_scores: bool = Field(False, description="Scores are the logits.")
    truncate: bool = Field(True, description="Cut texts that are too long; false refuses them.")


class Metrics:
    """Counts requests, batches and tokens for Prometheus."""

    def __init__(self, config: ModelConfig) -> None:
        self.registry = prometheus.CollectorRegistry()
        here: Any = {"registry": self.registry}
        timed = {"buckets": (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30), **here}
        self.requests = prometheus.Counter("trbert_requests", "Requests answered.", ("path", "code"), **here)
        self.seconds = prometheus.Histogram(
            "trbert_request_seconds", "From the first byte of a request to its answer.", ("path",), **timed
        )
        self.batch_seconds = prometheus.Histogram("trbert_batch_seconds", "Of a batch in the model.", **timed)
        sizes = {"buckets": [2**k for k in range(10)], **here}
        self.inputs = prometheus.Histogram("trbert_batch_inputs", "Texts or questions of a batch.", **sizes)
        self.waiting = prometheus.Gauge("trbert_waiting_inputs", "Inputs that wait for a batch.", **here)
        self.tokens = prometheus.Counter("trbert_tokens", "Tokens read.", **here)
        about = "Tokens that remain after a point of reduction."
        self.kept = prometheus.Counter("trbert_kept_tokens", about, ("point",), **here)
        about = "Of the encoder for texts: computed, and what the dense model would take."
        self.flops = prometheus.Counter("trbert_flops", about, ("kind",), **here)
        self._shape = None if config.inputs.data else flops.EncoderShape.of(config)

    def count(self, results: Sequence[Mapping[str, Any]], seconds: float) -> None:
        """Counts a batch."""
        self.batch_seconds.observe(seconds)
        self.inputs.observe(len(results))
        lengths = np.array([result["num_tokens"] for result in results])
        kept = np.array([result["num_kept"] for result in results]).reshape(len(lengths), -1)
        self.tokens.inc(float(lengths.sum()))
        for point, count in enumerate(kept.sum(0)):
            self.kept.labels(point).inc(float(count))
        if self._shape is not None:  # a question may have several rows, whose lengths are not known here
            dense = flops.dense_flops(self._shape, lengths)
            used = flops.reduced_flops(self._shape, lengths, kept) if kept.size else dense
            self.flops.labels("computed").inc(float(used.sum()))
            self.flops.labels("dense").inc(float(dense.sum()))


# Answers ------------------------------------------------------------------------------------------


class _Service:
    """A model, its batches, and whether it is ready."""

    def __init__(self, model: TRBert, options: Mapping[str, Any], limits: Limits) -> None:
        self.model, self.limits = model, limits
        self.options = model.checked_options(BATCH_SIZE, **options)
        self.default: Threshold = self.options["threshold"]
        self.metrics, self.ready = Metrics(model.config), False
        self.batcher = Batcher(
            self._run,
            max_tokens=limits.batch_tokens,
            max_waiting=limits.waiting,
            after_batch=self.metrics.count,
        )
        self.metrics.waiting.set_function(lambda: self.batcher.num_waiting)

    @property
    def questions(self) -> bool:
        """Whether the model answers questions, or labels texts."""
        return self.model.answers_questions

    def _run(self, inputs: list[Any], threshold: Threshold) -> list[dict[str, Any]]:
        options = {"batch_size": BATCH_SIZE, **self.options, "threshold": threshold}
        if not self.questions:
            found = self.model.predict(inputs, **options)
            return [self._record(prediction) for prediction in found]
        placed = [("question", {**question, "id": None}) for question in inputs]
        answers = self.model.answer_stream(placed, **options)
        return [
            answer if question.get("id") is None else {**answer, "id": question["id"]}
            for question, answer in zip(inputs, answers, strict=True)
        ]

    def _record(self, prediction: Prediction) -> dict[str, Any]:
        counts = [len(kept) for kept in prediction.kept]
        record = prediction_record(prediction, self.model.config.labels)
        return {**record, "logits": prediction.logits.tolist(), "num_kept": counts}

    def warm_up(self) -> None:
        """Compiles all that requests need."""
        for name, seconds in self.model.compile(BATCH_SIZE, self.options["rule"], self.options["backend"]):
            logger.info("compiled %s in %.1f s", name, seconds)

    def threshold(self, operating_point: Any, threshold: Any) -> Threshold:
        """Returns the thresholds of a request, by default those of the server."""
        if operating_point is None and threshold is None:
            return self.default
        given = DEFAULT_THRESHOLD if threshold is None else threshold
        given = tuple(given) if isinstance(given, list) else given
        asked = {"threshold": given, "operating_point": operating_point, "rule": self.options["rule"]}
        found = self.model.checked_options(BATCH_SIZE, backend=self.options["backend"], **asked)
        chosen: Threshold = found["threshold"]
        return chosen

    async def answer(self, request: Request, inputs: list[Any], threshold: Threshold) -> list[dict[str, Any]]:
        """Returns the results of inputs; gives them up if the client leaves or waits too long."""
        if not self.ready:
            raise HTTPException(503, "the model is not ready yet")
        if len(inputs) > min(self.limits.texts, self.limits.waiting):
            raise HTTPException(413, f"{len(inputs)} inputs; at most {self.limits.texts} a request")
        job = asyncio.ensure_future(self.batcher.submit(inputs, [*map(self._size, inputs)], threshold))
        left = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({job, left}, timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
            if job.done():
                return job.result()
            if left.done():
                raise HTTPException(499, "the client has left")
            raise HTTPException(504, f"no answer within {self.limits.timeout:g} s")
        finally:
            left.cancel()
            job.cancel()

    def _size(self, value: Any) -> int:
        """Estimates the tokens of an input."""
        texts = [value] if isinstance(value, str) else value.values() if self.questions else value
        characters = sum(len(text) for text in texts if isinstance(text, str))
        return min(self.model.config.max_length, 3 + characters // _CHARACTERS)

    def check(self, inputs: list[Any]) -> None:
        """Raises `UserError` for inputs of the wrong kind."""
        if not self.questions and not any(isinstance(value, dict) for value in inputs):
            check_texts(inputs, 0, pairs=bool(self.model.config.inputs.text_pair_field))
        elif not (self.questions and all(isinstance(value, dict) for value in inputs)):
            expected = "questions, JSON objects" if self.questions else "texts"
            raise UserError(f"inputs: this model takes {expected}")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def make_app(
    model: TRBert, name: str, options: Mapping[str, Any], limits: Limits, failed: Callable[[Exception], None]
) -> tuple[FastAPI, Metrics]:
    """Returns the ASGI application, without limits on requests, and its metrics.

    `options` are those of `TRBert.predict`. Calls `failed` if the model cannot be compiled. Raises
    `UserError` for a bad option.
    """
    service = _Service(model, options, limits)
    batcher, metrics = service.batcher, service.metrics

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async def start() -> None:
            try:
                await batcher.run_now(service.warm_up)
                service.ready = True
                logger.info("ready")
                await batcher.work()
            except Exception as error:
                service.ready = False
                failed(error)

        task = asyncio.ensure_future(start())
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        batcher.close()

    about = "Texts to labels, or questions to answers, with a BERT that drops tokens."
    app = FastAPI(title=f"trbert: {name}", version=__version__, lifespan=lifespan, description=about)

    @app.post("/predict")
    async def predict(body: PredictRequest, request: Request) -> Any:
        """Labels texts: a list of label and score, the best first, for each. Or answers questions."""
        inputs, single = _listed(body.inputs, bool(model.config.inputs.text_pair_field))
        service.check(inputs)
        threshold = service.threshold(body.operating_point, body.threshold)
        results = await service.answer(request, inputs, threshold)
        if not body.truncate and any(result.get("truncated") for result in results):
            raise UserError(f"a text is longer than {model.config.max_length} tokens, and truncate is false")
        shown: list[Any] = results
        if not service.questions:
            hidden = ("logits", "num_kept")
            shown = [{k: v for k, v in result.items() if k not in hidden} for result in results]
        if not (service.questions or body.details):
            shown = [_scores(result, body.raw_scores) for result in results]
        return JSONResponse(shown[0] if single else shown)

    @app.get("/health")
    @app.get("/v2/health/ready")
    @app.get(f"/v2/models/{name}/ready")
    async def ready() -> Any:
        """200 once all programs are compiled, else 503."""
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/v2/health/live")
    async def live() -> Any:
        """200 while the server runs."""
        return JSONResponse({"live": True})

    @app.get("/metrics")
    async def scrape() -> Any:
        """Metrics for Prometheus."""
        text = prometheus.generate_latest(metrics.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_LATEST)

    @app.get("/info")
    async def info() -> Any:
        """The model and the limits."""
        config = model.config
        points = {x.name: {"thresholds": x.thresholds, "speedup": x.speedup} for x in config.operating_points}
        about = {"task": config.task, "labels": config.labels, "max_length": config.max_length}
        options = {key: service.options[key] for key in ("rule", "backend", "threshold")}
        return {
            "model": name,
            "version": __version__,
            "model_type": config.model_type,
            **about,
            **options,
            "operating_points": points,
            "limits": dataclasses.asdict(limits),
        }

    @app.get("/v2")
    async def server() -> Any:
        """The server, in the Open Inference Protocol."""
        return open_inference.SERVER

    @app.get(f"/v2/models/{name}")
    async def described() -> Any:
        """The model's inputs and outputs, in the Open Inference Protocol."""
        return open_inference.metadata(model.config, name, service.options["backend"])

    @app.post(f"/v2/models/{name}/infer")
    async def infer(body: open_inference.InferRequest, request: Request) -> Any:
        """Labels texts or answers questions, in the Open Inference Protocol."""
        parameters = body.parameters or {}
        inputs = open_inference.read_inputs(body.inputs, service.questions)
        service.check(inputs)
        threshold = service.threshold(parameters.get("operating_point"), parameters.get("threshold"))
        results = await service.answer(request, inputs, threshold)
        outputs = open_inference.write_outputs(model.config, results)
        return JSONResponse({"model_name": name, "id": body.id or request.state.id, "outputs": outputs})

    return app, metrics


def _listed(inputs: Any, pairs: bool) -> tuple[list[Any], bool]:
    """Returns the inputs of a request, and whether it is a single one."""
    if not isinstance(inputs, list) or (
        pairs and len(inputs) == 2 and all(isinstance(x, str) for x in inputs)
    ):
        return [tuple(inputs) if isinstance(inputs, list) else inputs], True
    if any(isinstance(x, list) and len(x) not in (1, 2) for x in inputs):
        raise UserError("inputs: a list in the list has one text, or two: a pair")
    return [(x[0] if len(x) == 1 else tuple(x)) if isinstance(x, list) else x for x in inputs], False


def _scores(result: Mapping[str, Any], raw: bool) -> list[dict[str, Any]]:
    """Returns labels and scores as text-embeddings-inference does, the best first."""
    scores = result["logits"] if raw else [*result["scores"].values()]
    pairs = zip(result["scores"], scores, strict=True)
    return sorted(({"score": score, "label": label} for label, score in pairs), key=lambda x: -x["score"])

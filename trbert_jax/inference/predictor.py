"""Use a trained model: texts in, labels and kept tokens out; or questions in, answers out.

    model = TRBert.from_pretrained("runs/quickstart/model")
    for prediction in model.predict(["a gripping film", "two hours I want back"]):
        print(prediction.label, prediction.scores, prediction.num_tokens)

    model = TRBert.from_pretrained("work/squad/model")
    answer_questions(model, [{"question": "Who wrote it?", "context": "It was written by Ada."}])

Inputs run sorted by length in a few static shapes, each compiled once. With rule `threshold` a result depends
on its own text or question only, not on the batch or the order.
"""

import dataclasses
import functools
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.errors import UserError, iterable, whole_number
from trbert_jax.inference.engine import FEWER, CompiledForward, InferenceEngine, check_backend, fitting_size
from trbert_jax.inference.exported import ExportedEngine
from trbert_jax.inference.forked import ForkedEngine, Helper
from trbert_jax.inference.questions import WINDOW, answer_pairs, windows
from trbert_jax.io import check_unicode
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.engines import Graph
from trbert_jax.model.model import Params, TokenReducingModel
from trbert_jax.model.operating_points import find_thresholds
from trbert_jax.model.packed import BACKENDS, DEFAULT_BACKEND
from trbert_jax.model.pretrained import Pretrained, load_pretrained, save_pretrained
from trbert_jax.model.tokenizers import Tokenizer, check_vocabulary, copy_tokenizer
from trbert_jax.model.weight_files import upload
from trbert_jax.parallel import is_forked
from trbert_jax.reduction.rules import DEFAULT_RULE, DEFAULT_THRESHOLD, Threshold, check_rule
from trbert_jax.tasks import Task, saved_task
from trbert_jax.tasks.base import parse_requests
from trbert_jax.tasks.examples import Examples, Ragged
from trbert_jax.tasks.text_encoder import TextEncoder

if TYPE_CHECKING:
    from trbert_jax.pages import Page

TextOrPair = str | Sequence[str]  # a text, or a text and a second text
MOST = 2**24  # largest batch size
SMALL = (1, 4)  # rows of small batches, for requests of a few texts
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction for one text."""

    label: str | None  # name of the most probable class; None if it gives a score
    label_id: int | None  # its index
    # float32 [C], probabilities in the order of `TRBert.config.labels`. Of a model with one output, such as a
    # cross-encoder, the score: the sigmoid of the output, or for a regression the output itself.
    scores: np.ndarray
    logits: np.ndarray  # float32 [C], the outputs of the head
    # For each point of reduction the positions of the kept tokens, int32, ascending, from 0 ([CLS]) on; empty
    # for rule `dense`.
    kept: tuple[np.ndarray, ...]
    num_tokens: int  # tokens that the model read, [CLS] and [SEP] included
    truncated: bool  # whether the text was longer than `TRBert.config.max_length` tokens and was cut
    text: TextOrPair = dataclasses.field(repr=False)  # as given
    input_ids: np.ndarray  # int32 [num_tokens]
    _encoder: TextEncoder = dataclasses.field(repr=False)

    @property
    def tokens(self) -> list[str]:
        """The tokens as text; `kept` indexes into this list."""
        return self._encoder.words(self.input_ids)


class TRBert:
    """A trained model with its tokenizer; `from_pretrained` makes one.

    Attributes:
      config: the model's shape, label names, and how inputs are made.
      params: nested dict of float32 arrays, on the default device.
      tokenizer: a `transformers.PreTrainedTokenizerFast`, or None. The model reads texts with a copy: nothing
        done to this one changes an answer or a saved model.
      newly_initialized: parts that were initialized at random, see `Pretrained`.
      left_out: kind of the checkpoint's head if that was left out, see `Pretrained`.
      source: the model's name in messages.
      dtype: of the computation.

    Can be pickled, without its compiled programs. In a process that was forked after JAX had started, a
    helper process computes, see `trbert_jax.inference.forked`. Raises UserError for an unknown dtype, a
    tokenizer with more tokens than the model, or no device.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer | None = None,
        *,
        dtype: str = "float32",
        newly_initialized: Collection[str] = (),
        left_out: str = "",
        source: str = "this model",
        graph: Graph | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise UserError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
        if tokenizer is not None:
            check_vocabulary(tokenizer, config, "TRBert")
        self._module = TokenReducingModel(config, _DTYPES[dtype])
        self._helper: Helper | None = None
        self._graph = graph
        if not is_forked() and graph is None:  # else a helper computes, or another engine
            # The compiled passes, shared by all batch sizes; made first, since that looks for a device.
            self.programs = CompiledForward(self._module)
            params = jax.device_put(params)
        self.config, self.params, self._tokenizer, self.dtype = config, params, tokenizer, dtype
        self._own_tokenizer = None if tokenizer is None else copy_tokenizer(tokenizer)
        self.newly_initialized, self.left_out, self.source = tuple(newly_initialized), left_out, source

    def __reduce__(self) -> tuple[Any, ...]:
        # Compiled programs cannot be pickled; the copy compiles its own.
        names = ("dtype", "newly_initialized", "left_out", "source")
        make = functools.partial(
            type(self), graph=self._graph, **{name: getattr(self, name) for name in names}
        )
        return make, (self.config, jax.tree.map(np.asarray, self.params), self._own_tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        max_length: int | None = None,
        dtype: str = "float32",
        backend: str = "jax",
    ) -> "TRBert":
        """Loads a model directory, or a model of the Hugging Face hub; see `load_pretrained`.

        Cuts texts after `max_length` tokens, by default the model's own; computes in `dtype`, `float32` or
        `bfloat16`. `backend` `onnxruntime` or `openvino` computes with that engine, the graph of a folder of
        `trbert export` or one made now. Raises UserError if the model is missing or damaged, or the engine is
        not installed.
        """
        if backend not in ("jax", *BACKENDS):
            from trbert_jax.inference.export import load_exported

            config, tokenizer, graph = load_exported(path_or_id, backend, dtype, max_length)
            return cls(config, {}, tokenizer, dtype=dtype, source=str(path_or_id), graph=graph)
        x = load_pretrained(path_or_id, max_length=max_length)
        return cls(
            x.config,
            x.params,
            x.tokenizer,
            dtype=dtype,
            newly_initialized=x.newly_initialized,
            left_out=x.left_out,
            source=str(path_or_id),
        )

    def save_pretrained(self, directory: str | Path, **card: Any) -> None:
        """Writes a model directory, see `trbert_jax.model.pretrained.save_pretrained`."""
        self._check_has_weights("save")
        params, untrained = jax.device_get(self.params), self.newly_initialized
        save_pretrained(directory, self.config, params, self._own_tokenizer, exclude=untrained, **card)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        license: str | None = None,
        token: str | None = None,
        message: str = "Upload a trbert_jax model",
    ) -> str:
        """Uploads the model, with a card, to the Hugging Face hub; `from_pretrained(repo_id)` loads it.

        Makes the repository unless it exists, a `private` one if asked for; `license` is an identifier of the
        hub, such as apache-2.0. `token` is by default that of `hf auth login`. Returns the address. Raises
        UserError if the hub cannot be reached or refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "model", name=repo_id, license=license)
            options: Any = {"private": private, "token": token, "message": message}
            return upload(Path(folder) / "model", repo_id, **options)

    def _check_has_weights(self, use: str) -> None:
        if self._graph is not None:
            raise UserError(f"{self.source}: is exported already; {use} the model that it was made of")

    def export(self, directory: str | Path, **options: Any) -> Path:
        """Writes a folder for other engines; options and errors: see `inference.export.export_model`."""
        from trbert_jax.inference.export import export_model

        self._check_has_weights("export")
        params = jax.device_get(self.params)
        model = Pretrained(self.config, params, self._own_tokenizer, self.newly_initialized)
        return export_model(model, directory, source=self.source, **options)

    def show(self, inputs: Iterable[Any], **options: Any) -> "Page":
        """Draws a page of the tokens that the model keeps; options and errors: see `inference.show.show`."""
        from trbert_jax.inference.show import show

        return show(self, inputs, **options)

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The caller's tokenizer, see the class."""
        return self._tokenizer

    @functools.cached_property
    def _encoder(self) -> TextEncoder:
        return TextEncoder(self.require_tokenizer())

    @property
    def default_rule(self) -> str:
        """`threshold`, or `dense` for a model whose selectors are not trained or not exported."""
        reduces = self._graph is None or self._graph.reduces
        return DEFAULT_RULE if reduces and "selectors" not in self.newly_initialized else "dense"

    @functools.cached_property
    def task(self) -> Task:
        """The task that the model was trained for."""
        try:
            return saved_task(self.config)
        except UserError as error:
            raise UserError(f"{self.source}: {error}") from error

    @property
    def answers_questions(self) -> bool:
        """Whether the model answers questions, or labels texts."""
        return bool(self.config.inputs.data)

    def check_use(self, questions: bool, trained: bool = True) -> None:
        """Raises UserError unless the head answers questions, or texts, and is `trained`."""
        task, said = self.config.task, ""
        if not questions and self.answers_questions:
            said = "answers questions; ask it with trbert_jax.answer_questions(model, questions)"
        elif task != "classification" and not self.answers_questions:
            said = f"has a head for {task}, which labels no texts, and no trbert.inputs in its config.json, "
            said += "which say how questions become its inputs; `trbert train` writes both"
            if task == "multiple_choice":
                said += ', or add {"trbert": {"inputs": {"data": "race", "choices": "independent"}}}'
        elif questions and not self.answers_questions:
            said = "labels texts, or its config.json lacks trbert.inputs, which say how questions become its "
            said += "inputs; `trbert train` writes them for a data set of questions"
        elif trained and (parts := [part for part in self.newly_initialized if part != "selectors"]):
            said = f"has a head of {self.left_out}" if self.left_out else f"has no {', '.join(parts)}"
            said += f", so no trained head for {task}; train it first: `trbert train` takes it as model.init"
        if said:
            raise UserError(f"{self.source}: the model {said}")
        if self.answers_questions:
            _ = self.task  # raises if its head is of another task

    def engine(self, batch_size: int) -> InferenceEngine:
        """Returns the engine for batches of this many examples. Raises UserError if that is no number."""
        size = whole_number("batch_size", batch_size, 1, MOST)
        if self._graph is not None:
            return ExportedEngine(self.config, self._graph, size)
        if not is_forked():
            return InferenceEngine(self._module, size, self.programs)
        if self._helper is None or self._helper.process != os.getpid():
            self._helper = Helper(self.config, self.params, self.dtype)
        return ForkedEngine(self._helper, self._module, size)

    def compile(
        self, batch_size: int = 32, rule: str | None = None, backend: str = DEFAULT_BACKEND
    ) -> Iterator[tuple[str, float]]:
        """Compiles ahead of time what `predict` or `answer_questions` needs with this batch size.

        Yields the name of each program and the seconds that compiling took. Arguments: see `predict`.
        """
        self.check_use(self.answers_questions)
        self.engine(batch_size)
        if self.answers_questions:
            small = FEWER
            asked = parse_requests(self.task, [("example", self.task.shortest_request)], set())
            request = [record for _, record in asked]
            example = self.task.encode(request, self.require_tokenizer())
        else:
            small = (*SMALL, *FEWER)
            types = np.zeros(1, np.int8) if self.config.inputs.text_pair_field else None
            example = _make_examples(Ragged.of([np.zeros(1, np.int32)]), types)
        for size in sorted({size for size in small if size < batch_size} | {batch_size}):
            yield from self.engine(size).compile(self.params, example, rule or self.default_rule, backend)

    # Texts

    def predict(
        self,
        texts: Iterable[TextOrPair],
        batch_size: int = 32,
        rule: str | None = None,
        backend: str = DEFAULT_BACKEND,
        threshold: Threshold = DEFAULT_THRESHOLD,
        operating_point: str | None = None,
    ) -> list[Prediction]:
        """Classifies texts.

        Args:
          texts: any number, empty ones too, or pairs `(text, second text)`; one longer than
            `config.max_length` tokens is cut.
          batch_size: texts per forward pass; does not change the results. Memory grows with it up to the
            number of texts.
          rule: `threshold` decides on each text by itself. `batch_max` is the published evaluation: each text
            keeps as many tokens as the text of its batch that keeps most, so results depend on the batch.
            `dense` drops nothing. None takes `default_rule`.
          backend: `packed` computes no padding and no dropped tokens; `masked` computes every position and
            gives the same results.
          threshold: keep probability from which rule `threshold` keeps a token, or one for each point of
            reduction, `(0.5, 0.7)`. A lower one keeps more tokens, takes longer and is usually more accurate.
          operating_point: name of thresholds that the model has stored, `3x` say, in place of `threshold`;
            see `trbert calibrate`.

        Returns predictions in the order of the texts. Raises UserError for something else than a list of
        strings, an invalid option, a model without tokenizer or one that answers questions.
        """
        options = {"rule": rule, "backend": backend, "threshold": threshold}
        options["operating_point"] = operating_point
        return list(self.predict_stream(texts, batch_size, **options))

    def predict_stream(
        self, texts: Iterable[TextOrPair], batch_size: int = 32, **options: Any
    ) -> Iterator[Prediction]:
        """Classifies any number of texts, with a few windows of `WINDOW` batches in memory at a time.

        Sorts the texts by length within a window; tokenizes the next window while this one is computed.
        Arguments and errors: see `predict`; an invalid option raises at once, a bad text when its window is
        reached.
        """
        texts = iterable("texts", texts, "predict([text])")
        self.check_use(questions=False)
        options = self.checked_options(batch_size, **options)
        return self._predict(texts, int(batch_size), options)

    def _predict(self, texts: Iterable[TextOrPair], batch_size: int, options: Any) -> Iterator[Prediction]:
        rows = 0
        for window, examples, truncated in self._encode_ahead(texts, WINDOW * batch_size):
            if (needed := _num_rows(len(window), batch_size)) > rows:  # windows of a pipe are small at first
                engine, rows = self.engine(needed), needed
            outputs = engine.run(self.params, examples, **options)
            scores = outputs.probabilities
            if self.config.score:
                scores = outputs.logits if self.config.score == "identity" else _sigmoid(outputs.logits)
            winners = [None if self.config.score else int(i) for i in outputs.logits.argmax(-1)]
            for i, text in enumerate(window):
                winner = winners[i]
                yield Prediction(
                    label=None if winner is None else self.config.labels[winner],
                    label_id=winner,
                    scores=scores[i],
                    logits=outputs.logits[i],
                    kept=tuple(stage[i] for stage in outputs.kept),
                    num_tokens=int(examples.lengths[i]),
                    truncated=truncated[i],
                    text=text,
                    input_ids=examples.row(i),
                    _encoder=self._encoder,
                )

    def _encode_ahead(
        self, texts: Iterable[TextOrPair], size: int
    ) -> Iterator[tuple[list[TextOrPair], Examples, list[bool]]]:
        """Encodes `size` texts at a time, the next ones while these are in use."""
        if isinstance(texts, list | tuple) and 0 < len(texts) <= size:
            yield self._encode([*texts], 0)  # without a thread, which would take as long
            return
        source, first, pending = iter(texts), 0, None
        with ThreadPoolExecutor(1) as pool:  # the tokenizer runs without Python's lock
            for window in windows(source, size):
                following = pool.submit(self._encode, window, first) if window else None
                if pending:
                    yield pending.result()
                pending, first = following, first + len(window)
            if pending:
                yield pending.result()

    def _encode(self, texts: list[TextOrPair], first: int) -> tuple[list[TextOrPair], Examples, list[bool]]:
        """Encodes texts, whose numbers begin with `first`; tells which are cut."""
        check_texts(texts, first, pairs=bool(self.config.inputs.text_pair_field))
        pairs = [(text,) if isinstance(text, str) else text for text in texts]
        rows = self._encoder.rows(pairs, self.config.max_length)
        return texts, _make_examples(rows.tokens, rows.token_types), rows.cut.tolist()

    def checked_options(
        self,
        batch_size: int,
        rule: str | None = None,
        backend: str = DEFAULT_BACKEND,
        threshold: Threshold = DEFAULT_THRESHOLD,
        operating_point: str | None = None,
    ) -> dict[str, Any]:
        """Checks the options of a prediction and fills in their defaults."""
        self.engine(batch_size)
        rule = rule or self.default_rule
        threshold = find_thresholds(self.config.operating_points, operating_point, rule, threshold)
        check_rule(rule, threshold, self.config.num_reductions)
        if self._graph is None or backend != self._graph.engine:
            check_backend(backend)
        return {"rule": rule, "backend": backend, "threshold": threshold}

    def require_tokenizer(self) -> Tokenizer:
        """Returns the model's own copy of the tokenizer. Raises UserError if the model has none."""
        if self._own_tokenizer is None:
            raise UserError(
                "this model has no tokenizer; put the tokenizer files of the model it was made of into its "
                "directory (tokenizer.json and tokenizer_config.json, or vocab.txt)"
            )
        return self._own_tokenizer

    # Questions

    def answer_stream(self, requests: Iterable[Any], batch_size: int = 32, **options: Any) -> Iterator[Any]:
        """Answers any number of questions, with only `WINDOW` batches in memory at a time.

        `requests` has of each question its place for messages, and the JSON object. Options, results and
        errors: see `answer_questions`. A bad question raises after the answers to those before it.
        """
        return (answer for _, answer in answer_pairs(self, requests, batch_size, **options))


def _make_examples(tokens: Ragged, token_types: np.ndarray | None) -> Examples:
    """Returns examples of one row each, without labels."""
    ids = [str(i) for i in range(len(tokens))]
    return Examples(tokens.values, tokens.offsets, token_types, np.zeros(len(ids), np.int32), ids, 0, "")


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.maximum(logits, -80)))  # below, float32 overflows


def _num_rows(num_texts: int, batch_size: int) -> int:
    """Returns the rows of a batch: few shapes to compile, a small one for a request of a few texts."""
    return min([rows for rows in SMALL if rows >= num_texts] + [fitting_size(num_texts, batch_size)])


def check_texts(texts: Sequence[Any], first: int, *, pairs: bool) -> None:
    """Raises UserError for something else than texts, or pairs of texts, which a model of pairs needs."""
    for i, text in enumerate(texts, first):
        is_pair = isinstance(text, tuple | list) and len(text) == 2 and all(isinstance(x, str) for x in text)
        if not (is_pair or (isinstance(text, str) and not pairs)):
            expected = "a pair of strings, (text, second text): the model was trained on pairs"
            expected = expected if pairs else "a string, or a pair of strings"
            raise UserError(f"texts[{i}] is a {type(text).__name__}; expected {expected}")
        try:
            for part in [text] if isinstance(text, str) else text:
                check_unicode(part)
        except ValueError as error:
            raise UserError(f"texts[{i}] {error}") from error

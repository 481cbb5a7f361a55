"""Using a trained model: texts in, labels and the tokens that decided them out.

    model = TRBert.from_pretrained("runs/quickstart/model")
    for prediction in model.predict(["a gripping film", "two hours I want back"]):
        print(prediction.label, prediction.scores, prediction.num_tokens)

Texts run sorted by length in a few static shapes, each compiled once. A prediction depends on its
text alone: not on the batch it ran in, nor on the order of the texts.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.inference.engine import CompiledForward, InferenceEngine, Outputs, check_backend
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Params, TokenReducingModel
from trbert_jax.model.packed import DEFAULT_BACKEND
from trbert_jax.model.pretrained import Announce, load_pretrained, save_pretrained, to_stderr
from trbert_jax.model.tokenizers import Tokenizer, check_vocabulary
from trbert_jax.reduction.rules import DEFAULT_RULE, DEFAULT_THRESHOLD, check_rule
from trbert_jax.tasks.examples import Examples

WINDOW = 32  # batches within which texts are sorted by length
SMALL = (1, 4)  # rows of small batches, for requests of a few texts
_DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """What the model says about one text.

    Attributes:
      label: name of the most probable class.
      label_id: its index.
      scores: float32 [C], probabilities in the order of `TRBert.config.labels`.
      kept: for each point of reduction the int32 positions, ascending, of the tokens that went on;
        position 0 ([CLS]) always does. Empty for dense execution.
      num_tokens: tokens of the text as the model read it, [CLS] and [SEP] included.
      truncated: whether the text was longer than `TRBert.config.max_length` tokens and was cut.
      text: the text.
      input_ids: int32 [num_tokens].
    """

    label: str
    label_id: int
    scores: np.ndarray
    kept: tuple[np.ndarray, ...]
    num_tokens: int
    truncated: bool
    text: str = dataclasses.field(repr=False)
    input_ids: np.ndarray
    _tokenizer: Tokenizer = dataclasses.field(repr=False)

    @property
    def tokens(self) -> list[str]:
        """The tokens as text; `kept` indexes into this list."""
        return list(self._tokenizer.convert_ids_to_tokens(self.input_ids.tolist()))


class TRBert:
    """A text classifier with its tokenizer.

    Attributes:
      config: the model's shape and label names.
      params: nested dict of float32 arrays.
      tokenizer: a `transformers.PreTrainedTokenizerFast`, or None (then `predict` is not possible).
      fresh: parts that nothing has trained, see `Pretrained.newly_initialized`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Tokenizer | None = None,
        *,
        dtype: str = "float32",
        fresh: Collection[str] = (),
    ) -> None:
        """Wraps a model; `from_pretrained` is the usual way to one.

        Args:
          config: the model's shape.
          params: nested dict of float32 arrays, moved to the default device.
          tokenizer: as returned by `load_tokenizer`.
          dtype: what to compute in, `float32` or `bfloat16`.
          fresh: parts of `params` that nothing has trained.

        Raises:
          UserError: an unknown dtype, or a tokenizer with more tokens than the model.
        """
        if dtype not in _DTYPES:
            raise UserError(f"dtype is {dtype!r}; expected one of {', '.join(_DTYPES)}")
        if tokenizer is not None:
            check_vocabulary(tokenizer, config, "TRBert")
        self.config = config
        self.params = jax.device_put(params)
        self.tokenizer = tokenizer
        self.fresh = tuple(fresh)
        self._model = TokenReducingModel(config, _DTYPES[dtype])
        self.programs = CompiledForward(self._model)
        self._engines: dict[int, InferenceEngine] = {}

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        max_length: int | None = None,
        dtype: str = "float32",
        announce: Announce = to_stderr,
    ) -> TRBert:
        """Loads a model directory, or a model of the Hugging Face hub.

        Args:
          path_or_id: see `load_pretrained`.
          max_length: tokens after which a text is cut; None takes the model's own.
          dtype: what to compute in, `float32` or `bfloat16`.
          announce: called with a line of text if parts of the model had to be initialized.

        Raises:
          UserError: no such model, or a damaged one.
        """
        loaded = load_pretrained(path_or_id, max_length=max_length)
        return cls(
            loaded.config, loaded.params, loaded.tokenizer, dtype=dtype, fresh=loaded.newly_initialized
        )

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a model directory, see `trbert_jax.model.pretrained.save_pretrained`."""
        params = jax.device_get(self.params)
        save_pretrained(directory, self.config, params, self.tokenizer, exclude=self.fresh)

    @property
    def default_rule(self) -> str:
        """`threshold`, or `dense` for a model whose selectors are not trained."""
        return "dense" if "selectors" in self.fresh else DEFAULT_RULE

    def predict(
        self,
        texts: Sequence[str],
        batch_size: int = 32,
        rule: str | None = None,
        backend: str = DEFAULT_BACKEND,
        threshold: float = DEFAULT_THRESHOLD,
    ) -> list[Prediction]:
        """Classifies texts.

        Args:
          texts: any number, empty ones too; one longer than `config.max_length` tokens is cut.
          batch_size: texts a forward pass; has no influence on the results.
          rule: `threshold` decides on each text by itself. `batch_max` is the published evaluation: each text
            keeps as many tokens as the text of its batch that keeps most, so results depend on the batch.
            `dense` drops nothing. None takes `default_rule`.
          backend: `packed` computes no padding and no dropped tokens; `masked` computes every position and
            gives the same results.
          threshold: keep probability from which rule `threshold` keeps a token. A lower one keeps more
            tokens, which costs time and usually improves accuracy, without training.

        Returns:
          Predictions in the order of the texts.

        Raises:
          UserError: something else than a list of strings, a bad option, no tokenizer, a model that answers
            questions (`trbert_jax.answer_questions`).
        """
        _check_texts(texts)
        return list(self.predict_stream(texts, batch_size, rule, backend, threshold))

    def predict_stream(
        self,
        texts: Iterable[str],
        batch_size: int = 32,
        rule: str | None = None,
        backend: str = DEFAULT_BACKEND,
        threshold: float = DEFAULT_THRESHOLD,
    ) -> Iterator[Prediction]:
        """Classifies any number of texts, of which only a few batches are in memory at a time.

        Texts of like length share a batch within a window of `WINDOW` batches; the next window is read
        and tokenized while this one is computed.

        Args:
          texts: read as needed.
          batch_size, rule, backend, threshold: as in `predict`.

        Returns:
          Predictions in the order of the texts.

        Raises:
          UserError: as `predict`; a bad option at once, a bad text when its window is reached.
        """
        if self.config.inputs.data:
            raise UserError(
                "this model answers questions; ask it with trbert_jax.answer_questions(model, questions)"
            )
        rule = rule or self.default_rule
        check_rule(rule, threshold)
        check_backend(backend)
        _check_batch_size(batch_size)
        return self._predict_windows(
            iter(texts), batch_size, {"rule": rule, "backend": backend, "threshold": threshold}
        )

    def _predict_windows(
        self, texts: Iterator[str], batch_size: int, options: dict[str, Any]
    ) -> Iterator[Prediction]:
        def read() -> list[str]:
            return list(itertools.islice(texts, WINDOW * batch_size))

        if not (window := read()):
            return
        num_read = 0
        rows = _num_rows(len(window), batch_size)
        with ThreadPoolExecutor(1) as pool:  # the tokenizer works outside Python's lock
            encoding = pool.submit(self._encode, window, num_read)
            while window:
                features, truncated = encoding.result()
                num_read += len(window)
                if following := read():
                    encoding = pool.submit(self._encode, following, num_read)
                output = self.engine(rows).run(self.params, features, **options)
                yield from self._predictions(window, features, truncated, output)
                window = following

    def _predictions(
        self, texts: Sequence[str], features: Examples, truncated: Sequence[bool], output: Outputs
    ) -> Iterator[Prediction]:
        scores = output.probabilities
        winners = output.logits.argmax(-1)
        for i, text in enumerate(texts):
            yield Prediction(
                label=self.config.labels[winners[i]],
                label_id=int(winners[i]),
                scores=scores[i],
                kept=tuple(stage[i] for stage in output.kept),
                num_tokens=int(features.lengths[i]),
                truncated=truncated[i],
                text=text,
                input_ids=features.tokens[features.offsets[i] : features.offsets[i + 1]],
                _tokenizer=self.tokenizer,
            )

    def compile(
        self, batch_size: int = 32, rule: str | None = None, backend: str = DEFAULT_BACKEND
    ) -> Iterator[tuple[str, float]]:
        """Compiles ahead of time what `predict` needs with this batch size.

        Args:
          batch_size, rule, backend: as in `predict`.

        Yields:
          The name of each program and the seconds that compiling it took.

        Raises:
          UserError: a bad option, a model that answers questions, whose shapes their data set decides.
        """
        if self.config.inputs.data:
            raise UserError(
                "models that label texts can be compiled ahead; one that answers questions compiles at its "
                "first batch and finds its programs in the cache from then on"
            )
        _check_batch_size(batch_size)
        example = Examples(
            tokens=np.zeros(1, np.int32),
            offsets=np.array([0, 1]),
            token_types=None,
            labels=np.zeros(1, np.int32),
            ids=[""],
            num_truncated=0,
            digest="",
        )
        for rows in sorted({_num_rows(n, batch_size) for n in (*SMALL, batch_size)}):
            yield from self.engine(rows).compile(self.params, example, rule or self.default_rule, backend)

    def engine(self, batch_size: int) -> InferenceEngine:
        """What runs the model in batches of this many rows; kept, because it holds compiled programs."""
        if batch_size not in self._engines:
            self._engines[batch_size] = InferenceEngine(self._model, batch_size, self.programs)
        return self._engines[batch_size]

    def _encode(self, texts: Sequence[str], first: int) -> tuple[Examples, list[bool]]:
        _check_texts(texts, first)
        if self.tokenizer is None:
            raise UserError(
                "this model has no tokenizer; put the tokenizer.json or vocab.txt of the model it was "
                "made of into its directory and load it again"
            )
        encodings = self.tokenizer.backend_tokenizer.encode_batch(list(texts))
        longest, end = self.config.max_length, self.tokenizer.sep_token_id
        truncated = [len(encoding.ids) > longest for encoding in encodings]
        rows = [
            [*encoding.ids[: longest - 1], end] if cut else encoding.ids
            for encoding, cut in zip(encodings, truncated, strict=True)
        ]
        features = Examples(
            tokens=np.concatenate([np.array(row, np.int32) for row in rows]),
            offsets=np.cumsum([0, *map(len, rows)], dtype=np.int64),
            token_types=None,
            labels=np.zeros(len(rows), np.int32),
            ids=[str(i) for i in range(len(rows))],
            num_truncated=sum(truncated),
            digest="",
        )
        return features, truncated


def _num_rows(num_texts: int, batch_size: int) -> int:
    """Rows of a batch for so many texts: few shapes to compile, and a small one for a small request."""
    return min([rows for rows in SMALL if rows >= num_texts] + [batch_size])


def _check_batch_size(batch_size: int) -> None:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size is {batch_size!r}; expected a whole number, at least 1")


def _check_texts(texts: Sequence[str], first: int = 0) -> None:
    if isinstance(texts, str):
        raise UserError("predict takes a list of texts; put the text into one: predict([text])")
    for i, text in enumerate(texts, first):  # numbered as the caller's, of which these may be a part
        if not isinstance(text, str):
            raise UserError(f"texts[{i}] is a {type(text).__name__}; expected a string")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"texts[{i}] is not valid Unicode (character {error.start}: {error.reason})"
            ) from error

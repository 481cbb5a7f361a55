"""Classify texts: IMDB and the like."""

import hashlib
import itertools
import logging
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trbert_jax.datasets import reading
from trbert_jax.datasets.records import Example
from trbert_jax.errors import UserError
from trbert_jax.io import atomic_file
from trbert_jax.model.config import InputConfig
from trbert_jax.tasks.base import Score, Task, register_task
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.scorers import accuracy
from trbert_jax.tasks.text_encoder import TextEncoder

logger = logging.getLogger(__name__)

_FORMAT = "trbert_jax features 1"  # a new number invalidates old caches


@register_task
class ClassificationTask(Task):
    """Chooses the label with the highest logit."""

    name = "classification"
    metric = "accuracy"
    shortest_request: ClassVar[dict[str, Any]] = {"text": "a"}

    @classmethod
    def complete(cls, inputs: InputConfig, train: Callable[[], Sequence[Example]]) -> InputConfig:
        # A saved model that names no data set takes plain texts, not requests of a task of its own.
        return InputConfig() if cls is ClassificationTask else inputs

    def texts(self, records: Sequence[Example]) -> list[str]:
        return [record.text for record in records]

    def encode(
        self, records: Sequence[Example], tokenizer: Any, *, cache_dir: Path | None = None, **_: Any
    ) -> Examples:
        return encode_texts(records, tokenizer, self.max_length, cache_dir)

    def score(self, examples: Examples, logits: Any, null_threshold: float | None = None) -> Score:
        predicted, known = logits.argmax(-1), examples.labels >= 0
        metrics = {"accuracy": accuracy(predicted[known], examples.labels[known])} if known.any() else {}
        answers = {id: self.labels[k] for id, k in zip(examples.ids, predicted, strict=True)}
        return Score(metrics, {"predictions.json": answers} if self.inputs.data else {})

    def parse_request(self, request: Mapping[str, Any], id: str, where: str) -> Example:
        return Example(id, reading.text(request, "text"), -1)


def encode_texts(
    records: Sequence[Example], tokenizer: Any, max_length: int, cache_dir: str | Path | None = None
) -> Examples:
    """Encodes texts as `[CLS] tokens [SEP]`, cut to the maximum length, or reads them from the cache.

    The name of a file in `cache_dir` is a hash of everything that decides its contents, so another data set,
    tokenizer or length never reads it; None for no cache. Raises `UserError` for a text without tokens (names
    the record), or a cache folder that cannot be written. Source: docs/data.md, "Tokenized examples".
    """
    if max_length < 3:
        raise ValueError(f"max_length is {max_length}; [CLS], one token and [SEP] need 3")
    encoder = TextEncoder(tokenizer)
    digest = _digest(records, encoder, max_length)
    path = None if cache_dir is None else Path(cache_dir).expanduser() / f"features-{digest[:40]}.npz"
    arrays = None if path is None else _load(path, len(records))
    if arrays is None:
        arrays = _tokenize(records, encoder, max_length)
        if path is not None:
            with atomic_file(path, "wb") as stream:
                np.savez(stream, allow_pickle=False, **arrays)
    num_truncated = int(arrays["num_truncated"])
    if num_truncated:
        logger.warning(
            "%d of %d texts are longer than %d tokens and were cut", num_truncated, len(records), max_length
        )
    return Examples(
        tokens=arrays["tokens"],
        offsets=arrays["offsets"],
        token_types=None,
        labels=np.array([record.label for record in records], np.int32),
        ids=[record.id for record in records],
        num_truncated=num_truncated,
        digest=digest,
        records=records,
    )


def _digest(records: Sequence[Example], encoder: TextEncoder, max_length: int) -> str:
    backend, *ends = encoder.description
    parts = ((record.id, str(record.label), record.text) for record in records)
    digest = hashlib.sha256()
    head = (_FORMAT, str(max_length), str(tuple(ends)), str(backend))
    for part in itertools.chain(head, *parts):
        data = part.encode("utf-8", "surrogatepass")  # names of files too
        digest.update(len(data).to_bytes(8, "little"))  # separates a part from the next
        digest.update(data)
    return digest.hexdigest()


def _tokenize(records: Sequence[Example], encoder: TextEncoder, max_length: int) -> dict[str, np.ndarray]:
    encoded = encoder.encode([record.text for record in records], max_tokens=max_length - 2)
    rows = []
    for i, record in enumerate(records):
        if not encoded.num_tokens[i]:
            raise UserError(f"{record.id}: the text has no tokens; remove the example")
        rows.append(np.concatenate([encoder.cls, encoded.tokens[i], encoder.sep]))
    return {
        "tokens": np.concatenate(rows),
        "offsets": np.cumsum([0, *map(len, rows)], dtype=np.int64),
        "num_truncated": np.array((encoded.num_tokens > max_length - 2).sum(), np.int64),
    }


def _load(path: Path, num_examples: int) -> dict[str, np.ndarray] | None:
    """Reads the arrays of a cache file; None if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("tokens", "offsets", "num_truncated")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        arrays = {}
    if arrays and arrays["offsets"].shape == (num_examples + 1,):
        offsets = arrays["offsets"]
        if offsets[0] == 0 and offsets[-1] == len(arrays["tokens"]) and (np.diff(offsets) > 2).all():
            return arrays
    logger.warning("%s: this cache file is damaged; tokenizing again", path)
    return None

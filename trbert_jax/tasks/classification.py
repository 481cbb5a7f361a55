"""Classify texts: IMDB and the like."""

import collections
import dataclasses
import hashlib
import itertools
import logging
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from trbert_jax.datasets import reading
from trbert_jax.datasets.reading import shorten
from trbert_jax.datasets.records import Example
from trbert_jax.io import atomic_file
from trbert_jax.model.config import InputConfig
from trbert_jax.tasks.base import RecordErrors, Score, Task, register_task
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.scorers import class_scores
from trbert_jax.tasks.text_encoder import TextEncoder

logger = logging.getLogger(__name__)

_IMBALANCE = 10  # examples of the largest class for one of the smallest, from which on a warning is due
_FORMAT = "trbert_jax features 1"  # a new number invalidates old caches


@register_task
class ClassificationTask(Task):
    """Chooses the label with the highest logit."""

    name = "classification"
    metric = "accuracy"
    settings = frozenset({"data.skip_bad_records", "data.class_weights"})
    shortest_request: ClassVar[dict[str, Any]] = {"text": "a"}

    @classmethod
    def complete(cls, inputs: InputConfig, train: Callable[[], Sequence[Example]]) -> InputConfig:
        # A saved model that names no data set takes plain texts, not requests of a task of its own.
        return dataclasses.replace(inputs, data="") if cls is ClassificationTask else inputs

    def texts(self, records: Sequence[Example]) -> list[str]:
        return [text for record in records for text in (record.text, record.pair) if text is not None]

    def warnings(
        self, split: str, records: Sequence[Example], others: Mapping[str, Sequence[Example]]
    ) -> Iterator[str]:
        found = collections.Counter(record.label for record in records if record.label >= 0).most_common()
        if len(found) == 1:
            yield f"all {found[0][1]} examples are {self.labels[found[0][0]]!r}, nothing tells classes apart"
        elif split == "train" and len(found) < len(self.labels):
            absent = ", ".join(repr(self.labels[i]) for i in {*range(len(self.labels))} - {*dict(found)})
            yield f"no example is {shorten(absent)}; the model learns only the other classes"
        elif split == "train" and found[0][1] >= _IMBALANCE * found[-1][1]:
            sizes = " and ".join(f"{count} are {self.labels[i]!r}" for i, count in (found[0], found[-1]))
            yield f"of {len(records)} examples {sizes}; judge by macro F1, try data.class_weights: balanced"
        for other, theirs in others.items():
            known = {(record.text, record.pair) for record in theirs}
            if common := sum((record.text, record.pair) in known for record in records):
                yield f"{common} of {len(records)} texts are in {other} too, which makes scores too good"

    def encode(
        self, records: Sequence[Example], tokenizer: Any, *, cache_dir: Path | None = None, **_: Any
    ) -> Examples:
        return encode_texts(records, tokenizer, self.max_length, cache_dir)

    def score(self, examples: Examples, logits: Any, null_threshold: float | None = None) -> Score:
        predicted, known = logits.argmax(-1), examples.labels >= 0
        metrics, details = dict[str, float](), dict[str, Any]()
        if known.any():
            metrics, details = class_scores(predicted[known], examples.labels[known], self.labels)
        answers = {id: self.labels[k] for id, k in zip(examples.ids, predicted, strict=True)}
        files = {"predictions.json": answers} if self.inputs.data else {}
        return Score(metrics, files, details=details)

    def parse_request(self, request: Mapping[str, Any], id: str, where: str) -> Example:
        pair = self.inputs.text_pair_field
        second = reading.text(request, pair) if pair else None
        return Example(id, reading.text(request, self.inputs.text_field), -1, second)


def encode_texts(
    records: Sequence[Example], tokenizer: Any, max_length: int, cache_dir: str | Path | None = None
) -> Examples:
    """Encodes texts as `[CLS] tokens [SEP]`, cut to the maximum length, or reads them from the cache.

    Pairs become rows with token types, see `TextEncoder.rows`. The name of a file in `cache_dir` is a hash of
    everything that decides its contents, so another data set, tokenizer or length never reads it; None for no
    cache. Raises `UnusableRecords` for texts without tokens, `UserError` for a cache folder that cannot be
    written. Source: docs/data.md, "Tokenized examples".
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
    return Examples(
        tokens=arrays["tokens"],
        offsets=arrays["offsets"],
        token_types=arrays.get("token_types"),
        labels=np.array([record.label for record in records], np.int32),
        ids=[record.id for record in records],
        num_truncated=int(arrays["num_truncated"]),
        digest=digest,
        records=records,
    )


def _digest(records: Sequence[Example], encoder: TextEncoder, max_length: int) -> str:
    backend, *ends = encoder.description
    parts = ((r.id, str(r.label), r.text, *(() if r.pair is None else ("pair", r.pair))) for r in records)
    digest = hashlib.sha256()
    head = (_FORMAT, str(max_length), str(tuple(ends)), str(backend))
    for part in itertools.chain(head, *parts):
        data = part.encode("utf-8", "surrogatepass")  # names of files too
        digest.update(len(data).to_bytes(8, "little"))  # separates a part from the next
        digest.update(data)
    return digest.hexdigest()


def _tokenize(records: Sequence[Example], encoder: TextEncoder, max_length: int) -> dict[str, np.ndarray]:
    texts = [(r.text,) if r.pair is None else (r.text, r.pair) for r in records]
    rows, errors = encoder.rows(texts, max_length), RecordErrors()
    for i, text in enumerate(texts):
        for name, is_empty in zip(("text", "second text")[: len(text)], rows.empty[:, i], strict=False):
            if is_empty:
                errors.add(records[i], name, "has no tokens; remove the example")
    errors.raise_if_any()
    types = {} if rows.token_types is None else {"token_types": rows.token_types}
    num_truncated = np.array(rows.cut.sum(), np.int64)
    return {
        "tokens": rows.tokens.values,
        "offsets": rows.tokens.offsets,
        "num_truncated": num_truncated,
        **types,
    }


def _load(path: Path, num_examples: int) -> dict[str, np.ndarray] | None:
    """Reads the arrays of a cache file; None if it is missing or damaged."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in ("tokens", "offsets", "num_truncated")}
            arrays |= {name: archive[name] for name in {"token_types"} & {*archive}}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        arrays = {}
    if arrays and arrays["offsets"].shape == (num_examples + 1,):
        offsets = arrays["offsets"]
        if offsets[0] == 0 and offsets[-1] == len(arrays["tokens"]) and (np.diff(offsets) > 2).all():
            return arrays
    logger.warning("%s: this cache file is damaged; tokenizing again", path)
    return None

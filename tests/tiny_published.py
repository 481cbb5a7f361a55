"""Files as published to inputs, by the way that training takes, with word pieces that are easy to count.

Every word, sign and Chinese character of the texts is one word piece, but `Łódź` is two. `pieces` divides
texts like that by a few lines of its own, without the program's tokenizer.
"""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tiny_models import word_pieces

from trbert_jax.config import BackboneConfig, DataConfig, RunConfig
from trbert_jax.model.tokenizers import Tokenizer
from trbert_jax.tasks import Splits
from trbert_jax.tasks.examples import Examples

CAFE = "naïve cafe\u0301"  # the first accent is part of its letter, the second a character of its own
_PIECE = re.compile(r"\[(?:PAR|TLE|DOC)\]|[Łł]ó|[東京]|(?:[^\W_]|[\u0300-\u036f])+|[^\w\s]|_")
_MARKERS = {"[PAR]": "[unused1]", "[TLE]": "[unused2]", "[DOC]": "[unused3]"}
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_MARKERS.values())
_SURE = 10.0


def words(first: int, last: int) -> str:
    """`w3 w4 w5`: words named after the word piece of the text they are meant to be."""
    return " ".join(f"w{i}" for i in range(first, last + 1))


def places(text: str) -> list[tuple[int, int]]:
    """First and last character of each word piece, the last exclusive."""
    return [match.span() for match in _PIECE.finditer(text)]


def spelled(text: str, first: int, last: int) -> str:
    """Returns the text from one word piece to another, both inclusive."""
    return text[places(text)[first][0] : places(text)[last][1]]


def pieces(text: str) -> str:
    """A text's entries of the vocabulary, apart: lower case, without accents."""
    return " ".join(_entry(text[start:end]) for start, end in places(text))


def _entry(piece: str) -> str:
    plain = "".join(c for c in unicodedata.normalize("NFD", piece.lower()) if unicodedata.category(c) != "Mn")
    return _MARKERS.get(piece) or ("##dz" if piece == "dź" else plain)


def word_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """WordPiece as of bert-base-uncased, with the pieces of these texts for its vocabulary."""
    entries = [entry for text in texts for entry in pieces(text).split()]
    return word_pieces(dict.fromkeys((*_SPECIAL, *entries)), lowercase=True)


class Published:
    """A data set whose files lie in a folder, as a run with these settings of `model` reads it."""

    def __init__(self, name: str, folder: Path, choices: Any = "pairs", **model: Any) -> None:
        data = DataConfig(name=name, path=str(folder), choices=choices)
        config = RunConfig(workdir="x", data=data, model=BackboneConfig(init="scratch", **model))
        self.splits = Splits(config)
        self.tokenizer = word_tokenizer([*self.splits.texts("train"), *self.splits.texts("dev")])
        self.max_length = config.model.max_length

    def inputs(self, split: str) -> Examples:
        return self.splits.examples(split, self.tokenizer)

    def rows(self, split: str) -> list[str]:
        """Every input as one string, pieces apart."""
        found = self.inputs(split)
        ends = zip(found.offsets[:-1], found.offsets[1:], strict=True)
        return [" ".join(self.tokenizer.convert_ids_to_tokens(found.tokens[a:b].tolist())) for a, b in ends]

    def counts(self, split: str) -> dict[str, int]:
        """Counts of a split, without those that are 0."""
        self.inputs(split)
        return {name: count for name, count in self.splits.notes[split].items() if count}

    def score(self, split: str, logits: Any) -> tuple[dict[str, float], dict[str, Any]]:
        """Metrics and files of these logits."""
        found = self.splits.task.score(self.inputs(split), logits)
        return found.metrics, found.files

    def sure_of(self, ends: Iterable[tuple[int, int]]) -> np.ndarray:
        """Logits [rows, 2, S] of a model that is sure of one start and one end in every row."""
        pairs = np.array(list(ends))
        logits = np.zeros((len(pairs), 2, self.max_length), np.float32)
        for k in (0, 1):
            logits[np.arange(len(pairs)), k, pairs[:, k]] = _SURE
        return logits


def pairs(found: Examples) -> list[tuple[int, int]]:
    """First start and end of every row."""
    targets = found.row_targets or found.targets
    return [(int(a), int(b)) for a, b in zip(targets["starts"][:, 0], targets["ends"][:, 0], strict=True)]


def one_hot(places: np.ndarray, width: int) -> np.ndarray:
    """Logits [n, width] of a model that is sure of these."""
    return _SURE * np.eye(width, dtype=np.float32)[places]

"""Texts as word pieces that know which characters they stand for.

Answers are cut out of the original text by these characters (`cut_text`), never put together from
word pieces. docs/question_answering.md, "Answers as text".
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.tasks.examples import prepare_tokenizer

_CHUNK = 1000  # texts handed to the tokenizer's threads at a time
_CONTINUES = "##"
_MARKS = ("Mn", "Me")  # accents and the like that are characters of their own


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedTexts:
    """n texts as word pieces without special tokens, one after the other.

    Attributes:
      tokens: int32 [total].
      chars: int32 [total, 2], the characters `[start, end)` of its text that a piece stands for, or
        int32 [0, 2] where they were not asked for.
      offsets: int64 [n + 1], text i is `tokens[offsets[i]:offsets[i + 1]]`.
      num_tokens: int32 [n], pieces of each text before any were cut off.
    """

    tokens: np.ndarray
    chars: np.ndarray
    offsets: np.ndarray
    num_tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.num_tokens)

    def tokens_of(self, i: int) -> np.ndarray:
        """int32 [pieces of text i]."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def chars_of(self, i: int) -> np.ndarray:
        """int32 [pieces of text i, 2]."""
        return self.chars[self.offsets[i] : self.offsets[i + 1]]


class TextEncoder:
    """A tokenizer that neither cuts nor pads nor adds anything.

    Args:
      tokenizer: a `transformers.PreTrainedTokenizerFast`; not changed, and truncation and padding
        stored with it are not used.
      markers: words that texts mark their structure with, and the entry of the vocabulary each is
        read as: `{"[PAR]": "[unused1]"}`.

    Raises:
      UserError: a tokenizer without [CLS] or [SEP].

    Attributes:
      cls_id, sep_id: int.
      description: all that decides what a text becomes, for `storage.digest_of`.
    """

    def __init__(self, tokenizer: Any, markers: Mapping[str, str] | None = None) -> None:
        self._backend, (self.cls_id, self.sep_id) = prepare_tokenizer(tokenizer)
        self.description = (
            self._backend.to_str(),
            self.cls_id,
            self.sep_id,
            *sorted((markers or {}).items()),
        )
        # Marker id -> id of its stand-in. As words of the tokenizer the markers are found before the
        # text is lower-cased and split at brackets, and keep their characters.
        self._replaced: dict[int, tuple[str, str, int | None]] = {}
        for marker, entry in (markers or {}).items():
            self._add_marker(marker, entry)

    def _add_marker(self, marker: str, entry: str) -> None:
        from tokenizers import AddedToken

        stand_in = self._backend.token_to_id(entry)
        self._backend.add_special_tokens([AddedToken(marker, normalized=False, single_word=True)])
        self._replaced[self._backend.token_to_id(marker)] = (marker, entry, stand_in)

    def id_of(self, entry: str) -> int:
        """The id of an entry of the vocabulary that a layout needs.

        Raises:
          UserError: the vocabulary has no such entry.
        """
        found = self._backend.token_to_id(entry)
        if found is None:
            raise UserError(
                f"the tokenizer's vocabulary has no {entry}, which this task marks its texts with; "
                "choose one that has, such as that of bert-base-uncased"
            )
        return int(found)

    @functools.cached_property
    def _continuations(self) -> np.ndarray:
        vocabulary = self._backend.get_vocab()
        table = np.zeros(max(vocabulary.values()) + 1, bool)
        table[[i for entry, i in vocabulary.items() if entry.startswith(_CONTINUES)]] = True
        return table

    def continues(self, tokens: np.ndarray) -> np.ndarray:
        """Which pieces go on with the word of the piece before them; int [pieces] -> bool [pieces]."""
        return self._continuations[tokens]

    def encode(
        self, texts: Sequence[str], *, chars: bool = False, max_tokens: int | None = None
    ) -> EncodedTexts:
        """Tokenizes texts, in parallel.

        Args:
          texts: n of them; what has no word pieces becomes an empty row.
          chars: whether to keep the characters of each piece.
          max_tokens: pieces of a text to keep at most; None for all.

        Raises:
          UserError: a text holds a marker whose stand-in the vocabulary lacks.
        """
        from tqdm import tqdm

        encode_batch = self._backend.encode_batch if chars else self._backend.encode_batch_fast
        tokens, spans, num_tokens = [], [], []
        # disable=None: no bar where stderr is not a terminal; delay: none for what takes a moment.
        with tqdm(total=len(texts), desc="tokenizing", unit="text", disable=None, delay=2) as bar:
            for start in range(0, len(texts), _CHUNK):
                some = list(texts[start : start + _CHUNK])
                for encoding in encode_batch(some, add_special_tokens=False):
                    ids = np.array(encoding.ids, np.int32)
                    num_tokens.append(len(ids))
                    tokens.append(ids[:max_tokens])
                    if chars:
                        spans.append(np.array(encoding.offsets[:max_tokens], np.int32).reshape(-1, 2))
                bar.update(len(some))
        empty = np.zeros(0, np.int32)
        return EncodedTexts(
            tokens=self._replace_markers(np.concatenate([empty, *tokens])),
            chars=np.concatenate([empty.reshape(0, 2), *spans]),
            offsets=np.cumsum([0, *map(len, tokens)], dtype=np.int64),
            num_tokens=np.array(num_tokens, np.int32),
        )

    def encode_distinct(
        self, texts: Sequence[str], *, chars: bool = False, max_tokens: int | None = None
    ) -> tuple[EncodedTexts, np.ndarray]:
        """Like `encode`, but texts that occur several times are tokenized and stored once.

        Returns:
          The distinct texts, and for each of the given ones its place among them, int64 [n].
        """
        places: dict[str, int] = {}
        index = np.array([places.setdefault(text, len(places)) for text in texts], np.int64)
        return self.encode(list(places), chars=chars, max_tokens=max_tokens), index

    def _replace_markers(self, tokens: np.ndarray) -> np.ndarray:
        for marker_id, (marker, entry, stand_in) in self._replaced.items():
            found = tokens == marker_id
            if found.any() and stand_in is None:
                raise UserError(
                    f"a text holds {marker}, which is read as {entry}, and the tokenizer's vocabulary has "
                    "none; choose one that has, such as that of bert-base-uncased"
                )
            tokens[found] = -1 if stand_in is None else stand_in
        return tokens


def locate(chars: np.ndarray, start: int, end: int) -> tuple[int, int] | None:
    """The word pieces that stand for the characters `[start, end)`.

    A piece of which only a part lies inside counts: of `Japan` in `Japanese`, one piece, the answer
    can be no less than the whole.

    Args:
      chars: int [pieces, 2], see `EncodedTexts`.
      start, end: characters of the same text.

    Returns:
      First and last piece, both inclusive; None where the tokenizer keeps none of the characters.
    """
    first = int(np.searchsorted(chars[:, 1], start, side="right"))
    last = int(np.searchsorted(chars[:, 0], end, side="left")) - 1
    return (first, last) if first <= last else None


def cut_text(text: str, start: int, end: int) -> str:
    """The characters `[start, end)`, and the combining marks that follow them.

    A tokenizer that strips accents leaves those that are characters of their own out of the
    characters of a piece; an answer must not lose its last accent for that.
    """
    while end < len(text) and unicodedata.category(text[end]) in _MARKS:
        end += 1
    return text[start:end]

"""Tokenize texts into word pieces that know which characters they stand for.

Answers are cut out of the original text by these characters (`cut_span`), never put together from word
pieces. See docs/question_answering.md, "Answers as text".
"""

import dataclasses
import functools
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trbert_jax.datasets.records import trim_span
from trbert_jax.errors import UserError
from trbert_jax.io import streams
from trbert_jax.model.tokenizers import copy_backend
from trbert_jax.tasks.examples import Ragged

_CHUNK = 1000  # texts handed to the tokenizer's threads at a time
_CHARACTERS = 8  # of a long text read for each piece that is kept, before more are read
_MARKS = ("Mn", "Me")  # combining characters, such as accents


# A forked process has none of the library's threads, and would wait for them.
_THREADS = "TOKENIZERS_PARALLELISM"
os.register_at_fork(after_in_child=lambda: os.environ.update({_THREADS: "false"}))


def prepare_tokenizer(tokenizer: Any) -> tuple[Any, tuple[int, int]]:
    """Copies the backend of a tokenizer, without cutting and padding; returns it and the ids of [CLS], [SEP].

    Raises `UserError` if it lacks one of them.
    """
    # If unset, the library warns once the process has forked.
    os.environ.setdefault(_THREADS, "true")
    ends = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    if None in ends:
        raise UserError("the tokenizer has no [CLS] or no [SEP] token; choose one made for BERT")
    return copy_backend(tokenizer), ends


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedTexts:
    """n texts as word pieces without special tokens."""

    tokens: Ragged  # int32, the pieces of each text
    # int32 [pieces, 2], the characters `[start, end)` that a piece stands for; empty unless asked for
    chars: Ragged
    # int64 [n], pieces of each text before it was cut; of a text read in part, only more than are kept.
    num_tokens: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class TextRows:
    """n texts or pairs of texts with special tokens."""

    tokens: Ragged  # int32, the pieces of each row
    token_types: np.ndarray | None  # int8 [total], 0 and 1; None if no row is a pair
    cut: np.ndarray  # bool [n], whether the row lacks pieces
    empty: np.ndarray  # bool [1 or 2, n], whether the text or second text has no pieces


class TextEncoder:
    """A tokenizer that neither cuts nor pads nor adds special tokens.

    Made of a `transformers.PreTrainedTokenizerFast`, which does not change. `markers` has the vocabulary
    entries that words of structure are read as: `{"[PAR]": "[unused1]"}`. Raises `UserError` without [CLS]
    or [SEP].
    """

    def __init__(self, tokenizer: Any, markers: Mapping[str, str] | None = None) -> None:
        from tokenizers import AddedToken

        markers = markers or {}
        self._backend, ends = prepare_tokenizer(tokenizer)
        self.cls, self.sep = (np.array([i], np.int32) for i in ends)
        # Everything that decides how a text is encoded, for `digest_of`.
        split = " split" if self._backend.encode_special_tokens else ""
        self.description = (self._backend.to_str() + split, *ends, *sorted(markers.items()))
        # Marker id -> its word, its entry and the entry's id. As words of the tokenizer the markers are
        # found before the text is lower-cased and split at brackets, and keep their characters.
        self._replaced: dict[int, tuple[str, str, int | None]] = {}
        for marker, entry in markers.items():
            entry_id = self._backend.token_to_id(entry)
            self._backend.add_special_tokens([AddedToken(marker, normalized=False, single_word=True)])
            self._replaced[self._backend.token_to_id(marker)] = (marker, entry, entry_id)
        # A text that ends inside an added token or one of structure, such as `<br>`, has other last pieces.
        added = (token.content for token in self._backend.get_added_tokens_decoder().values())
        self._margin = 16 + 2 * max(map(len, added), default=0)

    def id_of(self, entry: str) -> int:
        """Returns the id of a vocabulary entry. Raises `UserError` if there is none."""
        found = self._backend.token_to_id(entry)
        if found is None:
            raise UserError(
                f"the tokenizer's vocabulary has no {entry}, which this task marks its texts with; "
                "choose one that has, such as that of bert-base-uncased"
            )
        return int(found)

    def words(self, ids: Iterable[int]) -> list[str]:
        """Returns the vocabulary entries of ids."""
        return [self._backend.id_to_token(int(i)) for i in ids]

    @functools.cached_property
    def continues(self) -> np.ndarray:
        """bool [vocabulary size], whether a piece continues the word of the piece before it."""
        vocabulary = self._backend.get_vocab()
        table = np.zeros(max(vocabulary.values()) + 1, bool)
        table[[i for entry, i in vocabulary.items() if entry.startswith("##")]] = True
        return table

    def encode(
        self, texts: Sequence[str], *, chars: bool = False, max_tokens: int | None = None
    ) -> EncodedTexts:
        """Tokenizes texts, in parallel; one without word pieces becomes an empty array.

        `chars` keeps the characters of each piece; `max_tokens` limits the pieces of a text that are kept,
        and with them how much of a long text is read. Raises `UserError` if a text holds a marker whose entry
        the vocabulary lacks.
        """
        tokens, spans, num_tokens = [], [], []
        with streams.bar(len(texts), "tokenizing", "text") as bar:
            for start in range(0, len(texts), _CHUNK):
                chunk = list(texts[start : start + _CHUNK])
                for encoding in self._encodings(chunk, chars, max_tokens):
                    ids = np.array(encoding.ids, np.int32)
                    num_tokens.append(len(ids))
                    tokens.append(ids[:max_tokens])
                    if chars:
                        spans.append(np.array(encoding.offsets[:max_tokens], np.int32).reshape(-1, 2))
                bar.update(len(chunk))
        ragged = Ragged.of(tokens)
        for marker_id, (marker, entry, entry_id) in self._replaced.items():
            found = ragged.values == marker_id
            if found.any() and entry_id is None:
                raise UserError(
                    f"a text holds {marker}, which is read as {entry}, and the tokenizer's vocabulary has "
                    "none; choose one that has, such as that of bert-base-uncased"
                )
            ragged.values[found] = -1 if entry_id is None else entry_id
        return EncodedTexts(ragged, Ragged.of(spans, width=2), np.array(num_tokens, np.int64))

    def _encodings(self, texts: list[str], chars: bool, max_tokens: int | None) -> list[Any]:
        """Returns the library's encodings; of long texts, of as many characters as `max_tokens` need."""
        wanted = (max_tokens or 0) + self._margin
        length = _CHARACTERS * wanted
        in_part = max_tokens is not None and any(len(text) > length for text in texts)
        # The fast one knows neither characters nor words.
        run = self._backend.encode_batch if chars or in_part else self._backend.encode_batch_fast
        encode = functools.partial(run, add_special_tokens=False)
        if not in_part:
            return encode(texts)
        encodings = encode([text[:length] for text in texts])
        while True:
            longer = (i for i, text in enumerate(texts) if len(text) > length)
            short = [i for i in longer if _num_whole(encodings[i]) < wanted]
            if not short:
                return encodings
            length *= 4
            for i, encoding in zip(short, encode([texts[i][:length] for i in short]), strict=True):
                encodings[i] = encoding

    def rows(self, texts: Sequence[Sequence[str]], max_length: int) -> "TextRows":
        """Encodes texts, alone or in pairs, as `[CLS] text [SEP]` and `[CLS] text [SEP] second text [SEP]`.

        Cuts them to `max_length` tokens, of a pair first the longer text, as Hugging Face does.
        """
        num_texts = max(map(len, texts), default=1)
        columns = [[text[k] if k < len(text) else "" for text in texts] for k in range(num_texts)]
        parts = [self.encode(column, max_tokens=max_length) for column in columns]
        pieces, lengths, cut = list[np.ndarray](), list[int](), list[bool]()
        for i, text in enumerate(texts):
            counts = [int(part.num_tokens[i]) for part in parts[: len(text)]]
            if len(text) == 2 and min(counts) > max_length:  # both may be read in part: which is longer?
                counts = self.encode(text).num_tokens.tolist()
            kept = cut_lengths(counts, max_length - 1 - len(text))
            cut.append(kept != counts)
            for k, part in enumerate(parts):
                segment = [part.tokens[i][: kept[k]], self.sep] if k < len(text) else []
                segment = [self.cls, *segment] if k == 0 else segment
                pieces += segment
                lengths.append(sum(map(len, segment)))
        offsets = np.cumsum([0, *lengths], dtype=np.int64)[::num_texts]
        types = np.repeat(np.tile(np.arange(num_texts, dtype=np.int8), len(texts)), lengths)
        tokens = Ragged(np.concatenate([np.zeros(0, np.int32), *pieces]), offsets)
        empty = np.array([part.num_tokens == 0 for part in parts]).reshape(num_texts, -1)
        return TextRows(tokens, types if num_texts > 1 else None, np.array(cut, bool), empty)

    def encode_distinct(
        self, texts: Sequence[str], *, chars: bool = False, max_tokens: int | None = None
    ) -> tuple[EncodedTexts, np.ndarray]:
        """Encodes each distinct text once; returns them and the position of each given one, int64 [n]."""
        places: dict[str, int] = {}
        index = np.array([places.setdefault(text, len(places)) for text in texts], np.int64)
        return self.encode(list(places), chars=chars, max_tokens=max_tokens), index


def cut_lengths(lengths: Sequence[int], room: int) -> list[int]:
    """Returns the tokens to keep of each of one or two texts so that together they have at most `room`.

    The longer text is cut first, as Hugging Face's strategy `longest_first` does.
    """
    if sum(lengths) <= room or len(lengths) == 1:
        return [min(length, room) for length in lengths]
    shorter = min(lengths)
    kept = (shorter, room - shorter) if 2 * shorter <= room else (room // 2, room - room // 2)
    return [*kept] if lengths[0] <= lengths[1] else [*reversed(kept)]


def _num_whole(encoding: Any) -> int:
    """Returns the number of pieces before the last word, which more text may continue."""
    words = encoding.word_ids
    return words.index(words[-1]) if words else 0


def locate(chars: np.ndarray, start: int, end: int) -> tuple[int, int] | None:
    """Finds the pieces, `EncodedTexts.chars` int [pieces, 2], that stand for the characters `[start, end)`.

    A piece that lies only partly inside counts: `Japan` in `Japanese`, one piece, gives the whole piece.
    Returns the first and last one, both inclusive; None if the tokenizer keeps none of the characters.
    """
    first = int(np.searchsorted(chars[:, 1], start, side="right"))
    last = int(np.searchsorted(chars[:, 0], end, side="left")) - 1
    return (first, last) if first <= last else None


def cut_span(text: str, start: int, end: int) -> tuple[int, int]:
    """Returns the characters `[start, end)` and the combining marks that follow them, trimmed (`trim_span`).

    A tokenizer that strips accents leaves them out of a piece's characters; an answer keeps its last one.
    """
    while end < len(text) and unicodedata.category(text[end]) in _MARKS:
        end += 1
    span = trim_span(text, int(start), int(end))
    return (span.start, span.end) if span else (int(start), int(end))

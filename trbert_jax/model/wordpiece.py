"""Trains a WordPiece vocabulary, for a model that starts from random weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from trbert_jax.errors import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MIN_VOCAB_SIZE = 100
_MAX_CHARACTERS = 1000
_CONTINUES = "##"


def train_wordpiece(texts: Sequence[str], vocab_size: int, markers: Sequence[str] = ()) -> Any:
    """Trains a tokenizer like that of BERT uncased; the same texts always give the same one.

    Args:
      texts: what to learn the vocabulary from.
      vocab_size: entries at most, fewer where the texts do not hold as many.
      markers: entries besides, which no text is tokenized into, such as BERT's [unused1].

    Returns:
      A `transformers.PreTrainedTokenizerFast`; [PAD], [UNK], [CLS], [SEP], [MASK] are 0 to 4, markers follow.

    Raises:
      UserError: a vocabulary of less than 100 entries.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size is {vocab_size}; expected at least {MIN_VOCAB_SIZE}")
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    vocabulary = _vocabulary(texts, vocab_size, normalizer, splitter, markers)
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    backend.post_processor = processors.BertProcessing(
        ("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"])
    )
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def _vocabulary(
    texts: Sequence[str], vocab_size: int, normalizer: Any, splitter: Any, markers: Sequence[str]
) -> dict[str, int]:
    from tokenizers import Tokenizer, models, trainers

    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(normalizer.normalize_str(text))
    frequent = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    alphabet = sorted(frequent[: min(_MAX_CHARACTERS, vocab_size // 10)])
    # The trainer numbers single characters, and breaks ties by those numbers, in the order of a
    # hash table that differs from run to run. Listed as special tokens they are numbered beforehand.
    listed = [*SPECIAL_TOKENS, *markers, *alphabet, *(_CONTINUES + c for c in alphabet)]
    scratch = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    scratch.normalizer, scratch.pre_tokenizer = normalizer, splitter
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=listed,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix=_CONTINUES,
        show_progress=False,
    )
    scratch.train_from_iterator(texts, trainer, length=len(texts))
    return scratch.get_vocab()

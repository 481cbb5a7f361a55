from __future__ import annotations

import random
from pathlib import Path

import pytest

from trbert_jax.errors import UserError
from trbert_jax.model.tokenizers import SPECIAL_TOKENS, load_tokenizer, train_wordpiece, wrap_tokenizer


def make_texts() -> list[str]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijkl", k=rng.randint(2, 8))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=30)) for _ in range(100)]


TEXTS = make_texts()


def test_the_same_texts_give_the_same_vocabulary() -> None:
    vocabularies = [train_wordpiece(TEXTS, 300).get_vocab() for _ in range(4)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    assert sorted(vocabularies[0].values()) == list(range(300))
    assert [vocabularies[0][token] for token in SPECIAL_TOKENS] == list(range(5))


def test_it_reads_text_as_bert_does() -> None:
    tokenizer = train_wordpiece(["The films, the FILM, a café. The Café!"] * 3, 1000)
    assert len(tokenizer) < 1000
    assert tokenizer.tokenize("the FILM, the CAFÉ?") == ["the", "film", ",", "the", "cafe", "[UNK]"]
    ids = tokenizer("the film")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "the", "film", "[SEP]"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the film"
    assert tokenizer.pad_token_id == 0


def test_only_the_special_tokens_are_special() -> None:
    tokenizer = train_wordpiece(TEXTS, 300)
    assert set(tokenizer.get_added_vocab()) == set(SPECIAL_TOKENS)
    assert tokenizer.tokenize("##a") == ["[UNK]"] * 2 + ["a"]


def test_saved_and_loaded(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(TEXTS, 300)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    text = TEXTS[0].upper()
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert wrap_tokenizer(tokenizer.backend_tokenizer).cls_token_id == tokenizer.cls_token_id


def test_rare_characters_do_not_fill_the_vocabulary() -> None:
    rare = ["".join(chr(0x3041 + 8 * i + k) for k in range(8)) for i in range(10)]
    tokenizer = train_wordpiece(TEXTS + rare, 200)
    assert len(tokenizer) == 200
    # 12 common letters and 8 of the 80 rare characters, each at the beginning of a word and inside.
    assert sum(len(token.removeprefix("##")) == 1 for token in tokenizer.get_vocab()) == 40


def test_too_small() -> None:
    with pytest.raises(UserError, match="vocab_size is 99; expected at least 100"):
        train_wordpiece(TEXTS, 99)

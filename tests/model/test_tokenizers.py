import random
from pathlib import Path

import pytest
import tiny_models
from tiny_models import BERT, edit_json, tiny_model, tiny_params, tiny_tokenizer

from trbert_jax.errors import UserError
from trbert_jax.model.pretrained import load_pretrained, save_pretrained
from trbert_jax.model.tokenizers import (
    SPECIAL_TOKENS,
    load_tokenizer,
    read_line_breaks_as_spaces,
    train_wordpiece,
)


def make_texts() -> list[str]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijkl", k=rng.randint(2, 8))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=30)) for _ in range(100)]


TEXTS = make_texts()


def test_line_breaks_as_spaces_stay_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    assert len(tokenizer("a<br />film<br>.").tokens()) > 5
    read_line_breaks_as_spaces(tokenizer)
    save_pretrained(tmp_path, BERT, tiny_params(BERT), tokenizer)
    loaded = load_tokenizer(tmp_path)
    assert loaded("a<br /><br/>film<br>.").tokens() == ["[CLS]", "a", "film", ".", "[SEP]"]
    assert loaded("a < br film").tokens() == tiny_tokenizer()("a < br film").tokens()


def test_bare_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(tiny_models.VOCABULARY) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "model_max_length": 4}')
    text = "I saw the goods, not badly!"
    assert load_tokenizer(tmp_path)(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]


def test_no_tokenizer(tmp_path: Path) -> None:
    save_pretrained(tmp_path, BERT, tiny_params(BERT), None)
    assert load_pretrained(tmp_path).tokenizer is None
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_cls_comes_first(tmp_path: Path) -> None:
    edit_json(tiny_model(tmp_path) / "tokenizer.json", post_processor=None)
    with pytest.raises(UserError, match=r"\[CLS\]"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("<s>\n</s>\na\n")
    with pytest.raises(UserError, match=r"PreTrainedTokenizerFast.*vocab.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"no token \[CLS\].*\[SEP\].*\[PAD\].*\[UNK\]"):
        load_tokenizer(tmp_path)


def test_same_texts_give_the_same_vocabulary() -> None:
    vocabularies = [train_wordpiece(TEXTS, 300).get_vocab() for _ in range(4)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    assert sorted(vocabularies[0].values()) == list(range(300))
    assert [vocabularies[0][token] for token in SPECIAL_TOKENS] == list(range(5))


def test_trained_tokenizer_reads_text_like_bert() -> None:
    tokenizer = train_wordpiece(["The films, the FILM, a café. The Café!"] * 3, 1000)
    assert len(tokenizer) < 1000
    assert tokenizer.tokenize("the FILM, the CAFÉ?") == ["the", "film", ",", "the", "cafe", "[UNK]"]
    ids = tokenizer("the film")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "the", "film", "[SEP]"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the film"
    assert tokenizer.pad_token_id == 0


def test_trained_tokenizer_saved_and_loaded(tmp_path: Path) -> None:
    tokenizer = train_wordpiece(TEXTS, 300)
    assert set(tokenizer.get_added_vocab()) == set(SPECIAL_TOKENS)
    assert tokenizer.tokenize("##a") == ["[UNK]"] * 2 + ["a"]
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded(TEXTS[0].upper())["input_ids"] == tokenizer(TEXTS[0].upper())["input_ids"]


def test_rare_characters_do_not_fill_the_vocabulary() -> None:
    rare = ["".join(chr(0x3041 + 8 * i + k) for k in range(8)) for i in range(10)]
    tokenizer = train_wordpiece(TEXTS + rare, 200)
    assert len(tokenizer) == 200
    # 12 common letters and 8 of the 80 rare characters, each at the beginning of a word and inside.
    assert sum(len(token.removeprefix("##")) == 1 for token in tokenizer.get_vocab()) == 40


def test_vocabulary_that_is_too_small() -> None:
    with pytest.raises(UserError, match="99"):
        train_wordpiece(TEXTS, 99)

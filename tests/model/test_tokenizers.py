import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from tiny_models import BERT, edit_json, tiny_model, tiny_params, tiny_tokenizer
from transformers import AutoTokenizer, BertTokenizer

from trbert_jax.errors import UserError
from trbert_jax.model.pretrained import load_pretrained, save_pretrained
from trbert_jax.model.tokenizers import (
    SPECIAL_TOKENS,
    copy_tokenizer,
    load_tokenizer,
    read_line_breaks_as_spaces,
    save_tokenizer,
    train_wordpiece,
)
from trbert_jax.tasks.text_encoder import TextEncoder


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
    # Digests of data depend on this form, and must stay.
    assert '"type":"BertProcessing"' in load_tokenizer(tmp_path).backend_tokenizer.to_str()


WORDS, NUMBER = "\n".join(tiny_models.VOCABULARY), len(tiny_models.VOCABULARY)
ADDED = {"content": "<num>", "special": False, "normalized": True}
ADDED |= {"lstrip": False, "rstrip": False, "single_word": False}


def odd_folder(folder: Path, files: dict[str, Any], **config: Any) -> Path:
    """Writes a model folder's small files; `tokenizer.json: None` is that of BERT uncased."""
    folder.mkdir()
    config = {"model_type": "bert", "vocab_size": NUMBER + 1, **config}
    for name, content in {"config.json": config, **files}.items():
        if name == "tokenizer.json":
            BertTokenizer(vocab={w: i for i, w in enumerate(WORDS.split("\n"))}).save_pretrained(folder / "x")
            content = {**json.loads((folder / "x" / name).read_text()), **(content or {})}
        data = content if isinstance(content, str | bytes) else json.dumps(content)
        (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder


def settings(**values: Any) -> dict[str, Any]:
    return {"vocab.txt": WORDS, "tokenizer_config.json": values}


ODD: dict[str, dict[str, Any]] = {
    "added_tokens.json": {"vocab.txt": WORDS, "added_tokens.json": {"<num>": NUMBER}},
    "added_tokens_decoder": settings(added_tokens_decoder={str(NUMBER): ADDED}),
    "added to tokenizer.json": {"tokenizer.json": None, "added_tokens.json": {"<num>": NUMBER}},
    "special token": settings(additional_special_tokens=["<num>"]),
    "cased beside lower-casing": {"tokenizer.json": None, "tokenizer_config.json": {"do_lower_case": False}},
    "taken as it is": {
        "tokenizer.json": {"normalizer": None},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    },
    "accents alone": settings(do_lower_case=False, strip_accents=True),
    "null that means nothing": settings(tokenizer_class=None, strip_accents=None, model_max_length=None),
    "special tokens split": settings(split_special_tokens=True),
    "CRLF": {"vocab.txt": WORDS.replace("\n", "\r\n")},
    "byte order mark": {"vocab.txt": b"\xef\xbb\xbf" + WORDS.encode()},
    "gap": {"vocab.txt": WORDS.replace("film", "\nfilm")},
    "space at the end": {"vocab.txt": WORDS.replace("film", "film ")},
    "cuts and pads": {
        "tokenizer.json": {
            "truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        }
    },
    "special tokens of its own": {
        "vocab.txt": WORDS.replace("[CLS]", "<s>").replace("[SEP]", "</s>"),
        "special_tokens_map.json": {"cls_token": "<s>", "sep_token": "</s>"},
    },
}


@pytest.mark.parametrize("name", ODD)
def test_odd_folders_are_read_as_transformers_does(tmp_path: Path, name: str) -> None:
    folder = odd_folder(tmp_path / "model", ODD[name])
    text = "The film <num> was B\u00e4d, [SEP] <s> \u6771 THE badly"
    expected = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    tokenizer = load_tokenizer(folder)
    assert tokenizer.backend_tokenizer.encode(text).ids == expected
    for own in (
        tokenizer,
        copy_tokenizer(pickle.loads(pickle.dumps(tokenizer))),
    ):  # as tasks and models read texts
        assert TextEncoder(own).encode([text]).tokens[0].tolist() == expected[1:-1]
    tiny_model(tmp_path / "ours")
    save_tokenizer(tmp_path / "ours", tokenizer, BERT)
    assert load_tokenizer(tmp_path / "ours").backend_tokenizer.encode(text).ids == expected


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (settings(do_lower_case=None), "tokenizer_config.json: do_lower_case is null"),
        (settings(tokenize_chinese_chars="no"), 'tokenize_chinese_chars is "no"'),
        (settings(unk_token=None), "null: unk_token|no token None"),
        (settings(added_tokens_decoder=None), "null: added_tokens_decoder"),
        (settings(tokenizer_class="XLMRobertaTokenizer"), "XLMRobertaTokenizer.*sentencepiece"),
        (settings(tokenizer_class="RobertaTokenizer"), "RobertaTokenizer.*merges"),
        (settings(tokenizer_class="BertJapaneseTokenizer"), "BertJapaneseTokenizer"),
        (settings(tokenizer_class="MPNetTokenizer"), "no token <s>"),
        ({"vocab.txt": WORDS.replace("[CLS]", "cls")}, r"no token \[CLS\]"),
        ({"vocab.txt": WORDS.replace("[UNK]", "unk")}, r"no token \[UNK\]"),
        ({"vocab.txt": WORDS.encode("utf-16")}, "vocab.txt: not UTF-8"),
        ({"vocab.txt": WORDS, "added_tokens.json": ["<num>"]}, "added_tokens.json: expected a JSON object"),
        ({"vocab.txt": WORDS, "tokenizer_config.json": "{"}, "tokenizer_config.json: not valid JSON"),
        (
            {"vocab.txt": WORDS, "tokenizer_config.json": "\ufeff{}"},
            "tokenizer_config.json begins with a byte",
        ),
    ],
)
def test_tokenizers_that_cannot_be_right(tmp_path: Path, files: dict[str, Any], words: str) -> None:
    folder = odd_folder(tmp_path / "model", files)
    with pytest.raises(UserError, match=rf"\A{folder}.*({words})"):
        load_tokenizer(folder)


def test_a_vocabulary_beyond_the_model(tmp_path: Path) -> None:
    """Of as many tokens as the model, the last of them with a higher id."""
    tokens = {w: i + (w == "badly") for i, w in enumerate([*tiny_models.VOCABULARY[:-1], "badly"])}
    BertTokenizer(vocab=tokens).save_pretrained(tiny_model(tmp_path))
    with pytest.raises(UserError, match=rf"ids up to {NUMBER} \('badly'\), the model's vocabulary has only"):
        load_pretrained(tmp_path)


def test_a_tokenizer_that_says_two_things_is_announced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_tokenizer(odd_folder(tmp_path / "model", ODD["cased beside lower-casing"]))
    assert "normalizer" in caplog.text


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

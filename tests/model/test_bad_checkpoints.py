"""Damaged and unfit checkpoints: an error that names file, tensor or option."""

from __future__ import annotations

import builtins
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_checkpoints import edit_json, edit_weights, quietly
from tiny_models import BERT, tiny_model, tiny_params

from trbert_jax.errors import UserError
from trbert_jax.model.pretrained import load_pretrained, load_tokenizer, read_weights, save_pretrained

Edit = Callable[[Path], Any]


def cut(path: Path) -> None:
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])


def scribble(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[8:200] = os.urandom(192)
    (path / "model.safetensors").write_bytes(content)


def reshape(path: Path) -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        weights["bert.embeddings.word_embeddings.weight"] = np.zeros((40, 16), np.float32)
        weights["bert.encoder.layer.2.output.dense.weight"] = np.zeros((16, 32), np.float32)

    edit_weights(path, change)


def drop_and_add(path: Path) -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        del weights["bert.encoder.layer.1.output.dense.bias"]
        del weights["bert.encoder.linear_2.1.bias"]  # half a selector is no plain encoder
        weights["qa_outputs.weight"] = np.zeros((2, 16), np.float32)
        weights["bert.encoder.layer.4.output.dense.bias"] = np.zeros(16, np.float32)

    edit_weights(path, change)


def quantize(path: Path) -> None:
    edit_weights(path, lambda w: w.update({"classifier.weight": np.zeros((2, 16), np.int8)}))


def diverge(path: Path) -> None:
    edit_weights(path, lambda w: w["bert.pooler.dense.bias"].fill(np.nan))


def lose_a_shard(path: Path) -> None:
    (path / "model.safetensors").unlink()
    index = {"weight_map": {"classifier.weight": "model-00001-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def bad_index(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text("[1]")


def shrink_vocabulary(path: Path) -> None:
    edit_weights(path, lambda w: w.update({"bert.embeddings.word_embeddings.weight": np.ones((9, 16), "f")}))
    edit_json(path / "config.json", vocab_size=9)


BAD_CHECKPOINTS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "truncated": (cut, ("model.safetensors", "truncated or damaged")),
    "corrupt": (scribble, ("model.safetensors", "truncated or damaged")),
    "empty": (lambda p: (p / "model.safetensors").write_bytes(b""), ("truncated or damaged",)),
    "no config": (lambda p: (p / "config.json").unlink(), ("no config.json", "unfinished")),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ("no weights", "model.safetensors")),
    "config not JSON": (lambda p: (p / "config.json").write_text("{,"), ("config.json:1", "JSON")),
    "config not an object": (lambda p: (p / "config.json").write_text("[]"), ("config.json", "object")),
    "other shapes": (
        reshape,
        (
            "bert.embeddings.word_embeddings.weight: [40, 16] in the checkpoint, [27, 16] expected",
            "bert.encoder.layer.2.output.dense.weight: [16, 32] in the checkpoint, [16, 24] expected",
        ),
    ),
    "other names": (
        drop_and_add,
        (
            "bert.encoder.layer.1.output.dense.bias [16]",
            "bert.encoder.linear_2.1.bias [1]",
            "qa_outputs.weight",
            "bert.encoder.layer.4.output.dense.bias",
        ),
    ),
    "quantized": (quantize, ("classifier.weight", "I8")),
    "not finite": (diverge, ("bert.pooler.dense.bias", "not finite")),
    "missing shard": (lose_a_shard, ("index.json", "model-00001-of-00002.safetensors")),
    "bad index": (bad_index, ("index.json", "weight_map")),
    "tokenizer not JSON": (lambda p: (p / "tokenizer.json").write_text("{"), ("tokenizer.json",)),
    "tokenizer settings not an object": (
        lambda p: (p / "tokenizer_config.json").write_text("3"),
        ("tokenizer_config.json", "object"),
    ),
    "vocabulary too large": (shrink_vocabulary, ("27 tokens", "only 9")),
}


@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_bad_checkpoint(tmp_path: Path, case: str) -> None:
    damage, words = BAD_CHECKPOINTS[case]
    tiny_model(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError) as error:
        load_pretrained(tmp_path / "model")
    for word in (str(tmp_path / "model"), *words):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_layers": [0, 4]}, "0 to 3"),
        ({"keep_layers": [1, 1]}, "different"),
        ({"keep_layers": []}, "keep_layers"),
        ({"max_length": 21}, "max_positions"),
        ({"max_length": 1}, "max_length"),
        ({"max_positions": 1}, "max_positions"),
        ({"labels": ["a", "a"]}, "differ"),
        ({"labels": []}, "none given"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_pretrained(tiny_model(tmp_path), **options)


def test_no_tokenizer_matters_only_when_one_is_asked_for(tmp_path: Path) -> None:
    save_pretrained(tmp_path / "model", BERT, tiny_params(BERT), None)
    assert quietly(tmp_path / "model").tokenizer is None
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path / "model")


def test_a_tokenizer_has_to_put_cls_first(tmp_path: Path) -> None:
    path = tiny_model(tmp_path) / "tokenizer.json"
    edit_json(path, post_processor=None)
    with pytest.raises(UserError, match=r"\[CLS\] first"):
        load_tokenizer(tmp_path)


def test_a_vocabulary_has_to_be_berts(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("<s>\n</s>\na\n")
    with pytest.raises(UserError, match=r"\[CLS\]"):
        load_tokenizer(tmp_path)


@pytest.mark.torch
@pytest.mark.parametrize("content", [b"", b"\x80\x02garbage"])
def test_damaged_torch_file(tmp_path: Path, content: bytes) -> None:
    tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: truncated, damaged"):
        load_pretrained(tmp_path)


@pytest.mark.torch
def test_a_torch_file_runs_no_code(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"classifier.weight": Path("x")}, tmp_path / "pytorch_model.bin")  # needs more than weights
    with pytest.raises(UserError, match="holding more than weights"):
        load_pretrained(tmp_path)


def test_a_torch_file_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    real_import = builtins.__import__

    def no_torch(name: str, *arguments: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "torch":
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", no_torch)
    with pytest.raises(UserError, match=r"trbert_jax\[torch\]"):
        read_weights(tmp_path)

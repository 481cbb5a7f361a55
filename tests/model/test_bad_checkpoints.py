"""Unfit checkpoints: errors name file, tensor or option. Damaged ones are in tests/test_bad_input.py."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import edit_json, edit_weights, tiny_model

from trbert_jax.errors import UserError
from trbert_jax.model.pretrained import load_pretrained
from trbert_jax.model.weight_files import read_weights

Edit = Callable[[Path], Any]
WEIGHTS = "model.safetensors"


def rewrite(file: str, change: Callable[[bytes], bytes]) -> Edit:
    return lambda path: (path / file).write_bytes(change((path / file).read_bytes()))


def put(**arrays: np.ndarray) -> Edit:
    """Puts arrays among the weights; `__` stands for a dot."""
    return lambda path: edit_weights(
        path, lambda w: w.update({name.replace("__", "."): array for name, array in arrays.items()})
    )


def drop_and_add(path: Path) -> None:
    def change(weights: dict[str, np.ndarray]) -> None:
        del weights["bert.encoder.layer.1.output.dense.bias"]
        del weights["bert.encoder.linear_2.1.bias"]  # half a selector
        weights["qa_outputs.weight"] = np.zeros((2, 16), np.float32)
        weights["bert.encoder.layer.4.output.dense.bias"] = np.zeros(16, np.float32)
        weights["embeddings.LayerNorm.weight"] = np.zeros(16, np.float32)  # also there with its prefix

    edit_weights(path, change)


def index(content: Any) -> Edit:
    def replace(path: Path) -> None:
        (path / WEIGHTS).unlink()
        (path / "model.safetensors.index.json").write_text(json.dumps(content))

    return replace


def shrink_vocabulary(path: Path) -> None:
    put(bert__embeddings__word_embeddings__weight=np.ones((9, 16), np.float32))(path)
    edit_json(path / "config.json", vocab_size=9)


BAD_CHECKPOINTS: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "config not JSON": (rewrite("config.json", lambda old: b"{,"), ("config.json", "JSON")),
    "config not an object": (rewrite("config.json", lambda old: b"[]"), ("config.json", "object")),
    "other shapes": (
        put(
            bert__embeddings__word_embeddings__weight=np.zeros((40, 16), np.float32),
            bert__encoder__layer__2__output__dense__weight=np.zeros((16, 32), np.float32),
        ),
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
            "embeddings.LayerNorm.weight (read as bert.embeddings.LayerNorm.weight): stored twice",
        ),
    ),
    "quantized": (put(classifier__weight=np.zeros((2, 16), np.int8)), ("classifier.weight", "I8")),
    "not finite": (put(bert__pooler__dense__bias=np.full(16, np.nan, np.float32)), ("pooler.dense.bias",)),
    "missing shard": (index({"weight_map": {"x": "model-1-of-2.safetensors"}}), ("model-1-of-2.",)),
    "bad index": (index([1]), ("index.json", "weight_map")),
    "tokenizer not JSON": (rewrite("tokenizer.json", lambda old: b"{"), ("tokenizer.json",)),
    "tokenizer settings": (rewrite("tokenizer_config.json", lambda old: b"3"), ("tokenizer_config.json",)),
    "vocabulary too large": (shrink_vocabulary, ("26", "9")),
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
    ("options", "key"),
    [
        ({"keep_layers": [0, 4]}, "keep_layers"),
        ({"keep_layers": [1, 1]}, "keep_layers"),
        ({"keep_layers": []}, "keep_layers"),
        ({"max_length": 21}, "max_positions"),
        ({"max_length": 1}, "max_length"),
        ({"max_positions": 1}, "max_positions"),
        ({"labels": ["a", "a"]}, "label"),
        ({"labels": []}, "label"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        load_pretrained(tiny_model(tmp_path), **options)


@pytest.mark.torch
@pytest.mark.parametrize("content", [b"", b"\x80\x02garbage"])
def test_damaged_torch_file(tmp_path: Path, content: bytes) -> None:
    tiny_model(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: .*damaged"):
        load_pretrained(tmp_path)


@pytest.mark.torch
def test_torch_file_runs_no_code(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    tiny_model(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save({"classifier.weight": Path("x")}, tmp_path / "pytorch_model.bin")  # needs more than weights
    with pytest.raises(UserError, match="holding more than weights"):
        load_pretrained(tmp_path)


def test_torch_file_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tiny_model(tmp_path) / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)  # makes its import fail
    with pytest.raises(UserError, match=r"trbert_jax\[torch\]"):
        read_weights(tmp_path)

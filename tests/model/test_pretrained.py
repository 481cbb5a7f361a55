"""Model folders, ours and those of transformers and the published code: what is saved and read back."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file
from tiny_models import (
    BERT,
    CONFIGS,
    DISTILBERT,
    assert_same_params,
    edit_json,
    edit_weights,
    quietly,
    tiny_model,
    tiny_params,
    tiny_weights,
    to_flax,
)

from trbert_jax.errors import UserError
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import TokenReducingModel
from trbert_jax.model.pretrained import load_pretrained, save_pretrained
from trbert_jax.model.weights import to_original_names

OPTIONS: dict[str, Any] = {"selector_hidden": 9, "classifier_dropout": 0.0, "hidden_dropout": 0.07}
OLD_NAMES = {"weight": "gamma", "bias": "beta"}  # of LayerNorm, in TensorFlow's checkpoints


@CONFIGS
@pytest.mark.parametrize("num_layers", [3, 6])
def test_round_trip_is_bit_exact(tmp_path: Path, config: ModelConfig, num_layers: int) -> None:
    config = dataclasses.replace(config, num_layers=num_layers, max_length=11, **OPTIONS)
    params = tiny_params(config)
    save_pretrained(tmp_path / "model", config, params, tiny_models.tiny_tokenizer())
    loaded = quietly(tmp_path / "model")
    assert loaded.config == config
    assert loaded.newly_initialized == ()
    assert_same_params(loaded.params, params)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(loaded.params))
    assert loaded.tokenizer("a dull film.").tokens() == ["[CLS]", "a", "dull", "film", ".", "[SEP]"]
    first = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    save_pretrained(tmp_path / "again", loaded.config, loaded.params, loaded.tokenizer)
    assert first == {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()}


def test_saving_half_a_model_is_refused(tmp_path: Path) -> None:
    params = tiny_params(BERT)
    del params["head"]["classifier"]["bias"]
    with pytest.raises(ValueError, match=r"classifier\.bias"):
        save_pretrained(tmp_path / "model", BERT, params, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.torch
@pytest.mark.parametrize(
    "config",
    [
        BERT,
        DISTILBERT,
        *(dataclasses.replace(BERT, activation=name) for name in ("gelu_new", "relu", "silu")),
    ],
    ids=lambda config: f"{config.model_type}-{config.activation}",
)
def test_transformers_loads_what_we_save(tmp_path: Path, config: ModelConfig) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    # Weights of a usual size: larger ones amplify the rounding in which two programs differ.
    save_pretrained(tmp_path, config, tiny_params(config, scale=0.1), tiny_models.tiny_tokenizer())
    kind = json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert all("linear_" in name for name in info["unexpected_keys"])
    assert model.config.id2label == dict(enumerate(config.labels))

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.model_max_length == config.max_positions
    texts = ["the plot was not dull.", "good!"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model.eval()(**batch)
    loaded = quietly(tmp_path)
    module = TokenReducingModel(loaded.config)
    arguments = (jnp.asarray(batch["input_ids"].numpy()), jnp.asarray(batch["attention_mask"].numpy() > 0))
    inputs = dict(zip(("input_ids", "mask"), arguments, strict=True))
    ours = module.apply({"params": loaded.params}, inputs, rule=None).logits
    np.testing.assert_allclose(ours, theirs.logits.numpy(), atol=1e-5)


@pytest.mark.torch
@CONFIGS
@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded", "encoder"])
def test_loads_what_transformers_saves(tmp_path: Path, config: ModelConfig, form: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tiny_model(tmp_path / "ours", config)
    kind = "AutoModel" if form == "encoder" else "AutoModelForSequenceClassification"
    model = getattr(transformers, kind).from_pretrained(tmp_path / "ours")
    theirs = tmp_path / "theirs"
    if form == "sharded":
        model.save_pretrained(theirs, max_shard_size="8KB")
        assert len(list(theirs.glob("model-*.safetensors"))) > 1
    else:
        model.save_pretrained(theirs)
    if form == "bin":
        (theirs / "model.safetensors").unlink()
        torch.save(model.state_dict(), theirs / "pytorch_model.bin")
    loaded = load_pretrained(theirs)
    expected = ["selectors"]
    if form == "encoder":
        expected += ["pre_classifier"] * (config.model_type == "distilbert") + ["classifier"]
    assert list(loaded.newly_initialized) == expected
    assert loaded.tokenizer is None
    assert loaded.config.num_layers == config.num_layers
    weights, ours = (to_original_names(x.params, config) for x in (loaded, quietly(tmp_path / "ours")))
    parts = {"selectors": "linear_", "pre_classifier": "pre_classifier", "classifier": "classifier"}
    compared = [n for n in ours if not any(parts[part] in n for part in loaded.newly_initialized)]
    assert len(compared) > 60
    for name in compared:
        np.testing.assert_array_equal(weights[name], ours[name])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(tmp_path: Path, dtype: Any) -> None:
    tiny_model(tmp_path)
    edit_weights(tmp_path, lambda weights: {k: v.astype(dtype) for k, v in weights.items()})
    loaded = to_original_names(quietly(tmp_path).params, BERT)
    for name, array in tiny_weights(BERT).items():
        assert loaded[name].dtype == np.float32
        np.testing.assert_array_equal(loaded[name], array.astype(dtype).astype(np.float32))


@CONFIGS
def test_names_without_prefix_old_names_and_harmless_extras(tmp_path: Path, config: ModelConfig) -> None:
    tiny_model(tmp_path, config)
    heads = ("cls.seq_relationship", "vocab_transform", "vocab_layer_norm", "vocab_projector")
    extras = {f"{head}.weight": np.zeros((2, 16), np.float32) for head in heads}

    def rename(name: str) -> str:
        name = name.removeprefix(f"{config.model_type}.")
        return re.sub(r"LayerNorm.(weight|bias)", lambda m: f"LayerNorm.{OLD_NAMES[m[1]]}", name)

    def change(weights: dict[str, np.ndarray]) -> dict[str, Any]:
        constants = {"embeddings.position_ids": np.arange(20)[None]}
        return {**{rename(name): array for name, array in weights.items()}, **extras, **constants}

    edit_weights(tmp_path, change)
    assert_same_params(quietly(tmp_path).params, tiny_params(config))


@pytest.mark.parametrize(
    ("config", "published"), [(BERT, "autobert"), (BERT, "initbert"), (DISTILBERT, "distilautobert")]
)
def test_published_model_types(tmp_path: Path, config: ModelConfig, published: str) -> None:
    tiny_model(tmp_path, config)
    edit_json(tmp_path / "config.json", model_type=published, remove=("trbert",))
    loaded = quietly(tmp_path)
    assert loaded.config == dataclasses.replace(config, max_length=20)
    assert loaded.tokenizer is not None


def test_number_of_labels_from_the_classifier(tmp_path: Path) -> None:
    tiny_model(tmp_path, dataclasses.replace(BERT, labels=("x", "y", "z")))
    edit_json(tmp_path / "config.json", remove=("id2label", "label2id"))
    assert quietly(tmp_path).config.labels == ("0", "1", "2")


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hf download some-body/some-model --local-dir"):
        load_pretrained("some-body/some-model")  # the tests run offline
    with pytest.raises(UserError, match="nothing/here"):
        load_pretrained(tmp_path / "nothing" / "here")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        load_pretrained(tmp_path / "file")


@pytest.mark.parametrize("kind", ["safetensors", "msgpack", pytest.param("bin", marks=pytest.mark.torch)])
def test_hub_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The PyTorch file is fetched only if there is no safetensors file, Flax's only if there is neither."""
    remote, cache = tiny_model(tmp_path / "remote"), tmp_path / "cache"
    if kind == "bin":
        torch = pytest.importorskip("torch")
        tensors = {k: torch.from_numpy(v) for k, v in load_file(remote / "model.safetensors").items()}
        torch.save(tensors, remote / "pytorch_model.bin")
        (remote / "model.safetensors").unlink()
    elif kind == "msgpack":
        to_flax(remote)
    else:
        (remote / "pytorch_model.bin").write_bytes(b"not wanted")
    (remote / "tf_model.h5").write_bytes(b"not wanted")
    cache.mkdir()

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        assert name == "some-body/some-model"
        for pattern in allow_patterns:
            for file in remote.glob(pattern):
                shutil.copyfile(file, cache / file.name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert_same_params(quietly("some-body/some-model").params, tiny_params(BERT))
    assert not (cache / "tf_model.h5").exists()
    assert (cache / "pytorch_model.bin").exists() == (kind == "bin")

from __future__ import annotations

import builtins
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny_models
from safetensors.numpy import load_file, save_file
from tiny_models import BERT, DISTILBERT, tiny_model, tiny_params, tiny_weights

from trbert_jax.errors import UserError
from trbert_jax.modeling import hub
from trbert_jax.modeling.config import ModelConfig
from trbert_jax.modeling.model import TokenReducingModel
from trbert_jax.modeling.names import to_original_names
from trbert_jax.modeling.pretrained import (
    load_pretrained,
    load_tokenizer,
    model_config_from_dict,
    model_config_to_dict,
    read_weights,
    save_pretrained,
)
from trbert_jax.modeling.tokenizer_files import read_line_breaks_as_spaces

CONFIGS = pytest.mark.parametrize("config", [BERT, DISTILBERT], ids=lambda c: c.model_type)
Edit = Callable[[Path], Any]


def quietly(path: str | Path, **options: Any) -> Any:
    """Loads a checkpoint that has to need no announcement."""
    said: list[str] = []
    loaded = load_pretrained(path, announce=said.append, **options)
    assert said == []
    return loaded


def edit_json(path: Path, remove: tuple[str, ...] = (), **changes: Any) -> None:
    values = {k: v for k, v in json.loads(path.read_text()).items() if k not in remove}
    path.write_text(json.dumps({**values, **changes}))


def edit_weights(path: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    weights = load_file(path / "model.safetensors")
    changed = change(weights)
    save_file(weights if changed is None else changed, path / "model.safetensors")


def assert_same_params(left: Any, right: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


# Round trips --------------------------------------------------------------------------------------


@CONFIGS
@pytest.mark.parametrize("num_layers", [3, 6])
def test_round_trip_is_bit_exact(tmp_path: Path, config: ModelConfig, num_layers: int) -> None:
    config = dataclasses.replace(config, num_layers=num_layers, max_length=11, hidden_dropout=0.07)
    params = tiny_params(config)
    save_pretrained(tmp_path / "model", config, params, tiny_models.tiny_tokenizer())
    loaded = quietly(tmp_path / "model")
    assert loaded.config == config
    assert loaded.fresh == ()
    assert_same_params(loaded.params, params)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(loaded.params))
    assert loaded.tokenizer("a dull film.").tokens() == ["[CLS]", "a", "dull", "film", ".", "[SEP]"]
    first = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    save_pretrained(tmp_path / "again", loaded.config, loaded.params, loaded.tokenizer)
    assert first == {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()}


def test_saving_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    tiny_model(tmp_path / "model", DISTILBERT)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert quietly(tmp_path / "model").config == DISTILBERT


def test_saving_half_a_model_is_refused(tmp_path: Path) -> None:
    params = tiny_params(BERT)
    del params["head"]["classifier"]["bias"]
    with pytest.raises(ValueError, match=r"classifier\.bias"):
        save_pretrained(tmp_path / "model", BERT, params, None)
    assert list(tmp_path.iterdir()) == []


@CONFIGS
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
        theirs = model.eval()(**batch, output_hidden_states=True)
    loaded = quietly(tmp_path)
    module = TokenReducingModel(loaded.config)
    arguments = (jnp.asarray(batch["input_ids"].numpy()), jnp.asarray(batch["attention_mask"].numpy() > 0))
    inputs = dict(zip(("input_ids", "mask"), arguments, strict=True))
    ours = module.apply({"params": loaded.params}, inputs, rule=None).logits
    np.testing.assert_allclose(ours, theirs.logits.numpy(), atol=1e-5)
    tokens = module.apply({"params": loaded.params}, *arguments, method="embed")
    tokens = module.apply({"params": loaded.params}, tokens, range(config.num_layers), method="run_layers")
    real = arguments[1]
    np.testing.assert_allclose(tokens.states[real], theirs.hidden_states[-1].numpy()[real], atol=1e-5)


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
    loaded = load_pretrained(theirs, announce=lambda message: None)
    expected = ["selectors"]
    if form == "encoder":
        expected += ["pre_classifier"] * (config.model_type == "distilbert") + ["classifier"]
    assert list(loaded.fresh) == expected
    assert loaded.tokenizer is None
    assert loaded.config.num_layers == config.num_layers
    weights, ours = (to_original_names(x.params, config) for x in (loaded, quietly(tmp_path / "ours")))
    parts = {"selectors": "linear_", "pre_classifier": "pre_classifier", "classifier": "classifier"}
    compared = [n for n in ours if not any(parts[part] in n for part in loaded.fresh)]
    assert len(compared) > 60
    for name in compared:
        np.testing.assert_array_equal(weights[name], ours[name])


# Forms of a checkpoint ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(tmp_path: Path, dtype: Any) -> None:
    tiny_model(tmp_path)
    edit_weights(tmp_path, lambda weights: {k: v.astype(dtype) for k, v in weights.items()})
    expected = {k: v.astype(dtype).astype(np.float32) for k, v in tiny_weights(BERT).items()}
    loaded = to_original_names(quietly(tmp_path).params, BERT)
    for name, array in expected.items():
        assert loaded[name].dtype == np.float32
        np.testing.assert_array_equal(loaded[name], array)


def test_names_without_prefix_old_names_and_harmless_extras(tmp_path: Path) -> None:
    tiny_model(tmp_path)

    def rename(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        renamed = {
            k.removeprefix("bert.")
            .replace("LayerNorm.weight", "LayerNorm.gamma")
            .replace("LayerNorm.bias", "LayerNorm.beta"): v
            for k, v in weights.items()
        }
        extras: dict[str, Any] = {
            "embeddings.position_ids": np.arange(20)[None],
            "cls.predictions.bias": np.zeros(3, np.float32),
            "cls.seq_relationship.weight": np.zeros((2, 16), np.float32),
        }
        return {**renamed, **extras}

    edit_weights(tmp_path, rename)
    assert_same_params(quietly(tmp_path).params, tiny_params(BERT))


@pytest.mark.parametrize(
    ("config", "published"), [(BERT, "autobert"), (BERT, "initbert"), (DISTILBERT, "distilautobert")]
)
def test_published_model_types(tmp_path: Path, config: ModelConfig, published: str) -> None:
    tiny_model(tmp_path, config)
    edit_json(tmp_path / "config.json", model_type=published, remove=("trbert",))
    loaded = quietly(tmp_path)
    assert loaded.config == dataclasses.replace(config, max_length=20)
    assert loaded.tokenizer is not None


def test_line_breaks_as_spaces_stay_with_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny_models.tiny_tokenizer()
    assert len(tokenizer("a<br />film<br>.").tokens()) > 5
    read_line_breaks_as_spaces(tokenizer)
    save_pretrained(tmp_path, BERT, tiny_params(BERT), tokenizer)
    loaded = load_tokenizer(tmp_path)
    assert loaded("a<br /><br/>film<br>.").tokens() == ["[CLS]", "a", "film", ".", "[SEP]"]
    assert loaded("a < br film").tokens() == tiny_models.tiny_tokenizer()("a < br film").tokens()


def test_tokenizer_from_a_bare_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(tiny_models.VOCABULARY) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "model_max_length": 4}')
    ours, theirs = load_tokenizer(tmp_path), tiny_models.tiny_tokenizer()
    text = "I saw the goods, not badly!"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


def test_stored_truncation_and_padding_are_switched_off(tmp_path: Path) -> None:
    tokenizer = tiny_models.tiny_tokenizer().backend_tokenizer
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=12)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).backend_tokenizer.encode("the film was very very dull").ids) == 8


# What is new is announced -------------------------------------------------------------------------


def without(*parts: str) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    return lambda weights: {k: v for k, v in weights.items() if not any(part in k for part in parts)}


@pytest.mark.parametrize(
    ("config", "parts", "fresh", "words"),
    [
        (BERT, ("linear_",), ("selectors",), "token selectors"),
        (BERT, ("classifier",), ("classifier",), "classifier"),
        (BERT, ("pooler", "linear_", "classifier"), ("selectors", "pooler", "classifier"), "pooler"),
        (DISTILBERT, ("classifier",), ("pre_classifier", "classifier"), "hidden layer of the classifier"),
    ],
)
def test_fresh_parts(
    tmp_path: Path, config: ModelConfig, parts: tuple[str, ...], fresh: tuple[str, ...], words: str
) -> None:
    config = dataclasses.replace(config, initializer_range=0.05)
    tiny_model(tmp_path, config)
    edit_weights(tmp_path, without(*parts))
    said: list[str] = []
    loaded = load_pretrained(tmp_path, announce=said.append, seed=3)
    assert loaded.fresh == fresh
    assert len(said) == 1
    assert words in said[0]
    assert "random" in said[0]
    new = {k: v for k, v in to_original_names(loaded.params, config).items() if any(p in k for p in parts)}
    drawn = np.concatenate([v.ravel() for k, v in new.items() if k.endswith(".weight")])
    assert 0.03 < drawn.std() < 0.07
    assert all((v == 0).all() for k, v in new.items() if k.endswith(".bias"))
    again = load_pretrained(tmp_path, announce=said.append, seed=3)
    assert_same_params(loaded.params, again.params)
    other = to_original_names(load_pretrained(tmp_path, announce=said.append, seed=4).params, config)
    assert all((other[k] != v).any() for k, v in new.items() if k.endswith(".weight"))


def test_nothing_new_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model(tmp_path)
    load_pretrained(tmp_path, labels=BERT.labels, max_positions=20, max_length=18)
    assert capsys.readouterr() == ("", "")
    edit_weights(tmp_path, without("linear_"))
    load_pretrained(tmp_path)
    out, err = capsys.readouterr()
    assert out == ""
    assert "selectors" in err


def test_other_number_of_labels_makes_a_new_classifier(tmp_path: Path) -> None:
    said: list[str] = []
    loaded = load_pretrained(tiny_model(tmp_path), labels=["a", "b", "c"], announce=said.append)
    assert loaded.config.labels == ("a", "b", "c")
    assert loaded.fresh == ("classifier",)
    assert loaded.params["head"]["classifier"]["kernel"].shape == (16, 3)
    assert "2 labels" in said[0]
    assert "random" in said[1]


def test_same_labels_in_another_order(tmp_path: Path) -> None:
    said: list[str] = []
    loaded = load_pretrained(tiny_model(tmp_path), labels=["positive", "negative"], announce=said.append)
    assert loaded.fresh == ()
    assert "order" in said[0]
    old = tiny_params(BERT)["head"]["classifier"]
    np.testing.assert_array_equal(loaded.params["head"]["classifier"]["kernel"], old["kernel"][:, ::-1])
    np.testing.assert_array_equal(loaded.params["head"]["classifier"]["bias"], old["bias"][::-1])


@pytest.mark.parametrize(
    ("old", "renamed"), [(("LABEL_0", "LABEL_1"), 0), (("0", "1"), 0), (("no", "yes"), 1)]
)
def test_as_many_labels_under_other_names(tmp_path: Path, old: tuple[str, str], renamed: int) -> None:
    tiny_model(tmp_path, dataclasses.replace(BERT, labels=old))
    said: list[str] = []
    loaded = load_pretrained(tmp_path, labels=["negative", "positive"], announce=said.append)
    assert loaded.config == BERT
    assert len(said) == renamed
    assert_same_params(loaded.params, tiny_params(BERT))


def test_number_of_labels_from_the_classifier(tmp_path: Path) -> None:
    tiny_model(tmp_path, dataclasses.replace(BERT, labels=("x", "y", "z")))
    edit_json(tmp_path / "config.json", remove=("id2label", "label2id"))
    assert quietly(tmp_path).config.labels == ("0", "1", "2")


def test_longer_position_table_repeats_the_pretrained_one(tmp_path: Path) -> None:
    said: list[str] = []
    loaded = load_pretrained(tiny_model(tmp_path), max_positions=50, max_length=48, announce=said.append)
    assert (loaded.config.max_positions, loaded.config.max_length) == (50, 48)
    table = loaded.params["encoder"]["embeddings"]["position"]["embedding"]
    old = tiny_params(BERT)["encoder"]["embeddings"]["position"]["embedding"]
    np.testing.assert_array_equal(table, np.concatenate([old, old, old[:10]]))
    assert "20 rows" in said[0]


def test_shorter_position_table(tmp_path: Path) -> None:
    said: list[str] = []
    loaded = load_pretrained(tiny_model(tmp_path), max_positions=8, announce=said.append)
    assert (loaded.config.max_positions, loaded.config.max_length) == (8, 8)
    assert len(said) == 1


def test_layer_dropping(tmp_path: Path) -> None:
    said: list[str] = []
    loaded = load_pretrained(tiny_model(tmp_path, DISTILBERT), keep_layers=[0, 2, 4], announce=said.append)
    assert loaded.config == dataclasses.replace(DISTILBERT, num_layers=3)
    assert loaded.config.num_reductions == 1
    old = tiny_params(DISTILBERT)["encoder"]
    for new, index in enumerate([0, 2, 4]):
        assert_same_params(loaded.params["encoder"][f"layer_{new}"], old[f"layer_{index}"])
    assert {k for k in loaded.params["encoder"] if "layer" in k} == {"layer_0", "layer_1", "layer_2"}
    assert "0, 2, 4" in said[0]
    save_pretrained(tmp_path / "three", loaded.config, loaded.params, loaded.tokenizer)
    assert_same_params(quietly(tmp_path / "three").params, loaded.params)


# config.json --------------------------------------------------------------------------------------


def test_defaults_are_the_frameworks() -> None:
    transformers = pytest.importorskip("transformers")
    for name, theirs in (
        ("bert", transformers.BertConfig()),
        ("distilbert", transformers.DistilBertConfig()),
    ):
        ours = model_config_to_dict(model_config_from_dict({"model_type": name}))
        for key in set(ours) - {"architectures", "trbert", "id2label", "label2id", "classifier_dropout"}:
            assert ours[key] == getattr(theirs, key), key


def test_config_of_bert() -> None:
    config = model_config_from_dict(
        {
            "model_type": "bert",
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_hidden_layers": 5,
            "intermediate_size": 64,
            "max_position_embeddings": 1024,
            "hidden_dropout_prob": 0.3,
            "classifier_dropout": None,
            "layer_norm_eps": 1e-6,
            "id2label": {"1": "pos", "0": "neg"},
            "use_cache": True,
        }
    )
    assert (config.hidden_size, config.num_heads, config.num_layers) == (32, 4, 5)
    assert (config.max_positions, config.max_length, config.layer_norm_eps) == (1024, 512, 1e-6)
    assert (config.classifier_dropout, config.labels) == (0.3, ("neg", "pos"))


@CONFIGS
def test_config_round_trip(config: ModelConfig) -> None:
    config = dataclasses.replace(config, selector_hidden=9, classifier_dropout=0.0, pad_token_id=3)
    assert model_config_from_dict(json.loads(json.dumps(model_config_to_dict(config)))) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "roberta"}, "roberta"),
        ({"model_type": None}, "model_type"),
        ({"hidden_act": "relu"}, "gelu"),
        ({"model_type": "distilbert", "activation": "relu"}, "activation"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder"),
        ({"problem_type": "regression"}, "problem_type"),
        ({"hidden_size": "768"}, "hidden_size"),
        ({"hidden_size": 770}, "multiple"),
        ({"num_hidden_layers": 0}, "at least 1"),
        ({"num_hidden_layers": 2.5}, "whole"),
        ({"hidden_dropout_prob": 1.5}, "dropout"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label"),
        ({"id2label": ["a", "b"]}, "id2label"),
        ({"id2label": {"0": "a", "1": "a"}}, "twice"),
        ({"id2label": {"0": "a", "1": "b"}, "num_labels": 3}, "num_labels"),
        ({"trbert": {"selector_widht": 3}}, "selector_widht"),
        ({"trbert": 3}, "trbert"),
        ({"trbert": {"max_length": 1024}}, "512 positions"),
    ],
)
def test_bad_config(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        model_config_from_dict({"model_type": "bert", **values}, "there/config.json")
    assert "there/config.json" in str(error.value)


# Bad checkpoints ----------------------------------------------------------------------------------


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


def quantise(path: Path) -> None:
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
    "quantised": (quantise, ("classifier.weight", "I8")),
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
        load_pretrained(tiny_model(tmp_path), announce=lambda message: None, **options)


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


@pytest.mark.parametrize("content", [b"", b"\x80\x02garbage"])
def test_damaged_torch_file(tmp_path: Path, content: bytes) -> None:
    pytest.importorskip("torch")
    tiny_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: truncated, damaged"):
        load_pretrained(tmp_path)


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


# The hub ------------------------------------------------------------------------------------------


def test_hub_model_that_is_not_cached_offline() -> None:
    with pytest.raises(UserError, match="could not be reached") as error:
        load_pretrained("some-body/some-model")
    assert "hf download some-body/some-model --local-dir" in str(error.value)


def test_neither_a_directory_nor_a_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such directory"):
        load_pretrained(tmp_path / "nothing" / "here")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        load_pretrained(tmp_path / "file")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_hub_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    """The PyTorch file is fetched only where there is no safetensors file."""
    if weights == "pytorch_model.bin":
        torch = pytest.importorskip("torch")
    remote, cache = tiny_model(tmp_path / "remote"), tmp_path / "cache"
    if weights == "pytorch_model.bin":
        tensors = {k: torch.from_numpy(v) for k, v in load_file(remote / "model.safetensors").items()}
        torch.save(tensors, remote / weights)
        (remote / "model.safetensors").unlink()
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
    assert hub.local_directory("some-body/some-model") == cache
    assert_same_params(quietly("some-body/some-model").params, tiny_params(BERT))
    assert not (cache / "tf_model.h5").exists()
    assert (cache / "pytorch_model.bin").exists() == (weights == "pytorch_model.bin")

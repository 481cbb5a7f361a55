"""Checkpoints as people have them: each loads as the one that this project saves."""

import dataclasses
import json
import logging
import re
from codecs import BOM_UTF8
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import load_file
from tiny_models import (
    BERT,
    DISTILBERT,
    assert_same_params,
    edit_json,
    edit_weights,
    tiny_model,
    tiny_params,
    to_flax,
)

from trbert_jax import TRBert
from trbert_jax.errors import UserError
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.layers import ACTIVATIONS
from trbert_jax.model.pretrained import load_pretrained

Edit = Callable[[Path], Any]
ZEROS = np.zeros((3, 16), np.float32)
NAN = np.full((2, 16), np.nan, np.float32)


def renamed(change: Callable[[str], str]) -> Edit:
    return lambda path: edit_weights(path, lambda w: {change(name): array for name, array in w.items()})


def added(**arrays: np.ndarray) -> Edit:
    """Adds tensors; `__` stands for a dot."""
    named = {name.replace("__", "."): array for name, array in arrays.items()}
    return lambda path: edit_weights(path, lambda weights: {**weights, **named})


def configured(*remove: str, **values: Any) -> Edit:
    return lambda path: edit_json(path / "config.json", remove=remove, **values)


def nested(path: Path) -> None:
    to_flax(path)
    file = path / "flax_model.msgpack"
    file.write_bytes(
        serialization.msgpack_serialize({"params": serialization.msgpack_restore(file.read_bytes())})
    )


def damaged_flax(path: Path) -> None:
    to_flax(path)
    (path / "flax_model.msgpack").write_bytes(b"\x85\xa4bert")


def in_pieces(path: Path) -> None:
    to_flax(path)
    tree = serialization.msgpack_restore((path / "flax_model.msgpack").read_bytes())
    for i, (name, piece) in enumerate(tree.items()):
        (path / f"flax_model-{i}.msgpack").write_bytes(serialization.msgpack_serialize({name: piece}))
    files = {name: f"flax_model-{i}.msgpack" for i, name in enumerate(tree)}
    (path / "flax_model.msgpack").unlink()
    (path / "flax_model.msgpack.index.json").write_text(json.dumps({"weight_map": files}))


def torch_state(path: Path) -> None:
    torch = pytest.importorskip("torch")
    tensors = {k: torch.from_numpy(v) for k, v in load_file(path / "model.safetensors").items()}
    torch.save({"epoch": 3, "state_dict": tensors}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


OLD = ("model_type", "architectures", "trbert")
# A change to a folder, and the words of the warning.
ODD: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "module": (renamed("module.{}".format), ()),
    "_orig_mod": (renamed("_orig_mod.{}".format), ()),
    "both": (renamed("_orig_mod.module.{}".format), ()),
    "held by another module": (renamed("net.{}".format), ()),
    "held, head outside": (renamed(lambda name: re.sub("^(distil)?bert", r"model.\g<0>", name)), ()),
    "held, without prefix": (renamed(lambda name: re.sub(r"^(distil)?bert\.", "model.", name)), ()),
    "compiled encoder": (renamed(lambda name: re.sub("bert", "bert._orig_mod", name, count=1)), ()),
    "compiled layers": (renamed(lambda name: re.sub(r"layer\.\d", r"\g<0>._orig_mod", name)), ()),
    "of TinyBERT": (added(fit_denses__0__weight=ZEROS), ("fit_denses.0.weight",)),
    "a loss": (added(loss_fct__weight=np.ones(2, np.float32)), ("loss_fct.weight",)),
    "integers beside": (added(loss_fct__weight=np.ones(2, np.int64)), ()),
    "another head": (added(qa_outputs__weight=ZEROS[:2]), ("qa_outputs.weight",)),
    "a teacher": (added(teacher__bert__embeddings__word_embeddings__weight=ZEROS), ("teacher.bert.",)),
    "NaN in an unused head": (added(cls__predictions__bias=NAN, qa_outputs__weight=NAN), ("qa_outputs.",)),
    "no model_type": (configured("model_type"), ()),
    "a config of 2019": (configured(*OLD, num_labels=2), ()),
    "a byte order mark": (
        lambda path: (path / "config.json").write_bytes(BOM_UTF8 + (path / "config.json").read_bytes()),
        (),
    ),
    "a Flax class": (
        lambda path: edit_json(
            path / "config.json",
            remove=("model_type", "trbert"),
            architectures=["FlaxDistilBertForSequenceClassification"]
            if "distil" in (path / "config.json").read_text()
            else ["FlaxBertForSequenceClassification"],
        ),
        (),
    ),
    "Flax": (to_flax, ()),
    "Flax, with params": (nested, ()),
    "Flax, in pieces": (in_pieces, ()),
    "a state of training": (torch_state, ()),
}


@pytest.mark.parametrize("config", [BERT, DISTILBERT], ids=lambda config: config.model_type)
@pytest.mark.parametrize("case", ODD)
def test_odd_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str, config: ModelConfig
) -> None:
    edit, named = ODD[case]
    edit(tiny_model(tmp_path, config))
    loaded = load_pretrained(tmp_path)
    assert_same_params(loaded.params, tiny_params(config))
    assert loaded.config.labels == config.labels
    assert loaded.newly_initialized == ()
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * len(named)
    for word in named:
        assert word in caplog.messages[0]


def test_the_head_follows_from_the_weights(tmp_path: Path) -> None:
    """Without a class in config.json."""
    questions = tiny_model(tmp_path / "questions", dataclasses.replace(BERT, task="span"))
    configured(*OLD)(questions)
    loaded = load_pretrained(questions)
    assert (loaded.config.task, loaded.config.inputs.data) == ("span", "squad")
    score = tiny_model(tmp_path / "score", dataclasses.replace(BERT, labels=("x",), score="sigmoid"))
    assert load_pretrained(score).config.score == "sigmoid"
    configured(*OLD, "problem_type", "id2label", "label2id")(score)
    assert load_pretrained(score).config.score == "sigmoid"
    configured(problem_type="regression")(score)
    assert load_pretrained(score).config.score == "identity"
    assert load_pretrained(score, labels=["relevance"]).config.score == "identity"
    assert load_pretrained(score, labels=["no", "yes"]).config.score == ""
    # A classifier that was trained here on one class labels texts.
    assert load_pretrained(tiny_model(score, dataclasses.replace(BERT, labels=("x",)))).config.score == ""


def only(tensor: str) -> Edit:
    return added(**{tensor: np.zeros(16, np.float32)})


REFUSED: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "a deeper encoder": (
        only("bert__encoder__layer__4__output__dense__bias"),
        ("layer.4.output.dense.bias",),
    ),
    "adapters": (only("bert__encoder__layer__0__adapter__bias"), ("layer.0.adapter.bias",)),
    "a deeper head": (only("classifier__dense__bias"), ("classifier.dense.bias",)),
    "two students": (
        lambda path: edit_weights(
            path, lambda w: {f"{n}.{k}": v for k, v in w.items() for n in ("student", "teacher")}
        ),
        ("bert.embeddings.word_embeddings.weight [27, 16]: missing", "student.bert.", "more"),
    ),
    "another family": (
        renamed(lambda name: name.replace("bert.", "roberta.")),
        ("bert.embeddings.position_embeddings.weight [20, 16]: missing", "roberta."),
    ),
    "a shape, under another name": (
        lambda path: (
            renamed("module.{}".format)(path),
            added(module__bert__pooler__dense__bias=np.zeros(8, np.float32))(path),
        ),
        ("module.bert.pooler.dense.bias (read as bert.pooler.dense.bias): [8] in the checkpoint, [16] exp",),
    ),
    "ten lines and a count": (configured(num_hidden_layers=30), ("... and 406 more",)),
    "TensorFlow": (
        lambda path: (path / "model.safetensors").rename(path / "tf_model.h5"),
        ("tf_model.h5", "model.safetensors"),
    ),
    "damaged Flax": (damaged_flax, ("flax_model.msgpack", "damaged")),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_checkpoint(tmp_path: Path, case: str) -> None:
    edit, named = REFUSED[case]
    edit(tiny_model(tmp_path))
    with pytest.raises(UserError) as error:
        load_pretrained(tmp_path)
    assert len(str(error.value).splitlines()) <= 12
    for word in named:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("name", "at_one"), [("gelu", 0.841345), ("gelu_new", 0.841192), ("relu", 1.0), ("silu", 0.731059)]
)
@pytest.mark.parametrize("config", [BERT, DISTILBERT], ids=lambda config: config.model_type)
def test_activation(tmp_path: Path, name: str, at_one: float, config: ModelConfig) -> None:
    key = config.backbone.activation_key
    changes: dict[str, Any] = {key: name}
    edit_json(tiny_model(tmp_path, config) / "config.json", **changes)
    model = TRBert.from_pretrained(tmp_path)
    assert model.config.activation == name
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.ones(())), at_one, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())[key] == name

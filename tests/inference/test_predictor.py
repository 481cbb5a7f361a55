"""Texts in, labels and kept tokens out; the same in whatever batch and order."""

import dataclasses
import datetime
import json
import operator
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tiny_processes
from jax import export

from trbert_jax import TRBert
from trbert_jax.cli import main
from trbert_jax.errors import UserError
from trbert_jax.inference.predictor import Prediction
from trbert_jax.inference.questions import WINDOW
from trbert_jax.model import stablehlo
from trbert_jax.model.model import TokenReducingModel, forward
from trbert_jax.model.weights import to_original_names
from trbert_jax.reduction.selection import keep_above, keep_probable
from trbert_jax.tasks.examples import Examples

# The shallowest that have both points of reduction: compilation is most of these tests' time.
CONFIGS = pytest.mark.parametrize(
    "config",
    [tiny_models.BERT, dataclasses.replace(tiny_models.DISTILBERT, num_layers=4)],
    ids=lambda c: c.model_type,
)


def make(config: Any = tiny_models.BERT, **options: Any) -> TRBert:
    return TRBert(config, tiny_models.tiny_params(config), tiny_models.tiny_tokenizer(), **options)


@pytest.fixture(scope="module")
def model() -> TRBert:
    return make()


def some_texts(count: int, seed: int = 0, max_length: int = tiny_models.BERT.max_length) -> list[str]:
    """Texts of up to `max_length` tokens with [CLS] and [SEP]."""
    rng = np.random.default_rng(seed)
    words = [word for word in tiny_models.VOCABULARY[5:] if not word.startswith("##")]
    return [" ".join(rng.choice(words, size=rng.integers(0, max_length - 1))) for _ in range(count)]


def assert_same(left: Sequence[Prediction], right: Sequence[Prediction]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
        assert [x.tolist() for x in a.kept] == [x.tolist() for x in b.kept]
        fields = ("label", "label_id", "num_tokens", "truncated")
        assert [getattr(a, name) for name in fields] == [getattr(b, name) for name in fields]


@CONFIGS
def test_prediction_is_the_models(config: Any) -> None:
    """Against the model itself, one text at a time, padded to the full length."""
    model, texts, width, dropped = make(config), some_texts(6), config.max_length, 0

    @jax.jit
    def run(ids: Any, mask: Any) -> Any:
        batch, variables = {"input_ids": ids, "mask": mask}, {"params": model.params}
        return TokenReducingModel(config).apply(variables, batch, rule=keep_probable)

    for text, prediction in zip(texts, model.predict(texts), strict=True):
        ids = tiny_models.tiny_tokenizer()(text)["input_ids"]
        output = run(jnp.array([ids + [0] * (width - len(ids))]), jnp.arange(width)[None] < len(ids))
        np.testing.assert_allclose(prediction.scores, jax.nn.softmax(output.logits[0]), atol=1e-5)
        expected = [np.flatnonzero(s.keep[0]).tolist() for s in output.selections]
        assert [k.tolist() for k in prediction.kept] == expected
        assert prediction.num_tokens == len(ids)
        assert prediction.input_ids.tolist() == ids
        dropped += len(ids) - len(prediction.kept[-1])
    assert dropped > 10


def test_long_text_is_cut(model: TRBert) -> None:
    exact, long, longest = model.predict([" ".join(["dull"] * n) for n in (16, 17, 5000)])
    assert (exact.truncated, exact.num_tokens) == (False, 18)
    assert (long.truncated, long.num_tokens) == (True, 18)
    assert longest.tokens == ["[CLS]", *["dull"] * 16, "[SEP]"]
    np.testing.assert_allclose(exact.scores, longest.scores, atol=1e-6)


def test_one_output_is_a_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sigmoid of the output, the softmax beside an output of 0; or of a regression the output itself."""
    config = dataclasses.replace(tiny_models.BERT, num_layers=2)
    two = tiny_models.tiny_model(tmp_path / "two", config)
    tiny_models.edit_weights(two, lambda w: {k: w[k] - w[k][:1] if "classifier" in k else w[k] for k in w})
    one = shutil.copytree(two, tmp_path / "one")
    tiny_models.edit_weights(one, lambda w: {k: w[k][1:] if "classifier" in k else w[k] for k in w})
    tiny_models.edit_json(one / "config.json", remove=("id2label", "label2id"))
    raw, texts = shutil.copytree(one, tmp_path / "raw"), some_texts(3)
    identity = {"activation_fn": "torch.nn.modules.linear.Identity"}
    tiny_models.edit_json(raw / "config.json", sentence_transformers=identity)
    expected = [p.scores[1] for p in TRBert.from_pretrained(two).predict(texts)]
    model = TRBert.from_pretrained(one)
    scored = model.predict(texts)
    assert [(p.label, p.label_id, p.scores.shape) for p in scored] == [(None, None, (1,))] * 3
    np.testing.assert_allclose([p.scores[0] for p in scored], expected, atol=1e-5)
    assert len({round(float(x), 3) for x in expected}) == 3
    TRBert.from_pretrained(raw).save_pretrained(tmp_path / "saved")
    main(["predict", "--model", str(tmp_path / "saved"), *texts])
    for line, p in zip(capsys.readouterr().out.splitlines(), scored, strict=True):
        found = json.loads(line)
        assert (found["label"], found["label_id"], found["scores"]) == (None, None, {"0": found["score"]})
        np.testing.assert_allclose([found["score"], found["logit"]], p.logits[0], atol=1e-5)
        np.testing.assert_allclose(1 / (1 + np.exp(-found["score"])), p.scores[0], atol=1e-5)


@CONFIGS
def test_batch_independence(config: Any) -> None:
    model, texts = make(config), some_texts(40)
    together = model.predict(texts, batch_size=32)
    assert_same(together[:8], [model.predict([text])[0] for text in texts[:8]])
    order = np.random.default_rng(1).permutation(40)
    shuffled = model.predict([texts[i] for i in order], batch_size=32)
    assert_same([together[i] for i in order], shuffled)
    assert len({p.label_id for p in together}) == 2, "a model that always says the same tests nothing"


def test_a_stream_is_read_as_it_is_used(model: TRBert) -> None:
    texts = some_texts(10 * WINDOW)
    source = iter(texts)
    stream = model.predict_stream(source, batch_size=2)
    assert operator.length_hint(source) == len(texts)
    first = next(stream)
    assert operator.length_hint(source) == len(texts) - 4 * WINDOW  # the window that runs, and the next
    predictions = [first, *stream]
    assert [p.text for p in predictions] == texts
    assert_same(predictions[::97], [model.predict([text])[0] for text in texts[::97]])


def test_a_stream_ends_with_its_source(model: TRBert) -> None:
    assert list(model.predict_stream(iter(()))) == []

    def source() -> Iterator[str]:
        yield "some text"
        raise UserError("line 2 is broken")

    with pytest.raises(UserError, match="line 2 is broken"):
        list(model.predict_stream(source()))


@pytest.mark.parametrize(
    ("max_length", "widths"), [(18, (18,)), pytest.param(256, (64, 256), marks=pytest.mark.slow)]
)
def test_nothing_is_compiled_after_the_warm_up(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, max_length: int, widths: tuple[int, ...]
) -> None:
    """200 requests of texts of all lengths, some of them short enough for the narrow batches alone."""
    compilations: list[str] = []

    def listener(event: str, *_: Any, **__: Any) -> None:
        if event.endswith("backend_compile_duration"):
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(listener)
    request.addfinalizer(lambda: jax.monitoring.unregister_event_duration_listener(listener))
    shallow = dataclasses.replace(tiny_models.BERT, num_layers=2)
    config = dataclasses.replace(shallow, max_positions=max_length, max_length=max_length)
    model, rng = make(config), np.random.default_rng(2)
    shapes = [(rows, width) for rows in (1, 4, 8) for width in widths]
    named = [name for name, seconds in model.compile(batch_size=8) if seconds > 0]
    assert named == [f"threshold, packed, {rows} x {width} tokens" for rows, width in shapes]
    first = len(compilations)
    assert first >= len(named)

    run, get = set[tuple[int, ...]](), model.programs.get

    def noting(params: Any, batch: Any, *options: Any) -> Any:
        run.add(batch["input_ids"].shape)
        return get(params, batch, *options)

    monkeypatch.setattr(model.programs, "get", noting)
    for seed in range(200):
        longest = int(rng.integers(3, max_length + 1))
        model.predict(some_texts(int(rng.integers(1, 20)), seed, longest), batch_size=8)
    assert len(compilations) == first
    assert run == set(shapes)


def test_batches_are_no_larger_than_the_texts_need(model: TRBert, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list[int]()
    monkeypatch.setattr(model.programs, "get", lambda params, batch, *_: rows.append(len(batch["mask"])))
    for count in (1, 3, 5, 33):
        with pytest.raises(TypeError):  # the program is None
            model.predict(["a film"] * count, batch_size=1024)
    assert rows == [1, 4, 32, 128]


_CACHED = """
import sys
from trbert_jax.io import enable_compilation_cache
enable_compilation_cache()
import jax
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name))
from trbert_jax.cli import main
assert main(["compile", "--model", sys.argv[1], "--batch-size", "1"]) == 0
print(sum(name.endswith("/cache_hits") for name in hits), "from the cache")
"""


def test_the_next_process_finds_the_programs(model: TRBert, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "model")
    environment = tiny_processes.environment(XDG_CACHE_HOME=str(tmp_path / "caches"))
    del environment["JAX_COMPILATION_CACHE_DIR"]
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    command = [sys.executable, "-c", _CACHED, str(tmp_path / "model")]
    options: Any = {"env": environment, "capture_output": True, "text": True, "check": True}
    first, second = (subprocess.run(command, **options) for _ in range(2))
    assert f"{tmp_path / 'caches'}" in first.stdout
    assert "programs ready" in first.stdout
    assert first.stdout.endswith("\n0 from the cache\n")
    assert not second.stdout.endswith("\n0 from the cache\n")
    assert second.stderr == ""


def test_saved_and_loaded(model: TRBert, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.save_pretrained(tmp_path)
    same, texts = TRBert.from_pretrained(tmp_path), some_texts(5)
    assert same.config == model.config
    tiny_models.assert_same_params(same.params, model.params)
    assert_same(same.predict(texts), model.predict(texts))
    assert capsys.readouterr() == ("", "")
    (prediction,) = TRBert.from_pretrained(tmp_path, max_length=5).predict(["the film was very dull"])
    assert prediction.tokens == ["[CLS]", "the", "film", "was", "[SEP]"]
    assert prediction.truncated
    with pytest.raises(UserError, match="20 positions"):
        TRBert.from_pretrained(tmp_path, max_length=21)


def test_bfloat16_is_close(model: TRBert) -> None:
    exact, rough = (
        np.array([p.scores for p in m.predict(some_texts(10), rule="dense")])
        for m in (model, make(dtype="bfloat16"))
    )
    assert 0 < np.abs(exact - rough).max() < 0.1


def test_the_callers_tokenizer_is_not_the_models(tmp_path: Path) -> None:
    model, texts = make(), some_texts(4)
    before = model.predict(texts)
    tokenizer: Any = model.tokenizer
    tokenizer(texts, padding=True, truncation=True, max_length=4)
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.add_tokens(["film was"])
    assert_same(model.predict(texts), before)
    model.save_pretrained(tmp_path)
    assert_same(TRBert.from_pretrained(tmp_path).predict(texts), before)


def test_iterables_and_numbers_of_numpy(model: TRBert) -> None:
    texts = some_texts(5)
    expected = model.predict(texts, batch_size=4, threshold=0.25)
    numbers: dict[str, Any] = {"batch_size": np.int64(4), "threshold": np.float32(0.25)}
    for given in ((text for text in texts), tuple(texts), np.array(texts), dict.fromkeys(texts).keys()):
        assert_same(model.predict(given, **numbers), expected)


def test_a_copy_by_pickle_answers_alike(model: TRBert) -> None:
    copy, texts = pickle.loads(pickle.dumps(model)), some_texts(3)
    predictions = pickle.loads(pickle.dumps(copy.predict(texts)))
    assert_same(predictions, model.predict(texts))
    assert predictions[0].tokens == model.predict(texts)[0].tokens


_FORKED = """
import os, pickle, sys
from trbert_jax import TRBert, UserError
model = TRBert.from_pretrained(sys.argv[1])
labels = [p.label for p in model.predict(["the film was good", "dull"])]
def answer():
    assert [p.label for p in model.predict(["the film was good", "dull"])] == labels
    another = pickle.loads(pickle.dumps(model))  # as pools of workers pass a model on
    assert [p.label for p in another.predict(["the film was good", "dull"])] == labels
    for bad in (lambda: list(model.compile(4)), lambda: model.predict(["a"], batch_size=0)):
        try: bad()
        except UserError as error: print(error)
if not (child := os.fork()):
    try: answer()
    finally: sys.stdout.flush(); os._exit(0)
os.waitpid(child, 0)
"""


def test_a_forked_process_answers(model: TRBert, tmp_path: Path) -> None:
    """Also, a program that loads a model hears nothing from the libraries."""
    model.save_pretrained(tmp_path / "model")
    fork_warns = ["-W", "ignore::RuntimeWarning", "-W", "ignore::DeprecationWarning"]  # JAX, Python 3.12
    command = [sys.executable, *fork_warns, "-c", _FORKED, str(tmp_path / "model")]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    forked, batch_size = run.stdout.splitlines()
    assert "spawn" in forked
    assert batch_size == "batch_size is 0; expected a whole number, from 1 to 16777216"
    assert run.stderr == ""


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        ("one text", {}, "texts: expected a list"),
        (b"one text", {}, "texts: expected a list"),
        ({"text": "a"}, {}, r"expected a list.*\[text\]"),
        (3, {}, "texts: expected a list"),
        (np.array([["a", "b"]]), {}, "texts: expected a list"),
        (["a", 3], {}, r"texts\[1\] is a int"),
        (["a \ud800"], {}, "Unicode"),
        (["a"], {"batch_size": 0}, "batch_size"),
        (["a"], {"batch_size": np.int64(-3)}, "batch_size is -3; expected a whole number"),
        (["a"], {"batch_size": 4.0}, "batch_size is 4.0"),
        (["a"], {"batch_size": True}, "batch_size is True"),
        (["a"], {"batch_size": 10**12}, "batch_size is 1000000000000; .* to 16777216"),
        (["a"], {"threshold": "0.5"}, "threshold is '0.5'"),
        (["a"], {"rule": "fast"}, "threshold, batch_max, dense"),
        (["a"], {"threshold": 1}, "threshold is 1; expected a probability"),
        (["a"], {"threshold": float("nan")}, "threshold is nan"),
        (["a"], {"threshold": (0.5, 0.6, 0.7)}, r"\(0.5, 0.6, 0.7\); expected 1 or 2 thresholds"),
        (["a"], {"threshold": [0.5, 2]}, r"\[0.5, 2\]; expected a probability"),
        (["a"], {"rule": "dense", "threshold": 0.3}, "rule dense has none"),
        (["a"], {"rule": "batch_max", "threshold": 0.3}, "rule batch_max has none"),
    ],
)
def test_bad_input(model: TRBert, texts: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        model.predict(texts, **options)
    with pytest.raises(UserError, match=words):
        list(model.predict_stream(texts, **options))


def test_bad_models() -> None:
    with pytest.raises(UserError, match="float16"):
        make(dtype="float16")
    with pytest.raises(UserError, match="ids up to 26"):
        make(dataclasses.replace(tiny_models.BERT, vocab_size=20))


PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "models" / "imdb_minilm_trbert"
needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published code's model is not here")


@pytest.fixture(scope="module")
def published() -> tuple[TRBert, dict[str, np.ndarray]]:
    with np.load(PUBLISHED / "reference.npz") as arrays:
        return TRBert.from_pretrained(PUBLISHED), dict(arrays)


@needs_published
def test_published_model_through_predict(published: tuple[TRBert, dict[str, np.ndarray]]) -> None:
    """From text: decoded reviews tokenize to what was recorded, alone and in any batch."""
    model, recorded = published
    tokenizer, lengths = model.require_tokenizer(), recorded["attention_mask"].sum(1)
    texts: dict[int, str] = {}
    for row in np.argsort(lengths):
        ids = recorded["input_ids"][row, : lengths[row]].tolist()
        text = tokenizer.decode(ids[1:-1], clean_up_tokenization_spaces=False)
        if tokenizer(text)["input_ids"] == ids and len(texts) < 12:
            texts[row] = text
    assert len(texts) == 12
    together = model.predict([*texts.values()])
    for row, prediction in zip(texts, together, strict=True):
        np.testing.assert_allclose(prediction.scores, jax.nn.softmax(recorded["logits"][row]), atol=1e-4)
        expected = [np.flatnonzero(recorded[f"kept_stage{stage}"][row]).tolist() for stage in range(2)]
        assert [kept.tolist() for kept in prediction.kept] == expected
    assert_same(together[:3], [model.predict([text])[0] for text in [*texts.values()][:3]])


@pytest.mark.slow
@needs_published
def test_published_model_packed(published: tuple[TRBert, dict[str, np.ndarray]]) -> None:
    """All recorded reviews, in batches of like length; the masked run of them is the reference besides."""
    model, recorded = published
    mask, labels = recorded["attention_mask"] > 0, recorded["labels"].astype(np.int32)
    tokens, offsets = recorded["input_ids"][mask].astype(np.int32), np.cumsum([0, *mask.sum(1)])
    examples = Examples(tokens, offsets, None, labels, [str(i) for i in range(len(mask))], 0, "")
    packed, masked = (
        model.engine(32).run(model.params, examples, backend=name) for name in ("packed", "masked")
    )
    reference = json.loads((PUBLISHED / "reference.json").read_text())
    assert packed.accuracy == reference["reference_accuracy"]
    np.testing.assert_allclose(packed.logits, masked.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(packed.logits, recorded["logits"], rtol=1e-5, atol=1e-5)
    for stage, rows in enumerate(packed.kept):
        expected = [np.flatnonzero(keep).tolist() for keep in recorded[f"kept_stage{stage}"]]
        assert [positions.tolist() for positions in rows] == expected
        assert [positions.tolist() for positions in masked.kept[stage]] == expected


@pytest.mark.parametrize("format", ["onnx", "stablehlo"])
def test_the_program_of_an_exported_folder_runs(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README.md beside the graph has a program without this package; it gives our logits."""
    model = TRBert.from_pretrained(tiny_models.tiny_model(tmp_path / "model"))
    folder = model.export(tmp_path / "exported", format=format, threshold=0.4)
    program = (folder / "README.md").read_text().split("```python")[1].split("```")[0]
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(program, found)
    texts = ["a gripping film", "two hours I want back"]
    expected = model.predict(texts, threshold=0.4)
    np.testing.assert_allclose(found["logits"], [x.logits for x in expected], rtol=1e-5, atol=1e-5)
    kept = [[np.flatnonzero(row).tolist() for row in stage] for stage in found["kept"]]
    assert kept == [[x.kept[stage].tolist() for x in expected] for stage in range(2)]
    assert model.export(folder, format="onnx", rule="dense") == folder  # replaces it
    (folder / "mine.txt").write_text("")
    with pytest.raises(UserError, match=r"mine\.txt"):
        model.export(folder)


def test_stablehlo_of_other_shapes_and_platforms(tmp_path: Path) -> None:
    """Rows that are missing change nothing; programs for other devices are lowered here."""
    config = dataclasses.replace(tiny_models.BERT, task="span")
    params = tiny_models.tiny_params(config)
    stablehlo.write_programs(tmp_path, config, (0.5, 0.6), rows=(4,))
    about = json.loads((tmp_path / "stablehlo.json").read_text())
    assert [(x["rows"], x["tokens"]) for x in about["programs"]] == [(4, 4), (4, 18)]
    made, expires = (datetime.date.fromisoformat(about[key]) for key in ("made", "expires"))
    assert (expires - made).days == 180
    stored = to_original_names(params, config)
    weights = [stored[x["name"]].T if x["transposed"] else stored[x["name"]] for x in about["weights"]]
    batch = tiny_models.random_batch(config, [18, 7], width=18)
    ids, mask = (np.pad(np.asarray(batch[x], np.int32), ((0, 2), (0, 0))) for x in ("input_ids", "mask"))
    types = np.pad(np.asarray(batch["token_type_ids"]), ((0, 2), (0, 0)))
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types.astype(np.int32)}
    inputs["threshold"] = np.array([0.5, 0.6], np.float32)
    program = export.deserialize(bytearray((tmp_path / about["programs"][1]["file"]).read_bytes()))
    found = program.call(weights, inputs)
    limits = jnp.log(jnp.array([0.5, 0.6])) - jnp.log(1 - jnp.array([0.5, 0.6]))
    rule = keep_above(jnp.tile(limits, (2, 1)))
    expected = forward(TokenReducingModel(config), params, batch, rule=rule)
    np.testing.assert_allclose(found["logits"][:2], expected.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["kept"][:, :2], [x.keep for x in expected.selections])
    stablehlo.write_programs(tmp_path, config, None, platform="tpu", rows=(1,))
    about = json.loads((tmp_path / "stablehlo.json").read_text())
    assert (about["platform"], about["threshold"]) == ("tpu", None)
    candidates = dataclasses.replace(config, task="candidates")
    with pytest.raises(UserError, match="use onnx"):
        stablehlo.write_programs(tmp_path, candidates, None)

"""`trbert benchmark`: the variants compute the same, and the numbers are right. Times are not tested."""

import dataclasses
import functools
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from common import random_actions, random_examples

from trbert_jax.cli import main
from trbert_jax.errors import UserError
from trbert_jax.inference.benchmark import Workload, benchmark_file, memory_bytes, prepare, time_runs
from trbert_jax.inference.benchmark_report import (
    VARIANTS,
    PreparedRun,
    Record,
    described,
    drift,
    make_records,
    plot_benchmark,
    table,
)
from trbert_jax.inference.engine import CompiledForward
from trbert_jax.model.model import TokenReducingModel
from trbert_jax.reduction.flops import EncoderShape, dense_flops, reduced_flops

LENGTH = 48
CONFIG = dataclasses.replace(tiny_models.BERT, max_positions=LENGTH, max_length=LENGTH)
SHAPE, PROGRAMS = EncoderShape.of(CONFIG), CompiledForward(TokenReducingModel(CONFIG))
PARAMS = jax.tree.map(jnp.asarray, tiny_models.tiny_params(CONFIG, seed=38, scale=0.3))
LENGTHS = np.array([5, 40, 20, 11, 30, 9, 12])  # the last one is in no full batch
BATCH = 2
RUN = LENGTHS[:6]
EXAMPLES = random_examples(CONFIG, LENGTHS, np.random.default_rng(0))
OWN = Workload(EXAMPLES, LENGTH)
ACTIONS = random_actions(LENGTHS, LENGTH, (0.6, 0.3), np.random.default_rng(1))


@pytest.fixture(scope="module")
def own() -> dict[str, Any]:
    """All variants, with the model's own choice of tokens."""
    return {name: prepare(name, PROGRAMS, PARAMS, OWN, BATCH) for name in VARIANTS if name != "huggingface"}


def test_variants_agree(own: dict[str, Any]) -> None:
    for name, reference in (("packed", "masked"), ("masked_full", "masked"), ("dense", "dense_full")):
        np.testing.assert_allclose(own[name].logits, own[reference].logits, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(own[name].keep, own[reference].keep)
    for name in ("onnxruntime", "openvino"):
        np.testing.assert_allclose(own[name].logits, own["packed"].logits, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(own[name].keep, own["packed"].keep)
        np.testing.assert_allclose(own[f"dense_{name}"].logits, own["dense"].logits, rtol=1e-5, atol=1e-5)
    assert own["dense"].keep is None
    assert np.abs(own["dense"].logits - own["packed"].logits).max() > 1e-3, "nothing was dropped"


def test_given_tokens_are_kept() -> None:
    given, names = Workload(EXAMPLES, LENGTH, ACTIONS), ("packed", "masked", "batch_max", "onnxruntime")
    packed, masked, batch_max, exported = (prepare(x, PROGRAMS, PARAMS, given, BATCH) for x in names)
    for other in (masked, exported):
        np.testing.assert_allclose(packed.logits, other.logits, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(packed.keep, other.keep)
    np.testing.assert_array_equal(packed.keep, ACTIONS[:6])
    filled: Any = batch_max.keep
    assert not np.any(ACTIONS[:6] & ~filled)
    most = ACTIONS[:6].sum(-1).reshape(3, BATCH, 2).max(1).repeat(BATCH, 0)
    first = np.minimum(most[:, 0], RUN)
    np.testing.assert_array_equal(filled.sum(-1), np.stack([first, np.minimum(most[:, 1], first)], axis=1))


def test_flops_and_memory(own: dict[str, Any]) -> None:
    """Padding counts if it is computed."""
    full = np.full(6, LENGTH)
    widths = np.array([48, 48, 32, 32, 32, 32])  # of the buckets 32 and 48
    expected = {
        "packed": reduced_flops(SHAPE, RUN, own["packed"].keep.sum(-1)),
        "masked": reduced_flops(SHAPE, widths, np.stack([widths, widths], axis=1)),
        "masked_full": reduced_flops(SHAPE, full, np.stack([full, full], axis=1)),
        "batch_max": reduced_flops(SHAPE, RUN, own["batch_max"].keep.sum(-1)),
        "dense": dense_flops(SHAPE, RUN),
        "dense_full": dense_flops(SHAPE, full),
        "onnxruntime": reduced_flops(SHAPE, RUN, own["packed"].keep.sum(-1)),
        "dense_openvino_bfloat16": dense_flops(SHAPE, RUN),
    }
    assert {name: own[name].flops for name in expected} == {
        name: float(flops.mean()) for name, flops in expected.items()
    }
    program = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
    assert memory_bytes(program) >= 2 * 64 * 64 * 4


@pytest.mark.torch
def test_hugging_face_is_the_dense_model(own: dict[str, Any]) -> None:
    run = prepare("huggingface", PROGRAMS, PARAMS, OWN, BATCH)
    np.testing.assert_allclose(run.logits, own["dense"].logits, rtol=1e-4, atol=1e-4)
    longest = np.array([40, 40, 20, 20, 30, 30])
    assert run.flops == float(dense_flops(SHAPE, longest).mean())


def test_timing_takes_turns() -> None:
    order: list[str] = []
    calls = {name: functools.partial(order.append, name) for name in ("a0", "a1", "b0")}
    seconds = time_runs({"a": [calls["a0"], calls["a1"]], "b": [calls["b0"]]}, repeats=2)
    assert order == ["a0", "a1", "b0"] * 2
    assert {name: times.shape for name, times in seconds.items()} == {"a": (2, 2), "b": (2, 1)}
    assert all((times > 0).all() for times in seconds.values())


fake_run = functools.partial(PreparedRun, calls=[], num_texts=4, logits=np.zeros((4, 2)))


def fake_records(batch_size: int = 2) -> list[Record]:
    keep = np.zeros((4, 2, 8), bool)
    keep[:, 0, :3], keep[:, 1, :2] = True, True
    compiled: dict[str, Any] = {"compile_seconds": 1.5, "peak_memory_bytes": 2_000_000}
    fakes = [
        fake_run("masked_full", flops=12e9, **compiled),
        fake_run("packed", flops=3e9, keep=keep, **compiled),
        fake_run("huggingface", flops=9e9),
    ]
    seconds = {
        "masked_full": np.array([[1.0, 2.0], [1.0, 3.0], [1.0, 1.0]]),  # 3 s a pass
        "packed": np.array([[0.5, 0.5], [0.4, 0.6], [9.0, 9.0]]),  # 1 s
        "huggingface": np.full((3, 2), 2.0),  # 4 s
    }
    return make_records(fakes, seconds, batch_size)


def test_records_and_table() -> None:
    records = fake_records()
    names = ["variant", "examples_per_second", "flops_per_second", "p50_ms", "p99_ms"]
    names += ["speedup_per_flop_saved", "kept"]
    packed = [records[1][name] for name in names]
    # 3 x faster with 4 x fewer FLOPs
    assert packed == ["packed", *map(pytest.approx, (4, 12e9, 550, 9000, 3 / 4)), [3, 2]]
    assert [record["speedup_per_flop_saved"] for record in records[::2]] == [None, None]
    lines = list(table([*records, *fake_records(4)]))
    assert len(lines) == 1 + 3 + 1 + 3
    assert lines[2].split() == ["2", "packed", "4.0", "550.00", "9000.00", "3", "12", "0.75", "1.5", "2"]
    assert lines[3].split()[-3:] == ["–", "–", "–"]
    assert lines[4] == ""


def test_data_are_identified(tmp_path: Path) -> None:
    """A file or a folder, as by `sha256sum`."""
    (tmp_path / "inner").mkdir()
    for name in "ba":
        (tmp_path / "inner" / name).write_bytes(b"good\n")
    digest = hashlib.sha256(b"good\n").hexdigest()
    assert described(tmp_path / "inner/a") == {"data": "a", "data_sha256": digest}
    both = hashlib.sha256(f"{digest}  inner/a\n{digest}  inner/b\n".encode()).hexdigest()
    assert described(tmp_path)["data_sha256"] == both


def test_drift_counts_tokens_texts_and_labels() -> None:
    keep = np.zeros((4, 2, 8), bool)
    keep[:, :, :4] = True
    changed = keep.copy()
    changed[0, 0, 5], changed[0, 1, 5] = True, True  # one token, at both points
    changed[2, 1, 1] = False
    logits = np.array([[0.0, 1.0]] * 3 + [[1.0, 0.0]])
    run = fake_run("packed", flops=1, logits=np.array([[0.0, 1.0]] * 4), keep=changed)
    exact, lengths = fake_run("packed", flops=1, logits=logits, keep=keep), np.full(4, 8)
    assert list(drift(run, exact, lengths).values()) == [2 / 32, 2 / 4, 1 / 4]
    assert list(drift(run, exact, lengths, given=True).values()) == [None, None, 1 / 4]
    assert list(drift(run, None, lengths).values()) == [None, None, None]
    dense, shorter = (fake_run("dense", flops=1, logits=logits[:count]) for count in (4, 3))
    assert list(drift(dense, shorter, lengths).values()) == [None, None, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    tiny_models.tiny_model(folder / "model")
    texts = ["the film was good .", "a dull plot !", "it is very bright and not dull and good", "bad"]
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "texts.jsonl").write_text(lines, encoding="utf-8")
    return folder


def test_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "trbert_jax")
    options = "--max-texts 3 --batch-sizes 1,2 --variants packed,masked_full --repeats 2"
    files = f"--model {folder}/model --data {folder}/texts.jsonl"
    outputs = f"--json {tmp_path}/r.json --plot {tmp_path}/plot/r.png"
    command = f"benchmark {files} {options} {outputs}"
    assert main(command.split()) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line] == [
        ["batch", "variant"],
        *([str(size), name] for size in (1, 2) for name in ("packed", "masked_full")),
    ]
    assert {"batch size 2: preparing masked_full", "batch size 2: repeat 2 of 2"} <= set(caplog.messages)
    records = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert [(r["batch_size"], r["texts"]) for r in records] == [(1, 3), (1, 3), (2, 2), (2, 2)]
    for record in records:
        assert (record["dtype"], record["max_length"], record["data"]) == ("float32", 18, "texts.jsonl")
        assert record["command"] == f"trbert {command}"
        assert min(record[name] for name in ("examples_per_second", "compile_seconds", "flops")) > 0
        assert {"device", "cpus", "jax", "peak_memory_bytes", "p50_ms", "p99_ms"} <= record.keys()
    assert (tmp_path / "plot" / "r.png").read_bytes().startswith(b"\x89PNG")
    # Without the variant that speed-ups are measured against, one panel.
    plot_benchmark([record for record in records if record["variant"] == "packed"], tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_bfloat16_is_compared_with_float32(folder: Path) -> None:
    settings: dict[str, Any] = {"batch_sizes": (4,), "repeats": 1, "dtype": "bfloat16"}
    settings |= {"model_dir": folder / "model", "variants": ("packed", "dense", "batch_max")}
    packed, dense, batch_max = benchmark_file(folder / "texts.txt", **settings)
    assert 0 <= packed["kept_changed_tokens"] <= packed["kept_changed_texts"] <= 1
    assert dense["kept_changed_tokens"] is None
    compared = [record["labels_changed"] is not None for record in (packed, dense, batch_max)]
    assert compared == [True, True, False]


@pytest.mark.slow
def test_random_weights_keep_replayed_tokens(folder: Path) -> None:
    settings: dict[str, Any] = {"variants": ("packed",), "batch_sizes": (2,), "repeats": 1}
    own = benchmark_file(folder / "texts.txt", model_dir=folder / "model", **settings)
    replay: dict[str, Any] = {"random": "tiny", "replay_dir": folder / "model"}
    (random,) = benchmark_file(folder / "texts.txt", **replay, **settings)
    assert random["kept"] == own[0]["kept"]
    assert (random["model"], random["replay"]) == ("tiny", str(folder / "model"))


def test_hugging_face_needs_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trbert_jax.inference.benchmark.torch_available", lambda: False)
    with pytest.raises(UserError, match="--variants: huggingface needs torch"):
        benchmark_file(folder / "texts.txt", model_dir=folder / "model", variants=("huggingface",))

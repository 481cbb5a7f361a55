"""`trbert benchmark`: every way runs the same, and numbers are what they are called. Times are not tested."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from common import random_actions, random_examples, review_lengths

from trbert_jax.cli import main
from trbert_jax.errors import UserError
from trbert_jax.inference.benchmark import (
    VARIANTS,
    Workload,
    benchmark_file,
    memory_bytes,
    prepare,
    prepare_huggingface,
    time_runs,
)
from trbert_jax.inference.benchmark_report import (
    PreparedRun,
    Record,
    described,
    drift,
    machine,
    make_records,
    plot_benchmark,
    table,
)
from trbert_jax.inference.engine import CompiledForward
from trbert_jax.model.model import TokenReducingModel
from trbert_jax.reduction.flops import EncoderShape, dense_flops, reduced_flops

LENGTH = 48
CONFIG = dataclasses.replace(tiny_models.BERT, max_positions=LENGTH, max_length=LENGTH)
SHAPE = EncoderShape.of(CONFIG)
PARAMS = jax.tree.map(jnp.asarray, tiny_models.tiny_params(CONFIG, seed=38, scale=0.3))
LENGTHS = np.array([5, 40, 20, 11, 30, 9, 12])  # the last one has no whole batch
BATCH = 2
RUN = LENGTHS[:6]
EXAMPLES = random_examples(CONFIG, LENGTHS, np.random.default_rng(0))
OWN = Workload(EXAMPLES, LENGTH)
GIVEN = Workload(EXAMPLES, LENGTH, random_actions(LENGTHS, LENGTH, (0.6, 0.3), np.random.default_rng(1)))


@pytest.fixture(scope="module")
def own() -> dict[str, PreparedRun]:
    """All ways, the model choosing."""
    programs = CompiledForward(TokenReducingModel(CONFIG))
    return {name: prepare(name, programs, PARAMS, OWN, BATCH) for name in VARIANTS}


@pytest.fixture(scope="module")
def given() -> dict[str, PreparedRun]:
    """The ways that drop tokens, kept ones given."""
    programs = CompiledForward(TokenReducingModel(CONFIG))
    return {name: prepare(name, programs, PARAMS, GIVEN, BATCH) for name in ("packed", "masked", "batch_max")}


def keep_of(run: PreparedRun) -> np.ndarray:
    assert run.keep is not None
    return run.keep


# Workloads ----------------------------------------------------------------------------------------


def test_batches_are_whole_in_order_and_as_wide_as_needed() -> None:
    numbered = list(GIVEN.batches(BATCH, (16, 32, LENGTH)))
    batches = [batch for _, batch in numbered]
    np.testing.assert_array_equal([index for index, _ in numbered], [[0, 1], [2, 3], [4, 5]])
    assert [batch["input_ids"].shape for batch in batches] == [(2, 48), (2, 32), (2, 32)]
    np.testing.assert_array_equal(np.concatenate([batch["mask"].sum(-1) for batch in batches]), RUN)
    ids = np.concatenate([batch["input_ids"][batch["mask"]] for batch in batches])
    np.testing.assert_array_equal(ids, EXAMPLES.tokens[: RUN.sum()])
    assert GIVEN.actions is not None
    for number, batch in enumerate(batches):
        width = batch["input_ids"].shape[1]
        rows = GIVEN.actions[BATCH * number : BATCH * (number + 1)]
        np.testing.assert_array_equal(batch["actions"], rows[:, :, :width])
        assert not rows[:, :, width:].any()


def test_texts_are_as_long_as_reviews() -> None:
    lengths = review_lengths(20_000, np.random.default_rng(0))
    assert abs(lengths.mean() - 203) < 2
    assert lengths.max() == 256
    assert 0.3 < (lengths == 256).mean() < 0.5
    assert review_lengths(100, np.random.default_rng(0), max_length=32).max() == 32


def test_random_actions_keep_the_shares() -> None:
    lengths = review_lengths(500, np.random.default_rng(0))
    actions = random_actions(lengths, 256, (0.5, 0.25), np.random.default_rng(1))
    counts = actions.sum(-1)
    assert np.all(actions[:, :, 0])
    assert not np.any(actions[:, 1] & ~actions[:, 0]), "a token came back"
    assert not np.any(actions & (np.arange(256) >= lengths[:, None, None])), "padding was kept"
    np.testing.assert_allclose(counts.mean(0) / lengths.mean(), (0.5, 0.25), rtol=0.02)
    assert (counts / lengths[:, None])[:, 0].std() > 0.03, "texts differ"


# Variants -----------------------------------------------------------------------------------------


def test_all_ways_give_one_answer(own: dict[str, PreparedRun], given: dict[str, PreparedRun]) -> None:
    for found, names, reference in (
        (own, ("packed", "masked_full"), "masked"),
        (own, ("dense",), "dense_full"),
        (given, ("packed",), "masked"),
    ):
        for name in names:
            np.testing.assert_allclose(found[name].logits, found[reference].logits, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(found[name].keep, found[reference].keep)
    assert own["dense"].keep is None
    assert np.abs(own["dense"].logits - own["packed"].logits).max() > 1e-3, "nothing was dropped"


def test_given_tokens_are_kept(given: dict[str, PreparedRun]) -> None:
    assert GIVEN.actions is not None
    np.testing.assert_array_equal(keep_of(given["packed"]), GIVEN.actions[:6])
    filled = keep_of(given["batch_max"])
    assert not np.any(GIVEN.actions[:6] & ~filled)
    most = GIVEN.actions[:6].sum(-1).reshape(3, BATCH, 2).max(1).repeat(BATCH, 0)
    first = np.minimum(most[:, 0], RUN)
    np.testing.assert_array_equal(filled.sum(-1), np.stack([first, np.minimum(most[:, 1], first)], axis=1))


def test_flops_count_padding_where_it_is_computed(own: dict[str, PreparedRun]) -> None:
    full = np.full(6, LENGTH)
    widths = np.array([48, 48, 32, 32, 32, 32])  # of the runner's ladder for 48: 32, 48
    kept = keep_of(own["packed"]).sum(-1)
    expected = {
        "packed": reduced_flops(SHAPE, RUN, kept),
        "masked": reduced_flops(SHAPE, widths, np.stack([widths, widths], axis=1)),
        "masked_full": reduced_flops(SHAPE, full, np.stack([full, full], axis=1)),
        "batch_max": reduced_flops(SHAPE, RUN, keep_of(own["batch_max"]).sum(-1)),
        "dense": dense_flops(SHAPE, RUN),
        "dense_full": dense_flops(SHAPE, full),
    }
    assert {name: run.flops for name, run in own.items()} == {
        name: float(flops.mean()) for name, flops in expected.items()
    }


def test_programs_say_what_they_took(own: dict[str, PreparedRun]) -> None:
    weights = sum(x.nbytes for x in jax.tree.leaves(PARAMS))
    for run in own.values():
        assert run.compile_seconds is not None
        assert run.compile_seconds > 0
        assert run.peak_memory_bytes is not None
        assert run.peak_memory_bytes > weights / 2  # what a program does not read it is not given


@pytest.mark.torch
def test_hugging_face_is_the_dense_model(own: dict[str, PreparedRun]) -> None:
    run = prepare_huggingface(CONFIG, PARAMS, OWN, BATCH, "float32")
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


# Records ------------------------------------------------------------------------------------------


def fake_run(name: str, flops: float, **changes: Any) -> PreparedRun:
    run = PreparedRun(name, [], 4, flops, 1.5, 2_000_000, np.zeros((4, 2)), None)
    return dataclasses.replace(run, **changes)


def fake_records(batch_size: int = 2) -> list[Record]:
    keep = np.zeros((4, 2, 8), bool)
    keep[:, 0, :3], keep[:, 1, :2] = True, True
    fakes = [
        fake_run("masked_full", 12e9),
        fake_run("packed", 3e9, keep=keep),
        fake_run("huggingface", 9e9, compile_seconds=None, peak_memory_bytes=None),
    ]
    seconds = {
        "masked_full": np.array([[1.0, 2.0], [1.0, 3.0], [1.0, 1.0]]),  # 3 s a pass
        "packed": np.array([[0.5, 0.5], [0.4, 0.6], [9.0, 9.0]]),  # 1 s
        "huggingface": np.full((3, 2), 2.0),  # 4 s
    }
    return make_records(fakes, seconds, batch_size)


def test_records_hold_medians_and_ratios() -> None:
    full, packed, peer = fake_records()
    assert packed["examples_per_second"] == pytest.approx(4.0)
    assert packed["flops_per_second"] == pytest.approx(12e9)
    assert packed["p50_ms"] == pytest.approx(550)
    assert packed["p99_ms"] == pytest.approx(9000)
    assert packed["speedup_per_flop_saved"] == pytest.approx(3 / 4)  # 3 x faster of 4 x fewer FLOPs
    assert packed["kept"] == [3, 2]
    assert full["speedup_per_flop_saved"] is None
    assert peer["speedup_per_flop_saved"] is None
    assert peer["compile_seconds"] is None
    assert [r["variant"] for r in (full, packed, peer)] == ["masked_full", "packed", "huggingface"]


def test_records_say_which_data(tmp_path: Path) -> None:
    """A file as `sha256sum` does; a folder whatever the order in which it lists its files."""
    file = tmp_path / "texts.txt"
    file.write_bytes(b"good\n")
    digest = hashlib.sha256(b"good\n").hexdigest()
    assert described(file) == {"data": "texts.txt", "data_sha256": digest}
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, names in zip(folders, ("ab", "ba"), strict=True):
        (folder / "inner").mkdir(parents=True)
        for name in names:
            (folder / "inner" / name).write_bytes(b"good\n")
    one, two = (described(folder)["data_sha256"] for folder in folders)
    assert one == two == hashlib.sha256(f"{digest}  inner/a\n{digest}  inner/b\n".encode()).hexdigest()
    (folders[1] / "inner/a").write_bytes(b"bad\n")
    assert described(folders[1])["data_sha256"] != one


def test_table_has_a_row_a_record() -> None:
    lines = list(table([*fake_records(), *fake_records(4)]))
    assert len(lines) == 1 + 3 + 1 + 3
    assert lines[2].split() == ["2", "packed", "4.0", "550.00", "9000.00", "3", "12", "0.75", "1.5", "2"]
    assert lines[3].split()[-3:] == ["–", "–", "–"]
    assert lines[4] == ""


def test_drift_counts_tokens_texts_and_labels() -> None:
    keep = np.zeros((4, 2, 8), bool)
    keep[:, :, :4] = True
    changed = keep.copy()
    changed[0, 0, 5], changed[0, 1, 5] = True, True  # one token, at both points
    changed[2, 1, 1] = False
    logits = np.array([[0.0, 1.0]] * 3 + [[1.0, 0.0]])
    run = fake_run("packed", 1.0, logits=np.array([[0.0, 1.0]] * 4), keep=changed)
    assert drift(run, logits, keep, np.full(4, 8)) == {
        "kept_changed_tokens": 2 / 32,
        "kept_changed_texts": 2 / 4,
        "labels_changed": 1 / 4,
    }
    dense = fake_run("dense", 1.0, logits=logits)
    assert drift(dense, logits[:3], None, np.full(4, 8)) == {
        "kept_changed_tokens": None,
        "kept_changed_texts": None,
        "labels_changed": 0.0,
    }


def test_plot_is_a_png(tmp_path: Path) -> None:
    about = {"model": "a/b", "replay": None, "dtype": "float32", "tokens": 9.5, "max_length": 18}
    found = [{**record, **about, **machine()} for record in fake_records()]
    for name, some in (("both", found), ("speed", found[1:])):
        plot_benchmark(some, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


# The command --------------------------------------------------------------------------------------


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
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines() if line] == [
        ["batch", "variant"],
        *([str(size), name] for size in (1, 2) for name in ("packed", "masked_full")),
    ]
    assert {"batch size 2: preparing masked_full", "batch size 2: repeat 2 of 2"} <= set(caplog.messages)
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert [(r["batch_size"], r["texts"]) for r in found] == [(1, 3), (1, 3), (2, 2), (2, 2)]
    for record in found:
        assert record["dtype"] == "float32"
        assert record["max_length"] == 18
        assert record["examples_per_second"] > 0
        assert record["peak_memory_bytes"] > 0
        assert record["command"] == f"trbert {command}"
        assert record["data"] == "texts.jsonl"
        assert record["data_sha256"] == hashlib.sha256((folder / "texts.jsonl").read_bytes()).hexdigest()
        assert {"device", "cpus", "jax", "compile_seconds", "flops", "p50_ms", "p99_ms"} <= record.keys()
    assert found[0]["speedup_per_flop_saved"] > 0
    assert (tmp_path / "plot" / "r.png").exists()


@pytest.mark.slow
def test_bfloat16_is_compared_with_float32(folder: Path) -> None:
    packed, dense, batch_max = benchmark_file(
        folder / "texts.txt",
        model_dir=folder / "model",
        variants=("packed", "dense", "batch_max"),
        batch_sizes=(4,),
        repeats=1,
        dtype="bfloat16",
    )
    assert 0 <= packed["kept_changed_tokens"] <= packed["kept_changed_texts"] <= 1
    assert packed["labels_changed"] is not None
    assert dense["kept_changed_tokens"] is None
    assert dense["labels_changed"] is not None
    assert batch_max["labels_changed"] is None


@pytest.mark.slow
def test_replayed_tokens_are_kept_by_random_weights(folder: Path) -> None:
    settings: dict[str, Any] = {"batch_sizes": (2,), "repeats": 1}
    own = benchmark_file(folder / "texts.txt", model_dir=folder / "model", variants=("packed",), **settings)
    (random,) = benchmark_file(
        folder / "texts.txt",
        random="tiny",
        replay_dir=folder / "model",
        variants=("packed",),
        **settings,
    )
    assert random["kept"] == own[0]["kept"]
    assert random["model"] == "tiny"
    assert random["replay"] == str(folder / "model")


def other_tokenizer(folder: Path) -> None:
    path = folder / "other" / "tokenizer.json"
    text = path.read_text(encoding="utf-8").replace('"film"', '"movie"')
    path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("config", "spoil", "options", "message"),
    [
        (
            None,
            None,
            {"variants": ("warp",)},
            "--variants: unknown variant 'warp'; expected some of packed, ",
        ),
        (None, None, {"batch_sizes": (1, 5)}, "--batch-sizes: 5 is more than the 4 texts of"),
        (None, None, {"model_dir": None, "random": "tiny"}, "name it with --replay DIR"),
        (
            tiny_models.BERT,
            None,
            {"model_dir": None, "random": "huge", "replay_dir": "other"},
            "--random: unknown size 'huge'; expected one of bert-base, minilm",
        ),
        (
            dataclasses.replace(tiny_models.BERT, num_layers=2),
            None,
            {"replay_dir": "other"},
            "other has 1 points of reduction, the model under test 2",
        ),
        (
            dataclasses.replace(tiny_models.BERT, max_length=12),
            None,
            {"replay_dir": "other"},
            "other has 12 tokens of a text at most, the model under test 18",
        ),
        (
            tiny_models.BERT,
            other_tokenizer,
            {"replay_dir": "other"},
            "other splits the texts into other tokens",
        ),
    ],
)
def test_mistakes(
    folder: Path,
    tmp_path: Path,
    config: Any,
    spoil: Callable[[Path], None] | None,
    options: dict[str, Any],
    message: str,
) -> None:
    if config:
        tiny_models.tiny_model(tmp_path / "other", config)
    if spoil:
        spoil(tmp_path)
    if "replay_dir" in options:
        options = {**options, "replay_dir": tmp_path / options["replay_dir"]}
    with pytest.raises(UserError) as caught:
        benchmark_file(folder / "texts.txt", **{"model_dir": folder / "model", **options})
    assert message in str(caught.value)


def test_hugging_face_asked_for_where_it_is_not(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trbert_jax.inference.benchmark.torch_available", lambda: False)
    with pytest.raises(UserError, match="huggingface needs PyTorch"):
        benchmark_file(folder / "texts.txt", model_dir=folder / "model", variants=("huggingface",))


def test_memory_is_what_the_compiler_planned() -> None:
    program = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((64, 64), jnp.float32)).compile()
    assert memory_bytes(program) >= 2 * 64 * 64 * 4

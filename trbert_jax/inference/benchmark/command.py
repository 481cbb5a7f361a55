"""Benchmarks of one model on texts of a file: the ways to run it side by side."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from trbert_jax.datasets.dataset import Dataset, Example
from trbert_jax.errors import UserError
from trbert_jax.inference.answering import read_questions
from trbert_jax.inference.benchmark import huggingface, runs
from trbert_jax.inference.benchmark.records import Record, described, drift, machine, make_records
from trbert_jax.inference.benchmark.runs import WAYS, Announce, PreparedRun
from trbert_jax.inference.benchmark.sizes import SIZES
from trbert_jax.inference.benchmark.workload import Workload, kept_masks
from trbert_jax.inference.predictor import TRBert
from trbert_jax.inference.text_input import read_texts
from trbert_jax.model.model import init_params
from trbert_jax.model.pretrained import to_stderr
from trbert_jax.tasks.examples import Examples, build_features

BATCH_SIZES = (1, 8, 32, 128)
_REFERENCE_BATCH = 32


def benchmark_file(
    data: str | Path,
    *,
    model_dir: str | Path | None = None,
    random: str | None = None,
    replay_dir: str | Path | None = None,
    batch_sizes: Sequence[int] | None = None,
    executions: Sequence[str] | None = None,
    max_texts: int | None = None,
    max_length: int | None = None,
    repeats: int = 5,
    dtype: str = "float32",
    command: str | None = None,
    skip_bad_records: bool = False,
    announce: Announce = to_stderr,
) -> list[Record]:
    """Times the ways to run a model on the same texts, in the order of the file.

    Args:
      data: `.jsonl` with `text`, or one text a line; for a model that answers questions a file in the
        published format of the data set it was trained on.
      model_dir: see `TRBert.from_pretrained`.
      random: in place of a model, a key of `SIZES`: random weights, tokenizer and labels of the
        replayed model.
      replay_dir: a model whose kept tokens are replayed, which the model under test then keeps.
      batch_sizes: None takes those of `BATCH_SIZES` that there are texts enough for.
      executions: keys of `WAYS`, and `huggingface`; None takes all, the last one if PyTorch is installed.
      max_texts: texts to read, of questions inputs (windows, where a context has several); None reads all.
      max_length: tokens after which a text is cut, and the width of full-length batches; None takes the
        model's.
      repeats: how often everything is timed.
      dtype: `float32` or `bfloat16`.
      command: what the user typed, for the records.
      skip_bad_records: leave out questions that are not as they should be, rather than stop at the first.
      announce: called with a line of text for every step.

    Returns:
      The records of `make_records`, with `dtype`, `model`, `replay`, `max_length`, `tokens` (mean of a text),
      `repeats`, `command`, what `described` and `machine` say, and for bfloat16 what `drift` finds.

    Raises:
      UserError: a model or file that cannot be read, an unknown execution, too few texts, a replayed model
        that does not fit.
    """
    names = _check_executions(executions)
    replayed = None
    if replay_dir is not None:
        replayed = TRBert.from_pretrained(replay_dir, max_length=max_length, announce=announce)
    if random is not None:
        model = _random_model(random, replayed, dtype)
    elif model_dir is not None:
        model = TRBert.from_pretrained(model_dir, max_length=max_length, dtype=dtype, announce=announce)
    else:
        raise ValueError("model_dir or random is needed")
    name = str(random or model_dir)
    texts: list[str] = []
    if model.config.inputs.data:
        if replayed is not None:
            raise UserError("--replay: kept tokens are replayed for models that label texts only")
        features = _question_features(model, Path(data), max_texts, skip_bad_records, announce)
        names = _without_peer(names, executions, announce)
    else:
        texts = list(itertools.islice(read_texts(Path(data)), max_texts))
        features = _tokenize(texts, model, name, str(data), announce)
    workload = Workload(features, model.config.max_length)
    if replayed is not None:
        announce(f"computing the tokens that {replay_dir} keeps")
        actions = _actions_of(replayed, str(replay_dir), texts, model, workload)
        workload = dataclasses.replace(workload, actions=actions)
    about = {
        "dtype": dtype,
        "model": name,
        "replay": None if replay_dir is None else str(replay_dir),
        "max_length": model.config.max_length,
        "repeats": repeats,
        "command": command,
        **described(Path(data)),
        **machine(),
    }
    return benchmark(
        model, workload, names, _check_sizes(batch_sizes, features, data), repeats, about, announce
    )


def benchmark(
    model: TRBert,
    workload: Workload,
    names: Sequence[str],
    batch_sizes: Sequence[int],
    repeats: int,
    about: Record,
    announce: Announce,
) -> list[Record]:
    """Times a model on a workload, see `benchmark_file`; `about` is repeated in every record."""
    records = []
    reference = _Float32(model, workload) if about["dtype"] != "float32" else None
    for batch_size in batch_sizes:

        def say(line: str, size: int = batch_size) -> None:
            announce(f"batch size {size}: {line}")

        prepared: list[PreparedRun] = []
        for name in names:
            say(f"preparing {name}")
            prepared.append(_prepare(name, model, workload, batch_size, about["dtype"]))
        seconds = runs.time_runs(prepared, repeats, say)
        rows = workload.features.rows(np.arange(workload.num_texts(batch_size)))
        lengths = workload.features.row_lengths[: rows.max() + 1]
        for run, record in zip(prepared, make_records(prepared, seconds, batch_size), strict=True):
            changes = reference.drift_of(run) if reference else {}
            records.append({**record, **changes, "tokens": float(lengths.mean()), **about})
    return records


class _Float32:
    """What the model answers in float32, computed where it is asked for."""

    def __init__(self, model: TRBert, workload: Workload) -> None:
        self._model = TRBert(model.config, model.params)
        self._workload = workload
        self._runs: dict[str, PreparedRun] = {}

    def drift_of(self, run: PreparedRun) -> dict[str, float | None]:
        if run.name == "batch_max":  # texts decide about each other, so batches would have to be the same
            return {"kept_changed_tokens": None, "kept_changed_texts": None, "labels_changed": None}
        name = "dense" if run.keep is None else "packed"
        if name not in self._runs:
            size = min(_REFERENCE_BATCH, run.num_texts)
            self._runs[name] = runs.prepare(
                name, self._model.programs, self._model.params, self._workload, size
            )
        found = self._runs[name]
        keep = None if self._workload.actions is not None else found.keep
        return drift(run, found.logits, keep, self._workload.features.row_lengths)


def _prepare(name: str, model: TRBert, workload: Workload, batch_size: int, dtype: str) -> PreparedRun:
    if name == huggingface.NAME:
        return huggingface.prepare_huggingface(model.config, model.params, workload, batch_size, dtype)
    return runs.prepare(name, model.programs, model.params, workload, batch_size)


def _check_executions(names: Sequence[str] | None) -> list[str]:
    if names is None:
        return [*WAYS, huggingface.NAME] if huggingface.available() else [*WAYS]
    for name in names:
        if name not in (*WAYS, huggingface.NAME):
            raise UserError(
                f"--executions: there is no {name!r}; expected some of {', '.join((*WAYS, huggingface.NAME))}"
            )
    if huggingface.NAME in names and not huggingface.available():
        raise UserError(
            "--executions: huggingface needs PyTorch for the device that JAX runs on; install it:"
            " pip install 'trbert-jax[torch]'"
        )
    return list(dict.fromkeys(names))


def _question_features(
    model: TRBert, data: Path, max_questions: int | None, skip_bad: bool, announce: Announce
) -> Examples:
    """Questions of a file in the published format of the data set that the model was trained on."""
    features = read_questions(model, data, skip_bad, announce).features
    if max_questions is None or max_questions >= len(features):
        return features
    return features.take(np.arange(max_questions))


def _without_peer(names: list[str], asked: Sequence[str] | None, announce: Announce) -> list[str]:
    if asked is not None and huggingface.NAME in asked:
        raise UserError("--executions: huggingface is compared for models that label texts only")
    if huggingface.NAME in names:
        announce("huggingface is left out: it is compared for models that label texts only")
    return [name for name in names if name != huggingface.NAME]


def _check_sizes(sizes: Sequence[int] | None, features: Examples, data: str | Path) -> list[int]:
    count = len(features)
    if sizes is None:
        return [size for size in BATCH_SIZES if size <= count]
    for size in sizes:
        if size > count:
            raise UserError(
                f"--batch-sizes: {size} is more than the {count} texts of {data}; give more texts or smaller "
                "batches"
            )
    return list(dict.fromkeys(sizes))


def _random_model(name: str, replayed: TRBert | None, dtype: str) -> TRBert:
    if name not in SIZES:
        raise UserError(f"--random: there is no {name!r}; expected one of {', '.join(SIZES)}")
    if replayed is None:
        raise UserError(
            "--random takes tokenizer and kept tokens from another model; name it with --replay DIR"
        )
    like = replayed.config
    config = dataclasses.replace(
        SIZES[name],
        vocab_size=like.vocab_size,
        max_positions=like.max_positions,
        max_length=like.max_length,
        labels=like.labels,
    )
    return TRBert(config, init_params(config, jax.random.key(0)), replayed.tokenizer, dtype=dtype)


def _tokenize(texts: Sequence[str], model: TRBert, name: str, data: str, announce: Announce) -> Examples:
    if model.tokenizer is None:
        raise UserError(f"{name}: has no tokenizer files; put those of the model it was made of there")
    examples = tuple(Example(f"{data}: text {i}", text, 0) for i, text in enumerate(texts, 1))
    dataset = Dataset(examples, model.config.labels)
    return build_features(dataset, model.tokenizer, model.config.max_length, announce=announce)


def _actions_of(
    replayed: TRBert, name: str, texts: Sequence[str], model: TRBert, workload: Workload
) -> np.ndarray:
    """bool [n, stages, max_length], what the replayed model keeps."""
    if replayed.config.num_reductions != model.config.num_reductions:
        raise UserError(
            f"--replay: {name} drops tokens at {replayed.config.num_reductions} points, the model under test "
            f"at {model.config.num_reductions}; kept tokens can be replayed where there are as many"
        )
    if replayed.config.max_length != workload.max_length:
        raise UserError(
            f"--replay: {name} reads up to {replayed.config.max_length} tokens, the model under test up to "
            f"{workload.max_length}; give both the same with --max-length"
        )
    features = _tokenize(texts, replayed, name, name, lambda line: None)
    if not np.array_equal(features.tokens, workload.features.tokens):
        raise UserError(
            f"--replay: {name} reads the texts as other tokens than the model under test; models that share "
            "a tokenizer are needed"
        )
    outputs = replayed.runner(min(_REFERENCE_BATCH, len(features))).run(
        replayed.params, features, rule=replayed.default_rule
    )
    return kept_masks(outputs, workload.max_length)

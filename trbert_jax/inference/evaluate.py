"""Evaluation: accuracy, kept tokens, FLOPs and speed of a model on labeled texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trbert_jax.datasets.text_files import read_file
from trbert_jax.errors import UserError
from trbert_jax.inference.answering import Questions, read_questions
from trbert_jax.inference.engine import InferenceEngine, Outputs
from trbert_jax.inference.predictor import TRBert
from trbert_jax.io import atomic_file, write_json
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Params
from trbert_jax.model.packed import DEFAULT_BACKEND
from trbert_jax.reduction import flops
from trbert_jax.reduction.rules import DEFAULT_THRESHOLD, RULES
from trbert_jax.tasks import Score
from trbert_jax.tasks.classification import encode_texts
from trbert_jax.tasks.examples import Examples

Judge = Callable[[Outputs], Mapping[str, float]]  # outputs -> the task's metrics


def evaluate_file(
    model_dir: str | Path,
    data_file: str | Path,
    *,
    batch_size: int = 32,
    rule: str | None = None,
    backend: str = DEFAULT_BACKEND,
    threshold: float = DEFAULT_THRESHOLD,
    predictions: Path | None = None,
    baselines: Sequence[str] = (),
    seed: int = 0,
    skip_bad_records: bool = False,
) -> dict[str, Any]:
    """Evaluates a saved model on a file of labeled texts.

    Args:
      model_dir: see `TRBert.from_pretrained`.
      data_file: `.jsonl` with `text` and `label`, or `.csv` with label and text; for a model that answers
        questions a file in the published format of the data set it was trained on.
      batch_size: examples of one forward pass.
      rule, backend, threshold: see `TRBert.predict`.
      predictions: file for one JSON line an example; of questions the JSON that the official scorer reads,
        with `NAME.null_odds.json` beside `NAME.json` where questions may have no answer.
      baselines: of `random`, `first_k`: selections that learned nothing, at the same kept counts.
      seed: of the random baseline.
      skip_bad_records: leave out questions that are not as they should be, and say so.

    Returns:
      The numbers of `summarize`, one entry of them for each baseline, and of questions in `data` what became
      of them on the way to inputs.

    Raises:
      UserError: a model or file that cannot be read, a label the model does not have.
    """
    model = TRBert.from_pretrained(model_dir)
    rule = rule or model.default_rule
    if model.tokenizer is None:
        raise UserError(f"{model_dir}: has no tokenizer files; put those of the model it was made of there")
    runner = model.engine(batch_size)
    questions: Questions | None = None
    if model.config.inputs.data:
        questions = read_questions(model, Path(data_file), skip_bad_records)
        features = questions.examples
    else:
        records = read_file(data_file, model.config.labels)
        features = encode_texts(records, model.tokenizer, model.config.max_length)

    def judge(outputs: Outputs) -> dict[str, float]:
        return {"accuracy": outputs.accuracy} if questions is None else questions.score(outputs).metrics

    outputs = runner.run(model.params, features, rule=rule, backend=backend, threshold=threshold)
    score = Score(judge(outputs), {}) if questions is None else questions.score(outputs)
    if predictions is not None and questions is not None:
        write_json(predictions, score.files["predictions.json"])
        if "null_odds.json" in score.files:  # the official scorer of SQuAD 2.0 reads both
            write_json(predictions.with_suffix(".null_odds.json"), score.files["null_odds.json"])
    elif predictions is not None:
        write_predictions(predictions, outputs, features, model.config.labels)
    settings = {"rule": rule, "backend": backend, "batch_size": batch_size, "threshold": threshold}
    result = {**settings, **summarize(outputs, model.config, score.metrics)}
    if questions is not None:
        result["data"] = questions.notes
    if questions is not None and skip_bad_records:
        result["skipped_records"] = questions.num_skipped
    if RULES[rule].drops and baselines:
        result["baselines"] = run_baselines(runner, model.params, features, outputs, baselines, seed, judge)
    return result


def run_baselines(
    runner: InferenceEngine,
    params: Params,
    features: Examples,
    outputs: Outputs,
    kinds: Sequence[str],
    seed: int,
    judge: Judge,
) -> dict[str, dict[str, Any]]:
    """Evaluates selections that learned nothing, with each example's own kept counts from `outputs`."""
    result = {}
    for kind in kinds:
        found = runner.run(params, features, rule=kind, num_kept=outputs.num_kept, seed=seed)
        result[kind] = summarize(found, runner.model.config, judge(found))
    return result


def run_thresholds(
    runner: InferenceEngine,
    params: Params,
    features: Examples,
    judge: Judge,
    thresholds: Sequence[float],
    *,
    rule: str,
    backend: str,
) -> dict[str, dict[str, Any]]:
    """Evaluates one model at several points between keeping more and keeping less."""
    result = {}
    for threshold in thresholds:
        found = runner.run(params, features, rule=rule, backend=backend, threshold=threshold)
        result[str(threshold)] = summarize(found, runner.model.config, judge(found))
    return result


def summarize(outputs: Outputs, config: ModelConfig, metrics: Mapping[str, float]) -> dict[str, Any]:
    """The numbers of an evaluation; FLOPs are 2 x MACs a row of tokens, padding not counted.

    `metrics` are the task's. `flops` follows the published accounting and `flops_exact` counts what it leaves
    out (docs/method.md, "FLOPs"); `flops_speedup` is the dense model's `flops` over the reduced ones.
    """
    shape, lengths = flops.EncoderShape.of(config), outputs.lengths
    dense = float(flops.dense_flops(shape, lengths).mean())
    summary: dict[str, Any] = {**metrics, "examples": len(lengths)}
    if outputs.kept:
        used = float(flops.reduced_flops(shape, lengths, outputs.num_kept).mean())
        exact = float(flops.exact_flops(shape, lengths, outputs.num_kept).mean())
        summary |= {"flops": used, "flops_exact": exact, "flops_speedup": dense / used}
        summary["kept"] = outputs.num_kept.mean(0).tolist()
    else:
        summary |= {"flops": dense, "flops_exact": float(flops.exact_dense_flops(shape, lengths).mean())}
    base = float(flops.bert_base_flops(lengths, config.num_outputs).mean())
    summary["flops_speedup_over_bert_base"] = base / summary["flops"]
    summary["tokens"] = float(lengths.mean())
    summary["examples_per_second"] = len(lengths) / max(outputs.seconds, 1e-9)
    return summary


def write_predictions(path: str | Path, outputs: Outputs, features: Examples, labels: Sequence[str]) -> None:
    """Writes one JSON line an example: prediction, probabilities, kept positions, true label."""
    scores = outputs.probabilities
    winners = outputs.logits.argmax(-1)
    with atomic_file(path) as stream:
        for row, winner in enumerate(winners):
            record = {
                "id": features.ids[row],
                "label": labels[outputs.labels[row]],
                "prediction": labels[winner],
                "scores": dict(zip(labels, scores[row].tolist(), strict=True)),
                "kept": [stage[row].tolist() for stage in outputs.kept],
                "num_tokens": int(outputs.lengths[row]),
            }
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")

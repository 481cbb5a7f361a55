"""Evaluate a model on labeled data: metrics, kept tokens, FLOPs and speed."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trbert_jax.datasets import BadRecords, find_dataset
from trbert_jax.datasets.own_texts import read_labeled
from trbert_jax.datasets.tables import Fields
from trbert_jax.errors import UserError
from trbert_jax.inference.class_report import plot_confusion
from trbert_jax.inference.engine import InferenceEngine
from trbert_jax.inference.lines import RecordWriter, check_kind
from trbert_jax.inference.outputs import Outputs
from trbert_jax.inference.predictor import TRBert
from trbert_jax.inference.questions import answering
from trbert_jax.io import atomic_file, write_json
from trbert_jax.io.outputs import check_outputs, is_stream
from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Params
from trbert_jax.model.operating_points import find_thresholds
from trbert_jax.model.packed import DEFAULT_BACKEND
from trbert_jax.reduction import flops
from trbert_jax.reduction.rules import DEFAULT_THRESHOLD, RULES, Threshold, point_thresholds
from trbert_jax.tasks import encode_usable, notes_of
from trbert_jax.tasks.examples import Examples

Metrics = Callable[[Outputs], Mapping[str, Any]]


def evaluate_file(
    model_dir: str | Path,
    data_file: str | Path,
    *,
    batch_size: int = 32,
    rule: str | None = None,
    backend: str = DEFAULT_BACKEND,
    dtype: str = "float32",
    threshold: Threshold = DEFAULT_THRESHOLD,
    operating_point: str | None = None,
    predictions: Path | None = None,
    plot: Path | None = None,
    baselines: Sequence[str] = (),
    seed: int = 0,
    skip_bad_records: bool = False,
    max_length: int | None = None,
    text_field: str | None = None,
    text_pair_field: str | None = None,
    label_field: str | None = None,
    null_threshold: float | None = None,
    max_answer_length: int | None = None,
) -> dict[str, Any]:
    """Evaluates a saved model on a file.

    Args:
      model_dir, dtype: see `TRBert.from_pretrained`, which also takes `backend`.
      data_file: texts and labels in any format of `datasets.tables`; for a model that answers questions a
        file in the published format of its data set.
      batch_size, rule, backend, threshold, operating_point: see `TRBert.predict`.
      predictions: output file, see `write_predictions`; of questions the JSON that the official scorer reads,
        with `NAME.null_odds.json` beside `NAME.json` if questions may have no answer.
      plot: output file, a PNG image of the confusion matrix of texts.
      baselines: of `random`, `first_k`: untrained selections with the same kept counts.
      seed: of the random baseline.
      skip_bad_records: skip malformed records, instead of raising an error.
      max_length: cut texts after this many tokens; None for the model's own number.
      text_field, text_pair_field, label_field: fields of the file; None for those the model was trained on.
      null_threshold, max_answer_length: see `questions.answering`.

    Returns:
      The numbers of `summarize`, the same for each baseline, and of questions in `data` what was cut, left
      out or skipped.

    Raises `UserError` for a model or file that cannot be read, or a label the model does not have.
    """
    check_outputs([predictions, plot], inputs=[data_file], models=[model_dir])
    check_kind(predictions)
    bad = BadRecords(skip=skip_bad_records)
    model = TRBert.from_pretrained(model_dir, max_length=max_length, dtype=dtype, backend=backend)
    rule, task = rule or model.default_rule, answering(model, null_threshold, max_answer_length)
    threshold = find_thresholds(model.config.operating_points, operating_point, rule, threshold)
    if plot is not None and model.answers_questions:
        raise UserError(f"--plot draws the confusion matrix of classes; {model_dir} answers questions")
    fields = model.config.inputs.fields(text_field, text_pair_field, label_field)
    examples = read_examples(model, Path(data_file), bad, fields)
    engine = model.engine(batch_size)
    outputs = engine.run(model.params, examples, rule=rule, backend=backend, threshold=threshold)
    score = task.score(examples, outputs.logits)
    if predictions is not None and not model.answers_questions:
        write_predictions(predictions, outputs, examples, model.config.labels)
    elif predictions is not None:
        write_json(predictions, score.files["predictions.json"])
        if "null_odds.json" in score.files and not is_stream(
            predictions
        ):  # the official scorer of SQuAD 2.0 reads both
            write_json(predictions.with_suffix(".null_odds.json"), score.files["null_odds.json"])
    settings = {"rule": rule, "backend": backend, "batch_size": engine.batch_size}
    settings["threshold"] = (
        [*thresholds] if len(thresholds := point_thresholds(threshold)) > 1 else thresholds[0]
    )
    result = {**settings, **summarize(outputs, model.config, score.report)}
    if plot is not None:
        plot_confusion({rule: result}, plot)
    if notes := notes_of(examples, bad):
        result["data"] = notes
    if skip_bad_records:
        result["skipped_records"] = len(bad.skipped)
    if RULES[rule].drops and baselines:

        def metrics(outputs: Outputs) -> Mapping[str, Any]:
            return task.score(examples, outputs.logits).report

        runs = baseline_runs(outputs, baselines, seed)
        result["baselines"] = evaluate_runs(engine, model.params, examples, metrics, runs)
    return result


def read_examples(
    model: TRBert, path: Path, bad: BadRecords, fields: Fields | None = None, may_lack_labels: bool = False
) -> Examples:
    """Reads labeled texts, or questions in the published format of the model's data set.

    Malformed records go to `bad`. Raises `UserError` for a file that cannot be read, an unknown label, or a
    model without tokenizer.
    """
    model.check_use(model.answers_questions)
    if model.config.score:
        advice = "`trbert predict` gives the scores"
        raise UserError(f"{model.source}: the model has one output, a score, and no labels; {advice}")
    tokenizer = model.require_tokenizer()
    inputs = model.config.inputs
    if model.answers_questions:
        records = find_dataset(inputs.data).read_file(path, bad)
    else:
        fields = fields or inputs.fields()
        records = read_labeled(path, model.config.labels, bad, fields, may_lack_labels)
    return encode_usable(model.task, records, tokenizer, bad, str(path))


def baseline_runs(outputs: Outputs, rules: Sequence[str], seed: int) -> dict[str, dict[str, Any]]:
    """Returns runs of baseline rules with the kept counts of `outputs`, for `evaluate_runs`."""
    return {rule: {"rule": rule, "num_kept": outputs.num_kept, "seed": seed} for rule in rules}


def evaluate_runs(
    engine: InferenceEngine,
    params: Params,
    examples: Examples,
    metrics: Metrics,
    runs: Mapping[str, Mapping[str, Any]],
) -> dict[str, dict[str, Any]]:
    """Evaluates a model several times; `runs` gives the arguments of `InferenceEngine.run` by name."""
    result = {}
    for name, options in runs.items():
        outputs = engine.run(params, examples, **options)
        result[name] = summarize(outputs, engine.model.config, metrics(outputs))
    return result


def summarize(outputs: Outputs, config: ModelConfig, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Computes the numbers of an evaluation.

    Returns:
      The task's `metrics`, and means of a row: `tokens`, `kept` (at each point of reduction), `flops` (2 x
      MACs by the published accounting, padding not counted), `flops_exact` (with what that leaves out;
      docs/method.md, "FLOPs") and `flops_speedup` (the dense model's `flops` over the reduced ones).
    """
    shape, lengths, num_kept = flops.EncoderShape.of(config), outputs.lengths, outputs.num_kept
    used = dense = float(flops.dense_flops(shape, lengths).mean())
    exact, reduction = flops.exact_dense_flops(shape, lengths), dict[str, Any]()
    if outputs.kept:
        used = float(flops.reduced_flops(shape, lengths, num_kept).mean())
        exact = flops.exact_flops(shape, lengths, num_kept)
        reduction = {"flops_speedup": dense / used, "kept": num_kept.mean(0).tolist()}
    base = float(flops.bert_base_flops(lengths, config.num_outputs).mean())
    return {
        **metrics,
        "examples": len(lengths),
        "flops": used,
        "flops_exact": float(exact.mean()),
        **reduction,
        "flops_speedup_over_bert_base": base / used,
        "tokens": float(lengths.mean()),
        "examples_per_second": len(lengths) / max(outputs.seconds, 1e-9),
    }


def write_predictions(path: str | Path, outputs: Outputs, examples: Examples, labels: Sequence[str]) -> None:
    """Writes a JSON line, or row of CSV or TSV by the ending of `path`, per text.

    It has prediction, probabilities, kept positions and the true label, null if that is not known. The id is
    that of the source; without one, file and line.
    """
    scores, winners, path = outputs.probabilities, outputs.logits.argmax(-1), Path(path)
    given = [getattr(record, "given_id", None) for record in examples.records]
    with atomic_file(path) as stream:
        writer = RecordWriter(stream, path)
        for row, winner in enumerate(winners):
            label = outputs.labels[row]
            record = {
                "id": examples.ids[row] if not given or given[row] is None else given[row],
                "label": None if label < 0 else labels[label],
                "prediction": labels[winner],
                "scores": dict(zip(labels, scores[row].tolist(), strict=True)),
                "kept": [stage[row].tolist() for stage in outputs.kept],
                "num_tokens": int(outputs.lengths[row]),
            }
            writer.write(record)

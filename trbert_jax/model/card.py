"""Describe a model folder in its README.md, the card that the Hugging Face hub shows."""

from collections.abc import Sequence

import yaml

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.operating_points import Evaluation

CARD = "README.md"
LIBRARY = "trbert_jax"
_BEGIN, _END = "<!-- numbers, written by trbert_jax -->", "<!-- end of numbers -->"
_PIPELINES = {"classification": "text-classification", "span": "question-answering"}  # by head
_PAPER = "[TR-BERT](https://arxiv.org/abs/2105.11618)"
_TEXTS = (
    'for p in model.predict(["some text"]):\n    print(p.label, p.scores, [len(kept) for kept in p.kept])'
)
_PAIRS = _TEXTS.replace('"some text"', '("a text", "a second text")')
_SPANS = """from trbert_jax import answer_questions

print(answer_questions(model, [{"question": "Who wrote it?", "context": "Ada wrote it."}]))"""
_QUESTIONS = "# docs/question_answering.md of trbert_jax lists the fields of a question"


def model_card(
    config: ModelConfig,
    *,
    name: str = "path/to/this/folder",
    library: str = LIBRARY,
    use: str | None = None,
    thresholds: Sequence[float] | None = None,
    reduces: bool = True,
    license: str | None = None,
) -> str:
    """Returns README.md of a model folder: what the model is, its numbers, how to use it, and its limits.

    Args:
      config: the model; its `evaluation` and `operating_points` become tables.
      name: folder or hub id in the example.
      library: `library_name` of the hub.
      use: example of another library; None for the one of this package.
      thresholds: default of an exported graph.
      reduces: whether it drops tokens, or its selectors are missing.
      license: an identifier of the hub; None if it is not known.
    """
    front = {
        **({"license": license} if license else {}),
        "library_name": library,
        **({"pipeline_tag": _PIPELINES[config.task]} if config.task in _PIPELINES else {}),
        "tags": [LIBRARY, "token-reduction", "tr-bert"],
        **_index(config, name),
    }
    kind = f"{config.model_type}, {config.num_layers} layers of width {config.hidden_size}, for {config.task}"
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {kind}",
    ]
    if config.task == "classification" and not config.score:
        lines += ["", f"Labels: {', '.join(config.labels)}."]
    lines += ["", _selection(config, thresholds, reduces)]
    lines += ["", *_numbers(config)]
    if use is None:
        task = _TEXTS if config.task == "classification" else _SPANS if config.task == "span" else _QUESTIONS
        task = _PAIRS if config.inputs.text_pair_field else task
        code = f'from trbert_jax import TRBert\n\nmodel = TRBert.from_pretrained("{name}")\n{task}'
        dense = "`transformers` loads the folder too, as a model that drops no tokens."
        use = f"\n```python\n{code}\n```\n\n{dense}"
    lines += ["", "## Use", use, "", "## Limits", "", _limits(config)]
    return "\n".join(lines).rstrip() + "\n"


def _selection(config: ModelConfig, thresholds: Sequence[float] | None, reduces: bool) -> str:
    if not reduces:
        return "Drops no tokens."
    layers = " and ".join(map(str, config.reduction_layers))
    limit = "the input `threshold`, by default " if thresholds else "a threshold, by default "
    values = ", ".join(f"{x:.4g}" for x in thresholds or (0.5,))
    return (
        f"Drops tokens before layers {layers}, counted from 0: those whose keep probability is below {limit}"
        f"{values}. A text keeps the same tokens alone and in a batch. Method: {_PAPER}."
    )


def _numbers(config: ModelConfig) -> list[str]:
    lines = [_BEGIN]
    if found := config.evaluation:
        data = f"{found.examples} examples of {_data(found)}, {found.split}"
        lines += ["", "## Evaluation", "", f"On {data}:", ""]
        lines += [f"| model | {found.metric} | fewer FLOPs |", "|---|---|---|"]
        lines += [
            f"| dense | {found.dense:.4g} | 1x |",
            f"| reduced | {found.reduced:.4g} | {found.speedup:.2f}x |",
        ]
    if config.operating_points:
        lines += ["", "## Operating points", ""]
        lines += ["Thresholds, and the model's numbers on the data that they were chosen on.", ""]
        lines += ["| name | threshold | fewer FLOPs | metric | dense |", "|---|---|---|---|---|"]
    for point in config.operating_points:
        limits = ", ".join(f"{x:.4g}" for x in point.thresholds)
        numbers = f"{point.speedup:.2f}x | {point.metric} {point.value:.4g} | {point.dense:.4g}"
        lines.append(f"| {point.name} | {limits} | {numbers} |")
    return [*lines, _END]


def with_numbers(card: str, config: ModelConfig) -> str:
    """Returns a card with the evaluation and operating points of `config` in place of those that it has."""
    before, begin, rest = card.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    return before + "\n".join(_numbers(config)) + after if begin and end else card


def _index(config: ModelConfig, name: str) -> dict[str, object]:
    """Returns the evaluation as the hub reads it."""
    found = config.evaluation
    if found is None:
        return {}
    data = {"name": found.data or "own texts", "type": found.data or "other", "split": found.split}
    metrics = [
        {
            "type": found.metric,
            "value": found.reduced,
            "name": f"{found.metric}, {found.speedup:.2f}x fewer FLOPs",
        }
    ]
    task = {"type": _PIPELINES.get(config.task, config.task)}
    return {"model-index": [{"name": name, "results": [{"task": task, "dataset": data, "metrics": metrics}]}]}


def _data(evaluation: Evaluation) -> str:
    return "the owner's texts" if evaluation.data == "text" else evaluation.data


def _limits(config: ModelConfig) -> str:
    return (
        f"Inputs are cut after {config.max_length} tokens. Accuracy and speed hold for texts like those "
        "measured; check others with `trbert calibrate`, which can also promise how often answers differ "
        "from the dense model. Bias and license follow from the pretrained model and the training data."
    )

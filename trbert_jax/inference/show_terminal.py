"""Print which tokens of a text a model keeps: the terminal form of a page."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from trbert_jax.inference.predictor import TRBert
from trbert_jax.inference.show import input_records
from trbert_jax.inference.show_inputs import answers, characters, owner_of
from trbert_jax.model.operating_points import find_thresholds
from trbert_jax.reduction.rules import DEFAULT_RULE, DEFAULT_THRESHOLD, Threshold


def terminal_lines(
    model: TRBert,
    inputs: Iterable[Any],
    threshold: Threshold = DEFAULT_THRESHOLD,
    operating_point: str | None = None,
    *,
    color: bool,
) -> Iterator[str]:
    """Yields the answer to each input, and its text with the dropped tokens dim, or without color as blanks.

    Arguments and errors: see `show`.
    """
    records = input_records(model, inputs)
    limits = find_thresholds(model.config.operating_points, operating_point, DEFAULT_RULE, threshold)
    examples = model.task.encode(records, model.require_tokenizer())
    outputs = model.engine(len(records)).run(model.params, examples, threshold=limits)
    owner, points = owner_of(model, examples), len(outputs.kept)
    for i, answer in enumerate(answers(model, examples, outputs)):
        rows = np.flatnonzero(owner == i)
        tokens, kept = int(examples.row_lengths[rows].sum()), int(outputs.num_kept[rows, -1].sum())
        share = f"{kept} of {tokens} tokens kept to the end"
        yield f"{answer['answer'] or 'no answer'}  {answer['score']:.1%}  {share}"
        for row in rows.tolist():
            texts, at, _ = characters(model._encoder, examples, row)
            passed = np.bincount(np.concatenate([stage[row] for stage in outputs.kept]), minlength=len(at))
            for segment, text in enumerate(texts):
                places = [(a, b, n) for (k, a, b), n in zip(at, passed, strict=True) if k == segment]
                yield _styled(text, places, points) if color else _blanked(text, places, points)
        yield ""


def _styled(text: str, places: Sequence[tuple[int, int, int]], points: int) -> str:
    parts, end = list[str](), 0
    for a, b, passed in places:
        style = "1" if passed == points else "2;4" if passed else "2"  # bold; dim and underlined; dim
        parts += [text[end:a], f"\x1b[{style}m{text[a:b]}\x1b[0m"]
        end = b
    return "".join([*parts, f"\x1b[2m{text[end:]}\x1b[0m" if text[end:].strip() else ""])


def _blanked(text: str, places: Sequence[tuple[int, int, int]], points: int) -> str:
    letters = [letter if letter.isspace() else "_" for letter in text]
    for a, b, passed in places:
        if passed == points:
            letters[a:b] = text[a:b]
    return "".join(letters)

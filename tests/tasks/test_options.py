"""Multiple choice and candidates."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_qa import qa_tokenizer, row

from trbert_jax.datasets.records import CandidateQuestion, ChoiceQuestion
from trbert_jax.errors import UserError
from trbert_jax.model.config import InputConfig
from trbert_jax.reduction.selection import SharedPassage
from trbert_jax.tasks.candidates import CandidateTask
from trbert_jax.tasks.examples import Examples, pad_batch
from trbert_jax.tasks.losses import Rows
from trbert_jax.tasks.multiple_choice import MultipleChoiceTask

TOKENIZER = qa_tokenizer()
OPTIONS = ("king", "the queen", "a", "東京")
PLACE = "high/1.txt: questions[0]"
CHOICE = ChoiceQuestion("high/1.txt:0", "The king is in Paris .", "Who is ?", OPTIONS, 1, PLACE)


def choices(
    *questions: ChoiceQuestion, max_length: int = 512, training: bool = False, **inputs: Any
) -> Examples:
    task = MultipleChoiceTask(InputConfig(data="race", **{"choices": "shared"} | inputs), max_length)
    return task.encode(questions, TOKENIZER, training=training)


def test_a_question_that_is_cut_is_shared_up_to_the_cut() -> None:
    examples = choices(CHOICE, max_question_length=2)
    assert row(examples, 0) == "[CLS] the king is in paris . [SEP] who is [SEP]"
    assert examples.row_targets["shared_length"].tolist() == [10] * 4


@pytest.mark.parametrize(("form", "chosen"), [("pairs", "BCB"), ("independent", "BAB"), ("shared", "BAB")])
def test_chosen_options(form: str, chosen: str) -> None:
    """Of two equal ones the later in pairs, otherwise the first; the class "wrong" does not matter."""
    right = np.array([[0.1, 0.3, 0.2, 0.0], [0.5, 0.1, 0.5, 0.2], [-3.0, -1.0, -2.0, -4.0]])
    known = {"x": 0, "y": None, "z": 1}
    records = [dataclasses.replace(CHOICE, id=id, answer=answer) for id, answer in known.items()]
    task = MultipleChoiceTask(InputConfig(data="race", choices=form), 64)
    logits = np.stack([np.arange(12.0), right.ravel()], axis=1) if form == "pairs" else right
    score = task.score(task.encode(records, TOKENIZER), logits)
    assert score.files["predictions.json"] == dict(zip("xyz", chosen, strict=True))
    assert score.metrics == {"accuracy": 0.5}


@pytest.mark.parametrize("form", ["pairs", "independent", "shared"])
def test_questions_have_any_number_of_options(form: str) -> None:
    """Rows that fill a question up take no part in anything."""
    records = [
        dataclasses.replace(CHOICE, id="high/a", options=OPTIONS[:2], answer=1),
        dataclasses.replace(CHOICE, id="middle/b", options=(*OPTIONS, "x"), answer=4),
    ]
    task = MultipleChoiceTask(InputConfig(data="race", choices=form), 64)
    examples = task.encode(records, TOKENIZER)
    assert examples.num_rows == 7
    if form == "pairs":
        assert examples.labels.tolist() == [0, 1, 0, 0, 0, 0, 1]
        scores: Any = np.stack([np.zeros(7), [0, 1, 0, 2, 0, 0, 1]], axis=1)
    else:
        batch = {k: jnp.asarray(x) for k, x in pad_batch(examples, np.arange(2), 2, 64).items()}
        assert batch["segment"].tolist() == [True] * 2 + [False] * 3 + [True] * 5
        logits = jnp.array([0, 1, 9, 9, 9, 0, 2, 0, 0, 1.0])[:, None]
        scores = task.example_logits(logits, Rows(batch))
        loss = task.loss(logits, Rows(batch))
        assert loss[0] == pytest.approx(np.log1p(np.exp(-1)), abs=1e-6)
    if form == "shared":
        by_row = jnp.tile(logits, (1, 64))
        passage = SharedPassage(batch["shared"], 5)
        assert passage.mean(by_row)[::5, 0].tolist() == pytest.approx([0.5, 0.6])
    score = task.score(examples, np.asarray(scores))
    assert score.files["predictions.json"] == {"high/a": "B", "middle/b": "B"}
    assert score.metrics == {"accuracy": 0.5, "accuracy_high": 1.0, "accuracy_middle": 0.0}


NAMES = ("paris", "the queen of france", "東京")
SUPPORTS = ("the king was born in paris .", "x")
QUERY = CandidateQuestion("WH_0", "born_in king", NAMES, SUPPORTS, 0, "train.json: [0]")


def candidates(
    *questions: CandidateQuestion,
    max_length: int = 1024,
    max_segments: int = 1,
    max_document_length: int = 1024,
    tokenizer: Any = TOKENIZER,
    training: bool = False,
) -> Examples:
    task = CandidateTask(InputConfig(data="wikihop", max_segments=max_segments), max_length)
    task.max_document_length = max_document_length
    return task.encode(questions, tokenizer, training=training)


@pytest.mark.parametrize(
    ("changes", "max_length", "place"),
    [
        ({"article": "\u200b"}, 64, r"high/1.txt: questions\[0\]: question 'high/1.txt:0': article: "),
        ({"article": "a", "answer": None}, 64, "answer: "),
        ({"answer": None}, 99, r"train.json: \[0\]: question 'WH_0': answer: "),
    ],
)
def test_unusable_questions_are_named(changes: dict[str, Any], max_length: int, place: str) -> None:
    encode: Any = choices if "article" in changes else candidates
    question: Any = CHOICE if "article" in changes else QUERY
    with pytest.raises(UserError, match=place):
        encode(dataclasses.replace(question, **changes), max_length=max_length, training=True)


def test_digest_follows_the_inputs() -> None:
    changes: list[dict[str, Any]] = [{}, {"choices": "pairs"}, {"max_length": 40}]
    variants = [choices(CHOICE, **change) for change in [*changes, {"max_question_length": 40}]]
    variants += [choices(dataclasses.replace(CHOICE, answer=2)), choices(CHOICE, CHOICE)]
    changes = [{}, {"max_length": 40}, {"max_segments": 2}, {"max_document_length": 40}]
    variants += [candidates(QUERY, **change) for change in changes]
    variants += [candidates(dataclasses.replace(QUERY, candidates=("a", "b")))]
    assert len({examples.digest for examples in variants}) == len(variants)


def test_limits_of_candidates() -> None:
    assert candidates(dataclasses.replace(QUERY, answer=None), max_length=17).labels.tolist() == [-1]
    many = candidates(dataclasses.replace(QUERY, candidates=tuple(f"x{i}" for i in range(79))))
    assert (many.row_targets["candidates"] >= 0).all()
    with pytest.raises(UserError, match=r"\[unused2\]"):
        candidates(QUERY, tokenizer=qa_tokenizer(("[unused2]",)))


def test_chosen_candidates() -> None:
    other = dataclasses.replace(QUERY, id="b", candidates=("x", "y", "東京"), answer=None)
    logits = np.zeros((2, 79), np.float32)
    logits[0, :4] = -2, -1, -1, 5  # the fourth is padding
    logits[1, 2] = 1
    score = CandidateTask(InputConfig(data="wikihop"), 64).score(candidates(QUERY, other), logits)
    assert score.files["predictions.json"] == {"WH_0": "the queen of france", "b": "東京"}
    assert score.metrics == {"accuracy": 0}

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_qa import qa_tokenizer, row, texts, types

from trbert_jax.datasets.records import ChoiceQuestion
from trbert_jax.errors import UserError
from trbert_jax.tasks.batching import pad_batch
from trbert_jax.tasks.choice_features import ChoiceFeatures, build_choice_features

TOKENIZER = qa_tokenizer()
QUESTION = ChoiceQuestion(
    id="high/1.txt:0",
    article="The king is in Paris .",
    question="Who is ?",
    options=("king", "the queen", "a", "東京"),
    answer=1,
    where="high/1.txt: questions[0]",
)


def build(*questions: ChoiceQuestion, **options: Any) -> ChoiceFeatures:
    return build_choice_features(questions, TOKENIZER, **options, announce=str)


def test_rows() -> None:
    features = build(QUESTION)
    article = "[CLS] the king is in paris . [SEP] who is ?"
    assert [row(features.rows, i) for i in range(4)] == [
        f"{article} king [SEP]",
        f"{article} the queen [SEP]",
        f"{article} a [SEP]",
        f"{article} 東 京 [SEP]",
    ]
    assert types(features.rows, 0) == [0] * 8 + [1] * 5
    assert features.labels.tolist() == [1]
    assert features.question_ends.tolist() == [11]
    assert (features.counts.num_truncated, features.counts.num_questions_cut) == (0, 0)


def test_shared_tokens() -> None:
    features = build(QUESTION, dataclasses.replace(QUESTION, article="a", question=""))
    shared = [features.shared[a:b].tolist() for a, b in zip(*borders(features), strict=True)]
    assert shared[:4] == [[True] * 11 + [False] * n for n in (2, 3, 2, 3)]
    assert shared[4:] == [[True] * 3 + [False] * n for n in (2, 3, 2, 3)]


def borders(features: ChoiceFeatures) -> tuple[np.ndarray, np.ndarray]:
    return features.rows.offsets[:-1], features.rows.offsets[1:]


def test_the_longest_option_decides_how_much_of_the_article_stays() -> None:
    features = build(QUESTION, max_length=12)  # 12 - 3 - (3 + 2) = 4
    assert row(features.rows, 0) == "[CLS] the king is in [SEP] who is ? king [SEP]"
    assert row(features.rows, 3) == "[CLS] the king is in [SEP] who is ? 東 京 [SEP]"
    assert features.question_ends.tolist() == [9]
    assert features.counts.num_truncated == 1


@pytest.mark.parametrize(
    ("max_question_length", "options", "end"),
    [
        (4, ["who is ? king", "who is ? the", "who is ? a", "who is ? 東"], 11),
        (3, ["who is ?"] * 4, 11),
        # The question alone is longer: what the rows have in common ends where they are cut.
        (2, ["who is"] * 4, 10),
    ],
)
def test_questions_and_options_are_cut_together(
    max_question_length: int, options: list[str], end: int
) -> None:
    features = build(QUESTION, max_question_length=max_question_length)
    assert [row(features.rows, i) for i in range(4)] == [
        f"[CLS] the king is in paris . [SEP] {option} [SEP]" for option in options
    ]
    assert features.question_ends.tolist() == [end]
    assert features.counts.num_questions_cut == 1


def test_pairs() -> None:
    withheld = dataclasses.replace(QUESTION, id="x", answer=None)
    features = build(QUESTION, withheld)
    pairs = features.pairs()
    assert pairs.labels.tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert pairs.ids[:3] == ["high/1.txt:0:A", "high/1.txt:0:B", "high/1.txt:0:C"]
    assert pairs.digest != features.digest
    assert features.labels.tolist() == [1, -1]
    batch = pad_batch(pairs, np.array([0, 1]), 3, 16)  # the batches of classification take them
    assert batch["token_type_ids"][0].tolist() == [0] * 8 + [1] * 5 + [0] * 3


def test_articles_of_several_questions_are_the_same() -> None:
    features = build(QUESTION, dataclasses.replace(QUESTION, id="b", question="where ?"))
    assert row(features.rows, 4).startswith("[CLS] the king is in paris . [SEP] where ? king")


@pytest.mark.parametrize(
    ("changes", "max_length", "message"),
    [
        (
            {},
            8,
            "question 'high/1.txt:0': question: has with its longest option 5 tokens, which leaves none of 8",
        ),
        ({"article": "\u200b"}, 64, "question 'high/1.txt:0': article: has no tokens"),
        ({"answer": None}, 64, "question 'high/1.txt:0': answer: missing; training needs one"),
    ],
)
def test_errors_name_the_question(changes: dict[str, Any], max_length: int, message: str) -> None:
    question = dataclasses.replace(QUESTION, **changes)
    with pytest.raises(UserError, match=message) as caught:
        build_choice_features([question], TOKENIZER, max_length, training=True, announce=str)
    assert str(caught.value).startswith("high/1.txt: questions[0]: ")


def test_digest_follows_what_decides_the_contents() -> None:
    variants = [
        build(QUESTION),
        build(QUESTION, max_length=40),
        build(QUESTION, max_question_length=40),
        build(dataclasses.replace(QUESTION, answer=2)),
        build(QUESTION, QUESTION),
    ]
    assert len({features.digest for features in variants}) == len(variants)


@settings(deadline=None)
@given(texts, st.lists(texts, min_size=4, max_size=4), st.integers(12, 60), st.integers(1, 8))
def test_rows_of_a_question_agree_up_to_its_end(
    article: str, options: list[str], max_length: int, max_question_length: int
) -> None:
    question = dataclasses.replace(QUESTION, article=article, options=tuple(options))
    features = build(question, max_length=max_length, max_question_length=max_question_length)
    end = int(features.question_ends[0])
    first = features.rows.row(0)
    for i in range(4):
        tokens = features.rows.row(i)
        assert len(tokens) <= max_length
        assert tokens[:end].tolist() == first[:end].tolist()
        assert len(tokens) > end  # the last [SEP] is never shared
        assert tokens[-1] == 3

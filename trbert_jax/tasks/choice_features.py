"""Questions about an article with four options: RACE.

docs/question_answering.md, "Options of a question".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from trbert_jax.datasets.dataset import Announce
from trbert_jax.datasets.reading import BadRecord, UnusableRecords, unusable
from trbert_jax.datasets.records import ChoiceQuestion
from trbert_jax.tasks.encoding import TextEncoder
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.ragged import Counts, RowParts, TokenRows, digest_of, join_rows

MAX_LENGTH = 512
MAX_QUESTION_LENGTH = 128  # question and option together


@dataclasses.dataclass(frozen=True, eq=False)
class ChoiceFeatures:
    """n questions with four rows each: `[CLS] article [SEP] question option [SEP]`.

    The rows of a question hold equally much of the article, so they agree up to the option. Three
    forms of the task read them:

    * pairs: every row by itself, right or wrong (`pairs`);
    * independent rows, cross entropy over the four (`labels`);
    * rows that share one selection among the tokens they have in common (`labels`, `shared`).

    Attributes:
      rows: 4 n rows, question i has the rows 4 i to 4 i + 3.
      labels: int32 [n], the right option, -1 where the source withholds it.
      question_ends: int32 [n], how many tokens the four rows of a question have in common: [CLS],
        article, [SEP], and the question as far as it was not cut.
      ids: n ids of questions.
      counts: what became of the questions.
      digest: identifies records, tokenizer and settings.
    """

    rows: TokenRows
    labels: np.ndarray
    question_ends: np.ndarray
    ids: list[str]
    counts: Counts
    digest: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shared(self) -> np.ndarray:
        """bool [total of rows], the tokens that the four rows of a question have in common."""
        position = np.arange(len(self.rows.tokens)) - np.repeat(self.rows.offsets[:-1], self.rows.lengths)
        return position < np.repeat(np.repeat(self.question_ends, 4), self.rows.lengths)

    def pairs(self) -> Examples:
        """The rows as 4 n examples of two classes, 1 for the right option; see `Examples`.

        Options of a question whose answer is withheld have the class 0.
        """
        return Examples(
            tokens=self.rows.tokens,
            offsets=self.rows.offsets,
            token_types=self.rows.token_types,
            labels=(np.arange(4) == self.labels[:, None]).astype(np.int32).ravel(),
            ids=[f"{i}:{'ABCD'[option]}" for i in self.ids for option in range(4)],
            num_truncated=self.counts.num_truncated,
            digest=digest_of("pairs", self.digest),
        )


def build_choice_features(
    questions: Sequence[ChoiceQuestion],
    tokenizer: Any,
    max_length: int = MAX_LENGTH,
    max_question_length: int = MAX_QUESTION_LENGTH,
    *,
    training: bool = False,
    announce: Announce = print,
) -> ChoiceFeatures:
    """Makes the four rows of every question.

    With M the word pieces of a question and its longest option, at most `max_question_length`, every
    row has M pieces at most after the article, and the article is cut to `max_length` - 3 - M.

    Args:
      questions: of one split.
      tokenizer: a `transformers.PreTrainedTokenizerFast`; not changed.
      max_length: tokens of a row at most.
      max_question_length: word pieces of a question with its option at most.
      training: whether a question without an answer is an error.
      announce: called with a line of text that says what became of the questions.

    Raises:
      UnusableRecords: an article without word pieces, a question that leaves no room for its article,
        or in training one without an answer; all such questions.
    """
    encoder = TextEncoder(tokenizer)
    articles, article_index = encoder.encode_distinct([q.article for q in questions], max_tokens=max_length)
    stems = encoder.encode([q.question for q in questions])
    options = encoder.encode([option for q in questions for option in q.options])
    cls, sep = (np.array([i], np.int32) for i in (encoder.cls_id, encoder.sep_id))
    rows: list[RowParts] = []
    ends = list[int]()
    truncated = questions_cut = 0
    bad = dict[str, BadRecord]()
    for i, question in enumerate(questions):
        if len(question.options) != 4:
            raise ValueError(f"{question.where}: {len(question.options)} options; expected 4")
        if training and question.answer is None:
            bad[question.id] = unusable(question, "answer", "missing; training needs one")
            continue
        stem = stems.tokens_of(i)
        parts = [np.concatenate([stem, options.tokens_of(4 * i + k)]) for k in range(4)]
        longest = min(max(map(len, parts)), max_question_length)
        room = max_length - 3 - longest
        if room < 1:
            bad[question.id] = unusable(
                question,
                "question",
                f"has with its longest option {longest} tokens, which leaves none of {max_length} for the "
                "article; give a larger max_length or a smaller max_question_length",
            )
            continue
        article = articles.tokens_of(article_index[i])[:room]
        if not len(article):
            reason = "has no tokens; expected a text that the tokenizer keeps"
            bad[question.id] = unusable(question, "article", reason)
            continue
        rows.extend(((cls, article, sep), (part[:longest], sep)) for part in parts)
        ends.append(len(article) + 2 + min(len(stem), longest))
        truncated += int(len(article) < articles.num_tokens[article_index[i]])
        questions_cut += any(len(part) > longest for part in parts)
    if bad:
        raise UnusableRecords(bad)
    counts = Counts(
        num_examples=len(questions),
        num_rows=4 * len(questions),
        num_truncated=truncated,
        num_questions_cut=questions_cut,
    )
    announce(counts.describe())
    return ChoiceFeatures(
        rows=join_rows(rows),
        labels=np.array([-1 if q.answer is None else q.answer for q in questions], np.int32),
        question_ends=np.array(ends, np.int32),
        ids=[q.id for q in questions],
        counts=counts,
        digest=digest_of(
            "choice", encoder.description, max_length, max_question_length, training, list(questions)
        ),
    )

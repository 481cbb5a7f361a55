"""Choose one of the options that answer a question about an article: RACE, in three forms.

pairs         each option is an example of two classes, wrong or right (as published)
independent   each option selects tokens by itself; one softmax over the options
shared        the options select the tokens of article and question together; one softmax over the options
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.datasets import reading
from trbert_jax.datasets.choice_files import LETTERS, LEVELS, option_texts
from trbert_jax.datasets.records import ChoiceQuestion
from trbert_jax.model.config import InputConfig
from trbert_jax.tasks.base import RecordErrors, Score, Task, ranked, register_task, softmax
from trbert_jax.tasks.examples import Counts, Examples, digest_of
from trbert_jax.tasks.losses import NO_CANDIDATE, Rows
from trbert_jax.tasks.scorers import accuracy
from trbert_jax.tasks.text_encoder import TextEncoder

MAX_QUESTION_LENGTH = 128  # of question and option together
NUM_OPTIONS = 4  # of a question of RACE; the rows of an example, unless some question has more options


@register_task
class MultipleChoiceTask(Task):
    """Accuracy over questions, whatever the form."""

    name = "multiple_choice"
    metric = "accuracy"
    settings = frozenset({"data.skip_bad_records", "data.choices", "model.max_question_length"})
    markers = ("[unused1]", "[unused2]", "[unused3]")
    shortest_request: ClassVar[dict[str, Any]] = {"passage": "a", "question": "a", "options": ["a"] * 4}

    def __init__(self, inputs: InputConfig, max_length: int, labels: Sequence[str] = ()) -> None:
        self.form = inputs.choices
        super().__init__(
            inputs, max_length, ("wrong", "right") if self.form == "pairs" else LETTERS[:NUM_OPTIONS]
        )

    @property
    def head(self) -> str:
        return "classification" if self.form == "pairs" else self.name

    def texts(self, records: Sequence[ChoiceQuestion]) -> list[str]:
        asked = [" ".join((record.question, *record.options)) for record in records]
        return asked + list(dict.fromkeys(record.article for record in records))

    def encode(
        self, records: Sequence[ChoiceQuestion], tokenizer: Any, *, training: bool = False, **_: Any
    ) -> Examples:
        """Makes a row of every option, `[CLS] article [SEP] question option [SEP]`; see `Task.encode`.

        With M the word pieces of a question and its longest option, at most `max_question_length`, every
        row has M pieces at most after the article, and the article is cut to `max_length` - 3 - M. So the
        rows of a question agree up to the option; `shared_length` is the number of tokens they share.
        """
        max_question_length = self.inputs.max_question_length or MAX_QUESTION_LENGTH
        encoder = TextEncoder(tokenizer)
        articles, article_index = encoder.encode_distinct(
            [q.article for q in records], max_tokens=self.max_length
        )
        stems = encoder.encode([q.question for q in records]).tokens
        options = iter(encoder.encode([option for q in records for option in q.options]).tokens)
        sizes = [len(q.options) for q in records]
        rows, shared, truncated, questions_cut = [], list[int](), 0, 0
        errors = RecordErrors(training)
        for i, question in enumerate(records):
            parts = [np.concatenate([stems[i], next(options)]) for _ in question.options]
            longest = min(max(map(len, parts)), max_question_length)
            room = self.max_length - 3 - longest
            length = int(articles.num_tokens[article_index[i]])
            # A question may be empty, an article not.
            tokens = {"question": max(1, longest), "article": length}
            if not errors.check(question, tokens, room, self.max_length):
                continue
            article = articles.tokens[article_index[i]][:room]
            rows += [((encoder.cls, article, encoder.sep), (part[:longest], encoder.sep)) for part in parts]
            shared.append(len(article) + 2 + min(len(stems[i]), longest))
            truncated += len(article) < length
            questions_cut += any(len(part) > longest for part in parts)
        errors.raise_if_any()
        counts = Counts(len(records), len(rows), truncated, questions_cut)
        settings = (encoder.description, self.max_length, max_question_length, training)
        digest = digest_of("choice", *settings, list(records))
        answers = np.array([-1 if q.answer is None else q.answer for q in records], np.int32)
        fields: dict[str, Any] = {"counts": counts, "records": records}
        if self.form == "pairs":
            ids = [f"{q.id}:{letter}" for q in records for letter in LETTERS[: len(q.options)]]
            # 0 if withheld
            right = np.array([k == q.answer for q in records for k in range(len(q.options))], np.int32)
            return Examples.of_pairs(rows, ids, labels=right, digest=digest_of("pairs", digest), **fields)
        if self.form == "shared":
            fields["row_targets"] = {"shared_length": np.repeat(np.array(shared, np.int32), sizes)}
        fields["first_row"] = np.cumsum([0, *sizes], dtype=np.int64)
        fields["group"] = max([NUM_OPTIONS, *sizes])
        return Examples.of_pairs(rows, [q.id for q in records], labels=answers, digest=digest, **fields)

    @staticmethod
    def example_logits(logits: jax.Array, rows: Rows) -> jax.Array:
        logits = rows.grouped(logits)[..., 0]
        return jnp.where(rows.grouped(rows.valid), logits, NO_CANDIDATE)

    def score(self, examples: Examples, logits: Any, null_threshold: float | None = None) -> Score:
        chosen = {}
        for question, scores in zip(examples.records, self._scores(examples, logits), strict=True):
            # As published: the later option wins among equals in pairs, otherwise the first.
            last = len(scores) - 1
            chosen[question.id] = last - scores[::-1].argmax() if self.form == "pairs" else scores.argmax()
        known = [question for question in examples.records if question.answer is not None]
        parts = {f"accuracy_{level}": [q for q in known if q.id.startswith(f"{level}/")] for level in LEVELS}
        if all(parts.values()):
            parts = {"accuracy": known, **parts}
        else:
            parts = {"accuracy": known} if known else {}
        metrics = {
            name: accuracy([chosen[q.id] for q in part], [q.answer for q in part])
            for name, part in parts.items()
        }
        return Score(metrics, {"predictions.json": {id: LETTERS[k] for id, k in chosen.items()}})

    def answers(self, examples: Examples, logits: Any, n_best: int = 0) -> dict[str, dict[str, Any]]:
        found, chosen = {}, self._predictions(examples, logits)
        given = self._scores(examples, logits)
        if self.form == "pairs":  # the probability that the option is right, by itself
            right = [softmax(pair)[1] for pair in np.asarray(logits)]
            given = np.split(np.array(right), np.cumsum([len(q.options) for q in examples.records])[:-1])
        for question, scores in zip(examples.records, given, strict=True):
            probabilities = scores if self.form == "pairs" else softmax(scores)
            best = LETTERS.index(chosen[question.id])
            found[question.id] = ranked(LETTERS[: len(scores)], probabilities, best, n_best)
        return found

    def _scores(self, examples: Examples, logits: Any) -> list[np.ndarray]:
        """Returns the scores of each question's options, float [options]."""
        sizes = [len(question.options) for question in examples.records]
        if self.form == "pairs":  # as published, the logit of "wrong" does not matter
            return np.split(np.asarray(logits)[:, 1], np.cumsum(sizes)[:-1])
        return [row[:size] for row, size in zip(np.asarray(logits), sizes, strict=True)]

    def parse_request(self, request: Mapping[str, Any], id: str, where: str) -> ChoiceQuestion:
        field = "article" if "article" in request and "passage" not in request else "passage"
        article = reading.text(request, field)
        question = reading.text({"question": "", **request}, "question", may_be_empty=True)
        return ChoiceQuestion(id, article, question, option_texts(request, "options"), None, where)

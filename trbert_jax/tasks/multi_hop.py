"""Answer questions over several paragraphs and name the sentences that support the answer: HotpotQA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.datasets.records import GraphQuestion, MultiHopQuestion, Paragraph
from trbert_jax.errors import UserError
from trbert_jax.tasks.base import Fields, Score, Task, register_task
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.losses import Rows, cross_entropy, distillation, mean_of, sentence_loss
from trbert_jax.tasks.paragraphs import (
    NO,
    SPAN,
    YES,
    Packing,
    TokenizedQuestion,
    drawn_orders,
    encode_paragraphs,
    file_orders,
    pack,
    paragraph_from_pieces,
)
from trbert_jax.tasks.scorers import score_hotpotqa
from trbert_jax.tasks.text_encoder import cut_text

MAX_QUESTION_LENGTH = 80
MAX_ANSWER_LENGTH = 30  # word pieces


@register_task
class MultiHopTask(Task):
    """Finds an answer (a span, yes or no) and its supporting sentences.

    Training draws the paragraphs of an input anew in each epoch.
    """

    name = "multi_hop"
    metric = "f1"
    settings = frozenset({"data.skip_bad_records", "model.max_question_length"})
    markers = ("[unused1]", "[unused2]", "[unused3]")
    shortest_request: ClassVar[dict[str, Any]] = {
        "question": "a",
        "paragraphs": [{"title": "a", "sentences": ["a"]}],
    }
    resamples = True
    logits = ("span", "kind", "sentence")

    def texts(self, records: Sequence[Any]) -> list[str]:
        texts = list[str]()
        for record in records:
            texts.append(record.question)
            for paragraph in record.paragraphs:
                texts.append(paragraph.title.replace("_", " "))
                texts.append(_text_of(paragraph))
        return list(dict.fromkeys(texts))

    def encode(
        self,
        records: Sequence[Any],
        tokenizer: Any,
        *,
        training: bool = False,
        seed: int = 0,
        cache_dir: Path | None = None,
    ) -> Examples:
        """Makes one input of every question, see `pack` and `Task.encode`.

        In training the paragraphs are drawn, as in epoch 0; otherwise they have the order of the source.
        Training leaves out questions whose answer is found in no paragraph.
        """
        paragraphs = encode_paragraphs(
            [_from_graph(r, tokenizer) if isinstance(r, GraphQuestion) else r for r in records],
            tokenizer,
            self.max_length,
            self.inputs.max_question_length or MAX_QUESTION_LENGTH,
            training=training,
        )
        orders = drawn_orders(paragraphs, seed, 0) if training else file_orders(paragraphs)
        return pack(paragraphs, orders, records)

    def resample(self, examples: Examples, seed: int, epoch: int) -> Examples:
        paragraphs = examples.layout.paragraphs
        return pack(paragraphs, drawn_orders(paragraphs, seed, epoch), examples.records)

    # `starts`, `ends` int32 [B, A], `kind` int32 [B], `sentence_labels` int32 [B, N]; -1 for padding

    @staticmethod
    def loss(logits: dict[str, jax.Array], rows: Rows) -> jax.Array:
        ends = (
            mean_of(logits["span"][:, i], rows.get(key), rows.mask)
            for i, key in enumerate(("starts", "ends"))
        )
        span = sum(ends, start=jnp.zeros(())) / 2
        kind = cross_entropy(logits["kind"], rows.get("kind"))
        return span + kind + sentence_loss(logits["sentence"], rows.get("sentence_labels"))

    @staticmethod
    def distillation_loss(logits: dict[str, jax.Array], rows: Rows, temperature: float) -> jax.Array:
        teacher, labeled = rows.get("teacher_logits"), rows.get("sentence_labels") >= 0
        span = distillation(logits["span"], teacher["span"], temperature, rows.mask[:, None]).sum(1)
        kind = distillation(logits["kind"], teacher["kind"], temperature)
        sentence = distillation(logits["sentence"], teacher["sentence"], temperature)
        # The published sum is over all slots for sentences, empty ones included.
        counted = sentence if "head_mask" in rows.batch else jnp.where(labeled, sentence, 0.0)
        return span + kind + counted.sum(-1) / jnp.maximum(labeled.sum(-1), 1)

    @staticmethod
    def is_by_token(name: str | None = None) -> bool:
        return name == "span"

    def score(self, examples: Examples, logits: Any, null_threshold: float | None = None) -> Score:
        predictions = decode_multi_hop(examples, logits)
        gold = {
            record.id: {"answer": record.answer, "supporting_facts": _facts(record)}
            for record in examples.records
            if record.answer is not None
        }
        metrics = score_hotpotqa(gold, predictions) if gold else {}
        return Score(metrics, {"predictions.json": predictions})

    def parse_request(self, request: Mapping[str, Any], id: str, where: str) -> MultiHopQuestion:
        fields = Fields(request, where)
        values = fields.get("paragraphs")
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}: paragraphs is not a list of objects with title and sentences")
        paragraphs = []
        for number, value in enumerate(values, 1):
            place = f"{where}: paragraph {number}"
            if not isinstance(value, Mapping):
                raise UserError(f"{place} is a JSON {type(value).__name__}; expected an object")
            inner = Fields(value, place)
            paragraphs.append(Paragraph(inner.text("title"), inner.texts("sentences", may_be_empty=True)))
        return MultiHopQuestion(id, fields.text("question"), None, tuple(paragraphs), (), where)


def _text_of(paragraph: Any) -> str:
    if isinstance(paragraph, Paragraph):
        return "".join(paragraph.sentences)
    if paragraph.words:
        return " ".join(paragraph.words)
    return " ".join(paragraph.wordpieces).replace(" ##", "")  # a training file in graph format has no words


def _facts(record: Any) -> list[list[Any]]:
    if not isinstance(record, GraphQuestion):
        return [list(fact) for fact in record.supporting]
    return [
        [paragraph.title, number]
        for paragraph in record.paragraphs
        for number, supports in enumerate(paragraph.supporting or ())
        if supports
    ]


def _from_graph(record: GraphQuestion, tokenizer: Any) -> TokenizedQuestion:
    paragraphs = tuple(
        paragraph_from_pieces(
            tokenizer,
            paragraph.title,
            paragraph.wordpieces,
            sentences=[(r.start, r.end) for r in paragraph.sentences],
            supporting=paragraph.supporting,
            spans=[(r.start, r.end) for r in paragraph.answers],
            gold=number < 2 and bool(paragraph.supporting and any(paragraph.supporting)),
            words=paragraph.words,
            piece_words=paragraph.word_of,
        )
        for number, paragraph in enumerate(record.paragraphs)
    )
    return TokenizedQuestion(record.id, record.question, record.answer, paragraphs, record.where)


def decode_multi_hop(
    examples: Examples, logits: Mapping[str, np.ndarray], max_answer_length: int = MAX_ANSWER_LENGTH
) -> dict[str, dict[str, Any]]:
    """Chooses an answer and supporting sentences for every question.

    Args:
      examples: from `pack`, not encoded for training.
      logits: `span` float [n, 2, S]; `kind` float [n, 3], a span, yes, no; `sentence` float [n, 80, 2], the
        second for supporting.
      max_answer_length: word pieces of an answer at most.

    Returns:
      The input of the official scorer: `{"answer": {id: text}, "sp": {id: [[title, number], ...]}}`. The
      answer is "" if the input has no text.

    Raises:
      ValueError: examples encoded for training, which have no characters to cut answers from.

    Source: docs/question_answering.md, "From logits to answers".
    """
    packing: Packing = examples.layout
    if len(packing.paragraphs.chars.values) != len(packing.paragraphs.tokens.values):
        raise ValueError("examples encoded for training have no characters to cut answers from")
    kinds = np.argmax(logits["kind"], axis=1)
    supporting = np.argmax(logits["sentence"], axis=2) == 1  # [n, 80]
    answers, facts = dict[str, str](), dict[str, list[list[Any]]]()
    for i, id in enumerate(examples.ids):
        answers[id] = {YES: "yes", NO: "no"}.get(int(kinds[i]), "")
        if kinds[i] == SPAN:
            row = logits["span"][i, :, : examples.row_lengths[i]]
            answers[id] = _best_span(packing, i, row, max_answer_length)
        in_input = packing.facts[i]
        chosen = in_input[supporting[i, : len(in_input)]].tolist()
        facts[id] = [[packing.paragraphs.titles[p], number] for p, number in chosen]
    return {"answer": answers, "sp": facts}


def _best_span(packing: Packing, i: int, logits: np.ndarray, max_answer_length: int) -> str:
    """Returns the text of the best span within the text of one paragraph, "" if there is no text.

    Titles, markers and pieces that stand for no text end a span. Among equals the one that begins first
    wins, then the shortest.

    Args:
      packing: see there.
      i: the question.
      logits: float [2, tokens of its row].
      max_answer_length: word pieces at most.
    """
    paragraphs, order = packing.paragraphs, packing.orders[i]
    chars = np.concatenate([np.zeros((0, 2), np.int32), *(paragraphs.chars[p] for p in order)])
    chars = chars[: paragraphs.room[i]]  # [t, 2]
    owner = np.repeat(order, paragraphs.tokens.lengths[order])
    is_text = chars[:, 0] >= 0
    if not is_text.any():
        return ""
    # The paragraphs end before the last [SEP].
    starts, ends = logits[:, -1 - len(chars) : -1].astype(np.float64)
    # Spans without a gap have the same number of gaps before their start and their end.
    gaps = np.cumsum(~is_text)
    last = np.arange(len(chars))[:, None] + np.arange(max_answer_length)  # [t, lengths]
    inside = np.minimum(last, len(chars) - 1)
    fits = (last < len(chars)) & is_text[:, None] & is_text[inside] & (gaps[:, None] == gaps[inside])
    scores = np.where(fits, starts[:, None] + ends[inside], -np.inf)
    start, length = np.unravel_index(np.argmax(scores), scores.shape)
    return cut_text(paragraphs.texts[owner[start]], chars[start, 0], chars[start + length, 1])

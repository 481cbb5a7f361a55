"""Answer questions over several paragraphs and name the sentences that support the answer: HotpotQA.

Paragraphs are tokenized once, and packed in any order: `[CLS] question [SEP] paragraphs [SEP]`, each of
them `[unused1] title [unused2] text`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.datasets import reading
from trbert_jax.datasets.records import GraphQuestion, MultiHopQuestion, Paragraph
from trbert_jax.tasks.base import Score, Task, register_task, softmax
from trbert_jax.tasks.examples import Examples, Ragged, digest_of
from trbert_jax.tasks.losses import (
    Rows,
    cross_entropy,
    distillation,
    margin,
    masked_mean,
    mean_of,
    sentence_loss,
)
from trbert_jax.tasks.paragraphs import (
    NO,
    SPAN,
    YES,
    MultiHopParagraphs,
    encode_paragraphs,
    question_from_graph,
)
from trbert_jax.tasks.scorers import score_hotpotqa
from trbert_jax.tasks.text_encoder import cut_span

MAX_QUESTION_LENGTH = 80
MAX_ANSWERS = 8  # slots of an input, as published
MAX_SENTENCES = 80
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
    max_answer_length = MAX_ANSWER_LENGTH
    logits = ("span", "kind", "sentence")

    def texts(self, records: Sequence[Any]) -> list[str]:
        texts = list[str]()
        for record in records:
            texts.append(record.question)
            for paragraph in record.paragraphs:
                texts += [paragraph.title.replace("_", " "), _text_of(paragraph)]
        return list(dict.fromkeys(texts))

    def encode(
        self, records: Sequence[Any], tokenizer: Any, *, training: bool = False, seed: int = 0, **_: Any
    ) -> Examples:
        """Makes one input of every question, see `pack` and `Task.encode`.

        In training the paragraphs are drawn, as in epoch 0; otherwise they have the order of the source.
        Training leaves out questions whose answer is found in no paragraph.
        """
        paragraphs = encode_paragraphs(
            [question_from_graph(r, tokenizer) if isinstance(r, GraphQuestion) else r for r in records],
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

    @classmethod
    def loss(cls, logits: dict[str, jax.Array], rows: Rows) -> jax.Array:
        ends = (
            mean_of(logits["span"][:, i], rows.get(key), rows.mask)
            for i, key in enumerate(("starts", "ends"))
        )
        span = sum(ends, start=jnp.zeros(())) / 2
        kind = cross_entropy(logits["kind"], rows.get("kind"))
        return span + kind + sentence_loss(logits["sentence"], rows.get("sentence_labels"))

    @classmethod
    def distillation_loss(cls, logits: dict[str, jax.Array], rows: Rows, temperature: float) -> jax.Array:
        teacher, labeled = rows.get("teacher_logits"), rows.get("sentence_labels") >= 0
        span = distillation(logits["span"], teacher["span"], temperature, rows.mask[:, None]).sum(1)
        kind = distillation(logits["kind"], teacher["kind"], temperature)
        sentence = distillation(logits["sentence"], teacher["sentence"], temperature)
        # The published sum is over all slots for sentences, empty ones included.
        counted = sentence if "head_mask" in rows.batch else jnp.where(labeled, sentence, 0.0)
        return span + kind + counted.sum(-1) / jnp.maximum(labeled.sum(-1), 1)

    @classmethod
    def margin(cls, logits: dict[str, jax.Array], rows: Rows) -> jax.Array:
        span = margin(logits["span"], rows.mask[:, None]).sum(1)
        sentence = masked_mean(margin(logits["sentence"]), rows.get("sentences")[..., 0] >= 0)
        return span + margin(logits["kind"]) + sentence

    @staticmethod
    def is_by_token(name: str | None = None) -> bool:
        return name == "span"

    def score(self, examples: Examples, logits: Any, null_threshold: float | None = None) -> Score:
        predictions = decode_multi_hop(examples, logits, self._longest)
        gold = {
            record.id: {"answer": record.answer, "supporting_facts": _facts(record)}
            for record in examples.records
            if record.answer is not None
        }
        metrics = score_hotpotqa(gold, predictions) if gold else {}
        if not any(facts["supporting_facts"] for facts in gold.values()):  # withheld
            metrics = {k: x for k, x in metrics.items() if not k.startswith(("sp_", "joint_"))}
        return Score(metrics, {"predictions.json": predictions})

    def answers(self, examples: Examples, logits: Any, n_best: int = 0) -> dict[str, dict[str, Any]]:
        packing: Packing = examples.layout
        chosen, found = self._predictions(examples, logits), {}
        for i, id in enumerate(examples.ids):
            kinds = softmax(logits["kind"][i])
            spans = best_spans(packing, i, logits["span"][i], self._longest, max(n_best, 1))
            named: list[dict[str, Any]] = [
                {"answer": name, "score": float(kinds[k])} for name, k in (("yes", YES), ("no", NO))
            ]
            cut = [{**span, "score": span["score"] * float(kinds[SPAN])} for span in spans]
            answer = chosen["answer"][id]
            of_kind = cut if kinds.argmax() == SPAN else named
            best = next((e for e in of_kind if e["answer"] == answer), {"answer": answer, "score": 0.0})
            rest = sorted((e for e in named + cut if e is not best), key=lambda e: -e["score"])
            listed = {"n_best": [best, *rest][:n_best]} if n_best else {}
            found[id] = best | {"supporting": chosen["sp"][id]} | listed
        return found

    @property
    def _longest(self) -> int:
        return self.max_answer_length or MAX_ANSWER_LENGTH

    def parse_request(self, request: Mapping[str, Any], id: str, where: str) -> MultiHopQuestion:
        paragraphs = []
        for i, paragraph in enumerate(reading.items(request, "paragraphs", some=True)):
            with reading.within(f"paragraphs[{i}]"):
                title = reading.text(paragraph, "title")
                sentences = reading.texts(paragraph, "sentences", some=True, may_be_empty=True)
                paragraphs.append(Paragraph(title, sentences))
        question = reading.text(request, "question")
        return MultiHopQuestion(id, question, None, tuple(paragraphs), (), where)


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


# Order and packing -----------------------------------------------------------------------------------


def file_orders(paragraphs: MultiHopParagraphs) -> list[np.ndarray]:
    """Orders paragraphs as the source does, until the input is full; for evaluation.

    Returns the numbers of each question's paragraphs, int64; the last may be cut.
    """
    orders = []
    for i in range(len(paragraphs)):
        first, last = paragraphs.offsets[i : i + 2]
        filled = np.cumsum(paragraphs.tokens.lengths[first:last])
        count = np.searchsorted(filled, paragraphs.room[i]) + 1
        orders.append(np.arange(first, min(first + count, last)))
    return orders


def drawn_orders(paragraphs: MultiHopParagraphs, seed: int, epoch: int) -> list[np.ndarray]:
    """Takes the gold paragraphs and, drawn at random, others until the input is full; for training.

    The last one added, which may be cut, comes last; the order of the rest is drawn too. Each draw depends
    only on seed, epoch (0-based) and the number of the question. Returns what `file_orders` does.
    """
    orders = []
    for i in range(len(paragraphs)):
        # + 1: a final 0 would give the random numbers of (seed, epoch), which order the examples.
        rng = np.random.Generator(np.random.PCG64([seed, epoch, i + 1]))
        first, last = paragraphs.offsets[i : i + 2]
        lengths, gold = paragraphs.tokens.lengths[first:last], paragraphs.gold[first:last]
        chosen, others = np.flatnonzero(gold), rng.permutation(np.flatnonzero(~gold))
        # A paragraph is added if those before it do not fill the input.
        before = lengths[chosen].sum() + np.cumsum(lengths[others]) - lengths[others]
        added = others[before < paragraphs.room[i]]
        drawn = rng.permutation(np.concatenate([chosen, added[:-1]]))
        orders.append(first + np.concatenate([drawn, added[-1:]]))
    return orders


@dataclasses.dataclass(frozen=True, eq=False)
class Packing:
    """The places of paragraphs in inputs; `Examples.layout` of multi-hop questions."""

    paragraphs: MultiHopParagraphs  # of n questions
    orders: Sequence[np.ndarray]  # n int64 arrays, the paragraphs of each input; the last may be cut
    # int32 [sentences, 2] of each input: paragraph and number in it of each sentence of `sentences`
    facts: Ragged


def pack(paragraphs: MultiHopParagraphs, orders: Sequence[np.ndarray], records: Sequence[Any]) -> Examples:
    """Packs the paragraphs of each of n questions into one input, in the order given; the rest is cut.

    Returns:
      n examples with a `Packing` and the targets
        starts, ends: int32 [n, 8], first and last token of each answer; 0, [CLS], without one.
        sentences: int32 [n, 80, 2], first and last token of every sentence that is in the input as a
          whole.
        sentence_labels: int32 [n, 80], 1 supporting, 0 not, -1 withheld.
        kind: int32 [n], see `kind_of`; 0 if it is withheld.
      Positions are inclusive, and -1 for padding.
    """
    answers, sentences, labels, facts, rows, without = [], [], [], [], [], 0
    for i, order in enumerate(orders):
        query, room = paragraphs.queries[i], paragraphs.room[i]
        source, _ = paragraphs.tokens.members(order)
        packed = paragraphs.tokens.values[source[:room]]
        rows.append(((paragraphs.cls, query, paragraphs.sep), (packed, paragraphs.sep)))
        lengths = paragraphs.tokens.lengths[order]
        begin = len(query) + 2 + np.cumsum(lengths) - lengths  # of each paragraph, in the row
        end = len(query) + 2 + min(room, len(source))

        source, owner = paragraphs.spans.members(order)
        spans = paragraphs.spans.values[source] + begin[owner, None]
        spans = spans[spans[:, 1] <= end][:MAX_ANSWERS] - [0, 1]
        if not len(spans):
            first, last = paragraphs.offsets[i : i + 2]
            has_span = paragraphs.spans.offsets[last] > paragraphs.spans.offsets[first]
            without += bool(paragraphs.kinds[i] <= SPAN and has_span)
            spans = np.zeros((1, 2), np.int64)
        answers.append(spans)

        source, owner = paragraphs.sentences.members(order)
        ranges = paragraphs.sentences.values[source] + begin[owner, None]
        kept = np.flatnonzero((ranges[:, 0] < ranges[:, 1]) & (ranges[:, 1] <= end))[:MAX_SENTENCES]
        sentences.append(ranges[kept] - [0, 1])
        labels.append(paragraphs.supporting.values[source[kept]])
        paragraph = order[owner[kept]]
        number = source[kept] - paragraphs.sentences.offsets[paragraph]
        facts.append(np.stack([paragraph, number], axis=1))
    ends = Ragged.of(answers, width=2).padded(MAX_ANSWERS)
    return Examples.of_pairs(
        rows,
        paragraphs.ids,
        counts=dataclasses.replace(paragraphs.counts, num_without_answer=without),
        targets={
            "starts": ends[:, :, 0].copy(),
            "ends": ends[:, :, 1].copy(),
            "sentences": Ragged.of(sentences, width=2).padded(MAX_SENTENCES),
            "sentence_labels": Ragged.of(labels).padded(MAX_SENTENCES),
            "kind": np.maximum(paragraphs.kinds, 0).astype(np.int32),
        },
        digest=digest_of("packed", paragraphs.digest, list(orders)),
        records=records,
        layout=Packing(paragraphs, orders, Ragged.of(facts, width=2)),
    )


# Answers ---------------------------------------------------------------------------------------------


def decode_multi_hop(
    examples: Examples, logits: Mapping[str, np.ndarray], max_answer_length: int = MAX_ANSWER_LENGTH
) -> dict[str, dict[str, Any]]:
    """Chooses an answer and supporting sentences for every question.

    Args:
      examples: from `pack`; raises `ValueError` if they were encoded for training.
      logits: `span` float [n, 2, S]; `kind` float [n, 3], a span, yes, no; `sentence` float [n, 80, 2], the
        second for supporting.
      max_answer_length: word pieces of an answer at most.

    Returns the input of the official scorer: `{"answer": {id: text}, "sp": {id: [[title, number], ...]}}`;
    the answer is "" if the input has no text. Source: docs/question_answering.md, "From logits to answers".
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
            found = best_spans(packing, i, logits["span"][i], max_answer_length)
            answers[id] = found[0]["answer"] if found else ""
        in_input = packing.facts[i]
        chosen = in_input[supporting[i, : len(in_input)]].tolist()
        facts[id] = [[packing.paragraphs.titles[p], number] for p, number in chosen]
    return {"answer": answers, "sp": facts}


def best_spans(
    packing: Packing, i: int, logits: np.ndarray, max_answer_length: int, count: int = 1
) -> list[dict[str, Any]]:
    """Returns the best spans within the text of one paragraph, best first; none if there is no text.

    Titles, markers and pieces that stand for no text end a span. Among equals the one that begins first
    wins, then the shortest. `logits` are those of question i, float [2, S]. An entry has `answer`, `score`
    (a softmax over all spans), the number of the `paragraph` in the question, and the characters `start` and
    `end` of its text.
    """
    paragraphs, order = packing.paragraphs, packing.orders[i]
    chars = np.concatenate([np.zeros((0, 2), np.int32), *(paragraphs.chars[p] for p in order)])
    chars = chars[: paragraphs.room[i]]  # [t, 2]
    owner = np.repeat(order, paragraphs.tokens.lengths[order])
    is_text = chars[:, 0] >= 0
    if not is_text.any():
        return []
    first = len(paragraphs.queries[i]) + 2  # [CLS], question, [SEP]
    starts, ends = logits[:, first : first + len(chars)].astype(np.float64)
    # Spans without a gap have the same number of gaps before their start and their end.
    gaps = np.cumsum(~is_text)
    last = np.arange(len(chars))[:, None] + np.arange(max_answer_length)  # [t, lengths]
    inside = np.minimum(last, len(chars) - 1)
    fits = (last < len(chars)) & is_text[:, None] & is_text[inside] & (gaps[:, None] == gaps[inside])
    scores = np.where(fits, starts[:, None] + ends[inside], -np.inf)
    if count == 1:
        ranking = np.array([np.argmax(scores)])
    else:
        ranking = np.argsort(-scores, axis=None, kind="stable")
    found, total = dict[str, dict[str, Any]](), np.exp(scores - scores.max()).sum()
    for start, length in zip(*np.unravel_index(ranking, scores.shape), strict=True):
        score = scores[start, length]
        if len(found) >= count or score == -np.inf:
            break
        text = paragraphs.texts[owner[start]]
        begin, end = cut_span(text, chars[start, 0], chars[start + length, 1])
        place = {"paragraph": int(owner[start] - paragraphs.offsets[i]), "start": begin, "end": end}
        probability = float(np.exp(score - scores.max()) / total)
        found.setdefault(text[begin:end], {"answer": text[begin:end], "score": probability, **place})
    return list(found.values())

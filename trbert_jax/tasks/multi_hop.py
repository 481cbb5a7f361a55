"""A question over several paragraphs, its answer and the sentences that support it: HotpotQA."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.datasets.records import GraphQuestion
from trbert_jax.tasks import score_hotpotqa as hotpotqa
from trbert_jax.tasks.base import QuestionData, Score, at_tokens, feature_set, padded
from trbert_jax.tasks.examples import Examples
from trbert_jax.tasks.multi_hop_answers import decode_multi_hop
from trbert_jax.tasks.multi_hop_features import (
    MAX_QUESTION_LENGTH,
    MultiHopFeatures,
    build_multi_hop_features,
)
from trbert_jax.tasks.paragraph_selection import PackedQuestions, drawn_orders, file_orders, pack
from trbert_jax.tasks.paragraphs import TokenizedQuestion, paragraph_from_pieces

_SENTENCES, _ANSWERS = 80, 8  # slots of an input, as published


class MultiHopData(QuestionData):
    """Answer, supporting sentences and both together, by the official scorer."""

    task = "multi_hop"
    labels = ()
    request = "multi_hop"
    metric = "f1"
    own_settings = frozenset({"data.skip_bad_records", "model.max_question_length"})

    def texts(self, split: str) -> list[str]:
        found = list[str]()
        for record in self.records(split):
            found.append(record.question)
            found.extend(_paragraph_texts(record))
        return list(dict.fromkeys(found))

    @functools.cache  # noqa: B019 - lives as long as the run
    def questions(self, split: str, tokenizer: Any) -> MultiHopFeatures:
        """The tokenized questions of a split."""
        model, records = self.config.model, self.records(split)
        if any(isinstance(record, GraphQuestion) for record in records):
            records = [_from_graph(record, tokenizer) for record in records]
        return build_multi_hop_features(
            records,
            tokenizer,
            model.max_length,
            model.max_question_length or MAX_QUESTION_LENGTH,
            training=split == "train",
            announce=lambda line: self.announce(f"{split}: {line}"),
        )

    @functools.cache  # noqa: B019
    def packed(self, split: str, tokenizer: Any) -> PackedQuestions:
        """The inputs of a split: one order of paragraphs, which scores and teacher are made for."""
        questions = self.questions(split, tokenizer)
        orders = drawn_orders(questions, self.config.seed, 0) if split == "train" else file_orders(questions)
        packed = pack(questions, orders)
        if packed.num_without_answer:
            self.announce(
                f"{split}: {packed.num_without_answer} of {len(packed)} inputs have no room for the answer"
            )
        return packed

    def features(self, split: str, tokenizer: Any, cache_dir: Path) -> Examples:
        found = self.packed(split, tokenizer)
        self.note_counts(split, self.questions(split, tokenizer).counts)
        self.note(split, num_without_answer=found.num_without_answer)
        return self._feature_set(split, tokenizer, found)

    def redraw(self, tokenizer: Any, epoch: int) -> Examples:
        questions = self.questions("train", tokenizer)
        orders = drawn_orders(questions, self.config.seed, epoch)
        return self._feature_set("train", tokenizer, pack(questions, orders))

    def _feature_set(self, split: str, tokenizer: Any, found: PackedQuestions) -> Examples:
        answers, sentences = found.target_offsets[1:-1], found.sentence_offsets[1:-1]
        first, last = (padded(np.split(found.sentences[:, k], sentences), _SENTENCES) for k in (0, 1))
        labels = np.split(found.sentence_labels.astype(np.int32), sentences)
        targets = {
            "starts": padded(np.split(found.starts, answers), _ANSWERS),
            "ends": padded(np.split(found.ends, answers), _ANSWERS),
            "sentences": np.stack([first, last], axis=-1),
            "sentence_labels": padded(labels, _SENTENCES),
            "kind": np.maximum(found.switch, 0).astype(np.int32),
        }
        questions = self.questions(split, tokenizer)
        return feature_set(
            found.rows, questions.ids, found.digest, questions.counts.num_truncated, targets=targets
        )

    def score(self, split: str, features: Examples, tokenizer: Any, logits: Any) -> Score:
        found = self.packed(split, tokenizer)
        counts = np.diff(found.sentence_offsets)
        there = np.arange(_SENTENCES) < counts[:, None]
        predictions = decode_multi_hop(
            self.questions(split, tokenizer),
            found,
            *at_tokens(features, logits["span"]),
            logits["kind"],
            logits["sentence"][there],
        )
        gold = {
            record.id: {"answer": record.answer, "supporting_facts": [list(f) for f in _facts(record)]}
            for record in self.records(split)
            if record.answer is not None
        }
        metrics = hotpotqa.evaluate(gold, predictions) if gold else {}
        return Score(metrics, {"predictions.json": predictions})


def _paragraph_texts(record: Any) -> list[str]:
    """Titles and contexts of a question's paragraphs, which a vocabulary from scratch is made of."""
    found = list[str]()
    for paragraph in record.paragraphs:
        found.append(paragraph.title.replace("_", " "))
        if not isinstance(record, GraphQuestion):
            found.append("".join(paragraph.sentences))
        elif paragraph.words:
            found.append(" ".join(paragraph.words))
        else:  # a training file has the pieces alone
            found.append(" ".join(paragraph.wordpieces).replace(" ##", ""))
    return found


def _facts(record: Any) -> Sequence[tuple[str, int]]:
    if isinstance(record, GraphQuestion):
        return [
            (paragraph.title, number)
            for paragraph in record.paragraphs
            for number, supports in enumerate(paragraph.supporting or ())
            if supports
        ]
    return tuple(record.supporting)


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

"""Choose one of several candidates that answer a query over documents: WikiHop."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.datasets import reading
from trbert_jax.datasets.records import CandidateQuestion
from trbert_jax.tasks.base import RecordErrors, Score, Task, ranked, register_task, softmax
from trbert_jax.tasks.examples import Counts, Examples, digest_of
from trbert_jax.tasks.losses import NO_CANDIDATE, Rows, masked_mean
from trbert_jax.tasks.scorers import accuracy
from trbert_jax.tasks.text_encoder import TextEncoder

MAX_CANDIDATES = 79  # no question of the data set has more


@register_task
class CandidateTask(Task):
    """Chooses the candidate whose marker has the highest logit, averaged over the segments."""

    name = "candidates"
    metric = "accuracy"
    settings = frozenset({"data.skip_bad_records", "model.max_segments"})
    markers = ("[unused1]", "[unused2]", "[unused3]")
    shortest_request: ClassVar[dict[str, Any]] = {"query": "a", "candidates": ["a"], "supports": ["a"]}
    max_document_length = 1024  # word pieces of all documents together, their markers included

    def texts(self, records: Sequence[CandidateQuestion]) -> list[str]:
        asked = [" ".join((record.query, *record.candidates)) for record in records]
        return asked + [text for record in records for text in record.supports]

    def encode(
        self, records: Sequence[CandidateQuestion], tokenizer: Any, *, training: bool = False, **_: Any
    ) -> Examples:
        """Makes one or more segments of every query; see `Task.encode`.

        A segment is `[CLS] query ([unused1] candidate)* part of the documents [SEP]`; the segments of a
        query do not overlap. The row target `candidates`, int32 [R, 79], has the position of each
        candidate's marker, -1 for padding. A query with more than 79 candidates is unusable.
        """
        encoder = TextEncoder(tokenizer)
        candidate, document = (np.array([encoder.id_of(k)], np.int32) for k in self.markers[:2])
        queries = encoder.encode([q.query for q in records]).tokens
        names = iter(encoder.encode([name for q in records for name in q.candidates]).tokens)
        supports = encoder.encode(
            [text for q in records for text in q.supports], max_tokens=self.max_document_length
        )
        max_segments = self.inputs.max_segments
        rows, counts, truncated, support = [], [0], 0, 0
        positions = np.full((len(records), MAX_CANDIDATES), -1, np.int32)
        errors = RecordErrors(training)
        for i, question in enumerate(records):
            pieces = [next(names) for _ in question.candidates]
            texts = [supports.tokens[support + k] for k in range(len(question.supports))]
            full = int(supports.num_tokens[support : support + len(texts)].sum()) + len(texts)
            support += len(texts)
            head = [encoder.cls, queries[i]]
            room = self.max_length - 1 - sum(map(len, (*head, *pieces))) - len(pieces)
            if len(pieces) > MAX_CANDIDATES:
                reason = f"has {len(pieces)} items; expected at most {MAX_CANDIDATES}"
                errors.add(question, "candidates", reason)
            if not errors.check(question, {"query": len(queries[i])}, room, self.max_length):
                continue
            for k, piece in enumerate(pieces):
                positions[i, k] = sum(map(len, head))
                head += [candidate, piece]
            documents = [part for text in texts for part in (document, text)]
            kept = np.concatenate([encoder.cls[:0], *documents])[
                : min(self.max_document_length, max_segments * room)
            ]
            starts = range(0, max(1, len(kept)), room)
            rows += [(head, (kept[start : start + room], encoder.sep)) for start in starts]
            counts.append(len(starts))
            truncated += len(kept) < full
        errors.raise_if_any()
        settings = (encoder.description, self.max_length, max_segments, self.max_document_length, training)
        return Examples.of_pairs(
            rows,
            [q.id for q in records],
            counts=Counts(len(records), len(rows), truncated),
            labels=np.array([-1 if q.answer is None else q.answer for q in records], np.int32),
            first_row=np.cumsum(counts, dtype=np.int64),
            group=max_segments,
            row_targets={"candidates": np.repeat(positions, counts[1:], axis=0)},
            digest=digest_of("candidate", *settings, list(records)),
            records=records,
        )

    @staticmethod
    def example_logits(logits: jax.Array, rows: Rows) -> jax.Array:
        logits = rows.grouped(jnp.where(rows.get("candidates") >= 0, logits, NO_CANDIDATE))
        if "segment" not in rows.batch:
            return logits.mean(1)
        return masked_mean(jnp.moveaxis(logits, 1, -1), rows.grouped(rows.get("segment"))[:, None])

    def score(self, examples: Examples, logits: Any, null_threshold: float | None = None) -> Score:
        records = examples.records
        logits = np.asarray(logits)
        # Among equals the first candidate wins; columns without a candidate do not count.
        chosen = [int(np.argmax(row[: len(q.candidates)])) for q, row in zip(records, logits, strict=True)]
        known = [(k, q.answer) for q, k in zip(records, chosen, strict=True) if q.answer is not None]
        metrics = {"accuracy": accuracy(*zip(*known, strict=True))} if known else {}
        answers = {q.id: q.candidates[k] for q, k in zip(records, chosen, strict=True)}
        return Score(metrics, {"predictions.json": answers})

    def answers(self, examples: Examples, logits: Any, n_best: int = 0) -> dict[str, dict[str, Any]]:
        found = {}
        for question, row in zip(examples.records, np.asarray(logits), strict=True):
            scores = softmax(row[: len(question.candidates)])
            found[question.id] = ranked(question.candidates, scores, int(scores.argmax()), n_best)
        return found

    def parse_request(self, request: Mapping[str, Any], id: str, where: str) -> CandidateQuestion:
        candidates = reading.texts(request, "candidates", some=True)
        supports = reading.texts(request, "supports", some=True, may_be_empty=True)
        return CandidateQuestion(id, reading.text(request, "query"), candidates, supports, None, where)

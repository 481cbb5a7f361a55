"""What earlier stages found out about the training examples, read by rows as batches need them.

Files are mapped into memory, never read as a whole; what has to be computed of them is computed of the rows
of a batch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from trbert_jax.errors import UserError
from trbert_jax.reduction import residual_scores as residual
from trbert_jax.tasks.batch import is_by_token
from trbert_jax.tasks.examples import Examples
from trbert_jax.training.batches import StageInput
from trbert_jax.training.run import Run

DATA_DIGEST = "data_digest"  # in what a finished stage says of itself: the examples it was about
SCORES, LOGITS = "scores.npy", "logits{}.npy"
_LOGITS_OF = {"multi_hop": ("span", "kind", "sentence")}  # tasks whose logits are several arrays


def load_stage_inputs(run: Run, stage: str, features: Examples, task: str) -> dict[str, StageInput]:
    """What a stage's batches need of earlier stages, in the order of the training examples.

    Raises:
      UserError: an earlier stage's output is missing, damaged or of other data.
    """
    if stage == "policy" and run.config.policy.guide_rate > 0:
        return {"guide": StageInput(residual_scores(run, stage, features), by_row=True, by_token=True)}
    if stage == "init":
        lengths = features.row_targets.get("shared_length", features.row_lengths)
        ranks = RankTargets(residual_scores(run, stage, features), lengths)
        return {"rank": StageInput(ranks, by_row=True, by_token=True)}
    if stage == "joint" and run.config.joint.distill:
        return {"teacher_logits": _teacher_logits(run, stage, features, task)}
    return {}


def residual_scores(run: Run, stage: str, features: Examples) -> Any:
    """Residual scores, to be indexed by rows; of rows that decide together on what they share, their sum."""
    scores = _load(run, run.output_of("score", SCORES, stage), features, features.num_rows)
    return GroupSums(scores, features.group) if "shared_length" in features.row_targets else scores


@dataclasses.dataclass(frozen=True)
class GroupSums:
    """Entries of rows summed over the group that each is in.

    Attributes:
      values: float32 [R, ...].
      group: rows of a group, next to each other.
    """

    values: np.ndarray
    group: int

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Rows int [b] -> [b, ...]."""
        groups, which = np.unique(np.asarray(rows) // self.group, return_inverse=True)
        members = groups[:, None] * self.group + np.arange(self.group)
        sums: np.ndarray = np.asarray(self.values[members]).sum(1)
        return sums[which]


@dataclasses.dataclass(frozen=True)
class RankTargets:
    """Targets of the selectors' initialization, see `residual.rank_targets`.

    Attributes:
      scores: float32 [R, stages, S], or what gives that when indexed by rows.
      lengths: int [R].
    """

    scores: Any
    lengths: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Rows int [b] -> float32 [b, stages, S]."""
        return residual.rank_targets(np.asarray(self.scores[rows]), self.lengths[rows])


def _teacher_logits(run: Run, stage: str, features: Examples, task: str) -> StageInput:
    by_row = task == "span"
    count = features.num_rows if by_row else len(features)
    names = _LOGITS_OF.get(task)
    if names is None:
        values = _load(run, run.output_of("teacher", LOGITS.format(""), stage), features, count)
        return StageInput(values, by_row, by_token=is_by_token(task))
    paths = {name: run.output_of("teacher", LOGITS.format(f"_{name}"), stage) for name in names}
    arrays = {name: _load(run, path, features, count) for name, path in paths.items()}
    return StageInput(arrays, by_row, tuple(name for name in names if is_by_token(task, name)))


def _load(run: Run, path: Path, features: Examples, count: int) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path}: damaged ({error}); delete {path.parent} to run stage {path.parent.name} again"
        ) from error
    # Rows belong together by their place: data in another order would go unnoticed by its number.
    digest = (run.finished(path.parent.name) or {}).get(DATA_DIGEST, features.digest)
    if len(array) != count or digest != features.digest:
        raise UserError(
            f"{path}: has {len(array)} entries, of other training data than the {count} of now; delete "
            f"{path.parent} to run stage {path.parent.name} again, or choose another `workdir`"
        )
    return array

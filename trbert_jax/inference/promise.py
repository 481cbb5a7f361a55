"""Choose the fastest thresholds that keep a promise on new texts, whatever the distribution of the texts.

A promise bounds a mean: the share of answers that differ from the dense model's, or of accuracy that is lost.
Thresholds are tested on texts that had no part in finding them, the slowest first, until one fails. Testing
in a fixed order, each at the full level, keeps the chance of any false promise below that level (Learn then
Test, Angelopoulos et al. 2021, arXiv:2110.01052, fixed sequence testing). The tests assume only that the
texts are drawn alike and independently. Source: docs/method.md, "Promises".
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import stats

from trbert_jax.errors import UserError
from trbert_jax.inference.copies import run_copies
from trbert_jax.inference.engine import InferenceEngine
from trbert_jax.inference.evaluate import summarize
from trbert_jax.inference.frontier import Point, metric_name, metrics_of
from trbert_jax.inference.outputs import Outputs
from trbert_jax.model.model import Params
from trbert_jax.model.operating_points import OperatingPoint, Promise
from trbert_jax.model.packed import DEFAULT_BACKEND
from trbert_jax.reduction.rules import DEFAULT_RULE, RULES
from trbert_jax.reduction.selection import min_logit
from trbert_jax.tasks import Task
from trbert_jax.tasks.examples import Examples

MOST_TEXTS = 10_000_000  # more are not worth asking for


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The promise asked for."""

    kind: str  # disagreement or drop, see `Promise`
    most: float  # as a share
    confidence: float
    data: str  # SHA-256 of the file

    @property
    def name(self) -> str:
        """Name of the operating point: `agrees_99`, or `drops_0.5`, in percent."""
        return (
            f"agrees_{100 - 100 * self.most:g}"
            if self.kind == "disagreement"
            else f"drops_{100 * self.most:g}"
        )


def promised_point(
    engine: InferenceEngine,
    params: Params,
    examples: Examples,
    task: Task,
    dense: Outputs,
    points: Sequence[Point],
    wanted: Wanted,
) -> OperatingPoint:
    """Returns the fastest of the points that keeps a promise.

    `points`, slowest first, were found on other examples; `dense` are the dense model's outputs on these. The
    engine is one of `calibrate.copying`. Raises `UserError` if no point keeps it, with the number of texts
    that would show it.
    """
    limits = np.array([[min_logit(x) for x in point.thresholds] for point in points], np.float32)
    rule, level = RULES[DEFAULT_RULE], 1 - wanted.confidence
    if wanted.kind == "drop" and not (examples.labels >= 0).all():
        raise UserError("a promise on accuracy needs texts that all have labels; promise --max-disagreement")
    outputs = [*run_copies(engine, params, examples, "min_logit", limits, rule, DEFAULT_BACKEND)]
    p_values, shares = [], []
    for output in outputs:
        changes = changed(task, examples, dense, output, wanted.kind)
        shares.append(float(changes.mean()))
        if wanted.kind == "disagreement":
            p_values.append(disagreement_p_value(changes > 0, wanted.most))
        else:
            p_values.append(drop_p_value(changes, wanted.most, level))
    if (kept := last_kept(p_values, level)) is None:
        raise UserError(_unkept(wanted, points[0], shares[0], len(examples)))
    metrics = [metrics_of(task, examples, dense, x) for x in (outputs[kept], dense)]
    metric = metric_name(task, metrics[0])
    numbers = summarize(outputs[kept], engine.model.config, metrics[0])
    return OperatingPoint(
        name=wanted.name,
        thresholds=points[kept].thresholds,
        speedup=numbers["flops_speedup"],
        kept=tuple(numbers["kept"]),
        metric=metric,
        value=metrics[0][metric],
        dense=metrics[1][metric],
        examples=len(examples),
        promise=Promise(found=shares[kept], **dataclasses.asdict(wanted)),
    )


def changed(
    task: Task, examples: Examples, dense: Outputs, reduced: Outputs, kind: str
) -> npt.NDArray[np.integer]:
    """Returns int [n] of two runs: 1 for another answer; in a drop 1 for a lost one, -1 for one gained."""
    if kind == "drop":
        right = [x.logits.argmax(-1) == examples.labels for x in (dense, reduced)]
        return right[0].astype(int) - right[1]
    if not task.inputs.data:
        return (dense.logits.argmax(-1) != reduced.logits.argmax(-1)).astype(int)
    ours, theirs = (task.answers(examples, x.logits) for x in (reduced, dense))
    return np.array([ours[id]["answer"] != theirs[id]["answer"] for id in theirs], int)


def _unkept(wanted: Wanted, slowest: Point, share: float, n: int) -> str:
    what = "of the answers differ" if wanted.kind == "disagreement" else "of the answers are lost"
    found = f"at {slowest.speedup:.2f}x, the slowest, {100 * share:.2g} % of {n} {what}"
    asked = (
        f"no thresholds keep at most {100 * wanted.most:g} % with confidence {100 * wanted.confidence:g} %"
    )
    needed = (
        texts_needed(share, wanted.most, 1 - wanted.confidence) if wanted.kind == "disagreement" else None
    )
    if needed:
        return f"{asked}: {found}; about {2 * needed} texts would show it, half of them to find thresholds"
    return f"{asked}: {found}; ask for less, or give more texts"


def disagreement_p_value(differ: npt.NDArray[np.bool_], most: float) -> float:
    """Tests whether more than a share `most` of answers differ: exact binomial test of bool [n]."""
    return float(stats.binom.cdf(differ.sum(), len(differ), most))


def drop_p_value(lost: npt.NDArray[np.integer], most: float, level: float) -> float:
    """Tests whether more than a share `most` of answers is lost on balance.

    `lost`, int [n], is 1 for an answer that the dense model alone has right, -1 for one that the reduced
    model alone has right, else 0. A bet that the mean is smaller grows, by Ville's inequality, to 1 / p with
    probability p at most if it is not; the stake follows the variance seen so far and is best for this
    `level` (Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting").
    """
    values, bound, n = (lost + 1) / 2, (most + 1) / 2, len(lost)
    count = np.arange(1, n + 1)
    mean = (0.5 + values.cumsum()) / (count + 1)
    variance = (0.25 + ((values - mean) ** 2).cumsum()) / (count + 1)
    before = np.concatenate([[0.25], variance[:-1]])  # a stake may depend on earlier texts alone
    stake = np.minimum(np.sqrt(2 * math.log(1 / level) / (n * before)), 0.9 / (1 - bound))
    wealth = np.log1p(stake * (bound - values)).cumsum()
    return float(min(1.0, math.exp(-wealth.max(initial=0.0))))


def last_kept(p_values: Sequence[float], level: float) -> int | None:
    """Returns the number of the last of the leading p-values up to `level`; None if the first is above."""
    kept = len([*itertools.takewhile(lambda p: p <= level, p_values)])
    return kept - 1 if kept else None


def texts_needed(share: float, most: float, level: float) -> int | None:
    """Returns how many texts show that less than `most` of the answers differ, if `share` of them do.

    None if there is no such number.
    """
    if share >= most:
        return None
    n = math.ceil(math.log(level) / math.log1p(-most))
    while stats.binom.cdf(math.ceil(share * n), n, most) > level:
        n = math.ceil(1.05 * n)
        if n > MOST_TEXTS:
            return None
    return n

"""Find the thresholds with which one model is most accurate at each speed.

    points = find_frontier(engine, params, dev, task, dense)
    results = evaluate_points(engine, params, test, task, points, dense_on_test)

Two cheap passes give the selectors' logits, from which the FLOPs of any thresholds follow without the model;
only thresholds of the speeds asked for are then evaluated.
Source: docs/method.md, "Frontier and operating points".
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trbert_jax.errors import UserError
from trbert_jax.inference.copies import judging_logits, run_copies
from trbert_jax.inference.engine import InferenceEngine
from trbert_jax.inference.evaluate import summarize
from trbert_jax.inference.outputs import Outputs
from trbert_jax.model.model import Params
from trbert_jax.model.operating_points import OperatingPoint
from trbert_jax.model.packed import DEFAULT_BACKEND
from trbert_jax.reduction import flops
from trbert_jax.reduction.rules import DEFAULT_RULE, RULES
from trbert_jax.reduction.selection import min_logit
from trbert_jax.tasks import Task
from trbert_jax.tasks.examples import Examples

logger = logging.getLogger(__name__)

Array = npt.NDArray[Any]

SPEEDUPS = (1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0)  # dense FLOPs over reduced ones; one pass for all
# Of the tokens, to keep at the first of two points; one pass for all.
_SHARES = (0.9, 0.7, 0.5, 0.4, 0.3, 0.22, 0.16, 0.11)
AGREEMENT = "agreement"  # metric of examples without known answers
_LARGEST = 30.0  # largest logit whose probability is below 1 in double precision, by a margin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """Thresholds, and a model's numbers with them on the data they were chosen on."""

    target: float  # the speed-up asked for
    thresholds: tuple[float, ...]  # keep probability of each point of reduction
    speedup: float  # dense FLOPs over reduced ones
    kept: tuple[float, ...]  # mean tokens of a row after each point of reduction
    value: float  # the task's metric, or without answers `AGREEMENT`
    divergence: float | None  # mean KL divergence from the dense model, in nats; None for several outputs
    flips: float | None  # share of answers that differ from the dense model's


def find_frontier(
    engine: InferenceEngine,
    params: Params,
    examples: Examples,
    task: Task,
    dense: Outputs,
    speedups: Sequence[float] = SPEEDUPS,
    backend: str = DEFAULT_BACKEND,
) -> list[Point]:
    """Finds thresholds for speeds, on development data; returns those tried, the best of each speed first.

    Each speed is tried with several divisions of the tokens between the points of reduction. The best one
    has the smallest divergence from `dense`, the dense model's outputs, or without it the best metric.
    Speeds out of reach are left out.
    """
    tried = _candidates(engine, params, examples, sorted(set(speedups)), backend)
    logger.info("frontier: %d thresholds for %d speeds", len(tried), len({target for target, _ in tried}))
    if not tried:
        return []
    values = np.array([logits for _, logits in tried], np.float32)
    points = []
    outputs = run_copies(engine, params, examples, "min_logit", values, RULES[DEFAULT_RULE], backend)
    for (target, logits), output in zip(tried, outputs, strict=True):
        metrics = metrics_of(task, examples, dense, output)
        summary = summarize(output, engine.model.config, metrics)
        divergence, flips = compare(dense, output)
        points.append(
            Point(
                target=target,
                thresholds=tuple(1 / (1 + np.exp(-x)) for x in logits),
                speedup=summary["flops_speedup"],
                kept=tuple(summary["kept"]),
                value=summary[metric_name(task, metrics)],
                divergence=divergence,
                flips=flips,
            )
        )

    def order(point: Point) -> tuple[float, float]:
        return point.target, -point.value if point.divergence is None else point.divergence

    return sorted(points, key=order)


def best(points: Sequence[Point]) -> list[Point]:
    """Returns the best point of each speed, slowest first, from a result of `find_frontier`."""
    return list({point.target: point for point in reversed(points)}.values())[::-1]


def _candidates(
    engine: InferenceEngine, params: Params, examples: Examples, speedups: Sequence[float], backend: str
) -> list[tuple[float, tuple[float, ...]]]:
    """Returns speed-ups and the logits of thresholds that reach them on these examples."""
    shape, lengths = flops.EncoderShape.of(engine.model.config), examples.row_lengths
    stages = len(shape.reduction_layers)
    nothing = np.full((1, stages), np.inf, np.float32)
    first = judging_logits(engine, params, examples, nothing, 0, backend)[0]
    # All tokens that the first point keeps stay: reaches every speed.
    solved = _solve(shape, lengths, first, lambda kept: np.stack([kept] * stages, 1), speedups)
    found = [(speedup, (logit, *[-_LARGEST] * (stages - 1))) for speedup, logit in solved]
    if stages == 1:
        return found
    values = first[np.isfinite(first)]
    firsts = np.unique(np.quantile(values, [1 - share for share in _SHARES]).astype(np.float32))
    logits = np.column_stack([firsts, np.full(len(firsts), np.inf, np.float32)])
    seconds = judging_logits(engine, params, examples, logits, 1, backend)
    for logit, second in zip(firsts, seconds, strict=True):
        counts = functools.partial(_columns, (first >= logit).sum(-1))
        found += [
            (x, (_clipped(logit), last)) for x, last in _solve(shape, lengths, second, counts, speedups)
        ]
    return found


def _columns(first: Array, second: Array) -> Array:
    return np.stack([first, second], 1)


def _solve(
    shape: flops.EncoderShape,
    lengths: Array,
    judged: Array,
    counts: Callable[[Array], Array],
    speedups: Sequence[float],
) -> Iterator[tuple[float, float]]:
    """Yields speed-ups within reach and the logit of one point that comes closest to each.

    `judged`, float32 [R, max_length], are the logits of that point; `counts` turns the tokens that it keeps,
    int [R], into those of all points, int [R, stages].
    """
    values = np.unique(judged[np.isfinite(judged)]).astype(np.float64)
    # Between two logits, so that rounding changes no decision.
    bounds = np.concatenate([values[:1] - 1, (values[1:] + values[:-1]) / 2, values[-1:] + 1])

    def cost(number: int) -> float:
        kept = counts((judged >= bounds[number]).sum(-1))
        return float(flops.reduced_flops(shape, lengths, kept).mean())

    dense, last = float(flops.dense_flops(shape, lengths).mean()), len(bounds) - 1
    slowest, fastest = cost(0), cost(last)
    for speedup in speedups:
        wanted, low, high = dense / speedup, 0, last
        if fastest <= wanted <= slowest:
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if cost(middle) >= wanted else (low, middle)
            nearest = min(low, high, key=lambda number: abs(cost(number) - wanted))
            yield speedup, _clipped(bounds[nearest])


def _clipped(logit: float) -> float:
    return float(np.clip(logit, -_LARGEST, _LARGEST))


def compare(dense: Outputs, outputs: Outputs) -> tuple[float | None, float | None]:
    """Compares two models on the same examples, without their labels.

    Returns the mean Kullback-Leibler divergence of the dense one's distribution from the other, in nats (of
    spans the mean over start and end), and the share whose highest logit differs (of spans, either of them);
    None for a head with several outputs.
    """
    if not isinstance(dense.logits, np.ndarray):
        return None, None
    left, right = dense.logits.astype(np.float64), outputs.logits.astype(np.float64)
    if left.ndim == 3:  # [R, 2, positions]
        real = (np.arange(left.shape[-1]) < dense.lengths[:, None])[:, None]
        left, right = (np.where(real, x, -1e9) for x in (left, right))
    left, right = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (left, right))
    differ = (left.argmax(-1) != right.argmax(-1)).reshape(len(left), -1).any(-1)
    return float((np.exp(left) * (left - right)).sum(-1).mean()), float(differ.mean())


def metrics_of(task: Task, examples: Examples, dense: Outputs, outputs: Outputs) -> dict[str, Any]:
    """Scores a run; without known answers its `AGREEMENT`, the share of answers that are the dense model's.

    Raises `UserError` for examples of several outputs without known answers.
    """
    metrics = dict(task.score(examples, outputs.logits).metrics)
    if task.metric not in metrics:
        flips = compare(dense, outputs)[1]
        if flips is None:
            raise UserError("calibration needs development data with answers; it has none")
        metrics[AGREEMENT] = task.full_score * (1 - flips)
    return metrics


def metric_name(task: Task, metrics: Mapping[str, Any]) -> str:
    """Returns the metric that a result of `metrics_of` has."""
    return task.metric if task.metric in metrics else AGREEMENT


def evaluate_points(
    engine: InferenceEngine,
    params: Params,
    examples: Examples,
    task: Task,
    points: Sequence[Point],
    dense: Outputs,
    baselines: Sequence[str] = (),
    backend: str = DEFAULT_BACKEND,
    seed: int = 0,
    named: Iterable[OperatingPoint] | None = None,
) -> list[dict[str, Any]]:
    """Evaluates thresholds on other data than they were chosen on.

    Returns for each point `target`, `threshold`, the numbers of `summarize`, `divergence` and `flips`; and
    each baseline's metrics at the same kept counts, of all points or those that are `named`.
    """
    if not points:
        return []
    logits = np.array([[min_logit(x) for x in point.thresholds] for point in points], np.float32)
    outputs = [*run_copies(engine, params, examples, "min_logit", logits, RULES[DEFAULT_RULE], backend)]
    kept = np.array([output.num_kept for output in outputs], np.int32)
    if "shared_length" in examples.row_targets:  # a rule decides on shared tokens only
        kept -= (examples.row_lengths - examples.row_targets["shared_length"])[:, None].astype(np.int32)
    thresholds = [point.thresholds for point in (points if named is None else named)]
    is_named = np.array([point.thresholds in thresholds for point in points])
    others = {
        name: run_copies(engine, params, examples, "num_kept", kept[is_named], RULES[name], backend, seed)
        for name in baselines
    }
    results = []
    for point, output in zip(points, outputs, strict=True):
        divergence, flips = compare(dense, output)
        metrics = metrics_of(task, examples, dense, output)
        result = summarize(output, engine.model.config, metrics)
        result |= {"target": point.target, "threshold": [*point.thresholds]}
        result |= {"divergence": divergence, "flips": flips}
        for name, runs in others.items() if point.thresholds in thresholds else ():
            result[name] = metrics_of(task, examples, dense, next(runs))
        del result["examples_per_second"]
        results.append(result)
    return results


def operating_points(
    points: Sequence[Point],
    task: Task,
    metric: str,
    dense: float,
    num_examples: int,
    speedups: Sequence[float],
    points_lost: Sequence[float],
) -> tuple[OperatingPoint, ...]:
    """Names the best points of speeds, and the fastest that lose at most some percentage points.

    `dense` is the dense model's `metric`. Losses are read off a curve that only falls with the speed
    (`falling`): a single lucky point decides nothing. Warns of speeds and losses that no point reaches.
    """
    chosen, named = best(points), dict[str, Point]()
    for speedup in speedups:
        if found := [point for point in chosen if point.target == speedup]:
            named[f"{speedup:g}x"] = found[0]
        else:
            logger.warning("operating point %gx: left out, no thresholds reach this speed-up", speedup)
    curve = falling([point.value for point in chosen])
    for lost in points_lost:
        within = [
            p for p, x in zip(chosen, curve, strict=True) if 100 * (dense - x) / task.full_score <= lost
        ]
        if within:
            named[f"within_{lost:g}"] = within[-1]
        else:
            logger.warning("operating point within_%g: left out, all points lose more", lost)
    numbers: dict[str, Any] = {"metric": metric, "dense": dense, "examples": num_examples}
    shared = ("thresholds", "speedup", "kept", "value")
    return tuple(
        OperatingPoint(name=name, **{key: getattr(point, key) for key in shared}, **numbers)
        for name, point in named.items()
    )


def falling(values: Sequence[float]) -> list[float]:
    """Returns the closest sequence that never rises, in least squares (pool adjacent violators)."""
    pools: list[list[float]] = []
    for value in values:
        pools.append([value])
        while len(pools) > 1 and np.mean(pools[-2]) < np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    return [float(np.mean(pool)) for pool in pools for _ in pool]

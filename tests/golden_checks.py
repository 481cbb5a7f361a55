"""Compares a run with its golden case: fixed tolerances, and slack for values that rounding moves."""

from typing import Any

import numpy as np
from golden_cases import Case, kind_of

from trbert_jax.reduction.selection import LOG_EPSILON


def check(case: Case) -> None:
    """Runs a case and compares every output array; raises `AssertionError` at the first that differs."""
    outputs = kind_of(case)(case)
    slack = conditioning(case, outputs)
    compared = 0
    for name, expected in case.outputs.items():
        assert name in outputs, f"{case.name}: no comparison for the output array {name}"
        compare(name, np.asarray(outputs[name]), expected, slack.get(name, 0.0))
        compared += 1
    assert compared, f"{case.name}: no output array to compare"


def compare(name: str, ours: np.ndarray, expected: np.ndarray, slack: Any = 0.0) -> None:
    """Compares one array.

    Args:
      name: decides the kind of array.
      ours, expected: arrays of one shape.
      slack: added to the absolute tolerance, see `conditioning`.
    """
    assert ours.shape == expected.shape, f"{name}: shape {ours.shape}, expected {expected.shape}"
    if name.startswith("after:"):
        if name.endswith(("key.bias", "k_lin.bias")):  # true gradient 0: Adam amplifies noise
            return
        tolerance: Any = 1e-5
    elif name.startswith(("action_stage", "kept_stage")):
        # A dropped token has no action (nan or 0), and is not kept.
        np.testing.assert_array_equal(ours, np.nan_to_num(expected) > 0, err_msg=name)
        return
    elif name.startswith("grad:"):
        tolerance = 1e-4 * np.abs(expected).max() + 1e-7
    else:
        if name == "kept_ratio":  # nan where the published run skipped a stage
            ours = np.where(np.isnan(expected), np.nan, ours)
        scale = np.maximum(1.0, np.abs(expected))
        if name.startswith("selector_logit_stage"):
            # A logit is a sum of terms as large as the largest logit, each rounded on both sides.
            scale = np.full(scale.shape, np.nanmax(scale))
        tolerance = 1e-5 * scale
    bound = np.broadcast_to(tolerance + slack, expected.shape)
    with np.errstate(invalid="ignore"):
        wrong = ~((np.abs(ours - expected) <= bound) | (np.isnan(ours) & np.isnan(expected)))
    assert not wrong.any(), (
        f"{name}: {wrong.sum()} of {wrong.size} values differ, the first by "
        f"{np.abs(ours - expected)[wrong].flat[0]:.3g} where {bound[wrong].flat[0]:.3g} is allowed"
    )


# The tolerances of `compare` fit well-conditioned values. Three kinds are not, and differ between processors
# by more. Their slack follows from recorded values, never from a measured difference.

ROUNDING = 2.0**-24  # of a float32 between 1/2 and 1, relative to 1
# Roundings that add up, on both sides together: in a keep probability, in a logit (relative to the largest
# one), in a gradient (relative to the layer's largest one).
PROBABILITY_ROUNDINGS, LOGIT_ROUNDINGS, GRADIENT_ROUNDINGS = 4, 16, 32


def conditioning(case: Case, outputs: dict[str, Any]) -> dict[str, Any]:
    """Output name -> absolute slack, a scalar or of the output's shape.

    * The log-probability of a dropped token is log(1 - p + 1e-6). Where p rounds to nearly 1, a rounding of
      p moves it by 6e-8 / (1 - p + 1e-6), and its gradient by the derivative of that.
    * A gradient that is 0 in exact arithmetic, such as a key bias's, is the rounding noise of its layer's
      other gradients. So is what little is left of one that almost cancels.
    * A loss after updates depends on parameters that may each be off by the 1e-5 that `compare` allows them:
      as independent errors, three standard deviations of which are 3e-5 times the gradient's norm.
    """
    slack: dict[str, Any] = {}
    relative = 0.0
    if "selector_nll" in case.outputs:
        nll, relative = _log_probability_slack(case)
        slack["selector_nll"] = nll
        weighted = np.abs(case.outputs["advantage"]).reshape(nll.shape) * nll
        slack |= {name: weighted.mean() for name in ("policy_loss", "total_loss")}
    gradients = {name: np.abs(x).max() for name, x in case.outputs.items() if name.startswith("grad:")}
    for name in gradients:
        layer = max(x for other, x in gradients.items() if _layer(other) == _layer(name))
        slack[name] = layer * (GRADIENT_ROUNDINGS * ROUNDING + relative)
    if "gradient_norms" in outputs:
        before = np.concatenate([[0.0], outputs["gradient_norms"][1:]])  # the first loss: no update yet
        slack["losses"] = 3e-5 * before
    return slack


def _log_probability_slack(case: Case) -> tuple[np.ndarray, float]:
    """Of `selector_nll`, float64 [rows]; and of the policy's gradient, relative to its size."""
    total, size, error = 0.0, 0.0, 0.0
    samples = case.outputs["selector_nll"].size
    weight = np.abs(case.outputs["advantage"]).reshape(samples, 1)
    for stage in range(case.config.num_reductions):
        logits = case.outputs[f"selector_logit_stage{stage}"].astype(np.float64)
        keep = case.outputs[f"kept_stage{stage}"] > 0
        judged = np.isfinite(logits) & (case.decided if case.shares_passage else True)
        logits = np.where(judged, logits, 0.0)
        taken = 1 / (1 + np.exp(np.where(keep, -logits, logits)))  # probability of the action
        floored = taken + LOG_EPSILON
        # The probability of keeping a token is rounded relative to itself, that of dropping it to 1.
        rounding = PROBABILITY_ROUNDINGS * ROUNDING * np.where(keep, taken, 1.0)
        of_logit = LOGIT_ROUNDINGS * ROUNDING * np.abs(logits).max() * (1 - taken)
        per_token = np.where(judged, rounding / floored + of_logit, 0.0)
        count = np.maximum(judged.sum(-1, keepdims=True), 1)
        weight = np.repeat(weight, len(logits) // len(weight), axis=0)  # the same for an example's rows
        total = total + per_token.sum(-1) / count[:, 0]
        slope = np.where(judged, taken * (1 - taken) / floored, 0.0)  # of the log-probability, by the logit
        slope_error = np.where(judged & ~keep, LOG_EPSILON / floored**2 * rounding, 0.0)
        size += float((weight * slope / count).sum())
        error += float((weight * slope_error / count).sum())
    return np.asarray(total).reshape(samples, -1).mean(1), error / max(size, 1e-30)


def _layer(name: str) -> str:
    """`grad:bert.encoder.layer.3.attention.self.key.bias` -> `grad:bert.encoder.layer.3`."""
    parts = name.split(".")
    if "layer" in parts:
        return ".".join(parts[: parts.index("layer") + 2])
    return ".".join(parts[:-2])

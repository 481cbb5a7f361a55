"""List the reduction rules by name. To add one, register one `RuleSpec`.

Free of JAX until a rule is built, because the settings and the command line are made from this table.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from trbert_jax.errors import UserError

if TYPE_CHECKING:
    from trbert_jax.reduction.selection import Rule

Inputs = Mapping[str, Any]  # arrays, one entry per row
Threshold = float | Sequence[float]  # a keep probability for all points of reduction, or one for each
Use = Literal["evaluate", "baseline", "given", "train"]

DEFAULT_RULE = "threshold"
DEFAULT_THRESHOLD = 0.5  # the published rule


@dataclasses.dataclass(frozen=True)
class RuleSpec:
    """A reduction rule. Arrays have R rows, copies included."""

    name: str  # key of `RULES`
    description: str  # one line, for help texts and documentation
    # Makes the rule from the entries of `inputs`; returns None to run the dense encoder. May be called inside
    # a compiled function.
    build: Callable[[Inputs], Rule | None]
    # Or `baseline` (selects without having learned anything), `given` (by scores of the caller), or `train`.
    use: Use = "evaluate"
    # The entries that `build` reads:
    #   `min_logit` float32 [R, stages], the lowest selector logits that keep a token (`selection.min_logit`);
    #   `num_kept` int32 [R, stages], tokens each row keeps;
    #   `row_keys` PRNG keys [R], one per row (`tasks.losses.Rows.keys`);
    #   `guide` float32 [R, stages, S], residual scores, or those of the caller;
    #   `imitating` bool [R], the rows that follow the guide.
    inputs: tuple[str, ...] = ()
    exact: bool = True  # whether a row's selection is independent of the other rows of its batch
    drops: bool = True  # whether the rule asks the selectors at all; False for the dense encoder
    judges: bool = False  # whether a pass gives the logits by which tokens are kept, in place of the decision

    @property
    def has_threshold(self) -> bool:
        """Whether a keep probability other than one half can be asked for."""
        return "min_logit" in self.inputs


RULES: dict[str, RuleSpec] = {}


def register_rule(spec: RuleSpec) -> RuleSpec:
    """Adds a rule to `RULES`; raises `ValueError` if its name is taken."""
    if spec.name in RULES:
        raise ValueError(f"rule {spec.name!r} is registered already")
    RULES[spec.name] = spec
    return spec


def rule_names(use: Use = "evaluate") -> tuple[str, ...]:
    """Names of the rules with this use, the default first."""
    return tuple(name for name, spec in RULES.items() if spec.use == use)


def point_thresholds(
    threshold: Any, num_points: int | None = None, name: str = "threshold"
) -> tuple[float, ...]:
    """Returns one threshold for each of `num_points` points of reduction; None: as many as are given.

    Raises `UserError`, which begins with `name`, for anything but a probability above 0 and below 1 for all
    points, or one for each.
    """
    given = threshold.tolist() if hasattr(threshold, "tolist") else threshold  # of NumPy
    values = tuple(given) if isinstance(given, list | tuple) else (given,)
    if not values or not all(isinstance(x, numbers.Real) and 0 < float(x) < 1 for x in values):
        expected = "a probability above 0 and below 1, or a list of one for each point of reduction"
        raise UserError(f"{name} is {threshold!r}; expected {expected}")
    if num_points is not None and len(values) not in (1, num_points):
        expected = "1 threshold" if num_points == 1 else f"1 or {num_points} thresholds"
        raise UserError(f"{name} is {threshold!r}; expected {expected}, for as many points of reduction")
    return tuple(map(float, values * (num_points or 1) if len(values) == 1 else values))


def threshold_name(threshold: Threshold) -> str:
    """Returns thresholds as results name them: `0.5`, or `0.5,0.7`."""
    return ",".join(map(str, point_thresholds(threshold)))


def check_rule(name: str, threshold: Any = DEFAULT_THRESHOLD, num_points: int | None = None) -> None:
    """Raises UserError for an unknown rule of evaluation, or thresholds that it or the model cannot have."""
    if name not in rule_names():
        raise UserError(f"rule is {name!r}; expected one of {', '.join(rule_names())}")
    values = point_thresholds(threshold, num_points)
    if not RULES[name].has_threshold and set(values) != {DEFAULT_THRESHOLD}:
        raise UserError(f"threshold is {threshold!r}, but rule {name} has none; use rule {DEFAULT_RULE}")


def _selection() -> Any:
    from trbert_jax.reduction import selection

    return selection


for _spec in (
    RuleSpec(
        "threshold",
        "keep each token whose keep probability reaches the threshold",
        lambda inputs: _selection().keep_above(inputs["min_logit"]),
        inputs=("min_logit",),
    ),
    RuleSpec(
        "batch_max",
        "as published: fill each row up to the row of the batch that keeps most",
        lambda inputs: _selection().keep_batch_max,
        exact=False,
    ),
    RuleSpec("dense", "keep all tokens; do not run the selectors", lambda inputs: None, drops=False),
    RuleSpec(
        "random",
        "keep [CLS] and random other tokens",
        lambda inputs: _selection().keep_random(inputs["num_kept"].T, inputs["row_keys"]),
        use="baseline",
        inputs=("num_kept", "row_keys"),
    ),
    RuleSpec(
        "first_k",
        "keep the first tokens",
        lambda inputs: _selection().keep_first(inputs["num_kept"].T),
        use="baseline",
        inputs=("num_kept",),
    ),
    RuleSpec(
        "scores",
        "keep the tokens with the highest given scores",
        lambda inputs: _selection().keep_scored(inputs["num_kept"].T, inputs["guide"]),
        use="given",
        inputs=("num_kept", "guide"),
    ),
    RuleSpec(
        "sample",
        "draw each token's action from its keep probability",
        lambda inputs: _selection().sample(inputs["row_keys"]),
        use="train",
        inputs=("row_keys",),
    ),
    RuleSpec(
        "imitate",
        "keep the tokens with the highest residual scores in some rows, sample in the others",
        lambda inputs: _selection().imitate(
            inputs["guide"], inputs["imitating"], _selection().sample(inputs["row_keys"])
        ),
        use="train",
        inputs=("row_keys", "guide", "imitating"),
    ),
):
    register_rule(_spec)

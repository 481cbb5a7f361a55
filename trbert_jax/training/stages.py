"""The stages of a run: what each one reads, minimizes and writes.

`finetune -> score -> [init] -> policy -> teacher -> joint`; evaluation is in `evaluation`.
Source: docs/method.md, "Training stages".
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.config import InitConfig, JointConfig, PolicyConfig, RunConfig, TrainingConfig
from trbert_jax.errors import UserError
from trbert_jax.model.model import Batch, Params, TokenReducingModel, forward
from trbert_jax.model.packed import packed_forward
from trbert_jax.model.pretrained import Pretrained, save_pretrained
from trbert_jax.parallel import ROWS
from trbert_jax.reduction import residual_scores as residual
from trbert_jax.tasks.examples import Examples, batch_rows, length_batches, pad_batch, width_buckets
from trbert_jax.training import dry_run as plan
from trbert_jax.training import loop, objectives
from trbert_jax.training import step as optimizer
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.logging import StageReport
from trbert_jax.training.loop import Training
from trbert_jax.training.preemption import stop_here
from trbert_jax.training.stage_inputs import (
    DATA_DIGEST,
    LOGITS,
    SCORES,
    ResumableArrays,
    check_finite,
    load_stage_inputs,
    params_digest,
)
from trbert_jax.training.step import ObjectiveFn

FORWARD: dict[str, objectives.Execute] = {"packed": packed_forward, "masked": forward}
LOSSES = "losses.npy"  # of the examples that are scored; for their mean only


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A training stage before its first update: where it starts from and how it trains."""

    start: Pretrained
    training: Training


def prepare(run: Experiment, stage: str) -> Prepared:
    """Gathers what a training stage needs.

    Raises:
      UserError: an earlier stage's output is missing; names the stage to run. Or the model does not fit the
        settings, those of later stages too.
    """
    start = run.base_model() if stage == "finetune" else run.load(_predecessor(run, stage), stage)
    shares, points = run.config.init.keep, start.config.num_reductions
    if shares is not None and len(shares) != points:
        raise UserError(
            f"init.keep: {list(shares)} are {len(shares)} shares, expected {points}: one for each point of "
            "reduction of this model"
        )
    features = run.features("train", start)
    module = run.module(start.config)
    config: TrainingConfig = getattr(run.config, stage)
    extras = load_stage_inputs(run, stage, features, start.config.task)
    training = Training(
        name=stage,
        directory=run.directory(stage),
        config=config,
        model_config=start.config,
        seed=run.config.seed,
        features=features,
        extras=extras,
        make_objective=lambda total_steps: _OBJECTIVES[stage](run, module, total_steps),
        trains=_TRAINS[stage](start.config),
        evaluate=_dev_evaluation(run, stage, start),
        metric=run.data.task.metric,
        fingerprint=run.fingerprint(stage, features),
        # Scores and teacher are of the inputs of epoch 0.
        redraw=None if extras else run.redraw(start),
        layout=run.layout,
        profile_steps=run.profile_steps,
        flops=functools.partial(plan.stage_flops, run.config, stage, start.config),
    )
    return Prepared(start, training)


def train_stage(run: Experiment, stage: str) -> dict[str, Any]:
    """Runs a training stage and writes its model; returns what to remember of it."""
    prepared = run.layout.together(lambda: prepare(run, stage))
    what = f"what stage {stage} trains on (settings, data)"
    run.layout.check_agreement(what, prepared.training.fingerprint)
    run.check_inputs(stage, prepared.start, ("dev",))
    params, summary = loop.run(prepared.training, prepared.start.params, run.announce)
    run.layout.on_main(
        functools.partial(
            save_pretrained,
            run.directory(stage) / "model",
            prepared.start.config,
            jax.device_get(params),
            prepared.start.tokenizer,
            exclude=("selectors",) if stage == "finetune" else (),
        )
    )
    return summary


def score_stage(run: Experiment) -> dict[str, Any]:
    """Residual scores of all training tokens: `scores.npy`, float32 [rows, stages, max_length]."""
    model = run.load("finetune", "score")
    run.check_inputs("score", model, ("train",))
    features, module = run.features("train", model), run.module(model.config)
    layout, width_limit = run.layout, model.config.max_length
    size = layout.rounded(run.config.score.batch_size)
    batches = list(length_batches(features, size, width_buckets(width_limit)))

    def scores_and_losses(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        values, _, loss = residual.residual_scores(module, params, batch)
        return values, loss

    mapped = layout.by_rows(scores_and_losses, out_specs=ROWS)
    score = jax.jit(mapped) if layout.is_single else jax.jit(mapped, out_shardings=layout.whole)
    params = layout.replicate(model.params)

    shape = (features.num_rows, model.config.num_selectors, width_limit)
    fingerprint = {**run.fingerprint("score", features), "of": params_digest(model.params), "batch": size}
    with (
        _report(run, "score", len(batches)) as report,
        ResumableArrays(run.directory("score"), fingerprint, len(batches), layout) as files,
    ):
        _say_start(run, "score", files.start, len(batches))
        scores, losses = files.array(SCORES, shape), files.array(LOSSES, (len(features),))
        for step, (index, width) in enumerate(batches[files.start :], files.start + 1):
            found = score(params, layout.place_rows(pad_batch(features, index, size, width)))
            values, loss = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), found)
            rows = batch_rows(features, index, size)
            check_finite("score", features, index, size, {"loss": loss, "score": values})
            scores[rows[rows >= 0], :, :width] = values[rows >= 0]
            losses[index] = loss[: len(index)]
            report.progress(step, len(index))
            files.progress(step)
            stop_here(layout, "in score")
        if not layout.is_main:  # it has kept nothing
            return {}
        files.finish(SCORES)
        result = {"loss": float(np.asarray(losses).mean(dtype=np.float64))}
        report.log(len(batches), result)
    return {**result, DATA_DIGEST: features.digest}


def teacher_stage(run: Experiment) -> dict[str, Any]:
    """Logits of the fine-tuned model on the training examples: `logits.npy`, shaped as `Outputs.logits`.

    Where there are several arrays, `logits_NAME.npy` each.
    """
    model = run.load("finetune", "teacher")
    run.check_inputs("teacher", model, ("train",))
    features = run.features("train", model)

    def after_batch(features: Examples, index: np.ndarray, logits: Any) -> None:
        check_finite("teacher", features, index, runner.batch_size, {"a logit": logits})

    runner = run.runner(model.config, run.config.teacher.batch_size, after_batch)
    steps = runner.num_batches(features)
    fingerprint = {
        **run.fingerprint("teacher", features),
        "of": params_digest(model.params),
        "batch": runner.batch_size,
    }
    with (
        _report(run, "teacher", steps) as report,
        ResumableArrays(run.directory("teacher"), fingerprint, steps, run.layout) as files,
    ):
        _say_start(run, "teacher", files.start, steps)
        names: list[str] = []

        def allocate(name: str, shape: tuple[int, ...]) -> np.ndarray:
            names.append(LOGITS.format(f"_{name}" if name else ""))
            array: np.ndarray = files.array(names[-1], shape)
            return array

        def progress(step: int, num_examples: int) -> None:
            report.progress(step, num_examples)
            files.progress(step)
            stop_here(run.layout, "in teacher")

        outputs = runner.run(
            model.params, features, rule="dense", progress=progress, allocate=allocate, start=files.start
        )
        if not run.layout.is_main:  # it has kept nothing
            return {}
        files.finish(*names)
        metrics = {"accuracy": outputs.accuracy} if features.has_labels else {}
        report.log(steps, metrics)
    return {**metrics, DATA_DIGEST: features.digest}


def _say_start(run: Experiment, stage: str, start: int, total: int) -> None:
    if start:
        run.announce(f"{stage}: going on from batch {start} of {total}")


def _report(run: Experiment, stage: str, total_steps: int) -> StageReport:
    return StageReport(run.directory(stage), stage, total_steps, silent=not run.layout.is_main)


# Parts of a training stage --------------------------------------------------------------------------


def _predecessor(run: Experiment, stage: str) -> str:
    """The stage whose model a training stage starts from."""
    if stage == "joint":
        return "policy"
    return "init" if stage == "policy" and "init" in run.config.stages else "finetune"


def _finetune_objective(run: Experiment, module: TokenReducingModel, total_steps: int) -> ObjectiveFn:
    config = run.config.finetune

    def objective(params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> objectives.Objective:
        batch = _with_padding(config, module, batch)
        return objectives.dense_objective(
            module,
            params,
            batch,
            dropout_rng=_dropout_rng(config, rng, batch),
            execute=FORWARD[config.backend],
        )

    return objective


def _init_objective(run: Experiment, module: TokenReducingModel, total_steps: int) -> ObjectiveFn:
    config: InitConfig = run.config.init

    def objective(params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> objectives.Objective:
        batch = _with_padding(config, module, batch)
        return objectives.initialization_objective(
            module,
            params,
            batch,
            per_length_scale=config.per_length_scale,
            keep=config.keep,
            dropout_rng=_dropout_rng(config, rng, batch),
            execute=FORWARD[config.backend],
        )

    return objective


def _policy_objective(run: Experiment, module: TokenReducingModel, total_steps: int) -> ObjectiveFn:
    config: PolicyConfig = run.config.policy
    guided_steps = math.ceil(config.guide_rate * total_steps)

    def objective(params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> objectives.Objective:
        batch = _with_padding(config, module, batch)
        imitating = step < guided_steps if "guide" in batch else False
        samples = objectives.sample_policy(
            module,
            params,
            batch,
            rule=objectives.sampling_rule(rng, batch, config.num_samples, imitating),
            num_samples=config.num_samples,
            alpha=config.alpha,
            max_length=module.config.max_length,
            dropout_rng=_dropout_rng(config, rng, batch),
            execute=FORWARD[config.backend],
        )
        return objectives.policy_objective(batch, samples)

    return objective


def _joint_objective(run: Experiment, module: TokenReducingModel, total_steps: int) -> ObjectiveFn:
    config: JointConfig = run.config.joint
    num_samples = config.num_samples or run.config.policy.num_samples

    def objective(params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> objectives.Objective:
        batch = _with_padding(config, module, batch)
        samples = objectives.sample_policy(
            module,
            params,
            batch,
            rule=objectives.sampling_rule(rng, batch, num_samples, imitating=False),
            num_samples=num_samples,
            alpha=config.alpha,
            max_length=module.config.max_length,
            temperature=config.temperature,
            dropout_rng=_dropout_rng(config, rng, batch),
            execute=FORWARD[config.backend],
        )
        return objectives.joint_objective(batch, samples)

    return objective


_OBJECTIVES: dict[str, Callable[[Experiment, TokenReducingModel, int], ObjectiveFn]] = {
    "finetune": _finetune_objective,
    "init": _init_objective,
    "policy": _policy_objective,
    "joint": _joint_objective,
}
_TRAINS = {
    "finetune": optimizer.trains_dense,
    "init": optimizer.trains_selectors,
    "policy": optimizer.trains_selectors,
    "joint": optimizer.trains_all,
}


def _with_padding(config: TrainingConfig, module: TokenReducingModel, batch: Batch) -> Batch:
    """The batch with padding as the published code treats it, where the stage asks for that."""
    if not (config.published_padding and module.config.reads_all_tokens):
        return batch
    return {**batch, "head_mask": jnp.ones_like(batch["mask"])}


def _dropout_rng(config: TrainingConfig, rng: jax.Array, batch: Batch) -> jax.Array | None:
    """A key for dropout where the stage has it on; micro-batches of one update differ by their examples.

    Of the `rbg` kind: the masks of a step are as many random numbers as its attention weights, and
    the default generator would take half of a step's time on a CPU.
    """
    if not config.dropout:
        return None
    key = jax.random.fold_in(jax.random.fold_in(rng, 1), batch["index"][0])
    data = jax.random.key_data(key)
    return jax.random.wrap_key_data(jnp.concatenate([data, data]), impl="rbg")


def rule_and_backend(config: RunConfig, stage: str) -> dict[str, Any]:
    """Returns how a stage's model is evaluated: the dense stage without reduction."""
    if stage == "finetune":
        return {"rule": "dense"}
    return {"rule": config.evaluate.rule, "backend": config.evaluate.backend}


def _dev_evaluation(run: Experiment, stage: str, start: Pretrained) -> Callable[[Params], dict[str, float]]:
    """Evaluates parameters on the development set, the dense stage without reduction."""
    how = rule_and_backend(run.config, stage)
    features = run.features("dev", start)
    runner = run.runner(start.config, run.config.evaluate.batch_size)

    def evaluate(params: Params) -> dict[str, float]:
        outputs = runner.run(params, features, **how)
        kept = {f"kept_tokens_{stage}": float(x) for stage, x in enumerate(outputs.num_kept.mean(0))}
        return {**run.score("dev", start, outputs).metrics, **kept}

    return evaluate

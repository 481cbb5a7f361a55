"""The stages of a run: what each one reads, minimises and writes.

`finetune -> score -> [init] -> policy -> teacher -> joint`; evaluation is in `pipeline`.
Source: docs/method.md, "Training stages".
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trbert_jax.config import InitConfig, JointConfig, PolicyConfig, TrainingConfig
from trbert_jax.data.batching import batch_rows, length_batches, pad_batch, width_ladder
from trbert_jax.data.features import FeatureSet
from trbert_jax.errors import UserError
from trbert_jax.files import atomic_file
from trbert_jax.modeling.model import Batch, Params, TokenReducingModel, forward
from trbert_jax.modeling.packed import packed_forward
from trbert_jax.modeling.pretrained import Pretrained, save_pretrained
from trbert_jax.modeling.tasks import is_by_token
from trbert_jax.parallel import ROWS
from trbert_jax.training import loop, objectives, optimizer, plan, residual
from trbert_jax.training.batches import Extra, Training
from trbert_jax.training.report import StageReport
from trbert_jax.training.run import Run
from trbert_jax.training.steps import ObjectiveFn

FORWARD: dict[str, objectives.Execute] = {"packed": packed_forward, "masked": forward}
SCORES, LOGITS = "scores.npy", "logits{}.npy"
_LOGITS_OF = {"multi_hop": ("span", "kind", "sentence")}  # tasks whose logits are several arrays


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A training stage before its first update: where it starts from and how it trains."""

    start: Pretrained
    training: Training


def prepare(run: Run, stage: str) -> Prepared:
    """Gathers what a training stage needs.

    Raises:
      UserError: an earlier stage's output is missing; names the stage to run.
    """
    start = run.base_model() if stage == "finetune" else run.load(_predecessor(run, stage), stage)
    features = run.features("train", start)
    module = run.module(start.config)
    config: TrainingConfig = getattr(run.config, stage)
    extras = _extras(run, stage, features, start.config.task)
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
        metric=run.data.metric,
        fingerprint=run.fingerprint(stage, features),
        # Scores and teacher are of the inputs of epoch 0.
        redraw=None if extras else run.redraw(start),
        layout=run.layout,
        profile_steps=run.profile_steps,
        flops=functools.partial(plan.stage_flops, run.config, stage, start.config),
    )
    return Prepared(start, training)


def train_stage(run: Run, stage: str) -> dict[str, Any]:
    """Runs a training stage and writes its model; returns what to remember of it."""
    prepared = prepare(run, stage)
    _check_divides(run, stage, prepared.training)
    params, summary = loop.run(prepared.training, prepared.start.params, run.announce)
    if run.layout.is_main:
        save_pretrained(
            run.directory(stage) / "model",
            prepared.start.config,
            jax.device_get(params),
            prepared.start.tokenizer,
            leave_out=("selectors",) if stage == "finetune" else (),
        )
    return summary


def _check_divides(run: Run, stage: str, training: Training) -> None:
    """Before any training: the devices must share a batch evenly, and all hosts train on the same data."""
    size, devices = training.config.batch_size, run.layout.num_devices
    if size % devices:
        raise UserError(
            f"{stage}.batch_size is {size}, which {devices} devices cannot share evenly; "
            f"set it to a multiple of {devices} (and {stage}.accumulation_steps so that their product stays)"
        )
    run.layout.check_agreement(f"what stage {stage} trains on (settings, data)", training.fingerprint)


def score_stage(run: Run) -> dict[str, Any]:
    """Residual scores of all training tokens: `scores.npy`, float32 [rows, stages, max_length]."""
    model = run.load("finetune", "score")
    features, module = run.features("train", model), run.module(model.config)
    layout, width_limit = run.layout, model.config.max_length
    size = layout.rounded(run.config.score.batch_size)
    batches = list(length_batches(features, size, width_ladder(width_limit)))

    def scores_and_losses(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        values, _, loss = residual.residual_scores(module, params, batch)
        return values, loss

    mapped = layout.by_rows(scores_and_losses, out_specs=ROWS)
    score = jax.jit(mapped) if layout.is_single else jax.jit(mapped, out_shardings=layout.whole)
    params = layout.replicate(model.params)

    shape = (features.num_rows, model.config.num_selectors, width_limit)
    losses = np.zeros(len(features))
    with contextlib.ExitStack() as stack:
        report = stack.enter_context(_report(run, "score", len(batches)))
        scores = None
        if layout.is_main:
            stream = stack.enter_context(atomic_file(run.directory("score") / SCORES, "wb"))
            scores = _create_npy(Path(stream.name), shape)
        for step, (index, width) in enumerate(batches, 1):
            found = score(params, layout.place_rows(pad_batch(features, index, size, width)))
            values, loss = jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), found)
            rows = batch_rows(features, index, size)
            if scores is not None:
                scores[rows[rows >= 0], :, :width] = values[rows >= 0]
            losses[index] = loss[: len(index)]
            report.progress(step, len(index))
        if scores is not None:
            scores.flush()
        report.log(len(batches), {"loss": float(losses.mean())})
    return {"loss": float(losses.mean())}


def teacher_stage(run: Run) -> dict[str, Any]:
    """Logits of the fine-tuned model on the training examples: `logits.npy`, shaped as `Outputs.logits`.

    Where there are several arrays, `logits_NAME.npy` each.
    """
    model = run.load("finetune", "teacher")
    features = run.features("train", model)
    runner = run.runner(model.config, run.config.teacher.batch_size)
    steps = runner.num_batches(features)
    with contextlib.ExitStack() as stack:
        report = stack.enter_context(_report(run, "teacher", steps))

        def allocate(name: str, shape: tuple[int, ...]) -> np.ndarray:
            if not run.layout.is_main:  # one process writes; the others' numbers are the same
                return np.zeros(shape, np.float32)
            path = run.directory("teacher") / LOGITS.format(f"_{name}" if name else "")
            stream = stack.enter_context(atomic_file(path, "wb"))
            return _create_npy(Path(stream.name), shape)

        outputs = runner.run(model.params, features, "dense", report.progress, allocate=allocate)
        metrics = {"accuracy": outputs.accuracy} if features.has_labels else {}
        report.log(steps, metrics)
        for array in jax.tree.leaves(outputs.logits):
            if isinstance(array, np.memmap):
                array.flush()
    return metrics


def _report(run: Run, stage: str, total_steps: int) -> StageReport:
    return StageReport(run.directory(stage), stage, total_steps, silent=not run.layout.is_main)


# Parts of a training stage --------------------------------------------------------------------------


def _predecessor(run: Run, stage: str) -> str:
    """The stage whose model a training stage starts from."""
    if stage == "joint":
        return "policy"
    return "init" if stage == "policy" and "init" in run.config.stages else "finetune"


def _extras(run: Run, stage: str, features: FeatureSet, task: str) -> dict[str, Extra]:
    """What a stage's batches need of earlier stages, in the order of the training examples."""
    if stage == "policy" and run.config.policy.guide_rate > 0:
        scores = _scores(run, stage, features)
        return {"guide": Extra(scores, by_row=True, by_token=True)}
    if stage == "init":
        lengths = features.row_targets.get("shared_length", features.row_lengths)
        ranks = residual.rank_targets(_scores(run, stage, features), lengths)
        return {"rank": Extra(ranks, by_row=True, by_token=True)}
    if stage == "joint" and run.config.joint.distill:
        return {"teacher_logits": _teacher_logits(run, stage, features, task)}
    return {}


def _scores(run: Run, stage: str, features: FeatureSet) -> np.ndarray:
    """Residual scores of all rows; rows that decide together on what they share have the sum of theirs."""
    scores = _load(run.output_of("score", SCORES, stage), features.num_rows)
    if "shared_length" not in features.row_targets:
        return scores
    groups = scores.reshape(-1, features.group, *scores.shape[1:])
    return np.repeat(groups.sum(1), features.group, axis=0)


def _teacher_logits(run: Run, stage: str, features: FeatureSet, task: str) -> Extra:
    by_row = task == "span"
    count = features.num_rows if by_row else len(features)
    names = _LOGITS_OF.get(task)
    if names is None:
        values = _load(run.output_of("teacher", LOGITS.format(""), stage), count)
        return Extra(values, by_row, by_token=is_by_token(task))
    files = {name: LOGITS.format(f"_{name}") for name in names}
    arrays = {name: _load(run.output_of("teacher", file, stage), count) for name, file in files.items()}
    return Extra(arrays, by_row, tuple(name for name in names if is_by_token(task, name)))


def _finetune_objective(run: Run, module: TokenReducingModel, total_steps: int) -> ObjectiveFn:
    config = run.config.finetune

    def objective(params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> objectives.Objective:
        batch = _with_padding(config, module, batch)
        return objectives.dense_objective(
            module,
            params,
            batch,
            dropout_rng=_dropout_rng(config, rng, batch),
            execute=FORWARD[config.execution],
        )

    return objective


def _init_objective(run: Run, module: TokenReducingModel, total_steps: int) -> ObjectiveFn:
    config: InitConfig = run.config.init

    def objective(params: Params, batch: Batch, rng: jax.Array, step: jax.Array) -> objectives.Objective:
        batch = _with_padding(config, module, batch)
        return objectives.initialization_objective(
            module,
            params,
            batch,
            per_length_scale=config.per_length_scale,
            dropout_rng=_dropout_rng(config, rng, batch),
            execute=FORWARD[config.execution],
        )

    return objective


def _policy_objective(run: Run, module: TokenReducingModel, total_steps: int) -> ObjectiveFn:
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
            execute=FORWARD[config.execution],
        )
        return objectives.policy_objective(batch, samples)

    return objective


def _joint_objective(run: Run, module: TokenReducingModel, total_steps: int) -> ObjectiveFn:
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
            execute=FORWARD[config.execution],
        )
        return objectives.joint_objective(batch, samples)

    return objective


_OBJECTIVES: dict[str, Callable[[Run, TokenReducingModel, int], ObjectiveFn]] = {
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


def _dev_evaluation(run: Run, stage: str, start: Pretrained) -> Callable[[Params], dict[str, float]]:
    """Evaluates parameters on the development set, the dense stage without reduction."""
    execution = "dense" if stage == "finetune" else run.config.evaluate.execution
    features = run.features("dev", start)
    runner = run.runner(start.config, run.config.evaluate.batch_size)

    def evaluate(params: Params) -> dict[str, float]:
        outputs = runner.run(params, features, execution)
        kept = {f"kept_tokens_{stage}": float(x) for stage, x in enumerate(outputs.num_kept.mean(0))}
        return {**run.score("dev", start, outputs).metrics, **kept}

    return evaluate


def _load(path: Path, count: int) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path}: damaged ({error}); delete {path.parent} to run stage {path.parent.name} again"
        ) from error
    if len(array) != count:
        raise UserError(
            f"{path}: has {len(array)} entries, the training data {count}; the data has changed since it "
            "was written, choose another `workdir`"
        )
    return array


def _create_npy(path: Path, shape: tuple[int, ...]) -> np.memmap:
    """A zeroed float32 .npy file as an array on disk: scores of a large data set do not fit in memory."""
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)

"""Golden cases: outputs of the published models, and how this project reproduces each kind.

A case is a folder with `case.json` (configuration and note), `weights.safetensors` (original
names) and `arrays.npz` (inputs and outputs). `golden_checks.check` runs ours and compares every output array.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trbert_jax.model.config import ModelConfig, model_config_from_dict
from trbert_jax.model.encoder import Encoder
from trbert_jax.model.model import TokenReducingModel, forward, head_inputs, init_params
from trbert_jax.model.packed import packed_forward
from trbert_jax.model.tiles import Tiling
from trbert_jax.model.weight_files import read_weights
from trbert_jax.model.weights import from_original_names, to_original_names
from trbert_jax.reduction import policy_loss as policy
from trbert_jax.reduction import residual_scores as residual
from trbert_jax.reduction import selection as tokens
from trbert_jax.tasks import TASKS as LOSSES
from trbert_jax.tasks.losses import Rows
from trbert_jax.training import objectives
from trbert_jax.training import step as optimizer

DIRECTORY = Path(os.environ.get("TRBERT_GOLDEN_DIR") or Path(__file__).parent / "golden")
# fmt: off
INPUTS = {
    "input_ids", "attention_mask", "token_type_ids", "labels", "guide", "rank", "teacher_logits",
    "start_positions", "end_positions", "question_ends", "cand_positions", "answer_index", "instance_mask",
    "sent_start_mapping", "sent_end_mapping", "sent_labels", "switch_labels", "teacher_switch_logits",
    "teacher_sent_logits",
}
# Keys of a case besides its configuration. One with other keys was run in a way that is not known here.
CONSTANTS = {
    "name", "note", "config", "K", "alpha", "temperature", "learning_rate", "adam_epsilon", "adam_betas",
    "weight_decay", "clip_global_norm", "total_steps", "warmup_steps", "back_layer", "reduction_layers",
}
# fmt: on
# Both ways to run the encoder must agree with the published models. The tiles are smaller than the
# cases, so that all loops run.
EXECUTIONS: dict[str, objectives.Execute] = {
    "masked": forward,
    "packed": functools.partial(
        packed_forward, tiling=Tiling(tokens=16, rest=4, group_tokens=24, width_step=6)
    ),
}
# Beginning of a case's name -> the task of its model.
TASKS = {
    "span_qa_": "span",
    "triviaqa_": "span",
    "multiple_choice_": "multiple_choice",
    "wikihop_": "candidates",
    "hotpot_": "multi_hop",
}


@dataclasses.dataclass
class Case:
    name: str
    config: ModelConfig
    constants: dict[str, Any]
    params: Any
    execute: objectives.Execute
    arrays: dict[str, np.ndarray]

    @property
    def batch(self) -> dict[str, Any]:
        arrays = {k: jnp.asarray(v) for k, v in self.arrays.items() if k in INPUTS}
        if "joint_distil" not in self.name:  # plain joint cases carry teacher logits too, unused
            arrays = {k: v for k, v in arrays.items() if not k.startswith("teacher_")}
        batch: dict[str, Any] = {}
        batch |= {k: arrays[k] for k in ("labels", "teacher_logits") if k in arrays}
        *_, width = arrays["input_ids"].shape
        batch |= {k: self._by_row(arrays[k], 2) for k in ("guide", "rank") if k in arrays}
        if self.config.task == "span" and "teacher_logits" in arrays:
            batch["teacher_logits"] = arrays["teacher_logits"].reshape(-1, 2, width)
        # A row a segment or an option of the examples.
        batch |= {
            "input_ids": arrays["input_ids"].reshape(-1, width),
            "mask": arrays["attention_mask"].reshape(-1, width) > 0,
            "valid": jnp.ones(len(arrays["input_ids"]), bool),
        }
        if "token_type_ids" in arrays:
            batch["token_type_ids"] = arrays["token_type_ids"].reshape(-1, width)
        return batch | self._task_inputs(arrays, width)

    @property
    def group(self) -> int:
        """Rows an example: options or segments."""
        return int(np.prod(self.arrays["input_ids"].shape[1:-1]))

    def _by_row(self, x: jax.Array, axes: int) -> jax.Array:
        """[B, (G,) ...] with `axes` last axes -> [B * G, ...]; what an example has goes to all its rows."""
        x = x.reshape(-1, *x.shape[-axes:])
        examples = len(self.arrays["input_ids"])
        return jnp.repeat(x, self.group, axis=0) if len(x) == examples else x

    def _task_inputs(self, arrays: dict[str, Any], width: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        rows = arrays["input_ids"].size // width
        # In training, padding takes part as published; evaluation is of one unpadded row at a time.
        padded = kind_of(self) is not run_eval or "padded input" in self.constants["note"]
        if self.config.reads_all_tokens and padded:
            found["head_mask"] = jnp.ones((rows, width), bool)
        if "start_positions" in arrays:
            found["starts"] = arrays["start_positions"].reshape(rows, -1)
            found["ends"] = arrays["end_positions"].reshape(rows, -1)
        if "question_ends" in arrays:
            shared = jnp.arange(width) < arrays["question_ends"][:, None]
            found["shared"] = jnp.repeat(shared, self.config.num_labels, axis=0)
        if "cand_positions" in arrays:
            candidates = self._by_row(arrays["cand_positions"], 1)  # in every segment alike
            found |= {"candidates": candidates, "labels": arrays["answer_index"]}
            found["segment"] = arrays["instance_mask"].reshape(-1) > 0
        if "switch_labels" in arrays:
            found |= {"kind": arrays["switch_labels"], "sentence_labels": arrays["sent_labels"]}
            ends = [_positions(arrays[f"sent_{end}_mapping"]) for end in ("start", "end")]
            found["sentences"] = jnp.stack(ends, axis=-1)
        if "teacher_switch_logits" in arrays:
            found["teacher_logits"] = {
                "span": arrays["teacher_logits"],
                "kind": arrays["teacher_switch_logits"],
                "sentence": arrays["teacher_sent_logits"],
            }
        return found

    @property
    def batch_max(self) -> bool:
        """Whether this is the published evaluation of a batch, where rows are filled up to the longest."""
        return "batch_max" in self.name or "as the original does it" in self.constants["note"]

    @property
    def outputs(self) -> dict[str, np.ndarray]:
        """The arrays to agree with.

        A published run gathers every row to the length of the longest and masks what is too much,
        padding or tokens that were not chosen, in an order that its sort leaves open. What it
        records of such fill is not compared: it is attended to by nobody and ours has none.
        """
        outputs = {k: v for k, v in self.arrays.items() if k not in INPUTS}
        valid = None
        for stage in range(self.config.num_reductions):
            logits, kept = f"selector_logit_stage{stage}", f"kept_stage{stage}"
            if kept not in outputs:
                break
            valid = self.real(len(outputs[kept])) if valid is None else valid
            outputs[logits] = np.where(valid, outputs[logits], np.nan)
            outputs[kept] = outputs[kept] & valid
            if f"action_stage{stage}" in outputs:
                chosen = np.nan_to_num(outputs[f"action_stage{stage}"]) > 0
                judged = np.asarray(chosen | ~self.decided if self.shares_passage else chosen)
                outputs[kept] = outputs[kept] & judged
            valid = outputs[kept]
        return outputs

    def real(self, rows: int) -> np.ndarray:
        """bool [rows, S], True for real tokens; copies of the batch are stacked."""
        mask = self.arrays["attention_mask"] > 0
        if self.shares_passage:
            mask = np.asarray(mask.any(1))
        mask = mask.reshape(-1, mask.shape[-1])
        return np.tile(mask, (rows // len(mask), 1))

    @property
    def temperature(self) -> float:
        """Of the distillation; published as part of a model's configuration."""
        return self.constants.get("temperature", self.constants["config"].get("temperature", 1.0))

    @property
    def model(self) -> TokenReducingModel:
        return TokenReducingModel(self.config)

    def actions(self) -> jax.Array:
        """bool [stages, rows, S]; a token that was no longer there has no action."""
        stages = range(self.config.num_reductions)
        actions = [np.nan_to_num(self.arrays[f"action_stage{s}"]) > 0 for s in stages]
        group = self.config.num_labels if self.shares_passage else 1
        return jnp.repeat(jnp.asarray(np.stack(actions)), group, axis=1)

    @property
    def shares_passage(self) -> bool:
        """Whether the options of a multiple choice decide together, and the records are an example's."""
        return "question_ends" in self.arrays

    @property
    def decided(self) -> np.ndarray:
        """bool [copies of examples, S], the tokens that such options decide on."""
        ends = np.tile(self.arrays["question_ends"], self.constants.get("K", 1))[:, None]
        return np.arange(self.arrays["input_ids"].shape[-1]) < ends


def _positions(mapping: jax.Array) -> jax.Array:
    """One-hot rows [..., S] -> the position of the one; -1 where there is none."""
    return jnp.where(mapping.any(-1), mapping.argmax(-1), -1)


def load(folder: Path, execution: str = "masked") -> Case:
    """Reads a case; raises `AssertionError` where it has constants that nothing here heeds."""
    constants = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    unknown = sorted(set(constants) - CONSTANTS)
    assert not unknown, f"{folder.name}: case.json has unknown constants: {', '.join(unknown)}"
    with np.load(folder / "arrays.npz") as file:
        arrays = {name: _flat(name, x) for name, x in file.items()}
    config = model_config_from_dict(constants["config"])
    for prefix, task in TASKS.items():
        if folder.name.startswith(prefix):
            config = dataclasses.replace(config, task=task)
    if config.task == "multiple_choice":
        options = arrays["input_ids"].shape[1]
        config = dataclasses.replace(config, labels=tuple("ABCDEFGH"[:options]))
    tree = from_original_names(read_weights(folder), config).tree
    if "selector_0" not in tree["encoder"]:  # the dense cases have no selectors
        fresh = init_params(config, jax.random.key(0))["encoder"]
        tree["encoder"] |= {name: fresh[name] for name in ("selector_0", "selector_1")}
    params = jax.tree.map(jnp.asarray, tree)
    return Case(folder.name, config, constants, params, EXECUTIONS[execution], arrays)


def _flat(name: str, x: np.ndarray) -> np.ndarray:
    """The recorded values of rows, [..., S] or [..., stages], with all rows along one axis."""
    by_row = ("kept_ratio", "kept_stage", "action_stage", "selector_logit_stage")
    return x.reshape(-1, x.shape[-1]) if name.startswith(by_row) else x


def kind_of(case: Case) -> Callable[[Case], dict[str, Any]]:
    """The function that reproduces a case; `KeyError` where there is none."""
    if case.name.startswith(("classification_", *TASKS)):
        for output, run in (("init_loss", run_init), ("policy_loss", run_policy), ("total_loss", run_joint)):
            if output in case.arrays:
                return run
        return run_eval
    for prefix, run in (("residual_score_", run_residual), ("finetune_steps_", run_finetune)):
        if case.name.startswith(prefix):
            return run
    raise KeyError(f"no way to run a golden case of this kind: {case.name}")


def _selection_outputs(case: Case, selections: tuple[tokens.Selection, ...]) -> dict[str, Any]:
    outputs = {}
    for stage, s in enumerate(selections):
        logits, keep = jnp.where(s.scored, s.logits, jnp.nan), s.keep
        # One decision for the rows of an example; what is recorded of other tokens decides nothing.
        if case.shares_passage:
            group = case.config.num_labels
            logits, keep = logits[::group], keep.reshape(-1, group, keep.shape[-1]).any(1)
            recorded = case.outputs.get(f"selector_logit_stage{stage}", np.nan)
            logits = jnp.where(case.decided, logits, recorded)
        outputs[f"selector_logit_stage{stage}"] = logits
        outputs[f"kept_stage{stage}"] = keep
    return outputs


def _logit_outputs(case: Case, logits: Any, num_copies: int = 1) -> dict[str, Any]:
    """Logits under the names that the golden set has for them."""
    task = case.config.task
    if task == "span":
        shape = (-1, *case.arrays["input_ids"].shape[1:])  # [copies of examples, (segments,) S]
        return {f"{end}_logits": logits[:, i].reshape(shape) for i, end in enumerate(("start", "end"))}
    if task == "multi_hop":
        start, end = jnp.moveaxis(logits["span"], 1, 0)
        ends = {"start_logits": start, "end_logits": end}
        return {**ends, "switch_logits": logits["kind"], "sent_logits": logits["sentence"]}
    answers = LOSSES[task].example_logits(logits, Rows(case.batch, num_copies))
    return {"candidate_logits" if task == "candidates" else "logits": answers}


def run_eval(case: Case) -> dict[str, Any]:
    """Evaluation, each example alone; or, where the note says so, the published batch-max form."""
    rule = tokens.keep_batch_max if case.batch_max else tokens.keep_probable
    output = jax.jit(lambda p: case.execute(case.model, p, case.batch, rule=rule))(case.params)
    logits = _logit_outputs(case, output.logits)
    for name in ("start_logits", "end_logits"):
        if name in logits and name in case.arrays:  # nan where a row was recorded without its padding
            absent = (case.arrays["attention_mask"] == 0) & np.isnan(case.arrays[name])
            logits[name] = np.where(absent, np.nan, logits[name])
    ratios = _confident_ratios(case, output.selections)
    return {**logits, "kept_ratio": ratios, **_selection_outputs(case, output.selections)}


def _confident_ratios(case: Case, selections: tuple[tokens.Selection, ...]) -> jax.Array:
    """The published ratio of an evaluation, [rows, stages].

    It counts confident tokens, [CLS] and what options have of their own, not the fill of a batch, over
    the length of the tensor the encoder was given.
    """
    width = case.arrays["input_ids"].shape[-1]

    def count(x: jax.Array) -> jax.Array:
        return (x.reshape(-1, case.group, width).any(1) if case.shares_passage else x).sum(-1)

    valid = case.batch["mask"]
    lengths = width if case.batch_max else count(valid)
    ratios = []
    for s in selections:
        ratios.append(count(((s.logits >= 0) | ~s.scored).at[:, 0].set(True) & valid) / lengths)
        valid = s.keep
    return _stages(case, ratios)


def _stages(case: Case, ratios: list[jax.Array]) -> jax.Array:
    """Stacked to as many stages as the record has: nan for those that the model has not, none it skipped."""
    recorded = case.arrays["kept_ratio"].shape[1] if "kept_ratio" in case.arrays else len(ratios)
    absent = [jnp.full(len(ratios[0]), jnp.nan)] * (recorded - len(ratios))
    return jnp.stack([*ratios[:recorded], *absent], axis=1)


def run_init(case: Case) -> dict[str, Any]:
    def loss(params: Any) -> jax.Array:
        objective = objectives.initialization_objective(
            case.model, params, case.batch, per_length_scale=True, execute=case.execute
        )
        return objectives.mean_over_examples(objective.sums())["loss"]

    value, grads = jax.jit(jax.value_and_grad(loss))(case.params)
    return {"init_loss": value, **_gradients(grads, case)}


def _samples(case: Case, params: Any) -> objectives.PolicySamples:
    rule = tokens.replay(case.actions())
    num_samples = case.constants["K"]
    if "imitation" in case.name:
        # The imitating copies must find their actions by themselves; the others replay theirs.
        rows = len(case.batch["input_ids"])
        first_copy = jnp.arange(num_samples * rows) < rows
        rule = tokens.imitate(jnp.tile(case.batch["guide"], (num_samples, 1, 1)), first_copy, rule)
    return objectives.sample_policy(
        case.model,
        params,
        case.batch,
        rule=rule,
        num_samples=num_samples,
        alpha=case.constants["alpha"],
        max_length=case.arrays["input_ids"].shape[-1],
        temperature=case.temperature,
        execute=case.execute,
    )


def _run_sampled(case: Case, objective: Callable[..., objectives.Objective], total: str) -> dict[str, Any]:
    def loss(params: Any) -> tuple[jax.Array, objectives.PolicySamples]:
        samples = _samples(case, params)
        sums = objective(case.batch, samples).sums()
        return objectives.mean_over_examples(sums)["loss"], samples

    (value, samples), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(case.params)
    kept = _selection_outputs(case, samples.selections)
    decided = case.decided if case.shares_passage else np.True_
    rows = [s.num_kept for s in samples.selections]
    if case.shares_passage:
        rows = [x[:: case.config.num_labels] for x in rows]
    ratios = [x / case.arrays["input_ids"].shape[-1] for x in rows]
    return {
        total: value,
        "task_loss": samples.task_loss.reshape(-1),
        "selector_nll": samples.selector_nll.reshape(-1),
        "kept_ratio": _stages(case, ratios),
        **_logit_outputs(case, samples.logits, case.constants["K"]),
        "reward": samples.reward,
        "advantage": policy.advantage(samples.reward),
        **{f"action_stage{s}": kept[f"kept_stage{s}"] & decided for s in range(case.config.num_reductions)},
        **kept,
        **_gradients(grads, case),
    }


def run_policy(case: Case) -> dict[str, Any]:
    return _run_sampled(case, objectives.policy_objective, "policy_loss")


def run_joint(case: Case) -> dict[str, Any]:
    return _run_sampled(case, objectives.joint_objective, "total_loss")


def run_residual(case: Case) -> dict[str, Any]:
    layers = (case.constants["reduction_layers"], case.constants["back_layer"])
    before, back = residual.score_layers(case.config)
    assert layers == (list(before), back), f"{case.name}: scores of layers {layers}, ours are {before, back}"
    scores = _masked_scores if case.execute is forward else objectives.score_tokens
    score, logits, loss = jax.jit(lambda p: scores(case.model, p, case.batch))(case.params)
    # Published scores are of the batch-mean loss, ours of every example's own.
    return {"score": score / len(score), "logits": logits, "loss": loss.mean()}


def _masked_scores(
    model: TokenReducingModel, params: Any, batch: dict[str, Any]
) -> tuple[jax.Array, Any, jax.Array]:
    """As `objectives.score_tokens`, which runs packed: the padded reference for it."""
    run = functools.partial(model.apply, {"params": params})
    before, back = residual.score_layers(model.config)
    encoder = functools.partial(Encoder(model.config, model.dtype).apply, {"params": params["encoder"]})
    tokens = encoder(batch["input_ids"], batch["mask"], batch.get("token_type_ids"), method="embed")
    states = {-1: tokens.states}  # [B, S, H] each
    for layer in range(back + 1):
        tokens = encoder(tokens, [layer], method="run_layers")
        states[layer] = tokens.states

    def loss_from(back_states: jax.Array) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        last = dataclasses.replace(tokens, states=back_states)
        last = encoder(last, range(back + 1, model.config.num_layers), method="run_layers")
        logits = run(last, head_inputs(batch), method="answer")
        loss = LOSSES[model.config.task].loss(logits, Rows(batch))
        return loss.sum(), (logits, loss)

    gradient, (logits, loss) = jax.grad(loss_from, has_aux=True)(states[back])
    work = [states[back] - states[layer] for layer in before]
    return jnp.stack([jnp.abs(jnp.sum(gradient * w, -1)) for w in work], axis=1), logits, loss


def run_finetune(case: Case) -> dict[str, Any]:
    constants = case.constants
    assert constants["adam_betas"] == [0.9, 0.999], f"{case.name}: adam_betas other than ours"
    schedule = optimizer.linear_schedule(
        constants["learning_rate"], constants["total_steps"], constants["warmup_steps"]
    )
    adamw = optimizer.adamw(
        schedule,
        case.config,
        weight_decay=constants["weight_decay"],
        clip_norm=constants["clip_global_norm"],
        epsilon=constants["adam_epsilon"],
    )
    trained, frozen = optimizer.split_params(case.params, optimizer.trains_dense(case.config))

    @jax.jit
    def step(trained: Any, state: Any) -> Any:
        def loss(trained: Any) -> jax.Array:
            params = optimizer.merge_params(trained, frozen)
            objective = objectives.dense_objective(case.model, params, case.batch, execute=case.execute)
            sums = objective.sums()
            return objectives.mean_over_examples(sums)["loss"]

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = adamw.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, value, optax.tree.norm(grads)

    state, losses, norms = adamw.init(trained), [], []
    for _ in case.arrays["losses"]:
        trained, state, value, norm = step(trained, state)
        losses.append(value)
        norms.append(norm)
    after = to_original_names(optimizer.merge_params(trained, frozen), case.config)
    found = {"losses": np.array(losses), "gradient_norms": np.array(norms)}
    return {**found, **{f"after:{name}": x for name, x in after.items()}}


def _gradients(grads: Any, case: Case) -> dict[str, Any]:
    return {f"grad:{name}": x for name, x in to_original_names(grads, case.config).items()}

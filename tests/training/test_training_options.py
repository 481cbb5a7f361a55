"""Options beyond the paper: which examples a stage reads, and how stage joint trains."""

import dataclasses
import functools
import json
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
import tiny_runs
from tiny_models import random_batch

from trbert_jax.config import load_config
from trbert_jax.errors import UserError
from trbert_jax.io import write_json
from trbert_jax.model.model import Params, TokenReducingModel, forward
from trbert_jax.model.packed import packed_forward
from trbert_jax.model.pretrained import Pretrained, load_pretrained
from trbert_jax.reduction.selection import keep_probable
from trbert_jax.tasks.examples import Counts, Examples, pad_batch
from trbert_jax.training import objectives
from trbert_jax.training import step as steps
from trbert_jax.training.checkpoints import CheckpointStore
from trbert_jax.training.experiment import Experiment
from trbert_jax.training.loop import restore_state, saved_params, to_checkpoint
from trbert_jax.training.stage_inputs import StageInput, places_in, teacher_logits
from trbert_jax.training.stages import STAGES, objective_of

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
LABELED = 16
ONE_POINT = dataclasses.replace(tiny_models.BERT, num_layers=1)


@pytest.mark.slow
def test_labels_of_other_examples_are_not_read(tmp_path: Path) -> None:
    """A run with few labels and many texts: fine-tuned like one with few texts, whatever other labels say."""
    changes: dict[str, Any] = {
        "stages": ["finetune", "score", "policy", "teacher", "joint"],
        "model": tiny_runs.ONE_LAYER,
        "finetune": {"max_examples": LABELED, "epochs": 1, "backend": "masked"},
        "score": {"max_examples": 12},
        "policy": {"max_examples": 8, "epochs": 1, "backend": "masked"},
        "teacher": {"max_examples": 40},
        "joint": {"rule": "threshold", "hard_fraction": 0.5, "epochs": 1, "save_steps": 1},
    }
    changes["joint"] |= {"keep_checkpoints": 5, "selector_learning_rate": 1e-2, "backend": "masked"}
    folders = [tmp_path / name for name in ("right", "wrong", "few")]
    for folder in folders:
        folder.mkdir()
    right = tiny_runs.write_config(folders[0], **changes)
    results = tiny_runs.train(right)
    splits = Experiment(load_config(right)).data
    known = {x.id for x in splits.records(f"train[:{LABELED}]")}
    tiny_runs.write_dataset(folders[1] / "data")
    path = folders[1] / "data" / "train.jsonl"
    lines = tiny_runs.read_lines(path)
    for record, example in zip(lines, splits.records("train"), strict=True):
        record["label"] = record["label"] if example.id in known else 1 - record["label"]
    path.write_text("".join(json.dumps(record) + "\n" for record in lines), encoding="utf-8")
    tiny_runs.train(tiny_runs.write_config(folders[1], **changes))
    model = {"model": {**tiny_runs.ONE_LAYER, "tokenizer": str(folders[0] / "work" / "finetune" / "model")}}
    limit = {"data": {"max_train_examples": LABELED}, "stages": ["finetune"], "finetune": changes["finetune"]}
    limit["finetune"] = {**changes["finetune"], "max_examples": None}
    tiny_runs.train(tiny_runs.write_config(folders[2], **model, **limit))

    def params(folder: Path, stage: str) -> Params:
        return load_pretrained(folder / "work" / stage / "model", seed=3).params

    for other, stage in ((1, "finetune"), (1, "policy"), (1, "joint"), (2, "finetune")):
        tiny_models.assert_same_params(params(folders[0], stage), params(folders[other], stage))
    sizes = {p.parent.name: len(np.load(p)) for p in (folders[0] / "work").glob("*/*.npy")}
    assert sizes == {"score": 12, "teacher": 40}
    assert [results["stages"][x]["steps"] for x in ("finetune", "policy", "joint")] == [2, 1, 5]
    _, _, params_at = saved_params(Experiment(load_config(right)), STAGES["joint"])
    encoders = [params_at(step)["encoder"] for step in (2, 3, 5)]  # the last two of five updates are hard
    selectors, layers = ([x[name] for x in encoders] for name in ("selector_0", "layer_0"))
    jax.tree.map(np.testing.assert_array_equal, selectors[1], selectors[2])
    assert (selectors[0]["hidden"]["kernel"] != selectors[1]["hidden"]["kernel"]).any()
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, layers[1:]), strict=True))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("score.max_examples=30", "finetune.max_examples"),
        ("policy.max_examples=11", "score.max_examples"),
        ("joint.max_examples=21", "teacher.max_examples"),
        ("joint.max_examples=17 joint.distill=false", "finetune.max_examples"),
    ],
)
def test_more_examples_than_there_are_answers_of_are_refused(tmp_path: Path, override: str, key: str) -> None:
    limits = {"finetune": {"max_examples": LABELED}, "teacher": {"max_examples": 20}}
    path = tiny_runs.write_config(tmp_path, **limits, score={"max_examples": 10})
    config = load_config(path)
    found = {name: stage.max_examples(config) for name, stage in STAGES.items() if name != "evaluate"}
    assert found == {"finetune": 16, "score": 10, "init": 10, "policy": 10, "teacher": 20, "joint": 20}
    few = load_config(path, ["data.max_train_examples=12", "teacher.max_examples=99"])
    assert [STAGES[x].max_examples(few) for x in ("finetune", "joint")] == [16, 99]
    assert Experiment(few).data.part(16) == "train"
    other, stage = load_config(path, override.split()), override.partition(".")[0]
    with pytest.raises(UserError, match=f"^{stage}.max_examples: .* of {key}"):
        STAGES[stage].max_examples(other)


def test_places() -> None:
    """Windows have the id of their question; entries are found by example, their rows by number."""
    rows = [[(np.array([7, i], np.int32), np.array([i] * (i % 3), np.int32))] for i in range(8)]

    def make(questions: list[int], group: int = 1) -> Examples:
        ids = [f"q{i // 2}" for i in questions[::group]]
        first = np.arange(0, len(questions) + 1, group) if group > 1 else None
        pieces = [([a], [b]) for i in questions for a, b in rows[i]]
        options: dict[str, Any] = {"digest": "", "first_row": first, "group": group}
        return Examples.of_pairs(pieces, ids, counts=Counts(), **options)

    whole = make(list(range(8)))

    def found(source: Examples, examples: Examples) -> list[list[int]]:
        return [x.tolist() for x in places_in(source, examples) or ()]

    assert found(whole, make([2, 3, 6, 7])) == [[2, 3, 6, 7]] * 2
    assert found(make(list(range(8)), 2), make([4, 5], 2)) == [[2], [4, 5]]
    assert places_in(whole, make([3, 2])) is None
    assert places_in(make([0, 1]), make([2, 3])) is None


@functools.cache
def gradients(settings: str, hard: bool = False, components: str = "") -> tuple[Any, Any]:
    """Loss and gradient of stage joint on one batch."""
    config = load_config(QUICKSTART, ["joint.backend=masked", "policy.num_samples=3", *settings.split()])
    model = TokenReducingModel(tiny_models.BERT)
    objective = objective_of(STAGES["joint"], config, model, 10, hard)
    batch = random_batch(tiny_models.BERT, [12, 9, 5, 12], 12)

    def loss(params: Params) -> jax.Array:
        return objective(params, batch, jax.random.key(1), jnp.int32(0)).sums()["loss"]

    return jax.jit(jax.value_and_grad(loss))(tiny_models.params_of(tiny_models.BERT))


def test_threshold_trains_the_encoder_on_the_selection_of_prediction() -> None:
    """And the selectors by the samples, as published; in the hard part no penalty reaches the encoder."""
    rules = ("sample", False), ("sample joint.penalty_gradient=exact", True), ("threshold", False)
    sampled, hard, kept = (gradients(f"joint.rule={rule}", hard)[1] for rule, hard in rules)
    for name, tree in kept["encoder"].items():
        expected = (sampled if name.startswith("selector") else hard)["encoder"][name]
        tiny_models.assert_same_gradients(tree, expected)
    assert not np.allclose(*(x["encoder"]["layer_2"]["output"]["bias"] for x in (sampled, hard)))
    assert all(not x.any() for x in jax.tree.leaves(hard["encoder"]["selector_0"]))


def test_selectors_have_their_own_rate() -> None:
    """AdamW with another rate for some parameters; moments are the same."""
    config = load_config(QUICKSTART, ["joint.learning_rate=1e-3", "joint.selector_learning_rate=2e-2"])
    params = jax.tree.map(jnp.asarray, tiny_models.tiny_params(ONE_POINT))
    batches = jax.tree.map(lambda x: x[None], random_batch(ONE_POINT, [6, 5], 6))
    objective = objective_of(STAGES["joint"], config, TokenReducingModel(ONE_POINT), 10)
    trained, frozen = steps.split_params(params, steps.trains_all(ONE_POINT))

    def after(rate: float, rates: Any) -> Any:
        optimizer = steps.adamw(lambda _: rate, ONE_POINT, weight_decay=0.1)
        step = jax.jit(functools.partial(steps.train_step, objective, optimizer, rates=rates))
        return step(steps.init_state(trained, optimizer), frozen, batches, jax.random.key(0))[0]

    slow, fast, both = after(1e-3, None), after(2e-2, None), after(1e-3, STAGES["joint"].rates(config))
    for name, tree in both.trained["encoder"].items():
        expected = (fast if name.startswith("selector") else slow).trained["encoder"][name]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), tree, expected)
    jax.tree.map(np.testing.assert_array_equal, both.opt_state, slow.opt_state)


def controlled(updates: int, *settings: str, passes: int = 1) -> tuple[Any, Params, list[Any]]:
    """Updates of stage joint with a target, on one batch; returns state, frozen parameters and metrics."""
    options = ["joint.backend=masked", "policy.num_samples=4", "joint.dropout=false"]
    config = load_config(QUICKSTART, [*options, *settings])
    stage, model = STAGES["joint"], TokenReducingModel(ONE_POINT)
    batch = random_batch(ONE_POINT, [18 - i % 5 for i in range(16)], 18)
    batches = jax.tree.map(lambda x: x.reshape(passes, -1, *x.shape[1:]), batch)
    optimizer = steps.adamw(lambda _: config.joint.learning_rate, ONE_POINT)
    params = jax.tree.map(jnp.asarray, tiny_models.tiny_params(ONE_POINT))
    trained, frozen = steps.split_params(params, stage.trained(ONE_POINT))
    state, metrics = steps.init_state(trained, optimizer, stage.control(config)), list[Any]()
    hard_from = stage.hard_from(config, updates)

    @functools.cache
    def update(hard: bool) -> Any:
        objective = objective_of(stage, config, model, updates, hard)
        rates, hold = stage.rates(config, hard), stage.hold(config, updates, hard)
        return steps.update_step(objective, optimizer, None, rates, hold)

    for step in range(updates):
        state, found = update(step >= hard_from)(state, frozen, batches, jax.random.key(0))
        metrics.append(jax.device_get(found))
    return state, frozen, metrics


TARGET = ["joint.target_speedup=1.5", "joint.penalty=flops", "joint.penalty_gradient=exact"]
TARGET += ["joint.rule=threshold"]


def test_a_speed_that_is_asked_for_is_reached() -> None:
    """Even where dropping does no harm, as here; the last part holds it while the encoder changes."""
    settings = ["joint.hard_fraction=0.4", "joint.alpha=0.1", "joint.selector_learning_rate=3e-3"]
    _, _, metrics = controlled(200, *TARGET, *settings)
    assert metrics[0]["speedup"] < 1  # the selectors' own cost
    speeds = [float(x["speedup"]) for x in metrics]
    assert abs(np.mean(speeds[-10:]) / 1.5 - 1) < 0.05, speeds[::10]
    assert metrics[0]["multiplier"] == np.float32(0.1)
    assert len({float(x["multiplier"]) for x in metrics[120:]}) == 1


def test_accumulation_does_not_change_the_multiplier() -> None:
    """Nor the shift of the last part."""
    for hard in ("joint.hard_fraction=0", "joint.hard_fraction=1"):
        whole, parts = (controlled(3, *TARGET, hard, passes=passes)[0] for passes in (1, 4))
        for one, other in zip(*map(jax.tree.leaves, (whole.control, parts.control)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)
        biases = [x.trained["encoder"]["selector_0"]["output"]["bias"] for x in (whole, parts)]
        np.testing.assert_allclose(biases[0], biases[1], rtol=1e-4)
        if hard.endswith("1"):
            assert biases[0] != tiny_models.tiny_params(ONE_POINT)["encoder"]["selector_0"]["output"]["bias"]


def test_control_is_saved(tmp_path: Path) -> None:
    """A checkpoint has it; one without a target has none, as before."""
    state = controlled(2, *TARGET)[0]
    for control in (state.control, None):
        path = tmp_path / str(control is None)
        saved: Any = dataclasses.replace(state, control=control)
        run = types.SimpleNamespace(config=types.SimpleNamespace(seed=1))
        training: Any = types.SimpleNamespace(steps_per_epoch=1, update_size=1, experiment=run)
        with CheckpointStore(path, 1, {}) as store:
            store.save(2, to_checkpoint(training, jax.device_get(saved)))
        restored = restore_state(store, 2, jax.eval_shape(lambda saved=saved: saved))
        jax.tree.map(np.testing.assert_array_equal, restored, saved)
        names = json.loads((path / "step_00000002/manifest.json").read_text())["arrays"].keys()
        assert ("control/multiplier" in names) == (control is not None)


def test_jitter_shifts_all_selections_but_the_first() -> None:
    """Uniformly, by example and point; half of the examples if they have one selection."""
    batch = {**random_batch(ONE_POINT, [6] * 400, 6), "shared": jnp.ones((400, 6), bool)}
    batch |= {"valid": jnp.ones(200, bool), "index": jnp.arange(200)}  # two rows an example
    one, two = (np.asarray(objectives.draw_shift(jax.random.key(0), batch, k, 2, 0.8)) for k in (1, 2))
    for shift in (one, two[400:]):
        np.testing.assert_array_equal(shift[::2], shift[1::2])
        drawn = shift[::2][shift[::2].any(-1)]
        assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.2
        np.testing.assert_allclose(np.quantile(drawn, [0, 0.25, 0.75, 1]), [-0.8, -0.4, 0.4, 0.8], atol=0.1)
    assert not two[:400].any()
    assert abs(one[::2].any(-1).mean() - 0.5) < 0.1
    few = {key: x[: 3 if key in ("valid", "index") else 6] for key, x in batch.items()}
    other = objectives.draw_shift(jax.random.key(0), few, 1, 2, 0.8)
    np.testing.assert_array_equal(other, one[:6])


def test_a_shift_is_another_threshold() -> None:
    """For selections and their log-probability; the speed-up is that of the rows without shift."""
    model, params = TokenReducingModel(ONE_POINT), tiny_models.params_of(ONE_POINT)
    batch = random_batch(ONE_POINT, [18, 12], 18)
    options: dict[str, Any] = {"rule": keep_probable, "num_samples": 1, "alpha": 1.0, "max_length": 18}
    run = functools.partial(objectives.sample_policy, model, params, batch, **options)
    shift = jnp.array([[0.0], [-1.5]])
    plain, shifted = jax.jit(run)(), jax.jit(run)(shift=shift)
    logits = np.asarray(plain.selections[0].logits)
    keep = (logits >= -np.asarray(shift)) & np.asarray(batch["mask"])
    keep[:, 0] = True
    np.testing.assert_array_equal(shifted.selections[0].keep, keep)
    assert (keep != np.asarray(plain.selections[0].keep)).any(-1).tolist() == [False, True]
    np.testing.assert_allclose(shifted.selections[0].logits, logits + shift, atol=1e-6)
    p = 1 / (1 + np.exp(-np.asarray(shifted.selections[0].logits, np.float64)))
    nll = -(np.log(np.where(keep, p, 1 - p) + 1e-6) * batch["mask"]).sum(-1) / batch["mask"].sum(-1)
    np.testing.assert_allclose(shifted.selector_nll[0], nll, rtol=1e-5)
    objective = objectives.with_speed(objectives.policy_objective(batch, shifted), shifted)
    speedup = objective.metrics["dense_flops"].sum() / objective.metrics["flops"].sum()
    np.testing.assert_allclose(speedup, plain.dense_flops[0, 0] / plain.flops[0, 0], rtol=1e-4)


def test_temperature_and_states() -> None:
    """The distillation loss of stage joint, by NumPy."""
    model, params = TokenReducingModel(ONE_POINT), tiny_models.params_of(ONE_POINT)
    batch = random_batch(ONE_POINT, [18, 12], 18)
    teacher_state = np.random.default_rng(0).normal(3, 2, (2, 16)).astype(np.float32)
    batch = {**batch, "teacher_state": jnp.asarray(teacher_state)}

    def run() -> tuple[Any, ...]:
        output, packed = (f(model, params, batch, rule=keep_probable) for f in (forward, packed_forward))
        options: dict[str, Any] = {"num_samples": 1, "alpha": 1.0, "max_length": 18, "rule": keep_probable}
        options |= {"temperature": 2.0, "state_weight": 0.3}
        samples = objectives.sample_policy(model, params, batch, **options)
        return output.logits, output.first, samples.task_loss, packed.first

    logits, first, loss, packed = map(np.asarray, jax.jit(run)())
    teacher = np.asarray(batch["teacher_logits"])
    ours, theirs = (x / 2 - np.log(np.exp(x / 2).sum(-1, keepdims=True)) for x in (logits, teacher))

    def normed(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)

    states = ((normed(first) - normed(teacher_state)) ** 2).mean(-1)
    np.testing.assert_allclose(loss[0], -(np.exp(theirs) * ours).sum(-1) + 0.3 * states, rtol=1e-4)
    np.testing.assert_allclose(packed, first, atol=1e-4)


def test_teacher_stores_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a run example by example, with the logits that it stores without them; joint reads both."""
    shape = dataclasses.replace(tiny_models.BERT, num_layers=1)
    model = Pretrained(shape, tiny_models.tiny_params(shape), tiny_models.tiny_tokenizer())
    monkeypatch.setattr(Experiment, "load", lambda run, stage, needed_by: model)
    path = tiny_runs.write_config(tmp_path, joint={"distill_states": 1}, teacher={"states": True})
    config = load_config(path, ["model.max_length=18"])
    runs, teacher = list[Experiment](), STAGES["teacher"]
    for states in (True, False):
        settings = dataclasses.replace(config.teacher, states=states)
        folder = str(tmp_path / str(states))
        runs.append(Experiment(dataclasses.replace(config, workdir=folder, teacher=settings)))
    for run in runs:
        assert teacher.run is not None
        write_json(run.workdir / "teacher" / "done.json", teacher.run(run, teacher))
    assert runs[0].finished("teacher") == runs[1].finished("teacher")
    one, other = (np.load(run.workdir / "teacher" / "logits.npy") for run in runs)
    np.testing.assert_allclose(one, other, atol=1e-5)
    examples = STAGES["joint"].examples(runs[0], model)
    entry = teacher_logits(runs[0], "joint", examples, examples, "classification")["teacher_state"]
    assert isinstance(entry, StageInput)
    found = entry.take(np.array([3]), np.array([3]), 18)
    batch = jax.tree.map(jnp.asarray, pad_batch(examples, np.array([3]), 1, 18))
    expected = forward(TokenReducingModel(shape), model.params, batch, rule=None).first
    np.testing.assert_allclose(found, expected, atol=1e-5)
    (runs[0].workdir / "teacher" / "states.npy").unlink()
    with pytest.raises(UserError, match=r"states\.npy"):
        teacher_logits(runs[0], "joint", examples, examples, "classification")
    with pytest.raises(UserError, match=r"joint\.distill_states: .* teacher\.states"):
        load_config(path, ["teacher.states=false"])

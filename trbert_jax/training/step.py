"""Update parameters: gradients of a stage's objective, accumulated over micro-batches, and AdamW.

Pure functions of arrays, on one device or several. Source: docs/method.md, "Optimizer".
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trbert_jax.model.config import ModelConfig
from trbert_jax.model.model import Batch, Params
from trbert_jax.parallel import AXES, WHOLE, DeviceMesh
from trbert_jax.reduction.budget import Control
from trbert_jax.training.objectives import Objective, mean_over_examples

# (all parameters, micro-batch, PRNG key of the update, number of the update) -> Objective; if a target
# speed-up is held, they also take the multiplier of the length penalty.
ObjectiveFn = Callable[..., Objective]
Trains = Callable[[str], bool]  # name of a component ("layer_3", "head") -> whether it is trained
Rates = Callable[[str], float]  # name of a component -> multiple of the learning rate
# (trained parameters, control, speed-up and number of an update) -> the first two after it
Hold = Callable[[Params, Control, jax.Array, jax.Array], tuple[Params, Control]]
_DEVICES = "devices"  # axis of pmap


@struct.dataclass
class TrainState:
    """The values that an update changes."""

    step: jax.Array  # int32 scalar, number of updates done
    trained: Params  # the parameters that this stage trains (`split_params`)
    opt_state: Any  # of the optimizer
    control: Control | None = None  # if a target speed-up is held


def init_state(
    trained: Params, optimizer: optax.GradientTransformation, control: Control | None = None
) -> TrainState:
    """Returns the state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained), control)


def update_step(
    objective: ObjectiveFn,
    optimizer: optax.GradientTransformation,
    layout: DeviceMesh | None = None,
    rates: Rates | None = None,
    hold: Hold | None = None,
) -> Any:
    """Returns the compiled update of a stage, `(state, frozen, batches, rng) -> (state, metrics)`.

    `state` is donated, `batches` are arrays [accumulation_steps, batch_size, ...] and `rng` is the stage's
    key, from which `state.step` derives the update's. Metrics are means over examples and the gradient's
    global norm. The loss is the mean over all real examples of the update, however they are divided into
    micro-batches and over devices. `layout` is None for one device; `place` and `place_batches` lay out
    arguments. `rates` multiply the change of each component, its moments aside; None for 1. `hold`
    holds a target speed-up if the state has a control.
    """
    step = functools.partial(train_step, objective, optimizer, rates=rates, hold=hold)
    if layout is not None and layout.strategy == "pmap":
        step = functools.partial(step, axis_name=_DEVICES)
        options: dict[str, Any] = {"in_axes": (0, 0, 0, None), "donate_argnums": (0,)}
        return jax.pmap(step, axis_name=_DEVICES, devices=list(layout.mesh.devices.flat), **options)
    return jax.jit(functools.partial(step, layout=layout), donate_argnums=(0,))


def train_step(
    objective: ObjectiveFn,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Params,
    batches: Batch,
    rng: jax.Array,
    *,
    axis_name: str | tuple[str, ...] | None = None,
    layout: DeviceMesh | None = None,
    rates: Rates | None = None,
    hold: Hold | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update as a pure function; see `update_step`. `axis_name` is the axis of pmap to add up over."""

    def gradients(params: tuple[Params, Params], batches: Batch, rng: jax.Array, *others: jax.Array) -> Any:
        result = accumulated_gradients(objective, *params, batches, rng, *others)
        return result if axis_name is None else jax.lax.psum(result, axis_name)

    if layout is not None and not layout.is_single:
        axis_name = AXES
        gradients = layout.by_rows(gradients, out_specs=WHOLE, batch_spec=PartitionSpec(None, AXES))
    update_rng = jax.random.fold_in(rng, state.step)
    price = () if state.control is None else (state.control.weight,)
    grads, sums = gradients((state.trained, frozen), batches, update_rng, state.step, *price)

    grads = jax.tree.map(lambda g: g / jnp.maximum(sums["weight"], 1.0), grads)
    if layout is not None:
        grads = layout.keep_divided(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
    if rates is not None:
        updates = _scaled(updates, rates)
    metrics = {**mean_over_examples(sums), "gradient_norm": optax.tree.norm(grads)}
    trained, control = optax.apply_updates(state.trained, updates), state.control
    if control is not None and hold is not None:
        speedup = metrics.pop("dense_flops") / metrics.pop("flops")
        metrics |= {"speedup": speedup, "multiplier": control.weight}
        trained, control = hold(trained, control, speedup, state.step)
    return TrainState(state.step + 1, trained, opt_state, control), metrics


def _scaled(updates: Params, rates: Rates) -> Params:
    def one(name: str, tree: Any) -> Any:
        return jax.tree.map(lambda x: rates(name) * x, tree)

    encoder = {name: one(name, tree) for name, tree in updates["encoder"].items()}
    others = {name: one(name, tree) for name, tree in updates.items() if name != "encoder"}
    return {"encoder": encoder, **others}


def shift_selectors(trained: Params, change: jax.Array) -> Params:
    """Adds to the logits of all selectors."""
    encoder = dict(trained["encoder"])
    for name in (name for name in encoder if name.startswith("selector_")):
        output = encoder[name]["output"]
        encoder[name] = {**encoder[name], "output": {**output, "bias": output["bias"] + change}}
    return {**trained, "encoder": encoder}


def accumulated_gradients(
    objective: ObjectiveFn,
    trained: Params,
    frozen: Params,
    batches: Batch,
    rng: jax.Array,
    *others: jax.Array,
) -> tuple[Params, dict[str, jax.Array]]:
    """Returns gradients of the summed loss and `Objective.sums`, added up over micro-batches.

    `rng` is the key of the update; `others`, its number and maybe a multiplier, are the last arguments of the
    objective.
    """

    def loss(trained: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        sums = objective(merge_params(trained, frozen), batch, rng, *others).sums()
        return sums["loss"], sums

    gradients = functools.partial(jax.grad(loss, has_aux=True), trained)
    first = jax.tree.map(lambda x: x[0], batches)
    if jax.tree.leaves(batches)[0].shape[0] == 1:
        return gradients(first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradients, first))

    def accumulate(carry: Any, batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, gradients(batch)), None

    total, _ = jax.lax.scan(accumulate, zeros, batches)
    return total


# Onto the devices and back ------------------------------------------------------------------------


def first_state(
    trained: Params,
    optimizer: optax.GradientTransformation,
    layout: DeviceMesh,
    control: Control | None = None,
) -> TrainState:
    """Returns the state before the first update from host arrays; no device holds all of a divided one."""
    if layout.is_single or layout.strategy == "pmap":
        return place(init_state(jax.tree.map(jnp.array, trained), optimizer, control), layout)
    init = functools.partial(init_state, optimizer=optimizer, control=control)
    shardings = jax.tree.map(layout.sharding_of, jax.eval_shape(init, trained))
    return jax.jit(init, out_shardings=shardings, donate_argnums=(0,))(layout.divide(trained))


def place(tree: Any, layout: DeviceMesh) -> Any:
    """Lays out a state, or parameters that are not trained, for `update_step`; copies host arrays."""
    if layout.is_single and layout.strategy == "jit":
        return jax.tree.map(lambda x: jnp.array(x) if isinstance(x, np.ndarray) else x, tree)
    if layout.strategy == "jit":
        return layout.divide(tree)
    devices = layout.local_devices
    sharding = NamedSharding(Mesh(np.array(devices), (_DEVICES,)), PartitionSpec(_DEVICES))

    def repeated(x: Any) -> jax.Array:  # [devices of this process, ...]
        array = np.asarray(x)
        shape = (len(devices), *array.shape)
        return jax.make_array_from_callback(shape, sharding, lambda index: array[None])

    return jax.tree.map(repeated, tree)


def place_batches(batches: Mapping[str, Any], layout: DeviceMesh) -> Batch:
    """Lays out arrays [accumulation_steps, rows of this process, ...] for `update_step`."""
    if layout.strategy == "jit":
        return layout.place_own_rows(batches, axis=1)

    def divided(x: Any) -> np.ndarray:  # [devices of this process, accumulation_steps, rows of a device, ...]
        array = np.asarray(x)
        shape = (array.shape[0], len(layout.local_devices), -1, *array.shape[2:])
        return np.moveaxis(array.reshape(shape), 1, 0)

    return jax.tree.map(divided, batches)


def fetch(tree: Any, layout: DeviceMesh) -> Any:
    """Returns NumPy copies of (a part of) a state, each array once."""
    if layout.strategy == "jit":
        return layout.fetch(tree)
    return jax.tree.map(lambda x: np.array(x.addressable_data(0))[0], tree)


# Optimizer ----------------------------------------------------------------------------------------


def linear_schedule(peak: float, total_steps: int, warmup_steps: int) -> optax.Schedule:
    """Returns a rate that rises from 0 (in update 0, as published) to `peak`, then falls to 0."""
    decay = optax.linear_schedule(peak, 0.0, max(total_steps - warmup_steps, 1))
    if not warmup_steps:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), decay], [warmup_steps])


def adamw(
    schedule: optax.Schedule,
    config: ModelConfig,
    *,
    weight_decay: float = 0.0,
    clip_norm: float = 1.0,
    epsilon: float = 1e-8,
) -> optax.GradientTransformation:
    """Clips by the global norm of all trained parameters, then applies AdamW (betas 0.9 and 0.999)."""
    return optax.chain(
        optax.clip_by_global_norm(clip_norm),
        scale_by_published_adam(epsilon),
        optax.add_decayed_weights(weight_decay, mask=lambda params: decay_mask(params, config)),
        optax.scale_by_learning_rate(schedule),
    )


def scale_by_published_adam(
    epsilon: float, beta1: float = 0.9, beta2: float = 0.999
) -> optax.GradientTransformation:
    """Adam with epsilon added to the root of the uncorrected second moment.

    `sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + epsilon)`. Compared to `optax.scale_by_adam`, epsilon
    is 30 times larger in the first update, which matters for small gradients, as of word embeddings.
    """

    def init(params: Params) -> optax.ScaleByAdamState:
        # Two trees of zeros, not one twice: a training step donates their buffers.
        mu, nu = optax.tree.zeros_like(params), optax.tree.zeros_like(params)
        return optax.ScaleByAdamState(count=jnp.zeros((), jnp.int32), mu=mu, nu=nu)

    def update(grads: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(grads, state.mu, beta1, 1)
        nu = optax.tree.update_moment_per_elem_norm(grads, state.nu, beta2, 2)
        scale = jnp.sqrt(1 - beta2**count) / (1 - beta1**count)
        updates = jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + epsilon), mu, nu)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def decay_mask(params: Params, config: ModelConfig) -> Any:
    """Returns True where weight decay applies: not to biases, nor, in most backbones, to LayerNorm scales."""

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = [entry.key for entry in path]
        if names[-1] == "scale":
            return config.backbone.decays_layer_norm and "embeddings" not in names
        return names[-1] != "bias"

    return jax.tree_util.tree_map_with_path(decays, params)


def split_params(params: Params, trains: Trains) -> tuple[Params, Params]:
    """Splits a parameter tree into (trained, frozen), so that no gradient is computed for the frozen part."""

    def part(chosen: bool) -> Params:
        encoder = {name: x for name, x in params["encoder"].items() if trains(name) == chosen}
        others = {name: x for name, x in params.items() if name != "encoder" and trains(name) == chosen}
        return {"encoder": encoder, **others}

    return part(True), part(False)


def merge_params(trained: Params, frozen: Params) -> Params:
    """Joins what `split_params` split."""
    return {**frozen, **trained, "encoder": {**frozen["encoder"], **trained["encoder"]}}


def trains_dense(config: ModelConfig) -> Trains:
    """Trains everything but the selectors (fine-tuning)."""
    return lambda name: not name.startswith("selector_")


def trains_selectors(config: ModelConfig) -> Trains:
    """Trains the selectors that the model uses (policy and selector initialization)."""
    used = {f"selector_{stage}" for stage in range(config.num_reductions)}
    return lambda name: name in used


def trains_all(config: ModelConfig) -> Trains:
    """Trains everything that the model uses; a shallow model does not use its second selector."""
    used = trains_selectors(config)
    return lambda name: not name.startswith("selector_") or used(name)

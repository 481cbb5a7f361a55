"""One optimizer update: gradients of a stage's objective, accumulated over micro-batches, and AdamW.

Source: docs/method.md, "Optimizer".
"""

from __future__ import annotations

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
from trbert_jax.training.objectives import Objective, mean_over_examples

# (all parameters, micro-batch, PRNG key of the update, number of the update) -> Objective
ObjectiveFn = Callable[[Params, Batch, jax.Array, jax.Array], Objective]


@struct.dataclass
class TrainState:
    """What an update changes.

    Attributes:
      step: int32 scalar, updates done.
      trained: the parameters this stage trains (see `optimizer.split_params`).
      opt_state: the optimizer's state.
    """

    step: jax.Array
    trained: Params
    opt_state: Any


def init_state(trained: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), trained, optimizer.init(trained))


def update_step(
    objective: ObjectiveFn, optimizer: optax.GradientTransformation, layout: DeviceMesh | None = None
) -> Any:
    """The compiled update of a stage, `(state, frozen, batches, rng) -> (state, metrics)`.

    The loss is the mean over all real examples of the update, however they are divided into
    micro-batches and over devices.

    Args:
      objective: the stage's objective.
      optimizer: its optimizer.
      layout: the devices; None for one. Then `batches` are rows of all devices, `state` is divided as
        `layout.divide` does, or for the strategy pmap both are as `per_device` and `copies` make them.

    Returns:
      A function of `state` before the update (donated), `frozen` parameters that are only read, `batches`,
      arrays [accumulation_steps, batch_size, ...], and `rng`, the stage's key, from which the update's own is
      derived with `state.step`. It returns the state after the update, and metrics: means over examples and
      the gradient's global norm.
    """
    if layout is not None and layout.strategy == "pmap":
        step = functools.partial(train_step, objective, optimizer, add_up=_added_up(_DEVICES))
        return jax.pmap(
            step,
            axis_name=_DEVICES,
            in_axes=(0, 0, 0, None),
            devices=list(layout.mesh.devices.flat),
            donate_argnums=(0,),
        )
    step = functools.partial(train_step, objective, optimizer, layout=layout)
    return jax.jit(step, donate_argnums=(0,))


def train_step(
    objective: ObjectiveFn,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Params,
    batches: Batch,
    rng: jax.Array,
    *,
    add_up: Callable[[Any], Any] | None = None,
    layout: DeviceMesh | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update as a pure function; `update_step` says what it takes and returns.

    `add_up` adds gradients and sums up over devices; `layout` does that and divides the results.
    """

    def gradients(params: tuple[Params, Params], batches: Batch, rng: jax.Array, step: jax.Array) -> Any:
        found = accumulated_gradients(objective, *params, batches, rng, step)
        return add_up(found) if add_up else found

    if layout is not None and not layout.is_single:
        add_up = _added_up(AXES)
        gradients = layout.by_rows(gradients, out_specs=WHOLE, batch_spec=PartitionSpec(None, AXES))
    update_rng = jax.random.fold_in(rng, state.step)
    grads, sums = gradients((state.trained, frozen), batches, update_rng, state.step)

    grads = jax.tree.map(lambda g: g / jnp.maximum(sums["weight"], 1.0), grads)
    if layout is not None:
        grads = layout.keep_divided(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.trained)
    metrics = {**mean_over_examples(sums), "gradient_norm": optax.tree.norm(grads)}
    return TrainState(state.step + 1, optax.apply_updates(state.trained, updates), opt_state), metrics


def accumulated_gradients(
    objective: ObjectiveFn,
    trained: Params,
    frozen: Params,
    batches: Batch,
    rng: jax.Array,
    step: jax.Array,
) -> tuple[Params, dict[str, jax.Array]]:
    """Gradients of the summed loss and `Objective.sums`, one micro-batch after another.

    Args:
      objective: the stage's objective.
      trained, frozen: parameters, with and without a gradient.
      batches: arrays [accumulation_steps, batch_size, ...].
      rng: key of the update.
      step: int32 scalar, number of the update.
    """

    def micro_step(batch: Batch) -> tuple[Params, dict[str, jax.Array]]:
        def loss(trained: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
            params = merge_params(trained, frozen)
            sums = objective(params, batch, rng, step).sums()
            return sums["loss"], sums

        grads, sums = jax.grad(loss, has_aux=True)(trained)
        return grads, sums

    first = jax.tree.map(lambda x: x[0], batches)
    if jax.tree.leaves(batches)[0].shape[0] == 1:
        return micro_step(first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro_step, first))

    def accumulate(carry: Any, batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, micro_step(batch)), None

    total, _ = jax.lax.scan(accumulate, zeros, batches)
    return total


# One update's arrays on the devices -----------------------------------------------------------------


def first_state(trained: Params, optimizer: optax.GradientTransformation, layout: DeviceMesh) -> TrainState:
    """The state before the first update, as `update_step` takes it; `trained` are arrays on the host.

    Made where it lies: divided, no device ever holds all of it.
    """
    if layout.is_single or layout.strategy == "pmap":
        return place_state(init_state(jax.tree.map(jnp.array, trained), optimizer), layout)
    init = functools.partial(init_state, optimizer=optimizer)
    shardings = jax.tree.map(layout.sharding_of, jax.eval_shape(init, trained))
    return jax.jit(init, out_shardings=shardings, donate_argnums=(0,))(layout.divide(trained))


def place_state(state: TrainState, layout: DeviceMesh) -> TrainState:
    """The state as `update_step` takes it."""
    if layout.strategy == "pmap":
        return copies(state, layout)
    if layout.is_single:  # copies of what is on the host: a step writes into its state
        return jax.tree.map(lambda x: jnp.array(x) if isinstance(x, np.ndarray) else x, state)
    return layout.divide(state)


def place_frozen(frozen: Params, layout: DeviceMesh) -> Params:
    """Parameters that are not trained, as `update_step` takes them."""
    return copies(frozen, layout) if layout.strategy == "pmap" else layout.divide(frozen)


def place_batches(batches: Mapping[str, Any], layout: DeviceMesh) -> Batch:
    """Arrays [accumulation_steps, rows of this process, ...], as `update_step` takes them."""
    return (
        per_device(batches, layout) if layout.strategy == "pmap" else layout.place_own_rows(batches, axis=1)
    )


def fetch(tree: Any, layout: DeviceMesh) -> Any:
    """NumPy copies of (a part of) a state, each array once."""
    if layout.strategy == "pmap":
        return jax.tree.map(lambda x: np.array(x.addressable_data(0))[0], tree)
    return layout.fetch(tree)


def copies(tree: Any, layout: DeviceMesh) -> Any:
    """Each array once for each of this process's devices, [devices, ...]."""
    devices = layout.local_devices
    sharding = NamedSharding(Mesh(np.array(devices), (_DEVICES,)), PartitionSpec(_DEVICES))

    def repeated(x: Any) -> jax.Array:
        array = np.asarray(x)
        shape = (len(devices), *array.shape)
        return jax.make_array_from_callback(shape, sharding, lambda index: array[None])

    return jax.tree.map(repeated, tree)


def per_device(batches: Mapping[str, Any], layout: DeviceMesh) -> Batch:
    """[accumulation_steps, own rows, ...] -> [own devices, accumulation_steps, rows of a device, ...]."""
    count = len(layout.local_devices)

    def divided(x: Any) -> np.ndarray:
        array = np.asarray(x)
        return np.moveaxis(array.reshape(array.shape[0], count, -1, *array.shape[2:]), 1, 0)

    return jax.tree.map(divided, batches)


_DEVICES = "devices"


def _added_up(axes: str | tuple[str, ...]) -> Callable[[Any], Any]:
    return functools.partial(jax.lax.psum, axis_name=axes)


Trains = Callable[[str], bool]  # name of a component of the encoder ("layer_3", "head") -> trained?


def linear_schedule(peak: float, total_steps: int, warmup_steps: int) -> optax.Schedule:
    """Learning rate of update t (0-based): from 0 up to `peak` over the warm-up, then down to 0.

    With a warm-up the first update has rate 0, as published.
    """
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
    """Clipping by the global norm of all trained parameters, then AdamW (betas 0.9 and 0.999)."""
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

    `sqrt(1 - beta2^t) / (1 - beta1^t) * m / (sqrt(v) + epsilon)`: against `optax.scale_by_adam`
    this makes epsilon 30 times larger in the first update, which shows wherever gradients are
    small, as in word embeddings.
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
    """Returns True where weight decay applies: not to biases, nor to LayerNorm scales.

    Some backbones decay the scales in their layers (`Backbone.decays_layer_norm`), as published.
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        names = [entry.key for entry in path]
        if names[-1] == "scale":
            return config.backbone.decays_layer_norm and "embeddings" not in names
        return names[-1] != "bias"

    return jax.tree_util.tree_map_with_path(decays, params)


def split_params(params: Params, trains: Trains) -> tuple[Params, Params]:
    """Splits a parameter tree into (trained, frozen), so that no gradient is ever computed for the rest."""
    trained: Params = {"encoder": {}}
    frozen: Params = {"encoder": {}}
    for name, value in params["encoder"].items():
        (trained if trains(name) else frozen)["encoder"][name] = value
    for name, value in params.items():
        if name != "encoder":
            (trained if trains(name) else frozen)[name] = value
    return trained, frozen


def merge_params(trained: Params, frozen: Params) -> Params:
    """Undoes `split_params`."""
    return {**frozen, **trained, "encoder": {**frozen["encoder"], **trained["encoder"]}}


def trains_dense(config: ModelConfig) -> Trains:
    """Fine-tuning: everything but the selectors, which take no part."""
    return lambda name: not name.startswith("selector_")


def trains_selectors(config: ModelConfig) -> Trains:
    """Policy and selector initialization: the selectors that are asked, all else frozen."""
    asked = {f"selector_{stage}" for stage in range(config.num_reductions)}
    return lambda name: name in asked


def trains_all(config: ModelConfig) -> Trains:
    """Joint training: everything that takes part (a shallow model's second selector does not)."""
    asked = trains_selectors(config)
    return lambda name: not name.startswith("selector_") or asked(name)

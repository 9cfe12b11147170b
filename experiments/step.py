"""The optimiser step and the measurement of a model, as pure functions for jit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from experiments.config import OptimizerConfig
from experiments.parallel import BATCH_AXES, shardings
from experiments.tasks import TASKS, Sums, Task

Batch = dict[str, Array]
"""Arrays [B, ...] of a task's data."""
Metrics = dict[str, Float[Array, ""]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """All that changes from step to step on the devices."""

    step: Int[Array, ""]
    """Steps that were taken."""
    parameters: Any
    optimizer: Any
    halted: Bool[Array, ""]
    """True from the first non-finite loss or gradient on: then no step changes anything more, so
    that the parameters stay what they were before it, however late the host looks."""


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW as the configuration says; it decays matrices, not gains, biases or angles."""
    schedule = learning_rate(config, steps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=lambda parameters: jax.tree_util.tree_map_with_path(_is_matrix, parameters),
        ),
    )


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine down to `final_fraction` of the peak at the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / max(config.warmup_steps, 1),
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


def _is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """Whether a parameter is of a linear map or an embedding, as Flax names them."""
    del leaf
    name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
    return name.rpartition("/")[2] in ("kernel", "embedding")


class Trainer:
    """The jitted functions of a run, on one mesh.

    Args:
      model: configuration of the task's model.
      optimizer: configuration of the optimiser.
      mesh: the mesh, current while anything here is called (`parallel.use_mesh`).
      steps: length of the run, for the learning rate's schedule.
      seed: seed of the initial parameters.
      accumulate: parts into which each batch is split, one after the other.
      task: what the model is for.
    """

    def __init__(
        self,
        model: Any,
        optimizer: OptimizerConfig,
        mesh: Mesh,
        *,
        steps: int,
        seed: int = 0,
        accumulate: int = 1,
        task: Task = TASKS["text"],
    ):
        self._task = task
        self._mesh = mesh
        self._accumulate = accumulate
        self._schedule = learning_rate(optimizer, steps)
        self._optimizer = make_optimizer(optimizer, steps)

        def make() -> nnx.Module:
            return task.make_model(model, nnx.Rngs(seed))

        self._graph, _ = nnx.split(nnx.eval_shape(make))

        def initial() -> TrainState:
            _, parameters = nnx.split(make(), nnx.Param)
            return TrainState(
                step=jnp.zeros((), jnp.int32),
                parameters=parameters,
                optimizer=self._optimizer.init(parameters),
                halted=jnp.zeros((), bool),
            )

        shapes = jax.eval_shape(initial)
        self._shardings = shardings(shapes, mesh)
        self.template = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            self._shardings,
        )
        """The state's shapes, dtypes and shardings."""
        self.initial = jax.jit(initial, out_shardings=self._shardings)
        """() -> the state before the first step; the same on every mesh."""
        whole = NamedSharding(mesh, P())
        self.step = jax.jit(self._step, donate_argnums=0, out_shardings=(self._shardings, whole))
        """(state, batch) -> (state, metrics); the state's buffers are reused."""
        self.measure = jax.jit(self._measure, out_shardings=(whole, whole))
        """(parameters, batch) -> (the task's sums by name, number of targets)."""

    def _measure(self, parameters: Any, batch: Batch) -> tuple[Sums, Array]:
        return self._task.sums(nnx.merge(self._graph, parameters), batch)

    def _loss(self, parameters: Any, batch: Batch) -> tuple[Array, tuple[Sums, Array]]:
        sums, count = self._measure(parameters, batch)
        return sums["loss"], (sums, count)

    def _gradients(self, parameters: Any, batch: Batch) -> tuple[Sums, Any]:
        """The means over the batch's targets, and the gradient of the mean loss."""
        gradient = jax.grad(self._loss, has_aux=True)
        if self._accumulate == 1:
            gradients, (sums, count) = gradient(parameters, batch)
        else:
            split = NamedSharding(self._mesh, P(None, BATCH_AXES))

            def parts(x: Array) -> Array:
                # Neighbouring rows go to different parts, so that each part stays spread over
                # the devices that hold the rows.
                x = x.reshape(x.shape[0] // self._accumulate, self._accumulate, *x.shape[1:])
                return jax.lax.with_sharding_constraint(x.swapaxes(0, 1), split)

            def add(total: Any, part: Batch) -> tuple[Any, None]:
                return jax.tree.map(jnp.add, total, gradient(parameters, part)), None

            batch = jax.tree.map(parts, batch)
            part = jax.tree.map(lambda x: x[0], batch)
            shapes = jax.eval_shape(gradient, parameters, part)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (gradients, (sums, count)), _ = jax.lax.scan(add, zeros, batch)
        count = jnp.maximum(count, 1.0)
        return jax.tree.map(lambda x: x / count, (sums, gradients))

    def _step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        means, gradients = self._gradients(state.parameters, batch)
        norm = optax.tree.norm(gradients)
        halted = state.halted | ~(jnp.isfinite(means["loss"]) & jnp.isfinite(norm))
        updates, optimizer = self._optimizer.update(gradients, state.optimizer, state.parameters)
        stepped = TrainState(
            step=state.step + 1,
            parameters=optax.apply_updates(state.parameters, updates),
            optimizer=optimizer,
            halted=halted,
        )
        kept = dataclasses.replace(state, halted=halted)
        state = jax.tree.map(lambda old, new: jnp.where(halted, old, new), kept, stepped)
        return state, {
            **means,
            "gradient_norm": norm,
            "learning_rate": jnp.asarray(self._schedule(kept.step)),
            "halted": halted.astype(jnp.float32),
        }

"""The derivative of `gpu_prepare`: in bfloat16, with a decay for each feature and no delta rule.

With the decays w = exp(W a) of a level, where the zeros and ones of W choose which logarithms a are
summed, scores are P = (w q) (w k)^T where the level joins two blocks, so that with the gradients G
of these the level adds

    dq = w (G (w k)),    dk = w (G^T (w q)),    da = W^T (q dq + k dk)

to the gradients: those of logarithms are no differences of large numbers.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.linear.gpu_call import Call
from pallas_kernels.linear.gpu_features import NOTHING
from pallas_kernels.linear.gpu_prepare import Prepared, own, run, steps_of
from pallas_kernels.linear.gpu_prepare_chunk import (
    LEVELS,
    SQUARE,
    Chunks,
    Plan,
    block,
    chosen,
    diagonal,
    joined,
    of_block,
    prefix,
    rows,
    suffix,
    within,
)
from pallas_kernels.linear.gpu_walk import CHUNK
from pallas_kernels.linear.inputs import LOWEST
from pallas_kernels.tpu import padded, result

TILES = "query", "key", "logs"
"""What the copy engine fetches."""


def serves(
    dtype: DTypeLike, logs: Array | None, beta: Array | None, log_momentum: Array | None
) -> bool:
    """Returns whether the derivative of what is prepared of a call is this kernel's."""
    channels = logs is not None and logs.ndim == 4
    return channels and beta is None and log_momentum is None and dtype == jnp.bfloat16


def gradients(call: Call, d: Prepared) -> dict[str, Float[Array, "B T M _"]]:
    """Returns gradients of features, values and logarithms, as memories have them.

    Args:
      call: what was prepared.
      d: gradients of what was prepared of it.
    """
    batch, tokens, _, size = call.query.shape
    memories, features, chunks = call.memories, gpu.whole(size), tokens // CHUNK
    fill = NOTHING.get(call.feature_map, 0)
    arguments = {name: padded(getattr(call, name), 3, features, fill) for name in TILES[:2]}
    arguments["logs"] = padded(call.logs, 3, features)
    arguments["d_scores"] = d.scores
    arguments |= {
        f"d_{name}": padded(getattr(d, name), 3, features) for name in ("reader", "writer")
    }
    like = result((batch, tokens, memories, features), jnp.float32, like=call.key)
    plan = Plan(
        chunks=chunks,
        steps=steps_of(chunks, memories * batch),
        features=features // gpu.FEATURES,
        values=0,
        stages=2,
        memories=memories,
        heads={name: getattr(call, name).shape[2] for name in ("query", "key")},
        channels=True,
        same=False,
        alone=False,
        delta=False,
        dtype=call.dtype,
        feature_map=call.feature_map,
    )
    scratch = {"tiles": [own(jnp.bfloat16)] * (plan.fine + 2), "out": own(jnp.float32)}
    results, name = dict.fromkeys(TILES, like), "linear_prepare_gradient"
    found = run(_Gradients, plan, arguments, results, scratch, name=name, batch=batch)
    found = {name: array[..., :size] for name, array in found.items()}
    # A chunk's own decay is that of all its tokens.
    whole = jnp.exp(jnp.sum(call.logs.reshape(batch, chunks, CHUNK, memories, size), axis=2))
    of_whole = jnp.repeat(whole * d.decays, CHUNK, axis=1)
    found["logs"] = jnp.where(call.logs > LOWEST, found["logs"] + of_whole, 0)
    return found | {"value": d.value}


class _Gradients(Chunks):
    """The chunks of a warpgroup."""

    def begin(self) -> None:
        """Has nothing to do once."""

    def __call__(self, step: Array, carry: None) -> None:
        """Finds the gradients of a chunk."""
        of_tile = functools.partial(self.of_tile, step)
        self.each(self.plan.features, of_tile, step * self.plan.jobs, [])

    def of_tile(self, step: Array, slot: Array, tile: Array, carry: list[Array]) -> list[Array]:
        """Finds those of a tile of features."""
        self.map(slot, *TILES[:2])
        self.cut_logs(slot)
        d_logs = gpu.matrix(0.0, SQUARE)
        # Both at once would be more than registers hold.
        for name in ("query", "key"):
            gradient, d_logs = self.of(name, step, slot, tile, d_logs)
            self.write(name, gradient, step, tile)
        self.write("logs", d_logs, step, tile)
        return carry

    def of(
        self, name: str, step: Array, slot: Array, tile: Array, d_logs: Array
    ) -> tuple[Array, Array]:
        """Returns the gradient of queries or keys, and d_logs with what comes of it."""
        fine, is_query = self.plan.fine, name == "query"
        other = "key" if is_query else "query"

        def with_logs(d_logs: Array, gradient: Array, mask: Array) -> Array:
            logs = self.put(self.loaded(name, slot) * gradient, fine, 1)
            return gpu.accumulated(d_logs, [chosen(mask)], logs)

        # Of what reads or writes the memory, and of tokens with themselves.
        decay = jnp.exp(self.sums(prefix() if is_query else suffix()))
        gradient = decay * self.given("d_reader" if is_query else "d_writer", step, tile)
        tokens = within(rows(), CHUNK) if is_query else within(0, rows())
        d_logs = with_logs(d_logs, gradient, tokens)
        same = jnp.sum(jnp.where(diagonal(), self.given("d_scores", step), 0), axis=1)
        gradient += gpu.across(same, SQUARE) * self.loaded(other, slot)

        def level(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            gradient, d_logs = carry
            size = jnp.left_shift(jnp.int32(1), i)
            scores = self.put(jnp.where(joined(size), self.given("d_scores", step), 0), fine, 1)
            decay = jnp.exp(self.sums(block(size)))
            others = self.put(self.loaded(other, slot) * decay, fine + 1, 1)
            scores = scores if is_query else gpu.transposed(scores)
            added = decay * gpu.product(scores, others)
            return gradient + added, with_logs(d_logs, added, of_block(size))

        return lax.fori_loop(0, LEVELS, level, (gradient, d_logs))

    def given(self, name: str, step: Array, tile: Array | int = 0) -> Array:
        """Returns a tile of a gradient that is given."""
        columns = pl.ds(tile * gpu.FEATURES, gpu.FEATURES)
        # Addresses that are made ahead of loops take too many registers.
        at = self.batch, self.tokens(lax.optimization_barrier(step)), self.memory, columns
        source = self.arguments[name].at[at]
        return plgpu.load(source, layout=gpu.MATRIX, optimized=False).astype(jnp.float32)

"""Gradients of what chunks of linear attention have as matrices, in bfloat16 on Hopper GPUs.

With the memory S before a chunk and the gradient S' in the memory after it, of readers R, writers
K, what is erased W and scores P, see `gpu_walk`, with values e and the gradients of the output o
and of the values,

    dR = do S^T,    dK = e S'^T,    dW = -de S^T,    dP = do e^T,    dD = sum_v S_v S'_v

so that each memory is read once for all of them.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels import gpu
from pallas_kernels.linear.gpu_chunks import SQUARE, Chunks, Fetch, Plan, own, run, steps_of
from pallas_kernels.linear.gpu_prepare import Prepared
from pallas_kernels.linear.gpu_walk import CHUNK
from pallas_kernels.tpu import padded, result

STATES = "memory", "d_after"
"""What has a matrix of features and values for each chunk."""


def gradients(
    d_out: Float[Array, "B T M V"],
    value: Float[Array, "B T M V"],
    d_value: Float[Array, "B T M V"],
    memory: Float[Array, "B chunks M F V"],
    d_after: Float[Array, "B chunks M F V"],
    x: Prepared,
) -> Prepared:
    """Returns the gradients of what was prepared, but for those of momentum.

    Args:
      d_out: gradients of the outputs.
      value: what is written, corrected by the delta rule.
      d_value: gradients of it.
      memory: before each chunk.
      d_after: gradients in the memory after each chunk.
      x: what was prepared.
    """
    batch, tokens, memories, width = value.shape
    chunks, rows = memory.shape[1], memory.shape[3]
    features, values = gpu.whole(rows), gpu.whole(width)
    arguments = {"d_out": padded(d_out, 3, values), "value": padded(value, 3, values)}
    for name, array in zip(STATES, (memory, d_after), strict=True):
        arguments[name] = padded(padded(array, 4, values), 3, features)
    like = functools.partial(result, like=value)
    by_feature = like((batch, tokens, memories, features), value.dtype)
    results = dict.fromkeys(("reader", "writer"), by_feature)
    results["scores"] = like((batch, tokens, memories, CHUNK), value.dtype)
    if x.decays is not None:
        results["decays"] = like((batch, chunks, memories, features), jnp.float32)
    if x.erase is not None:
        arguments["d_value"] = padded(d_value, 3, values)
        results["erase"] = by_feature
    tiles = values // gpu.FEATURES
    plan = Plan(
        chunks=chunks,
        steps=steps_of(chunks, memories * batch),
        fetches=(
            Fetch(tiles, {name: name for name in ("d_out", "value")}),
            Fetch(features // gpu.FEATURES * tiles, {name: name for name in arguments}),
        ),
        stages=2,
        memories=memories,
        dtype=value.dtype,
        heads={},
        delta=x.erase is not None,
    )
    scratch = {"out": own(plan.dtype)}
    name = "linear_states_products"
    found = run(_OfStates, plan, arguments, results, scratch, name=name, batch=batch)
    names = [name for name in results if name != "scores"]
    found |= {name: found[name][..., :rows] for name in names}
    return Prepared(**{name: found.get(name) for name in Prepared._fields} | {"value": d_value})


class _OfStates(Chunks):
    """Chunks that are products of what the memory is before and after them."""

    def __call__(self, step: Array, carry: None) -> None:
        """Finds the gradients of a chunk."""
        (scores,) = self.each(0, step, self.add_scores, [gpu.matrix(0.0, SQUARE)])
        self.write("scores", scores, step)
        count = self.plan.fetches[1].tiles // self.values

        def of_features(i: Array, carry: None) -> None:
            sums = [gpu.matrix(0.0, SQUARE) for _ in range(2 + self.plan.delta)]
            sums.append(gpu.of_rows(0.0))
            for j in range(self.values):
                sums = self.one(1, step, i * self.values + j, self.add, sums)
            *sums, decays = sums
            for name, gradient in zip(("reader", "writer", "erase"), sums, strict=False):
                self.write(name, -gradient if name == "erase" else gradient, step, i)
            if "decays" in self.results:
                rows = pl.ds(i * gpu.FEATURES, gpu.FEATURES)
                at = self.batch, self.first + step, self.memory, rows
                gpu.store(self.results["decays"].at[at], decays)

        lax.fori_loop(0, count, of_features, None)

    @property
    def values(self) -> int:
        """Returns the number of tiles of values."""
        return self.plan.fetches[0].tiles

    def source(self, name: str, step: Array, tile: Array) -> Any:
        """Returns a tile of an argument: those of values follow each other."""
        row, column = lax.div(tile, self.values), lax.rem(tile, self.values)
        if name not in STATES:
            return super().source(name, step, column)
        rows, columns = (pl.ds(i * gpu.FEATURES, gpu.FEATURES) for i in (row, column))
        at = self.batch, self.first + step, self.memory, rows, columns
        return self.arguments[name].at[at]

    def operand(self, name: str, slot: Array) -> list[Any]:
        """Returns what has been fetched, for the matrix units."""
        return [self.scratch[name].at[slot]]

    def add_scores(self, step: Array, slot: Array, tile: Array, scores: list[Array]) -> list[Array]:
        """Adds what a tile of values adds to the gradients of scores."""
        left, right = self.operand("d_out", slot), self.operand("value", slot)
        return [gpu.accumulated(scores[0], left, gpu.transposed(right))]

    def add(self, slot: Array, tile: Array, sums: list[Array]) -> list[Array]:
        """Adds what a tile of memories adds to the gradients of features, and of decays."""
        *sums, decays = sums
        pairs = [("d_out", "memory"), ("value", "d_after"), ("d_value", "memory")]
        for i, (name, of) in enumerate(pairs[: len(sums)]):
            left, right = self.operand(name, slot), self.operand(of, slot)
            sums[i] = gpu.accumulated(sums[i], left, gpu.transposed(right))
        if "decays" in self.results:
            dots = (self.loaded(name, slot) for name in STATES)
            decays += jnp.sum(math.prod(dots), axis=1)
        return [*sums, decays]

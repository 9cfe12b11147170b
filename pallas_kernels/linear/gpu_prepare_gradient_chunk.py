"""What a warpgroup of the kernels in `gpu_prepare_gradient` computes.

**The delta rule** has an inverse X of 1 + L, with L_ij = beta_i R_ij of the scores R among keys:
U = X diag(beta) V and W = X diag(beta) R_k, where R_k are the keys as they read the memory before
the chunk. With the gradients of U and W, and E = V - R U, F = R_k - R W, so that U = diag(beta) E,

    G_u = X^T dU,    dV = diag(beta) G_u,
    G_w = X^T dW,    dR_k = diag(beta) G_w,
    dR = -diag(beta) (G_u U^T + G_w W^T),    dbeta_i = sum_v G_u,iv E_iv + sum_f G_w,if F_if

of which what is below the diagonal counts. A beta of 0 is a small number here, to divide by.

**Scores** with a decay for each feature are sums over levels (see `gpu_prepare_chunk`). With the
decays w = exp(Z a) of a level, where the zeros and ones of Z choose which logarithms a are summed,
P = (w q) (w k)^T where the level joins two blocks, so that with the gradients G of these the level
adds

    dq = w (G (w k)),    dk = w (G^T (w q)),    da = Z^T (q dq + k dk)

to the gradients: those of logarithms are no differences of large numbers. With a decay D_ij for
all features the gradient in the logarithm of token t is the sum of D_ij (q_i k_j) G_ij over
i >= t > j, which the matrix units sum over i.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import gpu
from pallas_kernels.linear.gpu_chunks import SQUARE
from pallas_kernels.linear.gpu_prepare_chunk import (
    LEVELS,
    Decayed,
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


class OfErased(Decayed):
    """What is erased and written by the delta rule."""

    def __call__(self, step: Array, carry: None) -> None:
        """Finds the gradients of a chunk."""
        for i in range(2):
            self.put(self.given("inverse", step, i), i, 1)
        carry = [gpu.matrix(0.0, SQUARE), gpu.of_rows(0.0)]
        carry = self.each(0, step, functools.partial(self.of_tile, "value"), carry)
        d_scores, d_beta = self.each(1, step, functools.partial(self.of_tile, "erased"), carry)
        beta = self.beta(step)
        target = self.results["beta"].at[self.batch, self.memory, self.tokens(step)]
        gpu.store(target, d_beta / beta)
        d_scores = jnp.where(within(0, rows()), -gpu.across(beta, SQUARE) * d_scores, 0)
        self.write("among_keys", d_scores, step)

    def of_tile(
        self, name: str, step: Array, slot: Array, tile: Array, carry: list[Array]
    ) -> list[Array]:
        """Finds those of a tile of values or features."""
        d_scores, d_beta = carry
        given, found = (self.scratch[x].at[slot] for x in ("query", "key"))
        gradient = gpu.product(gpu.transposed(self.own("tiles")), [given])
        d_beta += jnp.sum(gradient * self.loaded("key", slot), axis=1)
        left = [gradient.astype(jnp.bfloat16)]
        d_scores += gpu.product(left, gpu.transposed([found]))
        self.write(name, gradient * gpu.across(self.beta(step), SQUARE), step, tile)
        return [d_scores, d_beta]


class OfTokens(Decayed):
    """What is prepared with a decay of each token, or with none."""

    def __call__(self, step: Array, carry: None) -> None:
        """Finds the gradients of a chunk."""
        of_logs = "logs" in self.results
        self.put(self.weighted("d_scores", step), 0, 1)
        self.put(self.weighted("d_among_keys", step), 1, 1)
        carry = [gpu.of_rows(0.0), gpu.of_rows(0.0), gpu.matrix(0.0, SQUARE)]
        carry = self.each(0, step, self.of_tile, carry if of_logs else [])
        if not of_logs:
            return
        since, until, terms = carry
        sums = gpu.product([chosen(within(rows(), CHUNK))], self.put(terms, 2, 2))
        between = jnp.sum(jnp.where(within(0, rows()), sums, 0), axis=1)
        for i, numbers in enumerate((since, until, between)):
            target = self.results["logs"].at[self.batch, self.memory, i, self.tokens(step)]
            gpu.store(target, numbers)

    def of_tile(self, step: Array, slot: Array, tile: Array, carry: list[Array]) -> list[Array]:
        """Finds those of a tile of features."""
        self.map(slot, "query", "key")
        at = lax.optimization_barrier(slot)
        query, key = ([self.scratch[name].at[at]] for name in ("query", "key"))
        scores, among_keys = ([matrix] for matrix in self.own("tiles")[:2])

        gradient = self.decayed_gradient("since", "d_reader", step, tile)
        since = jnp.sum(self.loaded("query", slot) * gradient, axis=1)
        self.write("query", gpu.accumulated(gradient, scores, key), step, tile)

        gradient = self.decayed_gradient("since", "d_erased", step, tile)
        since += jnp.sum(self.loaded("key", slot) * gradient, axis=1)
        writer = self.decayed_gradient("until", "d_writer", step, tile)
        until = jnp.sum(self.loaded("key", slot) * writer, axis=1)
        gradient = gpu.accumulated(gradient + writer, gpu.transposed(scores), query)
        for left in (among_keys, gpu.transposed(among_keys)):
            gradient = gpu.accumulated(gradient, left, key)
        self.write("key", gradient, step, tile)
        if not carry:
            return carry
        terms = carry[2]
        for left, weights in ((query, scores), (key, among_keys)):
            terms += gpu.loaded(weights) * gpu.product(left, gpu.transposed(key))
        return [carry[0] + since, carry[1] + until, terms]

    def decayed_gradient(self, decay: str, name: str, step: Array, tile: Array) -> Array:
        """Returns a gradient of features, of that of features with decays."""
        gradient = self.given(name, step, tile)
        if "numbers" not in self.arguments:
            return gradient
        return gradient * gpu.across(self.number(step, decay), SQUARE)

    def weighted(self, name: str, step: Array) -> Array:
        """Returns the gradients of scores without decays."""
        scores = self.given(name, step)
        if "numbers" in self.arguments:
            scores *= self.between(step)
        # Above the diagonal decays may be infinite.
        return jnp.where(prefix(), scores, 0)


class OfChannels(Decayed):
    """What is prepared with a decay of each token and feature."""

    def __call__(self, step: Array, carry: None) -> None:
        """Finds the gradients of a chunk."""
        self.each(0, step, self.of_tile, [])

    def of_tile(self, step: Array, slot: Array, tile: Array, carry: list[Array]) -> list[Array]:
        """Finds those of a tile of features."""
        self.map(slot, "query", "key")
        self.cut_logs(slot)
        d_logs = gpu.matrix(0.0, SQUARE)
        # Both at once would be more than registers hold.
        for name in ("query", "key"):
            d_logs = self.of(name, step, slot, tile, d_logs)
        self.write("logs", d_logs, step, tile)
        return carry

    def of(self, name: str, step: Array, slot: Array, tile: Array, d_logs: Array) -> Array:
        """Writes the gradient of queries or keys, and returns d_logs with what comes of it."""
        fine, is_query = self.plan.fine, name == "query"
        other = "key" if is_query else "query"

        def with_logs(d_logs: Array, gradient: Array, mask: Array) -> Array:
            logs = self.put(self.loaded(name, slot) * gradient, fine, 1)
            return gpu.accumulated(d_logs, [chosen(mask)], logs)

        # It is in SMEM, as with the decays it would be more than registers hold.
        total = self.own("out")
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        same = jnp.sum(jnp.where(diagonal(), self.given("d_scores", step), 0), axis=1)
        total[...] = gpu.across(same, SQUARE) * self.loaded(other, slot)

        def add(gradient: Array) -> None:
            total = self.own("out")
            total[...] = plgpu.load(total, layout=gpu.MATRIX) + gradient

        # Of what reads or writes the memory.
        uses = [("d_reader", prefix(), within(rows(), CHUNK))]
        if not is_query:
            uses = [("d_writer", suffix(), within(0, rows()))]
            if self.plan.delta:
                uses.append(("d_erased", prefix(), within(rows(), CHUNK)))
        for use, tokens, of_token in uses:
            gradient = jnp.exp(self.sums(tokens)) * self.given(use, step, tile)
            add(gradient)
            d_logs = with_logs(d_logs, gradient, of_token)

        def scores_of(name: str, size: Array) -> list[Any]:
            scores = jnp.where(joined(size), self.given(name, step), 0)
            return self.put(scores, fine, 1)

        def level(i: Array, d_logs: Array) -> Array:
            size = jnp.left_shift(jnp.int32(1), i)
            scores = scores_of("d_scores", size)
            decay = jnp.exp(self.sums(block(size)))
            others = self.put(self.loaded(other, slot) * decay, fine + 1, 1)
            gradient = gpu.product(scores if is_query else gpu.transposed(scores), others)
            if self.plan.delta and not is_query:  # keys are both
                scores = scores_of("d_among_keys", size)
                keys = self.put(self.loaded(name, slot) * decay, fine + 1, 1)
                for left in (scores, gpu.transposed(scores)):
                    gradient += gpu.product(left, keys)
            gradient *= decay
            add(gradient)
            return with_logs(d_logs, gradient, of_block(size))

        d_logs = lax.fori_loop(0, LEVELS, level, d_logs)
        plgpu.commit_smem()
        columns = pl.ds(tile * gpu.FEATURES, gpu.FEATURES)
        at = self.batch, self.tokens(step), self.memory, columns
        plgpu.copy_smem_to_gmem(self.own("out"), self.results[name].at[at])
        return d_logs

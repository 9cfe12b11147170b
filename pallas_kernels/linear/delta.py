"""The delta rule in a chunk: what each token writes is what the memory before it got wrong.

With P the scores among keys, P_ij = k_i D_ij k_j, and p_i what key i reads from the memory before
the chunk, both up to the token before i, the corrections E of the values V are

    e_i = beta_i (v_i - p_i - sum_{j<i} P_ij e_j),    (1 + diag(beta) P) E = diag(beta) (V - p)

With E in the place of the values a chunk is one of linear attention (Yang et al. 2024, by the WY
representation of products of Householder matrices).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear import blocks
from pallas_kernels.linear.gates import Gate, Memories


def corrections(
    gate: Gate,
    key: Float[Array, "B K C H"],
    value: Float[Array, "B K G|1 C V"],
    beta: Float[Array, "B K G C 1"],
    memories: Memories,
) -> Float[Array, "B K G C V"]:
    """Returns E."""
    before, as_query = gate.before(), key[:, :, None]
    lower = jnp.tril(beta * before.scores(as_query, key), -1)
    wrong = beta * (value - before.read(as_query, memories))
    return jnp.matmul(blocks.inverse(lower), wrong, precision="highest")

"""Feature maps: what queries and keys become before they meet the memory.

    elu            max(x, 0) + min(exp(x) - 1, 0)                 Qin et al. 2022 (TransNormer)
    elu_plus_one   elu(x) + 1                                     Katharopoulos et al. 2020
    relu           max(x, 0)
    taylor         [1, y, y_i y_i / sqrt(2), y_i y_j (i < j)],    y = x / H^(1/4)

The products of the last are the Taylor polynomial of softmax's exponential, 1 + s + s^2 / 2 with
s = q . k / sqrt(H) (Zhang et al. 2024, "Hedgehog"; Arora et al. 2024, "BASED"), on
1 + H + H (H + 1) / 2 features, in the order i, then j >= i. Implementations expand no more tokens
at a time than they hold in a chunk.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.linear import products


def taylor(x: Float[Array, "... H"]) -> Float[Array, "... F"]:
    """Returns the features whose products are 1 + s + s^2 / 2."""
    size = x.shape[-1]
    y = x / size**0.25
    squares = [
        y[..., i : i + 1] * jnp.concatenate([y[..., i : i + 1] / np.sqrt(2), y[..., i + 1 :]], -1)
        for i in range(size)
    ]
    return jnp.concatenate([jnp.ones_like(x[..., :1]), y, *squares], axis=-1)


def taylor_products(size: int) -> tuple[list[tuple[int, int]], Float[np.ndarray, "F"]]:
    """Returns of which two of [x, 1] each feature is the product, and times what."""
    pairs = [(i, j) for i in range(size) for j in range(i, size)]
    root = size**-0.25
    scales = [1, *[root] * size, *(root**2 * (np.sqrt(0.5) if i == j else 1) for i, j in pairs)]
    pairs = [(size, size), *((i, size) for i in range(size)), *pairs]
    return pairs, np.array(scales, np.float32)


def taylor_size(features: int) -> int:
    """Returns the size of x that has so many features."""
    return (math.isqrt(8 * features + 1) - 3) // 2


MAPS = {
    "elu": lambda x: jnp.where(x > 0, x, jnp.expm1(jnp.minimum(x, 0))),
    "elu_plus_one": lambda x: jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0))),
    "relu": jax.nn.relu,
    "taylor": taylor,
}
"""By name, functions of the last dimension."""


def mapped(name: str | None, x: Float[Array, "... H"]) -> Float[Array, "... F"]:
    """Returns the features of queries or keys."""
    return x if name is None else MAPS[name](x)


def count(name: str | None, size: int) -> int:
    """Returns the number of features that `size` numbers are mapped to."""
    return 1 + size + size * (size + 1) // 2 if name == "taylor" else size


def scores(
    name: str | None, query: Float[Array, "B K G C F"], key: Float[Array, "B K C F"]
) -> Float[Array, "B K G C C"]:
    """Returns the products of features, for "taylor" from those of degree 1."""
    if name != "taylor":
        return products.scores(query, key)
    size = taylor_size(query.shape[-1])
    s = products.scores(query[..., 1 : size + 1], key[..., 1 : size + 1])
    return 1 + s + s**2 / 2

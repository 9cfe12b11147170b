"""SOFT: attention with a Gaussian kernel in place of a softmax, by a few landmarks."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from attention.catalogue import Mechanism
from attention.grid import checked_shape, pooled, sizes_by_axis
from pallas_kernels.checks import check_arrays
from pallas_kernels.choose import resolve_implementation

NUM_LANDMARKS = 49
"""Of the released models at 224 pixels: 7 x 7."""

STEPS = 20
"""Newton's, as published."""

EXACT = jax.lax.Precision.HIGHEST
"""Of all products: an inverse enlarges their errors."""


def soft_attention(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B S K H"],
    value: Float[ArrayLike, "B S K V"],
    *,
    shape: tuple[int, ...] | None = None,
    num_landmarks: int | tuple[int, ...] | None = None,
    landmarks: Float[ArrayLike, "B m N H"] | None = None,
    normalise: bool = False,
    ridge: float | None = None,
    inverse: Literal["newton", "solve"] = "newton",
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Attention with weights G(q_i, k_j), of no softmax, approximated by landmarks.

    With m landmarks l, means of the queries over parts of the sequence or image, for every head

        G(a, b) = exp(-scale |a - b|^2 / 2)
        P_ia = G(q_i, l_a),   A_ab = G(l_a, l_b),   R_aj = G(l_a, k_j)
        o = P A^+ R v                                                                  SOFT
        o = P D^(-1/2) A^+ D^(-1/2) R v,   D = diag of the row sums of A               SOFT++

    which, where queries are keys and all of them are landmarks, is G v for an A^+ that is the
    inverse. The published model ties keys to queries. A^+ is what 20 of Newton's steps
    Y <- 2 Y - Y A' Y make of a multiple of A' = A + ridge I, at most that of 1.8 (SOFT++: 2) over
    the square of the largest row sum. That is the inverse where the least eigenvalue of A' is not
    below some 4e-3 of the largest row sum, and less than it in the directions of smaller ones:
    where landmarks are alike, or H is small. `inverse="solve"` is exact, as far as float32 goes.

    Gradients are those of the inverse, dA = -Y^T dY Y^T, with no residuals of the steps; SOFT++ is,
    as published, differentiated through them. O(T m H + m^3) time, O(T m) memory. Everything is in
    float32, or float64 for float64 queries. Plain JAX. Not causal, and packed documents are not
    taken: landmarks are of a whole row.

    The released code takes the largest row sum over the batch and all heads, by which an output
    depends on its neighbours in the batch; here it is that of each matrix. Its landmarks are made
    by a convolution, a norm and a GELU of queries divided by H^(1/4), and a depthwise convolution
    of the values is added to the output: both belong to layers, which pass `landmarks`, with such
    queries and keys and a scale of 1.

    Source: Lu et al., SOFT: Softmax-free Transformer with Linear Complexity (2021), and, SOFT++,
    Softmax-free Linear Transformers (2022).

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise.
      shape: of the tokens of query, such as (height, width); None for a sequence.
      num_landmarks: number of landmarks on each axis of the shape, and at most its tokens; None for
        49 of a sequence, 7 x 7 of an image, 4 x 4 x 4 of a video.
      landmarks: landmarks to use in place of pooled queries.
      normalise: whether A^+ is normalised, as in SOFT++.
      ridge: what is added to the diagonal; None for 0.01, and for 0 where normalised.
      inverse: "newton" as published, or "solve".
      scale: of squared distances; None for 1 / sqrt(H).
      implementation: None, "reference" or "xla", which are the same.

    Returns:
      The output in query's dtype.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> query, value = jax.random.normal(jax.random.key(0), (2, 2, 14 * 14, 4, 8))
      >>> out = soft_attention(query, query, value, shape=(14, 14))
      >>> out.shape
      (2, 196, 4, 8)
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value)
    available = {name: lambda: None for name in ("xla", "reference")}
    resolve_implementation(implementation, available, function="soft_attention")
    if inverse not in ("newton", "solve"):
        raise ValueError(f"inverse: must be 'newton' or 'solve'; got {inverse!r}")
    batch, tokens, heads, features = query.shape
    dtype = query.dtype
    query, key, value = (
        x.astype(jnp.promote_types(dtype, jnp.float32)) for x in (query, key, value)
    )
    if landmarks is None:
        shape = checked_shape(shape, tokens)
        if num_landmarks is None:
            num_landmarks = round(NUM_LANDMARKS ** (1 / len(shape)))
        sizes = sizes_by_axis("num_landmarks", num_landmarks, shape)
        sizes = tuple(map(min, sizes, shape))
        landmarks = pooled(query, shape, sizes)
    elif shape is not None or num_landmarks is not None:
        raise ValueError("landmarks: are given, so there is no shape nor num_landmarks")
    landmarks = jnp.asarray(landmarks)
    wanted = batch, heads, features
    if landmarks.ndim != 4 or (landmarks.shape[0], *landmarks.shape[2:]) != wanted:
        raise ValueError(
            f"landmarks: must be [{batch}, m, {heads}, {features}]; got shape {landmarks.shape}"
        )
    landmarks = landmarks.astype(query.dtype)
    scale = features**-0.5 if scale is None else scale
    ridge = (0.0 if normalise else 0.01) if ridge is None else ridge

    key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
    gathered = jnp.einsum(
        "bnsa,bsnv->bnav", _gaussian(key, landmarks, scale), value, precision=EXACT
    )
    kernel = _gaussian(landmarks, landmarks, scale)
    out = _inverted(kernel, gathered, normalise, ridge, inverse)
    out = jnp.einsum("bnta,bnav->btnv", _gaussian(query, landmarks, scale), out, precision=EXACT)
    return out.astype(dtype)


def _gaussian(
    a: Float[Array, "B T N H"], b: Float[Array, "B m N H"], scale: float
) -> Float[Array, "B N T m"]:
    """Returns exp(-scale |a - b|^2 / 2) of all pairs."""
    # Around the same point, so that as little as can be is lost in the difference of squares.
    middle = jax.lax.stop_gradient(jnp.mean(b, axis=1, keepdims=True))
    same, a, b = a is b, a - middle, b - middle
    products = jnp.einsum("btnh,bmnh->bntm", a, b, precision=EXACT)
    squares = [jnp.moveaxis(jnp.sum(x * x, axis=3), 1, 2) for x in (a, b)]
    distances = squares[0][..., None] + squares[1][:, :, None] - 2 * products
    if same:
        # A landmark is at no distance from itself.
        distances = jnp.where(jnp.eye(a.shape[1], dtype=bool), 0, distances)
    return jnp.exp(-scale / 2 * jnp.maximum(distances, 0))


def _inverted(
    kernel: Float[Array, "B N m m"],
    x: Float[Array, "B N m V"],
    normalise: bool,
    ridge: float,
    inverse: str,
) -> Float[Array, "B N m V"]:
    """Returns A^+ x, normalised or not."""
    sums = jnp.sum(kernel, axis=-1, keepdims=True)
    roots = jax.lax.rsqrt(sums)
    raised = kernel + ridge * jnp.eye(kernel.shape[-1], dtype=kernel.dtype)
    x = x * roots if normalise else x
    if inverse == "solve":
        out = jnp.linalg.solve(raised, x)
    else:
        largest = jax.lax.stop_gradient(jnp.max(sums, axis=-2, keepdims=True))
        if normalise:
            found = _steps(raised, _halved(raised, 2 / largest**2))
        else:
            found = _newton(raised, 1.8 / largest**2)
        out = jnp.matmul(found, x, precision=EXACT)
    return out * roots if normalise else out


def _halved(matrix: Float[Array, "*B m m"], factor: Float[Array, "*B 1 1"]) -> Array:
    """Returns the factors, halved up to ten times until Newton's steps from there converge."""
    matrix = jax.lax.stop_gradient(matrix)
    square = jnp.matmul(matrix, matrix, precision=EXACT)
    one = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)

    def halved(_: int, factor: Array) -> Array:
        columns = jnp.sum(jnp.abs(one - factor * square), axis=-2, keepdims=True)
        far = jnp.max(columns, axis=-1, keepdims=True) > 1.01
        return jnp.where(far, factor / 2, factor)

    return jax.lax.fori_loop(0, 10, halved, factor)


def _steps(matrix: Float[Array, "*B m m"], factor: Float[Array, "*B 1 1"]) -> Array:
    """Returns what Newton's steps make of a multiple of a symmetric matrix: about its inverse."""

    def step(found: Array, _: None) -> tuple[Array, None]:
        product = jnp.matmul(matrix, found, precision=EXACT)
        return 2 * found - jnp.matmul(found, product, precision=EXACT), None

    return jax.lax.scan(step, factor * matrix, length=STEPS)[0]


@jax.custom_vjp
def _newton(matrix: Float[Array, "*B m m"], factor: Float[Array, "*B 1 1"]) -> Array:
    """Returns `_steps`, with the gradient of the inverse."""
    return _steps(matrix, factor)


def _newton_forward(matrix: Array, factor: Array) -> tuple[Array, tuple[Array, Array]]:
    found = _steps(matrix, factor)
    return found, (found, jnp.zeros_like(factor))


def _newton_backward(residuals: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    found, zeros = residuals
    turned = jnp.swapaxes(found, -1, -2)
    inner = jnp.matmul(turned, cotangent, precision=EXACT)
    return -jnp.matmul(inner, turned, precision=EXACT), zeros


_newton.defvjp(_newton_forward, _newton_backward)


RECORD = Mechanism(
    slug="soft_attention",
    title="Softmax-free Linear Transformers",
    year=2022,
    family="linear",
    patterns=frozenset({"self non-causal", "cross non-causal"}),
    time="O(T)",
    memory="O(T)",
    kernel=None,
    has_weights=False,
    function=soft_attention,
    small={"num_landmarks": 4},
)

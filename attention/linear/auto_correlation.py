"""Auto-correlation (Autoformer): values of a series, shifted by its best lags and added up."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from attention.catalogue import Mechanism
from pallas_kernels.checks import check_arrays, check_positive
from pallas_kernels.choose import resolve_implementation


def auto_correlation(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B S K H"],
    value: Float[ArrayLike, "B S K V"],
    *,
    factor: float = 1.0,
    lags: Literal["row", "batch", "channel"] = "row",
    fit: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N V"]:
    """Attends to the lags at which a series is most like itself, not to tokens.

    With all times modulo T, for every channel c of every head,

        R_c(tau) = sum_t q_tc k_(t - tau)c
        o_t = sum_i w_i v_(t + tau_i),    w = softmax_i R(tau_i),    i = 1 .. L

    where tau_i are the L lags with the largest R, L = int(factor ln T) and at least 1. R is, by
    `lags`,

        "row"      the mean of R_c over all channels and heads: as the published model infers
        "batch"    the same, but the lags are the best of its mean over the batch: as the published
                   model trains. An output then depends on the other rows of the batch
        "channel"  R_c, so that every channel has lags of its own: its full form. V is H then

    R comes of Fourier transforms, in O(T log T) time; the values are shifted one lag after the
    other, in O(T) memory. R and sums are float32, or float64 for float64 queries. Derivatives exist
    of the weights, none of the choice of lags. Plain JAX.

    There is no scale, and no mask: it is not causal, as published also in the decoder, and packed
    documents are not taken, as a series goes around.

    Source: Wu et al., Autoformer: Decomposition Transformers with Auto-Correlation for Long-Term
    Series Forecasting (2021).

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads.
      value: likewise.
      factor: how many lags, in multiples of ln T; 1 by default as published.
      lags: "row", "batch" or "channel".
      fit: whether keys and values of another number of tokens are cut, or filled up with zeros, to
        T, as for cross-attention; otherwise S must be T.
      implementation: None, "xla", or "reference", which sums R up directly in O(T^2) memory.

    Returns:
      The output in query's dtype.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 96, 4, 8))
      >>> out = auto_correlation(query, key, value)
      >>> out.shape
      (2, 96, 4, 8)
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value, same_tokens=not fit)
    available = {name: lambda: None for name in ("xla", "reference")}
    name = resolve_implementation(implementation, available, function="auto_correlation")
    if lags not in ("row", "batch", "channel"):
        raise ValueError(f"lags: must be 'row', 'batch' or 'channel'; got {lags!r}")
    if not isinstance(factor, int | float) or factor <= 0:
        raise ValueError(f"factor: must be a positive number; got {factor!r}")
    if lags == "channel" and value.shape[3] != query.shape[3]:
        raise ValueError(
            f"value: must have the {query.shape[3]} channels of query for lags 'channel'; got "
            f"{value.shape[3]}"
        )
    tokens, heads = query.shape[1:3]
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    key, value = (jnp.repeat(_fitted(x, tokens), heads // x.shape[2], axis=2) for x in (key, value))
    found = (_correlated if name == "xla" else _summed)(
        query.astype(dtype), key.astype(dtype), each=lags == "channel"
    )

    # Lags are last, [B, T] or [B, N, V, T]. A sort, unlike `top_k`, is partitioned.
    ranked = jax.lax.stop_gradient(found)
    if lags == "batch":
        ranked = jnp.broadcast_to(jnp.mean(ranked, axis=0, keepdims=True), ranked.shape)
    count = min(max(int(factor * math.log(tokens)), 1), tokens)
    chosen = jnp.argsort(ranked, axis=-1, descending=True)[..., :count].astype(jnp.int32)
    weights = jax.nn.softmax(jnp.take_along_axis(found, chosen, axis=-1), axis=-1)
    return _shifted_sum(value, weights, chosen).astype(query.dtype)


def _fitted(x: Float[Array, "B S K H"], tokens: int) -> Float[Array, "B T K H"]:
    x = x[:, :tokens]
    return jnp.pad(x, ((0, 0), (0, tokens - x.shape[1]), (0, 0), (0, 0)))


def _correlated(
    query: Float[Array, "B T N H"], key: Float[Array, "B T N H"], *, each: bool
) -> Float[Array, "B T"] | Float[Array, "B N H T"]:
    """Returns R at all lags, of each channel or as the mean of all."""
    spectrum = jnp.fft.rfft(query, axis=1) * jnp.conj(jnp.fft.rfft(key, axis=1))
    spectrum = jnp.moveaxis(spectrum, 1, -1) if each else jnp.mean(spectrum, axis=(2, 3))
    return jnp.fft.irfft(spectrum, n=query.shape[1], axis=-1)


def _summed(
    query: Float[Array, "B T N H"], key: Float[Array, "B T N H"], *, each: bool
) -> Float[Array, "B T"] | Float[Array, "B N H T"]:
    """Returns what `_correlated` does, by its definition."""
    time = jnp.arange(query.shape[1])
    shifted = key[:, (time[:, None] - time) % query.shape[1]]
    found = jnp.einsum("btnh,btlnh->bnhl", query, shifted, precision=jax.lax.Precision.HIGHEST)
    return found if each else jnp.mean(found, axis=(1, 2))


def _shifted_sum(
    value: Float[Array, "B T N V"],
    weights: Float[Array, "B *dims L"],
    lags: Int[Array, "B *dims L"],
) -> Float[Array, "B T N V"]:
    """Returns sum_i w_i v_(t + lag_i), of all channels of a row or of each."""
    time = jnp.arange(value.shape[1], dtype=jnp.int32)[:, None, None]

    # Shifted values are made again in the backward: there would be as many as lags.
    @jax.checkpoint
    def term(value: Array, weight: Array, lag: Array) -> Array:
        lag = lag.reshape(lag.shape[0], 1, *(lag.shape[1:] or (1, 1)))
        shifted = jnp.take_along_axis(value, (time + lag) % value.shape[1], axis=1)
        return weight.reshape(lag.shape) * shifted.astype(weight.dtype)

    def add(out: Array, one: tuple[Array, Array]) -> tuple[Array, None]:
        return out + term(value, *one), None

    each = tuple(jnp.moveaxis(x, -1, 0) for x in (weights, lags))
    return jax.lax.scan(add, jnp.zeros_like(value, weights.dtype), each)[0]


def series_decomposition(
    x: Float[ArrayLike, "B T *dims"], window: int = 25
) -> tuple[Float[Array, "B T *dims"], Float[Array, "B T *dims"]]:
    """Splits a series into its moving average, the trend, and the rest, its seasonal part.

    The window lies around each time, with one more after than before it if it is even; beyond the
    ends, the first and the last value stand.

    Source: as for `auto_correlation`. There an even window makes the trend one shorter.

    Args:
      x: float array.
      window: times in an average, 25 by default as published.

    Returns:
      The seasonal part and the trend, which add up to x, in its dtype; sums are in float32 or
      better.

    Raises:
      TypeError, ValueError: an argument does not fit; the message names it.

    Example:
      >>> seasonal, trend = series_decomposition(jnp.arange(8.0).reshape(1, 8, 1), window=3)
      >>> trend[0, 1:-1, 0].round(2).tolist()
      [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    """
    x = jnp.asarray(x)
    check_positive(window=window)
    if x.ndim < 2:
        raise ValueError(f"x: must be [B, T, ...]; got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x: must be floating point; got {x.dtype}")
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    before = (window - 1) // 2
    rest = ((0, 0),) * (x.ndim - 2)
    padded = jnp.pad(wide, ((0, 0), (before, window - 1 - before), *rest), mode="edge")
    size = (1, window, *(1 for _ in rest))
    sums = jax.lax.reduce_window(padded, 0.0, jax.lax.add, size, (1,) * x.ndim, "VALID")
    trend = sums / window
    return (wide - trend).astype(x.dtype), trend.astype(x.dtype)


RECORD = Mechanism(
    slug="auto_correlation",
    title="Autoformer: Decomposition Transformers with Auto-Correlation for Long-Term Series "
    "Forecasting",
    year=2021,
    family="linear",
    patterns=frozenset({"self non-causal"}),
    time="O(T log T)",
    memory="O(T)",
    kernel=None,
    has_weights=False,
    function=auto_correlation,
    extras=(series_decomposition,),
)

"""What the walks of linear attention on Hopper GPUs are made for: a call, cut up in time."""

import functools
import operator
from contextlib import AbstractContextManager
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from pallas_kernels import gpu
from pallas_kernels.chunks import joined
from pallas_kernels.linear import features, products
from pallas_kernels.linear.gpu_walk import CHUNK, Walk, walk
from pallas_kernels.linear.inputs import GRID, LOWEST, Inputs, Options
from pallas_kernels.tpu import padded

SHORTEST = 16
"""Chunks that a span has at least, as to find what it begins with takes half as long again."""


WORTH = 2
"""How many times as many spans there are as walks in all, where a walk through the unit matrix has
to find what they leave of the memory."""


class Spans(NamedTuple):
    """How a call is cut in time, in chunks."""

    chunks: int
    span: int
    """Of a span but the last: groups of those that are kept."""
    kept: int
    """From one state that is kept to the next."""

    @property
    def count(self) -> int:
        """Returns the number of spans."""
        return -(-self.chunks // self.span)

    @classmethod
    def of(cls, options: Options, x: Inputs) -> "Spans":
        """Returns more than one where batch and memories are too few for a GPU.

        Each of its processors has a block of a walk at a time.
        """
        chunks, kept = -(-x.query.shape[1] // CHUNK), options.kept // CHUNK
        blocks = x.query.shape[0] * x.heads * -(-x.value.shape[3] // (2 * CHUNK))
        count = max(min(gpu.processors() // blocks, chunks // SHORTEST), 1)
        groups = -(-chunks // kept)
        return cls(chunks, -(-groups // count) * kept, kept)

    def starts(self, kept: Float[Array, "B count M F V"]) -> Float[Array, "B P M F V"]:
        """Returns what spans begin with, of the states that were kept."""
        return kept[:, :: self.span // self.kept]


class Call(NamedTuple):
    """The arrays of a call, in whole chunks of 64 tokens.

    Features, unless kernels are to make them; and where outputs are divided by the sums of weights,
    more values, of 1, whose outputs are these sums.
    """

    query: Float[Array, "B T N F"]
    key: Float[Array, "B T K F"]
    value: Float[Array, "B T L V"]
    logs: Float[Array, "B|1 64 M"] | Float[Array, "B T M"] | Float[Array, "B T M F"] | None
    """Logarithms of decays, which may be -1e30; of one chunk where they are always the same."""
    beta: Float[Array, "B T M"] | None
    memory: Float[Array, "B M F V"]
    """Before the first token."""
    spans: Spans
    scale: float
    """Of the outputs."""
    dtype: DTypeLike
    """Of products, and of the states that are kept."""
    out_dtype: DTypeLike
    count: int
    """Tokens but for what fills up the last chunk."""
    log_momentum: Float[Array, "B T M"] | None = None
    """With it, a memory is two, one above the other, each of whole 64 rows."""
    begins: Bool[Array, "B T"] | None = None
    """Which tokens begin a segment, where there is momentum."""
    feature_map: str | None = None
    """What kernels are to apply to queries and keys, see `gpu_features`."""

    def features(self, name: str) -> Array:
        """Returns the features of queries or keys, where kernels make them for themselves."""
        array = getattr(self, name)
        if self.feature_map is None:
            return array
        return features.mapped(self.feature_map, array.astype(jnp.float32)).astype(self.dtype)

    @property
    def memories(self) -> int:
        """Returns their number."""
        return self.memory.shape[1]


def begun(given: Walk, logs: Array | None, spans: Spans, name: str) -> Walk:
    """Returns a walk in spans, with what each of them begins with.

    A walk through all spans at the same time, each from zero, finds what they add to the memory.
    What they leave of it is known from decays or, by the delta rule and with momentum, is what a
    walk through them leaves of the unit matrix, of more columns.

    Args:
      given: the walk with what the first of its spans begins with, and no spans.
      logs: logarithms of decays.
      spans: how it is cut.
      name: of the kernel that finds what spans add.
    """
    batch, _, memories, rows, width = given.memory.shape
    walks = 2 + gpu.whole(rows) // gpu.whole(width)
    if spans.count < max(2, 0 if _is_diagonal(given) else WORTH * walks):
        return given
    zeros = jnp.zeros_like(given.memory, shape=(batch, spans.count, memories, rows, width))
    given, times = given._replace(span=spans.span), operator.mul
    alone = given._replace(memory=zeros, keep=0, writes=False)
    if given.erase is None or given.correct:  # nothing that is read changes the memory
        alone = alone._replace(reader=None, scores=None)
    if _is_diagonal(given):
        added = walk(alone, name).memory
        decays = _decays_of_spans(logs, spans, added)
    else:
        one = jnp.broadcast_to(jnp.eye(rows), (*zeros.shape[:3], rows, rows))
        nothing = jnp.zeros_like(given.value, shape=(*given.value.shape[:3], rows))
        alone = alone._replace(
            memory=jnp.concatenate([one, zeros], axis=-1),
            value=jnp.concatenate([nothing, given.value], axis=-1),
        )
        decays, added = jnp.split(walk(alone, name).memory, [rows], axis=-1)
        times = functools.partial(jnp.matmul, precision="highest")
    first = given.memory
    after = joined(decays, added, first[:, 0], reverse=given.reverse, times=times)
    begins = (after[:, 1:], first) if given.reverse else (first, after[:, :-1])
    return given._replace(memory=jnp.concatenate(begins, axis=1))


def numbers(logs: Float[Array, "B T M"] | None, *, reverse: bool) -> Float[Array, "B M 4 T"] | None:
    """Returns what `gpu_walk.NUMBERS` are of logarithms."""
    if logs is None:
        return None
    batch, tokens, memories = logs.shape
    logs = jnp.swapaxes(jnp.maximum(logs, LOWEST), 1, 2).reshape(batch, memories, -1, CHUNK)
    coarse = jnp.round(logs * GRID) / GRID
    coarse, fine = (jnp.cumsum(part, axis=-1) for part in (coarse, logs - coarse))
    after = (coarse[..., -1:] - coarse) + (fine[..., -1:] - fine)
    since, until = jnp.exp(coarse + fine), jnp.exp(after)
    if reverse:
        since, until = until, since
    numbers = jnp.stack([coarse, fine, since, until], axis=2)
    return numbers.reshape(batch, memories, 4, tokens)


def _is_diagonal(given: Walk) -> bool:
    """Returns whether each number of the memory decays by itself."""
    return given.erase is None and given.mixing is None


def _decays_of_spans(
    logs: Array | None, spans: Spans, like: Float[Array, "B P M F V"]
) -> Float[Array, "B P M F|1 1"]:
    """Returns what is left of a memory after each span."""
    batch, count, memories = like.shape[:3]
    if logs is None:
        return jnp.ones_like(like, shape=(batch, count, memories, 1, 1))
    if logs.shape[1] == CHUNK < spans.chunks * CHUNK:
        chunks = jnp.minimum(spans.span, spans.chunks - spans.span * jnp.arange(count))
        total = chunks[:, None] * jnp.sum(logs, axis=1)[:, None]
    else:
        logs = padded(logs, 1, count * spans.span * CHUNK)
        total = jnp.sum(logs.reshape(batch, count, -1, *logs.shape[2:]), axis=2)
    total = jnp.broadcast_to(total, (batch, *total.shape[1:]))
    return jnp.exp(total.reshape(batch, count, memories, -1, 1))


def in_full(dtype: DTypeLike) -> AbstractContextManager:
    """Has products of float32 be of float32, where a GPU would take TensorFloat-32."""
    return jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default")


def product(equation: str, left: Array, right: Array) -> Array:
    """Is `products.product`, in full; its derivative is so if it is taken in full."""
    with in_full(jnp.result_type(left, right)):
        return products.product(equation, left, right)


def in_chunks(array: Float[Array, "B T M F"]) -> Float[Array, "B chunks M C F"]:
    """Returns the matrix of every chunk and memory."""
    batch, _, memories, size = array.shape
    return jnp.swapaxes(array.reshape(batch, -1, CHUNK, memories, size), 2, 3)


def of_memories(call: Call) -> list[Float[Array, "B chunks M C n"]]:
    """Returns the queries, keys and values that memories have, in chunks."""
    arrays = call.query, call.key, call.value
    return [in_chunks(jnp.repeat(x, call.memories // x.shape[2], axis=2)) for x in arrays]


def of_tokens(array: Float[Array, "B chunks M C F"]) -> Float[Array, "B T M F"]:
    """Is the inverse of `in_chunks`."""
    array = jnp.swapaxes(array, 2, 3)
    return array.reshape(array.shape[0], -1, *array.shape[3:])


def transposed(memory: Array) -> Array:
    """Returns memories [..., F, V] as [..., V, F]."""
    return jnp.swapaxes(memory, -1, -2)

"""Spans: runs of tokens of one size, counted from the beginning of each document, and pooled."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int, Shaped

from attention.packing import places
from pallas_kernels import masks
from pallas_kernels.checks import check_positive


@dataclasses.dataclass(frozen=True)
class Spans:
    """The spans of a row that others may read; made by `make_spans`.

    Attributes:
      size: tokens in a span; the last one of a document may have fewer.
      number: for every token, how many of these spans begin before its own one; if that is one of
        them, this is its number.
      start: of every span, its first token.
      count: of every span, how many tokens it has; 0 where there is none.
      document: of every token; None where a row is one document.
      of_document: of every span; -2 where there is none.
    """

    size: int
    number: Int[Array, "B|1 T"]
    start: Int[Array, "B|1 S"]
    count: Int[Array, "B|1 S"]
    document: Int[Array, "B T"] | None = None
    of_document: Int[Array, "B S"] | None = None

    @property
    def inside(self) -> Bool[Array, "B|1 S size"]:
        """Returns which places of every span hold a token of it."""
        return jnp.arange(self.size) < self.count[..., None]

    def split(self, x: Shaped[Array, "B T *C"]) -> Shaped[Array, "B S size *C"]:
        """Returns what the tokens of every span carry; places that hold none hold anything."""
        batch, tokens, *rest = x.shape
        spans = self.start.shape[1]
        if self.document is None:
            missing = max(spans * self.size - tokens, 0)
            x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0) for _ in rest)))
            x = x[:, : spans * self.size]
        else:
            index = self.start[..., None] + jnp.arange(self.size)
            index = jnp.minimum(index, tokens - 1).reshape(batch, -1, *(1 for _ in rest))
            x = jnp.take_along_axis(x, index, axis=1)
        return x.reshape(batch, spans, self.size, *rest)

    def pooled(
        self, x: Shaped[Array, "B T *C"], how: Literal["mean", "max"]
    ) -> Shaped[Array, "B S *C"]:
        """Returns the mean or the maximum over the tokens of every span; 0 where there is none.

        Sums are in float32 or better; the result has the dtype of x.

        Raises:
          ValueError: `how` is neither.
        """
        if how not in ("mean", "max"):
            raise ValueError(f"how: must be 'mean' or 'max'; got {how!r}")
        parts = self.split(x)
        rest = (1,) * (x.ndim - 2)
        inside = self.inside.reshape(*self.inside.shape, *rest)
        count = self.count.reshape(*self.count.shape, *rest)
        if how == "max":
            maximum = jnp.max(jnp.where(inside, parts, -jnp.inf), axis=2)
            return jnp.where(count > 0, maximum, 0)
        parts = jnp.where(inside, parts, 0).astype(jnp.promote_types(x.dtype, jnp.float32))
        return (jnp.sum(parts, axis=2) / jnp.maximum(count, 1)).astype(x.dtype)

    def earlier(self) -> masks.Mask:
        """Lets a token see the spans of its document before its own."""
        return self._of_document(earlier(self.number, self.start.shape[1]))

    def others(self) -> masks.Mask:
        """Lets a token see the spans of its document other than its own."""
        spans = jnp.arange(self.start.shape[1], dtype=jnp.int32)
        return self._of_document(masks.rule(_differs, self.number, spans))

    def _of_document(self, mask: masks.Mask) -> masks.Mask:
        if self.document is None:
            return mask
        return mask & masks.segments(self.document, self.of_document)


def earlier(number: Int[Array, "B|1 T"], spans: int) -> masks.Mask:
    """Lets a token see the first spans of a row, as many as its number says."""
    return masks.rule(_less, number.astype(jnp.int32), jnp.arange(spans, dtype=jnp.int32))


def _less(number: Any, span: Any) -> Array:
    return span < number


def _differs(number: Any, span: Any) -> Array:
    return span != number


def make_spans(
    size: int,
    batch: int,
    tokens: int,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    *,
    whole: bool = False,
) -> Spans:
    """Returns the spans of rows, of which there is a static number S.

    Where a row holds documents, those of one span only are left out: no other span is there that
    could read it. So S is at most 2 T / (size + 1), where all of them might be as many as tokens.

    Args:
      size: tokens in a span.
      batch: number of rows.
      tokens: T.
      segment_ids: documents packed into a row; None for one.
      whole: whether to leave out spans of fewer tokens, too, which no later token of their document
        follows: all that causal reading of earlier spans needs. S is then at most T / size.

    Raises:
      ValueError: the size is no positive integer, or the ids do not fit.
      TypeError: the ids are no integers.
    """
    check_positive(size=size)
    if segment_ids is None:
        spans = max(tokens // size, 1) if whole else -(-tokens // size)
        start = jnp.arange(spans, dtype=jnp.int32)[None] * size
        count = jnp.minimum(tokens - start, size)
        number = jnp.arange(tokens, dtype=jnp.int32)[None] // size
        return Spans(size, number, start, jnp.where(count == size, size, 0) if whole else count)

    place = places(segment_ids, batch, tokens)
    index = jnp.arange(tokens, dtype=jnp.int32)[None]
    within = place % size
    # Where the next document begins, at the earliest after a token.
    following = jnp.where(place == 0, index, tokens)[:, 1:]
    following = jnp.pad(following, ((0, 0), (0, 1)), constant_values=tokens)
    end = jax.lax.cummin(following, axis=1, reverse=True)
    listed = end - (index - within) >= size if whole else end - (index - place) > size
    first = listed & (within == 0)
    number = jnp.cumsum(first, axis=1, dtype=jnp.int32) - listed
    spans = max(tokens // size if whole else 2 * tokens // (size + 1), 1)
    start = jax.vmap(lambda x: jnp.nonzero(x, size=spans, fill_value=tokens)[0])(first)
    there, start = start < tokens, jnp.minimum(start, tokens - 1).astype(jnp.int32)
    count = jnp.minimum(jnp.take_along_axis(end, start, axis=1) - start, size)
    document = jnp.cumsum(place == 0, axis=1, dtype=jnp.int32)
    of_document = jnp.take_along_axis(document, start, axis=1)
    return Spans(
        size,
        number,
        start,
        jnp.where(there, count, 0),
        document,
        jnp.where(there, of_document, -2),
    )

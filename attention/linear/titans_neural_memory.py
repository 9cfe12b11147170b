"""Titans' neural memory: weights that learn keys and values, by gradient descent, as they read."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Bool, Float, Int

from attention.catalogue import Mechanism
from attention.state import check_state
from pallas_kernels.checks import check_arrays, check_positive, segment_begins
from pallas_kernels.linear import LinearState, linear_attention

CHUNK_SIZE = 64
"""Tokens whose gradients are taken at the same weights."""

Weights = tuple[Float[Array, "..."], ...]
"""Matrices of the layers of a memory, [..., inputs, outputs]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TitansState:
    """What `titans_neural_memory` carries from token to token, float32 or better.

    Attributes:
      start: of every layer, its weights when the chunk began, at which gradients are taken.
      weights: its weights now.
      momentum: what they move by.
      place: number of tokens so far of the document.
    """

    start: tuple[Float[Array, "B N inputs outputs"], ...]
    weights: tuple[Float[Array, "B N inputs outputs"], ...]
    momentum: tuple[Float[Array, "B N inputs outputs"], ...]
    place: Int[Array, "B"]


def titans_neural_memory(
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    weights: Sequence[Float[ArrayLike, "N inputs outputs"]] | None = None,
    rate: Float[ArrayLike, "#B #T #N"] | float | None = None,
    log_decay: Float[ArrayLike, "#B #T #N"] | float | None = None,
    log_momentum: Float[ArrayLike, "#B #T #N"] | float | None = None,
    chunk_size: int = CHUNK_SIZE,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    initial_state: TitansState | None = None,
    return_state: bool = False,
    implementation: str | None = None,
) -> Float[Array, "B T N V"] | tuple[Float[Array, "B T N V"], TitansState]:
    """A memory M_W whose weights W are trained, token by token, to return values for keys.

    For every head, with rate theta_t, momentum eta_t = exp(log_momentum_t) and what decay leaves,
    a_t = exp(log_decay_t),

        S_t = eta_t S_{t-1} - theta_t grad |M_W(k_t) - v_t|^2  at W = W_c,    o_t = M_{W_t}(q_t)
        W_t = a_t W_{t-1} + S_t

    where W_c are the weights before the chunk of C tokens that t is in, counted from the beginning
    of a document: this, the published form for training, is the definition here, whichever way it
    is computed. With C = 1 every gradient is taken at the weights just before the token. A token
    reads the weights after its own update.

    One matrix is a linear memory, M_W(x) = x W; C = 1 is then the delta rule with momentum, by
    steps 2 theta. More are a perceptron around which its input passes,
    M_W(x) = x + gelu(... gelu(x W_1) ...) W_n, gelu in its tanh form. Weights after each token are
    never made: within a chunk each layer is linear attention, by the inputs and gradients of that
    layer. O(T C) time and O(T) memory, beside O(T) times the number of weights, and a C-th of that.
    Sums, gradients and states are in float32, or float64 for float64 queries. First derivatives
    exist in reverse mode; the implementation "reference" has all.

    Gates are logarithms, as elsewhere here, because those near 1 would be rounded in bfloat16; the
    paper's forgetting alpha is 1 - exp(log_decay). No code was released; the loss is summed over
    channels, not averaged. Keys and queries are taken as they are: the paper normalises them.

    Source: Behrouz et al., Titans: Learning to Memorize at Test Time (2024).

    Args:
      query: float array.
      key: of the dtype of query; K divides N, and each key head serves N / K consecutive query
        heads, each with a memory of its own.
      value: likewise.
      weights: the memory at the beginning of every document, as such learned: matrices of each
        head and layer, from H to V channels, such as `titans_weights` makes; V is H for more than
        one. None for a linear memory of zeros.
      rate: theta, of each token and head, or what broadcasts to that. None for 1 / (2 C H): with
        keys whose entries are about 1, chunks then do not overshoot.
      log_decay: at most 0, likewise; None for no decay, -inf to forget all but S_t.
      log_momentum: at most 0, likewise; None for no momentum.
      chunk_size: C; 64 by default.
      segment_ids: documents packed into a row: the memory begins anew wherever the id changes.
      initial_state: that after the tokens before, which belong to the first document.
      return_state: whether to return the state after the last token too.
      implementation: None for the best, "reference", "xla", "pallas_tpu" or "pallas_gpu".

    Returns:
      The output in query's dtype; with `return_state` also the state.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument does not fit; the message names it.
      NotImplementedError: the named implementation does not serve the call.

    Example:
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 100, 4, 8))
      >>> weights = titans_weights(jax.random.key(1), num_heads=4, head_dim=8)
      >>> out = titans_neural_memory(
      ...     query, key, value, weights=weights, log_decay=-0.01, log_momentum=-0.1
      ... )
      >>> out.shape
      (2, 100, 4, 8)
    """
    x = _checked(query, key, value, rate, log_decay, log_momentum, chunk_size)
    batch, tokens = x.query.shape[:2]
    first = _checked_weights(weights, x)
    first = tuple(jnp.broadcast_to(w, (batch, *w.shape)) for w in first)
    state = initial_state
    if state is None:
        place = jnp.zeros((batch,), jnp.int32)
        state = TitansState(first, first, jax.tree.map(jnp.zeros_like, first), place)
    else:
        state = _checked_state(state, x, first if weights is not None else None)
        if weights is None:
            # Of documents that begin after the one that is continued.
            first = jax.tree.map(jnp.zeros_like, state.weights)
            if segment_ids is not None and len(first) > 1:
                raise ValueError("weights: must be given, for documents that begin in this call")
    begins = None if segment_ids is None else segment_begins(segment_ids, (batch, tokens))
    place = _places(state.place, begins, tokens)
    if implementation == "reference":
        out, parts = _defined(x, first, state, begins, place, chunk_size)
    elif chunk_size == 1 and len(first) == 1 and (begins is None or weights is None):
        out, parts = _delta_rule(x, state, segment_ids, implementation)
    else:
        aligned = initial_state is None and begins is None
        slots = _slots(place, begins, chunk_size, aligned)
        out, parts = _chunked(x, first, state, begins, slots, implementation)
    out = out.astype(x.query.dtype)
    return (out, TitansState(*parts, place[:, -1] + 1)) if return_state else out


def titans_neural_memory_step(
    state: TitansState,
    query: Float[ArrayLike, "B T N H"],
    key: Float[ArrayLike, "B T K H"],
    value: Float[ArrayLike, "B T K V"],
    *,
    rate: Float[ArrayLike, "#B #T #N"] | float | None = None,
    log_decay: Float[ArrayLike, "#B #T #N"] | float | None = None,
    log_momentum: Float[ArrayLike, "#B #T #N"] | float | None = None,
    chunk_size: int = CHUNK_SIZE,
    implementation: str | None = None,
) -> tuple[Float[Array, "B T N V"], TitansState]:
    """Continues `titans_neural_memory` by T >= 1 tokens: a prompt at once, or token by token.

    The time of a step and the size of the state do not depend on the tokens before.

    Args:
      state: that of the tokens before, from `init_titans_neural_memory_state`, from the step
        before, or from `titans_neural_memory(..., return_state=True)`.
      query: queries of the new tokens.
      key: keys of the new tokens.
      value: values of the new tokens.
      rate: as for `titans_neural_memory`, of the new tokens.
      log_decay: likewise.
      log_momentum: likewise; given in all steps or in none.
      chunk_size: likewise, and the same in all steps.
      implementation: likewise.

    Returns:
      The output for the new tokens, and the state after them.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `titans_neural_memory`.

    Example:
      >>> state = init_titans_neural_memory_state(1, 1024, 4, 4, 8, 8)
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 20, 4, 8))
      >>> out, state = titans_neural_memory_step(state, query, key, value)
      >>> out.shape, int(state.place[0])
      ((1, 20, 4, 8), 20)
    """
    return titans_neural_memory(
        query,
        key,
        value,
        rate=rate,
        log_decay=log_decay,
        log_momentum=log_momentum,
        chunk_size=chunk_size,
        initial_state=check_state(state, TitansState),
        return_state=True,
        implementation=implementation,
    )


def init_titans_neural_memory_state(
    batch: int,
    max_length: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: DTypeLike = jnp.float32,
    *,
    weights: Sequence[Float[ArrayLike, "N inputs outputs"]] | None = None,
) -> TitansState:
    """Returns the state of no tokens for `titans_neural_memory_step`.

    Args:
      batch: number of sequences.
      max_length: number of tokens to come; the state does not depend on it.
      num_heads: number of query heads.
      num_kv_heads: number of key heads; the state does not depend on it.
      head_dim: width of a key.
      value_dim: width of a value.
      dtype: of the inputs to come; the state is float32, or float64 for float64.
      weights: as for `titans_neural_memory`.
    """
    del max_length, num_kv_heads
    wide = jnp.promote_types(dtype, jnp.float32)
    weights = [jnp.zeros((num_heads, head_dim, value_dim))] if weights is None else weights
    first = tuple(jnp.broadcast_to(jnp.asarray(w, wide), (batch, *jnp.shape(w))) for w in weights)
    zeros = jax.tree.map(jnp.zeros_like, first)
    return TitansState(first, first, zeros, jnp.zeros((batch,), jnp.int32))


def titans_recall(
    weights: Sequence[Float[ArrayLike, "B N inputs outputs"]], query: Float[ArrayLike, "B T N H"]
) -> Float[Array, "B T N V"]:
    """Returns M_W(q) for all queries, by the same weights: a memory that is read, not written.

    Args:
      weights: of every layer, such as those of a `TitansState`.
      query: as for `titans_neural_memory`.

    Returns:
      The output in query's dtype.

    Example:
      >>> weights = [w[None] for w in titans_weights(jax.random.key(0), num_heads=4, head_dim=8)]
      >>> titans_recall(weights, jnp.ones((1, 5, 4, 8))).shape
      (1, 5, 4, 8)
    """
    query = jnp.asarray(query)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    x = query.astype(wide)
    out = _outputs(tuple(jnp.asarray(w, wide) for w in weights), x, query.dtype)[1][-1]
    return (out if len(weights) == 1 else x + out).astype(query.dtype)


def titans_weights(
    rng: Array,
    num_heads: int,
    head_dim: int,
    *,
    depth: int = 2,
    expansion: int = 4,
    dtype: DTypeLike = jnp.float32,
) -> Weights:
    """Returns random weights of a deep memory, normal, of variance 1 / inputs.

    Args:
      rng: key of the random numbers.
      num_heads: N.
      head_dim: H, channels of keys and values.
      depth: number of matrices; 2 by default.
      expansion: channels between two matrices, in H; 4 by default.
      dtype: of the weights.

    Raises:
      ValueError: a size is not a positive integer.
    """
    check_positive(num_heads=num_heads, head_dim=head_dim, depth=depth, expansion=expansion)
    widths = [head_dim, *[expansion * head_dim] * (depth - 1), head_dim]
    shapes = [(num_heads, *pair) for pair in itertools.pairwise(widths)]
    rngs = jax.random.split(rng, depth)
    return tuple(
        jax.random.normal(key, shape, dtype) * shape[1] ** -0.5
        for key, shape in zip(rngs, shapes, strict=True)
    )


class _Inputs(NamedTuple):
    """What tokens bring, with a head for each memory."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B T N H"]
    value: Float[Array, "B T N V"]
    rate: Float[Array, "B T N"]
    log_decay: Float[Array, "B T N"] | None
    log_momentum: Float[Array, "B T N"] | None

    @property
    def wide(self) -> DTypeLike:
        return jnp.promote_types(self.query.dtype, jnp.float32)

    @property
    def narrow(self) -> DTypeLike:
        """Returns the dtype of products; float16 does not hold small gradients."""
        return self.wide if self.query.dtype == jnp.float16 else self.query.dtype


def _checked(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    rate: ArrayLike | None,
    log_decay: ArrayLike | None,
    log_momentum: ArrayLike | None,
    chunk_size: int,
) -> _Inputs:
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    check_arrays(query, key, value, same_tokens=True)
    for name, x in (("key", key), ("value", value)):
        if x.dtype != query.dtype:
            raise ValueError(f"{name}: dtype {x.dtype} must be query's, {query.dtype}")
    check_positive(chunk_size=chunk_size)
    heads, features = query.shape[2:]
    rate = 1 / (2 * chunk_size * features) if rate is None else rate
    gates = [
        None if gate is None else _gate(name, gate, query)
        for name, gate in (
            ("rate", rate),
            ("log_decay", log_decay),
            ("log_momentum", log_momentum),
        )
    ]
    key, value = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (key, value))
    return _Inputs(query, key, value, *gates)


def _gate(name: str, gate: ArrayLike, query: Array) -> Float[Array, "B T N"]:
    if name != "rate" and not isinstance(gate, jax.Array) and np.any(np.asarray(gate) > 0):
        raise ValueError(f"{name}: must be at most 0; got one of {np.max(gate)}")
    gate, shape = jnp.asarray(gate), query.shape[:3]
    if not jnp.issubdtype(gate.dtype, jnp.floating) and gate.shape:
        raise TypeError(f"{name}: must be floating point; got {gate.dtype}")
    fits = gate.ndim <= 3 and all(
        size in (1, whole) for size, whole in zip(gate.shape[::-1], shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(f"{name}: shape {gate.shape} must broadcast to [B, T, N] = {shape}")
    wide = jnp.promote_types(query.dtype, jnp.float32)
    return jnp.broadcast_to(gate.astype(wide), shape)


def _checked_weights(weights: Sequence[ArrayLike] | None, x: _Inputs) -> Weights:
    heads, features = x.query.shape[2:]
    width = x.value.shape[3]
    if weights is None:
        return (jnp.zeros((heads, features, width), x.wide),)
    if not isinstance(weights, tuple | list) or not weights:
        raise TypeError(f"weights: must be matrices of one or more layers; got {weights!r}")
    weights = tuple(jnp.asarray(w) for w in weights)
    inputs = features
    for i, w in enumerate(weights):
        outputs = width if i == len(weights) - 1 else "outputs"
        fits = w.ndim == 3 and w.shape[:2] == (heads, inputs)
        if not fits or (outputs == width and w.shape[2] != width):
            raise ValueError(
                f"weights[{i}]: must have shape [{heads}, {inputs}, {outputs}]; got {w.shape}"
            )
        if not jnp.issubdtype(w.dtype, jnp.floating):
            raise TypeError(f"weights[{i}]: must be floating point; got {w.dtype}")
        inputs = w.shape[2]
    if len(weights) > 1 and width != features:
        raise ValueError(
            f"value: {width} channels must be the {features} of key, which a deep memory adds"
        )
    return tuple(w.astype(x.wide) for w in weights)


def _checked_state(state: TitansState, x: _Inputs, first: Weights | None) -> TitansState:
    check_state(state, TitansState)
    batch, _, heads, features = x.query.shape
    here = (batch, heads, features, x.value.shape[3])
    made = (*state.weights[0].shape[:3], state.weights[-1].shape[3])
    if made != here:
        raise ValueError(
            f"state: was made for [batch, heads, H, V] = {list(made)}; these are {list(here)}"
        )
    shapes = [w.shape for w in state.weights]
    if first is not None and [w.shape for w in first] != shapes:
        raise ValueError(f"weights: must be as those of the state, {shapes}")
    parts = (state.start, state.weights, state.momentum)
    wide = (tuple(w.astype(x.wide) for w in part) for part in parts)
    return TitansState(*wide, state.place)


def _places(
    before: Int[Array, "B"], begins: Bool[Array, "B T"] | None, tokens: int
) -> Int[Array, "B T"]:
    """Returns the number of each token in its document, the first of which is continued."""
    index = jnp.arange(tokens, dtype=jnp.int32)[None]
    if begins is None:
        return before[:, None] + index
    last = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    return index - last + jnp.where(last == 0, before[:, None], 0)


def _recalled(weights: Weights, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns M_W(x), for one head and token."""
    hidden = x
    for i, w in enumerate(weights):
        hidden = (jax.nn.gelu(hidden) if i else hidden) @ w
    return hidden if len(weights) == 1 else x + hidden


def _defined(
    x: _Inputs,
    first: Weights,
    state: TitansState,
    begins: Bool[Array, "B T"] | None,
    place: Int[Array, "B T"],
    chunk_size: int,
) -> tuple[Array, tuple[Weights, Weights, Weights]]:
    """Returns the output and the last state's parts, token by token, with all weights."""

    def loss(weights: Weights, key: Array, value: Array) -> Array:
        return jnp.sum((_recalled(weights, key) - value) ** 2)

    def of_head(start: Weights, weights: Weights, momentum: Weights, token: _Inputs) -> tuple:
        gradient = jax.grad(loss)(start, token.key, token.value)
        eta = 0.0 if token.log_momentum is None else jnp.exp(token.log_momentum)
        kept = 1.0 if token.log_decay is None else jnp.exp(token.log_decay)
        moves = jax.tree.map(lambda s, g: eta * s - token.rate * g, momentum, gradient)
        weights = jax.tree.map(lambda w, s: kept * w + s, weights, moves)
        # Without momentum there is nothing to carry.
        momentum = momentum if token.log_momentum is None else moves
        return weights, momentum, _recalled(weights, token.query)

    def where(condition: Array, this: Weights, other: Weights) -> Weights:
        return jax.tree.map(
            lambda a, b: jnp.where(condition[:, None, None, None], a, b), this, other
        )

    def one(parts: tuple, token: tuple) -> tuple:
        start, weights, momentum = parts
        inputs, begin, place = token
        if begin is not None:
            weights = where(begin, first, weights)
            momentum = where(begin, jax.tree.map(jnp.zeros_like, momentum), momentum)
        start = where(place % chunk_size == 0, weights, start)
        step = jax.vmap(jax.vmap(of_head))
        weights, momentum, out = step(start, weights, momentum, inputs)
        return (start, weights, momentum), out

    def moved(tree: tuple) -> tuple:
        return jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), tree)

    wide = jax.tree.map(lambda a: a.astype(x.wide), x)
    parts = (state.start, state.weights, state.momentum)
    parts, out = jax.lax.scan(one, parts, moved((wide, begins, place)))
    return jnp.moveaxis(out, 0, 1), parts


def _delta_rule(
    x: _Inputs,
    state: TitansState,
    segment_ids: ArrayLike | None,
    implementation: str | None,
) -> tuple[Array, tuple[Weights, Weights, Weights]]:
    """Returns what `_defined` does, for a linear memory and chunks of one token."""
    moving = None if x.log_momentum is None else state.momentum[0]
    out, after = linear_attention(
        *(a.astype(x.narrow) for a in x[:3]),
        beta=2 * x.rate,
        log_decay=x.log_decay,
        log_momentum=x.log_momentum,
        segment_ids=segment_ids,
        initial_state=LinearState(state.weights[0], None, moving),
        return_state=True,
        implementation=implementation,
        function="titans_neural_memory",
    )
    momentum = state.momentum if moving is None else (after.momentum,)
    return out, ((after.memory,), (after.memory,), momentum)


class _Slots(NamedTuple):
    """Runs of tokens, of one size but for empty places at their ends, one after another.

    A slot begins where a chunk of the document that it continues does, or C tokens after the slot
    before. So all gradients of its tokens are at weights that are known when it begins: those of
    documents that begin within it at the first weights.

    Attributes:
      size: places in a slot.
      start: of every slot, its first token; None where slot i begins at token i C.
      inside: which places hold a token.
      opens: whether a chunk begins with the slot.
      slot: of every token; None likewise.
    """

    size: int
    start: Int[Array, "B S"] | None
    inside: Bool[Array, "S B|1 size"]
    opens: Bool[Array, "S B|1"]
    slot: Int[Array, "B T"] | None

    def split(self, x: Array) -> Array:
        """Returns [S, B, size, ...] of [B, T, ...]; empty places hold anything finite."""
        batch, tokens, *rest = x.shape
        count = len(self.inside)
        if self.start is None:
            missing = count * self.size - tokens
            x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0) for _ in rest)))
        else:
            index = self.start[..., None] + jnp.arange(self.size)
            index = jnp.minimum(index, tokens - 1).reshape(batch, -1, *(1 for _ in rest))
            x = jnp.take_along_axis(x, index, axis=1)
        return jnp.moveaxis(x.reshape(batch, count, self.size, *rest), 1, 0)

    def joined(self, x: Array, tokens: int) -> Array:
        """Returns [B, T, ...] of [S, B, size, ...]."""
        count, batch, size, *rest = x.shape
        x = jnp.moveaxis(x, 0, 1).reshape(batch, count * size, *rest)
        if self.start is None:
            return x[:, :tokens]
        index = jnp.arange(tokens, dtype=jnp.int32)[None]
        place = index - jnp.take_along_axis(self.start, self.slot, axis=1)
        index = (self.slot * size + place).reshape(batch, tokens, *(1 for _ in rest))
        return jnp.take_along_axis(x, index, axis=1)


def _slots(
    place: Int[Array, "B T"], begins: Bool[Array, "B T"] | None, chunk_size: int, aligned: bool
) -> _Slots:
    """Cuts tokens into slots; `aligned` where the first token is known to begin a document."""
    tokens = place.shape[1]
    size = min(chunk_size, tokens)
    if aligned:
        count = -(-tokens // size)
        inside = (jnp.arange(count * size) < tokens).reshape(count, 1, size)
        return _Slots(size, None, inside, jnp.ones((count, 1), bool), None)
    index = jnp.arange(tokens, dtype=jnp.int32)[None]
    opens = place % chunk_size == 0
    count = 1 - (1 - tokens) // chunk_size
    if begins is not None:
        # Of a document that begins in a slot, no chunk but the first does.
        opens &= ~begins
        count += (tokens - 1) // size
    last = jax.lax.cummax(jnp.where(opens, index, 0), axis=1)
    first = (index - last) % size == 0
    start = jax.vmap(lambda x: jnp.nonzero(x, size=count, fill_value=tokens)[0])(first)
    start = start.astype(jnp.int32)
    following = jnp.pad(start[:, 1:], ((0, 0), (0, 1)), constant_values=tokens)
    inside = jnp.arange(size) < (following - start)[..., None]
    opens = jnp.pad(opens, ((0, 0), (0, 1)))
    opens = jnp.take_along_axis(opens, start, axis=1)
    slot = jnp.cumsum(first, axis=1, dtype=jnp.int32) - 1
    return _Slots(size, start, jnp.moveaxis(inside, 1, 0), opens.T, slot)


def _chunked(
    x: _Inputs,
    first: Weights,
    state: TitansState,
    begins: Bool[Array, "B T"] | None,
    slots: _Slots,
    implementation: str | None,
) -> tuple[Array, tuple[Weights, Weights, Weights]]:
    """Returns what `_defined` does, slot by slot."""

    def one(parts: tuple, slot: tuple) -> tuple:
        return _slot(first, parts, *slot, implementation)

    begins = None if begins is None else slots.split(begins) & slots.inside
    parts = (state.start, state.weights, state.momentum)
    xs = (jax.tree.map(slots.split, x), begins, slots.inside, slots.opens)
    if len(slots.inside) == 1:
        parts, out = one(parts, jax.tree.map(lambda a: a[0], xs))
        out = out[None]
    else:
        # Kept for the backward are the weights before each slot, not what is made within.
        parts, out = jax.lax.scan(jax.checkpoint(one), parts, xs)
    return slots.joined(out, x.query.shape[1]), parts


def _slot(
    first: Weights,
    parts: tuple[Weights, Weights, Weights],
    x: _Inputs,
    begins: Bool[Array, "B C"] | None,
    inside: Bool[Array, "B|1 C"],
    opens: Bool[Array, "B|1"],
    implementation: str | None,
) -> tuple[tuple[Weights, Weights, Weights], Float[Array, "B C N V"]]:
    """Returns the parts of the state after the tokens of a slot, and their outputs."""
    start, weights, momentum = parts
    opens, inside = opens[:, None, None, None], inside[..., None]
    start = jax.tree.map(lambda w, s: jnp.where(opens, w, s), weights, start)
    learned = _learned(start, x)
    log_decay, log_momentum, document = x.log_decay, x.log_momentum, None
    if log_decay is not None:
        log_decay = jnp.where(inside, log_decay, 0)
    if begins is not None:
        document = jnp.cumsum(begins, axis=1, dtype=jnp.int32)
        new = document > 0
        learned = jax.tree.map(
            lambda fresh, old: jnp.where(new[..., None, None], fresh, old),
            _learned(first, x),
            learned,
        )
        # What is left of the first weights; a memory that begins within a slot begins as zeros.
        left = jnp.ones(x.rate.shape, x.wide)
        left = left if log_decay is None else jnp.exp(_sum_since(begins, log_decay))
        left = jnp.where(new[..., None], left, 0)
        drop, last = (new[:, i, None, None, None] for i in (0, -1))
        start = jax.tree.map(lambda w, s: jnp.where(last, w, s), first, start)
        weights = jax.tree.map(lambda w: jnp.where(drop, 0, w), weights)
        momentum = jax.tree.map(lambda s: jnp.where(drop, 0, s), momentum)

    # An empty place moves nothing: what is moving is stopped there, and computed apart.
    learned = [(a, jnp.where(inside[..., None], error, 0)) for a, error in learned]
    after_momentum = momentum
    if log_momentum is not None:
        after_momentum = _moved(learned, momentum, log_momentum, inside, document, x)
        log_momentum = jnp.where(inside, log_momentum, -jnp.inf)

    hidden, after = x.query.astype(x.wide), []
    for i, (a, error) in enumerate(learned):
        hidden = jax.nn.gelu(hidden) if i else hidden
        moving = None if log_momentum is None else momentum[i]
        out, memory = linear_attention(
            *(array.astype(x.narrow) for array in (hidden, a, error)),
            log_decay=log_decay,
            log_momentum=log_momentum,
            segment_ids=document,
            initial_state=LinearState(weights[i], None, moving),
            return_state=True,
            implementation=implementation,
            function="titans_neural_memory",
        )
        out, memory = out.astype(x.wide), memory.memory
        if begins is not None:
            out += left[..., None] * _product(x.query.dtype, "bcni,bnio->bcno", hidden, first[i])
            memory += left[:, -1, :, None, None] * first[i]
        hidden = out
        after.append(memory)
    if len(first) > 1:
        hidden += x.query.astype(x.wide)
    return (start, tuple(after), after_momentum), hidden


def _learned(weights: Weights, x: _Inputs) -> list[tuple[Array, Array]]:
    """Returns of every layer its inputs, and -theta times the gradient of the loss by its outputs.

    The product of the two is what the layer's weights learn of a token.
    """
    key = x.key.astype(x.wide)
    inputs, outputs = _outputs(weights, key, x.query.dtype)
    recalled = outputs[-1] if len(weights) == 1 else key + outputs[-1]
    gradients = [2 * (recalled - x.value.astype(x.wide))]
    for w, out in zip(weights[:0:-1], outputs[-2::-1], strict=True):
        _, slope = jax.vjp(jax.nn.gelu, out)
        gradients.append(*slope(_product(x.query.dtype, "bcno,bnio->bcni", gradients[-1], w)))
    rate = -x.rate[..., None]
    return [(a, rate * g) for a, g in zip(inputs, gradients[::-1], strict=True)]


def _outputs(
    weights: Weights, x: Float[Array, "B C N H"], dtype: DTypeLike
) -> tuple[list[Array], list[Array]]:
    """Returns the inputs and the outputs of every layer."""
    inputs, outputs = [], []
    for i, w in enumerate(weights):
        inputs.append(jax.nn.gelu(outputs[-1]) if i else x)
        outputs.append(_product(dtype, "bcni,bnio->bcno", inputs[-1], w))
    return inputs, outputs


def _moved(
    learned: list[tuple[Array, Array]],
    momentum: Weights,
    log_momentum: Float[Array, "B C N"],
    inside: Bool[Array, "B|1 C 1"],
    document: Int[Array, "B C"] | None,
    x: _Inputs,
) -> Weights:
    """Returns the momentum after the tokens of a slot."""
    log_momentum = jnp.where(inside, log_momentum, 0)
    since = jax.lax.cumsum(log_momentum, axis=1, reverse=True)
    before = jnp.exp(since[:, 0])
    weight = jnp.exp(jnp.pad(since[:, 1:], ((0, 0), (0, 1), (0, 0))))
    if document is not None:
        last = document[:, -1:]
        weight = jnp.where((document == last)[..., None], weight, 0)
        before = jnp.where(last == 0, before, 0)
    return tuple(
        before[..., None, None] * s
        + _product(x.query.dtype, "bcni,bcno->bnio", weight[..., None] * a, error)
        for (a, error), s in zip(learned, momentum, strict=True)
    )


def _sum_since(begins: Bool[Array, "B C"], x: Float[Array, "B C N"]) -> Float[Array, "B C N"]:
    """Returns the sum of the tokens of a document up to each; x may be -inf."""

    def combine(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
        return left[0] | right[0], right[1] + jnp.where(right[0], 0, left[1])

    flags = jnp.broadcast_to(begins[..., None], x.shape)
    return jax.lax.associative_scan(combine, (flags, x), axis=1)[1]


def _product(dtype: DTypeLike, subscripts: str, left: Array, right: Array) -> Array:
    """Returns a product of wide arrays, as exact as inputs of this dtype are."""
    precision = jax.lax.Precision.HIGHEST if dtype == left.dtype else None
    return jnp.einsum(
        subscripts, left, right, precision=precision, preferred_element_type=left.dtype
    )


RECORD = Mechanism(
    slug="titans_neural_memory",
    title="Titans: Learning to Memorize at Test Time",
    year=2024,
    family="linear",
    patterns=frozenset({"self causal"}),
    time="O(T)",
    memory="O(T)",
    kernel="linear",
    implementations=("reference", "xla", "pallas_tpu", "pallas_gpu"),
    has_weights=False,
    function=titans_neural_memory,
    step=titans_neural_memory_step,
    init_state=init_titans_neural_memory_state,
    extras=(TitansState, titans_recall, titans_weights),
    small={"chunk_size": 4, "rate": 0.05, "log_decay": -0.1, "log_momentum": -0.5},
)

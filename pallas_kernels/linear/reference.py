"""Linear attention one token after another: the definition.

Where it is not causal, the definition is the matrix of all scores. It is differentiated by JAX, to
any order.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear import features
from pallas_kernels.linear.inputs import Inputs, Options, finite, zero_unless

_product = functools.partial(jnp.einsum, precision="highest")


def supports(**call: object) -> str | None:
    """Returns None: the definition serves every call."""
    del call


def forward(options: Options, *inputs: Array | None) -> tuple[Array, ...]:
    """Returns the output in the dtype of the query, and the state after the last token."""
    x = Inputs(*inputs)
    arrays = (jnp.repeat(a, x.heads // a.shape[2], axis=2).astype(x.accumulator) for a in x[:3])
    query, key, value = arrays
    query, key = (features.mapped(options.feature_map, a) for a in (query, key))
    attend = _by_token if options.causal else _by_matrix
    out, state = attend(options, x, query, key, value)
    return (options.scale * out).astype(x.query.dtype), *map(state.get, x.state_shapes(options))


def _by_token(
    options: Options,
    x: Inputs,
    query: Float[Array, "B T M F"],
    key: Float[Array, "B T M F"],
    value: Float[Array, "B T M V"],
) -> tuple[Float[Array, "B T M V"], dict[str, Array]]:
    batch, tokens, heads, _ = query.shape
    decays = jnp.zeros((1, 1), query.dtype) if x.log_decay is None else x.log_decay
    decays = jnp.exp(finite(decays.astype(query.dtype)))
    constant = decays.ndim == 2
    if constant:
        # By row, so that its gradient is summed over the batch once and not for each token.
        decays = jnp.broadcast_to(decays, (batch, heads))
    momentums = None if x.log_momentum is None else x.log_momentum.astype(query.dtype)
    runs = jnp.zeros((batch, tokens), jnp.int32) if x.runs is None else x.runs
    by_token = {
        "query": query,
        "key": key,
        "value": value,
        "beta": x.beta,
        "decay": None if constant else decays,
        "momentum": None if momentums is None else jnp.exp(finite(momentums)),
        "continues": jnp.diff(runs, axis=1, prepend=0) == 0,
    }

    def step(state: dict[str, Array], token: dict[str, Array]) -> tuple[dict, Array]:
        key, new = token["key"], token["value"]
        state = {name: zero_unless(token["continues"], a) for name, a in state.items()}
        decay = decays if constant else token["decay"]
        decay = decay.reshape(batch, heads, -1)  # of the memory, or of each of its rows
        decayed = decay[..., None] * state["memory"]
        if token["beta"] is not None:
            known = decayed if token["momentum"] is None else state["memory"]
            predicted = _product("bnh,bnhv->bnv", key, known)
            new = token["beta"][..., None].astype(new.dtype) * (new - predicted)
        added = key[..., :, None] * new[..., None, :]
        if token["momentum"] is not None:
            added += token["momentum"][..., None, None] * state["momentum"]
            state["momentum"] = added
        state["memory"] = decayed + added
        out = _product("bnh,bnhv->bnv", token["query"], state["memory"])
        if options.epsilon is not None:
            state["key_sum"] = decay * state["key_sum"] + key
            total = _product("bnh,bnh->bn", token["query"], state["key_sum"])
            out /= total[..., None] + options.epsilon
        return state, out

    by_token = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), by_token)
    state, out = jax.lax.scan(step, x.initial_state(options), by_token)
    return jnp.moveaxis(out, 0, 1), state


def _by_matrix(
    options: Options,
    x: Inputs,
    query: Float[Array, "B T M F"],
    key: Float[Array, "B S M F"],
    value: Float[Array, "B S M V"],
) -> tuple[Float[Array, "B T M V"], dict[str, Array]]:
    scores = _product("btnh,bsnh->bnts", query, key)
    first = jnp.ones(query.shape[:2], bool)  # tokens of the segment that the initial state is of
    last = jnp.ones(key.shape[:2], bool)
    if x.runs is not None:
        same = x.runs[:, :, None] == x.runs[:, None]
        scores = jnp.where(same[:, None], scores, 0)
        first, last = x.runs == 0, same[:, -1]
    before = x.initial_state(options)
    key = zero_unless(last, key)
    after = {"memory": _product("bsnh,bsnv->bnhv", key, value), "key_sum": jnp.sum(key, 1)}
    state = {name: after[name] + zero_unless(first[:, -1], a) for name, a in before.items()}

    query = zero_unless(first, query)
    out = _product("bnts,bsnv->btnv", scores, value)
    out += _product("btnh,bnhv->btnv", query, before["memory"])
    if options.epsilon is not None:
        total = jnp.swapaxes(jnp.sum(scores, axis=-1), 1, 2)
        total += _product("btnh,bnh->btn", query, before["key_sum"])
        out /= total[..., None] + options.epsilon
    return out, state

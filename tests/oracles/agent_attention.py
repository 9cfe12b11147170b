"""Agent attention with its two matrices of weights, in NumPy float64."""

import itertools
import math

import numpy as np


def agents_of(query, shape, sizes):
    """Returns means of the queries over parts of each axis, [B, n, N, H]."""
    query = np.asarray(query, np.float64)
    batch, _, heads, features = query.shape
    grid = query.reshape(batch, *shape, heads, features)
    out = []
    for part in itertools.product(*map(range, sizes)):
        where = tuple(
            slice(math.floor(i * length / size), math.ceil((i + 1) * length / size))
            for i, length, size in zip(part, shape, sizes, strict=True)
        )
        out.append(grid[(slice(None), *where)].reshape(batch, -1, heads, features).mean(axis=1))
    return np.stack(out, axis=1)


def agent_weights(query, key, agents, agent_bias=0.0, query_bias=0.0, scale=None, query_scale=None):
    """Returns the weights of tokens for agents [B, N, T, n] and of agents for keys [B, N, n, S]."""
    query, key, agents = (np.asarray(x, np.float64) for x in (query, key, agents))
    heads, features = query.shape[2:]
    scale = features**-0.5 if scale is None else scale
    query_scale = scale if query_scale is None else query_scale
    key = np.repeat(key, heads // key.shape[2], axis=2)
    gathered = _softmax(scale * np.einsum("banh,bsnh->bnas", agents, key) + agent_bias)
    spread = _softmax(query_scale * np.einsum("btnh,banh->bnta", query, agents) + query_bias)
    return spread, gathered


def agent_attention(query, key, value, shape=None, num_agents=None, agents=None, **options):
    """Returns the output [B, T, N, V]."""
    skipped = options.pop("prefix_tokens", 0)
    if agents is None:
        pooled = np.asarray(query)[:, skipped:]
        shape = (pooled.shape[1],) if shape is None else shape
        agents = agents_of(pooled, shape, num_agents)
    spread, gathered = agent_weights(query, key, agents, **options)
    value = np.asarray(value, np.float64)
    value = np.repeat(value, spread.shape[1] // value.shape[2], axis=2)
    return np.einsum("bnta,bnas,bsnv->btnv", spread, gathered, value)


def resized(table, shape):
    """Returns a table [..., a, b] read between its entries, whose centres span the same area."""
    out = np.zeros((*table.shape[:-2], *shape))
    for i, j in np.ndindex(*shape):
        for corner in itertools.product((0, 1), repeat=2):
            weight, place = 1.0, []
            for here, length, entries, side in zip(
                (i, j), shape, table.shape[-2:], corner, strict=True
            ):
                at = (here + 0.5) * entries / length - 0.5
                low = math.floor(at)
                weight *= at - low if side else 1 - (at - low)
                place.append(min(max(low + side, 0), entries - 1))
            out[..., i, j] += weight * table[(..., *place)]
    return out


def _softmax(scores):
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)

"""Sigmoid attention in numpy float64, one query at a time, straight from the definition."""

import numpy as np


def sigmoid_attention(
    query,
    key,
    value,
    *,
    logit_bias,
    temperature=0.0,
    scale=None,
    bias=None,
    allowed=None,
    slopes=None,
    offset=0,
):
    """Returns the output [B, T, N, V].

    `bias`, `allowed` and `logit_bias` broadcast to [B, N, T, S]; `offset` is a number or one per
    batch row.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, queries, heads, features = query.shape
    keys, kv_heads = key.shape[1:3]
    scale = features**-0.5 if scale is None else scale
    shape = (batch, heads, queries, keys)
    bias = np.broadcast_to(0.0 if bias is None else np.asarray(bias, np.float64), shape)
    allowed = np.broadcast_to(True if allowed is None else np.asarray(allowed), shape)
    logit_bias = np.broadcast_to(logit_bias, shape)
    offset = np.broadcast_to(offset, batch)
    out = np.zeros((batch, queries, heads, value.shape[-1]))
    for b, i, n, j in np.ndindex(batch, queries, heads, keys):
        if not allowed[b, n, i, j]:
            continue
        group = n // (heads // kv_heads)
        logit = scale * (query[b, i, n] @ key[b, j, group])
        if slopes is not None:
            logit -= slopes[n] * abs(i + offset[b] - j)
        logit = np.exp(temperature) * logit + bias[b, n, i, j] + logit_bias[b, n, i, j]
        out[b, i, n] += value[b, j, group] * np.exp(-np.logaddexp(0, -logit))
    return out

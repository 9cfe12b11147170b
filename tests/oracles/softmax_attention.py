"""Softmax attention in numpy float64, one query at a time, straight from the definition."""

import numpy as np


def softmax_attention(
    query,
    key,
    value,
    *,
    scale=None,
    bias=None,
    allowed=None,
    soft_cap=None,
    slopes=None,
    sink=None,
    offset=0,
):
    """Returns output [B, T, N, V] and log-sum-exp [B, T, N].

    `bias` and `allowed` broadcast to [B, N, T, S]; `offset` is a number or one per batch row.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, queries, heads, features = query.shape
    keys, kv_heads = key.shape[1:3]
    scale = features**-0.5 if scale is None else scale
    shape = (batch, heads, queries, keys)
    bias = np.broadcast_to(0.0 if bias is None else np.asarray(bias, np.float64), shape)
    allowed = np.broadcast_to(True if allowed is None else np.asarray(allowed), shape)
    offset = np.broadcast_to(offset, batch)
    out = np.zeros((batch, queries, heads, value.shape[-1]))
    lse = np.full((batch, queries, heads), -np.inf)
    for b in range(batch):
        for n in range(heads):
            group = n // (heads // kv_heads)
            for i in range(queries):
                logits, values = [], []
                for j in range(keys):
                    if not allowed[b, n, i, j]:
                        continue
                    logit = scale * (query[b, i, n] @ key[b, j, group])
                    if soft_cap is not None:
                        logit = soft_cap * np.tanh(logit / soft_cap)
                    logit += bias[b, n, i, j]
                    if slopes is not None:
                        logit -= slopes[n] * abs(i + offset[b] - j)
                    logits.append(logit)
                    values.append(value[b, j, group])
                if sink is not None:
                    logits.append(np.float64(sink[n]))
                    values.append(np.zeros(value.shape[-1]))
                if not logits or max(logits) == -np.inf:
                    continue
                weights = np.exp(np.array(logits) - max(logits))
                out[b, i, n] = weights / weights.sum() @ np.array(values)
                lse[b, i, n] = max(logits) + np.log(weights.sum())
    return out, lse

"""Softplus attention in numpy float64, one query at a time, straight from the definition."""

import numpy as np


def softplus_attention(query, key, value, *, allowed=None, reweight_power=None):
    """Returns the output [B, T, N, V]; `allowed` broadcasts to [B, N, T, S]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, queries, heads, features = query.shape
    keys, kv_heads = key.shape[1:3]
    shape = (batch, heads, queries, keys)
    allowed = np.broadcast_to(True if allowed is None else np.asarray(allowed), shape)
    out = np.zeros((batch, queries, heads, value.shape[-1]))
    for b, i, n in np.ndindex(batch, queries, heads):
        seen = np.flatnonzero(allowed[b, n, i])
        if not seen.size:
            continue
        group = n // (heads // kv_heads)
        q = query[b, i, n] / np.linalg.norm(query[b, i, n])
        cosines = [q @ key[b, j, group] / np.linalg.norm(key[b, j, group]) for j in seen]
        weights = np.logaddexp(0, np.log(features) * np.log(seen.size) * np.array(cosines))
        weights /= weights.sum()
        if reweight_power is not None:
            weights = np.maximum(seen.size * weights - 1, 0)
            if weights.max() < 1e-5:
                continue
            weights = (weights / weights.max()) ** reweight_power
            weights /= weights.sum()
        out[b, i, n] = weights @ value[b, seen, group]
    return out

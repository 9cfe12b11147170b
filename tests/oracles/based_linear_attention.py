"""BASED's linear attention with its full Taylor features, token by token, in NumPy float64."""

import numpy as np


def taylor(x):
    """Returns [1, x / F^(1/4), vec(x x^T) / sqrt(2 F)]: 1 + F + F^2 features."""
    size = len(x)
    return np.concatenate([[1], x / size**0.25, np.outer(x, x).ravel() / np.sqrt(2 * size)])


def based_linear_attention(query, key, value, epsilon=1e-12, segment_ids=None):
    """Returns the output [B, T, N, V]; sums begin anew where the segment id changes."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, _ = query.shape
    group = heads // key.shape[2]
    out = np.zeros((batch, tokens, heads, value.shape[3]))
    for b in range(batch):
        for n in range(heads):
            memory, total = 0.0, 0.0
            for t in range(tokens):
                if segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]:
                    memory, total = 0.0, 0.0
                q, k = taylor(query[b, t, n]), taylor(key[b, t, n // group])
                memory = memory + np.outer(k, value[b, t, n // group])
                total = total + k
                out[b, t, n] = q @ memory / (q @ total + epsilon)
    return out

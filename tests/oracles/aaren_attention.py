"""Aaren as ordinary attention of one query to every beginning of the sequence, in NumPy float64."""

import numpy as np


def aaren_attention(query, key, value, scale=None, segment_ids=None):
    """Returns the output [B, T, N, V]; a token sees those since its segment id last changed."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, kv_heads, features = key.shape
    heads = query.shape[2]
    scale = features**-0.5 if scale is None else scale
    out = np.zeros((batch, tokens, heads, value.shape[3]))
    for b in range(batch):
        first = 0
        for t in range(tokens):
            if segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]:
                first = t
            for n in range(heads):
                of = n * kv_heads // heads
                q = query[b if len(query) > 1 else 0, 0, n]
                scores = scale * key[b, first : t + 1, of] @ q
                w = np.exp(scores - scores.max())
                out[b, t, n] = w @ value[b, first : t + 1, of] / w.sum()
    return out

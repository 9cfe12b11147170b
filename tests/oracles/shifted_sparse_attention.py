"""Shifted sparse attention token by token, in NumPy float64."""

import numpy as np


def shifted_sparse_attention(
    query, key, value, group_size, num_sinks=0, scale=None, segment_ids=None
):
    """Returns the output [B, T, N, V]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, features = query.shape
    scale = features**-0.5 if scale is None else scale
    out = np.zeros((batch, tokens, heads, value.shape[3]))
    plain = range(0, tokens + 1, group_size)
    shifted = [0, *range(group_size // 2, tokens + 1, group_size)]
    for b in range(batch):
        begin = 0
        for t in range(tokens):
            if segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]:
                begin = t
            for n in range(heads):
                bounds = plain if n < heads // 2 else shifted
                first = begin + max(bound for bound in bounds if bound <= t - begin)
                seen = [j for j in range(begin, t + 1) if j >= first or j < begin + num_sinks]
                of = n * key.shape[2] // heads
                scores = scale * np.array([query[b, t, n] @ key[b, j, of] for j in seen])
                w = np.exp(scores - scores.max())
                w /= w.sum()
                out[b, t, n] = sum(x * value[b, j, of] for x, j in zip(w, seen, strict=True))
    return out

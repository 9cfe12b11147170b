"""Lightning attention as the paper writes it, pair by pair, in NumPy float64."""

import numpy as np


def lightning_attention(
    query, key, value, slopes=None, scale=1.0, segment_ids=None, initial_memory=None
):
    """Returns output [B, T, N, V] and memory [B, N, H, V].

    o_t = scale sum_{j<=t} exp(-s (t - j)) (q_t . k_j) v_j, over the j from which the segment id has
    not changed until t; a memory before token 0 counts as if it were a token -1.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, features = query.shape
    group, width = heads // key.shape[2], value.shape[3]
    out = np.zeros((batch, tokens, heads, width))
    memory = np.zeros((batch, heads, features, width))
    for b in range(batch):
        for n in range(heads):
            slope = 0.0 if slopes is None else float(slopes[n])
            k, v = key[b, :, n // group], value[b, :, n // group]
            for t in range(tokens):
                for j in reversed(range(t + 1)):
                    weight = 1.0 if j == t else np.exp(-slope * (t - j))
                    out[b, t, n] += scale * weight * (query[b, t, n] @ k[j]) * v[j]
                    if t == tokens - 1:
                        memory[b, n] += weight * np.outer(k[j], v[j])
                    if segment_ids is not None and j and segment_ids[b, j] != segment_ids[b, j - 1]:
                        break
                else:
                    if initial_memory is not None:
                        before = np.exp(-slope * (t + 1)) * np.float64(initial_memory[b, n])
                        out[b, t, n] += scale * query[b, t, n] @ before
                        if t == tokens - 1:
                            memory[b, n] += before
    return out, memory

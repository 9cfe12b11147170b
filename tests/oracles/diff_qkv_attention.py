"""DiffQKV attention query by query, in NumPy float64."""

import numpy as np


def _turned(x, position, base):
    if base is None:
        return x
    half = len(x) // 2
    pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * position * base ** (-np.arange(half) / half))
    return np.concatenate([pairs.real, pairs.imag])


def diff_qkv_attention(
    query,
    key,
    value,
    key_lift=None,
    rope_base=None,
    top_values=None,
    renormalise=False,
    is_causal=False,
    scale=None,
    segment_ids=None,
):
    """Returns the output [B, T, N, V]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, queries, heads, features = query.shape
    keys = key.shape[1]
    scale = features**-0.5 if scale is None else scale
    out = np.zeros((batch, queries, heads, value.shape[3]))
    for b in range(batch):
        place = list(range(max(queries, keys)))
        if segment_ids is not None:
            for t in range(queries):
                same = t and segment_ids[b, t] == segment_ids[b, t - 1]
                place[t] = place[t - 1] + 1 if same else 0
        for n in range(heads):
            k_head, v_head = n * key.shape[2] // heads, n * value.shape[2] // heads
            lifted = []
            for j in range(keys):
                k = key[b, j, k_head]
                if key_lift is not None:
                    lift = np.asarray(key_lift, np.float64)
                    k = k @ (lift if lift.ndim == 2 else lift[k_head])
                lifted.append(_turned(k, place[j], rope_base))
            for t in range(queries):
                q = _turned(query[b, t, n], place[t], rope_base)
                seen = [
                    j
                    for j in range(keys)
                    if (j <= t or not is_causal)
                    and (segment_ids is None or segment_ids[b, j] == segment_ids[b, t])
                ]
                scores = scale * np.array([q @ lifted[j] for j in seen])
                p = np.exp(scores - scores.max())
                p /= p.sum()
                best = np.argsort(-p, kind="stable")[:top_values]
                total = p[best].sum() if renormalise else 1
                out[b, t, n] = sum(p[i] / total * value[b, seen[i], v_head] for i in best)
    return out

"""RAT token by token, in NumPy float64."""

import numpy as np


def _turned(x, position, base):
    if base is None:
        return x
    half = len(x) // 2
    angle = position * base ** (-np.arange(half) / half)
    pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag])


def rat_attention(
    query,
    key,
    value,
    log_decay=None,
    chunk_size=16,
    rope_base=10_000.0,
    scale=None,
    segment_ids=None,
):
    """Returns the output [B, T, N, V]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, features = query.shape
    scale = features**-0.5 if scale is None else scale
    out = np.zeros((batch, tokens, heads, value.shape[3]))
    for b in range(batch):
        for n in range(heads):
            of = n * key.shape[2] // heads
            place = -1
            for t in range(tokens):
                changed = (
                    segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]
                )
                place = 0 if changed else place + 1
                if place == 0:
                    chunks = []
                if place % chunk_size == 0:
                    k, v = np.zeros(features), np.zeros(value.shape[3])
                gate = 0.0 if log_decay is None else np.exp(np.float64(log_decay[b, t, n]))
                k = gate * k + (1 - gate) * key[b, t, of]
                v = gate * v + (1 - gate) * value[b, t, of]
                chunk = place // chunk_size
                own = _turned(k, chunk, rope_base), v
                q = _turned(query[b, t, n], chunk, rope_base)
                scores = scale * np.array([q @ x for x, _ in [*chunks, own]])
                w = np.exp(scores - scores.max())
                w /= w.sum()
                out[b, t, n] = sum(x * y for x, (_, y) in zip(w, [*chunks, own], strict=True))
                if place % chunk_size == chunk_size - 1:
                    chunks.append(own)
    return out

"""DiagAttention block by block, in NumPy float64."""

import numpy as np


def diag_attention(
    query,
    key,
    value,
    block_size,
    is_causal=False,
    weights="softmax",
    scale=None,
    epsilon=1e-8,
    segment_ids=None,
):
    """Returns the output [B, T, N, V]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, features = query.shape
    scale = features**-0.5 if scale is None else scale
    out = np.zeros((batch, tokens, heads, value.shape[3]))
    for b in range(batch):
        blocks = []
        for t in range(tokens):
            changed = segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]
            if changed or not blocks or len(blocks[-1]) == block_size:
                blocks.append([])
            blocks[-1].append(t)
        for t in range(tokens):
            (seen,) = (block for block in blocks if t in block)
            seen = [j for j in seen if j <= t or not is_causal]
            for n in range(heads):
                of = n * key.shape[2] // heads
                scores = scale * np.array([query[b, t, n] @ key[b, j, of] for j in seen])
                if weights == "softmax":
                    w = np.exp(scores - scores.max())
                    w /= w.sum()
                else:
                    w = np.maximum(scores, 0)
                out[b, t, n] = sum(x * value[b, j, of] for x, j in zip(w, seen, strict=True))
            if weights == "relu":
                out[b, t] /= np.sqrt(np.mean(out[b, t] ** 2)) + epsilon
    return out

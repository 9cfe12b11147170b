"""Routing attention cluster by cluster, in NumPy float64."""

import numpy as np


def _unit(x):
    return x / np.linalg.norm(x)


def _nearest(tokens, centroid, window):
    cosines = np.array([centroid @ _unit(x) for x in tokens])
    return sorted(np.argsort(-cosines)[:window])


def routing_attention(
    query,
    key,
    value,
    centroids,
    window,
    is_causal=False,
    shared_qk=False,
    attend_self=True,
    memory_key=None,
    memory_value=None,
    scale=None,
):
    """Returns the output [B, T, N, V]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, features = query.shape
    scale = features**-0.5 if scale is None else scale
    out = np.zeros((batch, tokens, heads, value.shape[3]))
    for b in range(batch):
        for n in range(heads):
            of = n * key.shape[2] // heads
            h = n * len(centroids) // heads
            q, v = query[b, :, n], value[b, :, of]
            k = np.array([_unit(x) for x in q]) if shared_qk else key[b, :, of]
            found = [[] for _ in range(tokens)]
            for c, centroid in enumerate(np.asarray(centroids[h], np.float64)):
                members = _nearest(k, centroid, window)
                for i in _nearest(q, centroid, window):
                    seen = [j for j in members if j <= i or not is_causal]
                    if not attend_self:
                        seen = [j for j in seen if j != i] or [i]
                    pairs = [(k[j], v[j]) for j in seen]
                    if memory_key is not None:
                        pairs += zip(memory_key[h, c], memory_value[h, c], strict=True)
                    if not pairs:
                        found[i].append(np.zeros(v.shape[1]))
                        continue
                    scores = scale * np.array([q[i] @ x for x, _ in pairs])
                    w = np.exp(scores - scores.max())
                    w /= w.sum()
                    found[i].append(sum(p * y for p, (_, y) in zip(w, pairs, strict=True)))
            for i in range(tokens):
                if found[i]:
                    out[b, i, n] = sum(found[i]) / len(found[i])
    return out


def updated_centroids(centroids, tokens, decay):
    """Returns centroids [heads, C, H] after tokens [heads, tokens, H] of one batch."""
    centroids = np.array(centroids, np.float64)
    for h, mine in enumerate(np.asarray(tokens, np.float64)):
        sums = np.zeros_like(centroids[h])
        count = np.zeros(len(sums))
        for x in mine:
            c = np.argmax([mu @ _unit(x) for mu in centroids[h]])
            sums[c] += _unit(x)
            count[c] += 1
        for c in range(len(sums)):
            if count[c]:
                centroids[h, c] = _unit(decay * centroids[h, c] + (1 - decay) * _unit(sums[c]))
    return centroids

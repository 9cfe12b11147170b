"""FlexPrefill token by token, in NumPy float64."""

import numpy as np


def _softmax(x):
    w = np.exp(x - np.max(x))
    return w / w.sum()


def _cover(x, mass):
    """Returns how many of the largest numbers are needed to reach a mass; one if it is never."""
    total, count = 0.0, 1
    for number in sorted(x, reverse=True):
        total += number
        count += total <= mass
    return count


def _best(x, count, forced):
    order = sorted(range(len(x)), key=lambda i: (i != forced, -x[i]))
    return set(order[:count])


def kept_blocks(query, key, gamma, tau, block_size, min_budget, max_budget, scale):
    """Returns whether a head is query-aware, and the pairs of blocks that it keeps.

    Args:
      query: of one head, [T, H].
      key: likewise.
      gamma: as for the mechanism, and so are all others.
      tau: the threshold.
      block_size: b.
      min_budget: in tokens.
      max_budget: in tokens, or None.
      scale: of the scores.
    """
    tokens, b = len(query), block_size
    blocks = -(-tokens // b)
    probe = min(b, tokens)
    vertical, slash = np.zeros(tokens), np.zeros(tokens)
    for t in range(tokens - probe, tokens):
        weights = _softmax(np.array([scale * query[t] @ key[j] for j in range(t + 1)]))
        for j, weight in enumerate(weights):
            vertical[j] += weight / probe
            slash[t - j] += weight / probe
    least = min(-(-min_budget // b), blocks)
    most = blocks if max_budget is None else min(-(-max_budget // b), blocks)
    verticals, slashes = (
        min(max(_cover(x, gamma) // b + 1, least), most) for x in (vertical, slash)
    )
    vertical, slash = (
        np.array([x[i * b : (i + 1) * b].sum() for i in range(blocks)]) for x in (vertical, slash)
    )
    queries, keys = (
        [x[i * b : (i + 1) * b].mean(axis=0) for i in range(blocks)] for x in (query, key)
    )
    last = query[tokens - probe :].mean(axis=0)
    pooled = _softmax(np.array([scale * last @ k for k in keys]))
    divergence = 0.0
    for p, v in zip(pooled, vertical, strict=True):
        middle = (p + v) / 2
        for x in (p, v):
            divergence += 0.5 * x * np.log(x / middle) if x > 0 else 0.0
    aware = np.sqrt(max(divergence, 0)) < tau
    if aware:
        verticals = slashes = least
    columns, offsets = _best(vertical, verticals, 0), _best(slash, slashes, 0)
    kept = set()
    for i in range(blocks):
        kept |= {(i, j) for j in range(i + 1) if j in columns or i - j in offsets}
    if aware:
        mass = {}
        for i in range(blocks):
            row = _softmax(np.array([scale * queries[i] @ keys[j] for j in range(i + 1)]))
            mass |= {(i, j): p for j, p in enumerate(row)}
        order = sorted(mass, key=lambda pair: (-mass[pair], pair))
        kept |= set(order[: _cover(mass.values(), gamma * blocks)])
    return aware, kept


def flex_prefill_attention(
    query,
    key,
    value,
    gamma=0.9,
    tau=0.1,
    block_size=128,
    min_budget=512,
    max_budget=None,
    scale=None,
):
    """Returns the output [B, T, N, V]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, features = query.shape
    scale = features**-0.5 if scale is None else scale
    full = tokens <= max(2 * block_size, -(-min_budget // block_size) * block_size)
    out = np.zeros((batch, tokens, heads, value.shape[3]))
    options = gamma, tau, block_size, min_budget, max_budget, scale
    for b in range(batch):
        for n in range(heads):
            of = n * key.shape[2] // heads
            if not full:
                _, kept = kept_blocks(query[b, :, n], key[b, :, of], *options)
            for t in range(tokens):
                keys = [
                    j for j in range(t + 1) if full or (t // block_size, j // block_size) in kept
                ]
                w = _softmax(np.array([scale * query[b, t, n] @ key[b, j, of] for j in keys]))
                out[b, t, n] = w @ value[b, keys, of]
    return out

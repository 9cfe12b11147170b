"""HiP token by token, in NumPy float64."""

import itertools

import numpy as np


def _score(samples, key, blocks, width, group, representative):
    """Returns the score of a node, `blocks` being the first key block and the number of them."""
    first, size = blocks
    if representative == "all":
        chosen = range(first, first + size)
    else:
        chosen = [first + size // 2 if representative == "middle" else first]
    best = -np.inf
    for block in chosen:
        for begin in range(block * width, (block + 1) * width, group):
            keys = key[begin : begin + group]
            for q in samples:
                best = max(best, q @ keys.min(axis=0), q @ keys.max(axis=0))
    return best


def found_blocks(samples, key, blocks, leaves, width, group, representative):
    """Returns the key blocks that the search keeps among the first `blocks`, ascending."""
    if blocks <= leaves:
        return list(range(blocks))
    ends = [blocks * i // leaves for i in range(leaves + 1)]
    nodes = [(a, b - a) for a, b in itertools.pairwise(ends)]
    mean = blocks / leaves
    while mean > 1:
        children = []
        for first, size in nodes:
            children += [(first, size // 2), (first + size // 2, size - size // 2)]
        children = [child for child in children if child[1] >= 1]
        scores = [_score(samples, key, c, width, group, representative) for c in children]
        best = sorted(range(len(children)), key=lambda i: -scores[i])[:leaves]
        nodes = sorted(children[i] for i in best)
        mean /= 2
    return [first for first, _ in nodes]


def hip_attention(
    query,
    key,
    value,
    mask_k=512,
    block_q=32,
    block_k=2,
    group=8,
    window=128,
    sinks=32,
    representative="first",
    scale=None,
):
    """Returns the output [B, T, N, V]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, features = query.shape
    scale = features**-0.5 if scale is None else scale
    width = block_k * group
    leaves = -(-mask_k // width)
    out = np.zeros((batch, tokens, heads, value.shape[3]))
    for b in range(batch):
        for n in range(heads):
            of = n * key.shape[2] // heads
            for begin in range(0, tokens, block_q):
                rows = query[b, begin : begin + block_q, n]
                samples = rows[1::2] if len(rows) > 1 else rows
                near = max(begin + block_q - window, 0) // width
                seen = found_blocks(
                    samples, key[b, :, of], near, leaves, width, group, representative
                )
                seen = {block * width + i for block in seen for i in range(width)}
                seen |= set(range(-(-sinks // width) * width))
                seen |= set(range(near * width, tokens))
                for t in range(begin, min(begin + block_q, tokens)):
                    keys = [j for j in sorted(seen) if j <= t]
                    scores = scale * np.array([query[b, t, n] @ key[b, j, of] for j in keys])
                    w = np.exp(scores - scores.max())
                    out[b, t, n] = w @ value[b, keys, of] / w.sum()
    return out

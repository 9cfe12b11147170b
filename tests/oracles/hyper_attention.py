"""HyperAttention query by query, in NumPy float64; what is random is given."""

import numpy as np


def _bucket(x, directions, order):
    bits = [int(x @ direction > 0) for direction in np.asarray(directions, np.float64).T]
    code = sum(bit << i for i, bit in enumerate(bits))
    if order == "released":
        return code ^ (code >> 1)
    # The place of the code in the list of Gray codes.
    return [i ^ (i >> 1) for i in range(1 << len(bits))].index(code)


def _sums(q, keys, values, scale):
    """Returns the row sum of exponentials, and with values."""
    w = np.array([np.exp(scale * q @ k) for k in keys])
    return w.sum(), sum((p * v for p, v in zip(w, values, strict=True)), np.zeros(values.shape[1:]))


def _estimated(level, q, k, v, samples, settings):
    """Returns row sums of all queries of one head, the estimated part of settings."""
    size, minimum, directions, order, scale = settings
    count = -(-len(k) // size)
    if len(q) < minimum or count == 1:
        return [_sums(x, k, v, scale) for x in q]
    orders = (sorted(range(len(x)), key=lambda i: _bucket(x[i], directions, order)) for x in (q, k))
    query_order, key_order = (list(x) for x in orders)
    query_size = -(-len(q) // count)
    out = [None] * len(q)
    for place, i in enumerate(query_order):
        block = place // query_size
        own = key_order[block * size : (block + 1) * size]
        total, sums = _sums(q[i], k[own], v[own], scale)
        drawn = samples[level]
        others = [key_order[j] for j in drawn if j // size != block]
        if others:
            more = _sums(q[i], k[others], v[others], scale)
            total += more[0] * len(k) / len(drawn)
            sums = sums + more[1] * len(k) / len(drawn)
        out[i] = total, sums
    return out


def _causal(level, part, q, k, v, samples, settings):
    half = len(q) // 2
    if level not in samples:
        return [_sums(x, k[: i + 1], v[: i + 1], settings[4]) for i, x in enumerate(q)]
    first, second = (
        _causal(level + 1, 2 * part + i, *(x[where] for x in (q, k, v)), samples, settings)
        for i, where in enumerate((slice(half), slice(half, None)))
    )
    mine = {level: samples[level][part]}
    across = _estimated(level, q[half:], k[:half], v[:half], mine, settings)
    return first + [(a + c, b + d) for (a, b), (c, d) in zip(second, across, strict=True)]


def hyper_attention(
    query,
    key,
    value,
    directions,
    samples,
    is_causal=False,
    block_size=256,
    min_seq_len=4096,
    bucket_order="gray",
    scale=None,
):
    """Returns the output [B, T, N, V].

    Samples are [B, K, parts, m] by level: where causal, of as many as tokens are halved, filled up
    with zeros to even halves.
    """
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, features = query.shape
    scale = features**-0.5 if scale is None else scale
    settings = block_size, min_seq_len, directions, bucket_order, scale
    out = np.zeros((batch, tokens, heads, value.shape[3]))
    for b in range(batch):
        for n in range(heads):
            of = n * key.shape[2] // heads
            arrays = query[b, :, n], key[b, :, of], value[b, :, of]
            mine = {level: np.asarray(x)[b, of] for level, x in samples.items()}
            if is_causal:
                pad = ((0, -tokens % 2 ** len(mine)), (0, 0))
                arrays = [np.pad(x, pad) for x in arrays]
                rows = _causal(0, 0, *arrays, mine, settings)
            else:
                mine = {level: x[0] for level, x in mine.items()}
                rows = _estimated(0, *arrays, mine, settings)
            for t, (total, sums) in enumerate(rows[:tokens]):
                out[b, t, n] = sums / total
    return out

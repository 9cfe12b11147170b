"""Neighbourhood attention token by token, in NumPy float64."""

import itertools

import numpy as np


def seen_on_axis(i, length, window, dilation, stride, is_causal):
    """Returns the tokens of an axis that token i sees, in order."""
    group = [j for j in range(length) if j % dilation == i % dilation]
    place, count = group.index(i), len(group)
    if is_causal:
        leader = min(place // stride * stride + stride - 1, count - 1)
        return group[max(leader - window + 1, 0) : place + 1]
    leader = min(place // stride * stride + stride // 2, count - 1)
    start = min(max(leader - window // 2, 0), count - window)
    return group[start : start + window]


def neighborhood_attention(
    query,
    key,
    value,
    shape=None,
    window=7,
    dilation=1,
    stride=1,
    is_causal=False,
    scale=None,
    extra_key=None,
    extra_value=None,
):
    """Returns the output [B, T, N, V]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, features = query.shape
    shape = (tokens,) if shape is None else shape
    options = [
        x if isinstance(x, tuple) else (x,) * len(shape)
        for x in (window, dilation, stride, is_causal)
    ]
    scale = features**-0.5 if scale is None else scale
    out = np.zeros((batch, tokens, heads, value.shape[3]))
    number = np.arange(tokens).reshape(shape)
    for place in itertools.product(*map(range, shape)):
        axes = (seen_on_axis(*axis) for axis in zip(place, shape, *options, strict=True))
        seen = [number[other] for other in itertools.product(*axes)]
        for b in range(batch):
            for n in range(heads):
                of = n * key.shape[2] // heads
                keys = [key[b, j, of] for j in seen]
                values = [value[b, j, of] for j in seen]
                if extra_key is not None:
                    keys += list(np.asarray(extra_key, np.float64)[b, :, of])
                    values += list(np.asarray(extra_value, np.float64)[b, :, of])
                scores = scale * np.array([query[b, number[place], n] @ k for k in keys])
                w = np.exp(scores - scores.max())
                w /= w.sum()
                out[b, number[place], n] = sum(x * v for x, v in zip(w, values, strict=True))
    return out

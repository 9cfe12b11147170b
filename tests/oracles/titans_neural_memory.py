"""Titans' neural memory token by token, in NumPy float64."""

import numpy as np


def _gelu(x):
    u = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    slope = 0.5 * (1 + np.tanh(u))
    slope += 0.5 * x * (1 - np.tanh(u) ** 2) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + np.tanh(u)), slope


def recall(weights, x):
    """Returns the memory's output for x, and of every layer its input and the slope of its gelu."""
    inputs, slopes, out = [x], [1.0], x @ weights[0]
    for w in weights[1:]:
        hidden, slope = _gelu(out)
        inputs.append(hidden)
        slopes.append(slope)
        out = hidden @ w
    return (out if len(weights) == 1 else x + out), inputs, slopes


def gradient(weights, key, value):
    """Returns the gradient of |M(key) - value|^2 by the weights."""
    out, inputs, slopes = recall(weights, key)
    error, gradients = 2 * (out - value), []
    for w, x, slope in zip(weights[::-1], inputs[::-1], slopes[::-1], strict=True):
        gradients.append(np.outer(x, error))
        error = slope * (w @ error)
    return gradients[::-1]


def titans_neural_memory(
    query,
    key,
    value,
    weights=None,
    rate=None,
    log_decay=None,
    log_momentum=None,
    chunk_size=64,
    segment_ids=None,
):
    """Returns the output [B, T, N, V]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, features = query.shape
    rate = 1 / (2 * chunk_size * features) if rate is None else rate
    log_decay = 0.0 if log_decay is None else log_decay
    log_momentum = -np.inf if log_momentum is None else log_momentum
    theta, a, eta = (
        np.broadcast_to(np.asarray(x, np.float64), (batch, tokens, heads))
        for x in (rate, np.exp(log_decay), np.exp(log_momentum))
    )
    if weights is None:
        weights = [np.zeros((heads, features, value.shape[3]))]
    out = np.zeros((batch, tokens, heads, value.shape[3]))
    for b, n in np.ndindex(batch, heads):
        of = n * key.shape[2] // heads
        place = 0
        for t in range(tokens):
            changed = segment_ids is not None and t and segment_ids[b, t] != segment_ids[b, t - 1]
            if t == 0 or changed:
                place, now = 0, [np.asarray(w[n], np.float64) for w in weights]
                moving = [np.zeros_like(w) for w in now]
            if place % chunk_size == 0:
                start = now
            slopes = gradient(start, key[b, t, of], value[b, t, of])
            moving = [
                eta[b, t, n] * s - theta[b, t, n] * g for s, g in zip(moving, slopes, strict=True)
            ]
            now = [a[b, t, n] * w + s for w, s in zip(now, moving, strict=True)]
            out[b, t, n] = recall(now, query[b, t, n])[0]
            place += 1
    return out

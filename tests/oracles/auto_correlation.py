"""Auto-correlation by direct circular sums, and moving averages, in NumPy float64."""

import math

import numpy as np


def correlations(query, key):
    """Returns R(tau) = sum_t q_t k_(t - tau) of each channel, [B, T, N, H]; keys have N heads."""
    tokens = query.shape[1]
    out = np.zeros(query.shape)
    for tau in range(tokens):
        for t in range(tokens):
            out[:, tau] += query[:, t] * key[:, (t - tau) % tokens]
    return out


def auto_correlation(query, key, value, factor=1.0, lags="row"):
    """Returns the output [B, T, N, V]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, _ = query.shape
    key, value = (np.repeat(_fitted(x, tokens), heads // x.shape[2], axis=2) for x in (key, value))
    found = correlations(query, key)
    if lags != "channel":
        found = np.broadcast_to(found.mean(axis=(2, 3), keepdims=True), value.shape)
    count = min(max(int(factor * math.log(tokens)), 1), tokens)
    out = np.zeros(value.shape)
    for b, n, c in np.ndindex(batch, heads, value.shape[3]):
        here = found[b, :, n, c]
        ranked = found[:, :, n, c].mean(axis=0) if lags == "batch" else here
        chosen = np.argsort(-ranked, kind="stable")[:count]
        weights = np.exp(here[chosen] - here[chosen].max())
        weights /= weights.sum()
        for t in range(tokens):
            out[b, t, n, c] = sum(
                w * value[b, (t + tau) % tokens, n, c]
                for w, tau in zip(weights, chosen, strict=True)
            )
    return out


def _fitted(x, tokens):
    out = np.zeros((x.shape[0], tokens, *x.shape[2:]))
    for t in range(min(tokens, x.shape[1])):
        out[:, t] = x[:, t]
    return out


def series_decomposition(x, window):
    """Returns what is left of a series, and its moving average."""
    x = np.asarray(x, np.float64)
    tokens = x.shape[1]
    trend = np.zeros(x.shape)
    for t in range(tokens):
        for j in range(t - (window - 1) // 2, t - (window - 1) // 2 + window):
            trend[:, t] += x[:, min(max(j, 0), tokens - 1)] / window
    return x - trend, trend

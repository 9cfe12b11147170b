"""NormAttention pair by pair, in NumPy float64."""

import numpy as np


def _features(name, x):
    elu = np.where(x > 0, x, np.exp(np.minimum(x, 0)) - 1)
    return elu + 1 if name == "elu_plus_one" else elu


def _placed(x, position, frequencies, reflection):
    """Reflects and turns one vector: channel i with channel i + H / 2."""
    if reflection is not None:
        w = np.asarray(reflection, np.float64)
        x = x - 2 * w * (w @ x)
    if frequencies is None:
        return x
    half = len(x) // 2
    angle = position * np.asarray(frequencies, np.float64)
    pairs = (x[:half] + 1j * x[half:]) * np.exp(1j * angle)
    return np.concatenate([pairs.real, pairs.imag])


def norm_attention(
    query,
    key,
    value,
    is_causal=False,
    feature_map="elu_plus_one",
    frequencies=None,
    reflection=None,
    normalize=True,
    epsilon=1e-8,
    segment_ids=None,
):
    """Returns the output [B, T, N, V]; only tokens with equal ids attend to each other."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, _ = query.shape
    group = heads // key.shape[2]
    out = np.zeros((batch, tokens, heads, value.shape[3]))
    for b in range(batch):
        for t in range(tokens):
            for n in range(heads):
                q = _placed(_features(feature_map, query[b, t, n]), t, frequencies, reflection)
                for j in range(t + 1 if is_causal else key.shape[1]):
                    if segment_ids is not None and segment_ids[b, t] != segment_ids[b, j]:
                        continue
                    k = _features(feature_map, key[b, j, n // group])
                    k = _placed(k, j, frequencies, reflection)
                    out[b, t, n] += (q @ k) * value[b, j, n // group]
            if normalize:
                out[b, t] /= np.sqrt(np.mean(out[b, t] ** 2)) + epsilon
    return out

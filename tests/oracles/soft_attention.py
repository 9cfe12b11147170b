"""SOFT and SOFT++ with their three matrices, in NumPy float64."""

import itertools
import math

import numpy as np


def landmarks_of(query, shape, sizes):
    """Returns means of the queries over parts of each axis, no more than its tokens."""
    sizes = [min(size, length) for size, length in zip(sizes, shape, strict=True)]
    query = np.asarray(query, np.float64)
    batch, _, heads, features = query.shape
    grid = query.reshape(batch, *shape, heads, features)
    out = []
    for part in itertools.product(*map(range, sizes)):
        where = tuple(
            slice(math.floor(i * length / size), math.ceil((i + 1) * length / size))
            for i, length, size in zip(part, shape, sizes, strict=True)
        )
        out.append(grid[(slice(None), *where)].reshape(batch, -1, heads, features).mean(axis=1))
    return np.stack(out, axis=1)


def gaussian(a, b, scale):
    """Returns exp(-scale |a_i - b_j|^2 / 2) for two lists of vectors."""
    out = np.zeros((len(a), len(b)))
    for i, j in np.ndindex(*out.shape):
        out[i, j] = np.exp(-scale / 2 * np.sum((a[i] - b[j]) ** 2))
    return out


def newton(matrix, alpha, steps=20):
    """Returns what comes of the matrix's inverse in a number of steps."""
    found = alpha * matrix
    for _ in range(steps):
        found = 2 * found - found @ matrix @ found
    return found


def inverse(matrix, normalise, ridge, how):
    """Returns the middle one of the three matrices."""
    rows = np.abs(matrix).sum(axis=1)
    raised = matrix + ridge * np.eye(len(matrix))
    if how == "solve":
        found = np.linalg.inv(raised)
    elif not normalise:
        found = newton(raised, 1.8 / rows.max() ** 2)
    else:
        alpha = 2 / rows.max() ** 2
        for _ in range(10):
            if np.abs(np.eye(len(matrix)) - alpha * raised @ raised).sum(axis=0).max() <= 1.01:
                break
            alpha /= 2
        found = newton(raised, alpha)
    return found / np.sqrt(np.outer(rows, rows)) if normalise else found


def soft_attention(
    query,
    key,
    value,
    shape=None,
    num_landmarks=None,
    landmarks=None,
    normalise=False,
    ridge=None,
    inverse_by="newton",
    scale=None,
):
    """Returns the output [B, T, N, V]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, features = query.shape
    scale = features**-0.5 if scale is None else scale
    ridge = (0.0 if normalise else 0.01) if ridge is None else ridge
    if landmarks is None:
        landmarks = landmarks_of(query, (tokens,) if shape is None else shape, num_landmarks)
    out = np.zeros((batch, tokens, heads, value.shape[3]))
    for b, n in np.ndindex(batch, heads):
        of, here = n * key.shape[2] // heads, landmarks[b, :, n]
        middle = inverse(gaussian(here, here, scale), normalise, ridge, inverse_by)
        gathered = gaussian(here, key[b, :, of], scale) @ value[b, :, of]
        out[b, :, n] = gaussian(query[b, :, n], here, scale) @ middle @ gathered
    return out

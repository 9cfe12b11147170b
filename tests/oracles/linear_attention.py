"""The family of linear attention, token by token and head by head, in NumPy float64.

Of every variant the matrix form that its paper writes, with q and k for their features, S [F, V]:

    gated linear attention    S_t = diag(a_t) S_{t-1} + k_t^T v_t
    gated delta rule          S_t = (I - b_t k_t^T k_t) diag(a_t) S_{t-1} + b_t k_t^T v_t
    Titans, linear memory     U_t = m_t U_{t-1} - theta_t grad |k_t S_{t-1} - v_t|^2
                              S_t = a_t S_{t-1} + U_t,    theta_t = b_t / 2

All of it works on complex numbers, so that a step of 1e-30 i gives exact derivatives.
"""

import numpy as np


def features(name, x):
    """Returns phi of a vector."""
    if name is None:
        return x
    if name == "elu_plus_one":
        return np.where(x.real > 0, x + 1, np.exp(np.where(x.real > 0, 0, x)))
    if name == "elu":
        return np.where(x.real > 0, x, np.exp(np.where(x.real > 0, 0, x)) - 1)
    if name == "relu":
        return np.where(x.real > 0, x, 0)
    assert name == "taylor", name
    pairs = [
        x[i] * x[j] / np.sqrt(2 * len(x)) * (1 if i == j else np.sqrt(2))
        for i in range(len(x))
        for j in range(i, len(x))
    ]
    return np.array([1, *(x / len(x) ** 0.25), *pairs])


def linear_attention(
    query,
    key,
    value,
    log_decay=None,
    beta=None,
    log_momentum=None,
    feature_map=None,
    normalize=False,
    epsilon=1e-6,
    causal=True,
    scale=1.0,
    segment_ids=None,
    memory=None,
    key_sum=None,
    momentum=None,
):
    """Returns the output and the last state by name."""
    arrays = [np.asarray(x) for x in (query, key, value)]
    batch, tokens, heads, _ = arrays[0].shape
    memories = max(heads, arrays[2].shape[2])
    dtype = np.result_type(np.float64, *(x for x in (query, log_decay) if x is not None))
    rows = []
    for b in range(batch):
        ids = np.zeros(arrays[1].shape[1]) if segment_ids is None else segment_ids[b]
        for n in range(memories):
            q, k, v = (x[b, :, n * x.shape[2] // memories] for x in arrays)
            q, k = ([features(feature_map, row) for row in x] for x in (q, k))
            size, width = len(k[0]), v.shape[1]
            before = (
                np.zeros((size, width), dtype) if memory is None else memory[b, n],
                np.zeros(size, dtype) if key_sum is None else key_sum[b, n],
                np.zeros((size, width), dtype) if momentum is None else momentum[b, n],
            )
            attend = _one_after_another if causal else _all_at_once
            gates = [
                None if log_decay is None else _of(log_decay, b, n),
                None if beta is None else beta[b, :, n],
                None if log_momentum is None else np.exp(log_momentum[b, :, n]),
            ]
            o, z, state = attend(q, k, v, *gates, ids, before)
            if normalize:
                o = [row / (total + epsilon) for row, total in zip(o, z, strict=True)]
            rows.append((scale * np.array(o), *state))
    out, *state = (np.array(x) for x in zip(*rows, strict=True))
    out = np.moveaxis(out.reshape(batch, memories, tokens, -1), 1, 2)
    state = [x.reshape(batch, memories, *x.shape[1:]) for x in state]
    results = {"out": out, "memory": state[0]}
    if normalize:
        results["key_sum"] = state[1]
    if log_momentum is not None:
        results["momentum"] = state[2]
    return results


def _of(log_decay, b, n):
    """Returns the decays of a head: one, one for each token, or for each token and feature."""
    return np.exp(np.asarray(log_decay)[n] if log_decay.ndim == 1 else log_decay[b, :, n])


def _one_after_another(q, k, v, decay, beta, momentum, ids, state):
    s, z, u = state
    out, totals = [], []
    for t in range(len(q)):
        if t and ids[t] != ids[t - 1]:
            s, z, u = (np.zeros_like(x) for x in (s, z, u))
        a = np.ones(len(k[t])) if decay is None else (decay if decay.ndim == 0 else decay[t])
        a = np.diag(np.broadcast_to(a, len(k[t])))
        kk, kv = np.outer(k[t], k[t]), np.outer(k[t], v[t])
        if momentum is not None:
            new = kv if beta is None else beta[t] / 2 * (2 * kv - 2 * kk @ s)
            u = momentum[t] * u + new
            s = a @ s + u
        elif beta is not None:
            s = (np.eye(len(k[t])) - beta[t] * kk) @ a @ s + beta[t] * kv
        else:
            s = a @ s + kv
        z = a @ z + k[t]
        out.append(q[t] @ s)
        totals.append(q[t] @ z)
    return out, totals, (s, z, u)


def _all_at_once(q, k, v, decay, beta, momentum, ids, state):
    assert decay is beta is momentum is None
    s, z, u = state
    out, totals = [], []
    starts = [j for j in range(len(k)) if j == 0 or ids[j] != ids[j - 1]]
    for t in range(len(q)):
        first, stop = 0, len(k)
        if len(starts) > 1:
            first = max(j for j in starts if j <= t)
            stop = min((j for j in starts if j > t), default=len(k))
        weights = [q[t] @ k[j] for j in range(first, stop)]
        o = sum(w * v[j] for w, j in zip(weights, range(first, stop), strict=True))
        out.append(o + (q[t] @ s if first == 0 else 0))
        totals.append(sum(weights) + (q[t] @ z if first == 0 else 0))
    last = starts[-1]
    kv = sum(np.outer(k[j], v[j]) for j in range(last, len(k)))
    keys = sum(k[j] for j in range(last, len(k)))
    carried = 1 if last == 0 else 0
    return out, totals, (kv + carried * s, keys + carried * z, u)

"""Mixture-of-head attention token by token, in NumPy float64."""

import numpy as np


def _softmax(x):
    x = np.exp(x - np.max(x))
    return x / x.sum()


def gates(query, num_shared, top_k, shared_logits=None, routed_logits=None, balance_logits=None):
    """Returns the gates [B, T, N]."""
    query = np.asarray(query, np.float64)
    batch, tokens, heads, _ = query.shape
    out = np.zeros((batch, tokens, heads))
    for b in range(batch):
        for t in range(tokens):
            shared = np.ones(num_shared)
            if shared_logits is not None:
                shared = num_shared * _softmax(np.float64(shared_logits[b, t]))
            routed = np.zeros(heads - num_shared)
            if routed_logits is None:
                norms = np.array([np.linalg.norm(query[b, t, n]) for n in range(num_shared, heads)])
                routed[np.argsort(-norms, kind="stable")[:top_k]] = 1
            else:
                weights = _softmax(np.float64(routed_logits[b, t]))
                best = np.argsort(-weights, kind="stable")[:top_k]
                routed[best] = top_k * weights[best] / weights[best].sum()
            if balance_logits is not None:
                a, b_ = 2 * _softmax(np.float64(balance_logits[b, t]))
                shared, routed = a * shared, b_ * routed
            out[b, t] = [*shared, *routed]
    return out


def balance_loss(routed_logits, top_k):
    """Returns the load-balance loss."""
    logits = np.asarray(routed_logits, np.float64).reshape(-1, np.shape(routed_logits)[-1])
    probability, load = np.zeros(logits.shape[1]), np.zeros(logits.shape[1])
    for row in logits:
        probability += _softmax(row) / len(logits)
        load[np.argsort(-row, kind="stable")[:top_k]] += 1 / len(logits)
    return logits.shape[1] * np.sum(probability * load)


def mixture_of_head_attention(
    query,
    key,
    value,
    num_shared,
    top_k,
    shared_logits=None,
    routed_logits=None,
    balance_logits=None,
    is_causal=False,
    scale=None,
    segment_ids=None,
):
    """Returns the output [B, T, N, V]."""
    weights = gates(query, num_shared, top_k, shared_logits, routed_logits, balance_logits)
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, features = query.shape
    scale = features**-0.5 if scale is None else scale
    out = np.zeros((batch, tokens, heads, value.shape[3]))
    for b in range(batch):
        for t in range(tokens):
            seen = [
                j
                for j in range(key.shape[1])
                if (j <= t or not is_causal)
                and (segment_ids is None or segment_ids[b, j] == segment_ids[b, t])
            ]
            for n in range(heads):
                of = n * key.shape[2] // heads
                p = _softmax(scale * np.array([query[b, t, n] @ key[b, j, of] for j in seen]))
                mixed = sum(x * value[b, j, of] for x, j in zip(p, seen, strict=True))
                out[b, t, n] = weights[b, t, n] * mixed
    return out

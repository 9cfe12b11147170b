"""Bi-level routing attention token by token, in NumPy float64."""

import itertools

import numpy as np


def regions_of(shape, regions):
    """Returns the tokens of every region, in order."""
    regions = regions if isinstance(regions, tuple) else (regions,) * len(shape)
    found = {}
    for number, place in enumerate(itertools.product(*map(range, shape))):
        sides = (int(np.ceil(n / s)) for n, s in zip(shape, regions, strict=True))
        region = tuple(i // side for i, side in zip(place, sides, strict=True))
        found.setdefault(region, []).append(number)
    return [found[region] for region in sorted(found)]


def routes(query, key, shape, regions, top_k):
    """Returns for each of the batch the list of regions that each region chooses."""
    members, heads = regions_of(shape, regions), query.shape[2]
    chosen = []
    for q, k in zip(query, key, strict=True):
        affinity = np.zeros((len(members), len(members)))
        for r, s in np.ndindex(*affinity.shape):
            for n in range(heads):
                mean = np.mean([q[t, n] for t in members[r]], axis=0)
                other = np.mean([k[t, n * k.shape[1] // heads] for t in members[s]], axis=0)
                affinity[r, s] += mean @ other
        chosen.append([sorted(np.argsort(-row, kind="stable")[:top_k]) for row in affinity])
    return chosen


def bi_level_routing_attention(query, key, value, shape=None, regions=7, top_k=4, scale=None):
    """Returns the output [B, T, N, V]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, features = query.shape
    shape = (tokens,) if shape is None else shape
    scale = features**-0.5 if scale is None else scale
    members, chosen = regions_of(shape, regions), routes(query, key, shape, regions, top_k)
    out = np.zeros((batch, tokens, heads, value.shape[3]))
    for b in range(batch):
        for r, region in enumerate(members):
            seen = [j for s in chosen[b][r] for j in members[s]]
            for t in region:
                for n in range(heads):
                    of = n * key.shape[2] // heads
                    scores = scale * np.array([query[b, t, n] @ key[b, j, of] for j in seen])
                    w = np.exp(scores - scores.max())
                    w /= w.sum()
                    out[b, t, n] = sum(x * value[b, j, of] for x, j in zip(w, seen, strict=True))
    return out

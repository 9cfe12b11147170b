"""Landmark attention token by token, in NumPy float64."""

import numpy as np


def landmark_attention(
    query,
    key,
    value,
    block_size=None,
    is_landmark=None,
    top_k=None,
    share_heads=False,
    scale=None,
    segment_ids=None,
):
    """Returns the output [B, T, N, V]."""
    weights = landmark_weights(
        query, key, block_size, is_landmark, top_k, share_heads, scale, segment_ids
    )
    value = np.asarray(value, np.float64)
    value = np.repeat(value, weights.shape[1] // value.shape[2], axis=2)
    return np.einsum("bnts,bsnv->btnv", weights, value)


def landmark_weights(
    query,
    key,
    block_size=None,
    is_landmark=None,
    top_k=None,
    share_heads=False,
    scale=None,
    segment_ids=None,
):
    """Returns the weights of all tokens [B, N, T, T]."""
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    batch, tokens, heads, features = query.shape
    scale = features**-0.5 if scale is None else scale
    out = np.zeros((batch, heads, tokens, tokens))
    for b in range(batch):
        # Blocks as (document, tokens without the landmark, landmark or None), in order.
        blocks, document = [], -1
        for t in range(tokens):
            if t == 0 or (segment_ids is not None and segment_ids[b, t] != segment_ids[b, t - 1]):
                document, first = document + 1, t
                blocks.append([document, [], None])
            elif blocks[-1][2] is not None:
                blocks.append([document, [], None])
            if is_landmark is None:
                ends = (t - first) % block_size == block_size - 1
            else:
                ends = is_landmark[b, t]
            if ends:
                blocks[-1][2] = t
            else:
                blocks[-1][1].append(t)
        for t in range(tokens):
            (own,) = (i for i, block in enumerate(blocks) if t in block[1] or t == block[2])
            before = [block for block in blocks[:own] if block[0] == blocks[own][0] and block[1]]
            scores = np.array(
                [
                    [
                        scale * query[b, t, n] @ key[b, j, n * key.shape[2] // heads]
                        for j in range(tokens)
                    ]
                    for n in range(heads)
                ]
            )
            chosen = [before] * heads
            if top_k is not None and before:
                of_landmarks = scores[:, [landmark for _, _, landmark in before]]
                if share_heads:
                    of_landmarks = np.array([_softmax(row) for row in of_landmarks])
                    of_landmarks[:] = of_landmarks.max(axis=0)
                chosen = [
                    [before[i] for i in np.argsort(-row, kind="stable")[:top_k]]
                    for row in of_landmarks
                ]
            for n in range(heads):
                seen = [j for j in blocks[own][1] if j <= t]
                stage = seen + [landmark for _, _, landmark in chosen[n]]
                if not stage:
                    continue
                first_stage = _softmax(scores[n, stage])
                out[b, n, t, seen] = first_stage[: len(seen)]
                for p, (_, others, _) in zip(first_stage[len(seen) :], chosen[n], strict=True):
                    out[b, n, t, others] = p * _softmax(scores[n, others])
    return out


def _softmax(scores):
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()

"""Softmax attention of one query to every prefix, in NumPy float64."""

import numpy as np


def softmax_scan(score, value, segment_ids=None, initial=None):
    """Returns output [B, T, N, V] and the last state's log-sum-exp [B, N] and mean [B, N, V].

    A row's weights are softmax(s_0 .. s_t), over the j from which the segment id has not changed
    until t. The initial state, a log-sum-exp and a mean, is like a token -1.
    """
    score, value = (np.asarray(a, np.float64) for a in (score, value))
    batch, tokens, heads = score.shape
    group = heads // value.shape[2]
    out, total = np.zeros((batch, tokens, heads, value.shape[3])), np.zeros(score.shape)
    for b, t, n in np.ndindex(score.shape):
        first = t
        while first and (segment_ids is None or segment_ids[b, first] == segment_ids[b, first - 1]):
            first -= 1
        scores, values = score[b, first : t + 1, n], value[b, first : t + 1, n // group]
        if first == 0 and initial is not None:
            scores = np.append(scores, np.float64(initial[0][b, n]))
            values = np.vstack([values, np.float64(initial[1][b, n])])
        largest = scores.max()
        if np.isneginf(largest):
            total[b, t, n] = -np.inf
            continue
        weights = np.exp(scores - largest)
        total[b, t, n] = largest + np.log(weights.sum())
        out[b, t, n] = weights @ values / weights.sum()
    return out, (total[:, -1], out[:, -1])

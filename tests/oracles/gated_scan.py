"""The gated scan, summed pair by pair, in NumPy float64."""

import numpy as np


def gated_scan(x, log_decay, segment_ids=None, initial=None):
    """Returns output [B, T, D] and last state [B, D].

    h_t = sum_{j<=t} (prod_{j<i<=t} a_i) x_j over the j from which the segment id has not changed
    until t; a state before token 0 counts as if it were the x of a token -1.
    """
    x, decay = np.asarray(x, np.float64), np.exp(np.asarray(log_decay, np.float64))
    out = np.zeros_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        left = np.ones(x.shape[2])
        for j in reversed(range(t + 1)):
            out[b, t] += left * x[b, j]
            left = left * decay[b, j]
            if segment_ids is not None and j and segment_ids[b, j] != segment_ids[b, j - 1]:
                break
        else:
            if initial is not None:
                out[b, t] += left * np.asarray(initial, np.float64)[b]
    return out, out[:, -1]

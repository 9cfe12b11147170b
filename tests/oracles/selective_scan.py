"""The selective scan, S6, channel by channel and pair by pair, in NumPy float64."""

import numpy as np


def selective_scan(
    x, delta, A, B, C, D=None, bias=None, softplus=True, segment_ids=None, initial=None, z=None
):
    """Returns output [B, T, D] and last state [B, N, D]; B and C are [B, T, N] or [B, T, G, N].

    y_t = sum_{j<=t} sum_n C_tn exp(A_n sum_{j<i<=t} delta_i) B_jn delta_j x_j + D x_t, over the j
    from which the segment id has not changed until t; the step is softplus(delta + bias).
    A gate z multiplies y by silu(z).
    """
    x, delta, A, B, C = (np.asarray(a, np.float64) for a in (x, delta, A, B, C))
    batch, tokens, channels = x.shape
    delta = delta + (0.0 if bias is None else np.asarray(bias, np.float64))
    delta = np.log1p(np.exp(-np.abs(delta))) + np.maximum(delta, 0) if softplus else delta
    out, last = np.zeros_like(x), np.zeros((batch, A.shape[1], channels))
    for b, d, t in np.ndindex(batch, channels, tokens):
        group = d // (channels // B.shape[2]) if B.ndim == 4 else ()
        hidden, passed = np.zeros(A.shape[1]), 0.0
        for j in reversed(range(t + 1)):
            hidden += np.exp(A[d] * passed) * B[b, j][group] * delta[b, j, d] * x[b, j, d]
            passed += delta[b, j, d]
            if segment_ids is not None and j and segment_ids[b, j] != segment_ids[b, j - 1]:
                break
        else:
            if initial is not None:
                hidden += np.exp(A[d] * passed) * np.asarray(initial, np.float64)[b, :, d]
        out[b, t, d] = C[b, t][group] @ hidden
        out[b, t, d] += 0.0 if D is None else np.float64(D[d]) * x[b, t, d]
        if z is not None:
            out[b, t, d] *= np.float64(z[b, t, d]) / (1 + np.exp(-np.float64(z[b, t, d])))
        last[b, :, d] = hidden
    return out, last

"""Tiled attention in numpy float64, one pair at a time, straight from the definition."""

import numpy as np

WEIGHTS = {
    "softmax": np.exp,
    "sigmoid": lambda s: np.exp(-np.logaddexp(0, -s)),
    "softplus": lambda s: np.logaddexp(0, s),
    "relu": lambda s: max(s, 0.0),
}


def tiled_weights(
    query,
    key,
    *,
    scale=None,
    logits_soft_cap=None,
    weights="softmax",
    normalise=True,
    logit_bias=0.0,
    bias=None,
    alibi_slopes=None,
    relative_bias=None,
    sink=None,
    row_statistic=None,
    reweight=None,
    group_size=None,
    allowed=None,
    query_offset=0,
):
    """Returns the matrix of weights [B, N, T, S] and the log-sum-exp [B, T, N].

    `bias` and `allowed` broadcast to [B, N, T, S], `sink` and `row_statistic` to [B, T, N],
    `relative_bias` to [N, 2 R + 1]; `query_offset` is a number or one per batch row.
    """
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    batch, queries, heads, features = query.shape
    keys, kv_heads = key.shape[1:3]
    scale = features**-0.5 if scale is None else scale
    shape = (batch, heads, queries, keys)
    bias = np.broadcast_to(0.0 if bias is None else np.asarray(bias, np.float64), shape)
    allowed = np.broadcast_to(True if allowed is None else np.asarray(allowed), shape)
    offset = np.broadcast_to(query_offset, batch)
    sink = np.broadcast_to(-np.inf if sink is None else sink, (batch, queries, heads))
    statistic = np.broadcast_to(
        0.0 if row_statistic is None else np.asarray(row_statistic, np.float64), sink.shape
    )
    table = np.zeros((1, 1)) if relative_bias is None else np.asarray(relative_bias, np.float64)
    table = np.broadcast_to(table, (heads, table.shape[1]))
    reach = table.shape[1] // 2
    matrix = np.zeros(shape)
    lse = np.full((batch, queries, heads), -np.inf)
    for b, n, i in np.ndindex(batch, heads, queries):
        scores = {}
        for j in range(keys):
            if not allowed[b, n, i, j]:
                continue
            score = scale * (query[b, i, n] @ key[b, j, n // (heads // kv_heads)])
            if logits_soft_cap is not None:
                score = logits_soft_cap * np.tanh(score / logits_soft_cap)
            distance = j - (i + offset[b])
            score += (
                logit_bias + bias[b, n, i, j] + table[n, np.clip(distance, -reach, reach) + reach]
            )
            if alibi_slopes is not None:
                score -= alibi_slopes[n] * abs(distance)
            scores[j] = score
        if group_size is not None:
            scores = _by_landmarks(scores, group_size)
        weigh = WEIGHTS[weights]
        if row_statistic is not None or not normalise:
            log_sum = statistic[b, i, n]
            row = {} if log_sum == -np.inf else {j: weigh(s) for j, s in scores.items()}
            if weights == "softmax":
                row = {j: np.exp(scores[j] - log_sum) for j in row}
            else:
                row = {j: weight * np.exp(-log_sum) for j, weight in row.items()}
            if reweight is None:
                lse[b, i, n] = log_sum
            else:
                power, threshold = reweight
                row = {j: max(weight - threshold, 0.0) for j, weight in row.items()}
                largest = max(row.values(), default=0.0)
                if largest < 1e-5:
                    continue
                row = {j: (weight / largest) ** power for j, weight in row.items()}
                total = sum(row.values())
                row = {j: weight / total for j, weight in row.items()}
                lse[b, i, n] = power * np.log(largest) + np.log(total)
            for j, weight in row.items():
                matrix[b, n, i, j] = weight
            continue
        shift = max(sink[b, i, n], max(scores.values(), default=-np.inf) * (weights == "softmax"))
        if shift == -np.inf:
            shift = 0.0
        if weights == "softmax":
            row = {j: np.exp(score - shift) for j, score in scores.items()}
        else:
            row = {j: weigh(score) * np.exp(-shift) for j, score in scores.items()}
        total = sum(row.values()) + np.exp(sink[b, i, n] - shift)
        if total > 0:
            for j, weight in row.items():
                matrix[b, n, i, j] = weight / total
            lse[b, i, n] = shift + np.log(total)
    return matrix, lse


def _by_landmarks(scores, size):
    """Returns the scores of keys that share, in groups, what the group's last key gets."""
    results = {}
    for landmark in scores:
        group = [j for j in scores if landmark - size < j < landmark]
        if landmark % size == size - 1 and group:
            log_sum = np.logaddexp.reduce([scores[j] for j in group])
            results |= {j: scores[landmark] + scores[j] - log_sum for j in group}
    return results


def tiled_attention(query, key, value, **options):
    """Returns output [B, T, N, V] and log-sum-exp [B, T, N]; the options of `tiled_weights`."""
    matrix, lse = tiled_weights(query, key, **options)
    value = np.asarray(value, np.float64)
    value = np.repeat(value, matrix.shape[1] // value.shape[2], axis=2)
    return np.einsum("bnts,bsnv->btnv", matrix, value), lse

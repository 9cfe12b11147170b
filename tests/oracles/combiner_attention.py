"""Combiner token by token, in NumPy float64."""

import numpy as np


def _softmax(scores):
    w = np.exp(np.array(scores) - np.max(scores))
    return w / w.sum()


def combiner_attention(
    query, key, value, span_size, form="fixed", is_causal=False, scale=None, segment_ids=None
):
    """Returns the output [B, T, N, V]."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, tokens, heads, features = query.shape
    scale = features**-0.5 if scale is None else scale
    out = np.zeros((batch, tokens, heads, value.shape[3]))
    for b in range(batch):
        documents = [[0]]
        for t in range(1, tokens):
            if segment_ids is not None and segment_ids[b, t] != segment_ids[b, t - 1]:
                documents.append([])
            documents[-1].append(t)
        for document in documents:
            for i, t in enumerate(document):
                if form == "fixed":
                    spans = [
                        document[first : first + span_size]
                        for first in range(0, len(document), span_size)
                    ]
                    own = i // span_size
                    direct = [j for j in spans[own] if j <= t or not is_causal]
                    spans = [
                        s for r, s in enumerate(spans) if r < own or (r > own and not is_causal)
                    ]
                else:
                    # The binary digits of i, from the lowest: spans back to the beginning.
                    direct, spans, end = [t], [], i
                    for level in range(i.bit_length()):
                        if i >> level & 1:
                            spans.append(document[end - 2**level : end])
                            end -= 2**level
                    assert end == 0
                for n in range(heads):
                    of = n * key.shape[2] // heads
                    scores = [scale * query[b, t, n] @ key[b, j, of] for j in direct]
                    values = [value[b, j, of] for j in direct]
                    for span in spans:
                        span_query = np.max([query[b, j, n] for j in span], axis=0)
                        span_key = np.max([key[b, j, of] for j in span], axis=0)
                        given = _softmax([scale * span_query @ key[b, j, of] for j in span])
                        scores.append(scale * query[b, t, n] @ span_key)
                        values.append(
                            sum(p * value[b, j, of] for p, j in zip(given, span, strict=True))
                        )
                    weights = _softmax(scores)
                    out[b, t, n] = sum(w * v for w, v in zip(weights, values, strict=True))
    return out

"""`attention.spans`: which spans there are, what is pooled over them, and who sees them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention.spans import make_spans
from tests.numerics import assert_close

B, T = 40, 13

pytestmark = pytest.mark.usefixtures("quick_compilation")

CHANGES = np.random.default_rng(0).random((B, T)) < np.linspace(0, 1, B)[:, None]
IDS = np.cumsum(CHANGES, axis=1) % 3


def _listed(ids, size, whole):
    """Returns the spans of a row, lists of tokens, those that are listed, and all documents."""
    documents = [[0]]
    for t in range(1, T):
        if ids is not None and ids[t] != ids[t - 1]:
            documents.append([])
        documents[-1].append(t)
    spans, listed = [], []
    for number, document in enumerate(documents):
        for first in range(0, len(document), size):
            span = document[first : first + size]
            spans.append((number, span))
            lone = ids is not None and len(document) <= size
            if len(span) == size if whole else not lone:
                listed.append((number, span))
    return spans, listed


@pytest.mark.parametrize("whole", (False, True))
@pytest.mark.parametrize("size", (1, 3, 20))
@pytest.mark.parametrize("ids", (None, IDS), ids=("one document", "documents"))
def test_spans(ids, size, whole):
    x = np.random.default_rng(1).standard_normal((B, T, 2))

    @jax.jit
    def run(x, ids):
        spans = make_spans(size, B, T, ids, whole=whole)
        masks = spans.earlier(), spans.others()
        count = spans.start.shape[1]
        return (
            jnp.broadcast_to(spans.count, (B, count)),
            jnp.where(spans.inside[..., None], spans.split(x), jnp.nan),
            {how: spans.pooled(x, how) for how in ("mean", "max")},
            [jnp.broadcast_to(m.to_dense(T, count)[:, 0], (B, T, count)) for m in masks],
        )

    counts, parts, pooled, (earlier, others) = jax.tree.map(np.asarray, run(jnp.float32(x), ids))
    most = counts.shape[1]
    assert most == max(
        T // size if whole else -(-T // size) if ids is None else 2 * T // (size + 1), 1
    )
    for b in range(B):
        spans, listed = _listed(None if ids is None else ids[b], size, whole)
        assert counts[b].tolist() == [len(s) for _, s in listed] + [0] * (most - len(listed))
        expected = {how: np.zeros((most, 2)) for how in pooled}
        for i, (_, span) in enumerate(listed):
            assert_close(parts[b, i, : len(span)], x[b, span])
            expected["mean"][i], expected["max"][i] = x[b, span].mean(0), x[b, span].max(0)
        assert_close({how: y[b] for how, y in pooled.items()}, expected)
        for document, span in spans:
            for t in span:
                before = [d == document and s[0] < span[0] for d, s in listed]
                other = [d == document and s != span for d, s in listed]
                assert earlier[b, t, : len(listed)].tolist() == before
                assert not earlier[b, t, len(listed) :].any()
                assert others[b, t, : len(listed)].tolist() == other
                assert not others[b, t, len(listed) :].any()


def test_as_many_spans_as_there_can_be():
    """Documents of one token more than a span have most."""
    ids = np.repeat(np.arange(4), 4)[None]
    for size, whole, counts in (3, False, [3, 1] * 4), (4, False, [0] * 6), (4, True, [4] * 4):
        count = jax.jit(lambda ids: make_spans(size, 1, 16, ids, whole=whole).count)(ids)  # noqa: B023
        assert count.tolist() == [counts]


@pytest.mark.parametrize("how", ("mean", "max"))
def test_low_precision(how):
    """Sums do not stop at 256 ones, and nothing becomes of a span that is not there."""
    spans = make_spans(1000, 1, 1500, whole=False)
    pooled = spans.pooled(jnp.ones((1, 1500, 1), jnp.bfloat16), how)
    assert pooled.dtype == jnp.bfloat16 and pooled.ravel().tolist() == [1, 1]
    spans = make_spans(2000, 1, 1500, whole=True)

    def loss(x):
        return spans.pooled(x, how).sum()

    value, gradient = jax.value_and_grad(loss)(jnp.ones((1, 1500, 1)))
    assert value == 0 and not gradient.any()


def test_wrong_input():
    for size in (0, 2.0):
        with pytest.raises(ValueError, match=f"size: must be a positive integer; got {size}"):
            make_spans(size, 1, 3)
    with pytest.raises(ValueError, match="segment_ids: must have shape"):
        make_spans(2, 1, 3, np.zeros((1, 4), int))
    with pytest.raises(ValueError, match="how: must be 'mean' or 'max'; got 'sum'"):
        make_spans(2, 1, 3).pooled(jnp.ones((1, 3)), "sum")

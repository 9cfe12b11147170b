"""`flex_prefill_attention`: its definition, and the blocks it keeps of known attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from attention import flex_prefill_attention, softmax_attention
from tests.numerics import assert_close
from tests.oracles import flex_prefill_attention as oracle
from tests.sharding import COLLECTIVE, mesh, place

B, T, N, K, H, BLOCK = 4, 47, 4, 2, 8, 4
V = T  # so that values can say what was attended to

CASES = {
    "both kinds": dict(gamma=0.6, tau=0.12, min_budget=BLOCK),
    "columns and diagonals": dict(gamma=0.6, tau=0.0, min_budget=5, max_budget=13, scale=0.5),
    "everything": dict(gamma=1.01, tau=2.0, min_budget=1),
}
RUN = {
    case: jax.jit(functools.partial(flex_prefill_attention, block_size=BLOCK, **options))
    for case, options in CASES.items()
}

pytestmark = pytest.mark.usefixtures("quick_compilation", "x64")


def _arrays(tokens=T):
    rng = np.random.default_rng(0)
    shapes = (B, tokens, N, H), (B, tokens, K, H), (B, tokens, K, V)
    return [rng.standard_normal(shape) for shape in shapes]


def _kept(case, query, key):
    """Returns which blocks are kept, [B, N, blocks, blocks], as outputs show it."""
    out = RUN[case](query, key, np.broadcast_to(np.eye(T)[:, None], (B, T, K, V)))
    seen = np.pad(np.moveaxis(np.asarray(out), 2, 1) > 0, [(0, 0)] * 2 + [(0, -T % BLOCK)] * 2)
    blocks = -(-T // BLOCK)
    return seen.reshape(B, N, blocks, BLOCK, blocks, BLOCK).any((3, 5))


def _expected(case, query, key):
    """Returns of the first row's heads whether they are query-aware, and the blocks they keep."""
    options = dict(max_budget=None, scale=H**-0.5, block_size=BLOCK) | CASES[case]
    pairs = [oracle.kept_blocks(query[0, :, n], key[0, :, n * K // N], **options) for n in range(N)]
    kept = np.zeros((N, *(-(-T // BLOCK),) * 2), bool)
    for of_head, (_, blocks) in zip(kept, pairs, strict=True):
        of_head[tuple(np.transpose(list(blocks)))] = True
    return [aware for aware, _ in pairs], kept


@pytest.mark.parametrize("case", ("both kinds", "columns and diagonals"))
def test_against_the_oracle(case):
    arrays = _arrays()
    out = RUN[case](*arrays)
    options = dict(block_size=BLOCK) | CASES[case]
    expected = oracle.flex_prefill_attention(*(x[:1] for x in arrays), **options)
    assert_close(out[:1], expected, jnp.float64)
    aware, kept = _expected(case, *arrays[:2])
    np.testing.assert_array_equal(_kept(case, *arrays[:2])[0], kept)
    assert not all(aware) and any(aware) == (case == "both kinds")


def test_gradients():
    """Along random directions, against differences: choices do not change along short ones."""

    def loss(*arrays):
        return jnp.sum(jnp.sin(3 * RUN["both kinds"](*arrays)))

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    arrays = _arrays()
    for i, gradient in enumerate(run(*arrays)[1]):
        direction = np.random.default_rng(i).standard_normal(gradient.shape)
        after, before = (
            run(*arrays[:i], arrays[i] + step * direction, *arrays[i + 1 :])[0]
            for step in (1e-6, -1e-6)
        )
        assert_close(np.sum(gradient * direction), (after - before) / 2e-6)


def test_what_is_causal_attention():
    """All mass, a budget of all tokens, and two blocks or fewer."""
    arrays = _arrays()
    expected = softmax_attention(*arrays, is_causal=True)
    assert_close(RUN["everything"](*arrays), expected, jnp.float64)
    for tokens, options in ((1, {}), (8, dict(block_size=BLOCK, min_budget=1, gamma=0.1))):
        out = flex_prefill_attention(*(x[:, :tokens] for x in arrays), **options)
        assert_close(out, expected[:, :tokens], jnp.float64)


def test_the_first_block_and_the_diagonal_are_kept():
    for case in CASES:
        kept = _kept(case, *_arrays()[:2])
        assert kept[..., 0].all() and np.diagonal(kept, axis1=2, axis2=3).all()


def _columns_and_diagonals(kept):
    """Returns the columns and diagonals that are kept as a whole."""
    blocks = len(kept)
    columns = {j for j in range(blocks) if kept[j:, j].all()}
    return columns, {s for s in range(blocks) if np.diagonal(kept, -s).all()}


def test_without_a_threshold_all_is_columns_and_diagonals():
    for kept in _kept("columns and diagonals", *_arrays()[:2]).reshape(-1, 12, 12):
        columns, diagonals = _columns_and_diagonals(kept)
        for i, j in np.argwhere(kept):
            assert j in columns or i - j in diagonals


def test_stripes_are_found():
    """One key that all queries look for, and keys that are looked for from a distance."""
    query, key, _ = (np.zeros_like(x) for x in _arrays())
    query[..., 0], key[:, 22, :, 0] = 9, 9
    for kept in _kept("columns and diagonals", query, key)[0]:
        assert {0, 22 // BLOCK} <= _columns_and_diagonals(kept)[0]

    angle = np.arange(T) / 3
    turns = 9 * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    query[..., :2], key[..., :2] = np.roll(turns, 14, axis=0)[:, None], turns[:, None]
    for kept in _kept("columns and diagonals", query, key)[0]:
        assert {0, 14 // BLOCK} <= _columns_and_diagonals(kept)[1]


@pytest.mark.parametrize(("blocks", "aware"), ((3, False), (8, True)))
def test_uniform_attention(blocks, aware):
    """Means tell it well, but for the half of the last block that its queries do not see."""
    zeros = np.zeros((blocks * 16, H))
    options = dict(gamma=0.9, tau=0.1, block_size=16, min_budget=16, max_budget=None, scale=1.0)
    assert oracle.kept_blocks(zeros, zeros, **options)[0] == aware


def test_only_the_last_queries_choose():
    """Unless the head is query-aware; values never do."""
    query, key, value = _arrays()
    case = "columns and diagonals"
    before = RUN[case](query, key, value)
    early = (np.arange(T) < T - BLOCK)[:, None, None]
    for token in (0, 11, 42):
        changed = query + (np.arange(T) == token)[:, None, None]
        differs = np.any(RUN[case](changed, key, value) != before, axis=(0, 2, 3))
        assert differs[token:].sum() == (token > 0) and not differs[:token].any()
        later = value + (np.arange(T) >= token)[:, None, None]
        for name in CASES:
            after = RUN[name](query, key, later)
            np.testing.assert_array_equal(after[:, :token], RUN[name](query, key, value)[:, :token])
    after = RUN[case](np.where(early, query, -query), key, value)
    assert np.any(after != before, axis=(0, 2, 3))[20:].all()


def test_sharded():
    """Without any collective, the choice included."""
    arrays, devices = _arrays(), mesh(AxisType.Explicit)
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    compiled = RUN["both kinds"].lower(*placed).compile()
    assert_close(compiled(*placed), RUN["both kinds"](*arrays), jnp.float64)
    assert not COLLECTIVE.findall(compiled.as_text())


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (dict(block_size=0), "block_size: must be a positive integer; got 0"),
        (dict(min_budget=1.5), "min_budget: must be a positive integer; got 1.5"),
        (dict(max_budget=0), "max_budget: must be a positive integer; got 0"),
        (dict(max_budget=511), "max_budget: must be at least min_budget, 512; got 511"),
        (dict(gamma=0), "gamma: must be a positive number; got 0"),
        (dict(gamma="all"), "gamma: must be a positive number; got 'all'"),
        (dict(tau=-0.1), "tau: must be a number and not negative; got -0.1"),
    ),
)
def test_wrong_input(options, message):
    with pytest.raises(ValueError, match=message):
        flex_prefill_attention(*_arrays(), **options)


def test_kernel_takes_the_default_blocks():
    arrays = [jax.ShapeDtypeStruct((1, 2048, 2, 64), jnp.bfloat16)] * 3
    named = functools.partial(flex_prefill_attention, implementation="pallas_tpu")
    with jax.enable_x64(False):
        assert jax.eval_shape(named, *arrays).shape == (1, 2048, 2, 64)
    message = "flex_prefill_attention: .* blocks of a list must be multiples of 16 tokens"
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(named, block_size=24), *arrays)

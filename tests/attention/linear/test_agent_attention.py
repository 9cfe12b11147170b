"""`agent_attention`: its definition, its rank and row sums, its agents, and their biases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from attention import agent_attention, agent_biases
from tests.numerics import assert_close
from tests.oracles import agent_attention as oracle
from tests.sharding import COLLECTIVE, mesh, place

B, T, S, N, K, H, V = 2, 16, 11, 4, 2, 8, 6
RNG = np.random.default_rng(1)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _arrays(dtype=jnp.float32, tokens=T, keys=S, batch=B):
    rng = np.random.default_rng(0)
    shapes = (batch, tokens, N, H), (batch, keys, K, H), (batch, keys, K, V)
    return [np.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


BIASES = dict(agent_bias=RNG.normal(size=(N, 6, S)), query_bias=RNG.normal(size=(B, 1, T, 6)))
# 5 x 3 of which 3 x 2 parts share tokens.
IMAGE = dict(shape=(5, 3), num_agents=(3, 2), prefix_tokens=1, **BIASES)
CASES = {
    "image, biases": IMAGE | dict(scale=0.7),
    "sequence": dict(num_agents=(5,), scale=1.0, query_scale=0.2),
    "agents": dict(agents=RNG.normal(size=(B, 3, N, H))),
}


@pytest.mark.parametrize("case", CASES)
def test_against_the_oracle(case, x64):
    arrays = _arrays(jnp.float64)
    out = jax.jit(functools.partial(agent_attention, **CASES[case]))(*arrays)
    assert_close(out, oracle.agent_attention(*arrays, **CASES[case]), jnp.float64)


def test_gradients():
    """By all arrays, the biases too, and in bfloat16 the output."""
    arrays = dict(zip(("query", "key", "value"), _arrays(), strict=True))
    arrays |= {name: np.float32(x) for name, x in BIASES.items()}
    options = {name: x for name, x in IMAGE.items() if name not in BIASES}

    def loss(implementation, arrays):
        out = agent_attention(**arrays, **options, implementation=implementation)
        return jnp.sum(jnp.sin(3 * out)), out

    @jax.jit
    def run(arrays):
        found = [
            jax.grad(functools.partial(loss, name), has_aux=True)(arrays)
            for name in ("xla", "reference")
        ]
        low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), arrays)
        return *found, loss(None, low)[1]

    found, defined, low = run(arrays)
    assert_close(found, defined, factor=2)
    assert low.dtype == jnp.bfloat16
    assert_close(low, found[1], jnp.bfloat16)


def test_implied_matrix_and_more_agents_than_tokens(x64):
    """Its rank is that of the agents, and its rows sum to 1: the values are unit vectors."""
    query, key, _ = _arrays(jnp.float64, keys=T)
    value = np.array(np.broadcast_to(np.eye(T)[None, :, None], (B, T, K, T)))

    @jax.jit
    def run(*arrays):
        one = [x[:, :1] for x in arrays]
        return [agent_attention(*arrays, num_agents=n) for n in (3, 1, 20)] + [
            agent_attention(*one, num_agents=3)
        ]

    few, single, many, alone = run(query, key, value)
    matrices = np.moveaxis(few, 2, 1)
    assert_close(matrices.sum(axis=-1), np.ones((B, N, T)), jnp.float64)
    assert (np.linalg.matrix_rank(matrices, tol=1e-9) == 3).all()
    assert_close(single, np.broadcast_to(single[:, :1], single.shape), jnp.float64)
    assert_close(many, oracle.agent_attention(query, key, value, num_agents=(20,)), jnp.float64)
    assert_close(alone, np.repeat(value[:, :1], N // K, axis=2), jnp.float64)


def test_default_agents():
    query, key, value = _arrays(tokens=100)
    found = jax.eval_shape(functools.partial(agent_attention, shape=(10, 10)), query, key, value)
    assert found.shape == (B, 100, N, V)
    biased = functools.partial(agent_attention, shape=(10, 10), agent_bias=np.zeros((48, S)))
    with pytest.raises(ValueError, match=r"agent_bias: .*\(2, 4, 49, 11\)"):
        jax.eval_shape(biased, query, key, value)


def test_biases(x64):
    shape = (6, 9)
    table, rows, columns = (RNG.normal(size=(N, 5, *x)) for x in ((4, 5), (6,), (9,)))
    prefix = RNG.normal(size=(N, 5, 2))
    found = agent_biases(table, rows, columns, prefix, shape=shape)
    wanted = oracle.resized(table, shape) + rows[..., None] + columns[:, :, None]
    wanted = np.concatenate([prefix, wanted.reshape(N, 5, -1)], axis=2)
    assert_close(found, wanted, jnp.float64)
    same = agent_biases(table, rows[..., :4] * 0, columns[..., :5] * 0, shape=(4, 5))
    np.testing.assert_array_equal(same, table.reshape(N, 5, -1))


def test_sharded():
    arrays, devices = _arrays(batch=4), mesh(AxisType.Auto)
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    options = dict(shape=(4, 4), num_agents=3)
    run = jax.jit(functools.partial(agent_attention, **options)).lower(*placed).compile()
    assert_close(run(*placed), oracle.agent_attention(*arrays, shape=(4, 4), num_agents=(3, 3)))
    assert not COLLECTIVE.findall(run.as_text())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        (dict(shape=(3, 5)), ValueError, r"shape: \(3, 5\) has 15 tokens; query has 16"),
        (dict(num_agents=0), ValueError, "num_agents: must be a positive integer.*got 0"),
        (dict(prefix_tokens=16), ValueError, "prefix_tokens: .* from 0 to 15; got 16"),
        (dict(agents=np.ones((B, 3, K, H))), ValueError, r"agents: must be \[2, n, 4, 8\]"),
        (dict(agents=np.ones((B, 3, N, H)), num_agents=3), ValueError, "agents: are given"),
        (dict(query_bias=np.ones((T, 3))), ValueError, r"query_bias: shape \(16, 3\) does not"),
        (dict(agent_bias=np.ones((5, S), int)), TypeError, "agent_bias: must be floating"),
    ),
)
def test_wrong_input(options, error, message):
    with pytest.raises(error, match=message):
        agent_attention(*_arrays(), **options)


def test_wrong_biases():
    table, rows = np.ones((N, 5, 7, 7)), np.ones((N, 5, 7))
    with pytest.raises(ValueError, match=r"columns: must start with \(4, 5\)"):
        agent_biases(table, rows, np.ones((N, 7)), shape=(7, 7))
    with pytest.raises(ValueError, match=r"shape: must be \(height, width\); got 7"):
        agent_biases(table, rows, rows, shape=7)
    with pytest.raises(ValueError, match=r"table: must be \[N, n, a, b\]"):
        agent_biases(rows, rows, rows, shape=(7, 7))

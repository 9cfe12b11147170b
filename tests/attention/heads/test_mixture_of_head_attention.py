"""`mixture_of_head_attention`: its definition, what its gates add up to, and its loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import attention
from attention import head_balance_loss, mixture_of_head_attention, mixture_of_head_gates
from tests.numerics import assert_close
from tests.oracles import mixture_of_head_attention as oracle
from tests.sharding import collectives, mesh, place

B, T, N, K, H, V = 2, 11, 8, 4, 6, 5
SHARED, ROUTED, TOP = 3, 5, 2

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _arrays(dtype=jnp.float32, batch=B, tokens=T):
    rng = np.random.default_rng(0)
    shapes = (batch, tokens, N, H), (batch, tokens, K, H), (batch, tokens, K, V)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


def _logits(dtype=jnp.float32, batch=B, tokens=T):
    rng = np.random.default_rng(1)
    counts = dict(shared_logits=SHARED, routed_logits=ROUTED, balance_logits=2)
    return {
        name: jnp.asarray(rng.standard_normal((batch, tokens, count)), dtype)
        for name, count in counts.items()
    }


SIZES = dict(num_shared=SHARED, top_k=TOP)
IDS = np.sort(np.random.default_rng(2).integers(0, 3, (B, T)), axis=1)


def test_against_the_oracle(x64):
    """With routers, with none, and with some; in one program."""
    arrays, logits = _arrays(jnp.float64), _logits(jnp.float64)
    cases = [
        logits | SIZES | dict(is_causal=True),
        logits | SIZES | dict(segment_ids=IDS, scale=0.3),
        SIZES | dict(is_causal=True, segment_ids=IDS),
        SIZES | dict(routed_logits=logits["routed_logits"]),
        SIZES | dict(balance_logits=logits["balance_logits"]),
        dict(num_shared=0, top_k=3),
        dict(num_shared=N, top_k=0, shared_logits=jnp.tile(logits["shared_logits"], 3)[..., :N]),
    ]
    outs = jax.jit(lambda: [mixture_of_head_attention(*arrays, **case) for case in cases])()
    for out, case in zip(outs, cases, strict=True):
        assert_close(out, oracle.mixture_of_head_attention(*arrays, **case), jnp.float64)


def test_gradients():
    def loss(implementation, arrays, logits):
        out = mixture_of_head_attention(
            *arrays, **logits, **SIZES, is_causal=True, implementation=implementation
        )
        return jnp.sum(jnp.sin(3 * out)), out

    @jax.jit
    def run(arrays, logits):
        gradient = jax.grad(loss, (1, 2), has_aux=True)
        return [gradient(name, arrays, logits) for name in ("xla", "reference")]

    assert_close(*run(_arrays(), _logits()), factor=4)


def test_gradients_of_routers_by_differences(x64):
    """Heads that are left out give nothing to their queries, and routers learn by the others."""
    arrays, logits = _arrays(jnp.float64), _logits(jnp.float64)

    def loss(query, logits):
        return jnp.sum(jnp.sin(mixture_of_head_attention(query, *arrays[1:], **logits, **SIZES)))

    d_query, gradients = jax.jit(jax.grad(loss, (0, 1)))(arrays[0], logits)
    gates = oracle.gates(arrays[0], **SIZES, **logits)
    assert np.array_equal(np.any(d_query != 0, axis=-1), gates > 0)

    def defined(logits):
        return np.sum(np.sin(oracle.mixture_of_head_attention(*arrays, **SIZES, **logits)))

    for name, array in logits.items():
        assert np.all(np.any(gradients[name] != 0, axis=(0, 1)))
        for index in ((0, 3, 1), (1, T - 1, 0)):
            step = np.zeros(array.shape)
            step[index] = 1e-5
            changed = [defined(logits | {name: np.asarray(array) + s * step}) for s in (1, -1)]
            difference = (changed[0] - changed[1]) / 2e-5
            np.testing.assert_allclose(gradients[name][index], difference, rtol=1e-6, atol=1e-9)


def test_zero_routers_are_plain_attention():
    arrays, logits = _arrays(), jax.tree.map(jnp.zeros_like, _logits())

    @jax.jit
    def run(arrays, logits):
        outs = [
            mixture_of_head_attention(*arrays, num_shared=SHARED, top_k=ROUTED, **given)
            for given in (logits, {})
        ]
        gates = mixture_of_head_gates(arrays[0], **SIZES, **logits)
        return outs, attention.softmax_attention(*arrays), gates

    outs, expected, gates = run(arrays, logits)
    assert_close(outs, [expected, expected])
    expected = [1.0] * (SHARED + TOP) + [0.0] * (ROUTED - TOP)
    assert_close(gates, np.broadcast_to(expected, gates.shape))


def test_sums_of_gates():
    """Shared gates add up to M a_1, routed ones to k a_2, with a_1 + a_2 = 2."""
    query, logits = _arrays()[0], _logits()
    gates = jax.jit(functools.partial(mixture_of_head_gates, **SIZES))(query, **logits)
    gates = np.asarray(gates)
    a = 2 * jax.nn.softmax(logits["balance_logits"])
    assert_close(gates[..., :SHARED].sum(-1), SHARED * a[..., 0])
    assert_close(gates[..., SHARED:].sum(-1), TOP * a[..., 1])
    assert ((gates > 0).sum(-1) == SHARED + TOP).all()


def test_routing_by_norms():
    """It does not change when queries are turned or all multiplied, and learns straight through."""
    query = _arrays()[0]

    @jax.jit
    def gates_of(query):
        changed = attention.positions.rope(query), 100 * query
        gates = [mixture_of_head_gates(x) for x in (query, *changed)]
        return *gates, attention.head_norm_logits(query, SHARED)

    gates, turned, multiplied, logits = map(np.asarray, gates_of(query))
    assert gates.sum() == B * T * (N // 2 + N // 4)
    assert (gates == turned).all() and (gates == multiplied).all()
    np.testing.assert_allclose(logits.std(axis=-1, ddof=1), 1, rtol=1e-5)

    def gate(query, straight):
        gates = mixture_of_head_gates(query, **SIZES, straight_through=straight)
        return jnp.sum(gates * jnp.arange(N)), gates

    @jax.jit
    def run(query):
        return [jax.grad(gate, has_aux=True)(query, straight) for straight in (False, True)]

    (exact, binary), (through, same) = run(query)
    assert (exact == 0).all() and np.isfinite(through).all()
    assert (through[:, :, SHARED:] != 0).all() and (through[:, :, :SHARED] == 0).all()
    assert_close(same, binary)
    # Equal queries, and none, have no standard deviation to divide by.
    _, (through, gates) = run(jnp.zeros_like(query))
    assert (through == 0).all() and (gates.sum(-1) == SHARED + TOP).all()


def test_balance_loss():
    logits = np.asarray(_logits(tokens=40)["routed_logits"])
    loss = jax.jit(head_balance_loss, static_argnums=1)
    assert_close(loss(logits, TOP), oracle.balance_loss(logits, TOP))
    kept = np.arange(40) < 25
    where = np.broadcast_to(kept, (B, 40))
    assert_close(loss(logits, TOP, where=where), oracle.balance_loss(logits[:, kept], TOP))
    # Each head equally often, and nearly equal weights: k. One pair of heads for all: at most R.
    turns = 1e-6 * np.stack([np.roll([1, 1, 0, 0, 0], t) for t in range(40)])[None].repeat(B, 0)
    np.testing.assert_allclose(loss(turns.astype(np.float32), TOP), TOP, rtol=1e-5)
    same = np.broadcast_to(np.float32([9, 9, 0, 0, 0]), turns.shape)
    assert TOP < loss(same, TOP) <= ROUTED
    gradient = jax.jit(jax.grad(head_balance_loss), static_argnums=1)(logits, TOP)
    assert (gradient != 0).all()


def test_causal_at_random_sizes():
    rng = np.random.default_rng(3)
    for _ in range(2):
        tokens, shared = int(rng.integers(2, 20)), int(rng.integers(0, N))
        top = int(rng.integers(1, N - shared + 1))
        run = jax.jit(
            functools.partial(
                mixture_of_head_attention, is_causal=True, num_shared=shared, top_k=top
            )
        )
        token, arrays = int(rng.integers(1, tokens)), _arrays(tokens=tokens)
        changed = [x + (np.arange(tokens) == token)[:, None, None] for x in map(np.asarray, arrays)]
        differs = np.any(run(*arrays) != run(*changed), axis=(0, 2, 3))
        assert differs[token] and not differs[:token].any()


def test_steps_with_routers():
    """The logits of a step are those of its tokens."""
    arrays, logits = _arrays(), _logits()
    step = jax.jit(functools.partial(attention.mixture_of_head_attention_step, **SIZES))
    whole = oracle.mixture_of_head_attention(*arrays, **logits, **SIZES, is_causal=True)
    state = attention.init_mixture_of_head_attention_state(B, 16, N, K, H, V)
    parts = []
    for part in (slice(0, 5), slice(5, 6), slice(6, T)):
        out, state = step(
            state,
            *(x[:, part] for x in arrays),
            **{name: x[:, part] for name, x in logits.items()},
        )
        parts.append(out)
    assert_close(np.concatenate(parts, axis=1), whole, factor=2)
    assert state.length == T


def test_one_token_of_bfloat16():
    arrays, logits = _arrays(jnp.bfloat16, tokens=1), _logits(jnp.bfloat16, tokens=1)
    out = jax.jit(functools.partial(mixture_of_head_attention, **SIZES))(*arrays, **logits)
    assert out.dtype == jnp.bfloat16
    gates = oracle.gates(arrays[0], **SIZES, **logits)
    value = jnp.repeat(arrays[2], N // K, axis=2)
    assert_close(out, gates[..., None] * np.asarray(value, np.float64), jnp.bfloat16)


@pytest.mark.parametrize("kind", (AxisType.Auto, AxisType.Explicit))
def test_sharded(kind):
    """Routing by norms compares heads of all devices; with routers a shard of rows is its own."""
    arrays, logits, devices = _arrays(batch=8), _logits(batch=8), mesh(kind)
    placed = [place(devices, x, "data", None, "tensor") for x in arrays]
    routers = {name: place(devices, x, "data") for name, x in logits.items()}

    @jax.jit
    def run(arrays, logits):
        return [
            mixture_of_head_attention(*arrays, **given, **SIZES, is_causal=True)
            for given in (logits, {})
        ]

    expected = [
        oracle.mixture_of_head_attention(*arrays, **given, **SIZES, is_causal=True)
        for given in (logits, {})
    ]
    assert_close(run(placed, routers), expected)
    rows = [place(devices, x, ("data", "tensor")) for x in (*arrays, *logits.values())]

    def of_rows(*x):
        given = dict(zip(logits, x[3:], strict=True))
        return mixture_of_head_attention(*x[:3], **given, **SIZES)

    assert not collectives(of_rows, *rows)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        (dict(num_shared=9), ValueError, "num_shared: must be 0 to 8, the heads; got 9"),
        (dict(num_shared=1.0), ValueError, "num_shared: .*1.0"),
        (dict(top_k=0), ValueError, "top_k: must be 1 to 4, the routed heads; got 0"),
        (dict(num_shared=5, top_k=4), ValueError, "top_k: must be 1 to 3"),
        (dict(num_shared=8, top_k=1), ValueError, "top_k: must be 0 to 0"),
        (
            dict(routed_logits=np.zeros((B, T, 3))),
            ValueError,
            r"routed_logits: must have shape \(2, 11, 4\); got \(2, 11, 3\)",
        ),
        (dict(shared_logits=np.zeros((B, T, 4), int)), TypeError, "shared_logits: .*int32"),
        (
            dict(num_shared=0, balance_logits=np.zeros((B, T, 2))),
            ValueError,
            "balance_logits: are between shared and routed heads; there are 0 and 8",
        ),
    ),
)
def test_wrong_input(options, error, message):
    with pytest.raises(error, match=message):
        mixture_of_head_attention(*_arrays(), **options)


def test_wrong_input_of_other_functions():
    with pytest.raises(ValueError, match=r"query: must be \[B, T, N, H\]; got shape \(3,\)"):
        mixture_of_head_gates(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"routed_logits: must be \[B, T, R\]"):
        head_balance_loss(jnp.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"where: must have shape \(2, 11\); got \(11,\)"):
        head_balance_loss(jnp.zeros((B, T, 4)), where=jnp.ones(T, bool))

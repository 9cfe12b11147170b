"""On a GPU every mechanism computes what its definition computes on the CPU, twice the same."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention import catalogue
from tests.numerics import assert_close

pytestmark = pytest.mark.gpu

BATCH, TOKENS, HEADS, KV_HEADS, WIDTH = 2, 300, 4, 2, 64
each_record = pytest.mark.parametrize(
    "record", catalogue.mechanisms().values(), ids=lambda record: record.slug
)


def _causal(record):
    """Returns the mechanism's function, of causal attention."""
    if "is_causal" in inspect.signature(record.function).parameters:
        return functools.partial(record.function, is_causal=True)
    return record.function


def _call(record, implementation):
    """Returns a function of arrays to results and gradients."""

    @jax.jit
    def run(segment_ids, cotangent, *arrays):
        call = functools.partial(_causal(record), implementation=implementation)
        if record.takes_segments:
            call = functools.partial(call, segment_ids=segment_ids)
        out, vjp = jax.vjp(call, *arrays)
        return out, vjp(cotangent)

    return run


def _arrays(record, dtype):
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(0, 3, (BATCH, TOKENS)), axis=1)
    if record.arguments:
        arrays = record.example_arguments(BATCH, TOKENS, dtype).values()
        cotangent = rng.normal(size=next(iter(arrays)).shape).astype(dtype)
        return ids, cotangent, *arrays
    query, key, value, cotangent = (
        np.asarray(rng.normal(size=(BATCH, TOKENS, n, WIDTH)), dtype)
        for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)
    )
    query = query[:, :1] if record.one_query else query
    return ids, cotangent, query, key, value


def _first_state(record):
    sizes = (HEADS, KV_HEADS, WIDTH, WIDTH)
    if record.arguments:
        known = inspect.signature(record.arguments).parameters
        names = list(inspect.signature(record.init_state).parameters)
        sizes = [known[name].default for name in names[2 : names.index("dtype")]]
    return record.init_state(BATCH, TOKENS, *sizes, jnp.float32)


@each_record
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_results_and_gradients_are_those_of_the_definition(record, dtype):
    arrays = _arrays(record, dtype)
    with jax.default_device(jax.devices("cpu")[0]):
        exact = [np.float32(x) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in arrays]
        expected = jax.tree.map(np.asarray, _call(record, "reference")(*exact))
    with jax.default_matmul_precision("highest"):
        results = _call(record, None)(*arrays)
    assert {x.device.platform for x in jax.tree.leaves(results)} == {jax.default_backend()}
    assert_close(results, expected, dtype)


@each_record
def test_a_second_call_gives_the_same_bits(record):
    run, arrays = _call(record, None), _arrays(record, jnp.bfloat16)
    first, second = (jax.tree.map(np.asarray, run(*arrays)) for _ in range(2))
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


@each_record
def test_steps_on_a_gpu_are_one_pass(record):
    if record.step is None:
        pytest.skip("has no step form")
    _, _, *arrays = _arrays(record, jnp.float32)
    with jax.default_matmul_precision("highest"):
        step = jax.jit(record.step)
        state = _first_state(record)
        parts, start = [], 0
        for count in (TOKENS - 2, 1, 1):
            here = slice(start, start + count)
            new = (x[:, here] if x.ndim > 2 and x.shape[1] == TOKENS else x for x in arrays)
            part, state = step(state, *new)
            parts.append(part)
            start += count
        expected = _causal(record)(*arrays)
    assert_close(np.concatenate(parts, axis=1), expected)

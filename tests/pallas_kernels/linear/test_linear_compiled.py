"""Linear attention as compiled: what it does on several devices, and how much memory it takes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.linear import LinearState, linear_attention
from pallas_kernels.partition import axes
from tests.numerics import assert_close

BATCH, TOKENS, HEADS, KV_HEADS, FEATURES, WIDTH = 4, 20, 4, 2, 8, 6
SPECS = {
    "query": P("data", None, "tensor"),
    "key": P("data", None, "tensor"),
    "value": P("data", None, "tensor"),
    "log_decay": P("tensor"),
    "memory": P("data", "tensor"),
    "segment_ids": P("data"),
}
COLLECTIVES = re.compile(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)


def arrays():
    rng = np.random.default_rng(0)
    shapes = {
        "query": (BATCH, TOKENS, HEADS, FEATURES),
        "key": (BATCH, TOKENS, KV_HEADS, FEATURES),
        "value": (BATCH, TOKENS, KV_HEADS, WIDTH),
        "memory": (BATCH, HEADS, FEATURES, WIDTH),
    }
    result = {n: np.float32(rng.standard_normal(shape)) for n, shape in shapes.items()}
    result["log_decay"] = np.float32([-1, -0.5, -0.1, 0])
    result["segment_ids"] = np.arange(BATCH * TOKENS, dtype=np.int32).reshape(BATCH, TOKENS) // 9
    return result


def results(arrays, implementation):
    """Returns output and memory."""
    arrays = dict(arrays)
    state = LinearState(arrays.pop("memory"))
    out, state = linear_attention(
        **arrays,
        initial_state=state,
        return_state=True,
        chunk_size=8,
        implementation=implementation,
    )
    return out, state.memory


def gradients(arrays, implementation):
    """Returns the gradients of all float arguments of a loss in which everything counts."""
    ids = arrays["segment_ids"]

    def loss(floats):
        out, memory = results(floats | {"segment_ids": ids}, implementation)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(memory))

    return jax.grad(loss)({n: x for n, x in arrays.items() if n != "segment_ids"})


def mesh(kind):
    return jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(kind,) * 2)


def placed(arrays, mesh):
    return {n: jax.device_put(x, NamedSharding(mesh, SPECS[n])) for n, x in arrays.items()}


def spec(x):
    """Returns the sharding of batch and heads of an output, whatever the type of axes."""
    entries = [*x.sharding.spec, *[None] * x.ndim]
    return entries[0], entries[2 if x.ndim == 4 and x.shape[1] == TOKENS else 1]


@pytest.mark.parametrize("implementation", ("xla", "reference"))
@pytest.mark.parametrize("kind", ("auto with axes", "auto", "explicit"))
def test_sharded(kind, implementation):
    expected = results(arrays(), implementation), gradients(arrays(), implementation)
    devices = mesh(AxisType.Explicit if kind == "explicit" else AxisType.Auto)
    named = dict(batch="data", heads="tensor") if kind == "auto with axes" else {}
    with jax.set_mesh(devices), axes(**named):
        inputs = placed(arrays(), devices)
        forward = jax.jit(results, static_argnums=1).lower(inputs, implementation).compile()
        backward = jax.jit(gradients, static_argnums=1).lower(inputs, implementation).compile()
        actual = forward(inputs), backward(inputs)
    assert_close(actual, expected, factor=2)
    assert [spec(x) for x in actual[0]] == [("data", "tensor")] * 2

    assert COLLECTIVES.findall(forward.as_text()) == []
    # The gradient of the decays, which have no batch, is a sum over the devices of the batch.
    # It stands outside of the loop over chunks.
    assert COLLECTIVES.findall(backward.as_text()) == ["all-reduce"]
    assert COLLECTIVES.findall(backward.as_text().partition("ENTRY ")[2]) == ["all-reduce"]


def test_backward_outside_of_the_context():
    devices = mesh(AxisType.Auto)
    with jax.set_mesh(devices):
        inputs = placed(arrays(), devices)
        ids = inputs.pop("segment_ids")
        with axes(batch="data", heads="tensor"):
            (out, memory), transpose = jax.vjp(
                lambda inputs: results(inputs | {"segment_ids": ids}, "xla"), inputs
            )
        (actual,) = transpose((jnp.cos(out), jnp.cos(memory)))
    assert_close(actual, gradients(arrays(), "xla"), factor=2)


@pytest.mark.parametrize("check_vma", (True, False))
def test_inside_of_a_shard_map(check_vma):
    def local(arrays):
        gradient = gradients(arrays, "xla")
        return results(arrays, "xla"), gradient | {"log_decay": gradient["log_decay"][None]}

    out_specs = {n: spec for n, spec in SPECS.items() if n != "segment_ids"}
    out_specs["log_decay"] = P("data", "tensor")
    mapped = jax.shard_map(
        local,
        mesh=mesh(AxisType.Auto),
        in_specs=(SPECS,),
        out_specs=((SPECS["query"], SPECS["memory"]), out_specs),
        check_vma=check_vma,
    )
    actual, gradient = jax.jit(mapped)(arrays())
    # With check_vma JAX sums the gradient of what does not vary; otherwise each shard has a part.
    part = gradient["log_decay"]
    gradient["log_decay"] = part[0] if check_vma else part.sum(0)
    assert_close(actual, results(arrays(), "xla"), factor=2)
    assert_close(gradient, gradients(arrays(), "xla"), factor=2)


def test_sharded_under_vmap():
    devices = mesh(AxisType.Auto)
    inputs = {n: np.stack([x, x[::-1]]) for n, x in arrays().items()}
    expected = jax.vmap(lambda a: gradients(a, "xla"))(inputs)
    with jax.set_mesh(devices), axes(batch="data", heads="tensor"):
        sharded = {
            n: jax.device_put(x, NamedSharding(devices, P(None, *SPECS[n])))
            for n, x in inputs.items()
        }
        mapped = jax.jit(jax.vmap(lambda a: gradients(a, "xla")))
        compiled = mapped.lower(sharded).compile()
    assert_close(compiled(sharded), expected, factor=2)
    assert COLLECTIVES.findall(compiled.as_text()) == ["all-reduce"]


@pytest.mark.parametrize("gradient", (False, True), ids=("forward", "backward"))
def test_memory_is_linear(gradient):
    def loss(query, key, value, log_decay):
        out = linear_attention(query, key, value, log_decay=log_decay, chunk_size=32)
        return jnp.sum(out * value)

    def temporary(tokens):
        fn = jax.grad(loss, argnums=(0, 1, 2, 3)) if gradient else loss
        x = jax.ShapeDtypeStruct((1, tokens, 4, 16), jnp.float32)
        decay = jax.ShapeDtypeStruct((4,), jnp.float32)
        compiled = jax.jit(fn).lower(x, x, x, decay).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(2048), temporary(8192)
    assert long <= 4.1 * short
    # Per token and head: the output and, in the backward, its cotangent and 16 / 32 of a memory.
    floats = 2 * 16 + 16 / 32 * 16 if gradient else 16
    assert long <= 1.1 * 4 * 4 * 8192 * floats

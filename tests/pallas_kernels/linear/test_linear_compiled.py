"""Linear attention as compiled: what it does on several devices, and how much memory it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.linear import linear_attention
from pallas_kernels.partition import axes
from tests.numerics import assert_close
from tests.pallas_kernels.linear.cases import STATE, Case, called
from tests.sharding import COLLECTIVE, mesh, place

CASES = {
    "decay": Case(16, 4, kv_heads=2, segments=True, state=True),
    "delta, channels": Case(
        16, 4, heads=2, kv_heads=2, value_heads=4, decay="channel", beta=True, state=True
    ),
    "momentum": Case(8, 4, kv_heads=2, beta=True, momentum=True, state=True),
    "all": Case(
        16, 4, kv_heads=2, causal=False, decay=None, normalize=True, segments=True, state=True
    ),
}


pytestmark = pytest.mark.usefixtures("quick_compilation")


def arrays(case):
    ids = case.segment_ids()
    floats = {n: np.asarray(x) for n, x in case.arrays(np.float32).items()}
    return floats if ids is None else floats | {"segment_ids": np.int32(ids)}


def spec(name, array):
    """Returns how an argument or a result is sharded: over batch and heads."""
    if array.ndim == 1:
        return P("tensor")
    entries = ("data", "tensor") if name in STATE else ("data", None, "tensor")
    return P(*entries[: array.ndim])


def differentiated(case, arrays, implementation):
    """Returns the results, and the gradients of a loss in which everything counts."""
    ids = arrays.get("segment_ids")

    def loss(floats):
        results = called(case, floats, implementation, segment_ids=ids)
        return sum(jnp.sum(jnp.sin(x)) for x in results.values()), results

    floats = {n: x for n, x in arrays.items() if n != "segment_ids"}
    gradients, results = jax.grad(loss, has_aux=True)(floats)
    return results, gradients


@pytest.mark.parametrize(
    "case, kind, implementation",
    (
        ("decay", "auto with axes", "xla"),
        ("decay", "auto", "xla"),
        ("decay", "explicit", "xla"),
        ("decay", "explicit", "reference"),
        ("delta, channels", "auto with axes", "xla"),
        ("all", "explicit", "xla"),
    ),
)
def test_sharded(case, kind, implementation):
    case = CASES[case]
    inputs = arrays(case)
    fn = jax.jit(lambda inputs: differentiated(case, inputs, implementation))
    expected = fn(inputs)
    devices = mesh(AxisType.Explicit if kind == "explicit" else AxisType.Auto)
    named = dict(batch="data", heads="tensor") if kind == "auto with axes" else {}
    with jax.set_mesh(devices), axes(**named):
        placed = {n: place(devices, x, *spec(n, x)) for n, x in inputs.items()}
        compiled = jax.jit(lambda inputs: fn(inputs)).lower(placed).compile()
        actual = compiled(placed)
    assert_close(actual, expected, factor=2)
    for n, x in actual[0].items():
        entries = [*x.sharding.spec, *[None] * x.ndim]
        assert (entries[0], entries[1 if n in STATE else 2]) == ("data", "tensor"), n

    # The gradient of the decays, which have no batch, is a sum over the devices of the batch.
    # It stands outside of the loop over chunks.
    sums = ["all-reduce"] if inputs.get("log_decay", inputs["query"]).ndim == 1 else []
    assert COLLECTIVE.findall(compiled.as_text()) == sums
    assert COLLECTIVE.findall(compiled.as_text().partition("ENTRY ")[2]) == sums


def test_backward_outside_of_the_context():
    case = CASES["decay"]
    devices = mesh(AxisType.Auto)
    inputs = arrays(case)
    ids = inputs.pop("segment_ids")
    with jax.set_mesh(devices):
        placed = {n: place(devices, x, *spec(n, x)) for n, x in inputs.items()}
        with axes(batch="data", heads="tensor"):
            results, transpose = jax.vjp(
                lambda inputs: called(case, inputs, "xla", segment_ids=ids), placed
            )
        (actual,) = transpose(jax.tree.map(jnp.cos, results))
    expected = differentiated(case, inputs | {"segment_ids": ids}, "xla")[1]
    assert_close(actual, expected, factor=2)


@pytest.mark.parametrize(
    "case, check_vma", (("decay", True), ("decay", False), ("momentum", True), ("all", True))
)
def test_inside_of_a_shard_map(case, check_vma):
    case = CASES[case]
    inputs = arrays(case)

    def local(inputs):
        results, gradients = differentiated(case, inputs, "xla")
        if "log_decay" in gradients:
            gradients["log_decay"] = gradients["log_decay"][None]
        return results, gradients

    specs = {n: spec(n, x) for n, x in inputs.items()}
    results = {n: specs.get(n, P("data", "tensor")) for n in ("out", *STATE) if n in inputs}
    results["out"] = specs["query"]
    gradients = {n: s for n, s in specs.items() if n != "segment_ids"}
    if "log_decay" in gradients:
        gradients["log_decay"] = P("data", "tensor")
    mapped = jax.shard_map(
        local,
        mesh=mesh(AxisType.Auto),
        in_specs=(specs,),
        out_specs=(results, gradients),
        check_vma=check_vma,
    )
    actual, gradients = jax.jit(mapped)(inputs)
    if "log_decay" in gradients:
        # With check_vma JAX sums the gradient of what does not vary; else each shard has a part.
        part = gradients["log_decay"]
        gradients["log_decay"] = part[0] if check_vma else part.sum(0)
    assert_close((actual, gradients), differentiated(case, inputs, "xla"), factor=2)


def test_sharded_under_vmap():
    case = CASES["decay"]
    devices = mesh(AxisType.Auto)
    inputs = {n: np.stack([x, x[::-1]]) for n, x in arrays(case).items()}
    fn = jax.vmap(lambda inputs: differentiated(case, inputs, "xla"))
    expected = fn(inputs)
    with jax.set_mesh(devices), axes(batch="data", heads="tensor"):
        placed = {n: place(devices, x, None, *spec(n, x[0])) for n, x in inputs.items()}
        compiled = jax.jit(fn).lower(placed).compile()
    assert_close(compiled(placed), expected, factor=2)
    assert COLLECTIVE.findall(compiled.as_text()) == ["all-reduce"]


@pytest.mark.optimized
@pytest.mark.parametrize(
    "gates, gradient", (("constant", False), ("constant", True), ("constant and beta", True))
)
def test_memory_is_linear(gates, gradient):
    chunk = 8 if "beta" in gates else 32

    def loss(query, key, value, log_decay, beta=None):
        options = dict(log_decay=log_decay, beta=beta, chunk_size=chunk)
        return jnp.sum(linear_attention(query, key, value, **options) * value)

    def temporary(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 4, 16), jnp.float32)
        args = x, x, x, jax.ShapeDtypeStruct((4,), jnp.float32)
        args += (jax.ShapeDtypeStruct(x.shape[:3], jnp.float32),) if "beta" in gates else ()
        fn = jax.grad(loss, argnums=tuple(range(len(args)))) if gradient else loss
        compiled = jax.jit(fn).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(2048), temporary(8192)
    assert long <= 4.1 * short
    # Per token and head: the output and, in the backward, its cotangent and a part of a memory.
    floats = 2 * 16 + 16 / chunk * 16 if gradient else 16
    assert long <= 1.1 * 4 * 4 * 8192 * floats

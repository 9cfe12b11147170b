"""Scans as compiled: what they do on several devices, and how much memory they take."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.partition import axes
from pallas_kernels.scan import gated_scan, selective_scan, softmax_scan
from tests.numerics import assert_close
from tests.pallas_kernels.scan.cases import PARAMETERS, Case
from tests.sharding import COLLECTIVE, mesh

CASES = {
    "gated": Case("gated", batch=4, segments=True, state=True),
    "selective": Case("selective", batch=4, channels=4, segments=True, state=True),
    "selective, grouped": Case("selective", batch=4, channels=4, groups=2, state=True),
    "softmax": Case("softmax", batch=4, channels=4, groups=2, segments=True, state=True),
}


def specs(case):
    """Returns how the arguments lie over ("data", "tensor")."""
    batch, tokens = P("data"), P("data", None, "tensor")
    known = {
        "A": P("tensor"),
        "D": P("tensor"),
        "delta_bias": P("tensor"),
        "B": tokens if case.groups else batch,
        "C": tokens if case.groups else batch,
        "hidden": P("data", "tensor") if case.scan == "gated" else tokens,
        "maximum": P("data", "tensor"),
        "total": P("data", "tensor"),
        "weighted": P("data", "tensor"),
    }
    return {name: known.get(name, tokens) for name in case.shapes}


def run(case):
    """Returns a function to results and gradients of a call."""

    def both(arrays, segment_ids):
        def loss(arrays):
            results = case.traced(arrays, "xla", segment_ids)
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(results)), results

        return jax.grad(loss, has_aux=True)(arrays)

    return both


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("kind", ("auto with axes", "explicit"))
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sharded(case, kind):
    arrays, ids = case.arrays(jnp.float32), case.segment_ids()
    expected = jax.jit(run(case))(arrays, ids)
    devices = mesh(AxisType.Explicit if kind == "explicit" else AxisType.Auto)
    named = dict(batch="data", heads="tensor") if kind == "auto with axes" else {}
    with jax.set_mesh(devices), axes(**named):
        placed = {
            n: jax.device_put(x, NamedSharding(devices, specs(case)[n])) for n, x in arrays.items()
        }
        ids = None if ids is None else jax.device_put(ids, NamedSharding(devices, P("data")))
        compiled = jax.jit(run(case)).lower(placed, ids).compile()
        actual = compiled(placed, ids)
    assert_close(actual, expected, factor=4)
    assert actual[1][0].sharding.spec[:3] == ("data", None, "tensor")

    summed = [n for n in arrays if n in PARAMETERS]
    summed += ["B", "C"] if case.scan == "selective" and not case.groups else []
    # Sums over the devices of the batch and, of one group's vectors, over those of the channels.
    found = COLLECTIVE.findall(compiled.as_text())
    assert set(found) == ({"all-reduce"} if summed else set())
    assert len(found) <= len(summed)
    # They stand outside of the loop over chunks.
    assert COLLECTIVE.findall(compiled.as_text().partition("ENTRY ")[2]) == found


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("check_vma", (True, False))
def test_inside_of_a_shard_map(check_vma):
    case = CASES["selective"]
    arrays, ids = case.arrays(jnp.float32), case.segment_ids()
    shared = [n for n in arrays if n in PARAMETERS]

    def local(arrays, ids):
        gradients, results = run(case)(arrays, ids)
        return {n: x[None] if n in shared else x for n, x in gradients.items()}, results

    spec = {n: P() if n in shared else P("data") for n in arrays}
    mapped = jax.shard_map(
        local,
        mesh=mesh(AxisType.Auto),
        in_specs=(spec, P("data")),
        out_specs=({n: P("data") for n in arrays}, P("data")),
        check_vma=check_vma,
    )
    gradients, results = jax.jit(mapped)(arrays, ids)
    # With check_vma JAX sums the gradient of what does not vary; otherwise each shard has a part.
    gradients |= {n: gradients[n][0] if check_vma else gradients[n].sum(0) for n in shared}
    assert_close((gradients, results), jax.jit(run(case))(arrays, ids), factor=4)


def sized(scan, tokens):
    """Returns types of the arguments of a scan of this many tokens."""
    shapes = {
        gated_scan: [(1, tokens, 32)] * 2,
        selective_scan: [(1, tokens, 32)] * 2 + [(32, 16)] + [(1, tokens, 16)] * 2,
        softmax_scan: [(1, tokens, 4), (1, tokens, 4, 8)],
    }
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes[scan]]


@pytest.mark.parametrize("scan", (gated_scan, selective_scan, softmax_scan))
def test_memory_is_linear_and_holds_no_states(scan):
    def loss(*args):
        return jnp.sum(jnp.sin(scan(*args, chunk_size=4)))

    def temporary(tokens):
        args = sized(scan, tokens)
        compiled = jax.jit(jax.grad(loss, argnums=range(len(args)))).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(4096), temporary(16384)
    assert long <= 4.1 * short
    # By token: the output, its cotangent and what is kept; what every gradient is made in.
    floats = 4 * 32 + 16 * 32 / 4 + (2 * 16 if scan is selective_scan else 0)
    assert long - short <= 1.1 * 4 * (16384 - 4096) * floats

"""Choosing an implementation: by name, the best that serves a call, or at lowering."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import partition
from pallas_kernels.choose import at_lowering, resolve_implementation
from tests.numerics import assert_close
from tests.sharding import mesh, place
from tests.tpu import compile_for_tpu, tpu_mesh


def _yes(**call):
    return None


def _small_only(*, size):
    return None if size < 10 else f"size {size} is more than 9"


def _resolve(name, available, size=1):
    return resolve_implementation(name, available, function="some_attention", size=size)


def test_none_takes_the_first_that_supports_the_call():
    available = {"xla": _small_only, "reference": _yes}
    assert _resolve(None, available) == "xla"
    assert _resolve(None, available, size=10) == "reference"


def test_none_says_why_nothing_serves():
    with pytest.raises(NotImplementedError, match=r"some_attention: .*xla: size 12 is more than 9"):
        _resolve(None, {"xla": _small_only}, size=12)


def test_a_name_is_taken_at_its_word():
    assert _resolve("reference", {"xla": _yes, "reference": _yes}) == "reference"
    with pytest.raises(NotImplementedError, match=r"some_attention: .*'xla'.*size 12 is more"):
        _resolve("xla", {"xla": _small_only, "reference": _yes}, size=12)


def test_an_implementation_that_the_family_lacks():
    with pytest.raises(NotImplementedError, match=r"'pallas_tpu'.*it has xla, reference"):
        _resolve("pallas_tpu", {"xla": _yes, "reference": _yes})


def test_an_unknown_name():
    with pytest.raises(ValueError, match=r"None or one of reference, xla, pallas_tpu, pallas_gpu"):
        _resolve("cudnn", {"xla": _yes})


# The choice at lowering. What serves a program is seen by its operation: sine, cosine or tanh.

OPERATIONS = {"sine": "fallback", "cosine": "tpu", "tanh": "cuda"}


def _computes(operation):
    def function(x, y):
        return {"out": operation(x) * y, "sums": (jnp.sum(x, -1).astype(jnp.bfloat16),)}

    return function


_fallback = _computes(jnp.sin)
KERNELS = {"tpu": _computes(jnp.cos), "cuda": _computes(jnp.tanh)}


def _choice(x, y):
    return at_lowering(_fallback, KERNELS, x, y)


def _never(*args):
    raise AssertionError("a kernel was traced for another platform than its own")


def _guarded(x, y):
    return at_lowering(_fallback, {"tpu": _never, "cuda": _never}, x, y)


def _arguments():
    return tuple(jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8)), jnp.float32))


def _chosen(function, *args, platforms=("tpu",)):
    """Returns what serves a function that is lowered for platforms."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=platforms).as_text()
    return {OPERATIONS[name] for name in re.findall(r"stablehlo\.(sine|cosine|tanh)\b", text)}


def _gradients(call, transform=lambda function: function):
    """Makes a function that returns the gradients of a call with a derivative rule."""

    @jax.custom_vjp
    def attend(x, y):
        return call(x, y)["out"]

    def backward(residuals, cotangent):
        return call(*residuals)["out"] * cotangent, cotangent

    attend.defvjp(lambda x, y: (attend(x, y), (x, y)), backward)
    return jax.grad(lambda x, y: transform(attend)(x, y).sum(), (0, 1))


def _sharded(call, names=("x",), spec="x", **options):
    """Makes a function that calls on the shards of eight devices."""
    shards = mesh(AxisType.Auto, (8,) + (1,) * (len(names) - 1), names)
    return jax.shard_map(call, mesh=shards, in_specs=P(spec), out_specs=P(spec), **options)


def _scanned(call):
    return lambda x, y: jax.lax.scan(lambda sum, x: (sum + call(x, y[0])["out"], x), y[0], x)


PROGRAMS = {
    "call": lambda call: call,
    "jit": jax.jit,
    "vmap": jax.vmap,
    "vmap of one argument": lambda call: lambda x, y: jax.vmap(call, (0, None))(x, y[0]),
    "vmap of other dimensions": lambda call: jax.vmap(call, (1, 0)),
    "vmap of vmap": lambda call: lambda x, y: jax.vmap(jax.vmap(call))(x[..., None], y[..., None]),
    "scan": _scanned,
    "vmap of scan": lambda call: lambda x, y: jax.vmap(_scanned(call), (None, 0))(x, y[:, None]),
    "while": lambda call: (
        lambda x, y: jax.lax.fori_loop(0, 2 + (x[0, 0] > 9), lambda _, x: call(x, y)["out"], x)
    ),
    "cond": lambda call: lambda x, y: jax.lax.cond(x[0, 0] < 9, call, call, x, y),
    "custom_vjp": _gradients,
    "vmap of custom_vjp": lambda call: jax.vmap(_gradients(call)),
    "checkpoint": lambda call: _gradients(call, jax.checkpoint),
    "shard_map": _sharded,
    "shard_map without types": lambda call: _sharded(call, check_vma=False),
    "vmap in shard_map": lambda call: _sharded(jax.vmap(call)),
    "custom_vjp in shard_map": lambda call: _sharded(_gradients(call)),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_cpu_runs_the_fallback_and_traces_no_kernel(program):
    make, args = PROGRAMS[program], _arguments()
    expected = jax.jit(make(_fallback))(*args)
    assert_close(jax.jit(make(_guarded))(*args), expected)
    assert_close(make(_guarded)(*args), expected)


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_platform_gets_its_own(program):
    function, args = PROGRAMS[program](_choice), _arguments()
    assert _chosen(function, *args, platforms=("cpu",)) == {"fallback"}
    assert _chosen(function, *args, platforms=("rocm",)) == {"fallback"}
    assert _chosen(function, *args, platforms=("tpu",)) == {"tpu"}
    assert _chosen(function, *args, platforms=("cuda",)) == {"cuda"}
    assert _chosen(function, *args, platforms=("cuda", "tpu")) == {"cuda", "tpu"}
    assert _chosen(function, *args, platforms=("tpu", "cpu")) == {"fallback", "tpu"}


def test_a_platform_without_a_kernel_gets_the_fallback():
    def function(x, y):
        return at_lowering(_fallback, {"cuda": _never}, x, y)

    assert _chosen(function, *_arguments(), platforms=("tpu",)) == {"fallback"}


def test_a_kernel_is_traced_when_it_is_lowered():
    traced = jax.jit(_guarded).trace(*_arguments())
    with pytest.raises(AssertionError, match="a kernel was traced"):
        traced.lower(lowering_platforms=("tpu",))


def test_calls_without_jit():
    args = _arguments()
    with jax.disable_jit():
        assert_close(_guarded(*args), _fallback(*args))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_several_devices_that_xla_partitions_get_the_fallback(kind):
    # This test or the next fails if JAX moves the number of devices, which it does not document.
    devices = mesh(kind, (8,), ("x",))
    args = [place(devices, x, "x") for x in _arguments()]
    assert _chosen(_choice, *args) == {"fallback"}
    assert_close(jax.jit(_guarded)(*args), _fallback(*_arguments()))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_of_one_device_gets_the_kernel(kind):
    devices = jax.make_mesh((1,), ("x",), axis_types=(kind,), devices=jax.devices()[:1])
    args = [place(devices, x, "x") for x in _arguments()]
    assert _chosen(_choice, *args) == {"tpu"}
    with jax.set_mesh(devices):
        assert _chosen(_choice, *args) == {"tpu"}


def test_a_region_is_manual_over_the_whole_mesh_or_gets_the_fallback():
    def partly(call):
        return _sharded(call, ("x", "y"), axis_names={"x"})

    def rest(x, y):
        return jax.shard_map(_choice, in_specs=P(), out_specs=P(), axis_names={"y"})(x, y)

    assert _chosen(partly(_choice), *_arguments()) == {"fallback"}
    assert _chosen(partly(rest), *_arguments()) == {"tpu"}


@pytest.mark.parametrize("spec", ["x", None])
def test_results_vary_over_the_mesh_axes_of_the_fallback(spec):
    seen = []

    def call(x, y):
        results = _choice(x, y)
        seen.extend(jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(results))
        return results

    assert _chosen(_sharded(call, spec=spec), *_arguments()) == {"tpu"}
    assert set(seen) == {frozenset({spec} - {None})}


def test_exported_programs_hold_the_kernels_of_their_platforms():
    args = _arguments()
    exported = jax.export.export(jax.jit(_choice), platforms=("cpu", "tpu"))(*args)
    text = exported.mlir_module()
    assert "stablehlo.sine" in text and "stablehlo.cosine" in text
    assert "stablehlo.tanh" not in text
    assert_close(exported.call(*args), _fallback(*args))


def test_arguments_are_any_pytrees():
    def call(tree, number, nothing):
        return at_lowering(
            lambda tree, number, nothing: (2 * tree["a"][0] + tree["b"] * number, nothing),
            {"tpu": _never},
            *(tree, number, nothing),
        )

    args = {"a": (jnp.ones(3),), "b": np.arange(3, dtype=np.float32)}, 2.0, None
    for function in (call, jax.jit(call)):
        assert_close(function(*args), (np.array([2, 4, 6], np.float32), None))


@pytest.mark.parametrize("constant", [np.arange(8.0, dtype=np.float32), jnp.arange(8.0), 3.0])
def test_functions_may_close_over_constants(constant):
    def call(x):
        return at_lowering(
            lambda x: jnp.sin(x) + constant, {"tpu": lambda x: jnp.cos(x) + constant}, x
        )

    x = _arguments()[0]
    for function in (call, jax.jit(call), jax.vmap(call), jax.jit(jax.vmap(call))):
        assert_close(function(x), jnp.sin(x) + constant)
        assert _chosen(function, x, platforms=("tpu", "cpu")) == {"fallback", "tpu"}


def test_effects_of_the_fallback_are_kept():
    seen = []

    def fallback(x):
        jax.debug.callback(lambda x: seen.append(float(x)), x.sum())
        return x

    @jax.jit
    def function(x):
        at_lowering(fallback, {"tpu": _never}, x)  # nothing but the effect asks for it
        return x

    function(jnp.ones(3))
    jax.effects_barrier()
    assert seen == [3.0]


@pytest.mark.parametrize("derivative", [jax.grad, jax.jacfwd, jax.jacrev])
def test_derivative_rules_are_made_around_it(derivative):
    x, y = _arguments()
    with pytest.raises(NotImplementedError, match=r"rules are made around it, by jax\.custom_vjp"):
        derivative(lambda x: _choice(x, y)["out"].sum())(x)


@pytest.mark.parametrize(
    ("kernel", "got"),
    [
        (lambda x: (x, x[0]), "('float32[8, 8]', 'float32[8]')"),
        (lambda x: (x, x.astype(jnp.bfloat16)), "('float32[8, 8]', 'bfloat16[8, 8]')"),
        (lambda x: [x, x], "['float32[8, 8]', 'float32[8, 8]']"),
    ],
)
@pytest.mark.parametrize(
    ("transform", "shape"), [(lambda function: function, (8, 8)), (jax.vmap, (3, 8, 8))]
)
def test_a_kernel_that_returns_something_else(transform, shape, kernel, got):
    function = transform(lambda x: at_lowering(lambda x: (x, x), {"tpu": kernel}, x))
    traced = jax.jit(function).trace(jnp.ones(shape))
    traced.lower()
    wanted = "('float32[8, 8]', 'float32[8, 8]')"
    message = f"'tpu' must return {wanted}, as the fallback; got {got}"
    with pytest.raises(TypeError, match=re.escape(message)):
        traced.lower(lowering_platforms=("tpu",))


def test_an_unknown_platform():
    with pytest.raises(ValueError, match=r"kernels: .*tpu, cuda; got \['gpu'\]"):
        at_lowering(jnp.sin, {"gpu": jnp.cos}, 1.0)


# Compiled for TPU, where a kernel that XLA would have to partition is an error of the compiler.


def _probe(x):
    def kernel(x, out):
        out[...] = 2 * x[...]

    pltpu.get_tpu_info()  # needs a TPU, or a mesh of a TPU topology in context
    varying = jax.typeof(x).manual_axis_type
    out = jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying)
    return pl.pallas_call(kernel, out_shape=out, name="probe")(x)


def _doubled(x):
    return at_lowering(lambda x: 2 * x, {"tpu": _probe}, x)


X = jax.ShapeDtypeStruct((4, 8, 4, 128), jnp.float32)


def _on(devices, *spec):
    return jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=NamedSharding(devices, P(*spec)))


def _has_kernel(compiled):
    text = compiled.as_text()
    assert ("tpu_custom_call" in text) == ("probe" in text)
    return "tpu_custom_call" in text


@pytest.mark.parametrize(
    "transform", [lambda call: call, jax.vmap, lambda call: lambda x: jax.lax.map(call, x)]
)
def test_one_tpu_runs_the_kernel(transform):
    assert _has_kernel(compile_for_tpu(transform(_doubled), X))


def test_a_cpu_program_has_no_tpu_kernel():
    assert "tpu_custom_call" not in jax.jit(_doubled).lower(X).as_text()
    assert_close(jax.jit(_doubled)(jnp.ones(3)), 2 * jnp.ones(3))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_shards_on_tpus_run_the_kernel(kind, check_vma):
    devices, spec = tpu_mesh((2, 2), ("x", "y"), kind=kind), P("x", None, "y")
    function = jax.shard_map(
        _doubled, mesh=devices, in_specs=spec, out_specs=spec, check_vma=check_vma
    )
    assert _has_kernel(compile_for_tpu(function, _on(devices, *spec), devices=devices))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_tpus_that_xla_partitions_do_not_run_the_kernel(kind):
    devices = tpu_mesh((2, 2), ("x", "y"), kind=kind)
    assert not _has_kernel(compile_for_tpu(_doubled, _on(devices, "x"), devices=devices))
    assert not _has_kernel(compile_for_tpu(_doubled, X, devices=devices))
    with pytest.raises((NotImplementedError, ValueError), match=r"partitioned|to be Manual"):
        compile_for_tpu(_probe, _on(devices, "x"), devices=devices)


def test_tpus_that_are_manual_in_part_do_not_run_the_kernel():
    devices = tpu_mesh((2, 2), ("x", "y"))
    function = jax.shard_map(
        _doubled, mesh=devices, in_specs=P("x"), out_specs=P("x"), axis_names={"x"}
    )
    assert not _has_kernel(compile_for_tpu(function, _on(devices, "x"), devices=devices))


@pytest.mark.parametrize(("transform", "lead"), [(lambda call: call, ()), (jax.vmap, (None,))])
def test_calls_that_partition_themselves_run_the_kernel(transform, lead):
    def local(query, key):
        return (_doubled(query),)

    def call(x):
        axes = partition.current_axes()
        return partition.partitioned(local, ("btnh", "btnh"), ("btnh",), axes)(x, x)

    devices = tpu_mesh((2, 2), ("data", "tensor"))
    sharding = NamedSharding(devices, P(*lead, "data", None, "tensor"))
    x = jax.ShapeDtypeStruct((3,) * len(lead) + X.shape, X.dtype, sharding=sharding)
    assert not _has_kernel(compile_for_tpu(transform(call), x, devices=devices))
    with partition.axes(batch="data", heads="tensor"):
        compiled = compile_for_tpu(transform(call), x, devices=devices)
    assert _has_kernel(compiled)
    assert not re.search(r"all-(gather|reduce|to-all)|collective-permute", compiled.as_text())


def test_exported_programs_hold_pallas_kernels():
    x = jnp.ones((8, 128))
    with jax.sharding.use_abstract_mesh(tpu_mesh().abstract_mesh):
        exported = jax.export.export(jax.jit(_doubled), platforms=("cpu", "tpu"))(x)
    assert "tpu_custom_call" in exported.mlir_module()
    assert_close(exported.call(x), 2 * x)

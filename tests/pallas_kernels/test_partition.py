"""Calls that partition themselves, on a function that is simple enough to follow."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import partition
from pallas_kernels.partition import Axes, aligned, axes, current_axes, partitioned, sharded
from tests.numerics import assert_close
from tests.sharding import collectives, mesh, place

B, T, N, K, H = 8, 3, 4, 2, 5
INS = ("btnh", "btnh", "+n", "++t", ("1t",))
NAMES = ("query", "key", "weights", "table", "mask")
OUTS = ("btnh", "+n", "++t")
CONTEXT = {"batch": "data", "heads": "tensor"}


def _arguments(kv_heads=K):
    rng = np.random.default_rng(0)
    query, key, weights, table = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((B, T, N, H), (B, T, kv_heads, H), (1, N), (1, 1, T))
    )
    return query, key, weights, table, [jnp.arange(B * T).reshape(B, T) % 3 == 0]


def _function(seen=None):
    """Returns an elementwise product, and sums over the batch, and over batch and heads.

    As `partition` asks, an array without a batch may come with one, and then so do its sums.
    """

    def local(query, key, weights, table, mask):
        if seen is not None:
            seen.append((query.shape, key.shape, weights.shape, table.shape, mask[0].shape))
        key = jnp.repeat(key, query.shape[2] // key.shape[2], axis=2)
        out = query * key * weights[:, None, :, None] * table[:, 0, :, None, None]
        out = jnp.where(mask[0][:, :, None, None], out, 0)
        of_weights, of_table = out.sum((1, 3)), out.sum((2, 3))[:, None]
        if weights.shape[0] == 1:
            of_weights = of_weights.sum(0, keepdims=True)
        if table.shape[0] == 1:
            of_table = of_table.sum(0, keepdims=True)
        return out, of_weights, of_table

    return local


def _call(*args, seen=None):
    args = aligned(args, INS, current_axes(), NAMES)
    return partitioned(_function(seen), INS, OUTS, current_axes())(*args)


def _placed(mesh, args, heads="tensor"):
    query, key, weights, table, (mask,) = args
    return (
        place(mesh, query, "data", None, heads),
        place(mesh, key, "data", None, heads),
        place(mesh, weights),
        place(mesh, table),
        [place(mesh, mask)],
    )


def _local(batch, heads, kv_heads):
    return (
        (batch, T, heads, H),
        (batch, T, kv_heads, H),
        (1, heads),
        (1, 1, T),
        (batch, T),
    )


def test_axes_are_none_by_default_and_nest():
    assert current_axes() == Axes()
    with axes(batch=("data", "fsdp"), heads="tensor"):
        assert current_axes() == Axes(("data", "fsdp"), ("tensor",))
        with axes(batch="data"):
            assert current_axes() == Axes(("data",), ())
        assert current_axes() == Axes(("data", "fsdp"), ("tensor",))
    assert current_axes() == Axes()


def test_wrong_axes():
    with (
        pytest.raises(TypeError, match="batch must be a mesh axis name or several"),
        axes(batch=(1,)),
    ):
        pass
    with pytest.raises(ValueError, match="one dimension only"), axes(batch="data", heads="data"):
        pass


def test_axes_are_part_of_the_cache_of_jit():
    traced = []

    @jax.jit
    def function(x):
        traced.append(current_axes().batch)
        return x

    for _ in range(2):
        function(1.0)
        with axes(batch="data"):
            function(1.0)
    assert traced == [(), ("data",)]


def test_without_a_mesh_the_function_is_called():
    seen = []
    args = _arguments()
    with axes(**CONTEXT):
        results = jax.jit(functools.partial(_call, seen=seen))(*args)
    assert seen == [_local(B, N, K)]
    assert_close(results, _function()(*args))


@pytest.mark.parametrize("ambient", [True, False])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_shards_over_batch_and_heads(kind, ambient):
    seen, devices = [], mesh(kind)
    args = _placed(devices, _arguments())
    function = functools.partial(_call, seen=seen)
    with axes(**CONTEXT):
        if ambient:
            with jax.set_mesh(devices):
                results = jax.jit(function)(*args)
                sent = collectives(function, *args)
        else:
            results = jax.jit(function)(*args)
            sent = collectives(function, *args)
    assert set(seen) == {_local(B // 4, N // 2, K // 2)}
    assert tuple(results[0].sharding.spec)[:3] == ("data", None, "tensor")
    assert_close(results, _function()(*_arguments()))
    # One for both sums, or one for each: batch, and batch and heads.
    assert set(sent) == {"all-reduce"} and len(sent) <= 2


def test_auto_axes_without_a_context_are_left_to_xla():
    seen = []
    args = _placed(mesh(AxisType.Auto), _arguments())
    results = jax.jit(functools.partial(_call, seen=seen))(*args)
    assert seen == [_local(B, N, K)]
    assert_close(results, _function()(*_arguments()))


def test_auto_axes_that_do_not_divide_the_key_heads_leave_heads_whole():
    seen, devices = [], mesh(AxisType.Auto)
    args = _arguments(kv_heads=1)
    with axes(**CONTEXT), jax.set_mesh(devices):
        results = jax.jit(functools.partial(_call, seen=seen))(*args)
    assert seen == [_local(B // 4, N, 1)]
    assert_close(results, _function()(*args))


def test_auto_axes_that_do_not_divide_the_batch_leave_it_whole():
    seen, devices = [], mesh(AxisType.Auto)
    query, key, weights, table, (mask,) = _arguments()
    args = query[:6], key[:6], weights, table, [mask[:6]]
    with axes(**CONTEXT), jax.set_mesh(devices):
        results = jax.jit(functools.partial(_call, seen=seen))(*args)
    assert seen == [_local(6, N // 2, K // 2)]
    assert_close(results, _function()(*args))


def test_several_axes_for_one_dimension():
    seen, devices = [], mesh(AxisType.Auto, (2, 2, 2), ("data", "fsdp", "tensor"))
    with axes(batch=("data", "fsdp", "absent"), heads=("tensor",)), jax.set_mesh(devices):
        results = jax.jit(functools.partial(_call, seen=seen))(*_arguments())
    assert seen == [_local(B // 4, N // 2, K // 2)]
    assert_close(results, _function()(*_arguments()))


def test_explicit_key_heads_that_do_not_divide_raise():
    devices = mesh(AxisType.Explicit)
    query, key, *rest = _arguments(kv_heads=1)
    args = place(devices, query, "data", None, "tensor"), place(devices, key, "data"), *rest
    with pytest.raises(ValueError, match=r"key: its 1 heads do not divide .*'tensor'.* of size 2"):
        jax.jit(_call)(*args)


@pytest.mark.parametrize(
    ("argument", "spec"), [("query", (None, "data")), ("key", (None,) * 3 + ("x",))]
)
def test_explicit_axes_on_other_dimensions_raise(argument, spec):
    devices = mesh(AxisType.Explicit, (1, 8), ("data", "x"))
    shapes = {"query": (B, T, N, H), "key": (B, T, K, 8)}
    args = dict(zip(NAMES, _arguments(), strict=True))
    args[argument] = place(devices, jnp.ones(shapes[argument]), *spec)
    with pytest.raises(
        ValueError, match=rf"{argument}: dimension {len(spec) - 1} .* only batch and"
    ):
        jax.jit(lambda args: aligned(args, INS, Axes(), NAMES))(tuple(args.values()))


def test_explicit_arguments_are_resharded_to_the_query():
    devices = mesh(AxisType.Explicit)
    query, key, weights, table, masks = _arguments()
    args = (
        place(devices, query, "data", None, "tensor"),
        place(devices, key, None, None, "tensor"),
        place(devices, weights, None, "data"),
        table,
        masks,
    )
    results = jax.jit(_call)(*args)
    assert_close(results, _function()(*_arguments()))


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit])
def test_vmapped_dimensions_shard_too(kind, batch):
    """A vmapped dimension takes the axes where the batch itself does not, and no data moves."""
    query, key, weights, table, (mask,) = _arguments()
    split = (B // batch, batch)
    queries, keys = (x.reshape(*split, *x.shape[1:]) for x in (query, key))
    mask = mask.reshape(*split, T)
    rows = [
        _function()(q, k, weights, table, [m]) for q, k, m in zip(queries, keys, mask, strict=True)
    ]
    expected = tuple(jnp.stack(x) for x in zip(*rows, strict=True))
    seen = []
    function = jax.vmap(functools.partial(_call, seen=seen), (0, 0, None, None, 0))
    if kind is None:
        assert_close(jax.jit(function)(queries, keys, weights, table, [mask]), expected)
        return
    devices = mesh(kind)
    spec = (None, "data") if batch % 4 == 0 else ("data", None)
    args = (
        place(devices, queries, *spec, None, "tensor"),
        place(devices, keys, *spec, None, "tensor"),
        place(devices, weights, None, "tensor"),
        place(devices, table),
        [place(devices, mask, *spec)],
    )
    with axes(**CONTEXT), jax.set_mesh(devices):
        results = jax.jit(function)(*args)
        sent = collectives(function, *args)
    local_batch, _, heads, _ = seen[-1][0]
    assert (local_batch, heads) == (B // 4, N // 2)
    assert set(sent) == {"all-reduce"}
    assert_close(results, expected)


def test_inside_of_a_manual_region_the_function_is_called():
    seen, devices = [], mesh(AxisType.Auto)
    args = _placed(devices, _arguments())

    def local(query, key, weights, table, mask):
        out, of_weights, of_table = _call(query, key, weights, table, [mask], seen=seen)
        return (
            out,
            jax.lax.psum(of_weights, "data"),
            jax.lax.psum(of_table, ("data", "tensor")),
        )

    heads = P("data", None, "tensor")
    function = jax.shard_map(
        local,
        mesh=devices,
        in_specs=(heads, heads, P(None, "tensor"), P(), P("data")),
        out_specs=(heads, P(None, "tensor"), P()),
    )
    with axes(**CONTEXT):
        results = jax.jit(lambda *args: function(*args[:4], args[4][0]))(*args)
    assert seen == [_local(B // 4, N // 2, K // 2)]
    assert_close(results, _function()(*_arguments()))


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_a_partly_manual_region_the_rest_is_sharded(check_vma):
    seen, devices = [], mesh(AxisType.Auto)
    args = _placed(devices, _arguments())

    def local(query, key, weights, table, mask):
        out, of_weights, of_table = _call(query, key, weights, table, [mask], seen=seen)
        return out, jax.lax.psum(of_weights, "data"), jax.lax.psum(of_table, "data")

    function = jax.shard_map(
        local,
        mesh=devices,
        in_specs=(P("data"), P("data"), P(), P(), P("data")),
        out_specs=(P("data"), P(), P()),
        axis_names={"data"},
        check_vma=check_vma,
    )
    with axes(**CONTEXT):
        results = jax.jit(lambda *args: function(*args[:4], args[4][0]))(*args)
    assert seen == [_local(B // 4, N // 2, K // 2)]
    assert_close(results, _function()(*_arguments()))


@pytest.mark.parametrize("kind", [None, AxisType.Auto, AxisType.Explicit])
def test_sharded_is_differentiated_by_jax(kind):
    def loss(query, key, weights, table, mask):
        args = aligned((query, key, weights, table, mask), INS, current_axes(), NAMES)
        function = sharded(lambda *x: _function()(*x)[:1], INS, OUTS[:1], current_axes())
        (out,) = function(*args)
        return (out**2).sum()

    gradient = jax.grad(loss, (0, 1, 2, 3))
    expected = jax.jit(gradient)(*_arguments())
    if kind is None:
        direct = jax.grad(lambda *x: (_function()(*x)[0] ** 2).sum(), (0, 1, 2, 3))
        assert_close(expected, direct(*_arguments()))
        return
    devices = mesh(kind)
    with axes(**CONTEXT), jax.set_mesh(devices):
        assert_close(jax.jit(gradient)(*_placed(devices, _arguments())), expected)


def test_examples_run():
    results = doctest.testmod(partition)
    assert results.attempted > 1 and results.failed == 0

"""Calls that partition themselves over batch and heads.

XLA cannot see into a kernel, so a call lays itself out: `partitioned` runs a function of local
arrays on every device's shard, by an inner `jax.shard_map` over the batch and head dimensions of
its arguments. What is sharded over what is known in two ways:

- Explicit mesh axes stand in the types of the arguments;
- Auto mesh axes do not, so a program names them once, with the context manager `axes`.

Where neither is known, or inside a shard_map that is manual over the whole mesh, the function is
simply called: XLA partitions it, or there is nothing left to partition.

A kernel family has a derivative rule of its own, of which the forward and the backward are each one
call of `partitioned`. The public function reads `current_axes()` and hands them to both: the
backward may be traced outside of the `with`. Before the derivative rule it calls `aligned`, so that
what has to move between devices is moved, and differentiated, by JAX.

Dimensions are written as letters, one string per array. The first stands for the batch:

    b   the batch
    1   the batch, or 1 where an array is the same for all of it
    n   heads: of query, key or value, or 1
    +   1, in the place of b or n: an array without a batch, or without heads, of which the backward
        returns the gradient. As an output, a sum over the local batch or heads, which `partitioned`
        completes over the devices: one all-reduce, the only collective
    any other letter is never sharded

Inside, the batch may be longer than the caller's: dimensions added by `jax.vmap` may be sharded
too, so they stay apart until they are on the shard, and are merged into the batch there. (Merging
them before costs all-gathers.)
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Axes:
    """Names of the Auto mesh axes that shard the batch and the heads."""

    batch: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()


_CONTEXT = jax.make_user_context(default_value=Axes())


@contextlib.contextmanager
def axes(*, batch: str | Sequence[str] = (), heads: str | Sequence[str] = ()) -> Iterator[None]:
    """Says which Auto mesh axes shard the batch and the heads of attention calls traced inside.

    A program sets it once, around the functions it jits; it is part of `jax.jit`'s cache key. Names
    that a mesh lacks, or whose axes are Explicit, are ignored, so one setting serves every mesh of
    a program. Axes that do not divide the batch, or the key heads, leave them whole.

    Args:
      batch: mesh axis or axes over which the batch dimension is sharded.
      heads: mesh axis or axes over which the head dimension is sharded.

    Raises:
      TypeError: a name is no string.
      ValueError: an axis is named twice.

    Example:
      >>> from pallas_kernels.partition import axes, current_axes
      >>> with axes(batch=("data", "fsdp"), heads="tensor"):
      ...     current_axes()
      Axes(batch=('data', 'fsdp'), heads=('tensor',))
    """
    value = Axes(_names(batch, "batch"), _names(heads, "heads"))
    named = value.batch + value.heads
    if len(set(named)) < len(named):
        raise ValueError(f"axes: a mesh axis can shard one dimension only; got {value}")
    with _CONTEXT(value):
        yield


def current_axes() -> Axes:
    """Returns the axes that the innermost `axes` context has set, by default none."""
    return _CONTEXT.value


def _names(names: str | Sequence[str], argument: str) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"axes: {argument} must be a mesh axis name or several; got {names!r}")
    return names


class _Layout(NamedTuple):
    """How a call lies on a mesh."""

    mesh: AbstractMesh
    ambient: bool  # the mesh is the one in context, so shard_map finds it by itself
    batch: tuple[tuple[str, ...], ...]  # axes of every vmapped dimension and, last, of the batch
    heads: tuple[str, ...]

    def entries(self, shape: Sequence[int], dims: str) -> list[tuple[str, ...]]:
        """Returns the axes that shard every dimension of an argument."""
        count = len(self.batch)
        lead = [names if size > 1 else () for names, size in zip(self.batch, shape, strict=False)]
        if dims[0] == "+":
            lead[-1] = ()
        rest = zip(dims[1:], shape[count:], strict=True)
        return lead + [self.heads if letter == "n" and size > 1 else () for letter, size in rest]

    def spec(self, shape: Sequence[int], dims: str) -> P:
        """Returns the PartitionSpec of an argument."""
        return P(*(names or None for names in self.entries(shape, dims)))

    def out_spec(self, dims: str) -> P:
        """Returns the PartitionSpec of an output; a "+" has a partial sum from every shard."""
        return P(
            *(names or None for names in self.batch),
            *((self.heads or None) if letter in "n+" else None for letter in dims[1:]),
        )


def partitioned(
    fn: Callable[..., Sequence[jax.Array]], ins: Sequence[Any], outs: Sequence[str], axes: Axes
) -> Callable[..., tuple[jax.Array, ...]]:
    """Makes a function of local arrays one of global arrays, sharded over batch and heads.

    It is not differentiable: it is what derivative rules are made of.

    Args:
      fn: computes the outputs of any part of batch and heads from the same part of the arguments.
        It may get a longer batch than the caller's (see above). It closes over no arrays.
      ins: for every argument its dimensions, or for a pytree a tree of them with as many leaves.
        The first argument must be the query and the second the key: they have all of the batch, and
        the number of heads that decides what the head axes divide.
      outs: dimensions of every output.
      axes: `current_axes()` at the time of the call that the caller's user made.

    Returns:
      A function of the arguments that returns a tuple of outputs.
    """
    in_dims = tuple(jax.tree.leaves(ins))

    def call(*args: Any) -> tuple[jax.Array, ...]:
        leaves, tree = jax.tree.flatten(args)

        def local(*leaves: jax.Array) -> tuple[jax.Array, ...]:
            return _merged(lambda *flat: fn(*tree.unflatten(flat)), leaves, in_dims, outs)

        @jax.custom_batching.custom_vmap
        def run(*leaves: jax.Array) -> tuple[jax.Array, ...]:
            return _dispatch(local, leaves, in_dims, outs, axes)

        @run.def_vmap
        def _(size: int, batched: Sequence[bool], *leaves: jax.Array) -> tuple[Any, Any]:
            widened = [x if own else x[None] for x, own in zip(leaves, batched, strict=True)]
            # The query shows the sizes of all leading dimensions; the others may have 1.
            widened[0] = jnp.broadcast_to(widened[0], (size, *widened[0].shape[1:]))
            return run(*widened), (True,) * len(outs)

        return run(*leaves)

    return call


def sharded(
    fn: Callable[..., Sequence[jax.Array]], ins: Sequence[Any], outs: Sequence[str], axes: Axes
) -> Callable[..., tuple[jax.Array, ...]]:
    """Is `partitioned` for a function that JAX differentiates: arguments and results are the same.

    Dimensions added by `jax.vmap` are not sharded, and no output may be a "+".
    """
    in_dims = tuple(jax.tree.leaves(ins))

    def call(*args: Any) -> tuple[jax.Array, ...]:
        leaves, tree = jax.tree.flatten(args)
        return _dispatch(lambda *flat: fn(*tree.unflatten(flat)), leaves, in_dims, outs, axes)

    return call


def aligned(args: Sequence[Any], ins: Sequence[Any], axes: Axes, names: Sequence[str]) -> tuple:
    """Makes the types of the arguments agree, outside of a derivative rule.

    Under Explicit axes, arguments whose sharding differs from the query's are resharded. Inside of
    a shard_map all become varying over the same mesh axes. Otherwise this does nothing.

    Args:
      args: the arguments, as for `partitioned`.
      ins: their dimensions.
      axes: `current_axes()`.
      names: of the arguments, for messages.

    Raises:
      ValueError: a dimension other than batch and heads is sharded over Explicit axes, or the axes
        that shard the query's heads do not divide the key's.
    """
    leaves, tree = jax.tree.flatten(tuple(args))
    dims = jax.tree.leaves(ins)
    owners = [n for n, arg in zip(names, args, strict=True) for _ in jax.tree.leaves(arg)]
    varying = frozenset().union(*(_varying(leaf) for leaf in leaves))
    if varying:
        leaves = [_pcast(leaf, varying) for leaf in leaves]
    layout = _layout(leaves, dims, axes)
    if layout is not None:
        kinds = _kinds(layout.mesh)
        for owner, leaf, letters in zip(owners, leaves, dims, strict=True):
            for letter, entry in zip(letters, _explicit_spec(leaf, kinds), strict=True):
                if letter not in "b1+n" and entry:
                    raise ValueError(
                        f"{owner}: dimension {letters.index(letter)} of {jax.typeof(leaf)} is "
                        f"sharded over {entry}; only batch and heads may be. For sharded sequences "
                        "see attention.parallel"
                    )
        leaves = [
            _resharded(leaf, letters, layout, kinds)
            for leaf, letters in zip(leaves, dims, strict=True)
        ]
    return tree.unflatten(leaves)


def _dispatch(
    local: Callable[..., tuple[jax.Array, ...]],
    leaves: Sequence[jax.Array],
    in_dims: Sequence[str],
    outs: Sequence[str],
    axes: Axes,
) -> tuple[jax.Array, ...]:
    """Calls `local` on shards and completes the sums, or simply calls it."""
    layout = _layout(leaves, in_dims, axes)
    if layout is None:
        return local(*leaves)
    kinds = _kinds(layout.mesh)
    varying = frozenset().union(*map(_varying, leaves))
    leaves = [_resharded(x, dims, layout, kinds) for x, dims in zip(leaves, in_dims, strict=True)]
    results = jax.shard_map(
        local,
        mesh=None if layout.ambient else layout.mesh,
        in_specs=tuple(map(layout.spec, (leaf.shape for leaf in leaves), in_dims)),
        out_specs=tuple(layout.out_spec(dims) for dims in outs),
        check_vma=False,
    )(*leaves)

    def complete(result: jax.Array, dims: str) -> jax.Array:
        first = len(layout.batch) - 1
        partial = tuple(first + i for i, letter in enumerate(dims) if letter == "+")
        result = jnp.sum(result, partial, keepdims=True) if partial else result
        return _pcast(result, varying)  # which check_vma=False has dropped

    return tuple(map(complete, results, outs))


def _merged(
    fn: Callable[..., Sequence[jax.Array]],
    leaves: Sequence[jax.Array],
    in_dims: Sequence[str],
    outs: Sequence[str],
) -> tuple[jax.Array, ...]:
    """Calls `fn` with the vmapped dimensions merged into the batch."""
    lead = leaves[0].shape[: leaves[0].ndim - len(in_dims[0]) + 1]
    count = len(lead)
    if count == 1:
        return tuple(fn(*leaves))

    def merge(leaf: jax.Array, dims: str) -> jax.Array:
        # A "+" is repeated too: its gradient must not be summed over vmapped dimensions.
        if dims[0] != "1" or any(size > 1 for size in leaf.shape[:count]):
            leaf = jnp.broadcast_to(leaf, lead + leaf.shape[count:])
        return leaf.reshape(-1, *leaf.shape[count:])

    def split(result: jax.Array, dims: str) -> jax.Array:
        result = result.reshape(*lead, *result.shape[1:])
        return jnp.sum(result, count - 1, keepdims=True) if dims[0] == "+" else result

    results = fn(*(merge(leaf, dims) for leaf, dims in zip(leaves, in_dims, strict=True)))
    return tuple(split(result, dims) for result, dims in zip(results, outs, strict=True))


def _layout(leaves: Sequence[jax.Array], in_dims: Sequence[str], axes: Axes) -> _Layout | None:
    """Returns the layout of a call, or None if it is not ours to partition."""
    mesh = jax.sharding.get_abstract_mesh()
    ambient = not mesh.empty
    if not ambient:
        meshes = (jax.typeof(leaf).sharding.mesh for leaf in leaves)
        mesh = next((m for m in meshes if not m.empty), mesh)
    kinds = _kinds(mesh)
    if all(kind == AxisType.Manual for kind in kinds.values()):
        return None

    count = leaves[0].ndim - len(in_dims[0]) + 1
    specs = [_explicit_spec(leaf, kinds) for leaf in leaves]
    batch = [list(specs[0][i]) for i in range(count)]
    for i in range(count - 1):  # a vmapped dimension may be sharded in another argument only
        batch[i] = next((list(spec[i]) for spec in specs if spec[i]), [])
    head_dim = count - 1 + in_dims[0].index("n")
    heads = list(specs[0][head_dim])
    key_heads = leaves[1].shape[count - 1 + in_dims[1].index("n")]

    def ways(names: Sequence[str]) -> int:
        return math.prod(mesh.shape[name] for name in names)

    if key_heads % ways(heads):
        raise ValueError(
            f"key: its {key_heads} heads do not divide over the mesh axes {tuple(heads)} of size "
            f"{ways(heads)} that shard the heads of query; shard them over axes that divide both"
        )
    for name in (name for name in axes.batch if kinds.get(name) == AxisType.Auto):
        # From the inside: a vmapped dimension takes the axis where the batch itself cannot.
        for i in reversed(range(count)):
            if leaves[0].shape[i] % ways([*batch[i], name]) == 0:
                batch[i].append(name)
                break
    for name in (name for name in axes.heads if kinds.get(name) == AxisType.Auto):
        if key_heads % ways([*heads, name]) == 0:
            heads.append(name)
    if not any(batch) and not heads and AxisType.Auto in kinds.values():
        return None
    return _Layout(mesh, ambient, tuple(map(tuple, batch)), tuple(heads))


def _kinds(mesh: AbstractMesh) -> dict[str, AxisType]:
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True))


def _explicit_spec(leaf: jax.Array, kinds: dict[str, AxisType]) -> list[tuple[str, ...]]:
    """Returns the Explicit axes that shard every dimension of an array."""
    spec = jax.typeof(leaf).sharding.spec
    entries = [() if e is None else (e,) if isinstance(e, str) else tuple(e) for e in spec]
    entries += [()] * (leaf.ndim - len(entries))
    return [tuple(n for n in entry if kinds.get(n) == AxisType.Explicit) for entry in entries]


def _resharded(
    leaf: jax.Array, dims: str, layout: _Layout, kinds: dict[str, AxisType]
) -> jax.Array:
    """Returns the array with the Explicit part of the sharding that the layout gives it."""
    wanted = [
        tuple(name for name in entry if kinds[name] == AxisType.Explicit)
        for entry in layout.entries(leaf.shape, dims)
    ]
    if wanted == _explicit_spec(leaf, kinds):
        return leaf
    spec = P(*(entry or None for entry in wanted))
    return jax.sharding.reshard(leaf, spec if layout.ambient else NamedSharding(layout.mesh, spec))


def _varying(leaf: jax.Array) -> frozenset[str]:
    return jax.typeof(leaf).manual_axis_type.varying


def _pcast(leaf: jax.Array, varying: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(varying - _varying(leaf)))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

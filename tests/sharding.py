"""Meshes of eight host devices, and what a compiled program sends between them."""

import re

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

COLLECTIVE = re.compile(
    r" (all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
    r"|ragged-all-to-all)(?:-start)?\("
)


def mesh(kind: AxisType, shape=(4, 2), names=("data", "tensor")) -> jax.sharding.Mesh:
    """Returns a mesh of all devices, with axes of one kind."""
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def place(mesh: jax.sharding.Mesh, array: jax.Array, *spec) -> jax.Array:
    """Shards an array."""
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def collectives(function, *args) -> list[str]:
    """Returns the names of the collectives of a jitted function, compiled for its arguments."""
    return COLLECTIVE.findall(jax.jit(function).lower(*args).compile().as_text())

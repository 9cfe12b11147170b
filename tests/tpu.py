"""Programs for TPUs, compiled and interpreted on a machine that has none."""

import contextlib
import functools
import os

import jax
import numpy as np
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@functools.cache
def topology_devices(topology: str = "v5e:2x2") -> tuple:
    """Returns the devices of a TPU topology: compilers, with no hardware behind them."""
    # Which TPU is here? Answered, so that libtpu does not go and ask the network.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    return tuple(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def tpu_mesh(
    shape=(1,), names=("x",), *, kind: AxisType = AxisType.Auto, topology: str = "v5e:2x2"
) -> Mesh:
    """Returns a mesh of the first devices of a TPU topology, with axes of one kind."""
    devices = np.array(topology_devices(topology)[: np.prod(shape)])
    return Mesh(devices.reshape(shape), names, axis_types=(kind,) * len(names))


def compile_for_tpu(
    function, *args, topology: str = "v5e:2x2", devices: int | Mesh = 1
) -> jax.stages.Compiled:
    """Compiles a function for TPU.

    Args:
      function: what to compile; it is jitted here.
      *args: pytrees of arrays, or of ShapeDtypeStructs, which may have shardings over the mesh. All
        others are on every device.
      topology: name of the TPU topology, where `devices` is a number.
      devices: how many devices, or a mesh made by `tpu_mesh`. It is the mesh in context.

    Returns:
      The compiled function, of which `as_text()` is the program. It cannot be called.
    """
    mesh = devices if isinstance(devices, Mesh) else tpu_mesh((devices,), topology=topology)
    everywhere = NamedSharding(mesh, P())

    def placed(x) -> jax.ShapeDtypeStruct:
        own = x.sharding if isinstance(x, jax.ShapeDtypeStruct) else None
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own or everywhere)

    # Pallas reads from the mesh in context which TPU it is.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function).trace(*jax.tree.map(placed, args))
        return traced.lower(lowering_platforms=("tpu",)).compile()


@contextlib.contextmanager
def interpreted(**params):
    """Runs TPU kernels in Pallas's TPU interpret mode, where races are errors.

    Memory that nothing was written to is NaN, a copy arrives when it is waited for and not before.
    Wait for results inside.
    """
    params = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait", **params)
    with pltpu.force_tpu_interpret_mode(params):
        try:
            yield
        finally:
            pltpu.reset_tpu_interpret_mode_state()  # which an exception leaves as it was

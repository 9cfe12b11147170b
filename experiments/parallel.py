"""Processes, the device mesh, and how parameters and batches are laid over it."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import attention
from experiments.config import DistributedConfig, MeshConfig
from experiments.errors import ExperimentError

BATCH_AXES = ("data", "fsdp")

# Path of a parameter -> mesh axes of its dimensions. The first rule that matches is taken; an axis
# that does not divide its dimension is left out. Optimiser state has the paths of its parameters.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed/embedding$", ("tensor", "fsdp")),
    (r"head/kernel$", ("fsdp", "tensor")),
    (r"attention/out/kernel$", ("tensor", "fsdp")),
    (r"attention/\w+/kernel$", ("fsdp", "tensor")),
    (r"attention/value_convolution/kernel$", (None, None, None, "tensor")),
    (r"attention/theta$", ("tensor", None)),
    (r"feed_forward/down/kernel$", ("tensor", "fsdp")),
    (r"feed_forward/\w+/kernel$", ("fsdp", "tensor")),
)


def start_processes(config: DistributedConfig) -> None:
    """Joins the processes of one job; does nothing for a single process. Call before any JAX use.

    Raises:
      ExperimentError: if the peers cannot be found or reached.
    """
    if not (config.initialize or config.coordinator):
        return
    # Only the CPU backend reads this: without it its processes cannot exchange arrays.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(config.coordinator, config.processes, config.process)
    except (ValueError, RuntimeError) as error:
        raise ExperimentError(
            f"distributed: {error}. Where neither TPU metadata nor Slurm tells who the peers are, "
            "give --distributed.coordinator HOST:PORT --distributed.processes N "
            "--distributed.process I"
        ) from error


def make_mesh(config: MeshConfig) -> Mesh:
    """A mesh with axes data, fsdp and tensor over all devices of all processes.

    Raises:
      ExperimentError: if the axes' sizes do not multiply to the number of devices.
    """
    count = jax.device_count()
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    for name, size in sizes.items():
        if size < 1 and not (name == "data" and size == -1):
            raise ExperimentError(f"mesh.{name}: {size}; it must be a positive number of devices")
    inner = config.fsdp * config.tensor
    if config.data == -1:
        if count % inner:
            raise ExperimentError(
                f"mesh: fsdp x tensor = {config.fsdp} x {config.tensor} = {inner} does not divide "
                f"the {count} devices"
            )
        sizes["data"] = count // inner
    elif config.data * inner != count:
        raise ExperimentError(
            f"mesh: data x fsdp x tensor = {config.data} x {config.fsdp} x {config.tensor} = "
            f"{config.data * inner}, but there are {count} devices"
        )
    axes = (AxisType.Auto,) * 3
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=axes)


def check_fit(mesh: Mesh, *, batch_size: int, accumulate: int, num_heads: int) -> None:
    """Refuses a batch or a number of heads that the mesh cannot split evenly.

    Raises:
      ExperimentError: naming the option, its value and what it must be.
    """
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    if accumulate < 1 or batch_size % accumulate or batch_size // accumulate % groups:
        raise ExperimentError(
            f"batch_size: {batch_size} in {accumulate} parts (accumulate); each part must be a "
            f"multiple of the {groups} groups of devices of mesh.data x mesh.fsdp"
        )
    if num_heads % mesh.shape["tensor"]:
        raise ExperimentError(
            f"mesh.tensor: {mesh.shape['tensor']} does not divide the {num_heads} attention heads"
        )


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Makes a mesh current, for JAX and for the attention functions that are called inside."""
    with jax.set_mesh(mesh), attention.parallel.axes(batch=BATCH_AXES, heads="tensor"):
        yield


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The NamedSharding of each leaf of a tree of parameters or optimiser state, by RULES."""

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        name = name.removesuffix("/value")
        for pattern, axes in RULES:
            if re.search(pattern, name) and len(axes) == len(leaf.shape):
                fitting = (
                    axis if axis and size % mesh.shape[axis] == 0 else None
                    for axis, size in zip(axes, leaf.shape, strict=True)
                )
                return NamedSharding(mesh, P(*fitting))
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(one, tree)


def global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Joins the rows that each process has read into arrays that are split over the mesh."""
    sharding = NamedSharding(mesh, P(BATCH_AXES))
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
    }


def reader(mesh: Mesh) -> tuple[int, int]:
    """Which part of the data this process reads, and of how many parts.

    Processes whose devices hold the same rows of a batch (they differ along `tensor` only) read
    the same part.

    Raises:
      ExperimentError: if the mesh mixes the rows of processes, so that parts would overlap.
    """
    groups = mesh.shape["data"] * mesh.shape["fsdp"]
    by_process: dict[int, set[int]] = {}
    for group, devices in enumerate(mesh.devices.reshape(groups, -1)):
        for device in devices:
            by_process.setdefault(device.process_index, set()).add(group)
    parts = sorted({tuple(sorted(rows)) for rows in by_process.values()})
    if sum(map(len, parts)) != groups:
        raise ExperimentError(
            "mesh: the devices of a process must hold whole groups of mesh.data x mesh.fsdp, or "
            f"share one group; with {jax.process_count()} processes choose another mesh.tensor "
            f"than {mesh.shape['tensor']}"
        )
    return parts.index(tuple(sorted(by_process[jax.process_index()]))), len(parts)


def on_first_process(action: Callable[[], None]) -> None:
    """Runs an action on process 0 only; where it fails, every process fails.

    Raises:
      ExperimentError: the action's own, or on the other processes one that points there.
    """
    failure = None
    if jax.process_index() == 0:
        try:
            action()
        except ExperimentError as error:
            failure = error
    if jax.process_count() > 1:
        failed = multihost_utils.broadcast_one_to_all(np.int32(failure is not None))
        if failed and failure is None:
            failure = ExperimentError("process 0 could not go on; its message says why")
    if failure is not None:
        raise failure

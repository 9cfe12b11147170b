"""How the GPU kernels are configured on a GPU that was measured."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import masks
from pallas_kernels.tiled import gpu_tuned, tiled_attention
from pallas_kernels.tiled.gpu_tuned import Config
from pallas_kernels.tiled.inputs import Inputs


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Has an empty table, on a machine with an H100."""
    (tmp_path / "gpu_tuned.json").write_text("{}\n")
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    devices = [types.SimpleNamespace(device_kind="H100")]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    gpu_tuned.table.cache_clear()
    yield
    gpu_tuned.table.cache_clear()


def _inputs(mask=None, features=100, width=40):
    query, value = (jnp.zeros((1, 256, 133, n), jnp.bfloat16) for n in (features, width))
    return Inputs(query, query, value, *(None,) * (len(Inputs._fields) - 3))._replace(mask=mask)


LISTS = masks.blocks(np.zeros((1, 1, 2, 1), np.int32), np.ones((1, 1, 2), np.int32), 128, 128)


def test_configurations_are_found_by_kernel_mask_dtype_and_features(table):
    keys = {
        "forward, full, bfloat16, 128 features": _inputs(),
        "forward, masked, bfloat16, 64 features": _inputs(masks.causal(), 40, 64),
        "forward, lists, bfloat16, 256 features": _inputs(masks.causal() & LISTS, 64, 200),
    }
    assert [gpu_tuned.key("forward", x) for x in keys.values()] == [*keys]
    assert gpu_tuned.config("forward", _inputs()) is None
    first, second, third = Config(64, True), Config(128, False), Config(64, False)
    gpu_tuned.write("H100", dict(zip(keys, (first, second, third), strict=True)))
    assert [gpu_tuned.config("forward", x) for x in keys.values()] == [first, second, third]
    # Others stay as they are.
    gpu_tuned.write("H100", {[*keys][1]: third})
    gpu_tuned.write("H200", {next(iter(keys)): third})
    assert [gpu_tuned.config("forward", x) for x in keys.values()] == [first, third, third]
    assert gpu_tuned.config("backward_keys", _inputs()) is None
    with gpu_tuned.trying("backward_keys", second):
        assert gpu_tuned.config("backward_keys", _inputs()) == second
        assert gpu_tuned.config("forward", _inputs()) == first


@pytest.mark.parametrize("mask", (None, masks.causal()))
def test_the_kernels_are_as_they_are_configured(table, mask):
    """A grid of processors is that of persistent blocks."""
    x = _inputs(mask, 64, 64)
    kernels = gpu_tuned.KERNELS

    def grids():
        def loss(*arrays):
            out = tiled_attention(*arrays, mask=mask, implementation="pallas_gpu")
            return out.astype(jnp.float32).sum()

        jax.clear_caches()
        jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(x.query, x.key, x.value)
        return [str(jaxpr).count(f"axis_name={name}") for name in ("processor", "share")]

    def configure(*config):
        configs = {gpu_tuned.key(kernel, x): Config(*config) for kernel in kernels}
        gpu_tuned.write("H100", configs)

    default = grids()
    configure(128, True)
    persistent = grids()
    configure(128, False)
    assert grids() == [0, 0]
    configure(128, True, True)
    # One pass has blocks of its own: that of the forward is left.
    of_one, shares = grids()
    assert [of_one, shares] == default and shares > 0
    assert persistent == [of_one * len(kernels), 0]


def test_what_is_written_is_in_the_package(table):
    assert gpu_tuned.file().read_text() == "{}\n"
    gpu_tuned.write("H100", {"b": Config(64, True), "a": Config(128, False)})
    assert gpu_tuned.file().read_text().split() == (
        '{ "H100": { "a": [ 128, false, false ], "b": [ 64, true, false ] } }'.split()
    )

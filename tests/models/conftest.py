"""Settings of the tests of models."""

import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compilation():
    """Compiles with few optimisations: no test here measures speed."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)

"""Settings of the tests of models."""

import pytest


@pytest.fixture(autouse=True)
def quick_models(quick_compilation):
    """No test of a model measures speed."""

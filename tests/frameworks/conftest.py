"""Settings for the tests with frameworks."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def as_users_have_it():
    """Frameworks mix dtypes and ranks freely, which the other tests do not; models here compile for long."""
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
    jax.config.update("jax_disable_most_optimizations", False)

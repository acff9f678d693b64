"""Settings for all tests: eight CPU devices, strict promotion, and no deadline for drawn examples."""

import hypothesis
import jax
import pytest

# Before anything starts the backend. Devices that nothing is put on cost nothing, and results on one of
# eight are those on one of one.
jax.config.update("jax_num_cpu_devices", 8)

hypothesis.settings.register_profile("tests", deadline=None, max_examples=30)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True, scope="module")
def strict_promotion():
    """Arrays of different dtypes or ranks meet only where the code says so; examples in docs are free."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True, scope="module")
def programs_are_dropped(request):
    """What a module compiled goes with it: a process may map only so many programs into its memory."""
    yield
    for value in vars(request.module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    jax.clear_caches()

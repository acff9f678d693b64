"""What differs between the versions of JAX and Optax that the tests run on."""

import jax
import optax

if hasattr(jax, "enable_x64"):
    enable_x64 = jax.enable_x64
else:  # JAX up to 0.7
    from jax.experimental import enable_x64  # noqa: F401


def before(package, *version: int) -> bool:
    """Whether a package is older than a version."""
    return tuple(int(part) for part in package.__version__.split(".")[: len(version)]) < version


OLD_JAX = before(jax, 0, 8)
OLD_OPTAX = before(optax, 0, 2, 7)

"""Strategies for trees. Values are drawn and shapes are not: each new shape is another compilation."""

from typing import Any

import jax
import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp


def like(tree: Any, bound: float = 1e4, special: bool = False) -> st.SearchStrategy:
    """Trees with the structure, shapes and dtypes of `tree`.

    Args:
      tree: arrays of float32.
      bound: the largest modulus of an entry.
      special: whether NaN and infinite entries may occur.
    """
    entries = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=False)
    if not special:
        largest = float(np.float32(bound))
        entries = st.floats(-largest, largest, width=32, allow_subnormal=False)
    leaves, structure = jax.tree.flatten(tree)
    drawn = [hnp.arrays(np.float32, leaf.shape, elements=entries) for leaf in leaves]
    return st.tuples(*drawn).map(lambda arrays: jax.tree.unflatten(structure, arrays))


def limits(least: float = 1e-3, most: float = 1e3) -> st.SearchStrategy:
    """Numbers to clip to, as float32 scalars: traced, so that they can vary in one compiled function."""
    ends = float(np.float32(least)), float(np.float32(most))
    return st.floats(*ends, width=32).map(np.float32)


def powers_of_two(least: int = -40, most: int = 40) -> st.SearchStrategy:
    """Exact scales: multiplying by one rounds nothing."""
    return st.integers(least, most).map(lambda exponent: np.float32(2.0**exponent))

"""Normalised paths: the same names for a leaf whatever container or wrapper it comes in."""

import collections
import re
from collections.abc import Callable, Container
from typing import Any

import jax
from jax.tree_util import FlattenedIndexKey, GetAttrKey

# What frameworks put below a parameter: nnx.Variable and boxed linen (value), Penzai (value, data_array).
_WRAPPERS = {GetAttrKey("value"), GetAttrKey("raw_value"), GetAttrKey("data_array"), FlattenedIndexKey(0)}


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[tuple[str, ...], Any]]:
    """The leaves of a tree, in its order, each with its normalised keys.

    A wrapper's key at the end of a path is dropped where it has no sibling: `kernel/value` becomes `kernel`.
    A last key with slashes in it, as flattened trees have, is several keys.
    """
    with_path, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    wrapped = any(path and path[-1] in _WRAPPERS for path, _ in with_path)
    below = collections.Counter(path[:k] for path, _ in with_path for k in range(len(path)) if wrapped)
    flat = []
    for path, leaf in with_path:
        while path and path[-1] in _WRAPPERS and below[path[:-1]] == 1:
            path = path[:-1]
        keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
        flat.append(((*keys[:-1], *(part for key in keys[-1:] for part in key.split("/"))), leaf))
    return flat


def parts(keys: tuple[str, ...]) -> tuple[str, ...]:
    """The keys without slashes in them: a tree prefix may be nested where a tree of arrays is flat."""
    return tuple(part for key in keys for part in key.split("/"))


def nearest(keys: tuple[str, ...], known: Container[tuple[str, ...]]) -> tuple[str, ...] | None:
    """The longest beginning of a path that is among those known, in a tree prefix, or None."""
    return next((keys[:n] for n in range(len(keys), -1, -1) if keys[:n] in known), None)


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Sorts names as people count: `Dense_2` before `Dense_10`."""
    parts = enumerate(re.split(r"(\d+)", name))
    return [(k % 2 == 0, int(part) if k % 2 else 0, part) for k, part in parts]

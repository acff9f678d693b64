"""Trees taken apart into leaves with names, and the rows of groups that these belong to."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optaxclip import _paths
from optaxclip._base import Groups, Leaf, Member, PyTree, Table

OVERWRITTEN = "_overwrite_with_gradient"  # Flax's FP8 statistics: values to store, not directions to go


class Place(NamedTuple):
    """Where a leaf's norm and factor stand among the rows.

    Attributes:
      axes: the axes of the leaf along which its rows run; none of them for a single row.
      first: the first row.
      measured: whether the leaf counts towards the norm.
      scaled: whether the factor is applied to it.
    """

    axes: tuple[int, ...]
    first: int
    measured: bool
    scaled: bool


class Partition(NamedTuple):
    """A tree, taken apart into the rows of its groups.

    Attributes:
      leaves: the leaves in tree order.
      treedef: the tree's structure.
      paths: the normalised path of each leaf.
      places: the place of each leaf, or None if it is left alone. Hashable.
      table: the rows' names and sizes.
    """

    leaves: list[Any]
    treedef: Any
    paths: tuple[str, ...]
    places: tuple[Place | None, ...]
    table: Table

    @property
    def measured(self) -> dict[int, Place]:
        """The places of the leaves that count in norms, by their numbers."""
        return {k: place for k, place in enumerate(self.places) if place is not None and place.measured}


def named_leaves(tree: PyTree, names: tuple[str, ...] | None = None) -> list[Leaf]:
    """The leaves of a tree with their normalised paths; a path that occurs again gets `#2`, `#3`."""
    flat = _paths.flatten(tree)
    if names is not None:
        if flat and len(names) != len(flat):
            raise ValueError(
                f"groups: names= has {len(names)} paths for a tree of {len(flat)} leaves. Pass one per leaf."
            )
        flat = [(tuple(name.split("/")), leaf) for name, (_, leaf) in zip(names, flat, strict=False)]
    leaves, seen = [], {}
    for keys, leaf in flat:
        path = "/".join(keys)
        seen[path] = seen.get(path, 0) + 1
        if seen[path] > 1:
            keys = (*keys[:-1], f"{keys[-1] if keys else ''}#{seen[path]}")
            path = "/".join(keys)
        leaves.append(Leaf(path, keys, leaf))
    return leaves


def is_grouped(leaf: Leaf) -> bool:
    """Whether a leaf can belong to a group: inexact, not empty, not a value to be stored."""
    dtype = getattr(leaf.value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
        return isinstance(leaf.value, float | complex)
    return math.prod(leaf.shape) > 0 and OVERWRITTEN not in leaf.keys


def _as_array(leaf: Leaf) -> Leaf:
    return leaf._replace(value=jnp.asarray(leaf.value)) if isinstance(leaf.value, float | complex) else leaf


def partition(groups: Groups, tree: PyTree) -> Partition:
    """Takes a tree apart. Rows are in natural order of their groups' names, whatever the tree's order."""
    leaves = [_as_array(leaf) if is_grouped(leaf) else leaf for leaf in named_leaves(tree, groups.names)]
    candidates = [leaf for leaf in leaves if is_grouped(leaf)]
    assigned = iter(groups.assign(candidates))
    members = [next(assigned) if is_grouped(leaf) else None for leaf in leaves]
    shapes = row_shapes(leaves, members)
    spans, first = {}, 0
    for name in sorted(shapes, key=_paths.natural):
        spans[name] = first, math.prod(shapes[name])
        first += spans[name][1]
    places = tuple(
        None if m is None else Place(m.rows, spans[m.group][0], m.measured, m.scaled) for m in members
    )
    sizes = np.zeros(first)
    for leaf, member in zip(leaves, members, strict=True):
        if member is not None and member.measured:
            start, count = spans[member.group]
            sizes[start : start + count] += math.prod(leaf.shape) // count
    names = tuple(name for group in spans for name in row_names(group, shapes[group]))
    table = Table(names, sizes, spans)
    values = [leaf.value for leaf in leaves]
    return Partition(values, jax.tree.structure(tree), tuple(leaf.path for leaf in leaves), places, table)


def row_shapes(leaves: Sequence[Leaf], members: Sequence[Member | None]) -> dict[str, tuple[int, ...]]:
    """The shape of each group's rows, checked to be the same for all of its leaves."""
    shapes, first, measured = {}, {}, set()
    for leaf, member in zip(leaves, members, strict=True):
        if member is None:
            continue
        name, shape = member.group, tuple(leaf.shape[axis] for axis in member.rows)
        if shapes.setdefault(name, shape) != shape:
            raise ValueError(
                f"groups: group {name!r} has rows of shape {shape} at leaf {leaf.path!r} and of shape "
                f"{shapes[name]} at leaf {first[name]!r}. Give stacked and other leaves groups of their own, "
                "with layer, leaf, depth or regex."
            )
        first.setdefault(name, leaf.path)
        if member.measured:
            measured.add(name)
    for name, path in first.items():
        if name not in measured:
            raise ValueError(
                f"groups: group {name!r}, of leaf {path!r}, is scaled but nothing in it is measured. "
                "Let at least one of its leaves count towards the norm."
            )
    return shapes


def row_names(group: str, shape: tuple[int, ...]) -> list[str]:
    """The names of a group's rows: its own, with the index behind it where there are several."""
    if not shape:
        return [group]
    return [f"{group}[{','.join(map(str, index))}]" for index in np.ndindex(shape)]


def matching(part: Partition, params: PyTree, names: tuple[str, ...] | None, where: str) -> list[Any]:
    """The leaves of the parameters at the paths of the updates, checked to be there in the same shapes.

    Only grouped leaves are looked up; in place of the others stands None. Matching by path lets the two
    trees use different containers and lets either hold leaves that the other lacks.
    """
    if params is None:
        raise ValueError(
            f"{where}: You are using a transformation that requires the current value of parameters, but you "
            "are not passing `params` when calling `update`."
        )
    by_path = {leaf.path: leaf.value for leaf in named_leaves(params, names)}
    found = []
    for path, place, leaf in zip(part.paths, part.places, part.leaves, strict=True):
        if place is None:
            found.append(None)
            continue
        value = by_path.get(path)
        if value is None or jnp.shape(value) != jnp.shape(leaf):
            got = "none" if value is None else f"shape {jnp.shape(value)} there"
            raise ValueError(
                f"{where}: the update's leaf {path!r} has shape {jnp.shape(leaf)}, the parameters have "
                f"{got}. Pass the parameters that the updates belong to."
            )
        found.append(jnp.asarray(value))
    return found

"""What a grouping does to a tree, in words."""

import math
from collections.abc import Sequence

import jax.numpy as jnp

from optaxclip import _checks, _paths
from optaxclip._base import Groups, PyTree
from optaxclip._partition import Partition, partition


def describe(groups: Groups, params: PyTree) -> str:
    """What a grouping does to a tree: each group with its leaves, and what is left alone.

    Args:
      groups: a grouping.
      params: the parameters or updates, arrays or `jax.ShapeDtypeStruct`.

    Returns:
      Text for a terminal, groups in natural order.

    >>> import jax.numpy as jnp, optaxclip as oc
    >>> params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "step": jnp.array(0)}
    >>> print(oc.describe(oc.groups.layer(), params))
    1 group, 2 leaves, 9 entries
    dense: 2 leaves, 9 entries
      dense/bias    (3,)    float32
      dense/kernel  (2, 3)  float32
    left alone: 1 leaf
      step  ()  int32
    """
    _checks.spec("describe", Groups, groups=groups)
    part = partition(groups, params)
    by_group: dict[str, list[int]] = {name: [] for name in part.table.spans}
    firsts = {first: name for name, (first, _) in part.table.spans.items()}
    for k, place in enumerate(part.places):
        if place is not None:
            by_group[firsts[place.first]].append(k)
    sizes = {name: sum(math.prod(jnp.shape(part.leaves[k])) for k in by_group[name]) for name in by_group}
    count = sum(map(len, by_group.values()))
    lines = [
        f"{_many(len(by_group), 'group')}, {_many(count, 'leaf')}, {_many(sum(sizes.values()), 'entry')}"
    ]
    for name, indices in by_group.items():
        rows = part.table.spans[name][1]
        of_rows = f", {rows} norms" if part.places[indices[0]].axes else ""  # type: ignore[union-attr]
        lines.append(f"{name}: {_many(len(indices), 'leaf')}, {_many(sizes[name], 'entry')}{of_rows}")
        lines += _leaf_lines(part, indices)
    alone = [k for k, place in enumerate(part.places) if place is None]
    if alone:
        lines += [f"left alone: {_many(len(alone), 'leaf')}", *_leaf_lines(part, alone)]
    return "\n".join(lines)


def _many(count: int, noun: str) -> str:
    plural = {"leaf": "leaves", "entry": "entries"}.get(noun, noun + "s")
    return f"{count:,} {noun if count == 1 else plural}"


def _leaf_lines(part: Partition, indices: Sequence[int]) -> list[str]:
    rows = []
    for k in sorted(indices, key=lambda k: _paths.natural(part.paths[k])):
        leaf, place, note = part.leaves[k], part.places[k], []
        if place is not None and place.axes:
            axes = "axis" if len(place.axes) == 1 else "axes"
            note.append(f"one norm per index of {axes} {', '.join(map(str, place.axes))}")
        if place is not None and not place.scaled:
            note.append("measured only")
        if place is not None and not place.measured:
            note.append("scaled only")
        dtype = str(getattr(leaf, "dtype", type(leaf).__name__))
        rows.append(
            (part.paths[k] or "(root)", str(tuple(getattr(leaf, "shape", ()))), dtype, ", ".join(note))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        "  " + "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]]).rstrip()
        for row in rows
    ]

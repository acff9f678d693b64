"""What recorded norms are of, and how they are put together to the norms of coarser groups."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from optaxclip import _checks, _paths, norms as _norms
from optaxclip._base import Groups, Leaf, Member, Norm, PyTree, Table
from optaxclip._partition import named_leaves, partition, row_names, row_shapes
from optaxclip.groups import ROOT

# The leaves of a layer of which only the name is known: two, so that no grouping takes the layer for a leaf.
UNKNOWN = "(one leaf)", "(another leaf)"


class Source(NamedTuple):
    """A leaf that a recorded norm is of.

    Attributes:
      keys: its normalised keys.
      shape: its shape; None if that is not known.
      axes: its axes along which there is one norm for each index.
    """

    keys: tuple[str, ...]
    shape: tuple[int, ...] | None = None
    axes: tuple[int, ...] = ()


class Row(NamedTuple):
    """What a recorded norm is of.

    Attributes:
      name: its name.
      sources: the leaves that it is the norm of.
      at: which index along their `axes`.
    """

    name: str
    sources: tuple[Source, ...]
    at: tuple[int, ...] = ()


class Regrouped(NamedTuple):
    """Rows put together to coarser groups.

    Attributes:
      table: the names, sizes and spans of the groups.
      rows: the groups as rows.
      place: the group of each recorded row, int `(rows,)`; -1 if it is left alone.
      measured: whether it counts towards the group's norm, `(rows,)`.
      scaled: whether the group's factor is applied to it, `(rows,)`.
    """

    table: Table
    rows: tuple[Row, ...]
    place: Int[np.ndarray, " rows"]
    measured: Bool[np.ndarray, " rows"]
    scaled: Bool[np.ndarray, " rows"]


class _Shapeless:
    """Stands for a leaf of which nothing but the path is known."""

    @property
    def shape(self) -> tuple[int, ...]:
        raise ValueError(
            "History: these groups depend on the shapes of leaves, which this recording does not have. Make "
            "it with record(groups=...) and History.from_state."
        )

    dtype = shape


def named_rows(names: Sequence[str | Sequence[str]], kind: str) -> tuple[Row, ...]:
    """The rows of leaves, or of layers, of which only the paths are known."""
    _checks.one_of("History", ("leaf", "layer"), rows=kind)
    found = []
    for name in names:
        keys = tuple(name.split("/")) if isinstance(name, str) else tuple(name)
        called = "/".join(keys)
        above = () if called == ROOT else keys
        paths = [keys] if kind == "leaf" else [(*above, leaf) for leaf in UNKNOWN]
        found.append(Row(called, tuple(map(Source, paths))))
    return tuple(found)


def rows_of(groups: Groups, tree: PyTree) -> tuple[tuple[Row, ...], Table]:
    """The rows that a grouping makes of a tree, and their table."""
    part = partition(groups, tree)
    keys = [leaf.keys for leaf in named_leaves(tree, groups.names)]
    sources: list[list[Source]] = [[] for _ in part.table.names]
    index: list[tuple[int, ...]] = [()] * len(sources)
    for own, place, leaf in zip(keys, part.places, part.leaves, strict=True):
        if place is None or not place.measured:
            continue
        shape = tuple(leaf.shape)
        for k, at in enumerate(np.ndindex(*(shape[axis] for axis in place.axes))):
            sources[place.first + k].append(Source(own, shape, place.axes))
            index[place.first + k] = at
    rows = zip(part.table.names, sources, index, strict=True)
    return tuple(Row(name, tuple(own), at) for name, own, at in rows), part.table


def regroup(rows: Sequence[Row], sizes: Float[np.ndarray, " rows"] | None, groups: Groups) -> Regrouped:
    """Puts rows together as a grouping of their tree would have.

    Args:
      rows: what was recorded.
      sizes: how many entries each has; None if that is not known.
      groups: the grouping. Its `names=` are not looked at: rows have theirs.

    Raises:
      ValueError: if it divides what was recorded as one, or needs shapes that are not known.
    """
    sources = dict.fromkeys(source for row in rows for source in row.sources)
    leaves = [
        Leaf("/".join(s.keys), s.keys, _Shapeless() if s.shape is None else _abstract(s.shape))
        for s in sources
    ]
    members = list(groups.assign(leaves))
    shapes = row_shapes(leaves, members)
    of = dict(zip(sources, members, strict=True))
    # Refuses groups finer than the recording before their rows, which may be any number, are listed.
    found = [_place(row, of) for row in rows]
    spans, names = {}, []
    for group in sorted(shapes, key=_paths.natural):
        spans[group] = len(names), int(np.prod(shapes[group], dtype=int))
        names += row_names(group, shapes[group])
    where = {name: k for k, name in enumerate(names)}
    place, measured, scaled = np.full(len(rows), -1), np.zeros(len(rows), bool), np.zeros(len(rows), bool)
    for k, (name, member) in enumerate(found):
        if member is not None:
            place[k], measured[k], scaled[k] = where[name], member.measured, member.scaled
    known = np.full(len(rows), np.nan) if sizes is None else sizes
    counted = measured & (place >= 0)
    total = np.bincount(place[counted], known[counted], len(names)).astype(float)
    return Regrouped(
        Table(tuple(names), total, spans), _rows(names, rows, place, measured, of), place, measured, scaled
    )


def check_whole(rows: Sequence[Row], found: Regrouped) -> None:
    """Raises if parts of a leaf are put together: its singular values are not those of its parts."""
    for row, place in zip(rows, found.place, strict=True):
        if row.at and place >= 0 and found.rows[place].at != row.at:
            raise ValueError(
                f"History: these groups put {row.name!r} together with other parts of its leaf, whose "
                "singular values cannot be had from those of parts. Record with the groups that you want."
            )


def _abstract(shape: tuple[int, ...]) -> Any:
    return jax.ShapeDtypeStruct(shape, np.float32)


def _place(row: Row, of: dict[Source, Member | None]) -> tuple[str, Member | None]:
    """The name of the group that a row belongs to, and how; every leaf of the row must be in it alike."""
    found: dict[Any, Source] = {}
    for source in row.sources:
        member = of[source]
        if member is None:
            found.setdefault(("", None), source)
            continue
        strange = [axis for axis in member.rows if axis not in source.axes]
        if strange:
            raise ValueError(
                f"History: these groups have a norm for each index of axis {strange[0]} of leaf "
                f"{'/'.join(source.keys)!r}; row {row.name!r} was recorded as one. Make the recording with "
                "record(groups=...) of these groups or finer ones."
            )
        at = [row.at[source.axes.index(axis)] for axis in member.rows]
        name = f"{member.group}[{','.join(map(str, at))}]" if at else member.group
        found.setdefault((name, member._replace(rows=())), source)
    if len(found) > 1 and row.sources[0].keys[-1:] in [(leaf,) for leaf in UNKNOWN]:
        raise ValueError(
            f"History: these groups divide row {row.name!r}, a layer whose leaves were not logged. Pass "
            "groups.layer() or coarser groups."
        )
    if len(found) > 1:
        groups = ", ".join(f"{'/'.join(s.keys)!r} to {name or None!r}" for (name, _), s in found.items())
        raise ValueError(
            f"History: these groups divide row {row.name!r}, which was recorded as one: leaf {groups}. Make "
            "the recording with record(groups=...) of these groups or finer ones."
        )
    return next(iter(found))


def _rows(
    names: Sequence[str],
    rows: Sequence[Row],
    place: np.ndarray,
    measured: np.ndarray,
    of: dict[Source, Member | None],
) -> tuple[Row, ...]:
    """The groups, as rows of the leaves that were measured."""
    sources: list[dict[Source, None]] = [{} for _ in names]
    index: list[tuple[int, ...]] = [()] * len(names)
    for row, at, counts in zip(rows, place, measured, strict=True):
        for source in row.sources if counts else ():
            member = of[source]
            axes = () if member is None else member.rows
            sources[at][source._replace(axes=axes)] = None
            index[at] = tuple(row.at[source.axes.index(axis)] for axis in axes)
    return tuple(Row(n, tuple(own), i) for n, own, i in zip(names, sources, index, strict=True))


def norm_called(name: str) -> Norm:
    """The norm of a name: `l2`, `l1`, `linf`, `rms`, `spectral` or `lp(3.0)`."""
    if name in ("l2", "l1", "linf", "rms", "spectral"):
        return getattr(_norms, name)()
    order = re.fullmatch(r"lp\((\d+(?:\.\d+)?)\)", name)
    if order:
        return _norms.lp(float(order[1]))
    raise ValueError(f"History: there is no norm {name!r}. Pass l2, l1, linf, rms, spectral or lp(p).")


def name_of(norm: Norm) -> str:
    """The name of one of the norms of `optaxclip.norms`."""
    _checks.spec("History", Norm, norm=norm)
    for name in ("l2", "l1", "linf", "rms"):
        if norm == norm_called(name):
            return name
    if norm.shaped and norm.combine == "max":
        return "spectral"
    # A whole order is kept as an integer, and `lp` makes a norm of its own for 3 and for 3.0.
    if norm.degree >= 1 and norm in (_norms.lp(norm.degree), _norms.lp(float(norm.degree))):
        return f"lp({float(norm.degree)})"
    raise ValueError("History: the norm is none of optaxclip.norms, and has no name. Record one of these.")


def put_together(
    norms: Float[np.ndarray, "steps rows"],
    sizes: Float[np.ndarray, " rows"] | None,
    place: Int[np.ndarray, " rows"],
    count: int,
    norm: str,
) -> Float[np.ndarray, "steps groups"]:
    """The norms of groups from those of their rows, in float64; NaN and infinity stay what they are.

    Args:
      norms: the norms of the rows.
      sizes: how many entries each has; read for `rms` alone.
      place: the group of each row; -1 for those that do not count.
      count: how many groups there are.
      norm: what the norms are.
    """
    order, rows = norm_called(norm).degree, np.flatnonzero(place >= 0)
    rows = rows[np.argsort(place[rows], kind="stable")]
    found = np.zeros((len(norms), count))
    if not len(rows):
        return found
    groups, first, members = np.unique(place[rows], return_index=True, return_counts=True)
    own = norms[:, rows]
    if norm_called(norm).combine == "max":
        found[:, groups] = np.maximum.reduceat(own, first, axis=1)
        return found
    # What is divided by the largest and raised to a power neither overflows nor vanishes.
    largest = np.maximum.reduceat(np.where(np.isfinite(own), own, 0), first, axis=1)
    scale = np.where(largest > 0, largest, 1)
    powers = (own / np.repeat(scale, members, axis=1)) ** order
    if norm == "rms":
        assert sizes is not None
        powers *= sizes[rows] / np.repeat(np.add.reduceat(sizes[rows], first), members)
    found[:, groups] = scale * np.add.reduceat(powers, first, axis=1) ** (1 / order)
    return found
